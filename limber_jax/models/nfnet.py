"""NF-ResNet: a pre-activation ResNet without normalisation, as timm's `nf_resnet50` is.

Sources: arXiv 2101.08692, and timm 0.5.4, whose weights LiMBeR used (its 1.0.31 computes the same). Convolutions
standardise their own kernels, each block divides its input by the standard deviation that it should have at
initialisation, and shortcuts are average pools. Images are NHWC.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.config import Compute
from limber_jax.models.layers import Features, Rows, scan, under
from limber_jax.models.linear import broadcast, conv
from limber_jax.models.spec import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig, EncoderSpec
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import BATCH, constrain


@dataclass
class NfResNetSize:
  """Sizes of an NF-ResNet."""

  kind: str = ranged("nf_resnet", choices=("nf_resnet",))
  # pixels a side; any will do: the weights were trained at 256
  image_size: int = ranged(384, at_least=1, at_most=4096)
  # blocks in each of the four stages
  layers: tuple[int, ...] = ranged((3, 4, 6, 3), at_least=1, at_most=10_000, length=4)
  width: int = ranged(64, at_least=1, at_most=10**5)  # channels after the stem

  @property
  def num_tokens(self) -> int:
    """The mean over the grid is the only token."""
    return 1


ALPHA = 0.2  # of what a block adds
EPS = 1e-5
GAMMA = 1.7139588594436646  # makes a ReLU of a standard normal variable keep its variance
# Kaiming's for a linear layer: N(0, 1 / fan in).
KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def _beta(expected_var: float | np.ndarray) -> float | np.ndarray:
  return 1 / np.sqrt(expected_var)


class StdConv(nn.Module):
  """Convolution by a standardised kernel, with a bias. x [B, H, W, I] -> [B, H/s, W/s, O]."""

  features: int
  kernel_size: int
  compute: Compute
  stride: int = 1
  gain: float = 1.0  # at initialisation

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    k, s = self.kernel_size, self.stride
    kernel = self.param("kernel", KERNEL_INIT, (k, k, x.shape[-1], self.features))
    gain = self.param("gain", nn.initializers.constant(self.gain), (1, 1, 1, self.features))
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    # In float32, even of weights that are kept in bfloat16: mean and variance over thousands of numbers.
    kernel = kernel.astype(jnp.float32)
    kernel = kernel - kernel.mean((0, 1, 2), keepdims=True)
    kernel = kernel * jax.lax.rsqrt(jnp.square(kernel).mean((0, 1, 2), keepdims=True) + EPS)
    kernel = kernel * (gain * (GAMMA / math.sqrt(k * k * x.shape[-1])))
    pad = (s - 1 + k - 1) // 2
    y = conv(x.astype(self.compute.dtype), kernel, s, pad)
    return y + broadcast(bias, y)


def _avg_pool(x: jax.Array) -> jax.Array:
  """Returns means of 2 × 2; at an odd side the last are of what is there (torch: ceil_mode, not counting padding)."""
  padding = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
  return nn.avg_pool(x, (2, 2), (2, 2), padding, count_include_pad=False)


class Block(nn.Module):
  """Pre-activation bottleneck. x [B, H, W, C], beta [] -> (x [B, H/s, W/s, 4 planes], None)."""

  planes: int
  stride: int
  downsample: bool
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array, beta: float | jax.Array) -> tuple[jax.Array, None]:
    x = constrain(x, BATCH, None, None, None)
    y = (nn.relu(x) * beta).astype(x.dtype)
    if self.downsample:
      x = _avg_pool(y) if self.stride > 1 else y
      x = StdConv(4 * self.planes, 1, self.compute, name="downsample")(x)
    y = StdConv(self.planes, 1, self.compute, name="conv1")(y)
    y = StdConv(self.planes, 3, self.compute, self.stride, name="conv2")(nn.relu(y))
    # Zero gain: each block starts as its shortcut, so a random network is almost linear.
    y = StdConv(4 * self.planes, 1, self.compute, gain=0.0, name="conv3")(nn.relu(y))
    return y * ALPHA + x, None


class NfResNet(nn.Module):
  """NF-ResNet. images [B, H, W, 3], normalised -> tokens [B, 1, 32 width], pooled [B, 32 width]: the mean, twice."""

  size: NfResNetSize
  compute: Compute

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Features:
    del train  # no dropout and no batch statistics
    w, c = self.size.width, self.compute
    x = StdConv(w, 7, c, 2, name="stem")(images)
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    expected_var = 1.0
    for i, blocks in enumerate(self.size.layers, start=1):
      planes = w * 2 ** (i - 1)
      x, _ = Block(planes, 1 if i == 1 else 2, True, c, name=f"stage{i}_first")(x, _beta(expected_var))
      # A stage starts again at variance 1, and each of its blocks adds α².
      variances = 1 + ALPHA**2 * np.arange(1, blocks + 1, dtype=np.float64)
      if blocks > 1:
        betas = jnp.asarray(_beta(variances[:-1]), jnp.float32)
        x, _ = scan(Block, blocks - 1, c)(planes, 1, False, c, name=f"stage{i}_rest")(x, betas)
      expected_var = variances[-1]
    pooled = nn.relu(x).astype(jnp.float32).mean((1, 2)).astype(x.dtype)  # [B, C]
    return Features(pooled[:, None], pooled)


# What does not divide is whole on every device.
SHARDING = (
  (r"stage\d_rest/.*kernel$", jax.P(None, None, None, None, "fsdp")),
  (r"(stem|stage\d_first/.*)/kernel$", jax.P(None, None, None, "fsdp")),
  (r"(stem|stage\d_(first|rest)/.*)/kernel$", jax.P()),
  (r"(stem|stage\d_(first|rest)/.*)/(gain|bias)$", jax.P()),
)


def _conv(ours: str, theirs: str) -> Rows:
  return ((f"{ours}/kernel", f"{theirs}.weight", "OIHW>HWIO"), (f"{ours}/gain", f"{theirs}.gain", "OIHW>HWIO"),
          (f"{ours}/bias", f"{theirs}.bias", ""))


_CONVS = (*_conv("conv1", "conv1"), *_conv("conv2", "conv2"), *_conv("conv3", "conv3"))

TIMM_WEIGHTS: Rows = (
  *_conv("stem", "stem.conv"),
  *(row for i in range(4) for row in (
    *under(f"stage{i + 1}_first/", f"stages.{i}.0.", (*_conv("downsample", "downsample.conv"), *_CONVS)),
    *under(f"stage{i + 1}_rest/", f"stages.{i}.{{+1}}.", _CONVS))),
)

TIMM_IGNORED = (r"head\.fc\.(weight|bias)",)


def _describes(values: dict[str, Any]) -> bool:
  """Returns whether a config.json is one of timm's nf_resnets."""
  return not values.get("model_type") and str(values.get("architecture", "")).startswith("nf_resnet")


def _named(**changes: Any) -> Callable[[], EncoderConfig]:
  return lambda: replace(EncoderConfig(NfResNetSize(), IMAGENET_MEAN, IMAGENET_STD, features="pooled"), **changes)


ENCODER = EncoderSpec(
  size=NfResNetSize, module=lambda size, compute: NfResNet(size.tower, compute), check=lambda tower: "",
  mu=lambda tower: replace(tower, image_size=64, layers=(1, 2, 1, 1), width=8), width=lambda tower: 32 * tower.width,
  weights={"timm": TIMM_WEIGHTS}, ignored=TIMM_IGNORED, sharding=SHARDING, title="an NF-ResNet of timm's",
  convolutional=True, processor="timm", describes=_describes,
  named={"nf_resnet50": _named(),
         # As LiMBeR's code fed it: pixels at their own resolution, cropped or padded, and not normalised.
         "nf_resnet50_reference": _named(mean=(0.0,) * 3, std=(1.0,) * 3, resize="native")})
