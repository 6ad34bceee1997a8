"""Tables of runs beside the published figures: `python -m limber_jax.report RUN [RUN…] [--out=report.md]`.

A RUN is a workdir in which limber_jax.evaluate has written results.json. One run is shown with every figure, what it
rests on and the published rows that fit; several are rows of one table. Scores are times 100, as in the papers.

--before=RUN names the run of the model before an intervention, such as fine-tuning: the table of robustness then has
what each run gained over it under each shift, the relative robustness of Taori et al. (2020).
"""

import math
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from absl import flags

from limber_jax import cli
from limber_jax.config import Evaluation, flatten
from limber_jax.errors import UserError
from limber_jax.evals import overlap, robustness
from limber_jax.inference import destination
from limber_jax.reports import published
from limber_jax.reports.figures import pictured
from limber_jax.reports.runs import (
  BLIND,
  CAPTIONS,
  SCORES,
  Run,
  by_source,
  data_title,
  label_of,
  of,
  ordered,
  printable,
  read,
  zeroshot_columns,
)
from limber_jax.runtime.atomic import atomic_write, is_regular, refusal, save_figure

NONE = "–"       # a figure that there is not
# Settings of an evaluation that are as everywhere; only others are shown.
DEFAULTS = {k: v for k, v in flatten(Evaluation()).items() if not k.startswith(("source.", "name"))}
OVERLAP = "clip_overlap"  # … and the model of CLIP's analysis of overlap
NAMED = 20       # damaged items that are named


@dataclass(frozen=True)
class Panel:
  """A table over models: a row of what was measured, and beneath it what was published."""

  title: str
  columns: Sequence[tuple[str, str, str, int]]  # heading, evaluation, "DATA/FIGURE", digits after the point
  others: str = "one"  # when published rows of models that were not run are shown: always | one: beside one run | never


VQA = tuple((f"{'VQA2 ' * (not n)}{n}-shot", "vqa", f"vqa2/accuracy_{n}shot", 2) for n in (0, 1, 2, 4))
PANELS = (
  Panel("Captioning and VQA", CAPTIONS + VQA, "always"),
  *(Panel(f"{title}, all metrics of captions",
          tuple((heading, "captions", f"{data}/{figure}", 1) for figure, heading in list(SCORES.items())[:10]), "never")
    for data, title in (("coco", "COCO"), ("nocaps", "NoCaps"))),
  Panel("Naming animals", tuple((heading, "naming", f"awa2/{figure}", 1) for heading, figure in (
    ("AWA2 named", "named"), ("Wu-Palmer if wrong", "wup_wrong"), ("attributes if wrong", "overlap_wrong")))),
  Panel("Natural distribution shift", tuple((heading, "shift", column, 1) for heading, column in (
    ("ImageNet", "imagenet/top1"), ("V2", "imagenet_v2/top1"), ("A", "imagenet_a/top1"), ("R", "imagenet_r/top1"),
    ("ObjectNet", "objectnet/top1_own"), ("Sketch", "imagenet_sketch/top1"),
    ("Vid PM-0", "imagenet_vid_robust/pm0_own"), ("PM-10", "imagenet_vid_robust/pm10_own"),
    ("YT-BB PM-0", "ytbb_robust/pm0_own"), ("PM-10", "ytbb_robust/pm10_own")))),
  Panel("Retrieval", tuple(
    (f"{title * (k == 1)}{arrow * (k == 1)}R@{k}", "retrieval", f"{data}/{way}_r{k}", 1)
    for data, title in (("coco", "COCO "), ("flickr30k", "Flickr30k "))
    for way, arrow in (("i2t", "text "), ("t2i", "image ")) for k in (1, 5, 10))),
)


def report(runs: Sequence[Run], pictures: Iterable[str] = (), before: Run | None = None) -> str:
  """Returns Markdown: tables beside the published figures, and of a single run all there is in its results.

  Args:
    runs: one or more; tables have them in the papers' order, unknown ones last.
    pictures: paths of images to show, relative to where the text will be.
    before: what relative robustness is over.

  Raises:
    UserError: `before` was not measured under any of the shifts that the others were.
  """
  runs = ordered(runs)
  one = runs[0] if len(runs) == 1 else None
  blocks = [f"# {escape(one.results['name'])}" if one else f"# {len(runs)} runs"]
  if one:
    blocks.append(f"{escape(one.results['task'])}, step {one.results['step']:,}, seed {one.results['seed']}.")
  blocks.append("Scores are times 100, as the papers print them; figures named as in results.json are as they stand "
                "there, and – is one that there is not.")
  cited: dict[published.Table, None] = {}
  tables = [(panel.title, _panel(panel, runs, cited)) for panel in PANELS]
  tables += [("Zero-shot classification", _zeroshot(runs, cited)), ("Effective robustness", _robustness(runs, before)),
             ("Overlap with the training data", _overlap(runs, cited))]
  for title, table in tables:
    if table:
      blocks += [f"## {title}", table]
  if not one:
    blocks += _others(runs)
  blocks += [f"![{escape(os.path.splitext(p)[0])}]({urllib.parse.quote(p)})" for p in pictures]
  if cited:
    blocks += ["## Published", "\n".join(_cite(table) for table in cited)]
  blocks += _details(one) if one else _rest(runs)
  failed = [(label_of(run, runs), name, reason) for run in runs for name, reason in run.results["failed"].items()]
  if failed:
    shown, header = slice(1 if one else 0, None), ("run", "evaluation", "reason")
    blocks += ["## Failed evaluations", markdown(header[shown], [line[shown] for line in failed])]
  if one:
    origin = [*_flat({"weights": one.results["weights"], "versions": one.results["versions"]}).items()]
    blocks += ["## Weights and versions", markdown(("what", "which"), origin)] if origin else []
  return "\n\n".join(blocks) + "\n"


def write(results: dict[str, Any], workdir: str) -> None:
  """Writes report.md and its pictures into the workdir.

  Args:
    results: what stands in results.json.

  Raises:
    UserError: the layout is another, or the files cannot be written.
  """
  _save([of(results, workdir)], os.path.join(workdir, "report.md"))


def _check(path: str, reads: Iterable[str] = ()) -> None:
  """Makes the directory of a report; raises UserError if it cannot be written there, or is one that is read."""
  try:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  except OSError as error:
    raise refusal(path, error) from error
  destination.file(path, what=path, reads=reads)


def _save(runs: Sequence[Run], path: str, before: Run | None = None) -> None:
  """Writes a report and its pictures."""
  stem, pictures = os.path.splitext(path)[0], []
  _check(path)
  beside = is_regular(path)  # else there is no place beside it, as of /dev/stdout
  for name, figure in pictured(runs).items() if beside else ():
    pictures.append(os.path.basename(f"{stem}_{name}.png"))
    save_figure(figure, f"{stem}_{name}.png")
  if beside and len(runs) == 1 and (shifts := _shifts(runs[0])):
    pictures.append(os.path.basename(f"{stem}_robustness.png"))
    robustness.draw(shifts, runs[0].title, f"{stem}_robustness.png")
  text = report(runs, pictures, before)
  with atomic_write(path) as file:
    file.write(text)


# Text


def number(value: float | None, digits: int = 1, times: int = 100) -> str:
  """Returns a figure times 100 with so many digits, half rounded up as it is written: 0.5485 -> "54.9"."""
  if value is None:
    return NONE
  if not math.isfinite(value := float(value)):
    return str(value)
  if abs(value) >= 1e9:
    return f"{value * times:.3g}"
  exact = (Decimal(repr(value)) * times).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
  return f"{exact + 0:f}"  # + 0: no minus before a zero


def percent(value: float | None, digits: int = 1) -> str:
  """Returns a published figure, which is in percent already."""
  return number(value, digits, times=1)


def escape(text: Any) -> str:
  """Returns a text as one line of Markdown that shows it as it is, also inside a table."""
  return re.sub(r"([\\|`*\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", printable(str(text))).replace("<", "&lt;")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: int = 0) -> str:
  """Returns a table whose columns line up in the text too; the last `numbers` of them to the right."""
  cells = [[escape(cell) for cell in row] for row in (header, *rows)]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  right = [i >= len(header) - numbers for i in range(len(header))]

  def line(row):
    padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
    return f"| {' | '.join(padded)} |"

  rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
  return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def _found(kind: str, model: str | None, column: str, cited: dict) -> dict[str, float]:
  """Returns {source: percent} of a published figure, and notes the tables."""
  found = published.load().find(kind, model, column) if model else []
  cited |= dict.fromkeys(table for table, _ in found)
  return by_source(found)


def _panel(panel: Panel, runs: Sequence[Run], cited: dict) -> str:
  """Returns the table of a panel, "" if no run has any of its figures."""
  book, kinds = published.load(), {kind for _, kind, _, _ in panel.columns}
  ours: dict[str | None, list[tuple[str, list[str]]]] = {}  # model -> (label, cells) of its runs and of further maps
  for run in runs:
    maps = dict.fromkeys(m for kind, m in run.scores if kind in kinds)
    for map_ in sorted(maps, key=bool):
      values = [run.scores.get((kind, map_), {}).get(column) for _, kind, column, _ in panel.columns]
      if all(v is None for v in values):
        continue
      cells = [number(v, digits) for v, (_, _, _, digits) in zip(values, panel.columns, strict=True)]
      if map_ != BLIND:
        ours.setdefault(run.model, []).append((label_of(run, runs) + (f" @{map_}" if map_ else ""), cells))
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
    theirs = [_found(kind, model, column, cited) for _, kind, column, _ in panel.columns]
    for i, source in enumerate(sorted({s for cell in theirs for s in cell})):
      cells = [percent(cell.get(source), c[3]) for cell, c in zip(theirs, panel.columns, strict=True)]
      rows.append(("" if i or model in ours else book.models[model], source, *cells))
  kept = [i for i in range(2 + len(panel.columns)) if any(row[i] != NONE for row in rows)]
  header = ("model", "figures", *(heading for heading, _, _, _ in panel.columns))
  return markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows], len(kept) - 2)


def _zeroshot(runs: Sequence[Run], cited: dict) -> str:
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
  return markdown(("data set", "figure", *(heading for heading, _ in columns)),
                  [(*name, *(cells[i] for _, cells in columns)) for i, name in enumerate(names)], len(columns))


def _shifts(run: Run, before: Run | None = None) -> dict[str, dict[str, float]]:
  """Returns what robustness.summary says of a run."""
  return robustness.summary(_shifted(run), _shifted(before) if before else None)


def _shifted(run: Run) -> dict[str, dict[str, float]]:
  """Returns the figures of a run under the shifts, by set."""
  figures: dict[str, dict[str, float]] = {}
  for column, value in run.scores.get(("shift", ""), {}).items():
    data, figure = column.split("/", 1)
    if data in robustness.SETS and math.isfinite(value):
      figures.setdefault(data, {})[figure] = value
  return figures


def _robustness(runs: Sequence[Run], before: Run | None) -> str:
  """Returns the table of accuracy above what models trained on ImageNet have under a shift; "" if no run has any.

  With `before` it has a column more: the accuracy under the shift less that of this run.
  """
  rows = []
  keys = ("imagenet", "expected", "accuracy", "effective", "gap_cut", *(("relative",) if before else ()))
  every = [_shifts(run, before) for run in runs]
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


def _overlap(runs: Sequence[Run], cited: dict) -> str:
  """Returns the table of evaluations "overlap", p-values corrected for all of a run's; "" if there is none."""
  rows = []
  for run in runs:
    figures = {name: e["figures"] for name, e in run.results["evaluations"].items()
               if e["evaluation"] == "overlap" and "share" in e["figures"]}
    corrected = overlap.summary(figures) if figures else {}
    for name, own in figures.items():
      theirs = [_found("overlap", OVERLAP, f"{run.data[name]}/{key}", cited) for key in ("share", "gain")]
      p_values = (own.get("p"), corrected.get(name, {}).get("p_corrected"))
      rows.append((label_of(run, runs), data_title(run.data[name]),
                   *(number(own.get(key)) for key in ("top1", "clean", "overlap", "share", "gain")),
                   *(NONE if p is None else f"{p:.3g}" for p in p_values),
                   *(percent(next(iter(cell.values()), None)) for cell in theirs)))
    if len(figures) > 1:
      whole = corrected[""]
      theirs = _found("overlap", OVERLAP, "overlap_sets/median_share", cited)
      rows.append((label_of(run, runs), f"median of {len(figures)}", *[NONE] * 3, number(whole["median_share"]),
                   *[NONE] * 3, percent(next(iter(theirs.values()))), NONE))
  header = ("model", "data set", "all", "clean", "overlap", "share, %", "gain", "p", "p, corrected", "CLIP's share, %",
            "CLIP's gain")
  return markdown(header, rows, 9) if rows else ""


def _sources(model: str | None, lines: Sequence[str], cited: dict) -> list[tuple[str, list[str]]]:
  """Returns a (heading, cells) each for the figures of a model that were measured again, and for the paper's."""
  found = [_found("zeroshot", model, line, cited) for line in lines]
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


def _cite(table: published.Table) -> str:
  splits = ", ".join(f"{data_title(d)}: {split}" for d, split in table.split.items())
  parts = [f"{table.source}, {table.table} ({table.where})", published.load().certainty[table.certainty]]
  return f"- {'; '.join(parts)}." + f" {splits}." * bool(splits) + f" {table.note}" * bool(table.note)


def _covered(facts: Mapping[str, Any]) -> str:
  """Returns "4,998 of 5,000", or – where the results do not say."""
  counts = [facts.get(key) for key in ("covered", "items")]
  return " of ".join(f"{n:,}" if isinstance(n, int) else NONE for n in counts) if any(counts) else NONE


def _others(runs: Sequence[Run]) -> list[str]:
  """Returns blocks with the figures of evaluations that no table above is for, a column a run."""
  above = {kind for panel in PANELS for _, kind, _, _ in panel.columns} | {"zeroshot", "overlap"}
  tables: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # (name, evaluation) -> run -> figures
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      if evaluation["evaluation"] not in above:
        tables.setdefault((name, evaluation["evaluation"]), {})[label_of(run, runs)] = evaluation["figures"]
  blocks = []
  for (name, kind), columns in tables.items():
    rows = [(_name(figure) or figure, *(shown(figure, figures.get(figure)) for figures in columns.values()))
            for figure in dict.fromkeys(f for figures in columns.values() for f in figures)]
    blocks += [f"## {escape(name)}: {escape(kind)}", markdown(("figure", *columns), rows, len(columns))]
  return blocks


def _rest(runs: Sequence[Run]) -> list[str]:
  """Returns blocks that say what the figures of several runs rest on."""
  rows = []
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      facts = evaluation["facts"]
      rows.append((label_of(run, runs), run.results["step"], run.results["seed"], name, facts.get("split", NONE),
                   _covered(facts), facts.get("damaged", NONE), str(facts.get("data", NONE))[:12]))
  header = ("run", "step", "seed", "evaluation", "split", "items", "damaged", "data")
  return ["## What the figures rest on", markdown(header, rows)] if rows else []


def _details(run: Run) -> list[str]:
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
    rows = [(_name(figure) or figure, *(shown(figure, evaluation["figures"].get(figure + f"@{m}" * bool(m)))
                                      for m in maps)) for figure in names]
    if rows:
      blocks.append(markdown(("figure", *(m or "value" for m in maps)), rows, len(maps)))
    if isinstance(facts.get("damage"), list) and facts["damage"]:
      lines = [f"- {escape(d)}" for d in facts["damage"][:NAMED]]
      blocks += ["Damaged:" if damaged == len(lines) else f"Damaged, the first {len(lines)}:", "\n".join(lines)]
    told = {"items", "covered", "damaged", "damage"}
    chosen = {k: v for k, v in evaluation["protocol"].items() if k not in DEFAULTS or v != DEFAULTS[k]}
    settings = _flat(chosen) | _flat({k: v for k, v in facts.items() if k not in told})
    if settings:
      blocks.append(markdown(("setting", "value"), list(settings.items())))
  return blocks


def _other_counts(data: str, evaluation: Mapping[str, Any]) -> str:
  """Returns a sentence on the number of items behind published figures where it is another."""
  tables = [t for t in published.load().tables if t.evaluation == evaluation["evaluation"]]
  counts = {t.source: t.items[data] for t in tables if data in t.items}
  counts = {source: n for source, n in counts.items() if n != evaluation["facts"].get("covered")}
  return f" Published figures are of {' and '.join(f'{n:,} ({s})' for s, n in counts.items())}." if counts else ""


def _name(figure: str) -> str:
  """Returns a figure's name as the papers have it: "cider_d/in" -> "CIDEr-D in"; "" of a figure that they have not."""
  whole, at, map_ = figure.partition("@")
  parts = whole.split("/")
  for i, part in enumerate(parts):
    if m := re.fullmatch(r"(accuracy|truncated)_(\d+)shot(_sd)?", part):  # of evaluation "vqa"
      parts[i] = f"{m[2]}-shot" + ", truncated" * (m[1] == "truncated") + ", deviation" * bool(m[3])
    elif part in SCORES:
      parts[i] = SCORES[part]
    else:
      continue
    return " ".join(parts) + at + map_
  return ""


def shown(figure: str, value: float | None) -> str:
  """Returns a figure as it is printed: scores times 100, whole numbers whole, others with four digits."""
  if value is None or _name(figure):
    return number(value, 2 if "shot" in figure else 1)
  if math.isfinite(value) and value == int(value):
    return f"{int(value):,}" if abs(value) < 1e15 else f"{float(value):.4g}"
  return f"{value:.4g}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
  """Returns {"source.name": "coco", …}: what is set, by its dotted name; of a long list the first three."""
  out = {}
  for key, value in values.items():
    if isinstance(value, dict):
      out |= _flat(value, f"{prefix}{key}.")
    elif isinstance(value, list) and value:
      some = ", ".join(map(str, value if len(value) <= 6 else value[:3]))
      out[f"{prefix}{key}"] = some if len(value) <= 6 else f"{len(value)}: {some}, …"
    elif value not in ("", None, []):
      out[f"{prefix}{key}"] = str(value) if len(str(value)) <= 200 else f"{str(value)[:200]}…"
  return out


if __name__ == "__main__":
  _before = flags.DEFINE_string("before", None, "Run of the model before an intervention: relative robustness is over "
                                "it.")
  _out = flags.DEFINE_string("out", None, "Markdown file, with pictures beside it; printed if not given.")

  def _main(argv: list[str]) -> None:
    if not argv:
      raise UserError("no run given; for example python -m limber_jax.report runs/limber_clip runs/limber_beit")
    out = "" if _out.value == destination.STDOUT else _out.value
    if out:
      _check(out, [os.path.join(run, "results.json") for run in (*argv, _before.value or "")])
    runs, before = [read(workdir) for workdir in argv], read(_before.value) if _before.value else None
    if out:
      _save(runs, out, before)
      print(f"written to {out}")
    else:
      print(report(runs, before=before), end="")

  cli.run(_main, prints=lambda: _out.value in (None, "", destination.STDOUT))
