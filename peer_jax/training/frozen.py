"""Experts that training leaves as they are: rows of the expert tables without gradients and updates."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from peer_jax.errors import InputError
from peer_jax.layers.interface import TABLE_AXES, FeedForward
from peer_jax.models.model import Model, Path
from peer_jax.sharding import EXPERT, on_each_device, parts_of, spec_of
from peer_jax.training.touched import RowGradients

Mask = Bool[np.ndarray, " N"]


class FrozenExperts:
    """The frozen rows of a model's tables, if there are any.

    Their gradients are zero before the optimiser sees them, so that they count in no norm. After its update the rows of
    whole tables are put back, whatever momentum and weight decay would have done to them; in a step on touched rows, a
    row rests whose gradient is zero. Their moments are zero if they were zero in the beginning, as they are in a new
    run and in one that has just grown.

    Args:
        model: whose tables they are; it may be abstract.
        experts: how many experts the layers had before they grew, which are frozen; or a mask of all experts, for each
            layer alike. None: no expert is frozen.

    Raises:
        InputError: if the model has no tables, or they had no such number of experts.
    """

    def __init__(self, model: Model, experts: int | Mask | None) -> None:
        self._frozen: dict[Path, Callable[[Array], Array]] = {}
        if experts is not None:
            self._frozen = {path: _are_frozen(layers[0], experts) for path, (_, layers) in model.tables().items()}
        if experts is not None and not self._frozen:
            raise InputError(f"frozen_experts={experts}: the model has no tables of experts, so leave it out")

    def without_gradients(self, grads: nnx.State, params: nnx.State) -> nnx.State:
        """The gradients of the parameters, zero for frozen rows."""
        tables = dict(nnx.to_flat_state(params))

        def of(path: Path, parameter: nnx.Variable) -> nnx.Variable:
            if (are_frozen := self._frozen.get(path)) is None:
                return parameter
            gradient, num_rows = parameter.get_value(), tables[path].shape[0]
            if isinstance(gradient, RowGradients):
                return parameter.replace(_zero_where(are_frozen, gradient, num_rows))
            return parameter.replace(jnp.where(are_frozen(jnp.arange(num_rows))[:, None], 0, gradient))

        return nnx.map_state(of, grads) if self._frozen else grads

    def put_back(self, before: nnx.State, after: nnx.State, grads: nnx.State | None = None) -> nnx.State:
        """Parameters or moments after an update, with the frozen rows that they had before.

        Args:
            before, after: the same arrays; a moment that a table doesn't have is None.
            grads: the gradients of the update, which has changed no frozen row of a table whose gradient is by rows.
        """
        old, given = dict(nnx.to_flat_state(before)), dict(nnx.to_flat_state(grads or nnx.State({})))
        by_rows = {path for path, gradient in given.items() if isinstance(gradient.get_value(), RowGradients)}

        def of(path: Path, parameter: nnx.Variable) -> nnx.Variable:
            new, are_frozen = parameter.get_value(), self._frozen.get(path)
            if new is None or are_frozen is None or path in by_rows:
                return parameter
            frozen = are_frozen(jnp.arange(new.shape[0]))[:, None]
            return parameter.replace(jnp.where(frozen, old[path].get_value(), new))

        return nnx.map_state(of, after) if self._frozen else after


def _are_frozen(layer: FeedForward, experts: int | Mask) -> Callable[[Int[Array, "..."]], Bool[Array, "..."]]:
    """A function that tells of rows whether they are frozen."""
    if not isinstance(experts, int):
        if experts.shape != (layer.num_experts,):
            raise InputError(
                f"frozen_experts is a mask of {experts.size}, but {layer.name} has num_experts={layer.num_experts}: "
                "give True or False for each"
            )
        return lambda rows: jnp.asarray(experts).at[rows].get(mode="fill", fill_value=False)
    fits = 0 < experts < layer.num_experts
    if not fits or jnp.sum(layer.were_there(jnp.arange(layer.num_experts), experts)) != experts:
        raise InputError(
            f"frozen_experts={experts} is no size that the {layer.num_experts} experts of {layer.name} can have grown "
            "from: give the num_experts of the run before it grew"
        )
    return functools.partial(layer.were_there, num_experts=experts)


def _zero_where(are_frozen: Callable[[Array], Array], gradient: RowGradients, num_rows: int) -> RowGradients:
    """The gradient with zeros for frozen rows; ``num_rows`` are those of the whole table."""
    parts = parts_of("rows")

    def on_device(gradient: RowGradients) -> RowGradients:
        first = jax.lax.axis_index(EXPERT) * (num_rows // parts) if parts > 1 else 0
        frozen = are_frozen(first + gradient.rows)[:, None]
        # NaN says that there was no room for all rows, whichever of them are frozen.
        return gradient._replace(values=jnp.where(frozen & ~jnp.isnan(gradient.values), 0, gradient.values))

    split = RowGradients(spec_of("rows"), spec_of(*TABLE_AXES))
    return on_each_device(on_device, (split,), split)(gradient)
