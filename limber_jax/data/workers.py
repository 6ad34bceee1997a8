"""Grain's worker processes: how they start, what they send, and what became of one that is gone."""

import multiprocessing
import os
import signal
import threading
from collections import Counter
from multiprocessing.process import BaseProcess

import numpy as np

from limber_jax.data import shared_memory
from limber_jax.runtime.signals import SIGNALS

STOPPED = 10  # seconds that a worker may be stopped


class Watch:
  """Looks every second after the workers of this process. Grain itself sees those that are gone, and waits for ever for
  one that is stopped: that one is killed here."""

  def __init__(self):
    self._workers: dict[int, BaseProcess] = {}  # by process number, also when they are gone
    self._stopped: set[int] = set()
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._look, name="watch-data-workers", daemon=True)
    self._thread.start()

  def _look(self) -> None:
    seconds = Counter()
    while not self._end.wait(1):
      for worker in multiprocessing.active_children():
        if worker.name.startswith("grain-process-prefetch"):
          self._workers[worker.pid] = worker
          seconds[worker.pid] = seconds[worker.pid] + 1 if _is_stopped(worker.pid) else 0
          if seconds[worker.pid] == STOPPED:
            self._stopped.add(worker.pid)
            worker.kill()

  def describe(self) -> str:
    """Returns what became of a worker, "" if nothing is known."""
    for pid in self._stopped:
      return f"data worker (process {pid}) was stopped for {STOPPED} seconds by a signal"
    for pid, worker in self._workers.items():
      if (code := worker.exitcode) is not None and code < 0:
        hint = {signal.SIGKILL: ", perhaps for want of memory", signal.SIGBUS: ", perhaps because /dev/shm is full"}
        return f"data worker (process {pid}) was ended by {signal.Signals(-code).name}{hint.get(-code, '')}"
      if code:
        return f"data worker (process {pid}) ended with exit code {code}"
    return ""

  def close(self) -> None:
    self._end.set()
    self._thread.join()


def _is_stopped(pid: int) -> bool:
  """Returns whether a process is stopped by a signal; False where the system has no /proc."""
  try:
    with open(f"/proc/{pid}/stat", "rb") as file:
      return file.read().rpartition(b")")[2].split()[0] == b"T"
  except (OSError, IndexError):
    return False


_sender: shared_memory.Sender | None = None  # of a worker


def start_worker(index: int, count: int, slots_: int) -> None:
  """Runs first in a worker: signals that go to all processes of a run are its parent's to answer."""
  global _sender
  del index, count
  _sender = shared_memory.Sender(slots_)
  for number in SIGNALS:
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()


def end_with_parent() -> None:
  """Makes this process, a child by multiprocessing, end as soon as its parent does, however that ends.

  Linux' PR_SET_PDEATHSIG would not do: it means the thread that started the child, which Grain ends at once.
  """

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def sent(piece: dict[str, np.ndarray]) -> dict[str, np.ndarray | shared_memory.SharedArray]:
  """Returns what crosses from a worker for a piece: its arrays by shared memory; outside of one the piece itself."""
  return _sender(piece) if _sender else piece
