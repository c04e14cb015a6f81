"""Retrieval and experts as pure functions on arrays; they import neither flax nor gin."""

from peer_jax.ops.checks import checked
from peer_jax.ops.choice import check_implementation
from peer_jax.ops.expert_mix import expert_mix
from peer_jax.ops.product_keys import product_key_top_k
from peer_jax.ops.value_bag import value_bag

__all__ = ["check_implementation", "checked", "expert_mix", "product_key_top_k", "value_bag"]
