"""Checkpoints written in the background by Orbax, sealed with a manifest, the newest and the best of them kept."""

import concurrent.futures
import contextlib
import gc
import os
import shutil
from typing import Any

import jax
import orbax.checkpoint as ocp

from limber_jax.checkpoints import manifest
from limber_jax.checkpoints.fits import reason
from limber_jax.checkpoints.quiet import flush_errors, one_line_a_failure
from limber_jax.checkpoints.state import TrainState, optimizer_item
from limber_jax.checkpoints.steps import DELETED, Steps
from limber_jax.config import Checkpoint
from limber_jax.errors import UserError

_POLICIES = ocp.checkpoint_managers


class Writer:
  """What saves the steps of one run; all its processes call the same of it together."""

  def __init__(self, steps: Steps, config: Checkpoint):
    """Starts its threads.

    Args:
      steps: of the workdir.
      config: what to keep.
    """
    self._steps = steps
    self._saving, self._step, self._broken = None, -1, False
    self._quiet = contextlib.ExitStack()
    self._quiet.enter_context(one_line_a_failure())
    # Two, because one may turn out to be damaged; the older goes only after the newer was committed.
    keep = [_POLICIES.LatestN(n=max(config.keep, 2))]
    if config.best:
      keep.append(_Best(steps))
    self._manager = ocp.CheckpointManager(steps.directory, options=ocp.CheckpointManagerOptions(
      preservation_policy=_POLICIES.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
      todelete_subdir=DELETED, async_options=ocp.AsyncOptions(
        post_finalization_callback=self._seal,
        # In the background, a directory that cannot be made is reported only when its writers waited five minutes.
        create_directories_asynchronously=False)))
    self._watch = concurrent.futures.ThreadPoolExecutor(1, "checkpoint_watch")

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts to save a state; see `Checkpoints.save`, here and below."""
    self.wait()
    self._step = int(state.step)
    try:
      self._manager.save(self._step, args=ocp.args.Composite(
        params=ocp.args.StandardSave({"params": state.params, "stats": state.stats}),
        optimizer=ocp.args.StandardSave(optimizer_item(state)),
        meta=ocp.args.JsonSave(meta | {"manifest": manifest.NAME})), force=True)
    except Exception as error:
      raise self._failed(error) from error
    self._saving = self._watch.submit(self._commit)

  def check(self) -> None:
    if self._saving is not None and self._saving.done():
      self.wait()

  def wait(self) -> None:
    saving, self._saving = self._saving, None
    if saving is not None:
      try:
        saving.result()
      except Exception as error:
        raise self._failed(error) from error

  def close(self) -> None:
    try:
      self.wait()
    finally:
      self._watch.shutdown()
      for end in (self._manager.wait_until_finished, self._manager.close):
        with contextlib.suppress(Exception):  # each thread of a save that failed raises; `wait` has told the first
          end()
      if self._broken:
        flush_errors()
      gc.collect()  # or what is left of such a save speaks up later
      self._quiet.close()

  def _seal(self) -> None:
    """Writes the manifest of the step being saved; Orbax calls this in process 0 when all is written but the rename."""
    path = self._steps.path(self._step)
    written = path + ocp.path.atomicity_types.TMP_DIR_SUFFIX
    manifest.write(written if os.path.isdir(written) else path, step=self._step, run=self._steps.run)

  def _commit(self) -> None:
    """Returns when the save under way is on disk, and what it replaces deleted."""
    self._manager.wait_until_finished()
    if jax.process_index() == 0 and os.path.isdir(deleted := os.path.join(self._steps.directory, DELETED)):
      shutil.rmtree(deleted)

  def _failed(self, error: Exception) -> UserError:
    self._broken = True
    steps = [step for step in self._steps.committed() if step != self._step]
    return UserError(f"{self._steps.directory}: step {self._step} could not be saved: {reason(error)}; "
                     + (f"the newest checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"))


class _Best(_POLICIES.PreservationPolicy):
  """Keeps the checkpoint with the highest score, the newer of equal ones."""

  def __init__(self, steps: Steps):
    self._steps = steps

  def should_preserve(self, checkpoints, *, context):
    del context
    scored = {c.step: score for c in checkpoints if (score := self._steps.score(c.step)) is not None}
    best = max(scored, key=lambda step: (scored[step], step), default=None)
    return [c.step == best for c in checkpoints]
