"""Which part of the data an evaluation reads: one that is named, or the only one there is."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from limber_jax.config import Evaluation, Source, Unnamed
from limber_jax.errors import UserError

_FIELD = re.compile(r"(?<![\w.])(?:config\.data\.)?source\.(?=[a-z])")  # as sources speak of their fields


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
  with own_fields(config, name):
    found = {field: dataclasses.replace(source, split=_split(source, f"evals.{name}.{field}", field == "train"))
             for field, source in sources_of(config).items() if isinstance(source.split, Unnamed)}
  return dataclasses.replace(config, **found) if found else config


def sources_of(config: Evaluation) -> dict[str, Source]:
  """Returns the sources of an evaluation by its fields, without those that are None."""
  return {f.name: value for f in dataclasses.fields(config) if isinstance(value := getattr(config, f.name), Source)}


@contextlib.contextmanager
def own_fields(config: Evaluation, name: str) -> Iterator[None]:
  """Puts an evaluation's own fields into errors of its sources, which speak of that of the data of training."""
  try:
    yield
  except UserError as error:
    train = sources_of(config).get("train", config.source)
    other = train.path != config.source.path and repr(train.path) in str(error)
    field = "train" if other else "source"
    raise UserError(_FIELD.sub(f"config.evals.{name}.{field}.", str(error))) from error


def _split(source: Source, where: str, train: bool) -> str:
  """Returns the split of a source that names none."""
  there = source.splits()
  if (train and "train" in there) or not there:
    return "train"
  if len(there) == 1:
    return there[0]
  likely = next((name for name in ("test", "val", "validation") if name in there), there[-1])
  raise UserError(f"config.{where}: {source.where} has the splits {', '.join(there)}; say which: "
                  f"--config.{where}.split={likely}")
