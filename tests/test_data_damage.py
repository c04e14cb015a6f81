"""A cache that is not as it was written is found out, whatever the damage, and caches of earlier versions are read."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from peer_jax import digests
from peer_jax.data import cache
from peer_jax.data.prepared import prepared
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError

SEQ_LEN, ROWS = 16, 40


def batches(seed):
    rng = np.random.default_rng(seed)
    segment_ids = np.sort(rng.integers(0, 3, (ROWS, SEQ_LEN)), axis=1)[:, ::-1]  # zeros, which are padding, come last
    segment_ids = np.where(segment_ids > 0, 3 - segment_ids, 0)
    return np.where(segment_ids > 0, rng.integers(1, 259, (ROWS, SEQ_LEN)), 0), segment_ids


def write(path):
    """A cache like those of `prepare`, without the seconds that TensorFlow takes to load."""
    with cache.CacheWriter(path, cache.TEXT, cache.text_fields(SEQ_LEN, 259)) as writer:
        counts = {
            split: writer.write_split(split, [batches(seed)]) | {"documents": 7, "bytes": 500, "words": 90}
            for seed, split in enumerate(("train", "validation"))
        }
        writer.write_left_out(["a.txt: not UTF-8 text"])
        writer.commit(
            {
                "task": {"corpus": "written"},
                "fingerprint": "f",
                "corpus_fingerprint": "c",
                "vocabulary": {"name": "bytes", "size": 259, "eos_id": 1, "sha256": None},
                "splits": counts,
            }
        )
    return path


@pytest.fixture
def written(tmp_path):
    return write(tmp_path / "written")


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != cache.VERIFIED)


def everything(path):
    """All that a cache says: its manifest and its rows."""
    sources = [cache.open_cache(path, split) for split in ("train", "validation")]
    return [sources[0].manifest, *(source.take(range(len(source))) for source in sources)]


def test_no_flipped_bit_is_silent(written):
    rng, before, found = np.random.default_rng(0), everything(written), 0
    contents = {file: file.read_bytes() for file in files(written)}
    assert len(contents) == 6
    for flip in range(300):
        file = list(contents)[flip % 6]
        damaged = bytearray(contents[file])
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            now = everything(written)
        except InputError:
            found += 1
        else:  # a blank of the manifest became another blank
            assert file.name == cache.MANIFEST
            np.testing.assert_equal(now, before)
        file.write_bytes(contents[file])
    assert found > 290
    np.testing.assert_equal(everything(written), before)


@pytest.mark.parametrize("damage", ["zeros", "ones", "cut", "gone", "longer", "other"])
@pytest.mark.parametrize("name", ["train/tokens-00000.npy", "validation/segment_ids-00000.npy", "manifest.json"])
def test_damaged_files_are_named(written, name, damage):
    file = written / name
    content = file.read_bytes()
    cache.open_cache(written, "train")
    changed = {
        "zeros": content[:128] + bytes(len(content) - 128),
        "ones": content[:128] + b"\xff" * (len(content) - 128),
        "cut": content[:100],
        "longer": content + b"x",
        "other": b"",
    }
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[damage])
    with pytest.raises(InputError, match=file.name.replace(".", r"\.")) as caught:
        cache.open_cache(written, "train")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, cache.Damaged) or (name, damage) == ("manifest.json", "gone")


def test_bytes_are_read_once_and_later_only_if_a_file_has_changed(written, monkeypatch):
    read = []
    monkeypatch.setattr(digests, "changed", lambda folder, kept: read.append(sorted(kept)) or [])
    cache._verified.clear()
    for _ in range(3):
        cache.open_cache(written, "train")
    assert len(read) == 1
    assert len(read[0]) == 5
    cache._verified.clear()  # as in another process
    cache.open_cache(written, "validation")
    assert len(read) == 1
    file = written / "train" / "tokens-00000.npy"
    status = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the time of the last change can't be set
    cache.open_cache(written, "train")
    assert len(read) == 2
    cache.open_cache(shutil.copytree(written, written.with_name("copy")), "train")
    assert len(read) == 3


def test_a_cache_that_cannot_be_marked_is_read(written, monkeypatch):
    def refuse(*_):
        raise InputError("read-only")

    monkeypatch.setattr(cache, "write_whole", refuse)
    cache._verified.clear()
    assert len(cache.open_cache(written, "train")) == ROWS
    assert not (written / cache.VERIFIED).exists()


def test_a_prepared_cache_is_refused_and_another_is_prepared_again(written):
    task = TextTask(prepared(written), SEQ_LEN)
    assert task.is_prepared()
    (written / "train" / "tokens-00000.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"tokens-00000\.npy is missing or damaged; delete .* or copy it here again"):
        task.is_prepared()
    write(written)  # takes the place of the damaged one
    assert task.is_prepared()
    assert [file.name for file in written.parent.iterdir()] == ["written"]


@pytest.fixture
def earlier(tmp_path):
    """A cache that an earlier version wrote."""
    (kept,) = (Path(__file__).parent / "earlier_run" / "tokens").iterdir()
    return shutil.copytree(kept, tmp_path / "earlier")


def test_a_cache_of_an_earlier_version_is_given_digests_when_it_is_opened(earlier, caplog):
    manifest = json.loads((earlier / cache.MANIFEST).read_text())
    assert manifest["format"] == 1
    tokens = np.load(earlier / "train" / "tokens-00000.npy")
    source = cache.open_cache(earlier, "train")
    np.testing.assert_array_equal(source.take(np.arange(source.rows))["tokens"], tokens)
    cache.open_cache(earlier, "validation")
    assert caplog.text.count("is a cache of an earlier version: its counts fit, and its manifest now has digests") == 1
    given = json.loads((earlier / cache.MANIFEST).read_text())
    assert {name: given[name] for name in manifest} == manifest | {"format": 2}
    file = earlier / "validation" / "tokens-00000.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the id of another byte, or none
    file.write_bytes(content)
    with pytest.raises(cache.Damaged, match=r"validation/tokens-00000\.npy is missing or damaged; delete"):
        cache.open_cache(earlier, "train")


def test_a_cache_of_an_earlier_version_that_can_not_be_written_to_is_read(earlier, caplog, monkeypatch):
    def refuse(*_):
        raise InputError("read-only")

    monkeypatch.setattr(cache, "write_whole", refuse)
    for _ in range(2):
        assert len(cache.open_cache(earlier, "train")) > 0
    assert not caplog.text
    assert json.loads((earlier / cache.MANIFEST).read_text())["format"] == 1


def test_the_worst_damages_of_a_cache_of_an_earlier_version_are_found(earlier):
    source = cache.PackedText(earlier, "train", cache.read_manifest(earlier))
    rows, seq_len = source.rows, source.seq_len
    for name in ("tokens", "segment_ids"):
        file = earlier / "train" / f"{name}-00000.npy"
        content = file.read_bytes()
        for filling in (b"\0", b"\xff"):
            file.write_bytes(content[:128] + filling * (len(content) - 128))
            with pytest.raises(cache.Damaged, match=r"train holds .* (vocabulary|says \d+); delete"):
                cache.open_cache(earlier, "train")
        np.save(file, np.zeros((rows, seq_len), np.int64))
        with pytest.raises(
            cache.Damaged, match=rf"{name}-00000\.npy holds int64 \({rows}, {seq_len}\) but its manifest says uint"
        ):
            cache.open_cache(earlier, "train")
        file.write_bytes(content)
    assert json.loads((earlier / cache.MANIFEST).read_text())["format"] == 1
    assert len(cache.open_cache(earlier, "train")) == rows


def test_foreign_and_newer_caches_are_refused(written):
    manifest = json.loads((written / cache.MANIFEST).read_text())
    for changed, says in [
        (cache.signed({key: value for key, value in manifest.items() if key != "digest"} | {"format": 3}), "format 3"),
        ({"kind": "of another program"}, "is not a cache of peer_jax"),
        ([1], "is not a cache of peer_jax"),
    ]:
        (written / cache.MANIFEST).write_text(json.dumps(changed))
        with pytest.raises(InputError, match=says) as caught:
            cache.open_cache(written, "train")
        assert not isinstance(caught.value, cache.Damaged)
