"""Items of a checkpoint, restored onto any mesh once its files are found whole."""

import contextlib
import os
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from limber_jax.checkpoints.fits import check_fits, first_line
from limber_jax.checkpoints.steps import Steps
from limber_jax.errors import UserError
from limber_jax.runtime import parallel


def read(steps: Steps, step: int, like: dict[str, Any], *, meta: bool = False) -> dict[str, Any]:
  """Returns items of a checkpoint by name; every process calls this together.

  Args:
    steps: of the workdir.
    step: which; all its files are compared with its manifest, unless they were.
    like: by item, ShapeDtypeStructs with the shardings that arrays are to have. Without "optimizer" floats may be of
      another precision than was saved.
    meta: whether to return "meta" too.

  Raises:
    UserError: the checkpoint is damaged, or its arrays have other names, shapes or types than those of `like`; the
      message names the first.
  """
  path = steps.path(step)

  def check():
    if (damage := steps.damage(step)) is not None:
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
