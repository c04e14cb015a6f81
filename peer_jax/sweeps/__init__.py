"""A sweep as data, its plan, the worker processes that train its runs, and the display of their progress."""
