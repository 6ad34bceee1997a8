"""CLIPScore and RefCLIPScore of captions by their embeddings. Source: arXiv 2104.08718, section 3.

The paper's code differs from its formula in one thing: it does not clip the cosine with the references at 0, which can
make a RefCLIPScore negative, or divide by nearly 0. Here it is clipped, as the formula has it. In both, the image's
part of the harmonic mean is CLIPScore, weight included, and the references' part is a bare cosine.
"""

from collections.abc import Sequence

import numpy as np

WEIGHT = 2.5
PREFIX = "A photo depicts "  # before every caption and reference that is embedded


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
  """Returns 2.5 * max(cosine, 0) of each image with its caption, float64 [N].

  Args:
    images: embeddings [N, E] of any length but 0.
    texts: embeddings [N, E] of any length but 0.

  Raises:
    ValueError: the shapes differ.
  """
  if images.shape != texts.shape or images.ndim != 2:
    raise ValueError(f"expected embeddings [N, E] of images and texts, got {images.shape} and {texts.shape}")
  return WEIGHT * np.maximum(np.sum(_unit(images) * _unit(texts), axis=-1), 0.0)


def ref_clip_score(images: np.ndarray, texts: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the harmonic mean of CLIPScore and the best max(cosine, 0) of caption and references, float64 [N].

  It is 0 where one of the two is.

  Args:
    images: embeddings [N, E].
    texts: embeddings [N, E].
    references: N arrays [R, E], one or more references each.

  Raises:
    ValueError: the shapes differ, or an image has no references.
  """
  if len(references) != len(texts) or any(r.ndim != 2 or not len(r) or r.shape[1] != texts.shape[1]
                                          for r in references):
    raise ValueError(f"expected references [R, {texts.shape[1]}] of {len(texts)} captions, R at least 1")
  score = clip_score(images, texts)
  best = np.array([np.maximum((_unit(r) @ t).max(), 0.0) for r, t in zip(references, _unit(texts), strict=True)])
  total = score + best
  return np.where(total > 0, 2 * score * best / np.where(total > 0, total, 1.0), 0.0)


def _unit(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)
