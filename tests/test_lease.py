"""Leases of run directories: one process has a run, and another takes it over only when that process has died."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
from small_runs import environment

from peer_jax import lease
from peer_jax.errors import InUse
from peer_jax.run_directory import RunDirectory

STALE = 1.2

# A process on a machine of another name holds a lease, and says when it has lost it.
HOLDS = """
import sys, time
from peer_jax import lease
place, host, stale = sys.argv[1:]
held = lease.hold(lease.Folder(place), host=host, stale=float(stale))
print("held", flush=True)
while not held.lost:
    time.sleep(0.01)
print("lost", flush=True)
"""

# A process on this machine locks a run directory.
LOCKS = """
import sys
from peer_jax.run_directory import RunDirectory
held = RunDirectory(sys.argv[1]).lock()
print("held", flush=True)
sys.stdin.read()
"""

# Waits for a moment and then tries to take a lease that is stale by then.
RACES = """
import sys, time
from peer_jax import lease
from peer_jax.errors import InUse
place, stale, start = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
time.sleep(max(0, start - time.time()))
try:
    held = lease.hold(lease.Folder(place), host=f"host{sys.argv[4]}", stale=stale)
    print("won", flush=True)
    time.sleep(3 * stale)
    print("lost" if held.lost else "kept", flush=True)
except InUse as error:
    print(error, flush=True)
"""


class Processes:
    def __init__(self):
        self._all = []

    def start(self, program, *arguments):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._all.append(process)
        return process

    def end(self):
        for process in self._all:
            process.kill()
            process.communicate()


@pytest.fixture
def processes():
    started = Processes()
    yield started
    started.end()


def holding(processes, place, host="elsewhere", stale=STALE):
    process = processes.start(HOLDS, place, host, stale)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_run_whose_holder_was_killed_on_this_machine_is_had_at_once(tmp_path, processes):
    directory = RunDirectory(tmp_path / "run")
    other = processes.start(LOCKS, directory)
    assert other.stdout.readline() == "held\n"
    holder = directory.holder()
    assert (holder.process, holder.since[-3:]) == (other.pid, "UTC")
    with pytest.raises(InUse, match=rf"in use by another process \(process {other.pid} on .* since .*\)") as refused:
        directory.lock()
    assert refused.value.argument == "workdir"
    other.kill()
    other.wait()
    assert directory.holder() is None
    before = time.monotonic()
    held = directory.lock(stale=600)
    assert time.monotonic() - before < 1
    assert not held.lost
    held.release()
    assert directory.holder() is None


def test_a_run_of_another_machine_is_had_when_it_is_stale(tmp_path, processes):
    """The holder is killed, so it says nothing; this machine's lock of the kernel's tells nothing of it."""
    directory = RunDirectory(tmp_path)
    other = holding(processes, tmp_path / ".lease")
    with pytest.raises(InUse, match=f"process {other.pid} on elsewhere"):
        directory.lock(stale=STALE)
    other.kill()
    other.wait()
    assert directory.holder().host == "elsewhere"  # it may be running, for all that this machine knows
    before = time.monotonic()
    held = directory.lock(stale=STALE, timeout=10 * STALE)
    assert 0.5 * STALE < time.monotonic() - before < 3 * STALE
    held.release()
    directory.lock(stale=600).release()  # a lease that was released is free at once


@pytest.mark.slow
def test_a_holder_that_lives_keeps_its_lease(tmp_path, processes):
    """However long another one waits for it, and though the other one is less patient."""
    directory = RunDirectory(tmp_path)
    other = holding(processes, tmp_path / ".lease")
    before = time.monotonic()
    with pytest.raises(InUse):
        directory.lock(stale=STALE / 100, timeout=5 * STALE)
    assert time.monotonic() - before > 5 * STALE
    with pytest.raises(InUse):
        directory.lock(stale=STALE)
    assert other.poll() is None
    assert list(json.loads((tmp_path / ".lease" / "1").read_text())) == [
        *("owner", "host", "machine", "process", "since", "stale", "beat")
    ]


def test_what_is_known_to_live_is_refused_without_watching(tmp_path, processes):
    holding(processes, tmp_path / ".lease", stale=4 * STALE)
    directory = RunDirectory(tmp_path)
    with pytest.raises(InUse):
        directory.lock()
    before = time.monotonic()
    with pytest.raises(InUse):
        directory.lock()
    assert time.monotonic() - before < 0.5 * STALE  # a renewal comes every STALE


def test_a_holder_that_has_ended_is_gone_even_if_nobody_has_asked_how_it_ended():
    holder = subprocess.Popen(["sleep", "60"])
    fields = {"machine": lease.machine(socket.gethostname()), "process": holder.pid}
    found = lease.Found(None, json.dumps(fields).encode())
    assert not lease.is_gone(found)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert lease.is_gone(found)
    holder.wait()
    assert lease.is_gone(found)


def test_a_holder_that_was_frozen_learns_that_its_lease_is_lost(tmp_path, processes):
    """And does not overwrite the lease of its successor when it wakes up."""
    other = holding(processes, tmp_path / "lease")
    other.send_signal(19)  # SIGSTOP
    held = lease.hold(lease.Folder(tmp_path / "lease"), stale=STALE, timeout=60)
    other.send_signal(18)  # SIGCONT
    assert other.stdout.readline() == "lost\n"
    time.sleep(STALE)
    assert not held.lost
    held.release()
    assert held.lost is False


def test_a_holder_that_could_not_renew_asks_again_before_it_writes(tmp_path):
    """Though it may be a while until its thread tries the next time."""

    class Failing(lease.Folder):
        is_down = False

        def renew(self, content, version):
            if self.is_down:
                raise OSError("no network")
            return super().renew(content, version)

    place = Failing(tmp_path)
    held = lease.hold(place, stale=STALE)
    place.is_down = True
    time.sleep(STALE)
    assert not held.lost  # for all that it knows
    assert lease.Folder(tmp_path).take(b"successor", 1) == 2
    place.is_down = False
    assert held.lost
    held.release()
    assert place.read() == (2, b"successor")


@pytest.mark.slow
def test_one_of_several_takes_a_stale_lease(tmp_path, processes):
    place = tmp_path / "lease"
    other = holding(processes, place)
    other.kill()
    other.wait()
    start = time.time() + 3
    racers = [processes.start(RACES, place, STALE, start, number) for number in range(4)]
    said = sorted(racer.communicate()[0] for racer in racers)
    assert said.count("won\nkept\n") == 1, said
    assert sum("is held by process" in words for words in said) == 3, said


def test_a_lease_that_can_not_be_read_is_watched_like_any_other(tmp_path):
    (tmp_path / ".lease").mkdir()
    (tmp_path / ".lease" / "7").write_text("{half of a le")
    directory = RunDirectory(tmp_path)
    assert directory.holder() is None
    before = time.monotonic()
    directory.lock(stale=STALE).release()
    assert time.monotonic() - before > STALE
    assert [path.name for path in (tmp_path / ".lease").iterdir()] == ["8"]


def test_a_late_watcher_does_not_take_a_later_lease(tmp_path):
    """It found lease 1 stale, and was so slow that others have taken over, released and taken again."""
    place = lease.Folder(tmp_path)
    assert place.take(b"first", None) == 1
    assert place.take(b"second", 1) == 2
    assert place.take(b"third", 2) == 3
    assert place.take(b"late", 1) is None
    assert place.take(b"late", None) is None
    assert place.renew(b"first again", 1) is None
    assert place.read() == (3, b"third")
    assert place.renew(b"THIRD", 3) == 3
    assert place.read() == (3, b"THIRD")
