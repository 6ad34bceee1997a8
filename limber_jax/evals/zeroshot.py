"""Zero-shot classification: class names in sentences are the weights of a classifier. Source: arXiv 2103.00020, 3.1."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from limber_jax.config import Evaluation
from limber_jax.data.sources import Source
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals.base import Context, Runner, ranks

TEMPLATES = ("imagenet80", "imagenet7")  # CLIP's published sentences, and the seven of them that do slightly better


class ZeroShot:
  """Accuracy of naming the class of an image: "top1", "top5" (of more than 5 classes), "mean_per_class", "count".

  A class is described by all templates, ensembled in embedding space. Equal scores go to the class that stands first.
  `mean_per_class` is the share of images named right, averaged over the classes that have images; `count` the number of
  images.
  """

  needs = ("embed_image", "embed_text")

  def __init__(self, config: Evaluation, context: Context):
    self._runner = Runner(config, context)
    self._where = f"evaluation 'zeroshot' on data source {config.source.name!r}"
    if "label" not in self._runner.source.annotation(0):
      raise UserError(f"{self._where}: its records have no labels; set source.label_key, or choose another evaluation")
    self._classes = class_names(config, self._runner.source)
    self._tokens = prompts(context.tokenizer, self._classes, load_templates(config.templates), context.length)

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    weights = ensemble(partial(self._runner.embed_rows, "text", predict["embed_text"], params, stats), self._tokens)
    numbers = np.arange(len(weights))
    right, there, top5 = np.zeros(len(weights)), np.zeros(len(weights)), 0
    for batch in self._runner.embed_source(predict["embed_image"], params, stats):
      labels = batch["label"]
      check_labels(labels, batch["index"], len(weights), self._where)
      place = ranks(batch["embedding"], labels, weights, numbers)  # of the right class
      right += np.bincount(labels[place == 0], minlength=len(weights))
      there += np.bincount(labels, minlength=len(weights))
      top5 += np.sum(place < 5)
    return {
      "top1": float(right.sum() / there.sum()),
      **({"top5": float(top5 / there.sum())} if len(weights) > 5 else {}),
      "mean_per_class": float(np.mean(right[there > 0] / there[there > 0])),
      "count": float(there.sum()),
    }


def classifier(embed_text: Callable[[np.ndarray], Any], tokenizer: Tokenizer, classes: Sequence[str],
               templates: Sequence[str], length: int) -> np.ndarray:
  """Returns the weights of a zero-shot classifier, unit float32 [C, E]: the scores of images are images @ weights.T.

  Args:
    embed_text: tokens int32 [n, T] -> unit embeddings [n, E]; it is given all C × templates at once.
    tokenizer: from `data.tokenizers.load`.
    classes: C names.
    templates: sentences with {} for the class.
    length: T, tokens of a sentence.
  """
  return ensemble(embed_text, prompts(tokenizer, classes, templates, length))


def prompts(tokenizer: Tokenizer, classes: Sequence[str], templates: Sequence[str], length: int) -> np.ndarray:
  """Returns the tokens int32 [C, templates, T] of every class in every template."""
  texts = [template.replace("{}", name) for name in classes for template in templates]
  return tokenizer(texts, length).reshape(len(classes), len(templates), length)


def ensemble(embed_text: Callable[[np.ndarray], Any], tokens: np.ndarray) -> np.ndarray:
  """Returns unit float32 [C, E]: a class's mean over templates of unit embeddings, brought to unit length again.

  Args:
    embed_text: tokens int32 [n, T] -> unit embeddings [n, E].
    tokens: int32 [C, templates, T].
  """
  embedded = np.asarray(embed_text(tokens.reshape(-1, tokens.shape[-1])), np.float32)
  mean = embedded.reshape(*tokens.shape[:2], -1).mean(axis=1)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def class_names(config: Evaluation, source: Source) -> list[str]:
  """Returns the names of the classes by label: config.classes ("imagenet" or a file), else those of the source.

  Raises:
    UserError: there are none, or not as many as the source has.
  """
  own = list(source.classes or ())
  if not config.classes:
    if not own:
      raise UserError(f"data source {config.source.name!r} names no classes; set the evaluation's `classes` to a file "
                      "with one name a line, in the order of the labels")
    return own
  names = _built_in("classes/imagenet") if config.classes == "imagenet" else lines(config.classes, "classes")
  if own and len(own) != len(names):
    raise UserError(f"classes={config.classes!r} has {len(names)} names, data source {config.source.name!r} "
                    f"{len(own)} classes")
  return names


def check_labels(labels: np.ndarray, index: np.ndarray, classes: int, where: str) -> None:
  """Raises UserError if a label is none of `classes` numbers from 0; `index` are the numbers of the records."""
  if len(wrong := np.flatnonzero((labels < 0) | (labels >= classes))):
    raise UserError(f"{where}: record {index[wrong[0]]} has label {labels[wrong[0]]}, wanted 0 to {classes - 1}")


def load_templates(name: str) -> list[str]:
  """Returns sentences with {} for the class.

  Args:
    name: imagenet80 | imagenet7 | a file with one template a line | one template itself, with its {}.

  Raises:
    UserError: there is no such file, or a line of it has no {}.
  """
  if name in TEMPLATES:
    return _built_in(f"templates/{name}")
  if "{}" in name:
    return [name]
  if not os.path.isfile(name):
    raise UserError(f"templates: no file {name!r}, and no template with {{}}{did_you_mean(name, TEMPLATES)}")
  templates = lines(name, "templates")
  if bad := next((t for t in templates if "{}" not in t), None):
    raise UserError(f"templates: {name} has the line {bad!r}, without {{}} for the class")
  return templates


def lines(path: str, what: str) -> list[str]:
  """Returns the lines of a UTF-8 file that are not empty; raises UserError, with `what` they are, if there are none."""
  try:
    with open(path, encoding="utf-8-sig") as file:
      found = [line.strip() for line in file if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"{what}: cannot read {path!r} ({getattr(error, 'strerror', None) or error})") from error
  if not found:
    raise UserError(f"{what}: {path!r} is empty; wanted one a line")
  return found


def _built_in(name: str) -> list[str]:
  return resources.files("limber_jax.evals").joinpath(f"{name}.txt").read_text(encoding="utf-8").splitlines()
