"""What a run of several processes says, and does, when one of them is gone.

JAX's coordination service, in process 0, ends all others once one has given no sign of life for HEARTBEAT seconds; a
process that finds process 0 gone ends itself. The signs are given by threads outside of Python, so a process that
computes or waits is never taken for dead. JAX ends a process by abort(), after a page of C++ stack. So what a process
of several writes to stderr passes through a child of its own, which puts one line in the place of that page, and
changes nothing else. (JAX 0.10's client takes a callback for this moment, and cannot call it: std::bad_cast.)

A process that ends for a reason of its own, such as a save that failed, says so to the others first, by the
coordination service: they may be waiting for it in the middle of a collective, where no exception can reach them.
"""

import atexit
import contextlib
import gc
import json
import os
import re
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from limber_jax.runtime.signals import SIGNALS, StopRequest

HEARTBEAT = 10  # seconds; measured: 8 to 9 pass from a kill to the end of the others

# With what JAX 0.10 begins to speak of a process that is gone, and what it says as it ends this one.
_BEGINS = re.compile(rb"^[IWEF]\d+ .*(coordination_service\w*|preemption_sync_manager)\.cc:\d+\]|"
                     rb"^F\d+ .*JAX distributed service detected fatal errors", re.MULTILINE)
_ENDS = b"JAX distributed service detected fatal errors"
_HELD = 5.0     # seconds that such text is held back, to see whether the process ends

_ENDING = "limber_jax/ending"  # the key of who ends first, and why
_HEARD = "limber_jax/heard"    # … and of those who know
_FAILED = "limber_jax/failed"  # … of what failed, by process
_STOP = "limber_jax/stop"      # the key of the signal that one of them got first
LATE = 10.0      # seconds after a request to stop in which one of several may still get the data that it waits for
_ALIKE = 20.0    # seconds in which all have failed of what fails in all
_PATIENCE = 5.0  # seconds in which others are to have heard
_GRACE = 2.0     # seconds in which a process with an error of its own may tell it itself
_ASK = 0.5       # seconds between two looks for the key

_left = threading.Event()  # set as this process ends in the usual way
_ends = threading.Event()  # set once this process ends with a line of its own

# What a collective raises, of Gloo on CPUs or NCCL on GPUs, when another process is no longer there.
_BROKEN = re.compile(r"Gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Cc]oordination ?[Ss]ervice|Socket closed")


def parse_jax_failure(text: bytes) -> str | None:
  """Returns the line to print in the place of what JAX wrote as it ended this process; None if it is about no process.

  Args:
    text: from the first line about the coordination service to the end.
  """
  if _ENDS not in text:
    return None
  listed = re.search(rb"stopped sending heartbeats\):\n(.*?)\nThe tasks have crashed", text, re.DOTALL)
  if listed:
    gone = sorted({int(n[-1]) for line in listed[1].split(b"\n") if (n := re.findall(rb"\d+", line))})
  elif b"Failed to send RPC to coordination service" in text or b"DEADLINE_EXCEEDED" in text:
    gone = [0]
  else:
    return None
  names = f"process {gone[0]} is" if len(gone) == 1 else f"processes {', '.join(map(str, gone))} are"
  return (f"error: {names} gone, or stands still; what was last printed there may say why. This process ends too; "
          "started again, all of them resume from the last checkpoint\n")


def watch_stderr() -> None:
  """From here on puts `parse_jax_failure` in the place of what JAX writes to stderr as it ends this process.

  To be called while this process has one thread that matters: it forks.
  """
  sys.stderr.flush()
  read, write = os.pipe()
  parent = os.getpid()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Python and JAX warn of forks beside threads; this child uses nothing of them
    child = os.fork()
  if child == 0:
    try:
      os.setsid()  # what a terminal sends, such as Ctrl-C, is for the parent
      for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
      gc.disable()
      for fd in (0, 1, write):
        os.close(fd)
      _pass_on(read, 2, parent)
    finally:
      os._exit(0)
  os.close(read)
  os.dup2(write, 2)
  os.close(write)


def _pass_on(source: int, target: int, parent: int) -> None:
  """Copies `source` to `target` until its end, but for what JAX writes as it ends the parent."""
  held, until = b"", None
  while True:
    waits = until is None or select.select([source], [], [], 0.1)[0]
    new = os.read(source, 65536) if waits else None
    ended = new == b"" or os.getppid() != parent
    held += new or b""
    if until is None and (begin := _BEGINS.search(held)):
      _write(target, held[: begin.start()])
      held, until = held[begin.start() :], time.monotonic() + _HELD
    if until is None or ended or time.monotonic() > until:
      line = parse_jax_failure(held) if ended else None
      _write(target, line.encode() if line else held)
      held, until = b"", None
    if new == b"":
      return


def _write(fd: int, data: bytes) -> None:
  with contextlib.suppress(OSError):  # nobody reads it any more: the run goes on
    while data:
      data = data[os.write(fd, data) :]


def _client():
  from jax._src import distributed  # nothing public gives it

  return distributed.global_state.client


def _ask(key: str, left: threading.Event) -> str | None:
  """Returns the value of a key once another process has set it; None once `left` is set, or JAX has left.

  Not by a call that blocks: a thread within one, as the interpreter ends, brings the process down.
  """
  while not (_left.is_set() or left.wait(_ASK)):
    try:
      return _client().key_value_try_get(key)
    except Exception as error:
      if "NOT_FOUND" not in str(error):
        return None
  return None


def _ask_in_thread(target: Callable[[], None]) -> None:
  thread = threading.Thread(target=target, name="peers", daemon=True)
  thread.start()
  atexit.register(lambda: (_left.set(), thread.join(2)))


def _set(key: str, value: str) -> None:
  with contextlib.suppress(Exception):  # it is set already, or process 0, which holds it, is gone
    _client().key_value_set(key, value)


def tell(code: int, line: str) -> None:
  """Tells the other processes of the run that this one ends with an exit code and why, and waits until they know it."""
  import jax

  _ends.set()
  me, others = jax.process_index(), [i for i in range(jax.process_count()) if i != jax.process_index()]

  def talk():
    _set(_ENDING, json.dumps({"process": me, "code": code, "line": line}))
    until = time.monotonic() + _PATIENCE
    for other in others:
      with contextlib.suppress(Exception):
        _client().blocking_key_value_get(f"{_HEARD}/{other}", max(int(1000 * (until - time.monotonic())), 1))

  thread = threading.Thread(target=talk, daemon=True)  # so that nothing holds up the end for longer
  thread.start()
  thread.join(_PATIENCE + 1)


def fail_alike(what: str, error: Exception) -> None:
  """Returns if every process of the run fails of the same; else raises `error`: the others wait for this one.

  Args:
    what: names it, once in the life of these processes.
    error: that of this process.
  """
  import jax

  if jax.process_count() == 1:
    return
  if _BROKEN.search(str(error)):
    raise error
  _set(f"{_FAILED}/{what}/{jax.process_index()}", "")
  until = time.monotonic() + _ALIKE
  for other in range(jax.process_count()):
    try:
      _client().blocking_key_value_get(f"{_FAILED}/{what}/{other}", max(int(1000 * (until - time.monotonic())), 1))
    except Exception:
      raise error from None


@contextlib.contextmanager
def shared(stop: StopRequest) -> Iterator[None]:
  """While entered, a request to stop that comes to one process comes to all; a signal may reach one of them alone.

  Those that step act on it together anyway. One that waits for data which never come must hear of it otherwise.
  """
  import jax

  if jax.process_count() == 1:
    yield
    return
  left = threading.Event()

  def pass_on():
    while not (_left.is_set() or left.wait(_ASK)):
      if stop():
        _set(_STOP, str(stop.name))
        return

  def hear():
    name = _ask(_STOP, left)
    if name is not None and not stop() and not left.is_set():
      stop.pass_on(name)

  for target in (pass_on, hear):
    _ask_in_thread(target)
  try:
    yield
  finally:
    left.set()


def listen() -> None:
  """From here on ends this process, with the same exit code, once another one tells that it ends, and says so."""
  import jax

  me = jax.process_index()

  def wait():
    if (value := _ask(_ENDING, _left)) is None:
      return
    message = json.loads(value)
    _set(f"{_HEARD}/{me}", "")
    if message["process"] == me or _ends.wait(_GRACE):
      return
    sys.stdout.flush()
    sys.stderr.write(f"error: process {message['process']} ended: {message['line']}\n")
    sys.stderr.flush()
    os._exit(message["code"])

  _ask_in_thread(wait)


@contextlib.contextmanager
def explain_failures() -> Iterator[None]:
  """While entered, an error because another process is gone waits until JAX has found out which, and ends this one."""
  try:
    yield
  except Exception as error:
    cause: BaseException | None = error
    while cause is not None:
      if _BROKEN.search(str(cause)):
        time.sleep(1.5 * HEARTBEAT)
        break
      cause = cause.__cause__
    raise
