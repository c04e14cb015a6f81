"""The command line: the only file that knows it. Nothing heavy is imported before a command needs it."""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer_jax import cluster, startup, supervisor
from peer_jax.errors import InputError, Interrupted, TrainingFailed

if TYPE_CHECKING:
    from peer_jax.launch.job import Job
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


@app.command()
def prepare(
    config: Configs,
    set_: Bindings = [],  # noqa: B006, typer copies it
    import_: Imports = [],  # noqa: B006
    quiet: Quiet = False,
) -> None:
    """Tokenise and pack the config's text into the cache that training reads. `train` does it if it is missing."""
    run = _load(config, set_, import_)
    from peer_jax.data.pipeline import ensure_prepared

    for task in (run.task, *run.eval_tasks):
        typer.echo(f"{ensure_prepared(task, progress=not quiet)}")


@app.command()
def train(
    config: Configs,
    workdir: Workdir,
    set_: Bindings = [],  # noqa: B006
    import_: Imports = [],  # noqa: B006
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

    DIR gets config.gin, metrics.jsonl, tensorboard/, checkpoints/ and result.json. All devices take part, as
    Sharding.data, fsdp, expert and tables in the config say. If the run has several processes, each runs this command
    with the same DIR on a file system that all share.
    """
    place = cluster.find(coordinator, num_processes, process_id)
    _join(place, distributed, cluster.Timeouts(start_timeout, heartbeat_timeout, shutdown_timeout), workdir)
    from peer_jax import config as configs
    from peer_jax import processes
    from peer_jax.run_directory import RunDirectory

    run = configs.load(config, set_, import_, before=_begun_with([RunDirectory(workdir)]))
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

    kept = _kept(workdir)
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

    run = configs.load_kept(_kept(workdir))
    text = continue_text(
        run, workdir, prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, checkpoint=checkpoint
    )
    typer.echo(prompt + text)


@app.command()
def sweep(
    config: Configs = [],  # noqa: B006
    workdir: Annotated[
        str | None,
        typer.Option("--workdir", metavar="DIR", help="The directory, or address gs://..., of the runs."),
    ] = None,
    set_: Bindings = [],  # noqa: B006
    import_: Imports = [],  # noqa: B006
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and their cost, and train nothing.")
    ] = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate/--no-estimate", help="With --dry-run, measure some steps, to tell the time that each run takes."
        ),
    ] = True,
    list_: Annotated[
        bool, typer.Option("--list", help="Print the runs in DIR and how far they are, and train nothing.")
    ] = False,
    run: Annotated[str | None, typer.Option("--run", metavar="NAME", help="Train only the run of this name.")] = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            envvar="PEER_JAX_SHARD",
            help="Train only a share of the runs: number I, from 0, of N shares. What launchers start sets the "
            "variable.",
        ),
    ] = "0/1",
    stale: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="A run whose process on another machine has been silent for so long is taken over.",
            min=0.1,
        ),
    ] = 60.0,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs at a time: by default one per GPU, one on a TPU host, else one per core.", min=1),
    ] = None,
    quiet: Quiet = False,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    distributed: Distributed = False,
    start_timeout: StartTimeout = cluster.Timeouts.start,
    heartbeat_timeout: HeartbeatTimeout = cluster.Timeouts.heartbeat,
    shutdown_timeout: ShutdownTimeout = cluster.Timeouts.shutdown,
) -> None:
    """Train the runs of a sweep that are not finished, and write results.csv; `peer-jax report DIR` draws them.

    The config is a file of configs/sweeps or one like it. --set Sweep.NAME=VALUE changes the sweep, such as
    'Sweep.seeds=(0,1,2)'; every other --set goes to all of its runs. Ctrl-C saves the runs that are being trained, and
    the same command goes on with them. A run that fails doesn't stop the others; the exit status is 1 then.

    Worker processes train several runs at a time. If several processes are started together, as for `train`, they
    train one run after another on all of their devices instead. Any number of sweep commands may share DIR, each on
    machines of its own: no run is trained by two of them, and a run whose command has died is taken over.
    """
    if workdir is None and not dry_run:
        raise InputError("is not given: name the directory that gets the runs, or --dry-run", argument="workdir")
    if list_:
        from peer_jax.run_directory import SweepDirectory
        from peer_jax.sweeps import listing

        typer.echo("\n".join(listing.lines(listing.listed(SweepDirectory(workdir)))))
        return
    if not config:
        raise InputError("is not given: name a file of configs/sweeps or one like it", argument="config")
    place = None if dry_run else cluster.find(coordinator, num_processes, process_id)
    is_slice = place is not None or (distributed and not dry_run)
    if is_slice:
        if workers is not None:
            raise InputError(
                f"{workers} is for one machine, but these processes train each run together: leave it out",
                argument="workers",
            )
        _join(place, distributed, cluster.Timeouts(start_timeout, heartbeat_timeout, shutdown_timeout), workdir)
    else:
        startup.prepare(workdir=workdir)
        startup.check_devices_of_workers()
        _keep_off_accelerators()
    from peer_jax import processes
    from peer_jax.sweeps import slices

    if is_slice and not processes.leads():
        slices.follow()
        return
    with slices.leading() if is_slice else contextlib.nullcontext():
        from peer_jax import config as configs
        from peer_jax.run_directory import SweepDirectory
        from peer_jax.storage import make_folder
        from peer_jax.sweeps import plan, runner
        from peer_jax.sweeps.board import plan_table
        from peer_jax.sweeps.chosen import chosen, parse_shard
        from peer_jax.sweeps.sweep import expand
        from peer_jax.sweeps.workers import Workers, default_workers, memory_of_worker

        share = parse_shard(shard)
        described, of_runs, imports = configs.load_sweep(config, set_, import_)
        points = expand(described, config[0].parent, of_runs, imports)
        begun = [] if workdir is None else [SweepDirectory(workdir).run(point.name) for point in points]
        load = functools.partial(configs.load, before=_begun_with(begun))
        planned = plan.plan(points, load)
        workers = workers or default_workers()
        memory = slices.memory_of_slice() if is_slice else memory_of_worker()
        if dry_run:
            here = chosen(planned, share, run)
            notes = plan.check(described, planned)
            measured = runner.measure(here, load=load, workers=workers) if estimate else ({}, {})
            plan_table(here, *measured, workers)
            for note in notes:
                typer.echo(note)
            plan.check_room(here, memory)
            return
        directory = SweepDirectory(workdir)
        here = chosen(planned, share, run)
        plan.check_room([run for run in here if not directory.run(run.point.name).has_result], memory)
        make_folder(directory.path, "workdir")
        runner.prepare_corpora(planned, progress=not quiet)
        planned = plan.plan(points, load) if not all(run.is_prepared for run in planned) else planned
        here = chosen(planned, share, run)
        for note in plan.check(described, planned):
            typer.echo(note, err=True)
        plan.check_begun_runs(here, directory)
        if is_slice:
            trainers = slices.Slice(load, runner.retry_seconds(stale))
        else:
            trainers = Workers(load, workers, directory.worker_log)
        runner.run_sweep(described, planned, directory, trainers, chosen=here, stale=stale, progress=not quiet)
    typer.echo(f"{directory.results} has a row for each of {len(here)} runs: peer-jax report {workdir}")


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
    """Say whether a run fits a mesh of devices, and how fast a step can be at best, without any of them.

    Prints the memory that each device needs, the bytes that it receives from other devices per step by cause, and the
    least time that FLOPs, memory traffic and interconnect take (docs/sharding.md has the formulas). Nothing is
    allocated: a mesh of hundreds of devices is planned on a laptop. Sharding.tables="columns" splits the expert tables
    the other way.

    Example: peer-jax plan --config configs/base.gin --config configs/layers/peer.gin --config configs/sizes/paper.gin
    --config configs/data/c4.gin --mesh data=8,expert=8 --device tpu-v5p --set Transformer.remat=True
    """
    run = _load(config, set_, import_)
    _keep_off_accelerators()
    from peer_jax.planning import capacity
    from peer_jax.planning.capacity_table import show

    on = capacity.device(device)
    planned = capacity.plan(run, capacity.parse_mesh(mesh), devices)
    show(planned, device, on, run.batch_size * run.task.seq_len, devices or 0)


@app.command()
def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Sweeps or runs, or folders of them; several are merged.")
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the report goes: the first DIR by default.")
    ] = None,
) -> None:
    """Print tables of finished runs, and draw them: report.html, figures/ and results.csv.

    The report has isoFLOP curves with their minima, the optimum against compute, the compute that each method saves,
    ablations, training curves and the usage of experts. It needs nothing but the directories.
    """
    from peer_jax.analysis import isoflop, results
    from peer_jax.analysis.report import minima_table, table, write_report
    from peer_jax.storage import place

    paths = [place(directory) for directory in directories]
    target = place(out, "out") if out is not None else paths[0]
    rows = results.read(paths)
    analysis = isoflop.analyse(rows)
    page = write_report(analysis, paths, target)
    table(rows)
    minima_table(analysis)
    typer.echo(f"The report is {page}")


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
    run = _load(config, set_, import_)
    from peer_jax.data.tasks import train_sentencepiece

    typer.echo(train_sentencepiece(run.task.corpus, model, vocab_size=vocab_size))


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
    retries: Annotated[int, typer.Option(help="How often a slice may be started again.")] = 100,
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
    """The address of prepared text in a bucket. This process forgets it, since planning would copy all of that text."""
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
    for flag in ("coordinator", "num_processes", "process_id", "distributed", "dry_run", "list_"):
        if parameters.get(flag) not in (None, False):
            raise InputError("can't be launched: leave it out", argument=flag.rstrip("_"))
    return parameters


def _check_launch(job: "Job", parameters: dict[str, Any]) -> list[str]:
    """Makes the runs that are to be launched, without memory for them, and says what they need and cost.

    Raises:
        InputError: if a run can't be made, or does not fit a slice.
    """
    startup.prepare()
    _keep_off_accelerators()
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


def _load(files: Sequence[str | Path], bindings: Sequence[str], imports: Sequence[str]) -> "Run":
    """The run of a command's configs."""
    startup.prepare()
    from peer_jax import config

    return config.load(files, bindings, imports)


def _begun_with(directories: "Sequence[RunDirectory]") -> dict[str, Any]:
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


def _kept(workdir: str) -> os.PathLike:
    """The config of a run directory."""
    from peer_jax.run_directory import RunDirectory

    kept = RunDirectory(workdir).config
    if not kept.is_file():
        raise InputError(
            f"{workdir} has no config.gin: give the directory of a run made by `peer-jax train`", argument="workdir"
        )
    return kept


def _join(place: cluster.Place | None, from_cluster: bool, timeouts: cluster.Timeouts, workdir: str) -> None:
    """Joins the other processes of a run or a sweep, if there are any, and starts JAX's devices."""
    if place is not None and place.num_processes > 1:
        supervisor.supervise(place, timeouts)  # goes on in a child, which may import JAX
    startup.prepare(workdir=workdir)
    from peer_jax import processes

    processes.start(place, from_cluster=from_cluster, timeouts=timeouts)
    startup.check_devices()


def _keep_off_accelerators() -> None:
    """This process plans a sweep and its workers have the devices, whose memory a second process would take."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def main() -> None:
    """Runs a command; bad input is one sentence on standard error and exit status 2."""
    try:
        if status := app(prog_name=NAME, standalone_mode=False):
            sys.exit(status)
    except typer.Abort:
        sys.exit(1)
    except USAGE_ERROR as error:
        _exit_usage(error)
    except InputError as error:
        _exit(error, 2)
    except TrainingFailed as error:
        _exit(error, 1)
    except Interrupted as stopped:
        _exit(stopped, 128 + stopped.signal_number)
    except Exception as error:
        if (reason := startup.fault_of_a_bucket(error)) is not None:
            _exit(InputError(f"a bucket can't be used any more ({reason}): check the connection and your rights"), 2)
        if not supervisor.is_supervised():
            raise
        traceback.print_exc()
        os._exit(1)  # its parent knows whether the cause is another process, and shows the traceback if it is not


# Typer has or brings Click, where these are the base classes of the one error that Typer names.
USAGE_ERROR = typer.BadParameter.__mro__[1]


def _exit_usage(error: Exception) -> None:
    """What the command line itself refuses, such as an option that doesn't exist; help where nothing was given."""
    if not sys.argv[1:]:
        error.show()
        sys.exit(2)
    message = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx is not None else NAME
    option = getattr(error, "param", None)
    given = " ".join(_values(option.opts)) if option is not None else ""
    shown = f" ({option.opts[0]} {given[:80]})" if given and given not in message else ""
    _exit(InputError(f"{message[0].lower()}{message[1:]}{shown}: see {command} --help"), 2)


def _values(names: Sequence[str]) -> list[str]:
    """The values that the command line gives an option."""
    pairs = zip(sys.argv[1:], [*sys.argv[2:], ""], strict=True)
    both = [*((a, b) for a, b in pairs), *(tuple(a.split("=", 1)) for a in sys.argv[1:] if "=" in a)]
    return [value for name, value in both if name in names and value]


def _exit(error: Exception, status: int) -> None:
    message = " ".join(str(error).split())
    if argument := getattr(error, "argument", None):
        message = f"--{argument.replace('_', '-')} {message}"
    print(f"peer-jax: {message}", file=sys.stderr)
    if "jax" in sys.modules:
        from peer_jax import processes

        processes.leave(status)
    sys.exit(status)
