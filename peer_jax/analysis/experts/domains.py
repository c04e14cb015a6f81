"""Where the tokens of a text come from: the task, and the folder and the kind of the file where a corpus tells them.

A prepared cache holds tokens and no names. The documents of a corpus that lies on this machine are tokenised again,
and the pieces in the cache are recognised by their tokens, whatever their order. A piece that isn't found, or that
stands in documents of different names, is of an unknown file; so is all text of TensorFlow Datasets and of prepared
caches.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Int

from peer_jax.analysis.experts.trace import UNKNOWN, Labels
from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.corpora import Corpus
from peer_jax.data.pipeline import TextTask
from peer_jax.errors import InputError

# Folders with little text are one label together, because a label with few documents says nothing.
MOST_FOLDERS = 24
OTHER, TOP = "(other folders)", "(no folder)"


def name_documents(task: TextTask, pieces: Sequence[Int[np.ndarray, " _"]]) -> list[str | None]:
    """The name of the document that each piece of tokens comes from; None where it isn't known."""
    names: dict[bytes, str | None] = {}
    try:
        for key, name in _pieces(task):
            names[key] = name if names.get(key, name) == name else None
    except InputError:  # the text is not on this machine any more
        return [None] * len(pieces)
    return [names.get(_key(piece)) for piece in pieces]


def _pieces(task: TextTask) -> Iterator[tuple[bytes, str]]:
    """The key of each piece of the validation split, and the name of its document."""
    if not isinstance(task.corpus, Corpus):
        return
    vocabulary = vocabularies.load(task.vocabulary)
    for document in task.corpus.documents("validation"):
        ids = np.array([*vocabulary.encode(document.text), vocabulary.eos_id], np.int32)
        for start in range(0, len(ids), task.seq_len):
            yield _key(ids[start : start + task.seq_len]), document.name


def _key(piece: Int[np.ndarray, " n"]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(piece, np.int32).tobytes()).digest()[:16]


def documents(
    texts: Sequence[int], names: Sequence[str | None], pieces: Int[np.ndarray, " T"]
) -> Int[np.ndarray, " T"]:
    """The number of each token's document. Pieces of the same text and name are one document.

    Args:
        texts: the number of the text that each piece is of.
        names: the name of the document that each piece is of; a piece without a name counts as a document.
        pieces: the number of each token's piece.
    """
    keys = [
        (text, place if name is None else name) for place, (text, name) in enumerate(zip(texts, names, strict=True))
    ]
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys])[pieces]


def by_folder(names: Sequence[str | None], pieces: Int[np.ndarray, " T"]) -> Labels:
    """A label for the folder of each token's document: the first part of its path, which names a package.

    Args:
        names: the name of each piece's document.
        pieces: the number of each token's piece.
    """
    folders = [None if name is None else _folder(name) for name in names]
    sizes = Counter(folders[piece] for piece in pieces if folders[piece] is not None)
    large = [folder for folder, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MOST_FOLDERS]]
    if len(sizes) > MOST_FOLDERS:
        folders = [folder if folder is None or folder in large else OTHER for folder in folders]
    return _labels("folder", folders, pieces)


def by_suffix(names: Sequence[str | None], pieces: Int[np.ndarray, " T"]) -> Labels:
    """A label for the kind of file of each token's document, by the end of its name."""
    return _labels("kind of file", [None if name is None else _suffix(name) for name in names], pieces)


def by_task(tasks: Sequence[str], pieces: Int[np.ndarray, " T"]) -> Labels:
    """A label for the task of each token's document."""
    return _labels("task", tasks, pieces)


def _folder(name: str) -> str:
    parts = PurePosixPath(name).parts
    return parts[0] if len(parts) > 1 else TOP


def _suffix(name: str) -> str:
    path = PurePosixPath(name.rpartition(":")[0] or name)  # a line of JSONL is named file:line
    return path.suffix or "(no suffix)"


def _labels(kind: str, of_piece: Sequence[str | None], pieces: Int[np.ndarray, " T"]) -> Labels:
    names = sorted({label for label in of_piece if label is not None})
    number = {name: place for place, name in enumerate(names)} | {None: UNKNOWN}
    return Labels(kind, tuple(names), np.array([number[label] for label in of_piece])[pieces], by_document=True)


def by_token(tokens: Int[np.ndarray, " T"], shown: Sequence[str], kind: str) -> Labels:
    """A label for each token itself. ``shown`` is how each id of the vocabulary is written."""
    return Labels(kind, tuple(shown), tokens)


def by_position(positions: Int[np.ndarray, " T"]) -> Labels:
    """A label for the place of each token in its document, by powers of two: 0, 1, 2-3, 4-7 and so on."""
    of = np.where(positions > 0, np.floor(np.log2(np.maximum(positions, 1))).astype(np.int64) + 1, 0)
    starts = [0, *(2 ** np.arange(of.max(initial=0)))]
    names = [
        str(a) if b - a < 2 else f"{a}-{b - 1}" for a, b in zip(starts, [*starts[1:], 2 * starts[-1]], strict=True)
    ]
    return Labels("position", tuple(names), of)
