"""What is wrong with a step that was compiled: each a line, for a list that is empty if all is well."""

import re

import jax

from limber_jax.planning import hlo
from limber_jax.planning.costs import Costs
from limber_jax.planning.modules import part_of
from limber_jax.training.setup import Outline

GIB = 2**30
FREE = 0.03     # the share of a chip's memory that must be left: libtpu's own buffers are in no program
FLOAT32 = 0.01  # the share of FLOPs in products of float32 from which on they are a problem


def remade(said: list[str]) -> list[str]:
  """Returns the problem that the compiler's own lines show: arrays that it makes whole on every chip."""
  lines = [line for line in said if "nvoluntary full rematerialization" in line]
  if not lines:
    return []
  found = [re.search(pattern, lines[0]) for pattern in (
    r"from sharding (.*?) efficiently", r"operation %[\w.\-]+ = (\w+\[[\d,]*\])", r'op_name="([^"]*)"')]
  change, array, where = (match[1] if match else "(not said)" for match in found)
  return [f"involuntary rematerialisation, {len(lines)} ×: an array is made whole on every chip, for its shardings do "
          f"not go into each other: a chip's part {array}, {change}, op_name {where}"]


def of_memory(memory: dict[str, int]) -> list[str]:
  """Returns the problem that a program wants all of a chip's memory, or more.

  Args:
    memory: bytes, by `plan.memory_of`.
  """
  peak, limit = memory["peak"], memory["limit"]
  return [f"memory: the peak of {peak / GIB:.2f} GiB leaves less than {FREE:.0%} of the chip's {limit / GIB:.2f} GiB"
          ] if peak > (1 - FREE) * limit else []


def of_donation(module: hlo.Module, o: Outline) -> list[str]:
  """Returns the problem that buffers of the state, which the step uses up, hold nothing of what it gives."""
  used, unused = hlo.donated(module)
  count = len(jax.tree.leaves(o.like))
  return [f"donation: {max(unused, count - used)} of the {count} buffers of the state are given up and not used again, "
          "so that old and new state lie beside each other"] if unused or used < count else []


def of_logits(module: hlo.Module, rows: int) -> list[str]:
  """Returns the problem that one chip holds the logits of all pairs of a batch of `rows`, in whatever precision."""
  whole = [op for ops in module.computations.values() for op in ops.values() if part_of(op.op_name)[0] == "loss"
           and any(a.shape == (rows, rows) for a in op.out)]
  return [f"logits: {len(whole)} operations hold all {rows:,} × {rows:,} of them on one chip; "
          "--config.loss.chunk_size holds so many rows at a time"] if whole and rows > 1 else []


def of_float32(costs: Costs, dtype: str) -> list[str]:
  """Returns the problem that products are in float32 where activations, by `dtype`, are not."""
  flops = sum(costs.float32.values())
  share = flops / max(costs.total.flops, 1.0)
  if dtype == "float32" or share <= FLOAT32:
    return []
  most = max(costs.float32, key=costs.float32.__getitem__)
  return [f"float32: {share:.1%} of the FLOPs are in products with an operand of float32, most of them in {most}"]


def of_loops(costs: Costs) -> list[str]:
  """Returns the problem that the text does not say how often a loop runs: all costs are then too low."""
  return [f"loops of unknown length, counted once: {', '.join(costs.unclear[:4])}"] if costs.unclear else []
