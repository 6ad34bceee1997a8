"""L2-regularised multinomial logistic regression at scikit-learn's optimum, for many λ and subsets at once.

The objective at λ, which is called l2 in code, is Σ losses + λ/2 ‖W‖², the intercept free: λ times scikit-learn's at
C = 1/λ. What makes it quick changes nothing at the optimum:

- Features are brought to mean 0, which the intercept takes up, and turned into the axes of their covariance, which
  leaves the norm. There the curvature of the loss is close to diagonal, and a diagonal is what L-BFGS starts from.
- Of fewer rows than features only the space of the rows is kept; the optimum lies in it.
- A step needs two products with the features however long the search along it: logits move on a line.
- Values of λ are solved from the largest to the smallest, each from where the two before it point.
- Losses and residuals are made of differences to the logit of the right class, so that they are precise in float32
  also where they are next to nothing: with weak regularisation most data can be separated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from limber_jax.metrics import lbfgs
from limber_jax.runtime.parallel import BATCH, make_mesh

A_DECADE = 8      # values of λ
# CLIP's: 96 steps of one size. Its λ multiplies half the squared norm beside the sum of losses: scikit-learn's 1 / C.
GRID = np.logspace(-6, 6, 12 * A_DECADE + 1)

BLOCK = 2**16     # rows that are held in float64 at a time
SMALLEST = 2**30  # multiplications a product should have on each device


@dataclass(frozen=True)
class Fits:
  """Classifiers at each of R values of λ, of each of S subsets where there are subsets."""

  l2: np.ndarray          # float64 [R], λ as they were asked for
  weights: np.ndarray     # float32 [(S,) R, d, C]; zeros of a class without examples
  bias: np.ndarray        # float32 [(S,) R, C]; -inf of a class without examples
  gap: np.ndarray         # float32 [(S,) R]: the objective is above its minimum by this share of it at most
  iterations: np.ndarray  # int32 [(S,) R]


def fit(features: np.ndarray, labels: np.ndarray, classes: int, l2: Sequence[float], *,
        subsets: np.ndarray | None = None, tolerance: float = 1e-9, max_iterations: int = 1000, lanes: int = 1,
        devices: Sequence[Any] | None = None) -> Fits:
  """Returns a classifier for each λ; what it says of x [d] is argmax(x @ weights + bias).

  A fit ends when its gap, ‖gradient‖²/2λ over the objective, is below the tolerance; that is a bound, for the objective
  curves by λ at least. It also ends when the decrease that the next step promises is far below the tolerance, or what
  float32 can tell: where the loss itself curves, the bound is too careful. Classes that only just overlap are hard: at
  small λ a fit may then take all iterations, as scikit-learn's L-BFGS does, the more so the further λ is from the one
  before it.

  Args:
    features: float [n, d].
    labels: int [n], in 0..C-1.
    classes: C.
    l2: λ, R of them, positive, in any order; close ones are quicker than distant ones.
    subsets: int [S, m]: rows of each of several training sets of one size; None = one, of all rows.
    tolerance: of the objective, relative.
    max_iterations: of each fit.
    lanes: pieces that the range of λ is solved in at once. Each begins anew: more than 1 only pays where a
      product with the features is too small for the device.
    devices: of this process, over which rows are spread if there are enough of them; None = all.

  Raises:
    ValueError: shapes that do not go together, no rows, features that are no numbers, labels out of range, λ
      that are not positive.
  """
  features, labels, wanted = np.asarray(features), np.asarray(labels), np.asarray(l2, np.float64)
  _check(features, labels, wanted)
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
  rows = np.arange(len(labels))[None] if subsets is None else np.asarray(subsets)
  fits = _fit(_place(features, rows, classes, devices), labels, classes, wanted, tolerance, max_iterations, lanes)
  return fits if subsets is not None else Fits(wanted, *(v[0] for v in (fits.weights, fits.bias, fits.gap,
                                                                       fits.iterations)))


def _fit(placed: "_Placed", labels: np.ndarray, classes: int, wanted: np.ndarray, tolerance: float = 1e-9,
         max_iterations: int = 1000, lanes: int = 1) -> Fits:
  """Returns what `fit` does of subsets that are on the devices already."""
  ranked, where = np.unique(-wanted, return_inverse=True)  # the largest first, each once
  lanes = min(lanes, len(ranked))
  # Pieces of one length: the last one repeats its smallest.
  paths = np.append(-ranked, np.repeat(-ranked[-1:], -len(ranked) % lanes)).reshape(lanes, -1)  # [lanes, R/lanes]

  rows, axes = placed.rows, placed.axes
  y = np.pad(labels[rows].astype(np.int32), ((0, 0), (0, placed.x.shape[1] - rows.shape[1])), mode="edge")
  found = lbfgs.solve(placed.x, jax.device_put(y, placed.real.sharding), placed.real, placed.spectrum,
                      paths.astype(np.float32), np.float32(tolerance), classes=classes, limit=max_iterations)

  def asked(v):  # [S, lanes, R/lanes, ...] -> [S, R, ...]
    return np.asarray(v).reshape(len(rows), -1, *v.shape[3:])[:, where.reshape(-1)]

  solved, gap, iterations = map(asked, found)
  # For the features as they came. In float64 one subset at a time.
  weights = np.stack([(a[None] @ s[:, :-1]).astype(np.float32) for a, s in zip(axes, solved, strict=True)])
  bias = np.stack([s[:, -1] - (a.T @ m) @ s[:, :-1] for a, m, s in zip(axes, placed.means, solved, strict=True)])
  there = np.stack([np.bincount(labels[r], minlength=classes) > 0 for r in rows])  # [S, C]
  bias = np.where(there[:, None], bias, -np.inf).astype(np.float32)
  return Fits(wanted, weights, bias, gap, iterations)


def fit_each(features: np.ndarray, truth: np.ndarray, l2: Sequence[float], *,
             devices: Sequence[Any] | None = None) -> Fits:
  """Returns a classifier of its own for each class, one against the rest; class c is there where its score is above 0.

  The score is x @ weights + bias; -inf of a class without examples, inf of one that is everywhere. Of two classes the
  multinomial's weights are w / 2 and -w / 2, whose squared norm is half that of w: it is solved at twice the λ.

  Args:
    features: float [n, d].
    truth: int [n, C]: 1 where the class is there, -1 where not, 0 where that is not to be learnt from.
    l2: as of `fit`, and so that of scikit-learn's LogisticRegression of two classes at C = 1 / λ.
    devices: as of `fit`.

  Returns:
    Fits, whose gap is the largest and whose iterations are all of those of the classes.

  Raises:
    ValueError: as `fit`.
  """
  features, truth, l2 = np.asarray(features), np.asarray(truth), np.asarray(l2, np.float64)
  _check(features, truth[:, 0] if truth.ndim == 2 and truth.size else truth, l2)
  count, width = len(l2), truth.shape[1]
  weights, bias = np.zeros((count, features.shape[1], width), np.float32), np.empty((count, width), np.float32)
  gap, iterations = np.zeros(count, np.float32), np.zeros(count, np.int32)
  rows, placed = None, None
  for c, column in enumerate(truth.T):
    there, own = (column > 0).astype(np.int64), np.flatnonzero(column)
    if len(np.unique(there[own])) < 2:
      bias[:, c] = np.inf if there.any() else -np.inf
      continue
    if rows is None or not np.array_equal(rows, own):  # classes that learn from the same rows share them
      rows, placed = own, _place(features, own[None], 2, devices)
    found = _fit(placed, there, 2, 2 * l2)
    weights[..., c] = found.weights[0, ..., 1] - found.weights[0, ..., 0]
    bias[:, c] = found.bias[0, :, 1] - found.bias[0, :, 0]
    gap, iterations = np.maximum(gap, found.gap[0]), iterations + found.iterations[0]
  return Fits(l2, weights, bias, gap, iterations)


def search(score: Callable[[float], float]) -> tuple[float, list[float]]:
  """Returns (the best λ of GRID, those that were looked at, in order): CLIP's parametric binary search.

  It begins with every 100-fold λ, and then halves the distance to the neighbours of the best until that is one
  step of the grid. Of equal scores the largest λ has the best; at an end of the grid there is one neighbour.

  Args:
    score: of a classifier at a λ, the higher the better; asked once for each.

  Source: arXiv 2103.00020, A.3.
  """
  scores: dict[int, float] = {}

  def best(places):
    for place in places:
      if 0 <= place < len(GRID) and place not in scores:
        scores[place] = score(float(GRID[place]))
    return max(scores, key=lambda place: (scores[place], place))

  distance = 2 * A_DECADE
  peak = best(range(0, len(GRID), distance))
  while distance > 1:
    distance //= 2
    peak = best((peak - distance, peak + distance))
  return float(GRID[peak]), [float(GRID[place]) for place in scores]


def objective(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, bias: np.ndarray, l2: float
              ) -> float:
  """Returns Σ losses + l2/2 ‖weights‖², in float64.

  Args:
    features: [n, d].
    labels: int [n].
    weights: [d, C].
    bias: [C].
    l2: λ.
  """
  logits = features.astype(np.float64) @ weights.astype(np.float64) + bias.astype(np.float64)[None]
  below = logits - logits[np.arange(len(labels)), labels][:, None]
  below[np.arange(len(labels)), labels] = -np.inf
  top = np.maximum(below.max(axis=1), 0)
  others = np.exp(below - top[:, None]).sum(axis=1)
  # log(1 + …) of what may be far below 1.
  losses = np.where(top == 0, np.log1p(others), top + np.log(np.exp(-top) + others))
  return float(losses.sum() + l2 / 2 * np.square(weights, dtype=np.float64).sum())


def _check(features: np.ndarray, labels: np.ndarray, l2: np.ndarray) -> None:
  if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
    raise ValueError(f"expected features [n, d] and labels [n], got {features.shape} and {labels.shape}")
  if not np.isfinite(features).all():
    raise ValueError("features: some are no numbers")
  if l2.ndim != 1 or not len(l2) or not np.all(l2 > 0):
    raise ValueError(f"l2: expected positive numbers, got {l2}")


class _Placed(NamedTuple):
  """Subsets of the features on the devices, turned; they are filled up to rows that the devices divide."""

  rows: np.ndarray      # int [S, m]
  x: jax.Array          # float32 [S, m', D], with ones at the end
  real: jax.Array       # bool [S, m'], False where a row only fills up
  spectrum: np.ndarray  # [S, D]: Σ x²
  axes: np.ndarray      # [S, d, D-1]
  means: np.ndarray     # [S, d]


def _place(features: np.ndarray, rows: np.ndarray, classes: int, devices: Sequence[Any] | None) -> _Placed:
  turned = [_turn(features, r) for r in rows]
  x, spectrum, axes, means = (np.stack(part) for part in zip(*turned, strict=True))
  if devices is None:
    devices = jax.local_devices()
  # Rounding depends on the number of devices, and small problems gain nothing from more.
  devices = devices[: max(1, x.size * classes // SMALLEST)]
  short = -x.shape[1] % len(devices)
  by_rows = NamedSharding(make_mesh({"data": -1}, devices), P(None, BATCH))
  x = jax.device_put(np.pad(x, ((0, 0), (0, short), (0, 0))), by_rows)
  real = jax.device_put(np.pad(np.ones(rows.shape, bool), ((0, 0), (0, short))), by_rows)
  return _Placed(rows, x, real, spectrum, axes, means)


def _turn(features: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns (x float32 [m, D], with ones at the end; Σ x² [D]; axes [d, D-1]; mean [d]) of some rows."""
  blocks = [rows[i : i + BLOCK] for i in range(0, len(rows), BLOCK)]
  mean = sum(features[b].sum(axis=0, dtype=np.float64) for b in blocks) / len(rows)

  def centred(b):
    return features[b].astype(np.float64) - mean[None]

  if len(rows) < features.shape[1]:
    axes, small = np.linalg.qr(centred(rows).T)  # [d, m], [m, m]
    axes = axes @ np.linalg.eigh(small @ small.T)[1]
  else:
    axes = np.linalg.eigh(sum(c.T @ c for c in map(centred, blocks)))[1]
  x = np.ones((len(rows), axes.shape[1] + 1), np.float32)
  for i, b in zip(range(0, len(rows), BLOCK), blocks, strict=True):
    x[i : i + len(b), :-1] = centred(b) @ axes
  return x, np.square(x).sum(axis=0), axes, mean
