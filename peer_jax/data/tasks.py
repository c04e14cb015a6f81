"""Prepares the token cache by running a seqio task once. Training calls `pipeline.ensure_prepared` instead.

tokenise -> append EOS -> cut documents into pieces of at most seq_len -> pack with seqio.DecoderFeatureConverter.
Nothing is truncated. A training document goes on in the next row when a row is full, so all rows are full. A validation
document is cut only at multiples of seq_len from its own start, so that its loss does not depend on its neighbours.
"""

import hashlib
import io
import json
import os
import pickle
import platform
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from peer_jax import startup
from peer_jax.data import cache
from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.corpora import SPLITS, Corpus, TfdsCorpus
from peer_jax.data.image_task import ImageTask
from peer_jax.data.prepare_progress import PrepareProgress
from peer_jax.data.task import Task
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError
from peer_jax.storage import local

SHOWN = 3  # of what was left out


def prepare(task: Task, *, progress: bool = True) -> Path:
    """Writes the task's cache unless it is there, and returns its path. Safe for several processes at once.

    A damaged cache is written again, unless it is that of a `PreparedCorpus`, whose text isn't here.

    This imports TensorFlow; a process that goes on to train calls `pipeline.ensure_prepared` instead.

    Raises:
        InputError: if the corpus or the vocabulary can't be used, or the cache can't be written.
    """
    path = task.cache_path()
    if not task.is_prepared():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with PrepareProgress(enabled=progress) as bar, _lock(path, bar):
                if not task.is_prepared():  # else another process has just made it
                    if path.exists():
                        bar.note(f"{path} is damaged and is prepared again")
                    if isinstance(task, ImageTask):
                        with bar.spinner(f"reading the images of {task.corpus.name}"):
                            task.write_cache(path, bar.note)
                    else:
                        _write(task, path, bar)
        except OSError as error:
            raise InputError(
                f"the cache {path} can't be written ({error.strerror or error}); "
                "free some space there, or set cache_dir or PEER_JAX_CACHE to another folder."
            ) from error
    cache.verify(path)
    return path


def _lock(path: Path, bar: PrepareProgress):
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        bar.note(f"waiting for another process that prepares {path.name}")
        return lock.acquire()


def _write(task: TextTask, path: Path, bar: PrepareProgress) -> None:
    vocabulary = vocabularies.load(task.vocabulary)
    splits = tuple(split for split in SPLITS if task.max_tokens(split) != 0)
    if not isinstance(task.corpus, TfdsCorpus):
        for split in splits:  # the commonest mistakes are found before the seconds that TensorFlow takes to load
            if next(iter(task.corpus.documents(split)), None) is None:
                raise _no_documents(task, split)
    with cache.CacheWriter(path, cache.TEXT, cache.text_fields(task.seq_len, vocabulary.size)) as writer:
        with bar.spinner("loading seqio and TensorFlow"):
            from peer_jax.data import seqio_task

            source = seqio_task.Source(task.corpus, splits)
        if source.note:
            bar.note(source.note)
        counts, taken, validation_texts = {}, {}, set()
        for split in reversed(SPLITS):  # validation first: training leaves out what validation holds
            documents = taken[split] = _Documents(task, split, vocabulary, validation_texts, bar)
            rows = []
            if split in splits:
                rows = seqio_task.packed_rows(task, source, split, documents.wanted, documents.admit)
            written = writer.write_split(split, rows)
            if split in splits and not documents.documents:
                raise _no_documents(task, split)
            if written["tokens"] != documents.tokens:
                raise RuntimeError(f"{documents.tokens} tokens of {split} went in, {written['tokens']} came out")
            counts[split] = written | documents.counts()
        left_out = getattr(task.corpus, "left_out", [])
        writer.write_left_out(left_out)
        writer.commit(_manifest(task, vocabulary, counts))
    for sentence in _notes(task, path, taken, left_out):
        bar.note(sentence)


def _notes(task: TextTask, path: Path, taken: dict[str, "_Documents"], left_out: list[str]) -> Iterator[str]:
    """What the user should know of the text that was prepared, a sentence each."""
    train, validation = taken["train"], taken["validation"]
    sizes = [f"{taken[split].size()} to {verb} on" for split, verb in (("train", "train"), ("validation", "validate"))]
    share, asked = validation.bytes / max(1, train.bytes + validation.bytes), getattr(task.corpus, "asked_share", None)
    whole = not (train.is_cut or validation.is_cut) and train.documents > 0
    yield f"{task.corpus.name}: {', '.join(sizes)}" + (f", which is {share:.2%} of the text" if whole else "")
    if asked is not None and whole and not 0.8 * asked <= share <= 1.25 * asked:
        yield (
            f"{task.corpus.name}: validation is {'under' if share < asked else 'over'} the {asked:.2%} that "
            "validation_share asks for; give more text, or validation_path"
        )
    if passed_over := getattr(task.corpus, "passed_over", ""):
        yield f"{task.corpus.name}: passed over {passed_over}; name such files in patterns to read them"
    if left_out:
        shown = "; ".join(sentence.split(";")[0] for sentence in left_out[:SHOWN])
        more = f", and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        yield f"{task.corpus.name}: left out {len(left_out)} lines or files, see {path / cache.LEFT_OUT}: {shown}{more}"
    if changed := train.changed + validation.changed:
        yield (
            f"vocabulary {task.vocabulary!r} does not keep all text: {changed} of "
            f"{train.documents + validation.documents} documents change, such as in newlines or repeated spaces, or by "
            "unknown characters; bits per byte are of the bytes that it keeps"
        )


def _no_documents(task: TextTask, split: str) -> InputError:
    return InputError(f"{task.corpus.name} has no documents for {split}; give more text, or other splits.")


class _Documents:
    """Decides which documents of one split are taken, one after another, and counts them.

    Bytes and words are those of the text that the tokens stand for: a vocabulary may drop newlines, for example.
    """

    def __init__(
        self,
        task: TextTask,
        split: str,
        vocabulary: vocabularies.Vocabulary,
        validation_texts: set[bytes],
        bar: PrepareProgress,
    ):
        self.documents = self.tokens = self.bytes = self.words = 0
        self.repeated = 0  # training documents that are left out because validation has their text
        self.changed = 0  # documents whose tokens don't stand for their whole text
        self.is_cut = False  # by the limit on tokens
        self._split, self._limit, self._bar, self._vocabulary = split, task.max_tokens(split), bar, vocabulary
        self._cut_at_limit = task.cut_at_limits
        # Local corpora have no text in both splits; a TFDS builder may.
        self._apart = isinstance(task.corpus, TfdsCorpus)
        self._validation_texts = validation_texts
        self._corpus_bytes = task.corpus.num_bytes() if split == "train" and not self._apart else None

    def wanted(self, text: bytes) -> bool:
        if self._apart and self._split == "train" and _digest(text) in self._validation_texts:
            self.repeated += 1
            return False
        return bool(text)

    def admit(self, text: bytes, ids: Sequence[int]) -> int:
        """How many of a document's ids to take; 0 ends the split."""
        room = len(ids) if self._limit is None else self._limit - self.tokens
        if room <= 0:
            self.is_cut = True
            return 0
        if self._apart and self._split == "validation":
            self._validation_texts.add(_digest(text))
        taken = min(room, len(ids)) if self._cut_at_limit else len(ids)
        self.is_cut |= taken < len(ids)
        kept = text
        if taken < len(ids) or self._vocabulary.sha256 is not None:
            kept = self._vocabulary.kept(ids[:taken])
            self.changed += taken == len(ids) and kept != text
        self.documents += 1
        self.tokens += taken
        self.bytes += len(kept)
        self.words += len(kept.decode(errors="replace").split())
        self._bar.update(self._split, self.tokens, self.documents, self._expected_tokens())
        return taken

    def size(self) -> str:
        cut = f" (cut at max_{self._split}_tokens)" if self.is_cut else ""
        return f"{self.tokens:,} tokens of {self.documents:,} document{'s' * (self.documents != 1)}{cut}"

    def counts(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("documents", "bytes", "words", "repeated")}

    def _expected_tokens(self) -> float | None:
        bounds = [] if self._limit is None else [self._limit]
        if self._corpus_bytes:
            bounds.append(self._corpus_bytes * self.tokens / max(self.bytes, 1))
        return min(bounds, default=None)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()[:16]


def _manifest(task: TextTask, vocabulary: vocabularies.Vocabulary, counts: dict) -> dict:
    packages = ("peer-jax", "seqio", "tensorflow", "tensorflow-datasets", "sentencepiece")
    return {
        "task": {
            "corpus": task.corpus.name,
            "max_train_tokens": task.max_train_tokens,
            "max_validation_tokens": task.max_validation_tokens,
        },
        "fingerprint": task.fingerprint(),
        "corpus_fingerprint": task.corpus.fingerprint(),
        "vocabulary": {
            "name": task.vocabulary,
            "size": vocabulary.size,
            "eos_id": vocabulary.eos_id,
            "sha256": vocabulary.sha256,
        },
        "splits": {split: counts[split] for split in SPLITS},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # peer-jax itself, run from a checkout
        return None


def train_sentencepiece(
    corpus: Corpus | TfdsCorpus, model_path: str | os.PathLike, *, vocab_size: int, max_bytes: int = 2**24
) -> Path:
    """Trains a SentencePiece model on the first training documents: BPE, lossless, with bytes if no piece fits.

    Args:
        corpus: the text.
        model_path: the file that gets the model.
        vocab_size: number of pieces, among them 0 = padding, 1 = EOS, 2 = unknown and the 256 bytes.
        max_bytes: how much text to train on.

    Raises:
        InputError: if the size doesn't suit the text, if there is no text, or if the path can't be written.
    """
    import sentencepiece

    path, model = Path(local(model_path, "model")).expanduser(), io.BytesIO()
    if type(vocab_size) is not int or vocab_size <= 259:
        raise InputError(f"vocab_size is {vocab_size!r}; give a number above 259 (the bytes and three special ids).")
    texts = _limited(_training_texts(corpus), max_bytes)
    first = next(texts, None)
    if first is None:
        raise InputError(f"{corpus.name} has no documents for train; give a corpus with text in it.")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2**16,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).split("] ", 1)[-1].strip().split("\n")[0].rstrip(".")
        raise InputError(f"vocab_size {vocab_size} does not suit {corpus.name}: {reason}.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(model.getvalue())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path} can't be written ({error.strerror}); give another path for the model.") from error
    return path


def _training_texts(corpus: Corpus | TfdsCorpus) -> Iterator[str]:
    if isinstance(corpus, TfdsCorpus):
        from peer_jax.data import seqio_task

        return seqio_task.Source(corpus, ("train",)).texts("train")
    return (document.text for document in corpus.documents("train"))


def _limited(texts: Iterator[str], max_bytes: int) -> Iterator[str]:
    """The lines, with their ends, of the first `max_bytes` or so of text: the trainer wants short pieces."""
    taken = 0
    for text in texts:
        for line in text.splitlines(keepends=True):
            yield line
            taken += len(line.encode())
        if taken >= max_bytes:
            return


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def main(request: str, answer: str) -> int:
    """The process that `pipeline.ensure_prepared` starts; returns its exit status.

    It reads a pickled (task, progress) from the file `request` and writes {"path": ...} or {"error": ...} as JSON to
    the file `answer`. TensorFlow's C++ code writes to file descriptor 2 whatever its settings are; this goes to a
    file beside the request, and Python's `sys.stderr` keeps the terminal.
    """
    terminal = os.dup(2)
    with open(Path(request).with_name("log"), "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    warnings.simplefilter("ignore")  # TensorFlow's own imports cause warnings that users can do nothing about
    try:
        task, progress = pickle.loads(Path(request).read_bytes())
        result, status = {"path": str(prepare(task, progress=progress))}, 0
    except InputError as error:
        result, status = {"error": error.told()}, error.status
    except Exception:
        traceback.print_exc()
        return 1
    Path(answer).write_text(json.dumps(result))
    return status


if __name__ == "__main__":
    startup.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, and its parent says so
    sys.exit(main(*sys.argv[1:]))
