"""Zero-shot classification: class names in sentences are the weights of a classifier. Source: arXiv 2103.00020, 3.1."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from limber_jax.data.sources import Source
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals import datasets
from limber_jax.evals.base import Context, Eval
from limber_jax.evals.prompts import (
  OfPrompts,
  by_class,
  check_labels,
  chosen_classes,
  chosen_templates,
  ensemble,
  prompts,
)
from limber_jax.metrics import classification

# Metrics by what they need of the data: one class an image, groups too, two classes in all, several classes an image.
METRICS = ("top1", "top5", "mean_per_class", "mean_top1_top5", "f1_macro")
OF_GROUPS = ("worst_group", "worst_group_top5")
OF_TWO = ("roc_auc",)
OF_SEVERAL = {"map11": classification.mean_average_precision, "map": classification.mean_area}


@dataclasses.dataclass
class ZeroShot(OfPrompts):
  """Naming the class of an image. A class is described by all templates, ensembled in embedding space.

  metrics: which of these; () = top1, top5 and mean_per_class, and the one that the paper gives of the data set.
    top1, top5: the share of images whose class is among the first (five of more than 5 classes).
    mean_per_class: top1, averaged over the classes that have images.
    mean_top1_top5: the mean of the two.
    f1_macro: the harmonic mean of precision and recall, averaged over the classes that have images, as WILDS has it.
    worst_group, worst_group_top5: top1 and top5 of the group of images that has the least, where records have a group.
    roc_auc: of two classes, how often the second scores higher for an image of it than for one of the first.
    map11: of images with several classes each, as PASCAL VOC 2007 has it; with map the only one there.
    map: the same with all points of the curve, and 0 for a class that is nowhere, as CLIP_benchmark has it.
    "count", the number of images, is always there.
  classes: a built-in list (imagenet, food101, …: see `datasets`) or a file with one class a line, in any order if the
    source names its classes, else in that of the labels: its name, or several with | between; then, where the source
    calls it otherwise, a tab and the source's word.
  source.split: with commas between, metrics are averaged over several splits, as those of UCF101 are.

  Equal scores go to the class that stands first. An example's record has "label" and the "rank" of that class, 0 the
  best, "predicted" and perhaps "group", or "labels", "difficult" and "scores".
  """

  name = "zeroshot"
  needs = ("embed_image", "embed_text")

  metrics: tuple[str, ...] = ()  # which of these; () = the evaluation's own choice

  def open(self, context: Context) -> Eval:
    return ZeroShotEval(self, context)


class ZeroShotEval:
  """A `ZeroShot` whose data are open."""

  def __init__(self, config: ZeroShot, context: Context):
    self._where = f"evaluation 'zeroshot' on data source {config.source.name!r}"
    splits = config.source.split.split(",")
    sources = [dataclasses.replace(config.source, split=s) for s in splits] if len(splits) > 1 else [config.source]
    self._runners = [datasets.open_runner(dataclasses.replace(config, source=s), context) for s in sources]
    source = self._runners[0].source
    self._several = "labels" in source.annotation(0)
    if not self._several and "label" not in source.annotation(0):
      raise UserError(f"{self._where}: its records have no labels; set source.label_key, or choose another evaluation")
    self._classes, self._templates = chosen_classes(config, source), chosen_templates(config.templates, source)
    self._grouped = all("group" in runner.source.annotation(0) for runner in self._runners)
    self._metrics = chosen_metrics(config, len(self._classes), self._several, getattr(source, "metrics", ()),
                                   self._grouped)
    self._tokens = prompts(context.tokenizer, [n for c in self._classes for n in c.names], self._templates,
                           context.length)

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    embed = partial(self._runners[0].embed_rows, "text", predict["embed_text"], params, stats)
    scores_of = scorer(by_class(ensemble(embed, self._tokens), self._classes))

    def run(params, stats, batch):
      return {"embedding": predict["embed_image"](params, stats, batch["image"]),
              **{k: batch[k] for k in ("index", "label") if k in batch}}

    found = []
    for runner in self._runners:
      record = partial(self._record, runner.source, scores_of)
      name = "images" if len(self._runners) == 1 else f"images {os.path.basename(runner.config.source.split)}"
      found.append(measure(runner.collect(name, run, params, stats, record=record).records, self._metrics))
    out = {name: float(np.mean([f[name] for f in found])) for name in self._metrics}
    return {**out, "count": float(sum(f["count"] for f in found))}

  def metadata(self) -> dict[str, Any]:
    """Returns `Runner.metadata` of all splits together, how many "classes", "templates", their digest "prompts"."""
    parts = [runner.metadata() for runner in self._runners]
    out = parts[0]
    if len(parts) > 1:
      data = hashlib.sha256("".join(p["data"] for p in parts).encode()).hexdigest()[:16]
      out = {k: sum(p[k] for p in parts) if isinstance(v, int) else v for k, v in out.items()} | {
        "split": ",".join(p["split"] for p in parts), "data": data, "damage": [d for p in parts for d in p["damage"]]}
    words = hashlib.sha256(repr(([c.names for c in self._classes], self._templates)).encode()).hexdigest()[:16]
    return {**out, "classes": len(self._classes), "templates": len(self._templates), "prompts": words}

  def _record(self, source: Source, scores_of: Callable[[np.ndarray], np.ndarray], row: dict[str, np.ndarray]
              ) -> dict[str, Any]:
    """Returns what is kept of an image: where its class comes among all, and the scores where metrics need them."""
    scores, count = scores_of(row["embedding"]), len(self._classes)
    kept = {"scores": [float(s) for s in scores]}
    if self._several:
      return {**labels_of(source, int(row["index"]), count, self._where), **kept}
    label = int(row["label"])
    check_labels(row["label"][None], row["index"][None], count, self._where)
    place, best = rank(scores, label), int(np.argmax(scores))
    out = {"label": label, "rank": place, "predicted": label if place == 0 else best if best != label else -1}
    if self._grouped:
      out["group"] = int(source.annotation(int(row["index"]))["group"])
    return {**out, **(kept if "roc_auc" in self._metrics else {})}


def labels_of(source: Source, index: int, classes: int, where: str) -> dict[str, list[int]]:
  """Returns {"labels", "difficult"} of a record with several classes; raises UserError for numbers that are none."""
  record = source.annotation(index)
  out = {key: [int(i) for i in record[key]] for key in ("labels", "difficult")}
  for label in (*out["labels"], *out["difficult"]):
    check_labels(np.array([label]), np.array([index]), classes, where)
  return out


def truth_of(records: Sequence[dict[str, Any]], classes: int) -> np.ndarray:
  """Returns int [N, C] of {"labels", "difficult"} each: 1 a class is there, 0 only difficult objects of it, -1 not."""
  truth = np.full((len(records), classes), -1)
  for row, r in zip(truth, records, strict=True):
    row[r["difficult"]] = 0
    row[r["labels"]] = 1
  return truth


def measure(records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, float]:
  """Returns the metrics of `ZeroShot` by name, and "count", from the records of its examples.

  Args:
    records: {"label", "rank", "predicted"} each, with "scores" for roc_auc and "group" for the worst of these; for
      map11 and map {"labels", "difficult", "scores"}.
    metrics: their names.

  Raises:
    UserError: the examples have none of the classes, or one only, where two are compared.
  """
  try:
    return _measure(records, metrics)
  except ValueError as error:
    raise UserError(f"evaluation 'zeroshot', metrics={','.join(metrics)}: {error}") from error


def _measure(records: Sequence[dict[str, Any]], metrics: Sequence[str]) -> dict[str, float]:
  if set(metrics) <= set(OF_SEVERAL):
    scores = np.array([r["scores"] for r in records], np.float32)
    truth = truth_of(records, scores.shape[1])
    return {**{name: OF_SEVERAL[name](scores, truth) for name in metrics}, "count": float(len(records))}
  labels, ranks = (np.array([r[k] for r in records]) for k in ("label", "rank"))
  out = {"count": float(len(records))}
  for name in metrics:
    match name:
      case "top1" | "top5":
        out[name] = classification.top(ranks, int(name[3:]))
      case "mean_per_class":
        out[name] = classification.mean_per_class(labels, ranks == 0)
      case "f1_macro":
        out[name] = classification.f1_macro(labels, np.array([r["predicted"] for r in records]))
      case "worst_group" | "worst_group_top5":
        right = ranks < (5 if name.endswith("5") else 1)
        out[name] = classification.worst_group(np.array([r["group"] for r in records]), right)
      case "mean_top1_top5":
        out[name] = (classification.top(ranks, 1) + classification.top(ranks, 5)) / 2
      case "roc_auc":
        scores = np.array([r["scores"] for r in records], np.float32)
        out[name] = classification.roc_auc(scores[:, 1] - scores[:, 0], labels)
  return out


def chosen_metrics(config: ZeroShot, classes: int, several: bool, own: tuple[str, ...] = (), grouped: bool = False
                   ) -> tuple[str, ...]:
  """Returns the names of the metrics: config.metrics, else the data's own, or what they allow and the paper asks for.

  Raises:
    UserError: there is no such metric, or it cannot be had of these data.
  """
  possible = tuple(OF_SEVERAL) if several else tuple(
    m for m in METRICS + OF_GROUPS * grouped if classes > 5 or "top5" not in m) + OF_TWO * (classes == 2)
  asked = datasets.SETS[config.classes].metric if config.classes in datasets.SETS else ""
  default = own or (possible[:1] if several else
                    tuple(m for m in possible if m in ("top1", "top5", "mean_per_class", asked)))
  for name in config.metrics:
    if name not in possible:
      raise UserError(f"evaluation 'zeroshot', metrics: no metric {name!r} of {classes} classes, "
                      f"{'several' if several else 'one'} an image{did_you_mean(name, possible)}")
  return config.metrics or default


def classifier(embed_text: Callable[[np.ndarray], Any], tokenizer: Callable[..., np.ndarray], classes: Sequence[str],
               templates: Sequence[str], length: int) -> np.ndarray:
  """Returns the weights of a zero-shot classifier, unit float32 [C, E]: the scores of images are images @ weights.T.

  Args:
    embed_text: tokens int32 [n, T] -> unit embeddings [n, E]; it is given all C × templates at once.
    tokenizer: from `data.tokenizers.load`, or what calls one.
    classes: C names.
    templates: sentences with {} for the class.
    length: T, tokens of a sentence.
  """
  return ensemble(embed_text, prompts(tokenizer, classes, templates, length))


def scorer(weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the function of an embedding [E] that gives its scores [C]; classes of equal weights [C, E] score equal."""
  distinct, which = np.unique(weights, axis=0, return_inverse=True)  # rounding differs between rows
  return lambda embedding: (distinct @ embedding)[which.reshape(-1)]


def rank(scores: np.ndarray, label: int) -> int:
  """Returns how many classes come before `label`: those of higher scores [C], and of equal ones those that stand first.

  What is not a number comes last as the label's score, and first as another's: a broken model is never right.
  """
  own, before = scores[label], np.arange(len(scores)) < label
  return int(np.count_nonzero(~(scores <= own) | ((scores == own) & before)))
