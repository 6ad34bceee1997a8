"""The evaluations of a run while it trains: when each is due, and that one which fails costs only its own metrics."""

import contextlib
import traceback

from limber_jax import config as config_lib
from limber_jax.checkpoints.scores import Scores
from limber_jax.checkpoints.state import TrainState
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Stopped
from limber_jax.runtime import peers
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.signals import Interrupted
from limber_jax.runtime.writer import Log
from limber_jax.training.setup import Setup, evaluate, make_eval


class Evaluations:
  """The evaluations of an experiment that training runs: those whose `every` is not -1."""

  def __init__(self, setup: Setup, context: Context):
    """Opens their data; raises UserError if one does not fit or has none."""
    self._setup, self._context = setup, context
    self._evals = {name: make_eval(setup, name, context) for name, e in setup.config.evals.items() if e.every >= 0}

  def begin(self, scores: Scores, out: Log, tracker: TimeTracker) -> None:
    """Takes what was measured before, and where to write what will be."""
    self._scores, self._out, self._tracker = scores, out, tracker

  def due(self, step: int) -> list[str]:
    """Returns the names of those that are to be measured at a step, and have not been."""
    config = self._setup.config
    every = {name: config.evals[name].every for name in self._evals}
    names = [n for n, e in every.items() if step == config.steps or (e and step % e == 0)]
    return self._scores.missing(step, names)

  def decide_best(self, step: int) -> bool:
    """Returns whether the metric by which the best checkpoint is chosen is due: it is of no use without one."""
    return self._setup.config.checkpoint.best.partition("/")[0] in self.due(step)

  def measure(self, step: int, state: TrainState) -> None:
    """Runs those that are due, and writes what they give as one record; one that fails is named, and the rest go on.

    Raises:
      Stopped, Interrupted: the run was asked to stop; what was not measured is due at the next start.
      Exception: that of one which failed in this process and not in the others, which wait for it.
    """
    found: dict[str, float] = {}
    for name in self.due(step):
      found |= self._one(step, name, state)
    if found:
      self._out.write(step, found)
      self._out.line(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
      if missing := config_lib.missing_best(self._setup.config.checkpoint.best, found):
        self._out.line(missing)
    self._out.restart_clock()

  def tell_failed(self) -> None:
    """Says what was not measured in this run, of any of its starts."""
    for name, steps in self._scores.all_failed().items():
      self._out.line(f"{name}: not evaluated at step {', '.join(map(str, steps))}; measure it by python -m "
                     "limber_jax.evaluate")

  def _one(self, step: int, name: str, state: TrainState) -> dict[str, float]:
    """Returns the metrics of one evaluation, {} if it failed."""
    try:
      self._scores.begin(step, name)
      with self._tracker("evaluation"):
        metrics = evaluate(self._setup, {name: self._evals[name]}, state.params, state.stats)
    except (Stopped, Interrupted):
      self._scores.interrupted(step, name)
      raise
    except Exception as error:
      peers.fail_alike(f"{name}/{step}", error)
      why = _reason(error)
      self._scores.end(step, name, {}, failed=why)
      self._out.write(step, {"event": "not evaluated", "evaluation": name, "reason": why})
      self._out.line(f"step {step}  {name}: not evaluated: {why}")
      with contextlib.suppress(UserError):  # what could not be read may be there again next time
        self._evals[name] = make_eval(self._setup, name, self._context)
      return {}
    self._scores.end(step, name, metrics)
    return metrics


def _reason(error: Exception) -> str:
  """Returns what an evaluation failed of, in a line; of a fault of this program the traceback too, on stderr."""
  if isinstance(error, UserError):
    return str(error)
  if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
    traceback.print_exception(error)
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
