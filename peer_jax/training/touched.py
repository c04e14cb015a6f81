"""Gradients of the touched rows of tables, out of the middle of a model (``peer_jax.layers.touched``)."""

from collections.abc import Callable
from typing import NamedTuple

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
    """The tables of a model that are trained by touched rows, those whose layers allow it; no model has none."""

    def __init__(self, model: Transformer | None) -> None:
        self._most: dict[Path, Callable[[int], int]] = {}
        for index, block in enumerate([] if model is None else model.blocks):
            if block.ffw.rows_touched(1) is not None:
                for path, parameter in nnx.to_flat_state(nnx.state(block.ffw, nnx.Param)):
                    if isinstance(parameter, Table):
                        self._most["blocks", index, "ffw", *path] = block.ffw.rows_touched

    def __len__(self) -> int:
        return len(self._most)

    def __contains__(self, path: object) -> bool:
        return path in self._most

    def split(self, params: nnx.State) -> tuple[nnx.State, nnx.State]:
        """The parameters that are trained whole, and these tables."""
        return nnx.split_state(params, lambda path, _: path not in self._most, ...)

    def changes(self, tables: nnx.State, tokens: int) -> nnx.State:
        """The zeros of compact tables for a batch of ``tokens`` tokens."""

        def of(path: Path, table: Table) -> Table:
            return table.replace(jnp.zeros((self._most[path](tokens), table.shape[1]), table.dtype))

        return nnx.map_state(of, tables)

    def zero_gradients(self, params: nnx.State, tokens: int) -> nnx.State:
        """Gradients of zero in float32, with room for those of the rows that ``tokens`` tokens touch."""

        def of(path: Path, parameter: nnx.Variable) -> nnx.Variable:
            if path not in self._most:
                return parameter.replace(jnp.zeros(parameter.shape, jnp.float32))
            (num_rows, d), most = parameter.shape, self._most[path](tokens)
            rows = jnp.arange(num_rows, num_rows + most, dtype=jnp.int32)
            return parameter.replace(RowGradients(rows, jnp.zeros((most, d), jnp.float32)))

        return nnx.map_state(of, params)

    def rows(self, params: nnx.State) -> nnx.State:
        """The numbers of the rows that a model has retrieved from these tables, from its parameters after a call."""
        return nnx.map_state(lambda _, table: table.replace(table.get_value().rows), self.split(params)[1])


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
