"""Batches on their way to the devices, and what each process says of its rows beside them."""

import jax
import numpy as np

from limber_jax.config import Config
from limber_jax.data import pipeline, transforms
from limber_jax.data.bad_records import BadRecords
from limber_jax.data.images import ImageOptions
from limber_jax.data.sources import Source
from limber_jax.runtime import parallel
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.writer import Log
from limber_jax.training.setup import Setup
from limber_jax.training.stopping import Stopping

Arrays = dict[str, jax.Array]
FLAGS = ("stop", "damaged", "record")  # what `Feed.take` says of each row, int32


class Feed:
  """The batches of a run from one step on, each as global arrays over the mesh."""

  def __init__(self, setup: Setup, source: Source, damage: BadRecords, stopping: Stopping, tracker: TimeTracker,
               out: Log, start: int):
    """Starts to read for the batch after step `start`; the log is told how long each was waited for."""
    self._out = out
    config: Config = setup.config
    self._mesh, self._damage, self._stopping, self._tracker = setup.mesh, damage, stopping, tracker
    self._rows = parallel.local_rows(config.batch_size, setup.mesh)  # of a batch that this process loads
    transform = transforms.with_options(setup.task.transform(setup.tokenizer, config.data, train=True),
                                        ImageOptions.from_config(config.data))
    self._batches = pipeline.train_batches(
      source, transform, batch_size=config.batch_size, rows=self._rows, seed=config.seed, start_step=start,
      workers=config.data.workers, threads=config.data.threads, prefetch=config.data.prefetch)

  def take(self, step: int) -> tuple[Arrays, Arrays]:
    """Returns (the batch of `step`, flags of its rows), global arrays [B, …].

    The flags are "stop" (this process was asked to), "damaged" (records that a row tried in vain) and "record" (which
    record it is), int32 [B, processes that hold the row].

    Args:
      step: counted from 1.

    Raises:
      UserError: the data can no longer be read.
      signals.Interrupted: a request to stop came meanwhile.
    """
    with self._tracker("data") as wait, self._stopping.waiting():
      local, damaged = self._damage.read(step, next(self._batches))
    self._out.waited(wait.seconds)
    index = local.pop("index")
    stop = np.full(len(self._rows), self._stopping.request(), np.int32)
    flags = dict(zip(FLAGS, (stop, damaged, (index ^ (index >> 32)).astype(np.int32)), strict=True))
    return parallel.global_batch(local, self._mesh), parallel.global_flags(flags, self._mesh)

  def detach(self) -> None:
    """Leaves what is being read to itself: it may never come."""
    self._batches.detach()

  def close(self) -> None:
    """Ends the readers."""
    self._batches.close()
