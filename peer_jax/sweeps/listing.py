"""What a sweep has done so far, read from its directory alone: JAX is not imported, and no config is read."""

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor

from peer_jax.errors import InputError
from peer_jax.run_directory import RunDirectory, SweepDirectory, find_runs

WAITING, RUNNING, FINISHED, FAILED = STATES = ("waiting", "running", "finished", "failed")
READERS = 16  # threads, because a bucket takes its time to answer


@dataclasses.dataclass(frozen=True)
class Listed:
    """A run of a sweep.

    Attributes:
        name: of its folder.
        state: one of ``STATES``.
        details: the holder of a running run, the loss of a finished one, the reason of a failed one, and the last step.
    """

    name: str
    state: str
    details: str


def listed(directory: SweepDirectory) -> list[Listed]:
    """The runs of all sweeps that were begun in a directory, in the order of the sweeps' descriptions.

    Raises:
        InputError: if no sweep was begun there, or if a description of a sweep is damaged.
    """
    sweeps = directory.sweeps()
    if not sweeps:
        raise InputError(f"{directory} has no sweep: give the directory of a sweep that has begun", argument="workdir")
    names = [name for sweep in sweeps for name in sweep["runs"] or [run.name for run in find_runs(directory)]]
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda name: _listed(directory.run(name)), dict.fromkeys(names)))


def lines(runs: list[Listed]) -> list[str]:
    """The runs as lines of text, and a last line that counts them."""
    width = max(len(run.name) for run in runs)
    counts = {state: [run.state for run in runs].count(state) for state in STATES}
    left = len(runs) - counts[FINISHED]
    shown = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    table = [f"{run.name:{width}}  {run.state:8}  {run.details}".rstrip() for run in runs]
    return [*table, f"{len(runs)} runs: {shown}; {left} left"]


def _listed(run: RunDirectory) -> Listed:
    if (result := run.whole_result()) is not None:
        loss = result["evaluations"][result["corpus"]["name"]]["loss"]
        return Listed(run.name, FINISHED, f"loss {loss:.4f}, {result['wall_seconds']:.0f} s")
    step = (run.last_metrics() or {}).get("step")
    reached = "" if step is None else f"step {step}"
    if (holder := run.holder()) is not None:
        return Listed(run.name, RUNNING, f"{holder}{reached and f', {reached}'}")
    failure = None
    with contextlib.suppress(InputError):
        failure = run.read_failure()
    if failure is not None:
        return Listed(run.name, FAILED, failure["reason"])
    return Listed(run.name, WAITING, reached and f"begun, {reached}")
