"""How sure an accuracy is, whether two differ by chance, and what a shift of the data does to it.

Accuracies are fractions. Source: arXiv 2103.00020, sections 3.3 and 5, and Taori et al., arXiv 2007.00644.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats


def interval(right: int, count: int, level: float = 0.995) -> tuple[float, float]:
  """Returns Clopper and Pearson's interval of an accuracy: it holds the true one with at least the probability `level`.

  Args:
    right: examples that are right.
    count: all examples, at least 1.
    level: CLIP's is 0.995.

  Raises:
    ValueError: `right` is none of 0 … count, there are no examples, or the level is none between 0 and 1.
  """
  _check(right, count)
  if not 0 < level < 1:
    raise ValueError(f"level={level}: wanted a probability between 0 and 1")
  tail = (1 - level) / 2
  low = stats.beta.ppf(tail, right, count - right + 1) if right else 0.0
  high = stats.beta.ppf(1 - tail, right + 1, count - right) if right < count else 1.0
  return float(low), float(high)


def at_least(right: int, count: int, accuracy: float) -> float:
  """Returns the probability of `right` or more of `count` examples where each is right with the probability `accuracy`.

  This is the p-value of the exact one-sided binomial test: small where the examples are easier than chance explains.

  Raises:
    ValueError: `right` is none of 0 … count, there are no examples, or the accuracy is none of 0 … 1.
  """
  _check(right, count)
  if not 0 <= accuracy <= 1:
    raise ValueError(f"accuracy={accuracy}: wanted 0 to 1")
  return float(stats.binom.sf(right - 1, count, accuracy))


def bonferroni(p_values: Sequence[float]) -> list[float]:
  """Returns p-values times their number, at most 1: each then holds for all of the tests together."""
  return [min(1.0, p * len(p_values)) for p in p_values]


@dataclass(frozen=True)
class Line:
  """What is expected of a model under a shift: a straight line between the logits of both accuracies."""

  slope: float
  intercept: float

  def __call__(self, accuracy: float) -> float:
    """Returns the accuracy expected on the shifted data of a model with `accuracy` on data without the shift."""
    if accuracy in (0, 1):  # where the line ends, whatever its slope
      return float(accuracy)
    return float(special.expit(self.intercept + self.slope * special.logit(accuracy)))


def fit(accuracies: Sequence[float], shifted: Sequence[float]) -> Line:
  """Returns the least-squares line through the logits of the accuracies of models, without and with the shift.

  Raises:
    ValueError: fewer than two models, all of one accuracy, or one whose logit is no number.
  """
  x, y = np.asarray(accuracies, np.float64), np.asarray(shifted, np.float64)
  if x.ndim != 1 or x.shape != y.shape or len(np.unique(x)) < 2:
    raise ValueError(f"wanted two or more models of different accuracies, got shapes {x.shape} and {y.shape}")
  if not all(((a > 0) & (a < 1)).all() for a in (x, y)):
    raise ValueError("wanted accuracies between 0 and 1, without 0 and 1 themselves: these have no logit")
  found = stats.linregress(special.logit(x), special.logit(y))
  return Line(float(found.slope), float(found.intercept))


def effective_robustness(accuracy: float, shifted: float, line: Line) -> float:
  """Returns how far a model's accuracy under the shift lies above what `line` expects."""
  return shifted - line(accuracy)


def relative_robustness(shifted: float, before: float) -> float:
  """Returns what an intervention gains under the shift: the accuracy with it less the accuracy `before`."""
  return shifted - before


def gap_cut(accuracy: float, shifted: float, line: Line) -> float:
  """Returns the share of the expected drop from `accuracy` that a model does not suffer: 0 as expected, 1 no drop.

  Raises:
    ValueError: no drop is expected at this accuracy.
  """
  gap = accuracy - line(accuracy)
  if gap <= 0:
    raise ValueError(f"no drop is expected from an accuracy of {accuracy}")
  return 1 - (accuracy - shifted) / gap


def _check(right: int, count: int) -> None:
  if not 0 <= right <= count or count < 1:
    raise ValueError(f"{right} right of {count}: wanted at least one example, and 0 to all of them right")
