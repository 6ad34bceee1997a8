"""One writer at a time: a lock that a process holds on a directory or a file, and that says who holds it.

The file beside (or in) what is locked holds one JSON object, {"host", "pid", "since", …}, and is gone when the holder
has ended. On one machine the operating system keeps the lock (flock), so one that a kill left behind is taken over at
once. Machines that share a file system may not see each other's flock. There the holder gives a sign of life every BEAT
seconds, by writing the file again; without any for STALE seconds it is taken for gone. Both times are the file's own,
so the clocks of the machines need not agree.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from limber_jax.errors import UserError

NAME = ".lock"  # of the file, in a directory that is locked
BEAT = 5.0      # seconds
STALE = 60.0    # seconds; after them a holder on another machine is taken for gone
_POLL = 0.1     # seconds

_descriptors: set[int] = set()


def _close_all() -> None:
  for fd in _descriptors:
    with contextlib.suppress(OSError):
      os.close(fd)
  _descriptors.clear()


os.register_at_fork(after_in_child=_close_all)  # else a child that outlives this process would go on holding the lock


class Lock:
  """While entered, this process alone holds all of some paths. Enter and `check` in all processes of a run together."""

  def __init__(self, *paths: str, what: str = "", otherwise: str = "", wait: float = 0.0,
               first: Callable[[Callable[[], None]], Any] = lambda function: function(),
               log: Callable[[str], None] | None = None):
    """Names what to hold.

    Args:
      paths: of lock files; their directories are made.
      what: is held, for messages, such as "runs/a"; each path without its ".lock" if "".
      otherwise: what else a user may do where it is in use, such as "choose another --workdir".
      wait: seconds to wait for others, who hold it for a moment.
      first: `parallel.broadcast_from_process_0`: calls a function in process 0 of several, raises its UserError in all.
      log: prints a line; to stderr if None.
    """
    self._paths, self._what, self._otherwise, self._wait, self._first = paths, what, otherwise, wait, first
    self._log = log or (lambda line: print(line, file=sys.stderr, flush=True))
    self._held: dict[str, tuple[int, bytes]] = {}  # path -> (descriptor, what the file says)
    self._made: list[str] = []                     # directories that were not there
    self._left = threading.Event()

  def __enter__(self) -> "Lock":
    """Takes the lock; raises UserError if another process has it, or where nothing can be written."""
    self._first(self._take)
    return self

  def __exit__(self, *_: object) -> None:
    self._left.set()
    for path, (fd, identity) in self._held.items():
      if _is_own(path, fd, identity):
        with contextlib.suppress(OSError):
          os.remove(path)
      _descriptors.discard(fd)
      os.close(fd)
    for directory in reversed(self._made):
      with contextlib.suppress(OSError):  # not empty
        os.rmdir(directory)
    self._held, self._made = {}, []

  def check(self) -> None:
    """Raises UserError if another process has taken the lock away; to be asked before something is written."""
    self._first(self._check)

  def _check(self) -> None:
    for path, (fd, identity) in self._held.items():
      if not _is_own(path, fd, identity):
        holder = _read(path)
        now = f"{_name(holder)} has taken it over" if holder else f"{path} was removed"
        raise UserError(f"{self._called(path)} is no longer held by this process: {now}; this one ends, and writes no "
                        "more")

  def _take(self) -> None:
    until = time.monotonic() + self._wait
    try:
      for path in self._paths:
        while (line := self._try(path)) is not None:
          if time.monotonic() >= until:
            raise UserError(line)
          time.sleep(_POLL)
    except BaseException:
      self.__exit__()
      raise
    threading.Thread(target=self._beat, name="lock", daemon=True).start()

  def _try(self, path: str) -> str | None:
    """Takes one path; returns a line that names its holder if there is one."""
    try:
      self._make(os.path.dirname(os.path.abspath(path)))
      while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
          held, flocks = False, True
          try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
          except BlockingIOError:
            held = True
          except OSError:  # a file system without
            flocks = False
          if not _same_file(path, fd):  # its holder has ended since it was opened
            continue
          holder = _parse(os.pread(fd, 4096, 0))
          if holder or held:
            here = (holder or {}).get("boot") == _boot() and (flocks or holder["pids"] == _namespace())
            age = None if held or here else _age(path, fd)
            if held or (here and not flocks and _alive(holder)) or (age is not None and age < STALE):
              return self._refusal(path, holder, age)
            if age is not None:
              self._log(f"{self._called(path)} was in use by {_name(holder)}, whose last sign of life was {age:.0f} s "
                        "ago: it is taken over")
          identity = _own()
          _write(fd, identity)
          self._held[path] = (fd, identity)
          _descriptors.add(fd)
          return None
        finally:
          if path not in self._held:
            os.close(fd)
    except OSError as error:
      raise UserError(f"{self._called(path)}: cannot write there ({error.strerror})") from error

  def _called(self, path: str) -> str:
    return self._what or str(path).removesuffix(NAME)

  def _make(self, directory: str) -> None:
    missing = []
    while not os.path.isdir(directory) and not os.path.lexists(directory):
      missing.append(directory)
      directory = os.path.dirname(directory)
    if os.path.islink(directory) and not os.path.exists(directory):
      raise OSError(errno.ENOENT, f"{directory} is a link to {os.readlink(directory)}, which is not there")
    for new in reversed(missing):
      os.makedirs(new, exist_ok=True)
      self._made.append(new)
    if not missing and not os.path.isdir(directory):
      os.makedirs(directory)  # raises what is wrong with it

  def _refusal(self, path: str, holder: dict[str, Any] | None, age: float | None) -> str:
    line = f"{self._called(path)} is in use by {_name(holder)}"
    if age is None:
      return f"{line}; wait until it has ended" + (f", or {self._otherwise}" if self._otherwise else "")
    if age < -BEAT:  # no wait would ever end
      return (f"{line}, another machine, whose last sign of life bears a time {-age:,.0f} s ahead of the clock here: "
              f"whether it is gone cannot be told; if it is, remove {path}"
              + (f", or {self._otherwise}" if self._otherwise else ""))
    return (f"{line}, another machine, whose last sign of life was {max(age, 0):.0f} s ago; wait until it has ended"
            + (f", or {self._otherwise}" if self._otherwise else "")
            + f"; if it is gone, start again in {STALE - age:.0f} s, or remove {path}")

  def _beat(self) -> None:
    while not self._left.wait(BEAT):
      for path, (fd, identity) in list(self._held.items()):
        with contextlib.suppress(OSError):  # a full disk, say: the age tells it to others, `check` to this process
          if _is_own(path, fd, identity):
            _write(fd, identity)


def _own() -> bytes:
  """Returns what the file of a lock of this process says."""
  return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": _utc(time.time()), "boot": _boot(),
                     "pids": _namespace(), "began": _began(os.getpid()), "token": os.urandom(8).hex()}).encode() + b"\n"


def _write(fd: int, identity: bytes) -> None:
  os.pwrite(fd, identity, 0)
  os.ftruncate(fd, len(identity))
  os.fsync(fd)


def _is_own(path: str, fd: int, identity: bytes) -> bool:
  try:
    return _same_file(path, fd) and os.pread(fd, 4096, 0) == identity
  except OSError:  # it cannot be known: nobody was seen to take it
    return True


def _same_file(path: str, fd: int) -> bool:
  try:
    return os.path.samestat(os.stat(path), os.fstat(fd))
  except FileNotFoundError:
    return False


def _read(path: str) -> dict[str, Any] | None:
  try:
    with open(path, "rb") as file:
      return _parse(file.read(4096))
  except OSError:
    return None


def _parse(data: bytes) -> dict[str, Any] | None:
  """Returns what a file says; None of one that is empty or half written."""
  try:
    holder = json.loads(data)
    return {key: holder[key] for key in ("host", "pid", "since", "boot", "pids", "began")}
  except (ValueError, KeyError, TypeError):
    return None


def _name(holder: dict[str, Any] | None) -> str:
  return (f"process {holder['pid']} on host {holder['host']} since {holder['since']}" if holder else
          "a process that has only just begun")


def _age(path: str, fd: int) -> float:
  """Returns the seconds since the holder's last sign of life, by the clock of the file system."""
  now = f"{path}.{os.getpid()}"
  try:
    with open(now, "wb") as file:
      file.write(b"\n")
      file.flush()
      os.fsync(file.fileno())
      return os.fstat(file.fileno()).st_mtime - os.fstat(fd).st_mtime
  finally:
    with contextlib.suppress(OSError):
      os.remove(now)


def _alive(holder: dict[str, Any]) -> bool:
  return _began(holder["pid"]) == holder["began"]


def _began(pid: int) -> str:
  """Returns when a process of this machine began, in ticks; "" if there is none, or where the system does not tell."""
  try:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
      return file.read().rpartition(")")[2].split()[19]  # field 22 of proc(5)
  except (OSError, IndexError):
    return ""


def _boot() -> str:
  """Returns what names this machine since it was started: containers on it share it, and flock."""
  try:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
      return file.read().strip()
  except OSError:
    return socket.gethostname()


def _namespace() -> str:
  """Returns what the numbers of processes belong to: each container has its own."""
  try:
    return os.readlink("/proc/self/ns/pid")
  except OSError:
    return ""


def _utc(seconds: float) -> str:
  return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
