"""A trained map between its frozen models, opened to be used: what the commands `caption` and `vqa` share.

It comes from a workdir of limber_jax.train, or from the one file that `limber_jax.convert --to=projection` makes of it.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

import limber_jax
from limber_jax import config_json
from limber_jax.data import transforms
from limber_jax.data.images import ImageOptions
from limber_jax.data.sources import folder
from limber_jax.decoding import interleaved
from limber_jax.decoding.generate import row_keys
from limber_jax.decoding.interleaved import Layout, Segments
from limber_jax.errors import UserError
from limber_jax.inference.images import attempt
from limber_jax.models.cache import Cache
from limber_jax.runtime import parallel
from limber_jax.tasks.captioning import Captioning
from limber_jax.training.setup import Setup
from limber_jax.weights.digest import digest


class Written(NamedTuple):
  """What was written about an image."""

  path: str
  text: str
  error: str = ""  # why the image cannot be read; there is no text then


class Captioner:
  """Images and texts in, text out. Batches of `setup.config.batch_size` are spread over all devices of its mesh."""

  def __init__(self, setup: Setup, params: dict, stats: dict, name: str = "", *, blind: bool = False):
    """Takes what `open_run` or `open_projection` return.

    Args:
      setup: of the experiment.
      params: of what was trained.
      stats: of what was trained.
      name: of the map.
      blind: leave the images out of what the language model reads.
    """
    task = cast(Captioning, setup.task)
    model, encoder = task.model, task.model.encoder_of(name)
    self.decoding = setup.config.decoding
    self.batch_size = setup.config.batch_size
    self._model, self._mesh, self._tokenizer, self._blind = model, setup.mesh, setup.tokenizer, blind
    self._prefix_length = 0 if blind else model.prefix_length(name)
    self._trained, self._setup, self._name = (params, stats), setup, name
    self._params = {**setup.frozen.params, **params}
    self._stats = {**setup.frozen.stats, **stats}
    self._preprocess = transforms.with_options(
      transforms.Compose((transforms.Decode(), task.rule(encoder))), ImageOptions.from_config(setup.config.data))
    self._image_prefixes = jax.jit(lambda params, stats, images: model.image_prefix(
      params, model.encode(params, stats, images, encoder)[0], name), out_shardings=parallel.batch_sharding(self._mesh))
    whole = parallel.replicated(self._mesh)
    self._read = jax.jit(functools.partial(interleaved.prefill, model), out_shardings=whole)
    self._continue = jax.jit(self._generate, out_shardings=whole)

  def read(self, path: str) -> np.ndarray:
    """Returns the image in a file as the encoder takes it, uint8 [H, W, 3]; raises UserError or OSError."""
    return self._preprocess({"image": folder.read_image(path)}, None)["image"]

  def key(self) -> dict[str, Any]:
    """Returns all that a text depends on but the request and the shots, plain JSON."""
    params, stats = self._trained
    config = self._setup.config
    trained = {part: digest({"params": tree, "stats": stats.get(part, {})}) for part, tree in params.items()}
    return {"weights": self._setup.digests | trained, "model": config_json.flatten(config.model, known=True),
            "decoding": dataclasses.asdict(self.decoding), "map": self._name, "blind": self._blind,
            "images": ImageOptions.from_config(config.data).changes(), "tokenizer": self._tokenizer.fingerprint(),
            "dtype": config.compute.dtype, "batch_size": self.batch_size, "version": limber_jax.__version__}

  def write(self, requests: Sequence[tuple[str, Segments]], shots: Sequence[np.ndarray] = (), *,
            start: int = 0) -> Iterator[Written]:
    """Yields what the language model writes after each of the requests, in their order.

    All batches are of one shape: texts are padded on the right to the longest, the last batch with empty rows. What is
    written about an image does not depend on the others, but where it is sampled, on its number among them. What all
    requests begin with goes through the language model once.

    Args:
      requests: the path of an image, and what is read before the text is written: texts, and images by their numbers.
        Those of the shots come first, then that of the request's own image, len(shots).
      shots: S images uint8 [H, W, 3] that all requests share.
      start: how many of the requests are left out because they are done, whole batches.

    Raises:
      UserError: more text and images than the language model's context holds.
    """
    layouts = {segments: Layout.of(segments, self._tokenizer, self._prefix_length)
               for segments in dict.fromkeys(s for _, s in requests)}
    length, context = max(len(layout.ids) for layout in layouts.values()), self._model.size.lm.context
    if length + self.decoding.max_new_tokens > context:
      raise UserError(f"{length} positions of images and text, and max_new_tokens={self.decoding.max_new_tokens}, are "
                      f"more than the language model's context of {context}")
    with jax.set_mesh(self._mesh):
      image_prefixes = self._shots(shots)
      shared = interleaved.common(list(layouts.values()), len(image_prefixes))
      prefix = self._prefix(next(iter(layouts.values())), shared, image_prefixes) if shared else None
    batches = [requests[i : i + self.batch_size] for i in range(start, len(requests), self.batch_size)]
    with ThreadPoolExecutor() as pool:

      def start_reading(batch):
        return [pool.submit(attempt, self.read, path) for path, _ in batch]

      reading = start_reading(batches[0]) if batches else []
      for number, batch in enumerate(batches):
        images = [image.result() for image in reading]
        reading = start_reading(batches[number + 1]) if number + 1 < len(batches) else []
        first = start + number * self.batch_size
        rows = [(image, Layout(*(part[shared:] for part in layouts[segments])), first + i)
                for i, (image, (_, segments)) in enumerate(zip(images, batch, strict=True))
                if not isinstance(image, str)]
        texts = iter(self._write_batch(rows, image_prefixes, prefix, length - shared) if rows else ())
        for image, (path, _) in zip(images, batch, strict=True):
          yield Written(path, "", image) if isinstance(image, str) else Written(path, next(texts))

  def _prefix(self, layout: Layout, start: int, image_prefixes: jax.Array) -> Cache:
    """Returns the cache of the first `start` positions of a layout, on every device."""
    begin = Layout(*(part[:start] for part in layout))
    return self._read(self._params, interleaved.stack([begin], 1, start, self._tokenizer.eot), image_prefixes)

  def _shots(self, images: Sequence[np.ndarray]) -> jax.Array:
    """Returns the image_prefixes [S · P, D] of images, on every device."""
    width = self._model.size.lm.width
    if not images or self._blind:
      return jnp.zeros((0, width), self._model.lm.compute.dtype)
    batches = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
    image_prefixes = np.concatenate([jax.device_get(self._encode(batch)) for batch in batches])[: len(images)]
    return jax.device_put(image_prefixes.reshape(-1, width), parallel.replicated(self._mesh))

  def _encode(self, images: Sequence[np.ndarray]) -> jax.Array:
    """Returns the image_prefixes [B, P, D] of up to B images; the other rows mean nothing."""
    whole = np.zeros((self.batch_size, *images[0].shape), np.uint8)
    whole[: len(images)] = images
    return self._image_prefixes(self._params, self._stats, parallel.global_batch(whole, self._mesh))

  def _write_batch(self, rows, image_prefixes, prefix, length) -> list[str]:
    """Returns the text for each row (image, layout, number)."""
    images, layouts, numbers = zip(*rows, strict=True)
    batch = interleaved.stack(layouts, self.batch_size, length, self._tokenizer.eot)
    batch["number"] = np.zeros(self.batch_size, np.int32)
    batch["number"][: len(rows)] = numbers
    with jax.set_mesh(self._mesh):
      own = None if self._blind else self._encode(images)
      batch = parallel.global_batch(batch, self._mesh)
      out = jax.device_get(self._continue(self._params, image_prefixes, own, batch, prefix))
    return [self._tokenizer.decode(out.tokens[i, : out.lengths[i]].tolist()) for i in range(len(rows))]

  def _generate(self, params, image_prefixes, own, batch, prefix):
    if self.decoding.method == "sample":
      batch = batch | {"key": row_keys(jax.random.key(self.decoding.seed), batch["number"])}
    return interleaved.decode(self._model, params, batch, image_prefixes, own, eos=self._tokenizer.eot,
                              settings=self.decoding, prefix=prefix)


def captions(model: Captioner, paths: Sequence[str], start: int = 0) -> Iterator[Written]:
  """Yields the caption of each image from number `start` on: what follows it and the prompt of the model's decoding."""
  for written in model.write([(path, (0, model.decoding.prompt)) for path in paths], start=start):
    yield written._replace(text=written.text.strip())
