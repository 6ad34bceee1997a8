"""Hands arrays from worker processes to their parent through shared memory that is used again and again.

Grain takes fresh shared memory for each piece of a batch, every page of which is zeroed and faulted in on both sides:
130 of the 200 µs that an image of 224 pixels took from worker to batch, beside 2,200 for decoding and scaling it.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from limber_jax.errors import UserError

FOLDER = "/dev/shm"
MIN_BYTES = 2**16  # bytes of an array that is worth a slot
_ALIGN = 64


@dataclass(frozen=True)
class SharedArray:
  """Where an array lies, in place of it."""

  name: str  # of the shared memory
  slot: int
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype


class Sender:
  """Puts the large arrays of {name: array} into a free slot of this process's shared memory.

  The first bytes of that memory say which slots are taken: the sender takes one, and the receiver gives it back once
  all was copied out. Where none is free, or the arrays do not fit, they are left as they are, and go Grain's way.
  """

  def __init__(self, slots: int):
    self._slots, self._size, self._memory = slots, 0, None
    self._lock = threading.Lock()

  def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray | SharedArray]:
    large = {k: v for k, v in arrays.items() if v.nbytes >= MIN_BYTES and not v.dtype.hasobject}
    size = sum(_aligned(v.nbytes) for v in large.values())
    slot = self._take(size) if large else None
    if slot is None:
      return arrays
    out, offset = dict(arrays), _aligned(self._slots) + slot * self._size
    for name, array in large.items():
      np.ndarray(array.shape, array.dtype, self._memory.buf, offset)[...] = array
      out[name] = SharedArray(self._memory.name, slot, offset, array.shape, array.dtype)
      offset += _aligned(array.nbytes)
    return out

  def _take(self, size: int) -> int | None:
    with self._lock:
      if self._memory is None:  # all pieces are of the size of the first
        self._size = size
        self._memory = _reserved(_aligned(self._slots) + self._slots * size)
      taken = bytes(self._memory.buf[: self._slots])
      if size > self._size or 0 not in taken:
        return None
      self._memory.buf[slot := taken.index(0)] = 1
      return slot


class Receiver:
  """Joins pieces of a batch, {name: array or SharedArray}, along their first axis; copies all and gives slots back."""

  def __init__(self):
    self._memory: dict[str, SharedMemory] = {}

  def __call__(self, pieces: Sequence[dict[str, np.ndarray | SharedArray]]) -> dict[str, np.ndarray]:
    out = {k: np.concatenate([self._view(piece[k]) for piece in pieces]) for k in pieces[0]}
    # Each slot once, whatever lies in it: its sender may take it again at once.
    for name, slot in {(v.name, v.slot) for piece in pieces for v in piece.values() if isinstance(v, SharedArray)}:
      self._memory[name].buf[slot] = 0
    return out

  def close(self) -> None:
    """Lets go of the memory; no piece may come after."""
    while self._memory:
      self._memory.popitem()[1].close()

  def _view(self, value: np.ndarray | SharedArray) -> np.ndarray:
    if not isinstance(value, SharedArray):
      return value
    if value.name not in self._memory:
      self._memory[value.name] = memory = SharedMemory(value.name)
      memory.unlink()  # so that it ends with the processes that have it open, however they end
    return np.ndarray(value.shape, value.dtype, self._memory[value.name].buf, value.offset)


def check_room(workers: int) -> None:
  """Raises UserError if there is no shared memory for what data workers take at the least: locks and queues, too."""
  memory = _reserved(workers * 2**20)
  memory.close()
  memory.unlink()


def _reserved(size: int) -> SharedMemory:
  """Returns new shared memory that is all there: else the first write that finds none kills the process by SIGBUS.

  Raises:
    UserError: there is not that much.
  """
  memory = None
  try:
    memory = SharedMemory(create=True, size=size)
    if os.path.exists(file := os.path.join(FOLDER, memory.name)):
      fd = os.open(file, os.O_RDWR)
      try:
        os.posix_fallocate(fd, 0, size)
      finally:
        os.close(fd)
    return memory
  except OSError as error:
    if memory is not None:
      memory.close()
      memory.unlink()
    raise UserError(f"{FOLDER}: data workers need {size / 1e6:,.1f} MB more of shared memory there ({error.strerror}); "
                    "make it larger (docker run --shm-size=…), or set --config.data.workers=0 or a smaller "
                    "--config.data.prefetch") from error


def _aligned(size: int) -> int:
  return -(-size // _ALIGN) * _ALIGN
