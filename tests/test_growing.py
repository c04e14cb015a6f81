"""Runs that go on with more experts, and experts that are frozen: what is kept, what is new, what it costs."""

import functools
import json
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eight_devices import measured
from flax import nnx
from reference import relative_error
from small_runs import (
    ADAM,
    KEEPS_NO_PROGRAMS,
    PROGRAM,
    arrays,
    assert_same,
    leaves,
    lines,
    load,
    losses,
    refused,
    saved_steps,
    start_process,
    train,
    wait_for,
    without_times,
)

from peer_jax.errors import InputError
from peer_jax.layers import PEER, PKM, Dense
from peer_jax.layers.growing import SHRINKING
from peer_jax.models import Transformer
from peer_jax.sharding import Sharding, use
from peer_jax.training import growth, loop
from peer_jax.training.optimizer import AdamW
from peer_jax.training.restore import restore_model
from peer_jax.training.step import Trainer
from peer_jax.training.touched import RowGradients

pytestmark = pytest.mark.usefixtures("trains")

BEFORE, AFTER, WIDTH = 256, 1024, 16
n, m = 16, 32


def moved(row):
    """Where an expert of the smaller pool is in the larger one."""
    return row // n * m + row % n


OLD_ROWS = [moved(row) for row in range(BEFORE)]
NEW_ROWS = sorted(set(range(AFTER)) - set(OLD_ROWS))


# Layers


def grown_pair(layer, **options):
    """A layer with sub-keys and outputs of the size of trained ones, and one that is to take it over."""
    sizes = {"num_heads": 2, "top_k": 4, "d_key": 8}
    small, large = (layer(6, size, **sizes, **options, rngs=nnx.Rngs(size)) for size in (BEFORE, AFTER))
    draw = np.random.default_rng(2)

    def random(path, variable):
        make = draw.normal if path[-1] in ("kernel", "sub_keys", layer.outputs) else draw.uniform
        return variable.replace(jnp.asarray(make(size=variable.shape), variable.dtype))

    nnx.update(small, nnx.map_state(random, nnx.state(small)))
    return small, large


@pytest.mark.parametrize("options", [{"share_sub_keys": False}, {"query_norm": "layer"}])
@pytest.mark.parametrize("layer", [PEER, PKM])
def test_a_larger_layer_has_all_of_the_smaller_one(layer, options, params_of):
    small, large = grown_pair(layer, **options)
    initial = params_of(large)
    large.grow(small)
    before, after = params_of(small), params_of(large)
    for name, old in before.items():
        new = after[name]
        if name in ("down", "up", "values"):
            np.testing.assert_array_equal([new[moved(row)] for row in range(BEFORE)], old)
            expected = 0 * initial[name] if name == layer.outputs else initial[name]
            np.testing.assert_array_equal(new[NEW_ROWS], expected[NEW_ROWS])
        elif name == "sub_keys":
            for old_keys, new_keys in zip(old.reshape(-1, n, 4), new.reshape(-1, m, 4), strict=True):
                np.testing.assert_array_equal(new_keys[:n], old_keys)
                for extra in range(m - n):
                    first, second = old_keys[extra % n], old_keys[(extra + 1 + extra // n) % n]
                    np.testing.assert_allclose(new_keys[n + extra], SHRINKING * (first + second) / 2, rtol=1e-6)
        else:
            np.testing.assert_array_equal(new, old)
    for name, statistic in params_of(small, nnx.BatchStat).items():
        np.testing.assert_array_equal(params_of(large, nnx.BatchStat)[name], statistic)


@pytest.mark.parametrize("layer", [PEER, PKM])
def test_old_experts_keep_their_order_and_outputs_most_of_their_weight(layer, rng):
    """The best one stays first where the best score of each half is positive.

    If new experts take the weight w, and those which have lost their places had the weight d, then the weights of the
    others change by |w - d| together: an output by at most (|w - d| + d) times the largest output of an expert.
    """
    small, large = grown_pair(layer, query_norm=None)
    large.grow(small)
    x = jnp.asarray(rng.normal(size=(200, 6)), jnp.float32)
    (was, old_gates), (now, new_gates) = (jax.tree.map(np.asarray, one.route(x)) for one in (small, large))
    change = np.linalg.norm(np.asarray(large(x)[0] - small(x)[0]), axis=-1)
    outputs = np.linalg.norm(getattr(small, layer.outputs)[...], axis=-1) * np.ones((len(x), 1))  # of experts, [t, N]
    if layer is PEER:
        outputs *= np.abs(jax.nn.gelu(x @ small.down[...].T))
    queries = np.asarray(small.query_proj(x)).reshape(-1, 2, 2, 4)  # [t, h, half, c]
    best = np.einsum("thjc,jnc->thjn", queries, small.sub_keys[...]).max(-1)

    is_new, bound = np.isin(now, NEW_ROWS), np.zeros(len(x))
    for token, head in np.ndindex(len(x), 2):
        kept = now[token, head][~is_new[token, head]].tolist()
        assert kept == [moved(row) for row in was[token, head][: len(kept)]]
        taken, lost = new_gates[token, head][is_new[token, head]].sum(), old_gates[token, head][len(kept) :].sum()
        bound[token] += (abs(taken - lost) + lost) * outputs[token, was[token, head]].max()
    positive = np.all(best > 1e-6, axis=-1)
    assert positive.mean() > 0.9
    assert np.all(now[positive][:, 0] == [moved(row) for row in was[positive][:, 0]])
    assert np.all(change <= bound + 1e-5)
    same = ~is_new.any((1, 2))
    assert change[same].max() < 1e-5
    assert change[~same].max() > 0.1


# Runs

BINDINGS = (
    *("Transformer.num_blocks=1", "Run.checkpoint_every=40", "Run.keep_checkpoints=9", "Run.evaluate_every=40"),
    *("TABLE_RATE=0.064", *ADAM),
)
AT, STEPS = 80, 120
SMALL = (*BINDINGS, f"Run.steps={STEPS}", f"NUM_EXPERTS={BEFORE}")


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """A run with 256 experts that has checkpoints of steps 40, 80 and 120."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    train(tiny, folder, *SMALL, layer="peer")
    return folder


def larger(tiny, source, *bindings, layer="peer"):
    """The run that the source is to become."""
    growing = (f"NUM_EXPERTS={AFTER}", f"Run.grown_from={str(source)!r}", f"Run.grown_at={AT}")
    return load(tiny, *BINDINGS, f"Run.steps={STEPS}", *growing, *bindings, layer=layer)


def command(source, folder, *more):
    grow = ["train", "--quiet", "--no-table", "--grow", AFTER, "--from", source, "--checkpoint", AT]
    return [*map(str, grow), *more, "--workdir", str(folder)]


@pytest.fixture(scope="module")
def grown(source, tiny):
    """The run, and the state that it begins with."""
    run = larger(tiny, source)
    step, state, position = growth.begin(run, run.trainer(), {"text": "another", "batches": {"next_index": 0}})
    assert step == AT
    assert position["batches"] == {"next_index": 0}
    return run, state


def test_state_is_rearranged_row_by_row(source, grown, tiny):
    """Parameters, moments and statistics; the moments of what is new are zero."""
    before = leaves(source, load(tiny, *SMALL, layer="peer"), AT)
    after = arrays(grown[1])
    assert before.keys() == after.keys()
    rearranged = [name for name in before if before[name].shape != after[name].shape]
    assert len(rearranged) == 3 * 3  # sub-keys and two tables, each with two moments
    for name, new in after.items():
        if name not in rearranged:
            np.testing.assert_array_equal(new, before[name], err_msg=name)
            continue
        is_moment = name.startswith(".optimizer")
        if "sub_keys" in name:
            kept, more = new[:, :n], new[:, n:]
        else:
            kept, more = new[OLD_ROWS], new[NEW_ROWS]
        np.testing.assert_array_equal(kept, before[name], err_msg=name)
        assert np.any(more) == (not is_moment and "'up'" not in name), name


def test_old_experts_keep_their_places_for_the_tokens_of_a_text(source, grown, tiny):
    """The queries are the same, since the layers below are: so are scores and order of all old experts.

    A new sub-key whose score is positive scores less than one of those which it lies between.
    """
    run, state = grown
    _, small = restore_model(load(tiny, *SMALL, layer="peer"), source, str(AT))
    large = run.trainer().model(state)
    tokens = jnp.asarray(np.frombuffer(b"the quick brown fox jumps over a lazy dog while seven small ", np.uint8))[None]
    segments = jnp.ones_like(tokens, jnp.int32)
    (was, _), (now, _) = (model.route(tokens.astype(jnp.int32) + 3, segments)[0] for model in (small, large))
    was, now = np.asarray(was).reshape(-1, 4), np.asarray(now).reshape(-1, 4)
    for before, after in zip(was, now, strict=True):
        kept = [row for row in after.tolist() if row in OLD_ROWS]
        assert kept == [moved(row) for row in before[: len(kept)]]
    assert np.mean(now[:, 0] == [moved(row) for row in was[:, 0]]) > 0.9
    assert 0.0 < np.mean(np.isin(now, NEW_ROWS)) < 0.5


def on_eight_devices(tiny, source):
    """For meshes of four devices: what a state that has grown there has otherwise than on one device, or elsewhere."""
    told = {}
    for name, sharding in {"rows": Sharding(data=2, expert=2), "columns": Sharding(expert=4, tables="columns")}.items():
        run = larger(Path(tiny), Path(source))
        at_first = {"text": "another", "batches": {"next_index": 0}}
        expected = arrays(growth.begin(run, run.trainer(), at_first)[1])
        placement = sharding.place(jax.devices()[:4])
        with use(placement):
            trainer = run.trainer()
            _, state, _ = growth.begin(run, trainer, at_first)
            shardings = placement.shardings(trainer.abstract_state())
        found = arrays(state)
        assert found.keys() == expected.keys()
        where = zip(found, jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
        up = state.params["blocks"][0]["ffw"]["up"].get_value()
        told[name] = {
            "differing": [array for array in found if not np.array_equal(found[array], expected[array])],
            "elsewhere": [array for array, leaf, at in where if not leaf.sharding.is_equivalent_to(at, leaf.ndim)],
            "part": list(up.addressable_shards[0].data.shape),
        }
    return told


@pytest.mark.slow
def test_growing_on_a_mesh(tiny, source):
    """The state is the same in every bit, and no device holds a whole table."""
    told = measured("test_growing", "on_eight_devices", str(tiny), str(source))
    for name, part in {"rows": [AFTER // 2, WIDTH], "columns": [AFTER, WIDTH // 4]}.items():
        assert told[name] == {"differing": [], "elsewhere": [], "part": part}


FROZEN = f"Run.frozen_experts={BEFORE}"


@pytest.fixture(scope="module")
def never(tiny, source, tmp_path_factory):
    """A grown run that was never stopped. The experts of before do not change any more."""
    folder = tmp_path_factory.mktemp("runs") / "never"
    loop.train(larger(tiny, source, FROZEN), folder, progress=False)
    return folder


def test_a_grown_run_goes_on_as_one_and_counts_what_was_spent(source, never):
    """Its steps, rates and batches are those of the run that did not grow; and, at first, nearly its loss."""
    plain, result = (json.loads((folder / "result.json").read_text()) for folder in (source, never))
    assert saved_steps(never) == [80, 120]
    assert [line["step"] for line in lines(never) if "loss" in line] == list(range(AT + 1, STEPS + 1))
    rates = {line["step"]: line["learning_rate/up"] for line in lines(source) if "loss" in line}
    assert all(line["learning_rate/up"] == rates[line["step"]] for line in lines(never) if "loss" in line)
    before, after = losses(source), losses(never)
    # Measured: 0.009 and 0.003. In the 40 steps before, the validation loss has fallen by 0.46.
    assert abs(after[AT, "validation_loss"] - before[AT, "validation_loss"]) < 0.03
    assert abs(after[AT + 1, "loss"] - before[AT + 1, "loss"]) < 0.03
    assert before[AT // 2, "validation_loss"] - before[AT, "validation_loss"] > 0.2
    assert after[STEPS, "validation_loss"] < after[AT, "validation_loss"] - 0.03

    tokens = 4 * 32
    spent = 3 * tokens * AT * plain["forward_flops_per_token"]
    since = 3 * tokens * (STEPS - AT) * result["forward_flops_per_token"]
    assert result["training_flops"] == pytest.approx(spent + since, rel=1e-12)
    assert result["training_flops"] > plain["training_flops"]
    assert (result["tokens"], result["epochs"]) == (plain["tokens"], plain["epochs"])
    assert result["method"] == f"{plain['method']}, grown from {BEFORE} experts"
    assert result["grown"]["training_flops"] == pytest.approx(spent, rel=1e-12)
    assert (result["grown"]["steps"], result["grown"]["tokens"]) == (AT, AT * tokens)


def test_frozen_experts_are_those_of_the_source(source, never, tiny):
    before = leaves(source, load(tiny, *SMALL, layer="peer"), AT)
    after = leaves(never, larger(tiny, source, FROZEN))
    tables = [name for name in before if name.startswith(".params") and ("'up'" in name or "'down'" in name)]
    assert len(tables) == 2
    for name in tables:
        np.testing.assert_array_equal(after[name][OLD_ROWS], before[name])
        assert np.any(after[name][NEW_ROWS])


@pytest.mark.slow
def test_a_killed_run_goes_on_without_its_source(source, never, tiny, tmp_path, run_cli):
    """The same command goes on from the first checkpoint, which was written when the run began."""
    killed, elsewhere = tmp_path / "killed", source.with_name("elsewhere")
    process = start_process([*PROGRAM, *command(source, killed, "--set", FROZEN)], **KEEPS_NO_PROGRAMS)
    wait_for(lambda: (killed / "metrics.jsonl").exists() and len(lines(killed)) > 15)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert saved_steps(killed) == [AT]
    source.rename(elsewhere)
    status, _, errors = run_cli(*command(source, killed, "--set", FROZEN))
    elsewhere.rename(source)
    assert status == 0, errors
    assert losses(killed) == losses(never)
    assert_same(*(leaves(folder, larger(tiny, source, FROZEN)) for folder in (killed, never)))
    first, second = (json.loads((folder / "result.json").read_text()) for folder in (killed, never))
    assert without_times(first) == without_times(second)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--grow", 49), "num_experts=49 256 raise"),
        (("--grow", 200), "num_experts=200 square try"),
        (("--grow", 256), "source as many experts: raise num_experts"),
        (("--set", "PEER.top_k=8"), "PEER.top_k 4 8 num_experts"),
        (("--set", "Run.steps=80"), "steps=80 80 raise"),
        (("--checkpoint", "77"), "77 [40, 80, 120]"),
        (("--set", "AdamW.table_b1=0"), "optimiser AdamW settings"),
        (("--set", "Run.frozen_experts=63"), "frozen_experts=63 1024 PEER"),
        (("--set", "Run.frozen_experts=1024"), "frozen_experts=1024 1024 PEER"),
    ],
)
def test_what_can_t_grow_is_refused(source, tmp_path, run_cli, arguments, words):
    refused(run_cli(*command(source, tmp_path / "new"), *arguments), words)
    assert not (tmp_path / "new" / "config.gin").exists()


def test_wrong_sources_are_refused(source, tiny, tmp_path, run_cli):
    new, empty = tmp_path / "new", tmp_path / "empty"
    empty.mkdir()
    refused(run_cli(*command(empty, new)), "--from empty config.gin train")
    (empty / "config.gin").write_text(load(tiny, *SMALL, layer="peer").config.text)
    refused(run_cli(*command(empty, new)), "empty checkpoints")
    for layer, words in {"moe": "MoE more experts num_experts", "dense": "empty num_experts"}.items():
        (empty / "config.gin").write_text(load(tiny, *BINDINGS, "Run.steps=10", layer=layer).config.text)
        refused(run_cli(*command(empty, new)), words)
    refused(run_cli(*command(source, source)), "--workdir source num_experts")
    refused(run_cli("train", "--grow", AFTER, "--workdir", new), "--grow --from")
    refused(run_cli("train", "--workdir", new), "--config missing")
    refused(run_cli("train", "--checkpoint", 5, "--workdir", new), "--checkpoint 5 --grow")
    with pytest.raises(InputError, match="grown_at=5 is a step of the run to grow from: give grown_from"):
        load(tiny, *SMALL, "Run.grown_at=5", layer="peer")


# Frozen experts

MASK = np.arange(64) % 3 == 0
SQUARE = np.array([row // 8 < 4 and row % 8 < 4 for row in range(64)])  # where 16 experts are after they grew


def trainer(frozen, **options):
    def build(*, rngs):
        sparse = functools.partial(PEER, num_experts=64, num_heads=2, top_k=8, d_key=4)
        return Transformer(
            13, 8, 1, 2, ffw=Dense, sparse_ffw=sparse, embed_init=nnx.initializers.normal(1.0), rngs=rngs
        )

    rates = {"learning_rate": 0.1, "table_learning_rate": 0.5, "warmup_steps": 1, "eps": 0.1}
    return Trainer(build, AdamW(**rates, **options), frozen_experts=frozen)


def frozen_steps(frozen, rows, **options):
    """The state and metrics after ten steps: frozen rows have not changed in any bit, nor their moments from zero."""
    made = trainer(frozen, **options)
    state, step = made.init(0), made.compiled_step()
    initial = jax.tree.map(jnp.copy, state)
    for index in range(10):
        tokens = np.random.default_rng(index).integers(13, size=(2, 2, 6)).astype(np.int32)
        batch = {"inputs": tokens[0], "targets": tokens[1], "segment_ids": np.ones_like(tokens[0])}
        state, metrics = step(state, batch, made.optimizer.rates(made.labels, index, 10))
    for name in ("down", "up"):
        before, after = (np.asarray(one.params["blocks"][0]["ffw"][name][...]) for one in (initial, state))
        assert before[rows].tobytes() == after[rows].tobytes()
        assert np.any(after[~rows] != before[~rows], axis=1).mean() > 0.5
        for moment in (state.optimizer.mu, state.optimizer.nu):
            if (value := moment["blocks"][0]["ffw"][name].get_value()) is not None:
                assert not np.any(np.asarray(value)[rows])
                assert np.any(np.asarray(value)[~rows], axis=1).mean() > 0.5
    return state, metrics


def test_experts_of_before_growing_are_frozen_despite_momentum_and_weight_decay():
    frozen_steps(16, SQUARE, table_weight_decay=0.1)


def test_frozen_experts_by_whole_tables_and_by_touched_rows():
    """Both updates are the same, and the norm of the parameters counts the frozen ones."""
    by_row = {"table_b1": 0.0, "table_second_moment": "row"}
    states = {form: frozen_steps(MASK, MASK, **by_row, table_updates=form) for form in ("all", "touched")}
    for state, metrics in states.values():
        squares = sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(state.params))
        assert float(metrics["param_norm"]) == pytest.approx(squares**0.5, rel=1e-5)
    for whole, touched in zip(*(jax.tree.leaves(state) for state, _ in states.values()), strict=True):
        assert relative_error(touched, whole) < 1e-5


def test_freezing_what_isn_t_there_is_refused():
    with pytest.raises(InputError, match="mask of 3, but PEER has num_experts=64"):
        trainer(np.ones(3, bool))
    for size in (-1, 0, 64):
        with pytest.raises(InputError, match=f"frozen_experts={size} is no size that the 64 experts"):
            trainer(size)


def test_frozen_rows_do_not_hide_that_there_is_no_room():
    made = trainer(np.arange(64) < 32)
    rows = jnp.arange(4, dtype=jnp.int32)  # all of them are frozen
    grads = made.abstract_model.blocks[0].ffw.up.replace(RowGradients(rows, jnp.full((4, 8), jnp.nan)))
    state = nnx.State({"blocks": {0: {"ffw": {"up": grads}}}})
    left = made.frozen.without_gradients(state, made.init(0).params)["blocks"][0]["ffw"]["up"].get_value()
    assert np.all(np.isnan(left.values))

    def dense(*, rngs):
        return Transformer(13, 8, 1, 2, ffw=Dense, rngs=rngs)

    with pytest.raises(InputError, match="no tables of experts"):
        Trainer(dense, AdamW(learning_rate=0.1), frozen_experts=16)
