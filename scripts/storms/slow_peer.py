"""Makes one of two processes wait for longer than Gloo's timeout at a random moment of a run.

The other must wait for it, and the run must end with the numbers of one in which no process waited.
"""

import functools
import os
import random
from pathlib import Path

import small

GOOD = "the same numbers as without waiting"
MOMENTS = ("import", "compile", "batch", "evaluate", "restore", "save", "result")
SECONDS = float(os.environ.get("SLUGGISH_SECONDS", "40"))  # Gloo's own timeout is 30
BINDINGS = ("Run.steps=12", "Run.batch_size=8", "Run.checkpoint_every=5", "Run.evaluate_every=4")


def run(folder: Path, workdir: Path, sluggish: str) -> tuple[list[int | None], str]:
    """Exit statuses of both processes, and what they have written to standard error."""
    also = (("--import=scripts.storms.sluggish",),) * 2
    processes = small.start_two(folder, workdir, *BINDINGS, also=also, SLUGGISH=sluggish)
    ends = [small.end(process, timeout=600) for process in processes]
    return [status for status, _ in ends], "\n".join(said for _, said in ends)


@functools.cache
def never(folder: Path) -> tuple[dict, dict]:
    """The numbers of a run in which no process waits."""
    statuses, errors = run(folder, folder / "never", "none:-1:0")
    assert statuses == [0, 0], errors
    return small.numbers(folder / "never")


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what both processes have written to standard error."""
    expected, moment, one = never(folder.parent), draw.choice(MOMENTS), draw.randrange(2)
    statuses, errors = run(folder.parent, folder, f"{moment}:{one}:{SECONDS}")
    if statuses != [0, 0]:
        return f"process {one} waits at {moment}: statuses {statuses}", errors
    return (GOOD if small.numbers(folder) == expected else f"OTHER NUMBERS, waited at {moment}"), errors


if __name__ == "__main__":
    small.main(small.repeated(trial, {GOOD}), __doc__, {GOOD}, 7)
