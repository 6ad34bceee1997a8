"""Zero-shot accuracy under natural shifts of the data; `effective_robustness` says what is to be thought of it.

Source: arXiv 2103.00020, section 3.3, and Taori et al., arXiv 2007.00644.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

import numpy as np

from limber_jax.config import Evaluation
from limber_jax.data.sources import Source
from limber_jax.data.transforms import decode
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.prompts import by_class, chosen_templates, ensemble, load_classes, plain, prompts
from limber_jax.evals.zeroshot import rank, scorer

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
    return Classes(tuple((numbers[wnid],) for wnid in read(f"{name}.txt").splitlines()))
  if name in ("objectnet", *VIDEOS):
    rows = json.loads(read(f"{name}.json"))
    folders = tuple(r["folder"] for r in rows) if name == "objectnet" else ()
    return Classes(tuple(tuple(r["imagenet"]) for r in rows), folders, tuple(r["name"] for r in rows))
  return Classes(tuple((i,) for i in numbers.values()))


@dataclasses.dataclass
class Robustness(Evaluation):
  """Zero-shot accuracy on one of ImageNet's shifted sets, or on ImageNet itself for comparison.

  dataset: only its classes are to choose from.
  source: images by class. A class is found by the name that the source gives it: a WordNet id such as n01440764, the
    name or the number of ImageNet's class (ImageNetV2's folders 0 … 999, in whatever order), for ObjectNet the folder
    (alarm_clock). Images of other classes, as of the 200 of ObjectNet that ImageNet lacks, are left out. For the two
    sets of videos it is data source "frames".

  "top1", and "top5" where every class is one of ImageNet's. Where a class of the set is several of ImageNet's, it
  scores as the best of them, and "top1_own" is with the set's own class names in the sentences instead: the paper's
  per-dataset class names. Of ImageNet, "on_imagenet_a" and so on are the accuracies on the classes of the other sets,
  as these class them: what a shifted accuracy is held against. Of videos "pm0" is the share of anchor frames that are
  right and "pm10" that of neighbourhoods in which every frame is; "pm0_own" and "pm10_own" with the set's own class
  names. A frame with several labels may be given any of them. "count" is the number of images, or of neighbourhoods.

  A neighbourhood whose anchor cannot be read is left out; of other frames those that can be read count. An example's
  record has its "labels" and the "rank" of the best of them, 0 where it is right.
  """

  name = "robustness"
  needs = ("embed_image", "embed_text")
  files = ("templates",)

  # the set: imagenet, imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch, objectnet, imagenet_vid_robust, ytbb_robust
  dataset: str = ""
  templates: str = ""  # of the sentences, as of "zeroshot"

  def open(self, context: Context) -> Eval:
    return RobustnessEval(self, context)


class RobustnessEval:
  """A `Robustness` whose data are open."""

  def __init__(self, config: Robustness, context: Context):
    self._set = config.dataset
    if self._set not in SETS:
      raise UserError(f"evaluation 'robustness': its `dataset` names no set {self._set!r}"
                      f"{did_you_mean(self._set, SETS)}")
    self._classes = classes_of(self._set)
    self._runner = Runner(config, context)
    source = self._runner.source
    self._where = f"evaluation 'robustness' of {self._set} on data source {config.source.name!r}"
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
    templates = chosen_templates(config.templates, source)
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

  def metadata(self) -> dict[str, Any]:
    out = {**self._runner.metadata(), "set": self._set, "classes": len(self._classes.members),
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


def read(name: str) -> str:
  """Returns the text of a file of `evals/shifts`."""
  return resources.files("limber_jax.evals").joinpath(f"shifts/{name}").read_text(encoding="utf-8")
