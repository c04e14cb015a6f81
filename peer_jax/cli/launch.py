"""The command `launch`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer_jax import startup
from peer_jax.cli.app import app, keep_off_accelerators
from peer_jax.errors import InputError

if TYPE_CHECKING:
    from peer_jax.launch.job import Job


@app.command(context_settings={"allow_interspersed_args": False})
def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="train|sweep FLAG...", help="The command that each slice runs, with its flags."),
    ],
    on: Annotated[str, typer.Option("--on", metavar="slurm|gke|tpu-vm|skypilot", help="What starts the jobs.")],
    slices: Annotated[
        int, typer.Option(help="How many slices share the runs of a sweep; with Slurm, jobs of an array.")
    ] = 1,
    accelerator: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What a slice is: a TPU slice such as v5p-32 or v6e-16, or h100 or h200."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the jobs; by default made of the workdir's last part.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="The image that hosts run, built from the Dockerfile.")] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes per slice, where it is not a TPU slice.")] = None,
    tasks_per_node: Annotated[
        int | None, typer.Option(help="Processes per node of Slurm: 1, with all GPUs, or one per GPU.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="Cores per process; Slurm gives it one by default.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs per node.")] = None,
    queue: Annotated[str | None, typer.Option(help="Slurm's partition, or Kueue's local queue.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    time: Annotated[
        str | None,
        typer.Option(metavar="H:MM:SS", help="Slurm's time limit; a job that reaches it goes on in another."),
    ] = None,
    project: Annotated[str | None, typer.Option(help="Google Cloud's project.")] = None,
    zone: Annotated[str | None, typer.Option(help="Google Cloud's zone, such as us-east5-a.")] = None,
    service_account: Annotated[
        str | None,
        typer.Option(
            help="Who reads and writes the bucket: a service account of Kubernetes, or an e-mail for TPU VMs."
        ),
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Take machines that are cheaper and may be preempted.")] = False,
    retries: Annotated[int, typer.Option(help="How often a slice may be started again; SkyPilot has no limit.")] = 100,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the files there instead of printing them.")
    ] = None,
    submit: Annotated[
        bool, typer.Option("--submit", help="Submit the jobs; without --out, the files go to runs/launch/NAME.")
    ] = False,
) -> None:
    """Check a run or a sweep against the slices it is to have, and print what starts it on a cluster.

    The files and commands are for the engine that is there, which starts the jobs and starts them again after a
    preemption. Every slice runs the same command on the same workdir, and slices share a sweep's runs between them.
    docs/clusters.md goes through it from nothing.

    Example: peer-jax launch --on gke --slices 8 --accelerator v5p-32 --image IMAGE sweep --config
    configs/sweeps/isoflop_paper.gin --set Transformer.remat=True --workdir gs://BUCKET/paper
    """
    parameters = _launched(command)
    from peer_jax.launch import files
    from peer_jax.launch.job import Job

    job = Job(
        engine=on,
        command=command,
        workdir=parameters["workdir"],
        files=parameters["config"],
        slices=slices,
        accelerator=accelerator,
        name=name,
        image=image,
        nodes=nodes,
        tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task,
        gpus_per_node=gpus_per_node,
        queue=queue,
        account=account,
        time=time,
        project=project,
        zone=zone,
        service_account=service_account,
        spot=spot,
        retries=retries,
        cache=_shared_cache(),
    )
    emitted = files.emit(job)
    if submit:
        files.check_client(emitted)
    for sentence in _check_launch(job, parameters):
        typer.echo(sentence, err=True)
    folder = out if out is not None else Path("runs/launch", job.job_name) if submit else None
    if folder is None:
        for file, text in emitted.files.items():
            typer.echo(f"# ==== {file}\n{text}")
    else:
        files.write(emitted, folder)
    if submit:
        for printed in files.submit(emitted, folder):
            typer.echo(printed)
    else:
        typer.echo("\n".join(files.lines(emitted.commands, folder)))


def _shared_cache() -> str | None:
    """The address of prepared text in a bucket. This process forgets it, since it may have no rights on the bucket."""
    cache = os.environ.get("PEER_JAX_CACHE", "")
    return os.environ.pop("PEER_JAX_CACHE") if "://" in cache else None


def _launched(command: Sequence[str]) -> dict[str, Any]:
    """The values of the flags of a command that is to be launched."""
    if command[0] not in ("train", "sweep"):
        raise InputError(f"{command[0]} can't be launched: give train or sweep, and then its flags")
    parameters = typer.main.get_command(app).commands[command[0]].make_context(command[0], list(command[1:])).params
    if not parameters["config"]:
        raise InputError("is not given to the launched command: name the files of its config", argument="config")
    if parameters["workdir"] is None:
        raise InputError(
            "is not given to the launched command: name the directory that all slices share", argument="workdir"
        )
    for flag in ("coordinator", "num_processes", "process_id", "distributed", "dry_run", "list_", "grow"):
        if parameters.get(flag) not in (None, False):
            raise InputError("can't be launched: leave it out", argument=flag.rstrip("_"))
    return parameters


def _check_launch(job: "Job", parameters: dict[str, Any]) -> list[str]:
    """Makes the runs that are to be launched, without memory for them, and says what they need and cost.

    Raises:
        InputError: if a run can't be made, or does not fit a slice.
    """
    startup.prepare()
    keep_off_accelerators()
    from peer_jax import config as configs
    from peer_jax.planning import cost
    from peer_jax.sweeps import plan
    from peer_jax.sweeps.sweep import expand

    files, bindings, imports = (parameters[name] for name in ("config", "set_", "import_"))
    notes, plans = [], {}
    if job.command[0] == "train":
        run = configs.load(files, bindings, imports)
        runs = [("the run", run.num_steps(run.trainer().abstract_model), "", files, bindings, imports)]
    else:
        described, of_runs, imports = configs.load_sweep(files, bindings, imports)
        planned = plan.plan(expand(described, files[0].parent, of_runs, imports), configs.load)
        notes = plan.check(described, planned)
        runs = [
            (run.point.name, run.steps, run.program, run.point.files, run.point.bindings, run.point.imports)
            for run in planned
        ]
    if job.cache is None and "://" in job.workdir:
        notes.append(
            "PEER_JAX_CACHE names no bucket, so each slice prepares the text for itself: set it, and prepare once."
        )
    if job.device is None:
        return [*notes, "Without --accelerator, memory and cost are not checked."]
    for name, _, program, *of_run in runs:
        if program not in plans:  # runs with the same program have the same plan
            plans[program] = cost.plan_on(name, configs.load(*of_run), job.devices)
    planned = [cost.Planned(name, steps, plans[program]) for name, steps, program, *_ in runs]
    costs = cost.cost(planned, job.device, job.devices, job.slice_name)
    return [*notes, *costs.sentences(job.slices, job.slice_name)]
