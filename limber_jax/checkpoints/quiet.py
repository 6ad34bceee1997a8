"""Keeps what Orbax and TensorStore print of a failed save, from each of their threads, off the terminal."""

import asyncio
import contextlib
import gc
import inspect
import logging
import sys
import traceback
import types


def _not_of_orbax(record: logging.LogRecord) -> bool:
  raised_in = traceback.extract_tb(record.exc_info[2]) if record.exc_info and record.exc_info[2] else ()
  return not (str(record.msg).startswith("[process=") or any("orbax" in frame.filename for frame in raised_in))


@contextlib.contextmanager
def one_line_a_failure():
  """While entered, what Orbax and TensorStore print of a failed save, from each of their threads, is not shown.

  They raise it too, and then it is reported once.
  """
  loggers, show = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

  def show_others(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":  # a write that ends after another one has failed
      show(unraisable)

  for logger in loggers:
    logger.addFilter(_not_of_orbax)
  sys.unraisablehook = show_others
  try:
    yield
  finally:
    for logger in loggers:
      logger.removeFilter(_not_of_orbax)
    sys.unraisablehook = show


def flush_errors() -> None:
  """Asks all that is left of Orbax's writes for its error, and closes what never began.

  Else each of them speaks up when it is collected, some at the very end of the process, behind the error reported.
  """
  for found in gc.get_objects():
    if issubclass(type(found), asyncio.Future) and found.done() and not found.cancelled():
      found.exception()
    elif type(found) is types.CoroutineType and "orbax" in found.cr_code.co_filename and (
        inspect.getcoroutinestate(found) == inspect.CORO_CREATED):
      found.close()
