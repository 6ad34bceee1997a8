"""What the rest of the tree knows of an image encoder: a file of `models` defines it whole, in one EncoderSpec.

A new one is that file and a line in `registry.ENCODERS`; nothing else asks what kind a tower is.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from limber_jax import ranges, registry
from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models.layers import ACTIVATIONS, Rows
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import Rules

# OpenAI's statistics of its training images, on the scale 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# How an image becomes pixels: what the fields of a size may be.
RESIZES = ("shortest", "longest", "squash", "native")
RESAMPLES = ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")
ROUNDINGS = ("even", "down")
PIXELS = ("mean", "std", "resize", "resample", "resize_to", "crop_rounding", "fill_color")  # and the fields themselves

FEATURES = ("tokens", "pooled")

# Tensors in files of CLIPs that carry no weights, as patterns of their whole names; and all that is no image tower.
OPENAI_IGNORED = ("input_resolution", "context_length", "vocab_size", r"visual\..*\.num_batches_tracked")
HF_IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)
NOT_IMAGE = (
  *OPENAI_IGNORED, r"(transformer|token_embedding|ln_final)\..*", "positional_embedding", "text_projection",
  *HF_IGNORED, r"text_model\..*", r"text_projection\.weight", "logit_scale", "logit_bias")


@dataclass
class EncoderConfig:
  """Everything that defines an image encoder but its weights."""

  tower: Any = ranged(factory=lambda: spec_of("vit").size(), registered="ENCODERS")
  mean: tuple[float, ...] = ranged(MEAN, length=3)  # of the training images, on the scale 0..1
  std: tuple[float, ...] = ranged(STD, at_least=1e-6, length=3)
  # shortest: the short side to image_size, then the central square | squash: straight to a square, aspect not kept |
  # longest: the long side, and fill_color beside it | native: the central square of the pixels as they are, whatever
  # the directory of the weights says; black where the image is smaller
  resize: str = ranged("shortest", choices=RESIZES)
  resample: str = ranged("bicubic", choices=RESAMPLES)  # a filter of PIL's
  features: str = ranged("tokens", choices=FEATURES)  # tokens | pooled: what goes to the language model
  # E of CLIP's towers; the others pool to their own width
  embed_dim: int = ranged(512, at_least=1, at_most=10**6)
  activation: str = ranged("quick_gelu", choices=tuple(ACTIVATIONS))  # of CLIP's towers
  # pixels of the side that is resized; 0 = image_size
  resize_to: int = ranged(0, at_least=0, at_most=16_384, later=True)
  crop_rounding: str = ranged("even", choices=ROUNDINGS, later=True)  # even: torchvision's | down: transformers'
  fill_color: int = ranged(0, at_least=0, at_most=255, later=True)  # grey beside images that are smaller than the crop

  def plain(self) -> "EncoderConfig":
    """Returns a size with the preprocessing that such an encoder has where nobody says anything."""
    spec = spec_of(self.tower.kind)
    return next(iter(spec.named.values()))() if spec.named else EncoderConfig(self.tower)


@dataclass(frozen=True)
class ClipTower:
  """What an encoder has that is the image tower of CLIPs too."""

  open_clip: Callable[[Any], dict[str, Any]]                # tower -> open_clip's "vision_cfg"
  hf: Callable[[Any], dict[str, Any]] | None = None         # tower -> transformers' "vision_config"; None: it has none


@dataclass(frozen=True)
class EncoderSpec:
  """An image encoder, as the rest of the tree sees it.

  Functions of a `tower` take an instance of `size`.
  """

  # A dataclass of the tower's sizes: its `kind` is the name in registry.ENCODERS, `image_size` the pixels a side,
  # `num_tokens` the S of its tokens.
  size: type
  module: Callable[[EncoderConfig, Compute], nn.Module]  # images [B, H, W, 3], normalised -> layers.Features
  check: Callable[[Any], str]                          # tower -> what does not fit together, "" if all does
  mu: Callable[[Any], Any]                             # tower -> the smallest of the same build, for tests
  width: Callable[[Any], int]                          # tower -> F of its tokens
  weights: dict[str, Rows]       # tables by format; statistics stand under "stats/"
  sharding: Rules                # of parameters and statistics
  title: str                     # "a BEiT", for messages
  ignored: tuple[str, ...] = ()  # patterns of whole names of tensors that are no part of it, in any of the formats
  named: dict[str, Callable[[], EncoderConfig]] = dataclasses.field(default_factory=dict)
  convolutional: bool = False
  batch_norm: bool = False       # it has running statistics, and its training sees the whole batch
  clip: ClipTower | None = None  # its weights come in files of CLIPs; pooled it is embed_dim wide
  # Of what is in no file of a CLIP: whether a config.json is of such a model, and what of it does not fit a tower.
  describes: Callable[[dict[str, Any]], bool] = lambda values: False
  check_config: Callable[[dict[str, Any], Any], None] = lambda values, tower: None  # raises UserError
  # What a lone file shows of itself, by the configuration's names, with what a silent configuration means; None: a
  # configuration that `describes` such a model is the file's own.
  shown: Callable[[Any], dict[str, tuple[Any, Any]]] | None = None
  processor: str = ""            # an image processor of transformers | timm: what says the preprocessing


@dataclass(frozen=True)
class DecoderSpec:
  """A language model, as the rest of the tree sees it.

  Functions of a `size` take an instance of `size`, those of a `model` what `module` returns: a linen module over
  embeddings with the methods of models.gptj.GPTJ (`embed`, `__call__` with a models.cache.Cache, `logits`).
  """

  # A dataclass of its sizes: `kind` is the name in registry.LANGUAGE_MODELS; `vocab`, `context`, `width`, `layers` and
  # `heads` are what caches and prompts are made by; `encoders()` returns {}.
  size: type
  module: Callable[[Any, Compute, Any], nn.Module]  # (size, compute, adapters or None)
  check: Callable[[Any, Any], None]                 # (size, adapters or None); raises UserError
  init: Callable[[Any, Any], dict]                  # (model, rng) -> parameters
  mu: Callable[[Any], Any]                          # size -> the smallest of the same build, for tests
  sharding: Rules
  adapter_sharding: Rules                           # of what a block's adapters would shard as
  named: dict[str, Callable[[], Any]]


def decoder_of(kind: str) -> DecoderSpec:
  """Returns the spec of a kind of language model; raises UserError with the nearest one if there is none."""
  return registry.lookup("language model", registry.LANGUAGE_MODELS, kind)


def spec_of(kind: str) -> EncoderSpec:
  """Returns the spec of a kind of tower; raises UserError with the nearest one if there is none."""
  return registry.lookup("encoder", registry.ENCODERS, kind)


def checked(size: EncoderConfig, where: str = "model.tower") -> EncoderSpec:
  """Returns the spec of a size; raises UserError if a field is out of its range, or they do not fit together."""
  ranges.check(size, "config.model.")
  spec = spec_of(size.tower.kind)
  if wrong := spec.check(size.tower):
    raise UserError(f"{where}: {wrong}")
  return spec


def patches_fit(tower: Any) -> str:
  """Returns what does not fit together of a transformer over patches, "" if all does."""
  if tower.image_size % tower.patch:
    return f"patches of {tower.patch} do not tile {tower.image_size} pixels"
  if tower.width % tower.heads:
    return f"{tower.heads} heads do not divide a width of {tower.width}"
  return ""


def same(values: dict[str, Any], fixed: dict[str, tuple]) -> None:
  """Raises UserError if one of `values` is there and not among those `fixed` for it."""
  for name, allowed in fixed.items():
    if name in values and values[name] not in allowed:
      raise UserError(f"{name} is {values[name]!r}, expected {allowed[0]!r}")
