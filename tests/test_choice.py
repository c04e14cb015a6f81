"""Which implementation is used in each case that docs/performance.md lists."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import Device
from jax.sharding import AbstractMesh

from peer_jax.errors import InputError
from peer_jax.ops import choice, expert_mix, mosaic_gpu, sharded
from peer_jax.ops.choice import choose
from peer_jax.ops.top_k import is_for_tpu
from peer_jax.sharding import AXES, Placement, compiled_for, use


def arrays(t=64, d=256, n=1024, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((t, d), dtype), jax.ShapeDtypeStruct((n, d), dtype)


needs_kernels = pytest.mark.skipif(jax.__version_info__ < mosaic_gpu.OLDEST_JAX, reason="this JAX has no such kernels")


@pytest.mark.parametrize(
    ("platform", "size", "r", "expected"),
    [
        # Exactly 1 MiB of gathered rows, and one token more; a table of exactly 1 MiB, and one row more.
        ("cpu", {"t": 8}, 128, "reference"),
        ("cpu", {"t": 9}, 128, "xla"),
        ("cpu", {"t": 1, "n": 1024}, 128, "reference"),
        ("cpu", {"t": 1, "n": 1025}, 128, "xla"),
        ("cpu", {"t": 8, "dtype": jnp.bfloat16}, 128, "xla"),
        ("cpu", {"t": 32768, "d": 768, "n": 1024**2}, 128, "xla"),
        ("gpu", {"t": 1, "n": 1}, 1, "xla"),
        ("gpu", {"t": 32768, "d": 768, "n": 1024**2}, 128, "xla"),
        ("tpu", {"t": 1, "n": 1}, 1, "xla"),
    ],
)
def test_none(platform, size, r, expected):
    with compiled_for(Device(platform)):
        assert choose(None, *arrays(**size), r) == expected


@needs_kernels
@pytest.mark.parametrize(
    ("platform", "size", "r", "expected"),
    [
        ("gpu", {"t": 32768, "d": 768, "n": 1024**2, "dtype": jnp.bfloat16}, 128, "mosaic_gpu"),
        ("gpu", {"t": 1, "n": 1}, 1, "mosaic_gpu"),
        ("gpu", {"d": 64}, 128, "mosaic_gpu"),
        ("gpu", {"d": 4096}, 128, "mosaic_gpu"),
        ("gpu", {"d": 96}, 128, "xla"),
        ("gpu", {"d": 4160}, 128, "xla"),
        ("gpu", {"dtype": jnp.float16}, 128, "xla"),
        ("gpu", {"t": 2**21}, 1024, "xla"),
        ("cpu", {}, 128, "xla"),
        ("tpu", {}, 128, "xla"),
    ],
)
def test_kernels_where_they_can_run(platform, size, r, expected):
    with compiled_for(Device(platform)):
        assert choose("mosaic_gpu", *arrays(**size), r) == expected


@needs_kernels
@pytest.mark.parametrize(
    ("capability", "size", "expected"),
    [
        ("9.0", {}, "mosaic_gpu"),
        ("9.0", {"d": 96}, "xla"),
        ("8.0", {}, "xla"),
        ("10.0", {}, "xla"),
        ("gfx942", {}, "xla"),
    ],
)
def test_none_is_the_kernels_on_hopper(capability, size, expected):
    with compiled_for(Device("gpu", capability)):
        assert choose(None, *arrays(**size), 128) == expected


@pytest.mark.parametrize(
    ("mesh", "tables", "tokens", "table"),
    [
        ({"data": 8}, "rows", (32, 256), (1024, 256)),
        ({"data": 2, "expert": 4}, "rows", (128, 256), (256, 256)),
        ({"data": 2, "expert": 4}, "columns", (128, 64), (1024, 64)),
        ({"data": 2, "fsdp": 2, "expert": 2}, "columns", (64, 128), (1024, 128)),
    ],
)
def test_kernels_are_judged_by_the_part_of_a_device(mesh, tables, tokens, table):
    sizes = tuple(mesh.get(axis, 1) for axis in AXES)
    with use(Placement(AbstractMesh(sizes, AXES), tables)):
        shapes = [part.shape for part in sharded.part_shapes(*arrays(t=256))]
    assert shapes == [tokens, table]


@pytest.mark.parametrize("asked_for", ["reference", "xla"])
def test_what_is_asked_for(asked_for):
    with compiled_for(Device("gpu", "9.0")):
        assert choose(asked_for, *arrays(), 128) == asked_for


def test_unknown_implementation_is_named():
    with pytest.raises(InputError, match="abacus"):
        choose("abacus", *arrays(), 128)


def test_a_fallback_is_said_once_and_computes_the_same(rng, caplog):
    x, down, up = (jnp.asarray(rng.normal(size=(n, 4)), jnp.float32) for n in (3, 9, 9))
    indices = jnp.asarray(rng.integers(0, 9, (3, 1, 2)), jnp.int32)
    gates = jnp.ones((3, 1, 2))
    choice._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        results = [
            expert_mix(x, down, up, indices, gates, jax.nn.gelu, implementation=implementation)
            for implementation in ("mosaic_gpu", "mosaic_gpu", "xla")
        ]
    assert len(caplog.messages) == 1
    assert "falls back to 'xla'" in caplog.text
    np.testing.assert_array_equal(results[0], results[2])


def test_no_kernels_on_a_mesh_of_somebody_else():
    """XLA can't partition a kernel. Within a `shard_map` each device has its part."""

    def chosen(device):
        with compiled_for(device):
            return choose(None, *arrays(), 128), is_for_tpu(64, 8)

    def of_part(x):
        assert chosen(Device("tpu")) == ("xla", True)
        return x

    mesh = jax.make_mesh((1,), ("mine",))
    with jax.set_mesh(mesh):
        assert chosen(Device("gpu", "9.0")) == ("xla", False)
        assert chosen(Device("tpu")) == ("xla", False)
        jax.shard_map(of_part, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())(jnp.ones(1))
    assert chosen(Device("tpu")) == ("xla", True)
