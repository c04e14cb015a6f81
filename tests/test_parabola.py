"""Parabolas are tested against the curves that made their losses, intervals against how often they hold the truth."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer_jax.analysis.columns import NoFit
from peer_jax.analysis.parabola import fit_parabola

SIZES = np.geomspace(1e6, 1.6e7, 5)
CURVATURE, OPTIMUM, MINIMUM = 0.05, 3.5e6, 2.0


def curve(sizes=SIZES):
    return CURVATURE * np.log(sizes / OPTIMUM) ** 2 + MINIMUM


def test_parabola_is_recovered():
    # The sizes are neither evenly spaced nor sorted.
    sizes = [3e6, 1e6, 1.7e7, 4e6, 9e6]
    fit = fit_parabola(sizes, curve(np.array(sizes)))
    assert fit.size == pytest.approx(OPTIMUM, rel=1e-9)
    assert fit.loss == pytest.approx(MINIMUM, rel=1e-9)
    log_optimum = math.log(OPTIMUM)
    expected = (CURVATURE, -2 * CURVATURE * log_optimum, CURVATURE * log_optimum**2 + MINIMUM)
    assert fit.coefficients == pytest.approx(expected, rel=1e-9)
    # A sum of two power laws has another minimum, by which the intervals are widened to one side.
    assert OPTIMUM in (pytest.approx(end, rel=1e-9) for end in fit.size_interval)
    assert MINIMUM in (pytest.approx(end, rel=1e-9) for end in fit.loss_interval)
    assert fit.size_interval[1] / fit.size_interval[0] < 1.1
    assert fit.loss_interval[1] - fit.loss_interval[0] < 2e-3
    assert (fit.is_extrapolation, fit.sizes, fit.points, fit.note) == (False, 5, 5, "")
    elsewhere = np.array([[1e5, OPTIMUM], [2e6, 1e9]])
    np.testing.assert_allclose(fit(elsewhere), curve(elsewhere), rtol=1e-9)
    assert fit(1e7) == pytest.approx(curve(1e7), rel=1e-9)
    assert fit([1e7]).shape == (1,)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("seeds", "noise"), [(1, 0.005), (3, 0.015)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds, noise, confidence):
    """400 noisy parabolas, with one seed per size and with three.

    The intervals also allow for curves that are no parabolas, so they hold the truth more often: in 2,000 other
    parabolas, those of 95 per cent held it in 94 to 96.5 per cent, and those of 80 per cent in 84 to 90. The test
    allows two and a half standard deviations below what they promise and above the most that was found. Intervals that
    are twice as wide fail it in each case, and with 5 points also residuals that are not scaled, and normal quantiles
    in place of Student's.
    """
    rng = np.random.default_rng(0)
    sizes = np.tile(SIZES, seeds)
    trials, held = 400, np.zeros(2)
    for trial in range(trials):
        losses = curve(sizes) + noise * rng.standard_normal(sizes.shape)
        fit = fit_parabola(sizes, losses, confidence=confidence, resamples=300, seed=trial)
        assert fit.size_interval is not None
        intervals = ((fit.size_interval, OPTIMUM), (fit.loss_interval, MINIMUM))
        held += [low <= truth <= high for (low, high), truth in intervals]
    most = {0.8: 0.9, 0.95: 0.965}[confidence]
    low, high = (
        share + 2.5 * side * math.sqrt(share * (1 - share) / trials) for share, side in ((confidence, -1), (most, 1))
    )
    assert np.all((low < held / trials) & (held / trials < high)), held / trials


@pytest.mark.parametrize(("points", "seeds", "width"), [(5, 1, 0.3), (8, 1, 0.16), (5, 3, 0.12)])
@pytest.mark.parametrize("noise", [0, 0.001, 0.005])
def test_intervals_hold_the_minimum_of_iso_flop_curves(points, seeds, noise, width):
    """200 random curves L(N, D) at fixed compute, whose minimum in closed form is at size 1, where the loss is 2.

    The grids are 4 to 64 times as wide as their smallest size, with the optimum up to four fifths of the way to an end.
    In 300 other curves per case, the share of intervals of 95 per cent that held the optimum was 97 to 100 per cent
    without noise and 93 to 98 with it; three standard deviations of 200 trials below this are 93 and 88. Without the
    allowance for a parabola's own error, the intervals held 10 to 96 and 29 to 88 per cent. In ln size, half of them
    are narrower than ``width``, or 2.5 times that with the most noise; twice as wide, they would not be.
    """
    rng, held, widths = np.random.default_rng(points * seeds), np.zeros(2), []
    for trial in range(200):
        alpha, beta = rng.uniform(0.15, 0.6, 2)
        reach = rng.uniform(math.log(2), math.log(8))
        u = np.tile(reach * (rng.uniform(-0.8, 0.8) + np.linspace(-1, 1, points)), seeds)
        losses = 2 + 0.1 / (alpha + beta) * (np.expm1(-alpha * u) / alpha + np.expm1(beta * u) / beta)
        fit = fit_parabola(np.exp(u), losses + noise * rng.standard_normal(u.shape), resamples=200, seed=trial)
        if fit.size_interval is not None:  # else it is said to have no bounds
            (low, high), (least, most) = fit.size_interval, fit.loss_interval
            held += low <= 1 <= high, least <= 2 <= most
            widths.append(math.log(high / low))
    assert len(widths) >= 190
    assert np.all(held / len(widths) >= (0.88 if noise else 0.95)), held / len(widths)
    assert np.median(widths) < (2.5 if noise == 0.005 else 1) * width


def test_bootstrap_is_drawn_by_the_seed():
    losses = curve() + 0.01 * np.array([1, -1, 0.5, -0.5, 1])
    first, again, other = (fit_parabola(SIZES, losses, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.size_interval != other.size_interval
    assert first.size == other.size
    assert first.size_interval[0] < first.size < first.size_interval[1]
    assert first.loss_interval[0] < first.loss < first.loss_interval[1]
    without = fit_parabola(SIZES, losses, resamples=0)
    assert without.size == first.size
    assert without.size_interval is without.loss_interval is None


@pytest.mark.parametrize("kept", [slice(3, None), slice(2)])
def test_minimum_beyond_the_sizes_is_an_extrapolation(kept):
    sizes = np.geomspace(1e6, 1e8, 9)
    optimum = math.sqrt(sizes[2] * sizes[3])
    tried = np.concatenate([sizes[kept], sizes[kept][:1] * 1.1])
    fit = fit_parabola(tried, np.log(tried / optimum) ** 2)
    assert fit.size == pytest.approx(optimum, rel=1e-8)
    assert fit.is_extrapolation


def test_three_points_leave_no_interval():
    fit = fit_parabola(SIZES[:3], curve()[:3])
    assert fit.size == pytest.approx(OPTIMUM, rel=1e-9)
    assert fit.size_interval is fit.loss_interval is None
    assert fit.note == "3 points fit exactly, so there is no interval"
    # A second seed at one of the sizes shows how large the noise is, but not whether the losses are a parabola.
    sizes = OPTIMUM * np.array([0.5, 1.0, 2.0, 0.5])
    more = fit_parabola(sizes, curve(sizes) + np.array([0, 0, 0, 1e-3]))
    assert (more.sizes, more.points) == (3, 4)
    assert more.note == "3 sizes can't tell how far off a parabola is, so there is no interval"
    assert more.size_interval is more.loss_interval is None


@pytest.mark.parametrize("lost", [math.nan, math.inf, -math.inf])
def test_diverged_runs_are_left_out(lost):
    sizes, losses = np.append(SIZES, [5e7, 1e6]), np.append(curve(), [lost, lost])
    fit, without = fit_parabola(sizes, losses), fit_parabola(SIZES, curve())
    assert fit.note == "2 rows without a finite loss left out"
    assert (fit.size, fit.points, fit.size_interval) == (without.size, 5, without.size_interval)
    # An optimum between the other sizes and a size that diverged lies outside the sizes with a loss.
    assert fit_parabola([1e6, 1.5e6, 2e6, 1e7], [*curve(np.array([1e6, 1.5e6, 2e6])), lost]).is_extrapolation
    with pytest.raises(NoFit, match=r"^2 sizes, and a parabola needs 3; 1 row without a finite loss left out$"):
        fit_parabola(SIZES[:3], [2.0, 1.9, lost])


def test_curvature_within_noise_bounds_nothing():
    losses = 2 + 0.001 * np.log(SIZES / OPTIMUM) ** 2 + 0.05 * np.array([1, -1, 1, -1, 1])
    fit = fit_parabola(SIZES, losses)
    assert fit.coefficients[0] > 0
    assert fit.size_interval is fit.loss_interval is None
    assert fit.note == "the curvature is within its noise, so the intervals have no bounds"


@pytest.mark.parametrize(
    ("sizes", "losses", "reason"),
    [
        (SIZES, -curve(), "curve downwards"),
        (SIZES, np.full(5, 2.1), "no curvature"),
        (SIZES, 0.1 * np.log(SIZES), "no curvature"),
        (SIZES, 1e-6 * curve() - np.log(SIZES), "no curvature"),  # its minimum is at e^1e7
        ([1e6, 2e6, 1e6, 2e6], [2.0, 1.9, 2.01, 1.91], "2 sizes, and a parabola needs 3"),
        ([1e6], [2.0], "1 size, and"),
        ([], [], "0 sizes, and"),
        ([1.0, math.nextafter(1.0, 2.0), 2.0], [2.0, 1.9, 2.0], "too near"),
        ([0, 1, 2, 3], [2, 1, 1, 2], "sizes must be positive and finite, but hold 0"),
        ([-1e6, 1e6, 2e6, 3e6], [2, 1, 1, 2], "hold -1e\\+06"),
        ([math.nan, 1e6, 2e6, 3e6], [2, 1, 1, 2], "hold nan"),
    ],
)
def test_no_parabola(sizes, losses, reason):
    with pytest.raises(NoFit, match=reason):
        fit_parabola(sizes, losses)


@settings(deadline=None, max_examples=50)
@given(
    factor=st.floats(1e-6, 1e6),
    shift=st.floats(-100, 100),
    noise=st.lists(st.floats(-0.01, 0.01), min_size=5, max_size=5),
)
def test_units_of_size_and_offsets_of_loss_carry_over(factor, shift, noise):
    losses = curve() + np.array(noise)
    plain, changed = fit_parabola(SIZES, losses), fit_parabola(factor * SIZES, losses + shift)
    # Rounding of the shifted losses is 1e-14. The optimum amplifies it by about 1 / CURVATURE, twice.
    assert changed.size == pytest.approx(factor * plain.size, rel=1e-9)
    assert changed.loss == pytest.approx(plain.loss + shift, abs=1e-10)
    assert (changed.size_interval is None) == (plain.size_interval is None)
    if plain.size_interval is not None:
        assert changed.size_interval == pytest.approx([factor * end for end in plain.size_interval], rel=1e-7)


OFF_CENTRE = [(1, 30), (2, 30), (0.5, 15), (1 / 30, 1), (1 / 15, 2)]  # smallest and largest size, in optima


@pytest.mark.parametrize("surface", [(0.34, 0.28, 406, 410, 1.69, 1e18), (0.3, 0.42, 14, 170, 0.9, 3e11)])
@pytest.mark.parametrize(("smallest", "largest"), OFF_CENTRE)
@pytest.mark.parametrize("sizes", [5, 8])
def test_off_centre_sizes_are_said_and_the_intervals_hold_the_truth(surface, smallest, largest, sizes):
    """Without noise, along L(N, D) at D = C / 6N, whose optimum is found by trying a million sizes."""
    alpha, beta, A, B, E, C = surface

    def losses(size):
        return E + A / size**alpha + B / (C / (6 * size)) ** beta

    tried = np.geomspace(1e3, 1e12, 1_000_000)
    best = tried[np.argmin(losses(tried))]
    grid = best * np.geomspace(smallest, largest, sizes)
    fitted = fit_parabola(grid, losses(grid))
    assert "off-centre" in fitted.note
    assert fitted.size_interval[0] < best < fitted.size_interval[1]
    assert fitted.loss_interval[0] < losses(best) < fitted.loss_interval[1]
    centred = best * np.geomspace(1 / 5, 5, sizes)
    assert "off-centre" not in fit_parabola(centred, losses(centred)).note
