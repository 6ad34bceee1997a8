"""How a run begins: what is quick to check first, then data, weights, evaluations, and the state it resumes from."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.checkpoints.scores import Scores
from limber_jax.checkpoints.state import TrainState
from limber_jax.config import Config
from limber_jax.data import bad_records, checks, pipeline
from limber_jax.data.bad_records import BadRecords
from limber_jax.data.features import FeatureSource
from limber_jax.data.sources import Source
from limber_jax.errors import UserError
from limber_jax.runtime import parallel
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.lock import Lock
from limber_jax.runtime.signals import StopRequest
from limber_jax.runtime.watchdog import Watchdog
from limber_jax.runtime.writer import Log
from limber_jax.tasks import microbatches
from limber_jax.training.evaluations import Evaluations
from limber_jax.training.feed import Feed
from limber_jax.training.saving import Saver
from limber_jax.training.setup import Setup, check_frozen, feature_specs, make_context, setup
from limber_jax.training.step_log import StepLog
from limber_jax.training.stopping import Stopping
from limber_jax.weights.adopt import adopt

Say = Callable[[str], None]


@dataclasses.dataclass
class Run:
  """A run at the step where it begins or resumes: all that its loop uses."""

  setup: Setup
  state: TrainState
  start: int             # its step
  measured: bool         # whether there is nothing to measure of it: step 0, or one of a release that measured first
  feed: Feed
  evaluations: Evaluations
  saver: Saver
  steps: StepLog
  out: Log
  tracker: TimeTracker
  stopping: Stopping


def open_run(config: Config, workdir: str, held: Lock, request: StopRequest, until_end: contextlib.ExitStack, *,
             log: Say, began: float | None, failures: list[str] | None = None) -> Run:
  """Returns the run of `config` in `workdir`, at the newest checkpoint there, or at step 0.

  Nothing is written but for the log, goodput.json and what names damaged data.

  Args:
    config: the experiment.
    workdir: where it trains, or is to.
    held: the lock on it.
    request: to stop; entered already.
    until_end: what is to be left at the end of the run is entered there.
    log: prints a line.
    began: when the command did, of time.monotonic(); None is now.
    failures: gets "name/step" of each evaluation that fails.

  Raises:
    UserError: see `loop.train`.
  """
  main = jax.process_index() == 0
  say = log if main else lambda _: None
  tracker = TimeTracker(workdir, active=main, began=began)
  # First what is quick to say: that the workdir is another run's, or that there are no data.
  parallel.broadcast_from_process_0(lambda: workdirs.check(
    dataclasses.replace(config, model=adopt(config, workdir, log=lambda _: None)), workdir))
  source, notes = _open_data(config)
  damage = BadRecords(workdir, source, config.data, config.batch_size)
  config = dataclasses.replace(config, model=adopt(config, workdir, log=say))
  s = setup(config, workdir if workdirs.begun(workdir) else "")
  until_end.enter_context(tracker)
  until_end.enter_context(Watchdog(tracker, config.watchdog, name=f"process {jax.process_index()}"))
  if config.data.features:
    source = FeatureSource(source, config.data.features, feature_specs(s))
  stopping = Stopping(request, tracker)
  evaluations = Evaluations(s, make_context(s, workdir, stopping.together, stopping.waiting))
  checkpoints = Checkpoints(workdir, config.checkpoint, write=True, log=log)
  fingerprints = _fingerprints(s, source, workdirs.ignored_of_source(workdir))
  with tracker("restore"):
    state, meta = _restore(checkpoints, s, workdir, fingerprints)
  start = int(state.step)
  scores = Scores(workdir, start, say, failures)
  tracker.at(start)
  damage.start(start)
  out = Log(workdir, steps=config.steps, batch_size=config.batch_size, start_step=start, active=main, print=log)
  _announce(out, s, source, start, damage, notes)
  evaluations.begin(scores, out, tracker)
  return Run(
    s, state, start, meta.get("evaluated", not meta), Feed(s, source, damage, stopping, tracker, out, start),
    evaluations, Saver(checkpoints, s, workdir, held, tracker, start=start, fingerprint=fingerprints[0]),
    StepLog(config, out, damage, start, checkpoints.latest), out, tracker, stopping)


def _open_data(config: Config) -> tuple[Source, list[str]]:
  """Returns (the training data, what there is to say of them)."""
  source = config.data.source.open()
  checks.check_enough(source, config)
  looked = checks.look(source) if jax.process_index() == 0 else ""
  return source, [*getattr(source, "notes", []), *filter(None, [looked])]


def _fingerprints(s: Setup, source: Source, ignored: dict[str, Any]) -> tuple[str, ...]:
  """Returns what identifies the data, as it is now and then as earlier releases had it."""
  config = s.config
  return tuple(pipeline.data_fingerprint(source, s.tokenizer, config.data, config.batch_size, config.seed,
                                         s.task.pixel_settings(config.data), earlier=earlier, ignored=beside)
               for beside in ({}, ignored)[: 1 + bool(ignored)] for earlier in (False, True))


def _restore(checkpoints: Checkpoints, s: Setup, workdir: str, fingerprints: tuple[str, ...]
             ) -> tuple[TrainState, dict[str, Any]]:
  """Returns the state to resume from and its checkpoint's meta, {} where there is none."""
  latest = checkpoints.latest()
  if latest is None:
    return s.init(), {}
  state, meta = checkpoints.restore(latest, s.like)
  if int(state.step) != latest:
    raise UserError(f"{checkpoints.directory}/{latest} holds step {int(state.step)}: it was moved or copied there")
  if meta["data"] not in fingerprints:
    # A config.json would have told by now of most settings; without one it may be any that decides what batches hold.
    what, back = ("was trained on other data", "") if workdirs.begun(workdir) else (
      f"lacks its {workdirs.CONFIG}, and was trained on other data or by another seed, batch_size, tokenizer or "
      "setting of config.data", f", or put its {workdirs.CONFIG} back")
    raise UserError(f"{workdir} {what}: its checkpoint {latest} has the fingerprint {meta['data'][:12]}, this config "
                    f"gives {fingerprints[0][:12]}; choose another --workdir{back}")
  check_frozen(meta, s.digests, workdir, latest)
  return state, meta


def _announce(out: Log, s: Setup, source: Source, start: int, damage: BadRecords, notes: list[str]) -> None:
  """Says what trains on what."""
  config = s.config
  count = sum(x.size for x in jax.tree.leaves(s.like.params))
  out.line(f"{config.name}: {count / 1e6:.1f} M trained parameters, {len(source):,} examples, "
           f"{jax.device_count()} × {jax.devices()[0].device_kind}"
           + (f", resuming from step {start}" if start else ""))
  with jax.set_mesh(s.mesh):
    count = microbatches.fitting(config.loss.num_microbatches, config.batch_size)
  if count != config.loss.num_microbatches:
    out.line(f"in {count} microbatches of {config.batch_size // count} rows: loss.num_microbatches="
             f"{config.loss.num_microbatches} would leave devices of the mesh {dict(s.mesh.shape)} without any")
  if damage.found:
    out.line(f"{len(damage.found):,} annotations cannot be used, and {bad_records.FILE} names them; the first: "
             f"{bad_records.describe(damage.found[0])}")
  for note in notes:
    out.line(note)
