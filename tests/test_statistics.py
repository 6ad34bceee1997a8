"""Intervals, tests and robustness, against SciPy and numbers worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from limber_jax.metrics.statistics import (
  Line,
  at_least,
  bonferroni,
  effective_robustness,
  fit,
  gap_cut,
  interval,
  relative_robustness,
)

COUNTS = [(0, 1), (1, 1), (0, 40), (40, 40), (7, 10), (1, 1000), (12_345, 50_000)]


@pytest.mark.parametrize(("right", "count"), COUNTS)
@pytest.mark.parametrize("level", [0.995, 0.9])
def test_intervals_equal_scipys(right, count, level):
  want = stats.binomtest(right, count).proportion_ci(confidence_level=level, method="exact")
  assert interval(right, count, level) == pytest.approx((want.low, want.high), abs=1e-12)


def test_the_interval_of_none_right_is_the_one_of_the_text_book():
  # No success in n trials: (1 - high)^n = 0.0025 at the level 0.995.
  low, high = interval(0, 20)
  assert low == 0 and high == pytest.approx(1 - 0.0025 ** (1 / 20))
  assert interval(20, 20) == (pytest.approx(1 - high), 1)


@pytest.mark.parametrize(("right", "count"), COUNTS)
@pytest.mark.parametrize("accuracy", [0.0, 0.25, 0.7, 1.0])
def test_the_binomial_test_equals_scipys(right, count, accuracy):
  want = stats.binomtest(right, count, accuracy, alternative="greater").pvalue
  assert at_least(right, count, accuracy) == pytest.approx(want, rel=1e-9)


def test_the_binomial_test_counted_by_hand():
  # Three coins: two or three heads in 4 of 8 cases, three in 1 of 8, any number in all.
  assert at_least(2, 3, 0.5) == pytest.approx(4 / 8)
  assert at_least(3, 3, 0.5) == pytest.approx(1 / 8)
  assert at_least(0, 3, 0.5) == 1


def test_bonferroni_multiplies_by_the_number_of_tests():
  assert bonferroni([0.01, 0.2, 0.5]) == pytest.approx([0.03, 0.6, 1.0])
  assert bonferroni([]) == []


@pytest.mark.parametrize("wrong", [(-1, 3), (4, 3), (0, 0)])
def test_counts_that_are_none_are_refused(wrong):
  with pytest.raises(ValueError, match=f"{wrong[0]} right of {wrong[1]}"):
    interval(*wrong)
  with pytest.raises(ValueError, match=f"{wrong[0]} right of {wrong[1]}"):
    at_least(*wrong, 0.5)


def test_probabilities_that_are_none_are_refused():
  with pytest.raises(ValueError, match="level=1"):
    interval(1, 2, 1)
  with pytest.raises(ValueError, match="accuracy=75"):
    at_least(1, 2, 75)


def test_the_fit_is_a_line_through_the_logits():
  # Logits of 1/2, 3/4, 9/10: 0, ln 3, 2 ln 3; of 1/4, 1/2, 3/4: -ln 3, 0, ln 3. So y = x - ln 3.
  line = fit([1 / 2, 3 / 4, 9 / 10], [1 / 4, 1 / 2, 3 / 4])
  assert (line.slope, line.intercept) == pytest.approx((1, -math.log(3)))
  assert line(3 / 4) == pytest.approx(1 / 2)


def test_the_fit_is_that_of_least_squares():
  rng = np.random.default_rng(0)
  x, y = rng.uniform(0.5, 0.9, 30), rng.uniform(0.1, 0.7, 30)
  slope, intercept = np.polyfit(np.log(x / (1 - x)), np.log(y / (1 - y)), 1)
  line = fit(x, y)
  assert (line.slope, line.intercept) == pytest.approx((slope, intercept))


def test_the_line_ends_at_none_and_all_right():
  assert [Line(slope, -1.0)(end) for slope in (0.5, 2.0) for end in (0, 1)] == [0, 1, 0, 1]


@pytest.mark.parametrize(("x", "y", "match"), [
  ([0.5], [0.5], "two or more"), ([0.5, 0.5], [0.1, 0.2], "two or more"), ([0.5, 0.6], [0.1], "two or more"),
  ([0.5, 0.6], [0.0, 0.2], "no logit"), ([0.5, 1.0], [0.1, 0.2], "no logit"),
  ([0.5, math.nan], [0.1, 0.2], "no logit")])
def test_what_cannot_be_fitted_is_refused(x, y, match):
  with pytest.raises(ValueError, match=match):
    fit(x, y)


def test_robustness_by_hand():
  line = Line(1.0, -math.log(3))                             # 3/4 -> 1/2
  assert effective_robustness(3 / 4, 0.6, line) == pytest.approx(0.1)
  assert effective_robustness(3 / 4, 0.4, line) == pytest.approx(-0.1)
  assert relative_robustness(0.6, 0.45) == pytest.approx(0.15)
  # Of the expected drop of 0.25, 0.15 is left.
  assert gap_cut(3 / 4, 0.6, line) == pytest.approx(0.4)
  assert gap_cut(3 / 4, 3 / 4, line) == pytest.approx(1)
  with pytest.raises(ValueError, match="no drop"):
    gap_cut(3 / 4, 0.6, Line(1.0, 0.0))
