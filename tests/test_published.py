"""The numbers of README's results, computed again from the tables in docs/results."""

from pathlib import Path

import numpy as np
import pytest

from peer_jax.analysis import results
from peer_jax.analysis.isoflop import analyse

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text().split("## Results")[1].split("\n## ")[0]
WORDS = " ".join(SECTION.split())


@pytest.fixture(scope="module")
def analysis():
    return analyse(results.read([ROOT / "docs" / "results" / "isoflop_cpu" / "results.csv"]), resamples=0)


@pytest.fixture(scope="module")
def seeds():
    return analyse(results.read([ROOT / "docs" / "results" / "seeds" / "results.csv"]), resamples=0)


def test_the_table_of_minima(analysis):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line[:1] == "|"]
    header, _, *lines = lines
    methods = [name.removesuffix(", not causal") for name in header[1:]]
    minima = {(curve.budget, curve.series): curve for curve in analysis.curves}
    savings = {(found.budget, found.series): found.saving for found in analysis.comparisons}
    assert len(lines) == 3
    for budget, *cells in lines:
        for method, cell in zip(methods, cells, strict=True):
            curve = minima[float(budget), method]
            assert curve.has_minimum
            expected = f"{curve.fit.loss:.3f}"
            if (saving := savings.get((float(budget), method))) is not None:
                note = ", extrapolated" if saving.is_extrapolation else ""
                expected += f" ({saving.factor:.1f}\N{MULTIPLICATION SIGN}{note})"
            assert cell == expected


def test_the_sentences_on_minima(analysis):
    losses = {(curve.budget, curve.series): curve.fit.loss for curve in analysis.curves}
    for words, other in (("ahead of dense layers", "Dense"), ("behind PKM", "PKM")):
        gaps = [abs(losses[budget, "PEER"] - losses[budget, other]) for budget in analysis.budgets]
        assert f"{words} at every budget by {min(gaps):.2f} to {max(gaps):.2f}" in WORDS
    assert (
        f"In {sum(curve.shared is not None for curve in analysis.curves)} of the {len(analysis.curves)} groups" in WORDS
    )
    assert all(claim.answer == "open" for claim in analysis.claims if claim.kind == "difference")
    shares = [row.flops_by_part["attention"] / row.flops_per_token for row in analysis.rows]
    assert f"attention takes {100 * min(shares):.0f} to {100 * max(shares):.0f}% of the FLOPs" in WORDS


def test_the_sentences_on_seeds(seeds):
    losses = {curve.series: [row.loss for row in curve.rows] for curve in seeds.curves}
    for name, method in (("dense", "Dense"), ("MoE", "MoE (expert choice)"), ("PEER", "PEER"), ("PKM", "PKM")):
        assert len(losses[method]) == 4
        assert f"{np.mean(losses[method]):.3f} for {name}" in WORDS
    deviations = [np.std(own, ddof=1) for own in losses.values()]
    assert f"standard deviations of {min(deviations):.2f} to {max(deviations):.2f}" in WORDS
    (budget,) = seeds.budgets
    below, behind = seeds.difference("Dense", "PEER", budget), seeds.difference("PEER", "PKM", budget)
    bounds = "{:.3f} (95% interval of the paired difference {:.3f} to {:.3f})".format(below.value, *below.interval)
    assert f"below dense by {bounds}" in WORDS
    assert "is open ({:.3f}, interval {:.3f} to {:.3f})".format(behind.value, *behind.interval) in WORDS
