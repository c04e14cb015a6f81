"""Labelled images, from a corpus to batches: splits, the cache and its damages, and what is refused."""

import dataclasses
import hashlib
import json
import shutil

import numpy as np
import pytest

from peer_jax.data import cache, pipeline, tasks
from peer_jax.data.images import digits, tfds_images
from peer_jax.data.pipeline import ImageTask
from peer_jax.data.prepared import prepared, prepared_images
from peer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images of a test: the last of training is also the first of validation, and so is left out."""

    train: int = 20
    validation: int = 7
    labels: int = 3
    shape: tuple = (4, 4, 2)

    name = "noise"
    num_classes, channels, size, num_images = 3, 2, 4, None

    def fingerprint(self):
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def images(self, split, size):
        seeds = range(self.train) if split == "train" else range(self.train - 1, self.train - 1 + self.validation)
        for seed in seeds:
            yield np.random.default_rng(seed).integers(0, 256, self.shape, np.uint8), seed % self.labels


@pytest.fixture
def task(tmp_path):
    return ImageTask(Noise(), patch_size=2, cache_dir=tmp_path)


@pytest.fixture
def written(task):
    return tasks.prepare(task, progress=False)


def test_digits_are_those_of_scikit_learn():
    """Their number per class is that of scikit-learn's documentation, and no image is in both splits."""
    corpus = digits()
    found = {split: list(corpus.images(split, 8)) for split in ("train", "validation")}
    counts = np.bincount([label for split in found.values() for _, label in split], minlength=10)
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert 0.17 < len(found["validation"]) / 1797 < 0.23
    held_out = {image.tobytes() for image, _ in found["validation"]}
    assert not held_out & {image.tobytes() for image, _ in found["train"]}
    # The first image of scikit-learn's array is a zero, whose first row is 0 0 5 13 9 1 0 0 of 16.
    first = next(image for split in found.values() for image, label in split if image[0, 3, 0] == 207 and label == 0)
    assert first[0, :, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert digits(validation_share=0.1).fingerprint() != corpus.fingerprint()


def test_a_cache_holds_the_images(task, written):
    wanted = {split: list(task.corpus.images(split, 4)) for split in ("train", "validation")}
    wanted["train"].pop()  # validation has it, too
    for split, own in wanted.items():
        source = pipeline.open_cache(written, split)
        assert len(source) == len(own)
        taken = source.take(range(len(own))[::-1])
        np.testing.assert_array_equal(taken["images"], [image for image, _ in own[::-1]])
        np.testing.assert_array_equal(taken["labels"], [label for _, label in own[::-1]])
    assert task.prepared_rows() == 19
    assert task.is_prepared()


def test_shards(task, written, monkeypatch):
    monkeypatch.setitem(cache.SHARD_VALUES, cache.IMAGES, 5 * 4 * 4 * 2)
    sharded = tasks.prepare(dataclasses.replace(task, cache_dir=written.parent / "sharded"), progress=False)
    assert len(list(sharded.glob("train/images-*.npy"))) == 4
    order = np.random.default_rng(0).permutation(19)
    found, whole = (pipeline.open_cache(path, "train").take(order) for path in (sharded, written))
    for name in ("images", "labels"):
        np.testing.assert_array_equal(found[name], whole[name])


def test_batches(written):
    """Every image once per epoch in an order of the seed, the same on one host and two, and from any position."""
    source = pipeline.open_cache(written, "train")
    names = {image.tobytes(): number for number, image in enumerate(source.take(range(19))["images"])}

    def read(steps, position=None, **how):
        batches = pipeline.train_batches(source, batch_size=4, seed=3, **how)
        if position is not None:
            batches.set_state(position)
        found = [next(batches) for _ in range(steps)]
        return [[names[image.tobytes()] for image in batch["inputs"]] for batch in found], batches.get_state()

    whole, _ = read(19)
    stream = [number for batch in whole for number in batch]
    assert [sorted(stream[19 * e : 19 * (e + 1)]) for e in range(4)] == [list(range(19))] * 4
    assert stream[:19] != stream[19:38]
    _, position = read(5)
    assert read(14, position)[0] == whole[5:]
    halves = [read(19, process_index=host, process_count=2)[0] for host in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_evaluation_fills_the_last_batch_up(written):
    batches = list(pipeline.eval_batches(pipeline.open_cache(written, "validation"), batch_size=4))
    assert [batch["segment_ids"].tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert [batch["inputs"].shape for batch in batches] == [(4, 4, 4, 2)] * 2
    assert {batch["inputs"].dtype.name for batch in batches} == {"uint8"}
    assert {batch[name].dtype.name for batch in batches for name in ("targets", "segment_ids")} == {"int32"}


@pytest.mark.parametrize("file", ["train/images-00000.npy", "validation/labels-00000.npy", "manifest.json"])
@pytest.mark.parametrize("harm", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_refused_in_one_sentence_and_made_again(task, written, file, harm):
    path, content = written / file, (written / file).read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if harm == "cut" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(InputError) as refusal:
        pipeline.open_cache(written, "train")
    assert "\n" not in str(refusal.value)
    assert str(written) in str(refusal.value)
    if (harm, file) != ("gone", "manifest.json"):  # a folder that is no cache is not deleted
        tasks.prepare(task, progress=False)
        assert path.read_bytes() == content


def test_a_cache_that_was_half_written_is_none(task, written):
    """A writer that was killed leaves a folder of another name, which the next one removes."""
    left = written.with_name(f".{written.name}.writing-x")
    shutil.copytree(written, left)
    shutil.rmtree(written)
    (left / "manifest.json").unlink()
    assert not task.is_prepared()
    tasks.prepare(task, progress=False)
    assert task.is_prepared()
    assert not left.exists()


def test_a_cache_of_another_kind_is_refused(written):
    manifest = json.loads((written / "manifest.json").read_text())
    manifest.pop("digest")
    (written / "manifest.json").write_text(json.dumps(cache.signed(manifest | {"kind": "sounds"})))
    with pytest.raises(InputError, match=r"delete .* and prepare it again"):
        pipeline.open_cache(written, "train")


@pytest.mark.parametrize(
    ("corpus", "says"),
    [
        (Noise(labels=4), "noise has the label 3, but num_classes=3"),
        (Noise(shape=(4, 5, 2)), r"noise has an image of uint8 \[4, 5, 2\], but the task says uint8 \[4, 4, 2\]"),
        (Noise(validation=0), "noise has no images for validation"),
        (Noise(train=1), "noise has no images for train"),
    ],
)
def test_bad_images_are_named(tmp_path, corpus, says):
    task = ImageTask(corpus, 2, cache_dir=tmp_path)
    with pytest.raises(InputError, match=says):
        tasks.prepare(task, progress=False)
    assert not task.cache_path().exists()


CIFAR = {"builder": "cifar10:3.0.2", "num_classes": 10}


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: ImageTask(digits(), 3), "patch_size is 3, which does not divide images of 8 x 8"),
        (lambda: ImageTask(digits(), 0), "patch_size is 0"),
        (lambda: ImageTask(digits(), 2, image_size=16), "image_size is 16, but images of digits have 8"),
        (lambda: ImageTask(tfds_images(**CIFAR), 4), "image_size is None, but images of cifar10_3.0.2 can have any"),
        (lambda: ImageTask(prepared("somewhere"), 4), "give one of peer_jax.data.images"),
        (lambda: digits(validation_share=1.0), "validation_share is 1.0"),
        (lambda: tfds_images("cifar10", num_classes=10), "names no version"),
        (lambda: tfds_images("cifar10:3.0.2", num_classes=0), "num_classes is 0"),
    ],
)
def test_refused(build, says, unchecked_types):
    with pytest.raises(InputError, match=says):
        build()


def test_a_prepared_cache_stands_in_the_place_of_its_images(task, written, tmp_path, monkeypatch):
    """The same names, sizes and rows, with any patches; and nothing is prepared."""
    monkeypatch.setattr(pipeline.subprocess, "run", None)
    copied = shutil.copytree(written, tmp_path / "elsewhere" / "renamed")
    other = ImageTask(prepared_images(str(copied)), patch_size=4)
    assert pipeline.ensure_prepared(other) == tasks.prepare(other, progress=False) == other.cache_path() == copied
    assert other.fingerprint() == task.fingerprint()
    assert other.model_sizes() == task.model_sizes() | {"patch_size": 4}
    assert other.corpus.name == task.corpus.name
    assert other.train_tokens() == 19 + 7
    theirs, ours = (pipeline.open_cache(each.cache_path(), "train").take(range(19)) for each in (task, other))
    np.testing.assert_array_equal(ours["images"], theirs["images"])
    (copied / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        pipeline.ensure_prepared(ImageTask(other.corpus, patch_size=4))


def test_a_cache_that_is_none_of_images_is_refused(written, tmp_path):
    with pytest.raises(InputError, match="holds images, not text; give the path of a prepared cache of text"):
        prepared(written).fingerprint()
    for path, says in ((tmp_path / "absent", "there is no prepared cache .*absent"), ("", "path is ''")):
        with pytest.raises(InputError, match=says):
            ImageTask(prepared_images(path), 2)


def test_too_large_a_batch_is_refused(written):
    with pytest.raises(InputError, match=r"batch_size 20 is more than the 19 images in .*give a smaller batch_size"):
        pipeline.train_batches(pipeline.open_cache(written, "train"), batch_size=20, seed=0)


def test_names_of_tasks(tmp_path):
    """The cache depends on the images and not on the patches."""
    one, other = (ImageTask(tfds_images(**CIFAR), size, image_size=32, cache_dir=tmp_path) for size in (4, 8))
    assert (one.seq_len, other.seq_len) == (64, 16)
    assert one.cache_path() == other.cache_path()
    assert one.cache_path() != ImageTask(tfds_images(**CIFAR), 4, image_size=64, cache_dir=tmp_path).cache_path()
    with pytest.raises(InputError, match="patch_size=8, which is not that of the model, 4"):
        other.check_fits(one, "the model")
