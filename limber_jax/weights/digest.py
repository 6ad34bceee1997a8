"""A short name of a tree of arrays that changes with any bit of it, whatever devices hold it.

What a projection was trained against is told by this: cheap enough to take of a whole language model where it lies.
It finds mistakes; it is no defence against someone who seeks two models of the same digest.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.runtime.parallel import path_name

_SEEDS = (0x9E3779B9, 0x85EBCA6B)  # of two independent sums of 32 bits a leaf


def digest(tree: Any) -> str:
  """Returns 32 hexadecimal digits (128 bits) of the paths, shapes, types and bits of all leaves.

  Each leaf is summed on its own devices in integers that wrap around, so that neither the sharding nor the order of
  the additions matters. An element is mixed with its position by a bijection: changing any single one changes both
  sums for certain; any other change, such as two elements in each other's place, escapes with a chance of 2⁻⁶⁴.

  Args:
    tree: arrays of jax or numpy. Every process of a multi-process run must call this on arrays that span processes.

  Raises:
    ValueError: a leaf of complex numbers or objects.
  """
  leaves = []
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    name = path_name(path)
    if x.dtype.kind not in "fiub" and x.dtype != jnp.bfloat16:
      raise ValueError(f"{name}: no digest of {x.dtype}")
    leaves.append((name, x.shape, str(x.dtype), tuple(int(n) for n in np.asarray(_sums(x)))))
  return hashlib.sha256(repr(sorted(leaves)).encode()).hexdigest()[:32]


def _sums(x: Any) -> jax.Array:
  """Returns uint32 [2] of one leaf, on every device that holds a part of it."""
  if isinstance(x, np.ndarray) and x.dtype.itemsize == 8:  # which jax would cut to 32 bits
    x = np.array(x, order="C").reshape(-1).view(np.uint32).reshape(*x.shape, 2)
  sharding = getattr(x, "sharding", None)
  everywhere = jax.sharding.NamedSharding(sharding.mesh, jax.P()) if isinstance(
    sharding, jax.sharding.NamedSharding) else None
  return _jitted(everywhere)(x)


@functools.cache
def _jitted(out_sharding: Any) -> Any:
  return jax.jit(_words, out_shardings=out_sharding)


def _words(x: jax.Array) -> jax.Array:
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  if x.dtype.itemsize == 8:  # an array of jax's under jax_enable_x64
    x = jax.lax.bitcast_convert_type(x, jnp.uint32)  # one more axis, of 2
  x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
  sums = []
  for seed in _SEEDS:
    position = jnp.full((1,) * x.ndim, seed, jnp.uint32)
    for axis, size in enumerate(x.shape):
      # Numbers of their own for each axis, because arrays may have more elements than uint32 can count.
      along = _mix(jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(2) + jnp.uint32(seed * (2 * axis + 1) & 0xFFFFFFFF))
      position = position * jnp.uint32(0x01000193) + along.reshape((-1,) + (1,) * (x.ndim - axis - 1))[
        (None,) * axis]
    odd = _mix(position) | jnp.uint32(1)
    sums.append(jnp.sum(_mix(x * odd + position), dtype=jnp.uint32))
  return jnp.stack(sums)


def _mix(x: jax.Array) -> jax.Array:
  """Returns murmur3's last step, a bijection of uint32 in which every bit of x reaches every bit."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
