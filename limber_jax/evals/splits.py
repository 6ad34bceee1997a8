"""Which part of the data an evaluation reads: one that is named, or the only one there is."""

import dataclasses

from limber_jax.config import Evaluation, Source, Unnamed
from limber_jax.errors import UserError
from limber_jax.registry import SOURCES, lookup


def named(config: Evaluation, name: str) -> Evaluation:
  """Returns an evaluation whose sources all have a split that was named, or that no other could stand for.

  A default would measure on what was trained on, unasked. Of `train`, what probes learn from and examples are drawn
  from, it is "train" where there is one.

  Args:
    config: of the evaluation.
    name: of it, in the experiment.

  Raises:
    UserError: there are several; the message lists them.
  """
  found = {field: dataclasses.replace(source, split=_split(source, f"evals.{name}.{field}", field == "train"))
           for field in ("source", "train", "validation")
           if isinstance(source := getattr(config, field), Source) and isinstance(source.split, Unnamed)}
  return dataclasses.replace(config, **found) if found else config


def _split(source: Source, where: str, train: bool) -> str:
  """Returns the split of a source that names none."""
  cls = lookup("data source", SOURCES, source.name)
  there = cls.splits(source) if hasattr(cls, "splits") else ()
  if (train and "train" in there) or not there:
    return "train"
  if len(there) == 1:
    return there[0]
  likely = next((name for name in ("test", "val", "validation") if name in there), there[-1])
  raise UserError(f"config.{where}: {source.path or source.name} has the splits {', '.join(there)}; say which: "
                  f"--config.{where}.split={likely}")
