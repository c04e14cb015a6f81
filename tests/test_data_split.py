"""Validation has the asked share of the text, whatever the sizes of the documents, and shares none with training."""

import json
import random

import numpy as np
import pytest

from peer_jax.data import corpora, text_split
from peer_jax.errors import InputError


def lines(count, seed):
    draw = random.Random(seed)
    words = (" ".join(draw.choices(["a", "bc", "é"], k=draw.randint(1, 12))) for _ in range(count))
    return "".join(f"line {n} {text}\n" for n, text in enumerate(words))


def splits(corpus):
    return [[document.text for document in corpus.documents(split)] for split in ("train", "validation")]


def share_of(train, validation):
    sizes = [sum(len(text.encode()) for text in texts) for texts in (train, validation)]
    return sizes[1] / sum(sizes)


def test_a_readme_beside_a_large_file_is_not_the_training_text(tmp_path):
    """The whole of the large file was validation, and the readme alone was trained on."""
    (tmp_path / "input.txt").write_text(lines(40000, 0))
    (tmp_path / "README.md").write_text(lines(150, 1))
    for share in (0.02, 0.1, 0.5):
        train, validation = splits(corpora.local_files(tmp_path, validation_share=share))
        assert share_of(train, validation) == pytest.approx(share, rel=0.05)
        assert all(text.endswith("\n") for text in train + validation)


@pytest.mark.parametrize(
    "sizes",
    [
        [300],
        [10, 10, 4000],
        [20] * 400,
        [5000] + [5] * 300,
        [2000] * 3,
        [1, 10, 100, 1000, 10000],
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4, 0.9])
def test_shares_of_text_come_out_and_no_text_is_lost_or_shared(tmp_path, sizes, share):
    texts = [lines(size, seed) for seed, size in enumerate(sizes)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, validation = splits(corpora.local_files(tmp_path, validation_share=share))
    slack = 0.1 * share + 40 / sum(map(len, texts))  # cuts are at the ends of lines
    assert share_of(train, validation) == pytest.approx(share, abs=slack)
    assert not set(train) & set(validation)
    for text in texts:  # a document is in one split, or its beginning trains and its end validates
        parts = [part for part in train if text.startswith(part)], [part for part in validation if text.endswith(part)]
        assert text in train or text in validation or any(a + b == text for a in parts[0] for b in parts[1])
    assert sum(map(len, train + validation)) == sum(map(len, texts))


def test_any_sizes_and_copies_come_near_the_share():
    rng = np.random.default_rng(0)
    for _ in range(150):
        sizes = (10 ** rng.uniform(0, 6, rng.integers(2, 40))).astype(int)
        keys = rng.integers(0, 2**63, len(sizes))
        copies = rng.integers(1, 4, len(sizes))
        share = float(rng.choice([0.001, 0.02, 0.1, 0.5, 0.9]))
        documents = np.repeat(np.stack([keys, sizes], 1), copies, axis=0)
        rng.shuffle(documents)
        plan = text_split.plan(map(tuple, documents.tolist()), share)
        divided = [plan.divide("x" * size, key, size) for key, size in documents.tolist()]
        train, validation = (sum(len(pair[side]) for pair in divided) for side in (0, 1))
        total = sizes @ copies
        assert train + validation == total
        assert train > 0 < validation
        assert abs(validation - share * total) <= 0.13 * share * total + 3 * text_split.LEAST_BYTES


def test_the_split_depends_on_texts_alone(tmp_path):
    texts = [lines(30 + 10 * n, n) for n in range(30)]
    found = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        for n, text in enumerate(order):
            (tmp_path / name / f"{n}.txt").write_text(text)
        found.append([set(side) for side in splits(corpora.local_files(tmp_path / name, validation_share=0.1))])
    assert found[0] == found[1]


def test_documents_can_be_kept_whole_as_earlier_versions_did(tmp_path):
    texts = [lines(100, n) for n in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, validation = splits(corpora.local_files(tmp_path, validation_share=0.1, split="documents"))
    assert sorted(train + validation) == sorted(texts)
    with pytest.raises(InputError, match="split is 'words'; it must be 'text' or 'documents'"):
        corpora.local_files(tmp_path, split="words")


def test_text_of_the_stdlib_is_split_as_before(monkeypatch, tmp_path):
    """Results of earlier versions compare: these are its documents and fingerprint for files of fixed contents."""
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    for n in range(60):
        (stdlib / f"m{n}.py").write_text(f"x = {n}\n" * (n * 100 + 1))
    (stdlib / "marked.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(stdlib))
    corpus = corpora.python_stdlib()
    validation = {document.name: len(document.text) for document in corpus.documents("validation")}
    assert validation == {"m15.py": 10507, "m5.py": 3006}
    assert corpus.fingerprint().startswith("21be1588870ffdbc")
    assert "\ufeffx = 1\n" in [document.text for document in corpus.documents("train")]
