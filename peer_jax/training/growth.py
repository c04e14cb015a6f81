"""Beginning a run with the state of another run whose layers have a smaller pool of experts."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from peer_jax.errors import InputError
from peer_jax.layers.growing import placed
from peer_jax.models import Model
from peer_jax.processes import together
from peer_jax.training.flops import training_flops
from peer_jax.training.restore import restore
from peer_jax.training.run import Grown, Run
from peer_jax.training.step import Trainer, TrainState


def begin(run: Run, trainer: Trainer, position: Mapping[str, Any]) -> tuple[int, TrainState, dict[str, Any]]:
    """The step, state and data position with which a run begins that is ``grown_from`` another.

    Args:
        run: the run.
        trainer: its functions.
        position: the position in the data of a run that has read nothing, and the fingerprint of its text.

    Raises:
        InputError: if there is no such run or checkpoint, or the models differ in more than ``num_experts``.
    """
    with together():
        source = _source(run)
        smaller = source.trainer()
        _check(run, source, trainer, smaller)
    try:
        step, state, spent = restore(smaller, run.grown_from, str(run.grown_at))
    except InputError as error:
        raise type(error)(f"Run.grown_from: {error}") from error
    at_same_place = spent.get("text") == position["text"] and _order(run) == _order(source)
    return (
        step,
        _grown(trainer, smaller, state, run.seed),
        {
            **position,
            "batches": spent["batches"] if at_same_place else position["batches"],
            "clock": {"wall_seconds": spent["clock"]["wall_seconds"]},
            "grown": _spent(run, source, smaller.abstract_model, step, Grown(**spent.get("grown", {})))._asdict(),
        },
    )


def _source(run: Run) -> Run:
    """The run that is to grow, by its own config."""
    if run.config is None:
        raise InputError(f"grown_from={run.grown_from!r} needs the run's config: load the run by peer_jax.config.load")
    try:
        return run.config.kept(run.grown_from)
    except InputError as error:
        raise type(error)(f"Run.grown_from: {error}") from error


def _check(run: Run, source: Run, trainer: Trainer, smaller: Trainer) -> None:
    """An InputError unless the run's model and optimiser can take over those of its source."""
    before, now = source.config.model, run.config.model
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name) and not name.endswith(".num_experts"):
            raise InputError(
                f"{run.grown_from} has {name} = {before.get(name, 'unset')}, now it is {now.get(name, 'unset')}: a run "
                "that grows keeps its model but for num_experts"
            )
    run.task.check_fits(source.task, str(run.grown_from))
    if before == now:
        raise InputError(f"{run.grown_from} has as many experts: raise num_experts, or leave Run.grown_from out")
    larger = functools.partial(_larger, trainer, smaller)
    nnx.eval_shape(larger, smaller.abstract_state(), jax.random.key(0))  # layers that can't grow say so
    if not _alike(smaller.abstract_state().optimizer, trainer.abstract_state().optimizer):
        raise InputError(
            f"the optimiser of {run.grown_from} keeps another state than {type(run.optimizer).__name__} does now: give "
            "it the settings that it had there"
        )


def _alike(before: Any, now: Any) -> bool:
    """Whether two states of optimisers have the same arrays, but for the number of their rows."""
    kinds = [[(leaf.ndim, leaf.shape[-1:], leaf.dtype) for leaf in jax.tree.leaves(state)] for state in (before, now)]
    return jax.tree.structure(before) == jax.tree.structure(now) and kinds[0] == kinds[1]


def _order(run: Run) -> tuple[int, int]:
    """What the order of the rows of a text depends on."""
    return run.batch_size, run.order_seed


def _spent(run: Run, source: Run, model: Model, step: int, before: Grown) -> Grown:
    """What the source had spent at ``step``, by the models that it had until then."""
    tokens = (step - before.steps) * source.batch_size * source.task.seq_len
    return Grown(
        source=str(run.grown_from),
        num_experts=model.method.num_experts,
        steps=step,
        tokens=before.tokens + tokens,
        training_flops=before.training_flops + training_flops(model, tokens, source.task.seq_len),
    )


def _grown(trainer: Trainer, smaller: Trainer, state: TrainState, seed: int) -> TrainState:
    """The state of the larger model. Each device makes its own part of it.

    Moments go with their parameters, and those of new sub-keys and rows are zero, while the optimiser's count of steps
    goes on: Adam then divides by moments that began at zero as if they were unbiased, as it does for every row of a
    table that is retrieved for the first time late in a run.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract_state())
    return jax.jit(functools.partial(_grow, trainer, smaller), out_shardings=shardings)(state, jax.random.key(seed))


def _larger(trainer: Trainer, smaller: Trainer, state: TrainState, key: Array) -> tuple[Model, Model]:
    """The model of a state, and a larger one, whose larger layers have taken over those of the first."""
    before, model = nnx.merge(smaller.graph, state.params, state.others), trainer.build(rngs=nnx.Rngs(key))
    for block, old in zip(model.blocks, before.blocks, strict=True):
        if block.ffw.num_experts != old.ffw.num_experts:
            block.ffw.grow(old.ffw)
    return before, model


def _grow(trainer: Trainer, smaller: Trainer, state: TrainState, key: Array) -> TrainState:
    before, model = _larger(trainer, smaller, state, key)
    _, params, others = nnx.split(model, nnx.Param, ...)
    params, others = _kept(state.params, params), _kept(state.others, others)

    def moments(fresh: Any, old: Any) -> Any:
        if not isinstance(fresh, nnx.State):  # an array that is not made of the parameters one by one
            return old if jnp.issubdtype(old.dtype, jnp.integer) else fresh
        return trainer.frozen.put_back(fresh, _placed(model, before, fresh, old))

    fresh = trainer.optimizer.init(trainer.labels, params)
    optimizer = jax.tree.map(moments, fresh, state.optimizer, is_leaf=lambda part: isinstance(part, nnx.State))
    return TrainState(state.step, params, others, optimizer)


def _kept(old: nnx.State, made: nnx.State) -> nnx.State:
    """The old arrays; where the larger model has made arrays of another shape, these."""
    flat = dict(nnx.to_flat_state(old))
    return nnx.map_state(lambda path, new: flat[path] if flat[path].shape == new.shape else new, made)


def _placed(model: Model, before: Model, fresh: nnx.State, old: nnx.State) -> nnx.State:
    """Arrays of the optimiser that belong to parameters, rearranged as these are."""
    flat = dict(nnx.to_flat_state(old))

    def place(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        new, had = variable.get_value(), flat[path].get_value()
        if new is None or new.shape == had.shape:  # None: a moment that a table doesn't have
            return flat[path]
        index = path[path.index("blocks") + 1]
        num_experts = before.blocks[index].ffw.num_experts
        return variable.replace(placed(model.blocks[index].ffw, num_experts, variable, had, new))

    return nnx.map_state(place, fresh)
