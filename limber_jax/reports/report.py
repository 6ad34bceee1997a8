"""A report of runs beside the published numbers: Markdown, with pictures beside it."""

import os
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

from limber_jax.evals import effective_robustness
from limber_jax.reports import published
from limber_jax.reports.details import details, others, rest
from limber_jax.reports.figures import pictured
from limber_jax.reports.runs import Run, label_of, of, ordered
from limber_jax.reports.tables import (
  PANELS,
  cite,
  contamination_table,
  panel_table,
  robustness_table,
  shifts,
  zeroshot_table,
)
from limber_jax.reports.text import escape, flat, markdown
from limber_jax.runtime.atomic import atomic_write, check, is_regular, refusal, save_figure


def report(runs: Sequence[Run], pictures: Iterable[str] = (), before: Run | None = None) -> str:
  """Returns Markdown: tables beside the published numbers, and of a single run all there is in its results.

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
  blocks.append("Scores are times 100, as the papers print them; metrics named as in results.json are as they stand "
                "there, and – is one that there is not.")
  cited: dict[published.Table, None] = {}
  tables = [(panel.title, panel_table(panel, runs, cited)) for panel in PANELS]
  tables += [("Zero-shot classification", zeroshot_table(runs, cited)),
             ("Effective robustness", robustness_table(runs, before)),
             ("Overlap with the training data", contamination_table(runs, cited))]
  for title, table in tables:
    if table:
      blocks += [f"## {title}", table]
  if not one:
    blocks += others(runs)
  blocks += [f"![{escape(os.path.splitext(p)[0])}]({urllib.parse.quote(p)})" for p in pictures]
  if cited:
    blocks += ["## Published", "\n".join(cite(table) for table in cited)]
  blocks += details(one) if one else rest(runs)
  failed = [(label_of(run, runs), name, reason) for run in runs for name, reason in run.results["failed"].items()]
  if failed:
    shown, header = slice(1 if one else 0, None), ("run", "evaluation", "reason")
    blocks += ["## Failed evaluations", markdown(header[shown], [line[shown] for line in failed])]
  if one:
    origin = [*flat({"weights": one.results["weights"], "versions": one.results["versions"]}).items()]
    blocks += ["## Weights and versions", markdown(("what", "which"), origin)] if origin else []
  return "\n\n".join(blocks) + "\n"


def write(results: dict[str, Any], workdir: str) -> None:
  """Writes report.md and its pictures into the workdir.

  Args:
    results: what stands in results.json.

  Raises:
    UserError: the layout is another, or the files cannot be written.
  """
  save([of(results, workdir)], os.path.join(workdir, "report.md"))


def prepare(path: str) -> None:
  """Makes the directory of a report; raises UserError if it cannot."""
  try:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
  except OSError as error:
    raise refusal(path, error) from error


def save(runs: Sequence[Run], path: str, before: Run | None = None) -> None:
  """Writes a report and its pictures."""
  stem, pictures = os.path.splitext(path)[0], []
  prepare(path)
  check(path)
  beside = is_regular(path)  # else there is no place beside it, as of /dev/stdout
  for name, figure in pictured(runs).items() if beside else ():
    pictures.append(os.path.basename(f"{stem}_{name}.png"))
    save_figure(figure, f"{stem}_{name}.png")
  if beside and len(runs) == 1 and (found := shifts(runs[0])):
    pictures.append(os.path.basename(f"{stem}_robustness.png"))
    effective_robustness.draw(found, runs[0].title, f"{stem}_robustness.png")
  text = report(runs, pictures, before)
  with atomic_write(path) as file:
    file.write(text)
