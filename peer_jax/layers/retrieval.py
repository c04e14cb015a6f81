"""Product-key retrieval, which PKM and PEER share: queries, their norm, exact top-k, gates.

Source: Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv:1907.05242).

d  d_model     h  heads     k  top-k     n  sub-keys in a half, N = n * n
"""

import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.layers.checks import (
    check_choice,
    check_flag,
    check_layer,
    check_memory,
    check_sizes,
    initial,
    real_tokens,
)
from peer_jax.layers.growing import sub_keys_between, take_over
from peer_jax.layers.interface import TABLE_AXES, Aux, DeviceLoad, FeedForward, Routing, Table
from peer_jax.layers.linear import Linear
from peer_jax.layers.masked import batch_norm, mean_of_real
from peer_jax.ops import check_implementation, floor, product_key_top_k, traffic
from peer_jax.ops.floor import Floor
from peer_jax.ops.touched import compact_size
from peer_jax.ops.traffic import FLOAT, Collectives
from peer_jax.sharding import current, target

QUERY_NORMS = ("batch", "layer", "qk", None)
SCORE_ACTIVATIONS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}

MOST_AT_ONCE = 2**28  # elements of a table that its initialiser makes at once


class ProductKeyRetrieval(FeedForward):
    """The retrieval half of PKM and PEER; a subclass owns the tables whose rows are retrieved.

    Query batch-norm uses statistics over the real tokens of the batch in training, and running statistics in
    evaluation. Scores, norm and gates are float32.

    With ``query_norm="qk"``, every half of a query and every sub-key is divided by its root mean square, the halves of
    queries are multiplied by a learned scale, and scores are divided by sqrt(d_key). So scores have a variance of about
    1 at first, and don't grow with the lengths of queries and sub-keys.

    Attributes:
        num_tables: number of tables of the subclass, each of which has a row of ``d_model`` per expert.
        outputs: the name of the table whose rows are added up for the output.
    """

    num_tables: ClassVar[int] = 1
    outputs: ClassVar[str]

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        num_heads: int,
        top_k: int,
        d_key: int,
        share_sub_keys: bool,
        query_norm: str | None,
        score_activation: str,
        implementation: Placed[str | None],
        dtype: Dtype | None,
        param_dtype: Dtype,
        query_init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(d_model=d_model, num_experts=num_experts, num_heads=num_heads, top_k=top_k, d_key=d_key)
        check_flag(share_sub_keys=share_sub_keys)
        check_layer(dtype, param_dtype, rngs, query_init=query_init)
        check_choice("query_norm", query_norm, QUERY_NORMS)
        check_choice("score_activation", score_activation, SCORE_ACTIVATIONS)
        check_implementation(implementation)
        n = math.isqrt(num_experts)
        if n * n != num_experts:
            raise InputError(
                f"num_experts={num_experts} must be the square of the number of sub-keys: try {n * n} or {(n + 1) ** 2}"
            )
        if d_key % 2:
            raise InputError(f"d_key={d_key} must be even: it is split into two halves")
        if top_k > num_experts:
            raise InputError(f"top_k={top_k} is more than num_experts={num_experts}")
        if num_experts > 2**31:
            raise InputError(f"num_experts={num_experts} is more than int32 counts, 2^31: choose at most 46340^2")
        num_params = (self.num_tables * num_experts + num_heads * d_key) * d_model
        sizes = {"d_model": d_model, "num_experts": num_experts, "num_heads": num_heads, "d_key": d_key}
        check_memory(self.name, num_params, param_dtype, **sizes)

        self.d_model, self.num_experts = d_model, num_experts
        self.num_heads, self.top_k, self.d_key = num_heads, top_k, d_key
        self.share_sub_keys, self.score_activation = share_sub_keys, score_activation
        self.implementation = implementation
        self.dtype = dtype
        self.query_proj = Linear(
            d_model,
            num_heads * d_key,
            ("embed", "keys"),
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=query_init,
            rngs=rngs,
        )
        self.query_norm: nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm | None
        if query_norm == "batch":
            self.needs_whole_batch = ("query batch-norm", "set query_norm to 'layer' or None")
            self.query_norm = nnx.BatchNorm(
                num_heads * d_key,
                momentum=0.9,
                use_fast_variance=False,
                dtype=jnp.float32,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        elif query_norm == "layer":
            self.query_norm = nnx.LayerNorm(
                d_key, use_fast_variance=False, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
            )
        elif query_norm == "qk":
            self.query_norm = nnx.RMSNorm(d_key // 2, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)
        else:
            self.query_norm = None
        shape = (2, n, d_key // 2) if share_sub_keys else (num_heads, 2, n, d_key // 2)
        self.sub_keys = nnx.Param(jax.random.uniform(rngs.params(), shape, param_dtype, -(d_key**-0.5), d_key**-0.5))

    def route(self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None) -> Routing:
        """The experts retrieved for each token and their gates; running statistics stay as they are."""
        x, mask = real_tokens(self.name, x, mask, self.d_model)
        return self._route(x, mask, nnx.clone(self.query_norm))

    def _route(
        self,
        x: Float[Array, "*tokens d"],
        mask: Bool[Array, "*tokens"] | None,
        norm: nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm | None,
    ) -> Routing:
        queries = self.query_proj(x).astype(jnp.float32)
        if isinstance(norm, nnx.BatchNorm):
            queries = batch_norm(norm, queries, mask)
        queries, sub_keys = queries.reshape(*x.shape[:-1], self.num_heads, self.d_key), self.sub_keys[...]
        if isinstance(norm, nnx.LayerNorm):
            queries = norm(queries)
        elif isinstance(norm, nnx.RMSNorm):
            queries, sub_keys = _query_key_norm(norm, queries, sub_keys)
        scores, indices = product_key_top_k(queries, sub_keys, self.top_k, implementation=self.implementation)
        return Routing(indices, SCORE_ACTIVATIONS[self.score_activation](scores))

    def _aux(self, routing: Routing, mask: Bool[Array, "*tokens"] | None) -> Aux:
        """No loss. The metric is the largest gate of a head, averaged over heads and tokens: it is near 1 if softmax
        picks a single expert.
        """
        top = jnp.mean(jnp.max(routing.gates, axis=-1), axis=-1)
        return Aux(jnp.zeros(()), {"top_gate": mean_of_real(top, mask)})

    def expert_keys(self, experts: Int[Array, " m"]) -> Float[Array, "m q"]:
        """Both sub-keys of each expert, normalised if scores take them so; of every head, if heads don't share them."""
        keys = self.sub_keys[...]
        if isinstance(self.query_norm, nnx.RMSNorm):
            keys = _over_rms(self.query_norm, keys)
        n, heads = keys.shape[-2], keys.reshape(-1, *keys.shape[-3:])
        pairs = jnp.concatenate([heads[:, 0, experts // n], heads[:, 1, experts % n]], axis=-1)
        return jnp.moveaxis(pairs, 0, 1).reshape(experts.size, -1)

    def expert_matrices(self, experts: Int[Array, " m"]) -> dict[str, Float[Array, "m neurons d"]]:
        tables = nnx.to_flat_state(nnx.state(self, Table))
        return {name: table.get_value()[experts][:, None] for (name,), table in tables}

    def expert_outputs(self, experts: Int[Array, " m"]) -> Float[Array, "m d"] | None:
        return getattr(self, self.outputs)[...][experts]

    def options(self) -> dict[str, object]:
        named = {nnx.LayerNorm: "layer", nnx.RMSNorm: "qk"}.get(type(self.query_norm))
        return super().options() | ({} if named is None else {"query_norm": named})

    def _retrieval_flops(self) -> int:
        """FLOPs per token of the query projection and of the scores of both halves."""
        n = self.sub_keys.shape[-2]
        return 2 * self.num_heads * self.d_key * (self.d_model + n)

    def num_active_params(self) -> int:
        idle = max(0, self.num_experts - self.num_heads * self.top_k)
        return self.num_params() - self.num_tables * idle * self.d_model

    def _rows_touched(self, tokens: int) -> int:
        return min(self.num_experts, tokens * self.num_heads * self.top_k)

    def were_there(self, experts: Int[Array, "..."], num_experts: int) -> Bool[Array, "..."]:
        """Experts are pairs of sub-keys, and the sub-keys of a smaller pool come first in a larger one."""
        n, before = self.sub_keys.shape[-2], math.isqrt(num_experts)
        return (experts // n < before) & (experts % n < before)

    def grow(self, smaller: FeedForward) -> None:
        """Takes over a smaller layer of the same class. Expert i of n * n becomes (i // n) * n' + i % n of n' * n'.

        New sub-keys are those of ``sub_keys_between``. The rows of new experts are as they were initialised, but zero
        in the table that outputs come from: a new expert adds nothing to the output where it is retrieved, but takes
        weight from the others and the place of the one that was last among the top k.

        Raises:
            InputError: if this layer has no more experts than the other, or its sub-keys are normalised.
        """
        if isinstance(self.query_norm, nnx.RMSNorm):
            raise InputError(
                f"num_experts can't grow from {smaller.num_experts} with query_norm='qk', which makes new sub-keys as "
                "long as the old ones, so that they would displace them: leave num_experts as it was"
            )
        if self.num_experts <= smaller.num_experts:
            raise InputError(
                f"num_experts={self.num_experts} is not more than {smaller.num_experts}, from which to grow: raise it"
            )
        old = smaller.sub_keys[...]
        new = sub_keys_between(old, self.sub_keys.shape[-2] - old.shape[-2])
        self.sub_keys[...] = jnp.concatenate([old, new], axis=-2)
        outputs = getattr(self, self.outputs)
        outputs[...] = jnp.zeros_like(outputs[...])
        take_over(self, smaller)

    def _exchanged(self, step: Callable[..., Collectives], load: DeviceLoad, gate_size: int) -> Collectives:
        """What ``step``, a function of ``traffic``, exchanges for the subclass's tables."""
        t, r, N, E, D = load.tokens, self.num_heads * self.top_k, self.num_experts, load.expert, load.copies
        rows, found = N, Collectives()
        if load.touched is not None:
            parts = E if load.tables == "rows" else 1
            rows = compact_size(N, self._rows_touched(E * D * t), parts, load.touched)
            found = traffic.touched_rows(t, r, N, rows, E, D, load.tables)
        sizes = {"size": load.size, "gate_size": gate_size}
        return step(t, r, self.d_model, rows, E, D, load.tables, **sizes, remat=load.remat).plus(found)

    def _retrieval_floor(self, tokens: int, *, backward: bool, size: int, weight_size: int) -> Floor:
        """Floor of the query projection and of the top-k, which is the same in both orders."""
        h, n, k, d_key = self.num_heads, self.sub_keys.shape[-2], self.top_k, self.d_key
        key_sets = 1 if self.share_sub_keys else h
        # Queries are float32 whatever the type of the computation; sub-keys have the type of the parameters.
        narrower = Floor((weight_size - FLOAT) * key_sets * n * d_key, 0)
        least = floor.linear_passes(
            tokens, self.d_model, h * d_key, backward=backward, size=size, weight_size=weight_size
        )
        least += floor.product_key_top_k(tokens, h, n, d_key, k, key_sets=key_sets) + narrower
        if backward:  # moves the sub-keys and their gradients
            least += floor.product_key_top_k_backward(tokens, h, n, d_key, k, key_sets=key_sets) + narrower + narrower
        return least


def _query_key_norm(
    norm: nnx.RMSNorm, queries: Float[Array, "*tokens h q"], sub_keys: Float[Array, "*sets n c"]
) -> tuple[Float[Array, "*tokens h q"], Float[Array, "*sets n c"]]:
    """Both halves of each query, and each sub-key, with a root mean square of 1; queries scaled for the scores.

    Halves are normalised on their own, because the norm of a whole key would not let scores be sums over its halves.
    The learned scale is one of queries alone: a scale of sub-keys would only be multiplied by it.
    """
    halves = norm(queries.reshape(*queries.shape[:-1], 2, -1)).reshape(queries.shape)
    return halves * queries.shape[-1] ** -0.5, _over_rms(norm, sub_keys)


def _over_rms(norm: nnx.RMSNorm, sub_keys: Float[Array, "*sets n c"]) -> Float[Array, "*sets n c"]:
    """Each sub-key divided by its root mean square."""
    sub_keys = sub_keys.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(sub_keys), axis=-1, keepdims=True)
    return sub_keys * jax.lax.rsqrt(mean_square + norm.epsilon)


def initial_table(initialiser: Initializer, key: Array, shape: tuple[int, int], dtype: Dtype) -> Table:
    """A table that is split over devices as ``TABLE_AXES`` say, and whose rows have nothing to do with each other.

    A table of more than ``MOST_AT_ONCE`` elements is made in blocks of rows, each from a key of its own: on CPUs, the
    random numbers of a block take several times its memory. The initialiser then sees the shape of a block.

    Raises:
        InputError: as ``initial`` does.
    """
    num_rows, width = shape
    least = max(1, -(-num_rows * width // MOST_AT_ONCE))
    blocks = next(number for number in range(least, num_rows + 1) if num_rows % number == 0)
    if blocks == 1:
        return Table(initial(initialiser, key, shape, dtype), axes=TABLE_AXES)

    def block(key: Array) -> Float[Array, "rows columns"]:
        return initial(initialiser, key, (num_rows // blocks, width), dtype)

    one_after_another = current() is None and target().platform == "cpu"  # a mesh would have all blocks everywhere
    make = functools.partial(jax.lax.map, block) if one_after_another else jax.vmap(block)
    return Table(make(jax.random.split(key, blocks)).reshape(shape), axes=TABLE_AXES)
