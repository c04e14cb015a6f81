"""Sweeps run by real processes: skipped, resumed, failed, killed, shared between two, stopped by a signal."""

import csv
import json
import os
import re
import signal
import time

import pytest
from small_runs import PROGRAM, gone, handles, read_until, start_process, sweep_config, wait_for, workers

from peer_jax import memory
from peer_jax.config import load
from peer_jax.run_directory import RunDirectory
from peer_jax.sweeps.workers import Task, Worker

pytestmark = pytest.mark.slow

LONG = ("Sweep.budgets=(1e12,)",)  # more than anybody waits for
RUNS = {f"{method}-d8-2e8-seed{seed}" for method in ("dense", "peer") for seed in (0, 1)}


@pytest.fixture(scope="module")
def config(tiny, tmp_path_factory):
    return sweep_config(tmp_path_factory.getbasetemp(), tiny)


def start(config, folder, *bindings, workers=2, also=(), compiled):
    command = [*PROGRAM, "sweep", f"--config={config}", f"--workdir={folder}", f"--workers={workers}", *also]
    command += [f"--set={binding}" for binding in bindings]
    return start_process(command, PEER_JAX_CACHE=str(compiled), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")


@pytest.fixture
def sweep(config, tmp_path, tmp_path_factory):
    """Starts `peer-jax sweep` on a folder; whatever still runs at the end of the test is killed."""
    started = []

    def sweep(*bindings, folder=tmp_path / "sweep", **options):
        started.append(
            start(config, folder, *bindings, compiled=tmp_path_factory.getbasetemp() / "programs", **options)
        )
        return started[-1]

    yield sweep
    for process in started:
        if process.poll() is None:
            for child in workers(process.pid):
                os.kill(child, signal.SIGKILL)
            process.kill()
            process.communicate()


def outcome(process):
    """Exit status, standard output and standard error."""
    printed, errors = process.communicate(timeout=240)
    return process.returncode, printed, errors


def training_runs(folder):
    """Run directories whose log has begun."""
    return [path.parent for path in folder.glob("*/metrics.jsonl") if RunDirectory(path.parent).last_metrics()]


def results(folder):
    with (folder / "results.csv").open() as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_runs_are_made_once_and_skipped_afterwards(sweep, config, tmp_path, run_cli):
    status, printed, errors = outcome(sweep())
    assert status == 0, errors
    folder = tmp_path / "sweep"
    rows = results(folder)
    assert rows.keys() == RUNS
    for name, row in rows.items():
        result = json.loads((folder / name / "result.json").read_text())
        assert float(row["loss"]) == result["evaluations"]["corpus"]["loss"]
        assert float(row["training_flops"]) == result["training_flops"]
        assert float(row["budget"]) == 2e8
        step_flops = 3 * result["forward_flops_per_token"] * result["batch_size"] * result["seq_len"]
        assert abs(float(row["training_flops"]) - 2e8) <= step_flops / 2
        assert int(row["seed"]) == int(name[-1])
    assert "4 runs, 0 finished earlier" in errors
    assert "results.csv" in printed
    for name in RUNS:
        assert f"{name}: loss " in errors

    before = {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in RUNS}
    (folder / "results.csv").unlink()
    status, _, errors = outcome(sweep("Sweep.seeds=(0,1,2)", "Sweep.methods=('dense',)"))
    assert status == 0, errors
    assert "3 runs, 2 finished earlier" in errors
    assert results(folder).keys() == RUNS | {"dense-d8-2e8-seed2"}
    assert before == {name: (folder / name / "metrics.jsonl").stat().st_mtime_ns for name in RUNS}

    other = ["--config", config, "--workdir", folder, "--set=AdamW.b1=0.5"]  # another config in the same directory
    status, printed, errors = run_cli("sweep", *other)
    assert (status, printed) == (2, "")
    assert errors.splitlines()[-1].startswith("peer-jax: ")
    assert "AdamW.b1 = 0.9" in errors.splitlines()[-1]


def test_a_failing_run_is_recorded_and_the_rest_goes_on(sweep, tmp_path):
    folder = tmp_path / "sweep"
    diverging = ("Sweep.methods={'dense': {'AdamW.learning_rate': 1e30, 'AdamW.clip_norm': None}, 'peer': {}}",)
    status, printed, errors = outcome(sweep(*diverging))
    assert (status, printed) == (1, "")
    last = errors.splitlines()[-1]
    assert last.startswith("peer-jax: 2 of 4 runs failed, the rest is finished: dense-d8-2e8-seed")
    assert "Traceback" not in errors
    assert results(folder).keys() == {name for name in RUNS if name.startswith("peer")}
    for seed in (0, 1):
        failure = json.loads((folder / f"dense-d8-2e8-seed{seed}" / "failure.json").read_text())
        assert "nan" in failure["reason"] or "inf" in failure["reason"]
        assert "learning rate" in failure["reason"]


def test_a_killed_worker_fails_its_run_alone_and_the_next_sweep_mends_it(sweep, tmp_path):
    folder = tmp_path / "sweep"
    process = sweep("Sweep.methods=('dense',)", "Sweep.budgets=(2e8,1e12)", "Sweep.seeds=(0,)", workers=1)
    big = folder / "dense-d8-1e12-seed0"
    wait_for(lambda: (RunDirectory(big).last_metrics() or {}).get("step", 0) > 30)
    (worker,) = workers(process.pid)
    os.kill(worker, signal.SIGKILL)
    status, _, errors = outcome(process)
    assert status == 1
    assert "SIGKILL" in errors
    assert "SIGKILL" in json.loads((big / "failure.json").read_text())["reason"]
    assert results(folder).keys() == {"dense-d8-2e8-seed0"}
    # It goes on from its checkpoint.
    process = sweep("Sweep.methods=('dense',)", "Sweep.budgets=(1e12,)", "Sweep.seeds=(0,)", workers=1)
    wait_for(lambda: (RunDirectory(big).last_metrics() or {}).get("step", 0) > 60)
    process.send_signal(signal.SIGINT)
    assert outcome(process)[0] == 130
    steps = [json.loads(line)["step"] for line in (big / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_what_is_running(sweep, tmp_path, number):
    folder = tmp_path / "sweep"
    process = sweep(*LONG)
    wait_for(lambda: len(training_runs(folder)) == 2)
    pids = workers(process.pid)
    assert len(pids) == 2
    process.send_signal(number)
    status, _, errors = outcome(process)
    assert status == 128 + number, errors
    assert errors.splitlines()[-1] == "peer-jax: stopped; every run is saved, and the same command goes on"
    assert all(gone(pid) for pid in pids)
    for run in training_runs(folder):
        saved = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
        assert saved >= RunDirectory(run).last_metrics()["step"]
        assert RunDirectory(run).read_result() is None


def test_workers_stop_when_the_sweep_is_killed(sweep, tmp_path):
    folder = tmp_path / "sweep"
    process = sweep(*LONG)
    wait_for(lambda: len(training_runs(folder)) == 2)
    pids = workers(process.pid)
    process.kill()
    wait_for(lambda: all(gone(pid) for pid in pids), seconds=60)
    for run in training_runs(folder):
        RunDirectory(run).lock().release()  # nobody has it any more


def test_a_worker_that_finished_as_it_was_asked_to_stop_ends(tmp_path):
    """The signal that came with the last step ended no run; the worker must not wait for another."""
    worker = Worker(load, (0, 1), tmp_path / "worker.log")
    worker.process.terminate = lambda: None  # the signal was taken by the run that is over
    worker.stop()
    worker.join(60)
    assert worker.process.exitcode == 0


def test_two_sweeps_share_a_directory_and_never_a_run(sweep, tmp_path):
    """Each run is trained by one of them: a second would leave a second file of events."""
    folder = tmp_path / "sweep"
    both = [sweep("Sweep.seeds=(0,1,2)", workers=1) for _ in range(2)]
    for process in both:
        status, _, errors = outcome(process)
        assert status == 0, errors
    names = {f"{method}-d8-2e8-seed{seed}" for method in ("dense", "peer") for seed in (0, 1, 2)}
    assert results(folder).keys() == names
    for name in names:
        assert len(list((folder / name / "tensorboard").iterdir())) == 1, name
        steps = [json.loads(line)["step"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
    logs = [path for path in folder.glob("worker-*.log") if path.stat().st_size]
    assert not any("Traceback" in path.read_text() for path in logs)


def test_a_run_left_by_a_dead_sweep_is_taken_over(sweep, tmp_path):
    folder = tmp_path / "sweep"
    options = ("Sweep.methods=('dense',)", "Sweep.seeds=(0,)", "Sweep.budgets=(2e9,)")
    first = sweep(*options, workers=1)
    run = folder / "dense-d8-2e9-seed0"
    wait_for(lambda: RunDirectory(run).last_metrics())
    (worker,) = workers(first.pid)
    os.kill(worker, signal.SIGSTOP)  # it holds its run, and makes no step
    second = sweep(*options, workers=1, also=["--stale=2"])
    read_until(second, f"{run.name} is being trained by process {worker} on ")  # found in use, and tried again
    assert not (run / "result.json").exists()
    first.kill()
    os.kill(worker, signal.SIGKILL)
    status, _, errors = outcome(second)
    assert status == 0, errors
    assert results(folder).keys() == {run.name}


def test_dry_run_prints_every_run_and_makes_nothing(config, tmp_path):
    command = [*PROGRAM, "sweep", f"--config={config}", "--dry-run", "--workers=2"]
    status, printed, errors = outcome(start_process(command, PEER_JAX_CACHE=str(tmp_path)))
    assert status == 0, errors
    for name in RUNS:
        (line,) = [line for line in printed.splitlines() if name in line]
        assert line.split()[-1] in ("s", "min")  # its time was estimated
    total, programs = re.search(r"(\S+) training FLOPs in all; (\d+) programs", printed).groups()
    assert float(total) == pytest.approx(len(RUNS) * 2e8, rel=0.01)  # steps are whole
    assert programs == "2"
    assert "About" in printed


def test_sizes_that_can_t_fit_are_refused_before_anything_is_begun(config, tmp_path, run_cli):
    """The width makes 4 d**2 parameters in attention alone, with two moments each: 12 bytes per parameter."""
    width = 200_000
    sizes = {"d8": {"Transformer.d_model": 8}, "huge": {"Transformer.d_model": width}}
    sweep = {"sizes": sizes, "budgets": (1e15,), "seeds": (0,), "max_epochs": 1e30}
    arguments = ["--config", config, *(f"--set=Sweep.{name}={value!r}" for name, value in sweep.items())]
    status, printed, errors = run_cli("sweep", *arguments, "--workdir", tmp_path / "runs")
    assert (status, printed) == (2, "")
    assert errors.startswith("peer-jax: 2 of 4 runs don't fit a worker")
    assert errors.count("\n") == 1
    named, tebibytes = re.search(r"a training step of (\S+) takes at least (\S+) TiB", errors).groups()
    assert "-huge-" in named
    assert float(tebibytes) > 12 * 4 * width**2 / 2**40
    assert not (tmp_path / "runs").exists()

    status, printed, dry = run_cli("sweep", *arguments, "--dry-run", "--no-estimate")
    assert (status, dry) == (2, errors)
    assert "dense-d8-1e15-seed0" in printed


def test_a_gpu_s_memory_is_known_without_jax(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '81559\\n[N/A]\\n143771\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert memory.of_gpu() == 143771 * 2**20
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert memory.of_gpu() is None


def test_a_directory_that_can_t_be_written_is_refused(config, tmp_path, run_cli):
    blocker = tmp_path / "file"
    blocker.write_text("")
    status, _, errors = run_cli("sweep", "--config", config, "--workdir", blocker / "x")
    assert status == 2
    assert errors.splitlines()[-1].startswith("peer-jax: --workdir ")
    status, printed, errors = run_cli("sweep", "--config", config)
    assert (status, printed) == (2, "")
    assert "--workdir" in errors


def told(worker, seconds=60):
    """The worker's answer, or None if there is none in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (answer := worker.answer()) is not None:
            return answer
        time.sleep(0.05)
    return None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("pause", [0.0, 0.3])
def test_a_worker_that_dies_before_it_has_read_its_task_is_replaced(tmp_path, number, pause):
    """Whether it dies before the task is sent or while it starts; the task is then answered as if nothing had been."""
    worker = Worker(load, (0, 1), tmp_path / "worker.log")
    time.sleep(pause)
    os.kill(worker.process.pid, number)
    worker.give(Task((str(tmp_path / "no.gin"),), (), ()))
    answer = told(worker)
    worker.kill()
    assert answer is not None
    assert (answer.state, "no.gin does not exist" in answer.reason) == ("failed", True)


def test_a_worker_that_was_asked_to_stop_is_not_replaced(tmp_path):
    worker = Worker(load, (0, 1), tmp_path / "worker.log")
    worker.give(Task((str(tmp_path / "no.gin"),), (), ()))
    worker.stop()
    worker.join(60)
    for _ in range(3):
        worker.answer()
    assert not worker.process.is_alive()


def test_an_idle_worker_that_was_killed_is_replaced(tmp_path):
    worker = Worker(load, (0, 1), tmp_path / "worker.log")
    task = Task((str(tmp_path / "no.gin"),), (), ())
    for _ in range(2):
        worker.give(task)
        assert told(worker).state == "failed"
        os.kill(worker.process.pid, signal.SIGKILL)
    worker.give(task)
    assert told(worker).state == "failed"
    worker.kill()


def test_a_task_that_kills_its_worker_is_not_given_again(tmp_path):
    module = tmp_path / "deadly.py"
    module.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    worker = Worker(load, (0, 1), tmp_path / "worker.log")
    worker.give(Task((), (), ("deadly",)))
    answer = told(worker)
    worker.kill()
    assert answer.state == "failed"


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.0), (signal.SIGTERM, 0.3), (signal.SIGINT, 2.0), (signal.SIGTERM, 4.0)]
)
def test_a_signal_in_the_first_seconds_ends_a_sweep_with_its_sentence(sweep, tmp_path, number, seconds):
    process = sweep(*LONG)
    wait_for(lambda: handles(process.pid, signal.SIGTERM))  # before, Python itself is starting
    time.sleep(seconds)
    process.send_signal(number)
    status, _, errors = outcome(process)
    assert status == 128 + number, errors
    assert errors.splitlines()[-1].startswith("peer-jax: stopped")
    assert "Traceback" not in errors
    assert not any("Traceback" in path.read_text() for path in (tmp_path / "sweep").glob("worker-*.log"))
