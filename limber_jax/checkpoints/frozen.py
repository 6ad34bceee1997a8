"""A run's frozen parts that were drawn at random: kept once, for no other machine would draw the same bits."""

import os
from typing import Any

import orbax.checkpoint as ocp

from limber_jax.checkpoints import manifest
from limber_jax.checkpoints.fits import check_fits, first_line
from limber_jax.errors import UserError
from limber_jax.runtime import parallel


def keep_frozen(workdir: str, part: str, tree: dict[str, Any]) -> None:
  """Writes a frozen part {"params": …, "stats": …} that was drawn at random; every process must call this."""
  path = _frozen(workdir, part)
  with ocp.StandardCheckpointer() as writer:
    writer.save(path, tree, force=True)
  parallel.broadcast_from_process_0(lambda: manifest.write(path))


def kept_frozen(workdir: str, part: str, like: dict[str, Any]) -> dict[str, Any] | None:
  """Returns what `keep_frozen` wrote, laid out as the ShapeDtypeStructs `like` say; None if it wrote nothing there.

  Raises:
    UserError: it is damaged, or holds other arrays than `like`.
  """
  path = _frozen(workdir, part)
  if not os.path.isdir(path):
    return None
  if (damage := parallel.broadcast_from_process_0(lambda: manifest.compare(path))) is not None:
    raise UserError(f"{path} is damaged: {damage}; the run cannot resume without a copy of it")
  where = f"{path} does not fit this config: "
  check_fits(path, like, where, cast=True)
  try:
    with ocp.StandardCheckpointer() as reader:
      return reader.restore(path, like)
  except ValueError as error:
    raise UserError(f"{where}{first_line(error)}") from error


def _frozen(workdir: str, part: str) -> str:
  return os.path.abspath(os.path.join(workdir, "frozen", part))
