"""The corpora: Python's standard library and installed packages, local files, TensorFlow Datasets builders.

A corpus has two splits, "train" and "validation". No document is in both, and no text of one split is repeated in the
other. This module imports neither TensorFlow nor JAX, so that naming a corpus is cheap.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from peer_jax.data import text_files, text_split
from peer_jax.data.builder import TfdsBuilder
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.storage import local

SPLITS = ("train", "validation")
SPLIT_BY = {"text": "text", "documents": "content"}  # what local_files calls them, and what a LocalCorpus does
ON_ERROR = ("stop", "skip")


class Document(NamedTuple):
    """One text, and a name that says where it is: the path, and for a JSONL file also the line."""

    name: str
    text: str


@runtime_checkable
class Corpus(Protocol):
    """What a `TextTask` needs of a corpus; any class with these methods will do. seqio reads `TfdsCorpus` itself."""

    @property
    def name(self) -> str:
        """A short name that can be part of a file name."""
        ...

    def fingerprint(self) -> str:
        """A hash of everything that determines the documents and their order."""
        ...

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of "train" or "validation", always in the same order; none is empty, and none is in both."""
        ...

    def num_bytes(self) -> int:
        """The approximate size of the text, for the progress bar."""
        ...


def python_stdlib(*, validation_share: float = 0.05) -> "LocalCorpus":
    """The `.py` files of the running interpreter's standard library: real text on any machine, nothing to download.

    The relative path of a module decides its split, so a module stays in its split from one Python release to the next.
    Files that are empty or not UTF-8 (tests of codecs) are skipped, and so are training files whose text is also in
    validation. Validation has only the first 16 KiB of each held-out file, so that a few large files don't outweigh the
    rest.
    """
    return _python_files("python_stdlib", validation_share, beginning=2**14)


def python_packages(*, validation_share: float = 0.05) -> "LocalCorpus":
    """The `.py` files of the standard library and of the installed packages: 200 MB with this project's packages.

    Splits are made as in `python_stdlib`, by the path relative to the standard library or to `site-packages`. A module
    therefore stays in its split between releases and machines, and with equal shares no file that validates in
    `python_stdlib` trains here.

    Validation has the first 4 KiB of each held-out file, in the order of the hash of its path, so that a cut by
    `max_validation_tokens` leaves a sample of files over all packages and the standard library. With 16 KiB per file,
    2**18 tokens came from 43 files, and one package had 38% of them.

    Only exact copies of validation files are kept out of training. Near copies (generated or vendored code, licence
    headers) stay: a fifth of the validation text is in blocks of eight lines that training contains word for word.

    The corpus is what is installed, so an upgrade makes a different corpus with a different cache. Runs that are to be
    compared over time or between machines should share one cache by `prepared(...)`.

    Reading it raises an `InputError` if the folder of the standard library or the folders of installed packages hold no
    `.py` files.
    """
    return _python_files("python_packages", validation_share, beginning=2**12)


def _python_files(name: str, share: float, *, beginning: int) -> "LocalCorpus":
    return LocalCorpus(
        name,
        source=PythonModules(packages=name == "python_packages"),
        validation_share=share,
        split_by="path",
        validation_document_chars=beginning,
    )


@dataclass(frozen=True)
class PythonModules:
    """The `.py` files of the standard library, and of the installed packages if `packages`."""

    packages: bool

    def find(self, on_bad: text_files.OnBad) -> text_files.Found:
        stdlib = Path(sysconfig.get_path("stdlib"))
        files = text_files.python_sources(stdlib)
        if not files:
            raise InputError(
                f"{stdlib} holds no .py files of the standard library; use local_files(...) with text of your own."
            )
        if self.packages:
            files += self._packages()
        return text_files.Found(text_files.in_hash_order(files), {})

    def _packages(self) -> tuple[text_files.TextFile, ...]:
        roots = dict.fromkeys(Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib"))
        packages = tuple(file for root in roots for file in text_files.python_sources(root))
        if not packages:
            raise InputError(
                f"{' and '.join(map(str, roots))} holds no .py files of installed packages; install some there, or use "
                "python_stdlib()."
            )
        return packages


def local_files(
    path: Placed[str | os.PathLike],
    *,
    validation_path: Placed[str | os.PathLike | None] = None,
    validation_share: float = 0.02,
    text_key: str = "text",
    split: str = "text",
    patterns: str | Sequence[str] | None = None,
    on_error: str = "stop",
) -> "LocalCorpus":
    """Text files: one file, or every text file in a folder and below. They are found when their text is needed.

    Args:
        path: a file or a folder. `.txt`, `.md`, `.py` and other text files hold one document each; `.jsonl` and
            `.json` files hold one document per line, under `text_key`; all may be compressed (`.gz`). In a folder,
            hidden files are ignored, and `prepare` says how many files with other suffixes there are.
        validation_path: files to validate on. Training documents with the same text as one of them are dropped.
        validation_share: without `validation_path`, the share to validate on.
        text_key: the key of the text in JSONL.
        split: "text": validation gets that share of the text. Whole documents are held out, and of documents that are
            large for the share the last part, at the end of a line where there is one. "documents": it gets about
            that share of the documents, all of them whole, as in earlier versions; a document stays in its split when
            others are added. If validation would be empty, it gets the document with the smallest hash, or the last
            part of a lone document. In both cases the hash of a document's text decides, so that all copies of a text
            are in one split.
        patterns: the files of a folder to read, such as ("*.rs", "docs/*.md"), matched with their names and with
            their paths in the folder; None: names with the usual suffixes.
        on_error: "stop" raises an error at the first file or line that can't be read; "skip" leaves them out, and
            `prepare` lists them.

    Raises:
        InputError: for an argument that can't be used. Errors of the path and of the files are raised when they are
            read.
    """
    if split not in SPLIT_BY:
        raise InputError(f"split is {split!r}; it must be 'text' or 'documents'.")
    if patterns is not None:
        patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
            raise InputError(f"patterns is {patterns!r}; give patterns of file names, such as ('*.rs', '*.js').")
    folder = text_files.TextFolder(_given(path, "path"), patterns)
    validation = None
    if validation_path is not None:
        validation = text_files.TextFolder(_given(validation_path, "validation_path"), patterns)
    return LocalCorpus(
        text_files.corpus_name(folder.path),
        source=folder,
        validation_source=validation,
        validation_share=validation_share,
        text_key=text_key,
        split_by=SPLIT_BY[split],
        on_error=on_error,
    )


def _given(path: str | os.PathLike, name: str) -> Path:
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):  # Path("") would be the current folder
        raise InputError(f"{name} is {path!r}; give the path of a text file or of a folder of text files.")
    return Path(local(path)).expanduser()


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
        builder: name, config and version. TFDS downloads or generates the data if no `data_dir` is given.
        train_split, validation_split: TFDS splits or slices, such as "train[:10%]". If `validation_split` is None or
            the builder lacks it, the last 1% of `train_split` is for validation, and `prepare` says so.
        text_key: the feature that holds the text.
        data_dir: where TFDS keeps data. If it is given, it must already hold the builder's data.

    Raises:
        InputError: `builder` names no version.
    """
    return TfdsCorpus(builder, train_split, validation_split, data_dir and str(data_dir), text_key)


@dataclass(frozen=True)
class LocalCorpus:
    """Documents in files on this machine, as `python_stdlib`, `python_packages` and `local_files` return them."""

    name: str
    source: text_files.TextFolder | PythonModules
    validation_source: text_files.TextFolder | None = None
    validation_share: float = 0.02
    text_key: str = "text"
    split_by: str = "text"  # or "content", the hash of each document's text, or "path", that of its name
    on_error: str = "stop"  # or "skip"
    validation_document_chars: int | None = None  # longer validation documents are cut, at the end of a line
    _known: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # what earlier passes found

    def __post_init__(self):
        share = self.validation_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"validation_share is {share!r}; give a number between 0 and 1, such as 0.02.")
        if not isinstance(self.text_key, str):
            raise InputError(f"text_key is {self.text_key!r}; give the key of the text in JSONL, such as 'text'.")
        if self.on_error not in ON_ERROR:
            raise InputError(f"on_error is {self.on_error!r}; it must be 'stop' or 'skip'.")

    @property
    def files(self) -> tuple[text_files.TextFile, ...]:
        """The files to train on, and to validate on where there are no others."""
        return self._found.files

    @property
    def validation_files(self) -> tuple[text_files.TextFile, ...] | None:
        """The files to validate on, where they are others."""
        if self.validation_source is None:
            return None
        return self._remember("validation_files", lambda: self.validation_source.find(self._bad).files)

    @property
    def asked_share(self) -> float | None:
        """The share of the text that is to be validated on; None where that isn't what `validation_share` asks for."""
        return self.validation_share if self.validation_source is None and self.split_by != "path" else None

    @property
    def left_out(self) -> list[str]:
        """What could not be read so far, a sentence each; empty unless `on_error` is "skip"."""
        return list(self._remember("left_out", dict))

    @property
    def passed_over(self) -> str:
        """How many files of a folder are not read because of their suffixes, in words; may be empty."""
        return text_files.count(self._found.passed_over)

    def fingerprint(self) -> str:
        return self._remember("fingerprint", self._fingerprint)

    def num_bytes(self) -> int:
        return sum(file.path.stat().st_size for file in self.files + (self.validation_files or ()))

    def documents(self, split: str) -> Iterator[Document]:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}; it must be 'train' or 'validation'.")
        if self.validation_source is not None:
            return self._read(self.validation_files) if split == "validation" else self._without_validation(self.files)
        if self.split_by == "text":
            documents = self._divided(split)
            return documents if split == "validation" else self._drop(documents)
        lone = self._remember("lone", self._lone_document)
        if lone is not None:
            head, tail = _cut(lone.text, self.validation_share)
            if not (head.strip() and tail.strip()):
                raise self._too_short(lone)
            return iter([Document(lone.name, head if split == "train" else tail)])
        if split == "validation":
            return (self._beginning(doc) for doc in self._read(self.files) if self._held_out(doc))
        kept = (doc for doc in self._read(self.files) if not self._held_out(doc))
        return kept if self.split_by == "content" else self._drop(kept)

    def _divided(self, split: str) -> Iterator[Document]:
        """The documents and parts of documents of one split, if validation has a share of the text."""
        plan = self._remember("plan", self._plan)
        for doc in self._read(self.files):
            parts = plan.divide(doc.text, *_key_and_size(doc))
            if plan.is_of_one and not all(parts):
                raise self._too_short(doc)
            if text := parts[SPLITS.index(split)]:
                yield Document(doc.name, text)

    def _plan(self) -> text_split.TextSplit:
        plan = text_split.plan((_key_and_size(doc) for doc in self._read(self.files)), self.validation_share)
        if plan is None:
            raise self._no_text()
        return plan

    def _read(self, files) -> Iterator[Document]:
        for file in files:
            for name, text in text_files.read(file, self.text_key, self._bad, keep_bom=self.split_by == "path"):
                yield Document(name, text)

    def _bad(self, error: InputError) -> None:
        """Raises an error of a file or line, unless it is to be left out."""
        if self.split_by == "path" and isinstance(error, text_files.NotText):
            return
        if self.on_error == "stop":
            raise error
        self._remember("left_out", dict)[str(error)] = None

    @property
    def _found(self) -> text_files.Found:
        return self._remember("files", lambda: self.source.find(self._bad))

    def _without_validation(self, files) -> Iterator[Document]:
        return self._drop(self._read(files))

    def _drop(self, documents) -> Iterator[Document]:
        """The documents whose text is not also in validation."""
        texts = self._remember("texts", self._validation_texts)
        return (doc for doc in documents if _digest(doc.text) not in texts)

    def _validation_texts(self) -> set[bytes]:
        if self.validation_source is not None or self.split_by == "text":
            return {_digest(doc.text) for doc in self.documents("validation")}
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
        """The smallest key, to be held out where no key is below the share; None if a key is below the share."""
        smallest = None
        for doc in self._read(self.files):
            key = self._key(doc)
            if _fraction(key) < self.validation_share:
                return None
            smallest = key if smallest is None else min(smallest, key)
        return smallest

    def _lone_document(self) -> Document | None:
        """The document, if all documents have the same text; None if two of them differ."""
        first = None
        for doc in self._read(self.files):
            if first is None:
                first = doc
            elif doc.text != first.text:
                return None
        if first is None:
            raise self._no_text()
        return first

    def _no_text(self) -> InputError:
        where = os.path.commonpath([file.path for file in self.files])
        left_out = f" or left out ({self.left_out[0]})" if self.left_out else ""
        return InputError(f"{where} holds no text: every document in it is empty{left_out}; give a path with text.")

    def _too_short(self, doc: Document) -> InputError:
        return InputError(
            f"{doc.name} is the only document and too short to be split into training and validation; "
            "give more text, or validation_path."
        )

    def _fingerprint(self) -> str:
        rules = [self.validation_share, self.text_key, self.split_by, self.split_by == "path"]
        rules.append(self.validation_document_chars)
        rules += ["skip"] if self.on_error == "skip" else []
        parts = [("rules", json.dumps(rules))]
        for role, files in (("documents", self.files), ("validation", self.validation_files or ())):
            parts += [(role, file.relative, *self._contents(file)) for file in files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _contents(self, file: text_files.TextFile) -> list[str]:
        """What stands for a file's contents in the fingerprint."""
        try:
            contents = [text_files.sha256(file)]
        except InputError as error:
            self._bad(error)
            return ["unreadable"]
        if self.split_by != "path" and text_files.begins_with_bom(file):
            contents.append("without its byte order mark")
        return contents

    def _remember(self, what, find):
        if what not in self._known:
            self._known[what] = find()
        return self._known[what]

    def __getstate__(self):
        return {**self.__dict__, "_known": {}}


@dataclass(frozen=True)
class TfdsCorpus(TfdsBuilder):
    """A TFDS builder of text, as `tfds_corpus` returns it. seqio reads it, see `seqio_task.py`."""

    text_key: str

    def fingerprint(self) -> str:
        return self.fingerprint_with(self.text_key)


def _key_and_size(doc: Document) -> tuple[int, int]:
    """What divides a document, if validation has a share of the text: a hash of the text, and its size in bytes."""
    data = doc.text.encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big"), len(data)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:16]


def _fraction(digest: bytes) -> float:
    return int.from_bytes(digest[:8], "big") / 2**64


def _cut(text: str, share: float) -> tuple[str, str]:
    """Divides a text before its last `share`, at the end of a line or else of a word where there is one."""
    at = int(len(text) * (1 - share))
    for separator in ("\n", " "):
        found = text.rfind(separator, 0, at)
        if text[:found].strip() and found > 0:
            return text[: found + 1], text[found + 1 :]
    return text[:at], text[at:]
