"""Reading a cache: the order of rows, hosts, position, shards, errors, and that TensorFlow is not imported."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from peer_jax.data import cache, pipeline
from peer_jax.errors import InputError

SEQ_LEN = 12
COUNTS = {"documents": 1, "bytes": 1, "words": 1}


def random_rows(rows, seed=0, seq_len=SEQ_LEN):
    """Rows as packing makes them, with segments 1, 2, ... and then padding. The first token identifies the row."""
    rng = np.random.default_rng(seed)
    tokens, segment_ids = np.zeros((2, rows, seq_len), np.int32)
    for row in range(rows):
        used = rng.integers(1, seq_len + 1)
        ends = np.sort(rng.choice(np.arange(1, seq_len + 1), 3, replace=False))
        segment_ids[row, :used] = 1 + np.searchsorted(ends, np.arange(used), side="right")
        tokens[row, :used] = rng.integers(1, 200, used)
        tokens[row, 0] = 1 + row
    return tokens, segment_ids


def write(path, train, validation, vocabulary_size=259):
    seq_len = train[0].shape[1]
    with cache.CacheWriter(path, cache.TEXT, cache.text_fields(seq_len, vocabulary_size)) as writer:
        splits = {"train": writer.write_split("train", [train]) | COUNTS}
        splits["validation"] = writer.write_split("validation", [validation]) | COUNTS
        writer.commit({"splits": splits})
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cache.SHARD_VALUES, cache.TEXT, 16 * SEQ_LEN)  # three shards of train
        return write(path, random_rows(37), random_rows(10, seed=1))


@pytest.fixture(scope="module")
def train(prepared):
    return pipeline.open_cache(prepared, "train")


def rows_of(batch):
    """The rows that a batch holds, identified by their first tokens."""
    return (batch["targets"][:, 0] - 1).tolist()


def take(iterator, steps):
    return [rows_of(next(iterator)) for _ in range(steps)]


def test_rows_come_back_from_all_shards(prepared, train):
    tokens, segment_ids = random_rows(37)
    assert len(list(prepared.glob("train/tokens-*.npy"))) == 3
    assert (len(train), train.rows, train.seq_len) == (37, 37, SEQ_LEN)
    assert train.counts["tokens"] == np.count_nonzero(segment_ids)
    for row in (0, 15, 16, 36, -1):
        np.testing.assert_array_equal(train[row]["tokens"], tokens[row])
        np.testing.assert_array_equal(train[row]["segment_ids"], segment_ids[row])
    order = np.random.default_rng(2).permutation(37)
    np.testing.assert_array_equal(train.take(order)["tokens"], tokens[order])
    np.testing.assert_array_equal(train.take(order)["segment_ids"], segment_ids[order])
    assert train.take(order)["tokens"].dtype == np.int32
    for bad in (37, -38):
        with pytest.raises(IndexError):
            train[bad]
        with pytest.raises(IndexError):
            train.take([0, bad])


@pytest.mark.parametrize(("size", "seq_len", "names"), [(65536, 255, "uint16 uint8"), (65537, 256, "int32 uint16")])
def test_dtypes_are_as_small_as_the_values_allow(tmp_path, size, seq_len, names):
    rows = random_rows(3, seq_len=seq_len)
    rows[0][0, 0] = size - 1
    source = pipeline.open_cache(write(tmp_path / "c", rows, rows, vocabulary_size=size), "train")
    assert f"{source[0]['tokens'].dtype} {source[0]['segment_ids'].dtype}" == names
    assert source[0]["tokens"][0] == size - 1


def test_inputs_are_targets_shifted_within_segments(train):
    for batch in list(pipeline.eval_batches(train, batch_size=8)):
        targets, segment_ids, inputs = batch["targets"], batch["segment_ids"], batch["inputs"]
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        for b in range(8):
            for t in range(SEQ_LEN):
                same = t > 0 and segment_ids[b, t] == segment_ids[b, t - 1]
                assert inputs[b, t] == (targets[b, t - 1] if same else 0)


@pytest.mark.parametrize("batch_size", [4, 8, 37])
def test_every_epoch_is_a_new_order_of_all_rows(train, batch_size):
    steps = 3 * 37 // batch_size + 1
    stream = [row for rows in take(pipeline.train_batches(train, batch_size=batch_size, seed=3), steps) for row in rows]
    epochs = [stream[37 * e : 37 * (e + 1)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(37))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # The shuffle is global and not within windows: rows of the first half of the epoch come from the whole split.
    assert max(epochs[0][:18]) > 30
    assert min(epochs[0][18:]) < 6


def test_order_depends_on_seed_and_step_only(train):
    first = take(pipeline.train_batches(train, batch_size=8, seed=3), 12)
    assert take(pipeline.train_batches(train, batch_size=8, seed=3), 12) == first
    assert take(pipeline.train_batches(train, batch_size=8, seed=4), 12) != first


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_each_global_batch_in_order(train, hosts):
    alone = pipeline.train_batches(train, batch_size=8, seed=3)
    together = [
        pipeline.train_batches(train, batch_size=8, seed=3, process_index=h, process_count=hosts) for h in range(hosts)
    ]
    for _ in range(12):
        whole, parts = next(alone), [next(iterator) for iterator in together]
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])

    source = pipeline.eval_batches(train, batch_size=8)
    parts = [pipeline.eval_batches(train, batch_size=8, process_index=h, process_count=hosts) for h in range(hosts)]
    assert {len(part) for part in parts} == {len(source)}
    for step, whole in enumerate(source):
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), whole[key])


def test_position_is_saved_and_restored_mid_epoch(train):
    whole = take(pipeline.train_batches(train, batch_size=8, seed=3), 20)
    first = pipeline.train_batches(train, batch_size=8, seed=3)
    assert take(first, 7) == whole[:7]
    state = json.loads(json.dumps(first.get_state()))
    assert state == {"next_index": 7}
    assert take(first, 3) == whole[7:10]  # reading ahead hasn't moved the position

    later = pipeline.train_batches(train, batch_size=8, seed=3)
    later.set_state(state)
    assert take(later, 13) == whole[7:]

    # The same holds on another number of hosts.
    half = pipeline.train_batches(train, batch_size=8, seed=3, process_index=1, process_count=2)
    half.set_state(state)
    assert take(half, 13) == [rows[4:] for rows in whole[7:]]


def test_evaluation_passes_once_and_pads_the_last_batch(train):
    batches = pipeline.eval_batches(train, batch_size=8)
    assert len(batches) == 5 == len(list(batches))
    tokens, segment_ids = random_rows(37)
    padding = ((0, 3), (0, 0))
    np.testing.assert_array_equal(np.concatenate([b["targets"] for b in batches]), np.pad(tokens, padding))
    np.testing.assert_array_equal(np.concatenate([b["segment_ids"] for b in batches]), np.pad(segment_ids, padding))
    assert not batches[4]["inputs"][5:].any()
    counted = sum(np.count_nonzero(batch["segment_ids"]) for batch in batches)
    assert counted == train.counts["tokens"]
    assert len(pipeline.eval_batches(train, batch_size=100)) == 1  # fewer rows than a batch are no error here


def test_too_small_or_indivisible_batches_are_named(train):
    with pytest.raises(InputError, match=r"batch_size 38 is more than the 37 rows of 12 tokens in tiny/train"):
        pipeline.train_batches(train, batch_size=38, seed=0)
    with pytest.raises(InputError, match="batch_size 8 does not divide by 3 hosts"):
        pipeline.train_batches(train, batch_size=8, seed=0, process_count=3)
    with pytest.raises(InputError, match="batch_size is 0"):
        pipeline.eval_batches(train, batch_size=0)
    with pytest.raises(InputError, match="process_index is 2 with 2 hosts"):
        pipeline.eval_batches(train, batch_size=8, process_index=2, process_count=2)
    with pytest.raises(InputError, match="seed is -1"):
        pipeline.train_batches(train, batch_size=8, seed=-1)


def truncate(path):
    file = path / "train" / "tokens-00001.npy"
    file.write_bytes(file.read_bytes()[:-5])


def swap(path):
    np.save(path / "train" / "tokens-00001.npy", np.zeros((16, SEQ_LEN), np.int64))


def shorten(path):
    np.save(path / "train" / "segment_ids-00000.npy", np.zeros((3, SEQ_LEN), np.uint8))


def edit(**changes):
    def apply(path):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["digest"]
        (path / "manifest.json").write_text(json.dumps(cache.signed(manifest | changes)))

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "does not exist; run `peer-jax prepare`"),
        (lambda path: (path / "manifest.json").unlink(), "is not a prepared cache"),
        (lambda path: (path / "manifest.json").write_text('{"kind": '), r"manifest\.json is damaged; delete"),
        (lambda path: (path / "manifest.json").write_text('{"kind": "other"}'), "is not a cache of peer_jax"),
        (lambda path: (path / "manifest.json").write_text("[]"), "is not a cache of peer_jax"),
        (edit(format=99), "has cache format 99 and this version reads 2"),
        (edit(splits={"train": {}}), r"manifest\.json is damaged"),
        (lambda path: (path / "train" / "tokens-00002.npy").unlink(), r"tokens-00002\.npy is missing or damaged"),
        (truncate, r"tokens-00001\.npy is missing or damaged"),
        (swap, r"tokens-00001\.npy is missing or damaged"),
        (shorten, r"segment_ids-00000\.npy is missing or damaged"),
    ],
)
def test_half_written_and_foreign_caches_are_refused(prepared, tmp_path, damage, says):
    path = tmp_path / "tiny"
    shutil.copytree(prepared, path)
    damage(path)
    with pytest.raises(InputError, match=says) as caught:
        pipeline.open_cache(path, "train")
    assert "\n" not in str(caught.value)


def test_split_that_is_not_there_is_named(prepared, tmp_path):
    with pytest.raises(InputError, match="has no split 'test'; it has train, validation"):
        pipeline.open_cache(prepared, "test")
    empty = tuple(array[:0] for array in random_rows(1))
    with pytest.raises(InputError, match="has no rows for 'train'; prepare it with max_train_tokens above 0"):
        pipeline.open_cache(write(tmp_path / "c", empty, random_rows(2)), "train")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def batches():
        yield random_rows(5)
        assert len(list(tmp_path.iterdir())) == 1
        raise ZeroDivisionError

    fields = cache.text_fields(SEQ_LEN, 259)
    with cache.CacheWriter(tmp_path / "c", cache.TEXT, fields) as writer, pytest.raises(ZeroDivisionError):
        writer.write_split("train", batches())
    assert not list(tmp_path.iterdir())


def test_reading_imports_neither_tensorflow_nor_seqio(prepared):
    code = f"""
import sys
from peer_jax.data import pipeline
source = pipeline.open_cache({str(prepared)!r}, "train")
next(pipeline.train_batches(source, batch_size=4, seed=0))
pipeline.eval_batches(source, batch_size=4)[0]
pipeline.decode(pipeline.encode("text", "bytes"), "bytes")
assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
