"""The loop of training: evaluate, save, step, log.

It knows `task.loss` and never the model. The position in the data is the step, so a run that was stopped resumes
exactly where it was, on any number of processes.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import jax

from limber_jax import cli
from limber_jax import config as config_lib
from limber_jax.checkpoints.state import TrainState
from limber_jax.config import Config
from limber_jax.errors import UserError
from limber_jax.evals.base import Stopped
from limber_jax.runtime import lock, parallel, peers
from limber_jax.runtime.signals import Interrupted, StopRequest
from limber_jax.training import optimizer
from limber_jax.training.flops import model_flops, peak_flops
from limber_jax.training.opening import Run, open_run
from limber_jax.training.profiling import Profiler
from limber_jax.training.setup import Outline, Setup
from limber_jax.training.train_step import make_step


def train(config: Config, workdir: str, *, log: Callable[[str], None] = print, stop: StopRequest | None = None,
          began: float | None = None, profile: tuple[int, int] | None = None,
          failures: list[str] | None = None) -> TrainState:
  """Trains `config` to its last step, resuming from the newest checkpoint in `workdir`, and returns the state.

  SIGTERM, SIGINT and SIGHUP save and return early. A checkpoint is saved before its evaluations; one of them that fails
  is named in the log and in scores.json, and the run goes on.

  Args:
    config: the experiment.
    workdir: where config.json, checkpoints, metrics.jsonl, TensorBoard files and pictures go.
    log: prints a line.
    stop: entered already; None listens to signals for as long as this takes.
    began: when the command did, of time.monotonic(), for the tracker; None is now.
    profile: (first, last) of the steps of which a trace is written to workdir/profile.
    failures: gets "name/step" of each evaluation that fails in this start.

  Raises:
    UserError: a workdir in which another process trains, settings or data that do not fit, a workdir of another
      experiment, no checkpoint there that is whole, optim.max_skips steps in a row without a finite and usual loss and
      gradient, more bad records than config.data.max_bad_fraction allows, a data worker that is gone, or a checkpoint
      that could not be saved: the run ends there rather than take steps that the next fault would lose.
  """
  config_lib.check(config)
  config_lib.check_best(config)
  profiler = Profiler(workdir, profile)
  first = {directory: (file, cli.load_experiment(file)) for directory, file in config.prerequisites.items()}
  with contextlib.ExitStack() as until_end:
    held = until_end.enter_context(lock.Lock(
      os.path.join(workdir, lock.NAME), what=workdir, otherwise="choose another --workdir",
      first=parallel.broadcast_from_process_0, log=log))
    for directory, (file, experiment) in first.items():
      if not os.path.isdir(os.path.join(directory, "checkpoints", str(experiment.steps))):
        log(f"first {file}, in {directory}")
        state, began = train(experiment, directory, log=log, stop=stop, began=began), None
        if int(state.step) < experiment.steps:
          return state  # a signal came; the same command resumes with it
    stop = stop or until_end.enter_context(StopRequest())
    until_end.enter_context(peers.shared(stop))
    run = open_run(config, workdir, held, stop, until_end, log=log, began=began, failures=failures)
    until_end.enter_context(run.tracker("step"))
    try:
      state, step, stopped = _steps(run, profiler)
    finally:
      profiler.close()
      run.feed.close()
      run.out.close()
      run.saver.close()
    run.out.line(run.tracker.summary())
    run.evaluations.tell_failed()
    if stopped:
      log(f"stopped by {run.stopping} at step {step}; the same command resumes from there")
    return state


def _steps(run: Run, profiler: Profiler) -> tuple[TrainState, int, bool]:
  """Takes the steps that are left; returns the state, its step, and whether the run was asked to stop meanwhile."""
  config, start, mesh = run.setup.config, run.start, run.setup.mesh
  step_fn, rng = compiled_step(run.setup), _key(run.setup)
  state, step, stopping = run.state, start, run.stopping.together()
  try:
    if not (stopping or run.measured):
      run.evaluations.measure(start, state)
    with jax.set_mesh(mesh):
      while step < config.steps and not stopping:
        try:
          batch, flags = run.feed.take(step + 1)
        except UserError as error:  # a mount that is gone may come back, and the state is whole
          _save_before(error, run, step, state)
          raise UserError(f"{error}; step {step} was saved") from error
        if step == start:
          _count_flops(run, batch)
        step += 1
        profiler.before(step)
        with run.tracker("compile" if step == start + 1 else "step"), _annotated(step):
          state, metrics = step_fn(state, run.setup.frozen, batch, flags, rng)
        if done := profiler.after(step, metrics):
          run.out.line(done)
        run.tracker.at(step)
        run.saver.check()
        stopping = run.steps.flush() or run.stopping.alone()
        run.steps.push(step, metrics)
        if stopping or run.saver.due(step) or run.evaluations.due(step):
          stopping = run.steps.flush() or stopping
          if stopping or run.saver.due(step) or run.evaluations.decide_best(step):
            _save(run, step, state)
          if not stopping and run.evaluations.due(step):
            run.saver.wait()  # an evaluation may bring the process down, by its hunger for memory alone
            run.evaluations.measure(step, state)
  except (Stopped, Interrupted) as reason:
    stopping = True
    if isinstance(reason, Interrupted):
      run.feed.detach()
      if not run.stopping.single:  # the others wait for this one in the next step, to which they have given the state
        raise UserError(f"{run.stopping}: process {jax.process_index()} has waited {peers.LATE:g} s longer for data "
                        f"that do not come, so nothing can be saved of step {step}; the same command resumes from "
                        f"step {run.saver.last}") from None
    run.steps.flush()
    if step != run.saver.last:
      _save(run, step, state)
  return state, step, stopping


def _count_flops(run: Run, batch: dict[str, jax.Array]) -> None:
  """Has the log show what the devices reach, in the process that writes it and where their peak is known."""
  config = run.setup.config
  if jax.process_index() == 0 and (peak := peak_flops(config)):
    with run.tracker("compile"):
      run.out.count_flops(model_flops(config, batch)[1], peak)


@contextlib.contextmanager
def _annotated(step: int) -> Iterator[None]:
  """While entered, a profile shows the step by its number, and an array that goes to a device unasked is an error."""
  with jax.profiler.StepTraceAnnotation("train", step_num=step), jax.transfer_guard("disallow"):
    yield


def _save(run: Run, step: int, state: TrainState) -> None:
  run.steps.name_bad_records(step)
  run.saver.save(step, state)


def _save_before(error: UserError, run: Run, step: int, state: TrainState) -> None:
  """Saves what `error`, of data that can no longer be read, would lose; raises it where there is nothing, or no way."""
  if not run.stopping.single or step == run.saver.last:
    raise error
  with contextlib.suppress(UserError):  # of the same cause
    run.steps.flush()
  run.saver.save(step, state)


def compiled_step(setup: Outline) -> Callable:
  """Returns step(state, frozen, batch, flags, rng) -> (state, metrics), jitted; the state given is used up.

  What processes say of their rows rides along, so that all of them act on the same, at the same step.
  """
  config, replicated = setup.config, parallel.replicated(setup.mesh)
  train_step = make_step(setup.task, setup.tx, optimizer.schedule(config.optim, config.steps), config.optim.spike)

  def flagged(state, frozen, batch, flags, rng):
    state, metrics = train_step(state, frozen, batch, rng)
    record = flags["record"]
    return state, metrics | {"stop": flags["stop"].max(), "damaged": flags["damaged"].max(axis=1).sum(),
                             "differing": (record.max(axis=1) != record.min(axis=1)).sum()}

  shardings = jax.tree.map(lambda x: x.sharding, setup.like)
  return jax.jit(flagged, donate_argnums=0, out_shardings=(shardings, replicated),
                 compiler_options=parallel.compiler_options(setup.mesh))


def _key(setup: Setup) -> jax.Array:
  """Returns the key of all that is random in a step."""
  return jax.jit(lambda: jax.random.key(setup.config.seed + 1), out_shardings=parallel.replicated(setup.mesh))()
