"""Bad indices and NaN scores: they give NaN by default and an error in checked mode; nothing is clipped in silence."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with the ops' checks switched on: it runs slower, and raises where a check fails.

    Outside of ``checked`` the checks cost nothing. JAX drops them if the gradient is taken of a ``lax.scan`` whose body
    has an op. It keeps them if the gradient is taken inside the scan, as in the trainer's gradient accumulation.

    Raises:
        InputError: when called, if an index is outside its table or a score is NaN; the message names the op.
    """
    functional = jax.jit(checkify.checkify(function, errors=checkify.user_checks))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        error, result = functional(*args, **kwargs)
        if message := error.get():
            raise InputError(message.removesuffix(" (`check` failed)"))
        return result

    return call


def check_arrays(op: str, integer: bool = False, **arrays: tuple[Array, str]) -> None:
    """Raises an InputError unless each array has the axes that are named beside it, and numbers of the right kind.

    Args:
        op: the name of the op.
        integer: whether the arrays must hold integers, and floating-point numbers otherwise.
        **arrays: each with its axes, such as "N d"; "*tokens" stands for any number of axes.
    """
    kind, wanted = (jnp.integer, "integers") if integer else (jnp.floating, "floating-point numbers")
    for name, (array, axes) in arrays.items():
        if not isinstance(array, jax.Array | np.ndarray):
            raise InputError(f"{op}: {name} must be an array [{', '.join(axes.split())}], not {type(array).__name__}")
        if not jnp.issubdtype(array.dtype, kind):
            raise InputError(f"{op}: {name} is {array.dtype}, but must hold {wanted}")
        named = [axis for axis in axes.split() if not axis.startswith("*")]
        if array.ndim < len(named) or (array.ndim > len(named) and "*" not in axes):
            raise InputError(f"{op}: {name} must have the shape [{', '.join(axes.split())}], not {list(array.shape)}")


def check_pairs(op: str, tokens: tuple[int, ...], indices: Int[Array, "..."], gates: Float[Array, "..."]) -> None:
    """Raises an InputError unless indices and gates both have the shape [*tokens, h, k]."""
    if indices.ndim != len(tokens) + 2 or indices.shape[:-2] != tokens or gates.shape != indices.shape:
        raise InputError(
            f"{op}: indices {indices.shape} and gates {gates.shape} must both be [*tokens, h, k], tokens being {tokens}"
        )


def check_indices(op: str, indices: Int[Array, "..."], size: int) -> None:
    """In checked mode, raises an error if an index is not in [0, size)."""
    checkify.debug_check(
        jnp.all((indices >= 0) & (indices < size)),
        op + ": indices run from {low} to {high}, but the table has rows 0 to {last}",
        low=jnp.min(indices, initial=0),
        high=jnp.max(indices, initial=0),
        last=jnp.asarray(size - 1),
    )


def check_room(op: str, enough: Bool[Array, ""]) -> None:
    """In checked mode, raises an error if a batch touches more rows of a table than there is room for."""
    checkify.debug_check(
        enough, op + ": a batch touches more rows of a table than there is room for: raise AdamW.touched_share"
    )


def check_not_nan(op: str, scores: Float[Array, "..."]) -> None:
    """In checked mode, raises an error if a score is NaN."""
    count = jnp.sum(jnp.isnan(scores))
    checkify.debug_check(count == 0, op + ": {count} scores are NaN; look for NaN in the queries or keys", count=count)


def drop_invalid(
    gates: Float[Array, "*tokens h k"], indices: Int[Array, "*tokens h k"], size: int
) -> tuple[Float[Array, "*tokens h k"], Int[Array, "*tokens h k"], Bool[Array, "*tokens"]]:
    """Replaces out-of-range indices by 0 and their gates by 0. Also returns which tokens had only valid indices.

    The caller makes the outputs of all other tokens NaN. A bad index gives no row of the table a gradient.
    """
    valid = (indices >= 0) & (indices < size)
    return jnp.where(valid, gates, 0.0), jnp.where(valid, indices, 0), jnp.all(valid, axis=(-2, -1))
