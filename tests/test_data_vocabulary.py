"""Encoding and decoding without TensorFlow. test_data_prepare.py compares the ids with those of seqio."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer_jax.data import corpora, tasks, vocabulary
from peer_jax.errors import InputError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    source = "def f(x):\n\treturn  [y**2 for y in x]  # 12 é ☃\n\nclass A:\n        pass\n"
    (folder / "code.py").write_text("\n".join(source.replace("x", f"x{i}") for i in range(300)))
    path = tasks.train_sentencepiece(corpora.local_files(folder / "code.py"), folder / "code.model", vocab_size=320)
    return str(path)


@given(TEXT)
def test_bytes_round_trip(text):
    ids = vocabulary.encode(text, "bytes")
    assert ids == [byte + 3 for byte in text.encode()]
    assert vocabulary.decode(ids, "bytes") == text
    assert vocabulary.decode([*ids, 1, 70, 71], "bytes") == text
    assert vocabulary.decode([0, *ids, 0, 2, 259, 1000], "bytes") == text


def test_sentencepiece_is_lossless_on_code(model):
    for text in [
        "",
        " ",
        "\n",
        "  two  spaces\n\n\ttab",
        "x = 12345\r\n",
        "日本語 é ☃ \N{GRINNING FACE}",
        "</s> <pad>",
    ]:
        ids = vocabulary.encode(text, model)
        assert all(2 < i < 320 for i in ids)
        assert vocabulary.decode(ids, model) == text
        assert vocabulary.decode([*ids, 1, *ids], model) == text
    assert len(vocabulary.encode("        return", model)) < 5


def test_sizes(model):
    assert vocabulary.vocabulary_size("bytes") == 259
    assert vocabulary.vocabulary_size(model) == 320


def test_bad_models_are_named(tmp_path):
    import sentencepiece

    path = tmp_path / "unk0"
    words = iter(["some words to train on", "and some more words"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=words, model_prefix=str(path), vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(InputError, match="has padding id -1 and EOS id 2, but packing needs 0"):
        vocabulary.vocabulary_size(f"{path}.model")


def test_training_a_model_refuses_bad_sizes_and_places(tmp_path):
    (tmp_path / "a.txt").write_text("just a few words\n" * 20)
    corpus = corpora.local_files(tmp_path / "a.txt")
    with pytest.raises(InputError, match="vocab_size is 100; give a number above 259"):
        tasks.train_sentencepiece(corpus, tmp_path / "a.model", vocab_size=100)
    with pytest.raises(InputError, match="vocab_size 50000 does not suit a: Vocabulary size too high"):
        tasks.train_sentencepiece(corpus, tmp_path / "a.model", vocab_size=50000)
    assert not (tmp_path / "a.model").exists()
    with pytest.raises(InputError, match="can't be written"):
        tasks.train_sentencepiece(corpus, tmp_path / "a.txt" / "a.model", vocab_size=280)
