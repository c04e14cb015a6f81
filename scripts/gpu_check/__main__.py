"""Checks and times the ops and the model on this machine's GPU: one table, in at most 8 minutes.

`scripts/gpu_check.sh` calls it.

Each part is a process with a time limit, so that a part that fails or hangs costs only its own rows. Writes table.txt
and rows.json again whenever a part ends. The exit status is 1 if a target was missed or a part failed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
TOTAL = 475  # seconds, a few of which go to processes that must be killed
PATIENCE = 4  # smoke mode, which runs on busy machines, may take this many times as long
LOSS_TOLERANCE = 2**-8  # a rounding to bfloat16; the errors of tokens and layers even out in the mean over all tokens
SPEED_UP = 5.0  # target: how many times faster than "reference" the forward pass is
COLUMNS = ("part", "case", "implementation", "what", "result", "target", "verdict")


@dataclasses.dataclass(frozen=True)
class Part:
    """Runs a module of this package with ``words`` as arguments.

    ``seconds`` are kept for it; it may also take what the parts before it have left over. ``smokes``: whether it runs
    without a GPU, where the kernels are interpreted and there is no cuDNN.
    """

    module: str
    words: tuple[str, ...]
    seconds: int
    smokes: bool = True


# Parts that run at once, one group after the other, the most important ones first. Most want the GPU for themselves,
# for their times or for their memory.
GROUPS = [
    [
        Part("correctness", ("mosaic_gpu",), 120),
        Part("correctness", ("xla", "reference"), 120),
    ],
    [Part("speed", ("ops", "mosaic_gpu"), 70)],
    [Part("speed", ("step", "mosaic_gpu", "cudnn"), 30)],
    [Part("model", ("layer",), 35)],
    [Part("speed", ("step", "xla", "cudnn"), 25, smokes=False)],
    [Part("speed", ("step", "xla", "xla"), 25, smokes=False)],
    [Part("correctness", ("mosaic_gpu", "large"), 30, smokes=False)],
    [Part("model", ("attention",), 30)],
    [Part("pytorch", (), 45)],
    [Part("speed", ("ops", "xla"), 40)],
    [Part("speed", ("ops", "reference"), 20)],
]
RUNNING: list[subprocess.Popen] = []


def run(part: Part, limit: float, smoke: bool) -> list[dict]:
    """The rows that the part printed within ``limit`` seconds; one says how long it took, or what went wrong."""
    label = " ".join((part.module, *part.words))
    command = [sys.executable, "-m", f"gpu_check.{part.module}", *part.words, *(["--smoke"] if smoke else [])]
    start = time.monotonic()
    # In a session of its own, so that it can be killed together with the processes that it started: as long as one of
    # these holds the pipe, `communicate` waits.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=setting(), start_new_session=True
    )
    RUNNING.append(process)
    try:
        out, err = process.communicate(timeout=limit)
        problem = None if process.returncode == 0 else f"ended with {process.returncode}: {last_line(err)}"
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        problem = f"stopped after {limit:.0f} s; the rows above are from before"
    RUNNING.remove(process)
    rows = [row for line in out.splitlines() if (row := parse(line)) is not None]
    taken = f"{time.monotonic() - start:.0f} of {limit:.0f} s"
    if problem:
        print(err[-4000:], file=sys.stderr)
    result, passed = (problem, "FAIL") if problem else (f"ended after {taken}", "pass")
    cells = ("parts", label, "", "the process", result, "ends", passed)
    print(f"{label}: {taken}, {len(rows)} rows", file=sys.stderr, flush=True)
    return [*rows, dict(zip(COLUMNS, cells, strict=True))]


def setting() -> dict[str, str]:
    """The environment of a part, in which it finds this package, peer_jax, and stand-ins for what is not installed."""
    paths = [SCRIPTS, SCRIPTS.parent]
    if importlib.util.find_spec("jaxtyping") is None:
        paths.append(SCRIPTS / "gpu_check" / "stand_ins")
    return {
        # Leaves memory to PyTorch, and lets the allocator's peak say what was used.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "JAX_TRACEBACK_FILTERING": "off",  # so that the last line of a traceback is the error
    }


def kill(process: subprocess.Popen) -> None:
    """Kills a part and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def parse(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # something that a library printed
        return None
    return row if isinstance(row, dict) and "part" in row else None


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it said nothing"])[-1][:160]


def speed_ups(rows: list[dict], smoke: bool) -> list[dict]:
    """How many times faster the kernels are than each other implementation, in the cases where both were timed."""
    times = {(row["case"], row["what"], row["implementation"]): row["seconds"] for row in rows if "seconds" in row}
    found = []
    for (case, direction, implementation), taken in times.items():
        if implementation != "mosaic_gpu":
            continue
        for other in ("reference", "xla", "pytorch eager", "pytorch compiled", "PEER-pytorch"):
            if (slow := times.get((case, direction, other))) is not None:
                is_target = other == "reference" and direction == "forward" and not smoke
                target, verdict = "", ""
                if is_target:
                    target, verdict = f">= {SPEED_UP:g}x", "pass" if slow / taken >= SPEED_UP else "FAIL"
                part = "layer" if case.startswith("PEER") else "speed"
                cells = (part, case, implementation, f"{direction}: over {other}", f"{slow / taken:.2f}x")
                found.append(dict(zip(COLUMNS, (*cells, target, verdict), strict=True)))
    return found


def first_losses(rows: list[dict]) -> list[dict]:
    """How far the first loss of a step is from that of the plain one, which has the same parameters and tokens."""
    losses = {row["implementation"]: row for row in rows if "first_loss" in row}
    plain = losses.get("xla, attention xla")
    found = []
    for implementation, row in losses.items():
        if plain is not None and row is not plain:
            error = abs(row["first_loss"] / plain["first_loss"] - 1)
            cells = ("step", row["case"], implementation, "first loss against xla, attention xla", f"{error:.1e}")
            passed = "pass" if error <= LOSS_TOLERANCE else "FAIL"
            found.append(dict(zip(COLUMNS, (*cells, f"<= {LOSS_TOLERANCE:.1e}", passed), strict=True)))
    return found


def environment() -> dict:
    """The GPU and the versions of packages, which the figures depend on."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch", "triton"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu = "no nvidia-smi"
    return {"gpu": gpu, "versions": versions, "xla_flags": os.environ.get("XLA_FLAGS", "")}


def table(rows: list[dict]) -> str:
    lines = [COLUMNS, *(tuple(str(row[column]) for column in COLUMNS) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(text) + "\n"


def write(folder: Path, machine: dict, rows: list[dict], took: float) -> str:
    """Writes both files; returns the text of the table."""
    order = ["machine", "expert_mix", "value_bag", "product_key_top_k", "cross_entropy", "speed", "top_k", "attention"]
    order += ["layer", "step", "memory", "parts"]
    rows = sorted(rows, key=lambda row: (order.index(row["part"]), natural(row["case"])))
    verdicts = [row["verdict"] for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    summary = f"{verdicts.count('pass')} passed, {verdicts.count('FAIL')} failed, {took:.0f} s"
    text = f"{machine['gpu']}; {versions}\n\n{table(rows)}\n{summary}\n"
    (folder / "table.txt").write_text(text)
    (folder / "rows.json").write_text(json.dumps(machine | {"seconds": took, "rows": rows}, indent=1) + "\n")
    return text


def natural(text: str) -> list:
    """A key that sorts 4096 before 16384."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", default=os.environ.get("OUT", "gpu_check"))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on any backend, kernels interpreted")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup, SIGHUP stays ignored
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    folder = Path(arguments.directory)
    folder.mkdir(parents=True, exist_ok=True)
    start, machine, rows = time.monotonic(), environment() | {"smoke": arguments.smoke}, []
    groups, total = GROUPS, TOTAL
    if arguments.smoke:  # the times mean nothing, so all parts are one group, of which two run at once
        groups, total = [[part for group in GROUPS for part in group if part.smokes]], TOTAL * PATIENCE
    for place, group in enumerate(groups):
        kept = sum(max(part.seconds for part in later) for later in groups[place + 1 :])
        limit = total - kept - (time.monotonic() - start)
        with ThreadPoolExecutor(2) as pool:
            try:
                for found in pool.map(lambda part, limit=limit: run(part, limit, arguments.smoke), group):
                    rows += found
                    compared = [*rows, *speed_ups(rows, arguments.smoke), *first_losses(rows)]
                    text = write(folder, machine, compared, time.monotonic() - start)
            except BaseException:  # Ctrl-C doesn't reach the parts, which are in sessions of their own
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(RUNNING):
                    kill(process)
                raise
    print(text, end="")
    print(f"written to {folder}/table.txt and {folder}/rows.json")
    return int(any(row["verdict"] == "FAIL" for row in compared))


if __name__ == "__main__":
    sys.exit(main())
