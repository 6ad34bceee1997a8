"""A configuration as JSON, one dotted field a line: what config.json holds, written, read and compared."""

import dataclasses
import functools
import json
import operator
import types
import typing
from typing import Any

from limber_jax import config_history, ranges
from limber_jax.config import NAMED, Config, Evaluation, check, models_of
from limber_jax.errors import UserError, did_you_mean
from limber_jax.ranges import LATER

# What may differ between two runs in the same workdir: it changes how fast and where, never which losses come out.
RUNTIME = ("mesh", "checkpoint", "log_every", "watchdog", "peak_flops", "data.workers", "data.threads", "data.prefetch",
           "data.max_bad_fraction", "data.repeat", "compute.attention", "compute.remat", "compute.unroll",
           "data.source.path", "data.source.images", "data.source.key_dot", "data.source.incomplete",
           "data.source.quoting", "data.tokenizer.path", "data.features", "decoding", "evals", "prerequisites")


def flatten(config: Any, prefix: str = "", *, known: bool = False) -> dict[str, Any]:
  """Returns {"optim.lr": 5e-4, …}: every leaf of a configuration by its dotted name; tuples count as leaves.

  With `known` a field marked LATER is left out where it has its default: so what is written down of a model, and what
  is hashed, stays what it was before there was such a field.
  """
  if isinstance(config, dict):
    items = config
  else:
    items = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
             if not (known and LATER.items() <= f.metadata.items() and getattr(config, f.name) == f.default)}
    items = {"name": config.name} | items if isinstance(config, Evaluation) else items
  out: dict[str, Any] = {}
  for key, value in items.items():
    name = f"{prefix}{key}"
    if isinstance(value, dict) or dataclasses.is_dataclass(value):
      out |= flatten(value, f"{name}.", known=known)
    else:
      out[name] = list(value) if isinstance(value, tuple) else value
  return out


def to_json(config: Config) -> str:
  """Returns the configuration as JSON text, one dotted field a line."""
  return json.dumps(flatten(config), indent=1)


def from_json(text: str, where: str) -> Config:
  """Returns the configuration whose `to_json` gave `text`, that of an earlier release included.

  Args:
    text: JSON.
    where: where it was read, for messages.

  Raises:
    UserError: no JSON object, or a field is missing, unknown or of another type or range; the message names `where` and
      the field.
  """
  try:
    values = json.loads(text.removeprefix("\ufeff"))  # which editors put there
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where}: no configuration, for it is {f'no JSON ({error})' if text else 'empty'}") from error
  if not isinstance(values, dict):
    raise UserError(f"{where}: no configuration, for it is no JSON object")
  try:
    return unflatten(Config, config_history.upgrade(values))
  except UserError as error:
    raise UserError(f"{where}: {error}") from error


def unflatten(cls: type, values: dict[str, Any]) -> Any:
  """Returns the instance of the dataclass `cls` whose `flatten` gave `values`, as JSON gives them back.

  The annotations of the fields say what belongs where: of several dataclasses the one is built whose `kind` is there,
  and `Config.model` is one of those that the task names. Of dicts of dataclasses no key has a dot.

  A setting of a Config that is not there came later than the run, and has its default. A size has all of its fields,
  for a model is not to be guessed, but those marked LATER, whose defaults are what was done before there was a choice.

  Raises:
    UserError: a field is missing, unknown or of another type or range.
  """
  used: set[str] = set()
  groups = {name.rsplit(".", i)[0] for name in values for i in range(name.count(".") + 1)}

  def read(hint: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    classes = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
    if typing.get_origin(hint) is dict:
      of, start = typing.get_args(hint)[1], f"{name}."
      keys = [n.removeprefix(start) for n in values if n.startswith(start)]
      keys = list(dict.fromkeys(k.partition(".")[0] for k in keys)) if dataclasses.is_dataclass(of) else keys
      return {key: read(of, start + key) for key in keys}
    if classes and not (types.NoneType in options and values.get(name, ...) is None):
      return build(classes, f"{name}.")
    if name not in values:
      raise UserError(f"{name} is missing")
    used.add(name)
    return None if classes else leaf(hint, name, values[name])

  def build(classes: list[Any], start: str) -> Any:
    cls = classes[0]
    if len(classes) > 1:
      kinds = {c.kind: c for c in classes}
      if (kind := read(str, f"{start}kind")) not in kinds:
        raise UserError(f"{start}kind: expected one of {', '.join(kinds)}, got {kind!r}")
      cls = kinds[kind]
    if of_name := NAMED.get(cls):
      name = read(str, f"{start}name")
      try:
        cls = of_name(name)
      except UserError as error:
        raise UserError(f"{start}name: {error}") from error
    hints = ranges.hints_of(cls)
    if cls is Config:
      hints["model"] = functools.reduce(operator.or_, models_of(read(str, "task")))
    return cls(**{f.name: read(hints[f.name], start + f.name) for f in dataclasses.fields(cls)
                  if start + f.name in groups or not later(f, start + f.name)})

  def later(f: dataclasses.Field, name: str) -> bool:
    given = f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    if LATER.items() <= f.metadata.items():
      return True
    return issubclass(root, Config) and name.partition(".")[0] not in ("model", "task") and given

  def leaf(hint: Any, name: str, value: Any) -> Any:
    if typing.get_origin(hint) is tuple and isinstance(value, list):
      of = typing.get_args(hint)
      of = of[:1] * len(value) if of[-1] is ... else of
      if len(of) == len(value):
        return tuple(leaf(h, name, v) for h, v in zip(of, value, strict=True))
    ranges.check_value(value, hint, name)
    return float(value) if hint is float else value  # 1.0 may have been written as 1 in an experiment

  root = cls
  out = build([cls], "")
  for name in sorted(values.keys() - used):
    beside = [n for n in used if n.rpartition(".")[0] == name.rpartition(".")[0]]
    raise UserError(f"{name}: no such field{did_you_mean(name, beside or {n.partition('.')[0] for n in used})}")
  check(out, "") if isinstance(out, Config) else ranges.check(out, "")
  return out


def check_same(config: Config, saved: str, where: str) -> None:
  """Raises UserError if `config` would train something else than the JSON `saved` beside an earlier run."""
  old, new = (json.loads(to_json(c)) for c in (from_json(saved, f"{where}/config.json"), config))
  for name in sorted(old.keys() | new.keys()):
    if any(name == r or name.startswith(f"{r}.") for r in RUNTIME):
      continue
    if old.get(name) != new.get(name):
      raise UserError(f"{where} holds a run with {name}={old.get(name)!r}, but this config says {new.get(name)!r}; "
                      f"choose another --workdir, or set --config.{name}={old.get(name)}")
