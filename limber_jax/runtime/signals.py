"""Requests to stop: SIGTERM (a preempted machine), SIGINT (Ctrl-C) and SIGHUP (a terminal that is gone, a dropped ssh).

Each asks the run to save and leave. Where SIGHUP is ignored at the start, as `nohup` has it, it stays so.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Interrupted(BaseException):
  """A request to stop came while there was nothing to do but wait.

  Not an Exception, as little as KeyboardInterrupt: what is ready for anything that a damaged file or a lost worker may
  raise would take it for that.
  """


class StopRequest:
  """While entered, turns the first SIGTERM, SIGINT or SIGHUP into a flag. A second SIGINT interrupts at once.

  Outside the main thread, where Python allows no handlers, the flag is only ever set by `set`.
  """

  def __init__(self, *, at_end: bool = False):
    """Makes a request that has not come.

    Args:
      at_end: the process ends when this is left: from then on all three are ignored, because all is saved and the
        exit code shall say so. Else the handlers of before come back.
    """
    self.name: str | None = None  # of the signal that came
    self._at_end = at_end
    self._old: dict[int, object] = {}
    self._waiting, self._after, self._since = False, 0.0, 0.0

  def __call__(self) -> bool:
    return self.name is not None

  def set(self, name: str) -> None:
    """Asks the run to stop, as a signal would."""
    if self.name is None:
      self.name, self._since = name, time.monotonic()

  def pass_on(self, name: str) -> None:
    """Does as if this signal had come here too; from any thread."""
    self.set(name)
    if self._old:  # the handler wakes the main thread, which may be waiting
      signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

  @contextlib.contextmanager
  def interrupts(self, after: float = 0.0) -> Iterator[None]:
    """While entered, a request, also one of before, raises Interrupted in the main thread.

    Args:
      after: seconds that the request must be old by then; what is waited for may still come.
    """
    self._waiting, self._after = True, after
    try:
      if self():
        self._interrupt()
      yield
    finally:
      self._waiting = False

  def _interrupt(self) -> None:
    """Raises Interrupted if the request is old enough, or sees to it that this is asked again once it is."""
    left = self._since + self._after - time.monotonic()
    if left <= 0:
      self._waiting = False
      raise Interrupted
    timer = threading.Timer(left + 0.01, lambda: self._waiting and self.pass_on(self.name))
    timer.daemon = True
    timer.start()

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
          continue
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    old, self._old = self._old, {}
    for number, handler in old.items():
      signal.signal(number, signal.SIG_IGN if self._at_end else handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.name is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.set(signal.Signals(number).name)
    if self._waiting:
      self._interrupt()
