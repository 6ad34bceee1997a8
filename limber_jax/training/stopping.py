"""When a run is to stop: one process decides alone wherever it waits, several together, in the step they all take."""

import contextlib

import jax

from limber_jax.runtime import parallel, peers
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.signals import StopRequest


class Stopping:
  """The request to stop, as the loop asks for it."""

  def __init__(self, request: StopRequest, tracker: TimeTracker):
    """Takes the request, entered already, and the tracker, which is told that asking is progress."""
    self.request, self._tracker = request, tracker
    self.single = jax.process_count() == 1

  def alone(self) -> bool:
    """Returns whether this process, the only one, was asked to stop; False in a run of several."""
    return self.single and self.request()

  def together(self) -> bool:
    """Returns whether any process was asked to stop; all of them must ask together."""
    self._tracker.alive()
    return any(parallel.allgather_objects(self.request()))

  def waiting(self) -> contextlib.AbstractContextManager:
    """Returns what is entered while data are awaited: a request then raises signals.Interrupted.

    One of several processes waits peers.LATE seconds longer, for the others stop with it in their next step.
    """
    return self.request.interrupts(0 if self.single else peers.LATE)

  def __str__(self) -> str:
    return self.request.name or "another process"
