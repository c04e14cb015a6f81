"""Feed-forward layers that plug into a transformer block: ``y, aux = layer(x)``, x [batch, seq, d_model]."""

from peer_jax.layers.dense import Dense
from peer_jax.layers.interface import Aux, Routing
from peer_jax.layers.moe import MoE
from peer_jax.layers.peer import PEER
from peer_jax.layers.pkm import PKM

__all__ = ["PEER", "PKM", "Aux", "Dense", "MoE", "Routing"]
