"""The loop of training; see `train`."""

import contextlib
import dataclasses
import math
import os
import traceback
from collections.abc import Callable, Iterable

import jax
import numpy as np

from limber_jax import cli, registry
from limber_jax import config as config_lib
from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.manager import Checkpoints, keep_frozen
from limber_jax.checkpoints.scores import Scores
from limber_jax.checkpoints.state import TrainState
from limber_jax.config import Config
from limber_jax.data import bad_records as damage_lib
from limber_jax.data import checks, pipeline, transforms
from limber_jax.data.features import FeatureSource
from limber_jax.data.images import ImageOptions
from limber_jax.errors import UserError
from limber_jax.evals.base import Stopped
from limber_jax.runtime import lock, parallel, peers
from limber_jax.runtime.goodput import Ledger
from limber_jax.runtime.signals import Interrupted, StopRequest
from limber_jax.runtime.watchdog import Watchdog
from limber_jax.runtime.writer import Log
from limber_jax.tasks import microbatches
from limber_jax.training import optimizer
from limber_jax.training.setup import cached, check_frozen, evaluate, make_context, make_eval, setup
from limber_jax.training.train_step import make_step
from limber_jax.weights.adopt import adopt


def train(config: Config, workdir: str, *, log: Callable[[str], None] = print, stop: StopRequest | None = None,
          began: float | None = None) -> TrainState:
  """Trains `config` to its last step, going on from the newest checkpoint in `workdir`, and returns the state.

  SIGTERM, SIGINT and SIGHUP save and return early. A checkpoint is saved before its evaluations; one of them that fails
  is named in the log and in scores.json, and the run goes on.

  Args:
    config: the experiment.
    workdir: where config.json, checkpoints, metrics.jsonl, TensorBoard files and pictures go.
    log: prints a line.
    stop: entered already; None listens to signals for as long as this takes.
    began: when the command did, of time.monotonic(), for the ledger; None is now.

  Raises:
    UserError: a workdir in which another process trains, settings or data that do not fit, a workdir of another
      experiment, no checkpoint there that is whole,
      optimizer.max_skips steps in a row without a finite and usual loss and gradient, more damaged records than
      config.data.damaged allows, a data worker that is gone, or a checkpoint that could not be saved: the run ends
      there rather than take steps that the next fault would lose.
  """
  config_lib.check(config)
  config_lib.check_best(config)
  first = {directory: (file, cli.load_experiment(file)) for directory, file in config.first.items()}
  with contextlib.ExitStack() as until_end:
    held = until_end.enter_context(lock.Lock(
      os.path.join(workdir, lock.NAME), what=workdir, otherwise="choose another --workdir", first=parallel.from_first,
      log=log))
    for directory, (file, experiment) in first.items():
      if not os.path.isdir(os.path.join(directory, "checkpoints", str(experiment.steps))):
        log(f"first {file}, in {directory}")
        state, began = train(experiment, directory, log=log, stop=stop, began=began), None
        if int(state.step) < experiment.steps:
          return state  # a signal came; the same command goes on with it

    stop = stop or until_end.enter_context(StopRequest())
    until_end.enter_context(peers.shared(stop))
    main = jax.process_index() == 0
    ledger = Ledger(workdir, active=main, began=began)
    # First what is quick to say: that the workdir is another run's, or that there are no data.
    parallel.from_first(lambda: workdirs.check(
      dataclasses.replace(config, model=adopt(config, workdir, log=lambda _: None)), workdir))
    source = registry.lookup("data source", registry.SOURCES, config.data.source.name)(config.data.source)
    checks.check_enough(source, config)
    notes = [*getattr(source, "notes", []), *filter(None, [checks.look(source) if main else ""])]
    damage = damage_lib.Damage(workdir, source, config.data, config.batch_size)
    config = dataclasses.replace(config, model=adopt(config, workdir, log=log if main else lambda _: None))
    s = setup(config, workdir if workdirs.begun(workdir) else "")
    until_end.enter_context(ledger)
    until_end.enter_context(Watchdog(ledger, config.watchdog, name=f"process {jax.process_index()}"))
    rows = parallel.local_rows(config.batch_size, s.mesh)
    if config.data.features:
      source = FeatureSource(source, config.data.features, cached(s))
    fingerprint, earlier = (
      pipeline.data_fingerprint(source, s.tokenizer, config.data, config.batch_size, config.seed,
                                s.task.pixel_settings(config.data), earlier=then) for then in (False, True))
    # One process looks at the flag wherever it waits; several agree on it in the step, see `flagged`.
    single = jax.process_count() == 1
    alone = stop if single else lambda: False

    def waiting() -> contextlib.AbstractContextManager:
      return stop.interrupts(0 if single else peers.LATE)

    def agreed() -> bool:
      """Returns whether any process was asked to stop; all of them must ask together."""
      ledger.alive()
      return any(parallel.from_each(stop()))

    context = make_context(s, workdir, agreed, waiting)
    evals = {name: make_eval(s, name, context) for name, e in config.evals.items() if e.every >= 0}
    checkpoints = Checkpoints(workdir, config.checkpoint, write=True, log=log)
    with ledger("restore"):
      latest = checkpoints.latest()
    known = Scores(workdir, latest or 0, log=log if main else lambda _: None)
    if latest is None:
      state, meta = s.init(), {"evaluated": True}
    else:
      with ledger("restore"):
        state, meta = checkpoints.restore(latest, s.like)
      if int(state.step) != latest:
        raise UserError(f"{checkpoints.directory}/{latest} holds step {int(state.step)}: it was moved or copied there")
      if meta["data"] not in (fingerprint, earlier):
        raise UserError(f"{workdir} was trained on other data: its checkpoint {latest} has the fingerprint "
                        f"{meta['data'][:12]}, config.data now gives {fingerprint[:12]}; choose another --workdir")
      check_frozen(meta, s.digests, workdir, latest)
    start = int(state.step)
    ledger.at(start)
    damage.start(start)
    out = Log(workdir, steps=config.steps, batch_size=config.batch_size, start_step=start, active=main, print=log)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    out.line(f"{config.name}: {count / 1e6:.1f} M trained parameters, {len(source):,} examples, "
             f"{jax.device_count()} × {jax.devices()[0].device_kind}"
             + (f", going on from step {start}" if start else ""))
    with jax.set_mesh(s.mesh):
      count = microbatches.fitting(config.loss.accumulate, config.batch_size)
    if count != config.loss.accumulate:
      out.line(f"in {count} pieces of {config.batch_size // count} rows: loss.accumulate={config.loss.accumulate} "
               f"would leave devices of the mesh {dict(s.mesh.shape)} without any")
    if damage.found:
      out.line(f"{len(damage.found):,} annotations cannot be used, and {damage_lib.FILE} names them; the first: "
               f"{damage_lib.told(damage.found[0])}")
    for note in notes:
      out.line(note)

    batches = pipeline.train_batches(
      source, transforms.with_options(s.task.transform(s.tokenizer, config.data, train=True),
                                      ImageOptions.of(config.data)), batch_size=config.batch_size, rows=rows,
      seed=config.seed, start_step=start, workers=config.data.workers,
      threads=config.data.threads, prefetch=config.data.prefetch)
    replicated = parallel.replicated(s.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, s.like)
    train_step = make_step(s.task, s.tx, optimizer.schedule(config.optim, config.steps), config.optim.spike)
    rng = jax.jit(lambda: jax.random.key(config.seed + 1), out_shardings=replicated)()

    def flagged(state, frozen, batch, flags, rng):
      """What processes say of their rows rides along, so that all of them act on the same, at the same step."""
      state, metrics = train_step(state, frozen, batch, rng)
      record = flags["record"]
      return state, metrics | {"stop": flags["stop"].max(), "damaged": flags["damaged"].max(axis=1).sum(),
                               "differing": (record.max(axis=1) != record.min(axis=1)).sum()}

    step_fn = jax.jit(flagged, donate_argnums=0, out_shardings=(shardings, replicated),
                      compiler_options=parallel.compiler_options())

    def measure(step: int, names: Iterable[str]) -> None:
      """Runs evaluations and writes what they give as one record; one that fails is named, and the others go on."""
      found = {}
      for name in names:
        try:
          known.begin(step, name)
          with ledger("evaluation"):
            figures = evaluate(s, {name: evals[name]}, state.params, state.stats)
        except (Stopped, Interrupted):
          known.interrupted(step, name)
          raise
        except Exception as error:
          peers.fail_alike(f"{name}/{step}", error)
          why = _told(error)
          known.end(step, name, {}, failed=why)
          out.write(step, {"event": "not evaluated", "evaluation": name, "reason": why})
          out.line(f"step {step}  {name}: not evaluated: {why}")
          with contextlib.suppress(UserError):  # what could not be read may be there again next time
            evals[name] = make_eval(s, name, context)
        else:
          known.end(step, name, figures)
          found |= figures
      if found:
        out.write(step, found)
        out.line(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
        if missing := config_lib.missing_best(config.checkpoint.best, found):
          out.line(missing)
      out.restart_clock()

    def name_damage(step: int, due: bool = True) -> None:
      """Names what could not be read up to `step`; raises UserError if it is too much."""
      if new := damage.settle(step, due):
        out.write(step, {"event": "damaged", "records": len(new), "share": damage.share(step)})
        out.line(f"step {step}  {len(new)} more cannot be read, others stand in for them: {damage.share(step):.2%} of "
                 f"what was seen; {damage_lib.FILE} names all; the last: {damage_lib.told(new[-1])}")

    def record(step: int, metrics: dict[str, jax.Array]) -> bool:
      """Writes what step `step` gave, once it is there; returns whether to stop."""
      values = {k: v.item() for k, v in jax.device_get(metrics).items()}
      stopping, skipped, in_row = values.pop("stop"), values.pop("skipped"), values.pop("skipped_in_row")
      damage.count(values.pop("damaged"))
      differing = values.pop("differing")
      name_damage(step, due=bool(differing) or step % config.log_every == 0)
      if differing:
        raise UserError(f"step {step}: processes that hold the same rows of the batch (mesh axis tensor) read other "
                        f"records for {differing} of them: one could not read a file that another could. The same "
                        "command goes on from what was saved last")
      limits = {k: values.pop(k) for k in ("loss_limit", "grad_norm_limit") if k in values}
      if skipped:
        seen = {k: values[k] for k in ("loss", "grad_norm")}
        out.write(step, {"event": "skipped"} | {k: repr(v) for k, v in (seen | limits).items()})
        out.line(f"step {step} skipped: " + ", ".join(f"{k} {v:.4g}" for k, v in (seen | limits).items()))
      elif step % config.log_every == 0 or step in (start + 1, config.steps):
        out.train(step, values | {k: v for k, v in limits.items() if math.isfinite(v)})
      if in_row >= config.optim.max_skips:
        raise UserError(f"steps {step - in_row + 1} to {step} had no finite loss, gradient and update"
                        f"{', or a spike' if limits else ''} (config.optim.max_skips="
                        f"{config.optim.max_skips}); the last checkpoint is step {checkpoints.latest()}; try a lower "
                        "--config.optim.lr")
      return bool(stopping)

    def due(step: int) -> list[str]:
      last = step == config.steps
      return known.missing(step, [n for n in evals if last or (config.evals[n].every
                                                               and step % config.evals[n].every == 0)])

    def save(step: int) -> None:
      name_damage(step)
      keep(step)

    def keep(step: int) -> None:
      nonlocal saved
      held.check()
      with ledger("save"):
        if saved is None:
          for part in s.drawn:
            keep_frozen(workdir, part, {"params": s.frozen.params[part], "stats": s.frozen.stats.get(part, {})})
          parallel.from_first(lambda: workdirs.claim(config, workdir, checkpoints.run))
        checkpoints.save(state, {"data": fingerprint, "frozen": s.digests})
      saved = step

    step, stopping, pending, saved = start, agreed(), None, None
    until_end.enter_context(ledger("step"))
    try:
      if not stopping and not meta.get("evaluated"):
        measure(start, due(start))
      with jax.set_mesh(s.mesh):
        while step < config.steps and not stopping:
          try:
            with ledger("data") as wait, waiting():
              local, damaged = damage.read(step + 1, next(batches))
          except UserError as error:  # a mount that is gone may come back, and the state is whole
            if not single or step in (saved, start):
              raise
            if pending is not None:
              with contextlib.suppress(UserError):  # of the same cause
                record(*pending)
            keep(step)
            raise UserError(f"{error}; step {step} was saved") from error
          out.waited(wait.seconds)
          index = local.pop("index")
          flags = parallel.global_flags({"stop": np.full(len(rows), stop(), np.int32), "damaged": damaged,
                                         "record": (index ^ (index >> 32)).astype(np.int32)}, s.mesh)
          with ledger("compile" if step == start else "step"):
            state, fresh = step_fn(state, s.frozen, parallel.global_batch(local, s.mesh), flags, rng)
          ledger.at(step + 1)
          # The values of a step are read while the next one runs, except where something is done after this step.
          checkpoints.check()
          stopping = (pending is not None and record(*pending)) or alone()
          step, pending = step + 1, (step + 1, fresh)
          at_checkpoint = step % config.checkpoint.every == 0
          if stopping or due(step) or at_checkpoint or step == config.steps:
            stopping = record(*pending) or stopping
            pending = None
            best = config.checkpoint.best.partition("/")[0]
            if at_checkpoint or stopping or step == config.steps or best in due(step):
              save(step)
            if not stopping and due(step):
              with ledger("save"):
                checkpoints.wait()  # an evaluation may bring the process down, by its hunger for memory alone
              measure(step, due(step))
    except (Stopped, Interrupted) as reason:
      stopping = True
      if isinstance(reason, Interrupted):
        batches.abandon()
        if not single:  # the others wait for this one in the next step, to which they have given the state
          raise UserError(f"{stop.name}: process {jax.process_index()} has waited {peers.LATE:g} s longer for data "
                          f"that do not come, so nothing can be saved of step {step}; the same command goes on from "
                          f"step {saved or start}") from None
      if pending is not None:
        record(*pending)
      if step not in (saved, start):
        save(step)
    finally:
      batches.close()
      out.close()
      with ledger("save"):
        checkpoints.close()
    out.line(ledger.summary())
    for name, steps in known.all_failed().items():
      out.line(f"{name}: not evaluated at step {', '.join(map(str, steps))}; measure it by python -m "
               "limber_jax.evaluate")
    if stopping:
      log(f"stopped by {stop.name or 'another process'} at step {step}; the same command goes on from there")
    return state


def _told(error: Exception) -> str:
  """Returns what an evaluation failed of, in a line; of a fault of this program the traceback too, on stderr."""
  if isinstance(error, UserError):
    return str(error)
  if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
    traceback.print_exception(error)
  return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
