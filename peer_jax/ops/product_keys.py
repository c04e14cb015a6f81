"""Exact top-k over the Cartesian product of two sets of sub-keys.

Source: Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv:1907.05242), section 3.1.

t  tokens          h  heads          n  sub-keys per half, N = n * n keys
c  d_key / 2       k  keys retrieved per head        p  min(k, n), candidates per half
"""

import functools
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from peer_jax.errors import InputError
from peer_jax.ops import sharded
from peer_jax.ops.checks import check_arrays, check_not_nan
from peer_jax.ops.choice import check_implementation
from peer_jax.ops.chunks import chunk_size, scan_chunks
from peer_jax.ops.cpu.product_keys import backward_by_rows
from peer_jax.ops.kept import keep
from peer_jax.ops.reverse_mode import explained, reverse_mode
from peer_jax.ops.rows import dot_rows
from peer_jax.ops.top_k import spread_columns, take_columns, top_k_columns
from peer_jax.sharding import automatic, split_of


def product_key_top_k(
    queries: Float[Array, "*tokens h d_key"],
    sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"],
    k: int,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*tokens h k"], Int[Array, "*tokens h k"]]:
    """The k highest of the N = n * n sums ``q1 . sub_keys[0, i1] + q2 . sub_keys[1, i2]``, and their ``i1 * n + i2``.

    q1 and q2 are the halves of a query. The result is exact: a key outside the best k of either half is beaten by k
    others. Scores and sums are float32 whatever the inputs are. Highest first; equal scores of a half rank by lower
    index, equal sums by the rank of the first half, then of the second. Scores are differentiable in queries and
    sub-keys. Forward-mode derivatives (``jax.jvp``, ``jax.jacfwd``) need ``"reference"``.

    Args:
        queries: one query per token and head; ``d_key = 2 * c``.
        sub_keys: one set that all heads share, or one set per head.
        k: keys to retrieve, 1 <= k <= N.
        implementation: ``"reference"``: plain products and top-k, which hold the scores of all sub-keys; ``"xla"``:
            chunks of tokens, and a backward pass of its own. ``"mosaic_gpu"`` and None mean ``"xla"`` here.

    Returns:
        Scores (float32) and indices (int32) of the retrieved keys.

    Raises:
        InputError: if sizes don't fit, or the implementation is unknown; under ``checked``, also if a score is NaN.
            Without ``checked``, a NaN query gives NaN scores.
    """
    axes = "h 2 n c" if getattr(sub_keys, "ndim", 3) == 4 else "2 n c"
    check_arrays("product_key_top_k", queries=(queries, "*tokens h d_key"), sub_keys=(sub_keys, axes))
    if sub_keys.shape[-3] != 2:
        raise InputError(f"product_key_top_k: sub_keys must be two sets, [{axes}], not {list(sub_keys.shape)}")
    if not isinstance(k, numbers.Integral) or isinstance(k, bool):
        raise InputError(f"product_key_top_k: k={k!r} must be a whole number")
    n, half = sub_keys.shape[-2:]
    if queries.shape[-1] != 2 * half:
        raise InputError(f"queries have d_key={queries.shape[-1]}, but sub_keys of width {half} need {2 * half}")
    if not 1 <= k <= n * n:
        raise InputError(f"k={k} keys can't be retrieved from {n}^2 = {n * n}: choose 1 <= k <= {n * n}")
    if n * n > 2**31:
        raise InputError(f"{n}^2 keys are more than int32 counts, 2^31: choose n <= 46340")
    if sub_keys.ndim == 4 and sub_keys.shape[0] != queries.shape[-2]:
        raise InputError(f"sub_keys are for {sub_keys.shape[0]} heads, but queries have {queries.shape[-2]}")
    check_implementation(implementation)

    *tokens, h, d_key = queries.shape
    if not math.prod((*tokens, h)):
        return jnp.zeros((*tokens, h, k), jnp.float32), jnp.zeros((*tokens, h, k), jnp.int32)
    retrieve = _reference if implementation == "reference" else _xla
    if implementation != "reference":
        queries, sub_keys = (reverse_mode("product_key_top_k", a) for a in (queries, sub_keys))

    def of_all_tokens(queries: Array, sub_keys: Array) -> tuple[Array, Array]:
        found = sharded.by_tokens(
            lambda sub_keys, queries: retrieve(queries, sub_keys, k), (sub_keys,), (queries.reshape(-1, h, d_key),)
        )
        return tuple(a.reshape(*tokens, h, k) for a in found)

    with explained("product_key_top_k"):
        scores, indices = automatic(of_all_tokens, split_of(queries, len(tokens)))(queries, sub_keys)
    check_not_nan("product_key_top_k", scores)
    return scores, indices


def _combine(
    best1: Float[Array, "p m"],
    index1: Int[Array, "p m"],
    best2: Float[Array, "p m"],
    index2: Int[Array, "p m"],
    n: int,
    k: int,
) -> tuple[Float[Array, "k m"], Int[Array, "k m"]]:
    """Top k of the sums of two halves' candidates, and the keys that they belong to; one column per query.

    The pair of ranks (a, b), counted from 1, comes after the a * b - 1 other pairs of ranks up to a and up to b, so
    only pairs with a * b <= k can be among the best k: 50 of 256 for k = 16, 119 of 1024 for k = 32.
    """
    ranks = range(1, best1.shape[0] + 1)  # by the first rank, then by the second: so equal sums rank
    sums = jnp.concatenate([best1[a - 1 : a] + best2[: k // a] for a in ranks])
    keys = jnp.concatenate([index1[a - 1 : a] * n + index2[: k // a] for a in ranks])
    scores, pair = top_k_columns(sums, k)
    return scores, take_columns(keys, pair)


def _reference(
    queries: Float[Array, "t h d_key"], sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"], k: int
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    t, h, d_key = queries.shape
    n = sub_keys.shape[-2]
    p = min(k, n)
    keys = jnp.broadcast_to(sub_keys, (h, 2, n, d_key // 2)).astype(jnp.float32)
    halves = queries.reshape(t, h, 2, d_key // 2).astype(jnp.float32)
    best, index = jax.lax.top_k(jnp.einsum("thsc,hsnc->thsn", halves, keys, precision=jax.lax.Precision.HIGHEST), p)
    sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]
    scores, pair = jax.lax.top_k(sums.reshape(t, h, p * p), k)
    i1 = jnp.take_along_axis(index[:, :, 0], pair // p, axis=-1)
    i2 = jnp.take_along_axis(index[:, :, 1], pair % p, axis=-1)
    return scores, i1 * n + i2


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _retrieve(
    queries: Float[Array, "t h d_key"], sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"], k: int
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    t, h, _ = queries.shape
    n, c = sub_keys.shape[-2:]
    keys = sub_keys.reshape(-1, 2, n, c).astype(jnp.float32)

    def body(_: None, chunk: Float[Array, "s h d_key"]) -> tuple[None, tuple[Array, Array]]:
        grouped = _group(chunk.astype(jnp.float32), keys.shape[0])
        candidates = [
            top_k_columns(_half_scores(grouped[..., half * c : (half + 1) * c], keys[:, half]), min(k, n))
            for half in (0, 1)
        ]
        scores, indices = _combine(*candidates[0], *candidates[1], n, k)
        return None, (_ungroup(scores.T, keys.shape[0], h), _ungroup(indices.T, keys.shape[0], h))

    _, out = scan_chunks(body, None, queries, t, chunk_size(t, 4 * h * n))
    return out


def _group(x: Shaped[Array, "s h q"], g: int) -> Shaped[Array, "{g} m q"]:
    """The queries of each of g sets of sub-keys: one set for all heads, or one per head; m = s * h / g."""
    s, h, q = x.shape
    return x.reshape(1, s * h, q) if g == 1 else jnp.moveaxis(x, 1, 0)


def _ungroup(x: Shaped[Array, "gm q"], g: int, h: int) -> Shaped[Array, "s {h} q"]:
    """The inverse of ``_group``."""
    q = x.shape[-1]
    return x.reshape(-1, h, q) if g == 1 else jnp.moveaxis(x.reshape(h, -1, q), 0, 1)


def _half_scores(queries: Float[Array, "g m c"], keys: Float[Array, "g n c"]) -> Float[Array, "n gm"]:
    """Scores of one half, one column per query."""
    scores = jnp.einsum("gnc,gmc->ngm", keys, queries, precision=jax.lax.Precision.HIGHEST)
    return scores.reshape(keys.shape[1], -1)


@_retrieve.defjvp
def _retrieve_jvp(k, primals, tangents):
    """The derivative of a score, which is a product of a query and its sub-keys; indices have none."""
    (queries, sub_keys), (d_queries, d_sub_keys) = primals, tangents
    scores, indices = _retrieve(queries, sub_keys, k)
    d_scores = _scores_of(d_queries, sub_keys, indices) + _scores_of(queries, d_sub_keys, indices)
    return (scores, indices), (d_scores, np.zeros(indices.shape, jax.dtypes.float0))


def _scores_of(
    queries: Float[Array, "t h d_key"],
    sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"],
    indices: Int[Array, "t h k"],
) -> Float[Array, "t h k"]:
    """Scores of the keys that ``indices`` name."""
    t, h, k = indices.shape
    n, c = sub_keys.shape[-2:]
    keys = sub_keys.reshape(-1, 2, n, c).astype(jnp.float32)
    queries = queries.astype(jnp.float32).reshape(t * h, 2, c)
    first = n * jnp.minimum(jnp.arange(h, dtype=jnp.int32), keys.shape[0] - 1)[None, :, None]
    halves = (
        dot_rows(queries[:, half], keys[:, half].reshape(-1, c), (first + index).reshape(t * h, k))
        for half, index in enumerate((indices // n, indices % n))
    )
    return sum(halves).reshape(t, h, k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _xla(
    queries: Float[Array, "t h d_key"], sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"], k: int
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    return _retrieve(queries, sub_keys, k)


def _xla_forward(queries, sub_keys, k):
    scores, indices = keep(_retrieve(queries, sub_keys, k))
    return (scores, indices), (queries, sub_keys, indices)


def _xla_backward(k, residuals, cotangents):
    """A retrieved score is linear in its query and its two sub-keys; keys that were not retrieved get no gradient."""
    queries, sub_keys, indices = residuals
    d_queries, d_keys = jax.lax.platform_dependent(
        queries.astype(jnp.float32),
        sub_keys.reshape(-1, *sub_keys.shape[-3:]).astype(jnp.float32),
        indices,
        cotangents[0],
        cpu=backward_by_rows,
        default=_backward_by_products,
    )
    return d_queries.astype(queries.dtype), d_keys.reshape(sub_keys.shape).astype(sub_keys.dtype)


def _backward_by_products(
    queries: Float[Array, "t h d_key"],
    keys: Float[Array, "g 2 n c"],
    indices: Int[Array, "t h k"],
    d_scores: Float[Array, "t h k"],
) -> tuple[Float[Array, "t h d_key"], Float[Array, "g 2 n c"]]:
    """Spreads the gradients of the scores to one [s, n] matrix per half and head; both results are its products."""
    t, h, d_key = queries.shape
    g, _, n, c = keys.shape

    def body(d_keys, chunk):
        grouped, d_grouped, chosen = (_group(a, g) for a in chunk)
        m, k = chosen.shape[1:]
        d_halves, d_half_keys = [], []
        for half, index in enumerate((chosen // n, chosen % n)):
            weights = spread_columns(d_grouped.reshape(-1, k).T, index.reshape(-1, k).T, n).reshape(n, g, m)
            query = grouped[..., half * c : (half + 1) * c]
            product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
            d_halves.append(product("ngm,gnc->gmc", weights, keys[:, half]))
            d_half_keys.append(product("ngm,gmc->gnc", weights, query))
        d_queries = _ungroup(jnp.concatenate(d_halves, axis=-1).reshape(g * m, d_key), g, h)
        return d_keys + jnp.stack(d_half_keys, axis=1), d_queries

    size = chunk_size(t, 4 * h * n)
    d_keys, d_queries = scan_chunks(body, jnp.zeros_like(keys), (queries, d_scores, indices), t, size)
    return d_queries, d_keys


_xla.defvjp(_xla_forward, _xla_backward)
