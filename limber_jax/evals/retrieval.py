"""Retrieval between images and their captions, both ways. Source: arXiv 2103.00020, E.1, and CLIP_benchmark."""

from collections.abc import Callable
from typing import Any

import numpy as np

from limber_jax.config import Evaluation
from limber_jax.evals.base import Context, Runner, ranks

DEPTHS = (1, 5, 10)


class Retrieval:
  """Recall at 1, 5 and 10: "i2t_r1", …, "t2i_r10", with the numbers of "images" and "captions".

  i2t: the share of images with at least one of their captions among the first k of all captions. t2i: the share of
  captions whose image is among the first k of all images. Captions of the same words are different captions: another
  image's is a wrong answer. Equal scores are ordered as the data are, the earlier first. A recall that could not fail,
  with no more than k to choose from, is left out.

  An image is a record: of data source "captions", split=images gives an image all its captions.
  """

  needs = ("embed_image", "embed_text")

  def __init__(self, config: Evaluation, context: Context):
    self._runner = Runner(config, context)
    records = map(self._runner.source.annotation, range(len(self._runner.source)))
    texts = [r.get("texts", (r["text"],)) for r in records]
    self._owner = np.repeat(np.arange(len(texts)), [len(t) for t in texts])  # [captions]: the image of each
    tokens = context.tokenizer([t for several in texts for t in several], context.length)
    # Captions of the same tokens are embedded once: the rounding differs between rows of a batch, and ties would break.
    self._tokens, self._which = np.unique(tokens, axis=0, return_inverse=True)

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    text = self._runner.embed_rows("text", predict["embed_text"], params, stats, self._tokens)
    batches = self._runner.embed_source(predict["embed_image"], params, stats)
    image = np.concatenate([batch["embedding"] for batch in batches])
    return recalls(image, text[self._which.reshape(-1)], self._owner)


def recalls(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """Returns the figures of `Retrieval` of embeddings [N, E] and [M, E], and the image int [M] of each caption."""
  number = np.arange(len(image))
  ways = {"i2t": (ranks(image, number, text, owner), len(text)), "t2i": (ranks(text, owner, image, number), len(image))}
  figures = {f"{way}_r{k}": float(np.mean(rank < k)) for way, (rank, of) in ways.items() for k in DEPTHS if k < of}
  return figures | {"images": float(len(image)), "captions": float(len(text))}
