"""Every metric of a run as it stands in its results, and what metrics rest on."""

from collections.abc import Mapping, Sequence
from typing import Any

from limber_jax.config import evaluation_of
from limber_jax.config_json import flatten
from limber_jax.map_names import join, split
from limber_jax.registry import EVALS
from limber_jax.reports import published
from limber_jax.reports.runs import Run, label_of
from limber_jax.reports.tables import PANELS
from limber_jax.reports.text import NONE, escape, flat, markdown, name_of, shown

NAMED = 20  # damaged examples that are named


def _covered(metadata: Mapping[str, Any]) -> str:
  """Returns "4,998 of 5,000", or – where the results do not say."""
  counts = [metadata.get(key) for key in ("covered", "num_examples")]
  return " of ".join(f"{n:,}" if isinstance(n, int) else NONE for n in counts) if any(counts) else NONE


def others(runs: Sequence[Run]) -> list[str]:
  """Returns blocks with the metrics of evaluations that no table above is for, a column a run."""
  above = {kind for panel in PANELS for _, kind, _, _ in panel.columns} | {"zeroshot", "contamination"}
  tables: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # (name, evaluation) -> run -> metrics
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      if evaluation["evaluation"] not in above:
        tables.setdefault((name, evaluation["evaluation"]), {})[label_of(run, runs)] = evaluation["metrics"]
  blocks = []
  for (name, kind), columns in tables.items():
    rows = [(name_of(metric) or metric, *(shown(metric, metrics.get(metric)) for metrics in columns.values()))
            for metric in dict.fromkeys(f for metrics in columns.values() for f in metrics)]
    blocks += [f"## {escape(name)}: {escape(kind)}", markdown(("metric", *columns), rows, len(columns))]
  return blocks


def rest(runs: Sequence[Run]) -> list[str]:
  """Returns blocks that say what the metrics of several runs rest on."""
  rows = []
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      metadata = evaluation["metadata"]
      rows.append((label_of(run, runs), run.results["step"], run.results["seed"], name, metadata.get("split", NONE),
                   _covered(metadata), metadata.get("damaged", NONE), str(metadata.get("data", NONE))[:12]))
  header = ("run", "step", "seed", "evaluation", "split", "examples", "damaged", "data")
  return ["## What the metrics rest on", markdown(header, rows)] if rows else []


def details(run: Run) -> list[str]:
  """Returns blocks with every metric of a run, what it rests on, and its settings."""
  blocks = []
  for name, evaluation in run.results["evaluations"].items():
    metadata, kind = evaluation["metadata"], evaluation["evaluation"]
    blocks.append(f"## {escape(name)}: {escape(kind)}")
    damaged = metadata.get("damaged")
    blocks.append(f"Metrics of {_covered(metadata)} examples" + (f", {damaged} damaged" if damaged else "") + "."
                  + _other_counts(run.data[name], evaluation))
    maps = dict.fromkeys(split(metric)[1] for metric in evaluation["metrics"])
    names = dict.fromkeys(split(metric)[0] for metric in evaluation["metrics"])
    rows = [(name_of(metric) or metric, *(shown(metric, evaluation["metrics"].get(join(metric, m)))
                                      for m in maps)) for metric in names]
    if rows:
      blocks.append(markdown(("metric", *(m or "value" for m in maps)), rows, len(maps)))
    if isinstance(metadata.get("damage"), list) and metadata["damage"]:
      lines = [f"- {escape(d)}" for d in metadata["damage"][:NAMED]]
      blocks += ["Damaged:" if damaged == len(lines) else f"Damaged, the first {len(lines)}:", "\n".join(lines)]
    shown_above = {"num_examples", "covered", "damaged", "damage"}
    usual = flatten(evaluation_of(kind)()) if kind in EVALS else {}
    usual = {k: v for k, v in usual.items() if not k.startswith(("source.", "name"))}  # of which only others are shown
    chosen = {k: v for k, v in evaluation["protocol"].items() if k not in usual or v != usual[k]}
    settings = flat(chosen) | flat({k: v for k, v in metadata.items() if k not in shown_above})
    if settings:
      blocks.append(markdown(("setting", "value"), list(settings.items())))
  return blocks


def _other_counts(data: str, evaluation: Mapping[str, Any]) -> str:
  """Returns a sentence on the number of examples behind published numbers where it is another."""
  tables = [t for t in published.load().tables if t.evaluation == evaluation["evaluation"]]
  counts = {t.source: t.num_examples[data] for t in tables if data in t.num_examples}
  counts = {source: n for source, n in counts.items() if n != evaluation["metadata"].get("covered")}
  return f" Published numbers are of {' and '.join(f'{n:,} ({s})' for s, n in counts.items())}." if counts else ""
