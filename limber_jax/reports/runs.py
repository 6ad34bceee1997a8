"""The results of runs as reports read them: what there is, what it is called, and in which order it stands."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from limber_jax import config_history
from limber_jax.errors import UserError
from limber_jax.evals import datasets
from limber_jax.map_names import BLIND, join, split
from limber_jax.reports import published

LAYOUT = {"name": str, "task": str, "model": str, "step": int, "seed": int, "weights": dict, "versions": dict,
          "evaluations": dict, "failed": dict}  # of results.json
LAYOUT_OF_EVALUATION = {"evaluation": str, "metrics": dict, "protocol": dict, "metadata": dict}
# What papers print times 100, and how they call it. Other metrics are printed as they are, by their own names.
SCORES = {
  "cider_d": "CIDEr-D", "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
  "meteor": "METEOR", "rouge_l": "ROUGE-L", "spice": "SPICE", "clip_s": "CLIP-S", "ref_clip_s": "RefCLIP-S",
  "top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class", "mean_top1_top5": "mean of top-1, top-5",
  "map11": "11-point mAP", "map": "mAP", "f1_macro": "macro F1",
  "worst_group": "worst group", "worst_group_top5": "worst group, top-5", "roc_auc": "ROC AUC",
  "pm0": "PM-0", "pm10": "PM-10",
  "top1_own": "top-1, own class names", "pm0_own": "PM-0, own class names", "pm10_own": "PM-10, own class names",
  "i2t_r1": "image to text R@1", "i2t_r5": "image to text R@5", "i2t_r10": "image to text R@10",
  "t2i_r1": "text to image R@1", "t2i_r5": "text to image R@5", "t2i_r10": "text to image R@10",
  "right": "names the class alone", "named": "names the class", "blind": "names the class alone, blind",
  "accuracy": "accuracy", "zeroshot": "zero-shot", **{f"few_shot_{k}": f"{k}-shot" for k in (1, 2, 4, 8, 16)},
  "wup_wrong": "Wu-Palmer if wrong", "overlap_wrong": "attributes if wrong", "chair_i": "CHAIR-i", "chair_s": "CHAIR-s",
}


@dataclass(frozen=True)
class Run:
  """The results of one run."""

  where: str                  # its workdir
  results: Mapping[str, Any]  # of results.json, its layout checked
  model: str | None           # what published.json calls it
  data: Mapping[str, str]     # what published.json calls the data set of each evaluation, or the evaluation's own name
  scores: Mapping[tuple[str, str], Mapping[str, float]]  # (evaluation, map) -> "DATA/METRIC" -> metric

  @property
  def title(self) -> str:
    name = printable(self.results["name"])
    if self.model is None:
      return name
    title = published.load().models[self.model]
    return title if published.load().model_of(name) == self.model else f"{title} ({name})"


CAPTIONS = (
  ("NoCaps In", "captions", "nocaps/cider_d/in", 1), ("Out", "captions", "nocaps/cider_d/out", 1),
  ("Near", "captions", "nocaps/cider_d/near", 1), ("All", "captions", "nocaps/cider_d", 1),
  ("CLIP-S", "captions", "nocaps/clip_s", 1), ("Ref-S", "captions", "nocaps/ref_clip_s", 1),
  ("COCO", "captions", "coco/cider_d", 1), ("CLIP-S", "captions", "coco/clip_s", 1),
  ("Ref-S", "captions", "coco/ref_clip_s", 1))


def read(workdir: str) -> Run:
  """Returns the results of a run; raises UserError if there are none, or none that can be read."""
  path = os.path.join(workdir, "results.json")
  if not os.path.isfile(path):
    if os.path.isfile(workdir):
      raise UserError(f"{workdir}: expected the workdir of a run, got a file")
    raise UserError(f"{workdir}: no results.json there; run python -m limber_jax.evaluate --workdir={workdir} "
                    "--config=… first")
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  except (ValueError, RecursionError) as error:  # a bad encoding is a ValueError too
    raise UserError(f"{path}: no results, for it is no JSON ({error}); run limber_jax.evaluate again") from error
  return of(content, workdir)


def of(results: Any, workdir: str) -> Run:
  """Returns a run by its results, those of results.json; raises UserError if their layout is another."""
  path = os.path.join(workdir, "results.json")
  _check(results, LAYOUT, path)
  book = published.load()
  data: dict[str, str] = {}
  scores: dict[tuple[str, str], dict[str, float]] = {}
  taken: dict[tuple[str, str | None], str] = {}  # (evaluation, data set) -> the name of the evaluation it stands under
  for name, evaluation in results["evaluations"].items():
    _check(config_history.keys(evaluation), LAYOUT_OF_EVALUATION, f"{path}: evaluations.{name}")
  results = results | {"evaluations": {n: config_history.entry(e) for n, e in results["evaluations"].items()}}
  # Of two evaluations of one data set, that which has its name goes into the tables.
  for name in sorted(results["evaluations"], key=lambda n: book.data_of(n, "") is None):
    evaluation = results["evaluations"][name]
    kind, known = evaluation["evaluation"], _data_of(name, evaluation)
    data[name] = known if known and taken.setdefault((kind, known), name) == name else name
    for metric, value in evaluation["metrics"].items():
      if isinstance(value, bool) or not isinstance(value, int | float) or (
          isinstance(value, int) and value.bit_length() > 1000):
        raise UserError(f"{path}: evaluations.{name}.metrics.{metric}: expected a number, got {value!r:.60}")
      metric, map_ = split(metric)
      map_ = BLIND if map_ == "blind_text" else map_  # as published.json calls it
      scores.setdefault((kind, map_), {})[f"{data[name]}/{metric}"] = float(value)
  model = book.model_of(results["model"]) or book.model_of(results["name"])
  return Run(workdir, results, model, data, scores)


def _data_of(name: str, evaluation: Mapping[str, Any]) -> str | None:
  """Returns what published.json calls the data set of an evaluation: by its name, its classes, or where it is read."""
  kind, protocol = evaluation["evaluation"], evaluation["protocol"]
  classes = str(protocol.get("dataset" if kind == "robustness" else "classes"))
  file = os.path.splitext(os.path.basename(str(protocol.get("source.path", ""))))[0]
  # ImageNet's classes are those of other sets, too.
  words = [classes] if kind == "robustness" else [name, file] if classes == "imagenet" else [name, classes, file]
  return next(filter(None, (published.load().data_of(word, kind) for word in words)), None)


def _check(value: Any, layout: Mapping[str, type], where: str) -> None:
  if not isinstance(value, dict):
    raise UserError(f"{where}: expected an object with {', '.join(layout)}, got {value!r:.60}; "
                    "run limber_jax.evaluate again")
  for key, kind in layout.items():
    if not isinstance(value.get(key), kind) or isinstance(value[key], bool):
      got = f"{value[key]!r:.60}" if key in value else "nothing"
      raise UserError(f"{where}: {key}: expected {kind.__name__}, got {got}; run limber_jax.evaluate again")


def printable(text: str) -> str:
  """Returns a text on one line, without characters that cannot be seen or written."""
  return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def ordered(runs: Sequence[Run]) -> list[Run]:
  """Returns runs in the papers' order, others last as they came."""
  place = {model: i for i, model in enumerate(published.load().models)}
  return sorted(runs, key=lambda run: place.get(run.model, len(place)))


def label_of(run: Run, runs: Sequence[Run], map_: str = "") -> str:
  """Returns the title of a run, with its workdir where another has the same, and the name of an extra projector."""
  label = run.title if sum(run.title == other.title for other in runs) == 1 else f"{run.title} ({run.where})"
  return f"{label} {join('', map_)}".rstrip()


def by_source(found: Sequence[tuple[published.Table, float]]) -> dict[str, float]:
  """Returns {source: percent}: what was measured again first, then the papers."""
  return {table.source: value for table, value in sorted(found, key=lambda x: x[0].paper)}


def zeroshot_columns(scores: Sequence[Mapping[str, float]]) -> list[str]:
  """Returns each "DATA/METRIC" that papers give of a data set, or top-1 of others, in the papers' order."""
  book = published.load()
  printed = {column for table in book.tables if table.evaluation == "zeroshot" for column in table.columns}
  place = {data: i for i, data in enumerate(book.data)}
  own = {name: data.metric for name, data in datasets.SETS.items() if data.metric}
  wanted = [c for c in dict.fromkeys(c for some in scores for c in some)
            if c in printed or c.split("/")[1] == own.get(c.split("/")[0], "top1")]
  return sorted(wanted, key=lambda column: place.get(column.split("/")[0], len(place)))


def data_title(data: str) -> str:
  return published.load().data.get(data, data)
