"""Every figure of a run as it stands in its results, and what figures rest on."""

from collections.abc import Mapping, Sequence
from typing import Any

from limber_jax.config import evaluation_of
from limber_jax.config_json import flatten
from limber_jax.registry import EVALS
from limber_jax.reports import published
from limber_jax.reports.runs import Run, label_of
from limber_jax.reports.tables import PANELS
from limber_jax.reports.text import NONE, escape, flat, markdown, name_of, shown

NAMED = 20  # damaged items that are named


def _covered(facts: Mapping[str, Any]) -> str:
  """Returns "4,998 of 5,000", or – where the results do not say."""
  counts = [facts.get(key) for key in ("covered", "items")]
  return " of ".join(f"{n:,}" if isinstance(n, int) else NONE for n in counts) if any(counts) else NONE


def others(runs: Sequence[Run]) -> list[str]:
  """Returns blocks with the figures of evaluations that no table above is for, a column a run."""
  above = {kind for panel in PANELS for _, kind, _, _ in panel.columns} | {"zeroshot", "contamination"}
  tables: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # (name, evaluation) -> run -> figures
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      if evaluation["evaluation"] not in above:
        tables.setdefault((name, evaluation["evaluation"]), {})[label_of(run, runs)] = evaluation["figures"]
  blocks = []
  for (name, kind), columns in tables.items():
    rows = [(name_of(figure) or figure, *(shown(figure, figures.get(figure)) for figures in columns.values()))
            for figure in dict.fromkeys(f for figures in columns.values() for f in figures)]
    blocks += [f"## {escape(name)}: {escape(kind)}", markdown(("figure", *columns), rows, len(columns))]
  return blocks


def rest(runs: Sequence[Run]) -> list[str]:
  """Returns blocks that say what the figures of several runs rest on."""
  rows = []
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      facts = evaluation["facts"]
      rows.append((label_of(run, runs), run.results["step"], run.results["seed"], name, facts.get("split", NONE),
                   _covered(facts), facts.get("damaged", NONE), str(facts.get("data", NONE))[:12]))
  header = ("run", "step", "seed", "evaluation", "split", "items", "damaged", "data")
  return ["## What the figures rest on", markdown(header, rows)] if rows else []


def details(run: Run) -> list[str]:
  """Returns blocks with every figure of a run, what it rests on, and its settings."""
  blocks = []
  for name, evaluation in run.results["evaluations"].items():
    facts, kind = evaluation["facts"], evaluation["evaluation"]
    blocks.append(f"## {escape(name)}: {escape(kind)}")
    damaged = facts.get("damaged")
    blocks.append(f"Figures of {_covered(facts)} items" + (f", {damaged} damaged" if damaged else "") + "."
                  + _other_counts(run.data[name], evaluation))
    maps = dict.fromkeys(figure.partition("@")[2] for figure in evaluation["figures"])
    names = dict.fromkeys(figure.partition("@")[0] for figure in evaluation["figures"])
    rows = [(name_of(figure) or figure, *(shown(figure, evaluation["figures"].get(figure + f"@{m}" * bool(m)))
                                      for m in maps)) for figure in names]
    if rows:
      blocks.append(markdown(("figure", *(m or "value" for m in maps)), rows, len(maps)))
    if isinstance(facts.get("damage"), list) and facts["damage"]:
      lines = [f"- {escape(d)}" for d in facts["damage"][:NAMED]]
      blocks += ["Damaged:" if damaged == len(lines) else f"Damaged, the first {len(lines)}:", "\n".join(lines)]
    told = {"items", "covered", "damaged", "damage"}
    usual = flatten(evaluation_of(kind)()) if kind in EVALS else {}
    usual = {k: v for k, v in usual.items() if not k.startswith(("source.", "name"))}  # of which only others are shown
    chosen = {k: v for k, v in evaluation["protocol"].items() if k not in usual or v != usual[k]}
    settings = flat(chosen) | flat({k: v for k, v in facts.items() if k not in told})
    if settings:
      blocks.append(markdown(("setting", "value"), list(settings.items())))
  return blocks


def _other_counts(data: str, evaluation: Mapping[str, Any]) -> str:
  """Returns a sentence on the number of items behind published figures where it is another."""
  tables = [t for t in published.load().tables if t.evaluation == evaluation["evaluation"]]
  counts = {t.source: t.items[data] for t in tables if data in t.items}
  counts = {source: n for source, n in counts.items() if n != evaluation["facts"].get("covered")}
  return f" Published figures are of {' and '.join(f'{n:,} ({s})' for s, n in counts.items())}." if counts else ""
