"""The cross-entropy of a softmax over a large vocabulary, without the logits of all tokens at once.

t  tokens     c  tokens of a chunk     d  d_model     V  vocabulary
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.ops import sharded
from peer_jax.ops.checks import check_arrays, check_indices
from peer_jax.ops.chunks import scan_chunks
from peer_jax.sharding import automatic, split_of

# Bytes of the logits of a chunk, in float32. Each chunk reads the kernel and adds to its gradient, so chunks should be
# large; docs/log.md has the measurements.
LOGITS_BUDGET = 128 * 2**20


def linear_cross_entropy(
    x: Float[Array, "*tokens d"],
    kernel: Float[Array, "d V"],
    targets: Int[Array, "*tokens"],
    weights: Float[Array, "*tokens"],
) -> Float[Array, ""]:
    """Sum of ``weights`` times the negative log-likelihood, in nats, of ``targets`` under softmax(x kernel).

    The kernel is cast to the type of ``x``; logits, softmax and sums are float32. The logits of a chunk of tokens are
    computed once: since the result is one number, whose cotangent can only scale the gradients, the gradients of a
    chunk are taken along with its losses if the function is to be differentiated. It has no forward-mode derivatives.
    On a mesh, each device works through its own tokens with the whole kernel, and the gradient of the kernel is summed
    over the devices once.

    Args:
        x: one vector per token.
        kernel: maps a vector to its logits.
        targets: the id of the right answer for each token.
        weights: 0 for tokens that do not count, such as padding.

    Raises:
        InputError: if sizes don't fit; under ``checked``, also if a target is not in the vocabulary. Without
            ``checked``, the result is then infinite, and NaN if the weight of that token is 0.
    """
    check_arrays("linear_cross_entropy", x=(x, "*tokens d"), kernel=(kernel, "d V"), weights=(weights, "*tokens"))
    check_arrays("linear_cross_entropy", integer=True, targets=(targets, "*tokens"))
    if not x.shape[:-1] == targets.shape == weights.shape:
        raise InputError(
            f"linear_cross_entropy: targets {targets.shape} and weights {weights.shape} must have one entry for each "
            f"token of x {x.shape}"
        )
    if x.shape[-1] != kernel.shape[0] or not kernel.shape[1]:
        raise InputError(f"linear_cross_entropy: kernel {kernel.shape} must have a row for each column of x {x.shape}")
    check_indices("linear_cross_entropy", targets, kernel.shape[1])
    if not targets.size:
        return jnp.zeros(())

    def of_all_tokens(x: Array, kernel: Array, targets: Array, weights: Array) -> Array:
        tokens = x.reshape(-1, x.shape[-1]), targets.reshape(-1), weights.reshape(-1)
        return jnp.sum(sharded.by_tokens(_of_device, (kernel,), tokens))

    return automatic(of_all_tokens, split_of(x, 0))(x, kernel, targets, weights.astype(jnp.float32))


def tokens_at_once(t: int, vocabulary: int) -> int:
    """Tokens of a chunk: all of them where their logits fit the budget, else they are spread evenly over the chunks."""
    chunks = max(1, -(-t // max(1, LOGITS_BUDGET // (4 * vocabulary))))
    return -(-t // chunks)


def _of_device(
    kernel: Float[Array, "d V"], x: Float[Array, "t d"], targets: Int[Array, " t"], weights: Float[Array, " t"]
) -> Float[Array, "1"]:
    return _weighted_sum(x, kernel, targets, weights)[None]


@jax.custom_vjp
def _weighted_sum(
    x: Float[Array, "t d"], kernel: Float[Array, "d V"], targets: Int[Array, " t"], weights: Float[Array, " t"]
) -> Float[Array, ""]:
    cast = kernel.astype(x.dtype)

    def chunk(total: Array, tokens: tuple[Array, Array, Array]) -> tuple[Array, None]:
        x, targets, weights = tokens
        return total + jnp.sum(weights * _losses(x, cast, targets, weights)[0]), None

    t = x.shape[0]
    return scan_chunks(chunk, jnp.zeros(()), (x, targets, weights), t, tokens_at_once(t, kernel.shape[1]))[0]


def _forward(
    x: Float[Array, "t d"], kernel: Float[Array, "d V"], targets: Int[Array, " t"], weights: Float[Array, " t"]
):
    cast = kernel.astype(x.dtype)

    def chunk(carry: tuple[Array, Array], tokens: tuple[Array, Array, Array]):
        total, d_kernel = carry
        x, targets, weights = tokens
        losses, d_logits = _losses(x, cast, targets, weights)
        d_logits = d_logits.astype(x.dtype)
        dx = _product("cV,dV->cd", d_logits, cast).astype(x.dtype)
        d_kernel += _product("cd,cV->dV", x, d_logits)
        return (total + jnp.sum(weights * losses), d_kernel), (dx, losses)

    t = x.shape[0]
    carry = jnp.zeros(()), jnp.zeros(kernel.shape)
    tokens = (x, targets, weights)
    (total, d_kernel), (dx, losses) = scan_chunks(chunk, carry, tokens, t, tokens_at_once(t, kernel.shape[1]))
    return total, (dx, d_kernel.astype(kernel.dtype), losses)


def _backward(residuals: tuple[Array, Array, Array], g: Float[Array, ""]):
    dx, d_kernel, d_weights = ((g * a.astype(jnp.float32)).astype(a.dtype) for a in residuals)
    return dx, d_kernel, None, d_weights


_weighted_sum.defvjp(_forward, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _losses(
    x: Float[Array, "c d"], kernel: Float[Array, "d V"], targets: Int[Array, " c"], weights: Float[Array, " c"]
) -> tuple[Float[Array, " c"], Float[Array, "c V"]]:
    """The losses of a chunk, and the gradient of their weighted sum with respect to the logits."""
    logits = _product("cd,dV->cV", x, kernel)
    vocabulary = kernel.shape[1]
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    total = jnp.sum(exponentials, axis=-1, keepdims=True)
    # A target outside of the vocabulary has probability 0; a negative one would count from the end.
    index = jnp.where(targets < 0, vocabulary, targets)[:, None]
    of_target = jnp.take_along_axis(logits, index, axis=-1, mode="fill", fill_value=-jnp.inf)
    is_target = jax.nn.one_hot(targets, vocabulary, dtype=bool)
    d_logits = exponentials * (weights[:, None] / total) - jnp.where(is_target, weights[:, None], 0.0)
    return (jnp.log(total) + largest - of_target)[:, 0], d_logits
