"""Evaluates a run: `python -m limber_jax.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart`.

Runs the evaluations of the experiment on a checkpoint of the workdir, or with --weights on weights from elsewhere, and
writes into the workdir, or into --out, results.json, report.md with the published numbers beside, and pictures. What is
found out about each example is kept below evaluation/: the same command resumes where it was stopped. Results of
another run or of other weights are never replaced. An evaluation whose data are missing or damaged is named, and the
others go on; the exit code is then 1.
"""

import os

import jax
from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.evals.base import Stopped
from limber_jax.inference import destination
from limber_jax.reports import text
from limber_jax.reports.results_file import write
from limber_jax.runtime import parallel, peers
from limber_jax.runtime.signals import Interrupted, StopRequest
from limber_jax.training.results import FILE, results

if __name__ == "__main__":
  _config = cli.define_config()
  _workdir = flags.DEFINE_string("workdir", None, "Directory of the run.")
  _checkpoint = flags.DEFINE_string("checkpoint", "latest", "latest, best, or a step.")
  _only = flags.DEFINE_list("only", [], "Names of evaluations, with commas; all if empty.")
  _weights = flags.DEFINE_string("weights", "", "Evaluate these in place of a checkpoint: a CLIP, or a map of LiMBeR.")
  _model = cli.define_model()
  _out = flags.DEFINE_string("out", "", "Where results, report and pictures go; the workdir if empty.")
  _data = flags.DEFINE_string("data", "", "Directory of the data sets, in place of 'data'.")

  def _main(argv: list[str]) -> int:
    if argv:
      raise UserError(f"unexpected argument {argv[0]!r}; settings are given as --config.field=value")
    if not _workdir.value:
      raise UserError("--workdir is missing; for example --workdir=runs/quickstart")
    if _model.value and not _weights.value:
      raise UserError(f"--model={_model.value} is of --weights=, which is missing")
    if _out.value:
      destination.directory(_out.value, what=f"--out={_out.value}", runs=True)
    config = cli.get_config(_config)
    parallel.start()
    with StopRequest() as stop, peers.shared(stop):
      try:
        found = results(config, _workdir.value, checkpoint=_checkpoint.value, only=_only.value, weights=_weights.value,
                        model=_model.value, data=_data.value, out=_out.value,
                        stop=lambda: any(parallel.allgather_objects(stop())),
                        waiting=lambda: stop.interrupts(0 if jax.process_count() == 1 else peers.LATE))
      except Stopped:
        print(f"stopped by {stop.name}; the same command resumes from there", flush=True)
        parallel.shutdown()
      except Interrupted:
        raise UserError(f"{stop.name}: process {jax.process_index()} has waited {peers.LATE:g} s longer for data that "
                        "do not come; the same command resumes from what was kept") from None
    if jax.process_index() == 0:
      out = _out.value or _workdir.value
      write(found, out)
      rows = {f"{name}/{key}": text.shown(key, value)
              for name, e in found["evaluations"].items() for key, value in e["metrics"].items()}
      width = max(map(len, rows))
      print(f"step {found['step']}; scores times 100, as in report.md")
      for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
      print(f"written to {os.path.join(out, FILE)} and report.md")
    return 1 if found["failed"] else 0

  cli.run(_main)
