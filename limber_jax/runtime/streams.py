"""The standard streams of a command: every line goes out at once, and none of them is a reason for a run to end.

What a closed, broken or full stream cannot take is dropped: a run of days goes on without its terminal, and what it
found is in its files. Characters that the stream's encoding has not are escaped, and so are control characters, which
file names may hold. A command whose only product is what it prints says so by `must_arrive`: then it ends with `Gone`.
"""

import errno
import io
import logging
import os
import re
import select
import sys
from typing import Any

from absl import logging as absl_logging

ERASE = "\r\x1b[K"  # the one sequence that a line may begin with: it takes the place of the last one on a terminal

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


class Gone(BaseException):
  """What is printed goes nowhere any more, and nothing else is made.

  Not an Exception: it may be raised wherever something is printed, and whoever guards against damage would take it for
  some.

  Attributes:
    error: why; EPIPE where the reader has seen enough.
  """

  def __init__(self, error: OSError):
    super().__init__(str(error))
    self.error = error


class _Raw(io.RawIOBase):
  """A descriptor that takes everything, and drops what cannot be written."""

  def __init__(self, fd: int, name: str):
    self._fd, self.name, self.mode = fd, name, "wb"
    self.must_arrive = False

  def writable(self) -> bool:
    return True

  def fileno(self) -> int:
    return self._fd

  def isatty(self) -> bool:
    return os.isatty(self._fd)

  def write(self, data: Any) -> int:
    view = memoryview(data).cast("B")
    sent = 0
    while sent < len(view):
      try:
        sent += os.write(self._fd, view[sent:])
      except BlockingIOError:  # of a terminal or a pipe that someone else has made so
        select.select([], [self._fd], [])
      except OSError as error:
        self._lose(error)
        break
    return len(view)

  def _lose(self, error: OSError) -> None:
    if error.errno in (errno.EPIPE, errno.EBADF):  # for good: libraries and child processes need not hear of it either
      _point_at_nothing(self._fd)
    if self.must_arrive:
      self.must_arrive = False
      raise Gone(error)


class _Text(io.TextIOWrapper):
  """Text in which control characters are shown, not obeyed."""

  def write(self, text: str) -> int:
    if text.isprintable() or text == "\n":
      return super().write(text)
    head = next(start for start in (ERASE, "\r", "") if text.startswith(start))  # a bar of progress begins with "\r"
    super().write(head + _CONTROL.sub(lambda m: repr(m[0])[1:-1], text[len(head) :]))
    return len(text)


def install() -> None:
  """Puts such streams in the place of sys.stdout and sys.stderr, and of what logging writes to.

  A stream that is none of the process's own, such as a test's, stays and gets the escapes alone.
  """
  if _is_free(0):  # else the next file that is opened is the standard input of whatever is started
    _point_at_nothing(0)
  for fd, name in ((1, "stdout"), (2, "stderr")):
    old = getattr(sys, name)
    new = _replacement(fd, f"<{name}>", old)
    if new is not old:
      setattr(sys, name, new)
      setattr(sys, f"__{name}__", new)
      for handler in _handlers():
        if handler.stream is old:
          handler.setStream(new)


def must_arrive() -> None:
  """Says that this process makes nothing but what it prints: a print that is lost raises Gone from now on.

  Raises:
    Gone: standard output is closed already.
  """
  raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
  if isinstance(raw, _Raw):
    if raw.name == _CLOSED:
      raise Gone(OSError(errno.EBADF, "it is closed"))
    raw.must_arrive = True


_CLOSED = "<closed>"


def _replacement(fd: int, name: str, old: Any) -> Any:
  """Returns the stream to use in place of `old`, which is None where the descriptor was closed at start."""
  encoding = "utf-8"
  if old is None:
    name = _CLOSED
    if _is_free(fd):  # else the next file that is opened, a checkpoint say, would get what libraries print
      _point_at_nothing(fd)
    else:
      fd = os.open(os.devnull, os.O_WRONLY)
  else:
    try:
      own = old.fileno() == fd
    except (AttributeError, OSError, ValueError):
      own = False
    if not own:
      if hasattr(old, "reconfigure"):
        old.reconfigure(errors="backslashreplace")
      return old
    encoding = old.encoding
    try:
      old.flush()
    except OSError:
      _point_at_nothing(fd)
  return _Text(io.BufferedWriter(_Raw(fd, name)), encoding, "backslashreplace", line_buffering=True)


def _handlers() -> list[logging.StreamHandler]:
  """Returns the handlers of logging that write to a stream."""
  loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
  found = [handler for logger in loggers for handler in logger.handlers]
  found.append(absl_logging.get_absl_handler().python_handler)
  return [handler for handler in found if isinstance(handler, logging.StreamHandler)]


def _is_free(fd: int) -> bool:
  try:
    os.fstat(fd)
  except OSError:
    return True
  return False


def _point_at_nothing(fd: int) -> None:
  """Makes a descriptor one of /dev/null, which takes everything."""
  null = os.open(os.devnull, os.O_RDWR)
  if null != fd:
    os.dup2(null, fd)
    os.close(null)
  else:
    os.set_inheritable(fd, True)
