"""Metrics of classification, as the data sets of arXiv 2103.00020, Table 9, are measured."""

import numpy as np


def top(ranks: np.ndarray, k: int) -> float:
  """Returns the share of examples whose right class is among the first k.

  Args:
    ranks: int [N], of each example's right class, 0 the best.
    k: classes.
  """
  return float(np.mean(ranks < k))


def mean_per_class(labels: np.ndarray, right: np.ndarray) -> float:
  """Returns the share of examples that are right, averaged over the classes that have examples.

  Args:
    labels: int [N].
    right: bool [N].
  """
  there, hits = np.bincount(labels), np.bincount(labels, weights=right)
  return float(np.mean(hits[there > 0] / there[there > 0]))


def f1_macro(labels: np.ndarray, predicted: np.ndarray) -> float:
  """Returns the F1 score, averaged over the classes that have examples; of a class that nothing was right of, 0.

  Args:
    labels: int [N].
    predicted: int [N].
  """
  each = []
  for c in np.unique(labels):
    right = np.count_nonzero((labels == c) & (predicted == c))
    each.append(2 * right / (np.count_nonzero(labels == c) + np.count_nonzero(predicted == c)))
  return float(np.mean(each))


def worst_group(groups: np.ndarray, right: np.ndarray) -> float:
  """Returns the share of examples that are right, in the group that has the least.

  Args:
    groups: int [N].
    right: bool [N].
  """
  return float(min(np.mean(right[groups == g]) for g in np.unique(groups)))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
  """Returns the 11-point interpolated average precision of one class, as PASCAL VOC 2007 defines it.

  It is the mean over the recalls 0, 0.1, …, 1 of the highest precision that is had at this recall or a higher one, 0
  where it is not reached. Examples are sorted by score, equal ones as they come; what is not a number comes last and
  finds nothing.

  Args:
    scores: float [N].
    truth: int [N]: 1 the class is there, -1 it is not, 0 only difficult objects of it are: these examples do not count.

  Raises:
    ValueError: nowhere is the class there.

  Source: M. Everingham et al., The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010, section 4.2.
  """
  if not np.any(truth > 0):
    raise ValueError("average precision of a class that is nowhere")
  order = np.argsort(-scores, kind="stable")
  order = order[truth[order] != 0]
  found = np.cumsum((truth[order] > 0) & ~np.isnan(scores[order]))
  precision = found / np.arange(1, len(order) + 1)
  # Compared as whole numbers: in fractions, 3 of 10 found would miss the level 0.3.
  reached = 10 * found[None] >= np.arange(11)[:, None] * np.count_nonzero(truth > 0)  # [11, N]
  return float(np.mean(np.where(reached, precision[None], 0).max(axis=1)))


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
  """Returns the mean of `average_precision` over the classes that are anywhere.

  Args:
    scores: float [N, C].
    truth: int [N, C], as there.

  Raises:
    ValueError: no class is anywhere.
  """
  if not np.any(truth > 0):
    raise ValueError("average precision of classes that are nowhere")
  return float(np.mean([average_precision(scores[:, c], truth[:, c]) for c in np.flatnonzero((truth > 0).any(axis=0))]))


def mean_area(scores: np.ndarray, truth: np.ndarray) -> float:
  """Returns the mean over classes of the average precision at each right example, 0 of a class that is nowhere.

  Examples are sorted by score, equal ones as they come; what is not a number comes last and finds nothing.

  Args:
    scores: float [N, C].
    truth: int [N, C], as for `average_precision`.

  Source: https://github.com/LAION-AI/CLIP_benchmark, metrics/zeroshot_classification.py.
  """

  def area(scores: np.ndarray, truth: np.ndarray) -> float:
    order = np.argsort(-scores, kind="stable")
    order = order[truth[order] != 0]
    right = truth[order] > 0
    found = right & ~np.isnan(scores[order])
    precision = np.cumsum(found) / np.arange(1, len(order) + 1)
    return float(precision[found].sum() / max(np.count_nonzero(right), 1))

  return float(np.mean([area(scores[:, c], truth[:, c]) for c in range(truth.shape[1])]))


def roc_auc(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the area under the ROC curve: how often an example of class 1 has a higher score than one of class 0.

  Equal scores count a half, what is not a number loses.

  Args:
    scores: float [N], higher for class 1.
    labels: int [N], 0 or 1.

  Raises:
    ValueError: one of the classes has no examples.
  """
  one, zero = scores[labels == 1], np.sort(scores[(labels == 0) & ~np.isnan(scores)])
  pairs = len(one) * np.count_nonzero(labels == 0)
  if not pairs:
    raise ValueError("a ROC curve of one class only")
  one = one[~np.isnan(one)]
  below = np.searchsorted(zero, one, "left").sum() + np.searchsorted(zero, one, "right").sum()
  return float(below / 2 / pairs)
