"""What every feed-forward layer has in common."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError


class Aux(NamedTuple):
    """What a layer returns beside its output.

    ``loss`` is added to the training loss as it is; ``metrics`` are scalars to log.
    """

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


class Routing(NamedTuple):
    """The experts of each token and their weights. A weight of zero is an expert that isn't used."""

    indices: Int[Array, "b s h k"]
    gates: Float[Array, "b s h k"]


class Table(nnx.Param):
    """A parameter whose rows are retrieved, [N, d]; the optimiser treats it apart from the backbone."""


# Logical axes of a table, by which ``peer_jax.sharding`` places it.
TABLE_AXES = ("rows", "columns")


class FeedForward(nnx.Module):
    """A layer that takes a transformer's feed-forward slot.

    ``is_causal`` is False where a token's output can depend on later tokens. ``mixes_tokens`` is True where, at
    evaluation, it depends on other tokens at all: such a layer can't be run a token at a time with a cache.
    ``variant`` tells apart what reports should not confuse.

    Modules start in training mode; ``.eval()`` and ``.train()`` switch.
    """

    is_causal: bool = True
    mixes_tokens: bool = False
    is_baseline: bool = False
    num_experts: int | None = None
    variant: str | None = None

    @property
    def name(self) -> str:
        """The name of the layer's class."""
        return type(self).__name__

    @property
    def label(self) -> str:
        """What reports call a model with this layer: its name, and the options that differ from the defaults."""
        return self.name if self.variant is None else f"{self.name} ({self.variant})"

    def options(self) -> dict[str, object]:
        """Options of the constructor that differ from their defaults, by name."""
        return {}

    @property
    def routes(self) -> bool:
        """Whether the layer routes tokens to experts, and so has ``route`` and ``num_experts``."""
        return hasattr(self, "route")

    def __call__(self, x: Float[Array, "b s d"], mask: Bool[Array, "b s"] | None = None) -> tuple[Array, Aux]:
        """Output and auxiliary loss. ``mask`` is True for real tokens; others touch neither statistics nor losses."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs a token in a sequence of ``seq_len`` tokens; a multiply-add counts 2."""
        raise NotImplementedError

    def num_params(self) -> int:
        """All parameters of the layer."""
        return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def num_active_params(self) -> int:
        """The parameters that one token uses."""
        return self.num_params()


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
GATED_ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}


def check_choice(name: str, value: object, choices: object) -> None:
    """An InputError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is not one of {', '.join(repr(c) for c in choices)}")


def check_positive(**sizes: float) -> None:
    """An InputError unless every size is above zero."""
    for name, value in sizes.items():
        if not value > 0:
            raise InputError(f"{name}={value} must be above zero")
