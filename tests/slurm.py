"""A real Slurm on this machine for a test: munged, slurmctld and slurmd with ports and folders of their own."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from hosts import free_port
from small_runs import environment

NEEDS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm", "munged": "munge"}
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,requeue_delay=1
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=600
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing():
    """Why Slurm can't be started here; nothing if it can."""
    lacking = [package for program, package in NEEDS.items() if program_path(program) is None]
    if lacking:
        return f"Debian's {' and '.join(dict.fromkeys(lacking))} not installed: see scripts/services.sh"
    return "" if os.geteuid() == 0 else "starting Slurm's daemons takes root"


def program_path(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class DoesNotStart(Exception):  # noqa: N818, it names what is so
    """A daemon has ended, or was not ready in time."""


class Slurm:
    """A controller and a node, until ``stop``. ``variables`` are for clients."""

    def __init__(self, folder):
        self._folder, self._daemons, self._started = Path(folder), [], False
        self._user = pwd.getpwuid(os.geteuid()).pw_name
        for name in ("state", "spool"):
            (self._folder / name).mkdir()
        config = self._folder / "slurm.conf"
        config.write_text(
            CONFIG.format(
                folder=self._folder,
                host=socket.gethostname().partition(".")[0],
                controller=free_port(),
                node=free_port(),
                user=self._user,
            )
        )
        self.variables = {"SLURM_CONF": str(config)}
        try:
            self._begin(config)
        except BaseException:
            self.stop()
            raise

    @classmethod
    def or_skip(cls, folder):
        """A Slurm; the test is skipped where a daemon ends by itself, or none of its nodes is idle, within 30 seconds.

        A configuration that Slurm can't read fails the test, and so does all that goes wrong once a node is idle.
        """
        try:
            return cls(folder)
        except DoesNotStart as error:
            if "arsing error" in str(error):
                raise
            pytest.skip(f"Slurm is installed, but does not start here: {error}")

    def _begin(self, config):
        key, munge_socket = self._folder / "munge.key", self._folder / "munge.socket"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        flags = [f"--{name}-file={self._folder}/munge.{name}" for name in ("pid", "log", "seed", "key")]
        self._start("munged", "--foreground", "--force", f"--socket={munge_socket}", *flags)
        self._wait(munge_socket.exists, "munged has no socket")
        for daemon in ("slurmctld", "slurmd"):
            self._start(daemon, "-D", "-f", str(config))
        self._wait(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%t", check=False), "no node is idle")
        self._started = True

    def _start(self, program, *arguments):
        with open(self._folder / f"{program}.out", "w") as output:
            daemon = subprocess.Popen(
                [program_path(program), *arguments],
                env=environment(**self.variables),
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
            )
        self._daemons.append(daemon)

    def _wait(self, condition, otherwise):
        until = time.monotonic() + 30
        while not condition():
            if time.monotonic() > until or any(daemon.poll() is not None for daemon in self._daemons):
                logs = "\n".join(path.read_text()[-1500:] for path in sorted(self._folder.glob("*.out")))
                raise DoesNotStart(f"{otherwise}\n{logs}")
            time.sleep(0.1)

    def run(self, *command, check=True):
        """What a client of Slurm prints."""
        done = subprocess.run(command, env=environment(**self.variables), capture_output=True, text=True)
        assert not check or done.returncode == 0, (command, done.stderr)
        return done.stdout

    def states(self, job):
        """The state of each job of an array."""
        listed = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%K %T")
        return dict(line.split() for line in listed.splitlines())

    def job(self, array, number):
        """The job's own id, by the number of its array and its number in it."""
        listed = self.run("squeue", "--noheader", "--array", "--states=all", f"--jobs={array}", "--format=%K %A")
        return dict(line.split() for line in listed.splitlines())[str(number)]

    def logs(self):
        """The ends of what the daemons have written."""
        return "\n".join(path.read_text()[-3000:] for path in sorted(self._folder.glob("*.log")))

    def stop(self):
        """Cancels all jobs and ends the daemons."""
        if self._started:
            self.run("scancel", "--full", "--signal=KILL", f"--user={self._user}", check=False)
            self.run("scancel", f"--user={self._user}", check=False)
            with contextlib.suppress(DoesNotStart):
                self._wait(lambda: not self.run("squeue", "--noheader", check=False), "jobs have not ended")
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
