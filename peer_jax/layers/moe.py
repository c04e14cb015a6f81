"""Mixture of coarse experts, each as large as the dense layer it replaces.

Sources: expert choice, Zhou et al. 2022 (arXiv:2202.09368); token choice with balance loss, Fedus et al. 2021 (Switch,
arXiv:2101.03961) and Lepikhin et al. 2020 (GShard, arXiv:2006.16668); router z-loss, Zoph et al. 2022 (ST-MoE,
arXiv:2202.08906); fine-grained experts and a shared one, Dai et al. 2024 (DeepSeekMoE, arXiv:2401.06066).

b  batch     s  sequence     d  d_model     E  experts     C  capacity: tokens that an expert takes from a sequence
f  d_ff      k  top-k        m  rows given to an expert
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError
from peer_jax.layers.checks import check_choice, check_layer, check_number, check_positive, check_sizes, initial
from peer_jax.layers.dense import Dense
from peer_jax.layers.experts import CoarseExperts, as_batch
from peer_jax.layers.interface import GATED_ACTIVATIONS, Aux, Benchmark, DeviceLoad, Routing
from peer_jax.layers.linear import Linear
from peer_jax.layers.masked import mean_of_real
from peer_jax.ops import sharded
from peer_jax.ops.grouped import grouped_product
from peer_jax.ops.kept import keep
from peer_jax.ops.traffic import Collectives
from peer_jax.sharding import EXPERT, automatic, on_each_device, split_of

ROUTINGS = ("expert_choice", "token_choice")


class MoE(CoarseExperts):
    """Coarse mixture of experts; tokens compete within their sequence only.

    *Expert choice*: each expert takes the C = ceil(seq * capacity_factor / E) tokens that give it the highest
    probability, weighted by that probability. It compares tokens with later ones, so it sees the future:
    ``is_causal`` is False.

    *Token choice*: each token takes its ``top_k`` experts; if top_k > 1, their probabilities are renormalised. With a
    capacity, an expert has C = ceil(seq * top_k * capacity_factor / E) places per sequence. They are filled in the
    order of the tokens and later tokens are dropped, which keeps the layer causal. With ``capacity_factor=None`` no
    token is dropped.

    *Fine-grained* experts have a ``d_ff`` of 4 * d_model / G, and a token takes ``top_k=G`` of them, so that as many
    parameters are active as in the dense layer; G is the granularity. A *shared expert* is added to every token's
    output, without a weight. K shared experts are one of K times their width.

    The input may have any axes before that of the sequence.

    The parameters are ``router``, ``shared``, a ``Dense``, and, stacked over E, ``up``, ``down`` and, gated, ``gate``.

    Args:
        d_model: width of input and output.
        num_experts: E.
        d_ff: hidden width of an expert; 4 * d_model if None.
        routing: "expert_choice" or "token_choice".
        top_k: experts per token, for token choice.
        capacity_factor: places per expert, relative to the places needed if all experts were equally popular; None for
            no limit.
        activation: as in ``Dense``.
        shared_d_ff: hidden width of the shared expert; None for no such expert.
        balance_loss_weight: weight of the loss E * sum_e f_e p_e, for token choice.
        z_loss_weight: weight of the mean squared logsumexp of the router's logits, for token choice.
        router_noise: Gaussian noise of this standard deviation, divided by E, is added to the logits in training.
        dtype: type of the computation; the type of ``x`` if None. The router is always float32.
        param_dtype: type of the parameters.
        kernel_init, router_init: initialisers.
        rngs: random numbers for the parameters; the stream ``router`` is for the noise.

    Raises:
        InputError: if sizes or options don't fit, or the layer doesn't fit into memory.
    """

    variant_option = "routing"
    # The numbers of experts that fine-grained layers are measured at would take hundreds of gigabytes here.
    benchmark = Benchmark(by_default=False, ignored=("top_k",), num_experts=(16, 64))

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_ff: int | None = None,
        *,
        routing: str = "expert_choice",
        top_k: int = 1,
        capacity_factor: float | None = 1.0,
        activation: str = "gelu",
        shared_d_ff: int | None = None,
        balance_loss_weight: float = 0.01,
        z_loss_weight: float = 0.001,
        router_noise: float = 0.0,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(batch_axis=0),
        router_init: Initializer = nnx.initializers.lecun_normal(),
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(d_model=d_model, num_experts=num_experts, top_k=top_k)
        check_sizes(**({} if shared_d_ff is None else {"shared_d_ff": shared_d_ff}))
        check_choice("routing", routing, ROUTINGS)
        check_number(balance_loss_weight=balance_loss_weight, z_loss_weight=z_loss_weight, router_noise=router_noise)
        check_layer(dtype, param_dtype, rngs, kernel_init=kernel_init, router_init=router_init)
        if router_noise < 0:
            raise InputError(f"router_noise={router_noise} is a standard deviation: it must be at least 0")
        if top_k > num_experts:
            raise InputError(f"top_k={top_k} is more than num_experts={num_experts}")
        if capacity_factor is not None:
            check_positive(capacity_factor=capacity_factor)
        elif routing == "expert_choice":
            raise InputError("capacity_factor=None means no limit, which only routing='token_choice' can do")

        self.routing, self.top_k, self.capacity_factor = routing, top_k, capacity_factor
        self.balance_loss_weight, self.z_loss_weight = balance_loss_weight, z_loss_weight
        self.variant = routing.replace("_", " ")
        self.is_causal = routing == "token_choice"
        self.mixes_tokens = capacity_factor is not None
        self.router = Linear(
            d_model,
            num_experts,
            None,
            dtype=jnp.float32,
            param_dtype=param_dtype,
            kernel_init=router_init,
            rngs=rngs,
        )
        kernels_each = 3 if activation in GATED_ACTIVATIONS else 2
        self._make_experts(
            d_model,
            num_experts,
            d_ff,
            activation,
            d_model * (num_experts + kernels_each * (shared_d_ff or 0)),
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            rngs=rngs,
        )
        self.shared_d_ff = shared_d_ff
        self.shared = (
            None
            if shared_d_ff is None
            else Dense(
                d_model,
                shared_d_ff,
                activation=activation,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=lambda key, shape, dtype: initial(kernel_init, key, (1, *shape), dtype)[0],
                rngs=rngs,
            )
        )
        self.router_noise = router_noise
        self.deterministic = False
        self.noise_rngs = rngs.fork() if router_noise else None

    def __call__(
        self, x: Float[Array, "*b s d"], mask: Bool[Array, "*b s"] | None = None
    ) -> tuple[Float[Array, "*b s d"], Aux]:
        x, mask = self._sequences(x, mask)
        logits = self._logits(x)
        if self.noise_rngs is not None and not self.deterministic:
            noise = jax.random.normal(self.noise_rngs.router(), logits.shape)
            logits = logits + self.router_noise / self.num_experts * noise
        x = x.astype(self.dtype or x.dtype)
        split = split_of(x, x.ndim - 1)
        y, aux = automatic(self._forward, split and (split, split_of(x, 0)))(x, logits, mask, self._kernels())
        return (y if self.shared is None else y + self.shared(x, mask)[0]), aux

    def _forward(
        self,
        x: Float[Array, "*b s d"],
        logits: Float[Array, "*b s E"],
        mask: Bool[Array, "*b s"],
        kernels: list[Array],
    ) -> tuple[Float[Array, "*b s d"], Aux]:
        if not x.size:
            names = ("dropped",) if self.routing == "expert_choice" else ("balance_loss", "router_z_loss", "dropped")
            return x, Aux(jnp.zeros(()), {name: jnp.zeros(()) for name in names})
        run = self._expert_choice if self.routing == "expert_choice" else self._token_choice
        y, aux = run(*as_batch(x.ndim - 2, x, logits, mask), kernels)
        # A token with infinite or NaN logits can't be compared with others, whatever experts it got.
        comparable = jnp.all(jnp.isfinite(logits), axis=-1)
        return jnp.where(comparable[..., None], y.reshape(x.shape), jnp.nan), aux

    def route(self, x: Float[Array, "*b s d"], mask: Bool[Array, "*b s"] | None = None) -> Routing:
        """Experts and combine weights of each token, without noise.

        For expert choice h = 1 and k = E: every expert is listed, with weight zero if it did not choose the token.
        """
        x, mask = self._sequences(x, mask)

        def run(logits: Float[Array, "*b s E"], mask: Bool[Array, "*b s"]) -> Routing:
            batch = as_batch(logits.ndim - 2, logits, mask)
            expert_choice = self.routing == "expert_choice"
            routing = self._list_experts(*batch) if expert_choice else self._choose_experts(*batch)[0]
            return Routing(*(a.reshape(*mask.shape, *a.shape[2:]) for a in routing))

        return automatic(run, split_of(x, x.ndim - 1))(self._logits(x), mask)

    def _logits(self, x: Float[Array, "*b s d"]) -> Float[Array, "*b s E"]:
        return self.router(x.astype(jnp.float32))

    def _capacity(self, seq_len: int) -> int:
        """Places per sequence and expert."""
        if self.capacity_factor is None:
            return seq_len
        choices = self.top_k if self.routing == "token_choice" else 1
        return min(seq_len, math.ceil(seq_len * choices * self.capacity_factor / self.num_experts))

    # Expert choice.

    def _choose_tokens(
        self, logits: Float[Array, "b s E"], mask: Bool[Array, "b s"]
    ) -> tuple[Int[Array, "b E C"], Float[Array, "b E C"]]:
        """Each expert's tokens and their weights, which are zero for padding and for tokens that can't be compared."""
        probabilities = jnp.swapaxes(jax.nn.softmax(logits), 1, 2)
        able = (mask & jnp.all(jnp.isfinite(logits), axis=-1))[:, None, :]
        weight, token = _top_k(jnp.where(able, probabilities, -1.0), self._capacity(logits.shape[1]))
        return token, jnp.maximum(weight, 0.0)

    def _list_experts(self, logits: Float[Array, "b s E"], mask: Bool[Array, "b s"]) -> Routing:
        """Every expert for each token, with weight zero if it did not choose the token."""
        token, weight = self._choose_tokens(logits, mask)
        b, s, e = logits.shape
        gates = jnp.zeros((b, s, e)).at[jnp.arange(b)[:, None, None], token, jnp.arange(e)[:, None]].add(weight)
        indices = jnp.broadcast_to(jnp.arange(e, dtype=jnp.int32), (b, s, 1, e))
        return Routing(indices, gates[:, :, None])

    def _expert_choice(
        self,
        x: Float[Array, "b s d"],
        logits: Float[Array, "b s E"],
        mask: Bool[Array, "b s"],
        kernels: list[Array],
    ) -> tuple[Float[Array, "b s d"], Aux]:
        token, weight = self._choose_tokens(logits, mask)
        y = self._by_capacity(jax.vmap(lambda x, token: x[token])(x, token), kernels)
        y = jax.vmap(lambda x, token, y: jnp.zeros_like(x).at[token].add(y))(
            x, token, weight[..., None].astype(x.dtype) * y
        )
        used = jnp.where(weight > 0, 1.0, 0.0)
        taken = jax.vmap(lambda token, used: jnp.zeros(x.shape[1]).at[token].max(used))(token, used)
        return y, Aux(jnp.zeros(()), {"dropped": mean_of_real(1 - taken, mask)})

    # Token choice.

    def _choose_experts(
        self, logits: Float[Array, "b s E"], mask: Bool[Array, "b s"]
    ) -> tuple[Routing, Int[Array, "b s k"]]:
        """Each token's experts, weights after dropping, and the place in the expert's queue."""
        gates, experts = _top_k(jax.nn.softmax(logits), self.top_k)
        if self.top_k > 1:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        chosen = jax.nn.one_hot(experts, self.num_experts, dtype=jnp.int32) * mask[..., None, None].astype(jnp.int32)
        b, s, k, e = chosen.shape
        # All choices of a token queue before any choice of the next token. In another order later tokens could push out
        # the second choices of earlier ones.
        queue = jnp.cumsum(chosen.reshape(b, s * k, e), axis=1).reshape(b, s, k, e)
        place = jnp.sum(chosen * queue, axis=-1) - 1
        place = keep(jnp.where(place < self._capacity(s), place, -1))
        gates = jnp.where(place < 0, 0.0, gates)
        return Routing(experts[:, :, None], gates[:, :, None]), place

    def _token_choice(
        self,
        x: Float[Array, "b s d"],
        logits: Float[Array, "b s E"],
        mask: Bool[Array, "b s"],
        kernels: list[Array],
    ) -> tuple[Float[Array, "b s d"], Aux]:
        routing, place = self._choose_experts(logits, mask)
        experts, gates = routing.indices[:, :, 0], routing.gates[:, :, 0]
        if self.capacity_factor is None:
            outputs = self._dropless(x, experts, kernels)
        else:
            outputs = self._within_capacity(x, experts, place, kernels)
        y = jnp.einsum("bskd,bsk->bsd", outputs, gates.astype(x.dtype))

        real = mask.astype(jnp.float32)
        tokens = jnp.maximum(jnp.sum(real, axis=1), 1.0)
        chosen = jnp.sum(jax.nn.one_hot(experts, self.num_experts) * real[..., None, None], axis=(1, 2))
        share = chosen / (tokens[:, None] * self.top_k)
        probability = jnp.sum(jax.nn.softmax(logits) * real[..., None], axis=1) / tokens[:, None]
        balance = jnp.mean(self.num_experts * jnp.sum(share * probability, axis=-1))
        z = jnp.mean(jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * real, axis=1) / tokens)
        dropped = mean_of_real(jnp.mean(jnp.where(place < 0, 1.0, 0.0), axis=-1), mask)
        metrics = {"balance_loss": balance, "router_z_loss": z, "dropped": dropped}
        return y, Aux(self.balance_loss_weight * balance + self.z_loss_weight * z, metrics)

    def _within_capacity(
        self,
        x: Float[Array, "b s d"],
        experts: Int[Array, "b s k"],
        place: Int[Array, "b s k"],
        kernels: list[Array],
    ) -> Float[Array, "b s k d"]:
        """Outputs of the chosen experts, zero for dropped choices."""
        b, s, k = experts.shape
        e, capacity = self.num_experts, self._capacity(s)
        slot = jnp.where(place < 0, e * capacity, experts * capacity + place)
        token = jnp.broadcast_to(jnp.arange(s)[None, :, None], (b, s, k))
        empty = jnp.zeros(e * capacity, jnp.int32)
        taken = jax.vmap(lambda slot, token: empty.at[slot].set(token, mode="drop"))(slot, token)
        rows = jnp.take_along_axis(x, taken[..., None], axis=1, mode="promise_in_bounds").reshape(b, e, capacity, -1)
        y = self._by_capacity(rows, kernels).reshape(b, e * capacity, -1)
        y = jax.vmap(lambda y, slot: y[slot])(y, jnp.minimum(slot, e * capacity - 1))
        return jnp.where((place < 0)[..., None], 0, y)

    def _dropless(
        self,
        x: Float[Array, "b s d"],
        experts: Int[Array, "b s k"],
        kernels: list[Array],
    ) -> Float[Array, "b s k d"]:
        """Outputs of the chosen experts, by grouped products over the choices sorted by expert.

        If experts are split over devices, every device gathers the tokens of all these devices, computes the choices
        of its own experts, and sends the outputs back.
        """

        def of_device(kernels: list[Array], x: Array, experts: Array) -> Array:
            split = sharded.splits_experts()
            if split:
                x, experts = sharded.gather(x), sharded.gather(experts)
            here = kernels[0].shape[0]
            own = experts.reshape(-1) - (here * jax.lax.axis_index(EXPERT) if split else 0)
            own = jnp.where((own >= 0) & (own < here), own, here)  # choices of other devices' experts come last
            order = jnp.argsort(own, stable=True)
            order, back, sizes = keep((order, jnp.argsort(order), jnp.bincount(own, length=here)))
            rows = x.reshape(-1, x.shape[-1])[order // experts.shape[-1]]
            y = self._mlp(lambda rows, kernel: grouped_product(rows, kernel, sizes), rows, *kernels)
            y = jnp.where((own < here)[:, None], y[back], 0).reshape(*experts.shape, -1)
            return sharded.scatter_sum(y) if split else y

        specs = PartitionSpec(EXPERT), sharded.TOKENS, sharded.TOKENS
        return on_each_device(of_device, specs, sharded.TOKENS)(kernels, x, experts)

    def mix(self, x: Float[Array, "*tokens d"], routing: Routing) -> Float[Array, "*tokens d"]:
        """Runs every expert on every token, which costs E times as much as a dense layer, one expert after another."""
        x = x.astype(self.dtype or x.dtype)

        def add(y: Array, expert: tuple[Array, list[Array]]) -> tuple[Array, None]:
            number, kernels = expert
            weight = jnp.sum(routing.gates, axis=(-2, -1), where=routing.indices == number)
            out = self._mlp(lambda rows, kernel: rows @ kernel.astype(rows.dtype), x, *kernels)
            return y + weight[..., None].astype(x.dtype) * out, None

        numbers = jnp.arange(self.num_experts, dtype=jnp.int32)
        y = jax.lax.scan(add, jnp.zeros_like(x), (numbers, self._kernels()))[0]
        return y if self.shared is None else y + self.shared(x)[0]

    def expert_keys(self, experts: Int[Array, " m"]) -> Float[Array, "m q"]:
        return self.router.kernel[...].T[experts]

    def expert_matrices(self, experts: Int[Array, " m"]) -> dict[str, Float[Array, "m neurons d"]]:
        rows = {"up": jnp.swapaxes(self.up[...][experts], 1, 2), "down": self.down[...][experts]}
        return rows if self.gate is None else rows | {"gate": jnp.swapaxes(self.gate[...][experts], 1, 2)}

    def flops_per_token(self, seq_len: int) -> float:
        check_sizes(seq_len=seq_len)
        router = 2 * math.prod(self.router.kernel.shape)
        shared = 0 if self.shared is None else self.shared.flops_per_token(seq_len)
        return router + self._places_per_token(seq_len) * 2 * self._expert_params() + shared

    def _places_per_token(self, seq_len: int) -> float:
        """Places of all experts that are computed, divided by the number of tokens."""
        if self.capacity_factor is None:
            return self.top_k
        return self.num_experts * self._capacity(seq_len) / seq_len

    def num_active_params(self) -> int:
        experts_per_token = (
            self.top_k if self.routing == "token_choice" else min(self.capacity_factor, self.num_experts)
        )
        shared = 0 if self.shared is None else self.shared.num_params()
        return math.prod(self.router.kernel.shape) + round(experts_per_token * self._expert_params()) + shared

    def exchanged(self, load: DeviceLoad) -> Collectives | None:
        """Tokens go to the experts and back once in each direction, and once more with remat; unknown if dropless."""
        if self.capacity_factor is None:
            return super().exchanged(load)
        return self._sent(load, load.tokens * self._places_per_token(load.seq_len))


def _top_k(scores: Float[Array, "b i o"], k: int) -> tuple[Float[Array, "b i {k}"], Int[Array, "b i {k}"]]:
    """The k largest along the last axis.

    On a mesh every device selects among its own sequences; GSPMD would gather all sequences first.
    """

    def of_device(scores: Array) -> tuple[Array, Array]:
        place = keep(jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1])
        return jnp.take_along_axis(scores, place, axis=-1), place

    return sharded.by_tokens(of_device, (), (scores,))
