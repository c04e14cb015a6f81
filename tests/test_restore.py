"""Continuing a prompt by a trained run: texts begin and end as the vocabulary and the data say."""

import io

import numpy as np
import pytest
import sentencepiece
from small_runs import SEQ_LEN, load, train

from peer_jax.data import cache
from peer_jax.data import vocabulary as vocabularies
from peer_jax.errors import InputError
from peer_jax.training.restore import continue_text

pytestmark = pytest.mark.usefixtures("trains")

LETTERS = "abcdefgh"
DOCUMENT = "abc\N{SNOWMAN}def"
UNKNOWN, EOS = 1, 2


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A SentencePiece model that gives the id 1, which ends a text elsewhere, to characters that it doesn't know."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([LETTERS] * 10),
        model_writer=model,
        vocab_size=len(LETTERS) + 3,
        model_type="char",
        pad_id=0,
        unk_id=UNKNOWN,
        eos_id=EOS,
        bos_id=-1,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("vocabulary") / "letters.model"
    path.write_bytes(model.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def trained(tiny, vocabulary, tmp_path_factory):
    """A run that knows one document by heart, and its directory."""
    folder = tmp_path_factory.mktemp("trained")
    loaded = vocabularies.load(vocabulary)
    document = [*loaded.encode(DOCUMENT), loaded.eos_id]
    assert document[3] == UNKNOWN
    assert document[-1] == EOS
    per_row = SEQ_LEN // len(document)
    tokens = np.tile(np.array(document * per_row, np.int32), (16, 1))
    segment_ids = np.tile(np.repeat(np.arange(1, per_row + 1, dtype=np.int32), len(document)), (16, 1))
    assert tokens.shape == segment_ids.shape == (16, SEQ_LEN)
    counts = {"documents": 16 * per_row, "bytes": 16 * per_row * len(DOCUMENT.encode()), "words": 16 * per_row}
    with cache.CacheWriter(folder / "cache", cache.TEXT, cache.text_fields(SEQ_LEN, loaded.size)) as writer:
        splits = {split: writer.write_split(split, [(tokens, segment_ids)]) for split in ("train", "validation")}
        manifest = {
            "task": {"corpus": "snowmen"},
            "fingerprint": "rows",
            "corpus_fingerprint": "texts",
            "vocabulary": {"name": "letters", "sha256": loaded.sha256},
            "splits": {split: written | counts for split, written in splits.items()},
        }
        writer.commit(manifest)
    bindings = (
        "Run.steps=60",
        "TextTask.corpus=@prepared()",
        f"prepared.path={str(folder / 'cache')!r}",
        f"TextTask.vocabulary={vocabulary!r}",
    )
    train(tiny, folder / "run", *bindings)
    return load(tiny, *bindings), folder / "run"


GREEDY = {"temperature": 0.0, "top_p": 1.0, "seed": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "continued"), [("", "abc \u2047 def"), ("ab", "c \u2047 def"), ("abc\N{SNOWMAN}d", "ef")]
)
def test_a_text_begins_and_ends_where_its_vocabulary_says(trained, prompt, continued):
    run, folder = trained
    assert continue_text(run, folder, prompt, 40, **GREEDY) == continued


def test_a_prompt_that_is_no_text_is_refused(trained):
    run, folder = trained
    with pytest.raises(InputError, match="is not UTF-8") as refused:
        continue_text(run, folder, "\udcff", 4, **GREEDY)
    assert refused.value.argument == "prompt"


def test_a_directory_without_checkpoints_is_refused(trained, tmp_path):
    run, _ = trained
    with pytest.raises(InputError, match=f"{tmp_path} has no checkpoints") as refused:
        continue_text(run, tmp_path, "", 4, **GREEDY)
    assert refused.value.argument == "workdir"
