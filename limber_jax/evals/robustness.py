"""Zero-shot accuracy under natural shifts of the data, against what models trained on ImageNet alone lose there.

Source: arXiv 2103.00020, section 3.3, and Taori et al., arXiv 2007.00644.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import special

from limber_jax.config import Evaluation
from limber_jax.data.sources import Source
from limber_jax.data.transforms import decode
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals.base import Context, Runner
from limber_jax.evals.zeroshot import by_class, chosen_templates, ensemble, load_classes, plain, prompts, rank, scorer
from limber_jax.metrics.statistics import Line, effective_robustness, fit, gap_cut, relative_robustness
from limber_jax.runtime.atomic import save_figure

# The sets, and how the paper writes their names; ImageNet itself is what they are held against.
SETS = {"imagenet": "ImageNet", "imagenet_v2": "ImageNetV2", "imagenet_a": "ImageNet-A", "imagenet_r": "ImageNet-R",
        "imagenet_sketch": "ImageNet Sketch", "objectnet": "ObjectNet", "imagenet_vid_robust": "ImageNet-Vid",
        "ytbb_robust": "YouTube-BB"}
SHIFTS = tuple(SETS)[1:]
VIDEOS = ("imagenet_vid_robust", "ytbb_robust")
BORDER = 2     # pixels cut off each side of ObjectNet's images, whose frame is red so that nobody trains on them
NONE = "none"  # a class of YTBB-Robust that stands for no class


@dataclass(frozen=True)
class Classes:
  """The classes of a set, each of which is one or several of ImageNet's, or none."""

  members: tuple[tuple[int, ...], ...]  # numbers among ImageNet's 1,000 classes
  folders: tuple[str, ...] = ()         # of images; empty where they are called as ImageNet's
  names: tuple[str, ...] = ()           # the set's own; empty where they are ImageNet's

  @functools.cached_property
  def known(self) -> np.ndarray:
    """The classes of ImageNet that belong to any class, sorted, int64 [K]."""
    return np.unique([i for members in self.members for i in members])

  @functools.cached_property
  def groups(self) -> np.ndarray:
    """The class that each of `known` belongs to, int64 [K]."""
    of = {i: number for number, members in enumerate(self.members) for i in members}
    return np.array([of[i] for i in self.known.tolist()])

  def scores(self, scores: np.ndarray) -> np.ndarray:
    """Returns the scores [M] of the classes: the best among the members [K, as `known`], -inf of one without any."""
    out = np.full(len(self.members), -np.inf, np.float32)
    np.maximum.at(out, self.groups, scores)
    return out


@functools.cache
def classes_of(name: str) -> Classes:
  """Returns the classes of one of SETS."""
  numbers = {c.key: i for i, c in enumerate(load_classes("imagenet"))}  # by WordNet id
  if name in ("imagenet_a", "imagenet_r"):
    return Classes(tuple((numbers[wnid],) for wnid in _read(f"{name}.txt").splitlines()))
  if name in ("objectnet", *VIDEOS):
    rows = json.loads(_read(f"{name}.json"))
    folders = tuple(r["folder"] for r in rows) if name == "objectnet" else ()
    return Classes(tuple(tuple(r["imagenet"]) for r in rows), folders, tuple(r["name"] for r in rows))
  return Classes(tuple((i,) for i in numbers.values()))


class Shift:
  """Zero-shot accuracy on one of ImageNet's shifted sets, or on ImageNet itself for comparison.

  classes: the set: imagenet, imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, objectnet, imagenet_vid_robust or
    ytbb_robust. Only the set's classes are to choose from.
  source: images by class. A class is found by the name that the source gives it: a WordNet id such as n01440764, the
    name or the number of ImageNet's class (ImageNetV2's folders 0 … 999, in whatever order), for ObjectNet the folder
    (alarm_clock). Images of other classes, as of the 200 of ObjectNet that ImageNet lacks, are left out. For the two
    sets of videos it is data source "frames".
  templates: of the sentences.

  "top1", and "top5" where every class is one of ImageNet's. Where a class of the set is several of ImageNet's, it
  scores as the best of them, and "top1_own" is with the set's own class names in the sentences instead: the paper's
  per-dataset class names. Of ImageNet, "on_imagenet_a" and so on are the accuracies on the classes of the other sets,
  as these class them: what a shifted accuracy is held against. Of videos "pm0" is the share of anchor frames that are
  right and "pm10" that of neighbourhoods in which every frame is; "pm0_own" and "pm10_own" with the set's own class
  names. A frame with several labels may be given any of them. "count" is the number of images, or of neighbourhoods.

  A neighbourhood whose anchor cannot be read is left out; of other frames those that can be read count. An item's
  record has its "labels" and the "rank" of the best of them, 0 where it is right.
  """

  needs = ("embed_image", "embed_text")

  def __init__(self, config: Evaluation, context: Context):
    self._set = config.classes
    if self._set not in SETS:
      raise UserError(f"evaluation 'shift': its `classes` name no set {self._set!r}{did_you_mean(self._set, SETS)}")
    self._classes = classes_of(self._set)
    self._runner = Runner(config, context)
    source = self._runner.source
    self._where = f"evaluation 'shift' of {self._set} on data source {config.source.name!r}"
    self._left_out, self._count = 0, 0
    if self._set in VIDEOS:
      check_frames(source, len(self._classes.members), self._where)
      self._neighbourhoods = source.neighbourhoods
    else:
      self._places = places(source, self._classes, self._where)
      part = Part(source, self._places, BORDER if self._set == "objectnet" else 0)
      if not len(part):
        raise UserError(f"{self._where}: none of its {len(source)} records is of a class of {self._set}")
      self._runner.source, self._left_out = part, len(source) - len(part)
    templates = chosen_templates(config, source)
    self._known = [load_classes("imagenet")[i] for i in self._classes.known]
    self._tokens = prompts(context.tokenizer, [n for c in self._known for n in c.names], templates, context.length)
    self._own = [i for i, name in enumerate(self._classes.names) if name != NONE]
    self._own_tokens = prompts(context.tokenizer, [self._classes.names[i] for i in self._own], templates,
                               context.length) if self._own else None

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    embed_text = partial(self._runner.embed_rows, "text", predict["embed_text"], params, stats)
    scores_of = scorer(by_class(ensemble(embed_text, self._tokens), self._known))
    own_scores_of = None if self._own_tokens is None else scorer(ensemble(embed_text, self._own_tokens))

    def embed(params, stats, batch):
      return {"embedding": predict["embed_image"](params, stats, batch["image"]),
              **{k: batch[k] for k in ("index", "label")}}

    def record(row: dict[str, np.ndarray]) -> dict[str, Any]:
      scores = scores_of(row["embedding"])
      labels = self._runner.source.labels[row["index"]] if self._set in VIDEOS else (self._places[row["label"]],)
      out = {"labels": list(labels), "rank": best_rank(self._classes.scores(scores), labels)}
      if own_scores_of is not None:
        all_ = np.full(len(self._classes.names), -np.inf, np.float32)
        all_[self._own] = own_scores_of(row["embedding"])
        out["rank_own"] = best_rank(all_, labels)
      return out | ({"on": right_on(scores, labels[0])} if self._set == "imagenet" else {})

    records = self._runner.collect("images", embed, params, stats, record=record).records
    if not records:
      raise UserError(f"{self._where}: none of its images can be read")
    out = {}
    for kind in ("", "_own") if self._own else ("",):
      right = {r["index"]: r[f"rank{kind}"] == 0 for r in records}
      if self._set in VIDEOS:
        anchors, whole = perturbed(right, self._neighbourhoods)
        if not anchors:
          raise UserError(f"{self._where}: none of its anchor frames can be read")
        out |= {f"pm0{kind}": float(np.mean(anchors)), f"pm10{kind}": float(np.mean(whole))}
        self._count = len(anchors)
      else:
        out[f"top1{kind}"] = float(np.mean([*right.values()]))
        self._count = len(records)
    if not self._classes.names:
      out["top5"] = float(np.mean([r["rank"] < 5 for r in records]))
    if self._set == "imagenet":
      for name in SHIFTS:
        if right := [r["on"][name] for r in records if name in r["on"]]:
          out[f"on_{name}"] = float(np.mean(right))
    return {**out, "count": float(self._count)}

  def facts(self) -> dict[str, Any]:
    out = {**self._runner.facts(), "set": self._set, "classes": len(self._classes.members),
           "templates": self._tokens.shape[1]}
    if self._set in VIDEOS:
      return {**out, "neighbourhoods": len(self._neighbourhoods), "neighbourhoods_covered": self._count}
    return {**out, "of_other_classes": self._left_out, "border": BORDER if self._set == "objectnet" else 0}


class Part:
  """The records of a source that are of the classes of a set, with the borders of their images cut off."""

  classes = None

  def __init__(self, source: Source, place: Sequence[int | None], border: int):
    """Opens it; `place` is the set's class of each label of the source, or None, and `border` pixels on each side."""
    self._source, self._border = source, border
    every = range(len(source))
    # Looked through only where there is something to leave out: some sources read the image with its label.
    self._index = every if None not in place else [i for i in every if _kept(source, i, place)]

  def __len__(self) -> int:
    return len(self._index)

  def annotation(self, index: int) -> dict[str, Any]:
    return self._source.annotation(self._index[index])

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self._source[self._index[index]]
    if not self._border:
      return record
    inner = slice(self._border, -self._border)
    return record | {"image": np.ascontiguousarray(decode(record["image"])[inner, inner])}

  def fingerprint(self) -> str:
    whole = (self._source.fingerprint(), self._border, list(self._index))
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:16]


def _kept(source: Source, index: int, place: Sequence[int | None]) -> bool:
  """Returns whether a record is of one of the classes, or cannot be read, which is found and named later."""
  try:
    return place[source.annotation(index)["label"]] is not None
  except UserError:
    return True


def places(source: Source, classes: Classes, where: str) -> list[int | None]:
  """Returns for each label of a source the class of a set, None for one that the set has not.

  Raises:
    UserError: the source names no classes, or none that the set has; `where` begins the message.
  """
  if not source.classes or "label" not in source.annotation(0):
    raise UserError(f"{where}: its records have no labels with names; wanted a folder of images for each class")
  number = {plain(folder): i for i, folder in enumerate(classes.folders)}
  imagenet = load_classes("imagenet")
  words = [plain(name) for c in imagenet for name in c.names]
  for i, members in enumerate(() if classes.folders else classes.members):
    for member in members:
      own = imagenet[member]
      number |= {plain(word): i for word in own.names if words.count(plain(word)) == 1}
      number |= {own.key: i, str(member): i}
  out = [number[key] if (key := plain(name)) in number else None for name in source.classes]
  if all(place is None for place in out):
    wanted = classes.folders or [imagenet[members[0]].key for members in classes.members]
    raise UserError(f"{where}: a class {source.classes[0]!r} is none of its {len(classes.members)}, nor is any other; "
                    f"wanted folders such as {', '.join(wanted[:2])}")
  return out


def check_frames(source: Source, classes: int, where: str) -> None:
  """Raises UserError if a source has no frames with neighbours, or they are not of `classes` classes."""
  if not hasattr(source, "neighbourhoods"):
    raise UserError(f"{where}: this is a set of videos; set source.name=frames")
  if (highest := max(labels[-1] for labels in source.labels)) >= classes:
    raise UserError(f"{where}: a frame is of class {highest}, wanted 0 to {classes - 1}; is source.path that of "
                    "another set?")


def best_rank(scores: np.ndarray, labels: Sequence[int]) -> int:
  """Returns how many classes come before the best of `labels` by scores [M]; 0 where the image is right."""
  return min(rank(scores, label) for label in labels)


def right_on(scores: np.ndarray, label: int) -> dict[str, bool]:
  """Returns {"imagenet_a": True, …}: whether an image of ImageNet is right among the classes of each shifted set.

  Sets are left out that do not have its class, and those that have all.

  Args:
    scores: of the 1,000 classes.
    label: of the image.
  """
  out = {}
  for name in SHIFTS:
    classes = classes_of(name)
    there = np.searchsorted(classes.known, label)
    if len(classes.known) < len(scores) and there < len(classes.known) and classes.known[there] == label:
      out[name] = rank(classes.scores(scores[classes.known]), int(classes.groups[there])) == 0
  return out


def perturbed(right: dict[int, bool], neighbourhoods: Sequence[Sequence[int]]) -> tuple[list[bool], list[bool]]:
  """Returns (PM0, PM10): for each neighbourhood whether its anchor is right, and whether all of its frames are.

  Args:
    right: by the number of the frame; frames that could not be read are not there.
    neighbourhoods: numbers of frames, the anchor first. One without its anchor is left out.
  """
  there = [group for group in neighbourhoods if group[0] in right]
  return [right[group[0]] for group in there], [all(right[i] for i in group if i in right) for group in there]


@functools.cache
def standard() -> list[dict[str, Any]]:
  """Returns {"model": name, set: accuracy or None, …} of models trained on ImageNet alone, without tricks.

  Keys beside the sets: "imagenet_on_SET" is ImageNet's accuracy on the classes of that set, "…_pm10" that of videos.
  """
  return json.loads(_read("standard.json"))["models"]


def baseline(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the accuracies (on ImageNet, of the set's classes; on the set) of `standard` models, float64 [m] each.

  A model that was not tried on the set is left out, and so is one with nothing right: ImageNet-A was made of what
  ResNet-50 gets wrong.
  """
  own = f"imagenet_on_{name}"
  pairs = [(model[own] if own in model else model["imagenet"], model[name]) for model in standard()]
  kept = np.array([pair for pair in pairs if None not in pair and pair[1] > 0])
  return kept[:, 0], kept[:, 1]


@functools.cache
def expected(name: str) -> Line:
  """Returns the fit of a shifted set's accuracy on ImageNet's, over models of standard training.

  On ImageNet-A, which was made of what one such model gets wrong, weak models lie on a line of their own; as in the
  paper's picture there is one for all.
  """
  return fit(*baseline(name))


def summary(figures: dict[str, dict[str, float]], before: dict[str, dict[str, float]] | None = None
            ) -> dict[str, dict[str, float]]:
  """Returns by set, and for "mean", what the shifts do to a model.

  For each shifted set: "accuracy" under the shift (of videos that of the anchors, PM0), "imagenet" on the same classes
  without it, "expected" of a model of standard training with that, "effective" robustness, the "gap_cut": the share of
  the expected drop that does not happen; "…_own" of them with the set's own class names; and "relative" robustness
  over a model `before`. "mean" has the means of what every set has ("…_own" where a set has names of its own, else as
  without) and the number of "sets": the paper's means are over seven. A set whose accuracy on ImageNet is not known is
  left out; without any, there is no "mean".

  Args:
    figures: of `Shift` by set, "imagenet" among them.
    before: the same of another model.
  """
  out: dict[str, dict[str, float]] = {}
  for name in SHIFTS:
    known = "imagenet" in figures and name in figures
    own = f"on_{name}" if len(classes_of(name).known) < len(classes_of("imagenet").known) else "top1"
    if not known or own not in figures["imagenet"]:
      continue
    accuracy, line = figures["imagenet"][own], expected(name)
    row = {"imagenet": accuracy, "expected": line(accuracy)}
    for kind in ("", "_own"):
      if (measure := f"{'pm0' if name in VIDEOS else 'top1'}{kind}") in figures[name]:
        shifted = figures[name][measure]
        row |= {f"accuracy{kind}": shifted, f"effective{kind}": effective_robustness(accuracy, shifted, line)}
        if line(accuracy) < accuracy:
          row[f"gap_cut{kind}"] = gap_cut(accuracy, shifted, line)
        if before is not None and name in before and measure in before[name]:
          row[f"relative{kind}"] = relative_robustness(shifted, before[name][measure])
    out[name] = row
  if rows := list(out.values()):
    keys = {key for row in rows for key in row}
    values = {key: [row[key] if key in row else row[plain_] for row in rows] for key in sorted(keys)
              if all((plain_ := key.removesuffix("_own")) in row for row in rows)}
    out["mean"] = {key: float(np.mean(found)) for key, found in values.items()} | {"sets": float(len(rows))}
  return out


def draw(rows: dict[str, dict[str, float]], name: str, path: str) -> None:
  """Writes the paper's picture as a PNG: for the mean and each set, the shifted accuracy against ImageNet's.

  Axes are logits. Small points are models of standard training with their fit, the dotted line is no loss at all, and
  the star is this model: hollow where its classes have the set's own names.

  Args:
    rows: of `summary`, with at least one set.
    name: of the model, for the legend.
    path: where to; the folder is made.
  """
  sets = [s for s in SHIFTS if s in rows]
  panels = ["mean", *sets] if len(sets) > 1 else sets
  columns = min(4, len(panels))
  down = -(-len(panels) // columns)
  figure = Figure(figsize=(3.3 * columns, 3.4 * down + 0.5), layout="constrained")
  for number, axes in enumerate(figure.subplots(down, columns, squeeze=False).flat):
    if number >= len(panels):
      axes.axis("off")
      continue
    which = panels[number]
    points = _means(sets) if which == "mean" else baseline(which)
    title = f"Mean of {len(sets)} sets" if which == "mean" else SETS[which]
    _panel(axes, rows[which], *points, title, name)
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
  if folder := os.path.dirname(path):
    os.makedirs(folder, exist_ok=True)
  save_figure(figure, path)


def _panel(axes: Axes, row: dict[str, float], x: np.ndarray, y: np.ndarray, title: str, name: str) -> None:
  own = [row["accuracy_own"]] if "accuracy_own" in row else []
  shown = [np.clip([*part], 0.002, 0.998) for part in ([*x, row["imagenet"]], [*y, row["accuracy"], *own])]
  low, high = zip(*((special.logit(part.min()) - 0.3, special.logit(part.max()) + 0.3) for part in shown), strict=True)
  line, along = fit(x, y), special.expit(np.linspace(low[0], high[0], 50))
  axes.plot(special.logit(along), special.logit(along), ":", color="#555555", label="no loss (y = x)")
  axes.plot(special.logit(along), special.logit([line(a) for a in along]), color="#7a9cc6", label="their fit")
  axes.plot(special.logit(x), special.logit(y), "o", markersize=3.5, color="#7a9cc6", alpha=0.6,
            label="trained on ImageNet")
  across, up = (special.logit(np.clip(a, 0.002, 0.998)) for a in (row["imagenet"], [row["accuracy"], *own]))
  axes.plot(across, up[0], "*", markersize=13, color="#6a3d9a", label=name.replace("$", r"\$"))
  if own:
    axes.plot(across, up[1], "*", markersize=13, markerfacecolor="none", markeredgecolor="#6a3d9a",
              label="the same, with the set's own class names")
  for axis, start, stop in ((axes.xaxis, low[0], high[0]), (axes.yaxis, low[1], high[1])):
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5)
             if start <= special.logit(t / 100) <= stop]
    axis.set_ticks([special.logit(t / 100) for t in ticks], [f"{t:g}" for t in ticks])
  axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="ImageNet, same classes (%)")
  axes.tick_params(labelsize=7)
  axes.set_title(f"{title} (%)", size=10)


def _means(sets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean accuracies over sets (on ImageNet; shifted) of the standard models that have all, float64 [m]."""
  own = [f"imagenet_on_{s}" if f"imagenet_on_{s}" in standard()[0] else "imagenet" for s in sets]
  whole = [m for m in standard() if None not in [m[key] for key in (*own, *sets)]]
  on_imagenet, shifted = (np.array([np.mean([m[k] for k in keys]) for m in whole]) for keys in (own, sets))
  return on_imagenet, shifted


def _read(name: str) -> str:
  return resources.files("limber_jax.evals").joinpath(f"shifts/{name}").read_text(encoding="utf-8")
