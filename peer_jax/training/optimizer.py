"""The interface of optimisers; and AdamW, with rates, clipping and weight decay of their own for expert tables."""

import dataclasses
import functools
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
from peer_jax.fields import Placed
from peer_jax.layers.checks import check_choice, check_positive
from peer_jax.layers.interface import Table
from peer_jax.sharding import mean_over, on_each_device, specs, sum_over
from peer_jax.training import rounding
from peer_jax.training.touched import RowGradients
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
        devices as the parameters are. Every device has all of the other arrays. When a pool of experts grows, such a
        part is rearranged as the parameters are, integers stay as they are, and all other arrays are made anew.
        """
        ...

    def update(
        self, labels: nnx.State, params: nnx.State, grads: nnx.State, state: Any, rates: Mapping[str, Array | float]
    ) -> tuple[nnx.State, Any, dict[str, Float[Array, ""]]]:
        """New parameters, new state and the scalars to log, from the gradient of the mean loss per token.

        The scalars must include the global norms of ``NORMS``: a run that finds the norm of the gradient or of the new
        parameters not finite stops before it saves them. The call is traced, and the old parameters and state are
        donated.

        An optimiser with a method ``updates_touched(room, num_rows) -> bool`` gets the gradients of those tables for
        which it is true, if their layers retrieve rows, as ``peer_jax.training.touched.RowGradients``. All other rows,
        and those with a gradient of zero, must stay as they are. ``room`` is the number of rows in such a gradient: as
        many as a batch can touch, or the share of these that an attribute ``touched_share`` of the optimiser says. Any
        other optimiser gets arrays alone.
        """
        ...


class Compensated(NamedTuple):
    """The state of Adam, and what parameters in bfloat16 have lost to rounding, also in bfloat16."""

    count: Array
    mu: nnx.State
    nu: nnx.State
    lost: nnx.State


class TouchableTables(NamedTuple):
    """The state if the update of a table's row may rest while the row has no gradient.

    Attributes:
        count, mu, nu, lost: as in ``Compensated``; ``mu`` is None for tables without a first moment, ``lost`` may be.
        squares: the sum of the squared parameters of each table, so that the norm of the parameters is known without
            reading whole tables: a float32 number, and what it has lost to rounding.
        last: for each row of a table the update that its moments are from, None for the backbone; or None, if the
            moments of all rows are from the last update.
    """

    count: Array
    mu: nnx.State
    nu: nnx.State
    lost: nnx.State | None
    squares: dict[str, Float[Array, "2"]]
    last: nnx.State | None


State = optax.ScaleByAdamState | Compensated | TouchableTables


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
        table_b1: b1 of the tables; None: ``b1``. With 0, tables have no first moment, and no memory for it.
        untouched_rows: what happens to a row of a table in a step that gives it no gradient. "update": its momentum and
            its weight decay move it, as Adam has it; "rest": it stays as it is, and its moments decay for the skipped
            steps once it has a gradient again (``update``).
        table_updates: "all": gradients and updates of whole tables; "touched": those of the rows that the batch
            retrieves, which is the same update, and needs rows to rest. None: "touched" where rows rest and there is to
            be room for at most half of a table's rows.
        touched_share: the room for touched rows, as a share of those that a batch could touch if no two of its tokens
            retrieved the same. Time and memory follow it. A run says how many rows it touches (``touched_rows``), and
            fails before it saves a step that has touched more than there was room for.
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
    table_b1: float | None = None
    untouched_rows: str = "update"
    table_updates: Placed[str | None] = None
    touched_share: Placed[float] = 1.0
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
        for name in ("b1", "b2", "table_b1"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise InputError(f"{name}={value} must lie in [0, 1)")
        check_choice("untouched_rows", self.untouched_rows, ("update", "rest"))
        check_choice("table_updates", self.table_updates, (None, "all", "touched"))
        if not 0 < self.touched_share <= 1:
            raise InputError(f"touched_share={self.touched_share} must lie in (0, 1]")
        if self.table_updates == "touched" and (moving := self._moves_untouched_rows()):
            raise InputError(
                f"AdamW.table_updates='touched' leaves rows as they are that a batch does not touch, but {moving} "
                "changes them: set AdamW.untouched_rows to 'rest', or table_updates to 'all'"
            )

    def _moves_untouched_rows(self) -> str | None:
        """The argument by which rows without a gradient change; None if they rest."""
        resting = {"table_b1": 0, "table_second_moment": "row", "table_weight_decay": 0}
        moving = (f"{name}={getattr(self, name)!r}" for name, value in resting.items() if getattr(self, name) != value)
        return None if self.untouched_rows == "rest" else next(moving, None)

    def updates_touched(self, room: int, num_rows: int) -> bool:
        """Whether it wants the gradient of a table of ``num_rows`` by rows, with room for ``room`` of them."""
        if self.table_updates is None:
            return self._moves_untouched_rows() is None and 2 * room <= num_rows
        return self.table_updates == "touched"

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

    def init(self, labels: nnx.State, params: nnx.State) -> State:
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
        compensates = in_bfloat16 and self.rounding in (None, "compensated")
        lost = jax.tree.map(jnp.zeros_like, params) if compensates else None
        rests = self.untouched_rows == "rest"
        if rests or self.table_b1 == 0:
            leaves = jax.tree.leaves(params)
            squares = {name: _plus(jnp.zeros(2), _sum_of_squares(leaves[place])) for place, name in _tables(labels)}

            mu, last = state.mu, None
            if self.table_b1 == 0:
                mu = jax.tree.map(lambda label, mu: mu if label == BACKBONE else None, labels, mu)
            if rests:
                first = functools.partial(jnp.zeros, dtype=jnp.int32)
                last = jax.tree.map(lambda label, p: None if label == BACKBONE else first((len(p), 1)), labels, params)
            return TouchableTables(state.count, mu, state.nu, lost, squares, last)
        return Compensated(*state, lost) if compensates else state

    def update(
        self,
        labels: nnx.State,
        params: nnx.State,
        grads: nnx.State,
        state: State,
        rates: Mapping[str, Array | float],
    ) -> tuple[nnx.State, State, dict[str, Float[Array, ""]]]:
        """Parameters and state after a step, and the global norms of gradient, update and parameters.

        A row u of a table with the gradient g, its first moment m and its second moment n change as follows in step t:
        m <- b1 m + (1 - b1) g, n <- b2 n + (1 - b2) g^2, and u <- u - rate (m / (1 - b1^t) / (sqrt(n / (1 - b2^t)) +
        eps) + decay u). With ``table_second_moment="row"``, n is one number and g^2 the mean of the row's squares; with
        ``table_b1=0``, there is no m, and g / (1 - b1^t) is in its place.

        Where g = 0, m and n only decay, and u moves by its momentum and decay, unless ``untouched_rows="rest"``: then
        the row stays as it is, and after s such steps in a row it begins with b1^s m and b2^s n, which are Adam's
        moments. What is left out is the way that u would have gone in these steps. Weight decay is that of the steps
        with a gradient. With ``table_b1=0``, a second moment per row and no decay, a row rests in either way.

        The gradient of a table is zero but for the rows that a batch retrieves, so its norm, by which it is clipped, is
        that of these rows.
        """
        label, treedef = jax.tree.flatten(labels)
        squares = [
            _sum_of_squares(g.values if isinstance(g, RowGradients) else g) for g in treedef.flatten_up_to(grads)
        ]
        clip = {
            group: _clip(self._clip_norm(group), sum(s for s, of in zip(squares, label, strict=True) if of == group))
            for group in sorted(set(label))
        }

        def leaf(group: str, spec: PartitionSpec, g: Array | RowGradients, p: Array, mu: Any, nu: Array, *others: Any):
            moment_spec = spec if nu.shape == p.shape else PartitionSpec(*spec[:1])
            by_rows = isinstance(g, RowGradients)

            def part(tables: tuple, g: Array | RowGradients, clip: Array, rate: Array, count: Array):
                how = {"group": group, "spec": spec, "by_rows": by_rows, "clip": clip, "rate": rate, "count": count}
                step = functools.partial(self._step, **how)
                if by_rows:
                    p, mu, nu, lost, last = tables
                    onto = tables if last is not None else (p, mu, self.b2 * nu, lost, last)
                    new, sums = update_by_rows(step, tables, g.values, rows=g.rows, onto=onto)
                else:
                    new, sums = update_by_rows(step, tables, g)
                return new, sum_over(spec, sums)

            tables = (spec, spec, moment_spec, spec, PartitionSpec(*spec[:1]))
            gradient = RowGradients(PartitionSpec(*spec[:1]), spec) if by_rows else spec
            update = on_each_device(part, (tables, gradient, *(PartitionSpec(),) * 3), (tables, PartitionSpec()))
            rate = jnp.asarray(rates[group], jnp.float32)
            return update((p, mu, nu, *others), g, clip[group], rate, state.count)

        further = [getattr(state, name, None) for name in ("lost", "last")]
        trees = [treedef.flatten_up_to(tree) for tree in (specs(params), grads, params, state.mu, state.nu)]
        trees += [[None] * len(label) if tree is None else treedef.flatten_up_to(tree) for tree in further]
        new, sums = zip(*(leaf(*of) for of in zip(label, *trees, strict=True)), strict=True)
        params, mu, nu, *changed = (treedef.unflatten(leaves) for leaves in zip(*new, strict=True))
        lost, last = (None if tree is None else after for tree, after in zip(further, changed, strict=True))
        update_squares, param_squares = map(list, zip(*sums, strict=True))
        moments = optax.ScaleByAdamState(optax.safe_increment(state.count), mu, nu)
        if isinstance(state, TouchableTables):
            before, known = state.squares, {}
            for place, name in _tables(labels):
                by_rows = isinstance(trees[1][place], RowGradients)
                known[name] = _plus(before[name] if by_rows else jnp.zeros(2), param_squares[place])
                param_squares[place] = known[name][0]
            after = TouchableTables(*moments, lost, known, last)
        else:
            after = moments if lost is None else Compensated(*moments, lost)
        norms = {"grad_norm": squares, "update_norm": update_squares, "param_norm": param_squares}
        return params, after, {name: jnp.sqrt(sum(each)) for name, each in norms.items()}

    def _step(
        self,
        p: Array,
        mu: Array | None,
        nu: Array,
        lost: Array | None,
        last: Array | None,
        g: Array,
        *,
        group: str,
        spec: PartitionSpec,
        by_rows: bool,
        clip: Array,
        rate: Array,
        count: Array,
    ) -> tuple[tuple[Array | None, ...], Float[Array, "2"]]:
        """Some rows of a parameter and of its state after a step, see ``update``; and two sums of squares.

        The sums are that of the update, and that of the new parameters, or with ``by_rows`` how much it has changed.
        """
        before, b1 = (p, mu, nu, lost, last), self._b1(group)
        if last is not None:
            skipped = count - last
            mu, nu = None if mu is None else b1**skipped * mu, self.b2**skipped * nu
        direction, moments = self._direction(in_float32(g) * clip, optax.ScaleByAdamState(count, mu, nu), b1, spec)
        decay = 0.0 if p.ndim < 2 else self.weight_decay if group == BACKBONE else self.table_weight_decay
        exact = in_float32(p) if lost is None else in_float32(p) + in_float32(lost)
        u = -rate * (direction + decay * exact)
        if lost is not None:
            new, lost = rounding.compensated(exact + u, p.dtype)
        else:
            new = (exact + u).astype(p.dtype)
        after = new, moments.mu, moments.nu, lost, last
        if by_rows or last is not None:  # a row without a gradient rests, and so does padding
            touched = mean_over(PartitionSpec(*spec[1:]), jnp.any(g != 0, axis=-1, keepdims=True) * 1.0) > 0
            if last is None:  # the second moment decays all the same
                before = *before[:2], moments.nu, *before[3:]
            else:
                after = *after[:-1], jnp.broadcast_to(moments.count, last.shape)
            after = jax.tree.map(lambda new, old: jnp.where(touched, new, old), after, before)
            u = jnp.where(touched, u, 0)
        squares = _change_of_squares(p, after[0]) if by_rows else _sum_of_squares(after[0])
        return after, jnp.stack([_sum_of_squares(u), squares])

    def _direction(
        self, g: Array, state: optax.ScaleByAdamState, b1: float, spec: PartitionSpec
    ) -> tuple[Array, optax.ScaleByAdamState]:
        """The direction of Adam's update, with the moments that the state has.

        The second moment is per element or per row. Without a first moment, the gradient is in its place.
        """
        if state.nu.shape == g.shape and state.mu is not None:
            return optax.scale_by_adam(b1, self.b2, self.eps).update(g, state)
        count = optax.safe_increment(state.count)
        mu = None if state.mu is None else b1 * state.mu + (1 - b1) * g
        squares = jnp.square(g)
        if state.nu.shape != g.shape:
            squares = mean_over(PartitionSpec(*spec[1:]), jnp.mean(squares, axis=-1, keepdims=True))
        nu = self.b2 * state.nu + (1 - self.b2) * squares
        unbiased_mu, unbiased_nu = g if mu is None else mu / (1 - b1**count), nu / (1 - self.b2**count)
        return unbiased_mu / (jnp.sqrt(unbiased_nu) + self.eps), optax.ScaleByAdamState(count, mu, nu)

    def _b1(self, label: str) -> float:
        return self.b1 if label == BACKBONE or self.table_b1 is None else self.table_b1

    def _clip_norm(self, label: str) -> float | None:
        return self.clip_norm if label == BACKBONE else self.table_clip_norm


def in_float32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _sum_of_squares(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(in_float32(x)))


def _change_of_squares(before: Array, after: Array) -> Float[Array, ""]:
    """The sum of the squares of ``after`` less that of ``before``."""
    before, after = in_float32(before), in_float32(after)
    return jnp.sum((after - before) * (after + before))


def _plus(total: Float[Array, "2"], more: Float[Array, ""]) -> Float[Array, "2"]:
    """Kahan's sum: a number and what it lacks, after ``more`` has been added."""
    number, lacks = total
    more += lacks
    return jnp.stack([number + more, more - ((number + more) - number)])


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


def _tables(labels: nnx.State) -> list[tuple[int, str]]:
    """The places of the tables among the leaves of ``labels``, and their names, such as "blocks.2.ffw.up"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(labels, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return [
        (place, jax.tree_util.keystr(path, simple=True, separator="."))
        for place, (path, label) in enumerate(flat)
        if label.get_value() != BACKBONE
    ]
