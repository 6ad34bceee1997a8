"""Traces of a few steps: workdir/profile, which TensorBoard's profiler and Perfetto show."""

import os
import re

import jax

from limber_jax.errors import UserError


def parse_steps(text: str) -> tuple[int, int] | None:
  """Returns (first, last) of "first:last", None of ""; raises UserError of anything else."""
  if not text:
    return None
  found = re.fullmatch(r"(\d+):(\d+)", text)
  if not found or not 1 <= int(found[1]) <= int(found[2]):
    raise UserError(f"--profile={text}: expected first:last, two steps such as 11:15, counted from 1")
  return int(found[1]), int(found[2])


class Profiler:
  """Writes one trace of the steps from `first` to `last`, as far as this start takes them."""

  def __init__(self, workdir: str, steps: tuple[int, int] | None):
    """Takes the run's directory and (first, last); None traces nothing."""
    self.path = os.path.join(workdir, "profile")
    self._first, self._last = steps or (0, -1)
    self._on = False

  def before(self, step: int) -> None:
    """To be called before step `step` begins."""
    if not self._on and self._first <= step <= self._last:
      jax.profiler.start_trace(self.path)
      self._on = True

  def after(self, step: int, result: object) -> str:
    """To be called after step `step` was dispatched; returns a line to print once the trace is written, else "".

    Args:
      step: that was taken.
      result: what it gives: the trace ends when that is there.
    """
    if not self._on or step < self._last:
      return ""
    jax.block_until_ready(result)
    self.close()
    return f"the trace of steps {self._first} to {step} is in {self.path}"

  def close(self) -> None:
    """Ends a trace that is being taken."""
    if self._on:
      self._on = False
      jax.profiler.stop_trace()
