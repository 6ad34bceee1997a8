"""What of its data a run could not read: named in bad_records.jsonl, counted, and past a share the end of the run."""

import contextlib
import json
import os
from typing import Any

import jax
import numpy as np

from limber_jax.config import Data
from limber_jax.data.sources import Source
from limber_jax.errors import UserError
from limber_jax.runtime import parallel
from limber_jax.runtime.atomic import atomic_write, refusal

FILE = "bad_records.jsonl"
_EARLIER = "damage.jsonl"  # its name in runs of before
# Records for which no run ends, unless none at all is allowed: one bad of the first ten says little.
ALWAYS_ALLOWED = 10

Line = dict[str, Any]


class BadRecords:
  """The damage of a run, each record named once however often it comes.

  FILE has a line {"step", "file", "index", "id", "reason"} for each: "step" is the first whose batch wanted the record,
  and "file" what the source was opened from. Lines of step 0 are what the source found when it was opened and what is
  no record: their index is null.

  A process knows what it read itself. Every so often `flush` puts together what all have read; process 0 writes it,
  sorted by step and record. So there is one file, the same for any number of processes and workers, and all processes
  end the run at the same step.

  The run ends where the share of annotations that the source could not use and the share of the records seen so far
  that could not be read are together more than config.data.max_bad_fraction, and more than ALWAYS_ALLOWED.
  """

  def __init__(self, workdir: str, source: Source, data: Data, batch_size: int):
    """Looks at what the source found when it was opened.

    Args:
      workdir: of the run.
      source: as it was opened, with its `damage`.
      data: config.data.
      batch_size: examples in the global batch.

    Raises:
      UserError: that is too much already.
    """
    self._path = os.path.join(workdir, FILE)
    self._file = os.path.basename(os.path.normpath(data.source.where))
    self.found: list[Line] = [{"step": 0, "file": d["file"], "index": None, "id": d["id"], "reason": d["reason"]}
                              for d in getattr(source, "damage", ())]
    self._records, self._allowed, self._batch = len(source), data.max_bad_fraction, batch_size
    self._named: set[int] = set()    # records
    self._read: list[Line] = []      # by this process, and not settled
    self._news = 0                   # of all processes, in steps that are not settled
    self._example = self.found[:1]  # for messages
    if not 0 <= self._allowed <= 1:
      raise UserError(f"config.data.max_bad_fraction={self._allowed}: wanted a share, 0 to 1")
    self._check(0)

  def start(self, step: int) -> None:
    """Resumes with what the file says up to `step`; what a killed run found after it will be found again."""

    def kept() -> tuple[list[int], list[Line]]:
      earlier = os.path.join(os.path.dirname(self._path), _EARLIER)
      if os.path.isfile(earlier) and not os.path.exists(self._path):
        os.rename(earlier, self._path)
      lines = [line for line in _lines(self._path) if 0 < line["step"] <= step]
      if self.found or os.path.exists(self._path):
        self._write(self.found + lines)
      return [line["index"] for line in lines], lines[:1]

    named, first = parallel.broadcast_from_process_0(kept)
    self._named = set(named)
    self._example = self._example or first

  def read(self, step: int, batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns the local batch of `step` without its "damage", and how many records each row tried in vain, int32 [b].

    The sum of these over the global batch belongs into `count`.
    """
    damaged = np.zeros(len(batch["damage"]), np.int32)
    for row in np.flatnonzero(batch["damage"]):
      found = json.loads(str(batch["damage"][row]))
      self._read += [{"step": step, "file": self._file, **record} for record in found]
      damaged[row] = len(found)
    return {k: v for k, v in batch.items() if k != "damage"}, damaged

  def count(self, damaged: int) -> None:
    """Adds how many records could not be read for a batch, in all processes."""
    self._news += damaged

  def flush(self, step: int, due: bool = True) -> list[Line]:
    """Writes what batches up to `step` wanted and could not have; all processes call it at the same step.

    Args:
      step: whose `count` has been added.
      due: False leaves it for later where several processes would have to wait for each other.

    Returns:
      The new lines, sorted.

    Raises:
      UserError: more than is allowed, or the file cannot be written.
    """
    if not self._news or not (due or jax.process_count() == 1):
      return []
    now = [line for line in self._read if line["step"] <= step]
    self._read, self._news = [line for line in self._read if line["step"] > step], 0
    read = (line for part in parallel.allgather_objects(now) for line in part)
    lines = sorted(read, key=lambda d: (d["step"], d["index"]))
    new = []
    for line in lines:
      if line["index"] not in self._named:
        self._named.add(line["index"])
        new.append(line)
    self._example = self._example or new[:1]
    if new and jax.process_index() == 0:
      self._write(new, append=True)
    self._check(step)
    return new

  def share(self, step: int) -> float:
    """Returns the share of the data seen up to `step` that could not be used."""
    seen = min(step * self._batch, self._records)
    return len(self.found) / (self._records + len(self.found)) + len(self._named) / max(seen, 1)

  def _check(self, step: int) -> None:
    total = len(self.found) + len(self._named)
    if total > (ALWAYS_ALLOWED if self._allowed else 0) and (share := self.share(step)) > self._allowed:
      where = f"; all are in {self._path}" if self._named else ""
      raise UserError(f"{total:,} of the data's records cannot be used, {share:.2%} of what was seen, more than "
                      f"config.data.max_bad_fraction={self._allowed} allows; the first: "
                      f"{describe(self._example[0])}{where}")

  def _write(self, lines: list[Line], append: bool = False) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if not append:
      with atomic_write(self._path) as file:
        file.write(text)
      return
    try:
      with open(self._path, "a", encoding="utf-8") as file:
        file.write(text)
    except OSError as error:
      raise refusal(self._path, error) from error


def describe(line: Line) -> str:
  """Returns a line of the file as a person reads it."""
  number = "" if line["index"] is None else f"record {line['index']}"
  name = f"({line['id']})" if number and line["id"] else line["id"]
  return f"{line['file']}: {' '.join(filter(None, (number, name)))}: {line['reason']}"


def _lines(path: str) -> list[Line]:
  """Returns the lines of the file; one that a kill cut short, or that is damaged, is left out."""
  lines = []
  if os.path.exists(path):
    with open(path, encoding="utf-8", errors="replace") as file:
      for text in file:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
          line = json.loads(text)
          if text.endswith("\n") and isinstance(line["step"], int):
            lines.append(line)
  return lines
