"""SIGTERM and SIGINT at a command's first moment, and the process that prepares a text when its parent is killed."""

import contextlib
import os
import signal

import pytest
from small_runs import CONFIGS, PROGRAM, children, gone, handles, stack, start_process, wait_for, write_text

COMMANDS = ("prepare", "train", "evaluate", "generate", "sweep", "plan", "report", "bench")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_command_answers_a_signal_from_its_first_moment(number):
    """Python takes SIGINT for itself before the command begins, so that SIGTERM shows when it has begun."""
    for command in COMMANDS:
        process = start_process([*PROGRAM, command])
        wait_for(lambda pid=process.pid: handles(pid, signal.SIGTERM))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert errors == (
            f"peer-jax: stopped by {number.name}; what was saved is kept, and the same command goes on from it\n"
        )


def preparing(pid):
    """The child of a command that has begun to prepare a text, whose output goes to a log; None if there is none."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{child}/fd/2").endswith("/log"):
                return child
    return None


def test_nothing_goes_on_to_prepare_a_text_when_the_command_is_killed(tmp_path):
    """The process that prepares is stopped, so that it can't have ended by itself."""
    settings = {"local_files.path": str(write_text(tmp_path / "text.jsonl")), "TextTask.cache_dir": str(tmp_path)}
    files = (f"--config={file}" for file in stack(CONFIGS / "data" / "local_files.gin"))
    bindings = (f"--set={name}={value!r}" for name, value in settings.items())
    process = start_process([*PROGRAM, "prepare", *files, *bindings])
    child = wait_for(lambda: preparing(process.pid))
    os.kill(child, signal.SIGSTOP)
    process.kill()
    process.wait()
    wait_for(lambda: gone(child), seconds=10)
