"""Requests to stop: SIGTERM (a preempted machine) and SIGINT (Ctrl-C) ask the run to save and leave."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
  """A request to stop came while there was nothing to do but wait.

  Not an Exception, as little as KeyboardInterrupt: what is ready for anything that a damaged file or a lost worker may
  raise would take it for that.
  """


class StopRequest:
  """While entered, turns the first SIGTERM or SIGINT into a flag. A second SIGINT interrupts at once.

  Outside the main thread, where Python allows no handlers, the flag is only ever set by `set`.
  """

  def __init__(self, *, at_end: bool = False):
    """Makes a request that has not come.

    Args:
      at_end: the process ends when this is left: from then on both signals are ignored, because all is saved and the
        exit code shall say so. Else the handlers of before come back.
    """
    self.name: str | None = None  # of the signal that came
    self._at_end = at_end
    self._old: dict[int, object] = {}
    self._waiting = False

  def __call__(self) -> bool:
    return self.name is not None

  def set(self, name: str) -> None:
    """Asks the run to stop, as a signal would."""
    self.name = self.name or name

  @contextlib.contextmanager
  def interrupts(self, allowed: bool = True) -> Iterator[None]:
    """While entered, a request, also one of before, raises Interrupted in the main thread; not if not `allowed`."""
    self._waiting = allowed
    try:
      if allowed and self():
        raise Interrupted
      yield
    finally:
      self._waiting = False

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, signal.SIG_IGN if self._at_end else handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.name is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.set(signal.Signals(number).name)
    if self._waiting:
      self._waiting = False
      raise Interrupted
