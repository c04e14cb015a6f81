"""Sweeps by slices: processes that train one run after another together, and several of them on one directory.

A slice here is two processes with a device each, or one process. They are stopped, killed and started again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import HOSTS, Hosts, ended, flags, free_port
from small_runs import ROOT, environment, lines, losses, saved_steps, sweep_config, without_times

from peer_jax import config as configs
from peer_jax.errors import InputError
from peer_jax.run_directory import RunDirectory, SweepDirectory
from peer_jax.sweeps import chosen, listing
from peer_jax.sweeps.sweep import expand
from peer_jax.training import loop

pytestmark = pytest.mark.usefixtures("trains")

BUDGETS = ("1e8", "4e8", "6e7")
BINDINGS = (
    "Sweep.methods=('peer',)",
    f"Sweep.budgets=({','.join(BUDGETS)})",
    "Sweep.seeds=(0,)",
)
# The second method diverges at once.
DIVERGING = (
    "Sweep.methods={'peer': {}, 'bad': {'AdamW.learning_rate': 1e30, 'AdamW.clip_norm': None}}",
    "Sweep.method_files={'bad': 'peer'}",
)
RUNS = [f"peer-d8-{budget}-seed0" for budget in BUDGETS]
LONGEST = "peer-d8-4e8-seed0"
ONE_DEVICE = {"JAX_NUM_CPU_DEVICES": "1"}
STOPPED = "peer-jax: stopped; every run is saved, and the same command goes on\n"


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return sweep_config(tmp_path_factory.mktemp("slices"), tiny)


@pytest.fixture(scope="module")
def hosts():
    hosts = Hosts()
    yield hosts
    hosts.kill()


def sweep_command(config, folder, *bindings, also=()):
    command = [sys.executable, "-m", "peer_jax", "sweep", f"--config={config}", f"--workdir={folder}", *also]
    return command + [f"--set={binding}" for binding in (*BINDINGS, *bindings)]


def start_alone(hosts, command, devices=1):
    """Starts a slice of one process."""
    alone = [*("--coordinator", f"127.0.0.1:{free_port()}"), *("--num-processes", "1", "--process-id", "0")]
    return hosts.start([*command, *alone], devices)


def train_all(config, folder):
    """Trains the runs of the sweep one by one, without a sweep."""
    described, bindings, imports = configs.load_sweep([config], BINDINGS)
    for point in expand(described, Path(config).parent, bindings, imports):
        loop.train(configs.load(point.files, point.bindings, point.imports), Path(folder, point.name), progress=False)


@pytest.fixture(scope="module")
def trained(hosts, config, tmp_path_factory):
    """The runs, each trained by two processes as ``peer-jax train`` does."""
    folder = tmp_path_factory.mktemp("trained")
    hosts.measured(folder, "test_slices", "train_all", str(config), str(folder), devices=HOSTS)
    return folder


@pytest.fixture(scope="module")
def swept(hosts, config, tmp_path_factory):
    """The same runs and three that diverge, by a slice of two processes; and how the processes have ended."""
    folder = tmp_path_factory.mktemp("swept")
    started = hosts.start_all(sweep_command(config, folder, *DIVERGING), variables=ONE_DEVICE)
    return folder, [ended(process, timeout=240) for process in started]


def result_of(run):
    return json.loads((run / "result.json").read_text())


def assert_equal_runs(found, expected, names=RUNS):
    """Equal bit for bit."""
    for name in names:
        assert losses(found / name) == losses(expected / name), name
        assert without_times(result_of(found / name)) == without_times(result_of(expected / name)), name


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)
    return value


def step_of(run):
    return (RunDirectory(run).last_metrics() or {}).get("step", 0)


def begun(run):
    """When the run was begun each time."""
    return sorted(int(path.name.split(".")[3]) for path in (run / "tensorboard").iterdir())


# One slice


def test_a_slice_trains_what_train_trains(swept, trained):
    assert_equal_runs(swept[0], trained)


def test_the_most_expensive_run_is_first(swept):
    first = {name: begun(swept[0] / name) for name in RUNS}
    assert sorted(first, key=first.get) == [LONGEST, "peer-d8-1e8-seed0", "peer-d8-6e7-seed0"]
    assert all(len(times) == 1 for times in first.values())


def test_a_run_that_fails_is_recorded_and_the_slice_goes_on(swept):
    folder, ends = swept
    for status, errors in ends:
        assert status == 1
        assert "peer-jax: 3 of 6 runs failed, the rest is finished: bad-d8-4e8-seed0: step " in errors
        assert "Traceback" not in errors
    for budget in BUDGETS:
        run = folder / f"bad-d8-{budget}-seed0"
        assert "learning rate" in json.loads((run / "failure.json").read_text())["reason"]
        assert len(begun(run)) == 1
    states = {run.name: run.state for run in listing.listed(SweepDirectory(folder))}
    assert states == dict.fromkeys(RUNS, "finished") | {f"bad-d8-{budget}-seed0": "failed" for budget in BUDGETS}


def test_a_slice_is_stopped_and_goes_on_elsewhere(hosts, config, trained, tmp_path, run_cli):
    """A signal to one of two processes stops both. Two go on to the same numbers; so does one, within rounding."""
    folder = tmp_path / "sweep"
    started = hosts.start_all(sweep_command(config, folder), variables=ONE_DEVICE)
    wait_for(lambda: step_of(folder / LONGEST) > 20)
    status, listed, _ = run_cli("sweep", "--list", "--workdir", folder)
    assert status == 0
    assert f"{LONGEST}  running" in listed.replace("   ", "  ")
    started[1].send_signal(signal.SIGTERM)
    for process in started:
        status, errors = ended(process)
        assert status == 128 + signal.SIGTERM, errors
        assert STOPPED in errors
    stopped = step_of(folder / LONGEST)
    assert saved_steps(folder / LONGEST)[-1] == stopped
    assert stopped < result_of(trained / LONGEST)["steps"]
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [LONGEST]

    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    alone = start_alone(hosts, sweep_command(config, elsewhere, also=["--run", LONGEST]), devices=HOSTS)
    for process in hosts.start_all(sweep_command(config, folder), variables=ONE_DEVICE):
        assert ended(process, timeout=240)[0] == 0
    assert_equal_runs(folder, trained)
    status, errors = ended(alone, timeout=240)
    assert status == 0, errors
    assert lines(elsewhere / LONGEST)[-1]["step"] == result_of(trained / LONGEST)["steps"]
    loss = result_of(trained / LONGEST)["evaluations"]["corpus"]["loss"]
    assert result_of(elsewhere / LONGEST)["evaluations"]["corpus"]["loss"] == pytest.approx(loss, rel=1e-3)
    assert [path.name for path in elsewhere.iterdir() if path.is_dir()] == [LONGEST]
