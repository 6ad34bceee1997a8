"""The tables of a report, each with what was published beside what was measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from limber_jax.errors import UserError
from limber_jax.evals import contamination, effective_robustness, robustness
from limber_jax.map_names import BLIND
from limber_jax.reports import published
from limber_jax.reports.runs import CAPTIONS, SCORES, Run, by_source, data_title, label_of, zeroshot_columns
from limber_jax.reports.text import NONE, markdown, number, percent

CONTAMINATION = "clip_overlap"  # what published.json calls the model of CLIP's analysis of overlap


@dataclass(frozen=True)
class Panel:
  """A table over models: a row of what was measured, and beneath it what was published."""

  title: str
  columns: Sequence[tuple[str, str, str, int]]  # heading, evaluation, "DATA/METRIC", digits after the point
  others: str = "one"  # when published rows of models that were not run are shown: always | one: beside one run | never


VQA = tuple((f"{'VQA2 ' * (not n)}{n}-shot", "vqa", f"vqa2/accuracy_{n}shot", 2) for n in (0, 1, 2, 4))
PANELS = (
  Panel("Captioning and VQA", CAPTIONS + VQA, "always"),
  *(Panel(f"{title}, all metrics of captions",
          tuple((heading, "captions", f"{data}/{metric}", 1) for metric, heading in list(SCORES.items())[:10]), "never")
    for data, title in (("coco", "COCO"), ("nocaps", "NoCaps"))),
  Panel("Naming animals", tuple((heading, "class_mention", f"awa2/{metric}", 1) for heading, metric in (
    ("AWA2 named", "named"), ("Wu-Palmer if wrong", "wup_wrong"), ("attributes if wrong", "overlap_wrong")))),
  Panel("Natural distribution shift", tuple((heading, "robustness", column, 1) for heading, column in (
    ("ImageNet", "imagenet/top1"), ("V2", "imagenet_v2/top1"), ("A", "imagenet_a/top1"), ("R", "imagenet_r/top1"),
    ("ObjectNet", "objectnet/top1_own"), ("Sketch", "imagenet_sketch/top1"),
    ("Vid PM-0", "imagenet_vid_robust/pm0_own"), ("PM-10", "imagenet_vid_robust/pm10_own"),
    ("YT-BB PM-0", "ytbb_robust/pm0_own"), ("PM-10", "ytbb_robust/pm10_own")))),
  Panel("Retrieval", tuple(
    (f"{title * (k == 1)}{arrow * (k == 1)}R@{k}", "retrieval", f"{data}/{way}_r{k}", 1)
    for data, title in (("coco", "COCO "), ("flickr30k", "Flickr30k "))
    for way, arrow in (("i2t", "text "), ("t2i", "image ")) for k in (1, 5, 10))),
)


def found_of(kind: str, model: str | None, column: str, cited: dict) -> dict[str, float]:
  """Returns {source: percent} of a published number, and notes the tables."""
  found = published.load().find(kind, model, column) if model else []
  cited |= dict.fromkeys(table for table, _ in found)
  return by_source(found)


def panel_table(panel: Panel, runs: Sequence[Run], cited: dict) -> str:
  """Returns the table of a panel, "" if no run has any of its metrics."""
  book, kinds = published.load(), {kind for _, kind, _, _ in panel.columns}
  ours: dict[str | None, list[tuple[str, list[str]]]] = {}  # model -> (label, cells) of its runs and projectors
  for run in runs:
    maps = dict.fromkeys(m for kind, m in run.scores if kind in kinds)
    for map_ in sorted(maps, key=bool):
      values = [run.scores.get((kind, map_), {}).get(column) for _, kind, column, _ in panel.columns]
      if all(v is None for v in values):
        continue
      cells = [number(v, digits) for v, (_, _, _, digits) in zip(values, panel.columns, strict=True)]
      if map_ != BLIND:
        ours.setdefault(run.model, []).append((label_of(run, runs, map_), cells))
      elif cells not in [c for _, c in ours.get(BLIND, [])]:  # runs on one language model are equally blind
        ours.setdefault(BLIND, []).append((book.models[BLIND], cells))
  if not ours:
    return ""
  alone = runs[0].model if len(runs) == 1 else None
  everything = panel.others == "always" or (panel.others == "one" and (len(runs) == 1 or None in ours))
  models = [m for m in book.models if everything or m in ours]
  models = sorted(models, key=lambda m: m != alone)  # the model of a single run comes first
  rows = []
  for model in [None, *models] if len(runs) == 1 else [*models, None]:
    rows += [(label, "measured", *cells) for label, cells in ours.get(model, [])]
    theirs = [found_of(kind, model, column, cited) for _, kind, column, _ in panel.columns]
    for i, source in enumerate(sorted({s for cell in theirs for s in cell})):
      cells = [percent(cell.get(source), c[3]) for cell, c in zip(theirs, panel.columns, strict=True)]
      rows.append(("" if i or model in ours else book.models[model], source, *cells))
  kept = [i for i in range(2 + len(panel.columns)) if any(row[i] != NONE for row in rows)]
  header = ("model", "source", *(heading for heading, _, _, _ in panel.columns))
  return markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows], len(kept) - 2)


def zeroshot_table(runs: Sequence[Run], cited: dict) -> str:
  """Returns the table of zero-shot classification, a row a data set; "" if no run has any."""
  book = published.load()
  mine = [(run, run.scores.get(("zeroshot", ""), {})) for run in runs]
  mine = [(run, scores) for run, scores in mine if scores]
  lines = zeroshot_columns([scores for _, scores in mine])
  if not lines:
    return ""
  columns: list[tuple[str, list[str]]] = []
  for run, scores in mine:
    columns.append((label_of(run, runs), [number(scores.get(line)) for line in lines]))
    columns += _sources(run.model, lines, cited)
  if len(runs) == 1:
    columns += [(book.models[model], _sources(model, lines, cited)[0][1]) for model in _near(runs[0].model)
                if _sources(model, lines, cited)]
  names = [(data_title(line.split("/")[0]), SCORES.get(line.split("/")[1], line.split("/")[1])) for line in lines]
  return markdown(("data set", "metric", *(heading for heading, _ in columns)),
                  [(*name, *(cells[i] for _, cells in columns)) for i, name in enumerate(names)], len(columns))


def shifts(run: Run, before: Run | None = None) -> dict[str, dict[str, float]]:
  """Returns what effective_robustness.summary says of a run."""
  return effective_robustness.summary(_shifted(run), _shifted(before) if before else None)


def _shifted(run: Run) -> dict[str, dict[str, float]]:
  """Returns the metrics of a run under the shifts, by set."""
  metrics: dict[str, dict[str, float]] = {}
  for column, value in run.scores.get(("robustness", ""), {}).items():
    data, metric = column.split("/", 1)
    if data in robustness.SETS and math.isfinite(value):
      metrics.setdefault(data, {})[metric] = value
  return metrics


def robustness_table(runs: Sequence[Run], before: Run | None) -> str:
  """Returns the table of accuracy above what models trained on ImageNet have under a shift; "" if no run has any.

  With `before` it has a column more: the accuracy under the shift less that of this run.
  """
  rows = []
  keys = ("imagenet", "expected", "accuracy", "effective", "gap_cut", *(("relative",) if before else ()))
  every = [shifts(run, before) for run in runs]
  if before and not any("relative" in row for found in every for row in found.values()):
    raise UserError(f"--before={before.where}: no accuracy there under a shift that the other runs were measured "
                    "under, each with ImageNet beside; evaluate it on the same sets first")
  for run, found in zip(runs, every, strict=True):
    for data in [d for d in found if d != "mean"] + [d for d in found if d == "mean" and len(found) > 2]:
      title = f"mean of {found[data]['sets']:.0f}" if data == "mean" else data_title(data)
      rows.append((label_of(run, runs), title, *(number(found[data].get(key)) for key in keys)))
  header = ("model", "shift", "ImageNet, same classes", "expected", "measured", "effective", "gap cut, %",
            *((f"relative to {before.title}, {before.where}",) if before else ()))
  return markdown(header, rows, len(keys)) if rows else ""


def contamination_table(runs: Sequence[Run], cited: dict) -> str:
  """Returns the table of evaluations "contamination", p-values corrected for all of a run's; "" if there is none."""
  rows = []
  for run in runs:
    metrics = {name: e["metrics"] for name, e in run.results["evaluations"].items()
               if e["evaluation"] == "contamination" and "share" in e["metrics"]}
    corrected = contamination.summary(metrics) if metrics else {}
    for name, own in metrics.items():
      theirs = [found_of("contamination", CONTAMINATION, f"{run.data[name]}/{key}", cited) for key in ("share", "gain")]
      p_values = (own.get("p"), corrected.get(name, {}).get("p_corrected"))
      rows.append((label_of(run, runs), data_title(run.data[name]),
                   *(number(own.get(key)) for key in ("top1", "clean", "overlap", "share", "gain")),
                   *(NONE if p is None else f"{p:.3g}" for p in p_values),
                   *(percent(next(iter(cell.values()), None)) for cell in theirs)))
    if len(metrics) > 1:
      whole = corrected[""]
      theirs = found_of("contamination", CONTAMINATION, "overlap_sets/median_share", cited)
      rows.append((label_of(run, runs), f"median of {len(metrics)}", *[NONE] * 3, number(whole["median_share"]),
                   *[NONE] * 3, percent(next(iter(theirs.values()))), NONE))
  header = ("model", "data set", "all", "clean", "overlap", "share, %", "gain", "p", "p, corrected", "CLIP's share, %",
            "CLIP's gain")
  return markdown(header, rows, 9) if rows else ""


def _sources(model: str | None, lines: Sequence[str], cited: dict) -> list[tuple[str, list[str]]]:
  """Returns a (heading, cells) each for the metrics of a model that were measured again, and for the paper's."""
  found = [found_of("zeroshot", model, line, cited) for line in lines]
  papers = {table.source for table in cited if table.paper}
  parts = {"measured again": [{k: v for k, v in cell.items() if k not in papers} for cell in found],
           "CLIP paper": [{k: v for k, v in cell.items() if k in papers} for cell in found]}
  return [(heading, [percent(next(iter(cell.values()), None)) for cell in cells])
          for heading, cells in parts.items() if any(cells)]


def _near(model: str | None) -> list[str]:
  """Returns the CLIP models on either side of one, or three sizes to compare another model with."""
  table = next(t for t in published.load().tables if (t.table, t.evaluation) == ("openai rows", "zeroshot"))
  sizes = list(table.rows)
  if model not in sizes:
    return [sizes[0], "clip_vit_b32", sizes[-1]]
  place = sizes.index(model)
  return [*sizes[max(place - 1, 0) : place], *sizes[place + 1 : place + 2]]


def cite(table: published.Table) -> str:
  splits = ", ".join(f"{data_title(d)}: {split}" for d, split in table.split.items())
  parts = [f"{table.source}, {table.table} ({table.where})", published.load().certainty[table.certainty]]
  return f"- {'; '.join(parts)}." + f" {splits}." * bool(splits) + f" {table.note}" * bool(table.note)
