"""Images as a task, and the cache that is made of them. This module imports nothing heavy."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_jax.data.builder import TfdsBuilder
from peer_jax.data.corpora import SPLITS
from peer_jax.data.images import Images
from peer_jax.data.prepared import PreparedImages
from peer_jax.data.task import Task
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.storage import AnyPath

_LAYOUT = 1  # raise it when the same task would give other rows
_BATCH = 256  # images that are handed to the writer at a time


@dataclass(frozen=True)
class ImageTask(Task):
    """Images that are classified. A row of a batch is an image, and a token is one of its patches.

    Attributes:
        corpus: from `peer_jax.data.images`, or an object of any class with that protocol; or `prepared_images(...)`, a
            cache that was made elsewhere.
        patch_size: height and width of a patch.
        image_size: height and width of the images, to which others are resized; None: those that the corpus has.
        cache_dir: a local folder, or an address in a bucket, of whose caches there are copies in ~/.cache/peer_jax;
            None: $PEER_JAX_CACHE, or else ~/.cache/peer_jax.
    """

    corpus: Placed[Images]
    patch_size: int
    image_size: int | None = None
    cache_dir: Placed[str | os.PathLike | None] = None

    def __post_init__(self):
        if not callable(getattr(self.corpus, "images", None)):
            raise InputError(f"corpus is {self.corpus!r}; give one of peer_jax.data.images, such as digits().")
        for name in ("patch_size", "image_size"):
            value = getattr(self, name)
            if (value is not None or name == "patch_size") and (type(value) is not int or value < 1):
                raise InputError(f"{name} is {value!r}; give a whole number of at least 1.")
        if self.image_size is None and self.corpus.size is None:
            raise InputError(f"image_size is None, but images of {self.corpus.name} can have any size; give a number.")
        if None not in (self.image_size, self.corpus.size) and self.image_size != self.corpus.size:
            raise InputError(
                f"image_size is {self.image_size}, but images of {self.corpus.name} have {self.corpus.size}; "
                "leave it out."
            )
        if self.size % self.patch_size:
            raise InputError(
                f"patch_size is {self.patch_size}, which does not divide images of {self.size} x {self.size}; "
                "give a divisor."
            )
        self.check_cache_dir()

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.corpus.size if self.image_size is None else self.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images."""
        return self.size, self.size, self.corpus.channels

    @property
    def seq_len(self) -> int:
        """The patches of an image."""
        return (self.size // self.patch_size) ** 2

    def fingerprint(self) -> str:
        parts = [_LAYOUT, self.corpus.fingerprint(), self.image_shape, self.corpus.num_classes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def cache_name(self) -> str:
        return f"{self.corpus.name}-{self.size}-{self.fingerprint()[:12]}"

    def given_cache(self) -> AnyPath | None:
        return self.corpus.path if isinstance(self.corpus, PreparedImages) else None

    def model_sizes(self) -> dict[str, Any]:
        return {
            "image_shape": self.image_shape,
            "patch_size": self.patch_size,
            "num_classes": self.corpus.num_classes,
        }

    def check_fits(self, other: Task, what: str) -> None:
        if not isinstance(other, ImageTask):
            raise InputError(f"{self.corpus.name} is images, but {what} is not of images: give text")
        for name, value in self.model_sizes().items():
            if value != (theirs := other.model_sizes()[name]):
                raise InputError(f"{self.corpus.name} has {name}={value}, which is not that of {what}, {theirs}")

    def train_tokens(self) -> int | None:
        """All patches of both splits, if the corpus knows the number of its images."""
        return None if self.corpus.num_images is None else self.corpus.num_images * self.seq_len

    def example(self, rows: int) -> dict[str, Any]:
        import numpy as np  # imported here, so that naming a task stays cheap

        draw = np.random.default_rng(0)
        return {
            "inputs": draw.integers(0, 256, (rows, *self.image_shape), np.uint8),
            "targets": draw.integers(0, self.corpus.num_classes, rows, np.int32),
            "segment_ids": np.ones(rows, np.int32),
        }

    def write_cache(self, path: Path, note: Callable[[str], None]) -> None:
        """Writes the cache, and tells how large it is by `note`. Training images that validation has are left out.

        Raises:
            InputError: if the images can't be read, or are not what the task says.
        """
        from peer_jax.data import cache  # imports NumPy

        if isinstance(self.corpus, TfdsBuilder):
            from peer_jax.data import tfds_source  # imports TensorFlow

            if (chosen := tfds_source.open_builder(self.corpus, {}, ()).note) is not None:
                note(chosen)
        counts, held_out = {}, set()
        with cache.CacheWriter(path, cache.IMAGES, cache.image_fields(self.image_shape)) as writer:
            for split in reversed(SPLITS):  # validation first: training leaves out what validation holds
                images = _Images(self, split, held_out)
                counts[split] = writer.write_split(split, images.batches()) | {"repeated": images.repeated}
                if not counts[split]["rows"]:
                    raise InputError(f"{self.corpus.name} has no images for {split}; give other splits.")
            writer.commit(
                {
                    "task": {"corpus": self.corpus.name, "image_size": self.size},
                    "num_classes": self.corpus.num_classes,
                    "fingerprint": self.fingerprint(),
                    "corpus_fingerprint": self.corpus.fingerprint(),
                    "splits": {split: counts[split] for split in SPLITS},
                    "versions": {"python": platform.python_version()},
                }
            )
        train, validation = (f"{counts[split]['rows']:,}" for split in SPLITS)
        shape = " x ".join(map(str, self.image_shape))
        note(f"{self.corpus.name}: {train} images to train on and {validation} to validate on, {shape}")


class _Images:
    """The images of one split, checked and counted.

    Attributes:
        repeated: training images that are left out because validation has them.
    """

    def __init__(self, task: ImageTask, split: str, held_out: set[bytes]):
        self.repeated = 0
        self._task, self._split, self._held_out = task, split, held_out

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """Batches of (images, labels), [n, H, W, c] and [n]."""
        import numpy as np

        images, labels = [], []
        for image, label in self._task.corpus.images(self._split, self._task.size):
            self._check(image, label)
            digest = hashlib.sha256(image.tobytes()).digest()[:16]
            if self._split == "validation":
                self._held_out.add(digest)
            elif digest in self._held_out:
                self.repeated += 1
                continue
            images.append(image)
            labels.append(label)
            if len(images) == _BATCH:
                yield np.stack(images), np.array(labels)
                images, labels = [], []
        if images:
            yield np.stack(images), np.array(labels)

    def _check(self, image: Any, label: int) -> None:
        corpus, shape = self._task.corpus, self._task.image_shape
        if image.shape != shape or image.dtype != "uint8":
            raise InputError(
                f"{corpus.name} has an image of {image.dtype} {list(image.shape)}, but the task says uint8 "
                f"{list(shape)}; set image_size and channels as they are."
            )
        if not 0 <= label < corpus.num_classes:
            raise InputError(
                f"{corpus.name} has the label {label}, but num_classes={corpus.num_classes}; raise it, or choose a "
                "split with labels."
            )
