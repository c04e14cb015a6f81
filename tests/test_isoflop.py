"""IsoFLOP analysis and what the report reads in it, on rows whose minima, laws and noise are known."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from peer_jax.analysis import reading, tables
from peer_jax.analysis.isoflop import analyse, same_budgets
from peer_jax.analysis.row import Row

SIZES = (1e4, 3e4, 1e5, 3e5, 1e6)


def row(method="Dense", *, loss, active=1e5, budget=1e12, seed=0, settings=None, corpus="text", **fields):
    """A run; training FLOPs per token are 6 N."""
    tokens = round(budget / (6 * active))
    values = {
        **{"run": f"{method}-{active:g}-{budget:g}-{seed}", "directory": Path("runs/x"), "method": method},
        **{"is_baseline": method == "Dense"},
        **{"is_causal": method != "MoE", "size": f"N{active:g}", "budget": budget, "seed": seed},
        **{"settings": settings or {}, "loss": float(loss), "perplexity": 1.0, "bits_per_byte": 1.0},
        **{"training_flops": 6.0 * active * tokens, "tokens": tokens, "steps": 1000, "epochs": 0.5},
        **{"params_total": int(4 * active), "params_active": int(active), "flops_per_token": 2.0 * active},
        **{"flops_by_part": {"all": 2.0 * active}, "d_model": 32, "num_blocks": 4, "num_experts": None},
        **{"batch_size": 4, "seq_len": 256, "usage": None, "unevenness": None, "tokens_per_second": None},
        **{"wall_seconds": 1.0, "corpus": corpus, "cache": f"{corpus}-1", "device": "cpu", "other_losses": {}},
    }
    return Row(**values | fields)


def parabola(method="Dense", *, minimum, at, budget=1e12, seeds=(0,), noise=0.0, draw=0, sizes=SIZES, **fields):
    """Runs along a parabola with a known minimum, with noise of the draw."""
    rng = np.random.default_rng(draw)
    return [
        row(
            method,
            loss=minimum + 0.05 * math.log(size / at) ** 2 + noise * rng.normal(),
            active=size,
            budget=budget,
            seed=seed,
            **fields,
        )
        for size in sizes
        for seed in seeds
    ]


def test_the_minimum_is_found_in_each_measure():
    (curve,) = analyse(parabola(minimum=2.0, at=1e5), resamples=50).curves
    assert curve.has_minimum
    assert curve.fit.loss == pytest.approx(2.0)
    assert curve.fit.size == pytest.approx(1e5)
    assert curve.fits["params_total"].size == pytest.approx(4e5)
    assert curve.fits["tokens"].size == pytest.approx(1e12 / 6e5, rel=0.01)
    assert curve.seeds == 1


@pytest.mark.parametrize("at", [3e4, 5.5e4, 4e5])
def test_tokens_at_the_minimum_are_those_of_the_model_there(at):
    (curve,) = analyse(parabola(minimum=2.0, at=at), resamples=0).curves
    assert curve.tokens_at_minimum == pytest.approx(1e12 / (6 * at), rel=0.01)


@pytest.mark.parametrize("at", [1e3, 1e7])
def test_a_minimum_outside_the_sizes_is_no_result(at):
    rows = parabola(minimum=2.0, at=at) + parabola(minimum=1.5, at=at, budget=1e13)
    analysis = analyse(rows, resamples=0)
    for curve in analysis.curves:
        assert curve.fit.is_extrapolation
        assert not curve.has_minimum
        assert curve.tokens_at_minimum is None
    assert analysis.laws[0].params is None
    assert analysis.laws[0].reason == "no budget has a minimum among the sizes tried, and a power law needs 2"
    assert tables.minima(analysis).rows[0][-1] == "extrapolation: outside the sizes tried"
    assert any("an extrapolation and is not counted as a result" in s for s in sentences(analysis))


def sentences(analysis):
    return [sentence for finding in reading.reading(analysis) for sentence in finding.sentences]


def test_two_sizes_have_no_parabola_and_the_reason_is_kept():
    analysis = analyse(parabola(minimum=2.0, at=1e5, sizes=SIZES[:2]), resamples=0)
    (curve,) = analysis.curves
    assert curve.fit is None
    assert curve.reasons["params_active"].startswith("2 sizes")
    assert tables.minima(analysis).rows == []
    assert tables.unfitted(analysis).rows == [["1e12", "Dense", curve.reasons["params_active"]]]


def test_diverged_runs_are_counted_and_left_out():
    rows = [*parabola(minimum=2.0, at=1e5), row(loss=math.nan, active=2e6), row(loss=math.inf, active=2e6)]
    analysis = analyse(rows, resamples=0)
    (curve,) = analysis.curves
    assert curve.diverged == analysis.diverged == 2
    assert curve.fit.loss == pytest.approx(2.0)
    assert "2 runs ended without a finite loss and are left out of the fits." in sentences(analysis)
    (curve,) = analyse([row(loss=math.nan)], resamples=0).curves
    assert curve.best() is None


def test_power_laws_of_size_and_tokens():
    """N_opt grows as C^0.3, and the tokens follow from C = 6 N D."""
    rows = []
    for budget in (1e11, 1e12, 1e13):
        rows += parabola(minimum=3 - 0.1 * math.log10(budget), at=1e5 * (budget / 1e12) ** 0.3, budget=budget)
    (law,) = analyse(rows, resamples=0).laws
    assert law.budgets == 3
    assert law.params.exponent == pytest.approx(0.3, abs=0.01)
    assert law.tokens.exponent == pytest.approx(0.7, abs=0.01)


def test_loss_surface_of_all_budgets():
    rows = [
        row(loss=1.5 + 20 / size**0.3 + 100 / (budget / 6 / size) ** 0.4, active=size, budget=budget)
        for budget in (1e11, 1e12, 1e13)
        for size in SIZES
    ]
    (found,) = analyse(rows, resamples=0).surfaces
    assert found.surface.alpha == pytest.approx(0.3, abs=0.02)
    assert found.surface.beta == pytest.approx(0.4, abs=0.02)
    (found,) = analyse(rows[:5], resamples=0).surfaces
    assert found.surface is None
    assert "too few" in found.reason


def test_compute_saved_against_dense():
    """Dense falls by 0.3 per decade of compute, nearly as a power law. PEER lies below it by half as much."""
    rows = [
        *parabola(minimum=2.3, at=1e5, budget=1e11),
        *parabola(minimum=2.0, at=1e5, budget=1e12),
        *parabola("PEER", minimum=2.15, at=1e5, budget=1e11),
        *parabola("PEER", minimum=1.85, at=1e5, budget=1e12),
    ]
    first, second = analyse(rows, resamples=0).comparisons
    assert first.difference == pytest.approx(-0.15)
    assert first.interval is None
    assert first.saving.factor == pytest.approx(10 ** (math.log(2.3 / 2.15) / math.log(2.3 / 2.0)), rel=0.01)
    assert not first.saving.is_extrapolation
    assert second.saving.is_extrapolation


@pytest.mark.parametrize(
    ("dense", "reason", "saving_reason"),
    [
        ([], "no method is a baseline", "no method is a baseline"),
        (parabola(minimum=2, at=1e5, corpus="other"), "no run of Dense on this text", "no run of Dense on this text"),
        (parabola(minimum=2, at=1e5, budget=1e13), "no run of Dense at this budget", "at only one budget"),
        (parabola(minimum=2, at=1e8), "the minimum of Dense lies outside the sizes tried", "at no budget"),
        (parabola(minimum=2, at=1e5, sizes=SIZES[:2]), "the runs of Dense have no parabola: 2 sizes", "at no budget"),
        (parabola(minimum=2, at=1e5), "", "at only one budget, and a comparison needs 2"),
    ],
    ids=["none", "other text", "other budget", "outside", "no parabola", "one budget"],
)
def test_what_cannot_be_compared_says_why(dense, reason, saving_reason):
    analysis = analyse([*parabola("PEER", minimum=1.9, at=1e5), *dense], resamples=0)
    (found,) = analysis.comparisons
    assert found.reason.startswith(reason)
    assert (found.difference is None) == bool(reason)
    assert found.saving is None
    assert saving_reason in found.saving_reason


@pytest.mark.slow
@pytest.mark.parametrize(("gap", "is_open"), [(0.001, True), (0.5, False)])
def test_a_paired_interval_around_zero_shows_no_order(gap, is_open):
    rows = parabola(minimum=2.0, at=1e5, seeds=(0, 1), noise=0.01)
    rows += parabola("PEER", minimum=2.0 - gap, at=1e5, seeds=(0, 1), noise=0.01, draw=1)
    analysis = analyse(rows, resamples=200)
    low, high = analysis.comparisons[0].interval
    assert (low <= 0 <= high) is is_open
    assert (analysis.claims[0].statement, analysis.claims[0].answer) == (
        "PEER is below Dense, the baseline",
        "open" if is_open else "holds",
    )
    said = " ".join(sentences(analysis))
    assert ("The runs do not show an order between PEER and Dense" in said) is is_open
    assert ("is higher, and the interval of the paired difference excludes 0" in said) is not is_open


def test_with_one_seed_the_reading_says_what_the_intervals_hold():
    one = analyse(parabola(minimum=2.0, at=1e5, noise=0.01), resamples=100)
    two = analyse(parabola(minimum=2.0, at=1e5, noise=0.01, seeds=(0, 1)), resamples=100)
    words = "have one seed. There the intervals show how far the points lie from a parabola"
    assert words in " ".join(sentences(one))
    assert words not in " ".join(sentences(two))


def test_a_method_that_is_not_causal_is_not_ranked():
    analysis = analyse([*parabola(minimum=2.0, at=1e5), *parabola("MoE", minimum=1.0, at=1e5)], resamples=0)
    said = sentences(analysis)
    assert said[0].startswith("Dense is the only causal method with a minimum")
    assert any(s.startswith("MoE reaches a fitted minimum of 1.0000, but is not causal") for s in said)
    assert "MoE, not causal" in [cells[1] for cells in tables.minima(analysis).rows]


def test_seed_noise_is_pooled_within_groups():
    losses = {1e4: (2.0, 2.2), 1e5: (1.0, 1.1, 1.2), 1e6: (3.0,)}
    rows = [row(loss=v, active=size, seed=s) for size, own in losses.items() for s, v in enumerate(own)]
    (noise,) = analyse([*rows, rows[0]], resamples=0).noise  # a copy of a run is no further seed
    assert (noise.groups, noise.runs) == (2, 5)
    assert noise.deviation == pytest.approx(math.sqrt((2 * 0.1**2 + 2 * 0.1**2) / 3))


def test_settings_are_series_of_their_own():
    plain = parabola("PEER", minimum=2.0, at=1e5)
    varied = parabola("PEER", minimum=1.9, at=1e5, settings={"PEER.top_k": 4})
    single = [row("PEER", loss=1.0, settings={"PEER.top_k": 8})]
    analysis = analyse([*plain, *varied, *single], resamples=0)
    assert {curve.series for curve in analysis.curves} == {"PEER", "PEER, top_k=4", "PEER, top_k=8"}
    assert {curve.series for curve in analysis.shown()} == {"PEER", "PEER, top_k=4"}


def test_dense_with_the_same_settings_is_the_baseline():
    rows = parabola(minimum=2.0, at=1e5)
    for settings, loss in (({"Run.batch_size": 4}, 1.8), ({"Run.batch_size": 8}, 1.6)):
        rows += parabola(minimum=loss, at=1e5, settings=settings)
    rows += parabola("PEER", minimum=1.5, at=1e5, settings={"Run.batch_size": 8})
    rows += parabola("PEER", minimum=1.5, at=1e5, settings={"PEER.top_k": 8})
    found = {found.series: found.difference for found in analyse(rows, resamples=0).comparisons}
    assert found == pytest.approx({"PEER, batch_size=8": -0.1, "PEER, top_k=8": -0.5})


def two_dense(**fields):
    """Runs of two methods of one class, neither of which has the name of the class."""
    return [
        *parabola("gelu", minimum=2.0, at=1e5, layer="Dense", is_baseline=True, **fields),
        *parabola("swiglu", minimum=1.9, at=1e5, layer="Dense", options={"activation": "swiglu"}, **fields),
    ]


def test_methods_of_one_class_are_series_of_their_own():
    rows = two_dense()
    rows += parabola("peer", minimum=1.8, at=1e5, layer="PEER")
    rows += parabola("peer_layer_norm", minimum=1.7, at=1e5, layer="PEER", options={"query_norm": "layer"})
    analysis = analyse(rows, resamples=0)
    losses = {"gelu": 2.0, "peer": 1.8, "peer_layer_norm": 1.7, "swiglu": 1.9}
    assert {curve.series: curve.fit.loss for curve in analysis.curves} == pytest.approx(losses)
    assert {cells[1] for cells in tables.minima(analysis).rows} == losses.keys()
    assert {cells[1] for cells in tables.comparisons(analysis).rows} == losses.keys() - {"gelu"}
    assert sentences(analysis)[0].startswith("peer_layer_norm has the lowest fitted minimum")


@pytest.mark.parametrize(("named", "against"), [(None, "gelu"), ("swiglu", "swiglu")])
def test_the_baseline_is_what_the_sweep_names_or_else_the_layer_that_says_so(named, against):
    analysis = analyse(two_dense(baseline=named), resamples=0)
    (found,) = analysis.comparisons
    assert analysis.baselines == (against,)
    assert found.baseline == against
    assert found.difference == pytest.approx(-0.1 if against == "gelu" else 0.1)
    assert tables.comparisons(analysis).rows[0][2] == against


def test_sweeps_with_baselines_of_their_own_keep_them():
    first = two_dense(baseline="swiglu", directory=Path("a/x"))
    second = [
        *parabola("dense", minimum=2.0, at=1e5, is_baseline=True, directory=Path("b/x")),
        *parabola("peer", minimum=1.5, at=1e5, directory=Path("b/x"), baseline="dense"),
    ]
    found = {c.series: (c.baseline, c.difference) for c in analyse([*first, *second], resamples=0).comparisons}
    assert found["gelu"] == ("swiglu", pytest.approx(0.1))
    assert found["peer"] == ("dense", pytest.approx(-0.5))


def test_of_several_baselines_the_one_of_the_same_directory_is_taken_or_none():
    rows = [
        *parabola("dense", minimum=2.0, at=1e5, is_baseline=True, directory=Path("a/x")),
        *parabola("Dense", minimum=2.2, at=1e5, is_baseline=True, directory=Path("b/x")),
    ]
    (found,) = analyse([*rows, *parabola("peer", minimum=1.9, at=1e5, directory=Path("b/y"))], resamples=0).comparisons
    assert (found.baseline, found.difference) == ("Dense", pytest.approx(-0.3))
    (found,) = analyse([*rows, *parabola("peer", minimum=1.9, at=1e5, directory=Path("c/y"))], resamples=0).comparisons
    assert found.difference is None
    assert found.reason == "several series could be the baseline: Dense; dense"


RATE, DTYPE = "AdamW.learning_rate", "Transformer.dtype"


@pytest.mark.parametrize(
    ("name", "values", "series"),
    [
        (RATE, ("0.012", "0.0001"), ["PEER, learning_rate=0.0001", "PEER, learning_rate=0.012"]),
        (DTYPE, ("%float32", "%bfloat16"), ["PEER, dtype=%bfloat16", "PEER, dtype=%float32"]),
    ],
    ids=["rates", "types"],
)
def test_lone_runs_that_differ_in_more_than_their_seed_are_no_point(name, values, series):
    rows = [
        row("PEER", loss=loss, config={name: value, "Run.seed": str(seed), "AdamW.b1": "0.9"}, seed=seed)
        for value, loss in zip(values, (1.0, 3.0), strict=True)
        for seed in (0, 1)
    ]
    analysis = analyse(rows, resamples=0)
    assert sorted(curve.series for curve in analysis.curves) == series
    assert sorted(curve.best()[1] for curve in analysis.curves) == [1.0, 3.0]
    assert all(len(curve.rows) == 2 for curve in analysis.curves)
    assert len(analysis.shown()) == 2  # no sweep varied it, so nothing else stands for the method
    said = " ".join(sentences(analysis))
    assert f"differ in {name}, not only in their seed. They are series of their own" in said
    assert "have the method, size, budget, settings and seed" not in said


def sweep_of_rates(directory, rate, *, minimum, seeds=(0, 1), **fields):
    """Runs of a sweep whose rates fall with the width."""
    rows = parabola("peer", minimum=minimum, at=1e5, seeds=seeds, directory=Path(directory) / "run", **fields)
    return [
        dataclasses.replace(
            r,
            sweep=str(directory),
            config={RATE: repr(rate * r.params_active**-0.5), "Run.seed": str(r.seed), "PEER.num_heads": str(r.steps)},
        )
        for r in rows
    ]


def test_runs_that_have_grown_from_runs_of_their_own_are_pooled():
    """Each seed has grown from the run of that seed; another step, or another run of that seed, is another series."""

    def grown(seed, at, folder="runs"):
        fields = {"Run.grown_from": f"'{folder}/small-seed{seed}'", "Run.grown_at": str(at)}
        return row("grown", loss=2.0 + seed, seed=seed, config=fields)

    (curve,) = analyse([grown(seed, 400) for seed in (0, 1)], resamples=0).curves
    assert curve.seeds == 2
    assert len(analyse([grown(0, 400), grown(1, 200)], resamples=0).curves) == 2
    assert len(analyse([grown(0, 400), dataclasses.replace(grown(0, 400, "other"), loss=3.0)], resamples=0).curves) == 2


def test_rates_that_follow_the_size_split_no_curve():
    rows = [*sweep_of_rates("runs/a", 0.01, minimum=2.0), *sweep_of_rates("runs/a", 0.01, minimum=1.9, budget=1e13)]
    analysis = analyse(rows, resamples=0)
    assert [curve.series for curve in analysis.curves] == ["peer", "peer"]
    assert all(curve.seeds == 2 for curve in analysis.curves)
    assert all(row.settings == {} for row in analysis.rows)
    assert list(analysis.rows) == rows


def test_sweeps_with_other_rates_are_series_named_by_their_directory():
    first = sweep_of_rates("runs/a", 0.01, minimum=2.0)
    second = sweep_of_rates("runs/b", 0.02, minimum=1.8)
    dense = parabola(minimum=2.1, at=1e5, sweep="runs/a", config={RATE: "0.01"}, directory=Path("runs/a/run"))
    analysis = analyse([*first, *second, *dense], resamples=0)
    losses = {"peer, sweep=runs/a": 2.0, "peer, sweep=runs/b": 1.8, "Dense": 2.1}
    assert {curve.series: curve.fit.loss for curve in analysis.curves} == pytest.approx(losses)
    assert [found.difference for found in analysis.comparisons] == pytest.approx([-0.1, -0.3])
    assert len(analysis.shown()) == 3
    # The same rates: one series, with the seeds of both.
    again = sweep_of_rates("runs/c", 0.01, minimum=2.0, seeds=(2, 3))
    (curve,) = analyse([*first, *again], resamples=0).curves
    assert (curve.series, curve.seeds) == ("peer", 4)


def test_two_sweeps_of_one_directory_are_told_apart_by_their_names():
    first = sweep_of_rates("runs/a", 0.01, minimum=2.0)
    second = [dataclasses.replace(r, sweep="runs/a/sweep-2") for r in sweep_of_rates("runs/a", 0.02, minimum=1.8)]
    losses = {"peer, sweep=runs/a": 2.0, "peer, sweep=runs/a/sweep-2": 1.8}
    assert {c.series: c.fit.loss for c in analyse([*first, *second], resamples=0).curves} == pytest.approx(losses)


def test_a_directory_that_is_not_uniform_in_itself_is_told_apart_by_its_arguments():
    rows = [
        row("peer", loss=1.0, seed=seed, sweep=f"runs/{place}", directory=Path(f"runs/{place}/x"), config={RATE: rate})
        for place, seed, rate in (("a", 0, "0.1"), ("a", 1, "0.2"), ("b", 2, "0.2"))
    ]
    found = {curve.series: curve.seeds for curve in analyse(rows, resamples=0).curves}
    assert found == {"peer, learning_rate=0.1": 1, "peer, learning_rate=0.2": 2}


def test_copies_and_runs_of_earlier_versions_are_pooled():
    config = {RATE: "0.1"}
    copies = [row("PEER", loss=1.0, directory=Path(place), config=config) for place in ("a/x", "b/x")]
    earlier = row("PEER", loss=1.0, directory=Path("c/x"), seed=1)  # it does not say its config
    analysis = analyse([*copies, earlier], resamples=0)
    assert [curve.series for curve in analysis.curves] == ["PEER"]
    assert "1 run has the method, size, budget, settings and seed of another run" in " ".join(sentences(analysis))


def test_settings_of_one_last_name_are_told_by_their_whole_names():
    found = row("PEER", loss=1.0, settings={"PEER.dtype": 1, "Transformer.dtype": 2, "PEER.top_k": 4})
    assert found.series == "PEER, PEER.dtype=1, Transformer.dtype=2, top_k=4"


def test_sizes_of_equal_parameters_are_points_of_their_own():
    """Two sizes can differ in the number of experts while a token uses equally many."""
    rows = [row("peer", loss=loss, size=size) for size, loss in (("n64", 1.0), ("n128", 2.0))]
    (curve,) = analyse(rows, resamples=0).curves
    assert [(x, [r.loss for r in own]) for x, own in curve.points("params_active")] == [(1e5, [2.0]), (1e5, [1.0])]


def test_texts_are_kept_apart():
    analysis = analyse(
        [*parabola(minimum=2.0, at=1e5), *parabola("PEER", minimum=1.0, at=1e5, corpus="other")], resamples=0
    )
    assert [curve.series for curve in analysis.curves] == ["Dense, on text", "PEER, on other"]
    assert analysis.comparisons[0].difference is None
    same = [row(loss=1.0), dataclasses.replace(row(loss=1.0), cache="text-2")]
    assert analyse(same, resamples=0).texts == ("text (text-1)", "text (text-2)")


@pytest.mark.parametrize(
    ("budgets", "names"),
    [
        ((3e11, 1e12), (3e11, 1e12)),
        ((2.993e11, 3.004e11, 1e12), (3e11, 3e11, 1e12)),
        ((1.234e12,), (1.234e12,)),
        ((1e12, 1.05e12), (1e12, 1.05e12)),
    ],
)
def test_budgets_within_half_a_step_are_one(budgets, names):
    found = same_budgets([row(loss=1.0, budget=budget) for budget in budgets])
    assert [found[budget] for budget in budgets] == list(names)


def test_runs_off_their_budget_and_repeated_text_are_said():
    rows = [row(loss=2.0, training_flops=0.9e12), row(loss=2.0, active=2e5, epochs=3.2)]
    said = " ".join(sentences(analyse(rows, resamples=0)))
    assert "1 run missed the budget by more than 2%" in said
    assert "1 run went over the corpus more than once, at most 3.2 times." in said


def test_an_order_within_the_noise_of_seeds_is_said_to_be_that():
    rows = [row(loss=2.0 + 0.1 * seed, seed=seed) for seed in (0, 1)]
    rows += [row("PEER", loss=2.01 + 0.1 * seed, seed=seed) for seed in (0, 1)]
    said = sentences(analyse(rows, resamples=0))
    assert said[1].startswith("This difference is within the noise of seeds (standard deviation over seeds 0.07")
    far = sentences(analyse([*rows[:2], *(dataclasses.replace(r, loss=r.loss + 1) for r in rows[2:])], resamples=0))
    assert not any("within the noise of seeds" in sentence for sentence in far)
