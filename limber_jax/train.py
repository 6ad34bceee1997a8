"""Trains an experiment: `python -m limber_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart`.

The loop knows `task.loss` and never the model. The position in the data is the step, so a run that was stopped resumes
exactly where it was, on any number of processes.
"""

from absl import flags

from limber_jax import cli
from limber_jax.checkpoints import scores
from limber_jax.config import Config
from limber_jax.errors import UserError
from limber_jax.runtime import goodput, parallel, peers
from limber_jax.runtime.signals import StopRequest
from limber_jax.training.loop import train
from limber_jax.training.profiling import parse_steps


def exit_code(failures: list[str], config: Config, workdir: str) -> int:
  """Returns 1 if an evaluation failed in this start, or one of the last step is still missing; else 0.

  What failed at an earlier step of an earlier start was reported then, and no further start makes up for it.
  """
  last = scores.read(workdir).get(config.steps, {"failed": {}})
  return int(bool(failures or last["failed"]))


if __name__ == "__main__":
  _config = cli.define_config()
  _workdir = flags.DEFINE_string("workdir", None, "Directory of this run; made if missing.")
  _profile = flags.DEFINE_string("profile", "", "first:last, steps of which a trace is written to WORKDIR/profile.")

  def _main(argv: list[str]) -> int:
    if argv:
      raise UserError(f"unexpected argument {argv[0]!r}; settings are given as --config.field=value")
    if not _workdir.value:
      raise UserError("--workdir is missing; for example --workdir=runs/quickstart")
    config, profile = cli.get_config(_config), parse_steps(_profile.value)
    with StopRequest(at_end=True) as stop, peers.explain_failures():
      parallel.start()
      train(config, _workdir.value, stop=stop, began=goodput.process_began(), profile=profile,
            failures=(failures := []))
    if stop():
      parallel.shutdown()
    return exit_code(failures, config, _workdir.value)

  cli.run(_main)
