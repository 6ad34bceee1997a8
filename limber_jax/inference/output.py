"""Where results about images go, row by row: a table or JSON lines on the terminal, or a file by --out.

What is written for --out=FILE is in FILE.partial until it is whole: a line that says what it depends on, then for each
image what it was and its row. The same command resumes behind the last whole batch, after a signal, a kill or a full
disk.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.inference import destination
from limber_jax.inference.destination import PARTIAL
from limber_jax.runtime import atomic, lock
from limber_jax.runtime.signals import StopRequest

PROGRESS = 50  # images from which on it is reported how far they are
EVERY = 10     # seconds between two such lines
_RESUMES = "the same command resumes from there"


class Output:
  """Rows on the terminal or in a file. Enter it before the model is loaded, which takes a while."""

  def __init__(self, *, as_json: bool = False, path: str = "", reads: Iterable[str] = ()):
    """Takes how to print, and the path of a file; "" prints.

    Args:
      as_json: print an object a line, as a file has them.
      path: of the file.
      reads: the files that this command reads, none of which may be that.

    Raises:
      UserError: the file cannot be written, or must not be.
    """
    self._json, self._path = as_json or bool(path), path
    self._file: Any = None  # opened with the first row
    self._partial = ""
    self._done: list[dict[str, Any]] = []    # rows that an earlier command has written
    self._rows = 0  # in the file
    self._inputs: Sequence[dict[str, str]] = ()
    self._stop = StopRequest()
    self._held = contextlib.ExitStack()
    if path:
      destination.file(path, what=f"--out={path}", reads=reads)
      if atomic.is_regular(path):
        self._partial = os.path.realpath(path) + PARTIAL
        if _size(self._partial) and "key" not in (_lines(self._partial) or [{}])[0]:
          raise UserError(f"--out={path}: rows that are not all there go to {self._partial}, which is something else; "
                          "move it away, or choose another file")

  def __enter__(self) -> "Output":
    if self._partial:
      self._held.enter_context(lock.Lock(f"{self._partial}{lock.NAME}", what=f"--out={self._path}",
                                         otherwise="choose another file"))
      self._held.enter_context(self._stop)
    elif self._path:
      with self._named_errors():
        self._file = self._held.enter_context(atomic.open_direct(self._path))
    return self

  def __exit__(self, *_: object) -> None:
    """Closes the file; one that has no row in it is removed."""
    with contextlib.suppress(OSError):  # of a full disk: `write` has reported it
      if self._partial and self._file:
        self._file.close()
        if not self._rows:
          os.remove(self._partial)
    with contextlib.suppress(OSError):
      self._held.close()

  def resume(self, key: Callable[[], dict[str, Any]], inputs: Sequence[dict[str, str]], batch_size: int) -> int:
    """Returns how many of the inputs are done already: those of whole batches, which an earlier command has written.

    To be called once the model is there, if only to say what the rows depend on.

    Args:
      key: returns all that a row depends on but its input, plain JSON; not called without a file that can be kept.
      inputs: what the rows are about, {"image": path, …}.
      batch_size: images that go through the model together.

    Raises:
      UserError: the file cannot be written.
    """
    self._inputs = inputs
    if not self._partial:
      return 0
    first = json.loads(json.dumps({"key": key()}))
    lines = _lines(self._partial)
    if lines and lines[0] != first:
      print(f"{self._partial}: of another model, other settings or another version; begun again", file=sys.stderr)
      lines = []
    for line, given in zip(lines[1:], inputs, strict=False):
      if line.get("input") != stamped(given):  # another image, or it was changed since
        break
      self._done.append(line["row"])
    if len(self._done) < len(inputs):
      self._done = self._done[: len(self._done) // batch_size * batch_size]
    if self._done:
      print(f"resuming behind {len(self._done)} of {len(inputs)}, which are in {self._partial}", file=sys.stderr)
    kept = [first, *({"input": stamped(given), "row": row} for given, row in zip(inputs, self._done, strict=False))]
    with atomic.atomic_write(self._partial, what=f"--out={self._path}") as file:
      file.writelines(json.dumps(line) + "\n" for line in kept)
    self._rows = len(self._done)
    with self._named_errors():
      self._file = open(self._partial, "a", encoding="utf-8")  # noqa: SIM115 (`__exit__` closes it)
    return len(self._done)

  def write(self, rows: Iterable[dict[str, Any]], widths: dict[str, int], total: int,
            shown: Callable[[dict[str, Any]], dict[str, str]] = lambda row: row) -> int:
    """Writes rows, names those with an "error" on stderr, finishes the file, and returns the exit code.

    Args:
      rows: {"image": path, …, "caption": text} or {"image": path, "error": reason}, of the inputs that are not done.
      widths: of the columns of a table, in order, negative of those aligned on the right; a single one has no heading.
      total: how many rows there are, with those that are done; from PROGRESS on it is reported how far it is.
      shown: returns the columns of a row.

    Raises:
      UserError: the file cannot be written.
    """
    columns, start, number = list(widths), time.monotonic(), len(self._done)
    said, unread = start - EVERY, 0
    heading = not self._json and len(columns) > 1
    for row in self._done:
      unread += self._name_error(row)
    for number, row in enumerate(rows, len(self._done) + 1):
      unread += self._name_error(row)
      if self._file:
        self._keep(number, row)
      elif "error" not in row:
        if self._json:
          print(json.dumps(row), flush=True)
        else:
          if heading:  # not before there is a row: an error may be all that is said
            self._print(widths, {name: name for name in columns})
            heading = False
          self._print(widths, shown(row))
      now = time.monotonic()
      if total >= PROGRESS and (now - said >= EVERY or number == total):
        said = now
        rate = (number - len(self._done)) / max(now - start, 1e-9)
        print(f"{number} of {total} images, {rate:.1f} a second", file=sys.stderr, flush=True)
      if self._stop() and number < total:
        print(f"stopped by {self._stop.name} after {number} of {total}; {_RESUMES}", flush=True)
        return 0
    if self._partial:
      self._finish()
    if self._path:
      where = sys.stdout if self._partial else sys.stderr  # which --out may be
      print(f"{total - unread} lines written to {self._path}", file=where)
    if unread:
      print(f"{unread} of {total} images could not be read", file=sys.stderr)
    return 1 if unread else 0

  def _keep(self, number: int, row: dict[str, Any]) -> None:
    if not self._partial and "error" in row:
      return
    line = {"input": stamped(self._inputs[number - 1]), "row": row} if self._partial else row
    with self._named_errors():
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
    self._rows += 1

  def _finish(self) -> None:
    """Puts the rows into the file that was asked for."""
    with self._named_errors():
      self._file.close()
    with atomic.atomic_write(self._path, what=f"--out={self._path}") as out, open(self._partial, "rb") as file:
      next(file)
      for line in file:
        row = json.loads(line)["row"]
        if "error" not in row:
          out.write(json.dumps(row) + "\n")
    os.remove(self._partial)

  @contextlib.contextmanager
  def _named_errors(self):
    try:
      yield
    except OSError as error:
      raise atomic.refusal(f"--out={self._path}", error) from error

  @staticmethod
  def _name_error(row: dict[str, Any]) -> bool:
    """Names an image that could not be read; returns whether it is one."""
    if "error" in row:
      print(f"{cli.printable(row['image'])}: {cli.printable(row['error'])}", file=sys.stderr, flush=True)
    return "error" in row

  @staticmethod
  def _print(widths: dict[str, int], row: dict[str, str]) -> None:
    cells = []
    for name, width in widths.items():
      text = cli.printable(row[name] if name == "image" else " ".join(row[name].split()))
      cells.append(f"{text:>{-width}}" if width < 0 else f"{text:<{width}}")
    print("  ".join(cells).rstrip(), flush=True)


class OutFlags:
  """The flags --json and --out, of commands that write rows."""

  def __init__(self, description: str = "Print one JSON object a line."):
    """Defines them; `description` is the help of --json."""
    self._json = flags.DEFINE_bool("json", False, description)
    self._out = flags.DEFINE_string("out", "", "Write one JSON object a line to this file, which is there once it is "
                                    "whole; what is stopped resumes. - is standard output, as --json.")

  def prints(self) -> bool:
    """Returns whether standard output is all that the rows go to."""
    return self._out.value in ("", destination.STDOUT)

  def output(self, reads: Iterable[str]) -> Output:
    """Returns where to and how the flags want it; raises UserError as Output does."""
    return Output(as_json=self._json.value or bool(self._out.value), path="" if self.prints() else self._out.value,
                  reads=reads)


def _size(path: str) -> int:
  return os.path.getsize(path) if os.path.isfile(path) else 0


def _lines(path: str) -> list[dict[str, Any]]:
  """Returns what a file of JSON objects says, up to a line that a kill cut short or that is none."""
  lines = []
  with contextlib.suppress(OSError, ValueError, RecursionError), open(path, "rb") as file:
    for line in file:
      if not line.endswith(b"\n") or not isinstance(found := json.loads(line), dict):
        break
      lines.append(found)
  return lines


def stamped(given: dict[str, str]) -> list[Any]:
  """Returns an input with what tells whether its file was changed."""
  try:
    now = os.stat(given["image"])
    stamp = [now.st_size, now.st_mtime_ns, now.st_ctime_ns]
  except (OSError, ValueError):
    stamp = None
  return [given, stamp]
