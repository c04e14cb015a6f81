"""What the parts share: the ops by the name of their implementation, random inputs, and rows of the printed table."""

import functools
import json
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from peer_jax.ops import expert_mix, mosaic_gpu, value_bag

SMOKE = "--smoke" in sys.argv
TOP_K = 16


def emit(
    part: str, case: str, implementation: str, what: str, result: str, target: str = "", verdict: str = "", **more
):
    """Prints a row at once, so that no row is lost if the process is stopped."""
    row = {"part": part, "case": case, "implementation": implementation, "what": what, "result": result}
    print(json.dumps(row | {"target": target, "verdict": verdict} | more), flush=True)


def emit_error(part: str, case: str, implementation: str, what: str, error: Exception) -> None:
    """Prints a row that says what went wrong, in one line."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    emit(part, case, implementation, what, lines[0][:160], "runs", "FAIL")


def verdict(passed: bool) -> str:
    return "pass" if passed else "FAIL"


def mix_by(implementation: str) -> Callable[..., Array]:
    """``mix(x, down, up, gates, indices)`` with gelu; indices and gates are [t, r].

    The kernels are called directly, because the op falls back to another implementation where they can't run.
    """
    if implementation == "mosaic_gpu":
        interpret = jax.default_backend() == "cpu"
        return lambda x, down, up, gates, indices: mosaic_gpu.expert_mix(
            x, down, up, indices, gates, jax.nn.gelu, interpret=interpret
        )
    call = functools.partial(expert_mix, activation=jax.nn.gelu, implementation=implementation)
    return lambda x, down, up, gates, indices: call(x, down, up, indices[:, None], gates[:, None])


def bag_by(implementation: str) -> Callable[..., Array]:
    """``bag(values, gates, indices)``; see ``mix_by``."""
    if implementation == "mosaic_gpu":
        interpret = jax.default_backend() == "cpu"
        return lambda values, gates, indices: mosaic_gpu.value_bag(values, indices, gates, interpret=interpret)
    return lambda values, gates, indices: value_bag(
        values, indices[:, None], gates[:, None], implementation=implementation
    )


def both(function: Callable[..., Array]) -> Callable[..., tuple]:
    """``function`` and the gradients of all but its last argument: (*primals, indices, dy) -> y, gradients."""

    def run(*arguments):
        *primals, indices, dy = arguments
        y, pullback = jax.vjp(lambda *primals: function(*primals, indices), *primals)
        return y, pullback(dy)

    return run


@functools.partial(jax.jit, static_argnames=("t", "d", "N", "r", "dtype", "rows"))
def draw(t: int, d: int, N: int, r: int, dtype: str, rows: str, hot: Array) -> tuple[Array, ...]:
    """x, down, up, gates, indices, dy. A share ``hot`` of the indices is N // 2; the others are uniform."""
    key = iter(jax.random.split(jax.random.key(0), 7))
    x, dy = (jax.random.normal(next(key), (t, d), dtype) for _ in range(2))
    down, up = (draw_table(next(key), N, d, rows) for _ in range(2))
    gates = jax.nn.softmax(jax.random.normal(next(key), (t, r)), axis=-1).astype(dtype)
    indices = jax.random.randint(next(key), (t, r), 0, N, jnp.int32)
    indices = jnp.where(jax.random.uniform(next(key), (t, r)) < hot, N // 2, indices)
    return x, down, up, gates, indices, dy


def draw_table(key: Array, N: int, d: int, dtype: str) -> Array:
    """Random rows of norm 1; those of a table too large for JAX's generator repeat, with other signs."""
    if N * d < 2**31:
        return jax.random.normal(key, (N, d), dtype) * d**-0.5
    first = jax.random.normal(key, (1024, d), dtype) * d**-0.5
    number = jax.lax.broadcasted_iota(jnp.uint32, (N // 1024, 1024, d), 0)
    column = jax.lax.broadcasted_iota(jnp.uint32, (N // 1024, 1024, d), 2)
    sign = 1 - 2 * ((number * (2 * column + 1) * jnp.uint32(0x9E3779B1)) >> 31).astype(jnp.int32)
    return (first[None] * sign.astype(dtype)).reshape(N, d)
