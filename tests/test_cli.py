"""The command line as a person meets it: quick help, and one sentence for what can't be done."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from small_runs import CONFIGS, ROOT, environment, load, stack, train

from peer_jax import cli, config
from peer_jax.run_directory import RunDirectory

COMMANDS = ("prepare", "train", "evaluate", "generate", "sweep", "plan", "report", "analyse", "bench", "sentencepiece")


pytestmark = pytest.mark.usefixtures("trains")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny, folder, "Run.steps=30")
    return folder


def command(tiny, *bindings, layer="dense"):
    return [*(f"--config={file}" for file in stack(tiny, layer)), *(f"--set={binding}" for binding in bindings)]


def refused(outcome, *words):
    """Exit status 2, nothing printed, and one line on standard error that says these words."""
    status, printed, errors = outcome
    assert status == 2, errors
    assert printed == ""
    assert errors.startswith("peer-jax: ")
    assert errors.count("\n") == 1
    assert errors.endswith("\n")
    assert "Traceback" not in errors
    assert "In call to configurable" not in errors
    for word in words:
        assert word in errors
    return errors


# Help


def test_help_takes_less_than_a_second():
    """Of a core, so that other processes do not count."""
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "peer_jax", "--help"], env=environment(), cwd=ROOT, check=True, capture_output=True
        )
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 1.0


def test_help_imports_nothing_heavy():
    program = """
import sys
from peer_jax.cli import main
for arguments in (["--help"], ["train", "--help"]):
    sys.argv = ["peer-jax", *arguments]
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code
heavy = {"jax", "jaxlib", "flax", "gin", "optax", "orbax", "numpy", "tensorflow", "grain"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", program], env=environment(), cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=60
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(run_cli, name):
    status, printed, errors = run_cli(name, "--help")
    assert (status, errors) == (0, "")
    assert f" {name} [OPTIONS]" in printed
    assert "--config" in printed or "--workdir" in printed or "DIR" in printed


def test_help_names_every_command(run_cli):
    _, printed, _ = run_cli("--help")
    assert all(name in printed for name in COMMANDS)
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} >= set(COMMANDS)


# One sentence


@pytest.mark.parametrize(
    ("bindings", "words"),
    [
        (["PEEER.top_k=4"], ["PEEER"]),
        (["Run.stepz=4"], ["stepz", "Run"]),
        (["Dense.depth=4"], ["Dense", "depth"]),
        (["PEER.tpo_k=4"], ["PEER", "tpo_k"]),
        (["Transformer.width=4"], ["Transformer", "width"]),
        (["AdamW.learning_rat=0.1"], ["AdamW", "learning_rat"]),
        (["TextTask.seqlen=4"], ["TextTask", "seqlen"]),
        (["Run.steps='many'"], ["Run.steps", "'many'", "int"]),
        (["Run.steps=2.5"], ["Run.steps", "2.5", "int"]),
        (["Run.batch_size='4'"], ["Run.batch_size", "'4'", "int"]),
        (["AdamW.learning_rate='fast'"], ["AdamW.learning_rate", "'fast'", "float"]),
        (["PEER.num_experts='64'"], ["PEER.num_experts", "'64'", "int"]),
        (["PEER.top_k=2.5"], ["PEER.top_k", "2.5", "int"]),
        (["Transformer.d_model='wide'"], ["Transformer.d_model", "'wide'", "int"]),
        (["Transformer.d_model=16.0"], ["Transformer.d_model", "16.0", "int"]),
        (["Transformer.dtype='floaty'"], ["dtype", "floaty"]),
        (["Transformer.sparse_blocks=7"], ["sparse_blocks", "7"]),
        (["Transformer.remat=3"], ["Transformer.remat", "3", "bool"]),
        (["Transformer.ffw=@Dense()"], ["Dense.d_model"]),
        (["Run.model=@Dense"], ["model", "Dense"]),
        (["PEER.up_init=3"], ["PEER.up_init", "3"]),
        (["Transformer.num_heads=5"], ["d_model=16", "num_heads=5"]),
        (["PEER.num_experts=63"], ["num_experts=63", "64"]),
        (["PEER.top_k=65"], ["top_k=65", "num_experts=64"]),
        (["PEER.d_key=7"], ["d_key=7"]),
        (["Run.accumulation=3"], ["batch_size=4", "accumulation=3"]),
        (["Run.batch_size=100000"], ["batch_size", "100000"]),
        (["Run.seed=-1"], ["seed", "-1"]),
        (["Run.steps=None"], ["steps", "training_flops"]),
        (["Run.batch_size=%NOTHING"], ["NOTHING"]),
        (["Run.task=@TextTask"], ["Run.task"]),
        (["local_files.path='/no/such/place'"], ["/no/such/place"]),
        (["TextTask.vocabulary='no_such.model'"], ["no_such.model"]),
        (["TextTask.seq_len=1"], ["seq_len", "1"]),
        (["AdamW.table_learning_rate={'down': 0.1}"], ["table_learning_rate", "'up'"]),
        (["AdamW.learning_rate=-1.0"], ["learning_rate=-1.0"]),
        (["AdamW.clip_norm=-1.0"], ["clip_norm=-1.0"]),
        (["Run.steps"], ["'Run.steps'", "NAME=VALUE"]),
        (["=5"], ["'=5'"]),
        (["Run.steps="], ["'Run.steps='"]),
        (["Run.steps=five"], ["'Run.steps=five'"]),
        (["Run.steps=[5"], ["'Run.steps=[5'"]),
        (["Run.model=@Nothing"], ["Nothing"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_binding_is_refused(tiny, tmp_path, run_cli, bindings, words):
    outcome = run_cli(
        "train", *command(tiny, "Run.steps=2", *bindings, layer="peer"), "--workdir", tmp_path / "run", "--quiet"
    )
    refused(outcome, *words)
    assert not (tmp_path / "run" / "result.json").exists()


def test_refusal_in_a_process_of_its_own_is_one_line_too(tiny, tmp_path):
    """Libraries that warn when they are imported would show here."""
    arguments = ["train", *command(tiny, "Run.steps=2", "PEEER.top_k=4"), "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "peer_jax", *arguments], env=environment(), capture_output=True, text=True, timeout=60
    )
    errors = refused((done.returncode, done.stdout, done.stderr), "PEEER")
    assert "--set 'PEEER.top_k=4'" in errors


def test_missing_config_file(run_cli, tmp_path):
    refused(run_cli("train", "--config", tmp_path / "no.gin", "--workdir", tmp_path / "run"), str(tmp_path / "no.gin"))


def test_included_file_that_is_missing(run_cli, tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("include 'no.gin'\n")
    refused(run_cli("train", "--config", file, "--workdir", tmp_path / "run"), "no.gin")


@pytest.mark.parametrize("content", [b"Run.steps = \n", b"\xff\xfe\x00", b"Run.steps 5\n", b"Run.stepz = 5\n"])
def test_config_file_that_cannot_be_read(run_cli, tmp_path, content):
    file = tmp_path / "a.gin"
    file.write_bytes(content)
    refused(run_cli("train", "--config", file, "--workdir", tmp_path / "run"), str(file))


def test_nothing_is_set(run_cli, tmp_path):
    refused(run_cli("train", "--config", CONFIGS / "layers" / "dense.gin", "--workdir", tmp_path / "run"), "Run.model")


def test_model_size_is_not_set(run_cli, tmp_path):
    """The size file is left out."""
    files = [CONFIGS / "base.gin", CONFIGS / "layers" / "dense.gin", CONFIGS / "data" / "python_stdlib.gin"]
    outcome = run_cli(
        "train", *(f"--config={file}" for file in files), "--set=Run.steps=2", "--workdir", tmp_path / "run"
    )
    refused(outcome, "Transformer.d_model")


@pytest.mark.parametrize("name", ["empty.txt", "binary.txt"])
def test_corpus_that_is_no_text(tiny, tmp_path, run_cli, name):
    path = tmp_path / name
    path.write_bytes({"empty.txt": b"", "binary.txt": b"\x00\xff\xfe" * 100}[name])
    binding = f"local_files.path={str(path)!r}"
    refused(run_cli("prepare", *command(tiny, "Run.steps=2", binding), "--quiet"), name)


def test_workdir_that_is_a_file(tiny, tmp_path, run_cli):
    file = tmp_path / "file"
    file.write_text("mine")
    for arguments in (["train", *command(tiny, "Run.steps=2")], ["evaluate"], ["generate"]):
        refused(run_cli(*arguments, "--workdir", file), str(file))
    refused(run_cli("train", *command(tiny, "Run.steps=2"), "--workdir", file / "below"), str(file / "below"))
    refused(run_cli("report", file), str(file))
    assert file.read_text() == "mine"


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_directory_without_a_run(tmp_path, run_cli, name):
    refused(run_cli(name, "--workdir", tmp_path / "nothing"), str(tmp_path / "nothing"))
    refused(run_cli(name, "--workdir", tmp_path), str(tmp_path), "peer-jax train")


@pytest.mark.parametrize("name", ["evaluate", "generate"])
def test_run_without_a_checkpoint(finished, tmp_path, run_cli, name):
    shutil.copy(finished / "config.gin", tmp_path)
    refused(run_cli(name, "--workdir", tmp_path), str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    refused(run_cli(name, "--workdir", tmp_path), str(tmp_path))


@pytest.mark.parametrize("option", [("--prompt", "a\udcff"), ("--seed", 2**32)])
def test_generate_refuses_what_is_no_text_and_no_seed(finished, run_cli, option):
    status, _, errors = run_cli("generate", "--workdir", finished, *option)
    assert status == 2
    assert option[0] in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("result.json", b'{"schema": 1}'),
        ("result.json", b'{"schema": 1, "steps": 3, "corpus": {"name": "x"}, "evaluations": {}}'),
        ("point.json", b'{"budget": "x"}'),
    ],
)
def test_a_damaged_result_is_named(finished, tmp_path, run_cli, name, damage):
    shutil.copy(finished / "result.json", tmp_path)
    (tmp_path / name).write_bytes(damage)
    refused(run_cli("report", tmp_path), name)


def test_a_config_that_is_no_text_is_named(tiny, finished, tmp_path, run_cli):
    (tmp_path / "config.gin").write_bytes(b"Run.steps = \xff")
    refused(run_cli("train", *command(tiny, "Run.steps=2"), "--workdir", tmp_path, "--quiet"), "config.gin")


def test_a_bench_that_can_not_keep_its_results_measures_nothing(finished, run_cli):
    refused(run_cli("bench", "op", "--quick", "--out", finished / "result.json"), "result.json")


def test_no_such_checkpoint(finished, run_cli):
    refused(run_cli("generate", "--workdir", finished, "--checkpoint", "29"), "'29'", "30")


def test_no_such_data_file(finished, run_cli):
    refused(run_cli("evaluate", "--workdir", finished, "--data", "no.gin"), "no.gin")


def test_workdir_of_another_process(tiny, tmp_path, run_cli):
    lock = RunDirectory(tmp_path).lock()
    refused(run_cli("train", *command(tiny, "Run.steps=2"), "--workdir", tmp_path, "--quiet"), "another process")
    lock.release()


def test_another_config_in_a_workdir(tiny, finished, run_cli):
    arguments = command(tiny, "Run.steps=30", "AdamW.eps=0.5")
    refused(run_cli("train", *arguments, "--workdir", finished, "--quiet"), "AdamW.eps = 1e-08", "0.5")
    arguments = command(tiny, "Run.steps=30", "Transformer.d_model=32")
    refused(run_cli("train", *arguments, "--workdir", finished, "--quiet"), "Transformer.d_model = 16", "32")


def test_diverging_run_exits_with_1(tiny, tmp_path, run_cli):
    arguments = command(tiny, "Run.steps=5", "AdamW.learning_rate=1e30", "AdamW.warmup_steps=0")
    status, _, errors = run_cli("train", *arguments, "--workdir", tmp_path, "--quiet")
    assert status == 1
    assert errors.startswith("peer-jax: step 1 has loss ")
    assert errors.count("\n") == 1


# What they do


def test_train_prints_a_row_and_again_the_same(tiny, finished, run_cli):
    outcome = run_cli("train", *command(tiny, "Run.steps=30"), "--workdir", finished, "--quiet")
    status, printed, errors = outcome
    assert (status, errors) == (0, "")
    assert "Dense" in printed
    assert run_cli("train", *command(tiny, "Run.steps=30"), "--workdir", finished, "--quiet") == outcome


def generate(run_cli, folder, *arguments):
    status, printed, errors = run_cli("generate", "--workdir", folder, "--max-new-tokens", 20, *arguments)
    assert (status, errors) == (0, "")
    return printed


def test_generate_goes_on_from_the_prompt(finished, run_cli):
    first = generate(run_cli, finished, "--prompt", "the quick", "--seed", 1)
    assert first.startswith("the quick")
    assert len(first) > len("the quick\n")
    assert generate(run_cli, finished, "--prompt", "the quick", "--seed", 1) == first
    others = {generate(run_cli, finished, "--prompt", "the quick", "--seed", seed) for seed in (2, 3)}
    assert others - {first}


def test_greedy_does_not_depend_on_the_seed(finished, run_cli):
    texts = {generate(run_cli, finished, "--prompt", "a", "--temperature", 0, "--seed", seed) for seed in (1, 2)}
    assert len(texts) == 1


def test_generation_past_the_trained_length_says_so_once(finished, run_cli, caplog):
    arguments = ("generate", "--workdir", finished, "--max-new-tokens", 40, "--prompt", "the quick " * 4)
    assert run_cli(*arguments)[0] == 0
    (said,) = caplog.messages
    assert "rows of 32" in said


def test_generate_without_a_prompt(finished, run_cli):
    assert generate(run_cli, finished).endswith("\n")


@pytest.mark.parametrize(
    ("option", "value"), [("--top-p", "0"), ("--top-p", "1.5"), ("--temperature", "-1"), ("--max-new-tokens", "0")]
)
def test_generate_refuses(finished, run_cli, option, value):
    status, printed, errors = run_cli("generate", "--workdir", finished, option, value)
    assert status == 2
    assert printed == ""
    assert "Traceback" not in errors
    assert option.strip("-") in errors or option.strip("-").replace("-", "_") in errors


def test_report_has_a_row_a_run(finished, tmp_path, run_cli):
    for name, loss in (("one", 1.25), ("two", 2.5)):
        (tmp_path / name).mkdir()
        result = json.loads((finished / "result.json").read_text())
        result["evaluations"]["corpus"]["loss"] = loss
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    status, printed, errors = run_cli("report", tmp_path)
    assert (status, errors) == (0, "")
    rows = [line for line in printed.splitlines() if "Dense" in line]
    assert ["1.2500" in rows[0], "2.5000" in rows[1], len(rows)] == [True, True, 2]
    assert str(tmp_path / "report.html") in printed.replace("\n", "")
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "results.csv", "figures"}
    merged = run_cli("report", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "out")[1]
    assert [line.split()[1] for line in merged.splitlines() if "Dense" in line] == ["1.2500", "2.5000"]
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "one" / "report.html").exists()


def test_report_marks_what_is_not_causal(finished, tmp_path, run_cli):
    result = json.loads((finished / "result.json").read_text()) | {"is_causal": False, "method": "MoE (expert choice)"}
    (tmp_path / "result.json").write_text(json.dumps(result))
    _, printed, _ = run_cli("report", tmp_path)
    assert printed.count("*") == 2  # one in the row, one before what it means
    assert "* not causal" in printed


def test_report_of_nothing(tmp_path, run_cli):
    refused(run_cli("report", tmp_path), str(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", '{"schema": 0}'])
def test_report_of_a_foreign_result(tmp_path, run_cli, content):
    (tmp_path / "result.json").write_text(content)
    refused(run_cli("report", tmp_path), str(tmp_path))


def test_prepare_prints_the_cache(tiny, run_cli):
    status, printed, errors = run_cli("prepare", *command(tiny, "Run.steps=2"), "--quiet")
    assert (status, errors) == (0, "")
    assert printed.strip() == str(load(tiny, "Run.steps=2").task.cache_path())


def test_later_files_and_bindings_override_earlier_ones(tiny, tmp_path):
    file = tmp_path / "a.gin"
    file.write_text("Run.seed = 5\nRun.batch_size = 2\n")
    run = config.load([*stack(tiny), file], ["Run.steps=2", "Run.seed=6"])
    assert (run.seed, run.batch_size) == (6, 2)


def test_a_traceback_has_a_status_of_its_own(run_cli, monkeypatch):
    """70, since launchers take 1 for a run that has failed and don't start it again."""

    def fault(*_, **__):
        raise ZeroDivisionError("a fault of the code")

    monkeypatch.setattr("peer_jax.config.load", fault)
    status, _, errors = run_cli("train", "--config=configs/base.gin", "--workdir=nowhere")
    assert status == os.EX_SOFTWARE == 70
    assert errors.endswith("ZeroDivisionError: a fault of the code\n")
