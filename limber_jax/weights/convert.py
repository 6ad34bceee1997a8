"""The table engine: weights from others' names and layouts into ours, and back, by the same rows.

A row is (our path, their name, how theirs becomes ours):

    ("blocks/fc/kernel", "transformer.resblocks.{}.mlp.c_fc.weight", "OI>IO")

`{}` in their name is the block, counted from 0 (`{+1}`: from 1): the tensors of all blocks are stacked on our leading
axis. How is "" or words in order: "OIHW>HWIO" reorders axes, "1/3" takes the second third of the first axis, "scalar"
takes the one number of a tensor of any shape that has but one, such as [1].
Conversion is exhaustive both ways: a leaf that nothing fills and a tensor that nothing reads raise.
"""

import functools
import gc
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.errors import UserError, did_you_mean
from limber_jax.models.layers import Rows
from limber_jax.weights import files

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
  plan = _plan(rows, source, like, ignored)
  leaves = flax.traverse_util.flatten_dict(like, sep="/")
  return flax.traverse_util.unflatten_dict(
    {ours: _fill(source, *plan[ours], leaf.shape) for ours, leaf in leaves.items()}, sep="/")


def stream(rows: Rows, source: Mapping[str, Any], like: dict[str, Any], ignored: Iterable[str] = ()) -> dict[str, Any]:
  """Returns the weights of `source` in the structure of `like`, on the devices, in the types and shardings of `like`.

  A leaf of stacked blocks is made on the devices and filled there, one tensor of `source` at a time. The host then
  holds that tensor and its copy in our layout, in the narrower of the two types, and no more. Every process must call
  this; each reads what its own devices need.

  Args:
    rows, source, ignored: as of `convert`.
    like: a nested dict of ShapeDtypeStructs; where one has no sharding, the leaf goes to the first device.

  Raises:
    UserError: as of `convert`, before anything is read.
  """
  plan = _plan(rows, source, like, ignored)
  leaves = flax.traverse_util.flatten_dict(like, sep="/")
  return flax.traverse_util.unflatten_dict(
    {ours: _place(source, *plan[ours], leaf) for ours, leaf in leaves.items()}, sep="/")


def _plan(rows: Rows, source: Mapping[str, Any], like: dict[str, Any], ignored: Iterable[str]
          ) -> dict[str, tuple[str, str]]:
  """Returns {our path: (their name, how)} once all names, shapes and types are found to fit; raises as `convert`."""
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
      one = shape_of(tuple(tensor.shape), how)
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
  return plan


def export(rows: Rows, params: dict[str, Any]) -> dict[str, np.ndarray]:
  """Returns {their name: float32 array} of the nested dict `params`: what `convert` by the same rows reads back.

  The arrays are C-contiguous: safetensors 0.8 writes the memory of any other array in the wrong order, silently.

  Raises:
    UserError: a leaf that no row writes.
  """
  leaves = flax.traverse_util.flatten_dict(params, sep="/")
  out: dict[str, np.ndarray] = {}
  parts: dict[str, dict[int, np.ndarray]] = {}
  for ours, theirs, how in plan_export(rows, params):
    leaf = np.asarray(leaves[ours], np.float32)
    names = _names(theirs, leaf.shape)
    for name, x in zip(names, leaf if "{" in theirs else [leaf], strict=True):
      part = None
      for word in reversed(how.split()):
        if ">" in word:
          x = _reorder(x, *reversed(word.split(">")))
        elif word != "scalar":
          part = int(word.split("/")[0])
      if part is None:
        out[name] = x
      else:
        parts.setdefault(name, {})[part] = x
  out |= {name: np.concatenate([x for _, x in sorted(pieces.items())]) for name, pieces in parts.items()}
  return {name: np.asarray(x, order="C") for name, x in out.items()}  # concatenate keeps a transposed order too


def plan_export(rows: Rows, params: dict[str, Any]) -> Rows:
  """Returns one row for each leaf of the nested dict `params`; raises UserError for a leaf that no row writes."""
  rows_of = {row[0]: row for row in rows}
  leaves = flax.traverse_util.flatten_dict(params, sep="/")
  for ours in leaves:
    if ours not in rows_of:
      raise UserError(f"{ours}: this format has no place for it")
  return tuple(rows_of[ours] for ours in leaves)


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
    elif word == "scalar":
      x = x.reshape(())  # ValueError where there are more
    else:
      part, parts = map(int, word.split("/"))
      if not x.ndim or x.shape[0] % parts:
        raise ValueError
      rows = x.shape[0] // parts
      x = x[part * rows : (part + 1) * rows]
  return x


def shape_of(shape: tuple[int, ...], how: str) -> tuple[int, ...] | None:
  """Returns the shape of their tensor in our layout, None where that is impossible."""
  try:
    return _apply(np.broadcast_to(np.float32(0), shape), how).shape
  except ValueError:
    return None


def _fill(source: Mapping[str, Any], theirs: str, how: str, shape: tuple[int, ...]) -> np.ndarray:
  out = np.empty(shape, np.float32)
  names = _names(theirs, shape)
  for name, target in zip(names, out if "{" in theirs else [out], strict=True):
    target[...] = _apply(_view(source[name]), how)
    if not np.isfinite(target.sum(dtype=np.float64)):
      raise UserError(f"{name} holds numbers that are not finite")
  return out


def _view(tensor: Any) -> np.ndarray:
  """Returns an array to look at: of a tensor in a file no more is read than is looked at."""
  return tensor.view() if isinstance(tensor, files.Tensor) else np.asarray(tensor)


def _place(source: Mapping[str, Any], theirs: str, how: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns one leaf on the devices."""
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  if "{" not in theirs:
    out = _to_devices(source[theirs], how, leaf.shape, leaf.dtype, sharding)
    return out if out.dtype == leaf.dtype else _cast(leaf.dtype, sharding)(out)
  # A block lies as the leaf does without its first axis.
  one = sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    one = jax.sharding.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
  zeros, put = _programs(leaf.shape, leaf.dtype, sharding)
  out = zeros()
  for i, name in enumerate(_names(theirs, leaf.shape)):
    # Waiting keeps blocks from queueing up in memory where reading is faster than the devices.
    out = jax.block_until_ready(put(out, _to_devices(source[name], how, leaf.shape[1:], leaf.dtype, one), np.int32(i)))
  return out


@functools.lru_cache(64)  # many leaves of a model are alike
def _programs(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding) -> tuple[Any, Any]:
  """Returns (make a leaf of zeros, put a block of any type into it at an index)."""

  def put(out, block, i):
    return jax.lax.dynamic_update_index_in_dim(out, block.astype(dtype), i, 0)

  return (jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding),
          jax.jit(put, donate_argnums=0, out_shardings=sharding))


@functools.lru_cache(64)
def _cast(dtype: Any, sharding: jax.sharding.Sharding) -> Any:
  return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)


def _to_devices(tensor: Any, how: str, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding
                ) -> jax.Array:
  """Returns a tensor in our layout on the devices: in `dtype`, or in its own type where that is narrower."""
  view = _apply(_view(tensor), how)
  narrow = np.dtype(dtype) if np.dtype(dtype).itemsize <= view.dtype.itemsize else view.dtype
  where = sharding.addressable_devices_indices_map(shape)
  pieces: dict[tuple, np.ndarray] = {}  # devices that hold the same piece share one copy on the host
  for index in where.values():
    if _bounds(index) not in pieces:
      pieces[_bounds(index)] = np.array(view[index], narrow, order="C")
  del view  # and with it the file's pages, before the devices' copies are made
  arrays = [jax.device_put(pieces[_bounds(index)], device) for device, index in where.items()]
  out = jax.block_until_ready(jax.make_array_from_single_device_arrays(shape, sharding, arrays))
  del pieces
  gc.collect(0)  # only then does JAX let go of the host's copies
  return out


def _bounds(index: tuple[slice, ...]) -> tuple[tuple[int | None, int | None], ...]:
  return tuple((s.start, s.stop) for s in index)
