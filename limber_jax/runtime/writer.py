"""What a run says: progress on the terminal, metrics.jsonl, TensorBoard. Process 0 only."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from limber_jax.errors import UserError
from limber_jax.runtime.atomic import atomic_write

_RESUMES = "the same command resumes from the last checkpoint"


class Log:
  """Writes metrics by step.

  metrics.jsonl has one JSON object a line, each with "step": records of training ({"step", "loss", …}), of evaluation
  ({"step", "zeroshot/top1", …}) and of events ({"step", "event", …}).
  """

  def __init__(self, workdir: str, *, steps: int, batch_size: int, start_step: int, active: bool, print=print):
    """Opens the files of `workdir`; records after `start_step`, left by a run that was killed, are dropped.

    Args:
      steps: where the run ends, for the time left.
      batch_size: examples a step, for examples/s.
      start_step: the step that training resumes from.
      active: False on processes other than 0: nothing is written.
      print: where lines for the terminal go.

    Raises:
      UserError: the files cannot be written.
    """
    self._steps, self._batch, self._active, self._print = steps, batch_size, active, print
    self._mark, self._wait, self._last = time.perf_counter(), 0.0, start_step
    self._flops, self._peak = 0.0, 0.0
    self._first = True  # the time of the first record is mostly that of compiling
    self._tty = active and print is _builtin_print and sys.stdout.isatty()
    if not active:
      return
    from tensorboardX import SummaryWriter  # here, for it brings in torch where that is installed: seconds

    self._path = os.path.join(workdir, "metrics.jsonl")
    with self._guarded():
      _truncate(self._path, start_step)
    with self._guarded(board := os.path.join(workdir, "tensorboard")):
      self._board = SummaryWriter(board, purge_step=start_step + 1, flush_secs=10)
    with self._guarded():
      self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

  def count_flops(self, per_step: float, peak: float) -> None:
    """Takes a step's model FLOPs and the FLOP/s of all devices at most: records then have what was reached of them."""
    self._flops, self._peak = per_step, peak

  def waited(self, seconds: float) -> None:
    """Adds time that the loop spent waiting for data."""
    self._wait += seconds

  def restart_clock(self) -> None:
    """Leaves what went before (compiling, an evaluation) out of examples/s."""
    self._mark, self._wait = time.perf_counter(), 0.0

  def train(self, step: int, metrics: dict[str, float]) -> None:
    """Writes a training record of `step`, with speed since the last one, and a line of progress."""
    seconds = max(time.perf_counter() - self._mark, 1e-9)
    count = max(step - self._last, 1)
    speed = {"examples_per_second": count * self._batch / seconds, "seconds_per_step": seconds / count,
             "data_wait": min(self._wait / seconds, 1.0)}
    if self._peak:
      rate = self._flops * count / seconds
      speed |= {"model_flops_per_second": rate, "share_of_peak": rate / self._peak}
    self._last = step
    self.restart_clock()
    self.write(step, metrics | speed)
    left = "" if self._first else f"  left {duration((self._steps - step) * speed['seconds_per_step'])}"
    self._first = False
    share = f"  {speed['share_of_peak']:.1%} of peak" if self._peak else ""
    self.line(f"step {step}/{self._steps}  loss {metrics['loss']:.4f}  "
              f"{speed['examples_per_second']:,.0f} examples/s  data wait {speed['data_wait']:.0%}{share}{left}",
              replace=step < self._steps)

  def write(self, step: int, metrics: dict[str, Any]) -> None:
    """Writes a record of `step` to metrics.jsonl and its numbers to TensorBoard; raises UserError if it cannot."""
    if not self._active:
      return
    with self._guarded():
      self._file.write(json.dumps({"step": step, **metrics}) + "\n")
      self._file.flush()
    if not self._board_is_written():  # it would wait for ever to take the next records
      raise UserError(f"{os.path.dirname(self._path)}/tensorboard: cannot be written; is the disk full? {_RESUMES}")
    for name, value in metrics.items():
      if isinstance(value, int | float):
        self._board.add_scalar(name, value, step)

  def line(self, text: str, *, replace: bool = False) -> None:
    """Prints a line; on a terminal a `replace` line is overwritten by the next."""
    if not self._active:
      return
    if self._tty:
      sys.stdout.write(f"\r\x1b[K{text}" + ("" if replace else "\n"))
      sys.stdout.flush()
    else:
      self._print(text)

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      with contextlib.suppress(OSError):  # all was flushed as it was written; where that failed, a UserError said so
        self._file.close()
        if self._board_is_written():
          self._board.close()

  def _board_is_written(self) -> bool:
    """Returns whether the thread of tensorboardX lives; it ends at the first error, and everyone waits for it."""
    worker = getattr(self._board.file_writer.event_writer, "_worker", None)
    return worker is None or worker.is_alive()

  @contextlib.contextmanager
  def _guarded(self, path: str = "") -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(f"{path or self._path}: cannot be written ({error.strerror}); {_RESUMES}") from error


_builtin_print = print


def _truncate(path: str, step: int) -> None:
  """Keeps the records up to `step`; a line cut short by a kill goes too, and one that is damaged."""
  if not os.path.exists(path):
    return
  kept = []
  with open(path, encoding="utf-8", errors="replace") as file:
    for line in file:
      with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
          kept.append(line)
  with atomic_write(path) as file:
    file.writelines(kept)


def duration(seconds: float) -> str:
  """Returns "2d 3h", "3h 05m" or "5m 07s"."""
  seconds = int(seconds)
  days, hours, minutes = seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60
  if days:
    return f"{days}d {hours}h"
  return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {seconds % 60:02}s"
