"""What the steps of a run gave: read one step late, so that the devices never wait, and acted on alike everywhere."""

import math
from collections.abc import Callable

import jax

from limber_jax.config import Config
from limber_jax.data import bad_records
from limber_jax.data.bad_records import BadRecords
from limber_jax.errors import UserError
from limber_jax.runtime.writer import Log

Metrics = dict[str, jax.Array]


class StepLog:
  """The metrics of steps, from the devices into the log.

  Those of a step are read while the next one runs, except where something is done after the step: `flush` reads them.
  """

  def __init__(self, config: Config, out: Log, damage: BadRecords, start: int, newest: Callable[[], int | None]):
    """Takes where things go.

    Args:
      config: of the run.
      out: the log.
      damage: what could not be read.
      start: the step that the run resumes from.
      newest: returns the step of the newest checkpoint, for messages.
    """
    self._config, self._out, self._damage, self._start, self._newest = config, out, damage, start, newest
    self._pending: tuple[int, Metrics] | None = None

  def push(self, step: int, metrics: Metrics) -> None:
    """Takes what step `step` gives; it may be computing still."""
    self._pending = step, metrics

  def flush(self) -> bool:
    """Writes what the last step pushed gave, once it is there; returns whether any process was asked to stop.

    Raises:
      UserError: too many steps in a row were skipped, too many records cannot be read, or processes differ in them.
    """
    pending, self._pending = self._pending, None
    return pending is not None and self._record(*pending)

  def name_bad_records(self, step: int, due: bool = True) -> None:
    """Names what could not be read up to `step`; raises UserError if it is too much."""
    if new := self._damage.flush(step, due):
      share = self._damage.share(step)
      self._out.write(step, {"event": "damaged", "records": len(new), "share": share})
      self._out.line(f"step {step}  {len(new)} more cannot be read, others are substituted: {share:.2%} of what was "
                     f"seen; {bad_records.FILE} names all; the last: {bad_records.describe(new[-1])}")

  def _record(self, step: int, metrics: Metrics) -> bool:
    config = self._config
    values = {k: v.item() for k, v in jax.device_get(metrics).items()}
    stopping, skipped, in_row = values.pop("stop"), values.pop("skipped"), values.pop("skipped_in_row")
    self._damage.count(values.pop("damaged"))
    differing = values.pop("differing")
    self.name_bad_records(step, due=bool(differing) or step % config.log_every == 0)
    if differing:
      raise UserError(f"step {step}: processes that hold the same rows of the batch (mesh axis tensor) read other "
                      f"records for {differing} of them: one could not read a file that another could. The same "
                      "command resumes from what was saved last")
    limits = {k: values.pop(k) for k in ("loss_limit", "grad_norm_limit") if k in values}
    if skipped:
      seen = {k: values[k] for k in ("loss", "grad_norm")} | limits
      self._out.write(step, {"event": "skipped"} | {k: repr(v) for k, v in seen.items()})
      self._out.line(f"step {step} skipped: " + ", ".join(f"{k} {v:.4g}" for k, v in seen.items()))
    elif step % config.log_every == 0 or step in (self._start + 1, config.steps):
      self._out.train(step, values | {k: v for k, v in limits.items() if math.isfinite(v)})
    if in_row >= config.optim.max_skips:
      raise UserError(f"steps {step - in_row + 1} to {step} had no finite loss, gradient and update"
                      f"{', or a spike' if limits else ''} (config.optim.max_skips={config.optim.max_skips}); the last "
                      f"checkpoint is step {self._newest()}; try a lower --config.optim.lr")
    return bool(stopping)
