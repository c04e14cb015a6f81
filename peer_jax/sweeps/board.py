"""What a sweep prints: its plan as a table, and its progress as a live table in a terminal or as lines elsewhere."""

import math
import sys
import time
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from peer_jax.analysis.row import Row
from peer_jax.lease import Holder
from peer_jax.run_directory import SweepDirectory
from peer_jax.sweeps.plan import Planned, step_seconds

RECENT = 8  # ended runs that the live table lists


def plan_table(
    planned: Sequence[Planned], measured: Mapping[str, float], reasons: Mapping[str, str], workers: int
) -> None:
    """Prints a row per run: sizes, FLOPs, steps, and the time that the steps will take, estimated from ``measured``.

    Args:
        measured: seconds per step, by ``Planned.program``.
        reasons: why some runs could not be measured, by name.
        workers: how many runs go on at a time.
    """
    seconds = step_seconds(planned, measured)
    columns = ("run", "params", "active", "FLOPs/token", "tokens", "steps", "FLOPs", "off budget", "epochs", "time")
    table = Table(box=SIMPLE_HEAD, title=f"{len(planned)} runs")
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right", no_wrap=True)
    total = 0.0
    for run in planned:
        per_step = seconds[run.program]
        total += math.nan if per_step is None else per_step * run.steps
        table.add_row(
            run.point.name + ("" if run.is_causal else " *"),
            *(f"{number:,.0f}" for number in (run.params_total, run.params_active, run.flops_per_token)),
            *(f"{number:,.0f}" for number in (run.tokens, run.steps)),
            f"{run.training_flops:.4g}",
            f"{run.training_flops / run.point.budget - 1:+.2%}",
            "-" if run.epochs is None else f"{run.epochs:.2f}",
            "-" if per_step is None else duration(per_step * run.steps),
        )
    console = Console(highlight=False, soft_wrap=True)
    (console if console.is_terminal else Console(width=180)).print(table)
    flops = sum(run.training_flops for run in planned)
    programs = len({run.program for run in planned})
    console.print(f"{flops:.3g} training FLOPs in all; {programs} programs to compile.")
    if measured and not math.isnan(total):
        console.print(
            f"About {duration(total / workers)} with {workers} at a time on this machine, estimated from steps on "
            "random tokens; compilation and evaluation come on top."
        )
    for name, reason in reasons.items():
        console.print(f"{name} was not measured: {reason}")
    if not all(run.is_causal for run in planned):
        console.print("* not causal: a token's output can depend on later tokens, which flatters its loss")


class Board:
    """Shows the runs that are being trained, how far they are, which ended last, and how long the rest may take."""

    def __init__(
        self,
        planned: Sequence[Planned],
        done: Sequence[Planned],
        directory: SweepDirectory,
        *,
        enabled: bool,
    ) -> None:
        self._planned, self._directory = planned, directory
        self._console = Console(stderr=True)
        self._enabled, self._is_live = enabled, enabled and self._console.is_terminal
        self._running: dict[str, Planned] = {}
        self._ended: dict[str, str] = {run.point.name: "finished earlier" for run in done}
        self._holders: dict[str, Holder] = {}
        self._failures = 0
        self._note: str | None = None
        self._since = time.monotonic()
        self._flops_before = sum(run.training_flops for run in done)
        self._flops_at_start: dict[str, float] = {}
        # A thread draws it, because the main thread of a slice trains.
        self._live = Live(console=self._console, refresh_per_second=2, get_renderable=self._render)

    def __enter__(self) -> "Board":
        if self._is_live:
            self._live.start()
        elif self._enabled:
            print(f"{len(self._planned)} runs, {len(self._ended)} finished earlier", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._is_live:
            self._live.stop()

    def started(self, run: Planned) -> None:
        """Notes that a worker has begun or continued the run."""
        self._running[run.point.name] = run
        self._flops_at_start[run.point.name] = self._progress(run)[0] * run.step_flops
        self._note = None

    def finished(self, run: Planned, row: Row) -> None:
        """Notes that the run has its result."""
        self._end(run, f"loss {row.loss:.4f}, {row.wall_seconds:.0f} s")

    def failed(self, run: Planned, reason: str) -> None:
        """Notes that the run has failed, and why."""
        self._failures += 1
        self._end(run, f"failed: {reason}")

    def elsewhere(self, run: Planned, holder: Holder | None = None) -> None:
        """Notes that another process, which is named if it is given, trains the run."""
        self._running.pop(run.point.name, None)
        self._note = f"{run.point.name} is being trained by {holder or 'another process'}"
        if holder and holder != self._holders.get(run.point.name):  # it is asked for again and again
            self._holders[run.point.name] = holder
            if self._enabled and not self._is_live:
                print(self._note, file=sys.stderr, flush=True)

    def put_off(self, run: Planned, reason: str) -> None:
        """Notes that the run could not go on for now, and is tried again."""
        self._running.pop(run.point.name, None)
        self.say(f"{run.point.name} is tried again: {reason}")

    def say(self, note: str | None) -> None:
        """Shows a line below the table, or prints it where there is no table; None removes the line."""
        self._note = note
        if self._is_live:
            self._live.refresh()
        elif note and self._enabled:
            print(note, file=sys.stderr, flush=True)

    def _end(self, run: Planned, outcome: str) -> None:
        self._running.pop(run.point.name, None)
        self._ended[run.point.name] = outcome
        if self._enabled and not self._is_live:
            print(f"{run.point.name}: {outcome}   [{self._summary()}]", file=sys.stderr, flush=True)

    def _progress(self, run: Planned) -> tuple[int, float | None]:
        """The last step in the metrics of a run, and the loss at that step."""
        line = self._directory.run(run.point.name).last_metrics() or {}
        return line.get("step", 0), line.get("loss", line.get("validation_loss"))

    def _summary(self) -> str:
        ended = len(self._ended)
        parts = [f"{ended} of {len(self._planned)} ended"]
        if self._failures:
            parts.append(f"{self._failures} failed")
        if self._running:
            parts.append(f"{len(self._running)} running")
        if (left := self._seconds_left()) is not None and ended < len(self._planned):
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def _seconds_left(self) -> float | None:
        """Seconds until all runs have ended, estimated from the FLOPs spent so far; None while these are too few."""
        total = sum(run.training_flops for run in self._planned)
        ended = sum(run.training_flops for run in self._planned if run.point.name in self._ended)
        current = sum(self._progress(run)[0] * run.step_flops for run in list(self._running.values()))
        made = ended + current - self._flops_before - sum(self._flops_at_start.values())
        elapsed = time.monotonic() - self._since
        if made <= 0 or elapsed < 5:
            return None
        return (total - ended - current) / made * elapsed

    def _render(self) -> Group:
        table = Table(box=SIMPLE_HEAD)
        for column in ("run", "step", "of", "loss", ""):
            table.add_column(column, justify="right" if column in ("step", "of", "loss") else "left")
        for name, outcome in list(self._ended.items())[-RECENT:]:
            table.add_row(name, "", "", "", outcome, style="red" if outcome.startswith("failed") else "dim")
        for name, run in list(self._running.items()):
            step, loss = self._progress(run)
            bar = "█" * round(20 * step / run.steps)
            table.add_row(name, f"{step:,}", f"{run.steps:,}", "" if loss is None else f"{loss:.4f}", f"{bar:░<20}")
        return Group(table, self._summary(), self._note or "")


def duration(seconds: float) -> str:
    """Writes seconds in a readable unit: 45 s, 12 min, 3.2 h, 2.1 days."""
    for size, unit in ((86400, "days"), (5400, "h"), (90, "min")):
        if seconds >= size:
            value = seconds / {"days": 86400, "h": 3600, "min": 60}[unit]
            return f"{value:.0f} {unit}" if unit == "min" else f"{value:.1f} {unit}"
    return f"{seconds:.0f} s"
