"""Writes the features of frozen encoders, and resumes where an earlier run ended."""

import dataclasses
import datetime
import os
import shutil
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from limber_jax.config import Config
from limber_jax.data import features, pipeline, transforms
from limber_jax.data.images import ImageOptions
from limber_jax.errors import UserError
from limber_jax.runtime import lock, parallel
from limber_jax.runtime.signals import StopRequest
from limber_jax.training.setup import feature_specs, setup
from limber_jax.weights.adopt import adopt

SHARD_MB = 512
PROGRESS = 10.0  # seconds between two lines of progress


def encode(config: Config, out: str, *, batch_size: int = 0, shard_mb: float = SHARD_MB,
           log: Callable[[str], None] = print) -> bool:
  """Writes the features of all images of `config.data` into `out`, resuming where an earlier run ended.

  SIGTERM, SIGINT and SIGHUP end it early; the shard being written is lost then.

  Args:
    config: the experiment that is to be trained from them.
    out: the directory.
    batch_size: images that go through the encoders together, over all devices; 0 = as in training.
    shard_mb: size of a file in 10⁶ bytes; an earlier run's choice is kept.
    log: prints a line.

  Returns:
    True if all is written, False if it was stopped.

  Raises:
    UserError: settings under which an image's features change during training, features of something else in `out`, or
      no room for them, or another process that writes there.
  """
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, features=out))
  for directory, file in config.prerequisites.items():
    if directory in (config.init.image, *config.init.extra_projectors.values()) and not os.path.exists(directory):
      raise UserError(f"the encoder is trained first, in {directory}: python -m limber_jax.train --config={file} "
                      f"--workdir={directory}")
  held = lock.Lock(os.path.join(out, lock.NAME), what=f"--out={out}", otherwise="choose another directory",
                   first=parallel.broadcast_from_process_0)
  with held, StopRequest() as stop:
    main = jax.process_index() == 0
    log = log if main else lambda _: None
    s = setup(dataclasses.replace(config, model=adopt(config, log=log)), only="image")
    source = config.data.source.open()
    what = features.describe(source, feature_specs(s))
    batch_size = batch_size or config.batch_size
    parallel.local_rows(batch_size, s.mesh)
    size = features.record_bytes(what)
    per_shard = max(int(shard_mb * 1e6) // size, 1)
    # Whole batches, so that each image stands at the same place of a batch whichever run encodes it.
    per_shard = max(per_shard // batch_size, 1) * batch_size
    shards, finished = features.claim(out, what, per_shard, write=main)

    missing = np.array([main and not shards.is_whole(k) for k in range(shards.count)])
    if jax.process_count() > 1:
      missing = multihost_utils.broadcast_one_to_all(missing)
    todo = np.flatnonzero(missing).tolist()
    if finished and not todo:
      log(f"{out} is complete: features of {shards.records:,} images in {shards.count} shards")
      return True
    images = sum(len(shards.rows(k)) for k in todo)
    if main and (free := shutil.disk_usage(out).free) < images * size:
      raise UserError(f"--out={out}: {images:,} images with {size:,} bytes of features each take "
                      f"{images * size / 1e9:,.1f} GB, only {free / 1e9:,.1f} GB are free there")
    log(f"{', '.join(what['encoders'])}: {shards.records:,} images × {size:,} bytes, {len(todo)} of {shards.count} "
        f"shards to write, {jax.device_count()} × {jax.devices()[0].device_kind}")
    done = not todo or _write(s, source, shards, todo, batch_size, images, stop, log)
    if not done:
      log(f"stopped by {stop.name or 'another process'}; the same command resumes after the shards that are whole")
      return False
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("all shards are written")
    if main:
      features.finish(shards, what)
    log(f"done: train with --config.data.features={out}")
    return True


def _write(s, source, shards, todo, batch_size, images, stop, log) -> bool:
  """Writes the shards `todo`, dealt out over the processes; returns False if one of them was asked to stop."""
  lanes = _lanes(batch_size, s.mesh)
  lane = next(i for i, (processes, _) in enumerate(lanes) if jax.process_index() in processes)
  processes, b = lanes[lane]
  writes = jax.process_index() == processes[0]

  def pieces(lane):
    b = lanes[lane][1]
    return [(k, rows[i : i + b]) for k in todo[lane :: len(lanes)] for rows in [shards.rows(k)]
            for i in range(0, len(rows), b)]

  own, steps = pieces(lane), max(len(pieces(i)) for i in range(len(lanes)))  # all processes take part in every step
  spans = np.array([(rows.start, rows.stop - 1) for _, rows in own] + [(0, 0)] * (steps - len(own)))
  indices = np.minimum(spans[:, :1] + np.arange(b)[None], spans[:, 1:]).reshape(-1)

  predict, data = s.task.predict(), s.config.data
  parts = {features.key_of(part): spec for part, spec in s.task.feature_specs(data).items()}

  def run(params, stats, batch, flags):
    found = {key: predict[key](params, stats, batch).astype(spec["dtype"]) for key, spec in parts.items()}
    return found, flags["stop"].max()

  run = jax.jit(run, out_shardings=(parallel.batch_sharding(s.mesh), parallel.replicated(s.mesh)),
                compiler_options=parallel.compiler_options(s.mesh))
  writer, shard = None, None

  def write(step, found):
    """Appends the features of one batch."""
    nonlocal writer, shard
    if step >= len(own) or not writes:
      return
    k, rows = own[step]
    if k != shard:
      writer, shard = features.ShardWriter(shards.path(k)), k
    arrays = [_local(found[key]) for key in parts]
    for i in range(len(rows)):
      writer.write(b"".join(array[i].tobytes() for array in arrays))
    if rows.stop == shards.rows(k).stop:
      writer.close()
      writer = None

  pixels = transforms.with_options(s.task.pixels(data), ImageOptions.from_config(data))
  pending, stopping, start, said = None, False, None, time.perf_counter()
  try:
    with (jax.set_mesh(s.mesh),
          pipeline.eval_batches(source, pixels, batch_size=b, indices=indices, workers=data.workers,
                                threads=data.threads, prefetch=data.prefetch) as batches):
      for step in range(steps + 1):  # a batch is written while the next one is computed
        fresh = None
        if step < steps:
          batch = next(batches)
          del batch["real"], batch["index"]
          flags = parallel.global_flags({"stop": np.full(b, stop(), np.int32)}, s.mesh)
          fresh = run(s.frozen.params, s.frozen.stats, parallel.global_batch(batch, s.mesh), flags)
        if pending is not None:
          if stopping := bool(pending[1]):
            break
          write(step - 1, pending[0])
          now = time.perf_counter()
          start = start or now  # after the first batch, which compiles
          if step > 1 and now - said >= PROGRESS:
            rate, said = (step - 1) / (now - start), now
            left = datetime.timedelta(seconds=int((steps - step) / rate))
            log(f"{images * step // steps:,} of {images:,} images  {rate * images / steps:,.0f} images/s  left {left}")
        pending = fresh
  finally:
    if writer is not None:
      writer.detach()
  return not stopping


def _lanes(batch_size: int, mesh: jax.sharding.Mesh) -> list[tuple[list[int], int]]:
  """Returns the groups of processes that hold the same rows of a batch, and how many: each group works as one.

  Raises:
    UserError: processes share some of their rows only.
  """
  lanes: dict[bytes, tuple[list[int], int]] = {}
  for process in sorted({d.process_index for d in mesh.devices.flat}):
    rows = parallel.local_rows(batch_size, mesh, process)
    lanes.setdefault(rows.tobytes(), ([], len(rows)))[0].append(process)
  if sum(count for _, count in lanes.values()) != batch_size:
    raise UserError(f"mesh {dict(mesh.shape)}: its processes share some of their rows of a batch and not others, and "
                    "then none of them has whole shards to write; encode with --config.mesh.tensor=1")
  return list(lanes.values())


def _local(x: jax.Array) -> np.ndarray:
  """Returns the rows of a batch that this process holds."""
  blocks = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
  return np.concatenate([np.asarray(blocks[row]) for row in sorted(blocks)])
