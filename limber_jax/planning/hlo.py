"""The text of a compiled program: its computations, their operations, and the arrays these give."""

import dataclasses
import functools
import math
import re

from limber_jax.errors import UserError

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
          "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "token": 0, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


@dataclasses.dataclass(frozen=True)
class Array:
  """The type of an array, with its layout in the memory of a chip."""

  dtype: str
  shape: tuple[int, ...]
  layout: str  # "{1,0:T(8,128)S(1)}": order of the dimensions from the innermost, tile, memory space

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def bytes(self) -> float:
    """Bytes of its numbers alone."""
    return self.size * _BYTES[self.dtype]

  @functools.cached_property
  def padded(self) -> float:
    """Bytes with what fills up its tiles, T(rows,columns) or T(columns)."""
    tile, order = re.search(r"T\((\d+)(?:,(\d+))?\)", self.layout), re.match(r"\{([\d,]+)", self.layout)
    dims = list(self.shape)
    if tile and order and tile[2]:
      minor = [int(i) for i in order[1].split(",")]
      for axis, side in zip(minor[:2], (int(tile[2]), int(tile[1])), strict=False):
        dims[axis] = -(-dims[axis] // side) * side
    return math.prod(dims) * _BYTES[self.dtype]

  @property
  def in_hbm(self) -> bool:
    """Whether it lies in the chip's main memory, not in one beside its cores."""
    return not re.search(r"S\([1-9]\)", self.layout)


@dataclasses.dataclass(frozen=True, eq=False)
class Operation:
  """A line of a computation."""

  name: str
  kind: str                   # "fusion", "all-reduce-start", …
  out: list[Array]            # what it gives, tuples flattened
  operands: list[str]         # names
  inside: str                 # between its parentheses
  rest: str                   # behind them: attributes

  def attribute(self, name: str) -> str:
    """Returns the name behind calls=, body= and their like; "" where there is none."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else ""

  @functools.cached_property
  def op_name(self) -> str:
    """What JAX called it: the transformations, modules and primitive that it comes from."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Module:
  """A compiled program, that of one device of all."""

  computations: dict[str, dict[str, Operation]]  # by name and name; the root of each comes last
  entry: str                                     # the name of the one that begins
  header: str                                    # the first line: what is donated


def arrays(text: str) -> list[Array]:
  """Returns the types of arrays that stand in a text, in their order."""
  return [Array(dtype, tuple(int(n) for n in shape.split(",") if n), layout)
          for dtype, shape, layout in _ARRAY.findall(text) if dtype in _BYTES]


def parse(text: str) -> Module:
  """Returns the program in the text of an executable, `jax.stages.Compiled.as_text()`; raises UserError if none is."""
  found: dict[str, dict[str, Operation]] = {}
  entry, operations = "", None
  for line in text.splitlines():
    if operations is None or not line.startswith(" "):
      if start := _COMPUTATION.match(line):
        operations = found[start[2]] = {}
        entry = start[2] if start[1] else entry
    elif start := _OPERATION.match(line):
      operations[start[1]] = _operation(start[1], line, start.end())
  if not entry:
    raise UserError("the compiler's text has no line that begins with ENTRY: it is no program in HLO")
  return Module(found, entry, text.split("\n", 1)[0])


def _operation(name: str, line: str, at: int) -> Operation:
  """Returns the operation of a line, whose type begins at column `at`."""
  end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
  kind = re.match(r"\s*([\w\-]+)", line[end:])
  start = end + kind.end()
  stop = _closing(line, start)
  inside = line[start + 1 : stop]
  return Operation(name, kind[1], arrays(line[at:end]), re.findall(r"%([\w.\-]+)", inside), inside, line[stop + 1 :])


def _closing(text: str, start: int) -> int:
  """Returns where the bracket that opens at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] in "([{") - (text[i] in ")]}")
    if depth == 0:
      return i
  return len(text) - 1


def donated(module: Module) -> tuple[int, int]:
  """Returns (how many donated buffers hold a result, how many are used for nothing)."""
  used = re.search(r"input_output_alias=\{(.*?)\}, \w+=", module.header)
  unused = re.search(r"buffer_donor=\{(.*?)\}, \w+=", module.header)
  return tuple(len(re.findall(r"\(\d+, \{[\d, ]*\}", found[1])) if found else 0 for found in (used, unused))


def iterations(loop: Operation, module: Module) -> int | None:
  """Returns how often a while runs: its counter goes from 0 by steps to the limit in its condition; None if unclear."""
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):  # which TPU executables do not say
    return int(known[1])
  condition = module.computations[loop.attribute("condition")].values()
  limits = [int(o.inside) for o in condition if o.kind == "constant" and o.inside.strip().isdigit()
            and o.out[0].dtype in ("s32", "u32")]
  counters = {int(o.attribute("index")) for o in condition if o.kind == "get-tuple-element"}
  if len(limits) != 1 or len(counters) != 1:
    return None
  body, counter = module.computations[loop.attribute("body")], counters.pop()

  def added(name: str) -> int:
    """Returns how much is added to the counter on the way to `name`."""
    o = body.get(name)
    if o is None or o.kind == "get-tuple-element":
      return 0
    if o.kind == "constant":
      return int(o.inside) if o.inside.strip().isdigit() else 0
    return sum(map(added, o.operands)) if o.kind in ("add", "copy", "bitcast") else 0

  root = list(body.values())[-1]
  by = added(root.operands[counter]) if root.kind == "tuple" and len(root.operands) > counter else 0
  return -(-limits[0] // (by or 1))


def product(op: Operation, operands: dict[str, Operation]) -> tuple[float, Array, Array]:
  """Returns (FLOPs, left, right) of a dot or convolution; what meets padding or the zeros of a dilation is none.

  Args:
    op: the product.
    operands: the operations of its computation, by name.
  """
  lhs, rhs, out = *(operands[name].out[0] for name in op.operands[:2]), op.out[0]
  if op.kind == "dot":
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    return 2 * out.size * math.prod(lhs.shape[int(i)] for i in dims[1].split(",") if i), lhs, rhs
  left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest).groups()
  flops = 2 * out.size * rhs.size / max(rhs.shape[right.index("o")], 1)
  for i, window in enumerate(_windows(op)):
    flops *= _met(lhs.shape[left.index(str(i))], out.shape[result.index(str(i))], **window)
  groups = re.search(r"batch_group_count=(\d+)", op.rest)
  return flops / (int(groups[1]) if groups else 1), lhs, rhs


def _windows(op: Operation) -> list[dict[str, int]]:
  """Returns of each spatial dimension of a convolution its window, as `_met` takes it."""
  found = re.search(r"window=\{([^}]*)\}", op.rest)
  text = found[1] if found else ""

  def numbers(key: str) -> list[str]:
    given = re.search(rf"\b{key}=([\dx_\-]+)", text)
    return given[1].split("x") if given else []

  sizes = numbers("size")
  rows = [numbers(key) or [default] * len(sizes) for key, default in (
    ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1"))]
  return [{"taps": int(taps), "stride": int(stride), "pad": int(re.match(r"-?\d+", pad)[0]), "spread": int(spread),
           "apart": int(apart)} for taps, stride, pad, spread, apart in zip(sizes, *rows, strict=True)]


def _met(length: int, places: int, *, taps: int, stride: int, pad: int, spread: int, apart: int) -> float:
  """Returns the share of the products of a window, at all its places over a dimension, that meet numbers of it."""
  if taps == places == 1 and pad == 0:
    return 1.0
  met = sum(len(range(max(start, 0), min(start + taps * apart, (length - 1) * spread + 1), apart))
            if spread == apart == 1 else sum(0 <= at <= (length - 1) * spread and at % spread == 0
                                             for at in range(start, start + taps * apart, apart))
            for start in range(-pad, places * stride - pad, stride))
  return met / (taps * places)
