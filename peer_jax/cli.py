"""The command line: the only file that knows it. Nothing heavy is imported before a command needs it."""

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from peer_jax.allocator import keep_freed_memory
from peer_jax.errors import InputError, Interrupted, TrainingFailed

app = typer.Typer(
    name="peer-jax",
    help="Train and compare decoder-only language models with dense, MoE, PKM and PEER layers.",
    epilog="A first run: peer-jax train --config configs/base.gin --config configs/layers/peer.gin --config "
    "configs/sizes/tiny.gin --config configs/data/python_stdlib.gin --set Run.steps=300 --workdir runs/peer",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Configs = Annotated[
    list[Path],
    typer.Option("--config", metavar="FILE", help="A gin file; repeat to stack base, layer, size, data."),
]
Bindings = Annotated[
    list[str],
    typer.Option("--set", metavar="NAME=VALUE", help="A gin binding over the files, such as PEER.top_k=8."),
]
Workdir = Annotated[Path, typer.Option("--workdir", metavar="DIR", help="The run directory.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
WhichCheckpoint = Annotated[str, typer.Option("--checkpoint", help="'last', 'best' (by validation loss) or a step.")]


@app.command()
def prepare(config: Configs, set_: Bindings = [], quiet: Quiet = False) -> None:  # noqa: B006, typer copies it
    """Tokenise and pack the config's text into the cache that training reads. `train` does it when it is missing."""
    run = _load(config, set_)
    from peer_jax.data.pipeline import ensure_prepared

    for task in (run.task, *run.eval_tasks):
        typer.echo(f"{ensure_prepared(task, progress=not quiet)}")


@app.command()
def train(
    config: Configs,
    workdir: Workdir,
    set_: Bindings = [],  # noqa: B006
    quiet: Quiet = False,
    show_table: Annotated[bool, typer.Option("--table/--no-table", help="Print the result as a table.")] = True,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of several processes: where the first one listens.")
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="Of several processes: how many.", min=1)] = None,
    process_id: Annotated[int | None, typer.Option(help="Of several processes: which one this is, from 0.")] = None,
    distributed: Annotated[
        bool,
        typer.Option(
            "--distributed", help="Join the cluster that JAX finds; Slurm, Open MPI, GKE's TPUs need no flag."
        ),
    ] = False,
) -> None:
    """Train, or go on from the last checkpoint in DIR, and evaluate. The same command resumes a run that was stopped.

    DIR gets config.gin, metrics.jsonl, tensorboard/, checkpoints/ and result.json. All devices take part, as
    Sharding.data, fsdp, expert and tables in the config say; of several processes each runs this command, with the same
    DIR on a file system that all share.
    """
    _prepare_process()
    from peer_jax import processes

    processes.start(coordinator, num_processes, process_id, from_cluster=distributed)
    run = _load(config, set_)
    from peer_jax.training.loop import train as train_run

    train_run(run, workdir, progress=not quiet)
    if show_table and processes.leads():
        from peer_jax.analysis import results
        from peer_jax.analysis.report import table

        table(results.read([workdir]))


@app.command()
def evaluate(
    workdir: Workdir,
    data: Annotated[
        list[Path], typer.Option("--data", metavar="FILE", help="A gin file of other text to evaluate on; repeatable.")
    ] = [],  # noqa: B006
    set_: Bindings = [],  # noqa: B006
    checkpoint: WhichCheckpoint = "last",
    batch_size: Annotated[int | None, typer.Option(help="Rows at a time; as the run has it.", min=1)] = None,
    quiet: Quiet = False,
) -> None:
    """Evaluate a trained run on the validation text of its own task, or of each --data, and add it to result.json."""
    _prepare_process()
    from peer_jax import config as configs
    from peer_jax.training.restore import evaluate_run

    runs = [configs.load(_with(workdir, [file]), set_) for file in data] or [configs.load(_with(workdir), set_)]
    step, evaluations = evaluate_run(runs, workdir, checkpoint=checkpoint, batch_size=batch_size, progress=not quiet)
    from peer_jax.analysis.report import evaluation_table

    evaluation_table(step, evaluations)


@app.command()
def generate(
    workdir: Workdir,
    prompt: Annotated[str, typer.Option(help="Text to continue; may be empty.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add at most.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token each time.", min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the samples.", min=0, max=2**32 - 1)] = 0,
    checkpoint: WhichCheckpoint = "last",
) -> None:
    """Continue a prompt with a trained run."""
    _prepare_process()
    from peer_jax import config as configs
    from peer_jax.training.restore import continue_text

    run = configs.load(_with(workdir))
    text = continue_text(
        run, workdir, prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, checkpoint=checkpoint
    )
    typer.echo(prompt + text)


@app.command()
def sweep(
    config: Configs,
    workdir: Annotated[Path | None, typer.Option("--workdir", metavar="DIR", help="Gets a directory a run.")] = None,
    set_: Bindings = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their cost, and stop.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Measure some steps, for the time in --dry-run's table.")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(help="Runs at a time: by default one a GPU, one on a TPU, else one a core.", min=1)
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Train the runs of a sweep, those that are not finished, and write results.csv; `peer-jax report DIR` draws them.

    The config is one of configs/sweeps. --set Sweep.NAME=VALUE changes the sweep, such as 'Sweep.seeds=(0,1,2)'; any
    other --set goes to all of its runs. Ctrl-C saves what is running, and the same command goes on. A run that fails
    doesn't stop the others; the exit status is 1 then. Several sweep processes may share DIR.
    """
    if workdir is None and not dry_run:
        raise InputError("--workdir is not given: name the directory that gets the runs, or --dry-run")
    _prepare_process()
    _keep_off_accelerators()
    from peer_jax import config as configs
    from peer_jax.sweeps import plan, runner
    from peer_jax.sweeps.board import plan_table
    from peer_jax.sweeps.sweep import expand
    from peer_jax.sweeps.workers import default_workers

    described, of_runs = configs.load_sweep(config, set_)
    points = expand(described, config[0].parent, of_runs)
    planned = plan.plan(points, load_run)
    workers = workers or default_workers()
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="peer_jax-") as folder:
            log = Path(folder, "log")
            measured = runner.measure(planned, log, load=load_run, workers=workers) if estimate else ({}, {})
        plan_table(planned, *measured, workers)
        for note in plan.check(described, planned):
            typer.echo(note)
        return
    runner.prepare_corpora(planned, progress=not quiet)
    planned = plan.plan(points, load_run) if not all(run.is_prepared for run in planned) else planned
    for note in plan.check(described, planned):
        typer.echo(note, err=True)
    plan.kept_configs_agree(planned, workdir)
    runner.run_sweep(described, planned, workdir, load=load_run, workers=workers, progress=not quiet)
    typer.echo(f"{workdir / 'results.csv'} has a row for each of {len(planned)} runs: peer-jax report {workdir}")


@app.command()
def plan(
    config: Configs,
    device: Annotated[str, typer.Option(metavar="NAME", help="tpu-v5p, tpu-v6e, h100 or h200.")],
    mesh: Annotated[
        str | None,
        typer.Option(metavar="AXIS=SIZE,...", help="Of data, fsdp and expert; what isn't named is as in the config."),
    ] = None,
    set_: Bindings = [],  # noqa: B006
    devices: Annotated[
        int | None, typer.Option(help="How many there are: by default as many as the mesh names.", min=1)
    ] = None,
) -> None:
    """Say whether a run fits a mesh of devices, and how fast a step can be at best, without any of them.

    Prints the memory of a device, the bytes that it receives from others in a step by cause, and the least time that
    FLOPs, memory traffic and interconnect take (docs/sharding.md has the formulas). Nothing is allocated: a mesh of
    hundreds of devices is planned on a laptop. Sharding.tables="columns" splits the expert tables the other way.

    Example: peer-jax plan --config configs/base.gin --config configs/layers/peer.gin --config configs/sizes/paper.gin
    --config configs/data/c4.gin --mesh data=8,expert=8 --device tpu-v5p --set Transformer.remat=True
    """
    run = _load(config, set_)
    _keep_off_accelerators()
    from peer_jax.planning import capacity
    from peer_jax.planning.capacity_table import show

    on = capacity.device(device)
    planned = capacity.plan(run, capacity.parse_mesh(mesh), devices)
    show(planned, device, on, run.batch_size * run.task.seq_len, devices or 0)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Sweeps or runs, or folders of them; several are merged.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes: the first DIR by default.")
    ] = None,
) -> None:
    """Print tables of finished runs, and draw them: report.html, figures/ and results.csv.

    IsoFLOP curves with their minima, the optimum against compute, what a method saves, ablations, training curves,
    usage of experts. It needs nothing but the directories.
    """
    from peer_jax.analysis import isoflop, results
    from peer_jax.analysis.report import minima_table, table, write_report

    rows = results.read(directories)
    table(rows)
    analysis = isoflop.analyse(rows)
    minima_table(analysis)
    typer.echo(f"The report is {write_report(analysis, directories, out or directories[0])}")


@app.command()
def bench(
    what: Annotated[str, typer.Argument(metavar="op|layer|step", help="An op, a whole layer, or a training step.")],
    only: Annotated[
        list[str], typer.Option(metavar="NAME", help="An op or a layer, such as expert_mix or PEER; repeatable.")
    ] = [],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(metavar="T", help="Tokens; this and the next are repeatable.")] = [],  # noqa: B006
    d_model: Annotated[list[int], typer.Option(metavar="d", help="Width.")] = [],  # noqa: B006
    num_experts: Annotated[list[int], typer.Option(metavar="N", help="Experts or values, a square.")] = [],  # noqa: B006
    heads: Annotated[list[int], typer.Option(metavar="h", help="Heads of the retrieval.")] = [],  # noqa: B006
    top_k: Annotated[list[int], typer.Option(metavar="k", help="Experts retrieved a head.")] = [],  # noqa: B006
    implementation: Annotated[
        list[str], typer.Option(metavar="NAME", help="'reference', 'xla' or another of the ops; repeatable.")
    ] = [],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="Of tokens and computation: float32, bfloat16 or float16.")] = "float32",
    table_dtype: Annotated[str, typer.Option(help="Of the tables; of all parameters of a layer.")] = "float32",
    against: Annotated[
        str | None, typer.Option(metavar="pytorch", help="Compare with PEER-pytorch, given the same weights.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Samples, of which the median and quartiles are shown.")] = 5,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Gets the JSON file and a figure a table.")] = Path(
        "runs/bench"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="One small size: see whether it runs.")] = False,
) -> None:
    """Time ops, layers or training steps, with their memory and the share of their floor that they reach.

    The floor is the time of the fewest bytes and FLOPs at the rates that this machine is measured to have
    (docs/performance.md). All combinations of the sizes are measured, competitors in turn.

    Example: peer-jax bench op --only expert_mix --tokens 2048 --d-model 256 --num-experts 262144 --heads 8
    """
    _prepare_process(keep_programs=False)  # a program that is read back doesn't tell its memory
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
        against=against,
        repeats=repeats,
        quick=quick,
    )
    report.make_folder(out)
    result = run(options, on_row=lambda row: typer.echo(report.line(row), err=True))
    report.show(result)
    for path in report.write(result, out):
        typer.echo(str(path))


@app.command()
def sentencepiece(
    config: Configs,
    model: Annotated[Path, typer.Option("--model", metavar="FILE", help="Where it goes, such as data/my.model.")],
    vocab_size: Annotated[int, typer.Option(help="Pieces.", min=16)] = 8192,
    set_: Bindings = [],  # noqa: B006
) -> None:
    """Train a SentencePiece model on the config's training text; then set TextTask.vocabulary to its path."""
    run = _load(config, set_)
    from peer_jax.data.tasks import train_sentencepiece

    typer.echo(train_sentencepiece(run.task.corpus, model, vocab_size=vocab_size))


def _load(files: Sequence[str | Path], bindings: Sequence[str]):
    return load_run(files, bindings)[0]


def load_run(files: Sequence[str | Path], bindings: Sequence[str]):
    """A run, and the function that tells its config's text once it is built; workers of a sweep call it, too."""
    _prepare_process()
    from peer_jax import config as configs

    return configs.load(files, bindings), configs.text


def _with(workdir: Path, files: list[Path] = []) -> list[Path]:  # noqa: B006, never changed
    """The config of a run, and files on top."""
    kept = workdir / "config.gin"
    if not kept.is_file():
        raise InputError(f"--workdir {workdir} has no config.gin: give the directory of a run made by `peer-jax train`")
    return [kept, *files]


def _prepare_process(*, keep_programs: bool = True) -> None:
    """Before JAX is imported: quiet libraries, and no returning of memory to the system after every step."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    keep_freed_memory()
    if keep_programs:
        _keep_programs()


def _keep_programs() -> None:
    """Has JAX keep compiled programs on disk: a run of the same shapes, or one that goes on, starts in a second."""
    root = Path(os.environ.get("PEER_JAX_CACHE") or "~/.cache/peer_jax").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "programs"))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))  # bytes; the oldest go first


def _keep_off_accelerators() -> None:
    """This process plans a sweep and its workers have the devices, whose memory a second process would take."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def main() -> None:
    """Runs a command; bad input is one sentence on standard error and exit status 2."""
    try:
        app()
    except InputError as error:
        _exit(error, 2)
    except TrainingFailed as error:
        _exit(error, 1)
    except Interrupted as stopped:
        _exit(stopped, 128 + stopped.signal_number)


def _exit(error: Exception, status: int) -> None:
    message = " ".join(str(error).split("\n  In call to configurable")[0].split())
    print(f"peer-jax: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        from peer_jax import processes

        processes.leave(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
