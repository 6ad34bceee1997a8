"""What is looked at before a run: whether there are records enough for a batch, and captions that say nothing."""

import time
from collections.abc import Iterable

import numpy as np

from limber_jax.config import Config
from limber_jax.data import text
from limber_jax.data.sources import Source
from limber_jax.errors import UserError

SAMPLE, RUNS = 10_000, 100  # captions looked at, at most, and in how many runs of neighbours: they are read together
SECONDS = 3.0               # after which no more are looked at: a file system may be slow


def check_enough(source: Source, config: Config) -> None:
  """Raises UserError if a batch holds records twice because there are too few, unless config.data.repeat allows it.

  Of a mixture each member must have as many records as it has a share of a batch.
  """
  found = [("the data", len(source), config.batch_size)]
  found += source.shares(config.batch_size) if hasattr(source, "shares") else []
  for what, records, wanted in found:
    if records < wanted and not config.data.repeat:
      raise UserError(f"{what} has {records:,} records, of which a batch wants {wanted:,}, so that it would hold some "
                      "several times; set --config.batch_size lower, or allow it with --config.data.repeat=true"
                      .replace("the data has", "the data have"))


def placeholders(texts: Iterable[str]) -> list[str]:
  """Returns those captions that are what programs write where there is none."""
  return [t for t in texts if text.is_placeholder(t)]


def format_count(count: int, of: int, first: str) -> str:
  """Returns what is said of captions that say nothing, "" if there are none."""
  return f"{count:,} of {of:,} captions looked at say nothing, such as {first!r}; they are kept" if count else ""


def look(source: Source) -> str:
  """Returns what is to be said of the captions of a source, of large data by a sample; "" if there is nothing."""
  n, start = len(source), time.perf_counter()
  length = SAMPLE // RUNS
  places = range(n) if n <= SAMPLE else (
    i for first in np.linspace(0, n - length, RUNS, dtype=int).tolist() for i in range(first, first + length))
  count, of, first = 0, 0, ""
  for index in places:
    try:
      record = source.annotation(index)
    except UserError:
      continue
    texts = record.get("texts", (record["text"],))
    found = placeholders(texts)
    count, of, first = count + len(found), of + len(texts), first or next(iter(found), "")
    if time.perf_counter() - start > SECONDS:
      break
  return format_count(count, of, first)
