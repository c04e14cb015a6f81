"""Feed-forward layers that plug into a transformer block: ``y, aux = layer(x)``, x [..., d_model]."""

import importlib
import inspect
import pkgutil

from peer_jax.layers.dense import Dense
from peer_jax.layers.interface import Aux, Benchmark, DeviceLoad, FeedForward, Routing
from peer_jax.layers.moe import MoE
from peer_jax.layers.mumoe import MuMoE
from peer_jax.layers.peer import PEER
from peer_jax.layers.pkm import PKM
from peer_jax.layers.soft_moe import SoftMoE

__all__ = [
    "PEER",
    "PKM",
    "Aux",
    "Benchmark",
    "Dense",
    "DeviceLoad",
    "FeedForward",
    "MoE",
    "MuMoE",
    "Routing",
    "SoftMoE",
    "families",
]


def families() -> dict[str, type[FeedForward]]:
    """The layer classes of this package by name: every class in one of its modules that defines ``__call__``."""
    found = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            is_layer = inspect.isclass(value) and issubclass(value, FeedForward) and value.__module__ == module.name
            if is_layer and value.__call__ is not FeedForward.__call__:
                found[name] = value
    return found
