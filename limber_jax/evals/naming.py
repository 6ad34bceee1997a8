"""Does a caption name what is in the picture? For images with a class each, as in section 5.2 of arXiv 2209.15162."""

import os
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from limber_jax.config import Evaluation
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Runner
from limber_jax.evals.zeroshot import check_labels, class_names
from limber_jax.generate import row_keys

SHEET = (5, 8)  # rows and columns of the picture


class Naming:
  """Writes a caption for every image and saves captions.png, a sheet of the first 40, in the workdir.

  Returns "right", the share of captions that name the class of their image and no other class; "right@name" of further
  maps; "blind" of the language model without any image; and "count", the number of images. A class is named where its
  words stand in the caption, in any case.
  """

  needs = ("generate",)

  def __init__(self, config: Evaluation, context: Context):
    self._runner = Runner(config, context)
    self._where = f"evaluation 'naming' on data source {config.source.name!r}"
    source = self._runner.source
    if "label" not in source.annotation(0):
      raise UserError(f"{self._where}: its records have no labels; set source.label_key, or choose another evaluation")
    self._classes = class_names(config, source)
    tokenizer = context.tokenizer
    self._before = tokenizer.encode(context.decoding.prompt) if context.decoding.prompt else []

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    out = {}
    for name, function in predict.items():
      if name.startswith("generate"):
        captions, labels = self._captions(name, function, params, stats)
        right = [named(caption, self._classes) == {label} for caption, label in zip(captions, labels, strict=True)]
        out["blind" if name == "generate_blind" else name.replace("generate", "right")] = float(np.mean(right))
        if name == "generate" and jax.process_index() == 0:
          self._draw(captions, right)
    return {**out, "count": float(len(labels))}

  def _captions(self, name, function, params, stats) -> tuple[list[str], np.ndarray]:
    """Returns the caption and the label of every image."""
    tokenizer, decoding = self._runner.context.tokenizer, self._runner.context.decoding
    # Without an image the text must start somewhere: where texts start in training, at the end of another.
    ids = [tokenizer.eot] * (name == "generate_blind") + self._before

    def caption(params, stats, batch):
      rows = len(batch["index"])
      text = {"tokens": jnp.tile(jnp.array([ids or [tokenizer.eot]], jnp.int32), (rows, 1)),
              "mask": jnp.full((rows, max(len(ids), 1)), bool(ids))}
      key = row_keys(jax.random.key(decoding.seed), batch["index"]) if decoding.method == "sample" else None
      generated = function(params, stats, batch | text | ({} if key is None else {"key": key}), tokenizer.eot)
      return {"tokens": generated.tokens, "length": generated.lengths, "label": batch["label"], "index": batch["index"]}

    captions, labels = [], []
    for batch in self._runner.run_source(name, caption, params, stats):
      check_labels(batch["label"], batch["index"], len(self._classes), self._where)
      captions += [tokenizer.decode(t[:n].tolist()).strip()
                   for t, n in zip(batch["tokens"], batch["length"], strict=True)]
      labels += batch["label"].tolist()
    return captions, np.array(labels)

  def _draw(self, captions: Sequence[str], right: Sequence[bool]) -> None:
    source, workdir = self._runner.source, self._runner.context.workdir
    images = [self._runner.transform(source[i], None)["image"] for i in range(min(len(source), SHEET[0] * SHEET[1]))]
    os.makedirs(workdir, exist_ok=True)
    draw(images, captions, right, f"{sum(right)} of {len(right)} captions name what is in the image",
         os.path.join(workdir, "captions.png"))


def named(caption: str, classes: Sequence[str]) -> set[int]:
  """Returns the numbers of the classes whose names stand in a caption as whole words, in any case."""
  return {i for i, name in enumerate(classes)
          if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", caption, re.IGNORECASE)}


def draw(images: Sequence[np.ndarray], captions: Sequence[str], right: Sequence[bool], title: str, path: str) -> None:
  """Writes a PNG: images [h, w, 3] in a grid, each over its caption, which is red where it is not right."""
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
  figure.savefig(f"{path}.tmp", format="png", dpi=110)
  os.replace(f"{path}.tmp", path)
