"""Checks of what a caller gives to a layer: each error is one sentence that names the value and what to do."""

import inspect
import math
import numbers
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float

from peer_jax import memory
from peer_jax.errors import InputError


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """An InputError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str | None) or value not in list(choices):
        raise InputError(f"{name}={value!r} is not one of {', '.join(repr(c) for c in choices)}")


def check_number(**values: object) -> None:
    """An InputError unless every value is a finite number."""
    for name, value in values.items():
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{name}={value!r} must be a finite number")


def check_positive(**values: object) -> None:
    """An InputError unless every value is a finite number above zero."""
    for name, value in values.items():
        check_number(**{name: value})
        if not value > 0:
            raise InputError(f"{name}={value} must be above zero")


def check_sizes(**sizes: object) -> None:
    """An InputError unless every size is a whole number above zero."""
    for name, value in sizes.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise InputError(f"{name}={value!r} must be a whole number above zero, such as 16")
        check_positive(**{name: value})


def check_flag(**flags: object) -> None:
    """An InputError unless every value is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{name}={value!r} must be True or False")


def check_function(**functions: object) -> None:
    """An InputError unless every value can be called."""
    for name, value in functions.items():
        if not callable(value):
            raise InputError(f"{name}={value!r} must be a function")


def check_dtype(**types: object) -> None:
    """An InputError unless every value is a floating-point type of 16 bits or more: 8 bits overflow in sums."""
    for name, value in types.items():
        try:
            kind = jnp.dtype(value)  # NumPy would take None for float64
            known = value is not None and jnp.issubdtype(kind, jnp.floating) and kind.itemsize >= 2
        except TypeError:
            known = False
        if not known:
            raise InputError(
                f"{name}={value!r} is not a floating-point type of 16 bits or more: try float32 or bfloat16"
            )


def check_layer(dtype: object, param_dtype: object, rngs: object, **initialisers: object) -> None:
    """An InputError unless these are what the arguments of these names of every layer must be."""
    check_dtype(param_dtype=param_dtype, **({} if dtype is None else {"dtype": dtype}))
    check_function(**initialisers)
    if not isinstance(rngs, nnx.Rngs):
        raise InputError(
            f"rngs={' '.join(repr(rngs).split())} must be random numbers of Flax, such as flax.nnx.Rngs(0)"
        )
    if "params" not in rngs and "default" not in rngs:
        raise InputError("rngs has no stream 'params' or 'default': make it as flax.nnx.Rngs(0)")


def initial(
    initialiser: Initializer, key: Array, shape: tuple[int, ...], dtype: Dtype, **kwargs: object
) -> Float[Array, "..."]:
    """What an initialiser makes.

    Raises:
        InputError: if it does not take (key, shape, dtype), or makes no array of that shape.
    """
    try:
        inspect.signature(initialiser).bind(key, shape, dtype, **kwargs)
    except (TypeError, ValueError):  # ValueError: Python knows no signature, as of its own dict
        raise InputError(f"the initialiser {initialiser!r} must be a function of (key, shape, dtype)") from None
    array = initialiser(key, shape, dtype, **kwargs)
    if (found := getattr(array, "shape", None)) != shape:
        what = type(array).__name__ if found is None else f"an array of the shape {list(found)}"
        raise InputError(f"the initialiser {initialiser!r} must make an array of the shape {list(shape)}, not {what}")
    return array


def is_tracing() -> bool:
    """Whether JAX is tracing, as within ``jax.jit`` or ``nnx.eval_shape``, so that no arrays are made."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def check_memory(what: str, num_params: int, param_dtype: Dtype, **sizes: int) -> None:
    """An InputError if a device has too little memory for so many parameters.

    While JAX traces, nothing is checked: the arrays may be split over many devices, or never be made.

    Args:
        what: the name of what has these parameters.
        num_params: their number.
        param_dtype: their type.
        **sizes: the arguments that the message names.
    """
    if not is_tracing():
        shown = ", ".join(f"{name}={value}" for name, value in sizes.items())
        memory.check(
            num_params * jnp.dtype(param_dtype).itemsize,
            f"{what} with {shown}, which has {num_params:.3g} parameters,",
            "choose smaller sizes, or make the model within jax.jit, split over devices",
        )


def real_tokens(
    layer: str,
    x: Float[Array, "*tokens d"],
    mask: Bool[Array, "*tokens"] | None,
    d_model: int,
    *,
    in_sequences: bool = False,
) -> tuple[Float[Array, "*tokens d"], Bool[Array, "*tokens"] | None]:
    """Both as arrays, ``x`` with zeros where ``mask`` is False: what padding holds, even NaN, then reaches nothing.

    Args:
        layer: the name of the layer that x is given to.
        x: vectors of the tokens, with any leading axes.
        mask: True for real tokens.
        d_model: the layer's width.
        in_sequences: whether x must have an axis of the sequence.

    Raises:
        InputError: if shapes or types don't fit the layer.
    """
    wanted = f"[..., seq, {d_model}]" if in_sequences else f"[..., {d_model}]"
    try:
        x = jnp.asarray(x)
        mask = None if mask is None else jnp.asarray(mask)
    except (TypeError, ValueError):
        raise InputError(
            f"{layer} takes arrays: x of shape {wanted} and its mask, not {type(x).__name__} and {type(mask).__name__}"
        ) from None
    if x.ndim < 1 + in_sequences or x.shape[-1] != d_model:
        raise InputError(f"{layer} has d_model={d_model}, so x must have the shape {wanted}, not {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"{layer} takes vectors of floating-point numbers, but x is {x.dtype}: embed or cast it first")
    if mask is None:
        return x, None
    if mask.dtype != bool:
        raise InputError(f"mask is {mask.dtype}, but {layer} takes bools, True for real tokens: pass mask > 0")
    if mask.shape != x.shape[:-1]:
        raise InputError(
            f"mask has the shape {list(mask.shape)}, but x {list(x.shape)} has {list(x.shape[:-1])} tokens"
        )
    return jnp.where(mask[..., None], x, jnp.zeros((), x.dtype)), mask
