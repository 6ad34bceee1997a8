"""What an evaluation found out about each example, on disk: a killed evaluation resumes behind the last whole batch.

NAME.jsonl has a line {"key": …, "shapes": …} that says what the results depend on, and then a line an example, in the
order of the data. Arrays lie beside it, rows of little-endian float32 in NAME.ARRAY.f32, one an example not damaged.
Each line ends in "crc", the CRC-32 of all before it in the file and of the example's rows: a line that is not as it was
written is not believed, nor is what follows it.
"""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from limber_jax.errors import UserError
from limber_jax.runtime.lock import NAME, Lock
from limber_jax.runtime.parallel import broadcast_from_process_0


@dataclass(frozen=True)
class Results:
  """Results by example, in the order of the data, the same in every process."""

  records: list[dict[str, Any]]  # {"index", "id", …} of each example that could be read
  arrays: dict[str, np.ndarray]  # float32 [n, ...], a row for each of the records
  damage: list[dict[str, Any]]   # {"index", "id", "reason"} of the others

  @property
  def index(self) -> np.ndarray:
    """The numbers of the examples that could be read, int64 [n]."""
    return np.array([r["index"] for r in self.records], np.int64)


class ResultStore:
  """Results as they come in: in memory, and in files if there is a path. Only process 0 reads and writes these."""

  def __init__(self, path: str, key: dict[str, Any], batch_size: int, total: int, arrays: Sequence[str] = (), *,
               shared: bool = False):
    """Reads the results that are there, and throws away those of another key or of a part of a batch.

    Args:
      path: of the lines, NAME.jsonl; "" keeps nothing.
      key: what the results depend on, plain JSON.
      batch_size: the batches that follow are those of a run that never stopped.
      total: number of examples.
      arrays: names of the arrays of each example.
      shared: other commands may write the same files, with whom `Lock` is for.

    Raises:
      UserError: the files cannot be read or written, or another process writes them.
    """
    self._path, self._key, self._names = path, json.loads(json.dumps(key)), tuple(arrays)
    self._batch_size, self._ends = batch_size, [(0, 0)]  # (where a line ends, its CRC), the header's at 1
    self.flaw = ""
    """What was wrong with the results there, in a line; "" if nothing was but that they may have ended early."""
    self._records: list[dict] = []
    self._damage: list[dict] = []
    self._arrays: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
    self._files: dict[str, Any] = {}
    self._held = contextlib.ExitStack()
    if path:
      with contextlib.ExitStack() as held:
        if shared:
          held.enter_context(Lock(f"{path}{NAME}", first=broadcast_from_process_0))
        shapes, lines, self.flaw = broadcast_from_process_0(lambda: self._guarded(self._read, total))
        self._held = held.pop_all()
      self._sort(lines)
      for name, shape in shapes.items():
        self._arrays[name].append(self._rows(name, shape))

  @property
  def done(self) -> int:
    """The number of examples that there are results of, damaged ones too."""
    return len(self._records) + len(self._damage)

  def collected(self) -> Results:
    """Returns what there is."""
    arrays = {name: np.concatenate(rows) for name, rows in self._arrays.items() if rows}
    return Results(self._records, arrays, self._damage)

  def append(self, lines: Sequence[dict[str, Any]], arrays: dict[str, np.ndarray]) -> None:
    """Adds the results of a batch.

    Args:
      lines: {"index", "id", …} of its examples in order; those with a "reason" are damaged.
      arrays: [n, ...] of each name, of those that are not.
    """
    self._sort(lines)
    rows = {name: np.ascontiguousarray(arrays[name], "<f4") for name in self._names}
    for name, some in rows.items():
      self._arrays[name].append(some)
    if self._path and jax.process_index() == 0:
      self._guarded(self._write, lines, rows)

  def cut(self, first: int) -> None:
    """Takes away the results from the batch of example `first` on."""
    count = first // self._batch_size * self._batch_size
    lines = sorted(self._records + self._damage, key=lambda line: line["index"])[:count]
    self._records, self._damage = [], []
    self._sort(lines)
    self._arrays = {name: [np.concatenate(rows)[: len(self._records)]] for name, rows in self._arrays.items() if rows}
    if self._path and jax.process_index() == 0:
      self._guarded(self._truncate, count, {name: rows[0].shape[1:] for name, rows in self._arrays.items()})

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
      raise UserError(f"{error.filename or self._path}: cannot keep the results of examples there "
                      f"({error.strerror})") from error

  def _beside(self, name: str) -> str:
    return f"{self._path.removesuffix('.jsonl')}.{name}.f32"

  def _write(self, lines, rows) -> None:
    if not self._files:
      new = not os.path.exists(self._path)
      self._files = {name: open(self._beside(name), "ab") for name in self._names}  # noqa: SIM115 (closed by `close`)
      self._files[""] = open(self._path, "ab")  # noqa: SIM115 (closed by `close`)
      if new:
        shapes = {name: list(some.shape[1:]) for name, some in rows.items()}
        self._files[""].write(self._line({"key": self._key, "shapes": shapes}))
    for name, some in rows.items():  # before the lines, which say that all of an item is there
      self._files[name].write(some.tobytes())
      self._files[name].flush()
    number, data = 0, []
    for line in lines:
      data.append(self._line(line, [some[number].tobytes() for some in rows.values()] if "reason" not in line else ()))
      number += "reason" not in line
    self._files[""].write(b"".join(data))
    self._files[""].flush()

  def _line(self, value: dict[str, Any], rows: Sequence[bytes] = ()) -> bytes:
    """Returns the next line of the file."""
    end, crc = self._ends[-1]
    body = json.dumps(value).encode()[:-1]
    crc = _crc(body, rows, crc)
    line = body + _CRC % crc
    self._ends.append((end + len(line), crc))
    return line

  def _read(self, total: int) -> tuple[dict[str, list[int]], list[dict], str]:
    """Returns (shapes of the arrays, lines of whole batches, what is wrong), and cuts what else there is off the files.
    """
    os.makedirs(os.path.dirname(self._path), exist_ok=True)
    found, flaw = self._believed() if os.path.exists(self._path) else ([], "")
    if not found or found[0].get("key") != self._key or found[0]["shapes"].keys() != set(self._names):
      for path in [self._path, *map(self._beside, self._names)]:
        if os.path.exists(path):
          os.remove(path)
      self._ends = [(0, 0)]
      return {}, [], flaw
    shapes, lines = found[0]["shapes"], found[1:]
    if len(lines) < total:
      lines = lines[: len(lines) // self._batch_size * self._batch_size]
    self._truncate(len(lines), shapes, sum("reason" not in line for line in lines))
    return shapes, lines, flaw

  def _believed(self) -> tuple[list[dict], str]:
    """Returns (what the lines say, up to the first that is not as it was written; what is wrong with that one).

    A line that has no end is what a kill leaves, and nothing wrong.
    """
    found: list[dict] = []
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(open(self._path, "rb"))
      arrays: list[tuple[Any, int]] = []  # a file of rows, and the bytes of one
      while (line := file.readline()).endswith(b"\n"):
        body, value = _parsed(line)
        if not found and value is not None and "crc" not in value:
          break  # of earlier releases, whose results have another key
        if value is None:
          return found, self._describe_flaw(len(found))
        rows = [rows.read(size) for rows, size in arrays] if "reason" not in value else ()
        crc = _crc(body, rows, self._ends[-1][1])
        if value.pop("crc", "") != f"{crc:08x}":
          return found, self._describe_flaw(len(found))
        self._ends.append((file.tell(), crc))
        if not found and value.get("key") != self._key:
          return [value], ""  # of something else
        if not found:
          there = {name: shape for name, shape in value["shapes"].items() if os.path.exists(self._beside(name))}
          arrays = [(stack.enter_context(open(self._beside(name), "rb")), 4 * math.prod(shape))
                    for name, shape in there.items()]
        found.append(value)
    return found, ""

  def _describe_flaw(self, lines: int) -> str:
    again = f"examples from number {(lines - 1) // self._batch_size * self._batch_size} on" if lines else "all examples"
    return f"{self._path}, line {lines + 1}: not as it was written, or its arrays are not; {again} are measured again"

  def _truncate(self, count: int, shapes: dict[str, Sequence[int]], readable: int | None = None) -> None:
    """Cuts the files behind the first `count` examples, `readable` of which have rows."""
    os.truncate(self._path, self._ends[count + 1][0])
    del self._ends[count + 2 :]
    for name, shape in shapes.items():
      with contextlib.suppress(FileNotFoundError):
        os.truncate(self._beside(name), 4 * math.prod(shape) * (len(self._records) if readable is None else readable))

  def _rows(self, name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns the rows that are in a file, in every process."""
    rows = np.zeros((len(self._records), *shape), "<f4")
    if len(rows) and jax.process_index() == 0:
      rows[:] = np.fromfile(self._beside(name), "<f4").reshape(rows.shape)
    return rows if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(rows))


_CRC = b', "crc": "%08x"}\n'  # what a line ends in


def _crc(body: bytes, rows: Sequence[bytes], before: int) -> int:
  """Returns the CRC of a line and of the rows of its example, after those of the lines before."""
  crc = zlib.crc32(body, before)
  for row in rows:
    crc = zlib.crc32(row, crc)
  return crc


def _parsed(line: bytes) -> tuple[bytes, dict[str, Any] | None]:
  """Returns (what the CRC of a line is of, the object in it or None)."""
  try:
    value = json.loads(line)
    return line[: -len(_CRC % 0)], value if isinstance(value, dict) else None
  except (ValueError, RecursionError):
    return b"", None
