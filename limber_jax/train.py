"""Trains an experiment: `python -m limber_jax.train --config=experiments/quickstart.py --workdir=runs/quickstart`.

The loop knows `task.loss` and never the model. The position in the data is the step, so a run that was stopped goes on
exactly where it was, on any number of processes.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from limber_jax import cli, optim, parallel, registry
from limber_jax import config as config_lib
from limber_jax.checkpoint import Checkpoints, abstract
from limber_jax.config import Config
from limber_jax.data import pipeline, tokenizers, transforms
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Stopped
from limber_jax.log import Log
from limber_jax.signals import StopRequest
from limber_jax.state import TrainState, split
from limber_jax.tasks.base import Task
from limber_jax.tasks.step import make_step
from limber_jax.weights import load


@dataclasses.dataclass
class Setup:
  """An experiment made concrete on this machine's devices."""

  config: Config
  mesh: jax.sharding.Mesh
  task: Task
  tx: optax.GradientTransformation
  frozen: dict[str, Any]                # parameters that are not trained
  init: Callable[[], TrainState]        # a fresh state
  like: TrainState                      # its ShapeDtypeStructs with shardings
  tokenizer: Any


def setup(config: Config) -> Setup:
  """Returns what training and evaluation share; raises UserError for settings that do not fit together."""
  mesh = parallel.make_mesh(dataclasses.asdict(config.mesh))
  parallel.local_rows(config.batch_size, mesh)
  task = registry.lookup("task", registry.TASKS, config.task).of(config)
  tokenizer = tokenizers.load(config.data.tokenizer)
  if tokenizer.vocab_size > config.model.text.vocab:
    raise UserError(f"config.data.tokenizer has {tokenizer.vocab_size} ids, the model's text tower only "
                    f"{config.model.text.vocab}; set --config.model.text.vocab={tokenizer.vocab_size}")
  tx = optim.make(config.optim, config.steps)
  rng = jax.random.key(config.seed)

  params_like, stats_like = jax.eval_shape(task.init, rng)
  params_sharding = parallel.shardings(params_like, task.sharding, mesh)
  stats_sharding = parallel.shardings(stats_like, task.sharding, mesh)
  given = {part: load.load_into(path, part, config.model, params_like[part], stats_like.get(part))
           for part in ("image", "text") if (path := getattr(config.init, part))}

  def place(tree, sharding):
    # device_put would want every device to be this process's own.
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), tree,
                        sharding)

  def initial() -> tuple[dict, dict]:
    with jax.set_mesh(mesh):
      params, stats = jax.jit(lambda: task.init(rng), out_shardings=(params_sharding, stats_sharding))()
    for part, (part_params, part_stats) in given.items():
      params = params | {part: place(part_params, params_sharding[part])}
      if part_stats:
        stats = stats | {part: place(part_stats, stats_sharding[part])}
    return params, stats

  trained_like, frozen_like = split(params_like, config.trainable)
  dtype = jnp.dtype(config.compute.dtype)
  frozen = {}
  if frozen_like:
    # What is not trained is held in the precision it is computed in.
    frozen = jax.tree.map(lambda x: x.astype(dtype) if x.ndim else x, split(initial()[0], config.trainable)[1])

  def create(params, stats):
    return TrainState.create(params, stats, tx)

  state_like = jax.eval_shape(create, trained_like, stats_like)
  state_sharding = parallel.shardings(state_like, task.sharding, mesh)

  def init() -> TrainState:
    params, stats = initial()
    return jax.jit(create, out_shardings=state_sharding)(split(params, config.trainable)[0], stats)

  return Setup(config, mesh, task, tx, frozen, init, abstract(state_like, state_sharding), tokenizer)


def make_evals(setup: Setup, workdir: str, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
  """Returns the evaluations of the experiment by name, their data opened."""
  config = setup.config
  context = Context(tokenizer=setup.tokenizer, image_size=config.model.image.image_size,
                    context_length=config.model.text.context, mesh=setup.mesh, workdir=workdir, stop=stop)
  return {name: registry.lookup("evaluation", registry.EVALS, e.name)(e, context) for name, e in config.evals.items()}


def evaluate(setup: Setup, evals: dict[str, Any], params: dict, stats: dict) -> dict[str, float]:
  """Returns {"zeroshot/top1": …} of the evaluations given; raises evals.base.Stopped when asked to stop."""
  predict = setup.task.predict()
  params = {**setup.frozen, **params}
  return {f"{name}/{key}": value for name, run in evals.items() for key, value in run(predict, params, stats).items()}


def train(config: Config, workdir: str, *, log: Callable[[str], None] = print) -> TrainState:
  """Trains `config` to its last step, going on from the newest checkpoint in `workdir`, and returns the state.

  SIGTERM and SIGINT save and return early.

  Args:
    config: the experiment.
    workdir: where config.json, checkpoints, metrics.jsonl, TensorBoard files and pictures go.
    log: prints a line.

  Raises:
    UserError: settings or data that do not fit, a workdir of another experiment, or optim.max_skips steps in a row
      without a finite loss and gradient.
  """
  with StopRequest() as stop:
    main = jax.process_index() == 0
    s = setup(config)
    _claim(workdir, config, main)
    rows = parallel.local_rows(config.batch_size, s.mesh)
    source = registry.lookup("data source", registry.SOURCES, config.data.source.name)(config.data.source)
    fingerprint = pipeline.data_fingerprint(source, s.tokenizer, config.data, config.batch_size, config.seed)
    # One process looks at the flag wherever it waits; several agree on it in the step, see `flagged`.
    alone = stop if jax.process_count() == 1 else lambda: False
    evals = make_evals(s, workdir, alone)
    checkpoints = Checkpoints(workdir, config.checkpoint, write=True)
    latest = checkpoints.latest()
    if latest is None:
      state, meta = s.init(), {"evaluated": True}
    else:
      state, meta = checkpoints.restore(latest, s.like)
      if meta["data"] != fingerprint:
        raise UserError(f"{workdir} was trained on other data: its checkpoint {latest} has the fingerprint "
                        f"{meta['data'][:12]}, config.data now gives {fingerprint[:12]}; choose another --workdir")
    start = int(state.step)
    out = Log(workdir, steps=config.steps, batch_size=config.batch_size, start_step=start, active=main, print=log)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    out.line(f"{config.name}: {count / 1e6:.1f} M trained parameters, {len(source):,} examples, "
             f"{jax.device_count()} × {jax.devices()[0].device_kind}"
             + (f", going on from step {start}" if start else ""))

    batches = pipeline.train_batches(
      source,
      transforms.train(config.model.image.image_size, s.tokenizer, config.model.text.context, config.data.crop,
                       config.data.crop_scale),
      batch_size=config.batch_size, rows=rows, seed=config.seed, start_step=start, workers=config.data.workers,
      threads=config.data.threads, prefetch=config.data.prefetch)
    replicated = parallel.replicated(s.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, s.like)
    train_step = make_step(s.task, s.tx, optim.schedule(config.optim, config.steps))
    rng = jax.jit(lambda: jax.random.key(config.seed + 1), out_shardings=replicated)()

    def flagged(state, frozen, batch, rng):
      """Every process puts its stop flag into the batch; the maximum is what all of them act on, at the same step."""
      batch, flag = dict(batch), batch["stop"]
      del batch["stop"]
      state, metrics = train_step(state, frozen, batch, rng)
      return state, metrics | {"stop": flag.max()}

    step_fn = jax.jit(flagged, donate_argnums=0, out_shardings=(shardings, replicated),
                      compiler_options=parallel.compiler_options())

    def measure(step: int, due: dict[str, Any]) -> dict[str, float]:
      """Runs evaluations, writes them as one record, and returns it; {} if none was due."""
      if not due:
        return {}
      metrics = evaluate(s, due, state.params, state.stats)
      out.write(step, metrics)
      out.line(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
      out.restart_clock()
      return metrics

    def record(step: int, metrics: dict[str, jax.Array]) -> bool:
      """Writes what step `step` gave, once it is there; returns whether to stop."""
      values = {k: v.item() for k, v in jax.device_get(metrics).items()}
      stopping, skipped, in_row = values.pop("stop"), values.pop("skipped"), values.pop("skipped_in_row")
      if skipped:
        out.write(step, {"event": "skipped", "loss": repr(values["loss"]), "grad_norm": repr(values["grad_norm"])})
        out.line(f"step {step} skipped: loss {values['loss']}, gradient norm {values['grad_norm']}")
      elif step % config.log_every == 0 or step in (start + 1, config.steps):
        out.train(step, values)
      if in_row >= config.optim.max_skips:
        raise UserError(f"steps {step - in_row + 1} to {step} had no finite loss and gradient "
                        f"(config.optim.max_skips={config.optim.max_skips}); the last checkpoint is step "
                        f"{checkpoints.latest()}; try a lower --config.optim.lr")
      return bool(stopping)

    def due(step: int) -> dict[str, Any]:
      last = step == config.steps
      return {n: run for n, run in evals.items()
              if last or (config.evals[n].every and step % config.evals[n].every == 0)}

    def save(step: int, metrics: dict[str, float], *, evaluated: bool) -> None:
      checkpoints.save(state, {"data": fingerprint, "evaluated": evaluated}, metrics or None)

    step, stopping, metrics, pending, saved = start, stop(), {}, None, start
    try:
      if not stopping and not meta["evaluated"]:
        metrics = measure(start, due(start))
        saved = -1
      with jax.set_mesh(s.mesh):
        while step < config.steps and not stopping:
          before = time.perf_counter()
          local = next(batches)
          out.waited(time.perf_counter() - before)
          local["stop"] = np.full(rows.stop - rows.start, stop(), np.int32)
          state, fresh = step_fn(state, s.frozen, parallel.global_batch(local, s.mesh), rng)
          # The values of a step are read while the next one runs, except where something is done after this step.
          stopping = (pending is not None and record(*pending)) or alone()
          step, pending = step + 1, (step + 1, fresh)
          at_checkpoint = step % config.checkpoint.every == 0
          if stopping or due(step) or at_checkpoint or step == config.steps:
            stopping = record(*pending) or stopping
            pending, metrics = None, {}
            if not stopping:
              metrics = measure(step, due(step))
            if at_checkpoint or stopping or step == config.steps or config.checkpoint.best in metrics:
              save(step, metrics, evaluated=not stopping or not due(step))
              saved = step
    except Stopped:
      stopping = True
      if saved != step:
        save(step, {}, evaluated=False)
        saved = step
    finally:
      batches.close()
      checkpoints.close()
      out.close()
    if stopping:
      log(f"stopped by {stop.name or 'another process'} at step {step}; the same command goes on from there")
    return state


def _claim(workdir: str, config: Config, main: bool) -> None:
  """Writes config.json, or checks that the one there is of the same experiment."""
  path = os.path.join(workdir, "config.json")
  if os.path.exists(path):
    with open(path, encoding="utf-8") as file:
      config_lib.check_same(config, file.read(), workdir)
  if main:
    try:
      os.makedirs(workdir, exist_ok=True)
      with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(config_lib.to_json(config))
      os.replace(f"{path}.tmp", path)
    except OSError as error:
      raise UserError(f"--workdir={workdir}: cannot write there ({error.strerror})") from error


if __name__ == "__main__":
  _config = cli.define_config()
  _workdir = flags.DEFINE_string("workdir", None, "Directory of this run; made if missing.")

  def _main(argv: list[str]) -> None:
    if argv:
      raise UserError(f"unexpected argument {argv[0]!r}; settings are given as --config.field=value")
    if not _workdir.value:
      raise UserError("--workdir is missing; for example --workdir=runs/quickstart")
    config = cli.get_config(_config)
    parallel.start()
    train(config, _workdir.value)

  cli.run(_main)
