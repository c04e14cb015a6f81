"""What is to be launched: a command on a number of slices, with what the engine needs, checked together."""

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from peer_jax.errors import InputError
from peer_jax.planning.tpus import TpuSlice, tpu_slice

GPUS = ("h100", "h200")
RETRIES = 100  # restarts after preemption are the normal case, not the exception
GRACE = 300  # seconds from the signal to save until the end of a job's time
_NAME = 40  # characters; Kubernetes adds to the name, and allows 63


@dataclasses.dataclass(frozen=True)
class Engine:
    """What starts jobs.

    Attributes:
        client: the program that submits them.
        needs: names of options that must be given.
        takes: names of the further options that may be.
        gpus, tpus: whether it starts jobs on them here.
        shares_folders: whether its hosts share a file system, and so a folder can be the workdir.
    """

    client: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    gpus: bool = False
    tpus: bool = True
    shares_folders: bool = False


ENGINES = {
    "slurm": Engine(
        "sbatch",
        (),
        ("accelerator", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "queue", "account", "time"),
        gpus=True,
        tpus=False,
        shares_folders=True,
    ),
    "gke": Engine("kubectl", ("accelerator", "image"), ("queue", "service_account", "spot")),
    "tpu-vm": Engine("gcloud", ("accelerator", "image", "project", "zone"), ("service_account", "spot")),
    "skypilot": Engine("sky", ("accelerator", "image"), ("nodes", "gpus_per_node", "zone", "spot"), gpus=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A ``peer-jax`` command on one or more slices. An option that is None, 0 or False is not given.

    Args:
        engine: a key of ``ENGINES``.
        command: what follows ``peer-jax``: train or sweep, and its flags.
        workdir: the value of its ``--workdir``.
        files: its config files.
        slices: how many slices run it.
        accelerator: a TPU slice such as v5p-32, or h100 or h200.
        name: of the jobs; by default made of the workdir's last part.
        image: of containers.
        nodes, tasks_per_node, cpus_per_task, gpus_per_node: hosts of a slice, processes of a host, cores of a process,
            and GPUs of a host; TPU slices have their own.
        queue: Slurm's partition, or Kueue's local queue.
        account: Slurm's.
        time: the longest that a job may take, as Slurm writes it.
        project, zone: of Google Cloud.
        service_account: that may read and write the bucket: its e-mail, or its name in Kubernetes.
        spot: on machines that may be taken away.
        retries: how often a slice is started again.
        cache: the address of prepared text. Slurm's jobs have the environment that they are submitted from instead.

    Raises:
        InputError: if the options don't fit one another or the engine.
    """

    engine: str
    command: Sequence[str]
    workdir: str
    files: Sequence[Path] = ()
    slices: int = 1
    accelerator: str | None = None
    name: str | None = None
    image: str | None = None
    nodes: int | None = None
    tasks_per_node: int | None = None
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    queue: str | None = None
    account: str | None = None
    time: str | None = None
    project: str | None = None
    zone: str | None = None
    service_account: str | None = None
    spot: bool = False
    retries: int = RETRIES
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"{self.engine} is not one of {', '.join(ENGINES)}", argument="on")
        for name in ("slices", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{value} is not at least 1", argument=name)
        if self.retries < 0:
            raise InputError(f"{self.retries} is not at least 0", argument="retries")
        self._check_options()
        self._check_accelerator()
        self._check_command()
        if self.time is not None:
            minutes(self.time)
        if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", self.job_name) or len(self.job_name) > _NAME:
            raise InputError(
                f"{self.job_name} can't be the name of a job: give at most {_NAME} of a-z, 0-9 and -, a letter first",
                argument="name",
            )

    @property
    def _engine(self) -> Engine:
        return ENGINES[self.engine]

    def _check_options(self) -> None:
        """Raises InputError for an option that the engine lacks or does not take."""
        engine = self._engine
        for name in engine.needs:
            if not getattr(self, name):
                example = " such as v5p-32" * (name == "accelerator")
                raise InputError(f"is not given, which {self.engine} needs: name it{example}", argument=name)
        options = {name for other in ENGINES.values() for name in (*other.needs, *other.takes)}
        taken = (*engine.needs, *engine.takes)
        for name in sorted(options - set(taken)):
            if getattr(self, name):
                flags = ", ".join(f"--{option.replace('_', '-')}" for option in taken)
                raise InputError(f"is not for {self.engine}, which takes {flags}", argument=name)

    def _check_accelerator(self) -> None:
        """Raises InputError if there is no such accelerator, or the engine has none such."""
        if self.accelerator in GPUS:
            if not self._engine.gpus:
                raise InputError(
                    f"{self.accelerator} is for slurm and skypilot: give {self.engine} a TPU slice such as v5p-32",
                    argument="accelerator",
                )
            if self.gpus_per_node is None:
                raise InputError(f"is not given: how many {self.accelerator} has a node?", argument="gpus_per_node")
        elif self.accelerator is not None:
            if not self._engine.tpus:
                raise InputError(
                    f"{self.accelerator} is not one of {', '.join(GPUS)}, which {self.engine} may have",
                    argument="accelerator",
                )
            tpu_slice(self.accelerator)
            for name in ("nodes", "gpus_per_node"):
                if getattr(self, name) is not None:
                    raise InputError(f"is for GPUs: {self.accelerator} says how many hosts it has", argument=name)

    def _check_command(self) -> None:
        """Raises InputError if the hosts that get the command can't do it."""
        if broken := [word for word in self.command if "\n" in word]:
            raise InputError(f"{broken[0]!r} has a line break, which a job's files can't hold: write it in one line")
        if self.command[0] == "train" and self.slices > 1:
            raise InputError(
                f"{self.slices} slices can't share the one run of train: launch a sweep, or one larger slice",
                argument="slices",
            )
        if self._engine.shares_folders:
            return
        if "://" not in self.workdir:
            raise InputError(
                f"{self.workdir} is a folder, and hosts of {self.engine} share none: give a bucket, such as "
                f"gs://BUCKET/{Path(self.workdir).name}",
                argument="workdir",
            )
        for file in self.files:
            if file.is_absolute() or ".." in file.parts:
                raise InputError(
                    f"{file} is not in the image, which has the files of the repository: give its path relative to the "
                    "repository's root, from there",
                    argument="config",
                )

    @property
    def job_name(self) -> str:
        """The name of the jobs."""
        if self.name is not None:
            return self.name
        last = self.workdir.rstrip("/").rpartition("/")[2].lower()
        return re.sub(r"[^a-z0-9]+", "-", f"peer-jax-{last}").strip("-")[:_NAME].rstrip("-")

    @property
    def tpu(self) -> TpuSlice | None:
        """The TPU slice; None where there are GPUs or CPUs."""
        return None if self.accelerator is None or self.accelerator in GPUS else tpu_slice(self.accelerator)

    @property
    def hosts(self) -> int:
        """How many hosts a slice has."""
        return self.tpu.hosts if self.tpu else self.nodes or 1

    @property
    def device(self) -> str | None:
        """The name of its devices in ``capacity.DEVICES``; None if it isn't known."""
        return self.tpu.device if self.tpu else self.accelerator

    @property
    def devices(self) -> int:
        """How many devices a slice has."""
        return self.tpu.chips if self.tpu else self.hosts * (self.gpus_per_node or 1)

    @property
    def slice_name(self) -> str:
        """What a slice is, in words."""
        shown = f"{self.hosts} node{'s' * (self.hosts > 1)} of {self.gpus_per_node} {self.accelerator}"
        return f"a {self.tpu.name}" if self.tpu else shown

    @property
    def signal_seconds(self) -> int:
        """How long before the end of its time a job is told to save."""
        return GRACE if self.time is None else max(1, min(GRACE, 60 * minutes(self.time) // 4))

    def shell(self, *flags: str) -> str:
        """The command without ``peer-jax``, and with some flags, as a shell reads it."""
        return shlex.join([*self.command, *flags])


def minutes(time: str) -> int:
    """The minutes of a time limit as Slurm writes it: MIN, MIN:SEC, H:MIN:SEC, D-H, D-H:MIN or D-H:MIN:SEC.

    Raises:
        InputError: if it is not of one of these forms.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        raise InputError(
            f"{time} is not a time such as 4:00:00 (hours:minutes:seconds) or 2-12 (days-hours)", argument="time"
        )
    days, *parts = found.groups()
    given = [int(part) for part in parts if part is not None]
    scale = (60, 1, 0) if days is not None or len(given) == 3 else (1, 0)
    total = 24 * 60 * int(days or 0) + sum(part * unit for part, unit in zip(given, scale, strict=False))
    if total < 1:
        raise InputError(f"{time} is less than a minute", argument="time")
    return total
