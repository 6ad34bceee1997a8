"""The results of a run's evaluations, of a checkpoint or of weights from elsewhere."""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax

from limber_jax import config_history, config_json, registry
from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.config import Config, Evaluation
from limber_jax.data.images import ImageOptions
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals.base import Context
from limber_jax.evals.splits import named, sources_of
from limber_jax.models import clip
from limber_jax.runtime import atomic, lock, parallel
from limber_jax.training.setup import Setup, check_frozen, evaluate, make_context, make_eval, setup
from limber_jax.weights.adopt import adopt
from limber_jax.weights.digest import digest

FILE = "results.json"
DATA = "data/"  # what the paths of the experiments' data sets start with
PACKAGES = ("limber_jax", "flax", "jax", "numpy", "pillow", "pycocoevalcap", "scikit-learn", "transformers")


def results(config: Config, workdir: str, *, checkpoint: str = "latest", only: Sequence[str] = (), weights: str = "",
            model: str = "", data: str = "", out: str = "", stop: Callable[[], bool] = lambda: False,
            waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext) -> dict[str, Any]:
  """Returns what results.json holds: the metrics of each evaluation, and all that they rest on.

  Args:
    config: the experiment; changed by `only`, `weights` and `data`.
    workdir: of the run.
    checkpoint: "latest", "best" (by config.checkpoint.best) or a step.
    only: names of evaluations; empty for all.
    weights: what is evaluated in place of the workdir's checkpoint: a CLIP, or of task "captioning" a map.
    model: what those weights are of, where nothing beside them says it; as of `weights.load.load`.
    data: a directory in place of "data", where the experiments' data sets are.
    out: where results of examples and pictures go, and `write` is to write; "" = the workdir.
    stop: asked between batches.
    waiting: entered while a batch is awaited, see `Context`.

  Raises:
    UserError: no such run, checkpoint, weights or evaluation, another experiment's workdir, another process that runs
      one of the evaluations there, none of them could be run, or the results there are of something else.
    Stopped: the run was asked to end.
  """
  names = _names(config, only)
  out = out or workdir
  folder = os.path.join(out, "evaluation")
  if not weights:
    _check_run(config, workdir)
  # One for each: others of the same workdir may run beside, and so may its training.
  locks = [os.path.join(folder, f"{name}{lock.NAME}") for name in names]
  with lock.Lock(*locks, first=parallel.broadcast_from_process_0, otherwise="name other evaluations with --only"):
    parallel.broadcast_from_process_0(lambda: [atomic.check(os.path.join(out, f)) for f in (FILE, "report.md")])
    return _results(config, workdir, out, names, checkpoint, weights, model, data, stop, waiting)


def _names(config: Config, only: Sequence[str]) -> list[str]:
  """Returns the names of the evaluations to run."""
  only = [config_history.named(name, config.evals) for name in only]
  for name in only:
    if name not in config.evals:
      raise UserError(f"--only: no evaluation {name!r} in this experiment{did_you_mean(name, config.evals)}")
  names = [name for name in config.evals if name in only or not only]
  if not names:
    raise UserError(f"experiment {config.name!r} has no evaluations; its config.evals is empty")
  return names


def _results(config, workdir, out, names, checkpoint, weights, model, data, stop, waiting) -> dict[str, Any]:
  if data:
    config.evals = {name: _moved(e, data) for name, e in config.evals.items()}
  s, params, stats, step = (imported(config, workdir, weights, model) if weights else
                            trained(config, workdir, checkpoint))
  digests = s.digests | {part: digest({"params": tree, "stats": stats.get(part, {})}) for part, tree in params.items()}
  # What results.json is of; `run` None says that it is of weights from elsewhere.
  what = {"name": config.name, "run": None if weights else workdirs.identity(workdir), "step": step,
          "seed": config.seed, "weights": digests,
          "versions": {name: importlib.metadata.version(name) for name in PACKAGES}}
  # Before hours of work.
  parallel.broadcast_from_process_0(lambda: earlier_results(what, os.path.join(out, FILE)) and None)
  context = dataclasses.replace(
    make_context(s, out, stop, waiting), results_dir=os.path.join(out, "evaluation"), key=_key(s, digests))
  found, failed = {}, {}
  for name in names:
    try:
      found[name] = _one(s, name, context, params, stats)
    except UserError as error:
      failed[name] = str(error)
      if jax.process_index() == 0:
        print(f"{name}: not evaluated: {error}", file=sys.stderr, flush=True)
  if not found:
    raise UserError(f"{next(iter(failed.values()))}" if len(failed) == 1 else
                    f"none of the {len(failed)} evaluations could be run; the reasons are above")
  return {**what, "task": config.task, "model": clip.published(config.model), "evaluations": found, "failed": failed}


def _check_run(config: Config, workdir: str) -> None:
  """Raises UserError if there is no run in a workdir, or one of another experiment."""
  path = os.path.join(workdir, "config.json")
  if not os.path.exists(path):
    raise UserError(f"--workdir={workdir}: no run there (no config.json); train one with python -m limber_jax.train "
                    f"--config=… --workdir={workdir}, or evaluate weights from elsewhere with --weights=…")
  workdirs.check_same(dataclasses.replace(config, model=adopt(config, workdir)), workdir)


def trained(config: Config, workdir: str, checkpoint: str) -> tuple[Setup, dict, dict, int]:
  """Returns (setup, params, stats, step) of a checkpoint in a workdir; raises UserError as `results` does."""
  checkpoints = Checkpoints(workdir, config.checkpoint)
  try:
    checkpoints.find(checkpoint)  # before the frozen parts are loaded, which may take long
    config.model = adopt(config, workdir)
    s = setup(config, workdir)

    def read(step):
      check_frozen(checkpoints.meta(step), s.digests, workdir, step)
      return *checkpoints.restore_params(step, s.like.params, s.like.stats), step

    return s, *checkpoints.read(checkpoint, read)
  finally:
    checkpoints.close()


def imported(config: Config, workdir: str, weights: str, model: str = "") -> tuple[Setup, dict, dict, int]:
  """Returns (setup, params, stats, 0) of weights from elsewhere; raises UserError as `results` does.

  What they are of is the task's to say: `Task.of_weights`.
  """
  main = jax.process_index() == 0
  task = registry.lookup("task", registry.TASKS, config.task)
  config.model, config.init = task.of_weights(
    config, weights, model, lambda line: print(line, file=sys.stderr) if main else None)
  s = setup(config, workdir)
  state = s.init()
  return s, state.params, state.stats, 0


def _one(s: Setup, name: str, context: Context, params: dict, stats: dict) -> dict[str, Any]:
  """Returns the entry of an evaluation; raises UserError in every process if it cannot be run in one of them."""
  run, problem = None, None
  try:
    s.config.evals[name] = named(s.config.evals[name], name)
    run = make_eval(s, name, context)
  except UserError as error:
    problem = str(error)
  parallel.fail_together(problem)
  metrics = evaluate(s, {name: run}, params, stats)
  return {"evaluation": s.config.evals[name].name, "metrics": {k.split("/", 1)[1]: v for k, v in metrics.items()},
          "protocol": config_json.flatten(s.config.evals[name]), "metadata": run.metadata()}


def _key(s: Setup, digests: dict[str, str]) -> dict[str, Any]:
  """Returns what results of examples depend on beside the evaluation and its data."""
  settings = {name: config_json.flatten(getattr(s.config, name), known=True) for name in ("model", "decoding")}
  if options := ImageOptions.from_config(s.config.data).changes():
    settings["images"] = options
  return {"weights": digests, **settings, "tokenizer": s.tokenizer.fingerprint(), "length": s.task.length,
          "dtype": s.config.compute.dtype}


def _moved(evaluation: Evaluation, data: str) -> Evaluation:
  """Returns the evaluation with paths below `data` in place of "data"."""

  def moved(path: str) -> str:
    return os.path.join(data, path.removeprefix(DATA)) if path.startswith(DATA) else path

  sources = {name: dataclasses.replace(source, **{field: moved(getattr(source, field)) for field in source.paths})
             for name, source in sources_of(evaluation).items()}
  files = {name: moved(getattr(evaluation, name)) for name in evaluation.files}
  return dataclasses.replace(evaluation, **files, **sources)


def earlier_results(what: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, bool]:
  """Returns (what the results.json at `path` holds, None if there is none; whether it is of the same as `what`).

  Raises UserError if it is no such file, or of another run or of other weights.
  """
  try:
    with open(path, encoding="utf-8") as file:
      earlier = json.load(file)
    same = all(earlier.get(k) == what[k] for k in ("name", "step", "seed", "weights", "versions"))
    if same and not all(isinstance(earlier[key], dict) for key in ("evaluations", "failed")):
      raise TypeError("no evaluations in it")
    weights = earlier["weights"]
    # Of before results said of which run they are: what is of the same experiment is kept beside, whichever it is of.
    run = earlier.get("run", what["run"])
    described = f"{earlier['name']} at step {int(earlier['step'])}" if run is not None and earlier["step"] else (
      f"weights {' '.join(f'{part}:{str(d)[:8]}' for part, d in weights.items())}")
  except FileNotFoundError:
    return None, False
  except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
    raise UserError(f"{path}: not what this command writes ({error}); move it away, and start this again: what was "
                    "computed is kept") from error
  own = what["run"] is not None and run == what["run"] and all(earlier.get(k) == what[k] for k in ("name", "seed"))
  if not (own or weights == what["weights"]):
    whose = f" of the run {str(run)[:8]}" if run else ""
    raise UserError(f"{path} is of something else, of {described}{whose}, and is not replaced; choose another "
                    "directory with --out=DIRECTORY, or move it away")
  return earlier, same
