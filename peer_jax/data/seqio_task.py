"""The seqio task of a `TextTask`: it tokenises, appends EOS, cuts, and packs by `seqio.DecoderFeatureConverter`.

This module imports TensorFlow, so `tasks.py` imports it only when there is something to prepare.
"""

import os
from collections.abc import Callable, Iterator

import numpy as np

# isort: off
from peer_jax.data.tfds_source import first_line, open_builder  # first, because it silences TensorFlow's beginning
import seqio
import tensorflow as tf
# isort: on

from peer_jax.data import vocabulary as vocabularies
from peer_jax.data.corpora import Corpus, TfdsCorpus
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError

BATCH_ROWS = 256
# seqio's packing takes about 250 us per row on a CPU core, whatever the length of the row. Training text is therefore
# packed into long rows of this many tokens, which are cut afterwards. Longer rows would cost memory: seqio pads as many
# pieces as a row has tokens to the longest piece, up to 64 MiB per call, with at most PARALLEL_CALLS calls at a time.
PACK_TOKENS = 4096
PARALLEL_CALLS = 8


class Source:
    """A corpus as a seqio data source whose examples are {"text": string}.

    An error that is raised in a thread of tf.data comes out as an error of TensorFlow; `error` keeps the original one.
    """

    def __init__(self, corpus: Corpus | TfdsCorpus, splits: tuple[str, ...]):
        self.error: InputError | None = None
        self.note: str | None = None
        if isinstance(corpus, TfdsCorpus):
            self.seqio, self.text_key, self.note = _tfds_source(corpus, splits)
        else:
            self.seqio = seqio.FunctionDataSource(self._read, splits=splits)
            self.text_key = "text"
        self._corpus = corpus

    def _read(self, split, shuffle_files, seed=None):
        del shuffle_files, seed  # the corpus fixes the order

        def examples():
            try:
                for document in self._corpus.documents(split):
                    yield {"text": document.text.encode()}
            except InputError as error:
                self.error = error
                raise

        spec = {"text": tf.TensorSpec([], tf.string)}
        return tf.data.Dataset.from_generator(examples, output_signature=spec)

    def texts(self, split: str) -> Iterator[str]:
        for example in self.seqio.get_dataset(split, shuffle=False).as_numpy_iterator():
            yield example[self.text_key].decode(errors="replace")


def packed_rows(
    task: TextTask,
    source: Source,
    split: str,
    wanted: Callable[[bytes], bool],
    admit: Callable[[bytes, list[int]], int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (tokens, segment_ids), each [n, seq_len] int32, of one split.

    Args:
        wanted: says whether to use a document, given its text.
        admit: called for each wanted document in order, with its text and ids. It returns how many of the ids to take;
            if that is 0, the split ends before that document.
    """

    def is_wanted(example):
        text = example["targets_pretokenized"]
        return tf.ensure_shape(tf.numpy_function(lambda t: np.bool_(wanted(t)), [text], tf.bool), [])

    def admitted(example):
        ids = example["targets"]
        arguments = [example["targets_pretokenized"], ids]
        taken = tf.numpy_function(lambda t, n: np.int64(admit(t, n.tolist())), arguments, tf.int64)
        return {"targets": ids[: tf.ensure_shape(taken, [])]}

    def has_tokens(example):
        return tf.size(example["targets"]) > 0

    name = f"peer_jax_{task.fingerprint()[:12]}_{split}"
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=source.seqio,
        preprocessors=[
            lambda dataset: dataset.map(lambda example: {"targets": example[source.text_key]}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
            lambda dataset: dataset.filter(is_wanted).map(admitted).take_while(has_tokens),  # one at a time, in order
            fill_rows if split == "train" else cut_documents,
        ],
        output_features={"targets": seqio.Feature(seqio_vocabulary(task.vocabulary), add_eos=True)},
    )
    lengths = {"targets": task.seq_len * max(1, PACK_TOKENS // task.seq_len) if split == "train" else task.seq_len}
    dataset = seqio.get_mixture_or_task(name).get_dataset(
        lengths, split=split, shuffle=False, trim_output_features=False, try_in_mem_cache=False
    )
    # Pieces are at most seq_len by construction, so seqio's checks (a third of the time) would find nothing.
    dataset = seqio.DecoderFeatureConverter(pack=True, apply_length_check=False)(dataset, lengths)
    dataset = dataset.map(lambda row: (row["decoder_target_tokens"], row["decoder_segment_ids"])).batch(BATCH_ROWS)
    options = tf.data.Options()
    options.autotune.cpu_budget = min(PARALLEL_CALLS, os.cpu_count() or 1)
    options.threading.max_intra_op_parallelism = 1
    options.experimental_optimization.map_fusion = True
    try:
        for tokens, segment_ids in dataset.with_options(options).as_numpy_iterator():
            yield cut_rows(tokens, segment_ids, task.seq_len)
    except tf.errors.OpError as error:
        if source.error is not None:
            raise source.error from error
        raise InputError(f"{task.corpus.name} can't be read: {first_line(error)}.") from error


def cut_rows(tokens: np.ndarray, segment_ids: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts packed rows of k * seq_len into rows of seq_len. Segments count from 1 in each; empty rows are dropped."""
    tokens, segment_ids = tokens.reshape(-1, seq_len), segment_ids.reshape(-1, seq_len)
    used = segment_ids[:, 0] > 0
    tokens, segment_ids = tokens[used], segment_ids[used]
    return tokens, np.where(segment_ids > 0, segment_ids - segment_ids[:, :1] + 1, 0)


def cut_documents(dataset: tf.data.Dataset, sequence_length: dict[str, int]) -> tf.data.Dataset:
    """Cuts each document into pieces of seq_len tokens; the last piece may be shorter."""
    length = sequence_length["targets"]
    return dataset.map(lambda example: _pieces(example["targets"], length, length)).unbatch()


def fill_rows(dataset: tf.data.Dataset, sequence_length: dict[str, int]) -> tf.data.Dataset:
    """Cuts documents where seqio's packing will end a row, so that the packed rows are full.

    seqio appends pieces to a row while they fit, and ends the row after every `seq_len` pieces. This function counts in
    the same way. If seqio counted differently, rows would be less full, and nothing else would change.
    """
    length = sequence_length["targets"]

    def cut(state, example):
        room, count = state
        pieces = _pieces(example["targets"], room, length)
        count = (count + tf.shape(pieces["targets"])[0]) % length
        room = (room - tf.size(example["targets"]) - 1) % length + 1
        return (tf.where(count == 0, length, room), count), pieces

    return dataset.scan((tf.constant(length), tf.constant(0)), cut).unbatch()


def _pieces(tokens: tf.Tensor, room: tf.Tensor | int, length: int) -> dict[str, tf.Tensor]:
    """The first `room` tokens, then `length` at a time, as [pieces, length]; packing removes the zeros at the ends."""
    first = tf.minimum(room, tf.size(tokens))
    rest = tf.size(tokens) - first
    last = rest % length
    lengths = tf.concat([[first], tf.fill([rest // length], length), tf.fill([tf.minimum(last, 1)], last)], 0)
    return {"targets": tf.RaggedTensor.from_row_lengths(tokens, lengths).to_tensor(shape=[None, length])}


def seqio_vocabulary(vocabulary: str) -> seqio.Vocabulary:
    if vocabulary == vocabularies.BYTES:
        return seqio.ByteVocabulary()
    return seqio.SentencePieceVocabulary(os.path.expanduser(vocabulary))


def _tfds_source(corpus: TfdsCorpus, splits: tuple[str, ...]) -> tuple[seqio.TfdsDataSource, str, str | None]:
    """The source, the key of its text, and a sentence about its splits if the user should know of something."""
    opened = open_builder(corpus, {"text_key": corpus.text_key}, splits)
    data_dir = corpus.data_dir and os.path.expanduser(corpus.data_dir)
    # Reading only: otherwise seqio asks for Google's copy too, and TFDS refuses that next to a data_dir.
    if data_dir is None and str(opened.builder.data_dir_root).startswith("gs://"):
        data_dir = str(opened.builder.data_dir_root)
    source = seqio.TfdsDataSource(corpus.builder, tfds_data_dir=data_dir, splits=opened.splits, read_only=True)
    return source, corpus.text_key, opened.note
