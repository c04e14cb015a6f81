"""Multilinear mixture of experts: N weight matrices in one tensor, of which only factors are ever made.

Source: Oldfield et al. 2024, "Multilinear Mixture of Experts" (arXiv:2402.12550), and its public code
(github.com/james-oldfield/muMoE), from which the initialisers and the language model's block are taken.

d  d_model     f  d_ff     i, o  widths of a map's input and output     n  experts of a level     R  rank
t  ring rank     w  width between the factors of input and output: R, or t * R in the TR form
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jaxtyping import Array, Bool, Float, Int

from peer_jax.errors import InputError
from peer_jax.layers.checks import check_choice, check_layer, check_memory, check_sizes, real_tokens
from peer_jax.layers.interface import ACTIVATIONS, Aux, Benchmark, FeedForward, Routing
from peer_jax.layers.linear import Linear
from peer_jax.layers.masked import batch_norm, mean_of_real
from peer_jax.ops.entmax import entmax15

FORMS = ("CP", "TR")
GATE_NORMS = ("layer", "batch", None)
NORM_EPSILON = 1e-5
MOST_LISTED = 1024  # experts whose gates ``route`` lists for each token


class Factors(nnx.Module):
    """The factors of a tensor W [n, i + 1, o], or [n1, n2, i + 1, o]; it maps z to sum_n a_n W_n^T [z; 1].

    CP: W_nio = sum_r A_nr U_ir V_or. TR: W_nio = sum_pqr A_pnq U_qir V_rop, a trace of matrices. A second level of
    experts has a factor B: A_nr B_mr in place of A_nr, or sum_s A_pns B_smq in place of A_pnq.

    ``experts`` has the kernels of A and B, [n, R] or [n, t * t], ``input`` and ``bias`` are U [i + 1, w], and
    ``output`` is V [w, o].
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        levels: tuple[int, ...],
        rank: int,
        ring_rank: int | None,
        *,
        dtype: Dtype | None,
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        linear = functools.partial(Linear, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.ring_rank = ring_rank
        width = rank if ring_rank is None else ring_rank * rank
        per_expert = rank if ring_rank is None else ring_rank**2
        inits = [_near_identity(ring_rank, stddev=1.0 if level == 0 else 0.0) for level in range(len(levels))]
        self.experts = nnx.List(
            [linear(n, per_expert, None, kernel_init=init) for n, init in zip(levels, inits, strict=True)]
        )
        self.input = linear(d_in, width, ("embed", "hidden"), kernel_init=_uniform(d_in))
        self.bias = nnx.Param(_uniform(d_in)(rngs.params(), (width,), param_dtype))
        self.output = linear(width, d_out, ("hidden", "embed"), kernel_init=_uniform(width))

    def __call__(
        self, z: Float[Array, "*tokens i"], gates: list[Float[Array, "*tokens _"]]
    ) -> Float[Array, "*tokens o"]:
        hidden = self._hidden(z)
        mixed = [experts(gate.astype(hidden.dtype)) for experts, gate in zip(self.experts, gates, strict=True)]
        return self.output(self._scaled(hidden, self._joined(mixed)))

    def mix(self, z: Float[Array, "*tokens i"], gates: Float[Array, "*tokens N"]) -> Float[Array, "*tokens o"]:
        """The same for a gate of each of all experts, which need not be a product of gates of the levels."""
        hidden = self._hidden(z)
        rows = self._rows(jnp.arange(gates.shape[-1], dtype=jnp.int32)).astype(hidden.dtype)
        return self.output(self._scaled(hidden, jnp.tensordot(gates.astype(hidden.dtype), rows, 1)))

    def weights(self, experts: Int[Array, " m"]) -> Float[Array, "m rows o"]:
        """The matrices of some experts, [m, i + 1, o], the last row of each being its bias."""
        inputs = jnp.concatenate([self.input.kernel[...], self.bias[...][None]])
        return jnp.tensordot(self._scaled(inputs[None], self._rows(experts)[:, None]), self.output.kernel[...], 1)

    def _hidden(self, z: Float[Array, "*tokens i"]) -> Float[Array, "*tokens w"]:
        hidden = self.input(z)
        return hidden + jnp.expand_dims(self.bias[...].astype(hidden.dtype), tuple(range(hidden.ndim - 1)))

    def _rows(self, experts: Int[Array, " m"]) -> Float[Array, "m *factor"]:
        """What some experts scale by: [m, R], or [m, t, t] in the TR form."""
        places = jnp.unravel_index(experts, tuple(level.in_features for level in self.experts))
        return self._joined([level.kernel[...][at] for level, at in zip(self.experts, places, strict=True)])

    def _joined(self, levels: list[Float[Array, "*tokens _"]]) -> Float[Array, "..."]:
        """The factors of all levels as one: [*tokens, R], or [*tokens, t, t] in the TR form."""
        if self.ring_rank is None:
            return functools.reduce(jnp.multiply, levels)
        t = self.ring_rank
        return functools.reduce(jnp.matmul, [level.reshape(*level.shape[:-1], t, t) for level in levels])

    def _scaled(self, hidden: Float[Array, "*tokens w"], factor: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.ring_rank is None:
            return factor * hidden
        *tokens, width = hidden.shape
        scaled = factor @ hidden.reshape(*tokens, self.ring_rank, width // self.ring_rank)
        return scaled.reshape(*scaled.shape[:-2], width)

    def flops(self) -> int:
        """Forward FLOPs per token of all matrix products."""
        linears = (*self.experts, self.input, self.output)
        products = sum(math.prod(linear.kernel.shape) for linear in linears)
        if self.ring_rank is not None:
            t = self.ring_rank
            products += t * self.input.out_features + (len(self.experts) - 1) * t**3
        return 2 * products


class MuMoE(FeedForward):
    """Two multilinear mixtures with an activation between: y = M2(act(M1(x; a)); a), M(z; a) = sum_n a_n W_n^T [z; 1].

    The gate is a = entmax(norm(x P)), with exact zeros; P is zero at first, so that all experts begin equal. Both
    mixtures have the gate of the layer's input, as in the paper's GPT-2 blocks. With a second level of experts, the
    gate of expert (n, m) is a_n b_m, where b has a P and a norm of its own.

    The tensors W are never made: a token costs what a low-rank dense layer costs, however many experts there are (see
    ``Factors``). Every token uses all factors, so all parameters are active.

    The parameters are ``gate``, the kernels of P for all levels, and the factors of ``first`` and ``second``. The norm
    has none.

    Args:
        d_model: width of input and output.
        num_experts: all experts, those of the first level times those of the second.
        d_ff: width between the two mixtures; 4 * d_model if None.
        form: "CP" or "TR" (tensor ring), how the tensors are factorised.
        rank: R; if None, that with which the layer comes closest to the parameters of a dense one.
        match: with ``rank=None``, the hidden width of that dense layer; 4 * d_model if None.
        ring_rank: t, the other ranks in the TR form.
        second_level: experts of the second level; 1 for a single level.
        gate_norm: "layer", as in the paper's language model, "batch", as in its vision models, or None. Batch-norm uses
            statistics over the real tokens of the batch in training, and running statistics in evaluation.
        activation: "gelu", "relu" or "silu".
        dtype: type of the computation; the type of ``x`` if None. The gate is always float32.
        param_dtype: type of the parameters.
        rngs: random numbers for the parameters.

    Raises:
        InputError: if sizes or options don't fit, or the layer doesn't fit into memory.
    """

    variant_option = "form"
    benchmark = Benchmark(by_default=False, num_experts=(64, 256))

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        d_ff: int | None = None,
        *,
        form: str = "CP",
        rank: int | None = None,
        match: int | None = None,
        ring_rank: int = 4,
        second_level: int = 1,
        gate_norm: str | None = "layer",
        activation: str = "gelu",
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(d_model=d_model, num_experts=num_experts, ring_rank=ring_rank, second_level=second_level)
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_sizes(d_ff=d_ff, **{name: v for name, v in {"rank": rank, "match": match}.items() if v is not None})
        check_choice("form", form, FORMS)
        check_choice("gate_norm", gate_norm, GATE_NORMS)
        check_choice("activation", activation, ACTIVATIONS)
        check_layer(dtype, param_dtype, rngs)
        if num_experts % second_level:
            raise InputError(f"num_experts={num_experts} is not a multiple of second_level={second_level}: make it one")
        if rank is not None and match is not None:
            raise InputError(f"rank={rank} and match={match} both say how large the layer is: give one of them")

        levels = (num_experts,) if second_level == 1 else (num_experts // second_level, second_level)
        ring = ring_rank if form == "TR" else None
        fixed, per_rank = _sizes(d_model, d_ff, levels, ring)
        found = rank or round((2 * d_model * (match or 4 * d_model) - fixed) / per_rank)
        if found < 1:
            raise InputError(
                f"num_experts={num_experts}: the gate and one rank have more parameters than a dense layer of width "
                f"{match or 4 * d_model} with d_model={d_model}: choose fewer experts, or give a rank or a larger match"
            )
        check_memory(
            self.name, fixed + per_rank * found, param_dtype, d_model=d_model, num_experts=num_experts, rank=found
        )

        self.num_experts, self.second_level, self.levels = num_experts, second_level, levels
        self.form, self.rank, self.match, self.ring_rank = form, rank, match, ring_rank
        self.activation, self.dtype = activation, dtype
        self.variant = form
        types = {"param_dtype": param_dtype, "rngs": rngs}
        self.gate = Linear(
            d_model, sum(levels), None, dtype=jnp.float32, kernel_init=nnx.initializers.zeros_init(), **types
        )
        self.gate_norms = nnx.List([_norm(gate_norm, n, rngs) for n in levels])
        if gate_norm == "batch":
            self.needs_whole_batch = ("batch-norm of the gate", "set gate_norm to 'layer' or None")
        self.first = Factors(d_model, d_ff, levels, found, ring, dtype=dtype, **types)
        self.second = Factors(d_ff, d_model, levels, found, ring, dtype=dtype, **types)

    def __call__(
        self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None
    ) -> tuple[Float[Array, "*tokens d"], Aux]:
        x, mask = real_tokens(self.name, x, mask, self.gate.in_features)
        gates = self._gates(x, mask, self.gate_norms)
        hidden = ACTIVATIONS[self.activation](self.first(x, gates))
        # The share of experts that a token gives a weight above zero.
        used = math.prod(jnp.mean(jnp.where(gate > 0, 1.0, 0.0), axis=-1) for gate in gates)
        return self.second(hidden, gates), Aux(jnp.zeros(()), {"experts_used": mean_of_real(used, mask)})

    @property
    def routes(self) -> bool:
        """Whether ``route`` lists the gates of a token's experts, which takes N numbers per token."""
        return self.num_experts <= MOST_LISTED

    def route(self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None = None) -> Routing:
        """All experts and their gates, many of which are zero: h = 1 and k = N. Running statistics stay as they are.

        Raises:
            InputError: if there are more than ``MOST_LISTED`` experts.
        """
        if not self.routes:
            raise InputError(f"num_experts={self.num_experts} is more than {MOST_LISTED}, whose gates can be listed")
        x, mask = real_tokens(self.name, x, mask, self.gate.in_features)
        first, *second = self._gates(x, mask, nnx.clone(self.gate_norms))
        gates = first[..., None] * second[0][..., None, :] if second else first
        gates = gates.reshape(*x.shape[:-1], 1, self.num_experts)
        return Routing(jnp.broadcast_to(jnp.arange(self.num_experts, dtype=jnp.int32), gates.shape), gates)

    def mix(self, x: Float[Array, "*tokens d"], routing: Routing) -> Float[Array, "*tokens d"] | None:
        """The output for any gates of the experts, in both mixtures; None if there are more than ``MOST_LISTED``.

        The activation between the mixtures makes it no sum of what the experts put out by themselves.
        """
        if not self.routes:
            return None
        *tokens, h, k = routing.gates.shape
        indices, weights = (array.reshape(-1, h * k) for array in routing)
        gates = jax.vmap(lambda at, own: jnp.zeros(self.num_experts).at[at].add(own))(indices, weights)
        gates = gates.reshape(*tokens, self.num_experts)
        return self.second.mix(ACTIVATIONS[self.activation](self.first.mix(x, gates)), gates)

    def expert_keys(self, experts: Int[Array, " m"]) -> Float[Array, "m q"]:
        """The columns of P, one after the other for each level."""
        rows = jnp.split(self.gate.kernel[...].T, self.levels[:-1])
        places = jnp.unravel_index(experts, self.levels)
        return jnp.concatenate([level[at] for level, at in zip(rows, places, strict=True)], axis=-1)

    def expert_matrices(self, experts: Int[Array, " m"]) -> dict[str, Float[Array, "m neurons d"]]:
        """The matrices of both mixtures, made from the factors, without biases."""
        first, second = (factors.weights(experts)[:, :-1] for factors in (self.first, self.second))
        return {"up": jnp.swapaxes(first, 1, 2), "down": second}

    def _gates(
        self, x: Float[Array, "*tokens d"], mask: Bool[Array, "*tokens"] | None, norms: nnx.List
    ) -> list[Float[Array, "*tokens _"]]:
        """The gate of each level."""
        parts = jnp.split(self.gate(x.astype(jnp.float32)), self.levels[:-1], axis=-1)
        gates = []
        for part, norm in zip(parts, norms, strict=True):
            if isinstance(norm, nnx.BatchNorm):
                part = batch_norm(norm, part, mask)
            elif norm is not None:
                part = norm(part)
            gates.append(entmax15(part))
        return gates

    def options(self) -> dict[str, object]:
        d_ff = self.second.input.in_features
        return super().options() | ({} if d_ff == 4 * self.gate.in_features else {"d_ff": d_ff})

    def flops_per_token(self, seq_len: int) -> float:
        return 2 * math.prod(self.gate.kernel.shape) + self.first.flops() + self.second.flops()


def _sizes(d_model: int, d_ff: int, levels: tuple[int, ...], ring_rank: int | None) -> tuple[int, int]:
    """Parameters that don't depend on the rank, and parameters for each unit of the rank."""
    n = sum(levels)
    if ring_rank is None:
        return d_model * n, 2 * (n + d_model + 1 + d_ff)
    return (d_model + 2 * ring_rank**2) * n, 2 * ring_rank * (d_model + 1 + d_ff)


def _norm(kind: str | None, size: int, rngs: nnx.Rngs) -> nnx.BatchNorm | nnx.LayerNorm | None:
    """A norm without parameters."""
    options = {"epsilon": NORM_EPSILON, "use_bias": False, "use_scale": False, "use_fast_variance": False, "rngs": rngs}
    if kind == "batch":
        return nnx.BatchNorm(size, momentum=0.9, dtype=jnp.float32, **options)
    return nnx.LayerNorm(size, dtype=jnp.float32, **options) if kind == "layer" else None


def _near_identity(ring_rank: int | None, stddev: float) -> Initializer:
    """Rows of N(1, stddev^2); with a ring rank, diagonal matrices of such elements."""

    def init(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
        rows = 1 + stddev * jax.random.normal(key, shape, dtype)
        return rows if ring_rank is None else rows * jnp.eye(ring_rank, dtype=dtype).reshape(1, -1)

    return init


def _uniform(fan_in: int) -> Initializer:
    """U(-fan_in^-1/2, fan_in^-1/2)."""

    def init(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return init
