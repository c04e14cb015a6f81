"""Runs and sweeps in a bucket: as in a folder, killed and damaged ones too. The bucket is an emulator's."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from bucket import Busy, reached_at
from google.api_core.exceptions import ServiceUnavailable
from small_runs import (
    assert_same,
    environment,
    leaves,
    load,
    refused,
    stack,
    sweep_config,
    train,
    without_times,
)
from tensorboardX.proto.event_pb2 import Event

from peer_jax import lease, startup, storage
from peer_jax.data import cache, pipeline
from peer_jax.errors import InputError, InUse, TryAgain
from peer_jax.run_directory import RunDirectory, find_runs
from peer_jax.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trains")]
SHORT = ("Run.steps=12", "Run.checkpoint_every=4", "Run.evaluate_every=6", "Transformer.num_blocks=1")


@pytest.fixture(scope="module")
def local(tmp_path_factory, tiny):
    """A run in a folder that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("local")
    train(tiny, folder, *SHORT)
    return RunDirectory(folder)


@pytest.fixture(scope="module")
def finished(bucket, tiny):
    """The same run in the bucket."""
    address = f"{bucket}/finished"
    train(tiny, address, *SHORT)
    return RunDirectory(address)


def flags(tiny, *bindings):
    return [f"--config={file}" for file in stack(tiny)] + [f"--set={binding}" for binding in bindings]


def measured(directory):
    """The losses of a run's metrics, each of which may be there only once."""
    found = {}
    for line in directory.read_metrics():
        for kind in ("loss", "validation_loss"):
            if kind in line:
                assert (line["step"], kind) not in found
                found[line["step"], kind] = line[kind]
    return found


def assert_as(directory, other, tiny):
    """The same run, bit for bit."""
    assert measured(directory) == measured(other)
    assert without_times(directory.read_result()) == without_times(other.read_result())
    run = load(tiny, *SHORT)
    assert_same(leaves(directory, run), leaves(other, run))


# Runs


def test_a_run_in_a_bucket_is_the_run_in_a_folder(finished, local, tiny):
    assert_as(finished, local, tiny)
    assert finished.holder() is None


def test_tensorboard_events_are_in_the_bucket(finished):
    (path,) = storage.listed(finished.path / "tensorboard")
    content, steps = storage.read(path), []
    while content:
        length = int.from_bytes(content[:8], "little")
        steps.append(Event.FromString(content[12 : 12 + length]).step)
        content = content[16 + length :]
    assert set(steps) >= set(range(1, 13))


def test_it_is_evaluated_continued_and_reported(finished, run_cli, tmp_path):
    status, printed, _ = run_cli("evaluate", f"--workdir={finished}", "--quiet", "--checkpoint=8")
    assert (status, "step 8" in printed) == (0, True)
    status, printed, _ = run_cli("generate", f"--workdir={finished}", "--prompt=the", "--max-new-tokens=4")
    assert (status, printed[:3]) == (0, "the")
    status, _, errors = run_cli("report", finished, f"--out={tmp_path}")
    assert (status, (tmp_path / "report.html").exists()) == (0, True), errors
    status, printed, _ = run_cli("report", finished)
    assert (status, storage.read(finished.path / "results.csv")) == (0, (tmp_path / "results.csv").read_bytes())


SLOW = """
import time
from peer_jax.training import loop
make = loop._step_function
def slow(*arguments):
    step = make(*arguments)
    def one(*arguments):
        time.sleep(0.5)
        return step(*arguments)
    return one
loop._step_function = slow
"""

# Waits less before a request is sent again, since half a minute of a test would be such waiting; and tells what it did.
IMPATIENT = """
import asyncio, atexit, collections, json, sys
import jax
from google.cloud.storage.retry import DEFAULT_RETRY
sleep, events = asyncio.sleep, collections.Counter()
asyncio.sleep = lambda seconds, *more: sleep(min(seconds, 0.05), *more)
DEFAULT_RETRY._initial = 0.05
jax.monitoring.register_event_listener(lambda event, **more: events.update([event.split("/")[-1]]))
atexit.register(lambda: print(json.dumps({"tensorflow": "tensorflow" in sys.modules, **events})))
"""


def start(tiny, directory, before, **variables):
    """Starts the run in a process of its own that executes a program first; what it compiles is kept in the bucket."""
    arguments = ["train", "--quiet", "--no-table", f"--workdir={directory}", *flags(tiny, *SHORT)]
    command = [sys.executable, "-c", f"{before}\nfrom peer_jax import cli\ncli.main()", *arguments]
    variables |= {"JAX_COMPILATION_CACHE_DIR": f"{directory.path.parent}/programs"}
    return subprocess.Popen(command, env=environment(**variables), stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def killed(bucket, tiny):
    """A run that was killed after a checkpoint."""
    directory = RunDirectory(f"{bucket}/killed")
    process = start(tiny, directory, SLOW)
    while not (directory.checkpoints / "4" / "commit_success.txt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    assert directory.holder().process == process.pid
    process.kill()
    process.communicate()
    assert max(Checkpoints(directory.checkpoints, read_only=True).steps()) < 12
    return directory


@pytest.fixture(scope="module")
def continued(bucket, killed, tiny):
    """How another process has finished that run, at a store that is too busy for some requests."""
    programs, began = storage.place(f"{bucket}/programs"), time.monotonic()
    began = time.monotonic()
    killed.lock().release()
    seconds = time.monotonic() - began
    before = {path.name for path in storage.listed(programs)}
    with Busy() as busy:
        process = start(tiny, killed, IMPATIENT, **reached_at(busy.url))
        printed, _ = process.communicate()
    assert process.returncode == 0
    return SimpleNamespace(
        directory=killed,
        seconds=seconds,
        faults=busy.faults,
        told=json.loads(printed),
        programs=(before, {path.name for path in storage.listed(programs)}),
    )


def test_a_killed_run_goes_on(continued, local, tiny):
    """At once, on the same machine; no line of its metrics is lost, and none is there twice."""
    assert continued.seconds < 30  # a lease of another machine takes 60 s to be stale
    assert_as(continued.directory, local, tiny)


def test_a_busy_store_is_asked_again(continued):
    """By each of the libraries, for all that it asks: the run above has not noticed."""
    libraries = ("gcloud-python", "python-gcsfs", "tensorstore")
    answered = {(library, status) for (library, *_), faults in continued.faults.items() for status in faults}
    assert answered == {(library, status) for library in libraries for status in (429, 503)}
    assert {method for _, method, *_ in continued.faults} == {"GET", "POST", "DELETE"}


def test_compiled_programs_are_found_in_the_bucket(continued):
    """The next process doesn't compile the step again that the killed one has; JAX finds it without TensorFlow."""
    before, after = continued.programs
    assert len([name for name in before if name.startswith("jit_step-")]) == 1
    assert not any(name.startswith("jit_step-") for name in after - before)
    assert continued.told["cache_hits"] >= 2
    assert continued.told["cache_misses"] == len(after - before)
    assert not continued.told["tensorflow"]


def test_where_programs_are_kept(bucket, monkeypatch):
    """Beside what is trained in a bucket, if there are accelerators."""
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(startup, "accelerators", lambda: ["tpu"])
    startup.prepare(workdir=f"{bucket}/sweep")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == f"{bucket}/sweep/.programs"


def test_what_is_older_than_a_checkpoint_is_written(bucket, tiny, monkeypatch):
    """However long the metrics might have been kept back."""
    written = []
    monkeypatch.setattr(storage, "FLUSH_SECONDS", 1e6)
    directory, save = RunDirectory(f"{bucket}/flushed"), Checkpoints.save

    def save_and_look(self, step, *arguments):
        written.append((step, max(line["step"] for line in directory.read_metrics())))
        return save(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save_and_look)
    train(tiny, directory, *SHORT)
    assert written == [(4, 4), (8, 8), (12, 12)]


def test_a_run_that_was_taken_over_stops(bucket, tiny, monkeypatch):
    """Its lease has been replaced by another, as after a long network failure: it neither saves nor writes a result."""
    directory = RunDirectory(f"{bucket}/taken")
    saves = []

    def save(self, step, *arguments):
        saves.append(step)
        found = directory._lease.read()
        assert lease.Bucket(directory.path / ".lease").take(b'{"owner": "another"}', found.version) is not None
        time.sleep(2)
        return True

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(lease.Held, "seconds", property(lambda held: 0.1))
    with pytest.raises(InUse, match=r"taken was taken over by another process"):
        train(tiny, directory, *SHORT)
    assert saves == [4]
    assert directory.read_result() is None


# Sweeps


def test_a_sweep_in_a_bucket(bucket, tiny, tmp_path, run_cli):
    workdir, bindings = f"{bucket}/sweep", ["--set=Sweep.seeds=(0,)", "--set=Sweep.budgets=(2e7,)"]
    command = ["sweep", f"--config={sweep_config(tmp_path, tiny)}", *bindings, "--workers=1", "--quiet"]
    status, _, errors = run_cli(*command, f"--workdir={workdir}")
    assert status == 0, errors
    assert len(find_runs(workdir)) == 2
    table = storage.read(storage.place(f"{workdir}/results.csv"))
    assert table.count(b"\n") == 3
    status, _, errors = run_cli("report", workdir, f"--out={tmp_path}")
    assert (status, (tmp_path / "results.csv").read_bytes()) == (0, table), errors
    assert (tmp_path / "report.html").exists()


# Leases


def test_one_of_several_takes_a_stale_lease(bucket):
    place = storage.place(f"{bucket}/race/.lease")
    assert lease.Bucket(place).take(b'{"owner": "dead", "stale": 1}', None) is not None
    outcomes, start = [], threading.Barrier(4)

    def race(number):
        start.wait()
        try:
            held = lease.hold(Named(place, number), host=f"host{number}", stale=1)
            outcomes.append("won")
            time.sleep(2)
            outcomes.append("lost" if held.lost else "kept")
            held.release()
        except InUse:
            outcomes.append("refused")

    threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["kept", "refused", "refused", "refused", "won"]


class Named(lease.Bucket):
    """A lease that a thread sees as a process of its own does."""

    def __init__(self, path, number):
        super().__init__(path)
        self._number = number

    def __str__(self):
        return f"{self._path} {self._number}"


def test_generations_decide_and_a_lost_answer_does_no_harm(bucket):
    place = lease.Bucket(storage.place(f"{bucket}/generations/.lease"))
    mine, theirs = b'{"owner": "me", "beat": %d}', b'{"owner": "they"}'
    first = place.take(mine % 1, None)
    assert place.take(theirs, None) is None
    second = place.renew(mine % 2, first)
    assert place.renew(mine % 2, first) == second  # sent again, because the answer was lost
    third = place.renew(mine % 3, first)  # the one before had failed for this process, but not for the bucket
    assert place.read() == (third, mine % 3)
    fourth = place.take(theirs, third)
    assert place.renew(mine % 4, third) is None
    assert place.read() == (fourth, theirs)


# Checkpoints that are not whole


def test_a_copy_without_its_commit_marker_is_passed_over_and_kept(bucket, finished, tiny, caplog):
    directory = RunDirectory(f"{bucket}/copied")
    for name in storage.checksums(finished.path):
        if name.startswith(("checkpoints/4/", "config.gin")) or name.startswith("checkpoints/8/"):
            storage.write_whole(directory.path / name, storage.read(finished.path / name))
    storage.remove(directory.checkpoints / "8" / "commit_success.txt")
    result = train(tiny, directory, *SHORT)
    said = [record.getMessage() for record in caplog.records]
    assert any(
        re.search(r"step 8 in .*/copied/checkpoints has no commit_success\.txt and is passed over", s) for s in said
    )
    assert result["steps"] == 12
    kept = storage.checksums(directory.checkpoints / "damaged-8")
    assert kept.keys() == storage.checksums(finished.checkpoints / "8").keys() - {"commit_success.txt"}


def test_changed_objects_are_noticed(finished, tiny, caplog):
    """A bit, a missing end, another object's content, a missing object: the checkpoint before is taken."""
    abstract, folder = load(tiny, *SHORT).trainer().abstract_state(), finished.checkpoints / "12"
    whole = {name: storage.read(folder / name) for name in storage.checksums(folder) if name.startswith("state/")}
    first, *_, last = sorted(whole)
    damages = [
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1],
        lambda content: whole[first if content == whole[last] else last],
        None,
    ]
    for number, name in enumerate(sorted(whole)[::2]):
        damage = damages[number % len(damages)]
        if damage is None:
            storage.remove(folder / name)
        else:
            storage.write_whole(folder / name, damage(whole[name]))
        with Checkpoints(finished.checkpoints, read_only=True) as checkpoints:
            step, _, _ = checkpoints.restore(abstract)
        assert step == 8, (name, number)
        storage.write_whole(folder / name, whole[name])
    with Checkpoints(finished.checkpoints, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract)[0] == 12


def test_a_bucket_that_does_not_answer_is_no_damage(finished, tiny, monkeypatch):
    """The checkpoint stays, and the same command may find it the next time."""

    def busy(*_, **__):
        raise ServiceUnavailable("come back later")

    abstract = load(tiny, *SHORT).trainer().abstract_state()
    monkeypatch.setattr(storage, "client", lambda: SimpleNamespace(list_blobs=busy))
    with Checkpoints(finished.checkpoints) as checkpoints, pytest.raises(TryAgain, match="come back later"):
        checkpoints.restore(abstract)
    monkeypatch.undo()
    assert finished.checkpoints.joinpath("12").exists()
    assert not list(finished.checkpoints.glob("damaged-12*"))


# Prepared text


def test_a_prepared_text_in_a_bucket_is_copied_once(bucket, tiny, tmp_path, monkeypatch, run_cli):
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    shared = f"TextTask.cache_dir={f'{bucket}/cache'!r}"
    status, printed, errors = run_cli("prepare", "--quiet", *flags(tiny, shared))
    assert (status, printed.startswith(str(tmp_path / "first"))) == (0, True), errors
    (address,) = storage.listed(storage.place(f"{bucket}/cache"))

    monkeypatch.setenv("HOME", str(tmp_path / "second"))
    monkeypatch.setattr(pipeline, "preparing_command", lambda: ["false"])
    task = load(tiny, shared).task
    rows, copies = task.prepared_rows(), tmp_path / "second" / ".cache" / "peer_jax"
    assert not copies.exists()  # planning copies nothing
    (copies / f".{address.name}.copying-killed").mkdir(parents=True)
    path = pipeline.ensure_prepared(task)
    assert path == copies / address.name
    assert len(pipeline.open_cache(path, "train")) == rows == task.prepared_rows()
    assert {p.name for p in copies.iterdir() if p.is_dir()} == {address.name}
    assert {p.name: p.read_bytes() for p in (path / "train").iterdir()} == {
        p.name: storage.read(p) for p in storage.listed(address / "train")
    }
    read = []
    monkeypatch.setattr(cache, "_copy", lambda *arguments: read.append(arguments))
    assert pipeline.ensure_prepared(task) == path
    assert read == []
    monkeypatch.undo()

    monkeypatch.setenv("HOME", str(tmp_path / "third"))
    given = ["TextTask.corpus=@prepared()", f"prepared.path={str(address)!r}", "TextTask.cache_dir=None"]
    monkeypatch.setenv("PEER_JAX_CACHE", str(tmp_path / "third"))
    copied = load(tiny, *given).task
    assert pipeline.open_cache(pipeline.ensure_prepared(copied), "train").rows > 0
    assert copied.fingerprint() == task.fingerprint()

    file = address / "train" / "tokens-00000.npy"
    content = storage.read(file)
    storage.write_whole(file, content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setenv("PEER_JAX_CACHE", str(tmp_path / "fourth"))
    with pytest.raises(InputError, match=f"{address} is damaged"):
        pipeline.ensure_prepared(load(tiny, *given).task)
    monkeypatch.setenv("HOME", str(tmp_path / "fifth"))
    pipeline.ensure_prepared(load(tiny, shared).task, progress=False)  # its text is here, so it is prepared anew
    assert storage.read(file) == content


# Refusals


def test_what_can_not_be_used_is_said_in_one_sentence(bucket, tiny, run_cli, monkeypatch):
    from google.api_core import exceptions

    asked = ["train", *flags(tiny, *SHORT)]
    refused(run_cli(*asked, "--workdir=gs://no-such-bucket/run"), "--workdir gs://no-such-bucket make")
    refused(run_cli(*asked, "--workdir=s3://bucket/run"), "--workdir s3://bucket/run only gs://bucket/folder")
    refused(run_cli("evaluate", f"--workdir={bucket}/nothing"), "has no config.gin")
    refused(run_cli("report", f"{bucket}/nothing"), "holds no finished run")
    refused(run_cli("report", "gs://no-such-bucket"), "make the bucket")

    def forbid(*arguments, **more):
        raise exceptions.Forbidden("GET https://host/b: you@example.org may not")

    with monkeypatch.context() as patch:
        patch.setattr(storage.client(), "list_blobs", forbid)
        refused(run_cli(*asked, "--workdir=gs://closed/run"), "gs://closed (you@example.org may not) rights")
    with monkeypatch.context() as patch:
        patch.setattr(lease.Bucket, "take", forbid)
        refused(run_cli(*asked, f"--workdir={bucket}/read-only"), "can't be written to (you@example.org may not)")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_is_installed", lambda name: name != "gcsfs")
        refused(run_cli(*asked, "--workdir=gs://without/run"), "gcsfs is not installed: pip install 'peer-jax[gcs]'")
