"""The linear map that layers are made of."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float

from peer_jax.layers.checks import initial
from peer_jax.sharding import split_of


class Linear(nnx.Linear):
    """``nnx.Linear`` without a bias, which computes in the type of its input unless ``dtype`` names another.

    On a mesh with explicit axes, the output is split as the input is, but whole along its last axis.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        axes: logical names of the kernel's axes, see ``peer_jax.sharding``; None for an axis, or a kernel, that is not
            split.
        dtype: type of the computation and the output; the type of ``x`` if None.
        param_dtype: type of the kernel.
        kernel_init: initialiser of the kernel.
        rngs: random numbers for the kernel.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None] | None,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        kernel_init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            d_in,
            d_out,
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=functools.partial(initial, kernel_init),
            kernel_metadata={} if axes is None else {"axes": axes},
            promote_dtype=_in_type_of_first,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*tokens i"]) -> Float[Array, "*tokens o"]:
        return super().__call__(x, out_sharding=split_of(x, x.ndim - 1))


def _in_type_of_first(arrays: Sequence[jax.Array | None], *, dtype: Dtype | None = None) -> list[jax.Array | None]:
    dtype = arrays[0].dtype if dtype is None else jnp.dtype(dtype)
    return [None if array is None else array.astype(dtype) for array in arrays]
