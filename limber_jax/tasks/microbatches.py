"""A batch in microbatches: less memory, the same gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from limber_jax.runtime.parallel import BATCH, constrain


def split(x: jax.Array, count: int) -> jax.Array:
  """[N, ...] -> [k, N/k, ...], every k-th row to a microbatch, so that each device keeps rows of each microbatch."""
  x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
  return constrain(x, None, BATCH, *(None,) * (x.ndim - 2))


def join(x: jax.Array) -> jax.Array:
  """[k, N/k, ...] -> [N, ...], undoing `split`."""
  return constrain(x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), BATCH, *(None,) * (x.ndim - 2))


def fitting(count: int, rows: int) -> int:
  """Returns in how many microbatches `rows` go: `count`, or the next fewer that divide over the mesh's devices.

  Devices with less than a row of each would wait for the others, and the memory that more microbatches would save is
  theirs already. Outside a mesh, and where the batch itself does not divide, it is `count`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
  return next((k for k in range(count, 0, -1) if count % k == 0 and rows // k % parts == 0), count)


def accumulate_gradients(loss: Callable[..., tuple[jax.Array, dict]], params: Any, batch: dict[str, jax.Array],
                         rng: jax.Array, count: int) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the sums of loss(params, microbatch, rng) = (loss [], metrics) over the microbatches of a batch.

  The gradient for `params` is taken one by one, with the value, so that one microbatch's activations are held at a time
  and nothing is computed twice. It flows to nothing else: not to the batch, nor to what `loss` closes over.

  Args:
    loss: gives a microbatch's share of the whole batch's loss and metrics.
    params: what is trained.
    batch: arrays [N, ...].
    rng: each microbatch gets a key of its own from it; a single microbatch the key itself.
    count: k, divides N; fewer where these do not divide over the devices, see `fitting`.
  """
  count = fitting(count, len(jax.tree.leaves(batch)[0]))
  if count == 1:
    return loss(params, batch, rng)
  inputs = jax.tree.map(lambda x: split(x, count), batch), jax.random.split(rng, count)

  def run(f):
    """Returns the sum of f(microbatch, rng) over all of them."""
    shapes = jax.eval_shape(f, *jax.tree.map(lambda x: x[0], inputs))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(lambda total, microbatch: (jax.tree.map(jnp.add, total, f(*microbatch)), None), zero, inputs)[0]

  @jax.custom_vjp
  def total(params):
    return run(lambda microbatch, rng: loss(params, microbatch, rng))

  def forward(params):
    return run(lambda microbatch, rng: jax.value_and_grad(loss, has_aux=True)(params, microbatch, rng))

  def backward(gradients, cotangents):
    return (jax.tree.map(lambda g: g * cotangents[0], gradients),)

  total.defvjp(forward, backward)
  return total(params)
