"""Ends a run that gets nowhere, and says where it hangs.

A file system that does not answer, a deadlock, another process that lives but joins no collective: none of these raises
anything, and a machine that waits costs as much as one that works. A dead process is not waited for this long; see
`limber_jax.runtime.peers`.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from limber_jax.runtime.goodput import TimeTracker

EXIT_CODE = 4
PATIENCE = 6    # times as long may take what does not go step by step: compilers, disks, evaluations
_STEPWISE = ("data", "step")
_TICK = 0.5     # seconds
_GRACE = 2.0    # seconds in which others of the run, who wait for this process, may say where they are


class Watchdog:
  """While entered, ends this process with EXIT_CODE when it makes no progress, after the stacks of all its threads.

  Progress is any change of the tracker's phase, of which a step has several, and each batch of an evaluation. To start,
  compile, restore, save and evaluate may take PATIENCE times as long. Time in which the process was stopped, as by
  Ctrl-Z, does not count. It is a thread of Python: code that never gives up the interpreter's lock holds it up too.
  """

  def __init__(self, tracker: TimeTracker, seconds: float, *, name: str = "this process",
               end: Callable[[int], NoReturn] = os._exit):
    """Watches a run.

    Args:
      tracker: of the run.
      seconds: without progress; 0 never ends it.
      name: of this process, for the message.
      end: what ends the process, given the exit code.
    """
    self._tracker, self._seconds, self._name, self._end = tracker, seconds, name, end
    self._left = threading.Event()
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()
    if self._seconds:
      self._thread.join()

  def _watch(self) -> None:
    turns, idle, last = -1, 0.0, time.monotonic()
    while not self._left.wait(_TICK):
      now = time.monotonic()
      idle, last = idle + min(now - last, 2 * _TICK), now
      if self._tracker.turns != turns:
        turns, idle = self._tracker.turns, 0.0
      phase = self._tracker.phase
      limit = self._seconds * (1 if phase in _STEPWISE else PATIENCE)
      if idle > limit:
        self._tracker.write()
        sys.stderr.write(f"error: no progress for {limit:g} s in phase {phase!r} of {self._name} (config.watchdog="
                         f"{self._seconds:g}); what its threads are at:\n")
        sys.stderr.flush()
        faulthandler.dump_traceback(2, all_threads=True)
        self._left.wait(_GRACE)
        self._end(EXIT_CODE)
        return
