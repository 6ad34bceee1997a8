"""The image encoders that LiMBeR maps from, by name: what they compute, what pixels they want, whose weights fit.

All of them return tokens [B, S, F] and a pooled embedding [B, E]; `features` of a size says which of the two goes to
the language model, pooled ones as a single token. The paper's random encoders are these sizes with random weights.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from limber_jax import ranges
from limber_jax.config import Compute
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import beit, clip, nfnet, resnet, vit
from limber_jax.models.beit import Beit, BeitSize
from limber_jax.models.clip import ClipSize, normalise
from limber_jax.models.layers import ACTIVATIONS, Features, Rows, under
from limber_jax.models.nfnet import NfResNet, NfResNetSize
from limber_jax.models.resnet import ResNet, ResNetSize
from limber_jax.models.vit import ViT, ViTSize
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import Rules

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

FEATURES = ("tokens", "pooled")

Tower = ViTSize | ResNetSize | BeitSize | NfResNetSize


@dataclass
class EncoderSize:
  """Everything that defines an image encoder but its weights."""

  tower: Tower = field(default_factory=ViTSize)
  mean: tuple[float, ...] = ranged(clip.MEAN, length=3)  # of the training images, on the scale 0..1
  std: tuple[float, ...] = ranged(clip.STD, at_least=1e-6, length=3)
  # shortest: the short side to image_size, then the central square | squash: straight to a square, aspect not kept |
  # longest: the long side, and fill_color beside it | native: the central square of the pixels as they are, whatever
  # the directory of the weights says; black where the image is smaller
  resize: str = ranged("shortest", choices=clip.RESIZES)
  resample: str = ranged("bicubic", choices=clip.RESAMPLES)  # a filter of PIL's
  features: str = ranged("tokens", choices=FEATURES)  # tokens | pooled: what goes to the language model
  # E of CLIP's towers; the others pool to their own width
  embed_dim: int = ranged(512, at_least=1, at_most=10**6)
  activation: str = ranged("quick_gelu", choices=tuple(ACTIVATIONS))  # of CLIP's towers
  # pixels of the side that is resized; 0 = image_size
  resize_to: int = ranged(0, at_least=0, at_most=16_384, later=True)
  crop_rounding: str = ranged("even", choices=clip.ROUNDINGS, later=True)  # even: torchvision's | down: transformers'
  fill_color: int = ranged(0, at_least=0, at_most=255, later=True)  # grey beside images that are smaller than the crop


@dataclass(frozen=True)
class Encoder:
  """An image encoder, as pure functions of its parameters and statistics."""

  size: EncoderSize
  tower: ViT | ResNet | Beit | NfResNet

  @classmethod
  def of(cls, size: EncoderSize, compute: Compute) -> "Encoder":
    """Returns the encoder of `size`, computing as `compute` says; raises UserError if its sizes do not fit together."""
    ranges.check(size, "config.model.")
    ranges.check(compute, "config.compute.")
    t = size.tower
    if isinstance(t, ViTSize | ResNetSize):
      return cls(size, clip.build(ClipSize(size.embed_dim, t, activation=size.activation), compute).image)
    if isinstance(t, NfResNetSize):
      return cls(size, NfResNet(t, compute))
    if t.image_size % t.patch:
      raise UserError(f"model.tower: patches of {t.patch} do not tile {t.image_size} pixels")
    if t.width % t.heads:
      raise UserError(f"model.tower: {t.heads} heads do not divide a width of {t.width}")
    return cls(size, Beit(t, compute))

  @property
  def image_size(self) -> int:
    """Pixels a side."""
    return self.size.tower.image_size

  @property
  def num_tokens(self) -> int:
    """S of what `encode` returns."""
    return 1 if self.size.features == "pooled" else self.size.tower.num_tokens

  @property
  def feature_dim(self) -> int:
    """F of what `encode` returns."""
    t = self.size.tower
    if self.size.features == "pooled" and isinstance(t, ViTSize | ResNetSize):
      return self.size.embed_dim
    return 32 * t.width if isinstance(t, ResNetSize | NfResNetSize) else t.width

  @property
  def convolutional(self) -> bool:
    """Whether it is a network of convolutions."""
    return isinstance(self.size.tower, ResNetSize | NfResNetSize)

  @property
  def sharding(self) -> Rules:
    """Rows of the sharding table, for parameters and statistics."""
    return _TABLES[self.size.tower.kind].sharding

  @property
  def weights(self) -> dict[str, Rows]:
    """Weight tables by format; paths are those of the parameters, and of statistics under "stats/"."""
    return _TABLES[self.size.tower.kind].weights

  @property
  def ignored(self) -> tuple[str, ...]:
    """Patterns of whole names of tensors that are no part of the encoder, in any of the formats."""
    return _TABLES[self.size.tower.kind].ignored

  def rows(self, names: Iterable[str]) -> Rows:
    """Returns the weight table that fits a file with tensors of these names; raises UserError if none does."""
    names = set(names)
    for rows in self.weights.values():
      if rows[0][1] in names:
        return rows
    raise UserError(f"no weights of a {self.size.tower.kind!r} encoder: none of the tensors is "
                    + " or ".join(rows[0][1] for rows in self.weights.values()))

  def init(self, rng: jax.Array) -> tuple[dict, dict]:
    """Returns random (parameters, statistics); statistics are {} where there is no BatchNorm."""
    variables = self.tower.init(rng, jnp.zeros((1, self.image_size, self.image_size, 3)))
    return variables["params"], variables.get("batch_stats", {})

  def shapes(self) -> tuple[dict, dict]:
    """Returns ShapeDtypeStructs of what `init` returns, computing nothing."""
    return jax.eval_shape(lambda: self.init(jax.random.key(0)))

  def encode(self, params: dict, stats: dict, images: jax.Array, train: bool = False,
             rng: jax.Array | None = None) -> tuple[Features, dict]:
    """Returns the features of images, and the statistics after them.

    Args:
      params, stats: as of `init`.
      images: [B, H, W, 3], uint8 in 0..255 (normalised here, with the encoder's mean and std) or float, already
        normalised.
      train: use the batch's own statistics and update the running ones (CLIP's ResNets), and skip branches at random
        (a BEiT with drop_path). Frozen encoders are run without, although LiMBeR's code did not.
      rng: for what is random when `train`.

    Returns:
      (Features(tokens [B, num_tokens, feature_dim], pooled [B, E]), stats).

    Raises:
      ValueError: images of another size than the tower's, or no rng where one is needed.
    """
    side = self.image_size
    if images.ndim != 4 or images.shape[1:] != (side, side, 3):
      raise ValueError(f"images: expected [B, {side}, {side}, 3], got {images.shape}")
    if train and rng is None and getattr(self.size.tower, "drop_path", 0):
      raise ValueError("rng: a BEiT with drop_path needs one to train")
    images = normalise(images, self.size.mean, self.size.std)
    variables = {"params": params} | ({"batch_stats": stats} if stats else {})
    rngs = {} if rng is None else {"drop_path": rng}
    if train and stats:
      features, changed = self.tower.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
      stats = changed["batch_stats"]
    else:
      features = self.tower.apply(variables, images, train=train, rngs=rngs)
    if self.size.features == "pooled":
      features = Features(features.pooled[:, None], features.pooled)
    return features, stats


@dataclass(frozen=True)
class _Tables:
  """What is known about a kind of tower beside its definition."""

  sharding: Rules
  weights: dict[str, Rows]
  ignored: tuple[str, ...]


# A file of CLIP holds the text tower too.
_CLIP_IGNORED = (
  *clip.OPENAI_IGNORED, r"(transformer|token_embedding|ln_final)\..*", "positional_embedding", "text_projection",
  *clip.HF_IGNORED, r"text_model\..*", r"text_projection\.weight", "logit_scale", "logit_bias")

_TABLES = {
  "vit": _Tables(vit.SHARDING, {"openai": vit.OPENAI_WEIGHTS, "hf": vit.HF_WEIGHTS}, _CLIP_IGNORED),
  "resnet": _Tables(resnet.SHARDING,
                    {"openai": (*resnet.OPENAI_WEIGHTS, *under("stats/", "", resnet.OPENAI_STATS))}, _CLIP_IGNORED),
  "beit": _Tables(beit.SHARDING, {"hf": beit.HF_WEIGHTS, "hf_headed": beit.HF_HEADED_WEIGHTS}, beit.HF_IGNORED),
  "nf_resnet": _Tables(nfnet.SHARDING, {"timm": nfnet.TIMM_WEIGHTS}, nfnet.TIMM_IGNORED),
}


def _of_clip(make: Callable[[], ClipSize]) -> Callable[[], EncoderSize]:
  def encoder():
    size = make()
    return EncoderSize(size.image, size.mean, size.std, embed_dim=size.embed_dim, activation=size.activation)
  return encoder


def _beit(**form: Any) -> Callable[[], EncoderSize]:
  # resample: its preprocessor_config.json says 2, PIL's bilinear filter.
  return lambda: EncoderSize(BeitSize(**form), (0.5,) * 3, (0.5,) * 3, "squash", "bilinear")


def _nf_resnet(**changes: Any) -> Callable[[], EncoderSize]:
  return lambda: dataclasses.replace(
    EncoderSize(NfResNetSize(), IMAGENET_MEAN, IMAGENET_STD, features="pooled"), **changes)


def mu(size: EncoderSize) -> EncoderSize:
  """Returns the smallest BEiT or NF-ResNet of the same build, for tests; widths and heads as `clip.mu` has them."""
  if isinstance(size.tower, BeitSize):
    tower = dataclasses.replace(size.tower, image_size=32, patch=8, width=64, layers=2, heads=2)
  else:
    tower = dataclasses.replace(size.tower, image_size=64, layers=(1, 2, 1, 1), width=8)
  return dataclasses.replace(size, tower=tower)


def _mu_of(make: Callable[[], EncoderSize]) -> Callable[[], EncoderSize]:
  return lambda: mu(make())


_OTHERS = {
  "beit_l16": _beit(),
  "beit_l16_ft": _beit(shared_positions=False, pooler=True),
  "nf_resnet50": _nf_resnet(),
  # As LiMBeR's code fed it: pixels at their own resolution, cropped or padded, and not normalised.
  "nf_resnet50_reference": _nf_resnet(mean=(0.0,) * 3, std=(1.0,) * 3, resize="native"),
}

ENCODERS: dict[str, Callable[[], EncoderSize]] = {
  **{name: _of_clip(make) for name, make in clip.SIZES.items()},
  **_OTHERS,
  **{f"{name}_mu": _mu_of(make) for name, make in _OTHERS.items()},
}


def encoder_size(name: str) -> EncoderSize:
  """Returns the size of this name; raises UserError with the nearest one if there is none."""
  if name not in ENCODERS:
    raise UserError(f"no encoder {name!r}{did_you_mean(name, ENCODERS)}")
  return ENCODERS[name]()
