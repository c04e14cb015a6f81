"""Stopping on SIGTERM and SIGINT between two steps."""

import os
import signal
from types import FrameType
from typing import Any

import jax

from peer_jax.processes import asked_to_stop


class StopOnSignal:
    """Turns the first SIGTERM or SIGINT into a request to stop; a second SIGINT interrupts at once.

    When a run has several processes, a signal to one of them is enough. JAX's preemption service handles SIGTERM then,
    and lets the processes agree on the step to stop at.

    A sweep that trains its runs in this process has one of these, and each run has another. What stops the run stops
    the sweep, too.
    """

    _innermost: "StopOnSignal | None" = None

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}
        self._outer: StopOnSignal | None = None

    def __enter__(self) -> "StopOnSignal":
        self._outer, StopOnSignal._innermost = StopOnSignal._innermost, self
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
        StopOnSignal._innermost = self._outer
        if self._outer is not None and self.signal_number is not None:
            self._outer.signal_number = self.signal_number

    def requested(self) -> bool:
        """Whether to stop now. All processes ask after every step, and all get the same answer."""
        if jax.process_count() > 1 and asked_to_stop():
            self.signal_number = signal.SIGTERM
        return self.signal_number is not None

    def _request(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self.signal_number = number
