"""Steps on the rows that a batch touches: equal to steps on whole tables, and without a gradient of a table's size."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import makers
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import relative_error

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Aux, Dense, FeedForward
from peer_jax.layers.interface import Table
from peer_jax.models import Transformer
from peer_jax.ops import checked
from peer_jax.ops.touched import put_rows, take_rows, touched_rows
from peer_jax.training.optimizer import AdamW, label_params
from peer_jax.training.step import Trainer
from peer_jax.training.touched import RowGradients

V = 13
# As in test_step: a large eps makes the update a smooth function of the gradient, so that only roundings may differ.
OPTIONS = {"learning_rate": 0.1, "table_learning_rate": 0.5, "warmup_steps": 1, "eps": 0.1, "table_clip_norm": 0.05}
BY_ROW = {"table_b1": 0.0, "table_second_moment": "row"}
RESTING = {"untouched_rows": "rest", "table_weight_decay": 0.1}
EQUAL = 5e-6


@pytest.fixture(autouse=True)
def _standard_promotion():
    """optax's bias correction raises a float to the power of an integer count, which strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def trainer(
    table_updates,
    layer,
    *,
    d=8,
    blocks=1,
    share_tables=False,
    remat=False,
    accumulation=1,
    form=BY_ROW,
    share=1.0,
    **sizes,
):
    def build(*, rngs):
        options = {"sparse_blocks": "all", "share_tables": share_tables, "remat": remat}
        options |= {"embed_init": nnx.initializers.normal(1.0)}
        sparse = functools.partial(layer, **sizes)
        return Transformer(V, d, blocks, 2, ffw=Dense, sparse_ffw=sparse, **options, rngs=rngs)

    optimizer = AdamW(**OPTIONS, **form, table_updates=table_updates, touched_share=share)
    return Trainer(build, optimizer, accumulation=accumulation)


def batch(seed, rows, length):
    """Random tokens; the first row ends in padding, unless it has a single token."""
    inputs, targets = np.random.default_rng(seed).integers(V, size=(2, rows, length)).astype(np.int32)
    segment_ids = np.ones_like(inputs)
    segment_ids[0, 1:] = 0
    return {"inputs": inputs, "targets": targets, "segment_ids": segment_ids}


def tables(state):
    return {path: np.asarray(v) for path, v in nnx.to_flat_state(state.params) if isinstance(v, Table)}


# Rows


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-2, 11), min_size=8, max_size=8), st.sampled_from((8, 9)))
def test_touched_rows_are_numpy_s_unique_ones(indices, most):
    """Rows and places; an index outside of the table, of 10 rows, has a place outside of the compact one."""
    valid = [i for i in indices if 0 <= i < 10]
    unique = np.unique(valid).astype(int)
    rows, slots = touched_rows(jnp.asarray(indices, jnp.int32), 10, most)
    assert rows[: len(unique)].tolist() == unique.tolist()
    assert rows[len(unique) :].tolist() == [10 + i for i in range(len(unique), most)]
    assert [unique[s] if s < most else None for s in slots.tolist()] == [i if i in valid else None for i in indices]
    table = np.arange(20.0, dtype=np.float32).reshape(10, 2)
    expected = table.copy()
    expected[unique] += 100
    taken = take_rows(jnp.asarray(table), rows)
    assert taken[: len(unique)].tolist() == table[unique].tolist()
    assert put_rows(jnp.asarray(table), rows, taken + 100).tolist() == expected.tolist()


# Steps


CASES = {
    "two blocks, remat": (PEER, {"num_heads": 2, "top_k": 2, "blocks": 2, "remat": True}, 64, (2, 5)),
    "one token, k=1": (PKM, {"num_heads": 1, "top_k": 1, "query_norm": "layer"}, 16, (1, 1)),
    "all rows": (PKM, {"num_heads": 1, "top_k": 4}, 4, (2, 3)),
    "accumulated": (PEER, {"num_heads": 2, "top_k": 2, "query_norm": "layer"}, 64, (4, 3)),
    "one table, three blocks, remat": (
        PEER,
        {"num_heads": 2, "top_k": 2, "blocks": 3, "share_tables": True, "remat": True},
        1024,
        (2, 5),
    ),
    "one table, accumulated": (
        PKM,
        {"num_heads": 2, "top_k": 2, "query_norm": "layer", "blocks": 2, "share_tables": True},
        256,
        (4, 3),
    ),
    "Adam, rows rest": (PEER, {"num_heads": 2, "top_k": 2, "form": RESTING}, 64, (2, 5)),
    "moment per row, rows rest": (
        PKM,
        {"num_heads": 1, "top_k": 2, "form": RESTING | {"table_second_moment": "row"}},
        64,
        (2, 5),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_equal_those_on_whole_tables(case):
    """Parameters, moments and metrics, also if the form changes from step to step, as between two parts of a run.

    Some rows are touched again after steps without them, some never.
    """
    layer, options, num_experts, size = CASES[case]
    made, steps = {}, {}
    for updates in ("all", "touched"):
        accumulation = 2 if "accumulated" in case and updates == "touched" else 1
        made[updates] = trainer(updates, layer, num_experts=num_experts, d_key=4, accumulation=accumulation, **options)
        steps[updates] = made[updates].compiled_step()
    initial, states, metrics, history = made["all"].init(0), {}, {}, []
    for name, forms in {"all": ["all"], "touched": ["touched"], "in turns": ["touched", "all"]}.items():
        state = jax.tree.map(jnp.copy, initial)
        for index in range(10):
            if name == "touched":
                history.append(tables(state))
            rates = made["all"].optimizer.rates(made["all"].labels, index, 10)
            state, measured = steps[forms[index % len(forms)]](state, batch(index, *size), rates)
            metrics.setdefault(name, []).append(measured)
        states[name] = state
    for name in ("touched", "in turns"):
        pairs = zip(jax.tree.leaves(states[name]), jax.tree.leaves(states["all"]), strict=True)
        assert max(relative_error(ours, whole) for ours, whole in pairs) < EQUAL
        for ours, whole in zip(metrics[name], metrics["all"], strict=True):
            for norm in ("loss", "grad_norm", "update_norm", "param_norm"):
                assert relative_error(ours[norm], whole[norm]) < EQUAL, norm

    history.append(tables(states["touched"]))
    for name in history[0]:
        moved = np.array([np.any(b[name] != a[name], axis=1) for a, b in itertools.pairwise(history)])
        assert moved.any()
        if case == "all rows":
            assert moved.all()
        else:
            assert not moved.any(axis=0).all()
            assert (np.diff(moved.astype(int), axis=0) == 1).any(), "no row is touched again after a step without it"


@pytest.mark.parametrize("second_moment", ["element", "row"])
@pytest.mark.parametrize("updates", ["all", "touched"])
def test_a_row_that_rests_has_adam_s_moments_once_it_has_a_gradient_again(second_moment, updates):
    """Against loops in float64 over rows, in which the moments decay in every step, and the row moves in some."""
    N, d, steps, rate, b1, b2, eps, decay = 6, 4, 12, 0.1, 0.8, 0.9, 1e-3, 0.2
    options = {"b1": b1, "b2": b2, "eps": eps, "clip_norm": None, "table_clip_norm": None, "warmup_steps": 0}
    options |= {"untouched_rows": "rest", "table_weight_decay": decay, "table_second_moment": second_moment}
    optimizer = AdamW(learning_rate=rate, table_updates=updates, **options)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(N, d))
    params = nnx.State({"up": Table(jnp.asarray(u, jnp.float32))})
    labels = label_params(params)
    state, step = optimizer.init(labels, params), jax.jit(functools.partial(optimizer.update, labels))
    m, n = np.zeros((N, d)), np.zeros((N, d))
    for t in range(1, steps + 1):
        # Row 0 in each step, row 1 never, the others now and then.
        rows = [0, *(r for r in range(2, N) if rng.random() < 0.3)]
        g = np.zeros((N, d))
        g[rows] = rng.normal(size=(len(rows), d))
        squares = g**2 if second_moment == "element" else np.mean(g**2, axis=1, keepdims=True)
        m, n = b1 * m + (1 - b1) * g, b2 * n + (1 - b2) * squares
        moved = m / (1 - b1**t) / (np.sqrt(n / (1 - b2**t)) + eps) + decay * u
        u[rows] -= rate * moved[rows]
        gradient = jnp.asarray(g, jnp.float32)
        if updates == "touched":
            padded = jnp.asarray([*sorted(rows), *range(N, 2 * N - len(rows))])
            gradient = RowGradients(padded, take_rows(jnp.pad(gradient, ((0, N), (0, 0))), padded))
        grads = nnx.State({"up": params["up"].replace(gradient)})
        params, state, norms = step(params, grads, state, {"up": rate})
        assert relative_error(params["up"].get_value(), u) < 1e-5
        assert relative_error(norms["param_norm"], np.linalg.norm(u)) < 1e-5
        assert relative_error(norms["update_norm"], rate * np.linalg.norm(moved[rows])) < 1e-5
    assert state.last["up"].get_value()[:2, 0].tolist() == [steps, 0]


def test_padding_adds_nothing_to_the_norm_of_parameters_in_bfloat16():
    """Padding stands for the last row, which would be rounded anew to another pair of a value and what it has lost."""
    p = jnp.full((4, 2), 1 + 2**-7, jnp.bfloat16)
    params = nnx.State({"up": Table(p)})
    optimizer, labels = (
        AdamW(learning_rate=0.1, warmup_steps=0, **BY_ROW, table_updates="touched"),
        label_params(params),
    )
    state = optimizer.init(labels, params)
    half = nnx.State({"up": params["up"].replace(jnp.full((4, 2), 2**-8, jnp.bfloat16))})
    rows = jnp.asarray([0, 4, 5], jnp.int32)
    gradient = RowGradients(rows, jnp.asarray([[1, 2], [0, 0], [0, 0]], jnp.float32))
    grads = nnx.State({"up": params["up"].replace(gradient)})
    new, state, norms = optimizer.update(labels, params, grads, state._replace(lost=half), {"up": 0.1})
    after = np.asarray(new["up"].get_value(), np.float64)
    assert np.array_equal(after[1:], np.asarray(p, np.float64)[1:])
    assert relative_error(norms["param_norm"], np.linalg.norm(after)) < 1e-6


def test_without_a_choice_rows_are_touched_where_they_rest_and_the_batch_is_small():
    sizes = {"num_experts": 64, "num_heads": 1, "top_k": 2, "d_key": 4, "query_norm": "layer"}
    for form, length, by_rows in ((BY_ROW, 8, True), (BY_ROW, 9, False), (RESTING, 8, True), ({}, 8, False)):
        made = trainer(None, PKM, form=form, **sizes)
        assert len(jax.tree.leaves(made.touched.split(made.abstract_state().params, 2 * length)[1])) == by_rows


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_has_room_for_what_it_touches_or_is_not_finite(accumulation):
    """The smallest room for which a step is right is the number of rows that it touches."""
    sizes = {"num_experts": 64, "num_heads": 2, "top_k": 2, "d_key": 4, "query_norm": "layer"}
    data = batch(0, 4, 3)
    made = trainer("all", PEER, **sizes)
    rates, initial = made.optimizer.rates(made.labels, 0, 10), made.init(0)
    expected, _ = jax.jit(made.step)(initial, data, rates)
    step = trainer("touched", PEER, accumulation=accumulation, **sizes)
    touched = int(jax.jit(step.step)(initial, data, rates)[1]["touched_rows"])
    assert 4 < touched < 12 * 4
    for room, fits in ((touched, True), (touched - 1, False)):
        # Room is a share of 12 tokens with 4 rows each.
        made = trainer("touched", PEER, accumulation=accumulation, share=(room - 0.5) / 48, **sizes)
        state, metrics = jax.jit(made.step)(initial, data, rates)
        assert bool(np.isfinite(metrics["loss"] + metrics["grad_norm"])) == fits
        if fits:
            assert max(map(relative_error, jax.tree.leaves(state), jax.tree.leaves(expected))) < EQUAL
        else:
            assert metrics["touched_rows"] == room
            with pytest.raises(InputError, match=r"more rows of a table than there is room for|indices run from"):
                checked(made.step)(initial, data, rates)


def test_gradients_of_rows_are_those_of_the_table_and_finite_differences():
    sizes = {"num_experts": 64, "num_heads": 2, "top_k": 2, "d_key": 4}
    made = {updates: trainer(updates, PEER, **sizes) for updates in ("all", "touched")}
    state, data, total = made["all"].init(0), batch(0, 2, 5), jnp.float32(6)
    gradient = {name: jax.jit(functools.partial(t._gradient, total=total)) for name, t in made.items()}

    def loss(params):
        return float(gradient["all"](params, state.others, data)[1]["loss"])

    whole, by_rows = (gradient[name](state.params, state.others, data)[0] for name in ("all", "touched"))
    for name in ("down", "up"):
        dense = np.asarray(whole["blocks"][0]["ffw"][name])
        rows, values = by_rows["blocks"][0]["ffw"][name].get_value()
        count = int(np.sum(np.asarray(rows) < 64))
        assert 0 < count < 20  # 6 real tokens at most, each with 4 rows, and 4 of padding
        scattered = np.zeros_like(dense)
        scattered[np.asarray(rows)[:count]] = np.asarray(values)[:count]
        assert relative_error(scattered, dense) < 1e-6
        assert not np.any(np.asarray(values)[count:])

        direction = np.random.default_rng(1).normal(size=dense.shape).astype(np.float32)
        size = 1e-2

        def shifted(sign, name=name, direction=direction, size=size):
            params = jax.tree.map(lambda p: p, state.params)
            table = params["blocks"][0]["ffw"][name]
            params["blocks"][0]["ffw"][name] = table.replace(table.get_value() + sign * size * direction)
            return loss(params)

        slope = (shifted(1) - shifted(-1)) / (2 * size)
        # Ten roundings of a loss near 3, 2e-6, over twice the size are 1e-4; the norms are 0.1.
        assert abs(slope - np.sum(scattered * direction)) < 1e-2 * np.linalg.norm(scattered)


def test_the_program_has_no_array_of_a_table_s_size_but_the_table():
    """But for what is scattered into it in place. The step on whole tables has other arrays of its size."""
    N, D = 4096, 32
    found, temporary = {}, {}
    for updates in ("all", "touched"):
        made = trainer(updates, PEER, d=D, num_experts=N, num_heads=2, top_k=2, d_key=4)
        data = jax.tree.map(jnp.asarray, batch(0, 2, 5))
        rates = made.optimizer.rates(made.labels, 0, 10)
        compiled = made.compiled_step().lower(made.abstract_state(), data, rates).compile()
        found[updates] = makers(compiled.as_text(), N, D)
        temporary[updates] = compiled.memory_analysis().temp_size_in_bytes
    assert found["touched"] == []
    assert found["all"]
    # A gradient takes 4 N D bytes; what is left is for each row a few integers.
    assert temporary["touched"] < 4 * N * D
    assert temporary["all"] > 2 * 4 * N * D


# Layers of a user's own, and what is refused


class Lookup(FeedForward):
    """y = x * (mean of a table's rows): it reads the whole table."""

    num_experts = 4

    def __init__(self, d_model, *, dtype, param_dtype, rngs):
        self.rows = Table(jnp.ones((4, d_model), param_dtype), axes=("rows", "columns"))

    def __call__(self, x, mask=None):
        return x * jnp.mean(self.rows[...], axis=0)[None, None], Aux(jnp.zeros(()), {})


class Promising(Lookup):
    def rows_touched(self, tokens):
        return 2


class Unplaced(Promising):
    """Nobody can say which part of its table a device has."""

    def __init__(self, d_model, *, dtype, param_dtype, rngs):
        self.rows = Table(jnp.ones((4, d_model), param_dtype))


def traced(made):
    data = jax.tree.map(jnp.asarray, batch(0, 2, 3))
    gradient = functools.partial(made._gradient, total=jnp.float32(4))
    state = made.abstract_state()
    return jax.eval_shape(gradient, state.params, state.others, data)[0]


def test_a_layer_that_reads_whole_tables_is_trained_by_whole_gradients():
    gradients = traced(trainer("touched", Lookup))
    assert gradients["blocks"][0]["ffw"]["rows"].shape == (4, 8)
    by_rows = traced(trainer("touched", PKM, num_experts=16, num_heads=1, top_k=2, d_key=4))
    assert isinstance(by_rows["blocks"][0]["ffw"]["values"].get_value(), RowGradients)


def test_what_can_t_be_done_by_rows_is_refused_with_a_way_out():
    with pytest.raises(InputError, match=r"reads a whole table.*retrieved.*table_updates='all'"):
        traced(trainer("touched", Promising))
    with pytest.raises(InputError, match=r"Unplaced defines rows_touched, but its table 'rows' has no axes=\('rows', "):
        trainer("touched", Unplaced)
