"""Which words come through the map: nouns, modifiers and relations of the references in the captions. LiMBeR, 5.1."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from limber_jax.config import Evaluation
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.generation import CaptionGenerator, map_of
from limber_jax.evals.prompts import lines
from limber_jax.map_names import join
from limber_jax.metrics import words as metric
from limber_jax.metrics.words import Word
from limber_jax.runtime.atomic import atomic_write, save_figure
from limber_jax.runtime.parallel import broadcast_from_process_0


@dataclasses.dataclass
class WordRecall(Evaluation):
  """Writes a caption for every image, and counts how the 50 most frequent words of a category come through.

  Returns means over words: "nouns_precision", "nouns_recall", "nouns_f1", and the same of "modifiers" and "relations".
  A word is in an image if it is in one of its references at least; precision is the share of the captions with the word
  whose image has it (0 of no captions), recall the share of the images with it whose caption has it. "nouns_wup" is the
  Wu-Palmer similarity on WordNet between a noun of the references and the nearest noun of the caption, where WordNet is
  at hand. "count" is the number of images, "@name" metrics are of extra projectors, "@blind" those without any image.

  Words are told apart by NLTK's tagger where that is at hand, else by lists of words; metadata say by which.

  NAME.words.jsonl in the workdir has a line a word, NAME.words.png shows the recalls.
  """

  name = "word_recall"
  needs = ("generate",)
  files = ("nouns",)

  nouns: str = ""  # a file with a noun a line, of which alone the nouns are, without NLTK; "" = all

  def open(self, context: Context) -> Eval:
    return WordRecallEval(self, context)


class WordRecallEval:
  """A `WordRecall` whose data are open."""

  def __init__(self, config: WordRecall, context: Context):
    self._runner = Runner(config, context)
    self._write = CaptionGenerator(self._runner)
    self._nouns = lines(config.nouns, "nouns") if config.nouns else []
    self._metadata: dict[str, Any] = {}

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    wordnet = metric.WordNet.find()
    tagger, what = metric.find_tagger(self._nouns, wordnet)
    self._metadata = {
      "tagger": what if what.startswith("NLTK") or self._nouns else f"{what}; wanted {metric.TAGGER_FROM}",
      "wordnet": "found" if wordnet else f"none, so no nouns_wup; wanted {metric.WORDNET_FROM}", "words": metric.TOP}
    tables, out = {}, {}
    for name, function in predict.items():
      if name.startswith("generate"):
        found = self._write(name, function, params, stats)
        references = [references_of(self._runner.source.annotation(i)) for i in found.index.tolist()]
        captions = [r["caption"] for r in found.records]

        def score(references=references, captions=captions):
          rows = metric.transfer(references, captions, tagger, wordnet.similarity if wordnet else None)
          return [dataclasses.asdict(row) for row in rows]

        words = [Word(**row) for row in broadcast_from_process_0(score)]
        map_ = map_of(name)
        if not words:
          raise UserError(f"evaluation 'word_recall' on data source {self._runner.config.source.name!r}: its texts "
                          f"hold no word that {what} know; give some in a file as `nouns`")
        tables[map_] = words
        out |= {join(key, map_): value for key, value in metric.summary(words).items()}
    if jax.process_index() == 0:
      self._save(tables)
    return {**out, "count": float(len(captions))}

  def metadata(self) -> dict[str, Any]:
    return {**self._runner.metadata(), **self._metadata}

  def _save(self, tables: dict[str, list[Word]]) -> None:
    workdir, name = self._runner.context.workdir, self._runner.context.name or "word_recall"
    os.makedirs(workdir, exist_ok=True)
    path = os.path.join(workdir, f"{name}.words")
    with atomic_write(f"{path}.jsonl") as file:
      for map_, words in tables.items():
        for word in words:
          scores = {key: getattr(word, key) for key in ("precision", "recall", "f1")}
          file.write(json.dumps({"map": map_, **dataclasses.asdict(word), **scores}) + "\n")
    draw(tables, f"{path}.png")


def references_of(record: dict[str, Any]) -> Sequence[str]:
  """Returns the references of a record: all its texts, or its one text."""
  return record.get("texts", (record["text"],))


def draw(tables: dict[str, Sequence[Word]], path: str) -> None:
  """Writes a PNG: the recall of each word, the most frequent on the left, a row a category and a colour a map."""
  from matplotlib.figure import Figure  # here: who only reads a configuration waits for it otherwise

  figure = Figure(figsize=(12, 8), layout="constrained")
  for axes, category in zip(figure.subplots(len(metric.CATEGORIES)), metric.CATEGORIES, strict=True):
    for number, (map_, words) in enumerate(tables.items()):
      mine = [w for w in words if w.category == category]
      axes.plot(range(len(mine)), [w.recall for w in mine], "o-", markersize=3, linewidth=1, color=f"C{number}",
                label=map_ or "the first map")
    axes.set_xticks(range(len(mine)), [w.word for w in mine], rotation=90, size=8, parse_math=False)
    axes.set(ylim=(-0.02, 1.02), xlim=(-0.5, max(len(mine), 1) - 0.5), ylabel="recall", title=category)
    axes.spines[["top", "right"]].set_visible(False)
  axes.legend(frameon=False, ncols=len(tables))
  with warnings.catch_warnings(category=UserWarning, action="ignore"):  # a letter that no font here has is a box
    save_figure(figure, path)
