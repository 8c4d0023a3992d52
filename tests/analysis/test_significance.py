"""Significance over seeds, against formulas written out, published examples and simulated data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from hdscale.analysis.significance import TESTS, bootstrap, compare, holm
from hdscale.errors import UserError

A = [84.1, 85.0, 84.4, 85.3, 84.9]
B = [85.0, 85.6, 85.5, 85.9, 85.1]


def test_paired_t_by_its_formula():
    (found,) = compare({"rte": A}, {"rte": B}, "paired-t")
    difference = np.array(B) - np.array(A)
    error = difference.std(ddof=1) / np.sqrt(5)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(difference.mean() / error), 4))
    assert (found.low, found.high) == pytest.approx(
        (difference.mean() - 2.7764451 * error, difference.mean() + 2.7764451 * error)
    )
    assert found.difference == pytest.approx(difference.mean()) and found.corrected == found.p and found.runs == (5, 5)


def test_welch_by_its_formula():
    (found,) = compare({"rte": A[:3]}, {"rte": B}, "welch")
    a, b = np.array(A[:3]), np.array(B)
    va, vb = a.var(ddof=1) / 3, b.var(ddof=1) / 5
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 4)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(b.mean() - a.mean()) / np.sqrt(va + vb), freedom))
    assert found.low < b.mean() - a.mean() < found.high


def test_wilcoxon_by_enumerating_all_signs():
    (found,) = compare({"rte": A}, {"rte": B}, "wilcoxon")
    difference = np.round(np.array(B) - np.array(A), 6)
    ranks = stats.rankdata(np.abs(difference))
    smaller = min(ranks[difference > 0].sum(), ranks[difference < 0].sum())
    extreme = []
    for signs in itertools.product((False, True), repeat=5):
        chosen = ranks[np.array(signs)].sum()
        extreme.append(min(chosen, ranks.sum() - chosen) <= smaller)
    assert found.p == pytest.approx(np.mean(extreme))


def test_bootstrap_interval_is_near_the_t_interval_and_repeats():
    draw = np.random.default_rng(1)
    a, b = draw.normal(80, 1, 40), draw.normal(80.5, 1, 40)
    (t,), (boot,) = (compare({"x": a}, {"x": b}, test) for test in ("paired-t", "bootstrap"))
    assert (boot.low, boot.high) == pytest.approx((t.low, t.high), abs=0.08)
    assert boot.p == pytest.approx(t.p, abs=0.03)
    assert compare({"x": a}, {"x": b}, "bootstrap") == [boot]
    assert bootstrap(np.array([1.0, 2.0, 3.0]), np.array([11.0, 12.0]), 2000, 0)[0] == pytest.approx(2 / 2001)


@pytest.mark.parametrize("test", TESTS)
def test_equal_methods_are_rarely_told_apart(test):
    """Under the null hypothesis at most about 5% of p-values lie below 0.05."""
    draw = np.random.default_rng(2)
    values = [
        compare({"x": draw.normal(size=12)}, {"x": draw.normal(size=12)}, test, resamples=500)[0].p for _ in range(300)
    ]
    assert np.mean(np.array(values) < 0.05) < (0.13 if test == "bootstrap" else 0.09)


@pytest.mark.parametrize("test", TESTS)
def test_identical_and_constantly_shifted_scores(test):
    (same,) = compare({"x": A}, {"x": A}, test)
    assert same.p == 1.0 and same.difference == 0.0
    (shifted,) = compare({"x": [1.0, 1.0, 1.0]}, {"x": [2.0, 2.0, 2.0]}, test)
    assert shifted.p < 0.3 and (shifted.low, shifted.high) == (1.0, 1.0)


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_applied_over_the_tasks():
    found = compare({"a": A, "b": A, "only": A}, {"a": B, "b": [value + 0.1 for value in B]}, "paired-t")
    assert [one.task for one in found] == ["a", "b"]
    assert [one.corrected for one in found] == pytest.approx(holm([one.p for one in found]))
    assert all(one.corrected > one.p for one in found)


@pytest.mark.parametrize(
    ("first", "second", "test", "message"),
    [
        ({"a": A}, {"a": B}, "anova", "unknown test 'anova'; known: paired-t"),
        ({"a": A}, {"b": B}, "welch", "no task in common"),
        ({"a": [1.0]}, {"a": B}, "welch", "task a: 1 and 5 runs; a test needs at least 2"),
        ({"a": A[:3]}, {"a": B}, "paired-t", "pairs runs by seed: use welch or bootstrap"),
        ({"a": [1.0, float("nan")]}, {"a": B}, "welch", "not a finite number"),
    ],
)
def test_mistakes(first, second, test, message):
    with pytest.raises(UserError, match=message):
        compare(first, second, test)
