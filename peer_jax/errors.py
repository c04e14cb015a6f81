"""The one exception for input that can't be used."""


class InputError(ValueError):
    """A value the user gave (config, data, checkpoint, device, file) can't be used.

    The message is one sentence that names the value and the way out. The command line prints it and exits with
    status 2; in library code it is an ordinary ``ValueError``.

    Args:
        message: the sentence.
        argument: the argument of the call that mends it, such as "workdir"; the command line names its flag.
    """

    def __init__(self, message: str = "", *, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


class InUse(InputError):  # noqa: N818, it names what is so
    """A run directory that another process is training in."""


class TrainingFailed(RuntimeError):  # noqa: N818, it names what happened
    """A run can't go on. The message says at which step, what is saved and what to try."""


class Interrupted(Exception):  # noqa: N818, it is no error
    """A run was asked to stop by a signal and has saved its state; the same command goes on from there."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number

    def __reduce__(self) -> tuple:
        return type(self), (self.signal_number, str(self))
