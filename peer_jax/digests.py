"""Digests of files, to find bytes that a disk or a network has changed. They are no protection against forgery.

XXH3 reads memory at several GB per second on one core, so a digest costs about as much as reading the file. Two
different files have the same digest with a probability of 2**-64.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import xxhash
from etils import epath

from peer_jax import storage

ALGORITHM = "xxh3_64"
OF_BUCKETS = "md5"  # a bucket tells it of each object, so that nothing has to be read again
_CHUNK_BYTES = 2**22
_THREADS = 8  # files in a bucket are read at the same time; xxhash releases the interpreter's lock


def of_bytes(data: bytes) -> str:
    """The digest of some bytes, such as "xxh3_64:2d06800538d394c2"."""
    return f"{ALGORITHM}:{xxhash.xxh3_64_hexdigest(data)}"


def of_file(path: epath.PathLike, algorithm: str = ALGORITHM) -> str:
    """The digest of a file, which may be in a bucket. It is read in parts, so it may be larger than memory.

    Raises:
        OSError: if the file can't be read.
    """
    state = hashlib.md5(usedforsecurity=False) if algorithm == OF_BUCKETS else xxhash.xxh3_64()
    with storage.as_os_errors(path), epath.Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            state.update(chunk)
    found = base64.b64encode(state.digest()).decode() if algorithm == OF_BUCKETS else state.hexdigest()
    return f"{algorithm}:{found}"


def of_folder(folder: epath.PathLike) -> dict[str, str]:
    """The digests of all files in a folder and below, by their paths relative to it, with forward slashes.

    Raises:
        OSError: if a file can't be read.
    """
    folder = epath.Path(folder)
    if not storage.is_in_bucket(folder):
        return of_files(folder, sorted(_files(folder, PurePosixPath())))
    known = _known(folder)
    return known | of_files(folder, [name for name, found in known.items() if found is None])


def of_files(folder: epath.PathLike, names: Iterable[str]) -> dict[str, str]:
    """The digests of some files of a folder, by their relative paths.

    Raises:
        OSError: if a file is missing or can't be read.
    """
    folder, names = epath.Path(folder), list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: of_file(folder / name), names), strict=True))


def changed(folder: epath.PathLike, digests: Mapping[str, str]) -> list[str]:
    """The files of `digests` that are missing in the folder, can't be read, or have another digest, in their order.

    Raises:
        OSError: if the folder is in a bucket that doesn't answer.
    """
    folder = epath.Path(folder)
    known = _known(folder) if storage.is_in_bucket(folder) else {}

    def differs(name: str) -> bool:
        algorithm, found = digests[name].partition(":")[0], known.get(name)
        try:
            if found is None or algorithm != OF_BUCKETS:  # a copy, for instance, of what was elsewhere before
                found = of_file(folder / name, algorithm)
        except storage.BucketError:  # which says nothing of the file
            raise
        except OSError:
            return True
        return found != digests[name]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [name for name, found in zip(digests, pool.map(differs, digests), strict=True) if found]


def _known(folder: epath.Path) -> dict[str, str | None]:
    """The digests that a bucket tells of the objects of a folder; None for an object that it knows none of."""
    return {name: found and f"{OF_BUCKETS}:{found}" for name, found in sorted(storage.checksums(folder).items())}


def _files(folder: epath.Path, relative: PurePosixPath) -> Iterable[str]:
    for child in folder.iterdir():
        if child.is_dir():
            yield from _files(child, relative / child.name)
        else:
            yield str(relative / child.name)
