"""What is cached: a corpus, cut and packed to a sequence length, in a vocabulary. Naming it imports nothing heavy."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.corpora import Corpus, TfdsCorpus
from peer_jax.data.prepared import PreparedCorpus
from peer_jax.errors import InputError

_LAYOUT = 1  # raise it when the same task would give other rows


@dataclass(frozen=True)
class TextTask:
    """A corpus as rows of `seq_len` tokens.

    Attributes:
        corpus: from `peer_jax.data.corpora`, or any class with that protocol; or `prepared(...)`, a cache made
            elsewhere, of this seq_len and vocabulary. Its limits on tokens are its own: the two below don't apply.
        seq_len: tokens a row, EOS included.
        vocabulary: "bytes", or the path of a SentencePiece model.
        max_train_tokens: training stops after the document that passes it; None takes all, 0 leaves the split out.
        max_validation_tokens: the same for validation, which is always evaluated whole.
        cache_dir: default $PEER_JAX_CACHE, else ~/.cache/peer_jax.
    """

    corpus: Corpus | TfdsCorpus
    seq_len: int
    vocabulary: str = vocabularies.BYTES
    max_train_tokens: int | None = None
    max_validation_tokens: int | None = 2**20
    cache_dir: str | os.PathLike | None = None

    def __post_init__(self):
        if not callable(getattr(self.corpus, "fingerprint", None)):
            raise InputError(f"corpus is {self.corpus!r}; give one of peer_jax.data.corpora, such as python_stdlib().")
        if type(self.seq_len) is not int or self.seq_len < 2:
            raise InputError(f"seq_len is {self.seq_len!r}; give a whole number of at least 2.")
        if not isinstance(self.vocabulary, str):
            raise InputError(f"vocabulary is {self.vocabulary!r}; give 'bytes' or the path of a SentencePiece model.")
        for name, least in (("max_train_tokens", 0), ("max_validation_tokens", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise InputError(f"{name} is {value!r}; give None for no limit, or a whole number of at least {least}.")

    def max_tokens(self, split: str) -> int | None:
        return self.max_train_tokens if split == "train" else self.max_validation_tokens

    def fingerprint(self) -> str:
        """A hash of everything that determines the cache's contents.

        Raises:
            InputError: the corpus or the vocabulary can't be read, or a prepared cache has other rows.
        """
        if isinstance(self.corpus, PreparedCorpus):
            return self.corpus.task_fingerprint(self.seq_len, self.vocabulary)
        vocabulary = vocabularies.load(self.vocabulary)
        limits = [self.max_train_tokens, self.max_validation_tokens]
        parts = [_LAYOUT, self.corpus.fingerprint(), vocabulary.name, vocabulary.sha256, self.seq_len, limits]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def cache_path(self) -> Path:
        """Where the cache of this task is, or will be. Raises as `fingerprint` does."""
        if isinstance(self.corpus, PreparedCorpus):
            self.fingerprint()  # refuses a cache that is not this task's
            return self.corpus.path
        root = self.cache_dir or os.environ.get("PEER_JAX_CACHE") or "~/.cache/peer_jax"
        name = vocabularies.load(self.vocabulary).name
        return Path(root).expanduser() / f"{self.corpus.name}-{name}-{self.seq_len}-{self.fingerprint()[:12]}"
