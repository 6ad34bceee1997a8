"""The plan of a run: what its step needs of TPU slices, by the text of its compiled program, and what is wrong with it.

Nothing is run: seconds are bounds by the makers' rates, and the compiler's own estimate.
"""

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import jax
import numpy as np

from limber_jax.config import Config
from limber_jax.errors import UserError
from limber_jax.planning import hlo, problems, program
from limber_jax.planning.chips import Chip
from limber_jax.planning.costs import Costs
from limber_jax.runtime import parallel
from limber_jax.tasks import microbatches
from limber_jax.training.flops import model_flops
from limber_jax.training.setup import outline

LABEL = "compiled, not run"
HEAVIEST = 10  # parts of the model that are listed


@dataclasses.dataclass(frozen=True)
class Slices:
  """The devices that a run is planned for."""

  name: str           # of the accelerator type, such as "v4-128"
  count: int          # how many such slices
  chip: Chip
  devices: list[Any]  # of all of them
  logs: str           # the directory that libtpu writes its log to


def plan(config: Config, slices: Slices) -> dict[str, Any]:
  """Returns what there is to say of a run's step on TPU slices, as plain JSON; its "problems" are lines, [] if none.

  Raises:
    UserError: settings that do not fit together, or a mesh that the slices or the model do not have.
  """
  mesh = parallel.make_mesh(dataclasses.asdict(config.mesh), slices.devices)
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu") if importlib.util.find_spec(name)}
  out: dict[str, Any] = {
    "label": LABEL, "config": config.name, "topology": slices.name, "slices": slices.count,
    "chips": len(slices.devices), "mesh": dict(mesh.shape), "batch_size": config.batch_size,
    "dtype": config.compute.dtype, "remat": config.compute.remat, "compiled": False,
    "versions": versions}
  hosts, problem = rows_of_hosts(config.batch_size, mesh)
  if problem:
    return out | {"problems": [problem]}
  o = outline(config, mesh)
  with jax.set_mesh(mesh):
    count = microbatches.fitting(config.loss.num_microbatches, config.batch_size)
  found = program.compile_step(o, slices.logs)
  out |= {"hosts": hosts, "num_microbatches": count, "compile_seconds": found.seconds}
  if found.executable is None:
    return out | {"problems": [f"it does not compile: {found.error[:400]}", *problems.remade(found.said)]}
  text, memory = found.executable.as_text(), memory_of(found.executable.memory_analysis(), slices.chip)
  module = hlo.parse(text)
  flops = model_flops(config, program.batch_specs(o)[0])[1] / len(slices.devices)
  costs = Costs(module)
  return out | {
    "compiled": True, "memory": memory, **rates(costs, flops, slices.chip, config.peak_flops),
    "heaviest": heaviest(costs),
    "problems": [
      *problems.of_memory(memory), *problems.of_donation(module, o), *problems.of_logits(module, config.batch_size),
      *problems.remade(found.said), *problems.of_float32(costs, config.compute.dtype), *problems.of_loops(costs)]}


def rows_of_hosts(batch_size: int, mesh: jax.sharding.Mesh) -> tuple[dict[str, int], str]:
  """Returns ({"count": hosts, "rows": of a batch that each loads, "copies": hosts that load the same row}, a problem).

  The problem is why they cannot load a batch so, "" if they can.
  """
  hosts = sorted({d.process_index for d in mesh.devices.flat})
  try:
    rows = [parallel.local_rows(batch_size, mesh, host) for host in hosts]
  except UserError as error:
    return {}, f"rows that processes cannot supply: {error}"
  loaded = np.bincount(np.concatenate(rows), minlength=batch_size)
  if not loaded.all():
    return {}, f"rows that processes cannot supply: {int((loaded == 0).sum())} of {batch_size}, of no host's devices"
  return {"count": len(hosts), "rows": max(map(len, rows)), "copies": int(loaded.max())}, ""


def memory_of(stats: Any, chip: Chip) -> dict[str, int]:
  """Returns bytes on a chip, by the `memory_analysis` of an executable."""
  return {"peak": stats.peak_memory_in_bytes, "limit": int(chip.memory * problems.GIB),
          "arguments": stats.argument_size_in_bytes, "donated": stats.alias_size_in_bytes,
          "temporary": stats.temp_size_in_bytes}


def rates(costs: Costs, model: float, chip: Chip, peak: float = 0.0) -> dict[str, Any]:
  """Returns what one chip does in a step, the seconds that it needs at least, and the share of its peak this allows.

  Args:
    costs: of its program.
    model: FLOPs of the model in a step, those of one chip.
    chip: what it can do.
    peak: its FLOP/s, 0 as the table has it.
  """
  peak, total = peak or chip.flops, costs.total
  # In a ring each byte of a sum goes round twice, of anything else once.
  sent = sum(c.bytes * (2 if kind == "all-reduce" else 1) for kind, c in costs.collectives.items())
  bounds = {"compute": total.flops / peak, "hbm": total.bytes / chip.bandwidth, "ici": sent / chip.links}
  cycles = total.cycles / chip.clock
  limit = max(bounds, key=bounds.__getitem__)
  return {
    "flops": {"model": model, "hardware": total.flops, "float32": sum(costs.float32.values())},
    "hbm_bytes": total.bytes, "ici_bytes": sent, "cycles": total.cycles, "clock": chip.clock,
    "collectives": {kind: dataclasses.asdict(c) for kind, c in sorted(costs.collectives.items())},
    "seconds": bounds | {"cycles": cycles, "estimate": cycles + bounds["ici"]}, "bound": limit,
    "share_of_peak": {"bound": model / peak / max(bounds[limit], 1e-12),
                      "estimate": model / peak / max(cycles + bounds["ici"], 1e-12)}}


def heaviest(costs: Costs) -> list[dict[str, Any]]:
  """Returns the parts of the model whose operations take the most cycles, and a pass through each."""
  parts = sorted(costs.parts.items(), key=lambda part: (-part[1].cycles, -part[1].bytes))[:HEAVIEST]
  return [{"module": module, "pass": way, "cycles": cost.cycles, "hbm_bytes": cost.bytes, "flops": cost.flops}
          for (module, way), cost in parts]
