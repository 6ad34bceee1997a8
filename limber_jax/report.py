"""Tables of runs beside the published numbers: `python -m limber_jax.report RUN [RUN…] [--out=report.md]`.

A RUN is a workdir in which limber_jax.evaluate has written results.json. One run is shown with every metric, what it
rests on and the published rows that fit; several are rows of one table. Scores are times 100, as in the papers.

--before=RUN names the run of the model before an intervention, such as fine-tuning: the table of robustness then has
what each run gained over it under each shift, the relative robustness of Taori et al. (2020).
"""

import os

from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.inference import destination
from limber_jax.reports.report import prepare, report, save
from limber_jax.reports.runs import read

if __name__ == "__main__":
  _before = flags.DEFINE_string("before", None, "Run of the model before an intervention: relative robustness is over "
                                "it.")
  _out = flags.DEFINE_string("out", None, "Markdown file, with pictures beside it; printed if not given.")

  def _main(argv: list[str]) -> None:
    if not argv:
      raise UserError("no run given; for example python -m limber_jax.report runs/limber_clip runs/limber_beit")
    out = "" if _out.value == destination.STDOUT else _out.value
    if out:
      prepare(out)
      destination.file(out, what=out, reads=[os.path.join(run, "results.json") for run in (*argv, _before.value or "")])
    runs, before = [read(workdir) for workdir in argv], read(_before.value) if _before.value else None
    if out:
      save(runs, out, before)
      print(f"written to {out}")
    else:
      print(report(runs, before=before), end="")

  cli.run(_main, prints=lambda: _out.value in (None, "", destination.STDOUT))
