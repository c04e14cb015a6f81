"""Runs a command, and says in one sentence what ended it."""

import os
import sys
import traceback
from collections.abc import Sequence

import typer

from peer_jax import startup, supervisor
from peer_jax.cli.app import NAME, app
from peer_jax.errors import InputError, Interrupted, TrainingFailed


def main() -> None:
    """Runs a command; bad input is one sentence on standard error and exit status 2, or 75 if it may pass."""
    try:
        if status := app(prog_name=NAME, standalone_mode=False):
            sys.exit(status)
    except typer.Abort:
        sys.exit(1)
    except USAGE_ERROR as error:
        _exit_usage(error)
    except InputError as error:
        _exit(error, error.status)
    except TrainingFailed as error:
        _exit(error, 1)
    except Interrupted as stopped:
        _exit(stopped, 128 + stopped.signal_number)
    except Exception as error:
        if (refused := startup.refusal_of_a_bucket(error)) is not None:
            _exit(refused, refused.status)
        traceback.print_exc()
        if supervisor.is_supervised():  # its parent knows whether the cause is another process, and shows it if not
            os._exit(os.EX_SOFTWARE)
        sys.exit(os.EX_SOFTWARE)  # 70: a fault of a device or of the code, after which launchers try again


# Typer has or brings Click, where these are the base classes of the one error that Typer names.
USAGE_ERROR = typer.BadParameter.__mro__[1]


def _exit_usage(error: Exception) -> None:
    """What the command line itself refuses, such as an option that doesn't exist; help where nothing was given."""
    if not sys.argv[1:]:
        error.show()
        sys.exit(2)
    message = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else NAME
    option = getattr(error, "param", None)
    given = " ".join(_values(option.opts)) if option is not None else ""
    shown = f" ({option.opts[0]} {given[:80]})" if given and given not in message else ""
    _exit(InputError(f"{message[0].lower()}{message[1:]}{shown}: see {command} --help"), 2)


def _values(names: Sequence[str]) -> list[str]:
    """The values that the command line gives an option."""
    pairs = zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True)
    both = [*((a, b) for a, b in pairs), *(tuple(a.split("=", 1)) for a in sys.argv[1:] if "=" in a)]
    return [value for name, value in both if name in names and value]


def _exit(error: Exception, status: int) -> None:
    message = " ".join(str(error).split())
    if argument := getattr(error, "argument", None):
        message = f"--{argument.replace('_', '-')} {message}"
    print(f"peer-jax: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        from peer_jax import processes

        processes.leave(status)
    sys.exit(status)
