"""Text to ids and back without TensorFlow. The ids are those of seqio's vocabularies: 0 is padding, and EOS exists.

A vocabulary is named by a string: "bytes" (byte b has id b + 3, EOS has id 1) or the path of a SentencePiece model.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from peer_jax.errors import InputError
from peer_jax.storage import as_os_errors, place, reason

BYTES = "bytes"
_WRITTEN = {ord("\n"): "\\n", ord("\t"): "\\t", ord("\r"): "\\r"}
_SPECIAL = 3  # padding, EOS and unknown come before the 256 bytes


@runtime_checkable
class Vocabulary(Protocol):
    name: str  # can be part of a file name
    size: int
    eos_id: int
    sha256: str | None  # hash of the SentencePiece model file; None for bytes

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def piece(self, i: int) -> str:
        """How the id itself is written, for people: a character where it stands for one, or else <its name>."""
        ...

    def kept(self, ids: Sequence[int]) -> bytes:
        """The text that ids stand for, without EOS, unknown pieces and the beginning of a character that is cut."""
        ...


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


def continuation(prompt: str, new: Sequence[int], vocabulary: str) -> str:
    """The text of ids that follow those of a prompt: a piece may stand for other text at the beginning of a text."""
    loaded = load(vocabulary)
    before, new = loaded.encode(prompt), [int(i) for i in new]
    known, whole = loaded.decode(before), loaded.decode([*before, *new])
    text = whole.removeprefix(known) if whole.startswith(known) else loaded.decode(new)
    if prompt[-1:] == " " and known[-1:] != " ":  # the vocabulary drops the space at the end of a text
        text = text.removeprefix(" ")
    return text


def vocabulary_size(vocabulary: str) -> int:
    """The number of ids with padding and EOS, which is the width of a model's embedding and logits."""
    return load(vocabulary).size


def load(vocabulary: str) -> Vocabulary:
    """The vocabulary of that name.

    Raises:
        InputError: the SentencePiece model does not exist, or its ids can't be used: padding must have id 0, and EOS
            must be defined.
    """
    if (content := model(vocabulary)) is None:
        return ByteVocabulary()
    return _sentencepiece(str(vocabulary), content)


def model(vocabulary: str) -> bytes | None:
    """The content of the file of a SentencePiece model; None for bytes.

    Raises:
        InputError: it can't be read.
    """
    if vocabulary == BYTES:
        return None
    try:
        path = place(vocabulary).expanduser()
        with as_os_errors(path):
            return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"vocabulary {str(vocabulary)!r} can't be read ({reason(error)}); "
            "give 'bytes' or the path of a SentencePiece .model file."
        ) from error


def same(a: str, b: str) -> bool:
    """Whether two names stand for the same vocabulary."""
    return a == b or (BYTES not in (a, b) and model(a) == model(b))


class ByteVocabulary:
    """A vocabulary whose ids stand for the bytes of UTF-8 text."""

    name, size, eos_id, sha256 = BYTES, 256 + _SPECIAL, 1, None

    def encode(self, text: str) -> list[int]:
        return [byte + _SPECIAL for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i - _SPECIAL for i in ids if _SPECIAL <= i < self.size).decode(errors="ignore")

    def piece(self, i: int) -> str:
        if i < _SPECIAL:
            return ("<padding or start>", "<end>", "<unknown>")[i]
        byte = i - _SPECIAL
        return chr(byte) if 0x20 <= byte < 0x7F else _WRITTEN.get(byte, f"<{byte:02x}>")

    def kept(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode()


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

    def piece(self, i: int) -> str:
        return self._processor.IdToPiece(i) if i < self.size else "<unknown>"

    def kept(self, ids: Sequence[int]) -> bytes:
        special = (self.eos_id, self._processor.unk_id())
        return self._processor.DecodeIds([i for i in ids if i not in special]).encode()
