"""What a cache is made of: a corpus, a sequence length and a vocabulary. This module imports nothing heavy."""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.corpora import Corpus, TfdsCorpus
from peer_jax.data.prepared import PreparedCorpus
from peer_jax.data.task import Task
from peer_jax.errors import InputError
from peer_jax.fields import Placed
from peer_jax.storage import AnyPath

_LAYOUT = 1  # raise it when the same task would give other rows


@dataclass(frozen=True)
class TextTask(Task):
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
        self.check_cache_dir()
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

    def cache_name(self) -> str:
        name = vocabularies.load(self.vocabulary).name
        return f"{self.corpus.name}-{name}-{self.seq_len}-{self.fingerprint()[:12]}"

    def given_cache(self) -> AnyPath | None:
        return self.corpus.path if isinstance(self.corpus, PreparedCorpus) else None

    def model_sizes(self) -> dict[str, int]:
        return {"vocab_size": vocabularies.vocabulary_size(self.vocabulary)}

    def check_fits(self, other: Task, what: str) -> None:
        if not isinstance(other, TextTask):
            raise InputError(f"{self.corpus.name} is text, but {what} is not of text: give images")
        if not vocabularies.same(self.vocabulary, other.vocabulary):
            raise InputError(f"TextTask.vocabulary={self.vocabulary!r} is not that of {what}, {other.vocabulary!r}")

    def train_tokens(self) -> int | None:
        """An estimate that takes each byte for a token.

        If the corpus doesn't know its size, as with TFDS, or tokens are not bytes, it is the limit of the task, or None
        if there is no limit.
        """
        limit = self.max_train_tokens
        if self.vocabulary == vocabularies.BYTES and hasattr(self.corpus, "num_bytes"):
            size = self.corpus.num_bytes()
            return size if limit is None else min(size, limit)
        return limit

    def example(self, rows: int) -> dict[str, Any]:
        import numpy as np  # imported here, so that naming a task stays cheap

        size = vocabularies.vocabulary_size(self.vocabulary)
        tokens = np.random.default_rng(0).integers(3, size, (rows, self.seq_len), np.int32)
        return {"inputs": tokens, "targets": tokens, "segment_ids": np.ones_like(tokens)}
