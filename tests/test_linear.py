"""Layers whose gradients are float32 where they compute in bfloat16, against flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from limber_jax.models.linear import Conv, Dense, broadcast
from limber_jax.runtime import parallel

# A layer, flax's, and the shape of its input.
LAYERS = {
  "dense": (lambda d: Dense(6, dtype=d), lambda d: nn.Dense(6, dtype=d), (4, 5, 8)),
  "dense without a bias": (lambda d: Dense(6, use_bias=False, dtype=d), lambda d: nn.Dense(6, use_bias=False, dtype=d),
                           (4, 8)),
  **{f"conv {k} by {s}, {p} around {n}": (
    lambda d, k=k, s=s, p=p: Conv(6, k, s, p, dtype=d),
    lambda d, k=k, s=s, p=p: nn.Conv(6, (k, k), (s, s), padding=p, dtype=d), (2, n, n + 1, 4))
    for k, s, p, n in ((1, 1, 0, 5), (3, 1, 1, 6), (3, 2, 1, 7), (3, 2, 1, 8), (7, 2, 3, 9), (4, 4, 0, 8),
                       (4, 4, 0, 11))}}


def gradients(layer, params, x, weight):
  """Returns the gradients of a sum of the outputs, weighted so that every one counts otherwise."""
  return jax.jit(jax.grad(lambda p, x: (layer.apply({"params": p}, x).astype(jnp.float32) * weight).sum(), (0, 1)))(
    params, x)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_flaxs_and_its_gradients_in_bfloat16_are_of_the_rounded_numbers_alone(name):
  ours, theirs, shape = LAYERS[name]
  x = jax.random.normal(jax.random.key(0), shape)
  params = ours("float32").init(jax.random.key(1), x)["params"]
  assert jax.tree.all(jax.tree.map(np.array_equal, params, theirs("float32").init(jax.random.key(1), x)["params"]))
  y = ours("float32").apply({"params": params}, x)
  np.testing.assert_array_equal(y, theirs("float32").apply({"params": params}, x))
  # Numbers that bfloat16 holds, and cotangents too: what differs then is only how products are added up and rounded.
  low = jax.tree.map(lambda v: v.astype(jnp.bfloat16).astype(jnp.float32), (params, x))
  weight = jax.random.normal(jax.random.key(2), y.shape).astype(jnp.bfloat16).astype(jnp.float32)
  want, want_x = gradients(theirs("float32"), *low, weight)
  got, got_x = gradients(ours("bfloat16"), *low, weight)
  assert jax.tree.all(jax.tree.map(lambda g: g.dtype == jnp.float32, got))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  np.testing.assert_allclose(got_x, want_x, rtol=2**-7, atol=2**-7 * np.abs(want_x).max())  # bfloat16 has 8 bits


def test_what_is_frozen_costs_no_product():
  layer, x = Dense(6, use_bias=False, dtype="bfloat16"), jnp.ones((4, 8))
  params = layer.init(jax.random.key(0), x)["params"]

  def products(of):
    f = jax.grad(lambda p, x: layer.apply({"params": p}, x).astype(jnp.float32).sum(), of)
    return str(jax.make_jaxpr(f)(params, x)).count("dot_general[")

  assert (products((0, 1)), products(0), products(1)) == (3, 2, 2)


def test_gradients_are_added_up_over_devices_in_float32():
  mesh = parallel.make_mesh({"data": 8})
  layer, x = Dense(16, dtype="bfloat16"), jax.random.normal(jax.random.key(1), (512, 8))
  params = layer.init(jax.random.key(0), x)["params"] | {"scale": jnp.ones(16)}

  def loss(params, x):
    y = layer.apply({"params": params}, x)
    return jnp.square((y * broadcast(params["scale"], y)).astype(jnp.float32)).mean()

  whole, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(parallel.BATCH))
  got = jax.jit(jax.grad(loss), in_shardings=(whole, rows), out_shardings=whole)(params, x)
  want = jax.jit(jax.grad(loss))(params, x)
  # Added up in bfloat16 they would differ by 2⁻⁸.
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
