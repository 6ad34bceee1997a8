"""Linear probes: what a classifier can read from a model's features, of all data and of a few. Source: CLIP, A.3."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from limber_jax.config import COUNT, SEEDS, Source, ranged
from limber_jax.data import sources as data_sources
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals.base import Context, Eval
from limber_jax.evals.datasets import SETS, open_runner
from limber_jax.evals.prompts import (
  OfPrompts,
  by_class,
  check_labels,
  chosen_classes,
  chosen_templates,
  ensemble,
  prompts,
)
from limber_jax.evals.result_store import Results
from limber_jax.evals.zeroshot import OF_SEVERAL, labels_of, truth_of
from limber_jax.metrics import classification, probe
from limber_jax.metrics.logistic import GRID, fit
from limber_jax.runtime.atomic import save_figure
from limber_jax.runtime.parallel import broadcast_from_process_0

METRICS = ("accuracy", "mean_per_class", "mean_top1_top5", "roc_auc")


@dataclasses.dataclass
class LinearProbe(OfPrompts):
  """L2-regularised logistic regression on penultimate features, and the same from a few images of each class.

  source: what is tested on.
  validation: None = a fifth of the images of each class of `train`, drawn by the first of the seeds.
  metrics: which of these; () = the one that the paper gives of the data set, else accuracy. λ is chosen by the
    first, and it is that of few-shot and zero-shot.
    accuracy: the share of images whose class is named.
    mean_per_class: accuracy, averaged over the classes that have images.
    mean_top1_top5: the mean of accuracy and the share whose class is among the first five.
    roc_auc: of two classes, how often the second scores higher for an image of it than for one of the first.
    map11, map: of images with several classes each, and only of these; as in zero-shot. Each class is then told from
      the rest by a classifier of its own, which learns nothing from images that have difficult objects of it only; a
      fifth is drawn of all images, and there are no few shots.
  shots: "few_shot_4" of 4 images a class, averaged over `seeds`, each of which draws its own; a seed's 4 are among its
    8. Their λ is chosen as that of the whole probe is, on the same validation set, which makes it a better one
    than few images could choose: so it is in the paper (openai/CLIP #128). 0: "zeroshot", where the model has texts and
    the classes names.
  classes, templates: of zero-shot, as there.

  "l2" is λ, what multiplies half the squared norm beside the sum of losses: 1 / C of scikit-learn. It is searched
  for as `metrics.probe` says, and the probe fitted again on train and validation together. "count", "train" and
  "validation" are the numbers of images. NAME.png in the workdir shows accuracy against shots, as the paper's Figure 6.

  The mean over folds of STL10 and splits of UCF101 is that of several such evaluations.
  """

  name = "linear_probe"
  needs = ("penultimate",)

  train: Source | None = None       # what is learnt from
  validation: Source | None = None  # where λ is chosen; None = a part of `train`
  metrics: tuple[str, ...] = ()  # which of these; () = the evaluation's own choice
  # examples a class; 0 = of zero-shot
  shots: tuple[int, ...] = ranged((0,), at_least=0, at_most=COUNT, nonempty=True)
  # of what is drawn: a figure is the mean over them
  seeds: tuple[int, ...] = ranged((0,), at_least=0, at_most=SEEDS, nonempty=True)

  def open(self, context: Context) -> Eval:
    return LinearProbeEval(self, context)


class LinearProbeEval:
  """A `LinearProbe` whose data are open."""

  def __init__(self, config: LinearProbe, context: Context):
    where = f"evaluation 'linear_probe' on data source {config.source.name!r}"
    if config.train is None:
      raise UserError(f"{where}: no `train`, the data that the probe learns from")
    sources = {"test": config.source, "train": config.train, "validation": config.validation}
    self._runners = {part: open_runner(dataclasses.replace(config, source=s), context)
                     for part, s in sources.items() if s is not None}
    source = self._runners["test"].source
    for part, runner in self._runners.items():
      _check(runner.source, source, f"{where}, {part}")
    self._config, self._context, self._where = config, context, where
    named = bool(config.classes or source.classes)
    classes = chosen_classes(config, source) if named else None
    if any(k < 0 for k in config.shots) or not config.seeds:
      raise UserError(f"{where}: shots={config.shots}, seeds={config.seeds}: wanted shots of at least 0 and a seed")
    self._count = len(classes) if named else 0
    self._several = "labels" in source.annotation(0)
    if self._several and (not named or any(config.shots)):
      raise UserError(f"{where}: its images have several classes each; wanted their names, and shots=(0,), got "
                      + (f"shots={config.shots}" if named else "no names"))
    self._metrics = _chosen_metrics(config, self._count, self._several, where)
    self._prompts: Callable[[], Any] | None = None  # of a model with texts alone: others may have no room for any
    if named and 0 in config.shots:
      self._classes, templates = classes, chosen_templates(config.templates, source)
      self._prompts = partial(prompts, context.tokenizer, [n for c in classes for n in c.names], templates,
                              context.length)
    self._metadata: dict[str, Any] = {}

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    weights = None
    if self._prompts is not None and {"embed_image", "embed_text"} <= predict.keys():
      embed = partial(self._runners["test"].embed_rows, "text", predict["embed_text"], params, stats)
      weights = by_class(ensemble(embed, self._prompts()), self._classes)  # [C, E]

    def run(embedded, params, stats, batch):
      out = {"feature": predict["penultimate"](params, stats, batch["image"])}
      out |= {"index": batch["index"]} if self._several else {"label": batch["label"]}
      return out | ({"embedding": predict["embed_image"](params, stats, batch["image"])} if embedded else {})

    found = {}
    for part, runner in self._runners.items():
      embedded = weights is not None and part == "test"
      found[part] = runner.collect(f"features {part}", partial(run, embedded), params, stats,
                                   record=partial(self._record, part),
                                   keep=("feature", "embedding") if embedded else ("feature",))
    metrics, self._metadata = broadcast_from_process_0(lambda: self._probe(found, weights))
    if jax.process_index() == 0 and any(self._config.shots):
      self._draw(metrics)
    return metrics

  def _record(self, part: str, row: dict[str, np.ndarray]) -> dict[str, Any]:
    if self._several:
      source = self._runners[part].source
      return labels_of(source, int(row["index"]), self._count, f"{self._where}, {part}")
    return {"label": int(row["label"])}

  def metadata(self) -> dict[str, Any]:
    """Returns `Runner.metadata` of the test set and, by their names, of the others; "searched": the λ tried."""
    others = {part: runner.metadata() for part, runner in self._runners.items() if part != "test"}
    return {**self._runners["test"].metadata(), **others, "metrics": list(self._metrics), **self._metadata}

  def _probe(self, found: dict[str, Results], weights: np.ndarray | None) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns (metrics, metadata)."""
    x = {part: f.arrays["feature"] for part, f in found.items()}
    if self._several:
      classes = self._count
      y = {part: truth_of(f.records, classes) for part, f in found.items()}
    else:
      y = {part: np.array([r["label"] for r in f.records], np.int64) for part, f in found.items()}
      classes = self._count or max(int(labels.max()) for labels in y.values()) + 1
    for part, labels in y.items():
      if not self._several:
        check_labels(labels, found[part].index, classes, f"{self._where}, {part}")
      elif not (labels > 0).any():
        raise UserError(f"{self._where}, {part}: none of its images has a class")
      if not np.isfinite(x[part]).all():
        raise UserError(f"{self._where}, {part}: the features of record "
                        f"{found[part].index[~np.isfinite(x[part]).all(axis=1)][0]} are no numbers")
    count = len(y["train"])
    if "validation" not in x:
      held = probe.held_out(np.zeros(count, int) if self._several else y["train"], self._config.seeds[0])
      for v in (x, y):
        v["train"], v["validation"] = v["train"][~held], v["train"][held]
    if not len(y["train"]) or not len(y["validation"]):
      raise UserError(f"{self._where}: {count} images are too few to hold a fifth of each class out; "
                      "set `validation`")

    score = partial(figure, self._metrics[0])
    validation = x["validation"], y["validation"]
    learnt = probe.learn((x["train"], y["train"]), validation, classes, score)
    out = {name: figure(name, learnt.scores(x["test"]), y["test"]) for name in self._metrics}
    if weights is not None:
      out["zeroshot"] = score(found["test"].arrays["embedding"] @ weights.T, y["test"])
    few = {}
    for shots in sorted({k for k in self._config.shots if k}):
      subsets = np.stack([draw_shots(y["train"], shots, seed, self._where) for seed in self._config.seeds])  # [S, m]
      fits = fit(x["train"], y["train"], classes, GRID, subsets=subsets)
      each, l2 = [], []
      for w, b in zip(fits.weights, fits.bias, strict=True):
        l2.append(probe.choose(w, b, validation, score)[0])
        i = np.searchsorted(GRID, l2[-1])
        each.append(score(x["test"] @ w[i] + b[i][None], y["test"]))
      out[f"few_shot_{shots}"] = float(np.mean(each))
      few[str(shots)] = {"each": each, "deviation": float(np.std(each)), "l2": l2}
    counts = {"count": "test", "train": "train", "validation": "validation"}
    return {**out, "l2": learnt.l2, **{k: float(len(y[part])) for k, part in counts.items()}}, {
      "searched": learnt.searched, "iterations": learnt.iterations, "largest_gap": learnt.gap, "classes": classes,
      "shots": few}

  def _draw(self, metrics: dict[str, float]) -> None:
    os.makedirs(self._context.workdir, exist_ok=True)
    name = self._context.name or "linear_probe"
    spread = {int(k): v["deviation"] for k, v in self._metadata["shots"].items()}
    draw({k: metrics[f"few_shot_{k}"] for k in spread}, spread, metrics.get("zeroshot"), metrics[self._metrics[0]],
         self._metrics[0].replace("_", " "), os.path.join(self._context.workdir, f"{name}.png"))


def _check(source: data_sources.Source, other: data_sources.Source, where: str) -> None:
  """Raises UserError if a source has no labels, or other classes than `other`."""
  kinds = [next((k for k in ("labels", "label") if k in s.annotation(0)), None) for s in (source, other)]
  if kinds[0] is None:
    raise UserError(f"{where}: its records have no label, one class an image; set label_key, or choose other data")
  if kinds[0] != kinds[1]:
    raise UserError(f"{where}: its images have {'several classes each' if kinds[0] == 'labels' else 'one class each'}, "
                    "those of the test set not")
  if source.classes and other.classes and tuple(source.classes) != tuple(other.classes):
    i = next((i for i, (a, b) in enumerate(zip(source.classes, other.classes, strict=False)) if a != b),
             min(len(source.classes), len(other.classes)))
    theirs, own = (repr(c[i]) if i < len(c) else "nothing" for c in (other.classes, source.classes))
    raise UserError(f"{where}: its class {i} is {own}, that of the test set {theirs}")


def _chosen_metrics(config: LinearProbe, classes: int, several: bool, where: str) -> tuple[str, ...]:
  """Returns config.metrics, or the paper's; raises UserError if there is no such figure of these classes, 0 unknown."""
  possible = tuple(OF_SEVERAL) if several else tuple(m for m in METRICS if m != "roc_auc" or classes == 2)
  own = SETS[config.classes].metric if config.classes in SETS else ""
  for name in config.metrics:
    if name not in possible:
      raise UserError(f"{where}, metrics: no figure {name!r} of {classes or 'unnamed'} classes"
                      f"{did_you_mean(name, possible)}")
  return config.metrics or ((own,) if own in possible else possible[:1])


def figure(metric: str, scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns one of METRICS, or of OF_SEVERAL.

  Args:
    metric: its name.
    scores: float [N, C].
    labels: int [N]; of OF_SEVERAL the truth int [N, C].
  """
  if metric in OF_SEVERAL:
    return OF_SEVERAL[metric](scores, labels)
  if metric == "roc_auc":
    return classification.roc_auc(scores[:, 1] - scores[:, 0], labels)
  own = scores[np.arange(len(labels)), labels][:, None]
  before = np.arange(scores.shape[1])[None] < labels[:, None]
  ranks = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
  if metric == "mean_per_class":
    return classification.mean_per_class(labels, ranks == 0)
  if metric == "mean_top1_top5":
    return (classification.top(ranks, 1) + classification.top(ranks, 5)) / 2
  return classification.top(ranks, 1)


def draw_shots(labels: np.ndarray, shots: int, seed: int, where: str) -> np.ndarray:
  """Returns the numbers of so many examples of each class there is, int [classes × shots]; a seed's fewer are part.

  Raises:
    UserError: a class has fewer; the message begins with `where`.
  """
  out = []
  for rows in probe.shuffled(labels, seed):
    if len(rows) < shots:
      raise UserError(f"{where}: shots={shots}, but class {labels[rows[0]]} has {len(rows)} images to learn from")
    out.append(rows[:shots])
  return np.concatenate(out)


def draw(few: dict[int, float], deviations: dict[int, float], zeroshot: float | None, full: float, metric: str,
         path: str) -> None:
  """Writes a PNG as the paper's Figure 6: a figure of probes against the number of their examples a class.

  Args:
    few: by examples a class.
    deviations: of `few`, over draws.
    zeroshot: a star at 0, if there is one.
    full: of the probe that had all examples, a dashed line.
    metric: its name.
    path: where to.
  """
  from matplotlib.figure import Figure  # here: who only reads a configuration waits for it otherwise

  shots = sorted(few)
  figure_ = Figure(figsize=(5.2, 4), layout="constrained")
  axes = figure_.add_subplot()
  places = np.arange(1, len(shots) + 1)
  axes.errorbar(places, [100 * few[k] for k in shots], [100 * deviations[k] for k in shots], marker="o",
                color="#7a9cc6", capsize=3, label="probe of a few examples")
  axes.axhline(100 * full, linestyle="--", color="#555555", label="probe of all examples")
  if zeroshot is not None:
    axes.plot([0], [100 * zeroshot], "*", markersize=14, color="#6a3d9a", label="zero-shot")
    axes.axhline(100 * zeroshot, linestyle=":", linewidth=1, color="#6a3d9a")
  axes.set_xticks(range(0 if zeroshot is not None else 1, len(shots) + 1),
                  [*(["0"] if zeroshot is not None else []), *map(str, shots)])
  axes.set(xlabel="labelled examples a class", ylabel=f"{metric} (%)")
  axes.legend(frameon=False, fontsize=9)
  save_figure(figure_, path)
