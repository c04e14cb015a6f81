"""Gradients of the touched rows of tables, out of the middle of a model (``peer_jax.layers.touched``)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peer_jax.layers.interface import Table
from peer_jax.layers.touched import TouchedTable
from peer_jax.models import Transformer
from peer_jax.ops.touched import touched_rows

Path = tuple[str | int, ...]


class RowGradients(NamedTuple):
    """The gradient of a table: that of the rows which the batch has touched. All others have none.

    Attributes:
        rows: numbers of the rows, ascending and different; those from the number of the table's rows on are padding.
        values: their gradients, zero for the padding.
    """

    rows: Int[Array, " U"]
    values: Float[Array, "U d"]


class TouchedTables:
    """The tables of a model that are trained by touched rows.

    Args:
        model: the model; tables whose layers define no ``rows_touched`` are trained whole.
        wanted: ``updates_touched`` of the optimiser; None: all tables are trained whole.
    """

    def __init__(self, model: Transformer, wanted: Callable[[int, int], bool] | None) -> None:
        self._wanted = wanted
        self._most: dict[Path, Callable[[int], int]] = {}
        for index, block in enumerate([] if wanted is None else model.blocks):
            if block.ffw.rows_touched(1) is not None:
                for path, parameter in nnx.to_flat_state(nnx.state(block.ffw, nnx.Param)):
                    if isinstance(parameter, Table):
                        self._most["blocks", index, "ffw", *path] = block.ffw.rows_touched

    def split(self, params: nnx.State, tokens: int) -> tuple[nnx.State, nnx.State]:
        """The parameters that are trained whole with batches of ``tokens`` tokens, and the tables that are not."""

        def is_whole(path: Path, parameter: nnx.Variable) -> bool:
            return path not in self._most or not self._wanted(self._most[path](tokens), parameter.shape[0])

        return nnx.split_state(params, is_whole, ...)

    def changes(self, tables: nnx.State, tokens: int) -> nnx.State:
        """The zeros of compact tables for a batch or micro-batch of ``tokens`` tokens."""

        def of(path: Path, table: Table) -> Table:
            return table.replace(jnp.zeros((self._most[path](tokens), table.shape[1]), table.dtype))

        return nnx.map_state(of, tables)

    def zero_gradients(self, params: nnx.State, tokens: int) -> nnx.State:
        """Gradients of zero in float32, with room for those of the rows that a batch of ``tokens`` tokens touches."""
        whole, tables = self.split(params, tokens)

        def by_rows(path: Path, table: Table) -> Table:
            (num_rows, d), most = table.shape, self._most[path](tokens)
            rows = jnp.arange(num_rows, num_rows + most, dtype=jnp.int32)
            return table.replace(RowGradients(rows, jnp.zeros((most, d), jnp.float32)))

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), whole)
        return nnx.merge_state(zeros, nnx.map_state(by_rows, tables))


def retrieved_rows(params: nnx.State) -> nnx.State:
    """The numbers of the rows that a model has retrieved from each ``TouchedTable``, from its parameters after a call."""
    tables = nnx.split_state(params, lambda _, parameter: isinstance(parameter.get_value(), TouchedTable), ...)[0]
    return nnx.map_state(lambda _, table: table.replace(table.get_value().rows), tables)


def with_changes(tables: nnx.State, changes: nnx.State) -> nnx.State:
    """The tables as a model has them during a step on touched rows."""
    return _zipped(TouchedTable, tables, changes)


def row_gradients(rows: nnx.State, of_changes: nnx.State) -> nnx.State:
    """The gradients of tables, from those of their changes and the rows that were changed."""
    return _zipped(RowGradients, rows, of_changes)


def sum_of_gradients(parameter: Array, total: Array | RowGradients, more: Array | RowGradients) -> Array | RowGradients:
    """The sum of two gradients of a parameter in the type of ``total``, which has room for the rows of both."""
    if not isinstance(total, RowGradients):
        return total + more.astype(total.dtype)
    most = total.rows.size
    rows, slots = touched_rows(jnp.concatenate([total.rows, more.rows]), parameter.shape[0], most)
    values = jnp.concatenate([total.values, more.values.astype(total.values.dtype)])
    return RowGradients(rows, jnp.zeros_like(total.values).at[slots].add(values, mode="drop"))


def _zipped(join: Callable, first: nnx.State, second: nnx.State) -> nnx.State:
    other = dict(nnx.to_flat_state(second))

    def of(path: Path, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(join(variable.get_value(), other[path].get_value()))

    return nnx.map_state(of, first)
