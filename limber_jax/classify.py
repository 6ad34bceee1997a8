"""Names images: `python -m limber_jax.classify --weights=DIR --labels="a dog,a cat" photo.jpg folder/`.

Prints a table, or with --json one object a line; --out=FILE writes these lines to a file, which appears once it is
whole: stopped or killed, the same command goes on. Labels are used as they are written; --templates puts them into
sentences. Images that cannot be read are named on stderr and counted; the exit code is then 1.
"""

import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from absl import flags

import limber_jax
from limber_jax import cli, config, inputs, parallel
from limber_jax.config import Compute
from limber_jax.data import tokenizers, transforms
from limber_jax.data.images import PLAIN, ImageFlags, ImageOptions
from limber_jax.data.sources import folder
from limber_jax.errors import UserError
from limber_jax.evals.zeroshot import classifier, lines, load_templates
from limber_jax.models import clip
from limber_jax.models.text import check_end
from limber_jax.output import Output
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.weights import load
from limber_jax.weights.configs import naming
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
    self._preprocess = transforms.Chain((transforms.Decode(), transforms.own_rule(size, size.image.image_size)))
    self._preprocess = transforms.with_options(self._preprocess, images)
    text = classifier(functools.partial(embed, "embed_text"), functools.partial(words, truncate=False), labels,
                      templates, size.text.context)
    self._depends = {"labels": list(labels), "templates": list(templates), "tokenizer": words.fingerprint(),
                     "model": config.flatten(size, known=True), "images": images.changes(),
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


def attempt(read: Callable[[str], np.ndarray], path: str) -> np.ndarray | str:
  """Returns the image that `read` finds at a path, or the reason why it finds none."""
  try:
    return read(path)
  except UserError as error:
    return str(error).removeprefix(f"{path}: ")
  except OSError as error:
    return error.strerror or str(error)


def find(inputs: Sequence[str], images: ImageOptions = PLAIN) -> list[str]:
  """Returns the files among `inputs` and the images in the folders among them, as `folder.images_below` has them.

  Folders that cannot be read are named on stderr.

  Raises:
    UserError: a folder without images, or nothing at all.
  """
  found, suffixes = [], tuple(dict.fromkeys((*folder.SUFFIXES, *images.suffixes)))
  for path in inputs:
    if not os.path.isdir(path):
      found.append(path)
      continue
    inside, refused = folder.images_below(path, suffixes)
    for name, reason in refused.items():
      print(cli.printable(f"{name}: {reason}"), file=sys.stderr, flush=True)
    if not inside:
      raise UserError(f"{path}: no images in this folder; looked for {', '.join(suffixes)}")
    found += inside
  if not found:
    raise UserError("no images given; name files or folders after the flags")
  return found


def own_images(weights: str) -> ImageOptions:
  """Returns how the run of a workdir reads image files; of other weights the defaults."""
  path = os.path.join(weights, "config.json")
  if not os.path.isdir(os.path.join(weights, "checkpoints")) or not os.path.isfile(path):
    return ImageOptions()
  with naming(path):
    text = inputs.text(path, inputs.CONFIG)
  return ImageOptions.of(config.from_json(text, path).data)


def read_labels(given: Sequence[str], path: str) -> list[str]:
  """Returns the labels given and those of a file with one a line; raises UserError for fewer than two, or doubles."""
  labels = [label for label in given if label] + (lines(path, "--labels_file") if path else [])
  if len(labels) < 2:
    raise UserError(f'wanted two labels or more, got {len(labels)}; for example --labels="a dog,a cat", or '
                    "--labels_file=FILE with one a line")
  if double := next((label for i, label in enumerate(labels) if label in labels[:i]), None):
    raise UserError(f"the label {double!r} is given twice")
  return labels


def _row(path: str, labels: Sequence[str], found: np.ndarray | str) -> dict[str, Any]:
  """Returns what is written about an image, of its probabilities or of why it cannot be read."""
  if isinstance(found, str):
    return {"image": path, "error": found}
  best = int(np.argmax(found))
  return {"image": path, "label": labels[best], "probability": float(found[best]),
          "probabilities": dict(zip(labels, found.tolist(), strict=True))}


def _shown(row: dict[str, Any]) -> dict[str, str]:
  """Returns the columns of a row: the likeliest label, and the next two."""
  (label, p), *others = sorted(row["probabilities"].items(), key=lambda pair: -pair[1])
  return {"image": row["image"], "label": label, "p": f"{p:.1%}",
          "next": ", ".join(f"{other} {q:.1%}" for other, q in others[:2])}


if __name__ == "__main__":
  _weights = flags.DEFINE_string("weights", None, "A workdir of limber_jax.train, or weights of Hugging Face, "
                                 "open_clip or OpenAI.")
  _model = cli.define_model()
  _labels = flags.DEFINE_list("labels", [], "Labels, with commas between them.")
  _labels_file = flags.DEFINE_string("labels_file", "", "File with one label a line.")
  _templates = flags.DEFINE_string("templates", "{}", "A sentence with {} for the label, a file with one a line, "
                                   "imagenet80 or imagenet7.")
  _tokenizer = flags.DEFINE_string("tokenizer", "", "clip, bytes or bpe; empty: the weights' own.")
  _tokenizer_path = flags.DEFINE_string("tokenizer_path", "", "Directory or hub id of the tokenizer.")
  _images = ImageFlags()
  _json = flags.DEFINE_bool("json", False, "Print one JSON object a line, with the probabilities of all labels.")
  _out = flags.DEFINE_string("out", "", "Write these lines to this file, which is there once it is whole; what is "
                             "stopped goes on.")

  def _main(inputs: list[str]) -> int:
    if not _weights.value:
      raise UserError("--weights is missing; for example --weights=runs/quickstart")
    images = _images.options(own_images(_weights.value))
    labels, paths = read_labels(_labels.value, _labels_file.value), find(inputs, images)
    tokenizer = load.own_tokenizer(_weights.value)
    if _tokenizer.value or _tokenizer_path.value:
      tokenizer = config.Tokenizer(_tokenizer.value or tokenizer.name, _tokenizer_path.value)
    wide = max(map(len, [*map(cli.printable, paths), "image"]))
    widths = {"image": wide, "label": max(map(len, [*labels, "label"])), "p": -6, "next": 0}
    with Output(as_json=_json.value, path=_out.value) as output:
      model = Classifier(_weights.value, labels, load_templates(_templates.value), tokenizer, model=_model.value,
                         images=images)
      done = output.resume(lambda: {"command": "classify", **model.key()}, [{"image": p} for p in paths],
                           model.batch_size)
      rows = (_row(path, labels, result) for path, result in model.classify(paths[done:]))
      return output.write(rows, widths, len(paths), shown=_shown)

  cli.run(_main, prints=lambda: not _out.value)
