"""Power-law fits: planted exponents come back, intervals cover as stated, thin data are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hdscale.errors import UserError
from hdscale.study.fits import FORMS, FitRefused, fit_power_law

FIVE_SIZES = np.geomspace(6e7, 1.1e10, 5)


def curve(x, offset: float, amplitude: float, alpha: float) -> np.ndarray:
    return offset + amplitude * np.asarray(x, dtype=float) ** -alpha


@pytest.mark.parametrize(
    ("offset", "amplitude", "alpha"),
    [(1.7, 400.0, 0.34), (0.0, 30.0, 0.1), (10.0, 2e4, 0.6), (2.0, 1e-3, -0.3)],
)
def test_exact_curves_are_recovered(offset, amplitude, alpha):
    x = np.geomspace(6e7, 1.1e10, 6)
    form = "offset" if offset else "power"
    fit = fit_power_law(x, curve(x, offset, amplitude, alpha), form, draws=50)
    assert fit.parameters["alpha"] == pytest.approx(alpha, rel=1e-4)
    assert fit.parameters["A"] == pytest.approx(amplitude * fit.x0**-alpha, rel=1e-4)
    if offset:
        assert fit.parameters["E"] == pytest.approx(offset, rel=1e-4)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-8)
    new = [1e8, 3e11]
    np.testing.assert_allclose(fit.predict(new), curve(new, offset, amplitude, alpha), rtol=1e-3)


def measured_coverage(form, offset, amplitude, alpha, sizes, seeds, noise, trials):
    """Share of noisy draws whose intervals contain the planted values and whose band contains the curve at 4x size."""
    x = np.repeat(sizes, seeds)
    x0 = math.exp(np.log(x).mean())
    truth = {"E": offset, "A": amplitude * x0**-alpha, "alpha": alpha}
    hits = dict.fromkeys([*FORMS[form], "band"], 0)
    further = [4 * sizes[-1]]
    for trial in range(trials):
        random = np.random.default_rng(trial)
        y = curve(x, offset, amplitude, alpha) * np.exp(noise * random.standard_normal(len(x)))
        fit = fit_power_law(x, y, form, draws=200, seed=trial)
        for name in FORMS[form]:
            low, high = fit.intervals[name]
            hits[name] += (low is None or low <= truth[name]) and (high is None or truth[name] <= high)
        low, high = fit.band(further)
        hits["band"] += bool(low[0] <= curve(further, offset, amplitude, alpha)[0] <= high[0])
    return {name: count / trials for name, count in hits.items()}


def test_intervals_cover_in_a_few_draws():
    trials = 60
    coverage = measured_coverage("power", 0.0, 30.0, 0.1, FIVE_SIZES, 2, 0.02, trials)
    slack = 3 * math.sqrt(0.95 * 0.05 / trials)
    assert all(0.95 - slack <= share for share in coverage.values()), coverage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "offset", "amplitude", "alpha", "sizes", "seeds", "noise"),
    [
        ("power", 0.0, 30.0, 0.1, FIVE_SIZES[:4], 1, 0.02),
        ("offset", 1.7, 400.0, 0.34, FIVE_SIZES, 1, 0.005),
        ("offset", 1.7, 400.0, 0.34, np.geomspace(6e7, 1.1e10, 8), 2, 0.02),
    ],
)
def test_intervals_cover_at_their_stated_rate(form, offset, amplitude, alpha, sizes, seeds, noise):
    trials = 150
    coverage = measured_coverage(form, offset, amplitude, alpha, sizes, seeds, noise, trials)
    print(form, len(sizes), seeds, noise, coverage)
    slack = 3 * math.sqrt(0.95 * 0.05 / trials)  # three standard errors of a share of 0.95
    for name, share in coverage.items():
        assert 0.95 - slack <= share <= 0.95 + slack, (name, coverage)


def test_form_is_chosen_by_the_data():
    x = np.repeat(np.geomspace(1e6, 1e10, 7), 3)
    chosen = {"offset": 0, "power": 0}
    for seed in range(10):
        noise = np.exp(0.003 * np.random.default_rng(seed).standard_normal(len(x)))
        chosen["offset"] += fit_power_law(x, curve(x, 1.7, 400.0, 0.34) * noise, draws=10).form == "offset"
        chosen["power"] += fit_power_law(x, curve(x, 0.0, 30.0, 0.1) * noise, draws=10).form == "power"
    assert chosen["offset"] == 10 and chosen["power"] >= 7, chosen


def test_an_offset_that_the_data_cannot_tell_from_zero_has_an_interval_from_zero():
    x = np.repeat(FIVE_SIZES, 3)
    noise = np.exp(0.02 * np.random.default_rng(1).standard_normal(len(x)))
    low, high = fit_power_law(x, curve(x, 0.0, 30.0, 0.1) * noise, "offset", draws=300).intervals["E"]
    assert low == 0.0 and high is not None and high > 0


def test_the_band_is_wider_where_it_is_extrapolated():
    x = np.repeat(FIVE_SIZES, 2)
    noise = np.exp(0.02 * np.random.default_rng(2).standard_normal(len(x)))
    fit = fit_power_law(x, curve(x, 0.0, 30.0, 0.1) * noise, "power", draws=300)
    low, high = fit.band([fit.x0, 1e13])
    assert math.log(high[1] / low[1]) > 2 * math.log(high[0] / low[0]) > 0


@pytest.mark.parametrize(
    ("x", "y", "form", "says"),
    [
        ([1e6, 1e7], [3.0, 2.0], "power", "too few sizes"),
        ([1e6] * 9 + [1e7] * 9, [3.0] * 18, "power", "2 distinct"),
        ([1e6, 1e7, 1e8], [3.0, 2.0, 1.5], "offset", "at least 4"),
        ([1.0, 1.2, 1.4], [3.0, 2.9, 2.8], "power", "too close"),
        ([1e6, 1e7, 1e8], [3.0, 0.0, 1.0], "power", "positive"),
        ([1e6, 1e7, 1e8], [3.0, float("nan"), 1.0], "power", "positive"),
        ([1e6, 1e7, 1e8], [3.0, 1.0], "power", "give one for each run"),
    ],
)
def test_thin_or_bad_points_are_refused(x, y, form, says):
    with pytest.raises(FitRefused, match=says):
        fit_power_law(x, y, form)


def test_unknown_form_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'power'"):
        fit_power_law([1, 2, 3], [3, 2, 1], "powr")


def test_the_same_seed_gives_the_same_intervals():
    x = np.repeat(FIVE_SIZES, 2)
    y = curve(x, 0.0, 30.0, 0.1) * np.exp(0.02 * np.random.default_rng(3).standard_normal(len(x)))
    first, second = (fit_power_law(x, y, draws=100, seed=5) for _ in range(2))
    assert first.intervals == second.intervals
