"""CLIP: an image tower and a text tower into one embedding space. Source: arXiv 2103.00020."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax import ranges
from limber_jax.config import Compute
from limber_jax.config_json import unflatten
from limber_jax.errors import UserError
from limber_jax.models import text
from limber_jax.models.layers import ACTIVATIONS, Features, Rows, under
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.spec import MEAN, RESAMPLES, RESIZES, ROUNDINGS, STD, EncoderConfig, checked, spec_of
from limber_jax.models.text import TextSize, TextTransformer
from limber_jax.models.vit import ViTSize
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import Rules


@dataclass
class ClipConfig:
  """Everything that defines a CLIP but its weights."""

  embed_dim: int = ranged(512, at_least=1, at_most=10**6)
  image: Any = ranged(factory=ViTSize, registered="ENCODERS:clip")
  text: TextSize = field(default_factory=TextSize)
  activation: str = ranged("quick_gelu", choices=tuple(ACTIVATIONS))
  # How an image becomes pixels; data.transforms.ResizeCrop says what the words mean.
  mean: tuple[float, float, float] = ranged(MEAN)
  std: tuple[float, float, float] = ranged(STD, at_least=1e-6)
  resize: str = ranged("shortest", choices=RESIZES, later=True)  # shortest | longest | squash | native
  resample: str = ranged("bicubic", choices=RESAMPLES, later=True)  # a filter of PIL's
  # pixels of the side that is resized; 0 = image_size
  resize_to: int = ranged(0, at_least=0, at_most=16_384, later=True)
  crop_rounding: str = ranged("even", choices=ROUNDINGS, later=True)  # even: torchvision's | down: transformers'
  fill_color: int = ranged(0, at_least=0, at_most=255, later=True)  # grey beside images that are smaller than the crop

  def encoders(self) -> dict[str, "ClipConfig"]:
    """Returns what says how images become pixels, by part."""
    return {"image": self}

  def with_encoder(self, part: str, size: "ClipConfig") -> "ClipConfig":
    """Returns this size with another of what `encoders` gives."""
    return size

  def encoder_field(self, part: str) -> str:
    """Returns where that stands in config.model, with its dot."""
    return ""

  def plain(self) -> "ClipConfig":
    """Returns a size with the preprocessing that a CLIP has where nobody says anything."""
    return ClipConfig()


def _size(embed_dim, image, text_width) -> Callable[[], ClipConfig]:
  def make():
    return ClipConfig(embed_dim, dataclasses.replace(image), TextSize(width=text_width, heads=text_width // 64))
  return make


PUBLISHED = {
  "clip_rn50": _size(1024, ResNetSize(), 512),
  "clip_rn101": _size(512, ResNetSize(layers=(3, 4, 23, 3)), 512),
  "clip_rn50x4": _size(640, ResNetSize(image_size=288, layers=(4, 6, 10, 6), width=80, heads=40), 640),
  "clip_rn50x16": _size(768, ResNetSize(image_size=384, layers=(6, 8, 18, 8), width=96, heads=48), 768),
  "clip_rn50x64": _size(1024, ResNetSize(image_size=448, layers=(3, 15, 36, 10), width=128, heads=64), 1024),
  "clip_vit_b32": _size(512, ViTSize(), 512),
  "clip_vit_b16": _size(512, ViTSize(patch=16), 512),
  "clip_vit_l14": _size(768, ViTSize(patch=14, width=1024, layers=24, heads=16), 768),
  "clip_vit_l14_336": _size(768, ViTSize(image_size=336, patch=14, width=1024, layers=24, heads=16), 768),
}


def published(model: Any) -> str:
  """Returns the name of a published CLIP, "" of any other model."""
  if not isinstance(model, ClipConfig):
    return ""
  plain = dataclasses.replace(model, crop_rounding="even")  # another only where transformers has it
  return next((name for name, make in PUBLISHED.items() if make() == plain), "")


def mu(size: ClipConfig) -> ClipConfig:
  """Returns the smallest model of the same build, for tests: the same kinds of layer, two of each at most.

  Widths divide by 8, and heads by 2, so that the sharding rows of the full size hold on small meshes.
  """
  image = spec_of(size.image.kind).mu(size.image)
  return dataclasses.replace(size, embed_dim=32, image=image,
                             text=TextSize(context=32, vocab=512, width=64, layers=2, heads=2))


def _mu_of(make: Callable[[], ClipConfig]) -> Callable[[], ClipConfig]:
  return lambda: mu(make())


SIZES: dict[str, Callable[[], ClipConfig]] = {
  **PUBLISHED,
  **{f"{name}_mu": _mu_of(make) for name, make in PUBLISHED.items()},
  # For 1,797 digits on a laptop: 32 × 32 pixels, captions in bytes.
  "clip_vit_digits": lambda: ClipConfig(64, ViTSize(image_size=32, patch=8, width=128, layers=3, heads=4),
                                      TextSize(context=32, vocab=259, width=64, layers=2, heads=2)),
}


@dataclass(frozen=True)
class Clip:
  """The two towers, as pure functions of their parameters and statistics."""

  size: ClipConfig
  image: nn.Module
  text: TextTransformer

  def init_image(self, rng: jax.Array) -> dict:
    """Returns random variables {"params": …, ("batch_stats": …)} of the image tower."""
    return self.image.init(rng, jnp.zeros((1, self.size.image.image_size, self.size.image.image_size, 3)))

  def init_text(self, rng: jax.Array) -> dict:
    """Returns random variables {"params": …} of the text tower."""
    return self.text.init(rng, jnp.zeros((1, self.size.text.context), jnp.int32))

  def encode_image(self, params: dict, stats: dict, images: jax.Array, train: bool = False) -> tuple[Features, dict]:
    """Returns the features of images, and the statistics after them.

    Args:
      params: parameters of the image tower.
      stats: its BatchNorm statistics; {} for a ViT.
      images: [B, H, W, 3], uint8 in 0..255 (normalised here, with the model's mean and std) or float, already
        normalised.
      train: use the batch's own statistics, and update the running ones.

    Returns:
      (Features(tokens [B, S, F], pooled [B, E], not normalised, penultimate [B, D]), stats).

    Raises:
      ValueError: images of another size than the tower's.
    """
    side = self.size.image.image_size
    if images.ndim != 4 or images.shape[1:] != (side, side, 3):
      raise ValueError(f"images: expected [B, {side}, {side}, 3], got {images.shape}")
    images = normalise(images, self.size.mean, self.size.std)
    variables = {"params": params} | ({"batch_stats": stats} if stats else {})
    if train and stats:
      features, changed = self.image.apply(variables, images, train=True, mutable=["batch_stats"])
      return features, changed["batch_stats"]
    return self.image.apply(variables, images), stats

  def encode_text(self, params: dict, tokens: jax.Array) -> Features:
    """Returns Features(tokens [B, T, D], pooled [B, E], not normalised) of tokens int32 [B, T]."""
    return self.text.apply({"params": params}, tokens)


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
  """Returns (images / 255 - mean) / std in float32 for uint8 images [..., 3]; floats are returned as they are."""
  if images.dtype != jnp.uint8:
    return images
  shape = (1,) * (images.ndim - 1) + (3,)
  m, s = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
  return (images.astype(jnp.float32) / 255 - m) / s


def build(size: ClipConfig, compute: Compute) -> Clip:
  """Returns the towers of `size`, computing as `compute` says; raises UserError if the sizes do not fit together."""
  ranges.check(size, "config.model.")
  ranges.check(compute, "config.compute.")
  tower = EncoderConfig(size.image, embed_dim=size.embed_dim, activation=size.activation)
  spec = checked(tower, "model.image")
  if size.text.width % size.text.heads:
    raise UserError(f"model.text: {size.text.heads} heads do not divide a width of {size.text.width}")
  if not -1 <= size.text.eos < size.text.vocab:
    raise UserError(f"model.text: eos={size.text.eos} is no id of a vocabulary of {size.text.vocab}")
  return Clip(size, spec.module(tower, compute),
              TextTransformer(size.text, size.embed_dim, size.activation, compute))


def sharding(size: ClipConfig) -> Rules:
  """Returns the rows of the sharding table for both towers."""
  return (*spec_of(size.image.kind).sharding, *text.SHARDING)


def openai_weights(kind: str) -> Rows:
  """Returns the weight table of a whole CLIP with such an image tower; open_clip kept OpenAI's names.

  Statistics stand under "stats/".
  """
  return _whole(spec_of(kind).weights["openai"], text.OPENAI_WEIGHTS)


def hf_weights(kind: str = "vit") -> Rows:
  """Returns the weight table of a whole CLIP in transformers' names."""
  return _whole(spec_of(kind).weights["hf"], text.HF_WEIGHTS)


def _whole(image: Rows, text_rows: Rows) -> Rows:
  stats = tuple((f"stats/image/{ours.removeprefix('stats/')}", *rest) for ours, *rest in image
                if ours.startswith("stats/"))
  plain = tuple(row for row in image if not row[0].startswith("stats/"))
  return (*under("image/", "", plain), *under("text/", "", text_rows), *stats,
          ("logit_scale", "logit_scale", "scalar"), ("logit_bias", "logit_bias", "scalar"))


def size_from_dict(values: dict[str, Any]) -> ClipConfig:
  """Returns the size whose `config_json.flatten` gave `values`; raises UserError as `config_json.unflatten` does."""
  return unflatten(ClipConfig, values)
