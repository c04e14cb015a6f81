"""Exact top-k over the Cartesian product of two sets of sub-keys.

Source: Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv:1907.05242), section 3.1.

t  tokens          h  heads          n  sub-keys in a half, N = n * n keys
c  d_key / 2       k  keys retrieved a head          p  min(k, n), candidates a half
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.ops.checks import check_implementation, check_not_nan
from peer_jax.ops.chunks import chunk_size, scan_chunks


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
    index, equal sums by the rank of the first half, then of the second.

    Args:
        queries: one query a token and head; ``d_key = 2 * c``.
        sub_keys: shared by all heads, or a set a head.
        k: keys to retrieve, 1 <= k <= N.
        implementation: ``"reference"``; ``"xla"``, which bounds memory and has its own backward pass; None picks.

    Returns:
        Scores (float32) and indices (int32) of the retrieved keys.

    Raises:
        InputError: if sizes don't fit; under ``checked``, also if a score is NaN. Otherwise a NaN query gives NaN
            scores.
    """
    n, half = sub_keys.shape[-2:]
    if queries.shape[-1] != 2 * half:
        raise InputError(f"queries have d_key={queries.shape[-1]}, but sub_keys of width {half} need {2 * half}")
    if not 1 <= k <= n * n:
        raise InputError(f"k={k} keys can't be retrieved from {n}^2 = {n * n}: choose 1 <= k <= {n * n}")
    if sub_keys.ndim == 4 and sub_keys.shape[0] != queries.shape[-2]:
        raise InputError(f"sub_keys are for {sub_keys.shape[0]} heads, but queries have {queries.shape[-2]}")
    check_implementation(implementation)

    *tokens, h, d_key = queries.shape
    retrieve = _reference if implementation == "reference" else _xla
    scores, indices = retrieve(queries.reshape(-1, h, d_key), sub_keys, k)
    check_not_nan("product_key_top_k", scores)
    return scores.reshape(*tokens, h, k), indices.reshape(*tokens, h, k)


def _combine(
    best1: Float[Array, "*b p"],
    index1: Int[Array, "*b p"],
    best2: Float[Array, "*b p"],
    index2: Int[Array, "*b p"],
    n: int,
    k: int,
) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"], Int[Array, "*b k"]]:
    """Top k of the sums of two halves' candidates: scores, i1, i2.

    The pair of ranks (a, b), counted from 1, comes after the a * b - 1 other pairs of ranks up to a and up to b, so
    only pairs with a * b <= k can be among the best k: 50 of 256 for k = 16, 119 of 1024 for k = 32.
    """
    p = best1.shape[-1]
    rank = np.arange(1, p + 1)
    a, b = np.nonzero(np.outer(rank, rank) <= k)  # by the first rank, then by the second: the order of equal sums
    partners = [best2[..., : k // r] for r in rank]  # slices, which are cheaper than a gather
    sums = [best1[..., r - 1, None] + partner for r, partner in zip(rank, partners, strict=True)]
    scores, pair = jax.lax.top_k(jnp.concatenate(sums, axis=-1), k)
    i1 = jnp.take_along_axis(index1, jnp.asarray(a)[pair], axis=-1)
    i2 = jnp.take_along_axis(index2, jnp.asarray(b)[pair], axis=-1)
    return scores, i1, i2


def _reference(
    queries: Float[Array, "t h d_key"], sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"], k: int
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    t, h, d_key = queries.shape
    n = sub_keys.shape[-2]
    keys = jnp.broadcast_to(sub_keys, (h, 2, n, d_key // 2)).astype(jnp.float32)
    halves = queries.reshape(t, h, 2, d_key // 2).astype(jnp.float32)
    scores = jnp.einsum("thsc,hsnc->thsn", halves, keys, precision=jax.lax.Precision.HIGHEST)
    best, index = jax.lax.top_k(scores, min(k, n))
    scores, i1, i2 = _combine(best[:, :, 0], index[:, :, 0], best[:, :, 1], index[:, :, 1], n, k)
    return scores, i1 * n + i2


def _half_scores(queries: Float[Array, "h t c"], keys: Float[Array, "g n c"]) -> Float[Array, "h t n"]:
    """Scores of one half; g is 1 for shared keys (then one matrix product serves all heads) or h."""
    h, t, c = queries.shape
    g, n, _ = keys.shape
    grouped = queries.reshape(g, h * t // g, c)
    product = jnp.einsum("gmc,gnc->gmn", grouped, keys, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(h, t, n)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _xla(
    queries: Float[Array, "t h d_key"], sub_keys: Float[Array, "2 n c"] | Float[Array, "h 2 n c"], k: int
) -> tuple[Float[Array, "t h k"], Int[Array, "t h k"]]:
    t, h, d_key = queries.shape
    n, c = sub_keys.shape[-2:]
    keys = sub_keys.reshape(-1, 2, n, c).astype(jnp.float32)

    def body(_: None, chunk: Float[Array, "s h d_key"]) -> tuple[None, tuple[Array, Array]]:
        halves = jnp.moveaxis(chunk.astype(jnp.float32), 1, 0)
        best1, index1 = _top_k_rows(_half_scores(halves[..., :c], keys[:, 0]), min(k, n))
        best2, index2 = _top_k_rows(_half_scores(halves[..., c:], keys[:, 1]), min(k, n))
        scores, i1, i2 = _combine(best1, index1, best2, index2, n, k)
        return None, (jnp.moveaxis(scores, 0, 1), jnp.moveaxis(i1 * n + i2, 0, 1))

    _, out = scan_chunks(body, None, queries, t, chunk_size(t, 4 * h * n))
    return out


def _top_k_rows(scores: Float[Array, "h t n"], k: int) -> tuple[Float[Array, "h t k"], Int[Array, "h t k"]]:
    """``top_k`` over a matrix: on CPU it is several times faster than over more dimensions."""
    h, t, n = scores.shape
    best, index = jax.lax.top_k(scores.reshape(h * t, n), k)
    return best.reshape(h, t, k), index.reshape(h, t, k)


def _xla_forward(queries, sub_keys, k):
    scores, indices = _xla(queries, sub_keys, k)
    return (scores, indices), (queries, sub_keys, indices)


def _xla_backward(k, residuals, cotangents):
    """A retrieved score is linear in its query and its two sub-keys; nothing flows to the keys left out.

    The scores' gradient is scattered into a [s, n] matrix a half and head, which turns both gradients into products.
    """
    queries, sub_keys, indices = residuals
    d_scores = cotangents[0]
    t, h, d_key = queries.shape
    n, c = sub_keys.shape[-2:]
    keys = sub_keys.reshape(-1, 2, n, c).astype(jnp.float32)
    g = keys.shape[0]

    def body(d_keys, chunk):
        halves, d_chunk, chosen = (jnp.moveaxis(a, 1, 0) for a in chunk)
        halves = halves.astype(jnp.float32)
        s = halves.shape[1]
        row = jnp.arange(h * s)[:, None]
        d_halves, d_half_keys = [], []
        for half, index in enumerate((chosen // n, chosen % n)):
            weights = jnp.zeros((h * s, n), jnp.float32)
            weights = weights.at[row, index.reshape(h * s, k)].add(d_chunk.reshape(h * s, k), mode="drop")
            weights = weights.reshape(g, h * s // g, n)
            query = halves[..., half * c : (half + 1) * c].reshape(g, h * s // g, c)
            product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
            d_halves.append(product("gmn,gnc->gmc", weights, keys[:, half]).reshape(h, s, c))
            d_half_keys.append(product("gmn,gmc->gnc", weights, query))
        d_queries = jnp.moveaxis(jnp.concatenate(d_halves, axis=-1), 0, 1)
        return d_keys + jnp.stack(d_half_keys, axis=1), d_queries

    d_keys, d_queries = scan_chunks(
        body, jnp.zeros_like(keys), (queries, d_scores, indices), t, chunk_size(t, 4 * h * n)
    )
    return d_queries.astype(queries.dtype), d_keys.reshape(sub_keys.shape).astype(sub_keys.dtype)


_xla.defvjp(_xla_forward, _xla_backward)
