"""Which checkpoints a workdir has, which of them are whole, and which one is meant.

All of this is done by one process, which tells the others: they might not all see the same files at the same time.
"""

import contextlib
import os
import shutil
from collections.abc import Callable

from limber_jax.checkpoints import manifest, scores
from limber_jax.errors import UserError

DELETED = "deleted"  # where a checkpoint goes, by a rename, before its files are deleted: none is ever half there


class Steps:
  """The steps under workdir/checkpoints. What was once found whole is not compared again."""

  def __init__(self, workdir: str, metric: str, run: str, log: Callable[[str], None]):
    """Looks at nothing yet.

    Args:
      workdir: of the run.
      metric: config.checkpoint.best.
      run: what the manifests say, "" of a run of before they did.
      log: prints a line about damage.
    """
    self.directory = os.path.abspath(os.path.join(workdir, "checkpoints"))
    self.run = run
    self._aside = os.path.abspath(os.path.join(workdir, "damaged"))
    self._workdir, self._metric, self._log = workdir, metric, log
    self._whole: set[int] = set()

  def path(self, step: int) -> str:
    """Returns the directory of a step."""
    return os.path.join(self.directory, str(step))

  def committed(self) -> list[int]:
    """Returns the committed steps, the oldest first."""
    with os.scandir(self.directory) if os.path.isdir(self.directory) else contextlib.nullcontext(()) as entries:
      return sorted(int(e.name) for e in entries if e.name.isdigit() and e.is_dir())

  def is_gone(self, step: int) -> bool:
    """Returns whether a step is not there, or no longer."""
    return not os.path.isdir(self.path(step))

  def deleted(self, step: int) -> UserError:
    """Returns the error that a step which was asked for was deleted while it was read."""
    others = ", ".join(map(str, self.committed())) or "none"
    return UserError(f"{self.directory}: the run that trains there deleted checkpoint {step} while it was read; there "
                     f"are now {others}: name one of them, latest or best, or let it keep more, with "
                     "--config.checkpoint.keep")

  def damage(self, step: int) -> str | None:
    """Returns what is wrong with the files of a step, or None; reads each of them once."""
    if step in self._whole:
      return None
    path = self.path(step)
    if not os.path.exists(os.path.join(path, manifest.NAME)):
      if manifest.promised(path):
        return f"{manifest.NAME} is missing"
      self._log(f"{path} is of before checkpoints had a {manifest.NAME}: it is used unchecked")
    elif (damage := manifest.compare(path, step=step, run=self.run)) is not None:
      return damage
    self._whole.add(step)
    return None

  def newest_whole(self) -> tuple[int | None, dict[int, str]]:
    """Returns (the newest step that is whole or None, what is wrong with the newer ones)."""
    damaged = {}
    for step in reversed(self.committed()):
      damage = self.damage(step)
      if damage is None:
        return step, damaged
      if not self.is_gone(step):
        damaged[step] = damage
    return None, damaged

  def find(self, which: str) -> int:
    """Returns the step that `which` names; see `Checkpoints.find`."""
    while True:
      steps = self.committed()
      try:
        return self._find_among(steps, which)
      except UserError as error:
        now = set(self.committed())
        if which.isdigit() and int(which) in set(steps) - now:
          raise self.deleted(int(which)) from error
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
      step, damaged = self.newest_whole()
      if step is None:
        raise self._none_whole(damaged)
      for bad, why in damaged.items():
        self._log(f"{self.directory}/{bad} is damaged: {why}; step {step} is used in its place")
      return step
    if not which.isdigit() or int(which) not in steps:
      raise UserError(f"{self.directory}: no checkpoint {which!r}; there are latest, best and {others}")
    if (damage := self.damage(int(which))) is not None:
      raise UserError(f"{self.directory}/{which} is damaged: {damage}; there are {others}")
    return int(which)

  def score(self, step: int) -> float | None:
    """Returns `config.best` of a step; None where it was not measured."""
    return scores.measured(self._workdir, self._metric, [step]).get(step)

  def recover(self) -> None:
    """Moves damaged checkpoints away, and ends the deletion that a kill cut short."""
    shutil.rmtree(os.path.join(self.directory, DELETED), ignore_errors=True)
    newest, damaged = self.newest_whole()
    if newest is None and damaged:
      raise self._none_whole(damaged)
    # Of the older ones only what Orbax reads as it opens them: to read all takes as long for each as for the newest.
    for step in self.committed():
      path = self.path(step)
      if step not in damaged and step != newest and (why := manifest.compare(path, "metrics/")):
        damaged[step] = why
    for step, why in damaged.items():
      path, target = self.path(step), os.path.join(self._aside, str(step))
      try:
        shutil.rmtree(target, ignore_errors=True)
        os.makedirs(self._aside, exist_ok=True)
        os.rename(path, target)
      except OSError as error:
        raise UserError(f"{path} is damaged: {why}; and it cannot be moved to {target} ({error.strerror})") from error
      self._log(f"{path} is damaged: {why}; it was moved to {target}, and step {newest} is used in its place")

  def _none_whole(self, damaged: dict[int, str]) -> UserError:
    return UserError(f"{self.directory}: no checkpoint is whole: "
                     + "; ".join(f"{step}: {why}" for step, why in sorted(damaged.items())))
