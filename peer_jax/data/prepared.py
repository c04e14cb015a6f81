"""A cache in the place of a corpus, to train on a machine that lacks seqio, TensorFlow, the texts or the images."""

import functools
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from peer_jax.data import vocabulary as vocabularies
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.storage import AnyPath, is_in_bucket, place


def prepared(path: Placed[str | os.PathLike]) -> "PreparedCorpus":
    """The cache in the folder `path`, which `peer-jax prepare` wrote on this machine or which was copied from another.

    The folder may be in a bucket; it is then copied to this machine once.

    Nothing is prepared, so seqio, TensorFlow, the network and the texts may be missing. `TextTask.seq_len` and
    `TextTask.vocabulary` must be those of the cache; a SentencePiece model has to be copied too, to any place. The
    limits `max_train_tokens` and `max_validation_tokens` of the task have no effect: the cache was cut when it was
    prepared. Name and fingerprint are those of the original corpus, so that results compare between machines.

    The folder is read only when data are needed, so a finished run can generate text where the cache is missing.
    """
    return PreparedCorpus(_place(path))


def prepared_images(path: Placed[str | os.PathLike]) -> "PreparedImages":
    """The cache of images in the folder `path`, for an `ImageTask`: as `prepared` is for text.

    The images, TensorFlow and the network may be missing. Size, channels and classes are those of the cache, so that
    `ImageTask.image_size` can be left out, and any patch size will do. The cache has to be there whenever the task is
    named.
    """
    return PreparedImages(_place(path))


def _place(path: str | os.PathLike) -> AnyPath:
    if not os.fspath(path):
        raise InputError("path is ''; give the path of a folder that `peer-jax prepare` printed.")
    found = place(path, "path")
    return found if is_in_bucket(found) else Path(found).expanduser()


@dataclass(frozen=True)
class PreparedCache:
    """What a prepared cache says of the corpus that it was made of.

    Every method raises an `InputError` if the cache is missing, damaged or of another kind.

    Attributes:
        holds: what has to be in it, "text" or "images".
        keys: what its manifest must have, such as "task.corpus" for a key of a key.
    """

    path: AnyPath

    holds: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str:
        return self.manifest()["task"]["corpus"]

    def fingerprint(self) -> str:
        return self.manifest()["corpus_fingerprint"]

    def manifest(self) -> dict[str, Any]:
        from peer_jax.data import cache  # imports NumPy; imported here, so that naming a task stays cheap

        if not self.path.is_dir():
            raise InputError(
                f"there is no prepared cache {self.path}; give the path of a folder that `peer-jax prepare` printed, "
                "or of a copy of all that is in it."
            )
        manifest = cache.read_manifest(self.path)
        holds = "images" if manifest["kind"] == cache.IMAGES else "text"
        if holds != self.holds:
            raise InputError(
                f"{self.path} holds {holds}, not {self.holds}; give the path of a prepared cache of {self.holds}."
            )
        try:
            for key in self.keys:
                functools.reduce(operator.getitem, key.split("."), manifest)
        except (KeyError, TypeError) as error:
            raise cache.Damaged(f"{self.path / cache.MANIFEST} is damaged", self.path) from error
        return manifest


@dataclass(frozen=True)
class PreparedCorpus(PreparedCache):
    """A corpus of which this machine has only the cache, as `prepared` returns it."""

    holds = "text"
    keys = ("fingerprint", "corpus_fingerprint", "task.corpus", "vocabulary.name", "vocabulary.sha256")

    def num_bytes(self) -> int:
        return sum(counts["bytes"] for counts in self.manifest()["splits"].values())

    def documents(self, split: str):
        raise InputError(f"{self.path} is a prepared cache, which holds tokens; name the corpus that has its texts.")

    def task_fingerprint(self, seq_len: int, vocabulary: str) -> str:
        """The fingerprint of the `TextTask` that the cache was prepared for.

        Raises:
            InputError: there is no such cache, or its rows have another length or vocabulary.
        """
        manifest = self.manifest()
        if manifest["seq_len"] != seq_len:
            raise InputError(
                f"{self.path} has rows of {manifest['seq_len']} tokens and TextTask.seq_len is {seq_len}; "
                f"set TextTask.seq_len to {manifest['seq_len']}, or prepare a cache with {seq_len}."
            )
        theirs, ours = manifest["vocabulary"], vocabularies.load(vocabulary)
        if theirs["sha256"] != ours.sha256:
            needed = repr(theirs["name"]) if theirs["sha256"] is None else "the path of that model"
            raise InputError(
                f"{self.path} has vocabulary {_shown(theirs['name'], theirs['sha256'])} and TextTask.vocabulary is "
                f"{_shown(vocabulary, ours.sha256)}; set it to {needed}, or prepare a cache with yours."
            )
        return manifest["fingerprint"]


@dataclass(frozen=True)
class PreparedImages(PreparedCache):
    """Images of which this machine has only the cache, as `prepared_images` returns them."""

    holds = "images"
    keys = ("corpus_fingerprint", "task.corpus", "num_classes")

    @functools.cached_property
    def num_classes(self) -> int:
        return self.manifest()["num_classes"]

    @functools.cached_property
    def _shape(self) -> tuple[int, int, int]:
        from peer_jax.data import cache

        return cache.fields(self.manifest())["images"].shape

    @property
    def channels(self) -> int:
        return self._shape[-1]

    @property
    def size(self) -> int:
        return self._shape[0]

    @property
    def num_images(self) -> int:
        return sum(counts["rows"] for counts in self.manifest()["splits"].values())

    def images(self, split: str, size: int) -> Iterator[tuple[Any, int]]:
        raise InputError(f"{self.path} is a prepared cache; name the images that it was made of.")


def _shown(name: str, sha256: str | None) -> str:
    return repr(name) if sha256 is None else f"{name!r} (sha256 {sha256[:12]})"
