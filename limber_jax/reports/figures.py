"""The pictures of reports: captions, answers and zero-shot accuracy of several models beside each other."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from limber_jax.map_names import BLIND
from limber_jax.reports import published
from limber_jax.reports.runs import (
  CAPTIONS,
  SCORES,
  Run,
  by_source,
  data_title,
  label_of,
  ordered,
  zeroshot_columns,
)

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

ACROSS = 3       # panes in a row of a picture
COLOURS = ("#1f6f8b", "#d1603d", "#6a4c93", "#4f772d", "#b5838d", "#e09f3e", "#335c67", "#9e2a2b", "#577590")
GREY, INK = "#c9c9c9", "#222222"


def pictured(runs: Sequence[Run]) -> "dict[str, Figure]":
  """Returns pictures by name, those there are metrics for: "captioning", "vqa", "zeroshot"."""
  runs = ordered(runs)
  drawn = {"captioning": _draw_captioning(runs), "vqa": _draw_vqa(runs), "zeroshot": _draw_zeroshot(runs)}
  return {name: figure for name, figure in drawn.items() if figure}


def _draw_captioning(runs: Sequence[Run]) -> "Figure | None":
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
    _style(axes, label_of(run, runs))
  grid[0].legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
  return figure


def _draw_vqa(runs: Sequence[Run]) -> "Figure | None":
  """Lines over the number of examples, a colour a run, grey without any image; as published, dashed."""
  lines = []  # (label, shots -> percent, how it is drawn)
  colours: dict[str | None, str] = {BLIND: "#888888"}
  for i, run in enumerate(runs):
    colours.setdefault(run.model, COLOURS[i % len(COLOURS)])
    for (kind, map_), scores in run.scores.items():
      if kind == "vqa" and (points := _by_shots({c: _hundred(v) for c, v in scores.items()})):
        label = label_of(run, runs, map_)
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


def _draw_zeroshot(runs: Sequence[Run]) -> "Figure | None":
  """Bars, or points of several runs, of every data set; a mark where it was published."""
  mine = [(run, run.scores.get(("zeroshot", ""), {})) for run in runs]
  mine = [(run, scores) for run, scores in mine if scores]
  columns = zeroshot_columns([scores for _, scores in mine])
  if not columns:
    return None
  names = [data_title(c.split("/")[0]) for c in columns]
  doubled = {n for n in names if names.count(n) > 1}
  names = [f"{n}, {SCORES[c.split('/')[1]]}" if n in doubled else n for n, c in zip(names, columns, strict=True)]
  places = range(len(columns))
  figure = _figure(7.6, 0.27 * len(columns) + 1.2 + 0.2 * len(mine), "Zero-shot classification, %")
  axes = figure.subplots()
  for i, (run, scores) in enumerate(mine):
    ours = [_hundred(scores[c]) if c in scores else math.nan for c in columns]
    theirs = [_printed("zeroshot", run.model, c) for c in columns]
    colour, label = COLOURS[i % len(COLOURS)], _plain(label_of(run, runs))
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
  """Returns a metric times 100; what is not finite is not drawn."""
  return 100 * value if math.isfinite(value) else math.nan


def _printed(kind: str, model: str | None, column: str) -> float:
  """Returns the published percent of a metric, measured again rather than the paper's; NaN if there is none."""
  found = published.load().find(kind, model, column) if model else []
  return next(iter(by_source(found).values()), math.nan)


def _plain(text: str) -> str:
  """Returns a text for a picture, where a $ would start a formula."""
  return text.replace("$", r"\$")


def _figure(width: float, height: float, title: str) -> "Figure":
  from matplotlib.figure import Figure  # here, for most commands draw nothing

  figure = Figure(figsize=(width, height), layout="constrained")
  figure.suptitle(title, size=12, color=INK)
  return figure


def _style(axes: "Axes", title: str, grid: str = "y") -> None:
  axes.set_title(title, size=10, color=INK, loc="left", parse_math=False)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color("#888888")
  axes.tick_params(color="#888888", labelcolor=INK)
  axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
  axes.set_axisbelow(True)
