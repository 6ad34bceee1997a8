"""Tables of runs beside the published figures: `python -m limber_jax.report RUN [RUN…] [--out=report.md]`.

A RUN is a workdir in which limber_jax.evaluate has written results.json. One run is shown with every figure, what it
rests on and the published rows that fit; several are rows of one table. Scores are times 100, as in the papers.

--before=RUN names the run of the model before an intervention, such as fine-tuning: the table of robustness then has
what each run gained over it under each shift, the relative robustness of Taori et al. (2020).
"""

import json
import math
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from limber_jax import cli
from limber_jax.config import Evaluation, flatten
from limber_jax.errors import UserError
from limber_jax.evals import datasets, overlap, published, robustness

NONE = "–"       # a figure that there is not
# Settings of an evaluation that are as everywhere; only others are shown.
DEFAULTS = {k: v for k, v in flatten(Evaluation()).items() if not k.startswith(("source.", "name"))}
BLIND = "blind"  # what published.json calls a language model alone: figures have @blind or @blind_text behind them
OVERLAP = "clip_overlap"  # … and the model of CLIP's analysis of overlap
NAMED = 20       # damaged items that are named
ACROSS = 3       # panes in a row of a picture
COLOURS = ("#1f6f8b", "#d1603d", "#6a4c93", "#4f772d", "#b5838d", "#e09f3e", "#335c67", "#9e2a2b", "#577590")
GREY, INK = "#c9c9c9", "#222222"

LAYOUT = {"name": str, "task": str, "model": str, "step": int, "seed": int, "weights": dict, "versions": dict,
          "evaluations": dict, "failed": dict}  # of results.json
LAYOUT_OF_EVALUATION = {"evaluation": str, "figures": dict, "protocol": dict, "facts": dict}

# What papers print times 100, and how they call it. Other figures are printed as they are, by their own names.
SCORES = {
  "cider_d": "CIDEr-D", "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
  "meteor": "METEOR", "rouge_l": "ROUGE-L", "spice": "SPICE", "clip_s": "CLIP-S", "ref_clip_s": "RefCLIP-S",
  "top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class", "mean_top1_top5": "mean of top-1, top-5",
  "map11": "11-point mAP", "map": "mAP", "f1_macro": "macro F1",
  "worst_group": "worst group", "worst_group_top5": "worst group, top-5", "roc_auc": "ROC AUC",
  "pm0": "PM-0", "pm10": "PM-10",
  "top1_own": "top-1, own class names", "pm0_own": "PM-0, own class names", "pm10_own": "PM-10, own class names",
  "i2t_r1": "image to text R@1", "i2t_r5": "image to text R@5", "i2t_r10": "image to text R@10",
  "t2i_r1": "text to image R@1", "t2i_r5": "text to image R@5", "t2i_r10": "text to image R@10",
  "right": "names the class alone", "named": "names the class", "blind": "names the class alone, blind",
  "accuracy": "accuracy", "zeroshot": "zero-shot", **{f"few_shot_{k}": f"{k}-shot" for k in (1, 2, 4, 8, 16)},
  "wup_wrong": "Wu-Palmer if wrong", "overlap_wrong": "attributes if wrong", "chair_i": "CHAIR-i", "chair_s": "CHAIR-s",
}


@dataclass(frozen=True)
class Run:
  """The results of one run."""

  where: str                  # its workdir
  results: Mapping[str, Any]  # of results.json, its layout checked
  model: str | None           # what published.json calls it
  data: Mapping[str, str]     # what published.json calls the data set of each evaluation, or the evaluation's own name
  scores: Mapping[tuple[str, str], Mapping[str, float]]  # (evaluation, map) -> "DATA/FIGURE" -> figure

  @property
  def title(self) -> str:
    name = _printable(self.results["name"])
    if self.model is None:
      return name
    title = published.load().models[self.model]
    return title if published.load().model_of(name) == self.model else f"{title} ({name})"


@dataclass(frozen=True)
class Panel:
  """A table over models: a row of what was measured, and beneath it what was published."""

  title: str
  columns: Sequence[tuple[str, str, str, int]]  # heading, evaluation, "DATA/FIGURE", digits after the point
  others: str = "one"  # when published rows of models that were not run are shown: always | one: beside one run | never


CAPTIONS = (
  ("NoCaps In", "captions", "nocaps/cider_d/in", 1), ("Out", "captions", "nocaps/cider_d/out", 1),
  ("Near", "captions", "nocaps/cider_d/near", 1), ("All", "captions", "nocaps/cider_d", 1),
  ("CLIP-S", "captions", "nocaps/clip_s", 1), ("Ref-S", "captions", "nocaps/ref_clip_s", 1),
  ("COCO", "captions", "coco/cider_d", 1), ("CLIP-S", "captions", "coco/clip_s", 1),
  ("Ref-S", "captions", "coco/ref_clip_s", 1))
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


def read(workdir: str) -> Run:
  """Returns the results of a run; raises UserError if there are none, or none that can be read."""
  path = os.path.join(workdir, "results.json")
  if not os.path.isfile(path):
    if os.path.isfile(workdir):
      raise UserError(f"{workdir}: expected the workdir of a run, got a file")
    raise UserError(f"{workdir}: no results.json there; run python -m limber_jax.evaluate --workdir={workdir} "
                    "--config=… first")
  try:
    with open(path, encoding="utf-8") as file:
      content = json.load(file)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror})") from error
  except (ValueError, RecursionError) as error:  # a bad encoding is a ValueError too
    raise UserError(f"{path}: no results, for it is no JSON ({error}); run limber_jax.evaluate again") from error
  return of(content, workdir)


def of(results: Any, workdir: str) -> Run:
  """Returns a run by its results, those of results.json; raises UserError if their layout is another."""
  path = os.path.join(workdir, "results.json")
  _check(results, LAYOUT, path)
  book = published.load()
  data: dict[str, str] = {}
  scores: dict[tuple[str, str], dict[str, float]] = {}
  taken: dict[tuple[str, str | None], str] = {}  # (evaluation, data set) -> the name of the evaluation it stands under
  for name, evaluation in results["evaluations"].items():
    _check(evaluation, LAYOUT_OF_EVALUATION, f"{path}: evaluations.{name}")
  # Of two evaluations of one data set, that which has its name goes into the tables.
  for name in sorted(results["evaluations"], key=lambda n: book.data_of(n, "") is None):
    evaluation = results["evaluations"][name]
    kind, known = evaluation["evaluation"], _data_of(name, evaluation)
    data[name] = known if known and taken.setdefault((kind, known), name) == name else name
    for figure, value in evaluation["figures"].items():
      if isinstance(value, bool) or not isinstance(value, int | float) or (
          isinstance(value, int) and value.bit_length() > 1000):
        raise UserError(f"{path}: evaluations.{name}.figures.{figure}: expected a number, got {value!r:.60}")
      figure, _, map_ = figure.partition("@")
      map_ = BLIND if map_ == "blind_text" else map_
      scores.setdefault((kind, map_), {})[f"{data[name]}/{figure}"] = float(value)
  model = book.model_of(results["model"]) or book.model_of(results["name"])
  return Run(workdir, results, model, data, scores)


def _data_of(name: str, evaluation: Mapping[str, Any]) -> str | None:
  """Returns what published.json calls the data set of an evaluation: by its name, its classes, or where it is read."""
  kind, classes = evaluation["evaluation"], str(evaluation["protocol"].get("classes"))
  file = os.path.splitext(os.path.basename(str(evaluation["protocol"].get("source.path"))))[0]
  # ImageNet's classes are those of other sets, too.
  words = [classes] if kind == "shift" else [name, file] if classes == "imagenet" else [name, classes, file]
  return next(filter(None, (published.load().data_of(word, kind) for word in words)), None)


def _check(value: Any, layout: Mapping[str, type], where: str) -> None:
  if not isinstance(value, dict):
    raise UserError(f"{where}: expected an object with {', '.join(layout)}, got {value!r:.60}; "
                    "run limber_jax.evaluate again")
  for key, kind in layout.items():
    if not isinstance(value.get(key), kind) or isinstance(value[key], bool):
      got = f"{value[key]!r:.60}" if key in value else "nothing"
      raise UserError(f"{where}: {key}: expected {kind.__name__}, got {got}; run limber_jax.evaluate again")


def report(runs: Sequence[Run], pictures: Iterable[str] = (), before: Run | None = None) -> str:
  """Returns Markdown: tables beside the published figures, and of a single run all there is in its results.

  Args:
    runs: one or more; tables have them in the papers' order, unknown ones last.
    pictures: paths of images to show, relative to where the text will be.
    before: what relative robustness is over.

  Raises:
    UserError: `before` was not measured under any of the shifts that the others were.
  """
  runs = _ordered(runs)
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
  failed = [(_label(run, runs), name, reason) for run in runs for name, reason in run.results["failed"].items()]
  if failed:
    shown = slice(1 if one else 0, None)
    header = ("run", "evaluation", "reason")
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


def _save(runs: Sequence[Run], path: str, before: Run | None = None) -> None:
  """Writes a report and its pictures."""
  stem = os.path.splitext(path)[0]
  pictures = []
  try:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    for name, figure in pictured(runs).items():
      pictures.append(os.path.basename(f"{stem}_{name}.png"))
      figure.savefig(f"{stem}_{name}.png.tmp", format="png", dpi=110)
      os.replace(f"{stem}_{name}.png.tmp", f"{stem}_{name}.png")
    if len(runs) == 1 and (shifts := _shifts(runs[0])):
      pictures.append(os.path.basename(f"{stem}_robustness.png"))
      robustness.draw(shifts, runs[0].title, f"{stem}_robustness.png")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
      file.write(report(runs, pictures, before))
    os.replace(f"{path}.tmp", path)
  except OSError as error:
    raise UserError(f"{path}: cannot be written ({error.strerror})") from error


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
  return re.sub(r"([\\|`*\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", _printable(str(text))).replace("<", "&lt;")


def _printable(text: str) -> str:
  """Returns a text on one line, without characters that cannot be seen or written."""
  return " ".join("".join(c if c.isprintable() else " " for c in text).split())


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


def _ordered(runs: Sequence[Run]) -> list[Run]:
  """Returns runs in the papers' order, others last as they came."""
  place = {model: i for i, model in enumerate(published.load().models)}
  return sorted(runs, key=lambda run: place.get(run.model, len(place)))


def _label(run: Run, runs: Sequence[Run]) -> str:
  """Returns the title of a run, with its workdir where another has the same."""
  return run.title if sum(run.title == other.title for other in runs) == 1 else f"{run.title} ({run.where})"


def _found(kind: str, model: str | None, column: str, cited: dict) -> dict[str, float]:
  """Returns {source: percent} of a published figure, and notes the tables."""
  found = published.load().find(kind, model, column) if model else []
  cited |= dict.fromkeys(table for table, _ in found)
  return _by_source(found)


def _by_source(found: Sequence[tuple[published.Table, float]]) -> dict[str, float]:
  """Returns {source: percent}: what was measured again first, then the papers."""
  return {table.source: value for table, value in sorted(found, key=lambda x: x[0].paper)}


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
        ours.setdefault(run.model, []).append((_label(run, runs) + (f" @{map_}" if map_ else ""), cells))
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
  lines = _zeroshot_columns([scores for _, scores in mine])
  if not lines:
    return ""
  columns: list[tuple[str, list[str]]] = []
  for run, scores in mine:
    columns.append((_label(run, runs), [number(scores.get(line)) for line in lines]))
    columns += _sources(run.model, lines, cited)
  if len(runs) == 1:
    columns += [(book.models[model], _sources(model, lines, cited)[0][1]) for model in _near(runs[0].model)
                if _sources(model, lines, cited)]
  names = [(_data_title(line.split("/")[0]), SCORES.get(line.split("/")[1], line.split("/")[1])) for line in lines]
  return markdown(("data set", "figure", *(heading for heading, _ in columns)),
                  [(*name, *(cells[i] for _, cells in columns)) for i, name in enumerate(names)], len(columns))


def _zeroshot_columns(scores: Sequence[Mapping[str, float]]) -> list[str]:
  """Returns each "DATA/FIGURE" that papers give of a data set, or top-1 of others, in the papers' order."""
  book = published.load()
  printed = {column for table in book.tables if table.evaluation == "zeroshot" for column in table.columns}
  place = {data: i for i, data in enumerate(book.data)}
  own = {name: data.metric for name, data in datasets.SETS.items() if data.metric}
  wanted = [c for c in dict.fromkeys(c for some in scores for c in some)
            if c in printed or c.split("/")[1] == own.get(c.split("/")[0], "top1")]
  return sorted(wanted, key=lambda column: place.get(column.split("/")[0], len(place)))


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
      title = f"mean of {found[data]['sets']:.0f}" if data == "mean" else _data_title(data)
      rows.append((_label(run, runs), title, *(number(found[data].get(key)) for key in keys)))
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
      rows.append((_label(run, runs), _data_title(run.data[name]),
                   *(number(own.get(key)) for key in ("top1", "clean", "overlap", "share", "gain")),
                   *(NONE if p is None else f"{p:.3g}" for p in p_values),
                   *(percent(next(iter(cell.values()), None)) for cell in theirs)))
    if len(figures) > 1:
      whole = corrected[""]
      theirs = _found("overlap", OVERLAP, "overlap_sets/median_share", cited)
      rows.append((_label(run, runs), f"median of {len(figures)}", *[NONE] * 3, number(whole["median_share"]),
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


def _data_title(data: str) -> str:
  return published.load().data.get(data, data)


def _cite(table: published.Table) -> str:
  splits = ", ".join(f"{_data_title(d)}: {split}" for d, split in table.split.items())
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
        tables.setdefault((name, evaluation["evaluation"]), {})[_label(run, runs)] = evaluation["figures"]
  blocks = []
  for (name, kind), columns in tables.items():
    rows = [(_name(figure) or figure, *(_shown(figure, figures.get(figure)) for figures in columns.values()))
            for figure in dict.fromkeys(f for figures in columns.values() for f in figures)]
    blocks += [f"## {escape(name)}: {escape(kind)}", markdown(("figure", *columns), rows, len(columns))]
  return blocks


def _rest(runs: Sequence[Run]) -> list[str]:
  """Returns blocks that say what the figures of several runs rest on."""
  rows = []
  for run in runs:
    for name, evaluation in run.results["evaluations"].items():
      facts = evaluation["facts"]
      rows.append((_label(run, runs), run.results["step"], run.results["seed"], name, facts.get("split", NONE),
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
    rows = [(_name(figure) or figure, *(_shown(figure, evaluation["figures"].get(figure + f"@{m}" * bool(m)))
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


def _shown(figure: str, value: float | None) -> str:
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


# Pictures


def pictured(runs: Sequence[Run]) -> dict[str, Figure]:
  """Returns pictures by name, those there are figures for: "captioning", "vqa", "zeroshot"."""
  runs = _ordered(runs)
  drawn = {"captioning": _draw_captioning(runs), "vqa": _draw_vqa(runs), "zeroshot": _draw_zeroshot(runs)}
  return {name: figure for name, figure in drawn.items() if figure}


def _draw_captioning(runs: Sequence[Run]) -> Figure | None:
  """Bars of the columns of captioning, a pane a run."""
  panes = []
  for run in runs:
    scores = run.scores.get(("captions", ""), {})
    if there := [column for _, _, column, _ in CAPTIONS if column in scores]:
      panes.append((run, there, [_hundred(scores[column]) for column in there]))
  if not panes:
    return None
  across = min(ACROSS, len(panes))
  down = -(-len(panes) // across)
  figure = _figure(6.8 if across == 1 else 4.6 * across, 2.9 * down + 0.5, "Captioning, scores × 100")
  grid = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
  for axes in grid[len(panes) :]:
    axes.axis("off")
  names = {column: heading.split()[-1].replace("COCO", "CIDEr-D") for heading, _, column, _ in CAPTIONS}
  for axes, (run, there, ours) in zip(grid, panes, strict=False):
    places = [i + 0.6 * column.startswith("coco") for i, column in enumerate(there)]
    theirs = [_printed("captions", run.model, column) for column in there]
    axes.bar([x - 0.2 for x in places], ours, 0.4, color=COLOURS[0], label="measured")
    axes.bar([x + 0.2 for x in places], theirs, 0.4, color=GREY, label="published")
    for x, value in zip(places, ours, strict=True):
      if math.isfinite(value):
        axes.text(x - 0.2, value, f"{value:.0f}", ha="center", va="bottom", size=7, color=INK)
    axes.set_xticks(places, [names[column] for column in there], size=7.5)
    for pattern, group in (("nocaps/cider_d.*", "NoCaps CIDEr-D"), ("nocaps/.*clip_s", "NoCaps"), ("coco/.*", "COCO")):
      if of := [x for x, column in zip(places, there, strict=True) if re.fullmatch(pattern, column)]:
        axes.text(sum(of) / len(of), -0.13, group, transform=axes.get_xaxis_transform(), ha="center", va="top",
                  size=8.5, color=INK)
    _style(axes, _label(run, runs))
  grid[0].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
  return figure


def _draw_vqa(runs: Sequence[Run]) -> Figure | None:
  """Lines over the number of examples, a colour a run, grey without any image; as published, dashed."""
  lines = []  # (label, shots -> percent, how it is drawn)
  colours: dict[str | None, str] = {BLIND: "#888888"}
  for i, run in enumerate(runs):
    colours.setdefault(run.model, COLOURS[i % len(COLOURS)])
    for (kind, map_), scores in run.scores.items():
      if kind == "vqa" and (points := _by_shots({c: _hundred(v) for c, v in scores.items()})):
        label = _label(run, runs) + (f" @{map_}" if map_ else "")
        how = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.2 if map_ else 2.2, "marker": "s" if map_ else "o"}
        if map_ == BLIND:
          label, how = published.load().models[BLIND], how | {"color": colours[BLIND]}
        if (label, points) not in [line[:2] for line in lines]:
          lines.append((label, points, how))
  if not lines:
    return None
  dashed = [(colours[model], _by_shots(table.rows[model])) for table in published.load().tables
            if table.evaluation == "vqa" for model in table.rows if model in colours]
  figure = _figure(8.0, max(4.2, 0.24 * len(lines) + 1.4), "VQA v2 accuracy in %, by examples before the question")
  axes = figure.subplots()
  for label, points, how in lines:
    axes.plot(list(points), list(points.values()), label=_plain(label), markersize=5, **how)
  for i, (colour, points) in enumerate(dashed):
    axes.plot(list(points), list(points.values()), color=colour, linestyle="--", linewidth=1.2, marker=".",
              label=None if i else "published")
  axes.set_xticks(sorted({round(x) for line in axes.lines for x in line.get_xdata()}))
  axes.set_xlabel("examples", size=9, color=INK)
  _style(axes, "")
  axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
  return figure


def _draw_zeroshot(runs: Sequence[Run]) -> Figure | None:
  """Bars, or points of several runs, of every data set; a mark where it was published."""
  mine = [(run, run.scores.get(("zeroshot", ""), {})) for run in runs]
  mine = [(run, scores) for run, scores in mine if scores]
  columns = _zeroshot_columns([scores for _, scores in mine])
  if not columns:
    return None
  names = [_data_title(c.split("/")[0]) for c in columns]
  doubled = {n for n in names if names.count(n) > 1}
  names = [f"{n}, {SCORES[c.split('/')[1]]}" if n in doubled else n for n, c in zip(names, columns, strict=True)]
  places = range(len(columns))
  figure = _figure(7.6, 0.27 * len(columns) + 1.2 + 0.2 * len(mine), "Zero-shot classification, %")
  axes = figure.subplots()
  for i, (run, scores) in enumerate(mine):
    ours = [_hundred(scores[c]) if c in scores else math.nan for c in columns]
    theirs = [_printed("zeroshot", run.model, c) for c in columns]
    colour, label = COLOURS[i % len(COLOURS)], _plain(_label(run, runs))
    if len(mine) == 1:
      axes.barh(places, ours, 0.66, color=colour, label=label)
      for y, value in zip(places, ours, strict=True):
        if math.isfinite(value):
          axes.text(1, y, f"{value:.1f}", va="center", size=7, color="white" if value > 9 else INK)
    else:
      axes.scatter(ours, places, 34, color=colour, label=label, zorder=3)
    if any(map(math.isfinite, theirs)):
      axes.scatter(theirs, places, 30, marker="D", facecolors="white", edgecolors=INK if len(mine) == 1 else colour,
                   linewidths=1.2, label=f"{published.load().models[run.model]}, published", zorder=4)
  axes.set_yticks(places, [_plain(n) for n in names], size=8)
  axes.set_ylim(len(columns) - 0.4, -0.6)
  axes.set_xlim(0, 102)
  _style(axes, "", grid="x")
  figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
  return figure


def _by_shots(scores: Mapping[str, float]) -> dict[int, float]:
  """Returns {shots: percent} of "vqa2/accuracy_0shot" and the like."""
  found = {int(m[1]): value for column, value in scores.items()
           if (m := re.fullmatch(r"vqa2/accuracy_(\d+)shot", column))}
  return dict(sorted(found.items()))


def _hundred(value: float) -> float:
  """Returns a figure times 100; what is not finite is not drawn."""
  return 100 * value if math.isfinite(value) else math.nan


def _printed(kind: str, model: str | None, column: str) -> float:
  """Returns the published percent of a figure, measured again rather than the paper's; NaN if there is none."""
  found = published.load().find(kind, model, column) if model else []
  return next(iter(_by_source(found).values()), math.nan)


def _plain(text: str) -> str:
  """Returns a text for a picture, where a $ would start a formula."""
  return text.replace("$", r"\$")


def _figure(width: float, height: float, title: str) -> Figure:
  figure = Figure(figsize=(width, height), layout="constrained")
  figure.suptitle(title, size=12, color=INK)
  return figure


def _style(axes: Axes, title: str, grid: str = "y") -> None:
  axes.set_title(title, size=10, color=INK, loc="left", parse_math=False)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color("#888888")
  axes.tick_params(color="#888888", labelcolor=INK)
  axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)


if __name__ == "__main__":
  _before = flags.DEFINE_string("before", None, "Run of the model before an intervention: relative robustness is over "
                                "it.")
  _out = flags.DEFINE_string("out", None, "Markdown file, with pictures beside it; printed if not given.")

  def _main(argv: list[str]) -> None:
    if not argv:
      raise UserError("no run given; for example python -m limber_jax.report runs/limber_clip runs/limber_beit")
    runs, before = [read(workdir) for workdir in argv], read(_before.value) if _before.value else None
    if _out.value:
      _save(runs, _out.value, before)
      print(f"written to {_out.value}")
    else:
      print(report(runs, before=before), end="")

  cli.run(_main)
