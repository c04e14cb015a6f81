"""Metrics of a run: ``metrics.jsonl``, TensorBoard and a progress bar."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricsLog:
    """Scalars by step, appended to ``metrics.jsonl`` and to TensorBoard's event files in ``tensorboard/``.

    A resumed run goes on from the checkpoint: lines of later steps, and a half-written one, are dropped first, so each
    step stands there once.
    """

    def __init__(self, workdir: Path, resume_step: int) -> None:
        path = workdir / "metrics.jsonl"
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resume_step]
        rewritten = path.with_suffix(".jsonl.tmp")
        rewritten.write_text("".join(line + "\n" for line in kept))
        os.replace(rewritten, path)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        self._board.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a log; what a kill cut short is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text().split("\n")[:-1] if line.startswith("{") and line.endswith("}")]


class ProgressBar:
    """A bar on standard error; where that is no terminal, a plain line about every tenth of the way."""

    def __init__(self, description: str, total: int, start: int = 0, *, enabled: bool = True) -> None:
        console = Console(stderr=True)
        self._enabled, self._live = enabled, enabled and console.is_terminal
        self._description, self._total, self._done = description, total, start
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(description, total=total, completed=start, note="")

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, done: int, note: str = "") -> None:
        """Moves the bar to ``done`` and shows the note beside it."""
        tenth = max(1, self._total // 10)
        if self._enabled and not self._live and (done // tenth > self._done // tenth or done == self._total):
            print(f"{self._description} {done}/{self._total} {note}", file=sys.stderr, flush=True)
        self._done = done
        self._progress.update(self._task, completed=done, note=note)
