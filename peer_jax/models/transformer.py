"""Decoder-only transformer whose feed-forward layers come from outside.

b  batch     s  sequence     S  keys     d  d_model     V  vocabulary
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.fields import Gives, Placed
from peer_jax.layers.checks import (
    check_dtype,
    check_flag,
    check_function,
    check_layer,
    check_memory,
    check_positive,
    check_sizes,
)
from peer_jax.layers.interface import Aux, FeedForward, Routing, Table, by_position
from peer_jax.layers.linear import Linear
from peer_jax.models.attention import Attention, KVCache
from peer_jax.ops.cross_entropy import linear_cross_entropy
from peer_jax.ops.kept import POLICY
from peer_jax.sharding import automatic, constrain, split_of

# The Transformer passes these arguments to the factory, so a config binds them at the Transformer.
FeedForwardFactory = Annotated[
    Callable[..., FeedForward],
    Gives(
        d_model="Transformer.d_model",
        dtype="Transformer.dtype",
        param_dtype="Transformer.param_dtype",
        rngs="Run.seed",
    ),
]


def sparse_block_indices(blocks: str | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Blocks that carry the sparse layer: "middle" (as in the paper), "all", "every n" (n-1, 2n-1, ...), or a list.

    Raises:
        InputError: if a block doesn't exist, or ``blocks`` is another word.
    """
    if blocks == "middle":
        return (num_blocks // 2,)
    if blocks == "all":
        return tuple(range(num_blocks))
    if isinstance(blocks, str):
        word, _, number = blocks.partition(" ")
        if word != "every" or not number.isdecimal() or not 1 <= int(number) <= num_blocks:
            raise InputError(
                f"sparse_blocks={blocks!r} is not 'middle', 'all', 'every n' with n up to num_blocks={num_blocks}, "
                "or a list of blocks"
            )
        return tuple(range(int(number) - 1, num_blocks, int(number)))
    if not isinstance(blocks, Sequence) or not all(isinstance(block, numbers.Integral) for block in blocks):
        raise InputError(
            f"sparse_blocks={blocks!r} is not 'middle', 'all', 'every n' or a list of blocks, such as [1, 3]"
        )
    if bad := [block for block in blocks if not 0 <= block < num_blocks]:
        raise InputError(
            f"sparse_blocks={list(blocks)} names block {bad[0]}, but blocks run from 0 to {num_blocks - 1}"
        )
    if len(set(blocks)) < len(blocks):
        raise InputError(f"sparse_blocks={list(blocks)} names a block twice: name each once")
    return tuple(blocks)


@by_position
class BlockOutput(NamedTuple):
    """What a block returns beside the residual stream; ``cache`` and ``routing`` only if they were asked for."""

    aux: Aux
    cache: KVCache | None
    routing: Routing | None


class Block(nnx.Module):
    """Pre-norm attention and feed-forward layer, each added to the residual stream."""

    def __init__(self, attention: Attention, ffw: FeedForward, d_model: int, norm: Callable[[int], nnx.RMSNorm]):
        self.attention_norm, self.attention = norm(d_model), attention
        self.ffw_norm, self.ffw = norm(d_model), ffw

    def __call__(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"] | None,
        cache: KVCache | None = None,
        route: bool = False,
    ) -> tuple[Float[Array, "b s d"], BlockOutput]:
        """The residual stream after the block; with ``route`` also the routing, if the feed-forward layer routes."""
        y, cache = self.attention(self.attention_norm(x), positions, segment_ids, cache)
        x = x + y
        normed, real = self.ffw_norm(x), None if segment_ids is None else segment_ids > 0
        routing = self.ffw.route(normed, real) if route and self.ffw.routes else None
        y, aux = self.ffw(normed, real)
        return x + y, BlockOutput(aux, cache, routing)


Path = tuple[str | int, ...]  # of a parameter in the state of a model

MOST_BLOCKS = 10_000
ROUTE = 5  # position of the argument ``route`` of ``Block.__call__``


class Transformer(nnx.Module):
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
        check_sizes(vocab_size=vocab_size, d_model=d_model, num_blocks=num_blocks, num_heads=num_heads)
        check_positive(rope_theta=rope_theta)
        if rope_theta < 1:
            raise InputError(f"rope_theta={rope_theta} must be at least 1, such as 10000")
        check_flag(share_tables=share_tables, tie_embeddings=tie_embeddings, remat=remat)
        check_layer(dtype, param_dtype, rngs, embed_init=embed_init)
        check_dtype(dtype=dtype)
        for name, factory in (("ffw", ffw), ("sparse_ffw", ffw if sparse_ffw is None else sparse_ffw)):
            check_function(**{name: factory})
        num_params = d_model * (vocab_size * (1 if tie_embeddings else 2) + num_blocks * 4 * d_model)
        sizes = {"vocab_size": vocab_size, "d_model": d_model, "num_blocks": num_blocks}
        check_memory("Transformer", num_params, param_dtype, **sizes)
        if num_blocks > MOST_BLOCKS:
            raise InputError(f"num_blocks={num_blocks} is more than {MOST_BLOCKS}, which would take hours to compile")
        sparse = sparse_block_indices(sparse_blocks, num_blocks) if sparse_ffw is not None else ()
        dense = tuple(sorted({*range(num_blocks)} - {*sparse}))
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}

        def norm(width: int) -> nnx.RMSNorm:
            return nnx.RMSNorm(width, **types)

        first: FeedForward | None = None  # the layer whose tables the other sparse ones share

        def block(index: int) -> Block:
            nonlocal num_params, first
            attention = Attention(
                d_model, num_heads, rope_theta=rope_theta, implementation=attention_implementation, **types
            )
            make, alike = (sparse_ffw, sparse) if index in sparse else (ffw, dense)
            layer = make(d_model, **types)
            shared = 0
            if share_tables and index in sparse:
                first = layer if first is None else first
                layer.share_with(first)
                shared = sum(table.size for table in layer.tables().values())
            if index == min(alike):  # now that the size of one is known, and before the others are made
                num_params += layer.num_params() + (len(alike) - 1) * (layer.num_params() - shared)
                check_memory("Transformer", num_params, param_dtype, **sizes)
            if layer.routes and layer.num_experts is None:
                raise InputError(f"{layer.name} defines route: set self.num_experts in its constructor too")
            return Block(attention, layer, d_model, norm)

        self.d_model, self.num_heads, self.vocab_size = d_model, num_heads, vocab_size
        self.sparse_blocks = sparse
        self.dtype, self.remat = dtype, remat
        self.embed = nnx.Embed(
            vocab_size, d_model, embedding_init=embed_init, embedding_metadata={"axes": ("vocab", "embed")}, **types
        )
        self.blocks = nnx.List([block(index) for index in range(num_blocks)])
        self.final_norm = norm(d_model)
        head_init = nnx.initializers.lecun_normal()
        self.head = (
            None if tie_embeddings else Linear(d_model, vocab_size, ("embed", "vocab"), kernel_init=head_init, **types)
        )

    @property
    def method(self) -> FeedForward:
        """The layer that the model is named after: that of the first sparse block, or else of the first block."""
        return self.blocks[self.sparse_blocks[0] if self.sparse_blocks else 0].ffw

    @property
    def is_causal(self) -> bool:
        """Whether no block lets a token see later ones."""
        return all(block.ffw.is_causal for block in self.blocks)

    @property
    def mixes_tokens(self) -> bool:
        """Whether a feed-forward layer makes tokens depend on one another, so that a cache can't be used."""
        return any(block.ffw.mixes_tokens for block in self.blocks)

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
        run = nnx.remat(Block.__call__, static_argnums=ROUTE, policy=POLICY) if self.remat else Block.__call__
        x, outputs = self._through_blocks(self._embed(tokens), _positions(tokens, segment_ids), segment_ids, run=run)
        loss, metrics = jnp.zeros(()), {}
        for index, (aux, *_) in enumerate(outputs):
            loss += aux.loss
            metrics |= {f"block_{index}/{name}": value for name, value in aux.metrics.items()}
        return x, Aux(loss, metrics)

    def route(self, tokens: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None = None) -> dict[int, Routing]:
        """The routing of every block whose layer routes, by the block's index; call it in evaluation mode."""
        _check_tokens(tokens, segment_ids)
        run = functools.partial(Block.__call__, route=True)
        _, outputs = self._through_blocks(self._embed(tokens), _positions(tokens, segment_ids), segment_ids, run=run)
        return {index: output.routing for index, output in enumerate(outputs) if output.routing is not None}

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

    def _through_blocks(
        self,
        x: Float[Array, "b s d"],
        positions: Int[Array, "b s"],
        segment_ids: Int[Array, "b s"] | None,
        caches: Sequence[KVCache] | None = None,
        *,
        run: Callable[..., tuple[Array, BlockOutput]] = Block.__call__,
    ) -> tuple[Float[Array, "b s d"], list[BlockOutput]]:
        """The residual stream after all blocks, and what else each block returns; ``run`` calls a block."""
        outputs = []
        for index, block in enumerate(self.blocks):
            if caches is None:
                x, output = run(block, x, positions, segment_ids)
                x = constrain(x, "batch")
            else:
                x, output = run(block, x, positions, segment_ids, caches[index])
            outputs.append(output)
        return x, outputs

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

    def flops_by_part(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token by part: attention, feed-forward layers by class, logits.

        A multiply-add counts as 2. Lookups of embeddings, norms, activations and softmax are not counted.

        Raises:
            InputError: if the class of a layer doesn't define ``flops_per_token``.
        """
        parts = {"attention": 0.0, "logits": 2.0 * self.d_model * self.vocab_size}
        for block in self.blocks:
            parts["attention"] += block.attention.flops_per_token(seq_len)
            name = block.ffw.name
            parts[name] = parts.get(name, 0.0) + block.ffw.flops_per_token(seq_len)
        return parts

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs per token in sequences of ``seq_len`` tokens."""
        return sum(self.flops_by_part(seq_len).values())

    def tables(self) -> dict[Path, tuple[Table, list[FeedForward]]]:
        """Each table, by its path in the model's state, and the layers that read it: several, if they share it."""

        def at(path: Path) -> Table:
            node = self
            for key in path:
                node = getattr(node, key) if isinstance(node, nnx.Module) and isinstance(key, str) else node[key]
            return node

        found = {path: (at(path), []) for path, _ in nnx.to_flat_state(nnx.state(self, Table))}
        readers = {id(table): layers for table, layers in found.values()}
        for block in self.blocks:
            for _, node in nnx.iter_graph(block.ffw):
                if isinstance(node, Table):
                    readers[id(node)].append(block.ffw)
        return found

    def num_params(self) -> int:
        """All parameters, embeddings included. Tables that blocks share count once."""
        return sum(p.size for p in jax.tree.leaves(nnx.state(self, nnx.Param)))

    def num_active_params(self) -> int:
        """Parameters that one token uses; all embeddings are counted.

        Blocks that share tables are taken to use different rows of them, as far as there are enough.
        """
        of_layers = sum(p.size for p in jax.tree.leaves(nnx.state(self, nnx.All(nnx.Param, nnx.PathContains("ffw")))))
        active = sum(block.ffw.num_active_params() for block in self.blocks)
        return self.num_params() - of_layers + min(active, of_layers)


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
