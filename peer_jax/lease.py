"""Who has a run: a lease that its holder renews, and that others take over once it is renewed no more.

A lease names its holder and counts its renewals. Whoever finds a lease watches it: a lease that does not change for
``stale`` seconds of the watcher's own monotonic clock belongs to a holder that has died. Clocks of two machines are
never compared. Who takes a lease over is decided by the place that it is kept in, which lets one of several win.
"""

import abc
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from peer_jax import storage
from peer_jax.errors import InUse

STALE = 60.0  # seconds
REQUEST_SECONDS = 10
LEAST_BYTES = 512
BEATS = 4  # renewals within ``stale``, of which all but one may fail or be late

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that has a run.

    Attributes:
        host: the name of its machine.
        process: its number there.
        since: the time by its own clock, for people to read.
    """

    host: str
    process: int
    since: str

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since}"


class Found(NamedTuple):
    """A lease as it is found: its content, and the version that names this very content to the place."""

    version: Any
    content: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the lease; empty if it can't be read, so that it is watched like any other."""
        with contextlib.suppress(ValueError):
            if isinstance(fields := json.loads(self.content), dict):
                return fields
        return {}

    @property
    def is_free(self) -> bool:
        """Whether its holder has released it."""
        return self.fields.get("released") is True

    @property
    def holder(self) -> Holder | None:
        """Its holder; None if it is released or can't be read."""
        fields = self.fields
        with contextlib.suppress(KeyError):
            return None if self.is_free else Holder(fields["host"], fields["process"], fields["since"])
        return None


class Place(abc.ABC):
    """Where a lease is kept. ``str`` of it names it in this process."""

    @abc.abstractmethod
    def read(self) -> Found | None:
        """The lease; None if there is none."""

    @abc.abstractmethod
    def take(self, content: bytes, version: Any) -> Any:
        """Puts a lease of a new holder in the place of the one of ``version`` (None: of none) and returns its version.

        None if another lease is there by now.
        """

    @abc.abstractmethod
    def renew(self, content: bytes, version: Any) -> Any:
        """Writes a lease anew for its holder and returns its version; None if somebody else has the lease by now."""


class Folder(Place):
    """A local or shared folder of leases, each in a file whose name is a number; the highest number is valid.

    A file system has no conditional replacement. But a new name can be linked by one process alone, and each holder
    writes to its own file only, so a holder that comes back to life can't overwrite the lease of its successor.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)

    def __str__(self) -> str:
        return str(self._path.absolute())

    def _numbers(self) -> list[int]:
        try:
            return sorted(int(name) for name in os.listdir(self._path) if name.isdecimal())
        except FileNotFoundError:
            return []

    def read(self) -> Found | None:
        """See ``Place``."""
        while numbers := self._numbers():
            with contextlib.suppress(FileNotFoundError):  # its successor has just removed it
                return Found(numbers[-1], (self._path / str(numbers[-1])).read_bytes())
            time.sleep(0.05)  # a network's file system may list it for a while
        return None

    def take(self, content: bytes, version: int | None) -> int | None:
        """See ``Place``."""
        number = (version or 0) + 1
        self._path.mkdir(parents=True, exist_ok=True)
        temporary = self._path / f".{secrets.token_hex(8)}.tmp"
        try:
            temporary.write_bytes(content)
            _link(temporary, self._path / str(number))
        except FileExistsError:
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if self._numbers()[-1:] != [number]:  # this process was so slow that the number has been used and removed
            (self._path / str(number)).unlink(missing_ok=True)
            return None
        for older in self._numbers():
            if older < number:
                (self._path / str(older)).unlink(missing_ok=True)
        return number

    def renew(self, content: bytes, version: int) -> int | None:
        """See ``Place``."""
        if self._numbers()[-1:] != [version]:
            return None
        try:
            with (self._path / str(version)).open("r+b") as file:  # it keeps its size, so a full disk has room for it
                file.write(content)
        except FileNotFoundError:
            return None
        return version


class Bucket(Place):
    """A lease that is an object in a bucket. Its version is the object's generation, which each writing names."""

    def __init__(self, path: epath.Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read(self) -> Found | None:
        """See ``Place``."""
        from google.api_core import exceptions

        while True:
            blob = storage.blob(self._path)
            try:
                blob.reload()
                return Found(blob.generation, blob.download_as_bytes(if_generation_match=blob.generation))
            except exceptions.NotFound:
                return None
            except exceptions.PreconditionFailed:  # it was written between the two requests
                continue

    def take(self, content: bytes, version: int | None) -> int | None:
        """See ``Place``."""
        from google.api_core import exceptions

        while True:
            blob = storage.blob(self._path)
            try:
                blob.upload_from_string(content, if_generation_match=version or 0, timeout=REQUEST_SECONDS)
                return blob.generation
            except exceptions.PreconditionFailed:
                found = self.read()
            if found is None or found.fields.get("owner") != Found(None, content).fields.get("owner"):
                return None
            if found.content == content:  # the bucket has written it, and its first answer was lost
                return found.version
            version = found.version

    def renew(self, content: bytes, version: int) -> int | None:
        """See ``Place``."""
        return self.take(content, version)


def _link(source: Path, target: Path) -> None:
    """Makes ``target`` with the content of ``source``; a FileExistsError if it is there already."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        with target.open("xb") as file:  # the file system has no links, and readers may find a part of the content
            file.write(source.read_bytes())


class Held:
    """A lease that this process has, and renews in a thread of its own until ``release``."""

    def __init__(self, place: Place, fields: dict[str, Any], version: Any) -> None:
        self._place, self._fields, self._version = place, fields, version
        self._renewed, self._renewing = time.monotonic(), threading.Lock()
        self._after: list[Callable[[], None]] = []
        self._ending = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._beating.start()

    def then(self, action: Callable[[], None]) -> "Held":
        """Has ``release`` call ``action`` at its end."""
        self._after.append(action)
        return self

    @property
    def lost(self) -> bool:
        """Whether somebody else has the lease by now, because this process could not renew it for too long.

        What the lease guards must not be written to any more then. If renewals have failed, the place is asked again.
        """
        if time.monotonic() - self._renewed > 2 * self.seconds and not self._ending.is_set():
            with contextlib.suppress(Exception):  # the thread says so
                self._renew()
        return self._version is None

    @property
    def seconds(self) -> float:
        """The time between two renewals."""
        return self._fields["stale"] / BEATS

    def _beat(self) -> None:
        complained = False
        while self._version is not None and not self._ending.wait(self.seconds):
            try:
                self._renew()
                complained = False
            except Exception as error:  # of whatever kind the storage's library has: it may come back
                if not complained:
                    logger.warning("the lease %s can't be renewed, trying again: %s", self._place, error)
                complained = True

    def _renew(self, **changes: Any) -> None:
        with self._renewing:
            if self._version is not None:
                self._fields |= {"beat": self._fields["beat"] + 1, **changes}
                self._version = self._place.renew(_encoded(self._fields), self._version)
                self._renewed = time.monotonic()

    def release(self) -> None:
        """Gives the lease back, if this process still has it. Releasing twice does nothing."""
        if self._ending.is_set():
            return
        self._ending.set()
        self._beating.join()
        with contextlib.suppress(Exception):  # whoever wants it next will find it stale
            self._renew(released=True)
        for action in self._after:
            action()


@dataclasses.dataclass
class _Seen:
    """What this process has seen of a lease: its last state, since when, and whether it was seen to change."""

    state: tuple[Any, bytes]
    since: float
    changed: bool = False


_seen: dict[str, _Seen] = {}


def hold(
    place: Place,
    *,
    timeout: float = 0,
    stale: float = STALE,
    has_died: Callable[[Found], bool] = lambda found: False,
    host: str | None = None,
) -> Held:
    """Takes a lease that is free, or whose holder has died.

    A lease of somebody else is watched until its holder renews it, which takes up to a quarter of ``stale``, or until
    it is stale. What this process has seen of a lease before is remembered, so a later call answers at once.

    Args:
        place: where the lease is kept.
        timeout: seconds to wait for a holder that lives.
        stale: seconds without a renewal after which a holder has died. If the holder was given more, that counts.
        has_died: whether the holder of a lease is known to have died, without watching.
        host: the name of this machine; None: as the system says.

    Raises:
        InUse: if a process that lives has the lease.
        OSError: if the place can't be written to, or what else its library raises.
    """
    host = host or socket.gethostname()
    holder = {"owner": secrets.token_hex(16), "host": host, "machine": machine(host), "process": os.getpid()}
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    fields = holder | {"since": now, "stale": stale, "beat": 0}
    deadline = time.monotonic() + timeout
    while True:
        found = place.read()
        if found is None or found.is_free or has_died(found) or _is_silent(place, found, stale):
            version = place.take(_encoded(fields), None if found is None else found.version)
            if version is not None:
                return Held(place, fields, version)
            if (winner := place.read()) is not None:  # it has just been taken, so its holder lives
                _seen[str(place)] = _Seen(winner, time.monotonic(), changed=True)
        elif _seen[str(place)].changed and time.monotonic() >= deadline:
            raise InUse(f"{place} is held by {found.holder or 'another process'}")
        else:
            time.sleep(min(1.0, stale / 20))


def _is_silent(place: Place, found: Found, stale: float) -> bool:
    """Whether this process has seen no renewal of a lease for as long as its holder or ``stale`` demand."""
    seen, now = _seen.get(str(place)), time.monotonic()
    if seen is None or seen.state != found:
        _seen[str(place)] = _Seen(found, now, changed=seen is not None)
        return False
    theirs = found.fields.get("stale", 0)
    return now - seen.since >= max(stale, theirs if isinstance(theirs, (int, float)) else 0)


def _encoded(fields: dict[str, Any]) -> bytes:
    """A lease as bytes, which are as many at each renewal."""
    return json.dumps(fields).encode().ljust(LEAST_BYTES)


@functools.cache
def machine(host: str) -> str:
    """What tells a running machine from all others, from itself before its last start, and from its containers."""
    parts = [host]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def is_here(found: Found) -> bool:
    """Whether the holder of a lease is or was a process of this machine."""
    return found.fields.get("machine") == machine(socket.gethostname())


def is_gone(found: Found) -> bool:
    """Whether the holder of a lease was a process of this machine that has ended."""
    process = found.fields.get("process")
    return is_here(found) and isinstance(process, int) and 0 < process < 2**31 and not _runs(process)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
        # In a container, whose first process may not ask how others have ended, a process that has ended stays: Z.
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True
