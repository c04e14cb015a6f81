"""The command, the options that several of its commands have, and how they begin."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer_jax import cluster, startup, supervisor

if TYPE_CHECKING:
    from peer_jax.run_directory import RunDirectory
    from peer_jax.training.run import Run

NAME = "peer-jax"
app = typer.Typer(
    name=NAME,
    help="Train and compare decoder-only language models with dense, MoE, PKM and PEER layers.",
    epilog="A first run: peer-jax train --config configs/base.gin --config configs/layers/peer.gin --config "
    "configs/sizes/tiny.gin --config configs/data/python_stdlib.gin --set Run.steps=300 --workdir runs/peer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Configs = Annotated[
    list[Path],
    typer.Option("--config", metavar="FILE", help="A gin file; repeat the option to stack base, layer, size and data."),
]
Bindings = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A gin binding that overrides the files, such as PEER.top_k=8; repeatable."
    ),
]
Imports = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        help="A Python module, such as my_package.my_layers, whose classes and functions the config may name; "
        "repeatable.",
    ),
]
Workdir = Annotated[
    str, typer.Option("--workdir", metavar="DIR", help="The directory of the run: a folder, or an address gs://...")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
WhichCheckpoint = Annotated[
    str, typer.Option("--checkpoint", help="Which checkpoint: 'last', 'best' (the lowest validation loss) or a step.")
]

Coordinator = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Address of process 0, if a run has several processes.")
]
NumProcesses = Annotated[int | None, typer.Option(help="How many processes a run has.", min=1)]
ProcessId = Annotated[int | None, typer.Option(help="The number of this process, from 0.")]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Join the cluster that JAX finds. Under Slurm, Open MPI and on GKE's TPUs no flag is needed.",
    ),
]
StartTimeout = Annotated[
    int, typer.Option(metavar="SECONDS", help="How long processes wait for one another when they start.", min=1)
]
HeartbeatTimeout = Annotated[
    int, typer.Option(metavar="SECONDS", help="A process that is silent for so long has died.", min=1)
]
ShutdownTimeout = Annotated[
    int, typer.Option(metavar="SECONDS", help="How long processes wait for one another when they end.", min=1)
]


def load(files: Sequence[str | Path], bindings: Sequence[str], imports: Sequence[str]) -> "Run":
    """The run of a command's configs."""
    startup.prepare()
    from peer_jax import config

    return config.load(files, bindings, imports)


def begun_with(directories: "Sequence[RunDirectory]") -> dict[str, Any]:
    """The earlier defaults that the first begun run of some directories has and keeps, which is said."""
    from peer_jax import config, processes

    for directory in directories:
        if (kept := directory.read_config()) is not None:
            before = config.begun_with(kept)
            if before and processes.leads():
                shown = ", ".join(f"{name} = {value!r}" for name, value in before.items())
                typer.echo(f"{directory} is of an earlier version, and goes on as it began: {shown}", err=True)
            return before
    return {}


def kept_config(workdir: str, argument: str = "workdir") -> os.PathLike:
    """The config of a run directory, which the flag of ``argument`` names."""
    from peer_jax.run_directory import RunDirectory

    return RunDirectory(workdir).kept_config(argument)


def join(place: cluster.Place | None, from_cluster: bool, timeouts: cluster.Timeouts, workdir: str) -> None:
    """Joins the other processes of a run or a sweep, if there are any, and starts JAX's devices."""
    if place is not None and place.num_processes > 1:
        supervisor.supervise(place, timeouts)  # goes on in a child, which may import JAX
    startup.prepare(workdir=workdir)
    from peer_jax import processes

    processes.start(place, from_cluster=from_cluster, timeouts=timeouts)
    startup.check_devices()
    if processes.leads():
        warn_if_far(workdir)


def warn_if_far(workdir: str) -> None:
    """Says if a bucket is in another region than this machine."""
    from peer_jax import region

    if warning := region.far_away(workdir):
        typer.echo(warning, err=True)


def keep_off_accelerators() -> None:
    """Keeps JAX in this process on the CPU: it only plans or compiles, and others may need the devices' memory."""
    import jax

    jax.config.update("jax_platforms", "cpu")
