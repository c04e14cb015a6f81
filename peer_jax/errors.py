"""Exceptions that are shown as one sentence, each with the exit status of the command that they end."""

import os
from collections.abc import Sequence


class InputError(ValueError):
    """A value the user gave (config, data, checkpoint, device, file) can't be used.

    The message is one sentence that names the value and the way out. The command line prints it and exits with
    ``status``; in library code it is an ordinary ``ValueError``.

    Args:
        message: the sentence.
        argument: the argument of the call that mends it, such as "workdir"; the command line names its flag.
    """

    status = 2

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument

    def told(self) -> list[str | None]:
        """What another process needs to raise the same error by ``heard``."""
        return [type(self).__name__, str(self), self.argument]

    @staticmethod
    def heard(told: Sequence[str | None]) -> "InputError":
        """The error that another process has ``told`` of."""
        kind, message, argument = told
        return {one.__name__: one for one in (InUse, TryAgain)}.get(kind, InputError)(message, argument=argument)


class InUse(InputError):  # noqa: N818, it names what is so
    """A run directory that another process is training in."""


class TryAgain(InputError):  # noqa: N818, it names the way out
    """Another process or a service has not answered, or has died: the same command may work the next time."""

    status = os.EX_TEMPFAIL  # 75: launchers start a command again after it, but not after 1 or 2


class TrainingFailed(RuntimeError):  # noqa: N818, it names what happened
    """A run can't go on. The message says at which step, what is saved and what to try."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """A run was asked to stop by a signal and has saved its state; the same command goes on from there."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple:
        return type(self), (self.signal_number, str(self))
