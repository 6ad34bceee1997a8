"""Requests to stop: SIGTERM (a preempted machine) and SIGINT (Ctrl-C) ask the run to save and leave."""

import signal
import threading
from types import FrameType


class StopRequest:
  """While entered, turns the first SIGTERM or SIGINT into a flag. A second SIGINT interrupts at once.

  Outside the main thread, where Python allows no handlers, the flag is only ever set by `set`.
  """

  def __init__(self):
    self.name: str | None = None  # of the signal that came
    self._old: dict[int, object] = {}

  def __call__(self) -> bool:
    return self.name is not None

  def set(self, name: str) -> None:
    """Asks the run to stop, as a signal would."""
    self.name = self.name or name

  def __enter__(self) -> "StopRequest":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if self.name is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.set(signal.Signals(number).name)
