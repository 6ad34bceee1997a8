"""Contrastive pre-training of two towers: CLIP (arXiv 2103.00020), LiT (2111.07991) and SigLIP (2303.15343)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from limber_jax import losses, ranges
from limber_jax.config import Config, Data, Init, check_model
from limber_jax.data import transforms
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.models.spec import spec_of
from limber_jax.models.text import check_end
from limber_jax.runtime.parallel import BATCH, WHOLE, Rules, place, within
from limber_jax.tasks import microbatches
from limber_jax.weights import load


@dataclasses.dataclass(frozen=True)
class Contrastive:
  """Pairs of images and texts. batch: image uint8 [N, H, W, 3], tokens int32 [N, T]."""

  model: clip.Clip
  kind: str                    # softmax | sigmoid
  chunk_size: int              # 0: all logits at once
  num_microbatches: int              # that a batch goes through the towers in
  trainable: tuple[str, ...]

  @staticmethod
  def model_configs() -> tuple[type, ...]:
    return (clip.ClipConfig,)

  @classmethod
  def from_config(cls, config: Config) -> "Contrastive":
    """Returns the task of an experiment; raises UserError if its settings cannot go together."""
    loss = config.loss
    ranges.check(loss, "config.loss.")
    check_model(config)
    count = loss.num_microbatches
    if config.batch_size % count:
      raise UserError(f"config.loss.num_microbatches={count} does not divide config.batch_size={config.batch_size}")
    if count > 1 and spec_of(config.model.image.kind).batch_norm and "image" in config.trainable:
      raise UserError(f"config.loss.num_microbatches={count}: BatchNorm of a trained ResNet takes its statistics from "
                      "the whole batch, which microbatches cannot give; use num_microbatches=1 with "
                      "config.compute.remat=full or more devices, or a ViT")
    return cls(clip.build(config.model, config.compute), loss.kind, loss.chunk_size, count, config.trainable)

  @staticmethod
  def of_weights(config: Config, weights: str, model: str, log: Callable[[str], None]) -> tuple[clip.ClipConfig, Init]:
    return load.open_model(weights, model).size, Init(image=weights, text=weights)

  @property
  def sharding(self) -> Rules:
    frozen = spec_of(self.model.size.image.kind).convolutional and "image" not in self.trainable
    return (*(within("image", WHOLE) if frozen else ()), *clip.sharding(self.model.size))

  @property
  def vocab(self) -> int:
    return self.model.size.text.vocab

  @property
  def length(self) -> int:
    return self.model.size.text.context

  def transform(self, tokenizer: Tokenizer, data: Data, train: bool) -> transforms.Transform:
    check_end(self.model.size.text, tokenizer.eot, f"config.data.tokenizer={data.tokenizer.name!r}")
    kept = ("image", "tokens") if train else ("image", "tokens", "label")
    return transforms.pairs(self._rule(data, train), tokenizer, self.length, kept, train and data.jpeg_fast_decode)

  def pixel_settings(self, data: Data) -> dict[str, Any]:
    return self._rule(data, train=True).changes("center" if data.crop == "encoder" else data.crop)

  def _rule(self, data: Data, train: bool) -> transforms.ResizeCrop:
    size = self.model.size
    if not train or data.crop == "encoder":
      return transforms.encoder_rule(size, size.image.image_size)
    return transforms.ResizeCrop(size.image.image_size, data.crop, tuple(data.crop_scale), size.resample)

  def init(self, rng: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    image = self.model.init_image(jax.random.fold_in(rng, 0))
    text = self.model.init_text(jax.random.fold_in(rng, 1))
    params = {"image": image["params"], "text": text["params"]}
    if self.kind == "softmax":
      params["logit_scale"] = jnp.float32(losses.INITIAL_LOG_SCALE)
    else:
      params["logit_scale"] = jnp.float32(losses.SIGLIP_LOG_SCALE)
      params["logit_bias"] = jnp.float32(losses.SIGLIP_BIAS)
    return params, {"image": image["batch_stats"]} if "batch_stats" in image else {}

  def load(self, path: str, part: str, like: dict, stats: dict, resample: bool = False
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    return place(load.load_into(path, part, self.model.size, like, stats, resample), (like, stats))

  def loss(self, params: dict, stats: dict, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple[dict, dict]]:
    del rng  # the towers have no dropout
    image, text, stats = self._embed(params, stats, batch["image"], batch["tokens"])
    scale = jnp.exp(params["logit_scale"])
    # Chunks go round a ring of devices; without chunks XLA splits the one matrix of logits by itself.
    chunks = {"chunk_size": self.chunk_size, "axis_name": _ring()} if self.chunk_size else {}
    if self.kind == "softmax":
      loss, metrics = losses.contrastive_loss(image, text, scale, **chunks)
    else:
      loss, metrics = losses.sigmoid_loss(image, text, scale, params["logit_bias"], **chunks)
    return loss, (metrics, stats)

  def _embed(self, params, stats, images, tokens):
    """Returns (image [N, E], text [N, E], stats), going through the towers in `num_microbatches`."""
    image_stats = stats.get("image", {})
    count = microbatches.fitting(self.num_microbatches, len(images))
    if count == 1:
      train = "image" in self.trainable
      image, image_stats = self.model.encode_image(params["image"], image_stats, images, train=train)
      text = self.model.encode_text(params["text"], tokens)
      return image.pooled, text.pooled, {"image": image_stats} if stats else stats

    # GradCache (arXiv 2101.06983): embeddings of every microbatch first, the loss over all of them, then each again for
    # its gradient. That is what the transpose of a map over checkpointed microbatches does.
    @jax.checkpoint
    def of_microbatch(args):
      image, _ = self.model.encode_image(params["image"], image_stats, args[0])
      return image.pooled, self.model.encode_text(params["text"], args[1]).pooled

    image, text = jax.lax.map(of_microbatch, (microbatches.split(images, count), microbatches.split(tokens, count)))
    return microbatches.join(image), microbatches.join(text), stats

  def project(self, params: dict) -> dict:
    if "logit_scale" not in params:  # it is not trained
      return params
    return params | {"logit_scale": jnp.clip(params["logit_scale"], 0, losses.MAX_LOG_SCALE)}

  def predict(self) -> dict[str, Callable[..., Any]]:
    """Returns "embed_image" (of images) and "embed_text" (of tokens): unit vectors float32 [B, E].

    "penultimate" (of images) gives what linear probes look at, I_f of the paper's Figure 3: float32 [B, D], before the
    projection and not normalised.
    """

    def unit(x):
      x = x.astype(jnp.float32)
      return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    def embed_image(params, stats, images):
      return unit(self.model.encode_image(params["image"], stats.get("image", {}), images)[0].pooled)

    def embed_text(params, stats, tokens):
      return unit(self.model.encode_text(params["text"], tokens).pooled)

    def penultimate(params, stats, images):
      features, _ = self.model.encode_image(params["image"], stats.get("image", {}), images)
      return features.penultimate.astype(jnp.float32)

    return {"embed_image": embed_image, "embed_text": embed_text, "penultimate": penultimate}


def _ring() -> tuple[str, ...] | None:
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.shape["data"] * mesh.shape["fsdp"] == 1 else BATCH
