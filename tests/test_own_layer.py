"""A layer that peer_jax has never heard of, with three methods: in a model, planned, benchmarked, and what it lacks."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_runs import ROOT

from peer_jax.bench import Options, cases, report, run
from peer_jax.data.corpora import python_stdlib
from peer_jax.data.pipeline import TextTask
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.layers import PEER, PKM, Aux, Dense, FeedForward, MoE, MuMoE, SoftMoE, families
from peer_jax.models import Transformer, generate
from peer_jax.planning import capacity
from peer_jax.planning.capacity_table import show
from peer_jax.sharding import Sharding
from peer_jax.training.flops import training_flops
from peer_jax.training.optimizer import AdamW
from peer_jax.training.run import Run

V, D = 13, 8


class Scale(FeedForward):
    """y = strength * scale * x."""

    def __init__(self, d_model, *, strength=1.0, table="none", where: Placed[str] = "here", dtype, param_dtype, rngs):
        self.strength, self.table, self.where, self.dtype = strength, table, where, dtype
        self.scale = nnx.Param(jnp.ones(d_model, param_dtype))

    def __call__(self, x, mask=None):
        return x * (self.strength * self.scale[None, None]).astype(x.dtype), Aux(jnp.zeros(()), {"mean": jnp.mean(x)})

    def flops_per_token(self, seq_len):
        return 2 * self.scale.size


class Quiet(FeedForward):
    """It says nothing of itself; it routes, but not to how many experts."""

    def __init__(self, d_model, *, width, dtype=None, param_dtype=jnp.float32, rngs):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x, mask=None):
        return x * self.scale[None, None], Aux(jnp.zeros(()), {})


class Routed(Quiet):
    def route(self, x, mask=None):
        raise AssertionError("is not called")


def model(layer, **options):
    return Transformer(V, D, 3, 2, ffw=Dense, sparse_ffw=layer, **options, rngs=nnx.Rngs(0))


# In a model


@pytest.mark.parametrize("remat", [False, True])
def test_it_learns_in_a_transformer(rng, remat):
    """The gradient of its parameter is that of a finite difference."""
    graph, params, rest = nnx.split(model(functools.partial(Scale, strength=0.5), remat=remat), nnx.Param, ...)
    tokens = jnp.asarray(rng.integers(V, size=(2, 5)), jnp.int32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        logits, aux = nnx.merge(graph, params, rest, copy=True)(tokens)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1)), aux

    (_, aux), grads = loss(params)
    assert set(aux.metrics) == {"block_1/mean"}
    gradient = np.asarray(grads["blocks"][1]["ffw"]["scale"].get_value())
    direction = np.asarray(rng.normal(size=D), np.float32)
    values = []
    for step in (1e-2, -1e-2):
        params["blocks"][1]["ffw"]["scale"].set_value(jnp.ones(D) + step * direction)
        values.append(float(loss(params)[0][0]))
    # Central differences: the third derivative times 1e-4, and float32 roundings of a value of 3 over 2e-2.
    assert gradient @ direction == pytest.approx((values[0] - values[1]) / 2e-2, abs=1e-4)


def test_it_generates_with_a_cache_and_is_not_asked_to_route(rng):
    built = model(Scale)
    built.eval()
    assert generate(built, [[1, 2, 3]], 4) == generate(built, [[1, 2, 3]], 4, use_cache=False)
    assert built.route(jnp.ones((1, 4), jnp.int32)) == {}
    assert (built.is_causal, built.mixes_tokens, built.method.routes) == (True, False, False)


def test_flops_are_counted_under_its_name():
    built = model(Scale)
    assert built.flops_by_part(16)["Scale"] == 2 * D
    assert training_flops(built, 100, 16) == 300 * built.flops_per_token(16)


def test_what_it_does_not_define_is_asked_for_in_a_sentence():
    quiet = model(functools.partial(Quiet, width=D))
    with pytest.raises(InputError, match=r"^Quiet .* define flops_per_token\(self, seq_len\)") as caught:
        training_flops(quiet, 100, 16)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"^Routed defines route: set self\.num_experts"):
        model(functools.partial(Routed, width=D))


# Names


def build(layer, *sizes, **options):
    return nnx.eval_shape(lambda: layer(*sizes, **options, rngs=nnx.Rngs(0)))


TYPES = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


@pytest.mark.parametrize(
    ("layer", "label", "options"),
    [
        ((Scale, D, TYPES), "Scale", {}),
        ((Scale, D, {"strength": 2.0, "where": "there", **TYPES}), "Scale (strength=2.0)", {"strength": 2.0}),
        (
            (Scale, D, {"table": "row", "strength": 0.5, **TYPES}),
            "Scale (strength=0.5, table='row')",
            {"strength": 0.5, "table": "row"},
        ),
        ((Dense, D, TYPES), "Dense", {}),
        ((Dense, D, {"activation": "swiglu"}), "Dense (swiglu)", {"activation": "swiglu"}),
        ((Dense, D, {"d_ff": 4 * D}), "Dense", {}),
        (
            (Dense, D, {"d_ff": 12, "activation": "relu"}),
            "Dense (relu, d_ff=12)",
            {"activation": "relu", "d_ff": 12},
        ),
        ((MoE, D, 4, {}), "MoE (expert choice)", {}),
        (
            (MoE, D, 4, {"routing": "token_choice", "capacity_factor": None}),
            "MoE (token choice, capacity_factor=None)",
            {"routing": "token_choice", "capacity_factor": None},
        ),
        ((MoE, D, 4, {"d_ff": 6}), "MoE (expert choice, d_ff=6)", {"d_ff": 6}),
        ((PEER, D, 16, {"top_k": 16, "implementation": "xla", **TYPES}), "PEER", {}),
        (
            (PEER, D, 64, {"top_k": 32, "query_norm": "layer"}),
            "PEER (query_norm='layer', top_k=32)",
            {"query_norm": "layer", "top_k": 32},
        ),
        (
            (PEER, D, 16, {"query_norm": None, "share_sub_keys": False}),
            "PEER (query_norm=None, share_sub_keys=False)",
            {"query_norm": None, "share_sub_keys": False},
        ),
        ((PKM, D, 64, {}), "PKM", {}),
        ((PKM, D, 64, {"top_k": 16, "num_heads": 2}), "PKM (num_heads=2, top_k=16)", {"top_k": 16, "num_heads": 2}),
    ],
)
def test_labels_name_the_options_that_differ(layer, label, options):
    cls, *sizes, given = layer
    built = build(cls, *sizes, **given)
    assert (built.label, built.options(), built.name) == (label, options, cls.__name__)


class Wider(PEER):
    """Hands its arguments on."""

    def __init__(self, d_model, num_experts, *, slope=1, **options):
        super().__init__(d_model, num_experts, **options)
        self.slope = slope


def test_options_that_are_handed_on_are_seen():
    assert build(Wider, D, 64, top_k=32, slope=2).label == "Wider (slope=2, top_k=32)"
    assert build(Wider, D, 64, slope=1).label == "Wider"


def test_the_baseline_is_the_plain_dense_layer():
    assert build(Dense, D).is_baseline
    others = build(Dense, D, 12), build(Dense, D, activation="relu"), build(PEER, D, 16), build(Scale, D, **TYPES)
    assert not any(layer.is_baseline for layer in others)


def test_families_are_the_layers_of_the_package():
    assert families() == {layer.__name__: layer for layer in (Dense, MoE, MuMoE, PEER, PKM, SoftMoE)}
    without_route = {name for name, layer in families().items() if layer.route is FeedForward.route}
    assert without_route == {"Dense", "SoftMoE"}


# Planned


def run_with(layer):
    return Run(
        model=functools.partial(Transformer, d_model=D, num_blocks=3, num_heads=2, ffw=Dense, sparse_ffw=layer),
        optimizer=AdamW(learning_rate=1e-3),
        task=TextTask(python_stdlib(), vocabulary="bytes", seq_len=16),
        batch_size=16,
        steps=1,
        sharding=Sharding(expert=2),
    )


def shown(layer, memory, capsys):
    planned = capacity.plan(run_with(layer))
    device = dataclasses.replace(capacity.DEVICES["h100"], memory=memory)
    show(planned, "h100", device, 16 * 16, 2)
    return planned, capsys.readouterr().out


class Spread(Scale):
    """Its parameter is split over ``expert``."""

    def __init__(self, d_model, **options):
        super().__init__(d_model, **options)
        self.scale = nnx.Param(self.scale[...], axes=("experts",))


def test_plan_counts_it_and_says_what_is_unknown(capsys):
    planned, out = shown(functools.partial(Scale, strength=2.0), 80e9, capsys)
    assert planned.unknown == ()  # it has no parameter that is split over ``expert``, so it sends no tokens anywhere
    assert "unknown" not in out
    # Its parameters are counted, and their moments (3 arrays of 8), and its FLOPs.
    dense = capacity.plan(run_with(Dense))
    kernels = 2 * D * 4 * D
    assert dense.memory.parameters - planned.memory.parameters == 4 * (kernels - D)
    assert dense.step.flops - planned.step.flops == 3 * (2 * kernels - 2 * D) * planned.tokens
    assert sum(planned.step.interconnect.values()) > 0

    spread, out = shown(functools.partial(Spread, strength=2.0), 80e9, capsys)
    assert spread.unknown == ("Spread (strength=2.0)",)
    assert [line.split() for line in out.splitlines()].count(["Spread", "(strength=2.0)", "unknown"]) == 1
    assert out.rstrip().splitlines()[-1].startswith("What Spread (strength=2.0) exchanges with other devices")
    assert planned.memory.parameters - spread.memory.parameters == 4 * D / 2


def test_plan_knows_the_layers_of_the_package(capsys):
    coarse = (functools.partial(layer, num_experts=4) for layer in (MoE, MuMoE, SoftMoE))
    for layer in (Dense, *coarse, functools.partial(PEER, num_experts=64)):
        planned, out = shown(layer, 80e9, capsys)
        assert planned.unknown == ()
        assert "unknown" not in out


# Benchmarked


def test_bench_layer_measures_it_without_a_floor(tmp_path, capsys):
    options = Options(what="layer", only=("Scale",), quick=True, layers={"Scale": Scale})
    result = run(options)
    rows = result["rows"]
    assert [(row["name"], row["direction"], row["implementation"]) for row in rows] == [
        ("Scale", direction, "-") for direction in cases.DIRECTIONS
    ]
    assert all(row["sizes"] == {"T": 64, "d": 32} and row["median"] > 0 for row in rows)
    unknown = {"token": None, "expert": None}
    assert all(row["floor"] == row["fraction_of_floor"] == unknown for row in rows)
    report.show(result)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:2] == ["T=64", "d=32"]][:1]
    assert line.split()[-4:-2] == ["-", "-"]
    written = report.write(result, tmp_path)
    assert [path.name for path in written] == [
        "layer.json",
        "layer-scale-forward.png",
        "layer-scale-forward-backward.png",
    ]
    assert json.loads(written[0].read_text())["rows"][0]["floor"] == unknown


def test_its_parameters_and_input_have_the_types_that_are_asked_for():
    options = Options(what="layer", layers={"Scale": Scale}, only=("Scale",), dtype="bfloat16", table_dtype="float32")
    layer = cases.build_layer(options.competitors()[0][0])
    assert (layer.dtype, layer.scale.dtype.name) == ("bfloat16", "float32")


@pytest.mark.slow
def test_bench_step_trains_it_in_a_process_of_its_own():
    (row,) = run(Options(what="step", only=("Scale",), quick=True, layers={"Scale": Scale}))["rows"]
    assert (row["name"], row["sizes"]) == ("training step with Scale", {"T": 64, "d": 32})
    assert 0 < row["fraction_of_floor"]["token"] < 1.5


def test_a_class_that_another_process_can_not_import_is_named():
    class Inside(Scale):
        pass

    with pytest.raises(InputError, match=r"Inside .* define the class at the top of a module"):
        run(Options(what="step", only=("Inside",), quick=True, layers={"Inside": Inside}))


def test_an_argument_that_bench_has_no_size_for_is_named():
    with pytest.raises(InputError, match="Quiet can't be measured: give its argument width a default"):
        run(Options(what="layer", only=("Quiet",), quick=True, layers={"Quiet": Quiet}))


def test_no_room_but_layers_names_or_tells_apart_a_layer_class():
    """Planning, benchmarks, models and FLOPs know layers by what they say of themselves."""
    rooms = [*(ROOT / "peer_jax").glob("planning/*.py"), *(ROOT / "peer_jax").glob("models/*.py")]
    rooms += (ROOT / "peer_jax").glob("bench/*.py")
    for path in [*rooms, ROOT / "peer_jax" / "training" / "flops.py"]:
        text = path.read_text()
        for name in families():
            assert not re.search(rf"from peer_jax.* import (.*, )?{name}\b|isinstance\(.*\b{name}\b", text), path
