"""The files of runs and sweeps: whole or not there, locked, listed; addresses that are no folders are refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import environment

from peer_jax import storage
from peer_jax.data.corpora import python_stdlib
from peer_jax.data.prepared import prepared
from peer_jax.data.text_task import TextTask
from peer_jax.errors import InputError, InUse
from peer_jax.run_directory import RunDirectory, SweepDirectory, find_runs

ADDRESSES = ("s3://bucket/run", "file:///run", "http://host/run", "gs:/bucket/run")
RESULT = json.loads((Path(__file__).parent / "earlier_run" / "expected_result.json").read_text())
del RESULT["schema"]


# Addresses


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize(
    ("use", "argument"),
    [
        (RunDirectory, "workdir"),
        (SweepDirectory, "workdir"),
        (find_runs, None),
        (storage.make_folder, None),
        (lambda address: storage.write_whole(address, "text"), None),
        (prepared, "path"),
        (lambda address: TextTask(python_stdlib(), 8, cache_dir=address), "cache_dir"),
    ],
    ids=["run", "sweep", "find_runs", "make_folder", "write_whole", "prepared", "cache_dir"],
)
def test_an_address_is_refused_in_one_sentence(tmp_path, monkeypatch, address, use, argument):
    """Instead of making a local folder of that name."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"{address} is an address .*, and only local ") as refused:
        use(address)
    assert "\n" not in str(refused.value)
    assert argument is None or refused.value.argument == argument
    assert list(tmp_path.iterdir()) == []


def test_an_address_in_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEER_JAX_CACHE", "s3://bucket/cache")
    with pytest.raises(InputError, match="s3://bucket/cache is an address"):
        TextTask(python_stdlib(), 8).cache_path()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["plain", "with:colon", "a/gs:b", "~x"])
def test_a_local_path_stays_what_it_is(tmp_path, path):
    made = storage.make_folder(tmp_path / path)
    assert (tmp_path / path).is_dir()
    assert os.fspath(made) == os.fspath(tmp_path / path)


# Written whole


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    storage.write_whole(tmp_path / "file", "before")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"file can't be written \(No space left on device\)"):
        storage.write_whole(tmp_path / "file", "after")
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


WRITES = """
import sys
from peer_jax.storage import write_whole
for _ in range(300):
    write_whole(sys.argv[1], sys.argv[2] * 100_000)
"""


def test_readers_find_one_of_the_whole_texts_while_two_processes_write(tmp_path):
    path = tmp_path / "file"
    storage.write_whole(path, "a" * 100_000)
    command = [sys.executable, "-c", WRITES, str(path)]
    writers = [subprocess.Popen([*command, letter], env=environment()) for letter in "bc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        text = path.read_text()
        assert len(text) == 100_000
        assert len(set(text)) == 1
        seen.add(text[0])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen & {"b", "c"}


@pytest.mark.parametrize("text", ["", "{", '{"schema": 1, "steps"', "[1]", "\x00\x00"])
def test_a_half_written_result_is_refused_and_set_aside_by_the_next(tmp_path, text):
    directory = RunDirectory(tmp_path)
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        directory.read_result()
    assert directory.whole_result() is None
    assert directory.has_result
    directory.write_result(RESULT)
    assert directory.read_result() == {"schema": 1} | RESULT
    assert (tmp_path / "damaged-result.json").read_text() == text


def test_a_result_is_read_back_if_it_is_whole_and_of_this_schema(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_result() is None
    directory.write_result(RESULT)
    assert directory.read_result() == {"schema": 1} | RESULT
    for other, field in ((RESULT | {"schema": 2}, "schema"), ({"schema": 1} | RESULT | {"steps": "3"}, "steps")):
        (tmp_path / "result.json").write_text(json.dumps(other))
        with pytest.raises(InputError, match=f"damaged at {field}"):
            directory.read_result()
        assert directory.whole_result() is None


def test_a_config_is_read_back_or_refused(tmp_path):
    directory = RunDirectory(tmp_path)
    assert directory.read_config() is None
    directory.write_config("Run.steps = 4\n")
    assert directory.read_config() == "Run.steps = 4\n"
    directory.config.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match=r"config\.gin can't be read"):
        directory.read_config()


# Locks and marks

HOLDS = """
import sys
from peer_jax.run_directory import RunDirectory
lock = RunDirectory(sys.argv[1]).lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_another_process_is_kept_out_until_the_first_one_dies(tmp_path):
    directory = RunDirectory(tmp_path / "made" / "run")
    command = [sys.executable, "-c", HOLDS, str(directory)]
    other = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(InUse, match=f"{directory} is in use by another process") as refused:
        directory.lock()
    assert refused.value.argument == "workdir"
    other.kill()
    other.communicate()
    directory.lock(timeout=5).release()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run can't be written to \(Not a directory\)"):
        RunDirectory(tmp_path / "file" / "run").lock()
    with pytest.raises(InputError, match="file/folder can't be made"):
        storage.make_folder(tmp_path / "file" / "folder")


def test_a_mark_is_seen_until_it_is_removed(tmp_path):
    directory, same = RunDirectory(tmp_path), RunDirectory(tmp_path)
    assert not same.has_mark("1")
    directory.leave_mark("1")
    assert same.has_mark("1")
    assert not same.has_mark("2")
    directory.remove_mark("1")
    directory.remove_mark("1")
    assert list(tmp_path.iterdir()) == []


# Lines and folders


def test_metrics_are_appended_to_what_is_kept(tmp_path):
    directory = RunDirectory(tmp_path)
    assert list(directory.read_metrics()) == []
    assert directory.last_metrics() is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nspoilt\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [entry["step"] for entry in directory.read_metrics()] == [1, 2, 3]
    assert directory.last_metrics() == {"step": 3}
    lines = directory.append_metrics(lambda line: "3" not in line)
    lines.append('{"step": 4}')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\nspoilt\n{"step": 2}\n{"step": 4}\n'
    assert directory.last_metrics() == {"step": 4}
    lines.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_damaged_folders_are_set_aside_under_names_of_their_own(tmp_path):
    names = []
    for content in ("first", "second", "third"):
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / "file").write_text(content)
        names.append(storage.set_aside(tmp_path / "7").name)
    assert names == ["damaged-7", "damaged-7-again", "damaged-7-again-again"]
    assert [(tmp_path / name / "file").read_text() for name in names] == ["first", "second", "third"]


def test_checking_for_room_leaves_nothing(tmp_path):
    storage.check_room(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="missing"):
        storage.check_room(tmp_path / "missing")


# Sweeps


def test_points_and_failures_are_read_back(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    assert directory.read_point() == {}
    assert directory.read_failure() is None
    directory.clear_failure()
    directory.write_point({"size": "tiny", "seed": 1})
    directory.write_failure("it was too hot", "a traceback")
    assert directory.read_point() == {"size": "tiny", "seed": 1}
    failure = directory.read_failure()
    assert (failure["reason"], failure["details"]) == ("it was too hot", "a traceback")
    directory.clear_failure()
    assert directory.read_failure() is None


def test_two_sweeps_share_a_directory(tmp_path):
    directory = SweepDirectory(tmp_path)
    assert directory.sweeps() == []
    directory.keep_sweep({"name": "one"}, ["a", "b"])
    directory.keep_sweep({"name": "two"}, ["c"])
    directory.keep_sweep({"name": "two"}, ["c"])
    found = {kept["sweep"]["name"]: kept for kept in directory.sweeps()}
    assert {name: kept["runs"] for name, kept in found.items()} == {"one": ["a", "b"], "two": ["c"]}
    assert found["one"]["name"] != found["two"]["name"]


def test_the_sweep_that_an_earlier_version_kept_is_that_of_all_runs(tmp_path):
    (tmp_path / "sweep.json").write_text('{"name": "old"}')
    assert SweepDirectory(tmp_path).sweeps() == [{"name": "sweep", "sweep": {"name": "old"}, "runs": None}]


def names(found, base):
    return [os.path.relpath(run, base) for run in found]


def test_runs_are_found_at_and_below_a_path(tmp_path):
    for folder in ("b/run", "a", "c/deep/er"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "a" / "config.gin").write_text("")
    (tmp_path / "b" / "run" / "failure.json").write_text("{}")
    (tmp_path / "c" / "deep" / "er" / "result.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    assert names(find_runs(tmp_path), tmp_path) == ["a", "b/run", "c/deep/er"]
    assert names(find_runs(tmp_path / "a"), tmp_path) == ["a"]
    assert find_runs(tmp_path / "empty") == find_runs(tmp_path / "missing") == []


def test_the_inside_of_a_run_is_not_walked(tmp_path):
    inner = tmp_path / "run" / "checkpoints" / "7"
    inner.mkdir(parents=True)
    (inner / "config.gin").write_text("")
    (tmp_path / "run" / "config.gin").write_text("")
    assert names(find_runs(tmp_path), tmp_path) == ["run"]


def test_the_list_of_a_sweep_saves_looking_into_its_runs(tmp_path, monkeypatch):
    """Runs of the list that have not been started have no folder; others beside them are found all the same."""
    SweepDirectory(tmp_path).keep_sweep({"name": "one"}, ["b", "a", "not started"])
    for name in ("a", "b", "beside"):
        RunDirectory(tmp_path / name).write_point({"size": name})
    RunDirectory(tmp_path / "beside").write_config("")
    assert names(find_runs(tmp_path), tmp_path) == ["a", "b", "beside"]
