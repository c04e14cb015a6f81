"""Files in a local folder and objects in a bucket of Google Cloud Storage (``gs://bucket/folder``), in the same way.

Objects of a bucket are written whole and by themselves: they can be replaced, but neither appended to nor locked, and
there are no folders to make. Both kinds have paths of ``etils.epath``, which reaches buckets by gcsfs here.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath
from etils.epath import gpath

from peer_jax.errors import InputError, TryAgain

AnyPath = Path | epath.Path

BUCKETS = "gs://"
PROBE = ".probe"
FLUSH_SECONDS = 30  # between two writings of an object that grows
REACH_SECONDS = 30  # for a first answer of a bucket

# Top packages whose exceptions say that a bucket can't be used. gcsfs raises OSErrors besides.
LIBRARIES = {"google", "gcsfs", "fsspec", "aiohttp", "requests", "urllib3"}


# Paths


def is_in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is the address of something in a bucket."""
    return os.fspath(path).startswith(BUCKETS)


def bucket_and_name(path: str | os.PathLike) -> tuple[str, str]:
    """The bucket of an address, and the name of the object in it, which may also be that of a folder or empty."""
    bucket, _, name = os.fspath(path).removeprefix(BUCKETS).partition("/")
    return bucket, name


def local(path: str | os.PathLike, argument: str | None = None) -> epath.Path:
    """The path of a local file or folder.

    Args:
        path: the path.
        argument: the argument of the caller that holds the path, for the error.

    Raises:
        InputError: for an address such as ``gs://bucket/folder``, which would become a local folder of that name.
    """
    text = os.fspath(path)
    if scheme := _scheme(text):
        raise InputError(
            f"{text} is an address ({scheme}), and only local paths can be used here: give a path", argument=argument
        )
    return epath.Path(text)


def place(path: str | os.PathLike, argument: str | None = None) -> epath.Path:
    """The path of a local file or folder, or of something in a bucket, which has to answer.

    Args:
        path: the path.
        argument: the argument of the caller that holds the path, for the error.

    Raises:
        InputError: for an address of another kind; if the libraries for buckets are missing; or if there is no such
            bucket or it can't be read; TryAgain if it does not answer.
    """
    text = os.fspath(path)
    if not (scheme := _scheme(text)):
        return epath.Path(text)
    if not is_in_bucket(text):
        raise InputError(
            f"{text} is an address ({scheme}), and only local folders and buckets can be used: give a path, or an "
            f"address like {BUCKETS}bucket/folder",
            argument=argument,
        )
    _check_bucket(bucket_and_name(text)[0], argument)
    return epath.Path(text)


def _scheme(text: str) -> str | None:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", text)  # pathlib makes gs:/bucket of gs://bucket
    return found and found[1]


# Buckets


@functools.cache
def _check_bucket(bucket: str, argument: str | None) -> None:
    """An InputError if a bucket can't be read. Prepares the libraries, which are imported when they are first used."""
    address = f"{BUCKETS}{bucket}"
    missing = [name for name in ("gcsfs", "google.cloud.storage") if not _is_installed(name)]
    if missing:
        raise InputError(
            f"{address} can't be used, because {' and '.join(missing)} is not installed: pip install 'peer-jax[gcs]'",
            argument=argument,
        )
    # epath would reach buckets by TensorFlow if it is installed, and remembers that from its first use for any path.
    os.environ["EPATH_USE_TF"] = "false"
    gpath._is_tf_installed.cache_clear()
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks for each bucket's kind by gRPC first
    import fsspec.config

    # Other processes write to the same folders, so no listing may be kept.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    from google.cloud.storage.retry import DEFAULT_RETRY

    try:
        retry = DEFAULT_RETRY.with_timeout(REACH_SECONDS)
        next(iter(client().list_blobs(bucket, max_results=1, retry=retry, timeout=REACH_SECONDS)), None)
    except Exception as error:
        if (reason := fault(error)) is None:
            raise
        raise refusal(error, f"{address} can't be used ({reason}): {_way_out(error)}", argument) from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _way_out(error: Exception) -> str:
    name = type(error).__name__
    if name == "NotFound":
        return "make the bucket, or mend its name"
    if name in ("Forbidden", "Unauthorized"):
        return "ask for the rights to read and write objects in it, or log in as somebody who has them"
    if "Credentials" in name:
        return "log in with `gcloud auth application-default login`"
    return "check the connection, and that its name is right"


def refusal(error: Exception, sentence: str, argument: str | None = None) -> InputError:
    """The error with this sentence for what the system or a library has raised: TryAgain if it may pass by itself."""
    return (TryAgain if _may_pass(error) else InputError)(sentence, argument=argument)


def _may_pass(error: Exception) -> bool:
    """Whether a bucket did not answer, or said that it can't now; a missing right or a wrong name stay as they are."""
    cause = error.__cause__ if isinstance(error, BucketError) else error
    if fault(cause) is None:  # an OSError: the system's own, or gcsfs's, which names what the bucket answered
        return cause is not error and not str(cause).startswith(("Forbidden", "Unauthorized", "Bad Request"))
    try:
        code = int(getattr(cause, "code", None))
    except (TypeError, ValueError):  # the bucket has not answered at all
        return "Credentials" not in type(cause).__name__
    return not 400 <= code < 500 or code in (408, 429)


@functools.cache
def client() -> Any:
    """The client of Google Cloud Storage of this process, with the user's own credentials."""
    from google.cloud import storage

    return storage.Client()


def blob(path: epath.Path) -> Any:
    """The object of a path, for what only the library of Google Cloud Storage can do."""
    bucket, name = bucket_and_name(path)
    return client().bucket(bucket).blob(name)


def checksums(folder: epath.Path) -> dict[str, str | None]:
    """The MD5 (base64) that a bucket itself keeps of each object below a folder, by relative path.

    None for an object that was put together from parts. Of such an object a bucket has only a CRC32C, which would not
    do: the files of Orbax's format OCDBT end with their own CRC32C, so all of them have the same one.

    Raises:
        OSError: if the bucket doesn't answer.
    """
    bucket, prefix = bucket_and_name(folder)
    with as_os_errors(folder):
        found = client().list_blobs(bucket, prefix=f"{prefix}/", fields="items(name,md5Hash),nextPageToken")
        return {one.name.removeprefix(f"{prefix}/"): one.md5_hash for one in found}


class BucketError(OSError):
    """A bucket can't be used; the text says why."""


def fault(error: BaseException) -> str | None:
    """What an exception of the libraries for buckets says, on one line; None for other exceptions."""
    if isinstance(error, BucketError):
        return str(error.strerror)
    if type(error).__module__.split(".")[0] not in LIBRARIES:
        return None
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return re.sub(r"^[A-Z]+ http\S+: ", "", " ".join(str(message).split()))[:300].rstrip(".")


def reason(error: OSError) -> str:
    """What an OSError says, whether the system or a library has raised it."""
    return error.strerror or (str(error).splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def as_os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Makes OSErrors of what the libraries for buckets raise, and says what they say."""
    try:
        yield
    except (FileNotFoundError, BucketError):
        raise
    except Exception as error:
        of_gcsfs = isinstance(error, OSError) and is_in_bucket(path)
        if (said := fault(error) or (reason(error) if of_gcsfs else None)) is None:
            raise
        raise BucketError(errno.EIO, said, os.fspath(path)) from error


# Files


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file so that readers find all of it or what was there before, even if several processes write it.

    Raises:
        InputError: if it can't be written.
    """
    path = place(path)
    try:
        _write(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        sentence = f"{path} can't be written ({reason(error)}): free space, or choose another place"
        raise refusal(error, sentence) from error


def _write(path: epath.Path, content: bytes) -> None:
    if is_in_bucket(path):
        with as_os_errors(path):
            path.write_bytes(content)
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read(path: epath.Path) -> bytes | None:
    """The content of a file; None if there is no file.

    Raises:
        OSError: if it can't be read.
    """
    with as_os_errors(path):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None


def remove(path: epath.Path) -> None:
    """Removes a file, unless it is gone."""
    with as_os_errors(path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path.unlink()


def listed(folder: epath.Path) -> list[epath.Path]:
    """The files and folders in a folder; none in the place of a folder of a bucket that is not there.

    Raises:
        OSError: if it can't be read, or for a local folder that is not there.
    """
    with as_os_errors(folder):
        try:
            return [child for child in folder.iterdir() if child != folder]
        except FileNotFoundError:  # a bucket has folders only where there is something in them
            if is_in_bucket(folder):
                return []
            raise


def make_folder(path: str | os.PathLike, argument: str | None = None) -> epath.Path:
    """Makes a folder and the folders above it, unless they exist. In a bucket there is nothing to make.

    Args:
        path: the folder.
        argument: the argument of the caller that holds the path, for the error.

    Raises:
        InputError: if it can't be made.
    """
    path = place(path, argument)
    if is_in_bucket(path):
        return path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} can't be made ({error.strerror}): choose another folder", argument=argument
        ) from error
    return path


def set_aside(path: str | os.PathLike) -> epath.Path:
    """Renames a damaged folder or file, so that another can take its place, and returns where it is now."""
    path = place(path)
    target = path.with_name(f"damaged-{path.name}")
    while target.exists():
        target = target.with_name(target.name + "-again")
    with as_os_errors(path):
        path.rename(target)
    return target


def check_room(folder: str | os.PathLike, size: int = 2**16) -> None:
    """Writes a file of ``size`` bytes to a folder and removes it. A bucket has room.

    Raises:
        OSError: if it can't be written, because the disk is full or for another reason.
    """
    if is_in_bucket(folder):
        return
    probe = local(folder) / PROBE
    try:
        probe.write_bytes(bytes(size))
    finally:
        probe.unlink(missing_ok=True)


class Growing:
    """An object in a bucket that grows: ``flush`` and ``close`` write it anew, with all that it has by then.

    Args:
        path: of the object.
        content: what it already has.
    """

    def __init__(self, path: str | os.PathLike, content: bytes = b"") -> None:
        self._path, self._content, self._written = epath.Path(path), bytearray(content), len(content)

    def write(self, content: bytes) -> None:
        """Adds to what the next ``flush`` writes."""
        self._content += content

    def flush(self) -> None:
        """Has readers find all of it.

        Raises:
            OSError: if it can't be written.
        """
        if self._written < len(self._content):
            _write(self._path, bytes(self._content))
            self._written = len(self._content)

    close = flush


class Lines:
    """A file of lines that grows.

    In a folder, a reader finds each line as soon as ``append`` has returned. In a bucket, a reader finds what was there
    at the last ``flush``, which the caller calls before it relies on the lines and when ``is_due`` says so.

    Args:
        path: of the file. Lines that it already has stay if ``keep`` accepts them and if they have a line end, which
            the last line lacks when a kill has cut it.
        keep: whether a line stays.

    Raises:
        OSError: if the file can't be written, here and in the methods.
    """

    def __init__(self, path: epath.Path, keep: Callable[[str], bool]) -> None:
        kept = "".join(line + "\n" for line in whole_lines(path) if keep(line)).encode()
        _write(path, kept)
        self._in_bucket = is_in_bucket(path)
        self._file = Growing(path, kept) if self._in_bucket else open(path, "ab")  # noqa: SIM115, close() closes it
        self._last = time.monotonic()

    def append(self, line: str) -> None:
        """Adds a line."""
        self._file.write(line.encode() + b"\n")
        if not self._in_bucket:
            self._file.flush()

    @property
    def is_due(self) -> bool:
        """Whether it is time to ``flush``."""
        return not self._in_bucket or time.monotonic() - self._last >= FLUSH_SECONDS

    def flush(self) -> None:
        """Has readers find all lines."""
        self._file.flush()
        self._last = time.monotonic()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def whole_lines(path: epath.Path) -> list[str]:
    """The lines of a file that have a line end: a kill may have cut the last line."""
    return (read(path) or b"").decode(errors="replace").split("\n")[:-1]
