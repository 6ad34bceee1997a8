"""The table engine: weights from others' names and layouts into ours, and back, by the same rows.

A row is (our path, their name, how theirs becomes ours):

    ("blocks/fc/kernel", "transformer.resblocks.{}.mlp.c_fc.weight", "OI>IO")

`{}` in their name is the block, counted from 0 (`{+1}`: from 1): the tensors of all blocks are stacked on our leading
axis. How is "" or words in order: "OIHW>HWIO" reorders axes, "1/3" takes the second third of the first axis.
Conversion is exhaustive both ways: a leaf that nothing fills and a tensor that nothing reads raise.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from limber_jax.errors import UserError, did_you_mean
from limber_jax.models.layers import Rows

FLOATS = ("float64", "float32", "float16", "bfloat16")


def convert(rows: Rows, source: Mapping[str, Any], like: dict[str, Any], ignored: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the weights of `source` in the structure of `like`, float32 numpy arrays.

  All names, shapes and types are checked before the first tensor is read; then one tensor is read at a time.

  Args:
    rows: the table. Rows whose path `like` lacks are skipped.
    source: their name -> anything with `shape` and `dtype` that np.asarray reads.
    like: a nested dict of anything with a `shape`.
    ignored: patterns of whole names of tensors that need not be read.

  Raises:
    UserError: a leaf without a row or a tensor, a tensor that no row reads, another shape, or no floating-point type.
  """
  leaves = flax.traverse_util.flatten_dict(like, sep="/")
  plan = {ours: (theirs, how) for ours, theirs, how in rows if ours in leaves}
  read = set()
  for ours, leaf in leaves.items():
    if ours not in plan:
      raise UserError(f"{ours}: nothing in this format fills it")
    theirs, how = plan[ours]
    for name in _names(theirs, leaf.shape):
      if name not in source:
        raise UserError(f"{ours}: no tensor {name!r}{did_you_mean(name, _nearest(name, source))}")
      read.add(name)
      tensor = source[name]
      if str(tensor.dtype) not in FLOATS:
        raise UserError(f"{ours}: expected floating point, got {tensor.dtype} from {name}")
      one = _shape(tuple(tensor.shape), how)
      if one is None:
        raise UserError(f"{ours}: expected {leaf.shape}, got {tuple(tensor.shape)} from {name}")
      got = leaf.shape[:1] * ("{" in theirs) + one
      if got != leaf.shape:
        raise UserError(f"{ours}: expected {leaf.shape}, got {got} from {theirs}")
  skip = re.compile("|".join(ignored) or "(?!)")
  unread = sorted(name for name in source if name not in read and not skip.fullmatch(name))
  if unread:
    raise UserError(f"nothing here reads {unread[0]!r} {tuple(source[unread[0]].shape)}"
                    + (f", nor {len(unread) - 1} other tensors" if unread[1:] else ""))
  return flax.traverse_util.unflatten_dict(
    {ours: _fill(source, *plan[ours], leaf.shape) for ours, leaf in leaves.items()}, sep="/")


def export(rows: Rows, params: dict[str, Any]) -> dict[str, np.ndarray]:
  """Returns {their name: float32 array} of the nested dict `params`: what `convert` by the same rows reads back.

  The arrays are C-contiguous: safetensors 0.8 writes the memory of any other array in the wrong order, silently.

  Raises:
    UserError: a leaf that no row writes.
  """
  leaves = flax.traverse_util.flatten_dict(params, sep="/")
  plan = {ours: (theirs, how) for ours, theirs, how in rows if ours in leaves}
  out: dict[str, np.ndarray] = {}
  parts: dict[str, dict[int, np.ndarray]] = {}
  for ours, leaf in leaves.items():
    if ours not in plan:
      raise UserError(f"{ours}: this format has no place for it")
    theirs, how = plan[ours]
    leaf = np.asarray(leaf, np.float32)
    names = _names(theirs, leaf.shape)
    for name, x in zip(names, leaf if "{" in theirs else [leaf], strict=True):
      part = None
      for word in reversed(how.split()):
        if ">" in word:
          x = _reorder(x, *reversed(word.split(">")))
        else:
          part = int(word.split("/")[0])
      if part is None:
        out[name] = x
      else:
        parts.setdefault(name, {})[part] = x
  out |= {name: np.concatenate([x for _, x in sorted(pieces.items())]) for name, pieces in parts.items()}
  return {name: np.asarray(x, order="C") for name, x in out.items()}  # concatenate keeps a transposed order too


def identity(tree: Mapping[str, Any]) -> Rows:
  """Returns the rows of our own format, where each leaf has the name of its path."""
  return tuple((path, path, "") for path in flax.traverse_util.flatten_dict(tree, sep="/"))


def pattern(theirs: str) -> str:
  """Returns the pattern of all names that `theirs` of a row stands for."""
  return re.sub(r"\\\{(\\\+\d+)?\\\}", r"\\d+", re.escape(theirs))


def _names(theirs: str, shape: tuple[int, ...]) -> list[str]:
  """Returns their names of a leaf: one, or one a block."""
  if "{" not in theirs:
    return [theirs]
  before, first, after = re.fullmatch(r"(.*)\{\+?(\d*)\}(.*)", theirs).groups()
  return [f"{before}{i + int(first or 0)}{after}" for i in range(shape[0])]


def _nearest(name: str, source: Iterable[str]) -> list[str]:
  """Returns the few names that share most with `name`, so that the message need not list hundreds."""
  return sorted(source, key=lambda other: -len(set(re.split(r"\W", name)) & set(re.split(r"\W", other))))[:3]


def _reorder(x: np.ndarray, old: str, new: str) -> np.ndarray:
  if x.ndim != len(old):
    raise ValueError
  return x.transpose([old.index(axis) for axis in new])


def _apply(x: np.ndarray, how: str) -> np.ndarray:
  """Returns a view of their tensor in our layout; raises ValueError if its shape does not allow that."""
  for word in how.split():
    if ">" in word:
      x = _reorder(x, *word.split(">"))
    else:
      part, parts = map(int, word.split("/"))
      if not x.ndim or x.shape[0] % parts:
        raise ValueError
      rows = x.shape[0] // parts
      x = x[part * rows : (part + 1) * rows]
  return x


def _shape(shape: tuple[int, ...], how: str) -> tuple[int, ...] | None:
  """Returns the shape of their tensor in our layout, None where that is impossible."""
  try:
    return _apply(np.broadcast_to(np.float32(0), shape), how).shape
  except ValueError:
    return None


def _fill(source: Mapping[str, Any], theirs: str, how: str, shape: tuple[int, ...]) -> np.ndarray:
  out = np.empty(shape, np.float32)
  names = _names(theirs, shape)
  for name, target in zip(names, out if "{" in theirs else [out], strict=True):
    target[...] = _apply(np.asarray(source[name]), how)
  return out
