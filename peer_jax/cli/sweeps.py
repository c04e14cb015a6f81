"""The commands of sweeps: training their runs, and the report."""

import functools
from collections.abc import Callable, Sequence
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
    app,
    begun_with,
    join,
    keep_off_accelerators,
    warn_if_far,
)
from peer_jax.errors import InputError


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
    if is_slice and workers is not None:
        raise InputError(
            f"{workers} is for one machine, but these processes train each run together: leave it out",
            argument="workers",
        )
    if is_slice:
        join(place, distributed, cluster.Timeouts(start_timeout, heartbeat_timeout, shutdown_timeout), workdir)
    else:
        startup.prepare(workdir=workdir)
        startup.check_devices_of_workers()
        keep_off_accelerators()
        if not dry_run:
            warn_if_far(workdir)
    planned = functools.partial(_Planned, config, set_, import_, workdir, shard, run)
    if dry_run:
        _dry_run(planned(), workers, estimate=estimate)
    elif not is_slice:
        _train(planned, workdir, workers, stale=stale, quiet=quiet)
    else:
        from peer_jax import processes
        from peer_jax.sweeps import slices

        if not processes.leads():
            slices.follow()
            return
        with slices.leading():
            _train(planned, workdir, None, stale=stale, quiet=quiet, is_slice=True)


class _Planned:
    """A sweep of the command line: its runs, and those of them that this command is to train."""

    def __init__(
        self,
        config: Sequence[Path],
        bindings: Sequence[str],
        imports: Sequence[str],
        workdir: str | None,
        shard: str,
        name: str | None,
    ) -> None:
        from peer_jax import config as configs
        from peer_jax.run_directory import SweepDirectory
        from peer_jax.sweeps.chosen import parse_shard
        from peer_jax.sweeps.sweep import expand

        self._share, self._name = parse_shard(shard), name
        self.sweep, of_runs, imports = configs.load_sweep(config, bindings, imports)
        self._points = expand(self.sweep, config[0].parent, of_runs, imports)
        begun = [] if workdir is None else [SweepDirectory(workdir).run(point.name) for point in self._points]
        self.load = functools.partial(configs.load, before=begun_with(begun))
        self.plan()

    def plan(self) -> None:
        """Plans the runs, once more when their text has been prepared."""
        from peer_jax.sweeps import plan
        from peer_jax.sweeps.chosen import chosen

        self.runs = plan.plan(self._points, self.load)
        self.chosen = chosen(self.runs, self._share, self._name)

    def notes(self) -> list[str]:
        """What is to be said of the sweep before it is trained."""
        from peer_jax.sweeps import plan

        return plan.check(self.sweep, self.runs)


def _dry_run(planned: _Planned, workers: int | None, *, estimate: bool) -> None:
    """Prints the runs, their cost and, if it is to be estimated, their time."""
    from peer_jax.sweeps import plan, runner
    from peer_jax.sweeps.board import plan_table
    from peer_jax.sweeps.workers import default_workers, memory_of_worker

    workers = workers or default_workers()
    notes = planned.notes()
    measured = runner.measure(planned.chosen, load=planned.load, workers=workers) if estimate else ({}, {})
    plan_table(planned.chosen, *measured, workers)
    for note in notes:
        typer.echo(note)
    plan.check_room(planned.chosen, memory_of_worker())


def _train(
    make: Callable[[], _Planned],
    workdir: str,
    workers: int | None,
    *,
    stale: float,
    quiet: bool,
    is_slice: bool = False,
) -> None:
    """Prepares the text of a sweep and trains the chosen runs, on workers or on the slice that this process leads."""
    from peer_jax.run_directory import SweepDirectory
    from peer_jax.storage import make_folder
    from peer_jax.sweeps import plan, runner, slices
    from peer_jax.sweeps.workers import Workers, default_workers, memory_of_worker

    planned, directory = make(), SweepDirectory(workdir)
    unfinished = [run for run in planned.chosen if not directory.run(run.point.name).has_result]
    plan.check_room(unfinished, slices.memory_of_slice() if is_slice else memory_of_worker())
    make_folder(directory.path, "workdir")
    runner.prepare_corpora(planned.runs, progress=not quiet)
    if not all(run.is_prepared for run in planned.runs):
        planned.plan()
    for note in planned.notes():
        typer.echo(note, err=True)
    plan.check_begun_runs(planned.chosen, directory)
    if is_slice:
        trainers = slices.Slice(planned.load, runner.retry_seconds(stale))
    else:
        trainers = Workers(planned.load, workers or default_workers(), directory.worker_log)
    runner.run_sweep(
        planned.sweep, planned.runs, directory, trainers, chosen=planned.chosen, stale=stale, progress=not quiet
    )
    typer.echo(f"{directory.results} has a row for each of {len(planned.chosen)} runs: peer-jax report {workdir}")


@app.command()
def report(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="Sweeps or runs, or folders of them, or a results.csv of them; several are merged, each run once.",
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the report goes: the first DIR by default.")
    ] = None,
) -> None:
    """Print tables of finished runs, and draw them: report.html, figures/ and results.csv.

    The report has isoFLOP curves with their minima, the optimum against compute, the compute that each method saves,
    ablations, training curves and the usage of experts. It says what can be claimed, from runs that are paired by size
    and seed. It needs nothing but the directories, or the results.csv that an earlier report or a sweep wrote: such a
    table has no training curves and no failures.
    """
    from peer_jax.analysis import isoflop, results
    from peer_jax.analysis.report import claims_table, minima_table, table, write_report
    from peer_jax.storage import place

    paths = [place(directory) for directory in directories]
    if out is None and results.is_table(paths[0]):
        raise InputError(f"is not given, and {paths[0]} is no folder: name one for the report", argument="out")
    target = place(out, "out") if out is not None else paths[0]
    rows = results.read(paths)
    analysis = isoflop.analyse(rows)
    page = write_report(analysis, paths, target)
    table(rows)
    minima_table(analysis)
    claims_table(analysis)
    typer.echo(f"The report is {page}")
