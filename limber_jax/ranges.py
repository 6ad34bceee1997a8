"""What a field of a configuration may be: said once, beside its default, and checked wherever values come from.

`lr: float = ranged(5e-4, above=0)` is a field of a dataclass. `check` looks at all fields of one, and of those within:
types by their annotations, numbers and words by what stands beside them. No float may be NaN or infinite, and none so
large or small that float32, in which everything is computed, has only infinity or 0 for it.
"""

import dataclasses
import functools
import math
import operator
import types
import typing
from typing import Any

import numpy as np

from limber_jax import registry
from limber_jax.errors import UserError

# Of a field of a size: it came later than the first runs, and its default is what they did.
LATER = {"later": True}
SEEDS = 2**32 - 1  # the highest seed: JAX drops what is above 32 bits, so that more seeds would give the same numbers
COUNT = 2**31 - 1  # the highest number of steps, rows …: they are counted in int32
_LARGEST, _SMALLEST = (float(x) for x in (np.finfo(np.float32).max, np.finfo(np.float32).smallest_normal))


@dataclasses.dataclass(frozen=True)
class Range:
  """What one value may be; of a tuple or a dict it is said of each element."""

  at_least: float | None = None
  above: float | None = None      # it is more
  at_most: float | None = None
  below: float | None = None      # it is less
  or_zero: bool = False           # 0 is allowed too, which means something else
  choices: tuple[str, ...] = ()   # of a string
  length: int = 0                 # of a tuple; 0 = any
  nonempty: bool = False          # of a tuple: it has an element at least

  def __str__(self) -> str:
    """Returns such as "0 or more and less than 1", "" if anything goes."""
    if self.or_zero:
      return f"0, or {dataclasses.replace(self, or_zero=False)}"
    if self.choices:
      return " | ".join(c or '""' for c in self.choices)
    low = f"{_format_value(self.at_least)} or more" if self.at_least is not None else (
      f"more than {_format_value(self.above)}" if self.above is not None else "")
    high = f"{_format_value(self.at_most)} or less" if self.at_most is not None else (
      f"less than {_format_value(self.below)}" if self.below is not None else "")
    if self.at_least is not None and self.at_most is not None:
      return f"{_format_value(self.at_least)} to {_format_value(self.at_most)}"
    return " and ".join(filter(None, [low, high]))

  def wanted(self, value: Any) -> str:
    """Returns what was wanted in place of `value`, "" where it is in range."""
    if isinstance(value, str):
      return f"choose one of {', '.join(filter(None, self.choices))}" if self.choices and value not in self.choices \
        else ""
    if isinstance(value, float):
      if not math.isfinite(value) or abs(value) > _LARGEST:
        return "wanted a finite number"
      if value and abs(value) < _SMALLEST:
        return f"it is 0 in float32, whose numbers begin at {_SMALLEST:.2g}"
    if self.or_zero and value == 0:
      return ""
    # What is just below 1 may be 1 in float32, where 1 - b2**t is what is divided by.
    single = float(np.float32(value)) if isinstance(value, float) else value
    if self.at_least is not None and value < self.at_least:
      return f"wanted {'0, or ' if self.or_zero else ''}{_format_value(self.at_least)} or more"
    if self.above is not None and min(value, single) <= self.above:
      return f"wanted more than {_format_value(self.above)}"
    if self.at_most is not None and value > self.at_most:
      return f"wanted {_format_value(self.at_most)} or less"
    if self.below is not None and max(value, single) >= self.below:
      return f"wanted less than {_format_value(self.below)}"
    return ""


ANY = Range()


def ranged(default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING, later: bool = False,
           registered: str = "", **allowed: Any) -> Any:
  """Returns the field of a dataclass with a default, or a factory of one, that says what its value may be.

  Args:
    default: as of dataclasses.field.
    factory: its `default_factory`.
    later: whether it is LATER.
    registered: the table of the registry whose entries say by their `size` which dataclasses may stand there; after a
      colon an attribute that such an entry must have.
    allowed: fields of `Range`.
  """
  metadata = {"range": Range(**allowed), "registered": registered} | (LATER if later else {})
  return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def check(config: Any, start: str = "config.") -> None:
  """Raises UserError for the first field of a dataclass, or of one within, whose value is of another type or range.

  Args:
    config: an instance of a dataclass.
    start: stands before the names of its fields, in the message.
  """
  hints = hints_of(config.__class__)
  for f in dataclasses.fields(config):
    check_value(getattr(config, f.name), hints[f.name], f"{start}{f.name}", range_of(f))


def check_value(value: Any, hint: Any, name: str, allowed: Range = ANY) -> None:
  """Raises UserError if a value, of the field `name`, does not fit the annotation `hint` or is not `allowed`."""
  origin = typing.get_origin(hint)
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  classes = tuple(o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o))
  if value is None and types.NoneType in options:
    return
  if classes or hint is Any:
    if isinstance(value, classes) if classes else dataclasses.is_dataclass(value):
      return check(value, f"{name}.")
    wanted = " or ".join(c.__name__ for c in classes) or "a size, such as models.clip.SIZES['clip_vit_b32']()"
    raise UserError(f"{name}: expected {wanted}, got {_format_value(value)}")
  if origin is dict and isinstance(value, dict):
    of = typing.get_args(hint)[1]
    for key, inner in value.items():
      if not isinstance(key, str) or not key or (dataclasses.is_dataclass(of) and "." in key):
        raise UserError(f"{name}: expected names without dots, got {_format_value(key)}")
      check_value(inner, of, f"{name}.{key}", allowed)
    return None
  if origin is tuple and isinstance(value, tuple | list):
    of = typing.get_args(hint)
    length = allowed.length or (0 if of[-1] is ... else len(of))
    if length and len(value) != length:
      raise UserError(f"{name}={_format_value(value)}: wanted {length} of them, got {len(value)}")
    if allowed.nonempty and not value:
      raise UserError(f"{name}=(): wanted one at least")
    for inner, h in zip(value, of[:1] * len(value) if of[-1] is ... else of, strict=True):
      check_value(inner, h, name, allowed)
    return None
  fits = isinstance(value, hint) if hint in (str, float) else type(value) is hint
  if not fits and not (hint is float and type(value) is int):  # 1.0 may have been written as 1
    raise UserError(f"{name}: expected {hint.__name__ if isinstance(hint, type) else hint}, got {_format_value(value)}")
  try:
    wrong = allowed.wanted(float(value) if hint is float else value)
  except OverflowError:  # an int above all floats
    wrong = "wanted a finite number"
  if wrong:
    raise UserError(f"{name}={_format_value(value)}: {wrong}")
  return None


def split_commas(config: Any) -> None:
  """Makes ("a", "b") of ("a,b",) wherever a configuration holds texts: --config.trainable=a,b gives that."""
  hints = hints_of(config.__class__)
  for f in dataclasses.fields(config):
    value = getattr(config, f.name)
    for inner in value.values() if isinstance(value, dict) else (value,):
      if dataclasses.is_dataclass(inner):
        split_commas(inner)
    if f.name == "formats":  # split where it is used, and written down so of runs
      continue
    one = value[0] if isinstance(value, tuple) and len(value) == 1 else None  # a user's (1,) is for `check` to refuse
    if hints[f.name] == tuple[str, ...] and isinstance(one, str) and "," in one:
      object.__setattr__(config, f.name, tuple(filter(None, map(str.strip, one.split(",")))))


def range_of(f: dataclasses.Field) -> Range:
  """Returns what is said of a field's values."""
  return f.metadata.get("range", ANY)


def hints_of(cls: type) -> dict[str, Any]:
  """Returns the types of the fields of a dataclass; of one that is registered, all that are registered now."""
  hints = dict(_annotations(cls))
  for f in dataclasses.fields(cls):
    if table := f.metadata.get("registered"):
      table, _, having = table.partition(":")
      specs = [registry.lookup("", getattr(registry, table), name) for name in getattr(registry, table)]
      hints[f.name] = functools.reduce(operator.or_, (s.size for s in specs if not having or getattr(s, having)))
  return hints


_annotations = functools.cache(typing.get_type_hints)


def _format_value(value: Any) -> str:
  """Returns a value for a message of one line."""
  try:
    text = " ".join(repr(value).split())
  except ValueError:  # an int of more digits than Python writes
    text = "a number of thousands of digits"
  return text if len(text) <= 100 else f"{text[:97]}…"
