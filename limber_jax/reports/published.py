"""What the papers and their careful re-measurers printed: the rows that a run's metrics stand beside.

published.json has every metric with its source, table, split and how certain it is. Its unit is percent.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

from limber_jax import config_history


@dataclass(frozen=True, eq=False)
class Table:
  """Metrics of several models from one place. A column is "DATA/METRIC": "coco/cider_d", "nocaps/cider_d/in"."""

  source: str                             # "LiMBeR paper"
  where: str                              # "arXiv 2209.15162"
  table: str                              # of the source: "table 1"
  evaluation: str                         # a name in registry.EVALS
  certainty: str                          # a key of Published.certainty
  split: Mapping[str, str]                # by data set
  num_examples: Mapping[str, int]         # by data set: how many the metrics rest on, where it is known
  note: str                               # "" or one or two sentences
  columns: Sequence[str]
  rows: Mapping[str, Mapping[str, float]]  # model -> column -> percent; what was not published is left out

  @property
  def paper(self) -> bool:
    """Whether the authors say so themselves; others measured their weights again."""
    return self.where.startswith("arXiv")


@dataclass(frozen=True)
class Published:
  """All of published.json."""

  certainty: Mapping[str, str]  # what each word for it means
  models: Mapping[str, str]     # model -> its name in a table, in the papers' order
  data: Mapping[str, str]       # data set -> its name in a table, in the papers' order
  tables: Sequence[Table]
  _models: Mapping[str, str]    # what an experiment may be called -> model
  _data: Mapping[str, str]      # what an evaluation may be called -> data set

  def model_of(self, name: str) -> str | None:
    """Returns the model that an experiment is meant to repeat, or None: "clip_vitb" -> "clip_vit_b32"."""
    return self._models.get(_plain(name))

  def data_of(self, name: str, evaluation: str) -> str | None:
    """Returns the data set that an evaluation goes by the name of, or None: "coco_retrieval" -> "coco".

    Args:
      name: of the evaluation in its experiment, or of its data source.
      evaluation: its name in registry.EVALS, which may stand in `name` too, as may its earlier one.
    """
    plain = _plain(name)
    kinds = (evaluation, *(old for old, new in config_history.EVALUATIONS.items() if new == evaluation))
    found = (self._data.get(text) for text in (plain, *(plain.replace(_plain(kind), "", 1) for kind in kinds)))
    return next(filter(None, found), None)

  def find(self, evaluation: str, model: str, column: str) -> list[tuple[Table, float]]:
    """Returns (table, percent) of every published number of a model in a column."""
    return [(t, t.rows[model][column]) for t in self.tables
            if t.evaluation == evaluation and column in t.rows.get(model, {})]


@functools.cache
def load() -> Published:
  """Returns what is in published.json."""
  text = resources.files("limber_jax.evals").joinpath("published.json").read_text(encoding="utf-8")
  content = json.loads(text)
  tables = []
  for table in content["tables"]:
    columns = table["columns"]
    rows = {model: {c: v for c, v in zip(columns, row, strict=True) if v is not None}
            for model, row in table["rows"].items()}
    source = content["sources"][table["source"]]
    tables.append(Table(**table | {"source": source["title"], "where": source["where"], "rows": rows}))
  titles, names = {}, {}
  for kind in ("models", "data"):
    titles[kind] = {key: entry["title"] for key, entry in content[kind].items()}
    names[kind] = {_plain(n): key for key, entry in content[kind].items() for n in (key, *entry["names"])}
  return Published(content["certainty"], titles["models"], titles["data"], tuple(tables), names["models"],
                   names["data"])


def _plain(name: str) -> str:
  """Returns a name without case and punctuation."""
  return re.sub(r"[\W_]+", "", name).lower()
