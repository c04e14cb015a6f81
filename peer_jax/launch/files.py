"""The files that start a job and the commands that submit them, made from the templates beside this file."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from peer_jax.errors import InputError
from peer_jax.launch.job import ENGINES, Job

COPIES = "/root/.cache/peer_jax"  # in the image: copies of prepared text, which a slice that starts again finds there
PORT = 8482  # of process 0, where Cloud TPUs have it
SLURM, JOBSETS, SKYPILOT = "slurm.sh", "jobsets.yaml", "skypilot.yaml"
STARTUP, QUEUED = "startup.sh", "slices.sh"
TEMPLATES = {"slurm": (SLURM,), "gke": (JOBSETS,), "tpu-vm": (QUEUED, STARTUP), "skypilot": (SKYPILOT,)}


class Launch(NamedTuple):
    """Files by their names, and the commands to give in their folder."""

    client: str
    files: dict[str, str]
    commands: list[list[str]]


def emit(job: Job) -> Launch:
    """The files and commands of a job."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["sh"] = lambda value: shlex.quote(str(value))
    # Where the hosts find one another by Cloud TPU's metadata, JAX looks for them itself.
    joins = ("--distributed",) if job.engine in ("tpu-vm", "skypilot") and job.tpu and job.hosts > 1 else ()
    values = {
        "job": job,
        "command": job.shell(*joins),
        "arguments": [*job.command, *joins],
        "folder": Path.cwd(),
        "port": PORT,
        "copies": COPIES,
        "docker": _docker(job.cache),
        "registry": _registry(job.image or ""),
    }
    files = {name: templates.get_template(f"{name}.jinja").render(values) for name in TEMPLATES[job.engine]}
    commands = {
        "slurm": [["sbatch", SLURM]],
        "gke": [["kubectl", "apply", "-f", JOBSETS]],
        "tpu-vm": [["bash", QUEUED, "create"]],
        "skypilot": [
            ["sky", "jobs", "launch", "--yes", "--detach-run", "--name", f"{job.job_name}-{number}", SKYPILOT]
            for number in range(job.slices)
        ],
    }
    return Launch(ENGINES[job.engine].client, files, commands[job.engine])


def write(launch: Launch, folder: Path) -> None:
    """Writes the files into a folder, which is made if it isn't there.

    Raises:
        InputError: if they can't be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in launch.files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise InputError(
            f"{folder} can't be written to ({error.strerror}): name another folder", argument="out"
        ) from error


def check_client(launch: Launch) -> None:
    """Raises InputError if the program that submits isn't installed."""
    if shutil.which(launch.client) is None:
        raise InputError(
            f"needs {launch.client}, which is not on the PATH of this machine: install it, or write the files by --out "
            "and submit them elsewhere",
            argument="submit",
        )


def submit(launch: Launch, folder: Path) -> list[str]:
    """Gives the commands, in the folder of the files, and returns what each has printed.

    Raises:
        InputError: if the client is missing, or refuses one; those before it are submitted.
    """
    check_client(launch)
    printed = []
    for command in launch.commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or "it said nothing"
            after = f", after {len(printed)} were submitted" if printed else ""
            raise InputError(f"`{shlex.join(command)}` has failed with status {done.returncode}{after}: {said[:600]}")
        printed.append(done.stdout.strip())
    return printed


def lines(commands: Sequence[Sequence[str]], folder: Path | None) -> list[str]:
    """The commands as a person types them, with the files in that folder or else in the current one."""
    into = f"cd {shlex.quote(str(folder))} && " if folder is not None else ""
    return [f"({into}{shlex.join(command)})" if into else shlex.join(command) for command in commands]


def _docker(cache: str | None) -> str:
    """What tells a container of docker where prepared text is."""
    shared = f" --env {shlex.quote(f'PEER_JAX_CACHE={cache}')}" if cache else ""
    return f"--volume /var/peer-jax:{COPIES}{shared}"


def _registry(image: str) -> str:
    """The host of an image in Google's registries, which ask for credentials; else nothing."""
    host = image.partition("/")[0]
    return host if re.fullmatch(r"[\w.-]*(gcr\.io|-docker\.pkg\.dev)", host) else ""
