"""CIFAR-10 and ImageNet by the shipped configs: TFDS's own builders read archives that have the original formats."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from small_runs import CONFIGS

from peer_jax import config
from peer_jax.data import pipeline, tasks
from peer_jax.training import loop

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trains")]

VISION = CONFIGS / "vision"
TRAIN, VALIDATION = 30, 10


@pytest.fixture(scope="module")
def draw():
    return np.random.default_rng(0)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Has TFDS build data from files that are there instead of downloaded ones."""
    import tensorflow_datasets as tfds

    import peer_jax.data.tfds_source  # noqa: F401, which silences TensorFlow

    def build(name, downloaded=None):
        for method in ("download", "download_and_extract"):
            monkeypatch.setattr(tfds.download.DownloadManager, method, lambda self, urls: downloaded)
        how = tfds.download.DownloadConfig(manual_dir=tmp_path)
        tfds.builder(name, data_dir=tmp_path / "tfds").download_and_prepare(download_config=how)
        return tmp_path / "tfds"

    return build


def load(data, root, tmp_path, *bindings, size="small"):
    """The run of a shipped config, whose images TFDS keeps in `root`."""
    files = [VISION / "base.gin", CONFIGS / "layers" / "dense.gin", VISION / "sizes" / f"{size}.gin"]
    given = [f"tfds_images.data_dir={str(root)!r}", f"ImageTask.cache_dir={str(tmp_path / 'cache')!r}", *bindings]
    return config.load([*files, VISION / "data" / f"{data}.gin"], ["Run.steps=2", *given])


def cached(run):
    """All images and labels of both splits, in an order of their labels and pixels."""
    path = tasks.prepare(run.task, progress=False)
    found = {}
    for split in ("train", "validation"):
        source = pipeline.open_cache(path, split)
        taken = source.take(range(len(source)))
        pairs = zip(taken["images"], taken["labels"].tolist(), strict=True)
        found[split] = sorted(pairs, key=lambda pair: (pair[1], pair[0].tobytes()))
    return found


def assert_found(found, images, labels):
    wanted = sorted(zip(images, labels, strict=True), key=lambda pair: (pair[1], pair[0].tobytes()))
    assert [label for _, label in found] == [label for _, label in wanted]
    np.testing.assert_array_equal([image for image, _ in found], [image for image, _ in wanted])


def test_cifar10(draw, build, tmp_path):
    """Its binary files have a byte for the label and then the planes of red, green and blue. A step is trained."""
    images = draw.integers(0, 256, (TRAIN + VALIDATION, 32, 32, 3), np.uint8)
    labels = [number % 10 for number in range(TRAIN + VALIDATION)]
    folder = tmp_path / "archive" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text(
        "airplane automobile bird cat deer dog frog horse ship truck".replace(" ", "\n")
    )
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for name, some in zip(names, np.split(np.arange(TRAIN + VALIDATION), (6, 12, 18, 24, 30)), strict=True):
        parts = (bytes([labels[i]]) + images[i].transpose(2, 0, 1).tobytes() for i in some)
        (folder / name).write_bytes(b"".join(parts))

    root = build("cifar10:3.0.2", str(folder.parent))
    run = load("cifar10", root, tmp_path, "ViT.d_model=12", "Run.batch_size=8")
    found = cached(run)
    assert_found(found["train"], images[:TRAIN], labels[:TRAIN])
    assert_found(found["validation"], images[TRAIN:], labels[TRAIN:])
    result = loop.train(run, tmp_path / "run", progress=False)
    assert result["evaluations"]["cifar10_3.0.2"]["images"] == VALIDATION
    assert result["tokens"] == 2 * 8 * 64


def test_imagenet32(draw, build, tmp_path):
    """Its archives hold arrays of planes, with labels from 1."""
    images = draw.integers(0, 256, (TRAIN + VALIDATION, 32, 32, 3), np.uint8)
    labels = draw.integers(0, 1000, TRAIN + VALIDATION)
    paths = []
    for name, own in (("train", slice(TRAIN)), ("val", slice(TRAIN, None))):
        paths.append(tmp_path / f"Imagenet32_{name}_npz.zip")
        content = io.BytesIO()
        np.savez(content, data=images[own].transpose(0, 3, 1, 2).reshape(-1, 3072), labels=labels[own] + 1)
        with zipfile.ZipFile(paths[-1], "w") as archive:
            archive.writestr(f"{name}_data.npz", content.getvalue())

    root = build("imagenet_resized/32x32:0.1.0", paths)
    found = cached(load("imagenet32", root, tmp_path))
    assert_found(found["train"], images[:TRAIN], labels[:TRAIN].tolist())
    assert_found(found["validation"], images[TRAIN:], labels[TRAIN:].tolist())


def test_imagenet_at_224(draw, build, tmp_path):
    """Photographs of any size and shape: the middle square is resized, and classes are those of the folders."""
    import tensorflow as tf

    def photograph(height, width, colour):
        """Of one colour in the middle square, and black beside it."""
        side, image = min(height, width), np.zeros((height, width, 3), np.uint8)
        top, left = (height - side) // 2, (width - side) // 2
        image[top : top + side, left : left + side] = colour
        return tf.io.encode_jpeg(image, quality=100).numpy()

    def add(archive, name, content):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))

    classes, sizes = ("n01440764", "n01443537", "n15075141"), ((300, 200), (224, 224), (100, 500), (64, 64))
    colours = draw.integers(40, 216, (len(classes) * len(sizes) + VALIDATION, 3)).astype(np.uint8)
    kept = iter(colours)
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as whole:
        for name in classes:
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w") as archive:
                for number, (height, width) in enumerate(sizes):
                    add(archive, f"{name}_{number}.JPEG", photograph(height, width, next(kept)))
            add(whole, f"{name}.tar", content.getvalue())
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in range(VALIDATION):
            add(archive, f"ILSVRC2012_val_{number + 1:08}.JPEG", photograph(240, 320, next(kept)))

    found = cached(load("imagenet", build("imagenet2012:5.1.0"), tmp_path, size="paper"))
    assert [label for _, label in found["train"]] == [0] * 4 + [1] * 4 + [999] * 4
    assert {image.shape for split in found.values() for image, _ in split} == {(224, 224, 3)}
    inner = {split: [image[48:-48, 48:-48] for image, _ in own] for split, own in found.items()}
    for image in (*inner["train"], *inner["validation"]):
        assert int(np.ptp(image, axis=(0, 1)).max()) <= 3  # one colour, but for JPEG's rounding at its edges
    for split, own in (("train", colours[:-VALIDATION]), ("validation", colours[-VALIDATION:])):
        means = sorted(tuple(image.mean(axis=(0, 1))) for image in inner[split])
        np.testing.assert_allclose(np.sort(means, axis=0), np.sort(own, axis=0), atol=3)
