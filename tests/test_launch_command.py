"""The command `peer-jax launch`, the page about it (docs/clusters.md), and the image that it starts."""

import dataclasses
import re
import shlex
import tomllib

import pytest
import typer.main
import yaml
from small_runs import ROOT, refused, sweep_config

from peer_jax import cli
from peer_jax.cli import launch as cli_launch
from peer_jax.launch import files
from peer_jax.launch.job import ENGINES, Job


@pytest.fixture
def sweep(tiny, tmp_path, monkeypatch):
    """The words of a small sweep, whose config lies in the current folder, as in an image's."""
    monkeypatch.chdir(tmp_path)
    return ["sweep", f"--config={sweep_config(tmp_path, tiny).relative_to(tmp_path)}", "--set=Run.batch_size=16"]


ON_GKE = ["launch", "--on=gke", "--image=peer-jax", "--accelerator=v5p-32", "--slices=8"]


def test_the_command_prints_files_commands_and_cost(sweep, run_cli):
    status, printed, errors = run_cli(*ON_GKE, *sweep, "--workdir=gs://bucket/small")
    assert status == 0, errors
    manifest, _, command = printed.rstrip().rpartition("\n")
    assert command == "kubectl apply -f jobsets.yaml"
    assert len(list(yaml.safe_load_all(manifest))) == 8
    assert "4 runs fit a v5p-32 (16 devices)" in errors
    assert "device-hours of tpu-v5p" in errors
    assert "--slices 4 takes about as long" in errors


def test_text_that_is_prepared_in_a_bucket_is_named_and_not_copied(sweep, run_cli, monkeypatch):
    monkeypatch.setenv("PEER_JAX_CACHE", "gs://bucket/the cache")  # where nobody could read
    _, printed, _ = run_cli(*ON_GKE, *sweep, "--set=TextTask.cache_dir=None", "--workdir=gs://bucket/small")
    assert 'value: "gs://bucket/the cache"' in printed


def test_a_separator_may_come_before_the_command(sweep, run_cli, tmp_path):
    options = [*ON_GKE, f"--out={tmp_path / 'out'}"]
    outcomes = [run_cli(*options, *between, *sweep, "--workdir=gs://b/x")[:2] for between in ([], ["--"])]
    assert outcomes[0] == outcomes[1] == (0, f"(cd {tmp_path}/out && kubectl apply -f jobsets.yaml)\n")
    assert len(list(yaml.safe_load_all((tmp_path / "out" / "jobsets.yaml").read_text()))) == 8


BAD = {
    "evaluate": (["evaluate", "--workdir=gs://b/x"], "evaluate train"),
    "no flag": (["sweep", "--confg=x.gin", "--workdir=gs://b/x"], "--confg"),
    "no config": (["sweep", "--workdir=gs://b/x"], "--config"),
    "no workdir": (["{sweep}"], "--workdir"),
    "a folder": (["{sweep}", "--workdir=runs/x"], "runs/x gs://BUCKET/x"),
    "no such config": (["sweep", "--config=none.gin", "--workdir=gs://b/x"], "none.gin"),
    "dry": (["{sweep}", "--dry-run", "--workdir=gs://b/x"], "--dry-run"),
    "coordinator": (["{sweep}", "--coordinator=a:1", "--workdir=gs://b/x"], "--coordinator"),
    "batch": (["{sweep}", "--set=Run.batch_size=4", "--workdir=gs://b/x"], "dense-d8 16 Run.batch_size"),
    "mesh": (["{sweep}", "--set=Sharding.data=1", "--workdir=gs://b/x"], "dense-d8 16 Sharding.data"),
    "client": (["--submit", "{sweep}", "--workdir=gs://b/x"], "--submit kubectl"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_launched_is_one_sentence(case, sweep, run_cli, monkeypatch):
    words, expected = BAD[case]
    monkeypatch.setenv("PATH", "/nowhere")
    given = [word for part in words for word in (sweep if part == "{sweep}" else [part])]
    refused(run_cli(*ON_GKE, *given), expected)


def test_what_does_not_fit_is_refused(run_cli, monkeypatch):
    monkeypatch.chdir(ROOT)
    stacked = ("base", "layers/peer", "sizes/tiny", "data/python_stdlib")
    run = ["train", *(f"--config=configs/{name}.gin" for name in stacked), "--set=Run.steps=10"]
    options = ["launch", "--on=gke", "--image=peer-jax", "--accelerator=v5e-1"]
    assert run_cli(*options, *run, "--workdir=gs://b/x")[0] == 0
    outcome = run_cli(*options, *run, "--set=NUM_EXPERTS=67108864", "--workdir=gs://b/x")
    refused(outcome, "1 v5e-1 GiB Sharding.expert")


# The page


PAGE = (ROOT / "docs" / "clusters.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"^peer-jax .*$", BLOCKS, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_are_ones(command):
    name, *words = shlex.split(command)[1:]
    parameters = typer.main.get_command(cli.app).commands[name].make_context(name, words).params
    if name != "launch":
        return
    options = {field.name for field in dataclasses.fields(Job)} - {"engine", "command", "workdir", "files", "cache"}
    launched = cli_launch._launched(parameters["command"])
    given = {option: parameters[option] for option in options}
    where = {"workdir": launched["workdir"], "files": launched["config"]}
    assert files.emit(Job(engine=parameters["on"], command=parameters["command"], **where, **given)).files


def test_the_page_has_the_commands_from_nothing_to_a_report():
    assert [command.split()[1] for command in COMMANDS] == ["prepare", "launch", "sweep", "report"] * 2
    assert all(f"| `{engine}` |" in PAGE for engine in ENGINES)


def test_the_image_is_built_for_accelerators_that_have_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "Dockerfile").read_text()
    named = {*re.findall(r"ACCELERATOR=(\w+)", text), *re.findall(r"\$ACCELERATOR,(\w+)", text)}
    assert named == {"tpu", "cuda", "gcs"}
    assert named <= project["optional-dependencies"].keys()
    python = re.search(r"FROM python:(3\.\d+)", text)[1]
    assert f"constraints/python{python}.txt" in text
    for copied in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (ROOT / name).exists()
            assert f"!{name}\n" in (ROOT / ".dockerignore").read_text()
