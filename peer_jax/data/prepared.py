"""A token cache in the place of a corpus, to train on a machine that lacks seqio, TensorFlow or the texts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    if not os.fspath(path):
        raise InputError("path is ''; give the path of a folder that `peer-jax prepare` printed.")
    found = place(path, "path")
    return PreparedCorpus(found if is_in_bucket(found) else Path(found).expanduser())


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus of which this machine has only the cache, as `prepared` returns it.

    Every method raises an `InputError` if the cache is missing, damaged or does not fit the task.
    """

    path: AnyPath

    @property
    def name(self) -> str:
        return self._manifest()["task"]["corpus"]

    def fingerprint(self) -> str:
        return self._manifest()["corpus_fingerprint"]

    def num_bytes(self) -> int:
        return sum(counts["bytes"] for counts in self._manifest()["splits"].values())

    def documents(self, split: str):
        raise InputError(f"{self.path} is a prepared cache, which holds tokens; name the corpus that has its texts.")

    def task_fingerprint(self, seq_len: int, vocabulary: str) -> str:
        """The fingerprint of the `TextTask` that the cache was prepared for.

        Raises:
            InputError: there is no such cache, or its rows have another length or vocabulary.
        """
        manifest = self._manifest()
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

    def _manifest(self) -> dict[str, Any]:
        from peer_jax.data import cache  # imports NumPy; imported here, so that naming a task stays cheap

        if not self.path.is_dir():
            raise InputError(
                f"there is no prepared cache {self.path}; give the path of a folder that `peer-jax prepare` printed, "
                "or of a copy of all that is in it."
            )
        manifest = cache.read_manifest(self.path)
        if manifest["kind"] != cache.TEXT:
            raise InputError(f"{self.path} holds images, not text; give the path of a prepared cache of text.")
        try:
            manifest["fingerprint"], manifest["corpus_fingerprint"], manifest["task"]["corpus"]
            manifest["vocabulary"]["name"], manifest["vocabulary"]["sha256"]
        except (KeyError, TypeError) as error:
            raise cache.Damaged(f"{self.path / cache.MANIFEST} is damaged", self.path) from error
        return manifest


def _shown(name: str, sha256: str | None) -> str:
    return repr(name) if sha256 is None else f"{name!r} (sha256 {sha256[:12]})"
