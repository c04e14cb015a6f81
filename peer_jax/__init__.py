"""PEER and its peers: very fine-grained mixtures of experts for decoder-only language models, in JAX."""

__version__ = "0.1.0"
