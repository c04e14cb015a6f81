"""The command that looks inside the experts of a run."""

from pathlib import Path
from typing import Annotated

import typer

from peer_jax import startup
from peer_jax.cli.app import Bindings, Quiet, WhichCheckpoint, Workdir, app, kept_config


@app.command()
def analyse(
    workdir: Workdir,
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            help="A gin file that names other text to look at beside the run's own; repeatable.",
        ),
    ] = [],  # noqa: B006, typer copies it
    set_: Bindings = [],  # noqa: B006
    tokens: Annotated[
        int,
        typer.Option(
            help="About how many tokens to look at, of all texts together. Few tokens show little of many experts. "
            "Each takes 8 bytes of memory for each expert that it retrieves in each block.",
            min=1,
        ),
    ] = 2**15,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Where the page goes: the directory of the run by default."),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate/--no-ablate", help="Also run the model with its layers changed, which takes most of the time."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of all samples and permutations.", min=0, max=2**32 - 1)] = 0,
    checkpoint: WhichCheckpoint = "last",
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per batch; by default as many as the run evaluates with.", min=1)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Look inside the experts of a trained run: usage, specialisation, similarity, ablations, a page for each of some.

    Writes analysis.html, which needs no other file, and its figures and tables into the folder analysis beside it. It
    answers with numbers whether experts are for domains, tokens or positions, whether the statements of "A Closer Look
    into Mixture-of-Experts" hold, and what the layer is good for. Any layer that routes will do; layers that tell less
    of themselves get fewer answers, and one that has experts but does not route is zeroed and no more
    (docs/analysis.md). It runs on one device.

    Example: peer-jax analyse --workdir runs/peer --data configs/data/python_packages.gin --tokens 65536
    """
    startup.prepare()
    startup.check_devices()
    from peer_jax import config as configs
    from peer_jax.analysis.experts import look_into, write
    from peer_jax.run_directory import RunDirectory
    from peer_jax.storage import place

    directory, kept = RunDirectory(workdir), kept_config(workdir)
    runs = [configs.load_kept(kept, bindings=set_), *(configs.load_kept(kept, [file], set_) for file in data)]
    step, found = look_into(
        runs,
        workdir,
        checkpoint=checkpoint,
        tokens=tokens,
        batch_size=batch_size,
        seed=seed,
        ablate=ablate,
        progress=not quiet,
    )
    page = write(found, f"{directory.name}, step {step}", directory.path if out is None else place(out, "out"))
    for one in found.statements:
        typer.echo(f"{one.claim}: {one.verdict}")
    for of in found.blocks:
        for one in of.specialisation:
            typer.echo(f"Block {of.trace.block}: {one.sentence}")
    for of in found.unrouted:
        typer.echo(f"Block {of.block}: {of.sentence}")
    typer.echo(f"The page is {page}")
