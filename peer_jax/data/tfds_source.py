"""Opens TensorFlow Datasets builders, and reads images from them.

This module imports TensorFlow, so `tasks.py` imports it only when there is something to prepare.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read by TensorFlow's C++ while it is imported
from absl import logging as absl_logging

absl_logging.set_verbosity(absl_logging.ERROR)
logging.getLogger("tensorflow").setLevel(logging.ERROR)

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402

from peer_jax.data.builder import TfdsBuilder  # noqa: E402
from peer_jax.errors import InputError  # noqa: E402

with contextlib.suppress(RuntimeError):  # raised if TensorFlow was already in use in this process
    tf.config.set_visible_devices([], "GPU")  # leave the accelerator's memory to whoever trains on it


class Opened(NamedTuple):
    """A builder whose data are there.

    Attributes:
        splits: what TFDS calls "train" and "validation".
        note: a sentence about the splits if the user should know of something.
    """

    builder: Any
    splits: dict[str, str]
    note: str | None


def open_builder(corpus: TfdsBuilder, keys: Mapping[str, str], splits: tuple[str, ...]) -> Opened:
    """Opens a builder, and downloads its data if no `data_dir` is given.

    Args:
        corpus: names the builder.
        keys: the features that are to be read, by the arguments that name them.
        splits: which of "train" and "validation" are needed.

    Raises:
        InputError: if TFDS can't provide the builder, or it has no such feature or split.
    """
    data_dir = corpus.data_dir and os.path.expanduser(corpus.data_dir)
    try:
        builder = tfds.builder(corpus.builder, data_dir=data_dir, try_gcs=data_dir is None)
        if not builder.is_prepared() and data_dir is None:
            builder.download_and_prepare()
        if not builder.is_prepared():
            raise InputError(f"{data_dir} holds no data of {corpus.builder}; give the data_dir that TFDS wrote it to.")
        known, features = builder.info.splits, builder.info.features
        for argument, key in keys.items():
            if key not in features:
                raise InputError(
                    f"{corpus.builder} has no feature {key!r}; set {argument} to one of {', '.join(sorted(features))}."
                )
        chosen, note = _splits(corpus, known)
        chosen = {split: chosen[split] for split in splits}
        for spec in chosen.values():
            known[spec]  # raises if there is no such split
    except InputError:
        raise
    except Exception as error:  # TFDS raises dozens of types: not found, no network, checksums, Apache Beam missing ...
        raise InputError(f"TFDS can't provide {corpus.builder}: {first_line(error)}.") from error
    return Opened(builder, chosen, note)


def _splits(corpus: TfdsBuilder, known) -> tuple[dict[str, str], str | None]:
    validation = corpus.validation_split
    if validation is not None and (validation in known or not validation.isidentifier()):
        return {"train": corpus.train_split, "validation": validation}, None
    if not corpus.train_split.isidentifier():
        raise InputError(
            f"{corpus.builder} has no split {validation!r} and train_split {corpus.train_split!r} is a slice already; "
            f"set validation_split to one of {', '.join(known)} or to another slice."
        )
    chosen = {"train": f"{corpus.train_split}[:99%]", "validation": f"{corpus.train_split}[99%:]"}
    return chosen, f"{corpus.builder}: no split {validation!r}, so validation is {chosen['validation']}"


def images(
    corpus: TfdsBuilder, image_key: str, label_key: str, split: str, size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """The images of "train" or "validation", each [size, size, c] uint8, with their labels, in the builder's order.

    An image of another size is cut to its central square, which is then resized.

    Raises:
        InputError: if TFDS can't provide them.
    """
    opened = open_builder(corpus, {"image_key": image_key, "label_key": label_key}, (split,))
    types = [getattr(opened.builder.info.features[key], "np_dtype", None) for key in (image_key, label_key)]
    if types[0] != np.uint8 or not np.issubdtype(types[1], np.integer):
        raise InputError(
            f"{corpus.builder} has {image_key!r} and {label_key!r} of the types {types[0]} and {types[1]}, but images "
            "must be uint8 and labels integers; set image_key and label_key to others."
        )

    def fit(example):
        image = example[image_key]
        side = tf.minimum(tf.shape(image)[0], tf.shape(image)[1])
        top, left = (tf.shape(image)[0] - side) // 2, (tf.shape(image)[1] - side) // 2
        square = tf.image.crop_to_bounding_box(image, top, left, side, side)
        resized = tf.image.resize(square, (size, size), antialias=True)  # the image itself if it has that size
        return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8), example[label_key]

    try:
        dataset = opened.builder.as_dataset(split=opened.splits[split], shuffle_files=False)
        dataset = dataset.map(fit, num_parallel_calls=os.cpu_count(), deterministic=True).prefetch(256)
        for image, label in dataset.as_numpy_iterator():
            yield image, int(label)
    except (tf.errors.OpError, ValueError, TypeError) as error:  # ValueError, TypeError: the feature is no image
        raise InputError(f"{corpus.name} can't be read: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    """The type of an error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no details'}".rstrip(".")
