"""A case in a process of its own, which measures when it is told to: for memory, and for libraries that don't mix.

The parent writes lines to its standard input: the case, then "sample" for each sample. It answers in lines of JSON.
"""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peer_jax.allocator import keep_freed_memory, return_freed_memory
from peer_jax.bench.cases import PYTORCH, PYTORCH_KEEPING, Case
from peer_jax.errors import InputError
from peer_jax.ops.floor import Floor


class Worker:
    """Handle of such a process, to be closed. ``answer`` is what it said of the case."""

    def __init__(self, case: Case, results: Path) -> None:
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.case, self.results_file = case, results
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from peer_jax.bench.worker import main; main()", str(results)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self.answer = self._ask(json.dumps(dataclasses.asdict(case)))
        except BaseException:
            self.close()
            raise
        self.floors = {order: Floor(**floor) for order, floor in self.answer["floors"].items()}

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            status = self.process.wait()
            raise InputError(
                f"the process that measures {self.case.name} {self.case.sizes} with {self.case.implementation} ended "
                f"with status {status}{' (out of memory?)' if status == -9 else ''}: choose smaller sizes"
            )
        found = json.loads(answer)
        if isinstance(found, dict) and "refused" in found:
            raise InputError(found["refused"])
        return found

    def sample(self) -> float:
        """Seconds of a call."""
        return self._ask("sample")

    def results(self) -> dict[str, np.ndarray]:
        """What the program computed, if it is to be compared."""
        return dict(np.load(self.results_file)) if self.results_file.exists() else {}

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def resident(what: str) -> int | None:
    """Bytes of the process: "VmRSS" now, "VmHWM" at the peak since it was reset; None where Linux doesn't tell."""
    try:
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak_of(call: Any) -> tuple[int | None, int | None]:
    """Bytes that the process grows by during a call, at its peak; and its size at that peak."""
    gc.collect()
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size
    except OSError:
        return None, None
    before = resident("VmRSS")
    call()
    peak = resident("VmHWM")
    return None if before is None or peak is None else max(0, peak - before), peak


def main() -> None:
    """The process."""
    pipe, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # whatever else is printed does not meet the answers

    def answer(value: Any) -> None:
        print(json.dumps(value), file=pipe, flush=True)

    case = Case(**json.loads(sys.stdin.readline()))
    if case.implementation != PYTORCH:
        keep_freed_memory()
    import jax

    from peer_jax.bench import programs, pytorch
    from peer_jax.bench.timing import sampler

    try:
        program = (pytorch if case.implementation in (PYTORCH, PYTORCH_KEEPING) else programs).program(case)
    except InputError as error:
        answer({"refused": str(error)})
        return
    if program.results:
        np.savez(sys.argv[1], **program.results())
    sample = sampler(program.call)
    extra, peak = peak_of(lambda: jax.block_until_ready(program.call()))
    floors = {order: dataclasses.asdict(floor) for order, floor in program.floors.items()}
    answer({"floors": floors, "memory": program.memory, "extra_memory": extra, "process_peak": peak})
    for _ in sys.stdin:
        answer(sample())
