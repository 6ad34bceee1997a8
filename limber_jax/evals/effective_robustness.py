"""What shifts of the data do to a model, against what models trained on ImageNet alone lose there.

Source: arXiv 2103.00020, section 3.3, and Taori et al., arXiv 2007.00644.
"""

import functools
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from limber_jax.evals.robustness import SETS, SHIFTS, VIDEOS, classes_of, read
from limber_jax.metrics.statistics import Line, effective_robustness, fit, gap_cut, relative_robustness
from limber_jax.runtime.atomic import save_figure


@functools.cache
def standard() -> list[dict[str, Any]]:
  """Returns {"model": name, set: accuracy or None, …} of models trained on ImageNet alone, without tricks.

  Keys beside the sets: "imagenet_on_SET" is ImageNet's accuracy on the classes of that set, "…_pm10" that of videos.
  """
  return json.loads(read("standard.json"))["models"]


def baseline(name: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the accuracies (on ImageNet, of the set's classes; on the set) of `standard` models, float64 [m] each.

  A model that was not tried on the set is left out, and so is one with nothing right: ImageNet-A was made of what
  ResNet-50 gets wrong.
  """
  own = f"imagenet_on_{name}"
  pairs = [(model[own] if own in model else model["imagenet"], model[name]) for model in standard()]
  kept = np.array([pair for pair in pairs if None not in pair and pair[1] > 0])
  return kept[:, 0], kept[:, 1]


@functools.cache
def expected(name: str) -> Line:
  """Returns the fit of a shifted set's accuracy on ImageNet's, over models of standard training.

  On ImageNet-A, which was made of what one such model gets wrong, weak models lie on a line of their own; as in the
  paper's picture there is one for all.
  """
  return fit(*baseline(name))


def summary(metrics: dict[str, dict[str, float]], before: dict[str, dict[str, float]] | None = None
            ) -> dict[str, dict[str, float]]:
  """Returns by set, and for "mean", what the shifts do to a model.

  For each shifted set: "accuracy" under the shift (of videos that of the anchors, PM0), "imagenet" on the same classes
  without it, "expected" of a model of standard training with that, "effective" robustness, the "gap_cut": the share of
  the expected drop that does not happen; "…_own" of them with the set's own class names; and "relative" robustness
  over a model `before`. "mean" has the means of what every set has ("…_own" where a set has names of its own, else as
  without) and the number of "sets": the paper's means are over seven. A set whose accuracy on ImageNet is not known is
  left out; without any, there is no "mean".

  Args:
    metrics: of `Robustness` by set, "imagenet" among them.
    before: the same of another model.
  """
  out: dict[str, dict[str, float]] = {}
  for name in SHIFTS:
    known = "imagenet" in metrics and name in metrics
    own = f"on_{name}" if len(classes_of(name).known) < len(classes_of("imagenet").known) else "top1"
    if not known or own not in metrics["imagenet"]:
      continue
    accuracy, line = metrics["imagenet"][own], expected(name)
    row = {"imagenet": accuracy, "expected": line(accuracy)}
    for kind in ("", "_own"):
      if (measure := f"{'pm0' if name in VIDEOS else 'top1'}{kind}") in metrics[name]:
        shifted = metrics[name][measure]
        row |= {f"accuracy{kind}": shifted, f"effective{kind}": effective_robustness(accuracy, shifted, line)}
        if line(accuracy) < accuracy:
          row[f"gap_cut{kind}"] = gap_cut(accuracy, shifted, line)
        if before is not None and name in before and measure in before[name]:
          row[f"relative{kind}"] = relative_robustness(shifted, before[name][measure])
    out[name] = row
  if rows := list(out.values()):
    keys = {key for row in rows for key in row}
    values = {key: [row[key] if key in row else row[plain_] for row in rows] for key in sorted(keys)
              if all((plain_ := key.removesuffix("_own")) in row for row in rows)}
    out["mean"] = {key: float(np.mean(found)) for key, found in values.items()} | {"sets": float(len(rows))}
  return out


def draw(rows: dict[str, dict[str, float]], name: str, path: str) -> None:
  """Writes the paper's picture as a PNG: for the mean and each set, the shifted accuracy against ImageNet's.

  Axes are logits. Small points are models of standard training with their fit, the dotted line is no loss at all, and
  the star is this model: hollow where its classes have the set's own names.

  Args:
    rows: of `summary`, with at least one set.
    name: of the model, for the legend.
    path: where to; the folder is made.
  """
  from matplotlib.figure import Figure  # here: a command that draws nothing waits for it otherwise

  sets = [s for s in SHIFTS if s in rows]
  panels = ["mean", *sets] if len(sets) > 1 else sets
  columns = min(4, len(panels))
  down = -(-len(panels) // columns)
  figure = Figure(figsize=(3.3 * columns, 3.4 * down + 0.5), layout="constrained")
  for number, axes in enumerate(figure.subplots(down, columns, squeeze=False).flat):
    if number >= len(panels):
      axes.axis("off")
      continue
    which = panels[number]
    points = _means(sets) if which == "mean" else baseline(which)
    title = f"Mean of {len(sets)} sets" if which == "mean" else SETS[which]
    _panel(axes, rows[which], *points, title, name)
  handles, labels = figure.axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
  if folder := os.path.dirname(path):
    os.makedirs(folder, exist_ok=True)
  save_figure(figure, path)


def _panel(axes: Any, row: dict[str, float], x: np.ndarray, y: np.ndarray, title: str, name: str) -> None:
  own = [row["accuracy_own"]] if "accuracy_own" in row else []
  shown = [np.clip([*part], 0.002, 0.998) for part in ([*x, row["imagenet"]], [*y, row["accuracy"], *own])]
  low, high = zip(*((special.logit(part.min()) - 0.3, special.logit(part.max()) + 0.3) for part in shown), strict=True)
  line, along = fit(x, y), special.expit(np.linspace(low[0], high[0], 50))
  axes.plot(special.logit(along), special.logit(along), ":", color="#555555", label="no loss (y = x)")
  axes.plot(special.logit(along), special.logit([line(a) for a in along]), color="#7a9cc6", label="their fit")
  axes.plot(special.logit(x), special.logit(y), "o", markersize=3.5, color="#7a9cc6", alpha=0.6,
            label="trained on ImageNet")
  across, up = (special.logit(np.clip(a, 0.002, 0.998)) for a in (row["imagenet"], [row["accuracy"], *own]))
  axes.plot(across, up[0], "*", markersize=13, color="#6a3d9a", label=name.replace("$", r"\$"))
  if own:
    axes.plot(across, up[1], "*", markersize=13, markerfacecolor="none", markeredgecolor="#6a3d9a",
              label="the same, with the set's own class names")
  for axis, start, stop in ((axes.xaxis, low[0], high[0]), (axes.yaxis, low[1], high[1])):
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.5)
             if start <= special.logit(t / 100) <= stop]
    axis.set_ticks([special.logit(t / 100) for t in ticks], [f"{t:g}" for t in ticks])
  axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xlabel="ImageNet, same classes (%)")
  axes.tick_params(labelsize=7)
  axes.set_title(f"{title} (%)", size=10)


def _means(sets: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the mean accuracies over sets (on ImageNet; shifted) of the standard models that have all, float64 [m]."""
  own = [f"imagenet_on_{s}" if f"imagenet_on_{s}" in standard()[0] else "imagenet" for s in sets]
  whole = [m for m in standard() if None not in [m[key] for key in (*own, *sets)]]
  on_imagenet, shifted = (np.array([np.mean([m[k] for k in keys]) for m in whole]) for keys in (own, sets))
  return on_imagenet, shifted
