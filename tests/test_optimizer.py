"""AdamW: the schedule in closed form, updates against NumPy in float64, groups, clipping, rates."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec
from reference import relative_error
from small_runs import assert_same, leaves, lines, load, losses, saved_steps, without_times

from peer_jax.data.pipeline import open_cache, train_batches
from peer_jax.errors import InputError, TrainingFailed
from peer_jax.layers import PEER, PKM, Dense, MoE
from peer_jax.layers.interface import Table
from peer_jax.models import Transformer
from peer_jax.sharding import AXES, Placement, use
from peer_jax.training import loop
from peer_jax.training.optimizer import AdamW, Optimizer, label_params

TOUCHED_OPTIONS = {
    "learning_rate": 0.01,
    "table_b1": 0.0,
    "table_second_moment": "row",
    "table_updates": "touched",
}
TOUCHED = AdamW(**TOUCHED_OPTIONS)


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax's bias correction raises a float to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# The schedule


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1), st.data())
def test_schedule_is_optax_s_warm_up_and_cosine(warmup, more, final, data):
    """optax counts updates made, so its first rate is 0; ours is the rate of the update being made."""
    steps = warmup + more
    step = data.draw(st.integers(0, steps - 1))
    ours = AdamW(learning_rate=1.0, warmup_steps=warmup, final_fraction=final)
    theirs = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps, end_value=final)
    # Ours is float64, theirs float32.
    assert abs(ours.schedule(step, steps) - float(theirs(jnp.asarray(step + 1)))) < 1e-6


@given(st.integers(0, 10_000), st.integers(1, 10_000), st.floats(0, 1))
def test_schedule_s_landmarks_are_exact(warmup, more, final):
    optimizer = AdamW(learning_rate=1.0, warmup_steps=warmup, final_fraction=final)
    steps = warmup + more
    assert optimizer.schedule(steps - 1, steps) == final
    if warmup:
        assert optimizer.schedule(warmup - 1, steps) == 1.0
        assert optimizer.schedule(0, steps) == 1 / warmup
    if more % 2 == 0:
        assert abs(optimizer.schedule(warmup + more // 2 - 1, steps) - (final + 1) / 2) < 1e-12


@given(st.integers(1, 60), st.integers(1, 60))
def test_the_rate_grows_and_then_falls(warmup, more):
    optimizer = AdamW(learning_rate=1.0, warmup_steps=warmup)
    rates = [optimizer.schedule(step, warmup + more) for step in range(warmup + more)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup - 1 :] == sorted(rates[warmup - 1 :], reverse=True)


# Groups


class Model(nnx.Module):
    """A model with a parameter of each kind that the groups tell apart."""

    def __init__(self, rng):
        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), jnp.float32)

        self.kernel, self.stacked = nnx.Param(normal(3, 4)), nnx.Param(normal(2, 2, 3))
        self.scale, self.bias = nnx.Param(normal(4)), nnx.Param(normal(4))
        self.down, self.up, self.values = Table(normal(5, 4)), Table(normal(5, 4)), Table(normal(6, 4))
        self.inner = nnx.Dict(up=nnx.Param(normal(4, 2)), down=Table(normal(3, 4)))


GROUP = {
    "kernel": "backbone",
    "stacked": "backbone",
    "scale": "backbone",
    "bias": "backbone",
    "inner.up": "backbone",
    "down": "down",
    "inner.down": "down",
    "up": "up",
    "values": "values",
}


def by_name(state):
    return {".".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def like(state, arrays):
    return nnx.from_flat_state(
        [(path, v.replace(jnp.asarray(arrays[".".join(path)]))) for path, v in nnx.to_flat_state(state)]
    )


def test_labels_of_parameters(rng):
    params = nnx.state(Model(rng), nnx.Param)
    labels = label_params(params)
    assert by_name(labels) == GROUP
    assert jax.tree.structure(labels) == jax.tree.structure(params)


def test_labels_of_a_transformer():
    """Only the tables of PEER and PKM have labels of their own; the kernels up and down of Dense and MoE have not."""
    layers = iter(
        [
            functools.partial(PEER, num_experts=16, num_heads=2, d_key=4, top_k=4),
            functools.partial(PKM, num_experts=16, num_heads=2, d_key=4, top_k=4),
            functools.partial(MoE, num_experts=3, d_ff=4),
            functools.partial(Dense, activation="swiglu"),
        ]
    )

    def build():
        return Transformer(11, 8, 4, 2, ffw=lambda *sizes, **more: next(layers)(*sizes, **more), rngs=nnx.Rngs(0))

    labels = by_name(label_params(nnx.state(nnx.eval_shape(build), nnx.Param)))
    tables = {"blocks.0.ffw.down": "down", "blocks.0.ffw.up": "up", "blocks.1.ffw.values": "values"}
    assert {name: label for name, label in labels.items() if label != "backbone"} == tables
    backbone = {"blocks.0.ffw.sub_keys", "blocks.2.ffw.up", "blocks.2.ffw.down", "blocks.3.ffw.up.kernel"}
    assert backbone < labels.keys()


@pytest.mark.parametrize(
    ("table_rate", "expected"),
    [
        (None, {"down": 0.5, "up": 0.5, "values": 0.5}),
        (0.25, {"down": 0.25, "up": 0.25, "values": 0.25}),
        ({"down": 0.1, "up": 0.2, "values": 0.3}, {"down": 0.1, "up": 0.2, "values": 0.3}),
    ],
)
def test_rates_by_group(rng, table_rate, expected):
    labels = label_params(nnx.state(Model(rng), nnx.Param))
    optimizer = AdamW(learning_rate=0.5, table_learning_rate=table_rate, warmup_steps=4, final_fraction=0.0)
    for step, relative in [(0, 0.25), (3, 1.0), (7, 0.5 * (1 + math.cos(math.pi * 4 / 6))), (9, 0.0)]:
        rates = optimizer.rates(labels, step, 10)
        assert rates == pytest.approx({"backbone": 0.5 * relative} | {k: v * relative for k, v in expected.items()})


def test_a_table_without_a_rate_is_named(rng):
    labels = label_params(nnx.state(Model(rng), nnx.Param))
    optimizer = AdamW(learning_rate=0.5, table_learning_rate={"down": 0.1, "up": 0.2})
    with pytest.raises(InputError, match="'values'"):
        optimizer.rates(labels, 0, 10)


# Updates


def numpy_adamw(params, gradients, optimizer, rates):
    """Loshchilov & Hutter 2017, algorithm 2, after clipping each group; gradients and rates by step."""
    params = {name: p.astype(np.float64) for name, p in params.items()}
    first, second = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        for name, p in params.items():
            table = GROUP[name] != "backbone"
            clip = optimizer.table_clip_norm if table else optimizer.clip_norm
            decay = optimizer.table_weight_decay if table else optimizer.weight_decay
            same_group = [gradient[other].astype(np.float64) for other in params if GROUP[other] == GROUP[name]]
            norm = math.sqrt(sum((g**2).sum() for g in same_group))
            g = gradient[name].astype(np.float64) * (1.0 if clip is None else min(1.0, clip / (norm or 1.0)))
            b1 = optimizer.table_b1 if table and optimizer.table_b1 is not None else optimizer.b1
            first[name] = b1 * first[name] + (1 - b1) * g
            square = g**2
            if table and optimizer.table_second_moment == "row":
                square = square.mean(axis=-1, keepdims=True)
            second[name] = optimizer.b2 * second[name] + (1 - optimizer.b2) * square
            m, v = first[name] / (1 - b1**t), second[name] / (1 - optimizer.b2**t)
            update = m / (np.sqrt(v) + optimizer.eps) + (decay * p if p.ndim > 1 else 0.0)
            params[name] = p - rate[GROUP[name]] * update
    return params


def three_steps(rng, optimizer, gradients=None):
    """Parameters after three updates, ours and NumPy's, and those before."""
    params = nnx.state(Model(rng), nnx.Param)
    labels = label_params(params)
    update = jax.jit(functools.partial(optimizer.update, labels))
    gradients = gradients or [
        {name: rng.normal(size=p.shape).astype(np.float32) for name, p in by_name(params).items()} for _ in range(3)
    ]
    rates = [optimizer.rates(labels, step, 3) for step in range(3)]
    before, ours, state = by_name(params), params, optimizer.init(labels, params)
    for gradient, rate in zip(gradients, rates, strict=True):
        ours, state, _ = update(ours, like(ours, gradient), state, rate)
    before = {name: np.asarray(p) for name, p in before.items()}
    return by_name(ours), numpy_adamw(before, gradients, optimizer, rates), before


@pytest.mark.parametrize(
    "options",
    [
        {},  # all groups are clipped: their norms are 3 and more
        {"clip_norm": None, "table_clip_norm": 2.0, "table_weight_decay": 0.3},
        {"clip_norm": 2.0, "table_clip_norm": None, "weight_decay": 0.0},
        {"clip_norm": 1e3, "table_clip_norm": 1e3, "b1": 0.5, "b2": 0.7, "eps": 0.1},
        {"table_second_moment": "row"},
        {"table_second_moment": "row", "table_b1": 0.0},
        {"table_b1": 0.0, "table_weight_decay": 0.3},
        {"table_b1": 0.5},
    ],
)
def test_three_updates_equal_numpy_s(rng, options):
    rates = {"learning_rate": 0.1, "table_learning_rate": {"down": 0.2, "up": 0.05, "values": 0.4}}
    optimizer = AdamW(**rates, warmup_steps=1, **options)
    ours, expected, before = three_steps(rng, optimizer)
    for name, p in ours.items():
        # A dozen float32 roundings of numbers of size 1, where parameters change by 0.05 and more.
        assert np.max(np.abs(p - expected[name])) < 5e-6, name
        assert np.max(np.abs(p - before[name])) > 0.05, name


def test_weight_decay_spares_vectors_and_is_the_table_s_own(rng):
    """Without gradients only decay is left: p * product of (1 - rate * decay)."""
    optimizer = AdamW(learning_rate=0.1, table_learning_rate=0.5, weight_decay=0.2, table_weight_decay=0.4)
    zeros = {name: np.zeros(p.shape, np.float32) for name, p in by_name(nnx.state(Model(rng), nnx.Param)).items()}
    ours, _, before = three_steps(rng, optimizer, [zeros] * 3)
    left = {"vector": 1.0, "matrix": 1.0, "table": 1.0}
    for step in range(3):
        left["matrix"] *= 1 - 0.1 * optimizer.schedule(step, 3) * 0.2
        left["table"] *= 1 - 0.5 * optimizer.schedule(step, 3) * 0.4
    for name, p in ours.items():
        kind = "table" if GROUP[name] != "backbone" else "vector" if p.ndim == 1 else "matrix"
        assert relative_error(p, before[name] * left[kind]) < 1e-6, name


@pytest.mark.parametrize("second_moment", ["element", "row"])
def test_parameters_in_bfloat16_have_the_moments_of_float32(rng, second_moment):
    """Bit for bit, from the same gradients; a parameter is rounded once, after its update."""
    optimizer = AdamW(learning_rate=0.1, warmup_steps=1, table_second_moment=second_moment, rounding="nearest")
    halves = jax.tree.map(lambda p: p.astype(jnp.bfloat16), nnx.state(Model(rng), nnx.Param))
    wholes = jax.tree.map(lambda p: p.astype(jnp.float32), halves)
    labels = label_params(wholes)
    update, rates = jax.jit(functools.partial(optimizer.update, labels)), optimizer.rates(labels, 1, 3)
    states = [optimizer.init(labels, params) for params in (halves, wholes)]
    for step in range(2):
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.bfloat16), halves)
        of_float32 = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
        after, states[0], norms = update(halves, gradients, states[0], rates)
        expected, states[1], expected_norms = update(wholes, of_float32, states[1], rates)
        if step == 0:
            rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), expected)
            assert {p.dtype.name for p in jax.tree.leaves(after)} == {"bfloat16"}
            jax.tree.map(np.testing.assert_array_equal, after, rounded)
            assert relative_error(norms["update_norm"], expected_norms["update_norm"]) < 1e-6
    assert {moment.dtype.name for moment in jax.tree.leaves((states[0].mu, states[0].nu))} == {"float32"}
    jax.tree.map(np.testing.assert_array_equal, states[0], states[1])


@pytest.mark.parametrize("large", ["kernel", "inner.down", "values"])
def test_a_large_gradient_scales_down_its_own_group_only(rng, large):
    """eps far above the gradients makes the update their clipped value, over eps."""
    params = by_name(nnx.state(Model(np.random.default_rng(0)), nnx.Param))
    gradient = {name: rng.normal(size=p.shape).astype(np.float32) * 1e-3 for name, p in params.items()}
    gradient[large] *= 1e5
    optimizer = AdamW(learning_rate=1.0, warmup_steps=0, final_fraction=1.0, weight_decay=0.0, eps=1e6, b1=0.0, b2=0.0)
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(Model(rng), nnx.Param))
    labels = label_params(zeros)
    rates = dict.fromkeys(GROUP.values(), -1.0)
    updates, _, _ = optimizer.update(labels, zeros, like(zeros, gradient), optimizer.init(labels, zeros), rates)
    norms = {
        group: math.sqrt(sum((g.astype(np.float64) ** 2).sum() for name, g in gradient.items() if GROUP[name] == group))
        for group in set(GROUP.values())
    }
    assert norms[GROUP[large]] > 10
    for name, update in by_name(updates).items():
        clip = min(1.0, 1.0 / norms[GROUP[name]])
        assert relative_error(np.asarray(update) * 1e6, gradient[name] * clip) < 1e-5, name


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "second_moment"), [(1, "element"), (2, "element"), (5, "element"), (2, "row")])
def test_tables_updated_some_rows_at_a_time(rng, rows, second_moment, monkeypatch):
    """As if updated whole, whether the rows divide the table's 5 and 6 or not; norms as NumPy has them."""
    params = nnx.state(Model(rng), nnx.Param)
    grads = like(params, {name: rng.normal(size=p.shape).astype(np.float32) for name, p in by_name(params).items()})
    labels, optimizer = (
        label_params(params),
        AdamW(learning_rate=0.1, table_weight_decay=0.2, table_second_moment=second_moment),
    )
    rates = optimizer.rates(labels, 5, 10)
    whole, moments, norms = jax.jit(functools.partial(optimizer.update, labels))(
        params, grads, optimizer.init(labels, params), rates
    )
    monkeypatch.setattr("peer_jax.training.update_by_rows.ROWS_BUDGET", rows * 4 * 4)
    parts = jax.jit(functools.partial(optimizer.update, labels))(params, grads, optimizer.init(labels, params), rates)
    # Roundings may differ where XLA fuses a product and a sum.
    pairs = zip(jax.tree.leaves(parts), jax.tree.leaves((whole, moments, norms)), strict=True)
    assert max(relative_error(part, all_) for part, all_ in pairs) < 1e-6

    def norm(tree):
        return math.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in jax.tree.leaves(tree)))

    assert norms["grad_norm"] == pytest.approx(norm(grads), rel=1e-6)
    assert norms["param_norm"] == pytest.approx(norm(whole), rel=1e-6)
    moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - np.asarray(old, np.float64), whole, params)
    assert norms["update_norm"] == pytest.approx(norm(moved), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": 0.1, "warmup_steps": -1}, "warmup_steps=-1"),
        ({"learning_rate": 0.1, "table_second_moment": "column"}, "table_second_moment='column'"),
        ({"learning_rate": 0.1, "rounding": "up"}, "rounding='up'"),
        ({"learning_rate": 0.1, "table_b1": 1.0}, "table_b1=1.0"),
        ({"learning_rate": 0.1, "table_updates": "some"}, "table_updates='some'"),
        ({"learning_rate": 0.1, "touched_share": 0.0}, "touched_share=0.0"),
        ({"learning_rate": 0.1, "untouched_rows": "stay"}, "untouched_rows='stay'"),
        ({"learning_rate": 0.1, "table_updates": "touched"}, "table_b1=None changes them: set AdamW.untouched_rows to"),
        (TOUCHED_OPTIONS | {"table_second_moment": "element"}, "table_second_moment='element' changes them"),
        (TOUCHED_OPTIONS | {"table_weight_decay": 0.1}, "table_weight_decay=0.1 changes them"),
        ({"learning_rate": 0.1, "final_fraction": 1.5}, "final_fraction=1.5"),
        ({"learning_rate": 0.1, "final_fraction": -0.5}, "final_fraction=-0.5"),
    ],
)
def test_values_out_of_range_are_named(options, named):
    with pytest.raises(InputError, match=named):
        AdamW(**options)


@pytest.mark.usefixtures("trains")
def test_rounding_of_what_is_not_bfloat16_is_refused(tiny):
    with pytest.raises(InputError, match=r"rounding='compensated' is for parameters in bfloat16: set Transformer\."):
        load(tiny, "Run.steps=2", 'AdamW.rounding="compensated"').trainer()


# Other optimisers


@dataclasses.dataclass(frozen=True)
class Sgd:
    """Gradient descent with momentum: an optimiser that the package has never heard of."""

    learning_rate: float = 0.3
    momentum: float = 0.9

    def rates(self, labels, step, steps):
        return {"all": self.learning_rate * (1 - step / steps)}

    def check(self, labels):
        pass

    def init(self, labels, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, labels, params, grads, state, rates):
        velocity = jax.tree.map(lambda v, g: self.momentum * v + g, state, grads)
        step = jax.tree.map(lambda v: -rates["all"] * v, velocity)
        after = jax.tree.map(jnp.add, params, step)
        norms = zip(("grad_norm", "update_norm", "param_norm"), (grads, step, after), strict=True)
        return after, velocity, {name: optax.tree.norm(tree) for name, tree in norms}


@dataclasses.dataclass(frozen=True)
class Lion:
    """optax's, with a rate of its own for tables: the adapter that any optax transformation needs."""

    learning_rate: float = 3e-3
    table_learning_rate: float = 1e-2

    def rates(self, labels, step, steps):
        groups = set(jax.tree.leaves(labels))
        return {group: self.learning_rate if group == "backbone" else self.table_learning_rate for group in groups}

    def check(self, labels):
        if "backbone" not in jax.tree.leaves(labels):
            raise InputError("Lion needs a backbone")

    def init(self, labels, params):
        return optax.scale_by_lion().init(params)

    def update(self, labels, params, grads, state, rates):
        direction, state = optax.scale_by_lion().update(grads, state, params)
        step = jax.tree.map(lambda label, d: -jnp.asarray(rates[label], d.dtype) * d, labels, direction)
        after = optax.apply_updates(params, step)
        norms = {"grad_norm": grads, "update_norm": step, "param_norm": after}
        return after, state, {name: optax.tree.norm(tree) for name, tree in norms.items()}


class Killed(BaseException):
    """The end of a process, as far as the process can tell."""


def die_at(monkeypatch, step):
    make = loop.train_batches

    def make_dying(*arguments, **options):
        batches = make(*arguments, **options)

        class Dying:
            fetched = 0

            def __next__(self):
                self.fetched += 1
                if self.fetched == step:
                    raise Killed
                return next(batches)

            def __getattr__(self, name):
                return getattr(batches, name)

        return Dying()

    monkeypatch.setattr(loop, "train_batches", make_dying)


@pytest.mark.slow
@pytest.mark.usefixtures("trains")
@pytest.mark.parametrize(
    ("optimizer", "param_dtype"),
    [(Sgd(), "float32"), (Lion(), "float32"), (AdamW(learning_rate=0.01), "bfloat16"), (TOUCHED, "bfloat16")],
    ids=["sgd", "lion", "compensated", "touched"],
)
def test_any_optimizer_trains_is_killed_and_goes_on_to_the_same(tiny, tmp_path, monkeypatch, optimizer, param_dtype):
    assert isinstance(optimizer, Optimizer)
    bindings = ("Run.steps=30", "Run.checkpoint_every=5", "Run.evaluate_every=10")
    types = f"Transformer.param_dtype=%{param_dtype}"
    run = dataclasses.replace(load(tiny, *bindings, types, layer="peer"), optimizer=optimizer)
    never, killed = tmp_path / "never", tmp_path / "killed"
    expected = loop.train(run, never, progress=False)
    with monkeypatch.context() as patch:
        die_at(patch, 13)
        with pytest.raises(Killed):
            loop.train(run, killed, progress=False)
    assert saved_steps(killed)[-1] == 10
    assert without_times(loop.train(run, killed, progress=False)) == without_times(expected)
    assert losses(killed) == losses(never)
    assert_same(leaves(killed, run), leaves(never, run))

    logged = [line for line in lines(never) if "loss" in line]
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.5
    rates = {name for name in logged[0] if name.startswith("learning_rate/")}
    labels = run.trainer().labels
    assert rates == {f"learning_rate/{name}" for name in optimizer.rates(labels, 0, 30)}
    for line in logged:
        assert min(line["grad_norm"], line["update_norm"], line["param_norm"]) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("trains")
def test_a_first_step_of_sgd_is_the_gradient(tiny):
    """Against a gradient that JAX takes of the loss, outside of the trainer."""
    run = dataclasses.replace(load(tiny, "Run.steps=2"), optimizer=Sgd())
    trainer = run.trainer()
    state = trainer.init(0)
    source = open_cache(run.task.cache_path(), "train")
    batch = jax.tree.map(jnp.asarray, dict(next(train_batches(source, batch_size=run.batch_size, seed=0))))

    def loss(params):
        logits, _ = nnx.merge(trainer.graph, params, state.others)(batch["inputs"], batch["segment_ids"])
        real = batch["segment_ids"] > 0
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]), where=real)

    gradient = jax.jit(jax.grad(loss))(state.params)
    after, metrics = jax.jit(trainer.step)(state, batch, {"all": 0.5})
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, gradient)
    pairs = zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True)
    # The same sums, compiled together with others.
    assert max(relative_error(ours, theirs) for ours, theirs in pairs) < 1e-5
    assert relative_error(metrics["grad_norm"], optax.tree.norm(gradient)) < 1e-5


@pytest.mark.usefixtures("trains")
@pytest.mark.parametrize(
    "optimizer",
    [AdamW(learning_rate=0.1), AdamW(learning_rate=0.1, table_second_moment="row"), Sgd(), Lion()],
    ids=["adamw", "adamw by row", "sgd", "lion"],
)
@pytest.mark.parametrize("tables", ["rows", "columns"])
def test_moments_are_split_as_the_parameters_are(tiny, optimizer, tables):
    mesh = Mesh(np.full((2, 2, 2), jax.devices()[0]), AXES)  # the one device there is, which is enough to plan with
    run = dataclasses.replace(load(tiny, "Run.steps=2", layer="peer"), optimizer=optimizer)
    with use(Placement(mesh, tables)):
        state = run.trainer().shardings()

    def specs(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): sharding.spec for path, sharding in leaves}

    params, moments = specs(state.params), specs(state.optimizer)
    assert len({str(spec) for spec in params.values()}) > 2
    mirrored = 0
    for path, spec in params.items():
        for moment in (name for name in moments if name.endswith(path)):
            by_row = moment.startswith(".nu") and spec != moments[moment]
            expected = PartitionSpec(*spec[:1], None) if by_row else spec
            assert moments[moment] == expected, moment
            mirrored += 1
    counters = [spec for name, spec in moments.items() if not any(name.endswith(path) for path in params)]
    assert mirrored >= len(params)
    assert set(counters) <= {PartitionSpec()}


class WithoutNorms(Sgd):
    def update(self, labels, params, grads, state, rates):
        return (*super().update(labels, params, grads, state, rates)[:2], {"grad_norm": jnp.zeros(())})


@pytest.mark.usefixtures("trains")
def test_norms_that_an_optimizer_does_not_return_are_named(tiny, tmp_path):
    run = dataclasses.replace(load(tiny, "Run.steps=2"), optimizer=WithoutNorms())
    with pytest.raises(InputError, match=r"WithoutNorms\.update returns no 'update_norm'"):
        loop.train(run, tmp_path, progress=False)


@pytest.mark.slow
@pytest.mark.usefixtures("trains")
def test_parameters_that_another_optimizer_makes_infinite_are_not_saved(tiny, tmp_path):
    bindings = ("Run.steps=20", "Run.checkpoint_every=1")
    run = dataclasses.replace(load(tiny, *bindings), optimizer=Sgd(learning_rate=1e30))
    with pytest.raises(TrainingFailed, match=r"step \d has loss"):
        loop.train(run, tmp_path, progress=False)
    for step in saved_steps(tmp_path):
        assert all(np.isfinite(value).all() for value in leaves(tmp_path, run, step).values())
