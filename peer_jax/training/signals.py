"""Stopping on SIGTERM and SIGINT between two steps."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopOnSignal:
    """Turns the first SIGTERM or SIGINT into a request to stop; a second SIGINT interrupts at once.

    When a run has several processes, a signal to one of them is enough. JAX's preemption service handles SIGTERM then,
    and lets the processes agree on the step to stop at.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        numbers = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        try:
            self._before = {number: signal.getsignal(number) for number in numbers}  # which the handler reads
            for number in numbers:
                signal.signal(number, self._request)
        except ValueError:  # outside the main thread, signals belong to the caller
            self._before = {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to stop after ``step``. All processes ask after every step, and all get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal_number = number
