"""Checkpoints by Orbax: asynchronous, the newest and the best kept, checked and restored onto any mesh.

Layout: workdir/checkpoints/<step>/{params,optimizer,meta,manifest.json}. `params` holds the trained parameters and the
statistics, so that evaluation and conversion need not know the optimizer; `optimizer` the rest of the TrainState;
`meta` a JSON object. manifest.json says which step of which run it is, and lists size and SHA-256 of every file that
restoring reads (limber_jax.checkpoints.manifest). Process 0 writes it once all processes have written, which needs the
file system that they share anyway. A step's directory appears by a rename once all of that is there, so a killed save
leaves nothing that counts.

A checkpoint is compared with its manifest before it is read. Damage is reported in one line, and the newest checkpoint
before it that is whole is taken, except where a step was asked for by its number. A run that resumes moves what is
damaged to workdir/damaged/<step>. One that trains beside may delete the checkpoint that is being read: then another is
chosen, see `Checkpoints.read`. Checkpoints of before there were manifests are used unchecked, and one line says so.

Beside them workdir/frozen/<part> holds, once, what was drawn at random and is not trained: another machine or another
release of JAX would draw other bits.
"""

import concurrent.futures
import contextlib
import gc
import json
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from limber_jax.checkpoints import manifest, scores, workdirs
from limber_jax.checkpoints.fits import check_fits, first_line, reason
from limber_jax.checkpoints.quiet import flush_errors, one_line_a_failure
from limber_jax.checkpoints.state import TrainState
from limber_jax.config import Checkpoint
from limber_jax.errors import UserError
from limber_jax.runtime import parallel

T = TypeVar("T")
_POLICIES = ocp.checkpoint_managers
_TRIES = 50           # to read a checkpoint before a run that trains beside deletes it
_DELETED = "deleted"  # where a checkpoint goes, by a rename, before its files are deleted: none is ever half there


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: str, config: Checkpoint, *, write: bool = False,
               log: Callable[[str], None] | None = None):
    """Opens them to read or, by the one process group that trains there, to write.

    Opening to write clears away killed saves and, if an older checkpoint is whole, the damaged ones.

    Args:
      workdir: of the run.
      config: what to keep.
      write: every process of the run must open them, and call `save` and `restore` together.
      log: prints a line about damage; to stderr if None.

    Raises:
      UserError: opened to write, and none of the checkpoints there is whole, or a damaged one cannot be moved.
    """
    self.directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
    self._aside = os.path.abspath(os.path.join(workdir, "damaged"))
    self._metric = config.best
    self._workdir = workdir
    self.run = workdirs.identity(workdir)  # what the manifests say, "" of a run of before they did
    self._log = log or (lambda line: print(line, file=sys.stderr, flush=True))
    self._whole: set[int] = set()  # what was compared with its manifest
    self._manager, self._saving, self._step, self._broken = None, None, -1, False
    if write:
      self.run = parallel.broadcast_from_process_0(lambda: self.run or uuid.uuid4().hex)
      parallel.broadcast_from_process_0(self._recover)
      self._quiet = contextlib.ExitStack()
      self._quiet.enter_context(one_line_a_failure())
      # Two, because one may turn out to be damaged; the older goes only after the newer was committed.
      keep = [_POLICIES.LatestN(n=max(config.keep, 2))]
      if config.best:
        keep.append(_Best(self._score))
      self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(
        preservation_policy=_POLICIES.AnyPreservationPolicy(keep), cleanup_tmp_directories=True,
        todelete_subdir=_DELETED, async_options=ocp.AsyncOptions(
          post_finalization_callback=self._seal,
          # In the background, a directory that cannot be made is reported only when its writers waited five minutes.
          create_directories_asynchronously=False)))
      self._watch = concurrent.futures.ThreadPoolExecutor(1, "checkpoint_watch")

  def latest(self) -> int | None:
    """Returns the newest step that is whole, or None."""
    return parallel.broadcast_from_process_0(lambda: self._newest_whole()[0])

  def find(self, which: str) -> int:
    """Returns the step that `which` names: "latest", "best", a number or "".

    "latest" is the newest that is whole, "best" the one with the highest `config.best`. "" is where nobody chose: the
    best of those that are there, or the latest where nothing was measured, and a line says so.

    Raises:
      UserError: there is none, or the best or the number's is gone or damaged, or nothing says which is the best.
    """
    return parallel.broadcast_from_process_0(lambda: self._find(which))

  def read(self, which: str, reader: Callable[[int], T]) -> T:
    """Returns reader(step) of the step that `which` names, as `find` has it.

    Where a run that trains beside deletes that checkpoint while it is read, `which` is looked up again, except where it
    is a number.

    Args:
      which: "latest", "best", a number or "".
      reader: reads a step by `restore`, `restore_params` and `meta`, as far as it reads at all.

    Raises:
      UserError: as `find` and `reader` do; the number's was deleted meanwhile.
    """
    for _ in range(_TRIES):
      step = self.find(which)
      try:
        return reader(step)
      except Exception as error:
        if not parallel.broadcast_from_process_0(lambda step=step: self._is_gone(step)):
          raise
        if which.isdigit():
          raise self._deleted(step) from error
    raise UserError(f"{self.directory}: {_TRIES} times a checkpoint was deleted while it was read, by the run that "
                    "trains there; wait until it has ended, or let it keep more, with --config.checkpoint.keep")

  def save(self, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts to save `state` in the background, under its own step; returns once the arrays are copied.

    Args:
      state: may be donated to the next step right after.
      meta: what resuming needs besides arrays; plain JSON.

    Raises:
      UserError: this save could not be started, or the one before it failed.
    """
    self.wait()
    self._step = int(state.step)
    try:
      self._manager.save(self._step, args=ocp.args.Composite(
        params=ocp.args.StandardSave({"params": state.params, "stats": state.stats}),
        optimizer=ocp.args.StandardSave(_optimizer(state)),
        meta=ocp.args.JsonSave(meta | {"manifest": manifest.NAME})), force=True)
    except Exception as error:
      raise self._failed(error) from error
    self._saving = self._watch.submit(self._commit)

  def check(self) -> None:
    """Raises UserError if the save in the background has failed by now; takes no time."""
    if self._saving is not None and self._saving.done():
      self.wait()

  def wait(self) -> None:
    """Returns when the save under way is on disk; raises UserError if it failed."""
    saving, self._saving = self._saving, None
    if saving is not None:
      try:
        saving.result()
      except Exception as error:
        raise self._failed(error) from error

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, meta) of `step`, laid out as `like` (ShapeDtypeStructs with shardings) says.

    Raises:
      UserError: the checkpoint is damaged, or its arrays have other names, shapes or types than those of `like`; the
        message names the first.
    """
    items = self._read(step, {"params": {"params": like.params, "stats": like.stats}, "optimizer": _optimizer(like)},
                       meta=True)
    return like.replace(**items["params"], **items["optimizer"]), items["meta"]

  def restore_params(self, step: int, params: dict, stats: dict) -> tuple[dict, dict]:
    """Returns (params, stats) of `step` alone, laid out as the ShapeDtypeStructs given; raises as `restore`.

    Other than there, floats may be asked for in another precision: what was trained may be frozen elsewhere.
    """
    item = self._read(step, {"params": {"params": params, "stats": stats}})["params"]
    return item["params"], item["stats"]

  def meta(self, step: int) -> dict[str, Any]:
    """Returns what `save` was given as `meta` of `step`; raises as `restore`."""
    return self._read(step, {}, meta=True)["meta"]

  def close(self) -> None:
    """Waits, then frees the threads; raises UserError if the save under way failed."""
    try:
      self.wait()
    finally:
      if self._manager is not None:
        self._watch.shutdown()
        for end in (self._manager.wait_until_finished, self._manager.close):
          with contextlib.suppress(Exception):  # each thread of a save that failed raises; `wait` has told the first
            end()
        if self._broken:
          flush_errors()
        gc.collect()  # or what is left of such a save speaks up later
        self._manager = None
        self._quiet.close()

  def _steps(self) -> list[int]:
    """Returns the committed steps, the oldest first."""
    with os.scandir(self.directory) if os.path.isdir(self.directory) else contextlib.nullcontext(()) as entries:
      return sorted(int(e.name) for e in entries if e.name.isdigit() and e.is_dir())

  def _is_gone(self, step: int) -> bool:
    return not os.path.isdir(os.path.join(self.directory, str(step)))

  def _deleted(self, step: int) -> UserError:
    others = ", ".join(map(str, self._steps())) or "none"
    return UserError(f"{self.directory}: the run that trains there deleted checkpoint {step} while it was read; there "
                     f"are now {others}: name one of them, latest or best, or let it keep more, with "
                     "--config.checkpoint.keep")

  def _damage(self, step: int) -> str | None:
    """Returns what is wrong with the files of a step, or None; reads each of them once for each of these objects."""
    if step in self._whole:
      return None
    path = os.path.join(self.directory, str(step))
    if not os.path.exists(os.path.join(path, manifest.NAME)):
      if _promises_manifest(path):
        return f"{manifest.NAME} is missing"
      self._log(f"{path} is of before checkpoints had a {manifest.NAME}: it is used unchecked")
    elif (damage := manifest.compare(path, step=step, run=self.run)) is not None:
      return damage
    self._whole.add(step)
    return None

  def _newest_whole(self) -> tuple[int | None, dict[int, str]]:
    """Returns (the newest step that is whole or None, what is wrong with the newer ones)."""
    damaged = {}
    for step in reversed(self._steps()):
      damage = self._damage(step)
      if damage is None:
        return step, damaged
      if not self._is_gone(step):
        damaged[step] = damage
    return None, damaged

  def _find(self, which: str) -> int:
    while True:
      steps = self._steps()
      try:
        return self._find_among(steps, which)
      except UserError as error:
        now = set(self._steps())
        if which.isdigit() and int(which) in set(steps) - now:
          raise self._deleted(int(which)) from error
        if which.isdigit() or now == set(steps):
          raise

  def _find_among(self, steps: list[int], which: str) -> int:
    if not steps:
      raise UserError(f"{self.directory}: no checkpoint there yet")
    others = ", ".join(map(str, steps))
    if which in ("best", ""):
      best, why = scores.best(self._workdir, self._metric, steps)
      if why and which:
        raise UserError(f"{self.directory}: no checkpoint is the best: {why}; there are latest and {others}")
      which = "latest" if best is None else str(best)
      if why and self._metric:
        self._log(f"{self.directory}: {why}; {which if best is None else f'step {which}'} is used")
    if which == "latest":
      step, damaged = self._newest_whole()
      if step is None:
        raise self._none_whole(damaged)
      for bad, why in damaged.items():
        self._log(f"{self.directory}/{bad} is damaged: {why}; step {step} is used in its place")
      return step
    if not which.isdigit() or int(which) not in steps:
      raise UserError(f"{self.directory}: no checkpoint {which!r}; there are latest, best and {others}")
    if (damage := self._damage(int(which))) is not None:
      raise UserError(f"{self.directory}/{which} is damaged: {damage}; there are {others}")
    return int(which)

  def _score(self, step: int) -> float | None:
    """Returns `config.best` of a step; None where it was not measured."""
    return scores.measured(self._workdir, self._metric, [step]).get(step)

  def _none_whole(self, damaged: dict[int, str]) -> UserError:
    return UserError(f"{self.directory}: no checkpoint is whole: "
                     + "; ".join(f"{step}: {why}" for step, why in sorted(damaged.items())))

  def _recover(self) -> None:
    """Moves damaged checkpoints away, and ends the deletion that a kill cut short; process 0 alone."""
    shutil.rmtree(os.path.join(self.directory, _DELETED), ignore_errors=True)
    newest, damaged = self._newest_whole()
    if newest is None and damaged:
      raise self._none_whole(damaged)
    # Of the older ones only what Orbax reads as it opens them: to read all takes as long for each as for the newest.
    for step in self._steps():
      path = os.path.join(self.directory, str(step))
      if step not in damaged and step != newest and (why := manifest.compare(path, "metrics/")):
        damaged[step] = why
    for step, why in damaged.items():
      path, target = os.path.join(self.directory, str(step)), os.path.join(self._aside, str(step))
      try:
        shutil.rmtree(target, ignore_errors=True)
        os.makedirs(self._aside, exist_ok=True)
        os.rename(path, target)
      except OSError as error:
        raise UserError(f"{path} is damaged: {why}; and it cannot be moved to {target} ({error.strerror})") from error
      self._log(f"{path} is damaged: {why}; it was moved to {target}, and step {newest} is used in its place")

  def _read(self, step: int, like: dict[str, Any], *, meta: bool = False) -> dict[str, Any]:
    """Returns items of a checkpoint, laid out as `like` says; raises as `restore`."""
    path = os.path.join(self.directory, str(step))

    def check():
      if (damage := self._damage(step)) is not None:
        raise UserError(f"{path} is damaged: {damage}")

    parallel.broadcast_from_process_0(check)
    where = f"{path} does not fit this config: "
    args = {item: ocp.args.StandardRestore(want) for item, want in like.items()}
    items, problem = {}, None
    try:
      for item, want in like.items():
        check_fits(os.path.join(path, item), want, where, cast="optimizer" not in like)
      # Not by ocp.Checkpointer: its processes wait for each other, also for one that cannot read.
      with contextlib.closing(ocp.CompositeCheckpointHandler()) as reader:
        items = dict(reader.restore(epath.Path(path), args=ocp.args.Composite(
          **args, **({"meta": ocp.args.JsonRestore()} if meta else {}))).items())
    except UserError as error:
      problem = str(error)
    except (ValueError, OSError) as error:
      problem = f"{where}{first_line(error)}"
    parallel.fail_together(problem)
    if meta:
      items["meta"].pop("manifest", None)
    return items

  def _seal(self) -> None:
    """Writes the manifest of the step being saved; Orbax calls this in process 0 when all is written but the rename."""
    path = os.path.join(self.directory, str(self._step))
    written = path + ocp.path.atomicity_types.TMP_DIR_SUFFIX
    manifest.write(written if os.path.isdir(written) else path, step=self._step, run=self.run)

  def _commit(self) -> None:
    """Returns when the save under way is on disk, and what it replaces deleted."""
    self._manager.wait_until_finished()
    if jax.process_index() == 0 and os.path.isdir(deleted := os.path.join(self.directory, _DELETED)):
      shutil.rmtree(deleted)

  def _failed(self, error: Exception) -> UserError:
    self._broken = True
    steps = [step for step in self._steps() if step != self._step]
    return UserError(f"{self.directory}: step {self._step} could not be saved: {reason(error)}; "
                     + (f"the newest checkpoint is step {steps[-1]}" if steps else "there is no checkpoint yet"))


class _Best(_POLICIES.PreservationPolicy):
  """Keeps the checkpoint with the highest score, the newer of equal ones."""

  def __init__(self, score: Callable[[int], float | None]):
    self._score = score

  def should_preserve(self, checkpoints, *, context):
    del context
    scored = {c.step: score for c in checkpoints if (score := self._score(c.step)) is not None}
    best = max(scored, key=lambda step: (scored[step], step), default=None)
    return [c.step == best for c in checkpoints]


def _promises_manifest(path: str) -> bool:
  """Returns whether a checkpoint says of itself that it has a manifest, or cannot say."""
  try:
    with open(os.path.join(path, "meta", "metadata"), encoding="utf-8") as file:
      return "manifest" in json.load(file)
  except (OSError, ValueError, TypeError, RecursionError):
    return True


def _optimizer(state: TrainState) -> dict[str, Any]:
  return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped,
          "skipped_in_row": state.skipped_in_row, **({"history": state.history} if state.history else {})}


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns ShapeDtypeStructs with shardings for `tree`: what restoring onto this mesh needs."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
