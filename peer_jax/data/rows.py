"""The rows of one split of a cache, memory-mapped, and the batches that are made of them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypedDict

import numpy as np
from jaxtyping import Int32, Shaped, UInt8

from peer_jax.errors import InputError
from peer_jax.storage import AnyPath

START_ID = 0  # the input at the start of each document, where there is no token before; seqio takes padding's id


class Batch(TypedDict):
    """b rows, whose `targets` a model predicts from `inputs`; a target counts if its `segment_ids` is above 0.

    Of text, all three are [b, T]: tokens, the tokens that follow them, and the pieces of documents in a row, 0 for
    padding. Of images, `inputs` are [b, H, W, c] from 0 to 255, `targets` are the labels [b], and `segment_ids` [b] are
    1 for an image and 0 for a row that fills the batch up.
    """

    inputs: Int32[np.ndarray, "b T"] | UInt8[np.ndarray, "b H W c"]
    targets: Int32[np.ndarray, "b ..."]
    segment_ids: Int32[np.ndarray, "b ..."]


class Damaged(InputError):  # noqa: N818, it names what is so
    """A cache whose files are not as they were written, or not there."""

    def __init__(self, what: str, path: AnyPath):
        super().__init__(f"{what}; delete {path} and prepare it again, or copy it here again.")


class Field(NamedTuple):
    """An array of a cache: the shape that it has for one row, and the type that it is stored in."""

    shape: tuple[int, ...]
    dtype: str


def shard_file(path: Path, split: str, name: str, shard: int) -> Path:
    """The file of one shard of an array, such as "tokens"."""
    return path / split / f"{name}-{shard:05d}.npy"


def fields(manifest: Mapping[str, Any]) -> dict[str, Field]:
    """The arrays of a cache by name, from its manifest; those of text have `seq_len` values per row."""
    shapes = manifest.get("shapes") or {name: [manifest["seq_len"]] for name in manifest["dtypes"]}
    return {name: Field(tuple(shapes[name]), dtype) for name, dtype in manifest["dtypes"].items()}


class Rows(Sequence):
    """One split of a cache as a random-access source of rows.

    `source[i]` is a row as it is stored, by the names of its arrays; `source.take(indices)` gathers rows.
    """

    counted: ClassVar[tuple[str, ...]]  # what the manifest of such a cache counts of each split
    more: ClassVar[str]  # what to do if there are too few rows for a batch

    def __init__(self, path: Path, split: str, manifest: dict):
        self.path, self.split, self.manifest = path, split, manifest
        counts = manifest["splits"][split]
        self.counts = {key: counts[key] for key in self.counted}
        self.rows, self._fields = counts["rows"], fields(manifest)
        self._starts = np.concatenate([[0], np.cumsum(counts["shards"], dtype=np.int64)])
        self.shards = {
            name: [self._map(name, i, rows) for i, rows in enumerate(counts["shards"])] for name in self._fields
        }

    def _map(self, name: str, shard: int, rows: int) -> np.ndarray:
        file = shard_file(self.path, self.split, name, shard)
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise Damaged(f"{file} is missing or damaged", self.path) from error
        expected = (rows, *self._fields[name].shape), self._fields[name].dtype
        if (array.shape, array.dtype.name) != expected:
            raise Damaged(
                f"{file} holds {array.dtype.name} {array.shape} but its manifest says {expected[1]} {expected[0]}",
                self.path,
            )
        return array

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        index = range(self.rows)[index]
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[shard])
        return {name: shards[shard][row] for name, shards in self.shards.items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> dict[str, Shaped[np.ndarray, "b ..."]]:
        """The rows in the order of `indices`, each array with these along its first axis; integers are int32."""
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.rows):
            raise IndexError(f"row {indices.min()} or {indices.max()} of {self.rows}")
        taken = {name: np.empty((len(indices), *own.shape), self.taken_as(name)) for name, own in self._fields.items()}
        found = np.searchsorted(self._starts, indices, side="right") - 1
        for shard in np.unique(found):
            at = np.flatnonzero(found == shard)
            for name, shards in self.shards.items():
                taken[name][at] = shards[shard][indices[at] - self._starts[shard]]
        return taken

    def taken_as(self, name: str) -> type[np.generic]:
        """The type in which `take` returns an array."""
        return np.int32

    def batch(self, indices: Sequence[int], size: int) -> Batch:
        """The rows of `indices` as a batch of `size` rows; rows that fill it up have targets that don't count."""
        raise NotImplementedError

    def measures(self, nll: float, count: int) -> dict[str, Any]:
        """What an evaluation says beside the mean loss, from the sum of the loss in nats and the number of targets."""
        raise NotImplementedError

    @property
    def described(self) -> str:
        """How many rows of what there are, in words."""
        raise NotImplementedError

    def __repr__(self) -> str:  # Grain shows it in its messages
        return f"{type(self).__name__}({str(self.path)!r}, {self.split!r}, {self.described})"


class PackedText(Rows):
    """Rows of tokens with the pieces of documents that they belong to, `{"tokens": [T], "segment_ids": [T]}`."""

    counted = ("rows", "tokens", "documents", "bytes", "words")
    more = "give more text, a smaller batch_size or a smaller seq_len"

    @property
    def seq_len(self) -> int:
        return self.manifest["seq_len"]

    @property
    def described(self) -> str:
        return f"{self.rows} rows of {self.seq_len} tokens"

    def batch(self, indices: Sequence[int], size: int) -> Batch:
        taken = self.take(indices)
        targets, segment_ids = filled(taken["tokens"], size), filled(taken["segment_ids"], size)
        return Batch(inputs=shift_right(targets, segment_ids), targets=targets, segment_ids=segment_ids)

    def measures(self, nll: float, count: int) -> dict[str, Any]:
        """Perplexity per token and per word, bits per byte, and the numbers of tokens, bytes and words."""
        return {
            "perplexity": _exp(nll / count),
            "word_perplexity": _exp(nll / max(1, self.counts["words"])),
            "bits_per_byte": nll / math.log(2) / max(1, self.counts["bytes"]),
            "tokens": count,
            "bytes": self.counts["bytes"],
            "words": self.counts["words"],
        }


class LabelledImages(Rows):
    """Images with their classes, `{"images": [H, W, c], "labels": []}`."""

    counted = ("rows",)
    more = "give a smaller batch_size"

    @property
    def described(self) -> str:
        return f"{self.rows} images"

    def taken_as(self, name: str) -> type[np.generic]:
        return np.uint8 if name == "images" else np.int32

    def batch(self, indices: Sequence[int], size: int) -> Batch:
        taken = self.take(indices)
        images, labels = filled(taken["images"], size), filled(taken["labels"], size)
        return Batch(inputs=images, targets=labels, segment_ids=filled(np.ones(len(indices), np.int32), size))

    def measures(self, nll: float, count: int) -> dict[str, Any]:
        """The number of images."""
        return {"images": count}


def filled(array: Shaped[np.ndarray, "b ..."], size: int) -> Shaped[np.ndarray, "size ..."]:
    """The array with rows of zeros after its own, `size` in all."""
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)])


def shift_right(targets: Int32[np.ndarray, "b T"], segment_ids: Int32[np.ndarray, "b T"]) -> Int32[np.ndarray, "b T"]:
    """The inputs that predict `targets`: the token before, and `START_ID` at the start of a segment, as in seqio."""
    inputs = np.full_like(targets, START_ID)
    inputs[:, 1:] = np.where(segment_ids[:, 1:] == segment_ids[:, :-1], targets[:, :-1], START_ID)
    return inputs


def _exp(x: float) -> float:
    """exp, or infinity if that is too large for a float."""
    return math.exp(x) if x < 700 else math.inf
