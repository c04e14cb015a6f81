"""The command `compile`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from peer_jax import startup
from peer_jax.cli.app import Bindings, Configs, Imports, app, keep_off_accelerators
from peer_jax.errors import InputError


@app.command()
def compile(
    config: Configs,
    topology: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="TPUs and their shape in chips, such as v5p:2x2x2 or v6e:8x8; or GPUs, such as h100:8."
        ),
    ],
    program: Annotated[
        str,
        typer.Option(
            metavar="step|evaluation|generation",
            help="A training step, a batch of an evaluation, or, on one device, a generated row.",
        ),
    ] = "step",
    set_: Bindings = [],  # noqa: B006
    import_: Imports = [],  # noqa: B006
    hlo: Annotated[
        Path | None, typer.Option("--hlo", metavar="FILE", help="Write the text of the compiled program to a file.")
    ] = None,
) -> None:
    """Compile a run for devices that this machine lacks, and say what it takes there by their own compiler.

    Prints the memory of each device, FLOPs and bytes, the compiler's estimate of the time, what the devices exchange,
    and loops. It takes minutes of a core. TPUs need the extra `compile` (libtpu); GPUs need JAX's wheels for CUDA 13.
    The mesh is that of the config: all devices must have a place in it.

    Example: peer-jax compile --config configs/base.gin --config configs/layers/peer.gin --config
    configs/sizes/paper.gin --config configs/data/c4.gin --topology v5p:2x2x2 --set
    Sharding.expert=8 --set Transformer.remat=True
    """
    startup.prepare(keep_programs=False)
    keep_off_accelerators()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)  # a program that is read back doesn't tell its memory
    from peer_jax import config as configs
    from peer_jax.planning.compiled import compile_run
    from peer_jax.planning.compiled_table import show
    from peer_jax.planning.topology import topology as topology_of

    devices = topology_of(topology)
    if hlo is not None and (hlo.is_dir() or not os.access(hlo if hlo.exists() else hlo.parent, os.W_OK)):
        raise InputError(f"{hlo} can't be written: name a file in a folder that can be", argument="hlo")
    compiled = compile_run(configs.load(config, set_, import_), devices, program)
    show(compiled, devices)
    if hlo is not None:
        hlo.write_text(compiled.text)
