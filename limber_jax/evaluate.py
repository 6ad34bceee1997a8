"""Evaluates a run: `python -m limber_jax.evaluate --config=experiments/quickstart.py --workdir=runs/quickstart`.

Runs the evaluations of the experiment on a checkpoint of the workdir, or with --weights on weights from elsewhere, and
writes into the workdir, or into --out, results.json, report.md with the published figures beside, and pictures. What is
found out about each item is kept below evaluation/: the same command goes on where it was stopped. Results of another
run or of other weights are never replaced. An evaluation whose data are missing or damaged is named, and the others go
on; the exit code is then 1.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from limber_jax import cli
from limber_jax import config as config_lib
from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.config import Config, Evaluation
from limber_jax.data.images import ImageOptions
from limber_jax.errors import UserError, did_you_mean
from limber_jax.evals import clip_benchmark
from limber_jax.evals.base import Context, Stopped
from limber_jax.evals.splits import named
from limber_jax.inference import destination
from limber_jax.models import clip
from limber_jax.reports import report, text
from limber_jax.runtime import atomic, lock, parallel, peers
from limber_jax.runtime.signals import Interrupted, StopRequest
from limber_jax.training.setup import Setup, check_frozen, evaluate, make_context, make_eval, setup
from limber_jax.weights import load
from limber_jax.weights.adopt import adopt
from limber_jax.weights.digest import digest

FILE = "results.json"
WAIT = 60.0          # seconds, until others have written their results
DATA = "data/"       # what the paths of the experiments' data sets start with
PACKAGES = ("limber_jax", "flax", "jax", "numpy", "pillow", "pycocoevalcap", "scikit-learn", "transformers")


def results(config: Config, workdir: str, *, checkpoint: str = "latest", only: Sequence[str] = (), weights: str = "",
            model: str = "", data: str = "", out: str = "", stop: Callable[[], bool] = lambda: False,
            waiting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext) -> dict[str, Any]:
  """Returns what results.json holds: the figures of each evaluation, and all that they rest on.

  Args:
    config: the experiment; changed by `only`, `weights` and `data`.
    workdir: of the run.
    checkpoint: "latest", "best" (by config.checkpoint.best) or a step.
    only: names of evaluations; empty for all.
    weights: what is evaluated in place of the workdir's checkpoint: a CLIP, or of task "captioning" a map.
    model: what those weights are of, where nothing beside them says it; as of `weights.load.load`.
    data: a directory in place of "data", where the experiments' data sets are.
    out: where results of items and pictures go, and `write` is to write; "" = the workdir.
    stop: asked between batches.
    waiting: entered while a batch is awaited, see `Context`.

  Raises:
    UserError: no such run, checkpoint, weights or evaluation, another experiment's workdir, another process that runs
      one of the evaluations there, none of them could be run, or the results there are of something else.
    Stopped: the run was asked to end.
  """
  names = _names(config, only)
  out = out or workdir
  items = os.path.join(out, "evaluation")
  if not weights:
    _check_run(config, workdir)
  # One for each: others of the same workdir may run beside, and so may its training.
  locks = [os.path.join(items, f"{name}{lock.NAME}") for name in names]
  with lock.Lock(*locks, first=parallel.broadcast_from_process_0, otherwise="name other evaluations with --only"):
    parallel.broadcast_from_process_0(lambda: [atomic.check(os.path.join(out, f)) for f in (FILE, "report.md")])
    return _results(config, workdir, out, names, checkpoint, weights, model, data, stop, waiting)


def _names(config: Config, only: Sequence[str]) -> list[str]:
  """Returns the names of the evaluations to run."""
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
  parallel.broadcast_from_process_0(lambda: earlier_results(what, os.path.join(out, FILE)) and None)  # before hours of work
  context = dataclasses.replace(
    make_context(s, out, stop, waiting), items=os.path.join(out, "evaluation"), key=_key(s, digests))
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
  return {**what, "task": config.task, "model": _published(config), "evaluations": found, "failed": failed}


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

  Of a CLIP the model is what the weights say. Of task "captioning" they are the map, and the frozen parts are those of
  config.init.
  """
  if config.task == "contrastive":
    config.model = load.open_model(weights, model).size
    config.init = config_lib.Init(image=weights, text=weights)
  elif model:
    raise UserError("--model is of the weights of a CLIP; the models of a map are those of config.model")
  else:
    config.init = dataclasses.replace(config.init, prompt=weights)
    main = jax.process_index() == 0
    config.model = adopt(config, weights=weights, log=lambda line: main and print(line, file=sys.stderr))
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
  figures = evaluate(s, {name: run}, params, stats)
  return {"evaluation": s.config.evals[name].name, "figures": {k.split("/", 1)[1]: v for k, v in figures.items()},
          "protocol": config_lib.flatten(s.config.evals[name]), "facts": run.facts()}


def _key(s: Setup, digests: dict[str, str]) -> dict[str, Any]:
  """Returns what results of items depend on beside the evaluation and its data."""
  settings = {name: config_lib.flatten(getattr(s.config, name), known=True) for name in ("model", "decoding")}
  if options := ImageOptions.from_config(s.config.data).changes():
    settings["images"] = options
  return {"weights": digests, **settings, "tokenizer": s.tokenizer.fingerprint(), "length": s.task.length,
          "dtype": s.config.compute.dtype}


def _published(config: Config) -> str:
  """Returns the name of a published CLIP, "" of any other model."""
  if config.task != "contrastive":
    return ""
  plain = dataclasses.replace(config.model, crop_rounding="even")  # another only where transformers has it
  return next((name for name, make in clip.PUBLISHED.items() if make() == plain), "")


def _moved(evaluation: Evaluation, data: str) -> Evaluation:
  """Returns the evaluation with paths below `data` in place of "data"."""

  def moved(path: str) -> str:
    return os.path.join(data, path.removeprefix(DATA)) if path.startswith(DATA) else path

  sources = {name: dataclasses.replace(source, path=moved(source.path), images=moved(source.images))
             for name in ("source", "train", "validation") if (source := getattr(evaluation, name)) is not None}
  return dataclasses.replace(evaluation, classes=moved(evaluation.classes), **sources)


def write(found: dict[str, Any], out: str) -> None:
  """Writes results.json, in which other evaluations of the same weights stay, report.md and its pictures.

  Results of the same run at another step, or by other versions, are kept beside, as results-step100.json. Of sets of
  CLIP_benchmark and DataComp also what their tables read is written: `limber_jax.evals.clip_benchmark.files`.

  Raises UserError if it cannot, or if the results.json there is no such file, or of something else.
  """
  path = os.path.join(out, FILE)
  with lock.Lock(f"{path}{lock.NAME}", wait=WAIT):  # another evaluation may end at this moment
    _write(found, out, path)


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
    told = f"{earlier['name']} at step {int(earlier['step'])}" if run is not None and earlier["step"] else (
      f"weights {' '.join(f'{part}:{str(d)[:8]}' for part, d in weights.items())}")
  except FileNotFoundError:
    return None, False
  except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
    raise UserError(f"{path}: not what this command writes ({error}); move it away, and start this again: what was "
                    "computed is kept") from error
  own = what["run"] is not None and run == what["run"] and all(earlier.get(k) == what[k] for k in ("name", "seed"))
  if not (own or weights == what["weights"]):
    raise UserError(f"{path} is of something else, of {told}{f' of the run {str(run)[:8]}' if run else ''}, and is not "
                    "replaced; choose another directory with --out=DIRECTORY, or move it away")
  return earlier, same


def _write(found: dict[str, Any], out: str, path: str) -> None:
  earlier, same = earlier_results(found, path)
  if same:
    for key in ("evaluations", "failed"):
      found[key] = {n: e for n, e in earlier[key].items()
                    if n not in found["evaluations"] and n not in found["failed"]} | found[key]
  elif earlier is not None:
    step = int(earlier["step"])
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (os.path.join(out, f"results-step{step}{end}.json") for end in ends)
    kept = next(name for name in names if not os.path.exists(name))
    os.replace(path, kept)
    what = f"step {step}" if step != found["step"] else "other versions, or another name or seed"
    print(f"{path} was of {what}; it is kept as {os.path.basename(kept)}", file=sys.stderr, flush=True)
  with atomic.atomic_write(path) as file:
    file.write(json.dumps(found, indent=1))
  report.write(found, out)
  clip_benchmark.write(found, out)


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
        print(f"stopped by {stop.name}; the same command goes on from there", flush=True)
        parallel.shutdown()
      except Interrupted:
        raise UserError(f"{stop.name}: process {jax.process_index()} has waited {peers.LATE:g} s longer for data that "
                        "do not come; the same command goes on from what was kept") from None
    if jax.process_index() == 0:
      out = _out.value or _workdir.value
      write(found, out)
      rows = {f"{name}/{key}": text.shown(key, value)
              for name, e in found["evaluations"].items() for key, value in e["figures"].items()}
      width = max(map(len, rows))
      print(f"step {found['step']}; scores times 100, as in report.md")
      for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
      print(f"written to {os.path.join(out, FILE)} and report.md")
    return 1 if found["failed"] else 0

  cli.run(_main)
