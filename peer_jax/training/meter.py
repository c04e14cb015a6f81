"""Time and metrics of the steps of a run, read without making the device wait."""

import dataclasses
import math
import time
from collections.abc import Mapping

from peer_jax.errors import TrainingFailed
from peer_jax.sharding import current
from peer_jax.training.checkpoint import Checkpoints
from peer_jax.training.metrics import MetricsLog, ProgressBar
from peer_jax.training.step import Metrics

WATCHED = ("loss", "grad_norm", "param_norm")


@dataclasses.dataclass
class Clock:
    """Time spent on a run by all processes that have worked on it, one after another.

    Attributes:
        wall_seconds: from the moment that a process begins with the first step, to the end.
        step_seconds: time in ``steps`` steps, without compilation and evaluation.
        steps: how many steps were timed.
    """

    wall_seconds: float = 0.0
    step_seconds: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        self._last = time.perf_counter()

    def state(self) -> dict[str, float]:
        """The fields, with the time up to now."""
        now = time.perf_counter()
        self.wall_seconds += now - self._last
        self._last = now
        return dataclasses.asdict(self)


class Meter:
    """Checks and logs the metrics of each step while the next step runs, so that the device never waits.

    Args:
        log, bar: where the metrics go.
        clock: counts the time of the steps.
        checkpoints: for the message when a step has failed.
        log_every: steps between lines in the log.
        step_tokens, step_flops: of one step.
    """

    def __init__(
        self,
        log: MetricsLog,
        bar: ProgressBar,
        clock: Clock,
        checkpoints: Checkpoints,
        *,
        log_every: int,
        step_tokens: int,
        step_flops: float,
    ) -> None:
        self._checkpoints = checkpoints
        self._log, self._bar, self._clock, self._log_every = log, bar, clock, log_every
        self._step_tokens, self._step_flops = step_tokens, step_flops
        self._pending: tuple[int, Metrics, Mapping[str, float]] | None = None
        self._since: float | None = None
        self._recent: list[float] = []

    def add(self, step: int, metrics: Metrics, rates: Mapping[str, float]) -> None:
        """Takes the metrics of the step that has just been started, and reads those of the step before."""
        self.flush()
        self._pending = (step, metrics, rates)

    def flush(self) -> None:
        """Waits for the last step and reads its metrics.

        Raises:
            TrainingFailed: if its loss, or the norm of its gradient or of the parameters, isn't finite.
        """
        if self._pending is None:
            return
        (step, metrics, rates), self._pending = self._pending, None
        watched = {name: float(metrics[name]) for name in WATCHED}
        self._tick()
        if not all(map(math.isfinite, watched.values())):
            raise _not_finite(step, watched, metrics, self._checkpoints)
        speed = self._step_tokens * len(self._recent) / sum(self._recent) if self._recent else None
        if step % self._log_every == 0 or step == 1:
            scalars = {name: float(value) for name, value in metrics.items()}
            scalars |= {f"learning_rate/{label}": rate for label, rate in rates.items()}
            if speed is not None:
                scalars["tokens_per_second"] = speed
                scalars["model_flops_per_second"] = speed / self._step_tokens * self._step_flops
                self._recent.clear()
            self._log.write(step, scalars)
        self._bar.update(step, f"loss {watched['loss']:.4f}" + (f"  {speed:,.0f} tokens/s" if speed else ""))

    def resume(self) -> None:
        """Starts to count time again, after something that is not a step."""
        self._since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._since is not None:  # the first step compiles, and is not counted
            self._recent.append(now - self._since)
            self._clock.step_seconds += now - self._since
            self._clock.steps += 1
        self._since = now


def _not_finite(step: int, watched: Mapping[str, float], metrics: Metrics, checkpoints: Checkpoints) -> TrainingFailed:
    """The error for a step that has made NaN or infinity."""
    checkpoints.wait()
    steps = checkpoints.steps()
    saved = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
    shown = ", ".join(f"{name} {value}" for name, value in watched.items())
    advice = "Try a lower learning rate, a longer warm-up or a smaller norm to clip at; "
    if "touched_rows" in metrics:
        touched = int(metrics["touched_rows"])
        advice += f"if AdamW.touched_share makes room for {touched} rows, more may be touched: raise it; "
    on_one_device = " on one device (Sharding.data=1, fsdp=1, expert=1)" if current() is not None else ""
    return TrainingFailed(
        f"step {step} has {shown}; {saved}. {advice}"
        f"the same command with Run.checked=True{on_one_device} tells where NaN starts"
    )
