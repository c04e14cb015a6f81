"""Prepares the texts of many tests in one process, because loading and tracing seqio takes seconds each time.

`Preparing.command` stands in the place of the command that `ensure_prepared` runs. It hands its arguments, directory,
environment and outputs to that process, which starts with the first text. A test of the command itself takes the real
one, which `pipeline.preparing_command` returns.
"""

import json
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

HERE = str(Path(__file__).absolute())
LENGTH = 8  # bytes of a message's length


class Preparing:
    """The process of one session of tests; its socket is in the folder."""

    def __init__(self, folder):
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / "preparing"))
        self._listening.listen()
        self._process = None
        self._address = str(folder / "preparing")

    def command(self):
        if self._process is None:
            number = self._listening.fileno()
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", HERE, "serve", str(number)],
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                pass_fds=[number],
            )
        return [sys.executable, "-I", "-S", HERE, "ask", self._address]

    def stop(self):
        self._listening.close()
        if self._process is not None:
            self._process.communicate()


def ask(address, *arguments):
    """Gives the process a request and returns its exit status."""
    message = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(address)
        socket.send_fds(asking, [len(message).to_bytes(LENGTH, "big")], [1, 2])
        asking.sendall(message)
        return int(asking.makefile().read() or 1)


def serve(number):
    """Answers one request after another, until the tests have ended."""
    from peer_jax.data import tasks

    listening = socket.socket(fileno=int(number))
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        answering, _ = listening.accept()
        with answering:
            length, outputs, _, _ = socket.recv_fds(answering, LENGTH, 2)
            request = answering.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
            arguments, folder, environment = json.loads(request)
            for output, number in zip(outputs, (1, 2), strict=True):
                os.dup2(output, number)
                os.close(output)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.path[:] = dict.fromkeys([*environment["PYTHONPATH"].split(os.pathsep), *sys.path])
            answering.sendall(str(tasks.main(*arguments)).encode())


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[1]](*sys.argv[2:]))
