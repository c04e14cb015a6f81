"""Signals a sweep, or kills one of its workers, at a random moment from its very start, and gives the command again.

A signal must end it with one sentence and status 128 + its number, or at once where nothing is to be saved; a killed
worker must cost its own run alone. The second command must finish every run.
"""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import small
from small_runs import sweep_config

GOOD = {"stopped with one sentence, then finished", "a worker was killed, then finished", "finished before the signal"}
RUNS = 4


def workers(process: subprocess.Popen) -> list[int]:
    """The worker processes of a sweep."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = children.read_text().split() if children.exists() else []
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what the sweep has written to standard error."""
    folder.mkdir()
    config = sweep_config(folder, small.tiny_config(folder.parent))
    command = [*small.PROGRAM, "sweep", f"--config={config}", f"--workdir={folder / 'runs'}", "--workers=2"]
    process = small.start(command, folder.parent)
    time.sleep(draw.choice((draw.uniform(0, 5), draw.uniform(0, 25))))
    number = draw.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
    killed = draw.choice(workers(process) or [0]) if number == signal.SIGKILL else 0
    if killed:
        os.kill(killed, number)
    elif number != signal.SIGKILL:
        process.send_signal(number)
    status, errors = small.end(process)
    how = "a worker was killed, then finished" if killed else "stopped with one sentence, then finished"
    if status == 0:
        how = "finished before the signal"
    elif status is None or "Traceback" in errors or status not in ({1} if killed else {128 + number, -number}):
        return f"status {status} after {number.name}", errors
    status, errors = small.end(small.start(command, folder.parent))
    finished = status == 0 and len(list(folder.glob("runs/*/result.json"))) == RUNS
    return how if finished else f"NOT FINISHED, status {status}", errors


if __name__ == "__main__":
    small.main(small.repeated(trial, GOOD), __doc__, GOOD, 15)
