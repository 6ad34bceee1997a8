"""Position embeddings at another image size or context length, as open_clip resamples them when it is asked to.

Of a ViT the grid is resampled bicubically with antialiasing, and the class token's position kept; of a text tower the
positions are resampled linearly. Both are products with small matrices, one an axis.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from limber_jax.errors import UserError
from limber_jax.models.layers import Rows

CUBIC = np.float32(-0.5)  # the parameter of the cubic kernel, as PIL's and of PyTorch's with antialias=True


def fitted(source: Mapping[str, Any], rows: Rows, like: Mapping[str, Any], resample: bool, flag: str
           ) -> Mapping[str, Any]:
  """Returns the tensors with positions of as many patches and tokens as a model has.

  Args:
    source: tensors by their names.
    rows: their table.
    like: of the positions of `rows` that are read, by our path: their shape, [1 + S, D] or [T, D].
    resample: resample what has another shape.
    flag: what asks for that, for messages.

  Raises:
    UserError: other positions, and `resample` does not ask for them; or they are no square grid or of another width.
  """
  theirs = {ours: name for ours, name, _ in rows}
  out = dict(source)
  for ours, shape in like.items():
    name, text = theirs.get(ours, ""), ours.startswith("text/")
    there = tuple(source[name].shape) if name in source else shape
    if there == tuple(shape) or len(there) != 2 or there[1] != shape[1]:
      continue  # what does not fit otherwise is reported by the table engine
    if not resample:
      other = "context length" if text else "image size"
      raise UserError(f"{name} has {there[0]} positions, this config's model {shape[0]}: another {other}; {flag} "
                      "resamples them as open_clip does")
    old = np.asarray(source[name], np.float32)
    out[name] = line(old, shape[0]) if text else grid(old, shape[0])
  return out


def grid(positions: np.ndarray, count: int) -> np.ndarray:
  """Returns float32 [count, D] of the positions [1 + s², D] of a class token and a square grid; raises UserError."""
  old, new = math.isqrt(len(positions) - 1), math.isqrt(count - 1)
  if old * old != len(positions) - 1 or new * new != count - 1:
    raise UserError(f"{len(positions)} and {count} positions are not both a class token's and a square grid's")
  matrix = bicubic(old, new)
  patches = positions[1:].reshape(old, old, -1)
  patches = np.einsum("ai,bj,ijd->abd", matrix, matrix, patches).reshape(new * new, -1)
  return np.concatenate([positions[:1], patches])


def line(positions: np.ndarray, count: int) -> np.ndarray:
  """Returns float32 [count, D] of the positions [T, D] of a text, linearly between neighbours."""
  old = len(positions)
  # In float32, as PyTorch does: its places are off by 1e-5 of a position.
  at = np.clip((np.arange(count, dtype=np.float32) + 0.5) * np.float32(old / count) - 0.5, 0, None)
  low = np.minimum(at.astype(int), old - 1)
  share = (at - low).astype(np.float32)[:, None]
  return (1 - share) * positions[low] + share * positions[np.minimum(low + 1, old - 1)]


def bicubic(old: int, new: int) -> np.ndarray:
  """Returns float32 [new, old]: what each of `old` samples gives to each of `new`, with antialiasing."""
  scale = np.float32(old / new)  # in float32 all of it, as PyTorch does: its places are off by 1e-6 of a position
  stretch = max(scale, np.float32(1))  # of the kernel, where samples become fewer
  centre = (np.arange(new, dtype=np.float32)[:, None] + np.float32(0.5)) * scale
  x = np.abs((np.arange(old, dtype=np.float32)[None] - centre + np.float32(0.5)) / stretch)
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * CUBIC
  weights = np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))
  return weights / weights.sum(1, keepdims=True)
