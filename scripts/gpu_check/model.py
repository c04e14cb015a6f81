"""Attention, retrieval and the whole layer: values against the plain form, and times.

python -m gpu_check.model attention [--smoke]    prints rows as lines of JSON
python -m gpu_check.model layer [--smoke]
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gpu_check.ops import SMOKE, TOP_K, emit, emit_error, verdict
from gpu_check.speed import seconds
from peer_jax.layers import PEER
from peer_jax.models.attention import Attention
from peer_jax.ops.top_k import by_groups, plain

# b, s, h, c: packed sequences of some documents each.
ATTENTION = [(2, 16, 2, 8)] if SMOKE else [(8, 1024, 16, 64), (64, 512, 4, 64), (4, 2048, 8, 128)]
# t, d, N of PEER, h = 8 and k = 16, as in the paper; gpu_check.pytorch has the same.
LAYER = (64, 64, 8**2) if SMOKE else (8192, 1024, 1024**2)
# n, m, k of the top k of columns: the halves' scores of 8192 tokens with 8 heads.
TOP = [(128, 64, 16)] if SMOKE else [(1024, 65536, 16), (512, 65536, 32), (256, 65536, 16)]
# Both round weights and outputs to bfloat16, at different places.
TOLERANCE = 2**-6


def name_of_layer() -> str:
    t, d, N = LAYER
    return f"PEER T={t} d={d} N={N} h=8 k={TOP_K}, bfloat16"


def attention() -> None:
    """The layer with each implementation, forward and with gradients of input and parameters."""
    plain_ones = {}
    for implementation in ("xla",) if SMOKE else ("xla", "cudnn"):
        for b, s, h, c in ATTENTION:
            case = f"attention b={b} s={s} h={h} c={c}, packed, bfloat16"
            try:
                layer = Attention(h * c, h, implementation=implementation, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
                graph, params = nnx.split(layer)
                keys = jax.random.split(jax.random.key(1), 3)
                x, dy = (jax.random.normal(key, (b, s, h * c), jnp.bfloat16) for key in keys[:2])
                segments = jnp.sort(jax.random.randint(keys[2], (b, s), 0, 4), axis=1)
                positions = jnp.broadcast_to(jnp.arange(s), (b, s))

                def forward(params, x, graph=graph, positions=positions, segments=segments):
                    return nnx.merge(graph, params)(x, positions, segments)[0]

                found = _time_both("attention", case, implementation, forward, (params, x), dy)
                _compare("attention", case, implementation, found, plain_ones.setdefault(case, found))
            except Exception as error:
                emit_error("attention", case, implementation, "time", error)


def layer() -> None:
    """PEER with parameters in bfloat16; and the top k of the halves' scores, which the layer needs twice."""
    t, d, N = LAYER
    case = name_of_layer()
    plain_ones = {}
    for implementation in ("xla", "mosaic_gpu"):
        try:
            build = functools.partial(PEER, d, N, top_k=TOP_K, implementation=implementation)
            graph, params, others = nnx.split(
                build(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), nnx.Param, ...
            )
            x, dy = (jax.random.normal(jax.random.key(key), (1, t, d), jnp.bfloat16) for key in (1, 2))

            def forward(params, x, graph=graph, others=others):
                return nnx.merge(graph, params, others, copy=True)(x)[0]

            found = _time_both("layer", case, implementation, forward, (params, x), dy)
            _compare("layer", case, implementation, found, plain_ones.setdefault(case, found))
        except Exception as error:
            emit_error("layer", case, implementation, "time", error)
    for n, m, k in TOP:
        case = f"top {k} of {n}, {m} columns"
        try:
            x = jax.random.normal(jax.random.key(0), (n, m))
            outs = {}
            for name, way in (("groups", by_groups), ("jax.lax.top_k", plain)):
                call = jax.jit(functools.partial(way, k=k))
                outs[name] = jax.device_get(call(x))
                taken = seconds(functools.partial(call, x))
                emit("top_k", case, name, "forward", f"{taken * 1e3:.3f} ms", seconds=taken)
            equal = all(map(np.array_equal, outs["groups"], outs["jax.lax.top_k"]))
            emit("top_k", case, "groups", "equals jax.lax.top_k", str(equal), "True", verdict(equal))
        except Exception as error:
            emit_error("top_k", case, "groups", "equals jax.lax.top_k", error)


def _compare(part: str, case: str, implementation: str, found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    """Prints a row with the largest difference of y and the gradients from those of "xla", relative to the largest."""
    if implementation != "xla":
        error = np.max([np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1) for a, b in zip(found, wanted, strict=True)])
        result, passed = f"{error:.1e} (largest of y and gradients)", verdict(error <= TOLERANCE)
        emit(part, case, implementation, "difference from xla", result, f"<= {TOLERANCE:.1e}", passed)


def _time_both(
    part: str, case: str, implementation: str, forward: Callable[..., Array], primals: tuple, dy: Array
) -> list[np.ndarray]:
    """Prints times and memory of the forward pass and of both; returns y and all gradients, of large ones a part."""

    def both(*arguments):
        y, pullback = jax.vjp(forward, *arguments[:-1])
        return y, pullback(arguments[-1])

    programs = {
        "forward": (jax.jit(forward).lower(*primals).compile(), primals),
        "forward + backward": (jax.jit(both).lower(*primals, dy).compile(), (*primals, dy)),
    }
    for what, (program, arguments) in programs.items():
        taken = seconds(functools.partial(program, *arguments))
        emit(part, case, implementation, what, f"{taken * 1e3:.3f} ms", seconds=taken)
        memory = program.memory_analysis().temp_size_in_bytes / 2**20
        emit("memory", case, implementation, f"{what}: temporary", f"{memory:.0f} MiB")
    program, arguments = programs["forward + backward"]
    y, gradients = program(*arguments)
    return [np.asarray(a.ravel()[: 2**24], np.float32) for a in (y, *jax.tree.leaves(gradients))]


if __name__ == "__main__":
    {"attention": attention, "layer": layer}[sys.argv[1]]()
