"""Where arrays live on many devices: the mesh, and the table from logical axis names to its axes.

A parameter carries the logical names of its axes in its metadata, ``axes=("embed", "hidden")``; nothing but ``RULES``
says where they go. Activations and batches are split over all devices by their first axis. The mesh in use is part of
JAX's context, as ``jax.set_mesh``'s is; without one everything is on one device.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from peer_jax.errors import InputError

logger = logging.getLogger(__name__)

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")

# Logical axis to mesh axis, or axes; None: to none. "rows" and "columns" are those of expert tables; "group" is a batch
# whose sequences are where an MoE's expert is.
_COMMON = {"batch": AXES, "group": (DATA, FSDP), "experts": EXPERT, "embed": FSDP} | dict.fromkeys(
    ("hidden", "heads", "keys", "vocab")
)
RULES: dict[str, dict[str, str | tuple[str, ...] | None]] = {
    "rows": {**_COMMON, "rows": EXPERT, "columns": None},
    "columns": {**_COMMON, "rows": None, "columns": EXPERT},
}
TABLE_FORMS = tuple(RULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """How many devices there are along each axis of the mesh, and how expert tables are split.

    Args:
        data: copies of the parameters that are not split otherwise.
        fsdp: parts of the width of dense parameters, which are gathered for their use.
        expert: parts of the expert tables and of MoE's experts, which are not.
        tables: "rows": each device of the ``expert`` axis holds N / expert rows; "columns": d_model / expert columns.

    One size may be -1: the rest of the devices. Batches are split over all of them.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tables: str = "rows"

    def __post_init__(self) -> None:
        if self.tables not in TABLE_FORMS:
            raise InputError(f"Sharding.tables={self.tables!r} is not one of {', '.join(map(repr, TABLE_FORMS))}")
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise InputError(f"Sharding.{axis}={size} must be at least 1, or -1 for the rest of the devices")
        if (rest := [axis for axis, size in sizes.items() if size == -1])[1:]:
            raise InputError(f"Sharding.{rest[0]} and Sharding.{rest[1]} are both -1: only one can be the rest")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Devices along each axis.

        Raises:
            InputError: if there are fewer devices than that, or the rest isn't a whole number.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        given = math.prod(size for size in sizes.values() if size != -1)
        shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        if given > num_devices:
            raise InputError(f"the mesh {shown} needs {given} devices, but there are {num_devices}")
        if -1 in sizes.values() and num_devices % given:
            raise InputError(f"the mesh {shown} splits by {given}, which does not divide the {num_devices} devices")
        return {axis: num_devices // given if size == -1 else size for axis, size in sizes.items()}

    def place(self, devices: Sequence[jax.Device] | None = None, *, rows: int | None = None) -> "Placement | None":
        """The placement on these devices, all of them by default; None where that is a single one.

        Of one process, ``data=-1`` leaves out devices that a batch of so many ``rows`` can't be split over.

        Raises:
            InputError: as ``sizes``; or if the mesh leaves out devices of a run of several processes.
        """
        devices = jax.devices() if devices is None else devices
        sizes = self.sizes(len(devices))
        if self.data == -1 and rows is not None and jax.process_count() == 1:
            others = sizes[FSDP] * sizes[EXPERT]
            fitting = [size for size in range(1, sizes[DATA] + 1) if rows % (size * others) == 0]
            sizes[DATA] = max(fitting, default=sizes[DATA])
        used = math.prod(sizes.values())
        if used < len(devices):
            said = f"the mesh uses {used} of {len(devices)} devices"
            if jax.process_count() > 1:
                raise InputError(f"{said}, but every process needs its own in it")
            logger.warning(said)
        if used == 1:
            return None
        types = (jax.sharding.AxisType.Auto,) * len(AXES)
        return Placement(jax.make_mesh(tuple(sizes.values()), AXES, types, devices=devices[:used]), self.tables)


def mesh_axes(spec: Iterable[str | Sequence[str] | None]) -> tuple[str, ...]:
    """The mesh axes that a spec names."""
    return tuple(axis for over in spec for axis in ((over,) if isinstance(over, str) else over or ()))


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, or on paper an abstract one, and how expert tables are split over its ``expert`` axis. Hashable."""

    mesh: Mesh | AbstractMesh
    tables: str

    def size(self, axis: str) -> int:
        """Devices along an axis."""
        return self.mesh.shape[axis]

    def spec(
        self, axes: Sequence[str | None], shape: Sequence[int] | None = None, name: str = "an array"
    ) -> PartitionSpec:
        """The mesh axes of an array with these logical axes.

        Raises:
            InputError: if two of its axes go to the same mesh axis, or a size does not divide.
        """
        rules = RULES[self.tables]
        if unknown := [axis for axis in axes if axis is not None and axis not in rules]:
            raise InputError(f"{name} has a logical axis {unknown[0]!r}, which is not one of {', '.join(rules)}")
        mapped = [rules[axis] if axis is not None else None for axis in axes]
        used: dict[str, str | None] = {}
        for place, (axis, over) in enumerate(zip(axes, mapped, strict=True)):
            over = mesh_axes((over,))
            for mesh_axis in over:
                if mesh_axis in used:
                    raise InputError(
                        f"{name} has axes {tuple(axes)}: {used[mesh_axis]!r} and {axis!r} are both split over "
                        f"{mesh_axis!r}"
                    )
                used[mesh_axis] = axis
            parts = math.prod(self.size(mesh_axis) for mesh_axis in over)
            if shape is not None and shape[place] % parts:
                raise InputError(
                    f"{name} has {shape[place]} along {axis!r}, which does not divide into the {parts} devices of "
                    f"the mesh axis {' x '.join(over)}"
                )
        return PartitionSpec(*mapped)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """That of an array with these logical axes; of a replicated one without."""
        return NamedSharding(self.mesh, self.spec(axes))

    def specs(self, tree: Any) -> Any:
        """The mesh axes of each array of a tree of variables, by their ``axes``; others are replicated.

        Raises:
            InputError: as ``spec``.
        """

        def of(path: tuple, leaf: Any) -> Any:
            if not isinstance(leaf, nnx.Variable):
                return PartitionSpec()
            axes = leaf.get_metadata().get("axes", ())
            shape = leaf.get_value().shape
            name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
            # Of a variable with fewer axes than its parameter's, as a moment a row, the last axis has a single entry.
            kept = [axis if size > 1 else None for axis, size in zip(axes, shape, strict=True)] if axes else ()
            return leaf.replace(self.spec(kept, shape, name))

        return jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def shardings(self, tree: Any) -> Any:
        """``specs`` as shardings."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(tree))

    def round_up(self, rows: int) -> int:
        """The next number of rows that splits over all devices."""
        return -(-rows // self.mesh.size) * self.mesh.size

    def check_rows(self, name: str, rows: int) -> None:
        """An InputError unless so many rows can be split over all devices."""
        if rows % self.mesh.size:
            raise InputError(
                f"{name}={rows} does not divide over the {self.mesh.size} devices of the mesh "
                f"{' x '.join(f'{axis}={size}' for axis, size in self.mesh.shape.items())}: make it a multiple, or set "
                "sizes of Sharding that use fewer"
            )


_current = jax.make_user_context(None)


def use(placement: Placement | None) -> contextlib.AbstractContextManager[None]:
    """Has what is traced and run within it follow this placement."""
    return _current(placement)


def current() -> Placement | None:
    """The placement in use; None on one device."""
    return _current.value


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """``x``, laid out by its logical axes where a placement is in use; axes that are not named are replicated."""
    placement = current()
    return x if placement is None else jax.lax.with_sharding_constraint(x, placement.sharding(*axes))


def split_batch(rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray | jax.Array]:
    """The batch of all processes, of which this one has ``rows``, on all devices; of a single one ``rows`` itself."""
    if current() is None:
        return rows
    sharding = current().sharding("batch")
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}


def specs(tree: Any) -> Any:
    """The mesh axes of each array of a tree of variables, in the placement in use; none on one device."""
    placement = current()
    return jax.tree.map(lambda _: PartitionSpec(), tree) if placement is None else placement.specs(tree)


def on_each_device(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``f`` on the part of each array that a device has, where a placement is in use.

    Unchecked: that what comes out is equal on the devices that share a part is up to ``f``.
    """
    placement = current()
    if placement is None:
        return f
    return jax.shard_map(f, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    """Within ``on_each_device``: the sum over the parts of an array that is split like that."""
    return jax.lax.psum(x, mesh_axes(spec)) if mesh_axes(spec) else x


def mean_over(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    """Within ``on_each_device``: the mean over the parts of an array that is split like that."""
    return jax.lax.pmean(x, mesh_axes(spec)) if mesh_axes(spec) else x
