"""Where a command may write: never over what it reads, and never over a file of a run.

Every command with --out or DST asks `file` or `directory` before anything is computed. "-" is standard output: who
prints lines takes it for that, and here, where a file or a directory is wanted, it is refused ("./-" is one of that
name).
"""

import contextlib
import os
from collections.abc import Iterable

from limber_jax.checkpoints import workdirs
from limber_jax.config import Source
from limber_jax.data.sources import webdataset
from limber_jax.errors import UserError
from limber_jax.runtime import atomic, lock

STDOUT = "-"
PARTIAL = ".partial"  # of rows that are not all there; see `limber_jax.inference.output`
# What a run keeps of itself, and what was measured of it. report.md is not among them: `report --out` writes it anew.
_FILES = (*workdirs.WRITTEN, "goodput.json", "results.json", lock.NAME)
_FOLDERS = (workdirs.CHECKPOINTS, "damaged", "frozen", "evaluation", "tensorboard")


def file(path: str, *, what: str, reads: Iterable[str] = ()) -> None:
  """Raises UserError if the file `path` cannot be written, or is one that must not be replaced.

  Args:
    path: of the file, with a name of its own while it is not whole.
    what: is written, for messages, such as "--out=x.md".
    reads: files that the same command reads, and directories of which it may read any file.
  """
  if path == STDOUT:
    raise UserError(f"{what}: wanted the name of a file, for what is written is no text; ./- is a file of that name")
  try:
    regular = atomic.is_regular(path)
  except OSError as error:
    raise atomic.refusal(what, error) from error
  if regular:
    _check_replaced(path, what, reads)
  atomic.check(path, what=what)  # the last, for it makes and removes a file beside


def directory(path: str, *, what: str, runs: bool = False) -> None:
  """Raises UserError if the directory `path` cannot be one to fill: a file, standard output, or a part of a run.

  Args:
    path: of the directory, which need not be there.
    what: is written, for messages.
    runs: whether it may be a workdir, of a run or of results.
  """
  if path == STDOUT:
    raise UserError(f"{what}: wanted the name of a directory; ./- is one of that name")
  if os.path.lexists(path) and not os.path.isdir(path):
    kind = "a link that leads nowhere" if os.path.islink(path) else "a file"
    raise UserError(f"{what}: is {kind}, where a directory belongs; choose another")
  real = os.path.realpath(path)
  if run := (real if _is_run(real) and not runs else _run_of(real)):
    raise UserError(f"{what}: is {'the workdir of a run' if run == real else f'a part of the run in {run}'}; choose "
                    "another directory")


def weights(path: str) -> list[str]:
  """Returns the files that weights at `path` may consist of: lines of JSON beside them are results, which may go."""
  if not os.path.isdir(path):
    return [path] if path else []
  return [entry.path for entry in os.scandir(path) if entry.is_file() and not entry.name.endswith((".jsonl", PARTIAL))]


def data(config: Source) -> list[str]:
  """Returns the files and directories that a data source reads, as far as its settings name them."""
  others = [getattr(config, name) for name in config.paths if name != "path"]
  if os.path.isdir(config.path):
    return [config.path, *others]
  with contextlib.suppress(UserError):  # which the source itself will tell
    return [*webdataset.shards(config.path, "", ""), *others]
  return others


def _check_replaced(path: str, what: str, reads: Iterable[str]) -> None:
  real = os.path.realpath(path)
  if run := _run_of(real):
    raise UserError(f"{what}: belongs to the run in {run}, and would be replaced; choose another file")
  names = (real, *(f"{real}{end}" for end in (PARTIAL, atomic.SUFFIX, PARTIAL + atomic.SUFFIX)))
  there = [(name, stat) for name in names if (stat := _stat(name))]
  for read in reads if there else ():
    for name, stat in there:
      if (found := _stat(read)) and os.path.samestat(found, stat):
        raise UserError(f"{what}: {'' if name == real else f'{name} '}is read by this command, and would be replaced; "
                        "choose another file")
      if os.path.isdir(read) and name.startswith(os.path.join(os.path.realpath(read), "")):
        raise UserError(f"{what}: is there already, in {read}, which this command reads; choose another file")


def _is_run(folder: str) -> bool:
  """Returns whether a folder is the workdir of a run, or of an evaluation of weights from elsewhere."""
  def has(name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))
  return has(workdirs.RUN) or (has(workdirs.CONFIG) and has(workdirs.CHECKPOINTS)) or (
    has("results.json") and has("evaluation"))


def _run_of(real: str) -> str:
  """Returns the workdir of the run that a file is, or would be, a part of; "" if there is none."""
  folder, below = os.path.split(real)
  while folder != os.path.dirname(folder):
    if (below in _FILES or below.split(os.sep)[0] in _FOLDERS) and _is_run(folder):
      return folder
    folder, name = os.path.split(folder)
    below = os.path.join(name, below)
  return ""


def _stat(path: str) -> os.stat_result | None:
  with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL in the path
    return os.stat(path)
  return None
