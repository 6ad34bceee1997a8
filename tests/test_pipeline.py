"""The pipeline: each record once an epoch, the same stream whatever reads it, clear words for what cannot be read."""

import dataclasses
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest

from limber_jax.config import Data, Source
from limber_jax.config import Tokenizer as TokenizerConfig
from limber_jax.data import transforms
from limber_jax.data.order import shuffled_index
from limber_jax.data.pipeline import Batches, data_fingerprint, eval_batches, train_batches
from limber_jax.data.shared_memory import Receiver
from limber_jax.data.sources.digits import Digits
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.runtime.signals import Interrupted


class Numbers:
  """n records that hold their index."""

  classes = None

  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, index):
    assert 0 <= index < self.n
    return {"id": f"number {index}", "index": index}

  def annotation(self, index):
    return self[index]

  def fingerprint(self):
    return f"{self.n:016x}"


class Draw:
  """Two random numbers, the record's index, and a refusal for those in `bad`."""

  def __init__(self, bad=()):
    self.bad = bad

  def __call__(self, record, rng):
    if record["index"] in self.bad:
      raise UserError("image of 0 bytes cannot be decoded")
    draw = np.zeros(2) if rng is None else rng.random(2)
    return {"draw": draw, "copy": np.int32(record["index"])}


def take(batches, count):
  with batches:
    return [next(batches) for _ in range(count)]


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for key in x:
      assert x[key].dtype == y[key].dtype
      np.testing.assert_array_equal(x[key], y[key])


class TestOrder:

  @pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 63, 64, 65, 100, 1797])
  def test_every_epoch_is_a_permutation(self, n):
    for epoch in (0, 1, 1000):
      assert sorted(shuffled_index(n, 7, epoch * n + i) for i in range(n)) == list(range(n))

  def test_epochs_and_seeds_differ(self):
    orders = {tuple(shuffled_index(50, seed, epoch * 50 + i) for i in range(50))
              for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25

  def test_all_orders_of_four_are_equally_likely(self):
    counts = Counter(tuple(shuffled_index(4, 1, 4 * epoch + i) for i in range(4)) for epoch in range(4800))
    assert len(counts) == 24
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 49.7  # chi-square, 23 degrees of freedom, p = 0.001

  def test_every_record_is_as_likely_everywhere(self):
    counts = np.zeros((40, 40))
    for epoch in range(2000):
      for i in range(40):
        counts[i, shuffled_index(40, 3, 40 * epoch + i)] += 1
    assert ((counts - 50) ** 2 / 50).sum() < 1697  # 39² degrees of freedom, p = 0.001

  def test_neighbours_are_torn_apart(self):
    steps = Counter((shuffled_index(1000, 0, p + 1) - shuffled_index(1000, 0, p)) % 1000 for p in range(20_000))
    assert max(steps.values()) < 60  # of 20 expected

  def test_billions_of_records_need_neither_time_nor_memory(self):
    n = 5 * 10**9
    start = time.perf_counter()
    seen = {shuffled_index(n, 0, 10**14 + p) for p in range(1000)}
    assert len(seen) == 1000 and all(0 <= i < n for i in seen)
    assert time.perf_counter() - start < 2

  def test_the_order_is_the_one_that_earlier_runs_had(self):
    # Runs in progress resume with these numbers: another order needs another name in data_fingerprint.
    assert [shuffled_index(10, 0, p) for p in range(20)] == [2, 1, 5, 4, 6, 3, 7, 9, 0, 8, 3, 6, 7, 5, 2, 8, 1, 4, 9, 0]
    assert [shuffled_index(10**9, 42, p) for p in (0, 1, 10**9, 10**12)] == [643260314, 483047882, 966318656, 716926954]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_record_comes_once_an_epoch_whatever_reads_it(processes, prefetch):
  n, size, steps = 30, 8, 15  # four epochs; batches straddle their ends
  share = size // processes
  streams = [take(train_batches(Numbers(n), Draw(), batch_size=size, rows=np.arange(p * share, (p + 1) * share), seed=3,
                                threads=prefetch, prefetch=prefetch), steps) for p in range(processes)]
  stream = [np.concatenate([s[step]["index"] for s in streams]) for step in range(steps)]
  flat = np.concatenate(stream)
  for epoch in range(4):
    assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
  assert flat.tolist() == [shuffled_index(n, 3, p) for p in range(size * steps)]
  draws = np.concatenate([np.concatenate([s[step]["draw"] for s in streams]) for step in range(steps)])
  np.testing.assert_array_equal(draws, [np.random.default_rng((3, p)).random(2) for p in range(size * steps)])


def exactly_once(n, batch_size, hosts, workers, seeks):
  """Reads an epoch of n records on several hosts, and after each seek a batch; each must be what `order` says."""
  size, steps = batch_size // hosts, -(-n // batch_size)
  wanted = np.array([shuffled_index(n, 11, p) for p in range(steps * batch_size)]).reshape(steps, hosts, size)
  assert sorted(wanted.reshape(-1)[:n].tolist()) == list(range(n))
  slowest = 0.0
  for host in range(hosts):
    def open_at(start, workers, host=host):
      return train_batches(Numbers(n), copied, batch_size=batch_size, rows=np.arange(host * size, (host + 1) * size),
                           seed=11, start_step=start, workers=workers, threads=0 if not workers else 1, prefetch=0)

    for step, batch in enumerate(take(open_at(0, workers), steps)):
      np.testing.assert_array_equal(batch["index"], wanted[step, host])
      np.testing.assert_array_equal(batch["copy"], batch["index"])
    for start in seeks:
      before = time.process_time()  # of this thread, which does all the work; workers take seconds to start
      with open_at(start, 0) as batches:
        batch = next(batches)
        slowest = max(slowest, (time.process_time() - before) / max(1, size / 1000))
      first = start * batch_size + host * size
      assert batch["index"].tolist() == [shuffled_index(n, 11, first + i) for i in range(size)]
  assert slowest < 1  # of a thousand records
  return slowest


def copied(record, rng):
  return {"copy": np.int32(record["index"])}


HOSTS = [1, 2, 4, 8, 16]


@pytest.mark.parametrize("hosts", HOSTS)
def test_any_number_of_hosts_sees_each_record_once_an_epoch(hosts):
  exactly_once(10_007, 400, hosts, 0, (7, 10**6, 10**12))


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("hosts", HOSTS)
def test_a_million_records_come_once_an_epoch_on_any_hosts_and_workers(hosts, workers):
  slowest = exactly_once(1_000_000, 16_000, hosts, workers, (1, 62, 63, 10**6, 10**9))
  print(f"R21: {hosts} hosts, {workers} workers: 1,000,000 of 1,000,000 once; seek at most {slowest:.3f} s")


@pytest.mark.parametrize("rows", [range(100), range(50, 100), range(64), range(3, 40), range(99, 100), range(1, 100, 7),
                                  [0, 1, 6, 7, 90]], ids=str)
def test_rows_of_any_number_are_those_of_the_global_batch(rows):
  whole = take(train_batches(Numbers(1000), Draw(), batch_size=100, rows=np.arange(0, 100), seed=0), 3)
  rows = np.array(rows)
  same(take(train_batches(Numbers(1000), Draw(), batch_size=100, rows=rows, seed=0), 3),
       [{k: v[rows] for k, v in batch.items()} for batch in whole])


@pytest.mark.parametrize("start", [1, 7, 10**9])
def test_a_later_start_gives_the_same_stream(start):
  batches = train_batches(Numbers(30), Draw(), batch_size=8, rows=np.arange(0, 8), seed=1, start_step=start)
  [first] = take(batches, 1)
  assert first["index"].tolist() == [shuffled_index(30, 1, 8 * start + row) for row in range(8)]
  if start < 100:
    whole = take(train_batches(Numbers(30), Draw(), batch_size=8, rows=np.arange(0, 8), seed=1), start + 5)
    resumed = train_batches(Numbers(30), Draw(), batch_size=8, rows=np.arange(0, 8), seed=1, start_step=start)
    same(take(resumed, 5), whole[start:])


def test_a_batch_larger_than_the_data_goes_round_several_times():
  [batch] = take(train_batches(Numbers(3), Draw(), batch_size=64, rows=np.arange(0, 64), seed=0), 1)
  assert sorted(Counter(batch["index"].tolist()).values()) == [21, 21, 22]


@pytest.mark.parametrize("n", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("rows", [None, range(8), range(8, 16), range(1, 16, 3)])
def test_evaluation_passes_once_in_order_and_marks_the_padding(n, rows):
  rows = rows and np.array(rows)
  with eval_batches(Numbers(n), Draw(), batch_size=16, rows=rows) as batches:
    out = list(batches)
  assert len(out) == -(-n // 16)
  for step, batch in enumerate(out):
    positions = step * 16 + (np.arange(16) if rows is None else rows)
    np.testing.assert_array_equal(batch["real"], positions < n)
    np.testing.assert_array_equal(batch["index"], np.minimum(positions, n - 1))
    np.testing.assert_array_equal(batch["copy"], batch["index"])
    assert batch["real"].dtype == bool and batch["index"].dtype == np.int64


def test_two_workers_give_what_threads_give():
  source, transform = Digits(Source(split="test")), transforms.train(32, ByteTokenizer(), 40, "random", (0.9, 1.0))
  streams = [take(train_batches(source, transform, batch_size=96, rows=np.arange(0, 80), seed=0, start_step=2,
                                workers=workers, threads=2), 5) for workers in (0, 2)]
  same(*streams)


def test_digits_arrive_as_arrays_for_the_device():
  source = Digits(Source())
  [batch] = take(train_batches(source, transforms.train(32, ByteTokenizer(), 40, "center", (0.9, 1.0)),
                               batch_size=48, rows=np.arange(0, 48), seed=0), 1)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    "image": ((48, 32, 32, 3), np.uint8), "tokens": ((48, 40), np.int32), "index": ((48,), np.int64),
    "damage": ((48,), np.dtype("<U1"))}
  for index, tokens in zip(batch["index"], batch["tokens"], strict=True):
    assert ByteTokenizer().decode(tokens) == source.annotation(index)["text"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_an_evaluation_cannot_read_is_named(workers):
  with eval_batches(Numbers(30), Draw(bad=(17,)), batch_size=8, workers=workers) as batches:
    for _ in range(2):
      next(batches)
    with pytest.raises(UserError, match=r"Numbers record 17 \(number 17\): image of 0 bytes cannot be decoded"):
      next(batches)


def test_a_source_without_records_and_a_negative_seed_are_reported():
  with pytest.raises(UserError, match="no records"):
    train_batches(Numbers(0), Draw(), batch_size=8, rows=np.arange(0, 8), seed=0)
  with pytest.raises(UserError, match="seed=-1"):
    train_batches(Numbers(9), Draw(), batch_size=8, rows=np.arange(0, 8), seed=-1)
  for rows in ([4, 8], [], [3, 2], [-1, 0]):
    with pytest.raises(ValueError, match="not rows of a batch of 8"):
      train_batches(Numbers(9), Draw(), batch_size=8, rows=np.array(rows, int), seed=0)


def test_no_more_is_read_ahead_than_said():
  counted, lock = [], threading.Lock()

  def count(record, rng):
    with lock:
      counted.append(record["index"])
    return {"copy": np.int32(record["index"])}

  with train_batches(Numbers(10**6), count, batch_size=64, rows=np.arange(64), seed=0, threads=2,
                     prefetch=2) as batches:
    next(batches)
    time.sleep(0.5)
    # one given out, two ready, one waiting for a place, and the pieces of one more being read
    assert 64 * 3 <= len(counted) <= 64 * 5


class Waiting:
  """Batches that never come: a signal does."""

  def __next__(self):
    raise Interrupted

  def close(self):
    pass


def test_a_signal_while_a_batch_is_awaited_is_no_failure_of_a_worker():
  with Batches(Waiting(), Receiver(), workers=1) as batches, pytest.raises(Interrupted):
    next(batches)


def test_closing_ends_threads_and_the_stream():
  before = threading.active_count()
  batches = train_batches(Numbers(100), Draw(), batch_size=8, rows=np.arange(0, 8), seed=0)
  next(batches)
  batches.close()
  batches.close()
  with pytest.raises(StopIteration):
    next(batches)
  deadline = time.monotonic() + 10
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before


@pytest.mark.process
def test_a_script_that_never_closes_ends_without_noise():
  script = """
import numpy as np
from limber_jax.config import Source
from limber_jax.data import pipeline, tokenizers, transforms
from limber_jax.data.sources.digits import Digits
if __name__ == "__main__":
  transform = transforms.train(32, tokenizers.ByteTokenizer(), 40, "center", (0.9, 1.0))
  batches = pipeline.train_batches(Digits(Source()), transform, batch_size=8, rows=np.arange(0, 8), seed=0)
  print(next(batches)["image"].shape)
"""
  done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, "(8, 32, 32, 3)\n", "")


class TestFingerprint:

  def of(self, source=None, data=None, batch_size=8, seed=0, tokenizer=None):
    return data_fingerprint(source or Numbers(5), tokenizer or ByteTokenizer(), data or Data(), batch_size, seed)

  def test_it_changes_with_everything_that_decides_a_batch(self):
    prints = [
      self.of(), self.of(source=Numbers(6)), self.of(batch_size=16), self.of(seed=1), self.of(data=Data(crop="center")),
      self.of(data=Data(crop_scale=(0.5, 1.0))), self.of(data=Data(source=Source(split="test"))),
      self.of(data=Data(source=Source(pairs=True))), self.of(data=Data(source=Source("jsonl"))),
      self.of(data=Data(source=Source("jsonl", text_key="t")))]
    assert len(set(prints)) == len(prints) and all(len(p) == 64 for p in prints)

  def test_it_does_not_change_with_places_and_speed(self):
    table = Source("captions")
    there = dataclasses.replace(table, path="x", images="y", quoting="csv")
    other = Data(source=there, tokenizer=TokenizerConfig(path="z"), workers=3, threads=1, prefetch=9)
    assert self.of(data=other) == self.of(data=Data(source=table))
