"""What every task has: a corpus, and a cache of it that is prepared once. This module imports nothing heavy."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peer_jax.errors import InputError
from peer_jax.startup import cache_folder, shared_cache
from peer_jax.storage import AnyPath, is_in_bucket


class Task:
    """What to train on and to evaluate: a `TextTask` or an `ImageTask`.

    A subclass is a frozen dataclass with the fields `corpus` and `cache_dir`, which says what is asked of it below.

    Attributes:
        corpus: what the cache is made of; it has a `name`, a `fingerprint()`, and a class by which the task knows it.
        seq_len: tokens per row of a batch.
    """

    corpus: Any
    seq_len: int
    cache_dir: str | os.PathLike | None

    def fingerprint(self) -> str:
        """A hash of everything that determines the cache's contents.

        Raises:
            InputError: if the corpus can't be read, or a given cache has other rows.
        """
        raise NotImplementedError

    def cache_name(self) -> str:
        """The name of the folder of the cache."""
        raise NotImplementedError

    def model_sizes(self) -> Mapping[str, Any]:
        """The arguments of a model that follow from the task."""
        raise NotImplementedError

    def check_fits(self, other: "Task", what: str) -> None:
        """An InputError if a model of the `other` task, which is called `what`, can't be used for this one."""
        raise NotImplementedError

    def train_tokens(self) -> int | None:
        """An estimate of the number of training tokens, for a task that isn't prepared; None if nothing is known."""
        raise NotImplementedError

    def example(self, rows: int) -> Mapping[str, Any]:
        """A `peer_jax.data.rows.Batch` with the shapes and types of the task's own and random values."""
        raise NotImplementedError

    def given_cache(self) -> AnyPath | None:
        """The place of a cache that was prepared elsewhere and stands in the place of a corpus; None without one."""
        return None

    def cache_path(self) -> Path:
        """Where the cache of this task is on this machine, or will be. Raises what `fingerprint` raises."""
        if (given := self.given_cache()) is not None:
            fingerprint = self.fingerprint()  # refuses a cache that is not this task's
            if not is_in_bucket(given):
                return Path(given)
            return cache_folder(self.cache_dir) / f"{given.name}-copy-{fingerprint[:12]}"
        return cache_folder(self.cache_dir) / self.cache_name()

    def shared_path(self) -> AnyPath | None:
        """Where the cache of this task is in a bucket, or will be; None if no bucket is used."""
        if (given := self.given_cache()) is not None:
            return given if is_in_bucket(given) else None
        folder = shared_cache(self.cache_dir)
        return None if folder is None else folder / self.cache_name()

    def check_cache_dir(self) -> None:
        """An InputError if `cache_dir` names no folder."""
        if self.cache_dir is not None:
            if not os.fspath(self.cache_dir):
                raise InputError("cache_dir is ''; give a folder, or None for the usual one.")
            cache_folder(self.cache_dir)

    def prepared_rows(self) -> int | None:
        """The number of training rows of the task's cache, here or in a bucket, from its manifest; None without one.

        Raises:
            InputError: what `fingerprint` raises; or if another program or version has written the cache.
        """
        from peer_jax.data import cache  # imports NumPy; imported here, so that naming a task stays cheap

        for path in filter(None, (self.cache_path(), self.shared_path())):
            with contextlib.suppress(cache.Damaged):
                if (path / cache.MANIFEST).exists():
                    return cache.read_manifest(path)["splits"]["train"]["rows"]
        return None

    def is_prepared(self) -> bool:
        """Whether the task has a cache that is whole. One that is in a bucket alone is copied to this machine first.

        Raises:
            InputError: what `fingerprint` raises; or if another program or version has written the cache; or if it is
                damaged and there is nothing to prepare it again from.
        """
        from peer_jax.data import cache  # imports NumPy; imported here, so that naming a task stays cheap

        path, shared = self.cache_path(), self.shared_path()
        try:
            if shared is not None:
                return cache.bring(path, shared)
            if not path.exists():
                return False
            cache.verify(path)
        except cache.Damaged:
            if self.given_cache() is not None:
                raise
            if shared is not None:
                cache.withdraw(shared)
            return False
        return True
