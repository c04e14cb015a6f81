"""Kills processes of two slices that share a sweep, one process or a whole slice at a time, and starts them again.

A slice is two processes that train each run together. When one is killed, the other must end within a minute. When all
runs are finished, each must have the numbers of a sweep that nobody has disturbed, bit for bit; must not have been
touched again once it was finished; and must not have been begun more often than kills explain.

With ``--bucket``, the sweep is in a bucket of an emulator, and each slice that is started is on a machine of its own
as far as it can tell: what a killed slice had is taken over once its lease is stale.
"""

import collections
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import small
from bucket import emulated
from hosts import flags, free_port
from small_runs import PROGRAM, children, sweep_config

from peer_jax import storage
from peer_jax.lease import Holder
from peer_jax.run_directory import RunDirectory

ONE, WHOLE, ROUND = "one process killed, its slice ended", "a whole slice killed", "all runs as if undisturbed"
GOOD = {ONE, WHOLE, ROUND}
SLICES = 2
KILLS_IN_A_ROUND = 6
SWEEP = ("Sweep.methods=('peer',)", "Sweep.budgets=(1e8,2e8)", "Sweep.seeds=(0,1)")
RUNS = [f"peer-d8-{budget}-seed{seed}" for budget in ("1e8", "2e8") for seed in (0, 1)]
NAMED = "import socket; socket.gethostname = lambda: {!r}; from peer_jax.__main__ import main; main()"


class Slice:
    """Two processes that train the runs of a sweep together."""

    def __init__(self, folder: Path, workdir: storage.AnyPath) -> None:
        config, port = sweep_config(folder, small.tiny_config(folder)), free_port()
        named = (sys.executable, "-c", NAMED.format(f"machine-{port}"))
        command = [*(named if storage.is_in_bucket(workdir) else PROGRAM), "sweep", f"--config={config}"]
        command += [f"--workdir={workdir}", "--stale=8"]
        command += [f"--set={binding}" for binding in SWEEP]
        self.processes = [
            small.start([*command, *flags(host, port)], folder, JAX_NUM_CPU_DEVICES="1") for host in range(2)
        ]

    def has_ended(self) -> bool:
        """Whether a process has ended."""
        return any(process.poll() is not None for process in self.processes)

    def ends(self, timeout: float) -> tuple[list[int | None], str]:
        """Statuses of the processes, None for one that had to be killed after the timeout, and what they have said."""
        ends = [small.end(process, timeout) for process in self.processes]
        return [status for status, _ in ends], "\n".join(said for _, said in ends)


def family(process: subprocess.Popen) -> list[int]:
    """A command, which is the parent of the process that trains, and that process."""
    return [process.pid, *children(process.pid)]


def kill(one: Slice, draw: random.Random) -> str:
    """Kills a process of a slice, its parent or its child, or all processes of the slice; which of these it was."""
    how = draw.choice((ONE, WHOLE))
    if how == ONE:
        victims = [draw.choice(family(draw.choice(one.processes)))]
    else:
        victims = [pid for process in one.processes for pid in family(process)]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    return how


def begun(workdir: storage.AnyPath) -> int:
    """How often runs were begun or went on: each time leaves a file of TensorBoard events.

    In a bucket, a run that was killed before its first checkpoint has left none.
    """
    return len(list(workdir.glob("*/tensorboard/*")))


def written(workdir: storage.AnyPath) -> dict[str, int]:
    """The runs that have a result, with what would change if it was written again."""
    found = {name: version(workdir / name / "result.json") for name in RUNS}
    return {name: version for name, version in found.items() if version is not None}


def version(path: storage.AnyPath) -> int | None:
    """The generation of an object, or when a file was written; None if there is none."""
    if storage.is_in_bucket(path):
        blob = storage.blob(path)
        found = blob.bucket.get_blob(blob.name)
        return found and found.generation
    return path.stat().st_mtime_ns if path.exists() else None


def held(workdir: storage.AnyPath) -> set[tuple[str, Holder]]:
    """The runs that somebody has, and who."""
    found = {name: RunDirectory(workdir / name).holder() for name in RUNS}
    return {(name, holder) for name, holder in found.items() if holder is not None}


class Takeovers(threading.Thread):
    """Measures how long it takes until somebody else has a run of a killed slice."""

    def __init__(self, workdir: storage.AnyPath) -> None:
        super().__init__(daemon=True)
        self._workdir, self._ended = workdir, threading.Event()
        self._since: dict[tuple[str, Holder], float] = {}
        self._lost: list[tuple[str, Holder, float]] = []

    def run(self) -> None:
        """Looks all the time who has the runs."""
        while not self._ended.wait(0.5):
            for pair in held(self._workdir):
                self._since.setdefault(pair, time.monotonic())

    def killing(self, one: Slice) -> None:
        """Notes what a slice has that is about to be killed."""
        processes = {pid for process in one.processes for pid in family(process)}
        lost = [pair for pair in held(self._workdir) if pair[1].process in processes]
        self._lost += [(*pair, time.monotonic()) for pair in lost]

    def seconds(self) -> list[float]:
        """The times until now, without those of runs that nobody has taken over."""
        self._ended.set()
        self.join()
        return [min(after) for lost in self._lost if (after := self._claimed(*lost))]

    def _claimed(self, run: str, before: Holder, killed: float) -> list[float]:
        """After how many seconds others were first seen to have a run whose holder was killed."""
        claims = [since for (name, holder), since in self._since.items() if name == run and holder != before]
        return [since - killed for since in claims if since > killed]


def a_round(
    folder: Path, workdir: storage.AnyPath, undisturbed: Path, kills: int, draw: random.Random
) -> collections.Counter:
    """A sweep by two slices, with so many kills at most; how each kill and the sweep have ended."""
    ends: collections.Counter = collections.Counter()
    slices = [Slice(folder, workdir) for _ in range(SLICES)]
    first_written: dict[str, int] = {}
    takeovers = Takeovers(workdir)
    takeovers.start()

    def note(how: str, said: str = "") -> None:
        ends[how] += 1
        small.say(sum(ends.values()), how if how in GOOD else f"{how}:\n{said[-4000:]}")

    next_kill = time.monotonic() + draw.uniform(5, 40)
    while not all(one.has_ended() for one in slices):
        time.sleep(0.2)
        first_written = written(workdir) | first_written
        if time.monotonic() < next_kill or kills == 0:
            continue
        kills -= 1
        number = draw.randrange(SLICES)
        if slices[number].has_ended():
            continue
        takeovers.killing(slices[number])
        how = kill(slices[number], draw)
        statuses, said = slices[number].ends(60)
        note("HUNG" if None in statuses else how, said)
        slices[number] = Slice(folder, workdir)
        next_kill = time.monotonic() + draw.uniform(5, 40)
    for one in slices:
        statuses, said = one.ends(300)
        if statuses != [0, 0]:
            note(f"a slice ended with {statuses}", said)
    if first_written != written(workdir) or sorted(first_written) != RUNS:
        note("A RUN IS MISSING, OR WAS WRITTEN TWICE", f"{first_written} {written(workdir)}")
    elif begun(workdir) > len(RUNS) + ends[ONE] + ends[WHOLE]:
        note("A RUN WAS TRAINED TWICE", str(begun(workdir)))
    elif any(small.numbers(workdir / name) != small.numbers(undisturbed / name) for name in RUNS):
        note("OTHER NUMBERS")
    else:
        note(ROUND)
    seconds = " ".join(f"{seconds:.1f}" for seconds in takeovers.seconds())
    small.say(sum(ends.values()), f"seconds from a kill until somebody else had the run: {seconds}")
    return ends


def storm(folder: Path, draw: random.Random, count: int, place: storage.AnyPath | None = None) -> collections.Counter:
    """Rounds, in a place of their own or in ``folder``, until so many kills have been made; how they have ended."""
    place = place or folder
    statuses, said = Slice(folder, folder / "undisturbed").ends(1200)
    assert statuses == [0, 0], said
    ends: collections.Counter = collections.Counter()
    while (left := count - ends[ONE] - ends[WHOLE]) > 0 and not ends.keys() - GOOD:
        workdir = place / f"round-{ends[ROUND]}"
        ends += a_round(folder, workdir, folder / "undisturbed", min(left, KILLS_IN_A_ROUND), draw)
    return ends


def in_bucket(folder: Path, draw: random.Random, count: int) -> collections.Counter:
    """The same in a bucket."""
    with emulated() as address:
        return storm(folder, draw, count, storage.place(address))


if __name__ == "__main__":
    small.main(storm, __doc__, GOOD, 20, in_bucket)
