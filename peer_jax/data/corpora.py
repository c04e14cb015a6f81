"""Where documents come from: the interpreter's own library and packages, local files, TFDS builders.

A corpus has two splits, "train" and "validation", that share no document, not even two with the same text. This module
imports neither TensorFlow nor JAX: training names its corpus without paying for either.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from peer_jax.data import text_files
from peer_jax.errors import InputError
from peer_jax.fields import Placed

SPLITS = ("train", "validation")


class Document(NamedTuple):
    """One text and where it is: a path, with the line in a JSONL file."""

    name: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """What a `TextTask` needs of a corpus. One's own class will do; `TfdsCorpus` is read by seqio instead."""

    @property
    def name(self) -> str:
        """Short, and fit for a file name."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything that determines the documents and their order."""
        ...

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of "train" or "validation": none empty, none in both, always in the same order."""
        ...

    def num_bytes(self) -> int:
        """About how much text there is, for the progress bar."""
        ...


def python_stdlib(*, validation_share: float = 0.05) -> "LocalCorpus":
    """The `.py` files of the running interpreter's standard library: real text on any machine, nothing to download.

    A module's relative path decides its split, so that it keeps it from one Python release to the next. Files that
    aren't UTF-8 (tests of codecs) or empty are skipped, and so are training files whose text is also in validation.
    Validation has the beginning of each held-out file, up to 16 KiB, so that a few large files don't outweigh the rest.
    """
    return _python_files("python_stdlib", _stdlib(), validation_share, beginning=2**14)


def python_packages(*, validation_share: float = 0.05) -> "LocalCorpus":
    """The `.py` files of the standard library and of the packages installed beside it: 200 MB with this project's.

    Splits are those of `python_stdlib`, by the path relative to the standard library or to `site-packages`: a module
    keeps its split between releases and machines, and at equal shares no file trains here that validates there.

    Validation has the first 4 KiB of each held-out file, in the order of the hash of its path. Where
    `max_validation_tokens` cuts, that leaves a sample of files over all packages and the standard library; with 16 KiB,
    2**18 tokens were 43 files and one package had 38% of them.

    Only exact copies of validation files are kept out of training. Near copies are not (generated or vendored code,
    licence headers): a fifth of the validation text is in blocks of eight lines that training holds word for word.

    The corpus is what is installed. After an upgrade it is another one, with another cache, so runs that are to be
    compared over time or between machines share a cache by `prepared(...)`.

    Raises:
        InputError: no `.py` files in the standard library's folder, or none in those of installed packages.
    """
    roots = dict.fromkeys(Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib"))
    packages = [file for root in roots for file in text_files.python_sources(root)]
    if not packages:
        raise InputError(
            f"{' and '.join(map(str, roots))} holds no .py files of installed packages; install some there, or use "
            "python_stdlib()."
        )
    return _python_files("python_packages", [*_stdlib(), *packages], validation_share, beginning=2**12)


def _stdlib() -> tuple[text_files.TextFile, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    files = text_files.python_sources(root)
    if not files:
        raise InputError(
            f"{root} holds no .py files of the standard library; use local_files(...) with text of your own."
        )
    return files


def _python_files(name: str, files: Sequence[text_files.TextFile], share: float, *, beginning: int) -> "LocalCorpus":
    return LocalCorpus(
        name,
        files=text_files.in_hash_order(files),
        validation_share=share,
        split_by="path",
        skip_undecodable=True,
        validation_document_chars=beginning,
    )


def local_files(
    path: Placed[str | os.PathLike],
    *,
    validation_path: Placed[str | os.PathLike | None] = None,
    validation_share: float = 0.02,
    text_key: str = "text",
) -> "LocalCorpus":
    """Text files: one file, or every text file in a folder and below.

    Args:
        path: `.txt`, `.md`, `.py` and other text (one document a file), `.jsonl` / `.json` (one a line, under
            `text_key`), each also with `.gz`. In a folder, other suffixes and hidden names are passed over.
        validation_path: files to validate on; training documents with the same text as one of them are dropped.
        validation_share: else, the share of documents to validate on. The hash of a document's text decides, so that
            all copies of a text are in one split. If that would leave validation empty, the document with the smallest
            hash goes there; a corpus of a single document gives its last part, cut at the end of a line.
        text_key: the key of the text in JSONL.

    Raises:
        InputError: a path is missing or holds no text files. What is wrong inside the files is found on reading.
    """
    files = text_files.find(path)
    return LocalCorpus(
        text_files.corpus_name(path),
        files=files,
        validation_files=None if validation_path is None else text_files.find(validation_path),
        validation_share=validation_share,
        text_key=text_key,
    )


def tfds_corpus(
    builder: str,
    *,
    train_split: str = "train",
    validation_split: str | None = "validation",
    text_key: str = "text",
    data_dir: Placed[str | os.PathLike | None] = None,
) -> "TfdsCorpus":
    """A TensorFlow Datasets builder with its version: "c4/en:3.1.0", "lambada:1.0.0" (text_key="passage"), ...

    Args:
        builder: name, config and version; downloaded or generated by TFDS if it isn't in `data_dir`.
        train_split, validation_split: TFDS splits or slices, such as "train[:10%]". If `validation_split` is None or
            the builder lacks it, validation is the last 1% of `train_split`, training the rest, and `prepare` says so.
        text_key: the feature that holds the text.
        data_dir: where TFDS keeps data; a folder given here must already hold the builder's data.

    Raises:
        InputError: no version in `builder`, or a missing `data_dir`.
    """
    return TfdsCorpus(builder, train_split, validation_split, text_key, None if data_dir is None else str(data_dir))


@dataclass(frozen=True)
class LocalCorpus:
    """Documents in files on this machine; made by `python_stdlib`, `python_packages` and `local_files`."""

    name: str
    files: tuple[text_files.TextFile, ...]
    validation_files: tuple[text_files.TextFile, ...] | None = None
    validation_share: float = 0.02
    text_key: str = "text"
    split_by: str = "content"  # or "path"
    skip_undecodable: bool = False
    validation_document_chars: int | None = None  # a longer validation document is cut there, at the end of a line
    _known: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # what one pass found out

    def __post_init__(self):
        share = self.validation_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"validation_share is {share!r}; give a number between 0 and 1, such as 0.02.")

    def fingerprint(self) -> str:
        return self._remember("fingerprint", self._fingerprint)

    def num_bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self.files + (self.validation_files or ()))

    def documents(self, split: str) -> Iterator[Document]:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; it must be 'train' or 'validation'.")
        if self.validation_files is not None:
            return self._read(self.validation_files) if split == "validation" else self._without_validation(self.files)
        lone = self._remember("lone", self._lone_document)
        if lone is not None:
            head, tail = _cut(lone.text, self.validation_share)
            if not (head.strip() and tail.strip()):
                raise InputError(
                    f"{lone.name} is the only document and too short to be split into training and validation; "
                    "give more text, or validation_path."
                )
            return iter([Document(lone.name, head if split == "train" else tail)])
        if split == "validation":
            return (self._beginning(doc) for doc in self._read(self.files) if self._held_out(doc))
        kept = (doc for doc in self._read(self.files) if not self._held_out(doc))
        return kept if self.split_by == "content" else self._drop(kept)

    def _read(self, files) -> Iterator[Document]:
        for file in files:
            for name, text in text_files.read(file, self.text_key, self.skip_undecodable):
                yield Document(name, text)

    def _without_validation(self, files) -> Iterator[Document]:
        return self._drop(self._read(files))

    def _drop(self, documents) -> Iterator[Document]:
        """Leaves out the documents whose text validation has too."""
        texts = self._remember("texts", self._validation_texts)
        return (doc for doc in documents if _digest(doc.text) not in texts)

    def _validation_texts(self) -> set[bytes]:
        if self.validation_files is not None:
            return {_digest(doc.text) for doc in self._read(self.validation_files)}
        return {_digest(doc.text) for doc in self._read(self.files) if self._held_out(doc)}

    def _beginning(self, doc: Document) -> Document:
        limit = self.validation_document_chars
        if limit is None or len(doc.text) <= limit:
            return doc
        return Document(doc.name, doc.text[: doc.text.rfind("\n", 0, limit) + 1 or limit])

    def _held_out(self, doc: Document) -> bool:
        key = self._key(doc)
        return _fraction(key) < self.validation_share or key == self._remember("fallback", self._smallest_key)

    def _key(self, doc: Document) -> bytes:
        return _digest(doc.text if self.split_by == "content" else doc.name)

    def _smallest_key(self) -> bytes | None:
        """The key to hold out when none is below the share; None when one is, which the first documents soon show."""
        smallest = None
        for doc in self._read(self.files):
            key = self._key(doc)
            if _fraction(key) < self.validation_share:
                return None
            smallest = key if smallest is None else min(smallest, key)
        return smallest

    def _lone_document(self) -> Document | None:
        """The only document (copies don't count), or None if there are two that differ."""
        first = None
        for doc in self._read(self.files):
            if first is None:
                first = doc
            elif doc.text != first.text:
                return None
        if first is None:
            where = os.path.commonpath([file.path for file in self.files])
            raise InputError(f"{where} holds no text: every document in it is empty; give a path with text in it.")
        return first

    def _fingerprint(self) -> str:
        rules = [self.validation_share, self.text_key, self.split_by, self.skip_undecodable]
        rules.append(self.validation_document_chars)
        parts = [("rules", json.dumps(rules))]
        for role, files in (("documents", self.files), ("validation", self.validation_files or ())):
            parts += [(role, file.relative, text_files.sha256(file)) for file in files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _remember(self, what, find):
        if what not in self._known:
            self._known[what] = find()
        return self._known[what]

    def __getstate__(self):
        return {**self.__dict__, "_known": {}}


@dataclass(frozen=True)
class TfdsCorpus:
    """A TFDS builder and its splits; made by `tfds_corpus`, read by seqio in `tasks.py`."""

    builder: str
    train_split: str
    validation_split: str | None
    text_key: str
    data_dir: str | None

    def __post_init__(self):
        if not isinstance(self.builder, str) or ":" not in self.builder:
            raise InputError(
                f"TFDS builder {self.builder!r} names no version; write it as 'name:1.0.0' or 'name/config:1.0.0'."
            )
        if self.data_dir is not None and "://" not in self.data_dir and not Path(self.data_dir).expanduser().is_dir():
            raise InputError(f"data_dir {self.data_dir!r} is not a folder; give the folder that holds {self.builder}.")

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() or c in "._" else "_" for c in self.builder)

    def fingerprint(self) -> str:
        """Of the names, not of the data: a TFDS version promises its contents."""
        data_dir = self.data_dir and str(Path(self.data_dir).expanduser().absolute())
        parts = [self.builder, self.train_split, self.validation_split, self.text_key, data_dir]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:16]


def _fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(text: str, share: float) -> tuple[str, str]:
    """The head and the last `share` of a text, cut at the end of a line, or of a word, where there is one."""
    at = int(len(text) * (1 - share))
    for separator in ("\n", " "):
        found = text.rfind(separator, 0, at)
        if text[:found].strip() and found > 0:
            return text[: found + 1], text[found + 1 :]
    return text[:at], text[at:]
