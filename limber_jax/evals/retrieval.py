"""Retrieval between images and their captions, both ways. Source: arXiv 2103.00020, E.1, and CLIP_benchmark."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from limber_jax.config import Evaluation
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner, ranks

DEPTHS = (1, 5, 10)


@dataclasses.dataclass
class Retrieval(Evaluation):
  """Recall at 1, 5 and 10: "i2t_r1", …, "t2i_r10", with the numbers of "images" and "captions" that they cover.

  i2t: the share of images with at least one of their captions among the first k of all captions. t2i: the share of
  captions whose image is among the first k of all images. Captions of the same words are different captions: another
  image's is a wrong answer. Equal scores are ordered as the data are, the earlier first. A recall that could not fail,
  with no more than k to choose from, is left out. An image that cannot be read is left out with all its captions.

  An image is a record; where several records show the same image, as in a table with a row a caption, they are one.
  prompt: CLIP's is "a photo of {}", which is worth one or two points of R@1.
  """

  name = "retrieval"
  needs = ("embed_image", "embed_text")

  # what captions stand in, one sentence with {} for the caption; "" = captions as they are
  prompt: str = ""

  def open(self, context: Context) -> Eval:
    return RetrievalEval(self, context)


class RetrievalEval:
  """A `Retrieval` whose data are open."""

  def __init__(self, config: Retrieval, context: Context):
    self._runner = Runner(config, context, grouped=True)
    if config.prompt and config.prompt.count("{}") != 1:
      raise UserError(f"prompt={config.prompt!r}: retrieval wants one sentence with one {{}} for the caption, such as "
                      "'a photo of {}', or nothing")
    self._prompt = config.prompt or "{}"
    texts = [self._texts(i) for i in range(len(self._runner.source))]
    self._owner = np.repeat(np.arange(len(texts)), [len(t) for t in texts])  # [captions]: the image of each
    if not len(self._owner):
      raise UserError(f"evaluation 'retrieval': data source {config.source.name!r} has no captions")
    tokens = context.tokenizer([self._prompt.replace("{}", t) for several in texts for t in several], context.length)
    # Captions of the same tokens are embedded once: the rounding differs between rows of a batch, and ties would break.
    self._tokens, which = np.unique(tokens, axis=0, return_inverse=True)
    self._which = which.reshape(-1)

  def _texts(self, index: int) -> tuple[str, ...]:
    """Returns the captions of a record, none if it cannot be read: then its image cannot either, and is left out."""
    try:
      record = self._runner.source.annotation(index)
    except UserError:
      return ()
    return record["texts"] if "texts" in record else (record["text"],)

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    def embed(params, stats, batch):
      return {"embedding": predict["embed_image"](params, stats, batch["image"])}

    found = self._runner.collect("embed_image", embed, params, stats, keep=("embedding",), shared=True)
    if not found.records:
      raise UserError("evaluation 'retrieval': none of the images can be read")
    text = self._runner.embed_rows("embed_text", predict["embed_text"], params, stats, self._tokens)
    there = np.isin(self._owner, found.index)  # [captions]
    owner = np.searchsorted(found.index, self._owner[there])
    return recalls(found.arrays["embedding"], text[self._which[there]], owner)

  def metadata(self) -> dict[str, Any]:
    """Returns `Runner.metadata` and "prompt", what captions stand in."""
    return {**self._runner.metadata(), "prompt": self._prompt}


def recalls(image: np.ndarray, text: np.ndarray, owner: np.ndarray) -> dict[str, float]:
  """Returns the metrics of `Retrieval` of embeddings [N, E] and [M, E], and the image int [M] of each caption."""
  number = np.arange(len(image))
  ways = {"i2t": (ranks(image, number, text, owner), len(text)), "t2i": (ranks(text, owner, image, number), len(image))}
  metrics = {f"{way}_r{k}": float(np.mean(rank < k)) for way, (rank, of) in ways.items() for k in DEPTHS if k < of}
  return metrics | {"images": float(len(image)), "captions": float(len(text))}
