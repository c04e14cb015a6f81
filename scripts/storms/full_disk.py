"""Fills the disk of a run at a random moment, frees it after the run has ended, and gives the same command again.

The run has one process or two. Each must end with one sentence, and the second command must finish the run with the
numbers of one that was never interrupted. Needs the right to mount a tmpfs.
"""

import contextlib
import functools
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import small

STEPS = 120
BINDINGS = (f"Run.steps={STEPS}", "Run.batch_size=8", "Run.checkpoint_every=10")
RESUMED, NOT_ENDED = "one sentence, then finished", "finished although it was full"
GOOD = {f"{count}: {how}" for count in (1, 2) for how in (RESUMED, NOT_ENDED)}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of so many megabytes at ``folder``."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Takes all space but ``leave`` bytes."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


def start(folder: Path, workdir: Path, count: int) -> list[subprocess.Popen]:
    """Starts the run in so many processes."""
    if count == 2:
        return small.start_two(folder, workdir, *BINDINGS)
    return [small.start(small.command(folder, workdir, *BINDINGS), folder)]


@functools.cache
def never(folder: Path, count: int) -> tuple[dict, dict]:
    """The numbers of a run that is not interrupted."""
    workdir = folder / f"never by {count}"
    for process in start(folder, workdir, count):
        status, errors = small.end(process)
        assert status == 0, errors
    return small.numbers(workdir)


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what the run has written to standard error."""
    count = draw.choice((1, 2))
    expected = never(folder.parent, count)
    with small_disk(folder / "disk", 16):
        workdir = folder / "disk" / "run"
        moment, leave = draw.randrange(STEPS), draw.choice((0, 0, 4096, 2**16, 2**20))
        processes = start(folder.parent, workdir, count)
        small.wait_for_steps(processes, workdir, moment)
        filler = fill(folder / "disk", leave)
        ends = [small.end(process, timeout=120) for process in processes]
        errors = "\n".join(f"status {status}\n{said}" for status, said in ends)
        if [status for status, _ in ends] == [0] * count:
            return f"{count}: {NOT_ENDED}", errors
        for status, said in ends:
            if status in (None, 0):
                return f"{count}: status {status}", errors
            if fault := small.sentence(said):
                return f"{count}: status {status}, {fault}", errors
        filler.unlink()
        ends = [small.end(process) for process in start(folder.parent, workdir, count)]
        errors += "\n".join(said for _, said in ends)
        if [status for status, _ in ends] != [0] * count:
            return f"{count}: NOT RESUMED", errors
        return f"{count}: {RESUMED if small.numbers(workdir) == expected else 'OTHER NUMBERS'}", errors


if __name__ == "__main__":
    small.main(small.repeated(trial, GOOD), __doc__, GOOD, 20)
