"""The mesh and the rules: sizes, specs, refusals with their numbers; where each array of a training state is."""

import functools

import jax
import numpy as np
import pytest
from eight_devices import measured
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from peer_jax import sharding
from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.models import Transformer
from peer_jax.sharding import AXES, Placement, Sharding, use
from peer_jax.training.optimizer import AdamW
from peer_jax.training.step import Trainer

V, D, N = 13, 16, 64
RETRIEVAL = {"num_experts": N, "num_heads": 2, "d_key": 4, "top_k": 4}
LAYERS = {
    "dense": functools.partial(Dense, d_ff=12),
    "moe": functools.partial(MoE, num_experts=8, d_ff=6),
    "pkm": functools.partial(PKM, **RETRIEVAL),
    "peer": functools.partial(PEER, **RETRIEVAL),
}


def placement(data, fsdp, expert, tables="rows"):
    """A mesh that repeats the one device there is, which is enough to plan with."""
    return Placement(Mesh(np.full((data, fsdp, expert), jax.devices()[0]), AXES), tables)


def trainer(names, d_model=D, moment="element", **sizes):
    def build(*, rngs):
        layers = [functools.partial(LAYERS[name], **sizes) for name in names.split(" and ")]
        return Transformer(V, d_model, len(layers), 2, ffw=layers[0], sparse_ffw=layers[-1], rngs=rngs)

    return Trainer(build, AdamW(learning_rate=1e-3, table_second_moment=moment))


def flat(state):
    """ "blocks.1.ffw.down" -> array or sharding."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


# Sizes


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (8, 1, 1)),
        ({"expert": 4}, 8, (2, 1, 4)),
        ({"data": 2, "fsdp": -1, "expert": 2}, 8, (2, 2, 2)),
        ({"data": 1, "expert": -1}, 8, (1, 1, 8)),
        ({"data": 1, "expert": 4}, 8, (1, 1, 4)),  # some are left over
    ],
)
def test_sizes(given, devices, expected):
    assert tuple(Sharding(**given).sizes(devices).values()) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fsdp": -1}, r"data and Sharding\.fsdp are both -1"),
        ({"data": 1, "fsdp": -1, "expert": -1}, r"fsdp and Sharding\.expert are both -1"),
        ({"data": 0}, r"Sharding\.data=0 must be at least 1"),
        ({"fsdp": -2}, r"Sharding\.fsdp=-2 must be at least 1"),
        ({"expert": 0}, r"Sharding\.expert=0 must be at least 1"),
        ({"tables": "diagonals"}, r"tables='diagonals' is not one of 'rows', 'columns'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Sharding(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": 16}, r"data=16, fsdp=1, expert=1 needs 16 devices, but there are 8$"),
        ({"fsdp": 4, "expert": 4}, r"data=-1, fsdp=4, expert=4 needs 16 devices, but there are 8$"),
        ({"expert": 3}, r"data=-1, fsdp=1, expert=3 splits by 3, which does not divide the 8 devices$"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Sharding(**given).sizes(8)


def test_one_device_needs_no_placement():
    assert Sharding().place() is None
    assert sharding.current() is None
    with pytest.raises(InputError, match=r"needs 2 devices, but there are 1$"):
        Sharding(expert=2).place()


def test_a_placement_is_in_use_within_its_block_only():
    outer, inner = placement(2, 2, 2), placement(8, 1, 1)
    with use(outer):
        with pytest.raises(KeyError, match="True"), use(inner):
            raise KeyError(sharding.current() is inner)
        assert sharding.current() is outer
    assert sharding.current() is None


# Rules


@pytest.mark.parametrize(
    ("axes", "rows", "columns"),
    [
        (("rows", "columns"), P("expert", None), P(None, "expert")),
        (("experts", "embed", "hidden"), P("expert", "fsdp", None), P("expert", "fsdp", None)),
        (("vocab", "embed"), P(None, "fsdp"), P(None, "fsdp")),
        (("embed", "heads"), P("fsdp", None), P("fsdp", None)),
        (("batch",), P(AXES), P(AXES)),
        (("group", "experts"), P(("data", "fsdp"), "expert"), P(("data", "fsdp"), "expert")),
        ((None, "batch"), P(None, AXES), P(None, AXES)),
        ((), P(), P()),
    ],
)
def test_specs(axes, rows, columns):
    for tables, expected in (("rows", rows), ("columns", columns)):
        assert placement(2, 2, 2, tables).spec(axes) == expected


@pytest.mark.parametrize(
    ("of", "axes", "shape", "message"),
    [
        (placement(1, 1, 8), ("rows", "columns"), (60, 16), r"^a table has 60 along 'rows', .* 8 devices .* expert$"),
        (placement(1, 1, 8, "columns"), ("rows", "columns"), (64, 12), r"12 along 'columns', .* the 8 devices"),
        (placement(1, 4, 2), ("embed", "hidden"), (18, 16), r"18 along 'embed', .* the 4 devices .* fsdp$"),
        (placement(2, 2, 2), ("batch",), (12,), r"12 along 'batch', .* the 8 devices .* data x fsdp x expert$"),
        (placement(2, 2, 2), ("experts", "rows"), None, r"'experts' and 'rows' are both split over 'expert'"),
        (placement(1, 1, 1), ("batch", None, "embed"), None, r"'batch' and 'embed' are both split over 'fsdp'"),
        (placement(2, 2, 2), ("embed", "abacus"), None, r"^a table has a logical axis 'abacus', which is not one of"),
    ],
)
def test_axes_that_cannot_be_split_are_refused(of, axes, shape, message):
    with pytest.raises(InputError, match=message):
        of.spec(axes, shape, "a table")


@pytest.mark.parametrize(
    ("of", "name", "sizes", "message"),
    [
        (placement(1, 1, 8), "peer", {"num_experts": 36}, r"ffw/down has 36 along 'rows', .* 8 devices"),
        (placement(1, 1, 8, "columns"), "pkm", {"d_model": 20}, r"ffw/values has 20 along 'columns', .* 8 devices"),
        (placement(1, 8, 1), "dense", {"d_model": 12}, r"has 12 along 'embed', .* 8 devices"),
        (placement(4, 1, 2), "moe", {"num_experts": 5}, r"ffw/down has 5 along 'experts', .* 2 devices"),
    ],
)
def test_a_model_that_does_not_divide_is_refused_by_the_name_of_its_parameter(of, name, sizes, message):
    made = trainer(name, **sizes)
    with use(of), pytest.raises(InputError, match=message):
        made.shardings()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"^rows=12 does not divide over the 8 devices .* data=2 x fsdp=2 x expert=2"):
        placement(2, 2, 2).check_rows("rows", 12)
    placement(2, 2, 2).check_rows("rows", 16)
    assert [placement(2, 2, 2).round_up(rows) for rows in (1, 8, 9)] == [8, 8, 16]


# Shapes of the parts


def parts(state, made):
    """By name, the shapes of one device's parts of parameters, first moments, second moments and all else."""

    def of(tree, shardings):
        shardings = flat(shardings)
        return {name: shardings[name].shard_shape(leaf.shape) for name, leaf in flat(tree).items()}

    return (
        of(state.params, made.params),
        of(state.optimizer.mu, made.optimizer.mu),
        of(state.optimizer.nu, made.optimizer.nu),
        of(state.others, made.others),
    )


@pytest.mark.parametrize("moment", ["element", "row"])
@pytest.mark.parametrize("tables", ["rows", "columns"])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 8), (2, 4, 1)])
def test_every_array_is_split_as_its_axes_say(mesh, tables, moment):
    _, fsdp, expert = mesh
    d = D // fsdp
    retrieving, coarse = (trainer(names, moment=moment) for names in ("pkm and peer", "dense and moe"))
    with use(placement(*mesh, tables)):
        params, mu, nu, others = parts(jax.eval_shape(retrieving._init, jax.random.key(0)), retrieving.shardings())
        backbone, coarse_mu, coarse_nu, _ = parts(jax.eval_shape(coarse._init, jax.random.key(0)), coarse.shardings())
    table, one = ((N // expert, D), (N // expert, 1)) if tables == "rows" else ((N, D // expert), (N, 1))
    second = table if moment == "element" else one
    for name in ("blocks.0.ffw.values", "blocks.1.ffw.down", "blocks.1.ffw.up"):
        assert (params[name], mu[name], nu[name]) == (table, table, second), name
    assert params["blocks.1.ffw.query_proj.kernel"] == (d, 8)
    assert params["blocks.1.ffw.sub_keys"] == (2, 8, 2)
    assert params["blocks.1.ffw.query_norm.scale"] == (8,)
    assert {others[f"blocks.1.ffw.query_norm.{name}"] for name in ("mean", "var")} == {(8,)}
    expected = {
        "embed.embedding": (V, d),
        "head.kernel": (d, V),
        "final_norm.scale": (D,),
        "blocks.0.attention.query_key_value.kernel": (d, 3 * D),
        "blocks.0.attention.out.kernel": (D, d),
        "blocks.0.ffw.up.kernel": (d, 12),
        "blocks.0.ffw.down.kernel": (12, d),
        "blocks.1.ffw.router.kernel": (D, 8),
        "blocks.1.ffw.up": (8 // expert, d, 6),
        "blocks.1.ffw.down": (8 // expert, 6, d),
    }
    for of in (backbone, coarse_mu, coarse_nu):
        assert {name: of[name] for name in expected} == expected


# On devices that exist


def measure():
    """Whether states made on 8 devices are as planned and as on one device; the memory that a large one takes."""
    report = {}
    for tables in ("rows", "columns"):
        made = trainer("moe and peer")
        alone = made.init(0)
        with use(Sharding(data=2, fsdp=2, expert=2, tables=tables).place()):
            state, planned = made.init(0), made.abstract_state()
            pairs = [*zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True)]
            batch = sharding.split_batch({"inputs": np.arange(16 * 3).reshape(16, 3)})["inputs"]
        report[tables] = {
            "as planned": all(
                {shard.data.shape for shard in leaf.addressable_shards} == {plan.sharding.shard_shape(plan.shape)}
                and len(leaf.sharding.device_set) == 8
                for leaf, plan in pairs
            ),
            "as alone": all(
                np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True)
            ),
            "statistics": all(
                leaf.get_value().sharding.is_fully_replicated for _, leaf in nnx.to_flat_state(state.others)
            ),
            "batch": sorted(shard.data.tolist() for shard in batch.addressable_shards),
        }
        large = trainer("pkm", num_experts=256**2)
        with use(Sharding(data=1, expert=8, tables=tables).place()):
            init = jax.jit(large._init, out_shardings=large.shardings()).lower(jax.random.key(0)).compile()
        held = init.memory_analysis()
        report[tables]["held"] = [held.temp_size_in_bytes, held.output_size_in_bytes]
    return report


@pytest.fixture(scope="module")
def report():
    return measured("test_sharding", "measure")


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["rows", "columns"])
def test_a_state_is_made_where_it_belongs_and_equals_one_device_s(report, tables):
    assert report[tables]["as planned"]
    assert report[tables]["statistics"]
    assert report[tables]["as alone"]


@pytest.mark.parametrize("tables", ["rows", "columns"])
def test_a_batch_is_split_over_all_devices(report, tables):
    rows = np.arange(16 * 3).reshape(8, 2, 3)
    assert report[tables]["batch"] == rows.tolist()


@pytest.mark.parametrize("tables", ["rows", "columns"])
def test_making_a_state_never_takes_a_whole_table(report, tables):
    table = 4 * D * 256**2
    temporary, output = report[tables]["held"]
    assert 3 * table / 8 < output < 1.05 * 3 * table / 8
    assert temporary < table / 2
