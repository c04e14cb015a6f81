"""Preparing loses no text, and packs and numbers tokens as seqio does; its errors name what is wrong."""

import errno
import json
import re

import numpy as np
import pytest

from peer_jax.data import cache, corpora, pipeline, tasks, vocabulary
from peer_jax.data.image_task import ImageTask
from peer_jax.data.images import tfds_images
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError

# TensorFlow, seqio and TFDS warn of deprecated calls of their own while the first test here imports them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SEQ_LEN = 32


class Given:
    """A corpus of texts that a test gives."""

    def __init__(self, name, train, validation):
        self.name, self.splits = name, {"train": train, "validation": validation}

    def fingerprint(self):
        return self.name

    def num_bytes(self):
        return sum(len(text) for text in self.splits["train"])

    def documents(self, split):
        for number, text in enumerate(self.splits[split]):
            yield corpora.Document(f"{split}:{number}", text)


def random_texts(count, longest, seed):
    rng = np.random.default_rng(seed)
    words = ["a", "of", "é", "☃", "  ", "\n", "peer", "expert", "million"]
    return [" ".join(rng.choice(words, rng.integers(1, longest))) for _ in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def segments(path, split):
    """The pieces in a cache, in order, and how full its rows are."""
    source = pipeline.open_cache(path, split)
    pieces = []
    for row in range(len(source)):
        tokens, segment_ids = source[row]["tokens"], source[row]["segment_ids"]
        used = np.count_nonzero(segment_ids)
        assert segment_ids[0] == 1
        assert set(np.diff(segment_ids[:used].astype(int))) <= {0, 1}  # 1, 2, 3 ... in order, without gaps
        assert not segment_ids[used:].any()
        assert not tokens[used:].any()
        assert tokens[:used].all()
        pieces += [tokens[segment_ids == i].tolist() for i in range(1, segment_ids.max() + 1)]
    return pieces, source.counts["tokens"] / (source.rows * source.seq_len)


def documents(pieces):
    """The documents: pieces joined up to each EOS."""
    joined, current = [], []
    for piece in pieces:
        assert 1 not in piece[:-1]  # EOS ends a piece: no piece holds parts of two documents
        current += piece
        if piece[-1] == 1:
            joined.append(current)
            current = []
    assert not current
    return joined


@pytest.fixture(scope="module")
def corpus():
    train = [*random_texts(300, 4, 0), *random_texts(60, 60, 1), "x" * 31, "y" * 32, "z" * 64, "w" * 1000]
    return Given("mixed", train, [*random_texts(40, 30, 2), "v" * 31, "u" * 63, "t" * 500])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def prepared(corpus, folder):
    return tasks.prepare(TextTask(corpus, SEQ_LEN, max_validation_tokens=None, cache_dir=folder))


@pytest.fixture(scope="module")
def sentencepiece_model(corpus, folder):
    return str(tasks.train_sentencepiece(corpus, folder / "mixed.model", vocab_size=300))


@pytest.mark.slow
def test_every_document_can_be_rebuilt(corpus, prepared):
    for split, texts in corpus.splits.items():
        pieces, _ = segments(prepared, split)
        assert documents(pieces) == [[*(byte + 3 for byte in text.encode()), 1] for text in texts]


@pytest.mark.slow
def test_training_rows_are_full_and_validation_documents_whole(corpus, prepared, folder):
    _, fill = segments(prepared, "train")
    assert fill > 0.98  # seqio ends a row after every seq_len pieces, full or not

    pieces, _ = segments(prepared, "validation")
    expected = []
    for text in corpus.splits["validation"]:
        ids = [*(byte + 3 for byte in text.encode()), 1]
        expected += [ids[start : start + SEQ_LEN] for start in range(0, len(ids), SEQ_LEN)]
    assert pieces == expected

    # Documents are shorter than rows, and there are more of them than seqio packs at a time.
    short = Given("short", random_texts(3000, 3, 5), ["validation"])
    _, fill = segments(tasks.prepare(TextTask(short, SEQ_LEN, cache_dir=folder)), "train")
    assert fill > 0.98


def test_counts_are_those_of_the_documents(corpus, prepared):
    manifest = json.loads((prepared / "manifest.json").read_text())
    for split, texts in corpus.splits.items():
        source = pipeline.open_cache(prepared, split)
        assert source.counts == {
            "rows": len(source),
            "tokens": sum(len(text.encode()) + 1 for text in texts),
            "documents": len(texts),
            "bytes": sum(len(text.encode()) for text in texts),
            "words": sum(len(text.split()) for text in texts),
        }
    assert manifest["vocabulary"] == {"name": "bytes", "size": 259, "eos_id": 1, "sha256": None}
    assert manifest["seq_len"] == SEQ_LEN
    assert manifest["versions"]["seqio"]


def test_preparing_twice_gives_the_same_bytes_and_once_is_enough(corpus, prepared, tmp_path, monkeypatch):
    again = tasks.prepare(TextTask(corpus, SEQ_LEN, max_validation_tokens=None, cache_dir=tmp_path))
    files, others = (
        sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file() and file.name != cache.VERIFIED)
        for path in (again, prepared)
    )
    assert files == others
    for file in files:
        assert (again / file).read_bytes() == (prepared / file).read_bytes()
    monkeypatch.setattr(tasks, "_write", None)  # not called again
    assert tasks.prepare(TextTask(corpus, SEQ_LEN, max_validation_tokens=None, cache_dir=tmp_path)) == again


def test_inputs_equal_those_of_seqio(prepared):
    import tensorflow as tf
    from seqio import utils

    for batch in list(pipeline.eval_batches(pipeline.open_cache(prepared, "train"), batch_size=4))[:40]:
        for targets, segment_ids, inputs in zip(batch["targets"], batch["segment_ids"], batch["inputs"], strict=True):
            expected = utils.make_autoregressive_inputs(tf.constant(targets), sequence_id=tf.constant(segment_ids))
            weight = segment_ids > 0
            np.testing.assert_array_equal(inputs[weight], expected.numpy()[weight])


def test_ids_equal_those_of_seqio(corpus, sentencepiece_model):
    from peer_jax.data import seqio_task

    for name in ("bytes", sentencepiece_model):
        theirs = seqio_task.seqio_vocabulary(name)
        assert theirs.vocab_size == vocabulary.vocabulary_size(name)
        assert (theirs.pad_id, theirs.eos_id, theirs.bos_id or 0) == (0, 1, 0 if name == "bytes" else -1)
        for text in [*corpus.splits["validation"], "", " ", "\n\n", "日本語 </s> \t", "12345"]:
            ids = vocabulary.encode(text, name)
            assert ids == theirs.encode(text) == theirs.encode_tf(text).numpy().tolist()
            assert vocabulary.decode(ids, name) == theirs.decode(ids) == text
            ended = [*ids, 1, 5, 6]
            assert vocabulary.decode(ended, name) == vocabulary.decode(ids, name)
        assert vocabulary.decode([200, 100, 101, 1], name) == theirs.decode([200, 100, 101, 1])


def test_sentencepiece_documents_can_be_rebuilt(corpus, sentencepiece_model, folder):
    task = TextTask(corpus, SEQ_LEN, sentencepiece_model, max_validation_tokens=None, cache_dir=folder)
    path = tasks.prepare(task)
    for split, texts in corpus.splits.items():
        pieces, _ = segments(path, split)
        rebuilt = documents(pieces)
        assert rebuilt == [[*vocabulary.encode(text, sentencepiece_model), 1] for text in texts]
        assert [vocabulary.decode(ids, sentencepiece_model) for ids in rebuilt] == texts
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["vocabulary"]["size"] == 300
    assert re.fullmatch("[0-9a-f]{64}", manifest["vocabulary"]["sha256"])


@pytest.mark.slow
def test_limits_hold_inside_documents(folder, capfd):
    texts = [f"document {i:04}" for i in range(100)]  # 13 bytes and EOS
    given = Given("limits", ["é" * 50_000, *texts], texts)
    task = TextTask(given, 16, max_train_tokens=10_001, max_validation_tokens=30, cache_dir=folder)
    path = tasks.prepare(task)
    counts = [pipeline.open_cache(path, split).counts for split in ("train", "validation")]
    assert [c["tokens"] for c in counts] == [10_001, 30]
    assert [c["documents"] for c in counts] == [1, 3]
    assert [c["bytes"] for c in counts] == [10_000, 13 + 13 + 2]  # half a character counts nowhere
    pieces, _ = segments(path, "validation")
    assert [bytes(i - 3 for i in piece if i != 1).decode() for piece in pieces] == [*texts[:2], "do"]
    assert (
        "limits: 10,001 tokens of 1 document (cut at max_train_tokens) to train on, "
        "30 tokens of 3 documents (cut at max_validation_tokens) to validate on\n"
    ) in capfd.readouterr().err

    whole = TextTask(
        Given("limits", texts, texts), 16, max_train_tokens=100, max_validation_tokens=28, cut_at_limits=False,
        cache_dir=folder,
    )  # fmt: skip
    path = tasks.prepare(whole)
    assert pipeline.open_cache(path, "train").counts["documents"] == 8
    assert pipeline.open_cache(path, "train").counts["bytes"] == 8 * 13
    assert pipeline.open_cache(path, "validation").counts["documents"] == 2

    only = tasks.prepare(TextTask(Given("only", [], texts), 16, max_train_tokens=0, cache_dir=folder))
    assert pipeline.open_cache(only, "validation").counts["documents"] == 100
    with pytest.raises(InputError, match="max_train_tokens above 0"):
        pipeline.open_cache(only, "train")


def test_a_damaged_cache_is_prepared_again(folder, capfd):
    task = TextTask(Given("damaged", random_texts(50, 9, 7), random_texts(9, 9, 8)), SEQ_LEN, cache_dir=folder)
    path = tasks.prepare(task)
    file = path / "train" / "tokens-00000.npy"
    content = file.read_bytes()
    file.write_bytes(content[:128] + bytes(len(content) - 128))
    assert not task.is_prepared()
    assert tasks.prepare(task) == path
    assert task.is_prepared()
    assert file.read_bytes() == content
    assert f"{path} is damaged and is prepared again\n" in capfd.readouterr().err


def test_a_vocabulary_that_drops_text_is_said_and_its_bytes_are_those_it_keeps(folder, capfd):
    """A SentencePiece model of default options turns newlines and runs of spaces into single spaces."""
    import sentencepiece

    texts = [f"I  will\ngo to {place}\n\nagain {n}" for n, place in enumerate(["him", "her", "them", "Paris"] * 20)]
    model = folder / "default"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(model), vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    task = TextTask(Given("dropping", texts[:60], texts[60:]), SEQ_LEN, f"{model}.model", cache_dir=folder)
    counts = pipeline.open_cache(tasks.prepare(task), "validation").counts
    assert counts["bytes"] == sum(len(" ".join(text.split()).encode()) for text in texts[60:])
    assert "does not keep all text: 80 of 80 documents change" in capfd.readouterr().err

    whole = "I will go to him again"
    for at in range(2, len(whole)):  # the text goes on where the prompt ends
        prompt, ids = whole[:at], vocabulary.encode(whole, f"{model}.model")
        before = vocabulary.encode(prompt, f"{model}.model")
        if ids[: len(before)] == before:
            assert prompt + vocabulary.continuation(prompt, ids[len(before) :], f"{model}.model") == whole


def write_tfds(root, name, features, splits):
    """Writes what TFDS would have written, so that nothing is downloaded."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    data = root / name / "1.0.0"
    data.mkdir(parents=True)
    features, infos = tfds.features.FeaturesDict(features), []
    for split, examples in splits.items():
        file = data / f"{name}-{split}.tfrecord-00000-of-00001"
        with tf.io.TFRecordWriter(str(file)) as writer:
            for example in examples:
                writer.write(features.serialize_example(example))
        template = tfds.core.ShardedFileTemplate(
            data_dir=data, dataset_name=name, split=split, filetype_suffix="tfrecord"
        )
        size = file.stat().st_size
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[len(examples)], num_bytes=size, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(data_dir=data, features=features, split_infos=infos)


def decoded(path, split):
    return [bytes(i - 3 for i in ids[:-1]).decode() for ids in documents(segments(path, split)[0])]


@pytest.fixture(scope="module")
def tfds_data(prepared, tmp_path_factory):  # `prepared` has imported TensorFlow and silenced its warnings
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("tfds")
    texts = [f"example {i} " + "word " * (i % 50) for i in range(300)]
    features = {"text": tfds.features.Text(), "url": tfds.features.Text()}
    splits = {"train": ["", *texts[:250]], "validation": texts[240:]}
    examples = {split: [{"text": text, "url": "u"} for text in own] for split, own in splits.items()}
    write_tfds(root, "tiny_text", features, examples)
    return root, texts


@pytest.mark.slow
def test_tfds_builder(tfds_data, folder):
    root, texts = tfds_data
    corpus = corpora.tfds_corpus("tiny_text:1.0.0", data_dir=root)
    path = tasks.prepare(TextTask(corpus, SEQ_LEN, max_train_tokens=5000, cut_at_limits=False, cache_dir=folder))
    taken = decoded(path, "train")
    assert taken == texts[: len(taken)]
    sizes = np.cumsum([len(text) + 1 for text in taken])
    assert sizes[-2] < 5000 <= sizes[-1] == pipeline.open_cache(path, "train").counts["tokens"]
    assert decoded(path, "validation") == texts[240:]

    # The ten examples that both splits have are left out of training.
    whole = tasks.prepare(TextTask(corpus, SEQ_LEN, cache_dir=folder))
    assert decoded(whole, "train") == texts[:240]
    assert json.loads((whole / "manifest.json").read_text())["splits"]["train"]["repeated"] == 10


def test_tfds_builder_without_validation_gives_its_tail(tfds_data, folder, capfd):
    root, texts = tfds_data
    corpus = corpora.tfds_corpus("tiny_text:1.0.0", validation_split="test", data_dir=root)
    path = tasks.prepare(TextTask(corpus, SEQ_LEN, cache_dir=folder))
    train, validation = decoded(path, "train"), decoded(path, "validation")
    assert train + validation == texts[:250]
    assert len(validation) == 3
    assert "no split 'test', so validation is train[99%:]" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("builder", "arguments", "says"),
    [
        ("tiny_text:1.0.0", {"text_key": "body"}, "has no feature 'body'; set text_key to one of text, url"),
        ("tiny_text:2.0.0", {}, "TFDS can't provide tiny_text:2.0.0"),
        ("absent:1.0.0", {}, "TFDS can't provide absent:1.0.0"),
        ("tiny_text:1.0.0", {"train_split": "training"}, "TFDS can't provide tiny_text:1.0.0: .*training"),
        ("tiny_text:1.0.0", {"train_split": "train[:9%]", "validation_split": None}, "is a slice already"),
        ("lambada:1.0.0", {}, "holds no data of lambada:1.0.0"),
    ],
)
def test_bad_tfds_arguments_are_named(tfds_data, folder, builder, arguments, says):
    corpus = corpora.tfds_corpus(builder, data_dir=tfds_data[0], **arguments)
    task = TextTask(corpus, SEQ_LEN, cache_dir=folder)
    with pytest.raises(InputError, match=says) as caught:
        tasks.prepare(task)
    assert "\n" not in str(caught.value)
    assert not task.cache_path().exists()


@pytest.fixture(scope="module")
def tfds_pictures(prepared, tmp_path_factory):
    """Images of 6 x 6, and one of 6 x 12 whose central square has one colour."""
    import tensorflow_datasets as tfds

    root, draw = tmp_path_factory.mktemp("tfds_images"), np.random.default_rng(0)
    wide = draw.integers(0, 256, (6, 12, 3), np.uint8)
    wide[:, 3:9] = (10, 200, 77)
    pictures = [*draw.integers(0, 256, (20, 6, 6, 3), np.uint8), wide]
    examples = [{"picture": picture, "kind": number % 4} for number, picture in enumerate(pictures)]
    features = {"picture": tfds.features.Image(shape=(None, None, 3)), "kind": tfds.features.ClassLabel(num_classes=4)}
    write_tfds(root, "tiny_pictures", features, {"train": examples[:15], "test": examples[12:]})
    return root, pictures


def pictures_of(root, **options):
    keys = {"image_key": "picture", "label_key": "kind", "num_classes": 4, "data_dir": root}
    return tfds_images("tiny_pictures:1.0.0", **keys | options)


def test_tfds_images(tfds_pictures, folder):
    root, pictures = tfds_pictures
    task = ImageTask(pictures_of(root), 2, image_size=6, cache_dir=folder)
    path = tasks.prepare(task)
    train, validation = (
        pipeline.open_cache(path, split).take(range(n)) for split, n in (("train", 12), ("validation", 9))
    )
    np.testing.assert_array_equal(train["images"], pictures[:12])  # without the three that validation has, too
    np.testing.assert_array_equal(train["labels"], np.arange(12) % 4)
    np.testing.assert_array_equal(validation["images"][:-1], pictures[12:20])
    np.testing.assert_array_equal(validation["images"][-1], np.full((6, 6, 3), (10, 200, 77)))  # its central square
    assert json.loads((path / "manifest.json").read_text())["splits"]["train"]["repeated"] == 3

    # Half the size: each pixel is a weighted mean of those around it, so the mean of an image nearly stays.
    small = pipeline.open_cache(tasks.prepare(ImageTask(pictures_of(root), 1, image_size=3, cache_dir=folder)), "train")
    assert small[0]["images"].shape == (3, 3, 3)
    np.testing.assert_allclose(
        small.take(range(12))["images"].mean(axis=(1, 2, 3)), np.mean(pictures[:12], axis=(1, 2, 3)), atol=12
    )


def test_it_is_said_where_validation_images_come_from(tfds_pictures, folder, capsys):
    """One percent of these few images is none, which TFDS refuses afterwards."""
    task = ImageTask(pictures_of(tfds_pictures[0], validation_split="dev"), 2, image_size=6, cache_dir=folder)
    with pytest.raises(InputError, match=r"tiny_pictures_1\.0\.0 can't be read"):
        tasks.prepare(task)
    assert "tiny_pictures:1.0.0: no split 'dev', so validation is train[99%:]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_key": "image"}, "has no feature 'image'; set image_key to one of kind, picture"),
        ({"label_key": "label"}, "has no feature 'label'; set label_key to one of kind, picture"),
        ({"image_key": "kind"}, "tiny_pictures:1.0.0 has 'kind' and 'kind' of the types .*int64.* set image_key"),
        ({"num_classes": 3}, "has the label 3, but num_classes=3"),
        ({"channels": 1}, r"has an image of uint8 \[6, 6, 3\], but the task says uint8 \[6, 6, 1\]"),
    ],
)
def test_bad_tfds_images_are_named(tfds_pictures, folder, options, says):
    task = ImageTask(pictures_of(tfds_pictures[0], **options), 2, image_size=6, cache_dir=folder)
    with pytest.raises(InputError, match=says) as caught:
        tasks.prepare(task)
    assert "\n" not in str(caught.value)
    assert not task.cache_path().exists()


def test_errors_inside_documents_come_out_as_their_sentence(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write("{broken\n")
    task = TextTask(corpora.local_files(tmp_path / "a.jsonl"), SEQ_LEN, cache_dir=tmp_path / "cache")
    with pytest.raises(InputError, match=r"a\.jsonl, line 51: not JSON"):
        tasks.prepare(task)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_corpora_without_documents_are_named(tmp_path):
    for train, validation, split in [(["text"], [], "validation"), ([], ["text"], "train")]:
        task = TextTask(Given(f"no_{split}", train, validation), SEQ_LEN, cache_dir=tmp_path)
        with pytest.raises(InputError, match=f"no_{split} has no documents for {split}"):
            tasks.prepare(task)


def test_places_that_cannot_be_written_are_named(corpus, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"the cache .*/file/mixed.* can't be written \(File exists\); free"):
        tasks.prepare(TextTask(corpus, SEQ_LEN, cache_dir=tmp_path / "file"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    task = TextTask(corpus, SEQ_LEN, cache_dir=tmp_path / "full")
    with pytest.raises(InputError, match=r"can't be written \(No space left on device\); free some space"):
        tasks.prepare(task)
    assert [file.suffix for file in (tmp_path / "full").iterdir()] == [".lock"]


def test_a_foreign_folder_in_the_way_is_kept(corpus, tmp_path):
    task = TextTask(corpus, SEQ_LEN, cache_dir=tmp_path)
    task.cache_path().mkdir()
    (task.cache_path() / "precious").write_text("data")
    for prepare in (tasks.prepare, pipeline.ensure_prepared):
        with pytest.raises(InputError, match="is not a prepared cache"):
            prepare(task)
    assert (task.cache_path() / "precious").exists()
