"""Signals a sweep, or kills one of its workers, at a random moment from its very start, and gives the command again.

A signal must end it with one sentence and status 128 + its number, unless Python itself is still starting; a killed
worker must cost its own run alone. The second command must finish every run.
"""

import os
import random
import signal
import time
from pathlib import Path

import small
from small_runs import PROGRAM, handles, sweep_config, workers

STOPPED, KILLED = "stopped with one sentence, then finished", "a worker was killed, then finished"
TOO_EARLY, TOO_LATE = "ended while Python was starting, then finished", "finished before the signal"
GOOD = {STOPPED, KILLED, TOO_EARLY, TOO_LATE}
RUNS = 4


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what the sweep has written to standard error."""
    folder.mkdir()
    config = sweep_config(folder, small.tiny_config(folder.parent))
    command = [*PROGRAM, "sweep", f"--config={config}", f"--workdir={folder / 'runs'}", "--workers=2"]
    process = small.start(command, folder.parent)
    time.sleep(draw.choice((draw.uniform(0.05, 5), draw.uniform(0.05, 25))))
    number = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
    has_begun = handles(process.pid, signal.SIGTERM)
    killed = draw.choice(workers(process.pid) or [0]) if number == signal.SIGKILL else 0
    if killed:
        os.kill(killed, number)
    elif number != signal.SIGKILL:
        process.send_signal(number)
    status, errors = small.end(process)
    if status == 0:
        how = TOO_LATE
    elif killed:
        how = KILLED if status == 1 and "Traceback" not in errors else f"status {status} after its worker was killed"
    elif status == 128 + number and not small.sentence(errors):
        how = STOPPED
    else:
        how = f"status {status} after {number.name}" if has_begun else TOO_EARLY
    if how not in GOOD:
        return how, errors
    status, errors = small.end(small.start(command, folder.parent))
    finished = status == 0 and len(list(folder.glob("runs/*/result.json"))) == RUNS
    return how if finished else f"NOT FINISHED, status {status}", errors


if __name__ == "__main__":
    small.main(small.repeated(trial, GOOD), __doc__, GOOD, 15)
