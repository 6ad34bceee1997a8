"""Layers shared by the models.

Parameters, their gradients and reductions are float32, over devices too; activations and what is frozen are in
`compute.dtype`.

Axis legend, used in every shape comment of this project:

    B batch   N global batch of pairs   H W C image   S image tokens   F encoder width   P prefix tokens
    T text tokens   M cache length   D model width   E embedding width   L layers   A heads   K head width   V vocab
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models.linear import Dense
from limber_jax.runtime.parallel import BATCH, constrain

Init = Callable[..., jax.Array]


class Features(NamedTuple):
  """What every tower returns."""

  tokens: jax.Array  # [B, S, F]
  pooled: jax.Array  # [B, E]
  penultimate: jax.Array | None = None  # [B, D]: of CLIP's image towers, what `pooled` is a projection of


def torch_uniform(fan_in: int | None = None) -> Init:
  """Returns PyTorch's default initialisation, U(±1/√fan_in), for kernels [..., in, out] and, given fan_in, biases."""

  def init(key, shape, dtype=jnp.float32):
    fan = fan_in
    if fan is None:
      fan = shape[-2]
      for n in shape[:-2]:
        fan *= n
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / fan**0.5

  return init


class BlockInit(NamedTuple):
  """Initialisers of one transformer block."""

  qkv: Init
  out: Init
  fc: Init
  proj: Init


def quick_gelu(x: jax.Array) -> jax.Array:
  """Returns x·sigmoid(1.702 x), the activation that OpenAI's weights were trained with."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, in float32, eps 1e-5 (linen's default of 1e-6 gives other embeddings)."""

  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    shape = (1,) * (x.ndim - 1) + (-1,)
    return (y * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype)


class BatchNorm(nn.Module):
  """BatchNorm over all axes but the last, in float32, with PyTorch's running statistics.

  The statistics are those of the global batch: under a sharded jit the means below run over every device. As in
  PyTorch, and unlike linen's, the running variance takes the unbiased variance of the batch.
  """

  momentum: float = 0.9
  eps: float = 1e-5
  scale_init: Init = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    scale = self.param("scale", self.scale_init, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (x.shape[-1],))
    running_var = self.variable("batch_stats", "var", jnp.ones, (x.shape[-1],))
    shape = (1,) * (x.ndim - 1) + (-1,)
    y = x.astype(jnp.float32)
    if train:
      axes = tuple(range(x.ndim - 1))
      mean = y.mean(axes)
      var = jnp.square(y - mean.reshape(shape)).mean(axes)
      if not self.is_initializing():
        count = x.size // x.shape[-1]
        running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
        running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var * (count / max(count - 1, 1))
    else:
      mean, var = running_mean.value, running_var.value
    y = (y - mean.reshape(shape)) * (scale * jax.lax.rsqrt(var + self.eps)).reshape(shape) + bias.reshape(shape)
    return y.astype(x.dtype)


def attention_kernel(compute: Compute, head_width: int) -> str:
  """Returns the implementation that jax.nn.dot_product_attention shall use: "cudnn" or "xla".

  "auto" takes cuDNN's flash attention where it runs: an NVIDIA GPU of compute capability 8.0 or later, half precision,
  and a head width that is a multiple of 8, at most 128. Raises UserError where "cudnn" cannot be.
  """
  half = compute.dtype != "float32"
  if compute.attention == "cudnn" and not (half and jax.default_backend() == "gpu"):
    raise UserError(f"config.compute.attention='cudnn' is for GPUs and half precision, and this is {compute.dtype} on "
                    f"{jax.default_backend()}; choose auto")
  if compute.attention != "auto":
    return compute.attention
  if jax.default_backend() != "gpu" or not half or head_width % 8 or head_width > 128:
    return "xla"
  capability = getattr(jax.local_devices()[0], "compute_capability", "0")
  return "cudnn" if float(capability) >= 8.0 else "xla"


class Attention(nn.Module):
  """Multi-head self-attention with biases everywhere. x [B, T, D] -> [B, T, D]."""

  heads: int
  causal: bool
  inits: BlockInit
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    B, T, D = x.shape
    width = D // self.heads

    def project(name):
      return Dense(D, dtype=self.compute.dtype, kernel_init=self.inits.qkv, name=name)(x).reshape(
        B, T, self.heads, width)

    y = jax.nn.dot_product_attention(project("q"), project("k"), project("v"), is_causal=self.causal,
                                     implementation=attention_kernel(self.compute, width))  # [B, T, A, K]
    return Dense(D, dtype=self.compute.dtype, kernel_init=self.inits.out, name="out")(y.reshape(B, T, D))


class Block(nn.Module):
  """Pre-norm transformer block. x [B, T, D] -> (x [B, T, D], None), the shape that nn.scan wants."""

  heads: int
  causal: bool
  activation: str
  inits: BlockInit
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    D = x.shape[-1]
    dense = {"dtype": self.compute.dtype}
    x = constrain(x, BATCH, None, None)
    x = x + Attention(self.heads, self.causal, self.inits, self.compute, name="attn")(LayerNorm(name="ln_1")(x))
    y = Dense(4 * D, kernel_init=self.inits.fc, bias_init=torch_uniform(D), name="fc", **dense)(
      LayerNorm(name="ln_2")(x))
    y = ACTIVATIONS[self.activation](y)
    y = Dense(D, kernel_init=self.inits.proj, bias_init=torch_uniform(4 * D), name="proj", **dense)(y)
    return x + y, None


REMAT = {
  "none": None,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}


def scan(block: type[nn.Module], length: int, compute: Compute) -> Callable[..., nn.Module]:
  """Returns `block` repeated `length` times by nn.scan, its parameters stacked on a leading axis L.

  Args:
    block: a module whose __call__(x) returns (x, None).
    length: number of repetitions.
    compute: its `remat` says what the backward pass keeps, its `unroll` how many blocks one iteration holds.
  """
  policy = REMAT[compute.remat]
  if policy is not None:
    # Under scan nothing can be merged with the forward pass, so the barrier of prevent_cse would only cost.
    block = nn.remat(block, prevent_cse=False, policy=policy)
  return nn.scan(block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=length,
                 unroll=min(compute.unroll, length))


# Kernels are split over fsdp on one side and over tensor on the other; what follows a nonlinearity is split the
# other way round, so that a block needs one sum over `tensor` after attention and one after the MLP.
BLOCK_SHARDING = (
  (r"blocks/.*(q|k|v|fc)/kernel$", jax.P(None, "fsdp", "tensor")),
  (r"blocks/.*(out|proj)/kernel$", jax.P(None, "tensor", "fsdp")),
  (r"blocks/.*(q|k|v|fc)/bias$", jax.P(None, "tensor")),
  (r"blocks/.*(bias|scale)$", jax.P()),
)


# Weight tables: rows of (our path, their name, how theirs becomes ours); `limber_jax.weights.convert` reads them. These
# are a block's, without the prefixes. PyTorch stores kernels output first, and q, k and v as thirds of one matrix.
Rows = tuple[tuple[str, str, str], ...]

OPENAI_BLOCK: Rows = (
  ("ln_1/scale", "ln_1.weight", ""),
  ("ln_1/bias", "ln_1.bias", ""),
  ("attn/q/kernel", "attn.in_proj_weight", "0/3 OI>IO"),
  ("attn/q/bias", "attn.in_proj_bias", "0/3"),
  ("attn/k/kernel", "attn.in_proj_weight", "1/3 OI>IO"),
  ("attn/k/bias", "attn.in_proj_bias", "1/3"),
  ("attn/v/kernel", "attn.in_proj_weight", "2/3 OI>IO"),
  ("attn/v/bias", "attn.in_proj_bias", "2/3"),
  ("attn/out/kernel", "attn.out_proj.weight", "OI>IO"),
  ("attn/out/bias", "attn.out_proj.bias", ""),
  ("ln_2/scale", "ln_2.weight", ""),
  ("ln_2/bias", "ln_2.bias", ""),
  ("fc/kernel", "mlp.c_fc.weight", "OI>IO"),
  ("fc/bias", "mlp.c_fc.bias", ""),
  ("proj/kernel", "mlp.c_proj.weight", "OI>IO"),
  ("proj/bias", "mlp.c_proj.bias", ""),
)

HF_BLOCK: Rows = (
  ("ln_1/scale", "layer_norm1.weight", ""),
  ("ln_1/bias", "layer_norm1.bias", ""),
  ("attn/q/kernel", "self_attn.q_proj.weight", "OI>IO"),
  ("attn/q/bias", "self_attn.q_proj.bias", ""),
  ("attn/k/kernel", "self_attn.k_proj.weight", "OI>IO"),
  ("attn/k/bias", "self_attn.k_proj.bias", ""),
  ("attn/v/kernel", "self_attn.v_proj.weight", "OI>IO"),
  ("attn/v/bias", "self_attn.v_proj.bias", ""),
  ("attn/out/kernel", "self_attn.out_proj.weight", "OI>IO"),
  ("attn/out/bias", "self_attn.out_proj.bias", ""),
  ("ln_2/scale", "layer_norm2.weight", ""),
  ("ln_2/bias", "layer_norm2.bias", ""),
  ("fc/kernel", "mlp.fc1.weight", "OI>IO"),
  ("fc/bias", "mlp.fc1.bias", ""),
  ("proj/kernel", "mlp.fc2.weight", "OI>IO"),
  ("proj/bias", "mlp.fc2.bias", ""),
)


def under(ours: str, theirs: str, rows: Rows) -> Rows:
  """Returns `rows` with prefixes before both names."""
  return tuple((ours + a, theirs + b, how) for a, b, how in rows)
