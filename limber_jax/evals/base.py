"""What an evaluation is, how data go through a model on a mesh, and how ranks are counted."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from limber_jax import config_history
from limber_jax.config import Decoding, Evaluation
from limber_jax.config_json import flatten
from limber_jax.data import pipeline
from limber_jax.data.contents import contents as contents_of
from limber_jax.data.contents import of_list
from limber_jax.data.images import PLAIN, ImageOptions
from limber_jax.data.sources import Source
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.data.transforms import Transform
from limber_jax.errors import UserError
from limber_jax.evals.grouped import by_image
from limber_jax.evals.result_store import Results, ResultStore
from limber_jax.runtime.parallel import (
  allgather_objects,
  broadcast_from_process_0,
  global_batch,
  global_flags,
  local_rows,
  replicated,
)
from limber_jax.runtime.signals import Interrupted

CHUNK = 2**24  # scores held at a time: 64 MB
NAMED = 20     # damaged examples that `Runner.metadata` names

# What of an Evaluation changes no result of an example, or changes its data, whose fingerprint is looked at instead.
_NOT_IN_KEY = ("every", "max_bad_fraction", "metrics", "source.path", "source.images", "train.path", "train.images",
               "validation.path", "validation.images", "scorer", "scorer_model")


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
  workdir: str                              # where pictures and tables go
  stop: Callable[[], bool] = lambda: False  # asked between batches; several processes must get the same answer
  # Entered while a batch is awaited: raises signals.Interrupted when asked to stop, where one process alone decides.
  waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
  workers: int = 0                          # Grain processes that read; 0 reads in threads
  threads: int = 8                          # reading threads a process
  name: str = ""                            # of the evaluation, in the experiment
  results_dir: str = ""                     # directory where results of examples are kept; "" keeps none
  key: dict[str, Any] = field(default_factory=dict)  # what they depend on beside evaluation and data, plain JSON
  images: ImageOptions = PLAIN              # which image files are read, and which way up


class Eval(Protocol):
  """An `Evaluation` with open data: what `predict` holds is jitted at the first call and kept for the next ones."""

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    """Returns metrics by name ({"top1": 0.63, …}), the same in every process; raises Stopped."""

  def metadata(self) -> dict[str, Any]:
    """Returns what the metrics of the last call rest on, plain JSON: `Runner.metadata` and more of the protocol."""


class Runner:
  """Sends data through pure functions on the mesh: each jitted once, results whole in every process."""

  def __init__(self, config: Evaluation, context: Context, *, grouped: bool = False):
    """Opens the source; raises UserError if it cannot, or if the batch does not divide over the devices.

    With `grouped` its records are by image, as `grouped.by_image` has them.
    """
    self.config, self.context = config, context
    self.source: Source = config.source.open()
    # Looked at when the data are opened, and not when results are kept: what is changed in between shows next time.
    look = partial(contents_of, self.source, config.source)
    self.contents = broadcast_from_process_0(look) if context.results_dir else ""
    self._lists = {name: found for name in config.files if (found := of_list(getattr(config, name)))}
    self.source = by_image(self.source) if grouped else self.source
    for note in getattr(self.source, "notes", ()):
      self._say(note)
    if not len(self.source):
      raise UserError(f"evaluation {config.name!r}: data source {config.source.name!r} has no records")
    self.transform = context.transform
    self._batch_size = config.batch_size
    self._rows = local_rows(config.batch_size, context.mesh)  # of a batch that this process loads
    self._jitted: dict[str, Callable[..., Any]] = {}
    # What cannot be used: of the annotations, known at once; of the images, found in the first pass.
    self._damage: list[str] = []
    self._damaged: set[int] = set()  # numbers of records
    for d in getattr(self.source, "damage", ()):
      self._name(f"{d['file']}: {d['id']}: {d['reason']}")
    self._annotations = len(self._damage)
    self._check()

  def collect(self, name: str, function: Callable[..., dict], params: dict, stats: dict, *,
              record: Callable[[dict[str, np.ndarray]], dict[str, Any]] = lambda row: {},
              keep: Sequence[str] = (), shared: bool = False, program: str = "") -> Results:
    """Returns what a function gives of each record, in order; what was found before a kill is not computed again.

    Args:
      name: of what is collected, such as "generate@random".
      function: (params, stats, batch) -> arrays [B, ...] by name, pure. The batch is what the transform gives, stacked,
        and "index" int32 [B].
      params: on the mesh, or numpy arrays.
      stats: likewise.
      record: one example's arrays -> what is kept of it, plain JSON.
      keep: names of arrays that are kept as they are, in float32.
      shared: the results depend on no setting of the evaluation but its data, and other evaluations may take them.
      program: what function computes, `name` if ""; functions of one program are jitted once.

    Raises:
      UserError: more than config.max_bad_fraction of the examples cannot be read; the message names the first.
      Stopped: between two batches, the run was asked to end.
    """
    n, size, context = len(self.source), self._batch_size, self.context
    key = self._key(name, shared)
    results = ResultStore(self._path(name, key, shared), key, size, n, keep, shared=shared)
    self._recheck(results)

    def run(params, stats, batch):
      return batch.pop("real"), function(params, stats, batch)

    try:
      with self._progress(name, n, results.done) as bar, pipeline.eval_batches(
          self.source, self.transform, batch_size=size, rows=self._rows, indices=np.arange(results.done, n),
          damage=True, workers=context.workers, threads=context.threads) as batches:
        while results.done < n:
          batch = self._next(batches)
          reasons = batch.pop("damage")
          batch["index"] = batch["index"].astype(np.int32)
          local = dict(zip(batch["index"].tolist(), reasons.tolist(), strict=True))
          real, out = self._call(program or name, run, params, stats, batch)
          first, count = results.done, min(size, n - results.done)
          lines = {}
          if not real[:count].all():
            for part in allgather_objects([[i, reason] for i, reason in local.items() if reason]):
              lines |= {i: {"index": i, "id": self._id(i), "reason": reason} for i, reason in part}
          for row in np.flatnonzero(real[:count]).tolist():
            found = record({k: v[row] for k, v in out.items()})
            lines[first + row] = {"index": first + row, "id": self._id(first + row), **found}
          results.append([lines[i] for i in sorted(lines)], {k: out[k][:count][real[:count]] for k in keep})
          for line in lines.values():
            if "reason" in line:
              self._found(line)
          bar.update(count)
    finally:
      results.close()
    return results.collected()

  def metadata(self) -> dict[str, Any]:
    """Returns {"source", "split", "data": digest, "num_examples", "covered", "damaged", "damage": [the first few]}."""
    total, damaged = len(self.source) + self._annotations, len(self._damage)
    return {"source": self.config.source.name, "split": self.config.source.split, "data": self.source.fingerprint(),
            "num_examples": total, "covered": total - damaged, "damaged": damaged,
            "damage": self._damage[:NAMED]}

  def _recheck(self, results: ResultStore) -> None:
    """Takes results that were kept for what they are: what could not be read then may be there by now."""
    if results.flaw:
      self._say(results.flaw)
    try:
      if (back := self.readable([line["index"] for line in results.collected().damage])) is not None:
        results.cut(back)
    except BaseException:
      results.close()
      raise
    for line in results.collected().damage:
      self._found(line)

  def readable(self, indices: Sequence[int]) -> int | None:
    """Returns the first of these records that can be read, None where none of them can; raises Stopped."""
    broken: set[int] = set()
    with contextlib.ExitStack() as stack:
      batches = stack.enter_context(pipeline.eval_batches(
        self.source, self.transform, batch_size=self._batch_size, rows=self._rows, indices=np.array(indices, np.int64),
        damage=True, workers=self.context.workers, threads=self.context.threads)) if indices else None
      for _ in range(0, len(indices), self._batch_size):
        if self.context.stop():
          raise Stopped
        batch = self._next(batches)
        own = [int(i) for i, reason in zip(batch["index"], batch["damage"], strict=True) if reason]
        broken.update(i for part in allgather_objects(own) for i in part)
    return min(set(indices) - broken, default=None)

  def _id(self, index: int) -> str:
    try:
      return self.source.annotation(index)["id"]
    except UserError:
      return f"record {index}"

  def _found(self, line: dict[str, Any]) -> None:
    """Names and counts a damaged record, once."""
    if line["index"] not in self._damaged:
      self._damaged.add(line["index"])
      self._name(f"{line['id']}: {line['reason']}")
      self._check()

  def _name(self, what: str) -> None:
    self._damage.append(what)
    self._say(what)

  def _say(self, what: str) -> None:
    if jax.process_index() == 0:
      print(f"{self.context.name or self.config.name}: {what}", file=sys.stderr, flush=True)

  def _check(self) -> None:
    total, damaged = len(self.source) + self._annotations, len(self._damage)
    if damaged > self.config.max_bad_fraction * total:
      name = self.context.name or self.config.name
      raise UserError(f"evaluation {name!r}: {damaged} of {total} examples cannot be used, more than its "
                      f"`max_bad_fraction` of {self.config.max_bad_fraction:.1%} allows; the first: {self._damage[0]}")

  def _key(self, name: str, shared: bool) -> dict[str, Any]:
    """Returns all that results of the function depend on."""
    settings = config_history.sources(flatten(self.config), config_history.source_before)
    settings = {k: v for k, v in settings.items() if k not in _NOT_IN_KEY}
    settings = {"batch_size": self.config.batch_size} if shared else settings | {"lists": self._lists}
    return {"function": name, "data": self.source.fingerprint(), "contents": self.contents, **settings,
            **self.context.key}

  def _path(self, name: str, key: dict[str, Any], shared: bool) -> str:
    """Returns where the results are kept, "" for nowhere."""
    directory = self.context.results_dir
    if directory and shared:
      digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
      directory = os.path.join(os.path.dirname(directory), f"shared-{digest}")
    return directory and os.path.join(directory, f"{name}.jsonl")

  def _progress(self, name: str, total: int, done: int) -> tqdm:
    hidden = jax.process_index() > 0 or not self.context.results_dir
    return tqdm(total=total, initial=done, desc=f"{self.context.name} {name}", unit=" examples", dynamic_ncols=True,
                disable=True if hidden else None)  # None: where stderr is no terminal

  def embed_rows(self, name: str, embed: Callable[..., Any], params: dict, stats: dict, rows: np.ndarray) -> np.ndarray:
    """Returns float32 [n, E] of all `rows` [n, ...], which every process holds.

    Args:
      name: of what `embed` gives; functions of one name are jitted once.
      embed: (params, stats, [B, ...]) -> [B, E].
      params: on the mesh, or numpy arrays.
      stats: likewise.
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

  def _next(self, batches: pipeline.Batches) -> pipeline.Batch:
    """Returns the next batch; raises Stopped when asked to, also where it never comes; of several Interrupted there."""
    try:
      with self.context.waiting():
        return next(batches)
    except Interrupted:
      batches.detach()
      if jax.process_count() > 1:  # the others wait in a collective, and cannot be asked
        raise
      raise Stopped from None

  def _call(self, name, function, params, stats, local):
    """Returns function(params, stats, batch) of this process's rows, whole; "real" is what all who hold a row say."""
    mesh, real = self.context.mesh, {}
    if self.context.stop():
      raise Stopped
    if isinstance(local, dict):
      real, local = {"real": local["real"]}, {k: v for k, v in local.items() if k != "real"}
    if name not in self._jitted:
      def run(params, stats, batch, flags):
        return function(params, stats, batch | {k: v.all(axis=1) for k, v in flags.items()} if flags else batch)

      self._jitted[name] = jax.jit(run, out_shardings=replicated(mesh))
    with jax.set_mesh(mesh):
      return jax.device_get(self._jitted[name](params, stats, global_batch(local, mesh), global_flags(real, mesh)))


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
