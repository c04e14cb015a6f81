"""Kills or stops a run up to six times at random moments, gives the same command again each time, and compares.

The run must end as one that was never interrupted: every loss and every number of its result, bit for bit.
"""

import functools
import random
import signal
import time
from pathlib import Path

import small
from small_runs import handles

GOOD = {"the same as never interrupted"}
STEPS = 120
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
BINDINGS = (f"Run.steps={STEPS}", "Run.checkpoint_every=10", "Run.evaluate_every=25", "Transformer.num_blocks=1")


@functools.cache
def never(folder: Path) -> Path:
    """A run that is not interrupted."""
    workdir = folder / "never"
    status, errors = small.end(small.start(small.command(folder, workdir, *BINDINGS), folder))
    assert status == 0, errors
    return workdir


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what the run has written to standard error."""
    expected, command = small.numbers(never(folder.parent)), small.command(folder.parent, folder, *BINDINGS)
    for _ in range(draw.randint(1, 6)):
        number, moment, pause = draw.choice(SIGNALS), draw.randrange(STEPS), draw.uniform(0.05, 6)
        process = small.start(command, folder.parent)
        if draw.random() < 0.5:
            small.wait_for_steps([process], folder, small.steps_logged(folder) + moment // 3)
        else:
            time.sleep(pause)
        has_begun = handles(process.pid, signal.SIGTERM)  # before, Python itself is starting
        process.send_signal(number)
        status, errors = small.end(process)
        stopped = -number if number == signal.SIGKILL else 128 + number
        if has_begun and (status not in (0, stopped) or "Traceback" in errors):
            return f"status {status} after {number.name}", errors
    status, errors = small.end(small.start(command, folder.parent))
    if status != 0:
        return f"NOT RESUMED, status {status}", errors
    return "the same as never interrupted" if small.numbers(folder) == expected else "OTHER NUMBERS", errors


if __name__ == "__main__":
    small.main(small.repeated(trial, GOOD), __doc__, GOOD, 20)
