"""Training in several processes, as on several hosts: real ones, which are stopped, killed and given what can't be.

Here two processes have 4 devices each; that their data is disjoint and complete is in test_data_pipeline.py.
"""

import concurrent.futures
import itertools
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hosts import HOSTS, Hosts, ended, finish, flags, free_port, open_mpi_5, slurm, train_command
from small_runs import (
    KEEPS_NO_PROGRAMS,
    PROGRAM,
    arrays,
    children,
    lines,
    load,
    losses,
    train,
    wait_for,
    without_times,
)

from peer_jax import cluster, processes
from peer_jax.data.pipeline import ensure_prepared, open_cache, train_batches
from peer_jax.errors import InputError, InUse
from peer_jax.run_directory import RunDirectory
from peer_jax.sharding import Sharding, split_batch, use
from peer_jax.training import ownership
from peer_jax.training.checkpoint import Checkpoints

# Batches that 8 devices share; and so much validation that its last batch of 128 rows has some in both processes.
STEPS, EVERY = 24, 4
BINDINGS = (
    "Run.batch_size=8",
    f"Run.steps={STEPS}",
    f"Run.checkpoint_every={EVERY}",
    "Run.evaluate_every=9",
    "local_files.validation_share=0.4",
    "AdamW.table_b1=0",
    "AdamW.table_second_moment='row'",
)
# Two processes train the rows that a batch touches, which is the same as whole tables.
BY_TWO = ("AdamW.table_updates='touched'", "Sharding.expert=4")
# Sums over the parts of a batch come in another order: a rounding of 6e-8 each, some dozen of them.
REDUCED = 5e-6


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trains")]


@pytest.fixture(scope="module")
def hosts():
    hosts = Hosts()
    yield hosts
    hosts.kill()


@pytest.fixture(scope="module")
def bad_start(hosts, tiny, tmp_path_factory):
    """Two processes, of which only the second has an impossible config. They take a while to end, with little to do."""
    command = train_command(tiny, tmp_path_factory.mktemp("bad") / "run", *BINDINGS)
    started = hosts.start_all(command, second=["--set=Run.stepz=6"])
    with concurrent.futures.ThreadPoolExecutor(HOSTS) as pool:
        yield [pool.submit(ended, process, timeout=100) for process in started]


@pytest.fixture(scope="module")
def one(tiny, tmp_path_factory):
    """A run on one device."""
    folder = tmp_path_factory.mktemp("one")
    train(tiny, folder, *BINDINGS, layer="peer")
    return folder


@pytest.fixture(scope="module")
def two(bad_start, hosts, tiny, tmp_path_factory):
    """The same run by two processes with 4 devices each, on touched rows."""
    folder = tmp_path_factory.mktemp("two")
    for process in hosts.start_all(train_command(tiny, folder, *BINDINGS, *BY_TWO)):
        finish(process)
    return folder


@pytest.fixture(scope="module")
def eight(hosts, tiny, two, tmp_path_factory):
    """The same run by one process with 8 devices, and what that process finds out about checkpoints."""
    folder = tmp_path_factory.mktemp("eight")
    shutil.copytree(two / "checkpoints" / str(STEPS - EVERY), folder / "two processes" / str(STEPS - EVERY))
    (report,) = hosts.measured(folder, "test_hosts", "on_eight_devices", str(tiny), str(folder), hosts=1)
    return folder / "run", report


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def assert_close(found, expected, names=("loss", "grad_norm", "param_norm", "validation_loss")):
    """The logs of two runs are equal within the rounding of sums."""
    found, expected = lines(found), lines(expected)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for a, b in zip(found, expected, strict=True):
        for name in names:
            assert (name in a) == (name in b)
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=REDUCED), f"{name} of step {a['step']}"


# Equal results


@pytest.mark.parametrize("processes", [1, 2])
def test_eight_devices_train_as_one(one, eight, two, processes):
    many = {1: eight[0], 2: two}[processes]
    assert_close(many, one)
    found, expected = result_of(many), result_of(one)
    (a,), (b,) = found["evaluations"].values(), expected["evaluations"].values()
    assert (a["tokens"], a["bytes"], a["words"]) == (b["tokens"], b["bytes"], b["words"])
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert a[name] == pytest.approx(b[name], rel=REDUCED)
    assert a["experts"].keys() == b["experts"].keys() == {"block_1"}
    for name in ("usage", "unevenness"):
        assert a["experts"]["block_1"][name] == pytest.approx(b["experts"]["block_1"][name], rel=REDUCED)
    assert (found["machine"]["devices"], found["machine"]["processes"]) == (8, processes)
    same = ("training_flops", "tokens", "epochs", "corpus", "params_total")
    assert [found[name] for name in same] == [expected[name] for name in same]


def test_the_last_batch_of_validation_is_uneven(tiny):
    """Otherwise the test above would see no padding: both processes have rows of the last batch, one has padding."""
    run = load(tiny, *BINDINGS)
    rows = open_cache(ensure_prepared(run.task, progress=False), "validation").rows
    batch = run.eval_batch_size()
    assert rows > batch
    assert batch / HOSTS < rows % batch < batch


def test_one_process_writes_for_all(one, two):
    logged = [(line["step"], "loss" in line) for line in lines(two)]
    assert len(logged) == len(set(logged)) == STEPS + 3  # validation has lines of its own
    assert len(list((two / "tensorboard").iterdir())) == 1
    own, alone = (set((folder / "config.gin").read_text().splitlines()) for folder in (two, one))
    assert own - alone == {line.replace("=", " = ") for line in BY_TWO}
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert sorted(path.name for path in (two / "checkpoints").iterdir()) == ["20", "24"]


# Stopped and killed


def wait_for_step(started, folder, step):
    """Waits until a run has logged a step."""

    def has_logged():
        for process in started:
            assert process.poll() is None, process.communicate()[1]
        path = folder / "metrics.jsonl"
        return path.exists() and f'{{"step": {step},' in path.read_text()

    wait_for(has_logged, seconds=240)


def signal_at(started, folder, step, numbers):
    """Sends each process its signal, if any, when the run has logged a step; returns how the processes end."""
    wait_for_step(started, folder, step)
    for process, number in zip(started, numbers, strict=True):
        if number is not None:
            process.send_signal(number)
    return [ended(process) for process in started]


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_stopped_and_killed_runs_end_as_one_that_never_was(hosts, tiny, two, tmp_path):
    def start():
        return hosts.start_all(train_command(tiny, tmp_path, *BINDINGS, *BY_TWO), variables=KEEPS_NO_PROGRAMS)

    kill, term = signal.SIGKILL, signal.SIGTERM
    died = (
        "has died (its connection has ended): start all processes again, and the run goes on from its last checkpoint"
    )
    for step, numbers in ((5, (None, kill)), (10, (kill, None)), (13, (kill, kill))):
        for number, (status, errors) in zip(numbers, signal_at(start(), tmp_path, step, numbers), strict=True):
            if number == kill:
                assert status == -kill
            else:
                assert status == os.EX_TEMPFAIL
                assert errors == f"peer-jax: process {numbers.index(kill)} {died}\n"
        assert max(saved(tmp_path), default=0) >= step - 2 * EVERY
        assert not (tmp_path / "result.json").exists()

    started = start()
    wait_for_step(started, tmp_path, 15)
    (other,) = children(started[0].pid)
    os.kill(other, signal.SIGSTOP)  # so that no step is made before JAX looks for a signal, once a second
    started[1].send_signal(term)
    time.sleep(1.5)
    os.kill(other, signal.SIGCONT)
    ends = [ended(process) for process in started]
    stopped = lines(tmp_path)[-1]["step"]
    assert 15 <= stopped < STEPS
    for status, errors in ends:
        assert status == 128 + term
        assert f"peer-jax: stopped at step {stopped} and saved; the same command resumes\n" in errors
        assert "Traceback" not in errors
    assert saved(tmp_path)[-1] == stopped

    for process in start():
        finish(process)
    assert losses(tmp_path) == losses(two)  # bit for bit, and none twice
    assert without_times(result_of(tmp_path)) == without_times(result_of(two))


@pytest.mark.parametrize("launcher", [slurm, open_mpi_5])
def test_a_process_that_dies_under_a_launcher_is_named(hosts, tiny, two, tmp_path, launcher):
    """No flag says where the processes meet. The process that trains is killed, then the same commands go on."""
    started = hosts.start_launched(train_command(tiny, tmp_path, *BINDINGS, *BY_TWO), launcher)
    wait_for_step(started, tmp_path, 5)
    (child,) = children(started[1].pid)
    os.kill(child, signal.SIGKILL)
    killed = "peer-jax: process 1 was killed by SIGKILL: start all processes again, and the run goes on from its last"
    assert ended(started[0]) == (os.EX_TEMPFAIL, f"{killed} checkpoint\n")
    status, errors = ended(started[1])
    assert status == 128 + signal.SIGKILL
    assert errors.endswith(f"{killed} checkpoint; is memory full?\n")
    for process in hosts.start_launched(train_command(tiny, tmp_path, *BINDINGS, *BY_TWO), launcher):
        finish(process)
    assert losses(tmp_path) == losses(two)


# Checkpoints on other devices

TOPOLOGIES = {
    "one": (1, Sharding()),
    "two": (2, Sharding(expert=2)),
    "four": (4, Sharding(data=2, expert=2, tables="columns")),
    "eight": (8, Sharding(data=2, fsdp=2, expert=2)),
}


class Topology:
    """A trainer on some of the devices."""

    def __init__(self, run, devices, sharding):
        self.placement = sharding.place(jax.devices()[:devices])
        with use(self.placement):
            self.trainer = run.trainer()
            self.step = self.trainer.compiled_step()
            self.abstract_state = self.trainer.abstract_state()
        self.source = open_cache(ensure_prepared(run.task, progress=False), "train")
        self.run = run

    def batches(self):
        return train_batches(self.source, batch_size=self.run.batch_size, seed=self.run.seed)

    def go_on(self, state, position, steps=2):
        """The state, the losses and the position after some steps; the state that is given is used up."""
        batches, found = self.batches(), []
        batches.set_state(position["batches"])
        with use(self.placement):
            for step in range(steps):
                batch = split_batch(next(batches))
                state, metrics = self.step(state, batch, self.run.optimizer.rates(self.trainer.labels, step, STEPS))
                found.append(float(metrics["loss"]))
        return state, found, {"batches": batches.get_state()}

    def save(self, folder, step, state, position):
        with use(self.placement):
            checkpoints = Checkpoints(folder)
            assert checkpoints.save(step, state, position)
            checkpoints.close()

    def restore(self, folder):
        with use(self.placement):
            checkpoints = Checkpoints(folder, read_only=True)
            _, state, position = checkpoints.restore(self.abstract_state)
            checkpoints.close()
        return state, position

    def differing(self, state, expected):
        """The names of arrays that have other values, or are not where this topology has them."""
        found = arrays(state)
        assert found.keys() == expected.keys()
        differing = [name for name in expected if not np.array_equal(expected[name], found[name])]
        if self.placement is not None:
            shardings = jax.tree.leaves(self.placement.shardings(self.abstract_state))
            for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(state), shardings, strict=True):
                if not leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
                    differing.append(f"{jax.tree_util.keystr(path)} is elsewhere")
        return differing


def on_eight_devices(tiny, folder):
    """Trains. Then, per pair of a topology that saves and one that restores: arrays that differ, losses that follow."""
    tiny, folder = Path(tiny), Path(folder)
    train(tiny, folder / "run", *BINDINGS, layer="peer")
    run = load(tiny, *BINDINGS, layer="peer")
    topologies = {name: Topology(run, *of) for name, of in TOPOLOGIES.items()}
    first = topologies["one"]
    first.save(folder / "first", 1, first.trainer.init(run.seed), {"batches": first.batches().get_state()})
    saved, following = {}, {}
    for name, topology in topologies.items():
        state, _, position = topology.go_on(*topology.restore(folder / "first"))
        topology.save(folder / name, 2, state, position)
        saved[name] = arrays(state)
        following[name] = topology.go_on(state, position)[1]
    saved["two processes"] = arrays(first.restore(folder / "two processes")[0])
    restored = {}
    for (source, expected), (target, topology) in itertools.product(saved.items(), topologies.items()):
        state, position = topology.restore(folder / source)
        differing = topology.differing(state, expected)
        restored[f"{source} to {target}"] = [differing, topology.go_on(state, position)[1]]
    return {"restored": restored, "uninterrupted": following}


@pytest.mark.parametrize("target", TOPOLOGIES)
@pytest.mark.parametrize("source", [*TOPOLOGIES, "two processes"])
def test_a_checkpoint_is_the_same_on_other_devices(eight, source, target):
    _, report = eight
    differing, following = report["restored"][f"{source} to {target}"]
    assert differing == []
    if source == target:
        assert following == report["uninterrupted"][source]  # bit for bit
    expected = report["uninterrupted"].get(source) or report["restored"][f"{source} to one"][1]
    np.testing.assert_allclose(following, expected, rtol=REDUCED)


def as_at_a_checkpoint(folder, of):
    """The directory of a run as if it had been killed after its last checkpoint but one."""
    shutil.copytree(of, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / str(STEPS))
    return folder


def test_one_process_goes_on_from_two(tiny, two, tmp_path):
    folder = as_at_a_checkpoint(tmp_path / "run", two)
    train(tiny, folder, *BINDINGS, layer="peer")
    assert_close(folder, two)


def test_two_processes_go_on_from_one_by_columns(told, one):
    folder, answers = told
    assert_close(folder / "by columns", one)
    loss = pytest.approx(result_of(one)["evaluations"]["corpus"]["loss"], rel=REDUCED)
    assert [answer["by columns"] for answer in answers] == [loss] * HOSTS


# What can't be


def test_a_process_that_cannot_start_ends_the_others(bad_start):
    """The others have its status, and say what it says."""
    (first, of_first), (second, of_second) = (end.result() for end in bad_start)
    assert (first, second) == (2, 2)
    assert of_second.startswith("peer-jax: --set 'Run.stepz=6': Run has no argument 'stepz'")
    assert of_first == of_second.replace("peer-jax: ", "peer-jax: process 1 has ended: ")


def test_an_unwritable_directory_ends_all_processes_with_one_sentence(hosts, tiny, tmp_path):
    """Only the first process writes there."""
    (tmp_path / "run").write_text("a file")
    for process in hosts.start_all(train_command(tiny, tmp_path / "run", *BINDINGS)):
        status, errors = ended(process)
        assert status == 2
        assert f"{tmp_path}/run can't be written to (File exists): choose another directory" in errors
        assert len([line for line in errors.splitlines() if not line.startswith("corpus: ")]) == 1


def attempts(tiny, folder):
    """The errors of impossible runs, whose fault one of two processes may know alone; for the others, the last loss."""
    tiny, folder, leads = Path(tiny), Path(folder), processes.leads()
    told = {}

    def attempt(name, where, *bindings):
        try:
            told[name] = train(tiny, where, *BINDINGS, *bindings, layer="peer")["evaluations"]["corpus"]["loss"]
        except InputError as error:
            told[name] = str(error)

    attempt("batch", folder / "batch", "Run.batch_size=12")
    attempt("rate", folder / "rate", *([] if leads else ["AdamW.learning_rate=0.5"]))
    attempt("steps", folder / "steps", *([] if leads else ["Run.steps=3"]))
    attempt("mesh", folder / "mesh", *([] if leads else ["Sharding.expert=2"]))
    attempt("another directory", folder / ("here" if leads else "there"))
    attempt("another run", folder / "finished", "Run.seed=1")
    attempt("finished", folder / "finished")
    attempt("by columns", folder / "by columns", *BY_TWO, "Sharding.fsdp=2", "Sharding.tables='columns'")

    read = Checkpoints._read

    def read_badly(self, step, abstract_state):
        if step == STEPS and not leads:
            raise ValueError("a bad sector")
        return read(self, step, abstract_state)

    Checkpoints._read = read_badly
    attempt("damaged for one", folder / "damaged for one", *BY_TWO)
    told["gathered"] = processes.gather("" if leads else "text \N{GREEK SMALL LETTER MU}")
    told["settled"] = settled(leads)
    return told


def settled(leads):
    """What processes learn that come together, of which one comes alone, and of which one has asked once more."""
    own = f"process {int(not leads)}"
    together = processes.settle("together", own, 60)
    alone = processes.settle("alone", own, 0.5) if leads else None
    processes._Counts.questions += leads
    apart = processes.settle("apart", own, 60)
    processes._Counts.questions -= leads
    return [together, alone, apart]


@pytest.fixture(scope="module")
def told(hosts, tiny, one, two, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    as_at_a_checkpoint(folder / "by columns", one)
    for name in ("finished", "damaged for one"):
        shutil.copytree(two, folder / name)
    (folder / "damaged for one" / "result.json").unlink()
    return folder, hosts.measured(folder, "test_hosts", "attempts", str(tiny), str(folder))


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("batch", "Run.batch_size / Run.accumulation=12 does not divide over the 8 devices"),
        ("rate", "process 1 has AdamW.learning_rate = 0.5, process 0 has 0.01"),
        ("steps", "process 1 has Run.steps = 3, process 0 has 24"),
        ("mesh", "process 1 has Sharding.expert = 2, process 0 has 1"),
        ("another directory", "there of process 1 is not that of process 0"),
        ("another run", "holds a run with Run.seed = 0, now it is 1"),
    ],
)
def test_what_one_process_refuses_all_refuse(told, case, says):
    first, second = (answer[case] for answer in told[1])
    assert says in first
    assert first == second


def test_a_refused_run_leaves_nothing_behind(told):
    folder, _ = told
    assert not any((folder / name).exists() for name in ("batch", "rate", "steps", "mesh", "there"))
    assert sorted(path.name for path in (folder / "here").iterdir()) == [".lease", ".lock"]


def test_a_finished_run_is_not_trained_again(told, two):
    folder, answers = told
    loss = result_of(two)["evaluations"]["corpus"]["loss"]
    assert [answer["finished"] for answer in answers] == [loss, loss]
    assert lines(folder / "finished") == lines(two)


def test_a_checkpoint_that_one_process_cannot_read_is_passed_over_by_all(told, two):
    folder, answers = told
    loss = result_of(two)["evaluations"]["corpus"]["loss"]
    assert [answer["damaged for one"] for answer in answers] == [loss, loss]
    assert losses(folder / "damaged for one") == losses(two)
    names = sorted(path.name for path in (folder / "damaged for one" / "checkpoints").iterdir())
    assert names == ["20", "24", "damaged-24"]


def test_gathered_text(told):
    assert [answer["gathered"] for answer in told[1]] == [["", "text μ"]] * HOSTS


def test_processes_know_whether_they_are_in_step(told):
    both = ["process 0", "process 1"]
    alone = [["process 0"], False]
    assert [answer["settled"] for answer in told[1]] == [
        [[both, True], alone, [both, False]],
        [[both, True], None, [both, False]],
    ]


# Starting


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"a:{port}: port {port} can't be had .*in use"):
            processes.start(cluster.find(f"a:{port}", 2, 0))


def test_flags_that_cannot_be_on_the_command_line(run_cli, tiny, tmp_path):
    arguments = train_command(tiny, tmp_path, *BINDINGS)[3:]
    status, _, errors = run_cli(*arguments, "--coordinator", "127.0.0.1:1")
    assert status == 2
    assert "coordinator given without num_processes and process_id: give all" in errors
    assert len(errors.splitlines()) == 1


def test_one_process_alone_starts_nothing():
    processes.start(cluster.find(environment={}))
    assert not jax.distributed.is_initialized()
    assert jax.process_count() == 1
    assert processes.leads()


def test_a_process_that_meets_no_other_says_so(hosts):
    """The first process waits where nobody comes; the second asks where nobody listens."""
    ports = [free_port() for _ in range(HOSTS)]
    command = [*PROGRAM, "train", "--config=none.gin", "--workdir=none", "--start-timeout=3"]
    started = [hosts.start([*command, *flags(host, port)]) for host, port in enumerate(ports)]
    missing = ("process 1 has not come in 3 s", "process 0 has not come in 3 s, [Errno 111] Connection refused")
    for process, port, other in zip(started, ports, missing, strict=True):
        status, errors = ended(process)
        said = [line for line in errors.splitlines() if line.startswith("peer-jax: ")]
        assert status == os.EX_TEMPFAIL, errors
        assert said == [
            f"peer-jax: 2 processes at 127.0.0.1:{port} did not start together ({other}): start all, and check that "
            "they reach the first"
        ]
        assert "Traceback" not in errors


# One process


def test_together_is_nothing_alone():
    with pytest.raises(InUse, match="mine"), processes.together():
        raise InUse("mine")
    assert processes.gather("text") == ["text"]


def test_a_directory_is_let_go_when_its_run_ends(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    for _ in range(2):
        with ownership.owned(directory, 60), pytest.raises(InUse), ownership.owned(directory, 60):
            pass
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lease", ".lock"]
