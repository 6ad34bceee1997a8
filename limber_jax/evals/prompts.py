"""Classes and the sentences that stand for them: what evaluations of images by class have in common."""

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from limber_jax.config import Evaluation
from limber_jax.data.sources import Source
from limber_jax.data.text import decode
from limber_jax.errors import UserError, did_you_mean
from limber_jax.runtime import inputs

USUAL_TEMPLATES = "imagenet7"


@dataclass
class OfClasses(Evaluation):
  """Settings of an evaluation of images by class."""

  files = ("classes",)

  # a built-in list (imagenet, food101, …) | a file, one class a line; "" = the source's own
  classes: str = ""


@dataclass
class OfPrompts(OfClasses):
  """Settings of an evaluation that has the classes in sentences."""

  files = ("classes", "templates")

  # a built-in list (imagenet80, imagenet7, single, food101, …) | a file, one a line, {} for the class | one itself
  # "" = the source's own, and where it has none imagenet7
  templates: str = ""


@dataclass(frozen=True)
class Class:
  """A class of images."""

  names: tuple[str, ...]  # what it is called in sentences; several stand for it together
  key: str = ""           # what the data set itself calls it, where that is another word


def class_names(config: OfClasses, source: Source) -> list[str]:
  """Returns the names of the classes by label, of several names the first; raises UserError as `chosen_classes`."""
  return [c.names[0] for c in chosen_classes(config, source)]


def chosen_classes(config: OfClasses, source: Source) -> list[Class]:
  """Returns the classes in the order of the source's labels: config.classes, else those of the source.

  Raises:
    UserError: there are none, or not those that the source has.
  """
  own, where = list(source.classes or ()), f"data source {config.source.name!r}"
  if not config.classes:
    if not own:
      raise UserError(f"{where} names no classes; set the evaluation's `classes` to a file with one name a line, in "
                      "the order of the labels")
    return [Class((name,)) for name in own]
  classes = load_classes(config.classes)
  if not own:
    return classes
  if len(own) != len(classes):
    there = {plain(name) for name in own}
    missing = next((c.key or c.names[0] for c in classes if not there & {plain(c.key), *map(plain, c.names)}), "")
    raise UserError(f"classes={config.classes!r} has {len(classes)} names, {where} {len(own)} classes"
                    + (f"; {missing!r} is not among them" if missing and len(own) < len(classes) else ""))
  known = {plain(word) for c in classes for word in (c.key, *c.names)}
  if config.classes not in built_in("classes") and not known & {plain(name) for name in own}:
    return classes  # other words for all of them
  return [classes[i] for i in places(classes, own, f"classes={config.classes!r}: {where}")]


def places(classes: Sequence[Class], own: Sequence[str], where: str) -> list[int]:
  """Returns the number among `classes` of each of a source's own names; its classes may be a part of them.

  Letter case and punctuation do not count: golden_retriever is "golden retriever". Numbers that are no names are the
  numbers of the classes.

  Raises:
    UserError: a name is none of them, or two are the same; `where` begins the message.
  """
  keys = {plain(c.key or c.names[0]): i for i, c in enumerate(classes)}
  words = [plain(name) for c in classes for name in c.names]
  numbers = {plain(name): i for i, c in enumerate(classes) for name in c.names if words.count(plain(name)) == 1} | keys
  if not all(plain(name) in numbers for name in own) and all(
      name.isascii() and name.isdecimal() and int(name) < len(classes) for name in own):
    found = [int(name) for name in own]
  else:
    for name in own:
      if plain(name) not in numbers:
        nearest = difflib.get_close_matches(plain(name), numbers, n=1, cutoff=0)[0]
        names = classes[numbers[nearest]]
        raise UserError(f"{where} has a class {name!r}, which is no name there; the nearest is "
                        f"{names.key or names.names[0]!r}")
    found = [numbers[plain(name)] for name in own]
  for i, number in enumerate(found):
    if (first := found.index(number)) != i:
      raise UserError(f"{where} has classes {own[first]!r} and {own[i]!r}, which are the same")
  return found


def plain(name: str) -> str:
  """Returns a name in small letters and digits only; of /a/abbey, as SUN397 has it, without the letter before."""
  return re.sub(r"[\W_]", "", re.sub(r"^/\w/", "", name).casefold())


def load_classes(name: str) -> list[Class]:
  """Returns the classes of a list that is built in, or of a file: one a line, name|other name, tab, the source's word.

  Raises:
    UserError: the file cannot be read, is empty, or has a line that is none.
  """
  found = lines(name, "classes") if name not in built_in("classes") else _read(f"classes/{name}")
  out = []
  for number, line in enumerate(found):
    words, _, key = line.partition("\t")
    names = tuple(word.strip() for word in words.split("|"))
    if not all(names) or "\t" in key:
      raise UserError(f"classes: {name}, line {number + 1}: wanted a name, or several with | between, and after a tab "
                      f"the word of the data for it; got {line!r}")
    out.append(Class(names, key.strip()))
  return out


def check_labels(labels: np.ndarray, index: np.ndarray, classes: int, where: str) -> None:
  """Raises UserError if a label is none of `classes` numbers from 0; `index` are the numbers of the records."""
  if len(wrong := np.flatnonzero((labels < 0) | (labels >= classes))):
    raise UserError(f"{where}: record {index[wrong[0]]} has label {labels[wrong[0]]}, wanted 0 to {classes - 1}")


def chosen_templates(templates: str, source: Source) -> list[str]:
  """Returns `templates`, else those of the source, else USUAL_TEMPLATES; raises UserError as `load_templates`."""
  own = getattr(source, "templates", None)
  return list(own) if own and not templates else load_templates(templates or USUAL_TEMPLATES)


def load_templates(name: str) -> list[str]:
  """Returns sentences with {} for the class.

  Args:
    name: a built-in list (imagenet80: the paper's, imagenet7: the seven of them that do slightly better, single: "A
      photo of a {}.", or that of a data set of the paper, such as food101) | a file with one template a line | one
      template itself, with its {}.

  Raises:
    UserError: there is no such file, or a line of it has no {}.
  """
  known = built_in("templates")
  if name in known:
    return _read(f"templates/{name}")
  if "{}" in name:
    return [name]
  if what := inputs.what_is(name):
    what = what.replace("no such file", "no such file, and no template with {}")
    raise UserError(f"templates: {name!r}: {what}{did_you_mean(name, known)}")
  templates = lines(name, "templates")
  if bad := next((t for t in templates if "{}" not in t), None):
    raise UserError(f"templates: {name} has the line {bad!r}, without {{}} for the class")
  return templates


def lines(path: str, what: str) -> list[str]:
  """Returns the lines of a UTF-8 file that are not empty; raises UserError, with `what` they are, if there are none."""
  try:
    text = decode(inputs.read(path, inputs.LIST), f"{what}: {path}")
  except OSError as error:
    raise UserError(f"{what}: cannot read {path!r} ({error.strerror or error})") from error
  found = [line.strip() for line in re.split("\r\n|\r|\n", text) if line.strip()]
  if not found:
    raise UserError(f"{what}: {path!r} is empty; wanted one a line")
  return found


@functools.cache
def built_in(what: str) -> frozenset[str]:
  """Returns the names of the built-in lists of "classes" or "templates"."""
  return frozenset(f.name.removesuffix(".txt") for f in resources.files("limber_jax.evals").joinpath(what).iterdir())


def _read(name: str) -> list[str]:
  return resources.files("limber_jax.evals").joinpath(f"{name}.txt").read_text(encoding="utf-8").splitlines()


def prompts(tokenizer: Callable[..., np.ndarray], classes: Sequence[str], templates: Sequence[str], length: int
            ) -> np.ndarray:
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


def by_class(weights: np.ndarray, classes: Sequence[Class]) -> np.ndarray:
  """Returns unit float32 [C, E]: of a class with several names, the mean of their weights at unit length.

  Args:
    weights: unit float32 [names, E], of the names of all classes, in their order.
    classes: C of them.
  """
  if len(weights) == len(classes):
    return weights
  ends = np.cumsum([len(c.names) for c in classes])
  mean = np.stack([part.mean(axis=0) for part in np.split(weights, ends[:-1])])
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)
