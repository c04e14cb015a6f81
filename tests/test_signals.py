"""SIGTERM and SIGINT at a command's first moment, and the process that prepares a text when its parent is killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import CONFIGS, ROOT, environment, gone, handles, stack, write_text

COMMANDS = ("prepare", "train", "evaluate", "generate", "sweep", "plan", "report", "bench")


def start(*arguments, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "peer_jax", *map(str, arguments)],
        cwd=ROOT,
        env=environment(JAX_PLATFORMS="cpu", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.002)
    return value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_command_answers_a_signal_from_its_first_moment(number):
    """Python takes SIGINT for itself before the command begins, so that SIGTERM shows when it has begun."""
    for command in COMMANDS:
        process = start(command)
        wait_for(lambda pid=process.pid: handles(pid, signal.SIGTERM))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + number, errors
        assert errors == (
            f"peer-jax: stopped by {number.name}; what was saved is kept, and the same command goes on from it\n"
        )


def preparing(pid):
    """The child of a command that has begun to prepare a text, whose output goes to a log; None if there is none."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{child}/fd/2").endswith("/log"):
                return int(child)
    return None


def test_nothing_goes_on_to_prepare_a_text_when_the_command_is_killed(tmp_path):
    """The process that prepares is stopped, so that it can't have ended by itself."""
    settings = {"local_files.path": str(write_text(tmp_path / "text.jsonl")), "TextTask.cache_dir": str(tmp_path)}
    files = (f"--config={file}" for file in stack(CONFIGS / "data" / "local_files.gin"))
    process = start("prepare", *files, *(f"--set={name}={value!r}" for name, value in settings.items()))
    child = wait_for(lambda: preparing(process.pid))
    os.kill(child, signal.SIGSTOP)
    process.kill()
    process.wait()
    wait_for(lambda: gone(child), seconds=10)
