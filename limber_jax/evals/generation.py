"""Texts about the images of a data source, written by a model: what the evaluations of captions start from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.decoding.generate import row_keys
from limber_jax.evals.base import Runner
from limber_jax.evals.result_store import Results
from limber_jax.map_names import BLIND, split


def map_of(name: str) -> str:
  """Returns the name of the map that a function of task.predict() writes by: "generate@NAME" -> "NAME", or BLIND."""
  return BLIND if name == "generate_blind" else split(name)[1]


class CaptionGenerator:
  """Writes a caption for every image of a runner's source, as its context's decoding says."""

  def __init__(self, runner: Runner):
    self._runner = runner
    tokenizer, decoding = runner.context.tokenizer, runner.context.decoding
    self._before = tokenizer.encode(decoding.prompt) if decoding.prompt else []

  def __call__(self, name: str, function: Callable[..., Any], params: dict, stats: dict) -> Results:
    """Returns records {"index", "id", "caption", "ended"}, "label" too where there are labels.

    "ended" says whether the model ended the caption by itself.

    Args:
      name: "generate", "generate@NAME" or "generate_blind".
      function: what task.predict() has by that name.
      params, stats: on the mesh, or numpy arrays.

    Raises:
      UserError, Stopped: as of Runner.collect.
    """
    tokenizer, decoding = self._runner.context.tokenizer, self._runner.context.decoding
    # Without an image the text must start somewhere: where texts start in training, at the end of another.
    ids = [tokenizer.eot] * (name == "generate_blind") + self._before

    def write(params, stats, batch):
      rows = len(batch["index"])
      text = {"tokens": jnp.tile(jnp.array([ids or [tokenizer.eot]], jnp.int32), (rows, 1)),
              "mask": jnp.full((rows, max(len(ids), 1)), bool(ids))}
      key = row_keys(jax.random.key(decoding.seed), batch["index"]) if decoding.method == "sample" else None
      generated = function(params, stats, batch | text | ({} if key is None else {"key": key}), tokenizer.eot)
      labels = {"label": batch["label"]} if "label" in batch else {}
      return {"tokens": generated.tokens, "length": generated.lengths, **labels}

    def record(row: dict[str, np.ndarray]) -> dict[str, Any]:
      tokens, length = row["tokens"].tolist(), int(row["length"])
      labels = {"label": int(row["label"])} if "label" in row else {}
      return {"caption": tokenizer.decode(tokens[:length]).strip(), "ended": length < len(tokens), **labels}

    return self._runner.collect(name, write, params, stats, record=record, shared=True)
