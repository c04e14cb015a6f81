"""Kills, stops or misleads one of two processes that train together, and gives the same commands again.

Both must end within a minute, the other with one sentence that names the cause; the same commands must then finish it.
"""

import json
import os
import random
import signal
from pathlib import Path

import small
from small_runs import children

STEPS = 120
BINDINGS = (f"Run.steps={STEPS}", "Run.batch_size=8", "Run.checkpoint_every=10", "Transformer.num_blocks=1")
KILLED, STOPPED, REFUSED = (f"{how}, then finished" for how in ("one killed", "one stopped", "one refused its config"))
GOOD = {KILLED, STOPPED, REFUSED}


def trial(folder: Path, draw: random.Random) -> tuple[str, str]:
    """How a trial ends, and what both processes have written to standard error."""
    how, one = draw.choice(sorted(GOOD)), draw.randrange(2)
    also = [(), ()]
    if how == REFUSED:
        also[one] = ("--set=Run.stepz=6",)
    processes = small.start_two(folder.parent, folder, *BINDINGS, also=tuple(also))
    if how != REFUSED:
        small.wait_for_steps(processes, folder, draw.randint(1, STEPS - 20))
        number = signal.SIGKILL if how == KILLED else draw.choice((signal.SIGTERM, signal.SIGINT))
        pid = processes[one].pid
        os.kill(draw.choice([pid, *children(pid)] if number == signal.SIGKILL else [pid]), number)
    ends = [small.end(process, timeout=60) for process in processes]
    errors = "\n".join(f"process {host}: status {status}\n{said}" for host, (status, said) in enumerate(ends))
    allowed = {KILLED: {os.EX_TEMPFAIL}, STOPPED: {128 + signal.SIGTERM, 128 + signal.SIGINT}, REFUSED: {2}}[how]
    other_status, other_said = ends[1 - one]
    if None in (ends[0][0], ends[1][0]):
        return "HUNG", errors
    if other_status not in allowed:
        return f"{how}: the other has status {other_status}", errors
    if fault := small.sentence(other_said):
        return f"{how}: {fault}", errors
    ends = [small.end(process) for process in small.start_two(folder.parent, folder, *BINDINGS)]
    if [status for status, _ in ends] != [0, 0] or json.loads((folder / "result.json").read_text())["steps"] != STEPS:
        return "NOT RESUMED", "\n".join(said for _, said in ends)
    return how, errors


if __name__ == "__main__":
    small.main(small.repeated(trial, GOOD), __doc__, GOOD, 15)
