"""`bench probe`: a linear probe's sweep of λ (L2), beside scikit-learn's L-BFGS on the same data and cores.

--num_l2 of them lie evenly spaced in their logarithm from 1e-6 to 1e6. scikit-learn is LogisticRegression with
max_iter=1000 and its defaults, as CLIP's authors had it, one λ after the other; C is 1 over λ. Ours is timed before it
and after it, from the features in memory to classifiers in memory, once compiled; the seconds to compile are given
apart. The ratio takes the slower of the two.

The objective of each fit is computed in float64. scikit-learn ends where no element of the mean gradient is above 1e-4:
of weak regularisation that is far above the minimum. Ours ends within --tolerance of it, by a bound. "excess" is ours
over scikit-learn's, less 1, its largest over λ: below 0 ours is lower everywhere.

The features are made: classes about centres in a space whose axes have falling deviations, then turned and shifted, so
that no column stands for an axis, as in an encoder's features.
"""

import statistics
import time
import warnings
from typing import Any

import numpy as np
from absl import flags
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from limber_jax.bench import measure
from limber_jax.errors import UserError
from limber_jax.metrics import logistic

_N = flags.DEFINE_integer("examples", 10_000, "Examples.", lower_bound=2)
_D = flags.DEFINE_integer("width", 512, "Features of an example.", lower_bound=1)
_CLASSES = flags.DEFINE_integer("classes", 100, "Classes.", lower_bound=2)
_NUM_L2 = flags.DEFINE_integer("num_l2", 96, "Values of λ from 1e-6 to 1e6.", lower_bound=2)
flags.DEFINE_alias("strengths", "num_l2")  # what it was called until 0.1
_EVERY = flags.DEFINE_integer("every", 1, "scikit-learn solves every so many-th λ only, and its seconds are "
                              "multiplied: the output says so.", lower_bound=1)
_TOLERANCE = flags.DEFINE_float("tolerance", 1e-9, "Of our objective, relative.", lower_bound=0)
_LANES = flags.DEFINE_integer("lanes", 1, "Pieces of the range that are solved at once.", lower_bound=1)


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench probe: unexpected argument {argv[0]!r}")
  x, y = made(_N.value, _D.value, _CLASSES.value)
  l2 = np.logspace(-6, 6, _NUM_L2.value)
  start = time.perf_counter()
  _ours(x, y, l2)
  first = time.perf_counter() - start
  start = time.perf_counter()
  ours = _ours(x, y, l2)
  seconds = [time.perf_counter() - start]
  solved = l2[:: _EVERY.value]
  start = time.perf_counter()
  theirs = [_theirs(x, y, s) for s in solved]
  peer = (time.perf_counter() - start) * len(l2) / len(solved)
  start = time.perf_counter()
  _ours(x, y, l2)
  seconds.append(time.perf_counter() - start)

  def excess(i):
    mine = logistic.objective(x, y, ours.weights[i], ours.bias[i], l2[i])
    model = theirs[i // _EVERY.value]
    return mine / logistic.objective(x, y, model.coef_.T, model.intercept_, l2[i]) - 1

  each = [excess(i) for i in range(0, len(l2), _EVERY.value)]
  steps = [int(m.n_iter_[0]) for m in theirs]
  measure.show(measure.surroundings(("jax", "jaxlib", "numpy", "scikit-learn")) | {
    "examples": _N.value, "width": _D.value, "classes": _CLASSES.value, "num_l2": len(l2),
    "lanes": _LANES.value, "tolerance": _TOLERANCE.value,
    "seconds": max(seconds), "seconds_before_and_after": seconds, "compile_seconds": max(first - seconds[0], 0.0),
    "iterations": int(ours.iterations.sum()), "largest_gap": float(ours.gap.max()),
    "scikit_learn_seconds": peer, "scikit_learn_num_l2_solved": len(solved),
    "scikit_learn_seconds_are_extrapolated": len(solved) < len(l2),
    "scikit_learn_iterations": sum(steps), "scikit_learn_fits_at_1000_iterations": sum(s >= 1000 for s in steps),
    "speed_against_scikit_learn": peer / max(seconds), "speed_with_compiling": peer / first,
    "excess_of_objective": {"largest": max(each), "median": statistics.median(each), "smallest": min(each)},
  })


def made(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns (features float32 [n, d], labels int [n])."""
  rng = np.random.default_rng(0)
  y = rng.integers(0, classes, n)
  deviation = np.arange(1, d + 1)[None] ** -0.5
  x = (0.6 * rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))) * deviation
  turn, _ = np.linalg.qr(rng.normal(size=(d, d)))
  return (x @ turn + rng.normal(size=(1, d))).astype(np.float32), y


def _ours(x: np.ndarray, y: np.ndarray, l2: np.ndarray) -> logistic.Fits:
  return logistic.fit(x, y, _CLASSES.value, l2, tolerance=_TOLERANCE.value, lanes=_LANES.value)


def _theirs(x: np.ndarray, y: np.ndarray, l2: float) -> Any:
  with warnings.catch_warnings(category=ConvergenceWarning, action="ignore"):  # counted
    return LogisticRegression(C=1 / l2, max_iter=1000).fit(x, y)
