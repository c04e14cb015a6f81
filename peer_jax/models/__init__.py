"""The models that the layers plug into: a decoder-only transformer of text, and a vision transformer."""

from peer_jax.models.generate import generate
from peer_jax.models.model import Model
from peer_jax.models.transformer import Transformer
from peer_jax.models.vit import ViT

__all__ = ["Model", "Transformer", "ViT", "generate"]
