"""A sweep as data: what runs it makes, what they cost, and what is refused before any starts."""

import dataclasses
import itertools
import re

import pytest
from small_runs import CONFIGS

from peer_jax import config
from peer_jax.config import load
from peer_jax.data.pipeline import open_cache
from peer_jax.errors import InputError, TryAgain
from peer_jax.gin_syntax import parse_binding
from peer_jax.run_directory import SweepDirectory
from peer_jax.sweeps import plan, runner, workers
from peer_jax.sweeps.sweep import Sweep, expand
from peer_jax.sweeps.tasks import Answer
from peer_jax.training.flops import short

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.gin"))
METHODS = ("dense", "moe", "moe_token_choice", "pkm", "peer")
FOLDER = CONFIGS / "sweeps"


pytestmark = pytest.mark.usefixtures("trains")


def sweep(tiny, **fields):
    """A sweep of seconds over the small text of the tests."""
    given = {
        "configs": (str(CONFIGS / "base.gin"), str(CONFIGS / "sizes" / "tiny.gin"), str(tiny)),
        "methods": ("dense", "peer"),
        "sizes": {"d8": {"Transformer.d_model": 8}, "d16": {"Transformer.d_model": 16}},
        "budgets": (1e8,),
        "min_steps": 1,
        "max_epochs": 1e6,
    }
    return Sweep(**given | fields)


def planned(tiny, **fields):
    return plan.plan(expand(sweep(tiny, **fields), FOLDER), load)


# Expansion


def test_axes_multiply_and_names_differ(tiny):
    made = expand(
        sweep(tiny, budgets=(1e8, 2e8), seeds=(0, 1, 2), cross={"PEER.top_k": (2, 4), "PEER.num_heads": (1, 2)}), FOLDER
    )
    assert len(made) == 2 * 2 * 2 * 3 * 4
    assert len({point.name for point in made}) == len(made)
    places = [
        (p.budget, p.method, p.size, p.seed, p.settings["PEER.top_k"], p.settings["PEER.num_heads"]) for p in made
    ]
    wanted = itertools.product((1e8, 2e8), ("dense", "peer"), ("d8", "d16"), (0, 1, 2), (2, 4), (1, 2))
    assert sorted(places) == sorted(wanted)
    assert [p.budget for p in made] == sorted(p.budget for p in made)


def test_zip_goes_in_step_and_crosses_with_the_rest(tiny):
    settings = sweep(
        tiny, zip={"PEER.num_heads": (1, 2, 4), "PEER.top_k": (4, 2, 1)}, cross={"PEER.query_norm": ("batch", None)}
    ).settings()
    assert len(settings) == 6
    assert {(s["PEER.num_heads"], s["PEER.top_k"]) for s in settings} == {(1, 4), (2, 2), (4, 1)}
    assert all(s["PEER.num_heads"] * s["PEER.top_k"] == 4 for s in settings)


def test_later_axes_win_and_reach_the_model(tiny):
    fields = {
        "methods": {"peer": {"PEER.top_k": 1, "PEER.num_heads": 1, "Run.batch_size": 1, "D_KEY": 2}},
        "sizes": {"d8": {"Transformer.d_model": 8, "PEER.num_heads": 2, "Run.batch_size": 2}},
        "budgets": {1e8: {"Run.batch_size": 3}},
        "cross": {"PEER.top_k": (4,)},
        "bindings": {"PEER.top_k": 8, "D_KEY": 4, "TextTask.max_validation_tokens": 77},
    }
    (point,) = expand(sweep(tiny, **fields), FOLDER, [parse_binding("AdamW.weight_decay=0.25")])
    run = load(point.files, point.bindings)
    layer = run.trainer().abstract_model.blocks[1].ffw
    assert (layer.d_model, layer.num_heads, layer.top_k, layer.d_key) == (8, 2, 4, 2)
    assert (run.batch_size, run.optimizer.weight_decay, run.task.max_validation_tokens) == (3, 0.25, 77)


def test_rates_follow_the_width(tiny):
    fields = {"methods": {"dense": {"AdamW.learning_rate": 0.02}}, "rates_at": 16}
    made = expand(
        sweep(
            tiny,
            sizes={f"d{d}": {"Transformer.d_model": d} for d in (4, 16, 64)},
            bindings={"AdamW.table_learning_rate": {"up": 0.08, "down": 0.04}},
            rate_exponents={"AdamW.learning_rate": -0.5, "AdamW.table_learning_rate": -1.0},
            **fields,
        ),
        FOLDER,
    )
    optimizers = {p.size: load(p.files, p.bindings).optimizer for p in made}
    assert {size: of.learning_rate for size, of in optimizers.items()} == {"d4": 0.04, "d16": 0.02, "d64": 0.01}
    assert optimizers["d64"].table_learning_rate == {"up": 0.02, "down": 0.01}
    with pytest.raises(InputError, match=r"Transformer\.d_model"):
        expand(sweep(tiny, sizes={"small": {}}, rate_exponents={"AdamW.learning_rate": -0.5}, **fields), FOLDER)


def test_sizes_at_a_budget(tiny):
    made = expand(sweep(tiny, budgets=(1e8, 2e8), sizes_at={2e8: ("d16",)}), FOLDER)
    assert {(p.budget, p.size) for p in made} == {(1e8, "d8"), (1e8, "d16"), (2e8, "d16")}


def test_the_method_s_file_comes_after_the_first(tiny):
    """So that a size may change a layer's options, as in a stack given by hand: base, layer, size, data."""
    (point,) = expand(sweep(tiny, methods=("peer",), sizes={"d8": {"Transformer.d_model": 8}}), FOLDER)
    assert [file.split("/")[-1] for file in point.files] == ["base.gin", "peer.gin", "tiny.gin", "tiny.gin"]
    run = load(point.files, point.bindings)
    assert run.trainer().abstract_model.blocks[1].ffw.top_k == 4  # the test's tiny.gin; 16 in the layer's file


def test_equal_runs_are_made_once(tiny):
    """A dense model doesn't change with PEER's top-k; its only run carries no such setting."""
    runs = planned(
        tiny, sizes={"d8": {"Transformer.d_model": 8}}, cross={"PEER.top_k": (1, 2, 4), "AdamW.b1": (0.8, 0.9)}
    )
    dense = [run.point for run in runs if run.point.method == "dense"]
    assert sorted(point.name for point in dense) == ["dense-d8-1e8-b1=0.8-seed0", "dense-d8-1e8-b1=0.9-seed0"]
    assert len(runs) == 2 + 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"methods": ()}, ["Sweep.methods", "empty"]),
        ({"methods": ("sparse",)}, ["'sparse'", "sparse.gin"]),
        ({"budgets": (-1e8,)}, ["budgets", "-1"]),
        ({"zip": {"A": (1, 2), "B": (1,)}}, ["Sweep.zip", "A 2", "B 1"]),
        ({"cross": {"PEER.query_norm": "batch"}}, ["Sweep.cross", "PEER.query_norm", "list"]),
        ({"cross": {"A": (1,)}, "zip": {"A": (1,)}}, ["A", "cross", "zip"]),
        ({"rate_exponents": {"A": 1.0}}, ["rates_at"]),
        ({"sizes_at": {3e8: ("d8",)}}, ["sizes_at", "3e+08"]),
        ({"sizes_at": {1e8: ("d9",)}}, ["d9", "d8, d16"]),
        ({"sizes_at": {1e8: ()}}, ["sizes_at", "()"]),
        ({"configs": "base.gin"}, ["Sweep.configs", "'base.gin'", "list"]),
        ({"methods": "peer"}, ["Sweep.methods", "'peer'", "list"]),
        ({"sizes": {"a/b": {}}}, ["Sweep.sizes", "'a/b'"]),
        ({"rates_at": 0, "rate_exponents": {"A": 1.0}}, ["Sweep.rates_at", "0"]),
        ({"rates_at": 8, "rate_exponents": {"AdamW.learning_rat": 1.0}}, ["AdamW.learning_rat", "Sweep.bindings"]),
        ({"bindings": {"Run.seed": 7}}, ["Run.seed", "Sweep.seeds"]),
        ({"cross": {"Run.training_flops": (1e8, 3e8)}}, ["Run.training_flops", "Sweep.budgets"]),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(tiny, fields, words):
    with pytest.raises(InputError) as refusal:
        expand(sweep(tiny, **fields), FOLDER)
    for word in words:
        assert word in str(refusal.value)


def test_what_an_axis_says_can_t_be_set_for_all_runs(tiny):
    with pytest.raises(InputError, match=r"Run\.steps .* Sweep\.budgets"):
        expand(sweep(tiny), FOLDER, [parse_binding("Run.steps=5")])


@pytest.mark.parametrize(
    ("binding", "axis"),
    [
        ("Transformer.d_model=64", "sizes"),
        ("peer_jax.Transformer.d_model=64", "sizes"),
        ("PEER.score_activation='relu'", "cross"),
        ("AdamW.learning_rate=0.1", "methods"),
        ("AdamW.eps=0.1", "zip"),
        ("Run.batch_size=8", "budgets"),
    ],
)
def test_a_binding_of_all_runs_can_t_belie_their_names(tiny, binding, axis):
    axes = {
        "methods": {"peer": {"AdamW.learning_rate": 0.01}},
        "budgets": {1e8: {"Run.batch_size": 4}},
        "cross": {"PEER.score_activation": ("softmax", "sigmoid")},
        "zip": {"AdamW.eps": (1e-8, 1e-6)},
    }
    with pytest.raises(InputError, match=rf"Sweep\.{axis}"):
        expand(sweep(tiny, **axes), FOLDER, [parse_binding(binding)])
    assert len(expand(sweep(tiny, **axes), FOLDER, [parse_binding("AdamW.b1=0.8")])) == 2 * 2 * 2


def test_a_macro_that_no_config_has_is_no_axis(tiny):
    values = {"TABEL_RATE": (0.1, 0.2)}
    with pytest.raises(InputError, match=r"TABEL_RATE.*TABLE_RATE"):
        planned(tiny, cross=values)
    runs = planned(tiny, cross={"TABLE_RATE": values["TABEL_RATE"]}, sizes={"d8": {"Transformer.d_model": 8}})
    assert len(runs) == 1 + 2  # the dense model, in whose file it isn't, has none of it


def test_a_run_that_can_t_be_built_is_named(tiny):
    with pytest.raises(InputError, match=r"^peer-d8-1e8-num_experts=15-seed0: .*15"):
        planned(tiny, cross={"PEER.num_experts": (16, 15)})
    with pytest.raises(InputError, match="tpo_k"):
        planned(tiny, cross={"PEER.tpo_k": (1,)})


def test_short_numbers():
    assert [short(x) for x in (3e11, 1.5e12, 6e18, 2e6, 262144, 0.0001)] == [
        *("3e11", "1.5e12", "6e18", "2e6"),
        *("262144", "0.0001"),
    ]


# Budgets


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [3e7, 1e8, 2.7182818e8])
def test_spent_flops_are_within_a_step_of_the_budget(tiny, method, budget):
    """Counted from the matrices that the forward pass multiplies by, apart from the code that counts."""
    (run,) = planned(tiny, methods=(method,), sizes={"d16": {"Transformer.d_model": 16}}, budgets=(budget,))
    d, seq, vocab, blocks, rows = 16, 32, 259, 2, 4
    attention = blocks * (4 * 2 * d * d + 2 * 2 * seq * d)
    dense = 2 * 2 * 4 * d * d
    n, h, d_key, k = 8, 2, 8, 4
    router = 2 * d * h * d_key + 2 * h * 2 * n * (d_key // 2)
    experts = 4
    layer = {
        "dense": dense,
        "moe": 2 * d * experts + dense,  # capacity 1: as many rows as tokens
        "moe_token_choice": 2 * d * experts + dense,
        "pkm": router + 2 * h * k * d,
        "peer": router + 4 * h * k * d,
    }[method]
    forward = attention + dense + layer + 2 * d * vocab
    assert run.flops_per_token == forward
    step = 3 * forward * rows * seq
    assert run.step_flops == step
    assert run.steps == round(budget / step)
    assert abs(run.training_flops - budget) <= step / 2
    assert run.tokens == run.steps * rows * seq


def test_runs_that_say_nothing_are_refused(tiny):
    runs = planned(tiny)
    steps = min(run.steps for run in runs)
    assert plan.check(sweep(tiny, min_steps=steps), runs) is not None
    with pytest.raises(InputError, match=rf"-d16-1e8-seed0 would make {steps} steps.*min_steps={steps + 1}"):
        plan.check(sweep(tiny, min_steps=steps + 1), runs)


def test_epochs_over_the_corpus(tiny):
    runs = planned(tiny, budgets=(1e9,))
    run = load(runs[0].point.files, runs[0].point.bindings)
    rows = len(open_cache(run.task.cache_path(), "train"))
    assert runs[0].epochs == runs[0].steps * run.batch_size / rows
    assert runs[0].is_prepared
    most = max(r.epochs for r in runs)
    assert most > 1  # the tests' text is small
    (note,) = plan.check(sweep(tiny), runs)
    assert f"{most:.1f} times" in note
    with pytest.raises(InputError, match=r"would read .* tokens, .* times the .* of corpus"):
        plan.check(sweep(tiny, max_epochs=most * 0.99), runs)


def test_unprepared_text_is_estimated_by_its_bytes(tiny, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_text("abc " * 2500)
    (text / "b.txt").write_text("xyz " * 2500)
    bindings = {"local_files.path": str(text), "TextTask.cache_dir": str(tmp_path / "cache")}
    runs = planned(tiny, bindings=bindings)
    assert {run.corpus_tokens for run in runs} == {20000}
    assert any("estimates" in note for note in plan.check(sweep(tiny), runs))
    assert not (tmp_path / "cache").exists()  # planning prepares nothing


# Time


def test_time_of_a_step_between_measured_sizes(tiny):
    """On a power law of seconds in FLOPs, interpolation is exact; beyond it, in proportion."""
    runs = planned(tiny, methods=("dense",), sizes={f"d{d}": {"Transformer.d_model": d} for d in (8, 16, 32, 64)})
    law = {run.program: 1e-9 * run.step_flops**0.8 for run in runs}
    middle = runs[1], runs[2]
    known = {program: s for program, s in law.items() if program not in {run.program for run in middle}}
    estimated = plan.step_seconds(runs, known)
    for run in runs:
        assert estimated[run.program] == pytest.approx(law[run.program], rel=1e-9)
    alone = plan.step_seconds(runs, {runs[0].program: 1.0})
    assert alone[runs[3].program] == pytest.approx(runs[3].step_flops / runs[0].step_flops)
    assert set(plan.step_seconds(runs, {}).values()) == {None}


def test_the_extremes_of_each_method_are_measured(tiny):
    runs = planned(tiny, sizes={f"d{d}": {"Transformer.d_model": d} for d in (8, 16, 32)}, seeds=(0, 1))
    chosen = plan.to_measure(runs)
    assert {(run.point.method, run.point.size) for run in chosen} == set(
        itertools.product(("dense", "peer"), ("d8", "d32"))
    )


def test_runs_of_equal_shape_share_a_program(tiny):
    runs = planned(tiny, seeds=(0, 1), budgets=(1e8, 2e8), cross={"AdamW.learning_rate": (0.01, 0.02)})
    assert len(runs) == 2 * 2 * 2 * 2 * 2
    assert len({run.program for run in runs}) == 4  # two methods, two sizes


def test_what_compiles_to_another_program_is_another_program(tiny):
    one = {"methods": ("peer",), "sizes": {"d8": {"Transformer.d_model": 8}}}
    for binding, values, programs in (
        ("PEER.score_activation", ("softmax", "sigmoid", "relu"), 3),
        ("PEER.top_k", (2, 4), 2),
        ("Transformer.dtype", ("%float32", "%bfloat16"), 2),
        ("AdamW.weight_decay", (0.1, 0.2), 2),
        ("TABLE_RATE", (0.1, 0.2), 1),
        ("Run.log_every", (1, 2), 1),
    ):
        runs = planned(tiny, **one, cross={binding: values})
        assert (len(runs), len({run.program for run in runs})) == (len(values), programs), binding


@pytest.mark.parametrize("accumulations", [(1, 2), (2, 1)])
def test_what_can_not_be_accumulated_is_refused_whatever_was_planned_before(tiny, accumulations):
    with pytest.raises(InputError, match=r"accumulation=2 can't give the query batch-norm of PEER"):
        planned(tiny, methods=("peer",), cross={"Run.accumulation": accumulations})


# Shares of the machine


def test_workers_divide_the_cores(monkeypatch):
    taken = []
    monkeypatch.setattr(workers, "cores", lambda: [3, 5, 7, 8, 9])
    monkeypatch.setattr(workers, "accelerators", list)
    monkeypatch.setattr(workers.os, "sched_setaffinity", lambda _, cores: taken.append(list(cores)), raising=False)
    for number in range(2):
        workers.take_share(number, 2)
    assert sorted(itertools.chain(*taken)) == [3, 5, 7, 8, 9]
    taken.clear()
    for number in range(7):  # more workers than cores
        workers.take_share(number, 7)
    assert all(len(cores) == 1 for cores in taken)


# The sweeps that are shipped


@pytest.mark.slow
@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweep_is_built(path):
    """Every run of its first seed, abstractly, and it passes the checks that it would meet before it starts."""
    described, _, _ = config.load_sweep([path])
    seeds = len(described.seeds)
    described = dataclasses.replace(described, seeds=described.seeds[:1])
    runs = plan.plan(expand(described, path.parent), load)
    plan.check(described, runs)
    for run in runs:
        assert abs(run.training_flops - run.point.budget) <= run.step_flops / 2
    text = path.read_text()
    if count := re.search(r"(\d+) runs", text):
        assert len(runs) * seeds == int(count[1])
    for command in re.findall(r"--config (\S+) --workdir", text):
        assert command == f"configs/sweeps/{path.name}"


def test_shipped_sweeps_are_those_promised():
    names = {path.stem for path in SWEEPS}
    assert names >= {"isoflop_quick", "isoflop_cpu", "isoflop_gpu", "isoflop_paper", "lr", "memory"}
    assert {name.removeprefix("ablation_") for name in names if name.startswith("ablation_")} == {
        *("heads", "experts", "active", "query_norm", "scores", "routing", "seeds", "table_optimizer"),
        "granularity",
    }


def shipped(name):
    """The runs of the first seed of a shipped sweep."""
    described, _, _ = config.load_sweep([FOLDER / f"{name}.gin"])
    described = dataclasses.replace(described, seeds=described.seeds[:1])
    return plan.plan(expand(described, FOLDER), load)


def test_runs_of_every_granularity_differ_by_their_routers_alone():
    """16 G experts of width 128 / G, of which a token takes G."""
    d, all_but_router = 32, set()
    for run, granularity in zip(shipped("ablation_granularity"), (1, 2, 4, 8, 16), strict=True):
        router = d * 16 * granularity
        all_but_router.add((run.params_total - router, run.params_active - router, run.flops_per_token - 2 * router))
        assert abs(run.training_flops - 1e12) <= run.step_flops / 2
    assert len(all_but_router) == 1


def test_memories_are_compared_at_equal_parameters_and_flops():
    runs = {run.point.method: run for run in shipped("memory")}
    assert runs.keys() == {"pkm", "memory_plus", "peer", "peer_linear"}
    for run in runs.values():
        assert run.params_total == pytest.approx(runs["pkm"].params_total, rel=0.02)
        assert abs(run.training_flops - 1e12) <= run.step_flops / 2
    assert runs["peer"].flops_per_token == runs["peer_linear"].flops_per_token


def test_the_paper_s_sweep_has_the_paper_s_layers():
    path = FOLDER / "isoflop_paper.gin"
    described, _, _ = config.load_sweep([path])
    assert set(described.budgets) == {6e18, 2e19}
    found = {}
    for point in expand(described, path.parent):
        run = load(point.files, point.bindings)
        width = int(run.config.fields["Transformer.d_model"])
        assert run.optimizer.learning_rate == pytest.approx(3e-4 * (1024 / width) ** 0.5, rel=1e-3)
        if point.size != "d768" or point.method == "dense" or point.method in found:
            continue
        model = run.trainer().abstract_model
        assert model.sparse_blocks == (len(model.blocks) // 2,)
        layer = model.method
        found[point.method] = {layer.num_experts} | ({layer.num_heads, layer.top_k} if point.method != "moe" else set())
    assert found == {"moe": {128}, "pkm": {1024**2, 8, 32}, "peer": {1024**2, 8, 16}}


def test_sweep_bindings_are_told_from_those_of_runs(tiny):
    described, others, _ = config.load_sweep(
        [FOLDER / "isoflop_quick.gin"], ["peer_jax.Sweep.seeds=(3,)", "AdamW.b1=0.8", " Sweep.min_steps = 7"]
    )
    assert (tuple(described.seeds), described.min_steps, others) == ((3,), 7, [parse_binding("AdamW.b1=0.8")])
    assert dataclasses.is_dataclass(described)
    with pytest.raises(InputError, match="colour"):
        config.load_sweep([FOLDER / "isoflop_quick.gin"], ["Sweep.colour='red'"])


# Methods


def test_two_methods_of_one_class_keep_their_names(tiny):
    methods = {"peer": {}, "peer_layer": {"PEER.query_norm": "layer"}}
    with pytest.raises(InputError, match=r"peer_layer\.gin.*method_files"):
        expand(sweep(tiny, methods=methods), FOLDER)
    with pytest.raises(InputError, match="'other'"):
        expand(sweep(tiny, methods=methods, method_files={"other": "peer"}), FOLDER)
    for file in ("peer", "../layers/peer.gin"):
        runs = planned(
            tiny, methods=methods, method_files={"peer_layer": file}, sizes={"d8": {"Transformer.d_model": 8}}
        )
        assert [run.point.method for run in runs] == ["peer", "peer_layer"]
        assert [run.config.fields["PEER.query_norm"] for run in runs] == ["'batch'", "'layer'"]


def test_two_methods_of_equal_configs_are_both_trained(tiny):
    """One of them may be the baseline of the other, or be changed later; a name that was given is not dropped."""
    named = {"methods": ("peer", "same"), "method_files": {"same": "peer"}}
    runs = planned(tiny, **named, sizes={"d8": {"Transformer.d_model": 8}}, cross={"PKM.top_k": (1, 2)})
    assert [run.point.name for run in runs] == ["peer-d8-1e8-seed0", "same-d8-1e8-seed0"]


def test_the_baseline_is_a_method():
    for named, allowed in (("dense", True), ("peer", True), (None, True), ("pkm", False)):
        fields = {"configs": ("a.gin",), "methods": ("dense", "peer"), "sizes": {"d8": {}}, "budgets": (1e8,)}
        if allowed:
            assert Sweep(**fields, baseline=named).describe()["baseline"] == named
        else:
            with pytest.raises(InputError, match=r"Sweep\.baseline = 'pkm' .* dense, peer"):
                Sweep(**fields, baseline=named)


# What does not answer for now


class Unanswered:
    """Stands in for workers whose bucket does not answer: each run is put off."""

    def __init__(self):
        self.given, self.count, self.is_killed = [], 0, False

    @property
    def is_busy(self):
        return bool(self.given)

    @property
    def is_free(self):
        return not self.given

    def give(self, task):
        self.given.append(task)
        self.count += 1

    def answers(self):
        answered = [(task, Answer("later", "the bucket does not answer")) for task in self.given]
        self.given.clear()
        return answered

    def stop(self):
        return []

    def kill(self):
        self.is_killed = True


def test_a_sweep_whose_bucket_does_not_answer_ends_so_that_it_is_started_again(tiny, tmp_path):
    """No run is marked as failed."""
    trainers, runs = Unanswered(), planned(tiny, methods=("dense",), sizes={"d8": {"Transformer.d_model": 8}})
    with pytest.raises(TryAgain, match=r"dense-d8-1e8-seed0 could not go on 21 times: the bucket does not answer"):
        runner.run_sweep(sweep(tiny), runs, SweepDirectory(tmp_path), trainers, stale=0.01, progress=False)
    assert trainers.count == 21
    assert trainers.is_killed
    assert not list(tmp_path.glob("*/failure.json"))
