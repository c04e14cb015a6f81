"""Text files on this machine: finding them, and reading documents out of them."""

import functools
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from peer_jax.errors import InputError

TEXT = (
    ".txt",
    ".text",
    ".md",
    ".rst",
    ".tex",
    ".py",
    ".html",
    ".xml",
    ".csv",
    ".tsv",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".java",
)
LINES = (".jsonl", ".json")  # one JSON object per line, as C4 and the Pile are published
SUFFIXES = tuple(suffix + gz for suffix in TEXT + LINES for gz in ("", ".gz"))


class TextFile(NamedTuple):
    path: Path
    relative: str  # to the folder that was given, with forward slashes


def find(path: str | os.PathLike) -> tuple[TextFile, ...]:
    """The file at `path`, whatever its suffix, or all text files in the folder, in the order of `in_hash_order`."""
    path = Path(path).expanduser()
    if not path.exists():
        raise InputError(f"{path} does not exist; give a text file or a folder of text files.")
    if path.is_file():
        return (TextFile(path, path.name),)
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        found += [Path(folder, n) for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    if not found:
        raise InputError(
            f"{path} holds no text files; expected names that end in {', '.join(TEXT[:3] + LINES[:1])} or .gz."
        )
    return in_hash_order(relative(found, path))


@functools.lru_cache(maxsize=8)
def python_sources(root: Path) -> tuple[TextFile, ...]:
    """The `.py` files below a folder of modules, without the packages that are installed inside it.

    The list is kept in memory: a sweep names its corpus for every run, and listing 13,000 files takes a second.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return relative(found, root)


def relative(files: Iterable[Path], root: Path) -> tuple[TextFile, ...]:
    return tuple(TextFile(file, file.relative_to(root).as_posix()) for file in files)


def in_hash_order(files: Iterable[TextFile]) -> tuple[TextFile, ...]:
    """Sorts files by the hash of their path, so that a limit on tokens takes a sample and not the first folders."""
    return tuple(sorted(files, key=lambda file: hashlib.sha256(file.relative.encode(errors="replace")).digest()))


def corpus_name(path: str | os.PathLike) -> str:
    """The last part of a path, without suffixes; characters that are unsafe in file names become "_"."""
    name = Path(path).expanduser().absolute().name
    while name.lower().endswith((*SUFFIXES, ".gz")):
        name = name[: name.rindex(".")]
    return "".join(c if c.isalnum() or c in "._" else "_" for c in name)[:60] or "text"


def sha256(file: TextFile) -> str:
    try:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(file, error) from error


def read(file: TextFile, text_key: str, skip_undecodable: bool) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each document that isn't empty.

    Raises:
        InputError: the file can't be read, isn't UTF-8 text (unless `skip_undecodable`), or a line isn't a JSON object
            with a string under `text_key`.
    """
    stem = file.path.name.lower().removesuffix(".gz")
    try:
        with (gzip.open if file.path.name.lower().endswith(".gz") else open)(file.path, "rb") as stream:
            if stem.endswith(LINES):
                yield from _read_lines(file, stream, text_key)
                return
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error
    try:
        text = _decode(data, str(file.path))
    except InputError:
        if skip_undecodable:
            return
        raise
    if text:
        yield file.relative, text


def _read_lines(file: TextFile, stream, text_key: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON ({error.msg}); JSONL has one object per line.") from error
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(sorted(record)) if isinstance(record, dict) else "no keys"
            raise InputError(f"{where}: no string under text_key {text_key!r} (found {keys}); give the right text_key.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: half of a surrogate pair, which UTF-8 can't hold; repair the text.") from error
        if text:
            yield f"{file.relative}:{number}", text


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise InputError(f"{where}: a binary file (NUL bytes), not text; remove it or give a path without it.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: not UTF-8 text (byte {error.start}); convert it or give a path without it."
        ) from error


def _unreadable(file: TextFile, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{file.path} can't be read ({reason}); repair it or give a path without it.")
