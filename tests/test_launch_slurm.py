"""`peer-jax launch --on slurm --submit` on a real Slurm: an array of two jobs of two tasks, one of which is killed."""

import os
import sys
import time
from pathlib import Path

import pytest
import slurm
from hosts import Hosts, finish
from small_runs import losses, sweep_config

from peer_jax.analysis import results

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())]

# Enough steps for a kill to meet a run that has saved some.
LONG = ["--set=Sweep.budgets=(6e8,)", "--set=Sweep.methods=('dense',)", "--set=Sweep.seeds=(0, 1, 2)"]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm that this process's commands reach; its jobs find the command of this Python."""
    (tmp_path / "slurm").mkdir()
    started = slurm.Slurm.or_skip(tmp_path / "slurm")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A killed process may leave half of a compiled program, so there is a folder for this test alone.
    jax = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "programs")}
    for name, value in (started.variables | jax | {"PATH": path}).items():
        monkeypatch.setenv(name, value)
    yield started
    started.stop()


def wait_until(cluster, condition, seconds, explain):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, explain()
        assert "FAILED" not in cluster.states(1).values(), explain()
        time.sleep(0.2)


@pytest.mark.timeout(2400)
def test_a_killed_job_is_requeued_and_every_run_is_finished_once(cluster, tiny, tmp_path, monkeypatch, run_cli):
    monkeypatch.chdir(tmp_path)
    command = ["sweep", f"--config={sweep_config(tmp_path, tiny)}", *LONG, "--quiet"]
    options = ["--slices=2", "--tasks-per-node=2", "--time=20", "--name=two", f"--out={tmp_path / 'files'}"]
    status, printed, errors = run_cli("launch", "--on=slurm", *options, "--submit", *command, "--workdir=sweep")
    assert status == 0, errors
    assert printed.startswith("Submitted batch job 1"), printed

    def logs():
        return {path.name: path.read_text() for path in sorted(tmp_path.glob("two-*.log"))}

    def explain():
        said = (f"== {name}\n{text}" for name, text in logs().items())
        return "\n".join([str(cluster.states(1)), cluster.logs(), *said])

    wait_until(cluster, lambda: list(tmp_path.glob("sweep/*/checkpoints/*/digests.json")), 600, explain)
    killed = cluster.job(1, 0)
    cluster.run("scancel", "--signal=KILL", f"{killed}.0")
    wait_until(cluster, lambda: "requeued, restart 1 of 100" in "".join(logs().values()), 120, explain)
    wait_until(cluster, lambda: "PENDING" in cluster.states(1).values(), 120, explain)
    # Slurm itself waits for two minutes. A node refuses a start of the second in which it revoked the one before.
    time.sleep(3)
    cluster.run("scontrol", "update", f"JobId={killed}", "StartTime=now")
    wait_until(cluster, lambda: set(cluster.states(1).values()) == {"COMPLETED"}, 600, explain)
    restarted = [text for text in logs().values() if "requeued, restart 1 of 100" in text]
    assert len(logs()) == 2
    assert len(restarted) == 1

    # The same sweep by two processes without Slurm, and without a kill.
    hosts = Hosts()
    try:
        reference = [sys.executable, "-m", "peer_jax", *command, f"--workdir={tmp_path / 'alone'}"]
        for process in hosts.start_all(reference, variables=dict(os.environ)):
            finish(process)
    finally:
        hosts.kill()
    ours, theirs = (rows(tmp_path / name) for name in ("sweep", "alone"))
    assert len(ours) == 3
    assert ours == theirs
    for run in ours:
        assert losses(tmp_path / "sweep" / run) == losses(tmp_path / "alone" / run)


def rows(folder):
    """The rows of a sweep by the names of their runs, without places and times."""
    left_out = ("directory", "sweep", "tokens_per_second", "wall_seconds")
    read = {row.run: vars(row) for row in results.read([folder])}
    return {run: {name: value for name, value in row.items() if name not in left_out} for run, row in read.items()}
