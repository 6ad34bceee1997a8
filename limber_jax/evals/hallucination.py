"""Captions that name what is not there (CHAIR, arXiv 1809.02156), or run on."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from limber_jax.config import Evaluation, choose
from limber_jax.data.sources import annotations
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.generation import CaptionGenerator, map_of
from limber_jax.evals.word_recall import references_of
from limber_jax.map_names import join
from limber_jax.metrics.chair import OBJECTS, Chair, chair, first_sentence, shown
from limber_jax.metrics.words import tokens
from limber_jax.runtime.atomic import atomic_write

WANTED = "COCO's instances_val2014.json (annotations_trainval2014.zip of https://cocodataset.org/#download)"
METRICS = ("chair", "run_off")


@dataclasses.dataclass
class Hallucination(Evaluation):
  """Writes a caption for every image of COCO, and counts the objects in it that the image does not have.

  Metrics of whole captions, of their first sentence (with "_cut" behind), of extra projectors ("@name") and of the
  language model without any image ("@blind"):
    chair_i: hallucinated mentions of objects / all mentions, 0 of none.
    chair_s: the share of captions with one at least.
    objects: mentions in a caption. Who names nothing hallucinates nothing, so read chair_i beside it.
    words: words in a caption.
    ended: the share of captions that the model ended itself, before decoding.max_new_tokens.
    cut: the share of captions that go on behind their first sentence.
  "count" is the number of images.

  An image has the objects of its segments and those that its references name, of COCO's 80 and their synonyms.

  metrics: chair, run_off (words, ended, cut); () = both. run_off needs no segments.

  NAME.objects.jsonl in the workdir has a line a caption of the first map, with what it names and what of that is wrong.
  """

  name = "hallucination"
  needs = ("generate",)
  files = ("segments",)

  # instances_val2014.json; "" = the file of that name (or instances_… for captions_….json) beside source.path, or in
  # the folder annotations there
  segments: str = ""
  metrics: tuple[str, ...] = ()  # which of these; () = the evaluation's own choice

  def open(self, context: Context) -> Eval:
    return HallucinationEval(self, context)


class HallucinationEval:
  """A `Hallucination` whose data are open."""

  def __init__(self, config: Hallucination, context: Context):
    self._runner = Runner(config, context)
    self._write = CaptionGenerator(self._runner)
    for metric in config.metrics:
      choose("evals.….metrics", metric, METRICS)
    self._metrics = config.metrics or METRICS
    self._metadata: dict[str, Any] = {}
    self._shown: list[frozenset[str]] = []  # of each record
    if "chair" in self._metrics:
      path = config.segments or _beside(config.source.path)
      segments, skipped = read_segments(path)
      self._metadata = {"segments": os.path.basename(path), "segments_skipped": skipped}
      source = self._runner.source
      for record in map(source.annotation, range(len(source))):
        if record["id"] not in segments:
          raise UserError(f"evaluation 'hallucination': image {record['id']} is not in {path}; wanted {WANTED}, of the "
                          "images of the data source")
        self._shown.append(shown(segments[record["id"]], references_of(record)))

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    out = {}
    for name, function in predict.items():
      if name.startswith("generate"):
        found = self._write(name, function, params, stats)
        captions = [r["caption"] for r in found.records]
        cut = [first_sentence(caption) for caption in captions]
        map_ = map_of(name)
        metrics = {}
        if "run_off" in self._metrics:
          longer = [len(tokens(a)) > len(tokens(b)) for a, b in zip(captions, cut, strict=True)]
          metrics |= {"words": mean_length(captions), "words_cut": mean_length(cut), "cut": float(np.mean(longer)),
                      "ended": float(np.mean([r["ended"] for r in found.records]))}
        if self._shown:
          truth = [self._shown[i] for i in found.index.tolist()]
          whole = chair(captions, truth)
          metrics |= _metrics(whole, "") | _metrics(chair(cut, truth), "_cut")
          if not map_ and jax.process_index() == 0:
            self._save(found.records, whole)
        out |= {join(key, map_): value for key, value in metrics.items()}
    return {**out, "count": float(len(captions))}

  def metadata(self) -> dict[str, Any]:
    return {**self._runner.metadata(), **self._metadata, "max_new_tokens": self._runner.context.decoding.max_new_tokens}

  def _save(self, records: Sequence[dict[str, Any]], found: Chair) -> None:
    context = self._runner.context
    os.makedirs(context.workdir, exist_ok=True)
    path = os.path.join(context.workdir, f"{context.name or 'hallucination'}.objects.jsonl")
    with atomic_write(path) as file:
      for record, mentions, wrong in zip(records, found.mentions, found.hallucinated, strict=True):
        file.write(json.dumps({"id": record["id"], "caption": record["caption"], "objects": mentions,
                               "hallucinated": wrong}) + "\n")


def _metrics(found: Chair, end: str) -> dict[str, float]:
  return {f"chair_i{end}": found.chair_i, f"chair_s{end}": found.chair_s, f"objects{end}": found.per_caption}


def mean_length(captions: Sequence[str]) -> float:
  """Returns the mean number of words."""
  return float(np.mean([len(tokens(caption)) for caption in captions]))


def read_segments(path: str) -> tuple[dict[str, set[str]], int]:
  """Returns ({image id: names of its objects}, the number of segments that are of no image or of no object of COCO).

  Raises:
    UserError: no such file, not JSON, or not of COCO's 80 objects.
  """
  table = annotations.load(path, WANTED)
  images, categories, segments = (annotations.entries(table, key, path)
                                  for key in ("images", "categories", "annotations"))
  names = {c["id"]: c["name"] for c in categories if not annotations.flaw(c, id=int, name=str)}
  if unknown := next((name for name in names.values() if name not in OBJECTS), None):
    raise UserError(f"{path}: no object of COCO {unknown!r}{did_you_mean(unknown, set(OBJECTS.values()))}; "
                    f"wanted {WANTED}")
  out: dict[str, set[str]] = {str(i["id"]): set() for i in images if not annotations.flaw(i, id=(int, str))}
  skipped = 0
  for segment in segments:
    flaw = annotations.flaw(segment, image_id=(int, str), category_id=int)
    if flaw or str(segment["image_id"]) not in out or segment["category_id"] not in names:
      skipped += 1
    else:
      out[str(segment["image_id"])].add(names[segment["category_id"]])
  return out, skipped


def _beside(path: str) -> str:
  """Returns where the segments lie, as COCO's archives unpack: annotations/instances_val2017.json for captions_…"""
  folder, name = os.path.split(path)
  name = name.replace("captions_", "instances_") if name.startswith("captions_") else "instances_val2014.json"
  places = [os.path.join(folder, name), os.path.join(folder, "annotations", name)]
  return next(filter(os.path.isfile, places), places[0])
