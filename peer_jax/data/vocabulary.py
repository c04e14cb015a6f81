"""Text to ids and back without TensorFlow. The ids are those of seqio's vocabularies: 0 is padding, and EOS exists.

A vocabulary is named by a string: "bytes" (byte b has id b + 3, EOS has id 1) or the path of a SentencePiece model.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from peer_jax.errors import InputError

BYTES = "bytes"
_SPECIAL = 3  # padding, EOS and unknown come before the 256 bytes


@runtime_checkable
class Vocabulary(Protocol):
    name: str  # can be part of a file name
    size: int
    eos_id: int
    sha256: str | None  # hash of the SentencePiece model file; None for bytes

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def encode(text: str, vocabulary: str) -> list[int]:
    """The ids of a text, without EOS."""
    return load(vocabulary).encode(text)


def decode(ids: Iterable[int], vocabulary: str) -> str:
    """The text of ids up to the first EOS. Padding and invalid UTF-8 are left out, as seqio does."""
    loaded = load(vocabulary)
    ids = [int(i) for i in ids]
    if loaded.eos_id in ids:
        ids = ids[: ids.index(loaded.eos_id)]
    return loaded.decode(ids)


def vocabulary_size(vocabulary: str) -> int:
    """The number of ids with padding and EOS, which is the width of a model's embedding and logits."""
    return load(vocabulary).size


def load(vocabulary: str) -> Vocabulary:
    """The vocabulary of that name.

    Raises:
        InputError: the SentencePiece model does not exist, or its ids can't be used: padding must have id 0, and EOS
            must be defined.
    """
    if vocabulary == BYTES:
        return ByteVocabulary()
    path = Path(vocabulary).expanduser()
    try:
        model = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"vocabulary {str(vocabulary)!r} can't be read ({error.strerror}); "
            "give 'bytes' or the path of a SentencePiece .model file."
        ) from error
    return _sentencepiece(str(path), model)


class ByteVocabulary:
    """A vocabulary whose ids stand for the bytes of UTF-8 text."""

    name, size, eos_id, sha256 = BYTES, 256 + _SPECIAL, 1, None

    def encode(self, text: str) -> list[int]:
        return [byte + _SPECIAL for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - _SPECIAL for i in ids if _SPECIAL <= i < self.size).decode(errors="ignore")


@functools.lru_cache(maxsize=8)
def _sentencepiece(path: str, model: bytes) -> "SentencePieceVocabulary":
    return SentencePieceVocabulary(path, model)


class SentencePieceVocabulary:
    """A SentencePiece model with the special ids that seqio expects, as `tasks.train_sentencepiece` makes it."""

    def __init__(self, path: str, model: bytes):
        import sentencepiece  # imported here, so that naming a vocabulary stays cheap

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded or self._processor.GetPieceSize() == 0:
            raise InputError(f"vocabulary {path!r} is not a SentencePiece model; give 'bytes' or a .model file.")
        self.size = self._processor.GetPieceSize()
        self.eos_id = self._processor.eos_id()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.name = f"sp{self.size}_{self.sha256[:6]}"
        if self._processor.pad_id() != 0 or self.eos_id < 1:
            raise InputError(
                f"vocabulary {path!r} has padding id {self._processor.pad_id()} and EOS id {self.eos_id}, but packing "
                "needs 0 for padding and an EOS; train it with pad_id=0, eos_id=1, unk_id=2 (train_sentencepiece does)."
            )

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        unknown = self._processor.unk_id()
        return self._processor.DecodeIds([i if i < self.size else unknown for i in ids])
