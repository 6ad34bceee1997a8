"""What every test stands on: 8 simulated CPU devices, set before JAX is first used, and the oracles."""

import importlib
import os
import tempfile

# Eight simulated devices on two cores share one pool of threads; with fewer threads than collectives in flight, each
# waits for another's turn and XLA aborts the process. Read when the CPU client starts.
os.environ.setdefault("NPROC", "32")
# Most of the time goes into compiling programs that then run for milliseconds: LLVM need not optimise them (a ResNet's
# step of 51 s takes 23 s so). What XLA itself does to a program, fusion and layouts and partitioning, stays.
os.environ["XLA_FLAGS"] = " ".join({*os.environ.get("XLA_FLAGS", "").split(), "--xla_backend_optimization_level=0"})

import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 8)
# Many tests build the same tiny programs again; they are compiled once a run, for all of its workers.
if "LIMBER_TEST_CACHE" not in os.environ:
  os.environ["LIMBER_TEST_CACHE"] = tempfile.mkdtemp(prefix="limber_jax_tests_")
jax.config.update("jax_compilation_cache_dir", os.environ["LIMBER_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
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


@pytest.fixture(scope="session")
def open_clip():
  """The module open_clip; the test is skipped where PyTorch is not installed."""
  return _import_oracle("open_clip")


@pytest.fixture(scope="session")
def transformers():
  """The module transformers, its models usable; the test is skipped where PyTorch is not installed."""
  return _import_oracle("transformers")
