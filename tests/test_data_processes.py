"""Preparing beside other processes: two at once, killed ones, and the process that keeps TensorFlow out of training."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from peer_jax.data import corpora, pipeline, tasks
from peer_jax.data.text_task import TextTask

# TensorFlow, seqio and TFDS warn of deprecated calls of their own when they are imported.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


# A program that prepares as usual, but takes rows from a stand-in for TensorFlow and pauses while it writes them.
SLOW = """
import sys, time, types
import numpy as np
from pathlib import Path
from peer_jax.data import corpora, tasks
from peer_jax.data.text_task import TextTask

def packed_rows(task, source, split, wanted, admit):
    for document in task.corpus.documents(split):
        text = document.text.encode()
        assert admit(text, text) == len(text)
        yield np.full((1, len(text)), 7, np.int32), np.ones((1, len(text)), np.int32)
    if split == "train":
        print("writing", flush=True)
        time.sleep(float(sys.argv[2]))

module = types.ModuleType("peer_jax.data.seqio_task")
module.packed_rows = packed_rows
module.Source = lambda corpus, splits: types.SimpleNamespace(note=None)
sys.modules["peer_jax.data.seqio_task"] = sys.modules["peer_jax.data"].seqio_task = module
folder = Path(sys.argv[1])
task = TextTask(corpora.local_files(folder / "a.jsonl", validation_share=0.2), 8, cache_dir=folder / "cache")
tasks.prepare(task)
print("done", flush=True)
"""


@pytest.fixture
def slow_task(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [f"text {i:03}" for i in range(100)])  # 8 bytes each
    task = TextTask(corpora.local_files(tmp_path / "a.jsonl", validation_share=0.2), 8, cache_dir=tmp_path / "cache")
    started = []

    def start(seconds):
        command = [sys.executable, "-c", SLOW, str(tmp_path), str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield task, start
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_process_leaves_no_cache_and_no_lock(slow_task):
    task, start = slow_task
    process = start(600)
    assert process.stdout.readline() == "writing\n"
    hidden = sorted(file.name for file in task.cache_path().parent.iterdir())
    assert all(name.startswith(".") for name in hidden)
    assert any(".writing-" in name for name in hidden)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not task.cache_path().exists()

    path = tasks.prepare(task)
    assert pipeline.open_cache(path, "train").counts["tokens"] % 9 == 0
    assert sorted(file.name for file in path.parent.iterdir()) == [f".{path.name}.lock", path.name]


def test_two_processes_at_once_write_one_cache(slow_task, monkeypatch, capfd):
    task, start = slow_task
    process = start(1.5)
    assert process.stdout.readline() == "writing\n"
    monkeypatch.setattr(tasks, "_write", None)  # this process must wait, not write
    began = time.monotonic()
    path = tasks.prepare(task)
    assert time.monotonic() - began > 0.5
    assert "waiting for another process that prepares a-bytes-8" in capfd.readouterr().err
    assert process.stdout.readline() == "done\n"
    assert pipeline.open_cache(path, "train")[0]["tokens"].tolist() == [7] * 8


def test_ensure_prepared_keeps_tensorflow_in_another_process(tmp_path):
    """It also prepares a corpus whose class is defined in the script that asks for it."""
    write_jsonl(tmp_path / "a.jsonl", [f"text {i:03}" for i in range(100)])
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"no": "text"}\n')
    code = f"""
import sys
from pathlib import Path
from peer_jax.data import corpora, pipeline
from peer_jax.errors import InputError
folder = Path({str(tmp_path)!r})


class Mine:
    name = "mine"

    def __init__(self, file):
        self.file = file

    def fingerprint(self):
        return self.name

    def num_bytes(self):
        return 1000

    def documents(self, split):
        lines = self.file.read_text().splitlines()
        for line in lines[:90] if split == "train" else lines[90:]:
            yield corpora.Document(line, line)


task = pipeline.TextTask(Mine(folder / "a.jsonl"), 8, cache_dir=folder / "cache")
path = pipeline.ensure_prepared(task)
assert path == task.cache_path() == pipeline.ensure_prepared(task)
next(pipeline.train_batches(pipeline.open_cache(path, "train"), batch_size=4, seed=0))
try:
    pipeline.ensure_prepared(pipeline.TextTask(corpora.local_files(folder / "bad.jsonl"), 8, cache_dir=folder))
except InputError as error:
    assert "bad.jsonl, line 3: no string under text_key 'text' (found no)" in str(error), error
else:
    raise AssertionError
assert not {{"tensorflow", "seqio"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    # There are no messages of TensorFlow, and no progress bar without a terminal.
    (said,) = result.stderr.splitlines()
    assert said == (
        "mine: 1,890 tokens of 90 documents to train on, 210 tokens of 10 documents to validate on, "
        "which is 10.00% of the text"
    )
