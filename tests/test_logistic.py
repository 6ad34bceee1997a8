"""Logistic regression ends where scikit-learn's does, and CLIP's search looks where the paper says."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from limber_jax.metrics import logistic
from limber_jax.metrics.logistic import GRID, fit, fit_each, objective, search

SEVEN = np.logspace(-6, 6, 7)


@pytest.fixture(scope="module")
def digits():
  return load_digits(return_X_y=True)


def oracle(x, y, l2, **options):
  """Returns (weights [d, C], bias [C], predict) of scikit-learn, by Newton's method: its L-BFGS ends far from the
  optimum where regularisation is weak (at 1e-6 on digits its objective is 2 % too high after 800 iterations)."""
  settings = {"solver": "newton-cholesky", "tol": 1e-14, "max_iter": 1000, **options}
  with threadpool_limits(1):
    model = LogisticRegression(C=1 / l2, **settings).fit(x.astype(float), y)
  return model.coef_.T, model.intercept_, model.predict


def predicted(fits, i, x):
  return (x @ fits.weights[i] + fits.bias[i][None]).argmax(axis=1)


def test_objective_and_predictions_are_scikit_learns_at_seven_values_of_l2(digits):
  x, y = digits
  found = fit(x[:1200], y[:1200], 10, SEVEN, tolerance=1e-11)
  for i, l2 in enumerate(SEVEN):
    weights, bias, predict = oracle(x[:1200], y[:1200], l2)
    theirs = objective(x[:1200], y[:1200], weights, bias, l2)
    ours = objective(x[:1200], y[:1200], found.weights[i], found.bias[i], l2)
    assert ours == pytest.approx(theirs, rel=1e-8, abs=0), l2
    np.testing.assert_array_equal(predicted(found, i, x), predict(x), err_msg=str(l2))
  assert found.iterations.max() <= 1000


def test_objective_is_below_scikit_learns_lbfgs_as_the_paper_ran_it(digits):
  x, y = digits[0][:600], digits[1][:600]
  found = fit(x, y, 10, SEVEN)
  with threadpool_limits(1):
    for i, l2 in enumerate(SEVEN):
      model = LogisticRegression(C=1 / l2, max_iter=1000).fit(x, y)
      assert objective(x, y, found.weights[i], found.bias[i], l2) < (1 + 1e-8) * objective(
        x, y, model.coef_.T, model.intercept_, l2)


def test_objective_is_scikit_learns_loss(digits):
  # Of 8 examples that any line separates by far: 1e-20 each, which 1 + … would lose.
  x = np.repeat([[-1.0], [1.0]], 4, axis=0)
  y, weights = np.repeat([0, 1], 4), np.array([[-23.0, 23.0]])
  assert objective(x, y, weights, np.zeros(2), 0.0) == pytest.approx(8 * np.exp(-46), rel=1e-12)
  assert objective(x, y, weights, np.zeros(2), 2.0) == pytest.approx(2 * 23**2)


def test_two_points_have_the_weights_that_the_root_of_the_slope_says():
  # At x = ±1 with weights ±w the objective is 2 log(1 + exp(-2w)) + λw², with its least at λw (1 + exp(2w)) = 2.
  values = [2 / (w * (1 + np.exp(2 * w))) for w in (0.5, 1, 2, 6)]
  found = fit(np.array([[-1.0], [1.0]]), np.array([0, 1]), 2, values)
  np.testing.assert_allclose(found.weights[:, 0], [[-w, w] for w in (0.5, 1, 2, 6)], rtol=1e-4)
  np.testing.assert_allclose(found.bias, np.zeros((4, 2)), atol=1e-5)


def clusters(n=300, d=20, classes=4, seed=0):
  rng = np.random.default_rng(seed)
  y = rng.permutation(np.arange(n) % classes)
  return (rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d)) * 2).astype(np.float32), y


def test_the_order_of_l2_and_repeats_do_not_matter():
  x, y = clusters()
  found = fit(x, y, 4, [1.0, 100.0, 0.01, 1.0])
  again = fit(x, y, 4, [100.0, 1.0, 0.01])
  for name in ("weights", "bias", "gap", "iterations"):
    np.testing.assert_array_equal(getattr(found, name), getattr(again, name)[[1, 0, 2, 1]])
  assert found.l2.tolist() == [1.0, 100.0, 0.01, 1.0]


def test_gap_bounds_how_far_a_fit_is_from_the_optimum():
  x, y = clusters()
  far, near = fit(x, y, 4, SEVEN, max_iterations=4), fit(x, y, 4, SEVEN)
  ended = [objective(x, y, far.weights[i], far.bias[i], s) for i, s in enumerate(SEVEN)]
  best = np.array([objective(x, y, near.weights[i], near.bias[i], s) for i, s in enumerate(SEVEN)])
  assert far.iterations.max() == 4 and (far.gap > 1e-4).any()
  assert np.all(ended - best <= 1.001 * far.gap * ended + 1e-8 * best)


def test_the_intercept_is_free():
  x, y = clusters()
  found, shifted = fit(x, y, 4, [0.1, 10.0]), fit(x + 50, y, 4, [0.1, 10.0])
  np.testing.assert_allclose(shifted.weights, found.weights, atol=2e-4)
  np.testing.assert_allclose(shifted.bias, found.bias - 50 * found.weights.sum(axis=1), atol=2e-2)


def test_a_class_without_examples_is_never_named_and_changes_nothing():
  x, y = clusters()
  values = [0.1, 1.0, 100.0]
  found, without = fit(x, y * 2, 8, values), fit(x, y, 4, values)
  np.testing.assert_allclose(found.weights[..., ::2], without.weights, rtol=1e-3, atol=1e-4)
  assert np.all(found.weights[..., 1::2] == 0) and np.all(found.bias[..., 1::2] == -np.inf)
  assert set(predicted(found, 2, x)) == {0, 2, 4, 6}


def test_subsets_are_solved_as_if_apart():
  # The 16 rows of a subset are fewer than the 20 features.
  x, y = clusters()
  subsets = np.stack([np.random.default_rng(i).choice(len(y), 16, replace=False) for i in range(3)])
  values = [0.1, 1.0, 100.0]
  found = fit(x, y, 4, values, subsets=subsets)
  assert found.weights.shape == (3, 3, 20, 4) and found.gap.shape == (3, 3)
  for s, rows in enumerate(subsets):
    for i, l2 in enumerate(values):
      weights, bias, _ = oracle(x[rows], y[rows], l2, solver="newton-cg", tol=1e-9)
      assert objective(x[rows], y[rows], found.weights[s, i], found.bias[s, i], l2) == pytest.approx(
        objective(x[rows], y[rows], weights, bias, l2), rel=1e-8, abs=0)


@pytest.mark.parametrize("options", [{"lanes": 3}, {"devices": 8}, {"lanes": 2, "devices": 3}], ids=str)
def test_lanes_and_devices_change_nothing_but_rounding(options, monkeypatch):
  monkeypatch.setattr(logistic, "SMALLEST", 1)
  x, y = clusters(n=301)
  values = np.logspace(-3, 3, 8)
  alone = fit(x, y, 4, values, devices=jax.devices()[:1])
  spread = fit(x, y, 4, values, lanes=options.get("lanes", 1), devices=jax.devices()[: options.get("devices", 1)])
  for i, l2 in enumerate(values):
    assert objective(x, y, spread.weights[i], spread.bias[i], l2) == pytest.approx(
      objective(x, y, alone.weights[i], alone.bias[i], l2), rel=1e-8, abs=0)


def test_noise_that_no_line_separates_ends_where_float32_does():
  # The bound of the gap is far too careful here: the loss curves by much more than λ.
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2000, 10)) * np.logspace(0, -2, 10)[None]
  y = rng.integers(0, 3, 2000)
  found = fit(x, y, 3, [1e-6, 1e-2])
  assert found.iterations.max() < 50
  for i, l2 in enumerate((1e-6, 1e-2)):
    weights, bias, _ = oracle(x, y, l2, tol=1e-10)
    assert objective(x, y, found.weights[i], found.bias[i], l2) == pytest.approx(
      objective(x, y, weights, bias, l2), rel=1e-8, abs=0)


@pytest.mark.parametrize(("x", "y", "l2", "message"), [
  (np.zeros((3, 2)), [0, 1], [1.0], "expected features"),
  (np.zeros((0, 2)), [], [1.0], "expected features"),
  (np.full((2, 2), np.nan), [0, 1], [1.0], "no numbers"),
  (np.zeros((2, 2)), [0, 2], [1.0], "labels from 0 to 2, expected 0 to 1"),
  (np.zeros((2, 2)), [0, 1], [1.0, 0.0], "positive"),
])
def test_unfit_data_are_refused(x, y, l2, message):
  with pytest.raises(ValueError, match=message):
    fit(x, np.array(y, int), 2, l2)


def test_the_grid_has_96_steps_and_eight_a_decade():
  assert len(GRID) == 97 and (GRID[0], GRID[-1]) == pytest.approx((1e-6, 1e6))
  np.testing.assert_allclose(GRID[8:] / GRID[:-8], 10)


def visited(peak):
  """Returns (exponents of 10 looked at, times 8; the exponent chosen, times 8) where scores fall away from `peak`."""
  best, looked = search(lambda l2: -abs(np.log10(l2) - peak))
  return [round(8 * np.log10(s)) for s in looked], round(8 * np.log10(best))


STARTS = [-48, -32, -16, 0, 16, 32, 48]


def test_search_visits_the_values_of_the_protocol():
  # By hand: from 10^0 a decade up and down, then a half, a quarter and an eighth of one about the best so far.
  assert visited(0) == ([*STARTS, -8, 8, -4, 4, -2, 2, -1, 1], 0)
  # The peak at 10^(11/8): 1, 10 and 100 -> 10; 10^1.5 is better than 10; 10^1.25 and 10^1.75 are not; then 10^1.375.
  assert visited(11 / 8) == ([*STARTS, 8, 24, 4, 12, 10, 14, 11, 13], 11)


def test_search_stays_within_the_range():
  assert visited(-7) == ([*STARTS, -40, -44, -46, -47], -48)
  assert visited(7) == ([*STARTS, 40, 44, 46, 47], 48)


def test_search_chooses_the_strongest_of_equal_scores():
  best, looked = search(lambda l2: 0.5)
  assert best == pytest.approx(1e6) and len(looked) == 7 + 4
  assert search(lambda l2: float(l2 < 20))[0] == pytest.approx(10 ** 1.25)


@pytest.mark.process
@pytest.mark.parametrize(("every", "flag"), [(1, "num_l2"), (2, "strengths")])  # its name now, and until 0.1
def test_bench_measures_both_in_the_same_run(every, flag):
  flags = ("--examples=200", "--width=12", "--classes=3", f"--{flag}=4", f"--every={every}")
  done = subprocess.run([sys.executable, "-m", "limber_jax.bench", "probe", *flags], cwd=Path(__file__).parents[1],
                        text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  out = json.loads(done.stdout)
  assert (out["num_l2"], out["scikit_learn_num_l2_solved"]) == (4, 4 // every)
  assert out["scikit_learn_seconds_are_extrapolated"] == (every > 1)
  assert out["speed_against_scikit_learn"] == pytest.approx(out["scikit_learn_seconds"] / out["seconds"], rel=1e-2)
  assert out["excess_of_objective"]["largest"] < 1e-6 and out["iterations"] > 0


@pytest.mark.parametrize("l2", [1e-2, 1.0, 100.0])
def test_each_class_against_the_rest_is_scikit_learns(l2):
  from sklearn.multiclass import OneVsRestClassifier

  rng = np.random.default_rng(4)
  x = rng.normal(size=(120, 12)).astype(np.float32)
  truth = np.where(x @ rng.normal(size=(12, 3)) + rng.normal(size=(120, 3)) > 0.5, 1, -1)
  with threadpool_limits(1):
    model = OneVsRestClassifier(LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-10))
    wanted = model.fit(x.astype(float), truth > 0).decision_function(x)
  fits = fit_each(x, truth, [1e6, l2])
  np.testing.assert_allclose(x @ fits.weights[1] + fits.bias[1], wanted, atol=2e-3 * np.abs(wanted).max())
  assert np.abs(fits.weights[0]).max() < 1e-3
  nowhere = fit_each(x, np.where(np.arange(3) == 1, -1, truth), [l2])
  assert nowhere.bias[0, 1] == -np.inf and np.isfinite(nowhere.bias[0, [0, 2]]).all()
