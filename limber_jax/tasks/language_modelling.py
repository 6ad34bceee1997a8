"""Texts alone: trains a GPT-J of any size, so that a whole LiMBeR can be made from nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax import losses, ranges, registry
from limber_jax.config import Config, Data, Init, check_model
from limber_jax.data import transforms
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.errors import UserError
from limber_jax.models.limber import target_hidden
from limber_jax.models.spec import decoder_of
from limber_jax.runtime.parallel import Rules, within
from limber_jax.tasks import microbatches
from limber_jax.weights import parts


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
  """Texts, each after the end of another. batch: tokens int32, mask bool [N, T]; the one part is "lm".

  The first token of each row is the end of another text: it is read and not predicted.
  """

  model: nn.Module    # of a DecoderSpec
  num_microbatches: int
  length: int      # T

  @staticmethod
  def model_configs() -> tuple[type, ...]:
    return tuple(decoder_of(kind).size for kind in registry.LANGUAGE_MODELS)

  @classmethod
  def from_config(cls, config: Config) -> "LanguageModelling":
    """Returns the task of an experiment; raises UserError if its settings cannot go together."""
    check_model(config)
    size, k = config.model, config.loss.num_microbatches
    decoder = decoder_of(size.kind)
    decoder.check(size, None)
    ranges.check(config.loss, "config.loss.")
    if config.batch_size % k:
      raise UserError(f"config.loss.num_microbatches={k} does not divide config.batch_size={config.batch_size}")
    if config.data.length < 2:
      raise UserError(f"config.data.length={config.data.length}: wanted 2 or more: what is predicted follows "
                      "another token")
    if config.data.length > size.context:
      raise UserError(f"config.data.length={config.data.length} is more than the model's context of {size.context}")
    return cls(decoder.module(size, config.compute, None), k, config.data.length)

  @staticmethod
  def of_weights(config: Config, weights: str, model: str, log: Callable[[str], None]) -> tuple[Any, Init]:
    if model:
      raise UserError(f"--model={model} is of the weights of a CLIP; the language model is config.model")
    return config.model, dataclasses.replace(config.init, lm=weights)

  @property
  def sharding(self) -> Rules:
    return within("lm", decoder_of(self.model.size.kind).sharding)

  @property
  def vocab(self) -> int:
    return self.model.size.vocab

  def transform(self, tokenizer: Tokenizer, data: Data, train: bool) -> transforms.Transform:
    return transforms.captioning({}, tokenizer, self.length, start=True)

  def pixel_settings(self, data: Data) -> dict[str, Any]:
    return {}

  def init(self, rng: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"lm": decoder_of(self.model.size.kind).init(self.model, rng)}, {}

  def load(self, path: str, part: str, like: dict, stats: dict, resample: bool = False
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    del resample  # its positions are rotations
    return parts.load_part(path, part, self.model.size, like, stats)

  def loss(self, params: dict, stats: dict, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple[dict, dict]]:
    count = batch["mask"][:, 1:].sum().astype(jnp.float32)

    def of_microbatch(params, batch, rng):
      del rng  # no dropout: GPT-J's are 0
      return self._nats(params, batch, count)

    loss, metrics = microbatches.accumulate_gradients(of_microbatch, params, batch, rng, self.num_microbatches)
    return loss, (metrics, stats)

  def _nats(self, params, batch, total):
    variables, tokens, mask = {"params": params["lm"]}, batch["tokens"], batch["mask"]
    start = self.model.apply(variables, tokens[:, :1], method="embed")
    hidden = target_hidden(self.model, variables, start, tokens[:, 1:], mask[:, 1:])
    return losses.caption_loss(self.model.apply(variables, hidden, method="logits"), tokens[:, 1:], mask[:, 1:],
                               total=total)

  def project(self, params: dict) -> dict:
    return params

  def predict(self) -> dict[str, Callable[..., Any]]:
    """Returns "nll": f(params, stats, batch) -> float32 [B], nats of each text, its end included."""

    def nll(params, stats, batch):
      def one(tokens, mask):
        return self._nats(params, {"tokens": tokens[None], "mask": mask[None]}, 1.0)[0]

      return jax.vmap(one)(batch["tokens"], batch["mask"])

    return {"nll": nll}
