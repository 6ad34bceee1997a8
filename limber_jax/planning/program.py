"""A run's own step, compiled for devices that need not be there, and what the compiler said meanwhile."""

import contextlib
import dataclasses
import glob
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from limber_jax.runtime import parallel
from limber_jax.training.feed import FLAGS
from limber_jax.training.loop import compiled_step
from limber_jax.training.setup import Outline, example_row

Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass
class Compiled:
  """What came of a compilation."""

  executable: Any        # jax.stages.Compiled; None if there is none
  error: str             # why not, "" if there is one
  said: list[str]        # lines that the compiler logged
  seconds: float         # that it took


def batch_specs(o: Outline) -> tuple[Shapes, Shapes]:
  """Returns (batch, flags) as `Feed.take` gives them: arrays [B, …] as ShapeDtypeStructs with shardings."""
  rows, columns = o.config.batch_size, o.mesh.shape["tensor"]
  batch = {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=parallel.batch_sharding(o.mesh))
           for name, value in example_row(o.task, o.config).items() for x in [np.asarray(value)]}
  flag = jax.ShapeDtypeStruct((rows, columns), np.int32, sharding=parallel.flags_sharding(o.mesh))
  return batch, dict.fromkeys(FLAGS, flag)


def arguments(o: Outline) -> tuple[Any, ...]:
  """Returns (state, frozen, batch, flags, rng), what the step of `training.loop.compiled_step` is called with."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  rng = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=parallel.replicated(o.mesh))
  return (o.like, o.frozen, *batch_specs(o), rng)


def compile_step(o: Outline, logs: str) -> Compiled:
  """Returns the executable of an experiment's step on its mesh, or why there is none: it wants more memory, say.

  Args:
    o: the experiment.
    logs: the directory that libtpu writes its log to.
  """
  began, executable, error = time.monotonic(), None, ""
  with jax.set_mesh(o.mesh), listening(logs) as said, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of donation, which the executable itself shows
    try:
      executable = compiled_step(o).lower(*arguments(o)).compile()
    except jax.errors.JaxRuntimeError as failure:
      error = " ".join(str(failure).split())
  return Compiled(executable, error, said, time.monotonic() - began)


@contextlib.contextmanager
def listening(logs: str) -> Iterator[list[str]]:
  """Gives a list that holds, after the block, the lines that libtpu logged or wrote to stderr meanwhile."""
  lines: list[str] = []
  before = {path: os.path.getsize(path) for path in _logs_in(logs)}
  with tempfile.TemporaryFile() as file, _stderr_to(file.fileno()):
    try:
      yield lines
    finally:
      file.seek(0)
      lines += file.read().decode(errors="replace").splitlines()
      for path in _logs_in(logs):
        with open(path, "rb") as log:
          log.seek(before.get(path, 0))
          lines += log.read().decode(errors="replace").splitlines()


def _logs_in(logs: str) -> list[str]:
  """Returns the files of a directory that hold warnings, and errors with them."""
  return [path for path in glob.glob(os.path.join(glob.escape(logs), "*.WARNING.*")) if not os.path.islink(path)]


@contextlib.contextmanager
def _stderr_to(descriptor: int) -> Iterator[None]:
  """While entered, all that is written to stderr goes elsewhere: XLA writes from C++, below sys.stderr."""
  saved = os.dup(2)
  os.dup2(descriptor, 2)
  try:
    yield
  finally:
    os.dup2(saved, 2)
    os.close(saved)
