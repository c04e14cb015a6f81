"""The parent of one process of a run that has several: it hears how the others fare, and says why all of them end.

JAX aborts a process when another one has died, with pages of C++ that do not name it. So the command of such a run
forks: the child trains, and the parents, which never import JAX, keep a connection to the first of them. Before they
fork, they compare what they were started with. Afterwards each tells the others how its child has ended.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from peer_jax import startup
from peer_jax.cluster import Place, Timeouts, not_together
from peer_jax.errors import InputError, TryAgain

# Seconds. A parent that is silent for SILENCE has died; it makes itself heard every PING. What a child writes is held
# back for HOLD, and a child that fails without a sentence is judged only after NEWS, since the cause may be another
# process. If a process ends because of bad input, the others have GRACE to find the same by themselves, and STOPPING if
# it was stopped by a signal, to save. After SAY, a process that has started says for whom it waits.
SILENCE, PING, HOLD, NEWS, GRACE, STOPPING, SAY = 20, 2, 1, 3, 5, 60, 20
SAYS = "peer-jax: "
ATTEMPTS = 4  # to listen at an address that is in use
_HELLO = "peer-jax run"
_SUPERVISED = False


def is_supervised() -> bool:
    """Whether this process is the child of a parent that tells the other processes how it ends."""
    return _SUPERVISED


def supervise(place: Place, timeouts: Timeouts = Timeouts()) -> None:  # noqa: B008, it can't change
    """Meets the other processes and forks; returns in the child, while the parent stays here until it exits.

    Args:
        place: which process this is, how many there are and where the first one listens. JAX listens there later.
        timeouts: how long the processes wait for one another.

    Raises:
        InputError: in all processes, if they were not all started with the same number of processes and a number of
            their own; TryAgain if not all come in time.
    """
    global _SUPERVISED
    links = _gather(place, timeouts.start) if place.process_id == 0 else _find(place, timeouts.start)
    reads, writes = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        startup.end_with_parent()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # until there is something to save, the parent says what has ended it
        os.setpgid(0, 0)  # Ctrl-C in a terminal reaches the parent alone, which passes it on
        for link in links:
            link.connection.close()
        os.dup2(writes, 2)
        os.close(reads)
        os.close(writes)
        _SUPERVISED = True
        return
    os.close(writes)
    _Parent(child, reads, links, place.process_id).run()


@dataclasses.dataclass(frozen=True)
class End:
    """How a process has ended.

    Attributes:
        process: which one.
        status: its exit status; the negative number of the signal that killed it; None if nobody knows.
        says: the last line that it wrote to standard error.
    """

    process: int
    status: int | None
    says: str

    @property
    def is_said(self) -> bool:
        """Whether it has said in a sentence why it ended."""
        return self.status is not None and self.status > 0 and self.says.startswith(SAYS)

    @property
    def was_killed(self) -> bool:
        """Whether it was ended from outside; a process that aborts does so because it has lost another one."""
        return self.status is None or (self.status < 0 and self.status != -signal.SIGABRT)

    def rank(self) -> int:
        """How likely it is that the others have ended for this one: the lower, the likelier."""
        if self.status == 0:
            return 4
        return 0 if self.was_killed else 1 if self.is_said else 3 if self.status == -signal.SIGABRT else 2

    def status_of_others(self) -> int:
        """The exit status of processes that end because of it: its own, or that of TryAgain if it did not exit."""
        return TryAgain.status if self.status is None or self.status < 0 else self.status

    def sentence(self) -> str:
        """What the other processes say of it."""
        if self.is_said:
            return f"process {self.process} has ended: {self.says.removeprefix(SAYS)}"
        if self.status is None:
            how = f"has died ({self.says})"
        elif self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
        else:
            how = f"has failed ({self.says})"
        return f"process {self.process} {how}: start all processes again, and the run goes on from its last checkpoint"


class _Link:
    """A connection to another parent, which sends lines of JSON."""

    def __init__(self, connection: socket.socket, process: int) -> None:
        self.connection, self.process = connection, process
        self.last_heard = time.monotonic()
        self._received = b""

    def send(self, message: object) -> None:
        """Sends a message, unless the other has gone, which reading will find."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list | None:
        """The messages that have come; None if the connection has ended. Waits as long as the socket's timeout."""
        try:
            received = self.connection.recv(2**16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not received:
            return None
        self.last_heard = time.monotonic()
        *lines, self._received = (self._received + received).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # another program is at this address
            return None


# Meeting


def _gather(place: Place, seconds: float) -> list[_Link]:
    """The first process's connections to all others, once all have come with the right number of processes."""
    links: dict[int, _Link] = {}
    deadline, say_at = time.monotonic() + seconds, time.monotonic() + SAY
    try:
        server = _listen(place.port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _find(place, seconds)  # another process may have number 0, too, and tells all of them
        taken = f"{place.coordinator}: port {place.port} can't be had ({error.strerror})"
        raise place.refusal("coordinator", taken, TryAgain) from error
    with server:
        while len(links) < place.num_processes - 1:
            server.settimeout(max(0.01, min(say_at, deadline) - time.monotonic()))
            try:
                link = _Link(server.accept()[0], -1)
            except TimeoutError:
                missing = sorted(set(range(1, place.num_processes)) - links.keys())
                whom = f"process {', '.join(map(str, missing))}"
                if say_at < deadline:
                    _say_waiting(place, whom, deadline)
                    say_at = deadline
                    continue
                came = f"{whom} has not come in {seconds} s"
                _refuse(list(links.values()), not_together(str(place), came))
            hello = _message(link, time.monotonic() + PING)
            if not isinstance(hello, dict) or hello.get("hello") != _HELLO:
                link.connection.close()
                continue
            link.process, count = hello["process"], hello["count"]
            everyone = [*links.values(), link]
            if count != place.num_processes:
                told = f"{count} of process {link.process} is not the {place.num_processes} of process 0"
                _refuse(everyone, place.refusal("num_processes", f"{told}: give all the same"))
            if link.process in (0, *links):
                each = f"give each its own, from 0 to {place.num_processes - 1}"
                _refuse(everyone, place.refusal("process_id", f"{link.process} is given to two processes: {each}"))
            links[link.process] = link
    for link in links.values():
        link.send({"start": True})
    return list(links.values())


def _find(place: Place, seconds: float) -> list[_Link]:
    """The connection of another process to the first one, once all have come."""
    deadline, say_at = time.monotonic() + seconds, time.monotonic() + SAY
    while True:
        try:
            link = _Link(socket.create_connection((place.host, place.port), timeout=PING), 0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                came = f"process 0 has not come in {seconds} s, {error}"
                raise not_together(str(place), came) from error
            if time.monotonic() > say_at:
                _say_waiting(place, f"process 0 ({error})", deadline)
                say_at = deadline
            time.sleep(0.1)
    link.send({"hello": _HELLO, "process": place.process_id, "count": place.num_processes})
    answer = _message(link, time.monotonic() + seconds + 2 * PING)  # the first one already listens, and waits so long
    if not isinstance(answer, dict):
        raise place.refusal(
            "coordinator",
            f"{place.coordinator} is where another program or a run that has begun listens, not process 0 of a run "
            f"that waits for process {place.process_id}: check the numbers of the processes, or choose another port",
            TryAgain,
        )
    if "refused" in answer:
        raise InputError.heard(answer["refused"])
    return [link]


def _say_waiting(place: Place, whom: str, deadline: float) -> None:
    left = deadline - time.monotonic()
    waits = f"process {place.process_id} waits at {place.coordinator} for {whom}, {left:.0f} s more at most"
    print(f"{SAYS}{waits}", file=sys.stderr, flush=True)


def _listen(port: int) -> socket.socket:
    """A socket that other processes can connect to.

    If two processes begin to listen in the same moment, Linux may refuse both, so each tries again after a random time.
    """
    family = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    for _ in range(ATTEMPTS - 1):
        try:
            return socket.create_server(("", port), **family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            time.sleep(random.uniform(0, 0.2))
    return socket.create_server(("", port), **family)


def _message(link: _Link, deadline: float) -> object:
    """The next message of a connection; None if it ends or the deadline comes first."""
    while (left := deadline - time.monotonic()) > 0:
        link.connection.settimeout(left)
        messages = link.receive()
        if messages is None:
            return None
        if messages:
            return messages[0]
    return None


def _refuse(links: Sequence[_Link], error: InputError) -> NoReturn:
    """Ends all processes that have come, and this one, with the same error."""
    for link in links:
        link.send({"refused": error.told()})
        link.connection.close()
    raise error


# Waiting


class _Parent:
    """The parent of a process, while the process trains.

    Args:
        child: the process.
        errors: what to read the child's standard error from.
        links: connections to other parents: of the first process to all, of each other one to the first.
        process_id: which process of the run the child is.
    """

    def __init__(self, child: int, errors: int, links: Sequence[_Link], process_id: int) -> None:
        self._child, self._errors, self._links, self._id = child, errors, list(links), process_id
        self._held: list[tuple[float, bytes]] = []
        self._last_written = b""
        self._news: list[tuple[float, End]] = []
        self._pinged = 0.0
        os.set_blocking(errors, False)
        for link in self._links:
            link.connection.settimeout(PING)

    def run(self) -> NoReturn:
        """Waits until the child has ended, or has to because another process has, and exits as it did."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        while True:
            self._listen(0.1)
            self._show(time.monotonic() - HOLD)
            pid, status = os.waitpid(self._child, os.WNOHANG)
            if pid:
                self._ended(End(self._id, os.waitstatus_to_exitcode(status), self._last_line()))
            if any(time.monotonic() > came + _patience(end) for came, end in self._news):
                self._give_up(min((end for _, end in self._news), key=End.rank))

    def _pass_on(self, number: int, _: object) -> None:
        """Gives a signal to the child, unless it has ended already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def _ended(self, end: End) -> NoReturn:
        """Exits as the child has."""
        self._tell(end)
        came = time.monotonic()
        if end.status != 0 and not end.is_said and not end.was_killed:
            while time.monotonic() < came + NEWS and not self._cause(came, end):
                self._listen(0.1)
        if cause := self._cause(came, end):
            self._leave(cause.status_of_others(), cause.sentence())
        self._show(float("inf"))
        if end.status < 0:
            self._leave(128 - end.status, f"{end.sentence()}{'; is memory full?' * (end.status == -signal.SIGKILL)}")
        self._leave(end.status)

    def _cause(self, came: float, own: End) -> End | None:
        """The process that this one has ended for, if it has not said why itself and was not killed."""
        if own.status == 0 or own.is_said or own.was_killed:
            return None
        ends = [
            end for when, end in self._news if end.rank() < own.rank() or (end.rank() == own.rank() and when < came)
        ]
        return min(ends, key=End.rank, default=None)

    def _give_up(self, cause: End) -> NoReturn:
        """Ends the child because another process has ended."""
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)
        self._tell(End(self._id, cause.status, cause.says))
        self._leave(cause.status_of_others(), cause.sentence())

    def _leave(self, status: int, sentence: str = "") -> NoReturn:
        """Exits, once the others have read what they were told."""
        if sentence:
            os.write(2, f"{SAYS}{sentence}\n".encode())
        until = time.monotonic() + PING
        for link in self._links:
            with contextlib.suppress(OSError):
                link.connection.shutdown(socket.SHUT_WR)
        while self._links and time.monotonic() < until:
            self._listen(0.1)
        os._exit(status)

    def _tell(self, end: End) -> None:
        for link in self._links:
            link.send(dataclasses.asdict(end))

    def _listen(self, seconds: float) -> None:
        """Reads what the child and the other parents have written; waits for so long if there is nothing."""
        if time.monotonic() > self._pinged + PING:
            self._pinged = time.monotonic()
            for link in self._links:
                link.send(None)
        readable, _, _ = select.select([self._errors, *(link.connection for link in self._links)], [], [], seconds)
        if self._errors in readable and not self._read():
            time.sleep(min(seconds, 0.01))  # the child has closed it, and will have ended in a moment
        for link in list(self._links):
            messages = link.receive() if link.connection in readable else []
            for message in filter(None, messages or ()):
                self._heard(End(**message), link)
            silent = time.monotonic() > link.last_heard + SILENCE
            if messages is None or silent:
                self._links.remove(link)
                link.connection.close()
                if link.process not in [end.process for _, end in self._news]:
                    how = f"nothing was heard of it for {SILENCE} s" if silent else "its connection has ended"
                    self._heard(End(link.process, None, how), link)

    def _read(self) -> bool:
        """Reads what the child has written, and returns whether there was anything."""
        found = False
        with contextlib.suppress(BlockingIOError):
            while written := os.read(self._errors, 2**16):
                self._held.append((time.monotonic(), written))
                self._last_written = (self._last_written + written)[-(2**12) :]
                found = True
        return found

    def _heard(self, end: End, source: _Link) -> None:
        """Takes note of how another process has ended, and passes it on."""
        self._news.append((time.monotonic(), end))
        for link in self._links:
            if link is not source:
                link.send(dataclasses.asdict(end))

    def _show(self, until: float) -> None:
        """Writes what the child has written before a moment."""
        while self._held and self._held[0][0] < until:
            os.write(2, self._held.pop(0)[1])

    def _last_line(self) -> str:
        """The last line that the child has written."""
        self._read()
        lines = self._last_written.decode(errors="replace").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _patience(end: End) -> float:
    """Seconds that a process may go on after another one has ended."""
    if end.status == 0:
        return float("inf")
    if end.was_killed:
        return 0
    if end.status == -signal.SIGABRT:
        return GRACE + NEWS
    return STOPPING if end.status in (128 + signal.SIGTERM, 128 + signal.SIGINT) else GRACE
