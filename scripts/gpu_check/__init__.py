"""Checks and times the ops on a GPU; `__main__` runs the parts, each in a process of its own."""
