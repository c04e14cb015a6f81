"""Gradients of the touched rows of tables, out of the middle of a model (``peer_jax.layers.touched``).

E  parts of a table by rows, see ``peer_jax.ops.touched``     U  the most rows of a part that a batch can touch
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.layers.interface import TABLE_AXES, FeedForward, Table
from peer_jax.layers.touched import TouchedTable
from peer_jax.models.model import Model, Path
from peer_jax.ops.checks import check_room
from peer_jax.ops.touched import compact_size, touched_rows
from peer_jax.sharding import current, on_each_device, parts_of, spec_of


class RowGradients(NamedTuple):
    """The gradient of a table: that of the rows which the batch has touched. All others have none.

    Attributes:
        rows: numbers of the rows within each part, ascending and different; those from the number of a part's rows on
            are padding.
        values: their gradients, zero for the padding.
    """

    rows: Int[Array, " E*U"]
    values: Float[Array, "E*U d"]


class TouchedTables:
    """The tables of a model that are trained by touched rows.

    Args:
        model: the model; tables whose layers define no ``rows_touched`` are trained whole.
        wanted: ``updates_touched`` of the optimiser; None: all tables are trained whole.
        share: the share of the rows that a batch could touch for which there is room. A batch that touches more makes
            the loss or the gradient NaN.
        accumulation: micro-batches of a batch. Tokens are those of a micro-batch in what follows.
    """

    def __init__(
        self, model: Model, wanted: Callable[[int, int], bool] | None, share: float, accumulation: int
    ) -> None:
        self._wanted, self._share, self._accumulation = wanted, share, accumulation
        self._readers: dict[Path, list[FeedForward]] = {}
        for path, (table, layers) in ({} if wanted is None else model.tables()).items():
            if all(layer.rows_touched(1) is not None for layer in layers):
                if table.get_metadata("axes", ()) != TABLE_AXES:
                    raise InputError(
                        f"{layers[0].name} defines rows_touched, but its table {path[-1]!r} has no axes={TABLE_AXES}: "
                        "give them to Table, or set AdamW.table_updates='all'"
                    )
                self._readers[path] = layers

    def split(self, params: nnx.State, tokens: int) -> tuple[nnx.State, nnx.State]:
        """The parameters that are trained whole with so many tokens, and the tables that are not."""

        def is_whole(path: Path, parameter: nnx.Variable) -> bool:
            if path not in self._readers:
                return True
            room = self._room(path, parameter, self._accumulation * tokens, self._share)
            return not self._wanted(room, parameter.shape[0])

        return nnx.split_state(params, is_whole, ...)

    @property
    def micro_share(self) -> float:
        """The share of the rows that a micro-batch could touch for which there is room."""
        return min(1.0, self._share * self._accumulation)

    def _room(self, path: Path, table: Table, tokens: int, share: float) -> int:
        """The rows of the table's gradient by so many tokens, in all layers that read it."""
        most = sum(layer.rows_touched(tokens) for layer in self._readers[path])
        return compact_size(table.shape[0], most, parts_of("rows"), share)

    def changes(self, tables: nnx.State, tokens: int) -> nnx.State:
        """The zeros of the compact tables of a micro-batch, those of all devices, for each layer that reads a table."""

        def of(path: Path, table: Table) -> Table:
            most = [layer.rows_touched(tokens) for layer in self._readers[path]]
            sizes = [compact_size(table.shape[0], rows, parts_of("rows"), self.micro_share) for rows in most]
            return table.replace(tuple(jnp.zeros((size, table.shape[1]), table.dtype) for size in sizes))

        return nnx.map_state(of, tables)

    def gradients(self, tables: nnx.State, rows: nnx.State, of_changes: nnx.State, tokens: int) -> nnx.State:
        """The gradients of tables by a micro-batch, from those of their changes and the rows that were changed.

        The rows of layers that share a table are merged, and the gradients of a row that several have retrieved add up
        in float32.
        """
        whole = dict(nnx.to_flat_state(tables))

        def of(path: Path, variable: nnx.Variable) -> nnx.Variable:
            first, *more = variable.get_value()
            if more:
                table = whole[path]
                total = _no_rows(table, self._room(path, table, tokens, self.micro_share))
                add = functools.partial(sum_of_gradients, table.get_value())
                first = functools.reduce(add, (first, *more), total)
            return variable.replace(first)

        def pairs(rows: tuple[Array, ...], values: tuple[Array, ...]) -> list[RowGradients]:
            return [RowGradients(*pair) for pair in zip(rows, values, strict=True)]

        return nnx.map_state(of, _zipped(pairs, rows, of_changes))

    def zero_gradients(self, params: nnx.State, tokens: int) -> nnx.State:
        """Gradients of a batch that are zero, in float32."""
        whole, tables = self.split(params, tokens)

        def by_rows(path: Path, table: Table) -> Table:
            return table.replace(_no_rows(table, self._room(path, table, self._accumulation * tokens, self._share)))

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), whole)
        return nnx.merge_state(zeros, nnx.map_state(by_rows, tables))


def retrieved_rows(params: nnx.State) -> nnx.State:
    """The numbers of the rows that layers have retrieved from each ``TouchedTable``, in the parameters after a call."""
    tables = nnx.split_state(params, lambda _, parameter: isinstance(parameter.get_value(), TouchedTable), ...)[0]
    return nnx.map_state(lambda _, table: table.replace(table.get_value().rows), tables)


def count_touched(params: nnx.State, grads: nnx.State) -> dict[str, Float[Array, ""]]:
    """The metric ``touched_rows``: the rows of a table that a step has touched, of the table that has most.

    It is no larger than the room for them.
    """
    gradients = jax.tree.leaves(grads, is_leaf=lambda g: isinstance(g, RowGradients))
    pairs = zip(jax.tree.leaves(params), gradients, strict=True)
    counts = [jnp.sum(g.rows < p.shape[0] // parts_of("rows")) for p, g in pairs if isinstance(g, RowGradients)]
    return {"touched_rows": jnp.max(jnp.stack(counts)).astype(jnp.float32)} if counts else {}


def with_changes(tables: nnx.State, changes: nnx.State) -> nnx.State:
    """The tables as a model has them during a step on touched rows."""
    return _zipped(TouchedTable, tables, changes)


def sum_of_gradients(parameter: Array, total: Array | RowGradients, more: Array | RowGradients) -> Array | RowGradients:
    """The sum of two gradients of a parameter in the type of ``total``; NaN without room for the rows of both."""
    if not isinstance(total, RowGradients):
        return total + more.astype(total.dtype)
    num_rows = parameter.shape[0] // parts_of("rows")

    def on_device(total: RowGradients, more: RowGradients) -> RowGradients:
        rows, slots = touched_rows(jnp.concatenate([total.rows, more.rows]), num_rows, total.rows.size)
        values = jnp.concatenate([total.values, more.values.astype(total.values.dtype)])
        enough = jnp.all((slots < rows.size) | (jnp.concatenate([total.rows, more.rows]) >= num_rows))
        if current() is None:
            check_room("sum_of_gradients", enough)
        zeros = jnp.where(enough, jnp.zeros_like(total.values), jnp.nan)
        return RowGradients(rows, zeros.at[slots].add(values, mode="drop"))

    split = RowGradients(spec_of("rows"), spec_of(*TABLE_AXES))
    return on_each_device(on_device, (split, split), split)(total, more)


def _no_rows(table: Table, size: int) -> RowGradients:
    """A gradient of a table without rows, in float32, and with room for ``size``."""
    parts = parts_of("rows")
    padding = table.shape[0] // parts + jnp.arange(size // parts, dtype=jnp.int32)
    return RowGradients(jnp.tile(padding, parts), jnp.zeros((size, table.shape[1]), jnp.float32))


def _zipped(join: Callable, first: nnx.State, second: nnx.State) -> nnx.State:
    other = dict(nnx.to_flat_state(second))

    def of(path: Path, variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(join(variable.get_value(), other[path].get_value()))

    return nnx.map_state(of, first)
