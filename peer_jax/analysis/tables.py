"""The tables of a report as text in cells, which the page and the terminal both show."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from peer_jax.analysis.ablations import Ablation
from peer_jax.analysis.curves import Training
from peer_jax.analysis.frontier import ranked
from peer_jax.analysis.isoflop import Analysis
from peer_jax.analysis.reading import budget, interval, loss, named, si
from peer_jax.analysis.row import Row
from peer_jax.analysis.series import Curve, mean_loss

# Columns that hold words, and those that hold whole sentences.
WORDS = {
    *(
        "method",
        "series",
        "baseline",
        "size",
        "run",
        "note",
        "device",
        "setting",
        "text",
        "reason",
        "intervals",
        "task",
    ),
    *("minus series", "curvature"),
    *("statement", "answer", "numbers", "finding", "layer", "change", "what it is", "label", "matrices", "domain"),
}
SENTENCES = {"note", "reason", "intervals", "statement", "numbers", "finding", "what it is"}
# Columns that are left out where no row has a value: text has no accuracy, and images have nothing else of these.
OPTIONAL = {"accuracy", "mean accuracy", "bits/byte", "perplexity", "word perplexity"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A heading, the names of the columns, and rows of cells."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def known(self) -> "Table":
        """The table without the columns of ``OPTIONAL`` in which no row has a value."""
        kept = [
            place
            for place, column in enumerate(self.columns)
            if column not in OPTIONAL or any(cells[place] != "-" for cells in self.rows)
        ]
        columns = tuple(self.columns[place] for place in kept)
        return Table(self.title, columns, [[cells[place] for place in kept] for cells in self.rows])

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which are aligned left."""
        return self.columns[column] in WORDS

    def wraps(self, column: int) -> bool:
        """Whether a column holds sentences."""
        return self.columns[column] in SENTENCES


def runs(rows: Sequence[Row]) -> Table:
    """One line per run, with what is known of it in short."""
    columns = (
        *("run", "method", "size", "seed", "loss", "accuracy", "bits/byte", "perplexity", "budget", "spent", "off by"),
        *("steps", "tokens", "epochs", "parameters", "active", "usage", "unevenness", "tokens/s", "device"),
    )
    names = Counter(row.run for row in rows)
    cells = [
        [
            # Directories that are reported together may have runs of the same name.
            row.run if names[row.run] == 1 else str(row.directory),
            named(row.series, row.is_causal),
            row.size,
            str(row.seed),
            loss(row.loss),
            *measures(row.accuracy, row.bits_per_byte, row.perplexity),
            budget(row.budget),
            f"{row.training_flops:.4g}",
            f"{row.training_flops / row.budget - 1:+.1%}",
            str(row.steps),
            si(row.tokens),
            "-" if row.epochs is None else f"{row.epochs:.2g}",
            si(row.params_total),
            si(row.params_active),
            "-" if row.usage is None else f"{row.usage:.3f}",
            "-" if row.unevenness is None else f"{row.unevenness:.3f}",
            si(row.tokens_per_second),
            row.device,
        ]
        for row in rows
    ]
    return Table("All runs", columns, cells).known()


def measures(accuracy: float | None, bits_per_byte: float | None, perplexity: float | None) -> list[str]:
    """The cells of what is measured beside the loss."""
    pairs = ((accuracy, ".2%"), (bits_per_byte, ".4f"), (perplexity, ".3f"))
    return ["-" if value is None else format(value, how) for value, how in pairs]


def minima(analysis: Analysis) -> Table:
    """The compute-optimal model of each series at each budget."""
    columns = (
        *("budget", "series", "N_opt", "95% interval", "D_opt", "loss", "95% interval", "perplexity", "runs", "sizes"),
        *("curvature", "note"),
    )
    cells = []
    for curve in analysis.curves:
        if (fit := curve.fit) is None:
            continue
        cells.append(
            [
                budget(curve.budget),
                named(curve.series, curve.is_causal),
                si(fit.size),
                interval(fit.size_interval),
                si(curve.tokens_at_minimum),
                loss(fit.loss),
                interval(fit.loss_interval, loss),
                f"{np.exp(fit.loss):.3f}" if curve.unit == "token" else "-",
                str(fit.points),
                str(fit.sizes),
                f"{fit.curvature:.3f}, " + ("own" if curve.shared is None else f"of {fit.budgets} budgets"),
                _note(curve),
            ]
        )
    return Table("Minima of the parabolas (N: active parameters, D: tokens)", columns, cells).known()


def _note(curve: Curve) -> str:
    outside = "extrapolation: outside the sizes tried" if curve.fit.is_extrapolation else ""
    diverged = f"{curve.diverged} diverged, left out" if curve.diverged else ""
    shared = "" if curve.shared is None else f"the budgets share a curvature (F test, p = {curve.shared:.2g})"
    return "; ".join(filter(None, [outside, shared, diverged, curve.fit.note]))


def unfitted(analysis: Analysis) -> Table:
    """The series and budgets that have no parabola, by reason."""
    reasons = defaultdict(list)
    for curve in analysis.curves:
        if curve.fit is None:
            reason = curve.reasons["params_active"] + (f"; {curve.diverged} diverged" if curve.diverged else "")
            reasons[budget(curve.budget), reason].append(named(curve.series, curve.is_causal))
    cells = [[at, "; ".join(series), reason] for (at, reason), series in reasons.items()]
    return Table("No parabola", ("budget", "series", "reason"), cells)


def points(analysis: Analysis) -> Table:
    """The points of the isoFLOP figures."""
    cells = []
    for curve in analysis.shown():
        seconds = {(rows[0].params_active, rows[0].size): value for value, rows in curve.points("seconds")}
        for _, rows in curve.points("params_active"):
            losses, accuracies = [row.loss for row in rows], [r.accuracy for r in rows if r.accuracy is not None]
            cells.append(
                [
                    budget(curve.budget),
                    named(curve.series, curve.is_causal),
                    rows[0].size,
                    si(rows[0].params_active),
                    si(rows[0].params_total),
                    si(rows[0].tokens),
                    si(seconds.get((rows[0].params_active, rows[0].size))),
                    loss(mean_loss(rows)),
                    f"{np.mean(accuracies):.2%}" if accuracies else "-",
                    str(len(rows)),
                    f"{max(losses) - min(losses):.4f}" if len(rows) > 1 else "-",
                ]
            )
    columns = (
        *("budget", "series", "size", "active", "parameters", "tokens", "seconds", "mean loss", "mean accuracy"),
        *("runs", "range over runs"),
    )
    return Table("Mean loss by size", columns, cells).known()


def comparisons(analysis: Analysis) -> Table:
    """Loss and compute of each series against its baseline, at the minima."""
    cells = []
    for found in analysis.comparisons:
        difference = "-" if found.difference is None else signed(found.difference)
        notes, saving = [found.reason], "-"
        if found.saving is not None:
            saving = f"{found.saving.factor:.2f} times"
            if found.saving.is_extrapolation:
                notes.append(f"compute is an extrapolation: outside the losses of {found.baseline}")
        elif found.saving_reason != found.reason:
            notes.append(found.saving_reason)
        series, note = named(found.series, found.is_causal), "; ".join(filter(None, notes))
        bounds = interval(found.interval, signed)
        cells.append([budget(found.budget), series, found.baseline or "-", difference, bounds, saving, note])
    columns = ("budget", "series", "baseline", "difference in loss", "95% interval", "baseline's compute", "note")
    return Table("Against the baseline", columns, cells)


def signed(value: float) -> str:
    """Writes a difference in nats, or a curvature, to four decimals."""
    return f"{value:+.4f}"


CLAIMS = {
    "difference": ("Claims on methods, from runs paired by size and seed", "difference in loss", signed),
    "minimum": ("Claims on minima", "N_opt", si),
    "curvature": ("Claims on curvatures", "nats per (ln N)^2", signed),
}
"""The title, the name of the number and how it is written, by the kind of a claim."""


def claims(analysis: Analysis) -> list[Table]:
    """What can be claimed, with the number that decides it; the claims on methods come first."""
    found = []
    for kind, (title, number, write) in CLAIMS.items():
        cells = [
            [
                budget(claim.budget),
                claim.statement,
                claim.answer,
                "-" if claim.value is None else write(claim.value),
                interval(claim.interval, write),
                claim.note,
            ]
            for claim in analysis.claims
            if claim.kind == kind
        ]
        found.append(Table(title, ("budget", "statement", "answer", number, "95% interval", "note"), cells))
    return [table for table in found if table.rows]


def paired(analysis: Analysis) -> Table:
    """The differences between two series at each size that both have, over the seeds that both have."""
    cells = [
        [
            budget(pair.first.budget),
            *(named(curve.series, curve.is_causal) for curve in (pair.first, pair.second)),
            *(found.size, signed(found.value), interval(found.interval, signed), str(found.seeds)),
        ]
        for pair in analysis.pairs
        for found in pair.at_sizes
    ]
    columns = ("budget", "series", "minus series", "size", "difference in loss", "95% interval", "seeds")
    return Table("Paired differences at each size", columns, cells)


def at_equal_seconds(analysis: Analysis) -> Table:
    """The lowest mean loss of each series within round numbers of seconds, over all budgets and sizes."""
    cells = []
    for value, found, step in ranked([found for found in analysis.frontiers if found.measure == "seconds"]):
        row, runs = step.rows[0], str(len(step.rows))
        # A series that was given less time could have gone on.
        note = f"its longest run took {si(found.last)} s" if found.last < value / 2 else ""
        series = named(found.series, found.is_causal)
        cells.append([si(value), series, loss(step.loss), row.size, budget(row.budget), si(step.value), runs, note])
    columns = ("within seconds", "series", "lowest loss", "size", "budget", "seconds", "runs", "note")
    return Table("Lowest mean loss within a time, over all budgets and sizes", columns, cells)


def at_equal_parameters(analysis: Analysis) -> Table:
    """The lowest mean loss of each series within round numbers of parameters in all, at each budget."""
    own = [found for found in analysis.frontiers if found.measure == "params_total"]
    cells = [
        [
            *(budget(at), si(value), named(found.series, found.is_causal), loss(step.loss)),
            *(step.rows[0].size, si(step.value), str(len(step.rows))),
        ]
        for at in dict.fromkeys(found.budget for found in own)
        for value, found, step in ranked([found for found in own if found.budget == at])
    ]
    columns = ("budget", "within parameters", "series", "lowest loss", "size", "parameters", "runs")
    return Table("Lowest mean loss within a number of parameters, at equal FLOPs", columns, cells)


def laws(analysis: Analysis) -> Table:
    """Exponents of N_opt and D_opt. ``Laws.reason`` says why a series is missing."""
    cells = []
    for law in analysis.laws:
        if law.params is None:
            continue
        note = f"{law.budgets} budgets" + (", which two points fit exactly: no interval" if law.budgets == 2 else "")
        exponents = [law.params, law.tokens]
        shown = [(f"{e.exponent:.3f}", interval(e.exponent_interval, "{:.2f}".format)) for e in exponents]
        cells.append([named(law.series, law.is_causal), *shown[0], *shown[1], note])
    columns = ("series", "a in N_opt ~ C^a", "95% interval", "b in D_opt ~ C^b", "95% interval", "note")
    return Table("Power laws", columns, cells)


def surfaces(analysis: Analysis) -> Table:
    """The fits of L(N, D) = E + A / N^alpha + B / D^beta. ``Surface.reason`` says why a series is missing."""
    cells = []
    for found in analysis.surfaces:
        if (s := found.surface) is None:
            continue

        def known(name: str, value: float, s=s) -> str:
            bounds = s.intervals and f" ({interval(s.intervals[name], '{:.2f}'.format)})"
            return f"{value:.3f}{bounds or ''}"

        a, b = s.exponents
        note = "E is almost zero: the runs are too small to show a floor" if s.E < 1e-3 else ""
        cells.append(
            [
                named(found.series, found.is_causal),
                *(known("E", s.E), f"{s.A:.3g}", f"{s.B:.3g}", known("alpha", s.alpha), known("beta", s.beta)),
                *(f"{a:.2f}, {b:.2f}", str(s.points), note),
            ]
        )
    columns = ("series", "E", "A", "B", "alpha", "beta", "a, b implied", "runs", "note")
    return Table("L(N, D) = E + A / N^alpha + B / D^beta (in brackets 95% intervals)", columns, cells)


def ablation(found: Ablation) -> Table:
    """The losses of an ablation by setting."""
    cells = []
    for panel in found.panels:
        for method, losses in panel.losses.items():
            for values in found.values:
                if own := losses.get(values):
                    cells.append(
                        [
                            *(budget(panel.budget), panel.size, named(method, method not in found.not_causal)),
                            *(found.label(values), loss(float(np.mean(own))), str(len(own))),
                            f"{max(own) - min(own):.4f}" if len(own) > 1 else "-",
                        ]
                    )
    columns = ("budget", "size", "method", "setting", "mean loss", "runs", "range over runs")
    return Table(found.title, columns, cells)


def training(curves: Sequence[Training]) -> Table:
    """Smoothed training losses at shares of the FLOPs."""
    shares = (0.1, 0.25, 0.5, 0.75, 1.0)
    cells = [
        [budget(c.row.budget), named(c.row.series, c.row.is_causal), c.row.size, str(c.row.seed)]
        + [loss(c.at(share)) for share in shares]
        for c in curves
    ]
    return Table(
        "Training loss at shares of the FLOPs, at the best size",
        ("budget", "series", "size", "seed", *(f"{share:.0%}" for share in shares)),
        cells,
    )


def usage(rows: Sequence[Row]) -> Table:
    """Usage and unevenness of the experts, as means over seeds."""
    groups = defaultdict(list)
    for row in rows:
        if row.usage is not None and row.unevenness is not None:
            groups[budget(row.budget), named(row.series, row.is_causal), row.size, row.num_experts].append(row)
    cells = [
        [
            *(*place[:3], "-" if place[3] is None else str(place[3])),
            f"{np.mean([r.usage for r in own]):.3f}",
            f"{np.mean([r.unevenness for r in own]):.3f}",
            str(len(own)),
        ]
        for place, own in groups.items()
    ]
    columns = ("budget", "series", "size", "experts", "usage", "unevenness", "runs")
    return Table("Usage (share of experts) and unevenness (nats)", columns, cells)


QUERY_NORM = ("query_norm", "QUERY_NORM")


def query_norm(rows: Sequence[Row]) -> Table:
    """Perplexity, unevenness and usage without and with query batch-norm, as the table of the PEER paper has them.

    A line compares the runs that differ in nothing else that a sweep varied, as means over seeds.
    """
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        names = [name for name in row.settings if name.rpartition(".")[2] in QUERY_NORM]
        measured = None not in (row.perplexity, row.usage, row.unevenness)  # images have no perplexity
        if len(names) == 1 and measured:
            others = tuple((name, str(value)) for name, value in sorted(row.settings.items()) if name not in names)
            method = f"{row.method}, on {row.text}" if row.text else row.method
            place = budget(row.budget), named(method, row.is_causal), row.size, row.num_experts, others
            groups[place][row.settings[names[0]]].append(row)
    cells = []
    for (*place, experts, _), by_norm in groups.items():
        if None in by_norm and "batch" in by_norm:
            means = [
                tuple(f"{np.mean([getattr(row, of) for row in by_norm[norm]]):.3f}" for norm in (None, "batch"))
                for of in ("perplexity", "unevenness", "usage")
            ]
            cells.append([*place, str(experts), *(f"{without} / {with_norm}" for without, with_norm in means)])
    columns = ("budget", "method", "size", "experts", "perplexity", "unevenness", "usage")
    return Table("Query batch-norm: without / with", columns, cells)


def flops_split(rows: Sequence[Row]) -> Table:
    """Forward FLOPs per token and the share of each part."""
    parts = list(dict.fromkeys(part for row in rows for part in row.flops_by_part))
    cells = []
    for row in rows:
        known = row.flops_by_part
        shares = [f"{known[part] / row.flops_per_token:.1%}" if part in known else "-" for part in parts]
        cells.append([named(row.series, row.is_causal), row.size, si(row.flops_per_token), *shares])
    return Table("Forward FLOPs per token", ("series", "size", "FLOPs per token", *parts), cells)
