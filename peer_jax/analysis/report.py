"""Finished runs as a report, which is a page with figures and a table of rows, and as tables in the terminal."""

import base64
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from peer_jax.analysis import ablations, curves, reading, results, row_table, tables
from peer_jax.analysis.curvature import F_TEST_LEVEL
from peer_jax.analysis.isoflop import Analysis
from peer_jax.analysis.row import Row, unit
from peer_jax.analysis.series import MEASURES
from peer_jax.analysis.tables import Table
from peer_jax.run_directory import SweepDirectory, find_runs
from peer_jax.storage import AnyPath, make_folder, write_whole

REPORT = "report.html"
FIGURES = "figures"
# Columns that a terminal keeps on one line.
WHOLE = ("method", "series", "95% interval", "run", "answer")


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure in the page: the name of its file, what it shows, its SVG as a data URI, and its width in inches."""

    name: str
    alt: str
    uri: str
    width: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a sweep says about how its rates were chosen.

    Attributes:
        directory: the directory of the sweep.
        runs: the number of runs in the report that belong to the sweep.
        text: how the rates were chosen.
        rates: the bindings of each method.
        rules: how rates change with width.
    """

    directory: str
    runs: int
    text: str
    rates: Table
    rules: list[str]


def write_report(analysis: Analysis, directories: Sequence[AnyPath], out: AnyPath) -> AnyPath:
    """Writes the table of rows, the figures, and a page that needs no other file. Returns the path of the page.

    Args:
        analysis: the analysis of the runs in ``directories``.
        directories: where the runs were read from: directories, whose failed runs are listed with their reasons, and
            tables of rows.
        out: the folder of the report, which is made if it is missing. The same runs give the same bytes.

    Raises:
        InputError: if ``out`` can't be written to.
    """
    make_folder(out / FIGURES)
    row_table.write(analysis.rows, SweepDirectory(out).results)
    write_whole(out / REPORT, _page(analysis, directories, out))
    return out / REPORT


def _page(analysis: Analysis, directories: Sequence[AnyPath], out: AnyPath) -> str:
    """Draws the figures into their files, and returns the page."""
    from peer_jax.analysis import ablation_figures, figures, style

    failed = failures([path for path in directories if not results.is_table(path)])
    rows, looks = analysis.rows, style.looks(analysis)
    told, untold = tuning(rows)
    pictured = figures.in_picture(analysis)
    trained = curves.read(pictured)
    varied = ablations.find(rows)
    isoflop = {measure: figures.isoflop(analysis, measure, looks) for measure in MEASURES}
    optimum = figures.optimum(analysis, looks)
    equal = {measure: figures.frontier(analysis, measure, looks) for measure in ("seconds", "params_total")}

    draw = functools.partial(draw_into, out / FIGURES)

    return render(
        "report.html.jinja",
        rows=rows,
        summary=_summary(analysis, directories),
        tabled=_tabled(rows),
        claims=tables.claims(analysis),
        seconds=reading.seconds(rows),
        analysis=analysis,
        reading=reading.reading(analysis),
        isoflop=draw("isoflop_active", _alt(analysis), isoflop["params_active"]),
        isoflop_total=draw("isoflop_total", "Loss against all parameters.", isoflop["params_total"]),
        isoflop_tokens=draw("isoflop_tokens", "Loss against training tokens.", isoflop["tokens"]),
        isoflop_seconds=draw("isoflop_seconds", "Loss against seconds of training steps.", isoflop["seconds"]),
        equal_seconds=draw("equal_seconds", "Lowest loss within seconds.", equal["seconds"]),
        equal_parameters=draw("equal_parameters", "Lowest loss within parameters.", equal["params_total"]),
        optimum=draw("optimum", "Compute-optimal size, tokens and loss against FLOPs.", optimum),
        training=draw("training", "Smoothed training loss against FLOPs spent.", figures.training(trained, looks)),
        usage=draw("usage", "Usage and unevenness of experts.", figures.usage(rows, looks)),
        flops=draw("flops", "Shares of the forward FLOPs by part of the model.", figures.flops(rows, looks)),
        ablations=[
            (found, draw(f"ablation_{number}", f"Validation loss by {found.title}.", drawn), tables.ablation(found))
            for number, (found, drawn) in enumerate(
                ((found, ablation_figures.ablation(found, looks)) for found in varied), 1
            )
        ],
        tables={
            "points": tables.points(analysis),
            "minima": tables.minima(analysis),
            "unfitted": tables.unfitted(analysis),
            "comparisons": tables.comparisons(analysis),
            "paired": tables.paired(analysis),
            "equal_seconds": tables.at_equal_seconds(analysis),
            "equal_parameters": tables.at_equal_parameters(analysis),
            "laws": tables.laws(analysis),
            "surfaces": tables.surfaces(analysis),
            "training": tables.training([curve for curve in trained if curve.is_best]),
            "usage": tables.usage(rows),
            "query_norm": tables.query_norm(rows),
            "flops": tables.flops_split(figures.models(rows)),
            "runs": tables.runs(rows),
            "failures": failed,
        },
        against=f"Against {analysis.baselines[0]}" if len(analysis.baselines) == 1 else "Against the baseline",
        tuning=told,
        untold=untold,
        table_file=SweepDirectory(out).results.name,
        split=_split(rows),
        left_out=sorted({c.series for c in analysis.shown()} - {c.series for c in pictured}),
        most_bars=figures.MOST_BARS,
        level=f"{F_TEST_LEVEL:.0%}",
        without_law=reading.without((law.series, law.is_causal, law.reason) for law in analysis.laws),
        without_surface=reading.without((s.series, s.is_causal, s.reason) for s in analysis.surfaces),
        not_causal=sorted({row.method for row in rows if not row.is_causal}),
    )


def render(template: str, **values: Any) -> str:
    """A page of this package, made of values that are written as text and not as markup."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("peer_jax.analysis", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)


def draw_into(folder: AnyPath, name: str, alt: str, figure: Any) -> Drawing | None:
    """Writes a figure as SVG and PNG into a folder, and returns it for a page; None where there is no figure."""
    from peer_jax.analysis import style

    if figure is None:
        return None
    vector = style.svg(figure)
    for path, content in ((folder / f"{name}.svg", vector), (folder / f"{name}.png", style.png(figure))):
        write_whole(path, content)
    return Drawing(name, alt, "data:image/svg+xml;base64," + base64.b64encode(vector).decode(), figure.get_figwidth())


def _summary(analysis: Analysis, directories: Sequence[AnyPath]) -> str:
    rows = analysis.rows
    methods = sorted({reading.named(row.method, row.is_causal) for row in rows})
    budgets = [reading.budget(value) for value in analysis.budgets]
    devices = sorted({row.device for row in rows})
    return (
        f"{reading.count(len(rows), 'finished run')} from {reading.joined([str(path) for path in directories])}: "
        f"{reading.count(len(methods), 'method')} ({'; '.join(methods)}) at {reading.joined(budgets)} training FLOPs. "
        f"Trained and validated on {reading.joined(analysis.texts)}, on {reading.joined(devices)}; losses are in nats "
        f"per {analysis.unit}, on the validation split."
    )


def _tabled(rows: Sequence[Row]) -> str:
    """A sentence on the runs that were read from tables; empty if there are none."""
    found = [row for row in rows if row.table]
    if not found:
        return ""
    places = reading.joined(sorted({str(row.table) for row in found}))
    return (
        f"{reading.count(len(found), 'run was', 'runs were')} read from {places}. A table of rows has no training "
        "curves, no failed runs, and not how rates were chosen, so these are missing here."
    )


def _split(rows: Sequence[Row]) -> str:
    """A sentence on the share of the FLOPs that each part takes."""
    shares = defaultdict(list)
    for row in rows:
        for part, value in row.flops_by_part.items():
            shares[part].append(value / row.flops_per_token)
    found = [f"{part} {min(own):.0%} to {max(own):.0%}" for part, own in shares.items()]
    return f"Shares of the forward FLOPs, over the models that have the part: {reading.joined(found)}."


def _alt(analysis: Analysis) -> str:
    """Describes the first figure to readers who can't see it."""
    found = [
        f"{reading.named(curve.series, curve.is_causal)} {reading.loss(curve.fit.loss)} at "
        f"{reading.si(curve.fit.size)} for {reading.budget(curve.budget)} FLOPs"
        for curve in analysis.shown()
        if curve.has_minimum
    ]
    minima = f"Minima: {'; '.join(found)}." if found else "There are no minima."
    return f"Validation loss against active parameters. {minima}"


def tuning(rows: Sequence[Row]) -> tuple[list[Tuning], list[str]]:
    """What the sweeps of the runs say about their rates, and the names of the runs that belong to no sweep.

    Rows of tables are left out.
    """
    found, told = [], set()
    by_directory = defaultdict(set)
    rows = [row for row in rows if row.table is None]
    for row in rows:
        for place in row.places:
            by_directory[place.parent].add(place.name)
    for directory, names in sorted(by_directory.items()):
        for kept in SweepDirectory(directory).sweeps():
            if runs := names if kept["runs"] is None else names & set(kept["runs"]):
                found.append(_tuning(str(directory), len(runs), kept["sweep"]))
                told |= {directory / name for name in runs}
    return found, [row.run for row in rows if not told & set(row.places)]


def _tuning(directory: str, runs: int, sweep: Mapping[str, Any]) -> Tuning:
    methods = sweep.get("methods") or {}
    methods = methods if isinstance(methods, dict) else {method: {} for method in methods}
    names = sorted({name for own in methods.values() for name in own})
    cells = [[method, *(str(own.get(name, "-")) for name in names)] for method, own in methods.items()]
    rules = [
        f"{name} is multiplied by (d_model / {sweep.get('rates_at')})^{exponent}"
        for name, exponent in (sweep.get("rate_exponents") or {}).items()
    ]
    rates = Table("Bindings by method", ("method", *names), cells)
    return Tuning(directory, runs, sweep.get("tuning") or "", rates, rules)


def failures(directories: Sequence[AnyPath]) -> Table:
    """The runs that failed and have not been finished since."""
    cells = {}
    for directory in directories:
        for run in find_runs(directory):
            if not run.has_result and (failure := run.read_failure()) is not None:
                folder = run.path
                place = folder.relative_to(directory)
                name = str(place) if place.name else folder.name
                cells[folder.resolve()] = [name, failure["reason"]]
    return Table("Runs that failed", ("run", "reason"), list(cells.values()))


def table(rows: Sequence[Row]) -> None:
    """Prints one line per run: losses on its own task, training FLOPs, parameters and speed."""
    columns = ("method", "loss", "accuracy", "bits/byte", "perplexity", "FLOPs", "params", "active", "tokens/s", "run")
    cells = [
        [
            row.method + ("" if row.is_causal else " *"),
            reading.loss(row.loss),
            *tables.measures(row.accuracy, row.bits_per_byte, row.perplexity),
            f"{row.training_flops:.3g}",
            reading.si(row.params_total),
            reading.si(row.params_active),
            reading.si(row.tokens_per_second),
            row.run,
        ]
        for row in rows
    ]
    console = _console()
    title = f"Validation loss (nats per {unit(rows)}) at the training FLOPs spent"
    _print(console, Table(title, columns, cells).known())
    if not all(row.is_causal for row in rows):
        console.print("* not causal: a token's output can depend on later tokens, which flatters its loss")


def claims_table(analysis: Analysis) -> None:
    """Prints the claims, if there are any; those on methods last, where a reader of a terminal looks first."""
    for shown in reversed(tables.claims(analysis)):
        _print(_console(), shown)


def minima_table(analysis: Analysis) -> None:
    """Prints the compute-optimal model of each series at each budget, if there is any."""
    shown = tables.minima(analysis)
    if shown.rows:
        # A terminal is too narrow for all columns; the page has them.
        kept = [place for place, column in enumerate(shown.columns) if column not in ("perplexity", "runs", "sizes")]
        columns = tuple(shown.columns[place] for place in kept)
        _print(_console(), Table(shown.title, columns, [[cells[place] for place in kept] for cells in shown.rows]))


def _print(console: Console, shown: Table) -> None:
    printed = RichTable(title=shown.title, box=SIMPLE_HEAD)
    for place, column in enumerate(shown.columns):
        justify = "left" if shown.is_text(place) else "right"
        printed.add_column(column, justify=justify, overflow="fold", no_wrap=column in WHOLE)
    for cells in shown.rows:
        printed.add_row(*map(Text, cells))  # not as markup: names may have brackets
    console.print(printed)


def _console() -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=max(160, console.width))


def evaluation_table(step: int, evaluations: dict[str, Any]) -> None:
    """Prints one line per task."""
    columns = ("task", "loss", "accuracy", "bits/byte", "perplexity", "word perplexity", "usage", "unevenness")
    cells = []
    for name, values in evaluations.items():
        experts = values.get("experts", {}).values()
        cells.append(
            [
                name,
                f"{values['loss']:.4f}",
                *tables.measures(*(values.get(name) for name in ("accuracy", "bits_per_byte", "perplexity"))),
                f"{values['word_perplexity']:.4g}" if "word_perplexity" in values else "-",
                ", ".join(f"{block['usage']:.3f}" for block in experts) or "-",
                ", ".join(f"{block['unevenness']:.3f}" for block in experts) or "-",
            ]
        )
    unit = "image" if any("accuracy" in values for values in evaluations.values()) else "token"
    _print(_console(), Table(f"Validation loss (nats per {unit}), step {step}", columns, cells).known())
