"""Sweeps by slices: processes that train one run after another together, and several of them on one directory.

A slice here is two processes with a device each, or one process. They are stopped, killed and started again.
"""

import csv
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from hosts import HOSTS, Hosts, ended, flags, free_port
from small_runs import (
    PROGRAM,
    children,
    gone,
    lines,
    load,
    losses,
    read_until,
    refused,
    saved_steps,
    start_process,
    sweep_config,
    wait_for,
    without_times,
)

from peer_jax import config as configs
from peer_jax import lease
from peer_jax.errors import InputError, InUse
from peer_jax.run_directory import RunDirectory, SweepDirectory
from peer_jax.sweeps import listing, plan
from peer_jax.sweeps.chosen import chosen
from peer_jax.sweeps.sweep import expand
from peer_jax.training import loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trains")]

BUDGETS = ("1e8", "4e8")
BINDINGS = (
    "Sweep.methods=('peer',)",
    f"Sweep.budgets=({','.join(BUDGETS)})",
    "Sweep.seeds=(0,)",
)
# One more run, which diverges at once.
DIVERGING = (
    "Sweep.sizes={'d8': {'Transformer.d_model': 8},"
    " 'bad': {'Transformer.d_model': 8, 'AdamW.learning_rate': 1e30, 'AdamW.clip_norm': None}}",
    "Sweep.sizes_at={1e8: ('d8',)}",
)
RUNS = [f"peer-d8-{budget}-seed0" for budget in BUDGETS]
LONGEST, BAD = "peer-d8-4e8-seed0", "peer-bad-4e8-seed0"
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
    command = [*PROGRAM, "sweep", f"--config={config}", f"--workdir={folder}", *also]
    return command + [f"--set={binding}" for binding in (*BINDINGS, *bindings)]


def start_alone(hosts, command, devices=1):
    """Starts a slice of one process."""
    alone = [*("--coordinator", f"127.0.0.1:{free_port()}"), *("--num-processes", "1", "--process-id", "0")]
    return hosts.start([*command, *alone], devices)


def train_all(config, folder, *bindings):
    """Trains the runs of the sweep one by one, without a sweep."""
    described, of_runs, imports = configs.load_sweep([config], [*BINDINGS, *bindings])
    for point in expand(described, Path(config).parent, of_runs, imports):
        run = configs.load(point.files, point.bindings, point.imports)
        loop.train(run, Path(folder, point.name), progress=False)


@pytest.fixture(scope="module")
def trained(hosts, config, tmp_path_factory):
    """The runs, each trained by two processes as ``peer-jax train`` does."""
    folder = tmp_path_factory.mktemp("trained")
    hosts.measured(folder, "test_slices", "train_all", str(config), str(folder), devices=HOSTS)
    return folder


@pytest.fixture(scope="module")
def swept(hosts, config, tmp_path_factory):
    """The same runs and one that diverges, by a slice of two processes; and how the processes have ended."""
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
    assert sorted(first, key=first.get) == [LONGEST, "peer-d8-1e8-seed0"]
    assert all(len(times) == 1 for times in first.values())


def test_a_run_that_fails_is_recorded_and_the_slice_goes_on(swept):
    folder, ends = swept
    for status, errors in ends:
        assert status == 1
        assert f"1 of 3 runs failed, the rest is finished: {BAD}: step " in errors
        assert "Traceback" not in errors
    assert "learning rate" in json.loads((folder / BAD / "failure.json").read_text())["reason"]
    assert len(begun(folder / BAD)) == 1
    states = {run.name: run.state for run in listing.listed(SweepDirectory(folder))}
    assert states == dict.fromkeys(RUNS, "finished") | {BAD: "failed"}


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


def test_a_slice_leaves_when_one_of_its_processes_hangs(hosts, config, tmp_path):
    """The process stands still and its command lives, so that only its missing heartbeats tell. Both commands end."""
    also = ["--heartbeat-timeout=10", f"--set=Sweep.budgets=({BUDGETS[1]},)"]
    started = hosts.start_all(sweep_command(config, tmp_path, also=also), variables=ONE_DEVICE)
    wait_for(lambda: step_of(tmp_path / LONGEST) > 5)
    (child,) = children(started[1].pid)
    os.kill(child, signal.SIGSTOP)
    for process in started:
        status, errors = ended(process, timeout=60)
        assert status in (os.EX_TEMPFAIL, 128 + signal.SIGABRT)  # after which launchers start it again
        assert errors.splitlines()[-1].startswith("peer-jax: process ")
    wait_for(lambda: gone(child), seconds=10)


# Several slices on one directory

# A process on a machine of another name holds a lease until it is killed.
HOLDS = """
import sys, time
from peer_jax import lease
lease.hold(lease.Folder(sys.argv[1]), host="elsewhere", stale=2)
print("held", flush=True)
time.sleep(600)
"""


def test_slices_share_a_directory_and_take_over_from_the_dead(hosts, config, tmp_path):
    """One of two slices stands still while it trains, and is killed; and another machine holds a run until it dies."""
    folder, three = tmp_path / "sweep", "Sweep.budgets=(1e8,4e8,6e7)"
    held, free = folder / "peer-d8-1e8-seed0", folder / "peer-d8-6e7-seed0"
    held.mkdir(parents=True)
    elsewhere = hosts.start([sys.executable, "-c", HOLDS, str(held / ".lease")])
    assert elsewhere.stdout.readline() == "held\n"
    command = sweep_command(config, folder, three, also=["--stale=2"])
    first = start_alone(hosts, command)
    wait_for(lambda: step_of(folder / LONGEST) > 25)
    first.send_signal(signal.SIGSTOP)
    second = start_alone(hosts, command)
    wait_for(lambda: (free / "result.json").exists())
    read_until(
        second,  # which tries the other two, whose holders live
        f"{held.name} is being trained by process {elsewhere.pid} on elsewhere since ",
        f"{LONGEST} is being trained by process {first.pid} on {socket.gethostname()} since ",
    )
    assert not (folder / LONGEST / "result.json").exists()
    assert not (held / "config.gin").exists()
    first.kill()
    elsewhere.kill()
    status, errors = ended(second)
    assert status == 0, errors
    assert [len(begun(run)) for run in (folder / LONGEST, held, free)] == [2, 1, 1]
    alone = tmp_path / "alone"
    train_all(config, alone, three)
    assert_equal_runs(folder, alone, [LONGEST, held.name, free.name])
    with (folder / "results.csv").open() as file:
        assert sorted(row["run"] for row in csv.DictReader(file)) == sorted([LONGEST, held.name, free.name])


def test_a_run_that_was_taken_over_is_left(tiny, tmp_path, monkeypatch):
    """As if this process had stood still so long that another one has the run by now."""
    make = loop.train_batches
    leases = lease.Folder(tmp_path / ".lease")

    class TakenOver:
        def __init__(self, *arguments, **named):
            self._batches, self._fetched = make(*arguments, **named), 0

        def __next__(self):
            self._fetched += 1
            if self._fetched == 13:
                assert leases.take(b"{}", leases.read().version) is not None
                time.sleep(0.5)  # this process looks every 0.1 s
            return next(self._batches)

        def __getattr__(self, name):
            return getattr(self._batches, name)

    monkeypatch.setattr(loop, "train_batches", TakenOver)
    run = load(tiny, "Run.steps=30", "Run.checkpoint_every=5", "Run.evaluate_every=30", "Transformer.num_blocks=1")
    with pytest.raises(InUse, match=r"was taken over by another process, .* not heard of for 0\.4 s"):
        loop.train(run, tmp_path, progress=False, stale=0.4)
    assert saved_steps(tmp_path) == [5, 10]
    assert not (tmp_path / "result.json").exists()
    assert leases.read().content == b"{}"


# Shares and lists


def test_shares_are_whole_and_alike(config):
    described, bindings, imports = configs.load_sweep([config], ["Sweep.seeds=(0,1,2,3)", "Sweep.budgets=(1e8,2e8)"])
    planned = plan.plan(expand(described, config.parent, bindings, imports), configs.load)
    ordered = chosen(planned)
    assert [run.training_flops for run in ordered] == sorted((run.training_flops for run in planned), reverse=True)
    shares = [chosen(planned[::-1], (number, 3)) for number in range(3)]
    assert sorted(run.point.name for share in shares for run in share) == sorted(run.point.name for run in planned)
    costs = [sum(run.training_flops for run in share) for share in shares]
    assert max(costs) - min(costs) <= ordered[0].training_flops
    assert chosen(planned, (2, 3), name=ordered[0].point.name) == ordered[:1]
    with pytest.raises(
        InputError, match=r"'peer-d8-1e8-seed9' is none of the 16 runs .* did you mean peer-d8-1e8-seed"
    ):
        chosen(planned, name="peer-d8-1e8-seed9")


def test_a_share_is_given_by_a_flag_or_by_the_environment(config, run_cli, monkeypatch):
    def names(*also):
        status, printed, errors = run_cli("sweep", f"--config={config}", "--dry-run", "--no-estimate", *also)
        assert status == 0, errors
        return {word for word in printed.split() if word.endswith(("-seed0", "-seed1"))}

    first = names("--shard", "0/2")
    monkeypatch.setenv("PEER_JAX_SHARD", "1/2")
    second = names()
    assert len(first) == len(second) == 2
    assert not first & second
    assert names("--shard", "0/2") == first
    for bad in ("2/2", "1", "-1/2", "1/0", ""):
        monkeypatch.setenv("PEER_JAX_SHARD", bad)
        if bad:
            refused(run_cli("sweep", f"--config={config}", "--dry-run"), f"--shard '{bad}' PEER_JAX_SHARD I/N 0/4")


def test_a_slice_has_no_workers(config, run_cli, tmp_path):
    arguments = [f"--config={config}", f"--workdir={tmp_path}", "--workers=2", *flags(0, 1)]
    refused(run_cli("sweep", *arguments), "--workers 2 leave it out")


LISTS = """
import sys
from peer_jax import cli
sys.argv = ["peer-jax", "sweep", "--list", "--workdir", sys.argv[1]]
cli.main()
print(*({"jax", "numpy", "gin", "flax"} & set(sys.modules)))
"""


def listed(folder):
    """State and details of each run that ``--list`` prints, its last line, and which libraries were imported."""
    printed, errors = start_process([sys.executable, "-c", LISTS, folder]).communicate()
    assert errors == ""
    *rows, last, imported = printed.splitlines()
    return {name: tuple(rest) for name, *rest in (row.split(maxsplit=2) for row in rows)}, last, imported


def test_what_a_sweep_has_done_is_listed_without_jax(swept, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(swept[0], folder)
    waiting, longest = folder / RUNS[0], folder / LONGEST
    shutil.rmtree(waiting)
    runs, last, imported = listed(folder)
    loss = result_of(longest)["evaluations"]["corpus"]["loss"]
    assert runs[LONGEST][0] == "finished"
    assert runs[LONGEST][1].startswith(f"loss {loss:.4f}, ")
    assert runs[waiting.name] == ("waiting",)
    assert runs[BAD][0] == "failed"
    assert "learning rate" in runs[BAD][1]
    assert (last, imported) == ("3 runs: 1 waiting, 1 finished, 1 failed; 2 left", "")

    (longest / "result.json").unlink()
    held = RunDirectory(longest).lock()
    runs, last, _ = listed(folder)
    held.release()
    state, details = runs[LONGEST]
    assert state == "running"
    assert details.startswith(f"process {os.getpid()} on {socket.gethostname()} since 2")
    assert last == "3 runs: 1 waiting, 1 running, 1 failed; 3 left"
    assert listed(folder)[0][LONGEST] == ("waiting", f"begun, step {step_of(longest)}")


def test_a_directory_without_a_sweep_has_nothing_to_list(tmp_path, run_cli):
    refused(run_cli("sweep", "--list", f"--workdir={tmp_path}"), f"--workdir {tmp_path} has no sweep")
    refused(run_cli("sweep", f"--workdir={tmp_path}"), "--config is not given")
