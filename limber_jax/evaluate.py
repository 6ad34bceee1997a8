"""Evaluates a run: `python -m limber_jax.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart`.

Prints the figures of the experiment's evaluations and writes them to results.json in the workdir.
"""

import json
import os

import jax
from absl import flags

from limber_jax import cli, parallel
from limber_jax import config as config_lib
from limber_jax.checkpoint import Checkpoints
from limber_jax.config import Config
from limber_jax.errors import UserError, did_you_mean
from limber_jax.train import evaluate, make_evals, setup


def results(config: Config, workdir: str, *, checkpoint: str = "latest", only: tuple[str, ...] = ()) -> dict:
  """Returns {"step": …, "metrics": {"zeroshot/top1": …}, …} of a run's checkpoint.

  Args:
    config: the experiment that was trained in `workdir`.
    workdir: of the run.
    checkpoint: "latest", "best" (by config.checkpoint.best) or a step.
    only: names of evaluations; empty for all.

  Raises:
    UserError: no such run, checkpoint or evaluation, or another experiment's workdir.
  """
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    raise UserError(f"--workdir={workdir}: no run there (no config.json); train one with python -m limber_jax.train "
                    f"--config=… --workdir={workdir}")
  with open(path, encoding="utf-8") as file:
    config_lib.check_same(config, file.read(), workdir)
  for name in only:
    if name not in config.evals:
      raise UserError(f"--only: no evaluation {name!r} in this experiment{did_you_mean(name, config.evals)}")
  if only:
    config.evals = {name: config.evals[name] for name in only}
  checkpoints = Checkpoints(workdir, config.checkpoint)
  try:
    step = checkpoints.find(checkpoint)
    s = setup(config, workdir)
    params, stats = checkpoints.restore_params(step, s.like.params, s.like.stats)
  finally:
    checkpoints.close()
  metrics = evaluate(s, make_evals(s, workdir), params, stats)
  return {"name": config.name, "step": step, "metrics": metrics,
          "evaluations": {n: config_lib.flatten(e) for n, e in config.evals.items()},
          "devices": f"{jax.device_count()} × {jax.devices()[0].device_kind}", "jax": jax.__version__}


if __name__ == "__main__":
  _config = cli.define_config()
  _workdir = flags.DEFINE_string("workdir", None, "Directory of the run.")
  _checkpoint = flags.DEFINE_string("checkpoint", "latest", "latest, best, or a step.")
  _only = flags.DEFINE_list("only", [], "Names of evaluations, with commas; all if empty.")

  def _main(argv: list[str]) -> None:
    if argv:
      raise UserError(f"unexpected argument {argv[0]!r}; settings are given as --config.field=value")
    if not _workdir.value:
      raise UserError("--workdir is missing; for example --workdir=runs/quickstart")
    config = cli.get_config(_config)
    parallel.start()
    out = results(config, _workdir.value, checkpoint=_checkpoint.value, only=tuple(_only.value))
    if jax.process_index() == 0:
      path = os.path.join(_workdir.value, "results.json")
      with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(json.dumps(out, indent=1))
      os.replace(f"{path}.tmp", path)
      width = max(map(len, out["metrics"]), default=0)
      print(f"step {out['step']}")
      for name, value in out["metrics"].items():
        print(f"{name:<{width}}  {value:.4f}")
      print(f"written to {path}")

  cli.run(_main)
