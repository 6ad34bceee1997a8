"""Files that are whole or not there: written beside, made durable, and put into place at once.

What is no regular file, such as a FIFO or /dev/stdout, is written to as it comes, and never replaced; a link stays, and
the file that it leads to is replaced.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from typing import IO, Any

from limber_jax.errors import UserError

SUFFIX = ".tmp"  # of a file that is not whole


@contextlib.contextmanager
def atomic_write(path: str, mode: str = "w", *, what: str = "") -> Iterator[IO]:
  """Yields a file to write to, which has the name `path` once this is left without an error; else nothing is left.

  Args:
    path: of the file, in a directory that is there; one of this name is replaced.
    mode: "w" for text in UTF-8, "wb" for bytes.
    what: is written, for messages, such as "--out=x.md"; "" is the path.

  Raises:
    UserError: it cannot be written; an OSError of what writes to it is taken for that.
  """
  try:
    target = _target(path)
    with open_direct(path, mode) if target is None else _beside(target, mode) as file:
      yield file
  except OSError as error:
    raise refusal(what or path, error) from error


def check(path: str, *, what: str = "") -> None:
  """Raises UserError if `atomic_write` could not write there; to be asked before anything is computed.

  What is no regular file is not opened: a FIFO would wait for its reader.
  """
  try:
    target = _target(path)
    if target is not None:
      with _beside(target, "wb", keep=False):
        pass
    elif not os.access(path, os.W_OK):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  except OSError as error:
    raise refusal(what or path, error) from error


def is_regular(path: str) -> bool:
  """Returns whether `path` is, or would be, a regular file; raises OSError of a directory, or of links in a circle."""
  return _target(path) is not None


def refusal(what: str, error: Exception) -> UserError:
  """Returns the error of what cannot be written."""
  return UserError(f"{what}: cannot be written ({getattr(error, 'strerror', None) or error})")


def commit(temporary: str, path: str) -> None:
  """Makes the closed file `temporary` durable and gives it the name `path`; raises OSError if it cannot."""
  with open(temporary, "rb+") as file:
    os.fsync(file.fileno())
  os.replace(temporary, path)
  _sync_directory(path)


def save_figure(figure: Any, path: str, **options: Any) -> None:
  """Writes a figure of matplotlib as a PNG, which is there once it is whole; raises UserError if it cannot."""
  with atomic_write(path, "wb") as file:
    figure.savefig(file, format="png", **{"dpi": 110, **options})


def open_direct(path: str, mode: str = "w") -> IO:
  """Returns what is no regular file, opened: of /dev/stdout and the like the descriptor that is open already."""
  own = re.fullmatch(rf"/proc/(?:self|{os.getpid()})/fd/(\d+)", _resolved(path))
  fd = os.dup(int(own[1])) if own else os.open(path, os.O_WRONLY | os.O_CLOEXEC)
  return _file(fd, mode)


def _resolved(path: str) -> str:
  """Returns where links lead from `path`, up to what need not exist; into /proc/PID/fd no link is followed."""
  for _ in range(40):
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    if path.startswith("/proc/") or not os.path.islink(path):
      return path
    path = os.path.join(os.path.dirname(path), os.readlink(path))
  raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _target(path: str) -> str | None:
  """Returns the regular file to replace or make, behind all links; None of what is to be written to as it is."""
  path = _resolved(os.fspath(path))
  if path.startswith("/proc/"):
    return None
  if not os.path.basename(path):
    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
  try:
    kind = os.stat(path).st_mode
  except FileNotFoundError:
    return path
  if stat.S_ISDIR(kind):
    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
  return path if stat.S_ISREG(kind) else None


@contextlib.contextmanager
def _beside(target: str, mode: str, *, keep: bool = True) -> Iterator[IO]:
  """Yields a file beside `target`, which takes its place at the end if `keep`; two writers come one after the other."""
  old = os.stat(target) if os.path.exists(target) else None
  if old and not os.access(target, os.W_OK):  # a rename does not ask
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
  temporary = target + SUFFIX
  with _file(fd := _locked(temporary), mode) as file:
    try:
      os.ftruncate(fd, 0)  # what a kill left
      if old:
        with contextlib.suppress(OSError):  # of another owner
          os.fchmod(fd, stat.S_IMODE(old.st_mode))
      yield file
      if not keep:
        os.remove(temporary)
        return
      file.flush()
      os.fsync(fd)
      os.replace(temporary, target)  # while it is locked: who waits for it makes a new one
    except BaseException:
      with contextlib.suppress(OSError):
        os.remove(temporary)
      raise
  _sync_directory(target)


def _locked(temporary: str) -> int:
  """Returns a descriptor of a file that no other process writes to, waiting for one that does."""
  while True:
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
      if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise OSError(errno.EEXIST, f"{temporary} is there, and no regular file")
      with contextlib.suppress(OSError):  # a file system without
        fcntl.flock(fd, fcntl.LOCK_EX)
      if os.path.samestat(os.stat(temporary), os.fstat(fd)):
        return fd
      os.close(fd)
    except FileNotFoundError:
      os.close(fd)  # its writer has put it into place
    except BaseException:
      os.close(fd)
      raise


def _file(fd: int, mode: str) -> IO:
  return os.fdopen(fd, mode) if "b" in mode else os.fdopen(fd, mode, encoding="utf-8", errors="backslashreplace")


def _sync_directory(path: str) -> None:
  """Makes a rename durable, where the system can."""
  with contextlib.suppress(OSError):
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
