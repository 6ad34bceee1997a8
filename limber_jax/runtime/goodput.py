"""Where the wall time of a run goes: goodput.json in the workdir, added up over all of its starts.

    {"goodput": 0.93, "wall_seconds": 3600.0, "seconds": {"start": 30.1, …}, "starts": 3, "max_step": 4000}

`seconds` splits the time in which a process of the run lived, up to the last time that the file was written:

    start        imports, data and weights opened, until the loop begins
    restore      a checkpoint read
    compile      the first call of the step
    data         waiting for a batch
    step         steps, and what is written of them
    save         waiting for a checkpoint
    evaluation   evaluations, their programs compiled
    recomputed   data, step, save and evaluation of steps that had been done before: since the last checkpoint, as of
                 which a kill makes a run start again
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator

from limber_jax.errors import UserError
from limber_jax.runtime.atomic import atomic_write
from limber_jax.runtime.writer import duration

PHASES = ("start", "restore", "compile", "data", "step", "save", "evaluation", "recomputed")
FILE = "goodput.json"
_REDONE = ("data", "step", "save", "evaluation")  # what counts as recomputed where it is done again


def process_began() -> float:
  """Returns when this process began, of time.monotonic(); the present where the system does not tell (not Linux)."""
  now = time.monotonic()
  try:
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
      ticks = int(file.read().rpartition(")")[2].split()[19])  # field 22 of proc(5), since the machine was started
    return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
  except (OSError, ValueError, IndexError, AttributeError):
    return now


class Span:
  """A stretch of time."""

  seconds = 0.0


class TimeTracker:
  """Splits time into phases: `with tracker("save"):`; one within another counts as the inner one.

  While entered, process 0 writes the file every so often and once more at the end: a kill takes a second out of the
  account, or a hundredth of the time since the start where that is more, up to ten seconds. A file that cannot be read
  or written is never a reason to end a run.
  """

  def __init__(self, workdir: str, *, active: bool = True, began: float | None = None,
               clock: Callable[[], float] = time.monotonic):
    """Resumes the tracker in `workdir`.

    Args:
      workdir: of the run.
      active: False on processes other than 0: nothing is written.
      began: when the phase "start" began, of `clock`; None is now.
      clock: seconds.
    """
    self._path, self._active, self._clock = os.path.join(workdir, FILE), active, clock
    self.seconds, self._starts, self.max_step = _read(self._path)
    self._starts += 1
    self.phase, self.turns = "start", 0  # what the watchdog looks at
    self._redo = False
    self._began = self._mark = clock() if began is None else began
    self._lock = threading.RLock()
    self._end = threading.Event()
    self._writer = threading.Thread(target=self._write_often, name="goodput", daemon=True)

  @contextlib.contextmanager
  def __call__(self, phase: str) -> Iterator[Span]:
    """While entered, time counts as `phase`; the span given has its seconds afterwards."""
    span, before, start = Span(), self.phase, self._clock()
    self._turn(phase)
    try:
      yield span
    finally:
      self._turn(before)
      span.seconds = self._clock() - start

  def alive(self) -> None:
    """Tells the watchdog of progress within a phase."""
    self.turns += 1

  def at(self, step: int) -> None:
    """Says that the run is past `step`: the first time for where it starts, then after each step."""
    self._turn(self.phase)
    with self._lock:
      self._redo = step < self.max_step
      self.max_step = max(self.max_step, step)

  def summary(self) -> str:
    """Returns one line on all of the time so far."""
    self._turn(self.phase)
    wall = max(sum(self.seconds.values()), 1e-9)
    others = sorted(((s, p) for p, s in self.seconds.items() if p != "step" and s / wall >= 0.001), reverse=True)
    starts = f" in {self._starts} starts" if self._starts > 1 else ""
    return (f"goodput {self.seconds['step'] / wall:.1%} of {duration(wall)}{starts}; the rest: "
            + (", ".join(f"{p} {s / wall:.1%}" for s, p in others) or "none"))

  def write(self) -> None:
    """Writes the file, by a rename."""
    self._turn(self.phase)
    with self._lock:
      wall = sum(self.seconds.values())
      values = {"goodput": round(self.seconds["step"] / max(wall, 1e-9), 4), "wall_seconds": round(wall, 3),
                "seconds": {p: round(s, 3) for p, s in self.seconds.items()}, "starts": self._starts,
                "max_step": self.max_step}
    if not self._active:
      return
    # A full disk is reported by the next checkpoint.
    with contextlib.suppress(UserError), atomic_write(self._path) as file:
      json.dump(values, file, indent=1)

  def __enter__(self) -> "TimeTracker":
    self._writer.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._end.set()
    self._writer.join()
    self.write()

  def _turn(self, phase: str) -> None:
    """Counts the time until now, and goes on with `phase`."""
    with self._lock:
      now = self._clock()
      self.seconds["recomputed" if self._redo and self.phase in _REDONE else self.phase] += now - self._mark
      if phase != self.phase:
        self.turns += 1
      self.phase, self._mark = phase, now

  def _write_often(self) -> None:
    while not self._end.wait(min(max(1.0, (self._clock() - self._began) / 100), 10.0)):
      self.write()


def _read(path: str) -> tuple[dict[str, float], int, int]:
  """Returns (seconds, starts, max_step) of a file; zeros of one that is not there or cannot be read."""
  try:
    with open(path, encoding="utf-8") as file:
      values = json.load(file)
    now = {"lost": "recomputed", "reached": "max_step"}  # names in runs of before
    values, spent = ({now.get(k, k): v for k, v in found.items()} for found in (values, values["seconds"]))
    seconds = {phase: float(spent[phase]) for phase in PHASES}
    starts, max_step = int(values["starts"]), int(values["max_step"])
    if all(math.isfinite(s) and s >= 0 for s in seconds.values()) and min(starts, max_step) >= 0:
      return seconds, starts, max_step
  except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
    pass  # as the docstring says
  return dict.fromkeys(PHASES, 0.0), 0, 0
