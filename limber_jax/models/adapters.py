"""MAGMA's bottleneck adapters: small trainable layers inside a frozen language model. Source: arXiv 2112.05253."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from limber_jax.config import Compute
from limber_jax.models.layers import LayerNorm
from limber_jax.models.linear import Dense, broadcast
from limber_jax.ranges import ranged

KINDS = ("", "normal", "parallel", "scaled_parallel")
NAMES = ("adapter_attn", "adapter_mlp")  # of the modules in a block, by which their parameters are split off


@dataclass(unsafe_hash=True)  # an attribute of linen modules, which are hashed; not to be changed once built
class AdapterConfig:
  """Where a block gets adapters, and which.

  Each place is one of "" (none), "normal" (after the module, with a residual connection), "parallel" (beside the
  module, on the same input) and "scaled_parallel" (that, times a learned number). MAGMA's own are normal and on the
  MLP, 235.0 M parameters in GPT-J; its later ones are on both, with downsample=8.
  """

  mlp: str = ranged("", choices=KINDS)
  attention: str = ranged("", choices=KINDS)
  downsample: int = ranged(4, at_least=1, at_most=10**6)  # width of the model / width of the bottleneck
  layer_norm: bool = False  # before the bottleneck


def _clipped_normal(key, shape, dtype=jnp.float32):
  # Clamped, not truncated: 4.6 % of the numbers lie exactly on the bounds.
  return jnp.clip(1e-3 * jax.random.normal(key, shape, dtype), -2e-3, 2e-3)


class Adapter(nn.Module):
  """What an adapter adds to its module's output. y [B, T, D] = module(x [B, T, D]) -> [B, T, D]."""

  kind: str
  size: AdapterConfig
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    D = x.shape[-1]
    z = y if self.kind == "normal" else x
    if self.size.layer_norm:
      z = LayerNorm(name="ln")(z)
    init = {"dtype": self.compute.dtype, "kernel_init": _clipped_normal, "bias_init": _clipped_normal}
    z = nn.relu(Dense(D // self.size.downsample, name="down", **init)(z))
    z = Dense(D, name="up", **init)(z)
    if self.kind == "scaled_parallel":
      z = z * broadcast(self.param("scale", nn.initializers.ones, (1,)), z)
    return y + z


def adapted(size: AdapterConfig | None, place: str, compute: Compute) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """Returns f(x, module(x)) -> the module's output with its adapter, if it has one; call it inside a block.

  Args:
    size: the adapters, None for none.
    place: "attention" or "mlp".
    compute: of the model.
  """
  kind = getattr(size, place) if size else ""
  if not kind:
    return lambda x, y: y
  return Adapter(kind, size, compute, name={"attention": "adapter_attn", "mlp": "adapter_mlp"}[place])


# After the rows of the blocks, which take every bias and scale.
SHARDING = (
  (r"adapter_(attn|mlp)/down/kernel$", jax.P(None, "fsdp", "tensor")),
  (r"adapter_(attn|mlp)/up/kernel$", jax.P(None, "tensor", "fsdp")),
)


def split_adapters(lm_params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (parameters of the language model alone, of its adapters); paths stay as they are, {} is no adapters."""
  parts: tuple[dict, dict] = ({}, {})
  for path, leaf in flax.traverse_util.flatten_dict(lm_params).items():
    parts[any(name in NAMES for name in path)][path] = leaf
  return tuple(map(flax.traverse_util.unflatten_dict, parts))


def merge_adapters(lm: dict[str, Any], adapters: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters that `split_adapters` took apart."""
  flat = flax.traverse_util.flatten_dict
  return flax.traverse_util.unflatten_dict(flat(lm) | flat(adapters))
