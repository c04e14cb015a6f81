"""Floors against brute-force counts, statistics of timing, and `peer-jax bench` from the command line to its files."""

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from peer_jax.bench import Options, cases, measure, programs, pytorch, report, timing, worker
from peer_jax.errors import InputError
from peer_jax.layers import families
from peer_jax.ops import floor
from peer_jax.ops.floor import Floor

ROOT = Path(__file__).parent.parent


# Floors


class Count:
    """Touches elements of named arrays one by one: bytes of what is touched, once or at every use."""

    def __init__(self):
        self.once, self.every, self.flops = {}, 0, 0

    def touch(self, name, *place, size=4):
        self.once[name, *place] = size

    def use(self, size=4):
        self.every += size

    def multiply_add(self):
        self.flops += 2

    def floor(self):
        return Floor(sum(self.once.values()) + self.every, self.flops)


def retrieved(t, r, N):
    return np.random.default_rng(t * r).integers(0, N, (t, r))


def count_rows(tables, order, indices, d, gradients, size, row_size):
    """What ``expert_mix`` (tables u and v) and ``value_bag`` (v) touch in a pass over a batch."""
    count = Count()
    t, r = indices.shape
    for token in range(t):
        for slot in range(r):
            count.touch("indices", token, slot)
            count.touch("gates", token, slot, size=size)
            if gradients:
                count.touch("d_gates", token, slot, size=size)
                if "u" in tables:
                    count.touch("projections", token, slot)
            for column in range(d):
                for table in tables:
                    if order == "token":
                        count.use(row_size)
                    else:
                        count.touch(table, int(indices[token, slot]), column, size=row_size)
                    # Forward: u . x and a v. Backward: dy . v and g a dy; ds u and ds x.
                    for _ in range(2 if gradients else 1):
                        count.multiply_add()
        for column in range(d):
            for name in {False: {"u": ("x", "y"), "v": ("y",)}, True: {"u": ("x", "dx", "dy"), "v": ("dy",)}}[
                gradients
            ][tables[0]]:
                count.touch(name, token, column, size=size)
    if gradients:
        for _ in range(len(tables) * d * N_ROWS):
            count.use(row_size)
    return count.floor()


N_ROWS = 7


@pytest.mark.parametrize("order", floor.ORDERS)
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("size", "row_size"), [(4, 4), (2, 4)])
@pytest.mark.parametrize("op", ["expert_mix", "value_bag"])
def test_floors_of_rows_are_brute_force_counts(op, order, gradients, size, row_size, monkeypatch):
    t, r, d = 3, 4, 5
    indices = retrieved(t, r, N_ROWS)
    # The formula has the expectation over uniform draws; here the draw is known.
    monkeypatch.setattr(floor, "touched_rows", lambda N, uses: float(len(np.unique(indices))))
    function = getattr(floor, op + ("_backward" if gradients else ""))
    tables = ("u", "v") if op == "expert_mix" else ("v",)
    found = function(t, r, d, N_ROWS, order, size=size, row_size=row_size)
    assert found == count_rows(tables, order, indices, d, gradients, size, row_size)


@pytest.mark.parametrize("key_sets", [1, 2])
def test_floors_of_product_keys_are_brute_force_counts(key_sets):
    t, h, n, d_key, k = 3, 2, 5, 4, 3
    forward, backward = Count(), Count()
    for token in range(t):
        for head in range(h):
            for count in (forward, backward):
                for column in range(d_key):
                    count.touch("q", token, head, column)
                    for key in range(n):
                        # Each half of the query meets the keys of its half.
                        count.touch("keys", head % key_sets, key, column)
                for slot in range(k):
                    count.touch("indices", token, head, slot)
                    count.touch("scores or their gradients", token, head, slot)
            for column in range(d_key):
                backward.touch("dq", token, head, column)
                for key in range(n):
                    backward.touch("d_keys", head % key_sets, key, column)
                    forward.multiply_add()
                for _ in range(k):  # of the query and of the sub-keys
                    backward.multiply_add()
                    backward.multiply_add()
    assert floor.product_key_top_k(t, h, n, d_key, k, key_sets=key_sets) == forward.floor()
    assert floor.product_key_top_k_backward(t, h, n, d_key, k, key_sets=key_sets) == backward.floor()


def test_touched_rows_are_those_of_uniform_draws():
    N, uses = 50, 40
    draws = np.random.default_rng(0).integers(0, N, (4000, uses))
    mean = np.mean([len(np.unique(row)) for row in draws])
    assert floor.touched_rows(N, uses) == pytest.approx(mean, rel=0.01)
    assert floor.touched_rows(1, 3) == 1
    assert floor.touched_rows(1, 0) == 0
    assert floor.touched_rows(10**6, 1) == pytest.approx(1)


def test_linear_and_step():
    assert floor.linear(3, 2, 5) == Floor(4 * (3 * 2 + 2 * 5 + 3 * 5), 2 * 3 * 2 * 5)
    assert floor.linear_backward(3, 2, 5) == Floor(4 * (2 * 3 * 2 + 2 * 2 * 5 + 3 * 5), 4 * 3 * 2 * 5)
    assert floor.training_step(10, 7.0) == Floor(320.0, 7.0)


def test_seconds_of_a_floor():
    least = Floor(100.0, 50.0)
    assert least.seconds(10.0) == 10
    assert least.seconds(10.0, 1.0) == 50
    assert least + least == Floor(200.0, 100.0)


def test_the_document_states_every_floor():
    text = (ROOT / "docs" / "performance.md").read_text().split("## Running the benchmark")[0]
    for name in ("product_key_top_k", "expert_mix", "value_bag"):
        assert len(re.findall(rf"^\| `{name}` \| (?:forward|backward) \|", text, re.MULTILINE)) == 2, name
    for symbol in ("`t`", "`r`", "`d`", "`N`", "`h`", "`k`", "`n`", "`d_key`", "`U`", "`s`", "`w`"):
        assert symbol in text, symbol


# Timing


def test_summary_is_median_and_quartiles():
    assert timing.summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0, 5)
    assert timing.summarise([2.0]) == (2.0, 2.0, 2.0, 1)


def test_competitors_take_turns():
    order = []

    def sample(name):
        order.append(name)
        return float(len(order))

    times = timing.interleaved({name: functools.partial(sample, name) for name in "ab"}, 3)
    assert order == list("ababab")
    assert [times[name].median for name in "ab"] == [3.0, 4.0]


def test_a_fast_call_is_repeated_within_a_sample():
    calls = []
    seconds = timing.sampler(lambda: calls.append(0))()
    assert len(calls) > 100
    assert 0 < seconds < 1e-3


def test_the_machine_is_measured():
    machine = timing.measure_machine(megabytes=8, width=128, repeats=2)
    assert 1e8 < machine.bandwidth < 1e14
    assert 1e7 < machine.flops_per_second < 1e16


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_a_call_is_what_it_holds_at_once():
    def call():
        held = [np.ones(2**22) for _ in range(2)]
        del held
        return np.ones(2**20)

    extra, process = worker.peak_of(call)
    # Some pages of the allocator may have been there already.
    assert 2**26 - 2**20 <= extra < 2**26 + 2**24
    assert process > extra


# Cases


def test_every_problem_once():
    options = Options(what="op", d_model=(8, 16), tokens=(4,), num_experts=(16,), heads=(1,), top_k=(2,))
    names = [(c[0].name, c[0].direction, c[0].d_model) for c in options.competitors()]
    assert len(names) == len(set(names)) == 10  # product keys know no d_model
    assert all([c.implementation for c in group] == ["reference", "xla"] for group in options.competitors())
    dense = Options(what="layer", only=("Dense",), quick=True).competitors()
    assert [[c.implementation for c in group] for group in dense] == [["-"], ["-"]]


def test_layers_are_measured_by_default_or_when_they_are_named():
    assert set(Options(what="layer").names()) == {"Dense", "PEER", "PKM"}
    assert list(Options(what="step").names()) == [cases.STEP]
    coarse = Options(what="layer", only=("MoE",), tokens=(8,), d_model=(4,)).competitors()
    assert [(c[0].sizes, c[0].implementation) for c in coarse] == [
        ({"T": 8, "d": 4, "N": f"{side}^2"}, "-") for side in (4, 8)
    ] * 2
    (odd, _) = Options(what="layer", only=("MoE",), num_experts=(6,), tokens=(8,), d_model=(4,)).competitors()
    assert odd[0].sizes["N"] == 6


@pytest.mark.parametrize("direction", cases.DIRECTIONS)
@pytest.mark.parametrize("name", ["PEER", "PKM", "Dense", cases.COMPARED])
def test_parameters_of_a_layer_have_their_own_type(name, direction):
    """Parameters of half the width have half the bytes in the floor; the program has parameters of that type."""
    make = functools.partial(
        cases.Case,
        *("layer", name, direction),
        tokens=8,
        d_model=16,
        num_experts=64,
        heads=2,
        top_k=4,
        d_key=6,
        layer=families().get(name, families()["PEER"]),
    )
    t, d, N, r = 8, 16, 64, 8
    dense = d * 2 * 6 + (2 if name == cases.COMPARED else 1) * 8 * 6 if name != "Dense" else 2 * d * 4 * d
    tables = {"PKM": 1, "Dense": 0}.get(name, 2)
    elements = dense + tables * d * t * r  # in token order
    if direction == cases.BOTH:  # all read again, and gradients written
        elements += 2 * dense + tables * d * (t * r + N)
    wide, narrow = (cases.floors(make(table_dtype=dtype))["token"] for dtype in ("float32", "bfloat16"))
    assert wide.bytes - narrow.bytes == 2 * elements
    if name != cases.COMPARED:  # which is given float32 weights
        _, (params, _), _ = programs.layer_function(make(table_dtype="bfloat16"))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_a_layer_is_at_least_its_ops():
    make = functools.partial(
        cases.Case, direction="forward", tokens=8, d_model=16, num_experts=64, heads=2, top_k=4, d_key=8
    )
    whole, mix = make("layer", "PEER", layer=families()["PEER"]), make("op", "expert_mix")
    for order in floor.ORDERS:
        assert cases.floors(whole)[order].bytes > cases.floors(mix)[order].bytes
    assert cases.floors(mix)["expert"].bytes <= cases.floors(mix)["token"].bytes


# The command


@pytest.fixture
def bench(run_cli):
    """Runs `peer-jax bench`; exit status, standard output and standard error."""
    return functools.partial(run_cli, "bench")


KEYS = {
    *("what", "name", "direction", "tokens", "d_model", "num_experts", "heads", "top_k", "d_key", "dtype"),
    *(
        "table_dtype",
        "table_updates",
        "touched_share",
        "implementation",
        "median",
        "low",
        "high",
        "samples",
        "floor",
        "fraction_of_floor",
    ),
    *("faster_than_first", "memory", "state", "extra_memory", "process_peak", "sizes", "shown"),
}


def test_ops_from_the_command_line(bench, tmp_path):
    status, printed, errors = bench("op", "--quick", "--out", tmp_path)
    assert status == 0, errors
    assert "expert_mix, forward + backward" in printed
    assert "GB/s" in printed
    assert errors.count("\n") == 12  # a line per row, printed as it is measured

    result = json.loads((tmp_path / "op.json").read_text())
    assert result["schema"] == measure.SCHEMA
    assert result["machine"]["bandwidth"] > 0
    assert result["machine"]["flops_per_second"] > 0
    rows = result["rows"]
    assert {(row["name"], row["direction"], row["implementation"]) for row in rows} == {
        (name, direction, implementation)
        for name in cases.OPS
        for direction in cases.DIRECTIONS
        for implementation in ("reference", "xla")
    }
    for row in rows:
        assert set(row) == KEYS
        assert 0 < row["low"] <= row["median"] <= row["high"]
        for order in floor.ORDERS:
            assert 0 < row["fraction_of_floor"][order] < 1.5
            assert row["floor"][order]["bytes"] > 0
        assert row["memory"] > 0
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(drawn) == 6
    assert "op-expert-mix-forward-backward.png" in drawn
    assert all(str(path) in printed.replace("\n", "") for path in tmp_path.iterdir())


def test_layers_at_sizes_from_the_command_line(bench, tmp_path):
    arguments = shlex.split("--quick --tokens 8 --d-model 8 --num-experts 16 --heads 1 --top-k 2 --implementation xla")
    status, _, errors = bench("layer", "--only", "PKM", "--only", "Dense", *arguments, "--out", tmp_path)
    assert status == 0, errors
    rows = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert [(row["name"], row["tokens"], row["samples"]) for row in rows] == [
        *[("PKM", 8, 3)] * 2,
        *[("Dense", 8, 3)] * 2,
    ]


@pytest.mark.slow
def test_steps_are_measured_in_their_own_processes(bench, tmp_path):
    """Those on whole tables and on touched rows are competitors. The latter have two arrays of a table's size less."""
    updates = ("--table-updates", "all", "--table-updates", "touched", "--touched-share", 0.75)
    status, printed, errors = bench("step", "--quick", *updates, "--out", tmp_path)
    assert status == 0, errors
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert [row["shown"] for row in rows] == ["xla", "xla, touched rows"]
    assert rows[0]["faster_than_first"] == 1
    tables = 2 * 4 * rows[0]["num_experts"] * rows[0]["d_model"]
    assert 2 * tables * 0.95 < rows[0]["state"] - rows[1]["state"] < 2 * tables
    for row in rows:
        assert row["name"] == cases.STEP
        assert 0 < row["fraction_of_floor"]["token"] < 1.5
        if sys.platform == "linux":
            assert row["process_peak"] > 2**26
    assert (tmp_path / "step-training-step-forward-backward.png").is_file()


def test_a_refused_competitor_of_a_step_is_left_out(monkeypatch):
    class Worker:
        floors, answer = {}, {"measured": {"memory": None}}

        def __init__(self, case, results):
            self.case = case
            if case.implementation == "mosaic_gpu":
                raise InputError("runs on GPUs")

        def sample(self):
            return 1.0

        def close(self):
            pass

    monkeypatch.setattr(measure, "Worker", Worker)
    (competitors,) = Options(what="step", quick=True, implementation=("xla", "mosaic_gpu")).competitors()
    measured, notes = measure.apart(competitors, 1)
    assert [case.implementation for case in measured] == ["xla"]
    assert notes == ["mosaic_gpu: runs on GPUs"]


def test_a_folder_that_cannot_be_written_to_is_one_sentence(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below"):
        with pytest.raises(InputError, match=f"{folder} can't be written to"):
            report.make_folder(folder)
    report.make_folder(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_steps_are_drawn_against_the_number_of_experts():
    least = {"bytes": 1.0, "flops": 1.0, "seconds": 0.01}
    rows = [
        {
            **case.described(),
            "shown": case.shown,
            "sizes": case.sizes,
            "median": 0.1 * side,
            "low": 0.09 * side,
            "high": 0.11 * side,
        }
        | {"floor": {"token": least, "expert": least}}
        for side in (4, 8)
        for case in [cases.Case("step", cases.STEP, cases.BOTH, 8, 8, side * side, 1, 2, layer=families()["PEER"])]
    ]
    (axes,) = report.figure_of("training step", rows).axes
    assert axes.get_xlabel() == "experts N"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4²", "8²"]


def refused(outcome, *words):
    status, printed, errors = outcome
    assert (status, printed) == (2, "")
    assert errors.startswith("peer-jax: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ops"], ["ops", "op, layer, step"]),
        (["op", "--only", "PEER"], ["PEER", "expert_mix"]),
        (["layer", "--only", "Sparse"], ["Sparse", "Dense, MoE, MuMoE, PEER, PKM, SoftMoE"]),
        (["step", "--only", "expert_mix"], ["expert_mix", "Dense, MoE, MuMoE, PEER, PKM, SoftMoE"]),
        (["layer", "--only", "PKM", "--num-experts", "1000", "--quick"], ["num_experts=1000", "try 961 or 1024"]),
        (["op", "--implementation", "fast"], ["fast", "xla"]),
        (["op", "--num-experts", "1000"], ["1000", "1024"]),
        (["op", "--tokens", "0"], ["tokens=0"]),
        (["step", "--tokens", "300"], ["tokens=300", "try 256 or 512"]),
        (["step", "--touched-share", "0.5"], ["--touched-share", "0.5", "touched rows"]),
        (["op", "--dtype", "int8"], ["dtype=int8", "bfloat16"]),
        (["op", "--repeats", "0"], ["repeats=0"]),
        (["op", "--num-experts", "4", "--top-k", "5"], ["top_k"]),
        (["op", "--against", "pytorch"], ["layer"]),
        (["layer", "--against", "tensorflow"], ["tensorflow", "pytorch"]),
        (["layer", "--against", "pytorch", "--only", "PKM"], ["PEER alone", "only"]),
        (["layer", "--against", "pytorch", "--dtype", "bfloat16"], ["float32"]),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(bench, arguments, words):
    refused(bench(*arguments), *words)


def test_pytorch_that_is_missing_is_one_sentence(bench, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    refused(bench("layer", "--against", "pytorch"), "torch", "uv pip install -e '.[bench]'")


def test_other_results_are_not_compared():
    case = cases.Case("layer", cases.COMPARED, cases.FORWARD, 4, 2, 16, 1, 2)
    y = np.ones((1, 4, 2))
    pytorch.check_agreement(case, {"xla": {"y": y + 1e-6}, "pytorch": {"y": y}})
    pytorch.check_agreement(case, {"xla": {"y": y}, cases.PYTORCH_KEEPING: {"y": y}})  # one of them can be left out
    with pytest.raises(InputError, match="PEER-pytorch"):
        pytorch.check_agreement(case, {"xla": {"y": y * 1.01}, "pytorch": {"y": y}})


@pytest.mark.skipif(importlib.util.find_spec("PEER_pytorch") is None, reason="needs the extra `bench`")
def test_against_pytorch(bench, tmp_path):
    status, printed, errors = bench("layer", "--against", "pytorch", "--quick", "--out", tmp_path)
    assert status == 0, errors
    rows = json.loads((tmp_path / "layer-pytorch.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["xla", "pytorch", "pytorch, keeping memory"] * 2
    assert all(row["extra_memory"] is not None for row in rows)


def test_it_imports_where_only_jax_and_flax_are():
    program = """
import sys
for name in ("gin", "typer", "seqio", "tensorflow", "matplotlib", "scipy", "torch", "grain"):
    sys.modules[name] = None
import peer_jax.bench
result = peer_jax.bench.run(peer_jax.bench.Options(what="op", only=("value_bag",), quick=True))
assert len(result["rows"]) == 4
from peer_jax.bench import report
report.show(result)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "value_bag, forward" in done.stdout
