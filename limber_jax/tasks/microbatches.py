"""A batch in pieces: less memory, the same gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from limber_jax.runtime.parallel import BATCH, constrain


def split(x: jax.Array, pieces: int) -> jax.Array:
  """[N, ...] -> [k, N/k, ...], every k-th row to a piece, so that each device keeps rows of each piece."""
  x = x.reshape(-1, pieces, *x.shape[1:]).swapaxes(0, 1)
  return constrain(x, None, BATCH, *(None,) * (x.ndim - 2))


def join(x: jax.Array) -> jax.Array:
  """[k, N/k, ...] -> [N, ...], undoing `split`."""
  return constrain(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), BATCH, *(None,) * (x.ndim - 2))


def fitting(pieces: int, rows: int) -> int:
  """Returns in how many pieces a batch of `rows` goes: `pieces`, or the next fewer that divide over the mesh's devices.

  Devices with less than a row of each piece would wait for the others, and the memory that more pieces would save is
  theirs already. Outside a mesh, and where the batch itself does not divide, it is `pieces`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
  return next((k for k in range(pieces, 0, -1) if pieces % k == 0 and rows // k % parts == 0), pieces)


def accumulate_gradients(loss: Callable[..., tuple[jax.Array, dict]], params: Any, batch: dict[str, jax.Array],
                         rng: jax.Array, pieces: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sums of loss(params, piece, rng) = (loss [], metrics) over the pieces of a batch.

  The gradient for `params` is taken piece by piece, with each piece's value, so that one piece's activations are held
  at a time and nothing is computed twice. It flows to nothing else: not to the batch, nor to what `loss` closes over.

  Args:
    loss: gives a piece's share of the whole batch's loss and metrics.
    params: what is trained.
    batch: arrays [N, ...].
    rng: each piece gets a key of its own from it; a single piece the key itself.
    pieces: k, divides N; fewer where these do not divide over the devices, see `fitting`.
  """
  pieces = fitting(pieces, len(jax.tree.leaves(batch)[0]))
  if pieces == 1:
    return loss(params, batch, rng)
  inputs = jax.tree.map(lambda x: split(x, pieces), batch), jax.random.split(rng, pieces)

  def run(f):
    """Returns the sum of f(piece, rng) over the pieces."""
    shapes = jax.eval_shape(f, *jax.tree.map(lambda x: x[0], inputs))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(lambda total, piece: (jax.tree.map(jnp.add, total, f(*piece)), None), zero, inputs)[0]

  @jax.custom_vjp
  def total(params):
    return run(lambda piece, rng: loss(params, piece, rng))

  def forward(params):
    return run(lambda piece, rng: jax.value_and_grad(loss, has_aux=True)(params, piece, rng))

  def backward(gradients, cotangents):
    return (jax.tree.map(lambda g: g * cotangents[0], gradients),)

  total.defvjp(forward, backward)
  return total(params)
