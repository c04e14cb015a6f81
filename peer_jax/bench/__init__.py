"""Benchmarks of the ops, the layers and the training step against their floors, one another and PyTorch."""

from peer_jax.bench.measure import Options, run

__all__ = ["Options", "run"]
