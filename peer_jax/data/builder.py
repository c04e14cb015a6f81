"""A TensorFlow Datasets builder and its splits. This module doesn't import TensorFlow."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from peer_jax.errors import InputError


@dataclass(frozen=True)
class TfdsBuilder:
    """A builder with its version, the splits to train and to validate on, and where TFDS keeps its data."""

    builder: str
    train_split: str
    validation_split: str | None
    data_dir: str | None

    def __post_init__(self):
        if not isinstance(self.builder, str) or ":" not in self.builder:
            raise InputError(
                f"TFDS builder {self.builder!r} names no version; write it as 'name:1.0.0' or 'name/config:1.0.0'."
            )
        if self.data_dir == "":
            raise InputError(f"data_dir is ''; give the folder that holds {self.builder}, or None.")

    @property
    def name(self) -> str:
        return "".join(c if c.isalnum() or c in "._" else "_" for c in self.builder)

    def fingerprint_with(self, *read: str | int) -> str:
        """A hash of the names and of what is read, not of the data: the contents of a TFDS version don't change.

        Raises:
            InputError: `data_dir` does not exist.
        """
        if self.data_dir is not None and "://" not in self.data_dir and not Path(self.data_dir).expanduser().is_dir():
            raise InputError(f"data_dir {self.data_dir!r} is not a folder; give the folder that holds {self.builder}.")
        data_dir = self.data_dir and str(Path(self.data_dir).expanduser().absolute())
        parts = [self.builder, self.train_split, self.validation_split, *read, data_dir]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
