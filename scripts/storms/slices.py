"""Kills processes of two slices that share a sweep, one process or a whole slice at a time, and starts them again.

A slice is two processes that train each run together. When one is killed, the other must end within a minute. When all
runs are finished, each must have the numbers of a sweep that nobody has disturbed, bit for bit; must not have been
touched again once it was finished; and must not have been begun more often than kills explain.
"""

import collections
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import small
from hosts import flags, free_port
from small_runs import PROGRAM, children, sweep_config

ONE, WHOLE, ROUND = "one process killed, its slice ended", "a whole slice killed", "all runs as if undisturbed"
GOOD = {ONE, WHOLE, ROUND}
SLICES = 2
KILLS_IN_A_ROUND = 6
SWEEP = ("Sweep.methods=('peer',)", "Sweep.budgets=(2e8,4e8)", "Sweep.seeds=(0,1)")
RUNS = [f"peer-d8-{budget}-seed{seed}" for budget in ("2e8", "4e8") for seed in (0, 1)]


class Slice:
    """Two processes that train the runs of a sweep together."""

    def __init__(self, folder: Path, workdir: Path) -> None:
        config, port = sweep_config(folder, small.tiny_config(folder)), free_port()
        command = [*PROGRAM, "sweep", f"--config={config}", f"--workdir={workdir}", "--stale=8"]
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


def begun(workdir: Path) -> int:
    """How often runs were begun or went on: each time leaves a file of TensorBoard events."""
    return len(list(workdir.glob("*/tensorboard/*")))


def written(workdir: Path) -> dict[str, int]:
    """When the result of each finished run was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in workdir.glob("*/result.json")}


def a_round(folder: Path, workdir: Path, undisturbed: Path, kills: int, draw: random.Random) -> collections.Counter:
    """A sweep by two slices, with so many kills at most; how each kill and the sweep have ended."""
    ends: collections.Counter = collections.Counter()
    slices = [Slice(folder, workdir) for _ in range(SLICES)]
    first_written: dict[str, int] = {}

    def note(how: str, said: str = "") -> None:
        ends[how] += 1
        small.say(sum(ends.values()), how if how in GOOD else f"{how}:\n{said[-4000:]}")

    next_kill = time.monotonic() + draw.uniform(5, 60)
    while not all(one.has_ended() for one in slices):
        time.sleep(0.05)
        first_written = written(workdir) | first_written
        if time.monotonic() < next_kill or kills == 0:
            continue
        kills -= 1
        number = draw.randrange(SLICES)
        if slices[number].has_ended():
            continue
        how = kill(slices[number], draw)
        statuses, said = slices[number].ends(60)
        note("HUNG" if None in statuses else how, said)
        slices[number] = Slice(folder, workdir)
        next_kill = time.monotonic() + draw.uniform(5, 60)
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
    return ends


def storm(folder: Path, draw: random.Random, count: int) -> collections.Counter:
    """Rounds until so many kills have been made; how they have ended."""
    statuses, said = Slice(folder, folder / "undisturbed").ends(600)
    assert statuses == [0, 0], said
    ends: collections.Counter = collections.Counter()
    while (left := count - ends[ONE] - ends[WHOLE]) > 0 and not ends.keys() - GOOD:
        workdir = folder / f"round-{ends[ROUND]}"
        ends += a_round(folder, workdir, folder / "undisturbed", min(left, KILLS_IN_A_ROUND), draw)
    return ends


if __name__ == "__main__":
    small.main(storm, __doc__, GOOD, 20)
