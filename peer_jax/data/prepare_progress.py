"""The progress bar of `prepare`, shown on standard error if that is a terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)


class PrepareProgress:
    """A context manager that shows a bar if `enabled` and standard error is a terminal, and notes in any case."""

    def __init__(self, *, enabled: bool = True):
        self._console = Console(file=sys.stderr)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not (enabled and self._console.is_terminal),
        )
        self._split: str | None = None
        self._bar: TaskID | None = None
        self._next_update = 0.0

    def __enter__(self) -> "PrepareProgress":
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def note(self, sentence: str) -> None:
        """Prints a sentence, whether or not standard error is a terminal."""
        self._progress.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def spinner(self, what: str) -> Iterator[None]:
        bar = self._progress.add_task(what, total=None, detail="")
        yield
        self._progress.remove_task(bar)

    def update(self, split: str, tokens: int, documents: int, expected_tokens: float | None) -> None:
        """Draws the bar at most five times per second, however often it is called."""
        now = time.monotonic()
        if now < self._next_update:
            return
        self._next_update = now + 0.2
        if split != self._split:
            if self._bar is not None:
                self._progress.remove_task(self._bar)
            self._split, self._bar = split, self._progress.add_task(f"preparing {split}", total=None, detail="")
        detail = f"{tokens / 1e6:.1f}M tokens, {documents:,} documents"
        self._progress.update(self._bar, completed=tokens, total=expected_tokens, detail=detail)
