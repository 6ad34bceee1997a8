"""The search for the settings with which a run's step would take the fewest seconds: plan after plan, none of them run.

Not all combinations are tried, for each takes minutes to compile: first the policies of remat, then microbatches, more
of them where memory lacks and fewer where it does not, and then meshes with the best of these.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from limber_jax.config import Config, Mesh
from limber_jax.errors import UserError
from limber_jax.models.layers import REMAT
from limber_jax.planning.plan import LABEL, Slices, plan
from limber_jax.planning.problems import of_memory
from limber_jax.runtime import parallel

MORE = 16  # times the experiment's microbatches that are tried at most

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
  """The settings that are searched over; none of them changes the losses that come out."""

  mesh: tuple[int, int, int]  # data, fsdp, tensor
  remat: str
  num_microbatches: int

  def apply(self, config: Config) -> Config:
    """Returns an experiment with these settings."""
    return dataclasses.replace(
      config, mesh=Mesh(*self.mesh), compute=dataclasses.replace(config.compute, remat=self.remat),
      loss=dataclasses.replace(config.loss, num_microbatches=self.num_microbatches))

  def flags(self) -> list[str]:
    """Returns the flags of a command that sets them."""
    return [*(f"--config.mesh.{axis}={size}" for axis, size in zip(parallel.AXES, self.mesh, strict=True)),
            f"--config.compute.remat={self.remat}", f"--config.loss.num_microbatches={self.num_microbatches}"]


def search(config: Config, slices: Slices, say: Callable[[Row], None]) -> dict[str, Any]:
  """Returns the plans that were tried and which is the best, as plain JSON: {"variants": rows, "best": a row or None}.

  The best is, of those that fit into memory, first one without another problem, and then the one whose estimate of
  seconds (the compiler's cycles, and what ICI needs at its full rate) is the least.

  Args:
    config: the experiment, from whose settings it starts.
    slices: to plan for.
    say: is given each row as soon as it is there.

  Raises:
    UserError: the experiment's own mesh does not fit.
  """
  rows: dict[Variant, Row] = {}

  def attempt(variant: Variant) -> Row:
    if variant not in rows:
      rows[variant] = trial(config, variant, slices)
      say(rows[variant])
    return rows[variant]

  mesh = parallel.make_mesh(dataclasses.asdict(config.mesh), slices.devices)
  own = Variant(tuple(mesh.shape.values()), config.compute.remat, config.loss.num_microbatches)
  for remat in REMAT:
    attempt(dataclasses.replace(own, remat=remat))
  for remat in REMAT:
    _try_microbatches(dataclasses.replace(own, remat=remat), config.batch_size, attempt)
  start = min(rows, key=lambda variant: rank(rows[variant]))
  for sizes in meshes(len(slices.devices), slices.count):
    attempt(dataclasses.replace(start, mesh=sizes))
  best = min(rows.values(), key=rank)
  return {"label": LABEL, "config": config.name, "topology": slices.name, "slices": slices.count,
          "chips": len(slices.devices), "batch_size": config.batch_size, "variants": list(rows.values()),
          "best": best if best["fits"] else None}


def trial(config: Config, variant: Variant, slices: Slices) -> Row:
  """Returns the plan with these settings, or the same without numbers where they cannot be; "fits" is of memory."""
  out: Row = dataclasses.asdict(variant) | {"mesh": dict(zip(parallel.AXES, variant.mesh, strict=True)),
                                            "flags": variant.flags()}
  try:
    found = plan(variant.apply(config), slices)
  except UserError as error:
    return out | {"compiled": False, "refused": True, "fits": False, "problems": [str(error)]}
  return found | out | {"refused": False, "fits": found["compiled"] and not of_memory(found["memory"])}


def rank(row: Row) -> tuple[bool, bool, float]:
  """Returns what orders rows, the best first."""
  return not row["fits"], bool(row["problems"]), row["seconds"]["estimate"] if row["compiled"] else float("inf")


def meshes(chips: int, slices: int) -> list[tuple[int, int, int]]:
  """Returns meshes (data, fsdp, tensor) of so many chips in all: no parameter is split over several slices."""
  each = chips // slices
  sizes = [(1, 1), (each, 1), (4, 1), (1, 2), (each // 2, 2)]  # fsdp, tensor
  fitting = [(chips // (fsdp * tensor), fsdp, tensor) for fsdp, tensor in sizes if fsdp and each % (fsdp * tensor) == 0]
  return list(dict.fromkeys(fitting))


def _try_microbatches(start: Variant, batch_size: int, attempt: Callable[[Variant], Row]) -> None:
  """Tries twice as many microbatches as long as memory lacks, or else half as many as long as it does not."""
  row, count = attempt(start), start.num_microbatches
  more, parts = not row["fits"], start.mesh[0] * start.mesh[1]
  while row["fits"] != more and not row["refused"]:
    count = count * 2 if more else count // 2
    if not 1 <= count <= MORE * start.num_microbatches or batch_size % count or batch_size // count % parts:
      return
    row = attempt(dataclasses.replace(start, num_microbatches=count))
