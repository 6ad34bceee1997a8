"""Does a model do better on what it has seen? Duplicates between its training data and an evaluation set.

Source: arXiv 2103.00020, section 5 and appendix C. There a network that was trained to find duplicates does so; here it
is the embeddings of the model itself, and as there a person sets the threshold.
"""

import dataclasses
import json
import os
import textwrap
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.config import Source, ranged
from limber_jax.data import pipeline
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner, Stopped
from limber_jax.evals.prompts import (
  OfPrompts,
  by_class,
  check_labels,
  chosen_classes,
  chosen_templates,
  ensemble,
  prompts,
)
from limber_jax.evals.zeroshot import rank
from limber_jax.evals.zeroshot import scorer as scores_by
from limber_jax.metrics.statistics import at_least, bonferroni, interval
from limber_jax.runtime.atomic import atomic_write, save_figure
from limber_jax.runtime.parallel import allgather_objects, broadcast_from_process_0, place, replicated

SAVE = 200          # batches of training data between two savings
SHEET = 12          # pairs in each of the three rows of the picture
LEVEL = 0.995       # of the intervals: CLIP's
SIGNIFICANT = 0.05  # p-values below it, after the correction, are
NOTHING = -2.0      # the cosine of an image that nothing has been held against


@dataclasses.dataclass
class Contamination(OfPrompts):
  """Zero-shot accuracy on what the training data hold, nearly or exactly, and on the rest.

  source: the evaluation set, images with labels.

  Metrics: "top1" of all images, "clean" of those that no training image is like, "overlap" of the others, each with
  "…_low" and "…_high", Clopper and Pearson's interval at 99.5 %; "share", that of the overlap; "gain", top1 less clean;
  "p", the probability of as many right among the overlap if they were as hard as the clean ones (one-sided, binomial);
  "count" and "overlap_count". What needs clean or overlapping images is left out where there are none. `summary`
  corrects the p-values of several evaluations.

  In the workdir NAME_pairs.jsonl has every image with the training image nearest to it, the most alike first, and
  NAME_pairs.png shows the nearest pairs and those on both sides of the threshold: whoever sets it looks at these. The
  training data are read once, held nowhere, and after a kill from where they were; another threshold reads them not at
  all.
  """

  name = "contamination"
  needs = ("embed_image", "embed_text")

  train: Source | None = None  # the model's training data
  # the cosine of two image embeddings from which on they count as the same
  threshold: float = ranged(0.95, at_least=-1, at_most=1)

  def open(self, context: Context) -> Eval:
    return ContaminationEval(self, context)


class ContaminationEval:
  """A `Contamination` whose data are open."""

  def __init__(self, config: Contamination, context: Context):
    self._where = f"evaluation 'contamination' on data source {config.source.name!r}"
    if config.train is None:
      raise UserError(f"{self._where}: its `train` names no training data")
    self._config, self._context = config, context
    self._runner = Runner(config, context)
    self._train = Nearest(dataclasses.replace(config, source=config.train), context)
    source = self._runner.source
    if "label" not in source.annotation(0):
      raise UserError(f"{self._where}: its records have no labels; set source.label_key, or choose another source")
    self._classes = chosen_classes(config, source)
    self._tokens = prompts(context.tokenizer, [n for c in self._classes for n in c.names],
                           chosen_templates(config.templates, source), context.length)

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    embed_image = predict["embed_image"]

    def embed(params, stats, batch):
      return {"embedding": embed_image(params, stats, batch["image"])}

    weights = ensemble(partial(self._runner.embed_rows, "text", predict["embed_text"], params, stats), self._tokens)
    scores = scores_by(by_class(weights, self._classes))
    found = self._runner.collect("embed_image", embed, params, stats, keep=("embedding",), shared=True)
    source, images = self._runner.source, found.arrays["embedding"]
    labels = np.array([source.annotation(i)["label"] for i in found.index.tolist()], np.int64)
    check_labels(labels, found.index, len(self._classes), self._where)
    right = np.array([rank(scores(image), label) == 0 for image, label in zip(images, labels.tolist(), strict=True)])
    cosine, nearest = self._train.nearest(embed_image, params, stats, images,
                                          f"{source.fingerprint()} {self._runner.contents}")
    same = cosine >= self._config.threshold
    if jax.process_index() == 0:
      self._write(found.records, cosine, nearest, right)
    return measure(right, same)

  def metadata(self) -> dict[str, Any]:
    train = {f"train_{k}": v for k, v in self._train.metadata().items()}
    return {**self._runner.metadata(), **train, "threshold": self._config.threshold, "classes": len(self._classes),
            "templates": self._tokens.shape[1], "detector": "cosine of the model's own image embeddings"}

  def _write(self, records: Sequence[dict], cosine: np.ndarray, nearest: np.ndarray, right: np.ndarray) -> None:
    """Writes the pairs and the picture of some."""
    order = np.argsort(-cosine, kind="stable")
    name = self._context.name or self._config.name
    os.makedirs(self._context.workdir, exist_ok=True)
    path = os.path.join(self._context.workdir, f"{name}_pairs.jsonl")
    with atomic_write(path) as file:
      for i in order.tolist():
        there = cosine[i] > NOTHING
        pair = {"id": records[i]["id"], "index": records[i]["index"], "cosine": float(cosine[i]) if there else None,
                "train_id": self._train.source.annotation(int(nearest[i]))["id"] if there else None,
                "train_index": int(nearest[i]) if there else None,
                "overlap": bool(cosine[i] >= self._config.threshold), "right": bool(right[i])}
        file.write(json.dumps(pair) + "\n")
    rows = {title: order[part][cosine[order[part]] > NOTHING] for title, part in shown(
      cosine[order], self._config.threshold).items()}
    pictures = {title: [(self._picture(self._runner, records[i]["index"]), self._picture(self._train, int(nearest[i])),
                         float(cosine[i])) for i in row.tolist()] for title, row in rows.items() if len(row)}
    if pictures:
      draw(pictures, self._config.threshold, f"{name}: each image beside the training image nearest to it",
           os.path.join(self._context.workdir, f"{name}_pairs.png"))

  def _picture(self, runner: Runner, index: int) -> np.ndarray:
    return runner.transform(runner.source[index], None)["image"]


class Nearest(Runner):
  """Finds in a source of any size the images nearest to given ones: memory holds these and one batch."""

  def nearest(self, embed: Callable[..., Any], params: dict, stats: dict, known: np.ndarray, of: str
              ) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the highest cosine, float32 [n]; the number of its record, int64 [n], the lower of equal ones).

    Where there is none to be compared, because nothing can be read or the embedding is no number, the cosine is
    NOTHING and the number -1.

    Args:
      embed: (params, stats, images [B, H, W, 3]) -> unit [B, E].
      params, stats: on the mesh, or numpy arrays.
      known: unit float32 [n, E].
      of: what `known` is of: which data, and what their files hold.

    Raises:
      UserError: more than config.max_bad_fraction of the records cannot be read.
      Stopped: between two batches, the run was asked to end; what was done is kept, if the context has a place for it.
    """
    context, total, size = self.context, len(self.source), self._batch_size
    path = os.path.join(context.results_dir, "nearest.json") if context.results_dir else ""
    key = self._key("nearest", True) | {"of": of, "known": len(known)}
    state, flaw = broadcast_from_process_0(partial(_load, path, key, len(known)))
    if not flaw and (back := self.readable([line["index"] for line in state["damage"]])) is not None:
      flaw = f"record {back} of the training data can be read now; all of them are read again"
    if flaw:
      self._say(flaw)
      state = _nothing(len(known))
    for line in state["damage"]:
      self._found(line)
    cosine, index, done = np.array(state["cosine"], np.float32), np.array(state["index"], np.int64), state["done"]
    damage, saved = state["damage"], done
    spec = jax.ShapeDtypeStruct(known.shape, np.float32, sharding=replicated(context.mesh))
    values = {"model": params, "known": place(known, spec)}

    def run(values, stats, batch):
      embedding = embed(values["model"], stats, batch["image"])  # [B, E]
      found = jnp.matmul(values["known"], embedding.T.astype(jnp.float32), precision="highest")  # [n, B]
      usable = batch["real"][None] & jnp.isfinite(found)
      found = jnp.where(usable, found, NOTHING)
      return {"real": batch["real"], "cosine": found.max(axis=1), "row": found.argmax(axis=1)}

    def save():
      if path and jax.process_index() == 0:
        _save(path, {"key": key, "done": done, "cosine": cosine.tolist(), "index": index.tolist(), "damage": damage})

    try:
      with self._progress("nearest", total, done) as bar, pipeline.eval_batches(
          self.source, self.transform, batch_size=size, rows=self._rows, indices=range(done, total), damage=True,
          workers=context.workers, threads=context.threads) as batches:
        while done < total:
          batch = self._next(batches)
          reasons, own = batch.pop("damage"), batch.pop("index")
          count = min(size, total - done)
          out = self._call("nearest", run, values, stats, batch)
          lines = []
          if not out["real"][:count].all():
            parts = allgather_objects([[int(i), str(reason)] for i, reason in zip(own, reasons, strict=True) if reason])
            found = {i: reason for part in parts for i, reason in part}
            lines = [{"index": i, "id": self._id(i), "reason": found[i]} for i in sorted(found)]
          better = out["cosine"] > cosine
          cosine = np.where(better, out["cosine"], cosine)
          index = np.where(better, done + out["row"], index)
          done += count
          damage += lines
          for line in lines:
            self._found(line)
          bar.update(count)
          if done - saved >= SAVE * size or done == total:
            save()
            saved = done
    except Stopped:
      save()
      raise
    return cosine, index


def measure(right: np.ndarray, same: np.ndarray) -> dict[str, float]:
  """Returns the metrics of `Contamination`.

  Args:
    right: bool [n], whether each image is named right.
    same: bool [n], whether it counts as one of the training data.
  """
  out = {"count": float(len(right)), "overlap_count": float(same.sum()), "share": float(same.mean())}
  parts = {"top1": right, "clean": right[~same], "overlap": right[same]}
  for name, part in parts.items():
    if len(part):
      low, high = interval(int(part.sum()), len(part), LEVEL)
      out |= {name: float(part.mean()), f"{name}_low": low, f"{name}_high": high}
  if "clean" in out:
    out["gain"] = out["top1"] - out["clean"]
    if "overlap" in out:
      out["p"] = at_least(int(right[same].sum()), int(same.sum()), out["clean"])
  return out


def summary(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
  """Returns {evaluation: {"p_corrected": …}} of those with a "p", and of all of them together, under "", what follows.

  "evaluations", their number; "median_share" and "mean_share" of the overlap; "moved": how many gain or lose more than
  0.1 %; "significant": how many have a p-value, corrected for the number of all (Bonferroni), below 0.05.

  Args:
    found: the metrics of evaluations "contamination" by name, at least one.
  """
  tested = [name for name, values in found.items() if "p" in values]
  # An evaluation without overlap has nothing to test, and still is one of those that were looked at.
  corrected = bonferroni([found[name]["p"] if name in tested else 1.0 for name in found])
  out = {name: {"p_corrected": p} for name, p in zip(found, corrected, strict=True) if name in tested}
  shares = [values["share"] for values in found.values()]
  moved = [values for values in found.values() if "gain" in values and abs(values["gain"]) > 0.001]
  return out | {"": {
    "evaluations": float(len(found)), "median_share": float(np.median(shares)), "mean_share": float(np.mean(shares)),
    "moved": float(len(moved)), "significant": float(sum(row["p_corrected"] < SIGNIFICANT for row in out.values()))}}


def shown(cosine: np.ndarray, threshold: float) -> dict[str, slice]:
  """Returns which pairs the picture shows, of cosines [n] in falling order, by the title of the row.

  Pairs far above the threshold come first, then those just above and just below it; none comes twice.
  """
  above = int(np.sum(cosine >= threshold))
  first = min(SHEET, above)
  return {"the most alike": slice(0, first), f"just above {threshold:g}": slice(max(first, above - SHEET), above),
          f"just below {threshold:g}": slice(above, above + SHEET)}


def draw(rows: dict[str, Sequence[tuple[np.ndarray, np.ndarray, float]]], threshold: float, title: str, path: str
         ) -> None:
  """Writes a PNG of pairs side by side, with their cosines: red where they do not count as the same.

  Args:
    rows: by their titles, (image [h, w, 3], training image [h, w, 3], cosine) each; at least one.
    threshold: from which on a pair counts as the same.
    title: above all.
    path: where to.
  """
  from matplotlib.figure import Figure  # here: who only reads a configuration waits for it otherwise

  height = 1.25 * len(rows) + 0.4
  figure = Figure(figsize=(1.9 * SHEET, height))
  figure.suptitle(title, size=11, parse_math=False)
  grid = figure.add_gridspec(len(rows), SHEET, left=0.05, right=0.995, top=1 - 0.55 / height, bottom=0.02, hspace=0.35,
                             wspace=0.08)
  for line, (name, pairs) in enumerate(rows.items()):
    for column, (image, trained, cosine) in enumerate(pairs):
      axes = figure.add_subplot(grid[line, column])
      for number, picture in enumerate((image, trained)):
        axes.imshow(picture, extent=(1.02 * number, 1.02 * number + 1, 0, 1), interpolation="nearest")
      axes.set(xlim=(0, 2.02), ylim=(0, 1), xticks=[], yticks=[])
      axes.spines[:].set_visible(False)
      axes.set_title(f"{cosine:.4f}", size=8, pad=2, color="#222222" if cosine >= threshold else "#d62728")
      if not column:
        axes.set_ylabel(textwrap.fill(name, 12), size=8, rotation=0, ha="right", va="center")
  save_figure(figure, path)


def _load(path: str, key: dict[str, Any], count: int) -> tuple[dict[str, Any], str]:
  """Returns (what is saved, or the start if nothing is, or of other data or another model; what is wrong with it)."""
  if not path or not os.path.exists(path):
    return _nothing(count), ""
  try:
    with open(path, encoding="utf-8") as file:
      state = json.load(file)
    if state["key"] != json.loads(json.dumps(key)):
      return _nothing(count), ""
    if state.pop("crc") == _crc(state):
      return state, ""
    why = "its checksum does not fit"
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    why = " ".join(str(error).split())
  return _nothing(count), f"{path} is damaged ({why}); the training data are read again"


def _nothing(count: int) -> dict[str, Any]:
  return {"done": 0, "cosine": [NOTHING] * count, "index": [-1] * count, "damage": []}


def _crc(state: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(state).encode())


def _save(path: str, state: dict[str, Any]) -> None:
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with atomic_write(path) as file:
    json.dump(state | {"crc": _crc(state)}, file)
