"""Text files on this machine: finding them, and reading documents out of them."""

import collections
import fnmatch
import functools
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
BOM = b"\xef\xbb\xbf"

_FORMATS = (  # what a file begins with that is no text, and what it is then
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\xfd7zXZ\0", "compressed with xz"),
    (b"BZh", "compressed with bzip2"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4"),
    (b"\x1f\x8b", "compressed with gzip but not named .gz"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"PAR1", "a Parquet table"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
)
_SHOWN_KEYS, _SHOWN_CHARS = 8, 40  # of a record, in messages

OnBad = Callable[[InputError], None]  # gets what can't be read, and raises it, or returns to have it left out


class NotText(InputError):  # noqa: N818, it names what is so
    """A file that holds something else than UTF-8 text."""


class TextFile(NamedTuple):
    path: Path
    relative: str  # to the folder that was given, with forward slashes


class Found(NamedTuple):
    """The files of a corpus, and how many others there are beside them, by their suffix."""

    files: tuple[TextFile, ...]
    passed_over: Mapping[str, int]


@dataclass(frozen=True)
class TextFolder:
    """A text file, or the files of a folder that match any of the patterns; None: that end in one of SUFFIXES."""

    path: Path
    patterns: tuple[str, ...] | None = None

    def find(self, on_bad: OnBad) -> Found:
        """The file, whatever its suffix, or the folder's files in the order of `in_hash_order`.

        Hidden files and folders, `__pycache__` and linked folders are left out.

        Raises:
            InputError: if the path does not exist, is neither a file nor a folder, or has no file that matches.
        """
        path = self.path
        try:
            exists, is_file, is_folder = path.exists(), path.is_file(), path.is_dir()
        except OSError as error:
            raise InputError(f"{path} can't be read ({error.strerror}); give another path.") from error
        if not exists:
            raise InputError(f"{path} does not exist; give a text file or a folder of text files.")
        if is_file:
            return Found((TextFile(path, path.name),), {})
        if not is_folder:
            raise InputError(f"{path} is neither a file nor a folder (a pipe or device); copy its text to a file.")
        found, passed_over = [], collections.Counter()
        for folder, folders, names in os.walk(path, onerror=lambda error: on_bad(_unreadable(error.filename, error))):
            folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
            passed_over["linked folders"] += sum(Path(folder, f).is_symlink() for f in folders)
            for file in (Path(folder, name) for name in names if not name.startswith(".")):
                if not self._matches(file):
                    passed_over[file.suffix.lower() or "no suffix"] += 1
                elif file.exists() and not file.is_file():
                    passed_over["pipes or devices"] += 1
                else:
                    found.append(file)
        passed_over = +passed_over
        if not found:
            expected = (
                f"expected names that end in {', '.join(TEXT[:3] + LINES[:1])} or .gz"
                if self.patterns is None
                else f"no name matches {', '.join(map(repr, self.patterns))}"
            )
            others = f", but it has others ({count(passed_over)}): give patterns for them" if passed_over else ""
            raise InputError(f"{path} holds no text files; {expected}{others}.")
        return Found(in_hash_order(relative(found, path)), passed_over)

    def _matches(self, file: Path) -> bool:
        if self.patterns is None:
            return file.name.lower().endswith(SUFFIXES)
        names = (file.name, file.relative_to(self.path).as_posix())
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in self.patterns)


def count(numbers: Mapping[str, int]) -> str:
    """Numbers of files by suffix in words, the largest first, such as "12 .rs, 3 .js, 7 others"."""
    largest = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    words = [f"{number} {suffix[:_SHOWN_CHARS]}" for suffix, number in largest[:_SHOWN_KEYS]]
    others = sum(number for _, number in largest[_SHOWN_KEYS:])
    return ", ".join([*words, f"{others} others"] if others else words)


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
        raise _unreadable(file.path, error) from error


def begins_with_bom(file: TextFile) -> bool:
    """Whether a file begins with the mark that some editors put before UTF-8 text."""
    try:
        with _open(file) as stream:
            return stream.read(len(BOM)) == BOM
    except (OSError, EOFError, zlib.error):
        return False


def read(file: TextFile, text_key: str, on_bad: OnBad, *, keep_bom: bool = False) -> Iterator[tuple[str, str]]:
    """Yields the name and the text of each document that isn't empty.

    Args:
        file: the file.
        text_key: the key of the text in JSONL.
        on_bad: gets an `InputError` for a file that can't be read, a `NotText` for one that isn't UTF-8 text, and an
            `InputError` for each line of JSONL that isn't a JSON object with a string under `text_key`.
        keep_bom: leave a byte order mark at the beginning of a text in it.
    """
    try:
        with _open(file) as stream:
            if file.path.name.lower().removesuffix(".gz").endswith(LINES):
                yield from _read_lines(file, stream, text_key, on_bad)
                return
            beginning = stream.read(8)
            _refuse_formats(beginning, str(file.path))
            data = beginning + stream.read()
        text = _decode(data if keep_bom else data.removeprefix(BOM), str(file.path))
    except InputError as error:
        on_bad(error)
    except (OSError, EOFError, zlib.error) as error:
        on_bad(_unreadable(file.path, error))
    else:
        if text:
            yield file.relative, text


def _open(file: TextFile):
    return (gzip.open if file.path.name.lower().endswith(".gz") else open)(file.path, "rb")


def _read_lines(file: TextFile, stream, text_key: str, on_bad: OnBad) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(stream, start=1):
        if number == 1:
            _refuse_formats(line, str(file.path))
            line = line.removeprefix(BOM)
        if not line.strip():
            continue
        try:
            text = _text_of(line, f"{file.path}, line {number}", text_key)
        except InputError as error:
            on_bad(error)
        else:
            if text:
                yield f"{file.relative}:{number}", text


# Numbers are not needed, and Python refuses to convert integers of more than 4,300 digits.
_JSON = json.JSONDecoder(parse_int=lambda digits: 0, parse_float=lambda digits: 0.0)


def _text_of(line: bytes, where: str, text_key: str) -> str:
    try:
        record = _JSON.decode(_decode(line, where))
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); JSONL has one object per line.") from error
    except RecursionError as error:
        raise InputError(f"{where}: JSON that is nested too deeply; JSONL has one object per line.") from error
    text = record.get(text_key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = _shown(record) if isinstance(record, dict) else "no keys"
        raise InputError(f"{where}: no string under text_key {text_key!r} (found {keys}); give the right text_key.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half of a surrogate pair, which UTF-8 can't hold; repair the text.") from error
    return text


def _shown(record: Mapping[str, object]) -> str:
    keys = [key if len(key) <= _SHOWN_CHARS else f"{key[:_SHOWN_CHARS]}..." for key in sorted(record)[:_SHOWN_KEYS]]
    return ", ".join(keys) + (f" and {len(record) - _SHOWN_KEYS} more" if len(record) > _SHOWN_KEYS else "")


def _refuse_formats(beginning: bytes, where: str) -> None:
    for magic, what in _FORMATS:
        if beginning.startswith(magic):
            raise NotText(f"{where} is {what}; text is read as UTF-8, plain or compressed with gzip (.gz): convert it.")


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise NotText(f"{where}: a binary file (NUL bytes), not text; remove it or give a path without it.")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NotText(f"{where}: not UTF-8 text (byte {error.start}); convert it or give a path without it.") from error


def _unreadable(path: str | os.PathLike, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error)
    return InputError(f"{path} can't be read ({reason}); repair it or give a path without it.")
