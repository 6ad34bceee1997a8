"""Batches on Grain, in an order that is a pure function of (seed, step).

The position of an example in training is step * batch_size + row. It decides everything: which record (`order`) and
which random numbers. So a run goes on at any step, on any number of processes and workers, with nothing saved but the
step.
"""

import dataclasses
import functools
import hashlib
import json
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset

from limber_jax.config import Data
from limber_jax.data.sources import Source
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.data.transforms import Transform
from limber_jax.errors import UserError

Batch = dict[str, np.ndarray]

PIECE = 32  # examples, at most, that one reading thread prepares at a time and one worker sends at once
_ROUNDS = 6
_64 = (1 << 64) - 1


def order(n: int, seed: int, position: int) -> int:
  """Returns the index of the record at a position of the endless training stream.

  Each epoch of n positions visits every record once, in a permutation of its own: a Feistel network over the least
  power of four that holds n, walked until it lands below n. It needs no memory, whatever n is. (Grain's own shuffle
  walks over at least 2^16 numbers: 67 ms a record where n = 2, measured with 0.2.18.)

  Args:
    n: number of records.
    seed: at least 0.
    position: at least 0.
  """
  epoch, x = divmod(position, n)
  half = max(3, ((n - 1).bit_length() + 1) // 2)  # bits; fewer than 3 shuffle poorly
  mask = (1 << half) - 1
  while True:
    left, right = x >> half, x & mask
    for key in _round_keys(seed, epoch):
      mixed = (right + key) & _64  # splitmix64's output function
      mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _64
      mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _64
      left, right = right, left ^ (mixed >> 32 & mask)
    x = left << half | right
    if x < n:
      return x


@functools.lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
  entropy = np.random.SeedSequence((seed, epoch), spawn_key=(1,))  # apart from the random numbers of examples
  return tuple(entropy.generate_state(_ROUNDS, np.uint64).tolist())


class Batches(Iterator[Batch]):
  """This process's rows of one batch after the other. `close()` ends its threads and workers; `with` does so too."""

  def __init__(self, iterator: Any):
    self._held = [iterator]
    # Also when the interpreter ends: Grain's own iterators then fail to close themselves, and say so on the terminal.
    self.close = weakref.finalize(self, _close, self._held)

  def __next__(self) -> Batch:
    if not self._held:
      raise StopIteration
    return next(self._held[0])

  def __enter__(self) -> "Batches":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()


def _close(held: list[Any]) -> None:
  while held:
    held.pop().close()


def train_batches(source: Source, transform: Transform, *, batch_size: int, rows: slice, seed: int, start_step: int = 0,
                  workers: int = 0, threads: int = 8, prefetch: int = 2) -> Batches:
  """Returns endless batches of what `transform` gives, stacked, with "index" int64 [b]: the number of the record.

  Args:
    source: the records.
    transform: (record, rng) -> arrays; the rng is seeded by (seed, position).
    batch_size: examples in the global batch.
    rows: of the global batch, those to load here: b = stop - start.
    seed: of the order and of the random numbers.
    start_step: the first batch is that of this step.
    workers: Grain processes that read; 0 reads in this process.
    threads: reading threads a process; 0 reads where the batch is asked for.
    prefetch: batches ready ahead of the caller; one more is being read.

  Raises:
    UserError: there are no records; later, from next(): a record cannot be read.
  """
  if seed < 0:
    raise UserError(f"config.seed={seed}: wanted at least 0")
  examples = _Examples(source, transform, batch_size, rows, seed)
  return _batches(examples, start_step, sys.maxsize // batch_size, workers, threads, prefetch)


def eval_batches(source: Source, transform: Transform, *, batch_size: int, rows: slice | None = None,
                 indices: np.ndarray | None = None, damage: bool = False, workers: int = 0, threads: int = 8,
                 prefetch: int = 2) -> Batches:
  """Returns one pass in the order of the source, as `train_batches` has it, with "real" bool [b].

  The last batch is filled with the last record, where real is False. The transform gets None for its rng. `rows` None
  means the whole batch. With `indices` int [n] the pass is over these records, in this order.

  With `damage` a record that cannot be read ends nothing: there is "damage" [b], the reason why or "", and where there
  is a reason, real is False and the rest means nothing.
  """
  examples = _Examples(source, transform, batch_size, rows or slice(0, batch_size), None, indices, damage)
  n = len(source) if indices is None else len(indices)
  return _batches(examples, 0, -(-n // batch_size), workers, threads, prefetch)


def data_fingerprint(source: Source, tokenizer: Tokenizer, data: Data, batch_size: int, seed: int) -> str:
  """Returns 64 hex digits that change with anything that decides what the batch of a step holds; see `order`.

  Where the data and the tokenizer are kept does not count, nor how they are read.
  """
  settings = dataclasses.asdict(data)
  for name in ("workers", "threads", "prefetch", "features"):
    del settings[name]
  del settings["source"]["path"], settings["source"]["images"], settings["tokenizer"]["path"]
  what = [source.fingerprint(), tokenizer.fingerprint(), settings, batch_size, seed]
  return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Examples:
  """What stands at a piece of the stream: piece p is part p % parts of this process's rows of step p // parts."""

  source: Source
  transform: Transform
  batch_size: int
  rows: slice
  seed: int | None  # None: in order, once
  indices: np.ndarray | None = None  # where in order: of the records to take; None: all
  damage: bool = False               # where in order: say what cannot be read, and go on

  def __post_init__(self):
    if not len(self.source):
      raise UserError("the data source has no records")
    if not 0 <= self.rows.start < self.rows.stop <= self.batch_size:
      raise ValueError(f"{self.rows} is not within a batch of {self.batch_size}")

  @property
  def count(self) -> int:
    """The number of local rows."""
    return self.rows.stop - self.rows.start

  @property
  def piece(self) -> int:
    """The number of examples in a piece: the largest part of the local rows up to PIECE."""
    return next(k for k in range(min(PIECE, self.count), 0, -1) if self.count % k == 0)

  @property
  def parts(self) -> int:
    return self.count // self.piece

  def __call__(self, number: int) -> Batch:
    step, part = divmod(int(number), self.parts)
    start = step * self.batch_size + self.rows.start + part * self.piece
    return _stack([self._example(position) for position in range(start, start + self.piece)])

  def _example(self, position: int) -> dict[str, Any]:
    n = len(self.source) if self.indices is None else len(self.indices)
    if self.seed is None:
      index, rng, extra = min(position, n - 1), None, {"real": np.bool_(position < n)}
      index = index if self.indices is None else int(self.indices[index])
    else:
      own = getattr(self.source, "order", None)  # a mixture's, which keeps shares
      index = own(self.seed, position) if own else order(n, self.seed, position)
      rng, extra = np.random.default_rng((self.seed, position)), {}
    record = {}
    try:
      record = self.source[index]
      if self.damage:
        extra["damage"] = np.str_()
      return {**self.transform(record, rng), **extra, "index": np.int64(index)}
    except UserError as error:
      if self.damage:
        return {**self._blank(index), "real": np.bool_(False), "damage": np.str_(error), "index": np.int64(index)}
      name = f" ({record['id']})" if record else ""
      raise UserError(f"{type(self.source).__name__} record {index}{name}: {error}") from error

  def _blank(self, index: int) -> dict[str, Any]:
    """Returns what stands in for a record: its annotation, or else the first that can be read, with a black image."""
    for number in (index, *range(len(self.source))):
      try:
        return self.transform(self.source.annotation(number) | {"image": np.zeros((1, 1, 3), np.uint8)}, None)
      except UserError:
        continue
    raise UserError(f"{type(self.source).__name__}: no record can be read, of {len(self.source):,}")


def _stack(examples: Sequence[dict[str, Any]]) -> Batch:
  return {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def _join(pieces: Sequence[Batch]) -> Batch:
  return {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}


def _batches(examples: _Examples, start: int, stop: int, workers: int, threads: int, prefetch: int) -> Batches:
  """Reads pieces in parallel and joins them: whole batches would let a thread hold one each, single examples would
  each cross from a worker on its own."""
  parts = examples.parts
  pieces = grain.MapDataset.range(start * parts, stop * parts).map(examples)
  ahead = -(-parts // max(workers, 1))  # in all processes together one batch, besides those in `prefetch`
  stream = pieces.to_iter_dataset(grain.ReadOptions(
    num_threads=threads, prefetch_buffer_size=max(threads, ahead) if threads else 0))
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl's flags, which only commands parse
    stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead))
  iterator = iter(ThreadPrefetchIterDataset(stream.batch(parts, batch_fn=_join), prefetch_buffer_size=prefetch))
  if prefetch:  # Grain would start even without it, and read on for ever
    iterator.start_prefetch()
  return Batches(iterator)
