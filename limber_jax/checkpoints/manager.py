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

import sys
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from limber_jax.checkpoints import reading, workdirs
from limber_jax.checkpoints.state import TrainState, optimizer_item
from limber_jax.checkpoints.steps import Steps
from limber_jax.checkpoints.writing import Writer
from limber_jax.config import Checkpoint
from limber_jax.errors import UserError
from limber_jax.runtime import parallel

T = TypeVar("T")
_TRIES = 50  # to read a checkpoint before a run that trains beside deletes it


class Checkpoints:
  """The checkpoints of one workdir, as all processes of a run see them."""

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
    self.run = workdirs.identity(workdir)  # what the manifests say, "" of a run of before they did
    if write:
      self.run = parallel.broadcast_from_process_0(lambda: self.run or uuid.uuid4().hex)
    log = log or (lambda line: print(line, file=sys.stderr, flush=True))
    self._steps = Steps(workdir, config.best, self.run, log)
    self.directory = self._steps.directory
    self._writer: Writer | None = None
    if write:
      parallel.broadcast_from_process_0(self._steps.recover)
      self._writer = Writer(self._steps, config)

  def latest(self) -> int | None:
    """Returns the newest step that is whole, or None."""
    return parallel.broadcast_from_process_0(lambda: self._steps.newest_whole()[0])

  def find(self, which: str) -> int:
    """Returns the step that `which` names: "latest", "best", a number or "".

    "latest" is the newest that is whole, "best" the one with the highest `config.best`. "" is where nobody chose: the
    best of those that are there, or the latest where nothing was measured, and a line says so.

    Raises:
      UserError: there is none, or the best or the number's is gone or damaged, or nothing says which is the best.
    """
    return parallel.broadcast_from_process_0(lambda: self._steps.find(which))

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
        if not parallel.broadcast_from_process_0(lambda step=step: self._steps.is_gone(step)):
          raise
        if which.isdigit():
          raise self._steps.deleted(step) from error
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
    self._writer.save(state, meta)

  def check(self) -> None:
    """Raises UserError if the save in the background has failed by now; takes no time."""
    self._writer.check()

  def wait(self) -> None:
    """Returns when the save under way is on disk; raises UserError if it failed."""
    self._writer.wait()

  def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Returns (state, meta) of `step`, laid out as `like` (ShapeDtypeStructs with shardings) says.

    Raises:
      UserError: the checkpoint is damaged, or its arrays have other names, shapes or types than those of `like`; the
        message names the first.
    """
    wanted = {"params": {"params": like.params, "stats": like.stats}, "optimizer": optimizer_item(like)}
    items = reading.read(self._steps, step, wanted, meta=True)
    return like.replace(**items["params"], **items["optimizer"]), items["meta"]

  def restore_params(self, step: int, params: dict, stats: dict) -> tuple[dict, dict]:
    """Returns (params, stats) of `step` alone, laid out as the ShapeDtypeStructs given; raises as `restore`.

    Other than there, floats may be asked for in another precision: what was trained may be frozen elsewhere.
    """
    item = reading.read(self._steps, step, {"params": {"params": params, "stats": stats}})["params"]
    return item["params"], item["stats"]

  def meta(self, step: int) -> dict[str, Any]:
    """Returns what `save` was given as `meta` of `step`; raises as `restore`."""
    return reading.read(self._steps, step, {}, meta=True)["meta"]

  def close(self) -> None:
    """Waits, then frees the threads; raises UserError if the save under way failed."""
    writer, self._writer = self._writer, None
    if writer is not None:
      writer.close()


def abstract(tree: Any, shardings: Any) -> Any:
  """Returns ShapeDtypeStructs with shardings for `tree`: what restoring onto this mesh needs."""
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
