"""A cache from another machine: it has the same rows, is refused if it doesn't fit, and needs no TensorFlow."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_runs import BATCH, ROOT, SEQ_LEN, environment, load, losses, stack, train

from peer_jax.data import cache, corpora, pipeline, tasks, vocabulary
from peer_jax.data.prepared import prepared
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("trains")


@pytest.fixture
def original(tiny):
    """The task of a corpus whose texts are here."""
    return load(tiny, "Run.steps=1").task


@pytest.fixture
def copied(original, tmp_path):
    """Its cache, in another place under another name."""
    return shutil.copytree(original.cache_path(), tmp_path / "elsewhere" / "renamed")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    return str(tasks.train_sentencepiece(corpora.local_files(__file__), folder / "my.model", vocab_size=400))


def test_batches_and_names_are_those_of_the_original(original, copied, monkeypatch):
    monkeypatch.setattr(pipeline.subprocess, "run", None)  # nothing is prepared
    task = TextTask(prepared(str(copied)), SEQ_LEN)
    assert pipeline.ensure_prepared(task) == tasks.prepare(task) == task.cache_path() == copied
    assert task.corpus.name == original.corpus.name == "corpus"
    assert task.corpus.fingerprint() == original.corpus.fingerprint()
    assert task.fingerprint() == original.fingerprint()
    counts = [pipeline.open_cache(copied, split).counts["bytes"] for split in ("train", "validation")]
    assert task.corpus.num_bytes() == sum(counts)
    for split in ("train", "validation"):
        ours, theirs = (pipeline.open_cache(t.cache_path(), split) for t in (original, task))
        steps = ours.rows // BATCH + 2  # into a second epoch
        streams = [pipeline.train_batches(source, batch_size=BATCH, seed=0) for source in (ours, theirs)]
        for _ in range(steps):
            batch, same = map(next, streams)
            for key in batch:
                np.testing.assert_array_equal(batch[key], same[key])


def test_limits_are_those_it_was_prepared_with(copied):
    limited = TextTask(prepared(copied), SEQ_LEN, max_train_tokens=1, max_validation_tokens=1)
    assert limited.fingerprint() == TextTask(prepared(copied), SEQ_LEN).fingerprint()
    assert limited.cache_path() == copied


def test_sentencepiece_model_may_be_anywhere(copied, model, tmp_path):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["vocabulary"] |= {"name": "/of/the/other/machine.model", "sha256": vocabulary.load(model).sha256}
    (copied / "manifest.json").write_text(json.dumps(cache.signed(manifest)))
    here = shutil.copy(model, tmp_path / "here.model")
    assert TextTask(prepared(copied), SEQ_LEN, vocabulary=str(here)).cache_path() == copied
    with pytest.raises(InputError, match=r"absent\.model' can't be read \(No such file"):
        TextTask(prepared(copied), SEQ_LEN, vocabulary=str(tmp_path / "absent.model")).cache_path()
    says = (
        r"renamed has vocabulary '/of/the/other/machine\.model' \(sha256 [0-9a-f]{12}\) and "
        r"TextTask\.vocabulary is 'bytes'; set it to the path of that model, or prepare a cache with yours"
    )
    with pytest.raises(InputError, match=says):
        TextTask(prepared(copied), SEQ_LEN).cache_path()


def refused(task, says):
    for use in (TextTask.cache_path, TextTask.fingerprint, pipeline.ensure_prepared, tasks.prepare):
        with pytest.raises(InputError, match=says) as caught:
            use(task)
        assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_named(copied, model, tmp_path):
    says = r"renamed has rows of 32 tokens and TextTask\.seq_len is 64; set TextTask\.seq_len to 32, or prepare"
    refused(TextTask(prepared(copied), 64), says)
    says = (
        r"renamed has vocabulary 'bytes' and TextTask\.vocabulary is '.*my\.model' \(sha256 .*\); set it to 'bytes', or"
    )
    refused(TextTask(prepared(copied), SEQ_LEN, vocabulary=model), says)
    with pytest.raises(InputError, match="renamed is a prepared cache, which holds tokens"):
        tasks.train_sentencepiece(prepared(copied), tmp_path / "x.model", vocab_size=400)


# Before Python 3.12 a check of the corpus's protocol would itself read the name, and meet the damage.
@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("key", ["task", "vocabulary", "fingerprint", "corpus_fingerprint"])
def test_damaged_manifest_is_named(copied, key):
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest[key]
    (copied / "manifest.json").write_text(json.dumps(manifest))
    refused(TextTask(prepared(copied), SEQ_LEN), r"manifest\.json is damaged; delete .*, or copy it here again")
    (copied / "manifest.json").write_text(json.dumps(cache.signed(manifest)))
    refused(TextTask(prepared(copied), SEQ_LEN), r"manifest\.json is damaged; delete .*, or copy it here again")


def test_missing_and_foreign_folders_are_named(copied):
    task = TextTask(prepared(copied), SEQ_LEN)
    (copied / "manifest.json").unlink()
    refused(task, "renamed is not a prepared cache")
    shutil.rmtree(copied)
    refused(task, "there is no prepared cache .*renamed; give the path of a folder that `peer-jax prepare` printed")
    with pytest.raises(InputError, match="there is no prepared cache"):
        task.corpus.name  # noqa: B018


# A machine without network, on which the packages that only `prepare` needs are not installed.
BARE = """
import importlib.util, socket, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        missing = name.partition(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets")
        return None if missing else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def unreachable(*_):
    raise OSError("Network is unreachable")

sys.meta_path[:] = map(Without, sys.meta_path)
socket.socket.connect = socket.getaddrinfo = unreachable
assert not any(map(importlib.util.find_spec, ("tensorflow", "seqio", "tensorflow_datasets")))

from pathlib import Path
from peer_jax import config
from peer_jax.training import loop

files, bindings = sys.argv[1].split(), sys.argv[2].split()
loop.train(config.load(files, bindings), Path("run"), progress=False)
"""


@pytest.mark.slow
def test_trains_where_tensorflow_seqio_and_network_are_missing(tiny, copied, tmp_path):
    machine = tmp_path / "machine"
    machine.mkdir()
    copied.rename(machine / "cache")
    bindings = ["Run.steps=3", "TextTask.corpus=@prepared()", "prepared.path='cache'"]
    arguments = [" ".join(map(str, stack(tiny))), " ".join(bindings)]
    subprocess.run(
        [sys.executable, "-c", BARE, *arguments], check=True, cwd=machine, env=environment(PYTHONPATH=str(ROOT))
    )
    result = json.loads((machine / "run" / "result.json").read_text())
    assert result["corpus"]["name"] == "corpus"
    assert list(result["evaluations"]) == ["corpus"]

    train(tiny, tmp_path / "here", "Run.steps=3")
    assert losses(machine / "run") == losses(tmp_path / "here")
