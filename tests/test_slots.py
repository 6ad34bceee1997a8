"""Arrays on their way from a worker to its parent: the same bytes, in memory that is taken, given back and gone."""

import os
import pickle
import types

import numpy as np
import pytest

from limber_jax.config import Source
from limber_jax.data.pipeline import train_batches
from limber_jax.data.shared_memory import Receiver, Sender, SharedArray
from limber_jax.data.sources.digits import Digits
from limber_jax.errors import UserError


def piece(seed, rows=4):
  rng = np.random.default_rng(seed)
  return {"image": rng.integers(0, 256, (rows, 96, 96, 3), np.uint8), "features": rng.random((rows, 5000), np.float32),
          "index": np.arange(rows), "text": np.array(["a"] * rows)}


def sent(sender, arrays):
  """Returns what a sender made of arrays, as it arrives, and the names of what lies in slots."""
  out = pickle.loads(pickle.dumps(sender(arrays)))
  return out, {k for k, v in out.items() if isinstance(v, SharedArray)}


@pytest.fixture
def ends():
  """Returns (a sender of three slots, a receiver); their memory must have no name in the end."""
  sender, receiver = Sender(3), Receiver()
  yield sender, receiver
  receiver.close()
  assert not os.path.exists(f"/dev/shm/{sender._memory.name}")


def test_large_arrays_come_by_slots_and_are_the_same(ends):
  sender, receiver = ends
  for turn in range(8):
    pieces = [piece(2 * turn), piece(2 * turn + 1)]
    parcels = [sent(sender, p) for p in pieces]
    assert [names for _, names in parcels] == [{"image", "features"}] * 2
    out = receiver([p for p, _ in parcels])
    assert out.keys() == pieces[0].keys()
    for name, value in out.items():
      assert value.dtype == pieces[0][name].dtype and value.flags.owndata
      np.testing.assert_array_equal(value, np.concatenate([p[name] for p in pieces]))


def test_what_finds_no_slot_goes_as_it_is(ends):
  sender, receiver = ends
  parcels = [sent(sender, piece(i)) for i in range(4)]
  assert [len(names) for _, names in parcels] == [2, 2, 2, 0]
  np.testing.assert_array_equal(receiver([parcels[3][0], parcels[1][0]])["image"],
                                np.concatenate([piece(3)["image"], piece(1)["image"]]))
  again, names = sent(sender, piece(5))  # into the slot that was given back
  assert names and again["image"].slot == parcels[1][0]["image"].slot
  larger, names = sent(sender, piece(6, rows=5))
  assert not names
  for i, value in ((0, parcels[0][0]), (2, parcels[2][0]), (5, again)):
    np.testing.assert_array_equal(receiver([value])["features"], piece(i)["features"])
  np.testing.assert_array_equal(receiver([larger])["image"], piece(6, rows=5)["image"])


def test_a_slot_is_given_back_once_whatever_lies_in_it():
  """A second time could take it from the piece that its sender has put there since."""
  sender, receiver, given = Sender(3), Receiver(), []

  class Watched(np.ndarray):
    def __setitem__(self, key, value):
      given.append((key, value))

  pieces = [sent(sender, piece(i))[0] for i in range(2)]
  memory = np.frombuffer(sender._memory.buf, np.uint8).view(Watched)
  receiver._memory[sender._memory.name] = types.SimpleNamespace(buf=memory)
  receiver(pieces)
  assert sorted(given) == [(0, 0), (1, 0)]
  del memory, receiver
  sender._memory.unlink()


def test_small_arrays_take_no_memory():
  sender = Sender(3)
  arrays = {"index": np.arange(5)}
  assert sender(arrays) is arrays and sender._memory is None


class Blocks:
  """100 images of one colour each, as large as those of a ViT."""

  def __len__(self):
    return 100

  def __getitem__(self, index):
    return {"image": np.full((224, 224, 3), index, np.uint8)}


def copied(record, rng):
  return dict(record)


def test_workers_share_memory_that_ends_with_them():
  with train_batches(Blocks(), copied, batch_size=32, rows=np.arange(0, 32), seed=0, workers=2, threads=1) as batches:
    kept = [next(batches) for _ in range(12)]
    for batch in kept:  # none was written over by a later one
      assert (batch["image"] == batch["index"][:, None, None, None].astype(np.uint8)).all()
    [receiver] = (held for held in batches._held if isinstance(held, Receiver))
    names = list(receiver._memory)
    assert len(names) == 2 and not any(os.path.exists(f"/dev/shm/{name}") for name in names)
  assert not receiver._memory


def test_too_little_shared_memory_is_one_line_and_leaves_none(monkeypatch):
  before = set(os.listdir("/dev/shm"))

  def full(fd, start, size):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "posix_fallocate", full)
  with pytest.raises(UserError, match=r"^/dev/shm: data workers need 0\.6 MB .*No space left on device.; make it"):
    Sender(3)(piece(0))
  with pytest.raises(UserError, match=r"^/dev/shm: data workers need 2\.1 MB .*No space left on device."):
    train_batches(Digits(Source("digits")), None, batch_size=4, rows=np.arange(4), seed=0, workers=2)
  assert not {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")}
