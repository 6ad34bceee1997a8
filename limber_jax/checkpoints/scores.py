"""What evaluations during training found, by step: workdir/scores.json.

A checkpoint is saved first and measured after. So what is known of a step is no part of its checkpoint, and is kept
beside them all:

    {"20": {"metrics": {"zeroshot/top1": 0.63}, "failed": {"retrieval": "why"}, "begun": {"probe": 1}}}

An evaluation that was begun and did not end was killed, perhaps by what it needs: after TRIES times it is left out.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from limber_jax import config_history
from limber_jax.errors import UserError
from limber_jax.runtime import inputs, parallel
from limber_jax.runtime.atomic import atomic_write

FILE = "scores.json"
KINDS = ("metrics", "failed", "begun")
TRIES = 3  # so often an evaluation of one step may be killed


class Scores:
  """The scores of one workdir; every process of a run calls all of these together, and process 0 writes."""

  def __init__(self, workdir: str, start: int, log: Callable[[str], None] = print, failures: list[str] | None = None):
    """Reads what is there; a damaged file is put aside, and what was measured of `start` is measured again.

    Args:
      workdir: of the run.
      start: the step that training resumes from: what is known of later ones is forgotten.
      log: prints a line, in process 0.
      failures: gets "name/step" of each evaluation that fails from now on.
    """
    self._path = os.path.join(workdir, FILE)
    self._failures = [] if failures is None else failures

    def look():
      try:
        return read(workdir)
      except UserError as error:
        log(f"{error}; it was moved to {FILE}.damaged")
        os.replace(self._path, f"{self._path}.damaged")
        return {}

    found = parallel.broadcast_from_process_0(look)  # by way of JSON, whose keys are text
    self._steps = {int(step): entry for step, entry in found.items() if int(step) <= start}

  def metrics(self, step: int) -> dict[str, float]:
    """Returns {"zeroshot/top1": 0.63, …} of a step, {} where nothing was measured."""
    return self._steps.get(step, {}).get("metrics", {})

  def failed(self, step: int) -> dict[str, str]:
    """Returns {name of an evaluation: why it gave no metrics} of a step."""
    return self._steps.get(step, {}).get("failed", {})

  def all_failed(self) -> dict[str, list[int]]:
    """Returns {name of an evaluation: the steps of which it gave no metrics}."""
    found: dict[str, list[int]] = {}
    for step in sorted(self._steps):
      for name in self.failed(step):
        found.setdefault(name, []).append(step)
    return found

  def missing(self, step: int, names: list[str]) -> list[str]:
    """Returns those of the evaluations that gave no metrics of a step yet."""
    return [name for name in names if not any(key.startswith(f"{name}/") for key in self.metrics(step))]

  def begin(self, step: int, name: str) -> None:
    """Notes that an evaluation begins; raises UserError if it has been killed TRIES times."""
    entry = self._steps.setdefault(step, {kind: {} for kind in KINDS})
    entry["failed"].pop(name, None)
    if entry["begun"].get(name, 0) >= TRIES:
      raise UserError(f"it was killed {TRIES} times at this step, perhaps for want of memory; measure it by "
                      "python -m limber_jax.evaluate")
    entry["begun"][name] = entry["begun"].get(name, 0) + 1
    self._write()

  def end(self, step: int, name: str, metrics: dict[str, float], failed: str = "") -> None:
    """Keeps what an evaluation found, or why it failed."""
    entry = self._steps[step]
    entry["begun"].pop(name, None)
    entry["metrics"] |= metrics
    if failed:
      entry["failed"][name] = failed
      self._failures.append(f"{name}/{step}")
    self._write()

  def interrupted(self, step: int, name: str) -> None:
    """Takes `begin` back: the run was asked to stop."""
    self._steps[step]["begun"].pop(name, None)
    self._write()

  def _write(self) -> None:
    if jax.process_index() == 0:
      with atomic_write(self._path) as file:
        json.dump(self._steps, file, indent=1)


def measured(workdir: str, metric: str, steps: Iterable[int]) -> dict[int, float]:
  """Returns a metric by the step that it was measured of, whether its checkpoint is there or not; {} of metric "".

  Args:
    workdir: of the run.
    metric: such as "zeroshot/top1".
    steps: of checkpoints that are there, in which earlier releases kept metrics: they measured before they saved.

  Raises:
    UserError: a file that says so is damaged.
  """
  found = {step: entry["metrics"][metric] for step, entry in (read(workdir) if metric else {}).items()
           if metric in entry["metrics"]}
  for step in steps if metric else ():
    path = os.path.join(workdir, "checkpoints", str(step), "metrics", "metrics")
    if step in found or not os.path.exists(path):
      continue
    try:
      with open(path, encoding="utf-8") as file:
        score = json.load(file).get(metric)
    except (OSError, ValueError, AttributeError) as error:
      raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:300]}; --checkpoint=latest does not need it"
                      ) from error
    found |= {} if score is None else {step: score}
  return found


def best(workdir: str, metric: str, steps: Sequence[int]) -> tuple[int | None, str]:
  """Returns (which of these steps has the highest score, the newer of equal ones, or None if it was measured of none;
  why this is not the best that there ever was, "" if it is); arguments and errors as of `measured`."""
  if not metric:
    return None, "config.checkpoint.best names no metric"
  found = measured(workdir, metric, steps)
  there = {step: score for step, score in found.items() if step in steps}
  if not there:
    return None, f"{metric} was measured of none of them"
  highest, ever = max(there, key=lambda step: (there[step], step)), max(found, key=found.get)
  gone = found[ever] > there[highest]
  return highest, f"{metric} was highest at step {ever}, whose checkpoint is gone" if gone else ""


def read(workdir: str) -> dict[int, dict[str, Any]]:
  """Returns what the file of a workdir holds; {} if there is none. Raises UserError if it is damaged."""
  path = os.path.join(workdir, FILE)
  try:
    entries = {step: config_history.keys(e) for step, e in json.loads(inputs.text(path, inputs.CONFIG)).items()}
    found = {int(step): {kind: dict(entry[kind]) for kind in KINDS} for step, entry in entries.items()}
    if not all(isinstance(v, int | float) for entry in found.values() for v in entry["metrics"].values()):
      raise ValueError("a metric is no number")
    return found
  except FileNotFoundError:
    return {}
  except (OSError, UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({_what(error)})") from error


def _what(error: Exception) -> str:
  """Returns what is wrong with the file: what was said of it, or what it should be where only Python knows what."""
  if isinstance(error, OSError):
    return error.strerror or str(error)
  if isinstance(error, json.JSONDecodeError):
    return f"not JSON: {error}"
  if isinstance(error, UserError | UnicodeDecodeError):
    return " ".join(str(error).split())
  return 'wanted {"STEP": {"metrics": {"NAME": number}, "failed": {…}, "begun": {…}}}'

