"""The decoder-only transformer that the layers plug into."""

from peer_jax.models.generate import generate
from peer_jax.models.transformer import Transformer

__all__ = ["Transformer", "generate"]
