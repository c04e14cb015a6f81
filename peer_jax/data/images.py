"""Labelled images: the handwritten digits that come with this package, and TensorFlow Datasets builders.

No image is in both splits. This module imports nothing heavy, so that naming images is cheap.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peer_jax.data.builder import TfdsBuilder
from peer_jax.data.corpora import SPLITS
from peer_jax.errors import InputError
from peer_jax.fields import Placed

DIGITS = Path(__file__).with_name("digits.csv.gz")


@runtime_checkable
class Images(Protocol):
    """What an `ImageTask` needs of its corpus; any class with these attributes and methods will do.

    Attributes:
        name: a short name that can be part of a file name.
        num_classes: labels run from 0 to num_classes - 1.
        channels: 1 for grey, 3 for colours.
        size: the height and width of all images; None if they can have any, so that the task must name one.
        num_images: of both splits together; None if it isn't known before they are read.
    """

    name: str
    num_classes: int
    channels: int
    size: int | None
    num_images: int | None

    def fingerprint(self) -> str:
        """A hash of everything that determines the images and their order."""
        ...

    def images(self, split: str, size: int) -> Iterator[tuple[Any, int]]:
        """The images of "train" or "validation", uint8 [size, size, channels], with labels, in a fixed order."""
        ...


def digits(*, validation_share: float = 0.2) -> "Digits":
    """1,797 grey images of handwritten digits, 8 x 8, that come with this package: nothing is downloaded.

    They are the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine
    Learning Repository, CC BY 4.0) in the file that scikit-learn distributes. A hash of an image decides its split, so
    an image that occurs twice is in one split.

    Raises:
        InputError: for a share that is not between 0 and 1.
    """
    return Digits(validation_share)


@dataclass(frozen=True)
class Digits:
    """The handwritten digits, as `digits` returns them."""

    validation_share: float

    name = "digits"
    num_classes, channels, size, num_images = 10, 1, 8, 1797

    def __post_init__(self):
        share = self.validation_share
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise InputError(f"validation_share is {share!r}; give a number between 0 and 1, such as 0.2.")

    def fingerprint(self) -> str:
        content = hashlib.sha256(DIGITS.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps([content, self.validation_share]).encode()).hexdigest()

    def images(self, split: str, size: int) -> Iterator[tuple[Any, int]]:
        import numpy as np  # imported here, so that naming images stays cheap

        if split not in SPLITS:
            raise InputError(f"split is {split!r}; it must be 'train' or 'validation'.")
        with gzip.open(DIGITS, "rt") as file:
            rows = np.loadtxt(file, np.uint8, delimiter=",")
        for *pixels, label in rows:
            image = np.array(pixels, np.uint8)
            share = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "big") / 2**64
            if (share < self.validation_share) == (split == "validation"):
                shade = np.rint(image * (255 / 16)).astype(np.uint8)  # the file has shades from 0 to 16
                yield shade.reshape(8, 8, 1), int(label)


def tfds_images(
    builder: str,
    *,
    num_classes: int,
    channels: int = 3,
    train_split: str = "train",
    validation_split: str | None = "test",
    image_key: str = "image",
    label_key: str = "label",
    data_dir: Placed[str | os.PathLike | None] = None,
) -> "TfdsImages":
    """A TensorFlow Datasets builder of images with its version: "cifar10:3.0.2", "imagenet2012:5.1.0", ...

    Args:
        builder: name, config and version. TFDS downloads or generates the data if no `data_dir` is given.
        num_classes: labels run from 0 to num_classes - 1.
        channels: of the images.
        train_split, validation_split: TFDS splits or slices, such as "train[:90%]". If `validation_split` is None or
            the builder lacks it, the last 1% of `train_split` is for validation, and `prepare` says so.
        image_key, label_key: the features that hold the image and its class.
        data_dir: where TFDS keeps data. If it is given, it must already hold the builder's data.

    Raises:
        InputError: `builder` names no version, or a number is not above 0.
    """
    for name, value in (("num_classes", num_classes), ("channels", channels)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} is {value!r}; give a whole number of at least 1.")
    data_dir = data_dir and str(data_dir)
    keys = {"image_key": image_key, "label_key": label_key}
    return TfdsImages(builder, train_split, validation_split, data_dir, num_classes, channels, **keys)


@dataclass(frozen=True)
class TfdsImages(TfdsBuilder):
    """A TFDS builder of images, as `tfds_images` returns it."""

    num_classes: int
    channels: int
    image_key: str
    label_key: str

    size = num_images = None

    def fingerprint(self) -> str:
        return self.fingerprint_with(self.image_key, self.label_key, self.channels, self.num_classes)

    def images(self, split: str, size: int) -> Iterator[tuple[Any, int]]:
        from peer_jax.data import tfds_source  # imports TensorFlow

        return tfds_source.images(self, self.image_key, self.label_key, split, size)
