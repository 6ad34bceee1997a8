"""LiMBeR: image features through one linear map into a frozen language model. Source: arXiv 2209.15162.

MAGMA (2112.05253) is the same build with a LayerNorm on the prompt, adapters in the language model, a tuned encoder.
"""

import dataclasses
import zlib
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax import ranges
from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.map_names import BLIND, join, split
from limber_jax.models import adapters, prompt
from limber_jax.models.adapters import AdapterConfig
from limber_jax.models.encoders import Encoder
from limber_jax.models.prompt import LinearPrompt, prefix_inputs
from limber_jax.models.spec import EncoderConfig, decoder_of
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import Rules, within


@dataclass
class ProjectorConfig:
  """What the linear map is, beside the widths it joins."""

  per_feature: int = ranged(1, at_least=1, at_most=10**6)  # k, prefix tokens that each feature becomes
  dropout: float = ranged(0.1, at_least=0, below=1)        # of its outputs
  layer_norm: bool = False   # after it: MAGMA's


@dataclass
class Projector:
  """An extra linear projector, trained beside the first on the same captions: parts "image@name" and "prompt@name"."""

  image: EncoderConfig | None = None  # None: on the features of the first map's encoder, from another seed
  prompt: ProjectorConfig = field(default_factory=ProjectorConfig)


@dataclass
class LimberConfig:
  """Everything that defines a LiMBeR but its weights."""

  image: EncoderConfig = field(default_factory=EncoderConfig)
  prompt: ProjectorConfig = field(default_factory=ProjectorConfig)
  lm: Any = ranged(factory=lambda: decoder_of("gptj").size(), registered="LANGUAGE_MODELS")
  adapters: AdapterConfig = field(default_factory=AdapterConfig)
  extra_projectors: dict[str, Projector] = field(default_factory=dict)

  def encoders(self) -> dict[str, EncoderConfig]:
    """Returns the image encoders, by part."""
    extra = {join("image", name): p.image for name, p in self.extra_projectors.items() if p.image}
    return {"image": self.image} | extra

  def with_encoder(self, part: str, size: EncoderConfig) -> "LimberConfig":
    """Returns this size with another of what `encoders` gives."""
    if part == "image":
      return dataclasses.replace(self, image=size)
    name = split(part)[1]
    changed = dataclasses.replace(self.extra_projectors[name], image=size)
    return dataclasses.replace(self, extra_projectors=self.extra_projectors | {name: changed})

  def encoder_field(self, part: str) -> str:
    """Returns where that stands in config.model, with its dot."""
    return "image." if part == "image" else f"extra_projectors.{split(part)[1]}.image."


@dataclass(frozen=True)
class Limber:
  """The encoders, the maps and the language model, as pure functions of their parameters and statistics."""

  size: LimberConfig
  encoders: dict[str, Encoder]     # by the name of the map; maps that share the first one's encoder are not in it
  projectors: dict[str, LinearPrompt]
  lm: nn.Module                    # of a DecoderSpec

  @classmethod
  def from_config(cls, size: LimberConfig, compute: Compute) -> "Limber":
    """Returns the models of `size`, computing as `compute` says; raises UserError if the sizes do not fit together."""
    ranges.check(size, "config.model.")
    if taken := sorted({BLIND, "blind_text", "blind_zeros"} & set(size.extra_projectors)):
      raise UserError(f"config.model.extra_projectors: a projector called {taken[0]!r}, which metrics without any "
                      "image are called; choose another name")
    has_adapters = size.adapters.mlp or size.adapters.attention
    adapted = size.adapters if has_adapters else None
    decoder = decoder_of(size.lm.kind)
    decoder.check(size.lm, adapted)
    lm = decoder.module(size.lm, compute, adapted)
    maps = {"": Projector(size.image, size.prompt), **size.extra_projectors}
    encoders = {name: Encoder.from_config(m.image, compute) for name, m in maps.items() if m.image is not None}
    projectors = {
      name: LinearPrompt(size.lm.width, m.prompt.per_feature, m.prompt.dropout, m.prompt.layer_norm, compute)
      for name, m in maps.items()}
    return cls(size, encoders, projectors, lm)

  @property
  def maps(self) -> tuple[str, ...]:
    """The names of the maps; the first is ""."""
    return tuple(self.projectors)

  def encoder_of(self, name: str) -> str:
    """Returns the map whose encoder the map `name` stands on: its own name, or ""."""
    return name if name in self.encoders else ""

  def prefix_length(self, name: str = "") -> int:
    """Returns P, the prefix tokens of an image."""
    return self.encoders[self.encoder_of(name)].num_tokens * self.projectors[name].per_feature

  @property
  def sharding(self) -> Rules:
    """Rows of the sharding table for all parts; each part's rows hold only within it."""
    decoder = decoder_of(self.size.lm.kind)
    rows = [*within("lm", decoder.sharding),
            *within("adapters", (*decoder.adapter_sharding, *adapters.SHARDING))]
    for name in self.maps:
      rows += within(join("prompt", name), prompt.SHARDING)
      if name in self.encoders:
        rows += within(join("image", name), self.encoders[name].spec.sharding)
    return tuple(rows)

  def init(self, rng: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns random (params by part, stats by part); the same for a map whatever other maps there are."""
    params, stats = {}, {}
    lm, adapted = adapters.split_adapters(decoder_of(self.size.lm.kind).init(self.lm, jax.random.fold_in(rng, 0)))
    params["lm"] = lm
    if adapted:
      params["adapters"] = adapted
    for name in self.maps:
      key = jax.random.fold_in(rng, 1 + zlib.crc32(name.encode()))
      if name in self.encoders:
        params[join("image", name)], found = self.encoders[name].init(jax.random.fold_in(key, 0))
        if found:
          stats[join("image", name)] = found
      features = jnp.zeros((1, 1, self.encoders[self.encoder_of(name)].feature_dim))
      params[join("prompt", name)] = self.projectors[name].init(jax.random.fold_in(key, 1), features)["params"]
    return params, stats

  def encode(self, params: dict, stats: dict, images: jax.Array, name: str = "", *, train: bool = False,
             rng: jax.Array | None = None) -> tuple[jax.Array, dict]:
    """Returns (features [B, S, F] of images [B, H, W, 3] by the encoder of map `name`, its statistics)."""
    here = join("image", name)
    features, changed = self.encoders[name].encode(params[here], stats.get(here, {}), images, train, rng)
    return features.tokens, changed

  def image_prefix(self, params: dict, features: jax.Array, name: str = "", *, rng: jax.Array | None = None
                   ) -> jax.Array:
    """Returns the image prefix [B, P, D] of features [B, S, F] by map `name`; with dropout if there is an rng."""
    rngs = {} if rng is None else {"dropout": rng}
    return self.projectors[name].apply({"params": params[join("prompt", name)]}, features, train=rng is not None,
                                    rngs=rngs)

  def lm_params(self, params: dict) -> dict[str, Any]:
    """Returns what the language model's functions take: {"params": …}, its adapters in their places."""
    return {"params": adapters.merge_adapters(params["lm"], params.get("adapters", {}))}

  def hidden(self, params: dict, image_prefix: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the hidden states [B, T, D] that predict tokens [B, T]; see `target_hidden`."""
    return target_hidden(self.lm, self.lm_params(params), image_prefix, tokens, mask)

  def logits(self, params: dict, hidden: jax.Array) -> jax.Array:
    """Returns float32 [..., V] of hidden states [..., D]."""
    return self.lm.apply(self.lm_params(params), hidden, method="logits")


def target_hidden(lm: nn.Module, variables: dict[str, Any], image_prefix: jax.Array, tokens: jax.Array, mask: jax.Array
                  ) -> jax.Array:
  """Returns the hidden states [B, T, D] that predict tokens, each from the image prefix and the tokens before it.

  Args:
    lm: the language model.
    variables: what its functions take.
    image_prefix: [B, P, D], P at least 1.
    tokens: int32 [B, T].
    mask: bool [B, T], True where real; padding is on the right.
  """
  embeds = lm.apply(variables, tokens[:, :-1], method="embed")
  hidden, _ = lm.apply(variables, *prefix_inputs(image_prefix, embeds, mask[:, :-1]))
  return hidden[:, image_prefix.shape[1] - 1 :]
