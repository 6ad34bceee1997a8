"""Whether what Orbax saved fits what is asked for, and its errors in one line."""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from limber_jax.errors import UserError
from limber_jax.runtime import parallel


def check_fits(path: str, like: Any, where: str, *, cast: bool) -> None:
  """Raises UserError, its message begun by `where`, unless the arrays saved in `path` are named and made as `like`.

  Orbax alone would cast float32 to int32, and say of a missing array only that the trees differ.

  Args:
    path: of a tree of arrays that Orbax saved.
    like: ShapeDtypeStructs.
    where: such as "runs/a/checkpoints/3 does not fit this config: ".
    cast: whether floats may be of another precision.
  """

  def kinds(tree):
    return {parallel.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}

  def same(a, b):
    floats = cast and all(jnp.issubdtype(x.dtype, jnp.floating) for x in (a, b))
    return tuple(a.shape) == tuple(b.shape) and (floats or a.dtype == b.dtype)

  def describe(x):
    return "no such array" if x is None else f"{x.dtype} {tuple(x.shape)}"

  try:
    with ocp.StandardCheckpointer() as reader:
      there = kinds(reader.metadata(path).item_metadata.tree)
  except (ValueError, OSError, AttributeError) as error:
    raise UserError(f"{where}no arrays in {path} ({first_line(error)})") from error
  want = kinds(like)
  for name in sorted(want.keys() | there.keys()):
    a, b = want.get(name), there.get(name)
    if a is None or b is None or not same(a, b):
      raise UserError(f"{where}{name}: expected {describe(a)}, got {describe(b)}")


def reason(error: Exception) -> str:
  """Returns what the operating system said, where it said something, of an exception of Python's or TensorStore's."""
  if isinstance(error, OSError) and error.strerror:
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
  code = re.search(r"os_error_code='(\d+)'", str(error))
  return os.strerror(int(code[1])) if code else first_line(error)


def first_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]
