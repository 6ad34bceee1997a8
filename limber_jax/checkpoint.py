"""Checkpoints by Orbax: asynchronous, the newest and the best kept, restored onto any mesh.

Layout: workdir/checkpoints/<step>/{params,optimizer,meta}. `params` holds the trained parameters and the statistics,
so that evaluation and conversion need not know the optimizer; `optimizer` the rest of the TrainState; `meta` a JSON
object. A step's directory appears by a rename once it is whole, so a killed save leaves nothing that counts.

Beside them workdir/frozen/<part> holds, once, what was drawn at random and is not trained: another machine or another
release of JAX would draw other bits.
"""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from limber_jax.config import Checkpoint
from limber_jax.errors import UserError
from limber_jax.state import TrainState

_POLICIES = ocp.checkpoint_managers


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: str, config: Checkpoint, *, write: bool = False):
    """Opens them to read or, by the one process group that trains there, to write: that clears away killed saves."""
    self.directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
    keep = [_POLICIES.LatestN(n=max(config.keep, 1))]
    best_fn = None
    if config.best:
      best_fn = lambda metrics: metrics[config.best]  # noqa: E731 (a field of Orbax's options)
      keep.append(_POLICIES.BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False))
    self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
      preservation_policy=_POLICIES.AnyPreservationPolicy(keep), best_fn=best_fn, cleanup_tmp_directories=write,
      read_only=not write))

  def latest(self) -> int | None:
    """Returns the newest step that is whole, or None."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the step with the highest `config.best`, or the newest where nothing was measured."""
    return self._manager.best_step() or self.latest()

  def find(self, which: str) -> int:
    """Returns the step that `which` names: "latest", "best" or a number; raises UserError if there is none."""
    steps = sorted(self._manager.all_steps())
    if not steps:
      raise UserError(f"{self.directory}: no checkpoint there yet")
    if which in ("latest", "best"):
      return steps[-1] if which == "latest" else self.best()
    if not which.isdigit() or int(which) not in steps:
      raise UserError(f"{self.directory}: no checkpoint {which!r}; there are latest, best and "
                      f"{', '.join(map(str, steps))}")
    return int(which)

  def save(self, state: TrainState, meta: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
    """Starts to save `state` in the background, under its own step; returns once the arrays are copied.

    Args:
      state: may be donated to the next step right after.
      meta: what resuming needs besides arrays; plain JSON.
      metrics: of the evaluations at this step, if there were any.
    """
    self._manager.save(int(state.step), args=ocp.args.Composite(
      params=ocp.args.StandardSave({"params": state.params, "stats": state.stats}),
      optimizer=ocp.args.StandardSave(_optimizer(state)),
      meta=ocp.args.JsonSave(meta)), metrics=metrics, force=True)

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, meta) of `step`, laid out as `like` (ShapeDtypeStructs with shardings) says.

    Raises:
      UserError: the checkpoint holds other arrays than `like`; the message names the first.
    """
    try:
      items = self._manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore({"params": like.params, "stats": like.stats}),
        optimizer=ocp.args.StandardRestore(_optimizer(like)),
        meta=ocp.args.JsonRestore()))
    except ValueError as error:
      raise UserError(f"{self.directory}/{step} does not fit this config: {_first_line(error)}") from error
    return like.replace(**items["params"], **items["optimizer"]), items["meta"]

  def restore_params(self, step: int, params: dict, stats: dict) -> tuple[dict, dict]:
    """Returns (params, stats) of `step` alone, laid out as the ShapeDtypeStructs given; raises as `restore`."""
    try:
      item = self._manager.restore(step, args=ocp.args.Composite(
        params=ocp.args.StandardRestore({"params": params, "stats": stats})))["params"]
    except ValueError as error:
      raise UserError(f"{self.directory}/{step} does not fit this config: {_first_line(error)}") from error
    return item["params"], item["stats"]

  def meta(self, step: int) -> dict[str, Any]:
    """Returns what `save` was given as `meta` of `step`."""
    return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

  def wait(self) -> None:
    """Returns when the save under way is on disk; raises if it failed."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then frees the manager's threads."""
    self._manager.close()


def keep_frozen(workdir: str, part: str, tree: dict[str, Any]) -> None:
  """Writes a frozen part {"params": …, "stats": …} that was drawn at random; every process must call this."""
  with ocp.StandardCheckpointer() as writer:
    writer.save(_frozen(workdir, part), tree, force=True)


def kept_frozen(workdir: str, part: str, like: dict[str, Any]) -> dict[str, Any] | None:
  """Returns what `keep_frozen` wrote, laid out as the ShapeDtypeStructs `like` say; None if it wrote nothing there.

  Raises:
    UserError: it holds other arrays than `like`.
  """
  path = _frozen(workdir, part)
  if not os.path.isdir(path):
    return None
  try:
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(path, like)
  except ValueError as error:
    raise UserError(f"{path} does not fit this config: {_first_line(error)}") from error


def _frozen(workdir: str, part: str) -> str:
  return os.path.abspath(os.path.join(workdir, "frozen", part))


def _optimizer(state: TrainState) -> dict[str, Any]:
  return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped,
          "skipped_in_row": state.skipped_in_row}


def _first_line(error: Exception) -> str:
  return " ".join(str(error).split())[:300]


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns ShapeDtypeStructs with shardings for `tree`: what restoring onto this mesh needs."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
