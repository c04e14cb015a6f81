"""Fills the disk of a run at a random moment, frees it after the run has ended, and gives the same command again.

The run must end with one sentence, and the second command must finish it. Needs the right to mount a tmpfs.
"""

import contextlib
import json
import os
import random
import subprocess
from pathlib import Path

import small

GOOD = {"one sentence, then finished", "finished although the disk was full"}
STEPS = 120


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
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


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what the run has written to standard error."""
    with small_disk(folder / "disk", 16):
        workdir = folder / "disk" / "run"
        command = small.command(folder.parent, workdir, f"Run.steps={STEPS}", "Run.checkpoint_every=10")
        moment, leave = draw.randrange(STEPS), draw.choice((0, 0, 4096, 2**16, 2**20))
        process = small.start(command, folder.parent)
        small.wait_for_steps([process], workdir, moment)
        filler = fill(folder / "disk", leave)
        status, errors = small.end(process)
        if status == 0:
            return "finished although the disk was full", errors
        if status is None:
            return "HUNG", errors
        if fault := small.sentence(errors):
            return f"status {status}, {fault}", errors
        filler.unlink()
        status, errors = small.end(small.start(command, folder.parent))
        finished = status == 0 and json.loads((workdir / "result.json").read_text())["steps"] == STEPS
        return "one sentence, then finished" if finished else f"NOT RESUMED, status {status}", errors


if __name__ == "__main__":
    small.main(small.repeated(trial, GOOD), __doc__, GOOD, 20)
