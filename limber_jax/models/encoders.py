"""The image encoders that LiMBeR maps from, by name: what they compute, what pixels they want, whose weights fit.

All of them return tokens [B, S, F] and a pooled embedding [B, E]; `features` of a size says which of the two goes to
the language model, pooled ones as a single token. The paper's random encoders are these sizes with random weights.
"""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax import ranges, registry
from limber_jax.config import Compute
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip
from limber_jax.models.clip import ClipConfig, normalise
from limber_jax.models.layers import Features, Rows
from limber_jax.models.spec import PIXELS, EncoderConfig, EncoderSpec, checked, spec_of


@dataclass(frozen=True)
class Encoder:
  """An image encoder, as pure functions of its parameters and statistics."""

  size: EncoderConfig
  spec: EncoderSpec
  tower: nn.Module

  @classmethod
  def from_config(cls, size: EncoderConfig, compute: Compute) -> "Encoder":
    """Returns the encoder of `size`, computing as `compute` says; raises UserError if its sizes do not fit together."""
    spec = checked(size)
    ranges.check(compute, "config.compute.")
    return cls(size, spec, spec.module(size, compute))

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
    pooled = self.size.features == "pooled" and self.spec.clip
    return self.size.embed_dim if pooled else self.spec.width(self.size.tower)

  def rows(self, names: Iterable[str]) -> Rows:
    """Returns the weight table that fits a file with tensors of these names; raises UserError if none does."""
    names = set(names)
    for rows in self.spec.weights.values():
      if rows[0][1] in names:
        return rows
    raise UserError(f"no weights of a {self.size.tower.kind!r} encoder: none of the tensors is "
                    + " or ".join(rows[0][1] for rows in self.spec.weights.values()))

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


def mu(size: EncoderConfig) -> EncoderConfig:
  """Returns the smallest encoder of the same build, for tests; widths and heads as `clip.mu` has them."""
  spec = spec_of(size.tower.kind)
  return dataclasses.replace(size, tower=spec.mu(size.tower), **({"embed_dim": 32} if spec.clip else {}))


def known() -> dict[str, Callable[[], EncoderConfig]]:
  """Returns all encoders by name: the image towers of CLIPs, what the registered ones name, and each's "…_mu"."""
  named: dict[str, Callable[[], EncoderConfig]] = {}
  for kind in registry.ENCODERS:
    named |= spec_of(kind).named
  small = {f"{name}_mu": _mu_of(make) for name, make in named.items()}
  return {name: _of_clip(make) for name, make in clip.SIZES.items()} | named | small


def encoder_size(name: str) -> EncoderConfig:
  """Returns the size of this name; raises UserError with the nearest one if there is none."""
  if name not in (encoders := known()):
    raise UserError(f"no encoder {name!r}{did_you_mean(name, encoders)}")
  return encoders[name]()


def as_clip(size: ClipConfig | EncoderConfig) -> ClipConfig | None:
  """Returns the CLIP that a size's image tower may be of, its text tower any; None where it is of none."""
  if isinstance(size, ClipConfig) or not spec_of(size.tower.kind).clip:
    return size if isinstance(size, ClipConfig) else None
  pixels = {name: getattr(size, name) for name in PIXELS}
  return ClipConfig(size.embed_dim, size.tower, activation=size.activation, **pixels)


def _of_clip(make: Callable[[], ClipConfig]) -> Callable[[], EncoderConfig]:
  def encoder():
    size = make()
    return EncoderConfig(size.image, size.mean, size.std, embed_dim=size.embed_dim, activation=size.activation)
  return encoder


def _mu_of(make: Callable[[], EncoderConfig]) -> Callable[[], EncoderConfig]:
  return lambda: mu(make())
