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
        similar=draw("similarity", "Cosines of experts' parameters.", figures.similar(found)),
        components=draw("components", "Neurons on two principal components.", figures.components(found)),
        norms=draw("norm_ranks", "Ranks of weights and output norms.", figures.norms(found)),
        histograms=draw("norms", "Norms of experts' outputs.", figures.norm_histograms(found)),
        depth=draw("depth", "Similarity of experts' outputs by block.", figures.depth(found)),
        costs=draw("ablations", "Loss added by each change.", figures.costs(found)),
        by_domain=[
            draw(f"ablations_by_{name}", f"Loss added by {kind}.", figures.costs_by_domain(found, kind))
            for kind, name in ((labels.kind, labels.kind.replace(" ", "_")) for labels in found.text.domains)
        ],
        data=_script({"pages": [page for of in found.blocks for page in of.pages], "index": _index(found)}),
    )
    write_whole(out / PAGE, page)
    return out / PAGE


def _summary(found: Look) -> str:
    layers = sorted({of.layer for of in found.blocks})
    text = found.text
    pieces, documents = (len(np.unique(of)) for of in (text.pieces, text.documents))
    return (
        f"{count(len(text.inputs), 'token')} in {count(pieces, 'piece')} of {count(documents, 'document')} of "
        f"{joined(found.texts)}; loss {text.losses.mean():.4f} nats per token. "
        f"{count(len(found.blocks), 'block')} with {joined(layers)}."
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
            [_ablation(one) for of in blocks for one in of.ablations],
        ),
        "ablations_by_domain": Table(
            "What each change costs, by domain",
            ("block", "change", "label", "domain", "loss added"),
            [
                [str(one.block), one.name, kind, name, f"{cost:+.4f}"]
                for of in blocks
                for one in of.ablations
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
        *(str(one.block), one.kind, str(one.labels), f"{one.entropy:.4f}", f"{one.information:.4f}"),
        *(f"{one.chance:.4f} ± {one.spread:.4f}", f"{one.share:.2%}", one.verdict),
    ]


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
        "static": {
            "experts": of.static.experts.tolist(),
            "regressions": {name: dataclasses.asdict(one) for name, one in of.static.regressions.items()},
            "matchings": [dataclasses.asdict(one) for one in of.static.matchings],
        },
        "dynamic": dynamic,
        "ablations": [dataclasses.asdict(one) | {"error": _finite(one.error)} for one in of.ablations],
        "pages": of.pages,
    }


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
