"""A process that measures a single case, so that its memory is that of the case and libraries don't mix.

The parent writes lines to the standard input of the process: the case, then "sample" for each sample. The process
answers in lines of JSON.
"""

import dataclasses
import gc
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from peer_jax.bench.cases import PYTORCH, PYTORCH_KEEPING, Case
from peer_jax.errors import InputError
from peer_jax.ops.floor import Floor
from peer_jax.startup import accelerators, keep_freed_memory, leave_out_libtpu, return_freed_memory


class Worker:
    """Handle of such a process; close it in the end. ``answer`` is what the process found out about the case."""

    def __init__(self, case: Case, results: Path) -> None:
        # The process imports the module of a layer from where this process imports it.
        places = os.pathsep.join(place or os.getcwd() for place in sys.path)
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": places}
        self.case, self.results_file = case, results
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from peer_jax.bench.worker import main; main()", str(results)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        try:
            self.answer = self._ask(json.dumps(_sent(case)))
        except BaseException:
            self.close()
            raise
        self.floors = {order: floor and Floor(**floor) for order, floor in self.answer["floors"].items()}

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
        """Seconds per call."""
        return self._ask("sample")

    def results(self) -> dict[str, np.ndarray]:
        """The results of a program that is compared with another; nothing for other programs."""
        return dict(np.load(self.results_file)) if self.results_file.exists() else {}

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.communicate()


def _sent(case: Case) -> dict[str, Any]:
    """The case as plain values, with the module and the name of its layer's class."""
    layer = case.layer
    return case.described() | {"layer": None if layer is None else [layer.__module__, layer.__qualname__]}


def _received(sent: dict[str, Any]) -> Case:
    """Makes the case again from what ``_sent`` returned.

    Raises:
        InputError: if another process can't import the class.
    """
    if sent["layer"] is not None:
        module, name = sent["layer"]
        try:
            sent["layer"] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            raise InputError(
                f"{name} of {module} can't be imported by the process that measures it: define the class at the top "
                "of a module"
            ) from None
    return Case(**sent)


def resident(what: str) -> int | None:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak since the last reset; None if the system doesn't tell."""
    try:
        found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def peak_of(call: Any) -> tuple[int | None, int | None]:
    """How many bytes the process grows by at the peak of a call, and the size of the process at that peak."""
    gc.collect()
    return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    except OSError:
        return None, None
    before = resident("VmRSS")
    call()
    peak = resident("VmHWM")
    return None if before is None or peak is None else max(0, peak - before), peak


def main() -> None:
    """What the process runs: it reads a case, then answers each "sample" with the seconds per call."""
    pipe, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    os.dup2(2, 1)  # whatever else is printed does not mix with the answers

    def answer(value: Any) -> None:
        print(json.dumps(value), file=pipe, flush=True)

    sent = json.loads(sys.stdin.readline())
    if sent["implementation"] != PYTORCH and not accelerators():
        keep_freed_memory()
    import jax

    leave_out_libtpu()

    from peer_jax.bench import programs, pytorch
    from peer_jax.bench.timing import sampler

    try:
        case = _received(sent)
        program = (pytorch if case.implementation in (PYTORCH, PYTORCH_KEEPING) else programs).program(case)
    except InputError as error:
        answer({"refused": str(error)})
        return
    if program.results:
        np.savez(sys.argv[1], **program.results())
    sample = sampler(program.call)
    extra, peak = peak_of(lambda: jax.block_until_ready(program.call()))
    floors = {order: floor and dataclasses.asdict(floor) for order, floor in program.floors.items()}
    memory = {"memory": program.memory, "state": program.state, "extra_memory": extra, "process_peak": peak}
    answer({"floors": floors, "measured": memory})
    for _ in sys.stdin:
        answer(sample())
