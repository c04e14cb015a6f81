"""Tables of which a training step reads, differentiates and updates only the rows that its batch retrieves.

During such a step a ``Table`` holds a ``TouchedTable``. The layer works on the compact table of the retrieved rows,
[U, d]: its op gets places in that table instead of indices of the whole one. The gradient is taken with respect to
a change, which is zero and is added to the compact table, as ``nnx.Perturbation`` is. No gradient has the size of the
whole table. Layers that share a table each have a compact table and a change of their own.

N  rows of the table     U  the most rows that a batch can touch     d  d_model
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from peer_jax.errors import InputError
from peer_jax.layers.interface import TABLE_AXES, Table
from peer_jax.ops.checks import check_indices, check_room
from peer_jax.ops.kept import keep
from peer_jax.ops.touched import take_rows, touched_by_all
from peer_jax.sharding import on_each_device, spec_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TouchedTable:
    """What a ``Table`` holds during a step on touched rows.

    Attributes:
        table: the whole table, which has no gradient.
        changes: for each layer that reads the table, in the order in which they run, zeros in the type of the table;
            what is added to the rows that it retrieves.
        rows: for each layer that has retrieved so far, the numbers of its rows as ``peer_jax.ops.touched`` has them.
    """

    table: Float[Array, "N d"]
    changes: tuple[Float[Array, "_ d"], ...]
    rows: tuple[Int[Array, " _"], ...] = ()

    def __getitem__(self, key: object) -> Array:
        raise InputError(
            "a layer that defines rows_touched reads a whole table, of which only the touched rows are trained: read "
            "it through peer_jax.layers.touched.retrieved, or set AdamW.table_updates='all'"
        )


def retrieved(indices: Int[Array, "*tokens h k"], *tables: Table) -> tuple[Array, ...]:
    """The indices and the tables to call an op with: compact ones in a step on touched rows, else the whole ones."""
    values = [table.get_value() for table in tables]
    if not isinstance(values[0], TouchedTable):
        return indices, *values
    changes = [value.changes[len(value.rows) :][:1] for value in values]
    if not all(changes):
        raise InputError("a layer retrieves rows of one table twice in a step: set AdamW.table_updates='all'")
    num_rows, most = values[0].table.shape[0], changes[0][0].shape[0]
    check_indices("retrieved", indices, num_rows)
    rows, slots = keep(touched_by_all(indices, num_rows, most))
    check_room("retrieved", jnp.all((slots < most) | (indices < 0) | (indices >= num_rows)))
    for table, value in zip(tables, values, strict=True):
        table.set_value(dataclasses.replace(value, rows=(*value.rows, rows)))
    split = spec_of(*TABLE_AXES)
    take = on_each_device(take_rows, (split, spec_of("rows")), split)
    return slots, *(take(value.table, rows) + change for value, (change,) in zip(values, changes, strict=True))
