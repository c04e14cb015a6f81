"""Digests find every change of a file, and are those of the published algorithm."""

import numpy as np

from peer_jax import digests


def test_digest_is_that_of_the_published_algorithm(tmp_path):
    # XXH3_64bits with seed 0, from the test vectors of the algorithm's own repository.
    assert digests.of_bytes(b"") == "xxh3_64:2d06800538d394c2"
    large = np.random.default_rng(0).bytes(2**22 + 12345)  # more than is read at a time
    (tmp_path / "large").write_bytes(large)
    assert digests.of_file(tmp_path / "large") == digests.of_bytes(large)


def test_every_flipped_bit_and_cut_file_is_found(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    contents = {"a": rng.bytes(1000), "deep/b": b"", "deep/er/c": rng.bytes(70000), "zeros": bytes(4096)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    kept = digests.of_folder(tmp_path)
    assert list(kept) == sorted(contents)
    assert digests.changed(tmp_path, kept) == []
    for name in ("a", "deep/er/c", "zeros") * 8:
        damaged = bytearray(contents[name])
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        (tmp_path / name).write_bytes(damaged)
        assert digests.changed(tmp_path, kept) == [name]
        (tmp_path / name).write_bytes(contents[name])
    (tmp_path / "zeros").write_bytes(bytes(4095))
    (tmp_path / "deep" / "b").unlink()
    assert digests.changed(tmp_path, kept) == ["deep/b", "zeros"]
