"""The commands of a single run."""

from pathlib import Path
from typing import Annotated

import typer

from peer_jax import cluster, startup
from peer_jax.cli.app import (
    Bindings,
    Configs,
    Coordinator,
    Distributed,
    HeartbeatTimeout,
    Imports,
    NumProcesses,
    ProcessId,
    Quiet,
    ShutdownTimeout,
    StartTimeout,
    WhichCheckpoint,
    Workdir,
    app,
    begun_with,
    join,
    kept_config,
    load,
)
from peer_jax.errors import InputError


@app.command()
def prepare(
    config: Configs,
    set_: Bindings = [],  # noqa: B006, typer copies it
    import_: Imports = [],  # noqa: B006
    quiet: Quiet = False,
) -> None:
    """Tokenise and pack the config's text into the cache that training reads. `train` does it if it is missing."""
    run = load(config, set_, import_)
    from peer_jax.data.pipeline import ensure_prepared

    for task in (run.task, *run.eval_tasks):
        typer.echo(f"{ensure_prepared(task, progress=not quiet)}")


@app.command()
def train(
    workdir: Workdir,
    config: Configs = [],  # noqa: B006
    set_: Bindings = [],  # noqa: B006
    import_: Imports = [],  # noqa: B006
    grow: Annotated[
        int | None, typer.Option(metavar="N", help="Begin with the run of --from, and give it N experts.", min=1)
    ] = None,
    from_: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="The run to grow; its config comes before --config.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint", help="Where to grow the run of --from: 'last', 'best' or a step.", show_default="last"
        ),
    ] = None,
    quiet: Quiet = False,
    show_table: Annotated[bool, typer.Option("--table/--no-table", help="Print the result as a table.")] = True,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    distributed: Distributed = False,
    start_timeout: StartTimeout = cluster.Timeouts.start,
    heartbeat_timeout: HeartbeatTimeout = cluster.Timeouts.heartbeat,
    shutdown_timeout: ShutdownTimeout = cluster.Timeouts.shutdown,
) -> None:
    """Train, or go on from the last checkpoint in DIR, and evaluate. The same command resumes a run that was stopped.

    With --grow, a new run begins where another one was, and with more experts (docs/growing.md).

    DIR gets config.gin, metrics.jsonl, tensorboard/, checkpoints/ and result.json. All devices take part, as
    Sharding.data, fsdp, expert and tables in the config say. If the run has several processes, each runs this command
    with the same DIR on a file system that all share.
    """
    if (grow is None) != (from_ is None):
        raise InputError("--grow N and --from DIR belong together: give both, or none")
    if checkpoint is not None and grow is None:
        raise InputError(
            f"--checkpoint {checkpoint} is for --grow: leave it out, a run goes on from its last checkpoint"
        )
    if not config and grow is None:
        raise InputError("is missing: give the files of a run, such as configs/base.gin", argument="config")
    place = cluster.find(coordinator, num_processes, process_id)
    join(place, distributed, cluster.Timeouts(start_timeout, heartbeat_timeout, shutdown_timeout), workdir)
    from peer_jax import config as configs
    from peer_jax import processes
    from peer_jax.run_directory import RunDirectory

    if grow is None:
        run = configs.load(config, set_, import_, before=begun_with([RunDirectory(workdir)]))
    else:
        begun = RunDirectory(workdir).read_config() is not None
        kept = kept_config(workdir) if begun else kept_config(from_, "from")
        run = configs.load_grown(kept, from_, grow, checkpoint or "last", config, set_, import_)
    from peer_jax.training.loop import train as train_run

    train_run(run, workdir, progress=not quiet)
    if show_table and processes.leads():
        from peer_jax import storage
        from peer_jax.analysis import results
        from peer_jax.analysis.report import table

        table(results.read([storage.place(workdir)]))


@app.command()
def evaluate(
    workdir: Workdir,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="A gin file that names other text to evaluate on; repeatable."),
    ] = [],  # noqa: B006
    set_: Bindings = [],  # noqa: B006
    checkpoint: WhichCheckpoint = "last",
    batch_size: Annotated[
        int | None, typer.Option(help="Rows per batch; by default as many as the run evaluates with.", min=1)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a trained run on the validation text of its own task, or of each --data, and add that to result.json."""
    startup.prepare()
    startup.check_devices()
    from peer_jax import config as configs
    from peer_jax.training.restore import evaluate_run

    kept = kept_config(workdir)
    runs = [configs.load_kept(kept, [file], set_) for file in data] or [configs.load_kept(kept, bindings=set_)]
    step, evaluations = evaluate_run(runs, workdir, checkpoint=checkpoint, batch_size=batch_size, progress=not quiet)
    from peer_jax.analysis.report import evaluation_table

    evaluation_table(step, evaluations)


@app.command()
def generate(
    workdir: Workdir,
    prompt: Annotated[str, typer.Option(help="Text to continue; may be empty.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="The largest number of tokens to add.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.", min=0)] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens whose probabilities add up to this.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the samples.", min=0, max=2**32 - 1)] = 0,
    checkpoint: WhichCheckpoint = "last",
) -> None:
    """Continue a prompt with a trained run."""
    startup.prepare()
    startup.check_devices()
    from peer_jax import config as configs
    from peer_jax.training.restore import continue_text

    run = configs.load_kept(kept_config(workdir))
    text = continue_text(
        run, workdir, prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, checkpoint=checkpoint
    )
    typer.echo(prompt + text)


@app.command()
def sentencepiece(
    config: Configs,
    model: Annotated[
        Path, typer.Option("--model", metavar="FILE", help="The file that gets the model, such as data/my.model.")
    ],
    vocab_size: Annotated[int, typer.Option(help="Number of pieces.", min=16)] = 8192,
    set_: Bindings = [],  # noqa: B006
    import_: Imports = [],  # noqa: B006
) -> None:
    """Train a SentencePiece model on the config's training text; then set TextTask.vocabulary to its path."""
    run = load(config, set_, import_)
    from peer_jax.data.pipeline import TextTask
    from peer_jax.data.tasks import train_sentencepiece

    if not isinstance(run.task, TextTask):
        raise InputError(f"{run.task.corpus.name} is no text to train a vocabulary on: give the config of a text")
    typer.echo(train_sentencepiece(run.task.corpus, model, vocab_size=vocab_size))
