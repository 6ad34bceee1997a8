"""Does a caption name what is in the picture? For images with a class each, as in section 5.2 of arXiv 2209.15162."""

import dataclasses
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.generation import CaptionGenerator, map_of
from limber_jax.evals.prompts import OfClasses, check_labels, class_names
from limber_jax.evals.result_store import Results
from limber_jax.map_names import join
from limber_jax.metrics.words import WORDNET_FROM, WordNet, singular
from limber_jax.runtime.atomic import save_figure

SHEET = (5, 8)  # rows and columns of the picture

Names = dict[tuple[str, ...], int]  # the words of a name -> the number of its class


@dataclasses.dataclass
class ClassMention(OfClasses):
  """Writes a caption for every image and saves captions_NAME.png, a sheet of the first 40, in the workdir.

  Returns "right", the share of captions that name the class of their image and no other class; "named", of those that
  name it, whatever else they name; "right@name" of extra projectors; "blind", what is right without any image; and
  "count", the number of images. A class is named where its words stand in the caption, in any case, in the singular or
  plural.

  Where classes have attributes (source "awa2"), of the captions that name other classes only, their share being
  "wrong": "overlap_wrong", the share of the attributes of the class named that the image's class has too, and
  "wup_wrong", the Wu-Palmer similarity of the two, where WordNet is at hand; means over the classes that a caption
  names, then over captions. "overlap_chance" and "wup_chance" are what they would be if any other class were named.
  (How LiMBeR counts common attributes is not published beyond the word overlap.)
  """

  name = "class_mention"
  needs = ("generate",)

  def open(self, context: Context) -> Eval:
    return ClassMentionEval(self, context)


class ClassMentionEval:
  """A `ClassMention` whose data are open."""

  def __init__(self, config: ClassMention, context: Context):
    self._runner = Runner(config, context)
    self._write = CaptionGenerator(self._runner)
    self._where = f"evaluation 'class_mention' on data source {config.source.name!r}"
    source = self._runner.source
    if "label" not in source.annotation(0):
      raise UserError(f"{self._where}: its records have no labels; set source.label_key, or choose another evaluation")
    self._classes = class_names(config, source)
    own = not config.classes and hasattr(source, "names")  # further names of each class
    self._names = names_of(source.names if own else [(name,) for name in self._classes])
    self._alike: dict[str, np.ndarray] = {}  # [C, C] by metric: of the class named (column), what it is to a class
    self._metadata = {}
    if hasattr(source, "has"):
      self._alike["overlap"] = overlap(source.has)
      wordnet = WordNet.find()
      self._metadata = {"wordnet": "found" if wordnet else f"none, so no wup_wrong; wanted {WORDNET_FROM}"}
      if wordnet:
        self._alike["wup"] = wu_palmer(self._classes, wordnet)

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    out = {}
    for name, function in predict.items():
      if name.startswith("generate"):
        found = self._write(name, function, params, stats)
        labels = np.array([r["label"] for r in found.records])
        check_labels(labels, found.index, len(self._classes), self._where)
        said = [named(r["caption"], self._names) for r in found.records]
        right = [s == {label} for s, label in zip(said, labels, strict=True)]
        if name == "generate_blind":
          out["blind"] = float(np.mean(right))
          continue
        map_ = map_of(name)
        out |= {join(key, map_): value for key, value in self._metrics(said, labels, right).items()}
        if not map_ and jax.process_index() == 0:
          self._draw(found, right)
    return {**out, "count": float(len(labels))}

  def metadata(self) -> dict[str, Any]:
    return {**self._runner.metadata(), "classes": len(self._classes), **self._metadata}

  def _metrics(self, said: list[set[int]], labels: np.ndarray, right: list[bool]) -> dict[str, float]:
    hits = [label in s for s, label in zip(said, labels, strict=True)]
    out = {"right": float(np.mean(right)), "named": float(np.mean(hits))}
    if not self._alike:
      return out
    wrong = [(label, sorted(s)) for s, label, hit in zip(said, labels, hits, strict=True) if s and not hit]
    out["wrong"] = len(wrong) / len(labels)
    for name, table in self._alike.items() if wrong else ():
      others = (table.sum(axis=1) - table.diagonal()) / (len(table) - 1)
      out |= {f"{name}_wrong": float(np.mean([table[label, s].mean() for label, s in wrong])),
              f"{name}_chance": float(np.mean([others[label] for label, _ in wrong]))}
    return out

  def _draw(self, found: Results, right: Sequence[bool]) -> None:
    source, workdir = self._runner.source, self._runner.context.workdir
    name = self._runner.context.name or "class_mention"
    shown = found.records[: SHEET[0] * SHEET[1]]
    images = [self._runner.transform(source[r["index"]], None)["image"] for r in shown]
    os.makedirs(workdir, exist_ok=True)
    title = f"{sum(right)} of {len(right)} captions name what is in the image"
    draw(images, [r["caption"] for r in shown], right, title, os.path.join(workdir, f"captions_{name}.png"))


def names_of(classes: Sequence[Sequence[str]]) -> Names:
  """Returns the number of the class behind each name; a name that two classes have stands for the first."""
  out: Names = {}
  for number, names in enumerate(classes):
    for name in names:
      out.setdefault(_words(name), number)
  return out


def named(caption: str, names: Names) -> set[int]:
  """Returns the numbers of the classes whose names stand in a caption as whole words, in any case and number."""
  lengths, words = {len(n) for n in names}, _words(caption)
  return {names[run] for read in (words, tuple(map(singular, words))) for start in range(len(read)) for n in lengths
          if (run := read[start : start + n]) in names}


def _words(text: str) -> tuple[str, ...]:
  """Returns words and single signs in lower case: "C++" has three."""
  return tuple(re.findall(r"\w+|[^\w\s]", text.lower()))


def overlap(has: np.ndarray) -> np.ndarray:
  """Returns float [C, C]: of the attributes of the class in the column, the share that the class in the row has too.

  Args:
    has: bool [C, A]. A class without attributes shares none.
  """
  both = has.astype(np.float64) @ has.T.astype(np.float64)
  return both / np.maximum(has.sum(axis=1), 1)[None]


def wu_palmer(classes: Sequence[str], wordnet: WordNet) -> np.ndarray:
  """Returns float [C, C]: the similarity of two classes. Of a name that WordNet lacks its last word counts."""
  names = [name if name in wordnet else name.split()[-1] for name in map(str.lower, classes)]
  return np.array([[wordnet.similarity(a, b) for b in names] for a in names])


def draw(images: Sequence[np.ndarray], captions: Sequence[str], right: Sequence[bool], title: str, path: str) -> None:
  """Writes a PNG: images [h, w, 3] in a grid, each over its caption, which is red where it is not right."""
  from matplotlib.figure import Figure  # here: who only reads a configuration waits for it otherwise

  rows, columns = SHEET
  rows = -(-len(images) // columns)
  figure = Figure(figsize=(1.5 * columns, 2.0 * rows + 0.5))
  figure.suptitle(title, size=12)
  figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.5 / (2.0 * rows + 0.5), bottom=0.5 / (2.0 * rows + 0.5),
                         wspace=0.05, hspace=0.35)
  for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
    axes.axis("off")
    if number < len(images):
      axes.imshow(images[number], interpolation="nearest")
      caption = "\n".join(textwrap.wrap(captions[number], 20, max_lines=3, placeholder=" …"))
      axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", size=8, parse_math=False,
                color="#222222" if right[number] else "#d62728")
  with warnings.catch_warnings(category=UserWarning, action="ignore"):  # a letter that no font here has is a box
    save_figure(figure, path)
