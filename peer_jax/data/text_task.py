"""What a cache is made of: a corpus, a sequence length and a vocabulary. This module imports nothing heavy."""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.corpora import Corpus, TfdsCorpus
from peer_jax.data.prepared import PreparedCorpus
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.startup import cache_folder, shared_cache
from peer_jax.storage import AnyPath, is_in_bucket

_LAYOUT = 1  # raise it when the same task would give other rows


@dataclass(frozen=True)
class TextTask:
    """A corpus as rows of `seq_len` tokens.

    Attributes:
        corpus: from `peer_jax.data.corpora`, or an object of any class with that protocol; or `prepared(...)`, a cache
            that was made elsewhere with this seq_len and vocabulary, to which the two limits below don't apply.
        seq_len: tokens per row, EOS included.
        vocabulary: "bytes", or the path of a SentencePiece model.
        max_train_tokens: the largest number of tokens to train on; None takes all documents, 0 leaves the split out.
        max_validation_tokens: the same limit for the validation split, which is always evaluated whole.
        cut_at_limits: the document that reaches a limit is cut there; False takes it whole, as earlier versions did.
        cache_dir: a local folder, or an address in a bucket, of whose caches there are copies in ~/.cache/peer_jax;
            None: $PEER_JAX_CACHE, or else ~/.cache/peer_jax.
    """

    corpus: Placed[Corpus | TfdsCorpus]
    seq_len: int
    vocabulary: Placed[str] = vocabularies.BYTES
    max_train_tokens: int | None = None
    max_validation_tokens: int | None = 2**20
    cut_at_limits: bool = True
    cache_dir: Placed[str | os.PathLike | None] = None

    def __post_init__(self):
        if not callable(getattr(self.corpus, "fingerprint", None)):
            raise InputError(f"corpus is {self.corpus!r}; give one of peer_jax.data.corpora, such as python_stdlib().")
        if type(self.seq_len) is not int or self.seq_len < 2:
            raise InputError(f"seq_len is {self.seq_len!r}; give a whole number of at least 2.")
        if not isinstance(self.vocabulary, str):
            raise InputError(f"vocabulary is {self.vocabulary!r}; give 'bytes' or the path of a SentencePiece model.")
        if self.cache_dir is not None:
            if not os.fspath(self.cache_dir):
                raise InputError("cache_dir is ''; give a folder, or None for the usual one.")
            cache_folder(self.cache_dir)
        if type(self.cut_at_limits) is not bool:
            raise InputError(f"cut_at_limits is {self.cut_at_limits!r}; give True or False.")
        for name, least in (("max_train_tokens", 0), ("max_validation_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{name} is {value!r}; give None for no limit, or a whole number of at least {least}.")

    def max_tokens(self, split: str) -> int | None:
        """The limit on the tokens of a split; None if there is none."""
        return self.max_train_tokens if split == "train" else self.max_validation_tokens

    def fingerprint(self) -> str:
        """A hash of everything that determines the cache's contents.

        Raises:
            InputError: if the corpus or the vocabulary can't be read, or a prepared cache has other rows.
        """
        if isinstance(self.corpus, PreparedCorpus):
            return self.corpus.task_fingerprint(self.seq_len, self.vocabulary)
        vocabulary = vocabularies.load(self.vocabulary)
        limits = [self.max_train_tokens, self.max_validation_tokens]
        if self.cut_at_limits and limits != [None, None]:
            limits.append("cut")
        parts = [_LAYOUT, self.corpus.fingerprint(), vocabulary.name, vocabulary.sha256, self.seq_len, limits]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def cache_path(self) -> Path:
        """Where the cache of this task is on this machine, or will be. Raises what `fingerprint` raises."""
        if isinstance(self.corpus, PreparedCorpus):
            fingerprint = self.fingerprint()  # refuses a cache that is not this task's
            if not is_in_bucket(self.corpus.path):
                return Path(self.corpus.path)
            return cache_folder(self.cache_dir) / f"{self.corpus.path.name}-copy-{fingerprint[:12]}"
        return cache_folder(self.cache_dir) / self._name()

    def shared_path(self) -> AnyPath | None:
        """Where the cache of this task is in a bucket, or will be; None if no bucket is used."""
        if isinstance(self.corpus, PreparedCorpus):
            return self.corpus.path if is_in_bucket(self.corpus.path) else None
        folder = shared_cache(self.cache_dir)
        return None if folder is None else folder / self._name()

    def _name(self) -> str:
        name = vocabularies.load(self.vocabulary).name
        return f"{self.corpus.name}-{name}-{self.seq_len}-{self.fingerprint()[:12]}"

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
                damaged and there is no text to prepare it again from.
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
            if isinstance(self.corpus, PreparedCorpus):
                raise
            if shared is not None:
                cache.withdraw(shared)
            return False
        return True
