"""The interface of optimisers; and AdamW, with rates, clipping and weight decay of their own for expert tables."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from peer_jax.errors import InputError
from peer_jax.layers.checks import check_choice, check_positive
from peer_jax.layers.interface import Table
from peer_jax.sharding import mean_over, on_each_device, specs, sum_over
from peer_jax.training import rounding
from peer_jax.training.update_by_rows import update_by_rows

BACKBONE = "backbone"
NORMS = ("grad_norm", "update_norm", "param_norm")


@runtime_checkable
class Optimizer(Protocol):
    """What a run needs of an optimiser: an object of values that do not change, as ``AdamW`` is.

    ``params`` is a model's parameters, a pytree of ``nnx.Param``s. ``labels``, with the same structure, says which
    group each parameter belongs to: "backbone", or an expert table by its name ("down", "up", "values"). Rates are
    computed outside of the compiled step and passed to it, so that one compiled program serves a whole schedule.
    """

    def rates(self, labels: nnx.State, step: int, steps: int) -> Mapping[str, float]:
        """The learning rates of update ``step``, counted from 0, in a run of ``steps``, by any names.

        A run logs each as ``learning_rate/<name>`` and passes all of them to ``update``.
        """
        ...

    def check(self, labels: nnx.State) -> None:
        """Raises an InputError if the optimiser does not fit a model with these groups."""
        ...

    def init(self, labels: nnx.State, params: nnx.State) -> Any:
        """The state before the first update: any pytree of arrays.

        A part of the state that is made with ``jax.tree.map`` over ``params``, as optax makes moments, is split over
        devices as the parameters are. Every device has all of the other arrays.
        """
        ...

    def update(
        self, labels: nnx.State, params: nnx.State, grads: nnx.State, state: Any, rates: Mapping[str, Array | float]
    ) -> tuple[nnx.State, Any, dict[str, Float[Array, ""]]]:
        """New parameters, new state and the scalars to log, from the gradient of the mean loss per token.

        The scalars must include the global norms of ``NORMS``: a run that finds the norm of the gradient or of the new
        parameters not finite stops before it saves them. The call is traced, and the old parameters and state are
        donated.
        """
        ...


class Compensated(NamedTuple):
    """The state of Adam, and what parameters in bfloat16 have lost to rounding, also in bfloat16."""

    count: Array
    mu: nnx.State
    nu: nnx.State
    lost: nnx.State


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Decoupled AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) for a model of backbone and expert tables.

    The tables are ``down`` and ``up`` of PEER and ``values`` of PKM; all other parameters are the backbone. The
    backbone and each kind of table are clipped by their own global norm. Rates grow linearly during warm-up and then
    fall along a cosine. Vectors (norm scales and biases) have no weight decay. Moments and updates are float32.

    Args:
        learning_rate: peak rate of the backbone.
        table_learning_rate: peak rate of the tables: one number for all, or {"down": ..., "up": ...}; None: the rate of
            the backbone.
        warmup_steps: steps of linear growth from zero. A run that is not longer warms up in all steps but the last.
        final_fraction: the share of the peak rate that the last step has.
        weight_decay, table_weight_decay: multiplied by the rate.
        table_second_moment: "element" for Adam's, or "row" for a single one per row of a table, the running mean of the
            row's mean squared gradient, which halves the optimiser's memory (docs/log.md).
        rounding: how parameters in bfloat16 are rounded after an update (docs/performance.md). "compensated": to the
            nearest value, and what is lost is kept in bfloat16 for the next update; "nearest": an update of less than
            1/512 of a parameter is lost. None: "compensated".
        clip_norm, table_clip_norm: largest global norm of the gradient; None: no clipping.
        b1, b2, eps: as in Adam.
    """

    # The compiled step takes rates as arguments, so these make no other program.
    schedule_arguments: ClassVar[tuple[str, ...]] = (
        *("learning_rate", "table_learning_rate", "warmup_steps", "final_fraction"),
    )

    learning_rate: float
    table_learning_rate: float | Mapping[str, float] | None = None
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    table_weight_decay: float = 0.0
    table_second_moment: str = "element"
    rounding: str | None = None
    clip_norm: float | None = 1.0
    table_clip_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_positive(learning_rate=self.learning_rate)
        check_choice("table_second_moment", self.table_second_moment, ("element", "row"))
        check_choice("rounding", self.rounding, (None, *rounding.FORMS))
        for name in ("clip_norm", "table_clip_norm"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        check_positive(eps=self.eps)
        table_rates = self.table_learning_rate
        for rate in table_rates.values() if isinstance(table_rates, Mapping) else [table_rates]:
            if rate is not None and not 0 <= rate < math.inf:
                raise InputError(f"table_learning_rate={table_rates} must be finite and not negative")
        for name in ("warmup_steps", "weight_decay", "table_weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} must be finite and not negative")
        if not 0 <= self.final_fraction <= 1:
            raise InputError(f"final_fraction={self.final_fraction} must lie in [0, 1]")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must lie in [0, 1)")

    def schedule(self, step: int, steps: int) -> float:
        """The rate of update ``step``, counted from 0, in a run of ``steps``, relative to the peak."""
        warmup = min(self.warmup_steps, steps - 1)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step + 1 - warmup) / (steps - warmup)
        return self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def rates(self, labels: nnx.State, step: int, steps: int) -> dict[str, float]:
        """The learning rate of each group at ``step``."""
        scale = self.schedule(step, steps)
        return {label: scale * self._peak(label) for label in sorted(set(jax.tree.leaves(labels)))}

    def _peak(self, label: str) -> float:
        table_rate = self.learning_rate if self.table_learning_rate is None else self.table_learning_rate
        if label == BACKBONE:
            return self.learning_rate
        if isinstance(table_rate, Mapping):
            if label not in table_rate:
                raise InputError(f"table_learning_rate={dict(table_rate)} has no rate for the table {label!r}")
            return table_rate[label]
        return table_rate

    def check(self, labels: nnx.State) -> None:
        """Raises an InputError if there is a rate for a table that the model does not have."""
        named = self.table_learning_rate if isinstance(self.table_learning_rate, Mapping) else {}
        if unknown := sorted(named.keys() - set(jax.tree.leaves(labels))):
            raise InputError(f"table_learning_rate has a rate for {unknown[0]!r}, but the model has no such table")

    def init(self, labels: nnx.State, params: nnx.State) -> "optax.ScaleByAdamState | Compensated":
        """The moments of the gradients before the first step, and what parameters have lost to rounding so far.

        Raises:
            InputError: if a rounding is given for parameters in bfloat16, and there are none.
        """
        in_bfloat16 = any(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))
        if self.rounding not in (None, "nearest") and not in_bfloat16:
            raise InputError(
                f"AdamW.rounding={self.rounding!r} is for parameters in bfloat16: set "
                "Transformer.param_dtype=%bfloat16, or leave it out"
            )
        state = optax.scale_by_adam().init(jax.tree.map(in_float32, params))
        if self.table_second_moment == "row":
            by_row = jax.tree.map(lambda label, nu: nu if label == BACKBONE else nu[:, :1], labels, state.nu)
            state = state._replace(nu=by_row)
        if in_bfloat16 and self.rounding in (None, "compensated"):
            return Compensated(*state, jax.tree.map(jnp.zeros_like, params))
        return state

    def update(
        self,
        labels: nnx.State,
        params: nnx.State,
        grads: nnx.State,
        state: "optax.ScaleByAdamState | Compensated",
        rates: Mapping[str, Array | float],
    ) -> tuple[nnx.State, "optax.ScaleByAdamState | Compensated", dict[str, Float[Array, ""]]]:
        """Parameters and state after a step, and the global norms of gradient, update and parameters."""
        label, treedef = jax.tree.flatten(labels)
        squares = [_sum_of_squares(g) for g in treedef.flatten_up_to(grads)]
        clip = {
            group: _clip(self._clip_norm(group), sum(s for s, of in zip(squares, label, strict=True) if of == group))
            for group in sorted(set(label))
        }

        def leaf(group: str, spec: PartitionSpec, p: Array, g: Array, mu: Array, nu: Array, lost: Any):
            decay = 0.0 if p.ndim < 2 else self.weight_decay if group == BACKBONE else self.table_weight_decay
            moment_spec = spec if nu.shape == p.shape else PartitionSpec(*spec[:1])

            def part(tables: tuple, g: Array, clip: Array, rate: Array, count: Array):
                def step(p: Array, mu: Array, nu: Array, lost: Array | None, g: Array):
                    moments = optax.ScaleByAdamState(count, mu, nu)
                    direction, after = self._direction(in_float32(g) * clip, moments, spec)
                    exact = in_float32(p) if lost is None else in_float32(p) + in_float32(lost)
                    u = -rate * (direction + decay * exact)
                    if lost is not None:
                        new, lost = rounding.compensated(exact + u, p.dtype)
                    else:
                        new = (exact + u).astype(p.dtype)
                    return (new, after.mu, after.nu, lost), jnp.stack([_sum_of_squares(u), _sum_of_squares(new)])

                new, sums = update_by_rows(step, tables, g)
                return new, sum_over(spec, sums)

            tables = (spec, spec, moment_spec, spec)
            update = on_each_device(part, (tables, spec, *(PartitionSpec(),) * 3), (tables, PartitionSpec()))
            rate = jnp.asarray(rates[group], jnp.float32)
            return update((p, mu, nu, lost), g, clip[group], rate, state.count)

        trees = [treedef.flatten_up_to(tree) for tree in (specs(params), params, grads, state.mu, state.nu)]
        lost = treedef.flatten_up_to(state.lost) if isinstance(state, Compensated) else [None] * len(label)
        new, sums = zip(*(leaf(*of) for of in zip(label, *trees, lost, strict=True)), strict=True)
        params, mu, nu, lost = (treedef.unflatten(leaves) for leaves in zip(*new, strict=True))
        update_norm, param_norm = jnp.sqrt(sum(sums))
        norms = {"grad_norm": jnp.sqrt(sum(squares)), "update_norm": update_norm, "param_norm": param_norm}
        after = optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)
        return params, Compensated(*after, lost) if isinstance(state, Compensated) else after, norms

    def _direction(
        self, g: Array, state: optax.ScaleByAdamState, spec: PartitionSpec
    ) -> tuple[Array, optax.ScaleByAdamState]:
        """The direction of Adam's update, with a second moment per element or per row, whichever the state has."""
        if state.nu.shape == g.shape:
            return optax.scale_by_adam(self.b1, self.b2, self.eps).update(g, state)
        count = optax.safe_increment(state.count)
        mu = self.b1 * state.mu + (1 - self.b1) * g
        squares = mean_over(PartitionSpec(*spec[1:]), jnp.mean(jnp.square(g), axis=-1, keepdims=True))
        nu = self.b2 * state.nu + (1 - self.b2) * squares
        unbiased_mu, unbiased_nu = mu / (1 - self.b1**count), nu / (1 - self.b2**count)
        return unbiased_mu / (jnp.sqrt(unbiased_nu) + self.eps), optax.ScaleByAdamState(count, mu, nu)

    def _clip_norm(self, label: str) -> float | None:
        return self.clip_norm if label == BACKBONE else self.table_clip_norm


def in_float32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _sum_of_squares(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(in_float32(x)))


def _clip(largest: float | None, sum_of_squares: Float[Array, ""]) -> Float[Array, ""]:
    """The factor that limits the norm of a gradient to ``largest``."""
    if largest is None:
        return jnp.ones(())
    norm = jnp.sqrt(sum_of_squares)
    return jnp.where(norm > largest, largest / norm, 1.0)


def label_params(params: nnx.State) -> nnx.State:
    """The group of each parameter: the name of a table, or "backbone"."""

    def label(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(str(path[-1].key) if isinstance(variable, Table) else BACKBONE)

    return jax.tree_util.tree_map_with_path(label, params, is_leaf=lambda v: isinstance(v, nnx.Variable))
