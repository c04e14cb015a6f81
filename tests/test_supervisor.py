"""Parents of processes, whose children do what a test says and have no JAX: how all end when one does."""

import sys
import time

import pytest
from hosts import ended, free_port, open_mpi_4, open_mpi_5, slurm
from small_runs import start_process

from peer_jax.supervisor import End

PROGRAM = """
import os, signal, sys, time
from peer_jax import cluster, supervisor
from peer_jax.errors import InputError

supervisor.SILENCE, supervisor.PING, supervisor.GRACE, supervisor.NEWS = 3, 0.2, 2, 3
supervisor.SAY = float(os.environ.get("SAY", 20))
port, count, number, action = sys.argv[1:]

def say(*lines):
    for line in lines:
        print(line, file=sys.stderr)

try:
    flags = (f"127.0.0.1:{port}", int(count), int(number)) if port != "launched" else ()
    supervisor.supervise(cluster.find(*flags), cluster.Timeouts(start=5))
except InputError as error:
    say("peer-jax: " + (f"--{error.argument} " if error.argument else "") + str(error))
    sys.exit(error.status)
exec(action)
"""
AGAIN = "start all processes again, and the run goes on from its last checkpoint"
WAIT = "time.sleep(30)"
ABORT = "time.sleep(1.5); say(*['F1127 client.h:86] Terminating process'] * 50); os.abort()"  # as JAX does
REFUSE = "time.sleep(0.5); say('peer-jax: Run has no argument stepz'); os._exit(2)"


def start(port, count, number, action=WAIT, launcher=None):
    variables = launcher(number, port, count) if launcher else {}
    where = "launched" if launcher else port
    return start_process([sys.executable, "-c", PROGRAM, where, count, number, action], **variables)


def ends(*actions):
    """Exit status and standard error of processes that do these."""
    port = free_port()
    started = [start(port, len(actions), number, action) for number, action in enumerate(actions)]
    return [ended(process, timeout=30) for process in started]


def test_children_that_end_well():
    assert ends("say('a line')", "time.sleep(0.5); say('peer-jax: stopped'); os._exit(143)", "pass") == [
        (0, "a line\n"),
        (143, "peer-jax: stopped\n"),
        (0, ""),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("culprit", "action", "status", "says"),
    [
        (0, "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)", 75, f"was killed by SIGKILL: {AGAIN}"),
        (1, "time.sleep(0.5); os.kill(os.getpid(), signal.SIGSEGV)", 75, f"was killed by SIGSEGV: {AGAIN}"),
        (
            0,
            "time.sleep(0.5); os.kill(os.getppid(), signal.SIGKILL)",
            75,
            f"has died (its connection has ended): {AGAIN}",
        ),
        (
            1,
            "time.sleep(0.5); os.kill(os.getppid(), signal.SIGKILL)",
            75,
            f"has died (its connection has ended): {AGAIN}",
        ),
        (1, "os.kill(os.getppid(), signal.SIGSTOP)", 75, f"has died (nothing was heard of it for 3 s): {AGAIN}"),
        (0, REFUSE, 2, "has ended: Run has no argument stepz"),
        (1, "time.sleep(0.5); raise ValueError('a fault')", 1, f"has failed (ValueError: a fault): {AGAIN}"),
    ],
)
def test_others_name_the_process_that_has_ended(culprit, action, status, says):
    """One of the others only waits, and the other is aborted, with many lines that are not shown."""
    actions = [WAIT, ABORT if "SIGSTOP" not in action else WAIT]
    actions.insert(culprit, action)
    port = free_port()
    started = [start(port, len(actions), number, what) for number, what in enumerate(actions)]
    for number, process in enumerate(started):
        if number != culprit:
            assert ended(process, timeout=30) == (status, f"peer-jax: process {culprit} {says}\n")
    started[culprit].kill()
    started[culprit].communicate()


def test_a_process_that_hangs_is_ended_when_another_dies():
    hangs, dies = "os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    first, _ = ends(hangs, dies)
    assert first == (75, f"peer-jax: process 1 was killed by SIGKILL: {AGAIN}\n")


def test_a_process_says_itself_how_it_was_killed():
    (_, (status, errors)) = ends(WAIT, "say('a line'); os.kill(os.getpid(), signal.SIGKILL)")
    assert status == 128 + 9
    assert errors == f"a line\npeer-jax: process 1 was killed by SIGKILL: {AGAIN}; is memory full?\n"


def test_a_fault_that_no_other_process_has_caused_is_shown():
    _, (status, errors) = ends(WAIT, "time.sleep(0.5); raise ValueError('a fault')")
    assert status == 1
    assert errors.startswith("Traceback")
    assert errors.endswith("ValueError: a fault\n")


def test_all_may_find_the_same_fault():
    assert ends(REFUSE, REFUSE) == [(2, "peer-jax: Run has no argument stepz\n")] * 2


def test_signals_reach_the_child():
    process = start(
        free_port(), 1, 0, "signal.signal(15, lambda *_: (say('peer-jax: saved'), os._exit(143))); say('on'); " + WAIT
    )
    assert process.stderr.readline() == "on\n"
    process.terminate()
    assert ended(process) == (143, "peer-jax: saved\n")


def test_processes_that_were_started_differently():
    port = free_port()
    started = [start(port, 3, 0), start(port, 3, 2), start(port, 2, 1)]
    says = "peer-jax: --num_processes 2 of process 1 is not the 3 of process 0: give all the same\n"
    assert [ended(process) for process in started if process is not started[1]] == [(2, says)] * 2
    assert ended(started[1])[0] in (2, 75)  # it may come when the first one has left


def test_a_number_that_is_given_twice():
    port = free_port()
    says = "peer-jax: --process_id 1 is given to two processes: give each its own, from 0 to 2\n"
    assert [ended(start) for start in [start(port, 3, number) for number in (0, 1, 1)]] == [(2, says)] * 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_number_that_all_have(number):
    """Number 0 twice: the one that can't listen asks the other. Number 1 twice: nobody listens."""
    port = free_port()
    twice = "peer-jax: --process_id 0 is given to two processes: give each its own, from 0 to 1\n"
    none = f"peer-jax: 2 processes at 127.0.0.1:{port} did not start together (process 0 has not come in 5 s"
    for status, errors in map(ended, [start(port, 2, number) for _ in range(2)]):
        assert status == (2, 75)[number]
        assert errors.splitlines(keepends=True)[-1].startswith((twice, none)[number])


@pytest.mark.parametrize("launcher", [slurm, open_mpi_4, open_mpi_5])
def test_a_launcher_s_variables_are_named(launcher):
    """Each process has another count; then all have the same number; then one dies."""
    count, number = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    if launcher is not slurm:
        count, number = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    port = free_port()
    says = f"peer-jax: {count} 3 of process 1 is not the 2 of process 0: give all the same\n"
    started = [start(port, count, number, launcher=launcher) for count, number in ((2, 0), (3, 1))]
    assert [ended(process) for process in started] == [(2, says)] * 2
    port = free_port()
    says = f"peer-jax: {number} 0 is given to two processes: give each its own, from 0 to 1\n"
    started = [start(port, 2, 0, launcher=launcher) for _ in range(2)]
    assert [ended(process) for process in started] == [(2, says)] * 2
    port = free_port()
    dies = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
    first, second = (start(port, 2, number, (ABORT, dies)[number], launcher) for number in range(2))
    assert ended(first) == (75, f"peer-jax: process 1 was killed by SIGKILL: {AGAIN}\n")
    assert ended(second)[0] == 128 + 9


@pytest.mark.slow
def test_a_process_that_does_not_come(monkeypatch):
    """The last one says for whom it waits, before the first one starts, which then says it too."""
    monkeypatch.setenv("SAY", "1")
    port = free_port()
    last = start(port, 3, 2)
    waits = f"waits at 127.0.0.1:{port} for process"
    assert last.stderr.readline().startswith(f"peer-jax: process 2 {waits} 0 ([Errno 111] Connection refused), ")
    first = start(port, 3, 0)
    together = f"peer-jax: 3 processes at 127.0.0.1:{port} did not start together (process 1 has not come in 5 s)"
    for process, said in ((first, [f"peer-jax: process 0 {waits} 1, "]), (last, [])):
        status, errors = ended(process)
        assert status == 75
        *before, sentence = errors.splitlines()
        assert sentence.startswith(f"{together}: start all")
        assert len(before) == len(said)
        assert all(map(str.startswith, before, said))


@pytest.mark.slow
def test_a_process_that_is_too_many_does_not_disturb_the_others():
    port = free_port()
    started = [start(port, 2, number, "say('begun'); time.sleep(4)") for number in (0, 1)]
    assert [process.stderr.readline() for process in started] == ["begun\n"] * 2
    time.sleep(0.2)
    status, errors = ended(start(port, 2, 1))
    assert status == 75
    assert f"2 processes at 127.0.0.1:{port} did not start together" in errors
    assert [ended(process) for process in started] == [(0, "")] * 2


def test_what_is_said_of_a_process():
    assert End(1, 143, "peer-jax: stopped").sentence() == "process 1 has ended: stopped"
