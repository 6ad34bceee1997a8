"""A picture of what the two towers agree on: captions against images, as in CLIP's first notebook."""

import dataclasses
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from limber_jax.data.sources import Source
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.prompts import OfPrompts, check_labels, chosen_templates, class_names, ensemble, prompts
from limber_jax.runtime.atomic import save_figure

MAX_ROWS = 16  # rows and columns that can still be read


@dataclasses.dataclass
class Similarity(OfPrompts):
  """Saves similarity.png in the workdir and returns "own": the share of its images that are nearest their own caption.

  Where the records have labels: a class in all templates against the first image of it, for up to 16 classes.
  Elsewhere: the first captions of the first 16 records against their images.
  """

  name = "similarity"
  needs = ("embed_image", "embed_text")

  def open(self, context: Context) -> Eval:
    return SimilarityEval(self, context)


class SimilarityEval:
  """A `Similarity` whose data are open."""

  def __init__(self, config: Similarity, context: Context):
    self._runner = Runner(config, context)
    source, length = self._runner.source, context.length
    if "label" in source.annotation(0):
      names, templates = class_names(config, source), chosen_templates(config.templates, source)
      records = _one_of_each(source, len(names), f"evaluation 'similarity' on data source {config.source.name!r}")
      chosen = [names[c] for c in records]
      self._captions = chosen if len(templates) > 1 else [templates[0].replace("{}", c) for c in chosen]
      self._note = f", each class in {len(templates)} sentences" if len(templates) > 1 else ""
      self._tokens = prompts(context.tokenizer, chosen, templates, length)  # [C, templates, T]
      indices = list(records.values())
    else:
      indices = list(range(min(MAX_ROWS, len(source))))
      self._captions = [source.annotation(i)["text"] for i in indices]
      self._note = ""
      self._tokens = context.tokenizer(self._captions, length)[:, None]  # [C, 1, T]
    self._images = np.stack([self._runner.transform(source[i], None)["image"] for i in indices])

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    text = ensemble(partial(self._runner.embed_rows, "text", predict["embed_text"], params, stats), self._tokens)
    image = self._runner.embed_rows("image", predict["embed_image"], params, stats, self._images)
    cosine = text @ image.T  # [captions, images]
    own = cosine.argmax(axis=0) == np.arange(len(image))
    if jax.process_index() == 0:
      workdir = self._runner.context.workdir
      os.makedirs(workdir, exist_ok=True)
      title = f"Cosine similarity: {own.sum()} of {len(own)} images are nearest their own caption{self._note}"
      draw(cosine, self._captions, self._images, title, os.path.join(workdir, "similarity.png"))
    return {"own": float(own.mean())}

  def metadata(self) -> dict[str, Any]:
    return {**self._runner.metadata(), "num_examples": len(self._images), "covered": len(self._images)}


def _one_of_each(source: Source, classes: int, where: str) -> dict[int, int]:
  """Returns {label: index of its first record}, of up to MAX_ROWS of the classes, in the order of the labels."""
  found: dict[int, int] = {}
  for index in range(len(source)):
    label = source.annotation(index)["label"]
    check_labels(np.array([label]), np.array([index]), classes, where)
    found.setdefault(label, index)
    if len(found) == min(MAX_ROWS, classes):
      break
  return dict(sorted(found.items()))


def draw(cosine: np.ndarray, captions: Sequence[str], images: np.ndarray, title: str, path: str) -> None:
  """Writes a PNG: captions down the side, images along the foot, cosines [captions, images] in the cells.

  The best caption of each image stands in a frame: dark if it is the image's own (the diagonal), else red.
  """
  from matplotlib.figure import Figure  # here: who only reads a configuration waits for it otherwise
  from matplotlib.patches import Rectangle

  n = len(captions)
  figure = Figure(figsize=(0.62 * n, 0.62 * (n + 1.05)))
  axes = figure.add_axes((0, 0, 1, 1))  # what stands outside of it is taken in when saving
  low, high = float(cosine.min()), float(cosine.max())
  # Above the highest cosine the scale goes on, so that the darkest cell still is a background for its number.
  axes.imshow(cosine, cmap="Blues", vmin=low, vmax=high + 0.25 * (high - low))
  for (row, column), value in np.ndenumerate(cosine):
    axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=9,
              color="white" if value > low + 0.7 * (high - low) else "#333333")
  for column, row in enumerate(cosine.argmax(axis=0)):
    axes.add_patch(Rectangle((column - 0.47, row - 0.47), 0.94, 0.94, fill=False, linewidth=1.8,
                             edgecolor="#08306b" if row == column else "#d62728"))
    axes.imshow(images[column], extent=(column - 0.47, column + 0.47, n + 0.51, n - 0.43), interpolation="nearest")
  axes.set(xlim=(-0.5, n - 0.5), ylim=(n + 0.55, -0.5), xticks=[])
  # Names are text, not mathematics, and a script that no font here has is drawn as boxes.
  axes.set_yticks(range(n), [textwrap.fill(textwrap.shorten(c, 64, placeholder=" …"), 34) for c in captions],
                  size=10, parse_math=False)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(textwrap.fill(title, 30 + 6 * n), size=11, pad=10)
  with warnings.catch_warnings(category=UserWarning, action="ignore"):
    save_figure(figure, path, bbox_inches="tight", pad_inches=0.15)
