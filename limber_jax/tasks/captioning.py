"""Image captions by a frozen language model: LiMBeR (arXiv 2209.15162) and MAGMA (2112.05253).

Only the parts named in `trainable` have gradients, optimizer state and checkpoints. Several maps, if the model has
them, are trained on the same captions, each as if it were alone; the loss is the sum of theirs.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from limber_jax import losses, ranges
from limber_jax.config import Captions, Config, Data, Decoding, Init, check_model
from limber_jax.config_json import flatten
from limber_jax.data import transforms
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.decoding import interleaved
from limber_jax.decoding.generate import check as check_decoding
from limber_jax.decoding.generate import generate
from limber_jax.errors import UserError
from limber_jax.map_names import join, split
from limber_jax.models.limber import Limber, LimberConfig
from limber_jax.models.prompt import prefix_inputs
from limber_jax.runtime.parallel import WHOLE, Rules, within
from limber_jax.tasks import microbatches
from limber_jax.weights import parts
from limber_jax.weights.adopt import adopt


@dataclasses.dataclass(frozen=True)
class Captioning:
  """Images and captions. batch: image uint8 [N, H, W, 3] (or features [N, S, F]), tokens int32, mask bool [N, T].

  Maps whose encoder takes other pixels have images of their own: "image@name"; features are an encoder's own always:
  "features@name".
  """

  model: Limber
  trainable: tuple[str, ...]
  num_microbatches: int              # that a batch goes through the model in
  captions: Captions
  decoding: Decoding
  length: int                  # T

  @staticmethod
  def model_configs() -> tuple[type, ...]:
    return (LimberConfig,)

  @classmethod
  def from_config(cls, config: Config) -> "Captioning":
    """Returns the task of an experiment; raises UserError if its settings cannot go together."""
    check_model(config)
    c, k, n = config.captions, config.loss.num_microbatches, config.batch_size
    ranges.check(c, "config.captions.")
    check_decoding(config.decoding)
    ranges.check(config.loss, "config.loss.")
    if "reference" in (c.eos, c.mean) and n % c.micro_batch:
      raise UserError(f"config.captions.micro_batch={c.micro_batch} does not divide config.batch_size={n}")
    if n % k:
      raise UserError(f"config.loss.num_microbatches={k} does not divide config.batch_size={n}")
    model = Limber.from_config(config.model, config.compute)
    if any(p.startswith("image") for p in config.trainable) and config.data.features:
      raise UserError("config.data.features holds what a frozen encoder saw; a trained one needs the images")
    batch_norm = [join("image", n) for n, e in model.encoders.items() if e.spec.batch_norm]
    if c.encoder == "train" and k > 1 and set(batch_norm) & set(config.trainable):
      raise UserError(f"config.loss.num_microbatches={k}: config.captions.encoder='train' takes BatchNorm's statistics "
                      "from the whole batch, which microbatches cannot give; use num_microbatches=1")
    if c.encoder == "train" and config.data.features:
      raise UserError("config.data.features holds what the encoder gives as at test; config.captions.encoder='train' "
                      "needs the images")
    longest = max(map(model.prefix_length, model.maps))
    if longest + config.data.length > config.model.lm.context:
      raise UserError(f"an image prefix of {longest} and config.data.length={config.data.length} tokens are more than "
                      f"the language model's context of {config.model.lm.context}")
    task = cls(model, config.trainable, k, c, config.decoding, config.data.length)
    if config.data.features:
      task.feature_specs(config.data)
    return task

  @staticmethod
  def of_weights(config: Config, weights: str, model: str, log: Callable[[str], None]) -> tuple[LimberConfig, Init]:
    """Returns those by which a map from elsewhere is evaluated, between the frozen parts of config.init."""
    if model:
      raise UserError("--model is of the weights of a CLIP; the models of a map are those of config.model")
    init = dataclasses.replace(config.init, prompt=weights)
    return adopt(dataclasses.replace(config, init=init), weights=weights, log=log), init

  @property
  def sharding(self) -> Rules:
    rows: Rules = ()
    for name, encoder in self.model.encoders.items():
      if encoder.spec.convolutional and join("image", name) not in self.trainable:
        rows += within(join("image", name), WHOLE)
    return rows + self.model.sharding

  @property
  def vocab(self) -> int:
    return self.model.size.lm.vocab

  def transform(self, tokenizer: Tokenizer, data: Data, train: bool) -> transforms.Transform:
    if data.features and train:
      kept = (*(join("features", name) for name in self.model.encoders), "tokens", "mask", "label")
      return transforms.Compose((transforms.TokenizeCaption(tokenizer, self.length), transforms.Select(kept)))
    rules = self._rules(data, data.crop if train else "encoder")
    return transforms.captioning(rules, tokenizer, self.length, jpeg_fast_decode=train and data.jpeg_fast_decode)

  def pixels(self, data: Data) -> transforms.Transform:
    """Returns what makes the images of a record in training, {"image": uint8 [H, W, 3], …}, and nothing else of it."""
    rules = self._rules(data, data.crop)
    return transforms.Compose((*transforms.images(rules, data.jpeg_fast_decode), transforms.Select(tuple(rules))))

  def _rules(self, data: Data, crop: str) -> dict[str, transforms.ResizeCrop]:
    return {self.pixels_of(name): self.rule(name, crop, data.crop_scale) for name in self.model.encoders}

  def feature_specs(self, data: Data) -> dict[str, dict[str, Any]]:
    """Returns, by the part of each encoder, all that its features depend on but its weights and the data; plain JSON.

    Raises:
      UserError: they would not be the same in every epoch.
    """
    out = {}
    fast = {"draft": True} if data.jpeg_fast_decode else {}  # as features of earlier releases say it
    for name, encoder in self.model.encoders.items():
      rule = self.rule(name, data.crop, data.crop_scale)
      if rule.crop in ("random", "resized"):
        raise UserError(f"config.data.crop={data.crop!r} shows an encoder another crop in every epoch, which "
                        "config.data.features cannot hold; set --config.data.crop=encoder, or center")
      out[join("image", name)] = {
        "shape": [encoder.num_tokens, encoder.feature_dim], "dtype": self.model.lm.compute.dtype,
        "pixels": {"size": rule.size, "crop": rule.crop, "resample": rule.resample} | rule.changes() | fast,
        "encoder": flatten(encoder.size, known=True)}
    return out

  def pixel_settings(self, data: Data) -> dict[str, Any]:
    found = {name: self.rule(name, data.crop, data.crop_scale) for name in self.model.encoders}
    return {join("image", name): changes for name, rule in found.items() if (changes := rule.changes())}

  def rule(self, name: str = "", crop: str = "encoder", scale: tuple[float, ...] = (0.9, 1.0)) -> transforms.ResizeCrop:
    """Returns what becomes of an image for the encoder of map `name`; crop "encoder" is the encoder's preprocessing."""
    size = self.model.encoders[name].size
    if crop == "encoder":
      return dataclasses.replace(transforms.encoder_rule(size, size.tower.image_size), scale=tuple(scale))
    return transforms.ResizeCrop(size.tower.image_size, crop, tuple(scale), size.resample)

  def pixels_of(self, name: str) -> str:
    """Returns the key of a batch that holds the images for the encoder of map `name`."""
    return join("image", name) if self.rule(name) != self.rule("") else "image"

  def init(self, rng: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    return self.model.init(rng)

  def load(self, path: str, part: str, like: dict, stats: dict, resample: bool = False
           ) -> tuple[dict[str, Any], dict[str, Any]]:
    kind, name = split(part)
    size = {"image": lambda: self.model.encoders[name].size, "lm": lambda: self.model.size.lm}.get(kind, lambda: None)()
    return parts.load_part(path, kind, size, like, stats, resample)

  def loss(self, params: dict, stats: dict, batch: dict, rng: jax.Array) -> tuple[jax.Array, tuple[dict, dict]]:
    trained = {k: v for k, v in params.items() if k in self.trainable}
    frozen = {k: v for k, v in params.items() if k not in self.trainable}
    batch = batch | {"weights": token_weights(batch["mask"], self.captions)}
    batch, changed = self._encode_frozen(params, stats, batch, rng)

    def of_microbatch(trained, batch, rng):
      params = frozen | trained
      total, metrics = 0.0, {}
      image_prefixes = self._image_prefixes(params, stats, batch, rng)
      for name, image_prefix in image_prefixes.items():
        hidden = self.model.hidden(params, image_prefix, batch["tokens"], batch["mask"])
        logits = self.model.logits(params, hidden)
        loss, found = losses.caption_loss(logits, batch["tokens"], batch["weights"], total=1.0)
        total += loss
        if len(image_prefixes) > 1:
          found = found | {"nats": loss}
        metrics |= {join(key, name): value for key, value in found.items()}
      return total, metrics

    loss, metrics = microbatches.accumulate_gradients(of_microbatch, trained, batch, rng, self.num_microbatches)
    return loss, (metrics, changed)

  def _encode_frozen(self, params, stats, batch, rng) -> tuple[dict[str, jax.Array], dict]:
    """Returns the batch with features in place of the images that frozen encoders alone look at, and the statistics.

    So they see the whole batch at once, not in microbatches: one is 16 images a chip or fewer, which it pads.
    """
    train, wanted = self.captions.encoder == "train", set()
    for name in self.model.encoders:
      here = join("image", name)
      if here in self.trainable:
        wanted.add(self.pixels_of(name))
        if train and here in stats:
          stats = stats | {here: self._features(params, stats, batch, name, True, rng)[1]}
      elif join("features", name) not in batch:
        features, changed = self._features(params, stats, batch, name, train, rng)
        batch = batch | {join("features", name): features}
        stats = stats | ({here: changed} if changed else {})
    images = {self.pixels_of(name) for name in self.model.encoders}
    return {k: v for k, v in batch.items() if k not in images or k in wanted}, stats

  def _image_prefixes(self, params, stats, batch, rng=None) -> dict[str, jax.Array]:
    """Returns the image prefix [B, P, D] of every map; with dropout if there is an rng."""
    features, out = {}, {}
    train = rng is not None and self.captions.encoder == "train"
    for i, name in enumerate(self.model.maps):
      encoder = self.model.encoder_of(name)
      if encoder not in features:
        features[encoder] = self._features(params, stats, batch, encoder, train, rng)[0]
      key = None if rng is None else jax.random.fold_in(rng, i)
      out[name] = self.model.image_prefix(params, features[encoder], name, rng=key)
    return out

  def _features(self, params, stats, batch, name, train=False, rng=None):
    if (known := join("features", name)) in batch:
      return batch[known], {}
    return self.model.encode(params, stats, batch[self.pixels_of(name)], name, train=train, rng=rng if train else None)

  def project(self, params: dict) -> dict:
    return params

  def predict(self) -> dict[str, Callable[..., Any]]:
    """Returns "nll", "generate", "features" and "prompt", each with "@name" behind it of the map of this name.

    nll(params, stats, batch): float32 [B], nats of each caption, its end included.
    generate(params, stats, batch, eos, prefix=None): a generate.Generated of what follows an image's prompt and the
      text in batch's "tokens" and "mask"; "key" of each row, where decoding draws (`generate.row_keys`). The prefix,
      from "read", stands before every row.
    features(params, stats, batch): [B, S, F] of the encoder.
    prompt(params, stats, batch): [B, P, D] of the map; what a batch has under this name, of any P, takes its place.
    generate_blind(params, stats, batch, eos, prefix=None): without any image; the text must not be empty.
    read(params, stats, batch): the cache of what rows begin with: `interleaved.prefill` of batch's "tokens", "source"
      and "mask" [1, L], and "shared" [S, D].
    """
    out: dict[str, Callable[..., Any]] = {"generate_blind": partial(self._generate, None), "read": self._read}
    for name in self.model.maps:
      out |= {join("nll", name): partial(self._nll, name), join("generate", name): partial(self._generate, name),
              join("features", name): partial(self._encoded, name),
              join("prompt", name): partial(self._image_prefix, name)}
    return out

  def _encoded(self, name, params, stats, batch):
    return self._features(params, stats, batch, self.model.encoder_of(name))[0]

  def _image_prefix(self, name, params, stats, batch):
    if (known := join("prompt", name)) in batch:
      return batch[known]
    return self.model.image_prefix(params, self._encoded(name, params, stats, batch), name)

  def _read(self, params, stats, batch):
    return interleaved.prefill(self.model, params, batch, batch["shared"])

  def _nll(self, name, params, stats, batch):
    image_prefix = self._image_prefix(name, params, stats, batch)
    logits = self.model.logits(params, self.model.hidden(params, image_prefix, batch["tokens"], batch["mask"]))

    def one(*row):
      return losses.caption_loss(*(x[None] for x in row), total=1.0)[0]

    return jax.vmap(one)(logits, batch["tokens"], batch["mask"])

  def _generate(self, name, params, stats, batch, eos, prefix=None):
    variables = self.model.lm_params(params)
    embeds = self.model.lm.apply(variables, batch["tokens"], method="embed")
    image_prefix = embeds[:, :0] if name is None else self._image_prefix(name, params, stats, batch)
    x, _, mask = prefix_inputs(image_prefix, embeds, batch["mask"])
    return generate(self.model.lm, variables["params"], x, interleaved.position_ids(mask, prefix), mask, eos=eos,
                    settings=self.decoding, max_new_tokens=self.decoding.max_new_tokens, keys=batch.get("key"),
                    prefix=prefix)


def token_weights(mask: jax.Array, captions: Captions) -> jax.Array:
  """Returns how much each token counts in the loss, float32 [N, T], 1 in all.

  Args:
    mask: bool [N, T], True up to the end of a caption and its EOS.
    captions: `eos` and `mean` may be "reference". Its micro-batches are runs of rows.
  """
  N, T = mask.shape
  size = captions.micro_batch if "reference" in (captions.eos, captions.mean) else N
  groups = mask.reshape(N // size, size, T)
  if captions.eos == "reference":
    # Its captions were padded with EOS to the longest, and only the first pad was a target: the longest had none.
    length = groups.sum(-1)  # [groups, rows]
    longest = length == length.max(1, keepdims=True)
    last = jnp.arange(T)[None, None] == length[..., None] - 1
    groups = groups & ~(longest[..., None] & last)
  weights = groups.astype(jnp.float32)
  if captions.mean == "reference":
    count = weights.sum((1, 2), keepdims=True)
    weights = weights / jnp.where(count > 0, count, 1.0) / len(groups)
  else:
    count = weights.sum()
    weights = weights / jnp.where(count > 0, count, 1.0)
  return weights.reshape(N, T)
