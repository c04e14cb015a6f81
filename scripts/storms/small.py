"""What the storms share: a small run, the command that trains it, and their command line."""

import argparse
import collections
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hosts import flags, free_port  # noqa: E402
from small_runs import PROGRAM, losses, stack, start_process, tiny_config, without_times  # noqa: E402

Storm = Callable[[Path, random.Random, int], collections.Counter]


def main(storm: Storm, text: str, good: set[str], count: int, in_bucket: Storm | None = None) -> None:
    """Runs a storm from the command line and prints how its trials ended; exit status 1 if one did not end well.

    Args:
        storm: gets a folder, a source of random numbers and the number of trials, and counts how they end.
        text: what ``--help`` says.
        good: the ends that are as they should be.
        count: the number of trials by default.
        in_bucket: the same storm in a bucket, which ``--bucket`` chooses.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of what is random (default: 0)")
    parser.add_argument("--count", type=int, default=count, help=f"number of trials (default: {count})")
    if in_bucket is not None:
        parser.add_argument("--bucket", action="store_true", help="use a bucket (of an emulator) instead of a folder")
    given = parser.parse_args()
    storm = in_bucket if in_bucket is not None and given.bucket else storm
    with tempfile.TemporaryDirectory(prefix="storm-") as folder:
        ends = storm(Path(folder), random.Random(given.seed), given.count)
    for end, times in sorted(ends.items()):
        print(f"{times:6d}  {end}")
    bad = {end: times for end, times in ends.items() if end not in good}
    print(f"{sum(ends.values())} trials, seed {given.seed}: {sum(bad.values())} did not end well")
    sys.exit(1 if bad else 0)


def repeated(trial: Callable[[Path, random.Random], tuple[str, str]], good: set[str]) -> Storm:
    """A storm of trials, each of which gets a folder of its own and says how it ends and what was written there."""

    def storm(folder: Path, draw: random.Random, count: int) -> collections.Counter:
        tiny_config(folder)
        ends: collections.Counter = collections.Counter()
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C ends a storm, which tells what it has counted
            for number in range(count):
                how, errors = trial(folder / str(number), draw)
                say(number, how if how in good else f"{how}:\n{errors[-4000:]}")
                ends[how] += 1
        return ends

    return storm


def say(trial: int, what: str) -> None:
    """Tells on standard error how a trial ended."""
    print(f"trial {trial}: {what}", file=sys.stderr, flush=True)


def command(folder: Path, workdir: Path, *bindings: str, layer: str = "peer", also: tuple[str, ...] = ()) -> list[str]:
    """The command that trains the small run in ``workdir``, with its text in ``folder``."""
    found = [*PROGRAM, "train", "--quiet", "--no-table", f"--workdir={workdir}", *also]
    files = stack(tiny_config(folder), layer)
    return found + [f"--config={file}" for file in files] + [f"--set={binding}" for binding in bindings]


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen:
    """Starts a command on the CPU; programs that one has compiled are kept in ``folder`` for the others."""
    programs = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return start_process(command, PYTHONPATH=path, **programs, **variables)


def start_two(
    folder: Path,
    workdir: Path,
    *bindings: str,
    also: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()),
    **variables: str,
) -> list[subprocess.Popen]:
    """Starts the small run in two processes; ``also`` has the further arguments of each."""
    port = free_port()
    return [
        start(
            command(folder, workdir, *bindings, also=(*flags(host, port), *more)),
            folder,
            JAX_NUM_CPU_DEVICES="1",
            **variables,
        )
        for host, more in enumerate(also)
    ]


def numbers(workdir: Path) -> tuple[dict, dict]:
    """The losses and the result of a run, which another run of the same config must have bit for bit."""
    return losses(workdir), without_times(json.loads((workdir / "result.json").read_text()))


def steps_logged(workdir: Path) -> int:
    """How many lines a run has logged."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_steps(processes: list[subprocess.Popen], workdir: Path, steps: int) -> None:
    """Waits until a run has logged so many lines, or one of its processes has ended."""
    while steps_logged(workdir) < steps and all(process.poll() is None for process in processes):
        time.sleep(0.002)


def end(process: subprocess.Popen, timeout: float = 300) -> tuple[int | None, str]:
    """Exit status and standard error of a process; None if it had to be killed after the timeout."""
    try:
        _, errors = process.communicate(timeout=timeout)
        return process.returncode, errors
    except subprocess.TimeoutExpired:
        process.kill()
        return None, process.communicate()[1]


def sentence(errors: str) -> str:
    """What is wrong with what a command says when it ends: its last line must be one sentence; empty if nothing is."""
    lines = errors.splitlines()
    if "Traceback" in errors:
        return "a traceback"
    if not lines or not lines[-1].startswith("peer-jax: "):
        return "the last line is not the sentence"
    return "" if len(lines) <= 20 else "more than 20 lines"
