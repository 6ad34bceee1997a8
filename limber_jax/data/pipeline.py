"""Batches on Grain, in an order that is a pure function of (seed, step).

The position of an example in training is step * batch_size + row. It decides everything: which record (`order`), which
other replaces it where that cannot be read, and which random numbers. So a run resumes at any step, on any number
of processes and workers, with nothing saved but the step.
"""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from limber_jax import config_history
from limber_jax.config import Data
from limber_jax.data import shared_memory
from limber_jax.data.images import ImageOptions
from limber_jax.data.order import TRIES, seed_in_turn, shuffled_index
from limber_jax.data.sources import Source
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.data.transforms import Transform
from limber_jax.data.workers import Watch, sent, start_worker
from limber_jax.errors import UserError

Batch = dict[str, np.ndarray]

PIECE = 32  # examples, at most, that one reading thread prepares at a time and one worker sends at once


class Batches(Iterator[Batch]):
  """This process's rows of one batch after the other. `close()` ends its threads and workers; `with` does so too.

  A worker that was killed, or stopped for STOPPED seconds, is a UserError from next() within 30 s.
  """

  def __init__(self, iterator: Any, join: shared_memory.Receiver, workers: int = 0):
    self._watch = Watch() if workers else None
    self._held = [iterator, join, *([self._watch] if workers else [])]
    # Also when the interpreter ends: Grain's own iterators then fail to close themselves, and say so on the terminal.
    self.close = weakref.finalize(self, _close, self._held)

  def __next__(self) -> Batch:
    if not self._held:
      raise StopIteration
    try:
      return next(self._held[0])
    except (StopIteration, UserError):
      raise
    except Exception as error:
      if self._watch is None:
        raise
      reason = self._watch.describe() or f"a data worker failed: {_describe(error)}"
      raise UserError(f"{reason}; the same command resumes from what was saved last") from error

  def detach(self) -> None:
    """Gives them up without waiting for what is being read, which may never come: that ends with the process."""
    self.close.detach()
    _ABANDONED.append(self._held)
    self._held = []

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()


_ABANDONED: list[list[Any]] = []  # kept, because Grain's iterators wait for their threads when they are collected


def _close(held: list[Any]) -> None:
  while held:
    held.pop(0).close()


def _describe(error: Exception) -> str:
  """Returns an error that nobody expected, on one line, with the place that raised it."""
  frames = traceback.extract_tb(error.__traceback__)
  place = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
  return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def train_batches(source: Source, transform: Transform, *, batch_size: int, rows: np.ndarray, seed: int,
                  start_step: int = 0, workers: int = 0, threads: int = 8, prefetch: int = 2) -> Batches:
  """Returns endless batches of what `transform` gives, stacked, with "index" int64 [b]: the number of the record.

  Where a record cannot be read, the one at the same position in the order of another seed substitutes for it, a
  mixture's from the same member; where that cannot, the next. So batches are full, and which record is where depends
  on seed and position alone. "damage" [b] says which were tried in vain: "", or a JSON list of
  {"index", "id", "reason"}.

  Args:
    source: the records.
    transform: (record, rng) -> arrays; the rng is seeded by (seed, position).
    batch_size: examples in the global batch.
    rows: of the global batch, those to load here, int [b]; see `parallel.local_rows`.
    seed: of the order and of the random numbers.
    start_step: the first batch is that of this step.
    workers: Grain processes that read; 0 reads in this process.
    threads: reading threads a process; 0 reads where the batch is asked for.
    prefetch: batches ready ahead of the caller; one more is being read.

  Raises:
    UserError: there are no records; later, from next(): TRIES records in a row cannot be read, a source raised what is
      no UserError, or a worker is gone.
  """
  if seed < 0:
    raise UserError(f"config.seed={seed}: wanted at least 0")
  examples = _Examples(source, transform, batch_size, rows, seed)
  return _batches(examples, start_step, sys.maxsize // batch_size, workers, threads, prefetch)


def eval_batches(source: Source, transform: Transform, *, batch_size: int, rows: np.ndarray | None = None,
                 indices: np.ndarray | None = None, damage: bool = False, workers: int = 0, threads: int = 8,
                 prefetch: int = 2) -> Batches:
  """Returns one pass in the order of the source, as `train_batches` has it, with "real" bool [b].

  The last batch is filled with the last record, where real is False. The transform gets None for its rng. `rows` None
  means the whole batch. With `indices` int [n] the pass is over these records, in this order.

  With `damage` a record that cannot be read ends nothing: there is "damage" [b], the reason why or "", and where there
  is a reason, real is False and the rest means nothing.
  """
  rows = np.arange(batch_size) if rows is None else rows
  examples = _Examples(source, transform, batch_size, rows, None, indices, damage)
  n = len(source) if indices is None else len(indices)
  return _batches(examples, 0, -(-n // batch_size), workers, threads, prefetch)


def data_fingerprint(source: Source, tokenizer: Tokenizer, data: Data, batch_size: int, seed: int,
                     pixels: dict[str, Any] | None = None, *, earlier: bool = False,
                     ignored: dict[str, Any] | None = None) -> str:
  """Returns 64 hex digits that change with anything that decides what the batch of a step holds.

  Where the data and the tokenizer are kept does not count, nor how they are read. With `earlier` they are those of the
  first runs, all of CLIP, whose texts' length is the model's: there was no `data.length`. Runs of then also counted
  what their source did not read, `ignored`.
  """
  settings = dataclasses.asdict(data)
  for name in ("workers", "threads", "prefetch", "features", "max_bad_fraction", "repeat"):
    del settings[name]
  del settings["formats"], settings["exif"]
  settings |= ImageOptions.from_config(data).changes()
  # As earlier releases called them; runs of before there was a fast decoding had nothing for it.
  settings["crop"] = {"encoder": "own"}.get(data.crop, data.crop)
  settings |= {"draft": True} if settings.pop("jpeg_fast_decode") else {}
  settings["source"] = config_history.source_before(settings["source"]) | (ignored or {})
  for name in ("path", "images", "key_dot", "incomplete", "quoting"):  # the last three show in the records, if anywhere
    del settings["source"][name]
  del settings["tokenizer"]["path"]
  if pixels:  # what `Task.pixel_settings` returns
    settings["pixels"] = pixels
  if earlier:
    del settings["length"]
  what = [source.fingerprint(), tokenizer.fingerprint(), settings, batch_size, seed]
  return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


class Unreadable(NamedTuple):
  """A record that cannot be read."""

  index: int
  id: str  # "" where it is not known
  reason: str


@dataclass(frozen=True)
class _Examples:
  """What stands at a piece of the stream: piece p is part p % parts of this process's rows of step p // parts."""

  source: Source
  transform: Transform
  batch_size: int
  rows: np.ndarray  # int [b], sorted
  seed: int | None  # None: in order, once
  indices: np.ndarray | None = None  # where in order: of the records to take; None: all
  damage: bool = False               # where in order: say what cannot be read, and go on

  def __post_init__(self):
    if not len(self.source):
      raise UserError("the data source has no records")
    if not len(self.rows) or self.rows[0] < 0 or self.rows[-1] >= self.batch_size or (np.diff(self.rows) < 1).any():
      raise ValueError(f"rows {self.rows} are not rows of a batch of {self.batch_size} in their order")

  @property
  def count(self) -> int:
    """The number of local rows."""
    return len(self.rows)

  @property
  def piece(self) -> int:
    """The number of examples in a piece: the largest part of the local rows up to PIECE."""
    return next(k for k in range(min(PIECE, self.count), 0, -1) if self.count % k == 0)

  @property
  def parts(self) -> int:
    return self.count // self.piece

  def __call__(self, number: int) -> Batch:
    step, part = divmod(int(number), self.parts)
    rows = self.rows[part * self.piece : (part + 1) * self.piece]
    return _stack([self._example(step * self.batch_size + row) for row in rows.tolist()])

  def _example(self, position: int) -> dict[str, Any]:
    return self._eval_example(position) if self.seed is None else self._train_example(position)

  def _train_example(self, position: int) -> dict[str, Any]:
    """Returns what stands at a position in training, or what substitutes for it."""
    n, own = len(self.source), getattr(self.source, "shuffled_index", None)  # a mixture's, which keeps shares
    damage: dict[int, Unreadable] = {}
    for turn in range(TRIES):
      seed = seed_in_turn(self.seed, turn)
      index = own(seed, position) if own else shuffled_index(n, seed, position)
      if index in damage:
        continue
      found = self._read(index, np.random.default_rng((self.seed, position)))
      if not isinstance(found, Unreadable):
        return found | {"damage": np.str_(json.dumps([d._asdict() for d in damage.values()]) if damage else "")}
      damage[index] = found
    raise UserError(f"none of {TRIES} tries gave a record that can be read; {self._line(next(iter(damage.values())))}")

  def _eval_example(self, position: int) -> dict[str, Any]:
    """Returns what stands at a position of a pass in order."""
    n = len(self.source) if self.indices is None else len(self.indices)
    index = min(position, n - 1)
    index = index if self.indices is None else int(self.indices[index])
    found = self._read(index, None)
    if not isinstance(found, Unreadable):
      return found | {"real": np.bool_(position < n)} | ({"damage": np.str_()} if self.damage else {})
    if not self.damage:
      raise UserError(self._line(found))
    return self._blank(index) | {"real": np.bool_(False), "damage": np.str_(found.reason), "index": np.int64(index)}

  def _read(self, index: int, rng: np.random.Generator | None) -> dict[str, Any] | Unreadable:
    """Returns what the transform gives of a record; raises UserError where anything but damage is in the way."""
    record: dict[str, Any] = {}
    try:
      record = self.source[index]
      return self.transform(record, rng) | {"index": np.int64(index)}
    except UserError as error:
      return Unreadable(index, str(record.get("id") or self._id(index)), str(error))
    except Exception as error:  # a defect of the source: what is damaged is a UserError
      raise UserError(self._line(Unreadable(index, str(record.get("id", "")), _describe(error)))) from error

  def _id(self, index: int) -> str:
    """Returns the id of a record whose image cannot be read, "" if nothing of it can."""
    try:
      return self.source.annotation(index)["id"]
    except UserError:
      return ""

  def _line(self, damage: Unreadable) -> str:
    name = f" ({damage.id})" if damage.id else ""
    return f"{type(self.source).__name__} record {damage.index}{name}: {damage.reason}"

  def _blank(self, index: int) -> dict[str, Any]:
    """Returns what substitutes for a record: its annotation, or else the first that can be read, with a black image."""
    for number in (index, *range(len(self.source))):
      try:
        return self.transform(self.source.annotation(number) | {"image": np.zeros((1, 1, 3), np.uint8)}, None)
      except UserError:
        continue
    raise UserError(f"{type(self.source).__name__}: no record can be read, of {len(self.source):,}")


def _stack(examples: Sequence[dict[str, Any]]) -> Batch:
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def _batches(examples: _Examples, start: int, stop: int, workers: int, threads: int, prefetch: int) -> Batches:
  """Reads pieces in parallel and joins them: whole batches would let a thread hold one each, single examples would
  each cross from a worker on its own."""
  parts = examples.parts
  pieces = grain.MapDataset.range(start * parts, stop * parts).map(examples).map(sent)
  ahead = -(-parts // max(workers, 1))  # in all processes together one batch, besides those in `prefetch`
  read = max(threads, ahead) if threads else 0
  stream = pieces.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read))
  if workers:
    shared_memory.check_room(workers)
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which only commands parse
    # For what was read, is on its way, and is being joined.
    begin = functools.partial(start_worker, slots_=read + 2 * ahead + 2)
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead),
                                begin)
  join = shared_memory.Receiver()
  iterator = iter(ThreadPrefetchIterDataset(stream.batch(parts, batch_fn=join), prefetch_buffer_size=prefetch))
  if prefetch:  # Grain would start even without it, and read on for ever
    iterator.start_prefetch()
  return Batches(iterator, join, workers)
