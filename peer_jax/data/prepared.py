"""A cache prepared on another machine, in the place of a corpus: trained on without seqio, TensorFlow or the texts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer_jax.data import vocabulary as vocabularies
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.run_directory import local


def prepared(path: Placed[str | os.PathLike]) -> "PreparedCorpus":
    """The cache in the folder `path`, as `peer-jax prepare` wrote it here or, copied whole, elsewhere.

    Nothing is prepared, so seqio, TensorFlow, the network and the texts may be missing. `TextTask.seq_len` and
    `TextTask.vocabulary` must be those of the cache (a SentencePiece model is copied too, its place doesn't matter);
    the limits `max_train_tokens` and `max_validation_tokens` are those it was prepared with, whatever the task says.
    Name and fingerprint are the original corpus's, so results compare between machines.

    The folder is looked at when data are needed, not here: a finished run generates text where the cache is missing.
    """
    return PreparedCorpus(Path(local(path, "path")).expanduser())


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus of which only the cache is here; made by `prepared`. What is wrong with it is an `InputError`."""

    path: Path

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
        """That of the `TextTask` the cache was prepared for.

        Raises:
            InputError: there is no such cache, or its rows are of another length or vocabulary.
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
        from peer_jax.data import cache  # here, so that naming a task stays cheap: it imports NumPy

        if not self.path.is_dir():
            raise InputError(
                f"there is no prepared cache {self.path}; give the path of a folder that `peer-jax prepare` printed, "
                "or of a copy of all that is in it."
            )
        manifest = cache.read_manifest(self.path)
        try:
            manifest["fingerprint"], manifest["corpus_fingerprint"], manifest["task"]["corpus"]
            manifest["vocabulary"]["name"], manifest["vocabulary"]["sha256"]
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path / cache.MANIFEST} is damaged; copy the prepared cache here again.") from error
        return manifest


def _shown(name: str, sha256: str | None) -> str:
    return repr(name) if sha256 is None else f"{name!r} (sha256 {sha256[:12]})"
