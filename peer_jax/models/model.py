"""What the models have in common: blocks of attention and feed-forward layers, which come from outside.

b  batch     s  sequence     d  d_model
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.fields import Gives
from peer_jax.layers.checks import (
    check_dtype,
    check_flag,
    check_function,
    check_layer,
    check_memory,
    check_sizes,
)
from peer_jax.layers.interface import Aux, FeedForward, Routing, Table, by_position
from peer_jax.models.attention import Attention, KVCache
from peer_jax.ops.kept import POLICY
from peer_jax.sharding import constrain

# A model passes these arguments to the factory, so a config binds them at the model.
FeedForwardFactory = Annotated[
    Callable[..., FeedForward],
    Gives(
        d_model="Transformer.d_model or ViT.d_model",
        dtype="Transformer.dtype or ViT.dtype",
        param_dtype="Transformer.param_dtype or ViT.param_dtype",
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


class Model(nnx.Module):
    """Blocks between an embedding and a head, pre-norm (RMSNorm) and without biases: a ``Transformer`` or a ``ViT``.

    A subclass defines ``is_causal``, ``cross_entropy``, ``route``, ``num_tokens``, ``logits_at_once`` and
    ``flops_by_part``, and may add to ``scores``. Training, evaluation and planning ask for nothing else.

    Args:
        d_model: width of the residual stream.
        num_blocks: blocks of attention and a feed-forward layer.
        num_heads: attention heads.
        embed, head: make what comes before and after the blocks, of ``dtype``, ``param_dtype`` and ``rngs``.
        sizes: the arguments that a message about memory names, beside d_model and num_blocks.
        outer_params: the parameters of ``embed`` and ``head``.
        ffw: makes a block's feed-forward layer: ``ffw(d_model, dtype=, param_dtype=, rngs=)``.
        sparse_ffw: makes the feed-forward layers of ``sparse_blocks`` instead; None for ``ffw`` in every block.
        sparse_blocks: "middle", "all", "every n" or a list of blocks.
        share_tables: whether the layers of ``sparse_blocks`` read one set of tables, as in Memory+ (Berges et al. 2024,
            arXiv:2412.09764); each has tables of its own otherwise. Sub-keys and all other parameters are never shared.
        remat: recompute blocks in the backward pass instead of keeping their activations, except what
            ``peer_jax.ops.kept`` names.
        attention: arguments of ``peer_jax.models.attention.Attention``.
        dtype: type of the computation; logits are always float32.
        param_dtype: type of the parameters. In bfloat16, see ``rounding`` of ``AdamW``; other optimisers may lose
            updates below 1/512 of a parameter.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, the parameters don't fit into memory, or a layer that routes doesn't
            say how many experts it has.
    """

    def __init__(
        self,
        d_model: int,
        num_blocks: int,
        num_heads: int,
        *,
        embed: Callable[..., nnx.Module],
        head: Callable[..., nnx.Module | None],
        sizes: dict[str, int],
        outer_params: int,
        ffw: Callable[..., FeedForward],
        sparse_ffw: Callable[..., FeedForward] | None,
        sparse_blocks: str | Sequence[int],
        share_tables: bool,
        remat: bool,
        attention: dict[str, Any],
        dtype: Dtype,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(**sizes, d_model=d_model, num_blocks=num_blocks, num_heads=num_heads)
        check_flag(share_tables=share_tables, remat=remat)
        check_layer(dtype, param_dtype, rngs)
        check_dtype(dtype=dtype)
        for name, factory in (("ffw", ffw), ("sparse_ffw", ffw if sparse_ffw is None else sparse_ffw)):
            check_function(**{name: factory})
        num_params = outer_params + num_blocks * 4 * d_model**2
        sizes = {**sizes, "d_model": d_model, "num_blocks": num_blocks}
        name = type(self).__name__
        check_memory(name, num_params, param_dtype, **sizes)
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
            make, alike = (sparse_ffw, sparse) if index in sparse else (ffw, dense)
            attending = Attention(d_model, num_heads, **attention, **types)
            layer = make(d_model, **types)
            shared = 0
            if share_tables and index in sparse:
                first = layer if first is None else first
                layer.share_with(first)
                shared = sum(table.size for table in layer.tables().values())
            if index == min(alike):  # now that the size of one is known, and before the others are made
                num_params += layer.num_params() + (len(alike) - 1) * (layer.num_params() - shared)
                check_memory(name, num_params, param_dtype, **sizes)
            if layer.routes and layer.num_experts is None:
                raise InputError(f"{layer.name} defines route: set self.num_experts in its constructor too")
            return Block(attending, layer, d_model, norm)

        self.d_model, self.num_heads = d_model, num_heads
        self.sparse_blocks = sparse
        self.dtype, self.remat = dtype, remat
        self.embed = embed(**types)
        self.blocks = nnx.List([block(index) for index in range(num_blocks)])
        self.final_norm = norm(d_model)
        self.head = head(**types)

    @property
    def method(self) -> FeedForward:
        """The layer that the model is named after: that of the first sparse block, or else of the first block."""
        return self.blocks[self.sparse_blocks[0] if self.sparse_blocks else 0].ffw

    @property
    def is_causal(self) -> bool | None:
        """Whether no block lets a token see later ones; None for a model that doesn't predict tokens."""
        raise NotImplementedError

    @property
    def mixes_tokens(self) -> bool:
        """Whether a feed-forward layer makes tokens depend on one another, so that a cache can't be used."""
        return any(block.ffw.mixes_tokens for block in self.blocks)

    def cross_entropy(
        self, inputs: Array, targets: Int[Array, "b ..."], segment_ids: Int[Array, "b ..."]
    ) -> tuple[Float[Array, ""], Aux]:
        """The negative log-likelihood in nats, summed over the targets with a segment id above 0; and auxiliary losses.

        The arguments are those of a batch, see ``peer_jax.data.pipeline.Batch``.
        """
        raise NotImplementedError

    def scores(
        self, inputs: Array, targets: Int[Array, "b ..."], segment_ids: Int[Array, "b ..."]
    ) -> dict[str, Float[Array, ""]]:
        """What an evaluation measures of a batch, each summed over the targets: the loss, and what a model adds."""
        return {"loss": self.cross_entropy(inputs, targets, segment_ids)[0]}

    def route(self, inputs: Array, segment_ids: Int[Array, "b ..."]) -> dict[int, Routing]:
        """The routing of every block whose layer routes, by the block's index; call it in evaluation mode."""
        raise NotImplementedError

    def num_tokens(self, inputs: Array) -> int:
        """How many tokens go through the blocks for the inputs of a batch."""
        raise NotImplementedError

    def logits_at_once(self, tokens: int, seq_len: int) -> int:
        """How many logits are held at once in a step of ``tokens`` tokens in rows of ``seq_len`` tokens."""
        raise NotImplementedError

    def flops_by_part(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token by part: attention, feed-forward layers by class, and what comes before and after.

        A multiply-add counts as 2. Lookups of embeddings, norms, activations and softmax are not counted.

        Raises:
            InputError: if the class of a layer doesn't define ``flops_per_token``.
        """
        raise NotImplementedError

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

    def _run_blocks(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None
    ) -> tuple[Float[Array, "b s d"], Aux]:
        """The residual stream after all blocks, and the auxiliary losses and metrics of the blocks."""
        run = nnx.remat(Block.__call__, static_argnums=ROUTE, policy=POLICY) if self.remat else Block.__call__
        x, outputs = self._through_blocks(x, positions, segment_ids, run=run)
        loss, metrics = jnp.zeros(()), {}
        for index, (aux, *_) in enumerate(outputs):
            loss += aux.loss
            metrics |= {f"block_{index}/{name}": value for name, value in aux.metrics.items()}
        return x, Aux(loss, metrics)

    def _route_blocks(
        self, x: Float[Array, "b s d"], positions: Int[Array, "b s"], segment_ids: Int[Array, "b s"] | None
    ) -> dict[int, Routing]:
        """The routing of every block whose layer routes, by the block's index."""
        _, outputs = self._through_blocks(x, positions, segment_ids, run=functools.partial(Block.__call__, route=True))
        return {index: output.routing for index, output in enumerate(outputs) if output.routing is not None}

    def _flops_of_blocks(self, seq_len: int) -> dict[str, float]:
        """Forward FLOPs per token of all attention layers together, and of the feed-forward layers by class."""
        parts = {"attention": 0.0}
        for block in self.blocks:
            parts["attention"] += block.attention.flops_per_token(seq_len)
            name = block.ffw.name
            parts[name] = parts.get(name, 0.0) + block.ffw.flops_per_token(seq_len)
        return parts
