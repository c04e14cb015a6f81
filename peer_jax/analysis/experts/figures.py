"""The figures of ``analysis.html``. Each function returns a Figure, or None where there is nothing to draw."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from peer_jax.analysis.experts import statements, usage
from peer_jax.analysis.experts.everything import BlockLook, Look
from peer_jax.analysis.reading import si
from peer_jax.analysis.style import PALETTE, QUIET, brief, figure, house_style, log_axis

MOST_BLOCKS = len(PALETTE)  # of which curves are told apart
MOST_PANELS = 8
MOST_DOMAINS = 12
DOUBLINGS = 3  # of an expert's mean weight, at which colours of gates end


@house_style()
def curves(found: Look) -> Figure | None:
    """Weight mass against the rank of an expert, a line per block."""
    if not found.blocks:
        return None
    made, (axes,) = figure(1, 1, height=4.0, width=8.0)
    drawn = [1.0]
    for (colour, marker), of in zip(PALETTE, found.blocks, strict=False):
        ranks, mass = usage.curve(of.trace)
        above = mass > 0
        drawn += mass[above].tolist()
        axes.plot(ranks[above], mass[above], color=colour, marker=marker, markevery=25, label=f"block {of.trace.block}")
    axes.axhline(1.0, color=QUIET, lw=1, ls=":")
    log_axis(axes.yaxis, min(drawn), max(drawn))
    log_axis(axes.xaxis, 1, max(2, *(of.trace.num_experts for of in found.blocks)), si)
    axes.set_xlabel("rank of the expert by use")
    axes.set_ylabel("weight mass, 1 = even share")
    axes.legend()
    return made


@house_style()
def specialisation(found: Look) -> Figure | None:
    """The share of what there is to tell about a token that its expert tells beyond chance, by kind of label."""
    if not found.blocks:
        return None
    kinds = [one.kind for one in found.blocks[0].specialisation]
    made, (axes,) = figure(1, 1, height=3.8)
    blocks = found.blocks[:MOST_BLOCKS]
    width = 0.8 / len(blocks)
    for place, ((colour, _), of) in enumerate(zip(PALETTE, blocks, strict=False)):
        shares = [one.share for one in of.specialisation]
        spreads = [2 * one.spread / one.entropy if one.entropy > 0 else 0.0 for one in of.specialisation]
        at = np.arange(len(kinds)) + (place - (len(blocks) - 1) / 2) * width
        axes.bar(at, shares, width, yerr=spreads, color=colour, label=f"block {of.trace.block}", ecolor=QUIET)
    axes.axhline(0.0, color=QUIET, lw=1)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set_ylabel("share told beyond chance")
    axes.legend()
    return made


@house_style()
def gates(found: Look, kind: str) -> Figure | None:
    """How many times its mean weight each of the most used experts gets from tokens of each label, by block."""
    shown = [one for of in found.blocks for one in of.gates if one.kind == kind][:MOST_PANELS]
    if not shown:
        return None
    made, panels = _panels(len(shown), 1.2 + 0.16 * max(len(one.labels) for one in shown))
    for axes, one in zip(panels, shown, strict=True):
        with np.errstate(divide="ignore"):
            doublings = np.clip(np.log2(one.times), -DOUBLINGS, DOUBLINGS)
        drawn = axes.imshow(
            doublings, vmin=-DOUBLINGS, vmax=DOUBLINGS, cmap="RdBu_r", aspect="auto", interpolation="nearest"
        )
        most = max(2, 24 // (len(str(one.experts.max())) + 1))  # numbers of experts that fit below a panel
        columns = np.arange(0, len(one.experts), -(-len(one.experts) // most))
        axes.set_xticks(columns, one.experts[columns])
        axes.set_yticks(range(len(one.labels)), [brief(name, 16) for name in one.labels], fontsize=7.5)
        axes.set_xlabel("expert, most used first")
        axes.set_ylabel(kind)
        axes.set_title(f"block {one.block}")
        axes.grid(False)
        bar = made.colorbar(drawn, ax=axes, label="times its mean weight", ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    return made


@house_style()
def heads(found: Look) -> Figure | None:
    """The share of a head's experts that another head retrieves for the same token."""
    shown = [of for of in found.blocks if len(of.overlap["heads"]) > 1][:MOST_PANELS]
    return _heat_maps(
        [(_title(of), of.overlap["heads"]) for of in shown], "head", "head", "share of experts in common", ends=(0, 1)
    )


@house_style()
def similar(found: Look) -> Figure | None:
    """Cosines of the sampled experts' parameters and router rows."""
    shown = []
    for of in found.blocks[:MOST_PANELS]:
        shown += [(f"{_title(of)}, {name}", one) for name, one in of.static.similar.items()]
        shown += [] if of.static.keys is None else [(f"{_title(of)}, router rows", of.static.keys)]
    return _heat_maps(shown[: 2 * MOST_PANELS], "expert of the sample", "expert", "cosine", ends=(-1, 1))


@house_style()
def components(found: Look) -> Figure | None:
    """The neurons of the sampled experts on their first two principal components."""
    shown = [of for of in found.blocks if of.static.components is not None][:MOST_PANELS]
    if not shown:
        return None
    made, panels = _panels(len(shown), 3.4)
    for axes, of in zip(panels, shown, strict=True):
        points, experts = of.static.components
        several = len(np.unique(experts)) < len(experts)
        colours = [PALETTE[place % len(PALETTE)][0] for place in np.unique(experts, return_inverse=True)[1]]
        axes.scatter(*points.T, s=6, c=colours if several else PALETTE[1][0], lw=0, rasterized=True)
        axes.set_title(_title(of))
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")
    return made


@house_style()
def norms(found: Look) -> Figure | None:
    """How often the expert with the i-th largest weight of a head has the j-th largest output norm."""
    shown = [of for of in found.blocks if of.dynamic is not None and of.dynamic.ranks is not None][:MOST_PANELS]
    maps = [(_title(of), of.dynamic.ranks / np.maximum(of.dynamic.ranks.sum(axis=1, keepdims=True), 1)) for of in shown]
    return _heat_maps(maps, "rank of the output norm", "rank of the weight", "share of the row", ends=None)


@house_style()
def norm_histograms(found: Look) -> Figure | None:
    """Output norms of the experts that tokens use, and of random others."""
    shown = [of for of in found.blocks if of.dynamic is not None and len(of.dynamic.norms)][:MOST_PANELS]
    if not shown:
        return None
    made, panels = _panels(len(shown), 3.0)
    for axes, of in zip(panels, shown, strict=True):
        both = of.dynamic.norms, of.dynamic.other_norms
        largest = max(float(np.quantile(one, 0.99)) for one in both if len(one)) or 1.0
        edges = np.linspace(0, largest, 40)
        for (colour, _), norm, label in zip(PALETTE, both, ("used", "random others"), strict=False):
            if len(norm):
                weights = np.full(len(norm), 1 / len(norm))
                axes.hist(norm, edges, weights=weights, histtype="step", color=colour, lw=1.8, label=label)
        axes.set_title(_title(of))
        axes.set_xlabel("norm of an expert's output")
        axes.set_ylabel("share")
    panels[0].legend()
    return made


@house_style()
def depth(found: Look) -> Figure | None:
    """The mean cosine of the outputs of random experts for the same token, by block."""
    blocks, cosines = statements.depth([of.dynamic for of in found.blocks if of.dynamic is not None])
    if len(blocks) < 2:
        return None
    made, (axes,) = figure(1, 1, height=3.4, width=7.0)
    axes.plot(blocks, cosines, color=PALETTE[1][0], marker="o")
    axes.set_xlabel("block")
    axes.set_ylabel("mean cosine of outputs")
    axes.set_xticks(blocks)
    return made


@house_style()
def costs(found: Look) -> Figure | None:
    """What each change of a layer costs."""
    shown = found.ablations[:MOST_PANELS]
    if not shown:
        return None
    made, panels = _panels(len(shown), 3.4)
    for axes, tried in zip(panels, shown, strict=True):
        names = [one.name for one in tried][::-1]
        values, errors = [one.cost for one in tried][::-1], [one.error for one in tried][::-1]
        errors = [2 * error if np.isfinite(error) else 0.0 for error in errors]
        axes.barh(range(len(names)), values, xerr=errors, color=PALETTE[1][0], ecolor=QUIET)
        axes.axvline(0.0, color=QUIET, lw=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("loss added [nats/token]")
        axes.set_title(f"block {tried[0].block}")
    return made


@house_style()
def costs_by_domain(found: Look, kind: str) -> Figure | None:
    """What each change costs for the text of each domain, one panel per block."""
    shown = []
    for tried in found.ablations[:MOST_PANELS]:
        rows = [one for one in tried if len(one.by_domain.get(kind, {})) > 1]
        if rows:
            shown.append((list(rows[0].by_domain[kind])[:MOST_DOMAINS], rows))
    if not shown:
        return None
    made, panels = _panels(len(shown), 4.2)
    for axes, (names, rows) in zip(panels, shown, strict=True):
        values = np.array([[one.by_domain[kind][name] for name in names] for one in rows])
        drawn = axes.imshow(values, aspect="auto", cmap="viridis")
        made.colorbar(drawn, ax=axes, label="loss added [nats/token]")
        axes.set_xticks(range(len(names)), [brief(name, 16) for name in names], rotation=60, ha="right")
        axes.set_yticks(range(len(rows)), [one.name for one in rows])
        axes.set_title(f"block {rows[0].block}")
        axes.grid(False)
    return made


def _title(of: BlockLook) -> str:
    return f"block {of.trace.block}"


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels, two in a row."""
    columns = min(2, count)
    made, panels = figure(-(-count // columns), columns, height=height)
    for spare in panels[count:]:
        spare.set_axis_off()
    return made, panels[:count]


def _heat_maps(
    maps: Sequence[tuple[str, np.ndarray]], x: str, y: str, label: str, *, ends: tuple[float, float] | None
) -> Figure | None:
    """Matrices as pictures, three in a row."""
    if not maps:
        return None
    columns = min(3, len(maps))
    made, panels = figure(-(-len(maps) // columns), columns, height=3.1)
    for spare in panels[len(maps) :]:
        spare.set_axis_off()
    low, high = (None, None) if ends is None else ends
    cmap = "RdBu_r" if ends == (-1, 1) else "viridis"
    for axes, (title, matrix) in zip(panels, maps, strict=False):
        drawn = axes.imshow(matrix, vmin=low, vmax=high, cmap=cmap, interpolation="nearest")
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        made.colorbar(drawn, ax=axes, label=label, shrink=0.8)
    return made
