"""What an evaluation is, how data go through a model on a mesh, and how ranks are counted."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from limber_jax.config import Decoding, Evaluation
from limber_jax.data import pipeline
from limber_jax.data.sources import Source
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.data.transforms import Transform
from limber_jax.errors import UserError
from limber_jax.parallel import global_batch, local_rows, replicated
from limber_jax.registry import SOURCES, lookup

CHUNK = 2**24  # scores held at a time: 64 MB


class Stopped(Exception):
  """A signal asked the run to end in the middle of an evaluation."""


@dataclass(frozen=True)
class Context:
  """What evaluations share."""

  tokenizer: Tokenizer
  transform: Transform                      # of records, by the task
  length: int                               # T, tokens of a text
  decoding: Decoding                        # of what is generated
  mesh: Mesh
  workdir: str                              # where pictures go
  stop: Callable[[], bool] = lambda: False  # asked between batches; several processes must get the same answer
  workers: int = 0                          # Grain processes that read; 0 reads in threads
  threads: int = 8                          # reading threads a process


class Eval(Protocol):
  """One evaluation of one task: what `predict` holds is jitted at the first call and kept for the next ones."""

  needs: tuple[str, ...]
  """The keys of task.predict() that it uses."""

  def __init__(self, config: Evaluation, context: Context):
    """Opens the data; raises UserError if they are missing or unfit."""
    ...

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    """Returns figures by name ({"top1": 0.63, …}), the same in every process; raises Stopped."""
    ...


class Runner:
  """Sends data through pure functions on the mesh: each jitted once, results whole in every process."""

  def __init__(self, config: Evaluation, context: Context):
    """Opens the source; raises UserError if it cannot, or if the batch does not divide over the devices."""
    self.context = context
    self.source: Source = lookup("data source", SOURCES, config.source.name)(config.source)
    if not len(self.source):
      raise UserError(f"evaluation {config.name!r}: data source {config.source.name!r} has no records")
    self.transform = context.transform
    self._batch_size = config.batch_size
    self._rows = local_rows(config.batch_size, context.mesh)  # of a batch that this process loads
    self._jitted: dict[str, Callable[..., Any]] = {}

  def embed_source(self, embed: Callable[..., Any], params: dict, stats: dict) -> Iterator[dict[str, np.ndarray]]:
    """Yields {"embedding" [b, E], "index" [b], "label" [b] where there are labels}: the source in order.

    Args:
      embed: (params, stats, images [B, H, W, 3]) -> [B, E].
      params, stats: on the mesh, or numpy arrays.

    Raises:
      Stopped: between two batches, the run was asked to end.
    """

    def run(params, stats, batch):
      kept = {k: batch[k] for k in ("index", "label") if k in batch}
      return {"embedding": embed(params, stats, batch["image"]), **kept}

    return self.run_source("source", run, params, stats)

  def run_source(self, name: str, function: Callable[..., dict], params: dict, stats: dict) -> Iterator[dict]:
    """Yields the tree of arrays [b, ...] that function(params, stats, batch) gives of the source, in order.

    Args:
      name: of the function; functions of one name are jitted once.
      function: gets what the transform gives, stacked, and "index" int32 [B]; its results have B rows.
      params, stats: on the mesh, or numpy arrays.

    Raises:
      Stopped: between two batches, the run was asked to end.
    """

    def run(params, stats, batch):
      real = batch.pop("real")
      return real, function(params, stats, batch)

    with pipeline.eval_batches(self.source, self.transform, batch_size=self._batch_size, rows=self._rows,
                               workers=self.context.workers, threads=self.context.threads) as batches:
      for batch in batches:
        batch["index"] = batch["index"].astype(np.int32)
        real, out = self._call(name, run, params, stats, batch)
        yield jax.tree.map(lambda x, real=real: x[real], out)

  def embed_rows(self, name: str, embed: Callable[..., Any], params: dict, stats: dict, rows: np.ndarray) -> np.ndarray:
    """Returns float32 [n, E] of all `rows` [n, ...], which every process holds.

    Args:
      name: of what `embed` gives; functions of one name are jitted once.
      embed: (params, stats, [B, ...]) -> [B, E].
      params, stats: on the mesh, or numpy arrays.
      rows: any number of them.

    Raises:
      Stopped: between two batches, the run was asked to end.
    """
    out = []
    for start in range(0, len(rows), self._batch_size):
      some = rows[start : start + self._batch_size]
      batch = np.concatenate([some, np.repeat(some[:1], self._batch_size - len(some), axis=0)])
      out.append(self._call(name, embed, params, stats, batch[self._rows])[: len(some)])
    return np.concatenate(out)

  def _call(self, name, function, params, stats, local):
    mesh = self.context.mesh
    if self.context.stop():
      raise Stopped
    if name not in self._jitted:
      self._jitted[name] = jax.jit(function, out_shardings=replicated(mesh))
    with jax.set_mesh(mesh):
      return jax.device_get(self._jitted[name](params, stats, global_batch(local, mesh)))


def ranks(queries: np.ndarray, own: np.ndarray, keys: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Returns the rank of each query's best own key among all keys, int64 [Q], 0 the best.

  Keys are sorted by inner product, equal ones by index, the lower first: as argmax and a stable sort have it. What is
  not a number comes last as an own key and first as another's, so a broken model looks like one. At most CHUNK scores
  are held at a time, or those of one query.

  Args:
    queries: float32 [Q, E].
    own: int [Q]: a key is the query's own if its group is this number. A query without own keys ranks last, at K.
    keys: float32 [K, E].
    groups: int [K].
  """
  out = np.empty(len(queries), np.int64)
  index = np.arange(len(keys))
  # Equal keys are multiplied once: in a product of matrices the rounding differs between columns.
  distinct, which = np.unique(keys, axis=0, return_inverse=True)
  chunk = max(1, CHUNK // len(keys))
  for start in range(0, len(queries), chunk):
    rows = slice(start, start + chunk)
    scores = (queries[rows] @ distinct.T)[:, which.reshape(-1)]  # [c, K]
    mine = own[rows, None] == groups[None]
    best = np.where(mine, scores, -np.inf).max(axis=1, keepdims=True)
    ties = scores == best
    first = (mine & ties).argmax(axis=1, keepdims=True)
    out[rows] = np.count_nonzero(~(scores <= best) | (ties & (index < first)), axis=1)
  return out
