"""The cache of a task on disk, which `prepare` writes once and training reads by random access.

manifest.json                 describes the cache; written last, before the folder is renamed into place
train/tokens-00000.npy        [rows, seq_len] targets: ids with EOS, 0 = padding
train/segment_ids-00000.npy   [rows, seq_len] 1, 2, ... for the pieces of documents in a row, 0 = padding
validation/...                of images instead: images-00000.npy [rows, H, W, c], 0 to 255, labels-00000.npy [rows]
left_out.txt                  what of the corpus could not be read and was left out, if there is any
.verified.json                written by readers: the files that they have found to be whole, by size and time

The manifest has the digest of every other file that `prepare` wrote, and one of itself.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from peer_jax import digests, storage
from peer_jax.data.corpora import SPLITS
from peer_jax.data.rows import Damaged, Field, LabelledImages, PackedText, Rows, fields, shard_file
from peer_jax.errors import InputError
from peer_jax.storage import AnyPath, write_whole

logger = logging.getLogger(__name__)

TEXT, IMAGES = "peer_jax token cache", "peer_jax image cache"
FORMAT = 2
WITHOUT_DIGESTS = 1  # the format of earlier versions, which is read as well
MANIFEST = "manifest.json"
LEFT_OUT = "left_out.txt"
VERIFIED = ".verified.json"
SHARD_VALUES = {TEXT: 2**24, IMAGES: 2**29}  # of the largest array of a shard, whose files stay open
COPIED_BYTES, COPIED_AT_ONCE = 2**24, 8
_READERS: dict[str, type[Rows]] = {TEXT: PackedText, IMAGES: LabelledImages}


def open_cache(path: Path | str, split: str) -> Rows:
    """Opens one split of a prepared cache, after `verify`.

    Raises:
        InputError: if there is no cache, if it is damaged or of another program or version, or if the split has no
            rows.
    """
    path = Path(path)
    manifest = verify(path)
    if split not in manifest["splits"]:
        raise InputError(f"{path} has no split {split!r}; it has {', '.join(manifest['splits'])}.")
    source = _READERS[manifest["kind"]](path, split, manifest)
    if not source.rows:
        raise InputError(f"{path} has no rows for {split!r}; prepare it with max_{split}_tokens above 0.")
    return source


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a cache whose files are as they were written.

    All bytes are read the first time. Later, also in other processes, only sizes and times of change are compared with
    what they were then. A cache of an earlier version has no digests: its tokens are compared with its counts, and its
    manifest is given digests, unless the folder is read-only.

    Raises:
        Damaged: if a file is missing or not as it was written.
        InputError: if there is no cache, or another program or another version has written it.
    """
    manifest = read_manifest(path)
    names = _files(manifest)
    now = {"manifest": digests.of_bytes(_canonical(manifest)), "files": _states(path, names)}
    is_earlier = manifest["format"] == WITHOUT_DIGESTS
    if _verified.get(path) == now or (_read_verified(path) == now and not is_earlier):
        return manifest
    if is_earlier:
        _compare_counts(path, manifest)
        given = signed({**manifest, "format": FORMAT, "digests": digests.of_files(path, names)})
        try:
            write_whole(path / MANIFEST, json.dumps(given, indent=1))
        except InputError:  # the folder is read-only
            _verified[path] = now
            return manifest
        logger.warning("%s is a cache of an earlier version: its counts fit, and its manifest now has digests", path)
        return verify(path)
    if changed := digests.changed(path, manifest["digests"]):
        others = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        raise Damaged(f"{path / changed[0]}{others} is missing or damaged", path)
    _verified[path] = now
    with contextlib.suppress(InputError):  # the folder may be read-only
        write_whole(path / VERIFIED, json.dumps(now))
    return manifest


def bring(path: Path, shared: AnyPath) -> bool:
    """Has a whole copy of a cache in a bucket on this machine, and returns whether there is one to copy.

    One process of a machine copies it, and the others wait for it.

    Raises:
        Damaged: if the one in the bucket is not as it was written.
        InputError: if another program or another version has written it, or it can't be copied.
    """
    if _is_whole(path):
        return True
    if not (shared / MANIFEST).exists():
        return False
    prefix = f".{path.name}.copying-"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f"{prefix}lock"):
            if not _is_whole(path):
                for leftover in path.parent.glob(f"{prefix}*/"):  # of processes that were killed
                    shutil.rmtree(leftover, ignore_errors=True)
                _bring(path, shared, prefix)
    except FileNotFoundError as error:
        raise Damaged(f"{shared} is damaged", shared) from error
    except OSError as error:
        sentence = f"{shared} can't be copied to {path} ({storage.reason(error)}): free space"
        raise storage.refusal(error, sentence) from error
    return True


def _bring(path: Path, shared: AnyPath, prefix: str) -> None:
    """Copies a cache to this machine, in the place of a damaged copy."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as above:
        (folder := Path(above, path.name)).mkdir()
        _copy([MANIFEST, *_files(read_manifest(shared))], shared, folder)
        try:
            verify(folder)
        except Damaged as error:
            raise Damaged(f"{shared} is damaged", shared) from error
        shutil.rmtree(path, ignore_errors=True)
        os.rename(folder, path)


def _is_whole(path: Path) -> bool:
    """Whether there is a cache that is not damaged."""
    try:
        return path.exists() and bool(verify(path))
    except Damaged:
        return False


def publish(path: Path, shared: AnyPath) -> None:
    """Copies a cache of this machine to a bucket, unless it has one; its manifest last, which makes it a cache.

    Raises:
        InputError: if it can't be written.
    """
    manifest = verify(path)
    try:
        if storage.read(shared / MANIFEST) is None:
            _copy(_files(manifest), path, shared)
            _copy([MANIFEST], path, shared)
    except OSError as error:
        sentence = f"{shared} can't be written to ({storage.reason(error)}): choose another cache"
        raise storage.refusal(error, sentence) from error


def withdraw(shared: AnyPath) -> None:
    """Has a damaged cache in a bucket count as none, so that it is written anew."""
    storage.remove(shared / MANIFEST)


def _copy(names: Iterable[str], source: AnyPath, target: AnyPath) -> None:
    """Copies files between a bucket and this machine, some at the same time."""

    def copy(name: str) -> None:
        storage.make_folder((target / name).parent)
        with storage.as_os_errors(source / name), (source / name).open("rb") as file, (target / name).open("wb") as out:
            shutil.copyfileobj(file, out, COPIED_BYTES)

    with ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
        list(pool.map(copy, names))


_verified: dict[Path, dict[str, Any]] = {}  # what this process has found to be whole


def _read_verified(path: Path) -> object:
    try:
        return json.loads((path / VERIFIED).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _files(manifest: Mapping[str, Any]) -> list[str]:
    """The files of a cache beside its manifest; of an earlier version's cache, those that it can't do without."""
    return list(manifest.get("digests", ())) or [
        shard_file(Path(), split, name, shard).as_posix()
        for split in SPLITS
        for name in manifest["dtypes"]
        for shard in range(len(manifest["splits"][split]["shards"]))
    ]


def _states(path: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """What changes when a file is written: its size, its inode and the times of its last changes."""
    try:
        states = {name: (path / name).stat() for name in names}
    except OSError as error:
        raise Damaged(f"{error.filename} is missing or damaged", path) from error
    return {name: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for name, s in states.items()}


def _compare_counts(path: Path, manifest: dict[str, Any]) -> None:
    """Finds most damages of a cache without digests: tokens must be ids where a segment is, and as many as counted."""
    size = manifest.get("vocabulary", {}).get("size", np.inf)
    for split in SPLITS:
        source, tokens = PackedText(path, split, manifest), 0
        for shard, segment_ids in zip(source.shards["tokens"], source.shards["segment_ids"], strict=True):
            used = np.asarray(segment_ids) > 0
            if ((np.asarray(shard) > 0) != used).any() or (shard.size and int(shard.max()) >= size):
                raise Damaged(f"{path / split} holds tokens that are no ids of its vocabulary", path)
            tokens += np.count_nonzero(used)
        if tokens != source.counts["tokens"]:
            raise Damaged(f"{path / split} holds {tokens} tokens but its manifest says {source.counts['tokens']}", path)


def read_manifest(path: AnyPath) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
        Damaged: if it is not as it was written.
        InputError: if it is missing, or if another program or another version has written it.
    """
    try:
        with storage.as_os_errors(path):
            manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        what = "is not a prepared cache (it has no readable manifest.json)" if path.exists() else "does not exist"
        sentence = f"{path} {what}; run `peer-jax prepare`, or delete it if nothing else needs it."
        raise storage.refusal(error, sentence) from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path / MANIFEST} is damaged", path) from error
    if not isinstance(manifest, dict) or (manifest.get("kind") not in _READERS and "digest" not in manifest):
        raise InputError(f"{path} is not a cache of peer_jax; choose another cache_dir.")
    version = manifest.get("format")
    if ("digest" in manifest or version == FORMAT) and manifest.get("digest") != _signature(manifest):
        raise Damaged(f"{path / MANIFEST} is damaged", path)
    if version not in (FORMAT, WITHOUT_DIGESTS):
        raise InputError(
            f"{path} has cache format {version} and this version reads {FORMAT}; delete it and prepare it again."
        )
    try:
        counted, shapes = _READERS[manifest["kind"]].counted, [field.shape for field in fields(manifest).values()]
        for split in SPLITS:
            counts = manifest["splits"][split]
            if sum(counts["shards"]) != counts["rows"] or not all(type(counts[key]) is int for key in counted):
                raise KeyError(split)
        sum(size for shape in shapes for size in shape)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path / MANIFEST} is damaged", path) from error
    return manifest


def signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with a digest of itself."""
    return {**manifest, "digest": _signature(manifest)}


def _signature(manifest: Mapping[str, Any]) -> str:
    return digests.of_bytes(_canonical({key: value for key, value in manifest.items() if key != "digest"}))


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def text_fields(seq_len: int, vocabulary_size: int) -> dict[str, Field]:
    """The arrays of text, in the smallest types that are large enough for ids, and for `seq_len` segments per row."""
    return {
        "tokens": Field((seq_len,), "uint16" if vocabulary_size <= 2**16 else "int32"),
        "segment_ids": Field((seq_len,), np.min_scalar_type(seq_len).name),
    }


def image_fields(shape: tuple[int, int, int]) -> dict[str, Field]:
    """The arrays of images of this height, width and number of channels."""
    return {"images": Field(shape, "uint8"), "labels": Field((), "int32")}


class CacheWriter:
    """Writes a cache beside its final place and renames it there, so that readers see all of it or nothing.

    A damaged cache that is there already is replaced.

    To be used as a context manager while the lock of that place is held. Leftovers of writers that were killed are
    removed, and so are those of this writer if the block raises.
    """

    def __init__(self, path: Path, kind: str, arrays: Mapping[str, Field]):
        self.path, self.kind, self.arrays = path, kind, dict(arrays)
        self._prefix = f".{path.name}.writing-"

    def __enter__(self) -> "CacheWriter":
        for leftover in self.path.parent.glob(self._prefix + "*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._folder = Path(tempfile.mkdtemp(prefix=self._prefix, dir=self.path.parent))
        os.chmod(self._folder, 0o755)  # mkdtemp's 0700 would lock colleagues out of a shared cache
        return self

    def __exit__(self, *exception) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)  # commit() has renamed it, and nothing is there

    def write_split(self, split: str, batches) -> dict:
        """Writes batches of rows, each a tuple of the arrays in their order, as shards.

        Returns the number of rows, the rows of each shard and, of text, the number of tokens.
        """
        (self._folder / split).mkdir()
        shard_rows = max(1, SHARD_VALUES[self.kind] // max(math.prod(field.shape) for field in self.arrays.values()))
        shards, tokens, held = [], 0, 0
        pending: dict[str, list[np.ndarray]] = {name: [] for name in self.arrays}

        def flush(rows: int) -> None:
            for name, parts in pending.items():
                joined = np.concatenate(parts)
                self._save(shard_file(self._folder, split, name, len(shards)), joined[:rows])
                pending[name] = [joined[rows:]]
            shards.append(rows)

        for batch in batches:
            for name, array in zip(pending, batch, strict=True):
                pending[name].append(array.astype(self.arrays[name].dtype))
            tokens += int(np.count_nonzero(batch[1])) if self.kind == TEXT else 0
            held += len(batch[0])
            while held >= shard_rows:
                flush(shard_rows)
                held -= shard_rows
        if held:
            flush(held)
        _sync(self._folder / split)
        return {"rows": sum(shards), "shards": shards} | ({"tokens": tokens} if self.kind == TEXT else {})

    def _save(self, file: Path, array: np.ndarray) -> None:
        with open(file, "wb") as stream:
            np.save(stream, array, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())

    def write_left_out(self, sentences: Sequence[str]) -> None:
        """Writes what was left out of the corpus, a line each; no file if that is nothing."""
        if sentences:
            self._write(self._folder / LEFT_OUT, "".join(f"{sentence}\n" for sentence in sentences))

    def commit(self, manifest: dict) -> None:
        """Writes the manifest and moves the folder into place."""
        manifest = {"kind": self.kind, "format": FORMAT, **manifest}
        manifest["dtypes"] = {name: field.dtype for name, field in self.arrays.items()}
        if self.kind == TEXT:  # as earlier versions read it
            manifest["seq_len"] = self.arrays["tokens"].shape[0]
        else:
            manifest["shapes"] = {name: field.shape for name, field in self.arrays.items()}
        manifest["digests"] = digests.of_folder(self._folder)
        self._write(self._folder / MANIFEST, json.dumps(signed(manifest), indent=1))
        _sync(self._folder)
        if self.path.exists():
            damaged = self._folder.with_name(self._folder.name + "-damaged")
            os.rename(self.path, damaged)
            os.rename(self._folder, self.path)
            shutil.rmtree(damaged, ignore_errors=True)
        else:
            os.rename(self._folder, self.path)
        _sync(self.path.parent)

    @staticmethod
    def _write(file: Path, text: str) -> None:
        with open(file, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Has the file system keep the names of a folder even if the machine crashes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
