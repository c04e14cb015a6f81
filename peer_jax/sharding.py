"""Where arrays live on many devices: the mesh, and the table from logical axis names to its axes.

A parameter carries the logical names of its axes in its metadata, ``axes=("embed", "hidden")``; ``RULES`` alone says
which mesh axes they are split over. Activations and batches are split over all devices by their first axis. The mesh in
use is part of JAX's context, like that of ``jax.set_mesh``; without a mesh everything is on one device.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from peer_jax.errors import InputError
from peer_jax.fields import Placed

logger = logging.getLogger(__name__)

DATA, FSDP, EXPERT = AXES = ("data", "fsdp", "expert")

# Logical axis to the mesh axis or axes that it is split over; None: it is not split. "rows" and "columns" are the axes
# of expert tables; "group" is the batch axis of tokens that have been sent to the devices of their MoE experts.
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
        data: number of copies of what no other axis splits.
        fsdp: number of parts that the width of dense parameters is split into; they are gathered when they are used.
        expert: number of parts that the expert tables and MoE's experts are split into; they are never gathered.
        tables: "rows": each device along ``expert`` holds N / expert rows of a table; "columns": d_model / expert
            columns.

    One of the sizes may be -1, which means the rest of the devices. Batches are split over all devices.
    """

    data: Placed[int] = -1
    fsdp: Placed[int] = 1
    expert: Placed[int] = 1
    tables: Placed[str] = "rows"

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
        """Number of devices along each axis of the mesh, where there are ``num_devices`` in all.

        Raises:
            InputError: if the mesh needs more devices, or the number along the axis of size -1 isn't whole.
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
        """The placement on ``devices``, by default all that JAX sees; None if the mesh has a single device.

        Args:
            devices: what the mesh is made of; some may be left over.
            rows: size of the batch. In a run of one process, ``data=-1`` then means only as many devices as the batch
                can be split over.

        Raises:
            InputError: as ``sizes``, or if a run of several processes would leave out some of its devices.
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
                raise InputError(f"{said}, but every process needs its own devices in it")
            logger.warning(said)
        if used == 1:
            return None
        types = (AxisType.Auto,) * len(AXES)
        shape, devices = tuple(sizes.values()), devices[:used]
        try:
            mesh = jax.make_mesh(shape, AXES, types, devices=devices)
        except NotImplementedError:  # an axis of the mesh is no product of axes of the TPUs' torus
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            mesh = Mesh(grid, AXES, axis_types=types)
        return Placement(mesh, self.tables)


def mesh_axes(spec: Iterable[str | Sequence[str] | None]) -> tuple[str, ...]:
    """All mesh axes that a spec names, in their order."""
    return tuple(axis for over in spec for axis in ((over,) if isinstance(over, str) else over or ()))


def _is_variable(leaf: Any) -> bool:
    """Whether it is an array with metadata, as an ``nnx.Variable`` is; the ops import this module, but not flax."""
    return hasattr(leaf, "get_metadata")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and how expert tables are split over its ``expert`` axis. Hashable. An abstract mesh will do to plan."""

    mesh: Mesh | AbstractMesh
    tables: str

    def size(self, axis: str) -> int:
        """Number of devices along an axis."""
        return self.mesh.shape[axis]

    def spec(
        self, axes: Sequence[str | None], shape: Sequence[int] | None = None, name: str = "an array"
    ) -> PartitionSpec:
        """The mesh axes that an array with these logical axes is split over.

        Args:
            axes: the logical axes; None for an axis that is not split.
            shape: sizes to check, if given.
            name: what messages call the array.

        Raises:
            InputError: if two of the axes are split over the same mesh axis, or a size does not divide.
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
        """The sharding of an array with these logical axes; without any, the array is replicated."""
        return NamedSharding(self.mesh, self.spec(axes))

    def specs(self, tree: Any) -> Any:
        """The spec of each variable of a tree, from the ``axes`` in its metadata; what has none is replicated.

        Raises:
            InputError: as ``spec``.
        """

        def of(path: tuple, leaf: Any) -> Any:
            if not _is_variable(leaf):
                return PartitionSpec()
            if leaf.get_value() is None:  # a moment that a table doesn't have
                return leaf
            axes = leaf.get_metadata().get("axes", ())
            shape = leaf.get_value().shape
            name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
            # A moment per row has the axes of its table, but only a single column, which can't be split.
            pairs = zip(axes, shape, strict=True) if axes else ()
            kept = [None if axis == "columns" and size == 1 else axis for axis, size in pairs]
            return leaf.replace(self.spec(kept, shape, name))

        return jax.tree_util.tree_map_with_path(of, tree, is_leaf=_is_variable)

    def shardings(self, tree: Any) -> Any:
        """What ``specs`` gives, as shardings."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.specs(tree))

    def round_up(self, rows: int) -> int:
        """The smallest number of rows, at least ``rows``, that can be split over all devices."""
        return -(-rows // self.mesh.size) * self.mesh.size

    def check_rows(self, name: str, rows: int) -> None:
        """Raises an InputError unless ``rows``, which the message calls ``name``, can be split over all devices."""
        if rows % self.mesh.size:
            raise InputError(
                f"{name}={rows} does not divide over the {self.mesh.size} devices of the mesh "
                f"{' x '.join(f'{axis}={size}' for axis, size in self.mesh.shape.items())}: make it a multiple, or set "
                "sizes of Sharding that use fewer"
            )


_current = jax.make_user_context(None)


def use(placement: Placement | None) -> contextlib.AbstractContextManager[None]:
    """A context in which all that is traced and run follows ``placement``."""
    return _current(placement)


def current() -> Placement | None:
    """The placement in use; None means one device."""
    return _current.value


_compiled_for = jax.make_user_context(None)


def compiled_for(device: Any) -> contextlib.AbstractContextManager[None]:
    """A context in which what is traced is for ``device``, which this machine needn't have.

    With a placement, the context is not needed: the devices of the mesh are what a program is for.
    """
    return _compiled_for(device)


def target() -> Any:
    """The device that what is traced is for, or one of these devices: choices follow its ``platform``."""
    placement = current()
    if placement is not None and isinstance(placement.mesh, Mesh):
        return placement.mesh.devices.flat[0]
    return jax.devices()[0] if _compiled_for.value is None else _compiled_for.value


def may_run_kernels() -> bool:
    """Whether a kernel of Pallas can be traced here, which XLA can't partition: without a mesh, on one of ours, where
    ``on_each_device`` gives each device its part, or where somebody else's ``shard_map`` does.
    """
    kinds = jax.sharding.get_abstract_mesh().axis_types
    return current() is not None or all(kind == AxisType.Manual for kind in kinds)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays ``x`` out by its logical axes if a placement is in use; axes that are not named are replicated."""
    placement = current()
    return x if placement is None else jax.lax.with_sharding_constraint(x, placement.sharding(*axes))


def spec_of(*axes: str | None) -> PartitionSpec:
    """How the placement in use splits an array with these logical axes; on one device, a spec that splits nothing."""
    return PartitionSpec() if current() is None else current().spec(axes)


def parts_of(axis: str) -> int:
    """The number of parts that the placement in use splits a logical axis into."""
    return math.prod(current().size(over) for over in mesh_axes(spec_of(axis)))


def split_batch(rows: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray | jax.Array]:
    """Joins the ``rows`` of all processes to a batch split over all devices; on one device, returns ``rows``."""
    if current() is None:
        return rows
    sharding = current().sharding("batch")
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}


def specs(tree: Any) -> Any:
    """``Placement.specs`` in the placement in use; on one device, specs that split nothing."""
    placement = current()
    return jax.tree.map(lambda _: PartitionSpec(), tree) if placement is None else placement.specs(tree)


def on_each_device(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """``f``, called on every device with its own part of each array; ``f`` itself if no placement is in use.

    Devices that share a part of an output must compute the same values for it: this is not checked.
    """
    placement = current()
    if placement is None:
        return f
    return jax.shard_map(f, mesh=placement.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_over(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    """Within ``on_each_device``: sums ``x`` over the devices that ``spec`` splits an array over."""
    return jax.lax.psum(x, mesh_axes(spec)) if mesh_axes(spec) else x


def mean_over(spec: PartitionSpec, x: jax.Array) -> jax.Array:
    """Within ``on_each_device``: averages ``x`` over the devices that ``spec`` splits an array over."""
    return jax.lax.pmean(x, mesh_axes(spec)) if mesh_axes(spec) else x


def part_bytes(tree: Any) -> int:
    """Bytes of the parts of arrays, which may be abstract, that one device has."""

    def of_one(leaf: jax.Array | jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(of_one, jax.tree.leaves(tree)))


# Meshes of the caller's own that have explicit axes (``jax.set_mesh``): the types of arrays say how they are split.


def split_of(x: jax.Array, num_axes: int) -> NamedSharding | None:
    """How the first ``num_axes`` axes of ``x`` are split over explicit axes of a mesh; None if there are no such axes.

    As a sharding it leaves all other axes of an array whole.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:num_axes]))


def automatic(f: Callable[..., Any], split: Any) -> Callable[..., Any]:
    """``f``, within which XLA decides how explicit axes of a mesh share the work; ``f`` itself if ``split`` is None.

    Args:
        f: a function of arrays.
        split: how its outputs are split, from ``split_of``; a tree of which ``f``'s outputs are the leaves, or their
            parents.
    """
    if split is None:
        return f
    mesh = jax.tree.leaves(split)[0].mesh
    explicit = tuple(
        axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    )
    return jax.sharding.auto_axes(f, axes=explicit, out_sharding=split)
