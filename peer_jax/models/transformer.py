"""Decoder-only transformer whose feed-forward layers come from outside.

b  batch     s  sequence     S  keys     d  d_model     V  vocabulary
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.layers.checks import check_flag, check_function, check_positive, check_sizes
from peer_jax.layers.interface import Aux, Routing
from peer_jax.layers.linear import Linear
from peer_jax.models.attention import KVCache
from peer_jax.models.model import FeedForwardFactory, Model
from peer_jax.ops.cross_entropy import linear_cross_entropy, tokens_at_once
from peer_jax.sharding import automatic, constrain, split_of


class Transformer(Model):
    """Decoder-only transformer: RMSNorm before attention and feed-forward layer, rotary positions, no biases.

    Args:
        vocab_size: V.
        d_model: width of the residual stream.
        num_blocks: blocks of attention and a feed-forward layer.
        num_heads: attention heads.
        ffw: makes a block's feed-forward layer: ``ffw(d_model, dtype=, param_dtype=, rngs=)``.
        sparse_ffw: makes the feed-forward layers of ``sparse_blocks`` instead; None for ``ffw`` in every block.
        sparse_blocks: "middle", "all", "every n" or a list of blocks.
        share_tables: whether the layers of ``sparse_blocks`` read one set of tables, as in Memory+ (Berges et al. 2024,
            arXiv:2412.09764); each has tables of its own otherwise. Sub-keys and all other parameters are never shared.
        tie_embeddings: use the embedding table for the logits too.
        remat: recompute blocks in the backward pass instead of keeping their activations, except what
            ``peer_jax.ops.kept`` names.
        rope_theta: base of the rotary frequencies.
        attention_implementation: implementation of the attention, see ``peer_jax.models.attention.Attention``.
        dtype: type of the computation; logits are always float32.
        param_dtype: type of the parameters. In bfloat16, see ``rounding`` of ``AdamW``; other optimisers may lose
            updates below 1/512 of a parameter.
        embed_init: initialiser of the embedding table.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, the parameters don't fit into memory, or a layer that routes doesn't
            say how many experts it has.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_blocks: int,
        num_heads: int,
        *,
        ffw: FeedForwardFactory,
        sparse_ffw: FeedForwardFactory | None = None,
        sparse_blocks: str | Sequence[int] = "middle",
        share_tables: bool = False,
        tie_embeddings: bool = False,
        remat: Placed[bool] = False,
        rope_theta: float = 10_000.0,
        attention_implementation: Placed[str | None] = None,
        dtype: Dtype = jnp.float32,
        param_dtype: Dtype = jnp.float32,
        embed_init: Initializer = nnx.initializers.normal(0.02),
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(vocab_size=vocab_size, d_model=d_model)
        check_positive(rope_theta=rope_theta)
        if rope_theta < 1:
            raise InputError(f"rope_theta={rope_theta} must be at least 1, such as 10000")
        check_flag(tie_embeddings=tie_embeddings)
        check_function(embed_init=embed_init)

        def embed(**types) -> nnx.Embed:
            axes = {"axes": ("vocab", "embed")}
            return nnx.Embed(vocab_size, d_model, embedding_init=embed_init, embedding_metadata=axes, **types)

        def head(**types) -> Linear | None:
            kernel_init = nnx.initializers.lecun_normal()
            axes = ("embed", "vocab")
            return None if tie_embeddings else Linear(d_model, vocab_size, axes, kernel_init=kernel_init, **types)

        self.vocab_size = vocab_size
        super().__init__(
            d_model,
            num_blocks,
            num_heads,
            embed=embed,
            head=head,
            sizes={"vocab_size": vocab_size},
            outer_params=d_model * vocab_size * (1 if tie_embeddings else 2),
            ffw=ffw,
            sparse_ffw=sparse_ffw,
            sparse_blocks=sparse_blocks,
            share_tables=share_tables,
            remat=remat,
            attention={"rope_theta": rope_theta, "implementation": attention_implementation},
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    @property
    def is_causal(self) -> bool:
        """Whether no block lets a token see later ones."""
        return all(block.ffw.is_causal for block in self.blocks)

    def __call__(
        self, tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None = None
    ) -> tuple[Float[Array, "b s V"], Aux]:
        """Logits of the next token at every position, and the auxiliary losses summed over blocks.

        ``segment_ids`` number the documents packed into a row, 0 for padding; a token attends to its own document
        only. Metrics are named ``block_<i>/<metric>``.
        """
        x, aux = self._residual_stream(tokens, segment_ids)
        return self.logits(x), aux

    def cross_entropy(
        self, tokens: Int[Array, "b s"], targets: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None = None
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood of ``targets`` in nats, summed over all tokens but padding; and auxiliary losses.

        It never holds the logits of all tokens at once (``peer_jax.ops.cross_entropy``).
        """
        x, aux = self._residual_stream(tokens, segment_ids)
        return self._cross_entropy(x, targets, _weights(tokens, segment_ids)), aux

    def losses(
        self, tokens: Int[Array, "b s"], targets: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None = None
    ) -> Float[Array, "b s"]:
        """The negative log-likelihood of each target in nats; that of padding means nothing.

        The loss of a token is the derivative of ``cross_entropy`` in the weight with which the token counts.
        """
        x, _ = self._residual_stream(tokens, segment_ids)
        return jax.grad(self._cross_entropy, argnums=2)(x, targets, _weights(tokens, segment_ids))

    def _cross_entropy(
        self, x: Float[Array, "b s d"], targets: Int[Array, "b s"], weights: Float[Array, "b s"]
    ) -> Float[Array, ""]:
        kernel = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        return linear_cross_entropy(self.final_norm(x), kernel, targets, weights)

    def _residual_stream(
        self, tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None
    ) -> tuple[Float[Array, "b s d"], Aux]:
        """The residual stream after all blocks, and the auxiliary losses and metrics of the blocks."""
        _check_tokens(tokens, segment_ids)
        return self._run_blocks(self._embed(tokens), _positions(tokens, segment_ids), segment_ids)

    def route(self, tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None = None) -> dict[int, Routing]:
        """The routing of every block whose layer routes, by the block's index; call it in evaluation mode."""
        _check_tokens(tokens, segment_ids)
        return self._route_blocks(self._embed(tokens), _positions(tokens, segment_ids), segment_ids)

    def init_cache(self, batch: int, max_len: int) -> list[KVCache]:
        """Empty caches for ``batch`` sequences of up to ``max_len`` tokens, one per block."""
        shape = (batch, max_len, self.num_heads, self.d_model // self.num_heads)
        zeros = jnp.zeros(shape, self.dtype)
        return [KVCache(zeros, zeros, jnp.zeros((), jnp.int32)) for _ in self.blocks]

    def decode(self, tokens: Int[Array, "b s"], cache: list[KVCache]) -> tuple[Float[Array, "b s V"], list[KVCache]]:
        """Logits of tokens that continue the cached ones, and the cache extended by these tokens."""
        _check_tokens(tokens, None)
        b, s = tokens.shape
        positions = jnp.broadcast_to(cache[0].length + jnp.arange(s), (b, s))
        x, outputs = self._through_blocks(self.embed(tokens), positions, None, cache)
        return self.logits(x), [output.cache for output in outputs]

    def _embed(self, tokens: Int[Array, "b s"]) -> Float[Array, "b s d"]:
        """Embeddings. A table that is split over devices is gathered, and each device looks its own tokens up."""
        table = constrain(self.embed.embedding[...].astype(self.embed.dtype))
        look_up = automatic(functools.partial(jnp.take, axis=0), split_of(tokens, tokens.ndim))
        return constrain(look_up(table, tokens), "batch")

    def logits(self, x: Float[Array, "*tokens d"]) -> Float[Array, "*tokens V"]:
        """The logits that a vector of the residual stream stands for after the last block."""
        x = self.final_norm(x)
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return logits.astype(jnp.float32)

    def num_tokens(self, inputs: Int[Array, "b s"]) -> int:
        return inputs.size

    def logits_at_once(self, tokens: int, seq_len: int) -> int:
        return tokens_at_once(tokens, self.vocab_size) * self.vocab_size

    def flops_by_part(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token by part, see ``Model``; ``logits`` are those of every token."""
        parts = self._flops_of_blocks(seq_len)
        return {"attention": parts["attention"], "logits": 2.0 * self.d_model * self.vocab_size} | parts


def _check_tokens(tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None) -> None:
    """An InputError unless these are integers of the same shape, [batch, seq]."""
    for name, array in (("tokens", tokens), ("segment_ids", tokens if segment_ids is None else segment_ids)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.integer):
            raise InputError(
                f"{name} must be an array of integers, not {getattr(array, 'dtype', type(array).__name__)}"
            )
        if array.ndim != 2 or array.shape != tokens.shape:
            of_tokens = "" if array is tokens else f", as tokens have {list(tokens.shape)}"
            raise InputError(f"{name} must have the shape [batch, seq]{of_tokens}, not {list(array.shape)}")


def _weights(tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None) -> Float[Array, "b s"]:
    """1 for each token that counts, 0 for padding."""
    return jnp.ones(tokens.shape) if segment_ids is None else (segment_ids > 0).astype(jnp.float32)


def _positions(tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None) -> Int[Array, "b s"]:
    """Positions within each document."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return index
    start = segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return index - jax.lax.cummax(jnp.where(start, index, 0), axis=1)
