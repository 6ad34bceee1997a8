"""When and what a run saves: the state, and with the first checkpoint the claim to its workdir."""

from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.frozen import keep_frozen
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.checkpoints.state import TrainState
from limber_jax.runtime import parallel
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.lock import Lock
from limber_jax.training.setup import Setup


class Saver:
  """The checkpoints of a run as its loop writes them."""

  def __init__(self, checkpoints: Checkpoints, setup: Setup, workdir: str, held: Lock, tracker: TimeTracker, *,
               start: int, fingerprint: str):
    """Takes what a checkpoint needs; nothing is written.

    Args:
      checkpoints: opened to write.
      setup: of the run.
      workdir: of the run.
      held: the lock on it.
      tracker: that saving counts in.
      start: the step of the state that is on disk already, or 0.
      fingerprint: of the data, which a checkpoint repeats.
    """
    self._checkpoints, self._setup, self._workdir, self._held = checkpoints, setup, workdir, held
    self._tracker, self._start, self._fingerprint = tracker, start, fingerprint
    self._saved: int | None = None

  @property
  def last(self) -> int:
    """The step that the same command would resume from."""
    return self._start if self._saved is None else self._saved

  def due(self, step: int) -> bool:
    """Returns whether it is time for a checkpoint, whatever else happens at this step."""
    config = self._setup.config
    return step % config.checkpoint.every == 0 or step == config.steps

  def save(self, step: int, state: TrainState) -> None:
    """Starts to save the state of `step` in the background; raises UserError if it or the save before it failed."""
    self._held.check()
    with self._tracker("save"):
      if self._saved is None:
        self._claim()
      self._checkpoints.save(state, {"data": self._fingerprint, "frozen": self._setup.digests})
    self._saved = step

  def check(self) -> None:
    """Raises UserError if the save in the background has failed by now; takes no time."""
    self._checkpoints.check()

  def wait(self) -> None:
    """Returns when the save under way is on disk; raises UserError if it failed."""
    with self._tracker("save"):
      self._checkpoints.wait()

  def close(self) -> None:
    """Waits, then frees the threads; raises UserError if the save under way failed."""
    with self._tracker("save"):
      self._checkpoints.close()

  def _claim(self) -> None:
    s = self._setup
    for part in s.drawn:
      keep_frozen(self._workdir, part, {"params": s.frozen.params[part], "stats": s.frozen.stats.get(part, {})})
    parallel.broadcast_from_process_0(lambda: workdirs.claim(s.config, self._workdir, self._checkpoints.run))
