"""What was found of experts as a page that needs no other file, with its figures and tables as files beside it."""

import csv
import dataclasses
import functools
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from peer_jax.analysis.experts import ablations, figures
from peer_jax.analysis.experts.everything import BlockLook, Look
from peer_jax.analysis.experts.gates import GateMap
from peer_jax.analysis.reading import count, joined
from peer_jax.analysis.report import draw_into, render
from peer_jax.analysis.tables import Table
from peer_jax.storage import AnyPath, make_folder, write_whole

PAGE, VALUES = "analysis.html", "analysis.json"
FOLDER = "analysis"


def write(found: Look, name: str, out: AnyPath) -> AnyPath:
    """Writes ``analysis.html``, and figures, tables and values into the folder ``analysis``. Returns the page's path.

    Args:
        found: what was found.
        name: of the run, for the title.
        out: the folder, which is made if it is missing. The same values give the same bytes.

    Raises:
        InputError: if ``out`` can't be written to.
    """
    folder = out / FOLDER
    make_folder(folder)
    shown = tables(found)
    for key, table in shown.items():
        write_whole(folder / f"{key}.csv", _csv(table))
    write_whole(folder / VALUES, json.dumps(values(found), indent=1, allow_nan=False))
    draw = functools.partial(draw_into, folder)
    page = render(
        "analysis.html.jinja",
        name=name,
        found=found,
        folder=FOLDER,
        summary=_summary(found),
        tables=shown,
        explained=ablations.EXPLAINED,
        sentences=[(of, one) for of in found.blocks for one in of.specialisation],
        curves=draw("usage", "Weight mass of experts by rank.", figures.curves(found)),
        heads=draw("heads", "Experts that two heads have in common.", figures.heads(found)),
        specialisation=draw("specialisation", "What experts tell about tokens.", figures.specialisation(found)),
        gates=[
            draw(f"gates_by_{name}", f"Weights of experts by {kind}.", figures.gates(found, kind))
            for kind, name in _kinds(one.kind for of in found.blocks for one in of.gates)
        ],
        similar=draw("similarity", "Cosines of experts' parameters.", figures.similar(found)),
        components=draw("components", "Neurons on two principal components.", figures.components(found)),
        norms=draw("norm_ranks", "Ranks of weights and output norms.", figures.norms(found)),
        histograms=draw("norms", "Norms of experts' outputs.", figures.norm_histograms(found)),
        depth=draw("depth", "Similarity of experts' outputs by block.", figures.depth(found)),
        costs=draw("ablations", "Loss added by each change.", figures.costs(found)),
        by_domain=[
            draw(f"ablations_by_{name}", f"Loss added by {kind}.", figures.costs_by_domain(found, kind))
            for kind, name in _kinds(labels.kind for labels in found.text.domains)
        ],
        data=_script({"pages": [page for of in found.blocks for page in of.pages], "index": _index(found)}),
    )
    write_whole(out / PAGE, page)
    return out / PAGE


def _kinds(kinds: Iterable[str]) -> list[tuple[str, str]]:
    """Each kind of label once, and its name as part of the names of files."""
    return [(kind, kind.replace(" ", "_")) for kind in dict.fromkeys(kinds)]


def _summary(found: Look) -> str:
    shown = [*found.blocks, *found.unrouted]
    layers = sorted({of.layer for of in shown})
    text = found.text
    pieces, documents = (len(np.unique(of)) for of in (text.pieces, text.documents))
    return (
        f"{count(len(text.inputs), 'token')} in {count(pieces, 'piece')} of {count(documents, 'document')} of "
        f"{joined(found.texts)}; loss {text.losses.mean():.4f} nats per token. "
        f"{count(len(shown), 'block')} with {joined(layers)}."
    )


def tables(found: Look) -> dict[str, Table]:
    """The tables, by the names of their files."""
    blocks = found.blocks
    return {
        "statements": Table(
            "Statements of “A Closer Look into Mixture-of-Experts”",
            ("statement", "answer", "numbers"),
            [[one.claim, one.verdict, one.numbers] for one in found.statements],
        ),
        "usage": Table(
            "How evenly experts are used",
            (
                "block",
                "layer",
                "experts",
                "used",
                "dead",
                "unevenness",
                "worth",
                "half of the mass",
                "pair lift",
                "distinct",
            ),
            [_usage(of) for of in blocks],
        ),
        "together": Table(
            "Experts that the same token uses most often",
            ("block", "expert", "with", "tokens", "times chance"),
            [
                [str(of.trace.block), str(a), str(b), str(n), _number(lift)]
                for of in blocks
                for a, b, n, lift in zip(
                    of.together.first, of.together.second, of.together.counts, of.together.lift, strict=True
                )
            ],
        ),
        "specialisation": Table(
            "Mutual information of a token's expert and its label, in nats",
            ("block", "label", "labels", "entropy", "information", "by chance", "share beyond", "answer"),
            [_specialisation(one) for of in blocks for one in of.specialisation],
        ),
        "gates": Table(
            "The expert whose weight rises most over its mean, by label",
            ("block", "label", "value", "tokens", "expert", "mean weight", "of all tokens", "times"),
            [row for of in blocks for one in of.gates for row in _raised(one)],
        ),
        "regressions": Table(
            "Similarity of router rows regressed on that of experts",
            ("block", "matrices", "experts", "mean cosine", "r", "R²", "slope", "p"),
            [row for of in blocks for row in _regressions(of)],
        ),
        "matchings": Table(
            "Neurons of two experts after matching",
            ("block", "expert", "with", "cosine in order", "cosine matched", "Kendall's tau"),
            [
                [str(of.trace.block), str(m.first), str(m.second), *map(_number, (m.before, m.after, m.tau))]
                for of in blocks
                for m in of.static.matchings
            ],
        ),
        "outputs": Table(
            "Outputs of experts for the same token",
            ("block", "tokens", "cosine, used", "cosine, random", "used larger", "±", "rank correlation", "±"),
            [_outputs(of) for of in blocks if of.dynamic is not None],
        ),
        "ablations": Table(
            "What each change costs",
            ("block", "change", "experts", "their mass", "loss added", "±"),
            [_ablation(one) for tried in found.ablations for one in tried],
        ),
        "ablations_by_domain": Table(
            "What each change costs, by domain",
            ("block", "change", "label", "domain", "loss added"),
            [
                [str(one.block), one.name, kind, name, f"{cost:+.4f}"]
                for tried in found.ablations
                for one in tried
                for kind, by in one.by_domain.items()
                for name, cost in by.items()
            ],
        ),
    }


def _usage(of: BlockLook) -> list[str]:
    used = of.usage
    return [
        *(str(of.trace.block), of.layer, str(used["experts"]), f"{used['usage']:.3%}", str(used["dead"])),
        *(_number(used["unevenness"]), f"{used['effective']:.0f}", str(used["half"])),
        *(_number(of.together.mean_lift), f"{of.overlap['distinct']:.1f} of {of.overlap['used']:.1f}"),
    ]


def _specialisation(one: Any) -> list[str]:
    return [
        *(str(one.block), one.kind, str(one.labels), f"{one.entropy:z.4f}", f"{one.information:z.4f}"),
        *(f"{one.chance:z.4f} ± {one.spread:.4f}", f"{one.share:.2%}", one.verdict),
    ]


def _raised(one: GateMap) -> Iterable[list[str]]:
    for place, (name, tokens, times) in enumerate(zip(one.labels, one.tokens, one.times, strict=True)):
        most = int((one.weights[place] - one.mean).argmax())
        numbers = one.weights[place, most], one.mean[most], times[most]
        yield [str(one.block), one.kind, name, str(tokens), str(one.experts[most]), *map(_number, numbers)]


def _regressions(of: BlockLook) -> Iterable[list[str]]:
    for name, cosines in of.static.similar.items():
        one, n = of.static.regressions.get(name), len(cosines)
        mean = (cosines.sum() - cosines.trace()) / max(1, n * (n - 1))
        numbers = (
            ["-"] * 4 if one is None else [_number(v) for v in (one.correlation, one.r_squared, one.slope, one.chance)]
        )
        yield [str(of.trace.block), name, str(n), f"{mean:+.4f}", *numbers]


def _outputs(of: BlockLook) -> list[str]:
    one = of.dynamic
    numbers = one.chosen, one.others, one.larger, one.larger_error, one.rank_correlation, one.rank_error
    return [str(one.block), str(one.tokens), *map(_number, numbers)]


def _ablation(one: ablations.Ablation) -> list[str]:
    knocked = ["-", "-"] if one.experts is None else [str(one.experts), f"{one.mass:.2%}"]
    return [str(one.block), one.name, *knocked, f"{one.cost:+.4f}", _number(one.error)]


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.rows)
    return file.getvalue()


def values(found: Look) -> dict[str, Any]:
    """What was found, as JSON has it: numbers of each block in full, without the arrays that figures are drawn from."""
    return {
        "texts": found.texts,
        "tokens": len(found.text.inputs),
        "loss": float(found.text.losses.mean()),
        "is_causal": found.is_causal,
        "statements": [dataclasses.asdict(one) for one in found.statements],
        "blocks": [_values(of) for of in found.blocks],
        "unrouted": [
            {"block": of.block, "layer": of.layer, "zeroed": None if of.zeroed is None else _cost(of.zeroed)}
            for of in found.unrouted
        ],
    }


def _values(of: BlockLook) -> dict[str, Any]:
    together = dataclasses.asdict(of.together) | {
        name: getattr(of.together, name).tolist() for name in ("first", "second", "counts")
    }
    together |= {"lift": [_finite(lift) for lift in of.together.lift.tolist()], "mean_lift": of.together.mean_lift}
    overlap = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in of.overlap.items()}
    dynamic = None
    if of.dynamic is not None:
        kept = ("tokens", "chosen", "others", "larger", "larger_error", "rank_correlation", "rank_error")
        dynamic = {name: _finite(getattr(of.dynamic, name)) for name in kept}
    return {
        "block": of.trace.block,
        "layer": of.layer,
        "usage": of.usage,
        "together": together,
        "overlap": overlap,
        "specialisation": [
            dataclasses.asdict(one) | {"share": one.share, "answer": one.verdict} for one in of.specialisation
        ],
        "gates": [_gates(one) for one in of.gates],
        "static": {
            "experts": of.static.experts.tolist(),
            "regressions": {name: dataclasses.asdict(one) for name, one in of.static.regressions.items()},
            "matchings": [dataclasses.asdict(one) for one in of.static.matchings],
        },
        "dynamic": dynamic,
        "ablations": [_cost(one) for one in of.ablations],
        "pages": of.pages,
    }


def _gates(one: GateMap) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "labels": list(one.labels),
        "tokens": one.tokens.tolist(),
        "experts": one.experts.tolist(),
        "mean": _rounded(one.mean),
        "weights": [_rounded(row) for row in one.weights],
    }


def _rounded(numbers: np.ndarray) -> list[float]:
    """Numbers of four digits, which are shorter to write."""
    return [float(f"{number:.4g}") for number in numbers]


def _cost(one: ablations.Ablation) -> dict[str, Any]:
    return dataclasses.asdict(one) | {"error": _finite(one.error)}


def _finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else value


def _index(found: Look) -> dict[str, Sequence[Sequence[float]]]:
    """For each token, [block, expert, share] of its experts in all blocks."""
    merged: dict[str, list] = {}
    for of in found.blocks:
        for token, experts in of.index.items():
            merged.setdefault(token, []).extend([of.trace.block, expert, round(share, 4)] for expert, share in experts)
    return merged


def _script(data: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element."""
    return json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")
