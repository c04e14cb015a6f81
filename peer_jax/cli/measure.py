"""The commands that say what a run or a layer takes: `plan` and `bench`."""

from pathlib import Path
from typing import Annotated

import typer

from peer_jax import startup
from peer_jax.cli.app import (
    Bindings,
    Configs,
    Imports,
    app,
    keep_off_accelerators,
    load,
)


@app.command()
def plan(
    config: Configs,
    device: Annotated[str, typer.Option(metavar="NAME", help="tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, h100 or h200.")],
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=SIZE,...",
            help="Sizes of data, fsdp and expert; an axis that isn't named has its size in the config.",
        ),
    ] = None,
    set_: Bindings = [],  # noqa: B006
    import_: Imports = [],  # noqa: B006
    devices: Annotated[
        int | None, typer.Option(help="How many devices there are: by default as many as the mesh names.", min=1)
    ] = None,
) -> None:
    """Count what a run holds and exchanges on a mesh of devices, and how fast a step can be at best, without them.

    Prints the least memory that each device needs (its state exactly), the bytes that it receives from other devices
    per step by cause, and the least time that FLOPs, state and interconnect take (docs/sharding.md has the formulas).
    Nothing is allocated or compiled: a mesh of hundreds of devices is planned on a laptop. `peer-jax compile` tells
    what a step takes at its peak. Sharding.tables="columns" splits the expert tables the other way.

    Example: peer-jax plan --config configs/base.gin --config configs/layers/peer.gin --config configs/sizes/paper.gin
    --config configs/data/c4.gin --mesh data=8,expert=8 --device tpu-v5p --set Transformer.remat=True
    """
    run = load(config, set_, import_)
    keep_off_accelerators()
    from peer_jax.planning import capacity
    from peer_jax.planning.capacity_table import show

    on = capacity.device(device)
    planned = capacity.plan(run, capacity.parse_mesh(mesh), devices)
    show(planned, device, on, run.batch_size * run.task.seq_len, devices or 0)


@app.command()
def bench(
    what: Annotated[
        str, typer.Argument(metavar="op|layer|step", help="What to time: ops, whole layers, or a training step.")
    ],
    only: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="The name of an op or a layer, such as expert_mix or PEER; repeatable."),
    ] = [],  # noqa: B006
    tokens: Annotated[
        list[int], typer.Option(metavar="T", help="Number of tokens; this option and the next four are repeatable.")
    ] = [],  # noqa: B006
    d_model: Annotated[list[int], typer.Option(metavar="d", help="Width of the model.")] = [],  # noqa: B006
    num_experts: Annotated[list[int], typer.Option(metavar="N", help="Number of experts or values, a square.")] = [],  # noqa: B006
    heads: Annotated[list[int], typer.Option(metavar="h", help="Number of retrieval heads.")] = [],  # noqa: B006
    top_k: Annotated[list[int], typer.Option(metavar="k", help="Experts retrieved per head.")] = [],  # noqa: B006
    implementation: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="An implementation of the ops, such as 'reference' or 'xla'; repeatable."),
    ] = [],  # noqa: B006
    table_updates: Annotated[
        list[str],
        typer.Option(metavar="all|touched", help="How a step updates tables, as AdamW.table_updates; repeatable."),
    ] = [],  # noqa: B006
    touched_share: Annotated[
        float, typer.Option(metavar="SHARE", help="Room for touched rows, as AdamW.touched_share.")
    ] = 1.0,
    import_: Imports = [],  # noqa: B006
    dtype: Annotated[
        str, typer.Option(help="Type of tokens and computation: float32, bfloat16 or float16.")
    ] = "float32",
    table_dtype: Annotated[
        str, typer.Option(help="Type of the expert tables (for `layer`: of all parameters).")
    ] = "float32",
    against: Annotated[
        str | None, typer.Option(metavar="pytorch", help="Compare with PEER-pytorch, which is given the same weights.")
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Number of samples per competitor; their median and quartiles are shown.")
    ] = 5,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder that gets the JSON file and a figure per table.")
    ] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Measure one small size, to see whether it runs.")] = False,
) -> None:
    """Time ops, layers or training steps, with their memory and the share of their floor that they reach.

    The floor is the time that the fewest bytes and FLOPs take at the rates that this machine is measured to have
    (docs/performance.md). All combinations of the sizes are measured; competitors take turns.

    Example: peer-jax bench op --only expert_mix --tokens 2048 --d-model 256 --num-experts 262144 --heads 8
    """
    startup.prepare(keep_programs=False)  # a program that is read back doesn't tell its memory
    startup.check_devices()
    from peer_jax import config as configs
    from peer_jax.bench import Options, report, run

    options = Options(
        what=what,
        only=only,
        tokens=tokens,
        d_model=d_model,
        num_experts=num_experts,
        heads=heads,
        top_k=top_k,
        dtype=dtype,
        table_dtype=table_dtype,
        implementation=implementation,
        table_updates=table_updates,
        touched_share=touched_share,
        against=against,
        repeats=repeats,
        quick=quick,
        layers=configs.layers_of(import_),
    )
    report.make_folder(out)
    result = run(options, on_row=lambda row: typer.echo(report.line(row), err=True))
    report.show(result)
    for path in report.write(result, out):
        typer.echo(str(path))
