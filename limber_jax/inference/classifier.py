"""A CLIP and its labels, opened to be used: what the command `classify` and other programs call."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

import limber_jax
from limber_jax import config, config_json
from limber_jax.config import Compute
from limber_jax.data import tokenizers, transforms
from limber_jax.data.images import PLAIN, ImageOptions
from limber_jax.data.sources import folder
from limber_jax.errors import UserError
from limber_jax.evals.prompts import lines
from limber_jax.evals.zeroshot import classifier
from limber_jax.inference.images import attempt
from limber_jax.models import clip
from limber_jax.models.text import check_end
from limber_jax.runtime import parallel
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.weights import load
from limber_jax.weights.digest import digest


class Classifier:
  """A model and its labels: images in, probabilities out. Batches are spread over all devices."""

  def __init__(self, weights: str, labels: Sequence[str], templates: Sequence[str], tokenizer: config.Tokenizer,
               batch_size: int = 32, model: str = "", images: ImageOptions = PLAIN):
    """Reads the model and embeds the labels.

    Args:
      weights: anything that `weights.load.load` reads.
      labels: L names, no two the same.
      templates: sentences with {} for the label; several are ensembled.
      tokenizer: of the model.
      batch_size: images that go through the model together; rounded up to a multiple of the devices.
      model: what the weights are of, where nothing beside them says it; as of `weights.load.load`.
      images: which image files are read, and which way up.

    Raises:
      UserError: no such model or tokenizer, a tokenizer with more ids than the model knows, or a label too long for it.
    """
    loaded = load.load(weights, model)
    size = loaded.size
    words = tokenizers.load(tokenizer)
    if words.vocab_size > size.text.vocab:
      raise UserError(f"tokenizer {tokenizer.name!r} has {words.vocab_size} ids, the model at {weights} only "
                      f"{size.text.vocab}; name the model's own by --tokenizer and --tokenizer_path")
    check_end(size.text, words.eot, f"tokenizer {tokenizer.name!r}")
    self._mesh = parallel.make_mesh({"data": -1})
    self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
    replicated = parallel.replicated(self._mesh)
    params, stats = jax.device_put((loaded.params, loaded.stats), replicated)
    task = Contrastive(clip.build(size, Compute(dtype="float32")), "softmax", 0, 1, ())
    jitted = {name: jax.jit(f, out_shardings=replicated) for name, f in task.predict().items()}

    def embed(name: str, rows: np.ndarray) -> np.ndarray:
      """Returns float32 [n, E] of rows [n, ...]."""
      whole = np.zeros((-(-len(rows) // self.batch_size) * self.batch_size, *rows.shape[1:]), rows.dtype)
      whole[: len(rows)] = rows
      with jax.set_mesh(self._mesh):
        out = [jitted[name](params, stats, parallel.global_batch(batch, self._mesh))
               for batch in np.split(whole, len(whole) // self.batch_size)]
      return np.concatenate(jax.device_get(out))[: len(rows)]

    self._embed_image = functools.partial(embed, "embed_image")
    self._preprocess = transforms.with_options(
      transforms.Compose((transforms.Decode(), transforms.encoder_rule(size, size.image.image_size))), images)
    text = classifier(functools.partial(embed, "embed_text"), functools.partial(words, truncate=False), labels,
                      templates, size.text.context)
    self._depends = {"labels": list(labels), "templates": list(templates), "tokenizer": words.fingerprint(),
                     "model": config_json.flatten(size, known=True), "images": images.changes(),
                     "batch_size": self.batch_size, "version": limber_jax.__version__}
    self._loaded = params, stats
    self._weights = text * np.exp(loaded.params["logit_scale"])  # [L, E]

  def key(self) -> dict[str, Any]:
    """Returns all that the probabilities of an image depend on but the image, plain JSON."""
    return {"weights": digest(self._loaded), **self._depends}

  def read(self, path: str) -> np.ndarray:
    """Returns the image in a file as the model takes it, uint8 [H, W, 3]; raises UserError or OSError."""
    return self._preprocess({"image": folder.read_image(path)}, None)["image"]

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Returns probabilities [n, L] of the labels for images uint8 [n, H, W, 3]: softmax at the model's temperature."""
    logits = self._embed_image(images) @ self._weights.T
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return odds / odds.sum(axis=1, keepdims=True)

  def classify(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields each path with its probabilities [L], or with the reason why it cannot be read."""
    paths = iter(paths)
    with ThreadPoolExecutor() as pool:
      while batch := list(itertools.islice(paths, self.batch_size)):
        read = list(pool.map(functools.partial(attempt, self.read), batch))
        images = [image for image in read if not isinstance(image, str)]
        found = iter(self(np.stack(images)) if images else ())
        yield from ((path, image if isinstance(image, str) else next(found))
                    for path, image in zip(batch, read, strict=True))


def read_labels(given: Sequence[str], path: str) -> list[str]:
  """Returns the labels given and those of a file with one a line; raises UserError for fewer than two, or doubles."""
  labels = [label for label in given if label] + (lines(path, "--labels_file") if path else [])
  if len(labels) < 2:
    raise UserError(f'wanted two labels or more, got {len(labels)}; for example --labels="a dog,a cat", or '
                    "--labels_file=FILE with one a line")
  if double := next((label for i, label in enumerate(labels) if label in labels[:i]), None):
    raise UserError(f"the label {double!r} is given twice")
  return labels


def row(path: str, labels: Sequence[str], found: np.ndarray | str) -> dict[str, Any]:
  """Returns what is written about an image, of its probabilities or of why it cannot be read."""
  if isinstance(found, str):
    return {"image": path, "error": found}
  best = int(np.argmax(found))
  return {"image": path, "label": labels[best], "probability": float(found[best]),
          "probabilities": dict(zip(labels, found.tolist(), strict=True))}


def shown(row: dict[str, Any]) -> dict[str, str]:
  """Returns the columns of a row: the likeliest label, and the next two."""
  (label, p), *others = sorted(row["probabilities"].items(), key=lambda pair: -pair[1])
  return {"image": row["image"], "label": label, "p": f"{p:.1%}",
          "next": ", ".join(f"{other} {q:.1%}" for other, q in others[:2])}
