"""What every test stands on: 8 simulated CPU devices, set before JAX is first used, and the oracles."""

import hashlib
import importlib
import importlib.metadata
import math
import os
import pathlib
import shutil
import sys
import time

# Eight simulated devices on two cores share one pool of threads; with fewer threads than collectives in flight, each
# waits for another's turn and XLA aborts the process. Read when the CPU client starts.
os.environ.setdefault("NPROC", "32")
# Most of the time goes into compiling programs that then run for milliseconds: LLVM need not optimise them (a ResNet's
# step of 51 s takes 23 s so). What XLA itself does to a program, fusion and layouts and partitioning, stays.
os.environ["XLA_FLAGS"] = " ".join(
  sorted({*os.environ.get("XLA_FLAGS", "").split(), "--xla_backend_optimization_level=0"}))

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)


def _cache():
  """Returns the directory of compiled programs, which outlives the run: for this processor, these versions and flags.

  One that was not used for a month goes.
  """
  if given := os.environ.get("LIMBER_TEST_CACHE"):
    return given
  cpu = pathlib.Path("/proc/cpuinfo")
  lines = cpu.read_text().splitlines() if cpu.is_file() else []
  processor = sorted({line for line in lines if line.startswith(("flags", "model name"))})
  versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")]
  what = repr((sys.version, versions, os.environ["XLA_FLAGS"], processor))
  key = hashlib.sha256(what.encode()).hexdigest()[:16]
  root = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"), "limber_jax", "tests")
  path = root / key
  path.mkdir(parents=True, exist_ok=True)
  os.utime(path)
  for other in root.iterdir():
    if time.time() - other.stat().st_mtime > 30 * 86400:
      shutil.rmtree(other, ignore_errors=True)
  return str(path)


os.environ["LIMBER_TEST_CACHE"] = _cache()
jax.config.update("jax_compilation_cache_dir", os.environ["LIMBER_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_numpy_rank_promotion", "raise")  # [N] + [N, 1] is a bug more often than a wish
flags.FLAGS.mark_as_parsed()  # Grain and ml_collections read absl's flags, which nothing parses under pytest


def _import_oracle(name):
  torch = pytest.importorskip("torch")
  # torchvision 0.28 comes built for CUDA, and dies at import beside a torch for CPU unless these operators exist.
  if not hasattr(torch.ops.torchvision, "nms"):
    library = _import_oracle.keep_alive = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  return importlib.import_module(name)


@pytest.fixture
def only_the_devices_of_the_mesh(monkeypatch):
  """A mesh of one device, of the eight that are simulated, is an error to a user, and what many tests want."""
  from limber_jax.runtime import parallel
  make = parallel.make_mesh
  monkeypatch.setattr(parallel, "make_mesh", lambda sizes: make(sizes, jax.devices()[: math.prod(sizes.values())]))


@pytest.fixture(scope="session")
def open_clip():
  """The module open_clip; the test is skipped where PyTorch is not installed."""
  return _import_oracle("open_clip")


@pytest.fixture(scope="session")
def transformers():
  """The module transformers, its models usable; the test is skipped where PyTorch is not installed."""
  return _import_oracle("transformers")


@pytest.fixture(autouse=True, scope="module")
def _programs_go():
  """Drops the compiled programs of a file's tests: a worker that kept all of them came to 6 GB."""
  yield
  jax.clear_caches()
