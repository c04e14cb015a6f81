"""Memory, traffic and least time of a training step on a mesh of devices, on paper."""
