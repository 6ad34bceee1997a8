"""The protocol of linear probes: λ is chosen on validation data, then all data are learnt from."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from limber_jax.metrics import probe
from limber_jax.metrics.logistic import GRID, fit_each


def made(n=90, d=6, classes=3, seed=0):
  """Returns (features, labels) of classes that overlap."""
  rng = np.random.default_rng(seed)
  labels = rng.permutation(np.arange(n) % classes)
  return (np.eye(classes)[labels] @ rng.normal(size=(classes, d)) + rng.normal(size=(n, d))).astype(np.float32), labels


def theirs(x, y, l2):
  with threadpool_limits(1):
    model = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    return model.fit(x.astype(float), y)


def log_likelihood(scores, labels):
  """Returns its mean; it has one peak over λ, where accuracies are often the same."""
  scores = scores - scores.max(axis=1, keepdims=True)
  return float((scores[np.arange(len(labels)), labels] - np.log(np.exp(scores).sum(1))).mean())


def test_a_probe_is_scikit_learns_of_all_data_at_the_l2_that_did_best_on_validation():
  x, y = made()
  held = probe.held_out(y, 0)
  train, validation = (x[~held], y[~held]), (x[held], y[held])
  found = probe.learn(train, validation, 3, log_likelihood)
  each = [log_likelihood(theirs(*train, s).decision_function(validation[0]), validation[1]) for s in found.searched]
  assert found.l2 == max(zip(each, found.searched, strict=True))[1] and 1e-2 < found.l2 < 1e2
  whole = theirs(np.concatenate([train[0], validation[0]]), np.concatenate([train[1], validation[1]]), found.l2)
  np.testing.assert_allclose(found.scores(x) - found.scores(x).mean(1, keepdims=True), whole.decision_function(x),
                             atol=1e-4)  # L-BFGS in float32 against Newton's method in float64
  np.testing.assert_array_equal(found.scores(x).argmax(1), whole.predict(x))
  alone = theirs(*train, found.l2)  # what had not seen the validation data is another
  assert np.abs(alone.decision_function(x) - whole.decision_function(x)).max() > 0.01


def test_features_are_taken_as_they_come():
  # Of features 10 times as large the same probe has a tenth of the weights at 100 times the λ: 16 steps of GRID.
  x, y = made()
  held = probe.held_out(y, 0)
  one, ten = (probe.learn((v[~held], y[~held]), (v[held], y[held]), 3, log_likelihood) for v in (x, 10 * x))
  assert np.abs(GRID - ten.l2).argmin() - np.abs(GRID - one.l2).argmin() == 16
  np.testing.assert_allclose(10 * ten.weights, one.weights, atol=1e-5)


def test_of_several_classes_each_has_a_probe_of_its_own_at_one_l2():
  x, _ = made()
  rng = np.random.default_rng(1)
  truth = np.where(x @ rng.normal(size=(6, 2)) + rng.normal(size=(90, 2)) > 0, 1, -1)

  def score(scores, labels):
    return float(np.mean((scores > 0) == (labels > 0)))

  found = probe.learn((x[:60], truth[:60]), (x[60:], truth[60:]), 2, score)
  wanted = fit_each(x, truth, [found.l2])
  np.testing.assert_allclose(found.weights, wanted.weights[0], atol=1e-5)
  assert found.scores(x).shape == (90, 2) and score(found.scores(x), truth) > 0.7


def test_one_class_alone_can_be_learnt():
  x, y = made()
  found = probe.learn((x[:9], np.zeros(9, int)), (x[9:12], np.zeros(3, int)), 3, probe.accuracy)
  assert found.l2 == pytest.approx(1e6) and probe.accuracy(found.scores(x), y) == np.mean(y == 0)


def test_held_out_is_a_fifth_of_each_class_and_another_by_seed():
  labels = np.repeat([0, 2, 5], [10, 25, 2])
  held = probe.held_out(labels, 0)
  assert [int(held[labels == c].sum()) for c in (0, 2, 5)] == [2, 5, 0]
  assert (probe.held_out(labels, 0) == held).all() and (probe.held_out(labels, 1) != held).any()
