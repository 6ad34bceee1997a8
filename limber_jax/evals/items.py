"""What an evaluation found out about each item, on disk: a killed evaluation goes on behind the last whole batch.

NAME.jsonl has a line {"key": …, "shapes": …} that says what the results depend on, and then a line an item, in the
order of the data. Arrays lie beside it, rows of little-endian float32 in NAME.ARRAY.f32, one an item not damaged.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from limber_jax.errors import UserError
from limber_jax.lock import NAME, Lock
from limber_jax.parallel import from_first


@dataclass(frozen=True)
class Collected:
  """Results by item, in the order of the data, the same in every process."""

  records: list[dict[str, Any]]  # {"index", "id", …} of each item that could be read
  arrays: dict[str, np.ndarray]  # float32 [n, ...], a row for each of the records
  damage: list[dict[str, Any]]   # {"index", "id", "reason"} of the others

  @property
  def index(self) -> np.ndarray:
    """The numbers of the items that could be read, int64 [n]."""
    return np.array([r["index"] for r in self.records], np.int64)


class Items:
  """Results as they come in: in memory, and in files if there is a path. Only process 0 reads and writes these."""

  def __init__(self, path: str, key: dict[str, Any], batch_size: int, total: int, arrays: Sequence[str] = (), *,
               shared: bool = False):
    """Reads the results that are there, and throws away those of another key or of a part of a batch.

    Args:
      path: of the lines, NAME.jsonl; "" keeps nothing.
      key: what the results depend on, plain JSON.
      batch_size: the batches that follow are those of a run that never stopped.
      total: number of items.
      arrays: names of the arrays of each item.
      shared: other commands may write the same files, with whom `Lock` is for.

    Raises:
      UserError: the files cannot be read or written, or another process writes them.
    """
    self._path, self._key, self._names = path, json.loads(json.dumps(key)), tuple(arrays)
    self._records: list[dict] = []
    self._damage: list[dict] = []
    self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
    self._files: dict[str, Any] = {}
    self._held = contextlib.ExitStack()
    if path:
      with contextlib.ExitStack() as held:
        if shared:
          held.enter_context(Lock(f"{path}{NAME}", first=from_first))
        shapes, lines = from_first(lambda: self._guarded(self._read, batch_size, total))
        self._held = held.pop_all()
      self._sort(lines)
      for name, shape in shapes.items():
        self._arrays[name].append(self._rows(name, shape))

  @property
  def done(self) -> int:
    """The number of items that there are results of, damaged ones too."""
    return len(self._records) + len(self._damage)

  def collected(self) -> Collected:
    """Returns what there is."""
    arrays = {name: np.concatenate(rows) for name, rows in self._arrays.items() if rows}
    return Collected(self._records, arrays, self._damage)

  def append(self, lines: Sequence[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
    """Adds the results of a batch.

    Args:
      lines: {"index", "id", …} of its items in order; those with a "reason" are damaged.
      arrays: [n, ...] of each name, of those that are not.
    """
    self._sort(lines)
    rows = {name: np.ascontiguousarray(arrays[name], "<f4") for name in self._names}
    for name, some in rows.items():
      self._arrays[name].append(some)
    if self._path and jax.process_index() == 0:
      self._guarded(self._write, lines, rows)

  def close(self) -> None:
    """Closes the files."""
    for file in self._files.values():
      file.close()
    self._held.close()

  def _sort(self, lines) -> None:
    for line in lines:
      (self._damage if "reason" in line else self._records).append(line)

  def _guarded(self, function, *args):
    try:
      return function(*args)
    except OSError as error:
      raise UserError(f"{error.filename or self._path}: cannot keep the results of items there "
                      f"({error.strerror})") from error

  def _beside(self, name: str) -> str:
    return f"{self._path.removesuffix('.jsonl')}.{name}.f32"

  def _write(self, lines, rows) -> None:
    if not self._files:
      new = not os.path.exists(self._path)
      self._files = {name: open(self._beside(name), "ab") for name in self._names}  # noqa: SIM115 (see `close`)
      self._files[""] = open(self._path, "ab")  # noqa: SIM115 (see `close`)
      if new:
        shapes = {name: list(some.shape[1:]) for name, some in rows.items()}
        self._files[""].write(_line({"key": self._key, "shapes": shapes}))
    for name, some in rows.items():  # before the lines, which say that all of an item is there
      self._files[name].write(some.tobytes())
      self._files[name].flush()
    self._files[""].write(b"".join(map(_line, lines)))
    self._files[""].flush()

  def _read(self, batch_size: int, total: int) -> tuple[dict[str, list[int]], list[dict]]:
    """Returns (shapes of the arrays, lines) of whole batches, and cuts whatever else there is off the files."""
    os.makedirs(os.path.dirname(self._path), exist_ok=True)
    found, ends = [], []  # what each line says, and where it ends
    if os.path.exists(self._path):
      with open(self._path, "rb") as file:
        while (line := file.readline()).endswith(b"\n"):
          try:
            found.append(json.loads(line))
          except ValueError:  # half a line, and after it what was written after a crash of the machine
            break
          ends.append(file.tell())
    if not found or found[0].get("key") != self._key or found[0]["shapes"].keys() != set(self._names):
      for path in [self._path, *map(self._beside, self._names)]:
        if os.path.exists(path):
          os.remove(path)
      return {}, []
    shapes, lines = found[0]["shapes"], found[1:]
    for name, shape in shapes.items():  # a machine that crashed may have kept lines and lost rows
      held, there = os.path.getsize(self._beside(name)) // (4 * math.prod(shape)), 0
      for number, line in enumerate(lines):
        there += "reason" not in line
        if there > held:
          lines = lines[:number]
          break
    if len(lines) < total:
      lines = lines[: len(lines) // batch_size * batch_size]
    os.truncate(self._path, ends[len(lines)])
    readable = sum("reason" not in line for line in lines)
    for name, shape in shapes.items():
      os.truncate(self._beside(name), 4 * math.prod(shape) * readable)
    return shapes, lines

  def _rows(self, name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns the rows that are in a file, in every process."""
    rows = np.zeros((len(self._records), *shape), "<f4")
    if jax.process_index() == 0:
      rows[:] = np.fromfile(self._beside(name), "<f4").reshape(rows.shape)
    return rows if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(rows))


def _line(value: dict[str, Any]) -> bytes:
  return json.dumps(value).encode() + b"\n"
