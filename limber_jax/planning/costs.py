"""What a compiled program does in a step: FLOPs, bytes of HBM, collectives and cycles, loops counted out."""

import collections
import dataclasses
import functools
import math
import re

from limber_jax.planning import hlo
from limber_jax.planning.modules import part_of

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all",
                "collective-broadcast")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier",
         "optimization-barrier"}
_VIEWS = ("bitcast", "reshape", "get-tuple-element", "optimization-barrier")


@dataclasses.dataclass
class Cost:
  """What something costs one chip."""

  cycles: float = 0.0  # the compiler's own estimates, which collectives have none of
  bytes: float = 0.0   # that cross the edges of operations in HBM, padded as tiles are
  flops: float = 0.0   # of products and convolutions, exact


@dataclasses.dataclass
class Collective:
  """Collectives of one kind."""

  ops: int = 0           # in the program
  runs: int = 0          # in a step
  bytes: float = 0.0     # that a chip puts in, over all runs; of an all-gather what it gets
  asynchronous: int = 0  # of the ops, those that other work can run beside


class Costs:
  """The costs of the program of one device."""

  def __init__(self, module: hlo.Module):
    """Walks through the program once."""
    self._module = module
    self.total = Cost()
    self.parts: dict[tuple[str, str], Cost] = collections.defaultdict(Cost)  # by `modules.part_of`
    self.float32: dict[str, float] = collections.Counter()                   # FLOPs of products of it, by module
    self.collectives: dict[str, Collective] = collections.defaultdict(Collective)
    self.unclear: list[str] = []                                             # loops of unknown length, counted once
    self._visit(module.entry, 1)

  def _add(self, part: tuple[str, str], **values: float) -> None:
    for cost in (self.total, self.parts[part]):
      for name, value in values.items():
        setattr(cost, name, getattr(cost, name) + value)

  def _visit(self, name: str, times: int) -> None:
    """Counts a computation that runs so often."""
    computations = self._module.computations
    for op in computations[name].values():
      if cycles := re.search(r'"estimated_cycles":"(\d+)"', op.rest):
        self._add(part_of(op.op_name), cycles=int(cycles[1]) * times)
      inner = op.attribute("calls") or op.attribute("to_apply")
      if op.kind == "while":
        count = hlo.iterations(op, self._module)
        self.unclear += [op.op_name or op.name] if count is None else []
        self._visit(op.attribute("body"), times * (count or 1))
      elif op.kind == "conditional":
        for branch in re.findall(r"%([\w.\-]+)", op.rest.partition("branch_computations={")[2].partition("}")[0]):
          self._visit(branch, times)
      elif op.kind in ("call", "async-start") and inner in computations:
        self._visit(inner, times)
      elif re.sub(r"-(start|done|update)$", "", op.kind) in _COLLECTIVES:
        self._collective(op, computations[name], times, op.kind.endswith("-start"))
      else:
        if op.kind == "fusion":
          self._fused(inner, times)
        elif op.kind in ("dot", "convolution"):
          self._product(op, computations[name], times)
        self._memory(op, computations[name], times)

  def _product(self, op: hlo.Operation, beside: dict[str, hlo.Operation], times: int) -> None:
    flops, left, right = hlo.product(op, beside)
    part = part_of(op.op_name)
    self._add(part, flops=flops * times)
    if "f32" in (left.dtype, right.dtype):
      self.float32[part[0]] += flops * times

  def _fused(self, name: str, times: int) -> None:
    """Counts products and collectives in a fused computation; its memory is the caller's."""
    ops = self._module.computations.get(name, {})
    # An asynchronous collective is in the fusion that starts it, those that run beside it, and the one that ends it.
    again = "async_collective_fusion" in name or any("AsyncCollectiveDone" in o.rest for o in ops.values())
    for op in ops.values():
      if op.kind in ("dot", "convolution"):
        self._product(op, ops, times)
      elif op.kind in _COLLECTIVES and not again:
        self._collective(op, ops, times, any("AsyncCollectiveStart" in o.rest for o in ops.values()))
      elif op.attribute("calls") in self._module.computations:
        self._fused(op.attribute("calls"), times)

  def _collective(self, op: hlo.Operation, beside: dict[str, hlo.Operation], times: int, asynchronous: bool) -> None:
    if op.kind.endswith(("-done", "-update")):
      return
    kind = op.kind.removesuffix("-start")
    moved = sum(beside[o].out[0].bytes for o in op.operands if o in beside and beside[o].out)
    if kind == "all-gather":
      moved = sum(a.bytes for a in op.out) - (moved if op.kind.endswith("-start") else 0)
    found = self.collectives[kind]
    found.ops, found.runs = found.ops + 1, found.runs + times
    found.bytes, found.asynchronous = found.bytes + moved * times, found.asynchronous + asynchronous

  def _memory(self, op: hlo.Operation, beside: dict[str, hlo.Operation], times: int) -> None:
    """Counts the bytes that an operation moves between HBM and the cores."""
    if op.kind in _FREE or op.kind.endswith(("-done", "-update")):
      return
    part = part_of(op.op_name)
    if op.kind.endswith("-start"):  # a copy or slice that runs beside others: its two ends, in either order
      ends = sorted((a for a in op.out if a.size > 1), key=lambda a: a.bytes)[:2]
      moved, part = (ends[0].padded * sum(a.in_hbm for a in ends) if ends else 0), ("unnamed", "")
    elif op.attribute("calls") in self._module.computations:
      moved = self._fusion_bytes(op, beside)
    else:
      reads = [beside[o].out[0] for o in dict.fromkeys(op.operands) if o in beside and beside[o].out]
      writes = [a for a in op.out if a.in_hbm]
      if op.kind == "dynamic-update-slice":
        reads, writes = reads[1:], [reads[1]]
      elif op.kind == "dynamic-slice":
        reads = writes
      moved = sum(a.padded for a in (*reads, *writes) if a.in_hbm)
    self._add(part, bytes=moved * times)

  def _fusion_bytes(self, op: hlo.Operation, beside: dict[str, hlo.Operation]) -> float:
    """Returns the bytes that a fusion reads and writes in HBM."""
    inner = op.attribute("calls")
    ops = self._module.computations[inner]
    # The buffers of a collective that runs beside a fusion only pass through it.
    passing = {a.shape for c in ops.values() if c.kind in _COLLECTIVES and c.kind != "all-reduce"
               for name in (c.name, *c.operands) if name in ops for a in ops[name].out}
    read = sum(min(beside[o].out[0].padded, self._read(inner, i)) for i, o in enumerate(op.operands)
               if o not in op.operands[:i] and o in beside and beside[o].out and beside[o].out[0].in_hbm
               and beside[o].out[0].shape not in passing)
    return read + sum(min(a.padded, w or a.padded) for a, w in zip(op.out, self._written(inner), strict=False)
                      if a.in_hbm and a.shape not in passing)

  @functools.cache  # noqa: B019 (such an object lives as long as its cache is of use)
  def _read(self, name: str, index: int) -> float:
    """Returns the bytes of parameter `index` that a fused computation reads: of slices no more than the slice."""
    ops = self._module.computations[name]
    first = next((o.name for o in ops.values() if o.kind == "parameter" and o.inside.strip() == str(index)), None)
    size, names = 0.0, {first}
    for o in ops.values() if first else ():
      if not names & set(o.operands):
        continue
      if o.kind in _VIEWS or (o.kind == "dynamic-update-slice" and o.operands[0] in names):
        names.add(o.name)
      elif o.kind in ("dynamic-slice", "slice", "gather") and o.operands[0] in names:
        size += o.out[0].padded
      elif o.kind == "fusion" and o.attribute("calls") in self._module.computations:
        size += sum(self._read(o.attribute("calls"), i) for i, x in enumerate(o.operands) if x in names)
      elif o.kind != "tuple":
        return math.inf
    return size if first else math.inf

  @functools.cache  # noqa: B019 (likewise)
  def _written(self, name: str) -> list[float]:
    """Returns, of each output of a fused computation, the bytes that an update in place writes; 0 is all of it."""
    ops = self._module.computations[name]

    def one(output: str) -> float:
      o = ops.get(output)
      while o is not None and o.kind in ("bitcast", "reshape", "copy", "convert") and o.operands:
        o = ops.get(o.operands[0])
      if o is not None and o.kind == "dynamic-update-slice" and o.operands[1] in ops:
        return ops[o.operands[1]].out[0].padded
      if o is not None and o.kind == "fusion" and o.attribute("calls") in self._module.computations:
        return self._written(o.attribute("calls"))[0]
      return 0.0

    root = list(ops.values())[-1]
    return [one(x) for x in root.operands] if root.kind == "tuple" else [one(root.name)]
