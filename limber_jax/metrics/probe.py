"""The one protocol of linear probes, CLIP's: λ chosen on validation data by a search, then all data learnt from.

Probes are L2-regularised logistic regressions (`metrics.logistic`) on features as they come: nothing is standardised.
Source: arXiv 2103.00020, A.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from limber_jax.metrics.logistic import GRID, Fits, fit, fit_each, search

FIFTH = 5  # of the training set, where there is no validation set

Data = tuple[np.ndarray, np.ndarray]  # features float [n, d]; labels int [n], or [n, C] as of `logistic.fit_each`


@dataclass(frozen=True)
class Probe:
  """A linear probe, and how it was come by."""

  l2: float               # λ: scikit-learn's 1 / C
  searched: list[float]   # the λ that were looked at, in order
  weights: np.ndarray     # float32 [d, C]
  bias: np.ndarray        # float32 [C]
  iterations: int         # of all fits
  gap: float              # see `Fits`: the largest

  def scores(self, features: np.ndarray) -> np.ndarray:
    """Returns [n, C] of features [n, d]."""
    return features @ self.weights + self.bias[None]


def learn(train: Data, validation: Data, classes: int, score: Callable[[np.ndarray, np.ndarray], float]) -> Probe:
  """Returns the probe of train and validation together, at the λ whose probe of train alone is best on validation.

  Args:
    train: what is learnt from.
    validation: what λ is chosen on.
    classes: C.
    score: (scores [n, C], labels) -> the higher the better.

  Raises:
    ValueError: as `logistic.fit`.
  """
  # Neighbours on the path are so close to each other that all of it takes less than the few that are looked at would,
  # each from the beginning.
  path = _fit(*train, classes, GRID)
  l2, searched = choose(path.weights, path.bias, validation, score)
  whole = tuple(np.concatenate(both) for both in zip(train, validation, strict=True))
  last = _fit(*whole, classes, np.array([l2]))
  return Probe(l2, searched, last.weights[0], last.bias[0], int(path.iterations.sum() + last.iterations.sum()),
               float(max(path.gap.max(), last.gap.max())))


def choose(weights: np.ndarray, bias: np.ndarray, validation: Data,
           score: Callable[[np.ndarray, np.ndarray], float]) -> tuple[float, list[float]]:
  """Returns (the best λ of GRID, those that were looked at, in order), by `logistic.search`.

  Args:
    weights: [97, d, C] at the λ of GRID.
    bias: [97, C].
    validation: what they are scored on.
    score: as of `learn`.
  """
  features, labels = validation

  def at(l2: float) -> float:
    i = np.searchsorted(GRID, l2)
    return score(features @ weights[i] + bias[i][None], labels)

  return search(at)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the share of scores [n, C] that are highest where labels int [n] say."""
  return float(np.mean(scores.argmax(axis=1) == labels))


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
  """Returns bool [n]: a fifth of the examples of each class, to the nearest, drawn by a seed."""
  held = np.zeros(len(labels), bool)
  for rows in shuffled(labels, seed):
    held[rows[: round(len(rows) / FIFTH)]] = True
  return held


def shuffled(labels: np.ndarray, seed: int) -> list[np.ndarray]:
  """Returns the numbers of the examples of each class that has some, in an order of the seed."""
  rng = np.random.default_rng(seed)
  return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def _fit(features: np.ndarray, labels: np.ndarray, classes: int, l2: np.ndarray) -> Fits:
  return fit_each(features, labels, l2) if labels.ndim == 2 else fit(features, labels, classes, l2)
