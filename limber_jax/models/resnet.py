"""CLIP's ModifiedResNet. Source: CLIP (arXiv 2103.00020), section 2.4, and OpenAI's release.

Against a ResNet-D: a stem of three convolutions and an average pool, strides as average pools (anti-aliased), and
attention pooling in place of the global mean. Images are NHWC.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax.config import Compute
from limber_jax.models.layers import BatchNorm, Features, Rows, attention_kernel, scan, torch_uniform, under
from limber_jax.models.linear import Conv, Dense, broadcast
from limber_jax.models.spec import NOT_IMAGE, ClipTower, EncoderSpec
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import BATCH, constrain


@dataclass
class ResNetSize:
  """Sizes of a ModifiedResNet."""

  kind: str = ranged("resnet", choices=("resnet",))
  image_size: int = ranged(224, at_least=32, at_most=4096)  # pixels a side; a multiple of 32
  # blocks in each of the four stages
  layers: tuple[int, int, int, int] = ranged((3, 4, 6, 3), at_least=1, at_most=10_000)
  width: int = ranged(64, at_least=2, at_most=10**5)  # channels after the stem; even
  heads: int = ranged(32, at_least=1, at_most=10**6)  # of the attention pooling; divide 32 times the width

  @property
  def num_tokens(self) -> int:
    """Positions of the final grid."""
    return (self.image_size // 32) ** 2


def _conv(features: int, kernel: int, compute: Compute, name: str, stride: int = 1) -> Conv:
  return Conv(features, kernel, stride, kernel // 2, use_bias=False, dtype=compute.dtype, kernel_init=torch_uniform(),
              name=name)


def _avg_pool(x: jax.Array, stride: int) -> jax.Array:
  return nn.avg_pool(x, (stride, stride), (stride, stride)) if stride > 1 else x


class Bottleneck(nn.Module):
  """Bottleneck of expansion 4; every convolution has stride 1. x [B, H, W, C] -> (x [B, H/s, W/s, 4 planes], None)."""

  planes: int
  stride: int
  downsample: bool
  train: bool
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    train = self.train
    x = constrain(x, BATCH, None, None, None)
    y = nn.relu(BatchNorm(name="bn1")(_conv(self.planes, 1, self.compute, "conv1")(x), train))
    y = nn.relu(BatchNorm(name="bn2")(_conv(self.planes, 3, self.compute, "conv2")(y), train))
    y = _avg_pool(y, self.stride)
    # Zero gain: each block starts as its shortcut.
    y = BatchNorm(scale_init=nn.initializers.zeros, name="bn3")(
      _conv(4 * self.planes, 1, self.compute, "conv3")(y), train)
    if self.downsample:
      x = _conv(4 * self.planes, 1, self.compute, "downsample_conv")(_avg_pool(x, self.stride))
      x = BatchNorm(name="downsample_bn")(x, train)
    return nn.relu(x + y), None


class AttentionPool(nn.Module):
  """Attention from the spatial mean to the grid. grid [B, S, C] -> ([B, E], the same before the projection [B, C])."""

  heads: int
  embed_dim: int
  compute: Compute

  @nn.compact
  def __call__(self, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
    B, S, C = grid.shape
    x = jnp.concatenate([grid.mean(1, keepdims=True), grid], axis=1)  # [B, 1 + S, C]
    position = self.param("position", nn.initializers.normal(C**-0.5), (S + 1, C))
    x = x + broadcast(position, x)

    def dense(features, name, y):
      return Dense(features, dtype=self.compute.dtype, kernel_init=nn.initializers.normal(C**-0.5),
                      bias_init=torch_uniform(C), name=name)(y)

    q, k, v = (dense(C, name, y).reshape(B, -1, self.heads, C // self.heads)
               for name, y in (("q", x[:, :1]), ("k", x), ("v", x)))
    y = jax.nn.dot_product_attention(q, k, v, implementation=attention_kernel(self.compute, C // self.heads))
    y = y.reshape(B, C)
    return dense(self.embed_dim, "out", y), y


class ResNet(nn.Module):
  """ModifiedResNet. images [B, H, W, 3], normalised -> tokens [B, S, 32 width] (the grid, row by row), pooled [B, E].

  The tokens are the output of the last stage, before attention pooling; the penultimate features [B, 32 width] are what
  the heads of the pooling gathered, before the projection: that is CLIP's W_i, as its authors say (openai/CLIP #51).
  Statistics of BatchNorm are in the collection "batch_stats", and change when `train`.
  """

  size: ResNetSize
  embed_dim: int
  activation: str
  compute: Compute

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Features:
    w, c = self.size.width, self.compute
    x = images.astype(c.dtype)
    for i, (features, stride) in enumerate(((w // 2, 2), (w // 2, 1), (w, 1)), start=1):
      x = nn.relu(BatchNorm(name=f"bn{i}")(_conv(features, 3, c, f"conv{i}", stride)(x), train))
    x = _avg_pool(x, 2)
    for i, blocks in enumerate(self.size.layers, start=1):
      planes, stride = w * 2 ** (i - 1), 1 if i == 1 else 2
      x, _ = Bottleneck(planes, stride, True, train, c, name=f"layer{i}_first")(x)
      if blocks > 1:
        x, _ = scan(Bottleneck, blocks - 1, c)(planes, 1, False, train, c, name=f"layer{i}_rest")(x)
    grid = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, S, C]
    return Features(grid, *AttentionPool(self.size.heads, self.embed_dim, c, name="pool")(grid))


# What does not divide is whole on every device: the kernels of RN50x16 begin with 48 channels.
SHARDING = (
  (r"layer\d_rest/.*kernel$", jax.P(None, None, None, None, "fsdp")),
  (r"(layer\d_first/.*|conv\d)/kernel$", jax.P(None, None, None, "fsdp")),
  (r"(layer\d_(first|rest)/.*|conv\d)/kernel$", jax.P()),
  (r"pool/(q|k|v)/kernel$", jax.P("fsdp", "tensor")),
  (r"pool/out/kernel$", jax.P("tensor", "fsdp")),
  (r"pool/out/kernel$", jax.P("tensor")),
  (r"pool/(q|k|v)/bias$", jax.P("tensor")),
  (r"(pool/\w+/bias|pool/position|bn\d?/(scale|bias|mean|var))$", jax.P()),
)


def _conv_bn(ours: tuple[str, str], theirs: tuple[str, str]) -> tuple[Rows, Rows]:
  """Returns the rows of a convolution and its BatchNorm: of parameters, and of statistics."""
  (conv, bn), (their_conv, their_bn) = ours, theirs
  return ((f"{conv}/kernel", f"{their_conv}.weight", "OIHW>HWIO"),
          (f"{bn}/scale", f"{their_bn}.weight", ""),
          (f"{bn}/bias", f"{their_bn}.bias", "")), (
          (f"{bn}/mean", f"{their_bn}.running_mean", ""),
          (f"{bn}/var", f"{their_bn}.running_var", ""))


_THREE = [_conv_bn(pair, pair) for pair in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))]
_DOWNSAMPLE = _conv_bn(("downsample_conv", "downsample_bn"), ("downsample.0", "downsample.1"))


def _trunk(kind: int) -> Rows:
  """Returns the rows of stem and stages: of parameters (0) or of statistics (1)."""
  block = sum((rows[kind] for rows in _THREE), ())
  stages = tuple(row for i in (1, 2, 3, 4) for row in (
    *under(f"layer{i}_first/", f"visual.layer{i}.0.", block + _DOWNSAMPLE[kind]),
    *under(f"layer{i}_rest/", f"visual.layer{i}.{{+1}}.", block)))
  return under("", "visual.", block) + stages


OPENAI_WEIGHTS: Rows = (
  *_trunk(0),
  ("pool/position", "visual.attnpool.positional_embedding", ""),
  *(row for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "c_proj")) for row in (
    (f"pool/{ours}/kernel", f"visual.attnpool.{theirs}.weight", "OI>IO"),
    (f"pool/{ours}/bias", f"visual.attnpool.{theirs}.bias", ""))),
)

OPENAI_STATS: Rows = _trunk(1)


def _check(tower: ResNetSize) -> str:
  if tower.image_size % 32:
    return f"image_size={tower.image_size}; a ResNet needs a multiple of 32"
  if 32 * tower.width % tower.heads:
    return f"{tower.heads} heads do not divide a width of {32 * tower.width}"
  return ""


def _mu(tower: ResNetSize) -> ResNetSize:
  return ResNetSize(image_size=64, layers=tuple(max(1, min(2, n - 2)) for n in tower.layers), width=16, heads=8)


def _open_clip(tower: ResNetSize) -> dict:
  return {"image_size": tower.image_size, "width": tower.width, "layers": list(tower.layers), "patch_size": None,
          "head_width": 32 * tower.width // tower.heads}


ENCODER = EncoderSpec(
  size=ResNetSize, module=lambda size, compute: ResNet(size.tower, size.embed_dim, size.activation, compute),
  check=_check, mu=_mu, width=lambda tower: 32 * tower.width,
  weights={"openai": (*OPENAI_WEIGHTS, *under("stats/", "", OPENAI_STATS))}, ignored=NOT_IMAGE, sharding=SHARDING,
  title="the image tower of a CLIP", convolutional=True, batch_norm=True, clip=ClipTower(_open_clip))
