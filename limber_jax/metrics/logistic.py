"""L2-regularised multinomial logistic regression at scikit-learn's optimum, for many strengths and subsets at once.

The objective at a strength λ is Σ losses + λ/2 ‖W‖², the intercept free: λ times scikit-learn's at C = 1/λ. What makes
it quick changes nothing at the optimum:

- Features are brought to mean 0, which the intercept takes up, and turned into the axes of their covariance, which
  leaves the norm. There the curvature of the loss is close to diagonal, and a diagonal is what L-BFGS starts from.
- Of fewer rows than features only the space of the rows is kept; the optimum lies in it.
- A step needs two products with the features however long the search along it: logits move on a line.
- Strengths are solved from the strongest to the weakest, each from where the two before it point.
- Losses and residuals are made of differences to the logit of the right class, so that they are precise in float32
  also where they are next to nothing: with weak regularisation most data can be separated.

Source: D. C. Liu and J. Nocedal, On the limited memory BFGS method, 1989.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from limber_jax.runtime.parallel import BATCH, make_mesh

A_DECADE = 8      # strengths
# CLIP's: 96 steps of one size. Its λ multiplies half the squared norm beside the sum of losses: scikit-learn's 1 / C.
GRID = np.logspace(-6, 6, 12 * A_DECADE + 1)

HISTORY = 10      # pairs of steps and changes of the gradient
SEARCHES = 20     # points looked at along a step, at most
BLOCK = 2**16     # rows that are held in float64 at a time
FAR = 1e-3        # below the tolerance, of a decrease that is promised and not proven
SMALLEST = 2**30  # multiplications a product should have on each device


@dataclass(frozen=True)
class Fits:
  """Classifiers at each of R strengths, of each of S subsets where there are subsets."""

  strengths: np.ndarray   # float64 [R], as they were asked for
  weights: np.ndarray     # float32 [(S,) R, d, C]; zeros of a class without examples
  bias: np.ndarray        # float32 [(S,) R, C]; -inf of a class without examples
  gap: np.ndarray         # float32 [(S,) R]: the objective is above its minimum by this share of it at most
  iterations: np.ndarray  # int32 [(S,) R]


def fit(features: np.ndarray, labels: np.ndarray, classes: int, strengths: Sequence[float], *,
        subsets: np.ndarray | None = None, tolerance: float = 1e-9, max_iterations: int = 1000, lanes: int = 1,
        devices: Sequence[Any] | None = None) -> Fits:
  """Returns a classifier for each strength; what it says of x [d] is argmax(x @ weights + bias).

  A fit ends when its gap, ‖gradient‖²/2λ over the objective, is below the tolerance; that is a bound, for the objective
  curves by λ at least. It also ends when the decrease that the next step promises is far below the tolerance, or what
  float32 can tell: where the loss itself curves, the bound is too careful. Classes that only just overlap are hard: at
  weak strengths a fit may then take all iterations, as scikit-learn's L-BFGS does, the more so the further the strength
  is from the one before it.

  Args:
    features: float [n, d].
    labels: int [n], in 0..C-1.
    classes: C.
    strengths: λ, R of them, positive, in any order; close ones are quicker than distant ones.
    subsets: int [S, m]: rows of each of several training sets of one size; None = one, of all rows.
    tolerance: of the objective, relative.
    max_iterations: of each fit.
    lanes: pieces that the range of strengths is solved in at once. Each begins anew: more than 1 only pays where a
      product with the features is too small for the device.
    devices: of this process, over which rows are spread if there are enough of them; None = all.

  Raises:
    ValueError: shapes that do not go together, no rows, features that are no numbers, labels out of range, strengths
      that are not positive.
  """
  features, labels, wanted = np.asarray(features), np.asarray(labels), np.asarray(strengths, np.float64)
  if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
    raise ValueError(f"expected features [n, d] and labels [n], got {features.shape} and {labels.shape}")
  if not np.isfinite(features).all():
    raise ValueError("features: some are no numbers")
  if labels.min() < 0 or labels.max() >= classes:
    raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
  if wanted.ndim != 1 or not len(wanted) or not np.all(wanted > 0):
    raise ValueError(f"strengths: expected positive numbers, got {strengths}")
  rows = np.arange(len(labels))[None] if subsets is None else np.asarray(subsets)
  ranked, where = np.unique(-wanted, return_inverse=True)  # the strongest first, each once
  lanes = min(lanes, len(ranked))
  # Pieces of one length: the last one repeats its weakest.
  paths = np.append(-ranked, np.repeat(-ranked[-1:], -len(ranked) % lanes)).reshape(lanes, -1)  # [lanes, R/lanes]

  turned = [_turn(features, r) for r in rows]
  x, spectrum, axes, means = (np.stack(part) for part in zip(*turned, strict=True))
  if devices is None:
    devices = jax.local_devices()
  # Rounding depends on the number of devices, and small problems gain nothing from more.
  devices = devices[: max(1, x.size * classes // SMALLEST)]
  short = -x.shape[1] % len(devices)
  x = np.pad(x, ((0, 0), (0, short), (0, 0)))
  y = np.pad(labels[rows].astype(np.int32), ((0, 0), (0, short)), mode="edge")
  real = np.pad(np.ones(rows.shape, bool), ((0, 0), (0, short)))
  by_rows = NamedSharding(make_mesh({"data": -1}, devices), P(None, BATCH))
  found = _solve(*(jax.device_put(v, by_rows) for v in (x, y, real)), spectrum, paths.astype(np.float32),
                 np.float32(tolerance), classes=classes, limit=max_iterations)

  def asked(v):  # [S, lanes, R/lanes, ...] -> [S, R, ...]
    return np.asarray(v).reshape(len(rows), -1, *v.shape[3:])[:, where.reshape(-1)]

  solved, gap, iterations = map(asked, found)
  # For the features as they came. In float64 one subset at a time.
  weights = np.stack([(a[None] @ s[:, :-1]).astype(np.float32) for a, s in zip(axes, solved, strict=True)])
  bias = np.stack([s[:, -1] - (a.T @ m) @ s[:, :-1] for a, m, s in zip(axes, means, solved, strict=True)])
  there = np.stack([np.bincount(labels[r], minlength=classes) > 0 for r in rows])  # [S, C]
  bias = np.where(there[:, None], bias, -np.inf).astype(np.float32)
  out = weights, bias, gap, iterations
  return Fits(wanted, *(out if subsets is not None else (v[0] for v in out)))


def fit_each(features: np.ndarray, truth: np.ndarray, strengths: Sequence[float], *,
             devices: Sequence[Any] | None = None) -> Fits:
  """Returns a classifier of its own for each class, one against the rest; class c is there where its score is above 0.

  The score is x @ weights + bias; -inf of a class without examples, inf of one that is everywhere. Of two classes the
  multinomial's weights are w / 2 and -w / 2, whose squared norm is half that of w: it is solved at twice the strength.

  Args:
    features: float [n, d].
    truth: int [n, C]: 1 where the class is there, -1 where not, 0 where that is not to be learnt from.
    strengths: as of `fit`, and so that of scikit-learn's LogisticRegression of two classes at C = 1 / λ.
    devices: as of `fit`.

  Returns:
    Fits, whose gap is the largest and whose iterations are all of those of the classes.

  Raises:
    ValueError: as `fit`.
  """
  features, truth, strengths = np.asarray(features), np.asarray(truth), np.asarray(strengths, np.float64)
  count, width = len(strengths), truth.shape[1]
  weights, bias = np.zeros((count, features.shape[1], width), np.float32), np.empty((count, width), np.float32)
  gap, iterations = np.zeros(count, np.float32), np.zeros(count, np.int32)
  for c, column in enumerate(truth.T):
    rows = column != 0
    there = (column[rows] > 0).astype(np.int64)
    if len(np.unique(there)) < 2:
      bias[:, c] = np.inf if there.any() else -np.inf
      continue
    found = fit(features[rows], there, 2, 2 * strengths, devices=devices)
    weights[..., c] = found.weights[..., 1] - found.weights[..., 0]
    bias[:, c] = found.bias[:, 1] - found.bias[:, 0]
    gap, iterations = np.maximum(gap, found.gap), iterations + found.iterations
  return Fits(strengths, weights, bias, gap, iterations)


def search(score: Callable[[float], float]) -> tuple[float, list[float]]:
  """Returns (the best strength of GRID, those that were looked at, in order): CLIP's parametric binary search.

  It begins with every 100-fold strength, and then halves the distance to the neighbours of the best until that is one
  step of the grid. Of equal scores the strongest strength has the best; at an end of the grid there is one neighbour.

  Args:
    score: of a classifier at a strength, the higher the better; asked once for each.

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


def objective(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, bias: np.ndarray, strength: float
              ) -> float:
  """Returns Σ losses + strength/2 ‖weights‖², in float64.

  Args:
    features: [n, d].
    labels: int [n].
    weights: [d, C].
    bias: [C].
    strength: λ.
  """
  logits = features.astype(np.float64) @ weights.astype(np.float64) + bias.astype(np.float64)[None]
  below = logits - logits[np.arange(len(labels)), labels][:, None]
  below[np.arange(len(labels)), labels] = -np.inf
  top = np.maximum(below.max(axis=1), 0)
  others = np.exp(below - top[:, None]).sum(axis=1)
  # log(1 + …) of what may be far below 1.
  losses = np.where(top == 0, np.log1p(others), top + np.log(np.exp(-top) + others))
  return float(losses.sum() + strength / 2 * np.square(weights, dtype=np.float64).sum())


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


@partial(jax.jit, static_argnames=("classes", "limit"))
def _solve(x, y, real, spectrum, paths, tolerance, *, classes, limit):
  """Returns (weights [S, lanes, r, D, C], gap [S, lanes, r], iterations [S, lanes, r])."""
  one = partial(_walk, tolerance=tolerance, classes=classes, limit=limit)
  lanes = jax.vmap(one, in_axes=(None, None, None, None, 0))
  return jax.vmap(lanes, in_axes=(0, 0, 0, 0, None))(x, y, real, spectrum, paths)


class _Problem(NamedTuple):
  """The data of one fit. Of weights [D, C] the last row is the intercept, as the last column of x is ones."""

  x: jax.Array         # [m, D]
  own: jax.Array       # bool [m, C]: the right class
  real: jax.Array      # bool [m, 1]: False where a row is only there to fill up
  there: jax.Array     # bool [1, C]: classes that have examples
  spectrum: jax.Array  # [D, 1]: Σ x²
  penalty: jax.Array   # [D, 1]: λ, and 0 of the intercept


class _State(NamedTuple):
  """Where a descent stands. `margins` [m, C] are logits less that of the right class."""

  weights: jax.Array    # [D, C]
  margins: jax.Array
  objective: jax.Array
  gradient: jax.Array   # [D, C]
  curvature: jax.Array  # [D, 1]: about that of the objective along each axis
  steps: jax.Array      # [HISTORY, D, C], the newest at (iteration - 1) % HISTORY
  changes: jax.Array    # [HISTORY, D, C]: of the gradient
  inverse: jax.Array    # [HISTORY]: 1 / <step, change>; 0 where there is none yet
  scale: jax.Array      # of the diagonal that L-BFGS starts from
  gap: jax.Array
  iteration: jax.Array
  done: jax.Array


def _walk(x, y, real, spectrum, path, *, tolerance, classes, limit):
  """Returns (weights [r, D, C], gap [r], iterations [r]) at falling strengths [r], each after the others."""
  own = y[:, None] == jnp.arange(classes)[None]
  there = (own & real[:, None]).any(axis=0, keepdims=True)
  features = jnp.arange(x.shape[1])[:, None] < x.shape[1] - 1

  def at(carry, strength):
    before, last, margins, pace, previous = carry
    problem = _Problem(x, own, real[:, None], there, spectrum[:, None], strength * features)
    log = jnp.log(previous / strength)
    ahead = last + jnp.clip(log / pace, 0, 1) * (last - before)
    beyond = _margins(problem, ahead)
    further = _objective(problem, ahead, beyond) < _objective(problem, last, margins)
    end = _descend(problem, jnp.where(further, ahead, last), jnp.where(further, beyond, margins), strength, tolerance,
                   limit)
    carry = last, end.weights, end.margins, jnp.maximum(log, 1e-6), strength
    return carry, (end.weights, end.gap / end.objective, end.iteration)

  nothing = jnp.zeros((x.shape[1], classes))
  level = jnp.where(there, 0, -jnp.inf) + jnp.zeros(own.shape)
  _, out = jax.lax.scan(at, (nothing, nothing, level, jnp.float32(1), path[0]), path)
  return out


def _descend(problem, weights, margins, strength, tolerance, limit):
  """Returns the _State at which L-BFGS ends."""

  def state(weights, margins, **rest):
    objective, gradient, curvature = _look(problem, weights, margins)
    # The intercept, which no penalty holds, has its own curvature in the place of λ.
    gap = jnp.square(gradient[:-1]).sum() / (2 * strength) + jnp.square(gradient[-1]).sum() / (2 * curvature[-1, 0])
    return _State(weights, margins, objective, gradient, curvature, gap=gap, **rest)

  def step(s):
    way = _direction(s)
    slope = (s.gradient * way).sum()
    moved = _product(problem.x, way)
    moved = moved - jnp.where(problem.own, moved, 0).sum(axis=1, keepdims=True)
    far = _search(problem, s, way, moved, slope)
    stride = far * way
    new = state(s.weights + stride, s.margins + far * moved, steps=s.steps, changes=s.changes, inverse=s.inverse,
                scale=s.scale, iteration=s.iteration + 1, done=s.done)
    change = new.gradient - s.gradient
    agreement, place = (stride * change).sum(), s.iteration % HISTORY
    promised = -slope / 2
    return new._replace(
      steps=s.steps.at[place].set(stride), changes=s.changes.at[place].set(change),
      inverse=s.inverse.at[place].set(1 / agreement),
      scale=agreement / (change * change / new.curvature).sum(),
      # Without agreement nothing is left but rounding: the objective is convex.
      done=(new.gap <= tolerance * new.objective) | (promised <= FAR * tolerance * new.objective) | ~(agreement > 0))

  pairs = jnp.zeros((HISTORY, *weights.shape))
  first = state(weights, margins, steps=pairs, changes=pairs, inverse=jnp.zeros(HISTORY), scale=jnp.float32(1),
                iteration=jnp.int32(0), done=jnp.bool(False))
  first = first._replace(done=first.gap <= tolerance * first.objective)
  return jax.lax.while_loop(lambda s: ~s.done & (s.iteration < limit), step, first)


def _direction(s):
  """Returns where L-BFGS goes next, [D, C]: the product of its inverse Hessian with the gradient, downhill."""

  def newest_first(i, carry):
    q, along = carry
    j = (s.iteration - 1 - i) % HISTORY
    a = s.inverse[j] * (s.steps[j] * q).sum()
    return q - a * s.changes[j], along.at[j].set(a)

  def oldest_first(i, q):
    j = (s.iteration + i) % HISTORY
    return q + (along[j] - s.inverse[j] * (s.changes[j] * q).sum()) * s.steps[j]

  q, along = jax.lax.fori_loop(0, HISTORY, newest_first, (s.gradient, jnp.zeros(HISTORY)))
  return -jax.lax.fori_loop(0, HISTORY, oldest_first, s.scale * q / s.curvature)


def _search(problem, s, way, moved, slope):
  """Returns how far to go: where the slope, -|slope| at 0, is within a half of it below 0 or a tenth above.

  The slope rises with the distance, for the objective is convex: Newton's method within a bracket finds the place. An
  objective could not be told from its neighbours near the minimum, in float32; a slope can.
  """
  penalty = (problem.penalty * s.weights * way).sum(), (problem.penalty * way * way).sum()

  def look(far):
    residual, _ = _residual(problem, s.margins + far * moved)
    mean = (residual * moved).sum(axis=1)
    spread = (residual * moved * moved).sum(axis=1) - mean * mean
    return mean.sum() + penalty[0] + far * penalty[1], spread.sum() + penalty[1]

  def more(carry):
    _, here, _, _, _, looks = carry
    return ((here < slope / 2) | (here > -slope / 10)) & (looks < SEARCHES)

  def closer(carry):
    far, here, rise, low, high, looks = carry
    low, high = jnp.where(here < 0, far, low), jnp.where(here < 0, high, far)
    next_ = jnp.minimum(far - here / rise, 4 * far)
    middle = jnp.where(jnp.isinf(high), 2 * far, (low + high) / 2)
    next_ = jnp.where((next_ > low) & (next_ < high), next_, middle)  # also where the slope is no number
    return next_, *look(next_), low, high, looks + 1

  one = jnp.float32(1)
  return jax.lax.while_loop(more, closer, (one, *look(one), jnp.float32(0), jnp.float32(jnp.inf), 1))[0]


def _product(a, b):
  return jnp.matmul(a, b, precision="highest")  # float32 also where the device would take less


def _margins(problem, weights):
  """Returns [m, C]: logits less that of the right class; -inf of a class without examples."""
  logits = _product(problem.x, weights)
  return jnp.where(problem.there, logits - jnp.where(problem.own, logits, 0).sum(axis=1, keepdims=True), -jnp.inf)


def _residual(problem, margins):
  """Returns (P - Y [m, C], losses [m]), 0 in rows that only fill up. Both are precise next to 0."""
  top = margins.max(axis=1, keepdims=True)  # at least the 0 of the right class
  each = jnp.where(problem.own, 0, jnp.exp(margins - top))
  others = each.sum(axis=1, keepdims=True)
  whole = jnp.exp(-top) + others
  losses = jnp.where(top == 0, jnp.log1p(others), top + jnp.log(whole))
  residual = jnp.where(problem.own, -others, each) / whole
  return jnp.where(problem.real, residual, 0), jnp.where(problem.real, losses, 0)[:, 0]


def _objective(problem, weights, margins):
  return _residual(problem, margins)[1].sum() + (problem.penalty * weights * weights).sum() / 2


def _look(problem, weights, margins):
  """Returns (objective, gradient [D, C], curvature [D, 1])."""
  residual, losses = _residual(problem, margins)
  objective = losses.sum() + (problem.penalty * weights * weights).sum() / 2
  gradient = _product(problem.x.T, residual) + problem.penalty * weights
  # Where all classes are as likely, a half of the mean residual is the curvature of the loss; L-BFGS scales the rest.
  mean = jnp.abs(residual).sum(axis=1).sum() / (2 * residual.shape[1] * problem.real.sum())
  return objective, gradient, mean * problem.spectrum + problem.penalty
