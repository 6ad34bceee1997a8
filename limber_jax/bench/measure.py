"""What the measurements share: the clock, memory, the limits of the device, and the output."""

import importlib
import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_KEPT: list[Any] = []  # torch forgets a library's operators with the library


def timed(run: Callable[[], Any]) -> float:
  """Returns the seconds that `run()` takes until its result is there."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def compiled(function: Callable, *shapes: Any, **options: Any) -> tuple[Callable, float]:
  """Returns (the compiled jax.jit(function, **options) for arguments of these shapes, the seconds it took)."""
  start = time.perf_counter()
  return jax.jit(function, **options).lower(*shapes).compile(), time.perf_counter() - start


def ratios(above: Sequence[float], below: Sequence[float]) -> tuple[float, list[float]]:
  """Returns (the median of the pairs' ratios, all of them)."""
  each = [a / b for a, b in zip(above, below, strict=True)]
  return statistics.median(each), each


def matrix_product(dtype: str, precision: str | None = None) -> tuple[Callable[[], jax.Array], int, str]:
  """Returns (a run on one device, its FLOPs, what it is): the largest square product that is quick to time here."""
  side = 2048 if jax.default_backend() == "cpu" else 8192
  a = jax.random.normal(jax.random.key(0), (side, side), dtype)
  multiply = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
  return lambda: multiply(a), 2 * side**3, f"{dtype} product of two matrices of side {side}, measured in this run"


def memory_pass() -> tuple[Callable[[], jax.Array], int, str]:
  """Returns (a run on one device, the bytes it moves, what it is): an array far larger than any cache, updated."""
  megabytes = 256 if jax.default_backend() == "cpu" else 4096
  array = jnp.zeros(megabytes * 2**20 // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: nothing is spent on the pages of a new array

  def run():
    nonlocal array
    array = add(array)
    return array

  return run, 2 * array.nbytes, f"{megabytes} MiB read and written in place, the fastest pass of this run"


def bytes_of(tree: Any) -> int:
  """Returns the bytes of all arrays in a tree, counted once each however many devices hold them."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def size_of(tree: Any) -> int:
  """Returns how many numbers the arrays of a tree hold."""
  return sum(x.size for x in jax.tree.leaves(tree))


def memory_in_use() -> int | None:
  """Returns the bytes in use on the device, or, on a CPU, by this process; None where neither is known."""
  if stats := jax.local_devices()[0].memory_stats():
    return stats["bytes_in_use"]
  try:
    with open("/proc/self/statm") as f:
      return int(f.read().split()[1]) * resource.getpagesize()
  except OSError:
    return None


def peak_memory() -> int:
  """Returns the most bytes that were ever in use, in the sense of `memory_in_use`, with everything in the process."""
  stats = jax.local_devices()[0].memory_stats()
  unit = 1 if sys.platform == "darwin" else 1024
  return stats["peak_bytes_in_use"] if stats else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def import_peer(name: str) -> Any:
  """Returns the module `name` (open_clip or transformers) with PyTorch; None, with a line on stderr, without."""
  try:
    import torch
    # torchvision's CUDA build dies at import beside a torch for CPUs unless these operators are declared.
    if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
      _KEPT.append(library := torch.library.Library("torchvision", "DEF"))
      library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
      library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
  except (ImportError, RuntimeError) as error:  # a torchvision that does not fit its torch raises RuntimeError
    no_peer(name, f"{' '.join(str(error).split())[:200]}; pip install -e '.[test]' brings it")
    return None


def choose_threads(run: Callable[[], Any]) -> int:
  """Returns the threads that PyTorch is set to from now on: one, or all if `run()` is faster so; all of them on a GPU.

  On a CPU that others use too, all its threads wait for the one that is held up: we saw 16 times as long with two.
  """
  import torch
  everything = torch.get_num_threads()
  if torch.cuda.is_available() or everything == 1:
    run()
    return everything
  seconds = {}
  for threads in (1, 1, everything):  # the first one only warms up
    torch.set_num_threads(threads)
    seconds[threads] = timed(run)
  fastest = min(seconds, key=seconds.__getitem__)
  torch.set_num_threads(fastest)
  return fastest


def no_peer(name: str, why: str) -> None:
  """Says on stderr why there is nothing to compare with."""
  print(f"{name}: not timed ({why})", file=sys.stderr)


def surroundings(packages: Iterable[str]) -> dict[str, Any]:
  """Returns what every measurement says of where it was made."""
  return {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(),
          "versions": {name: importlib.metadata.version(name) for name in packages}}


def show(out: dict[str, Any]) -> None:
  """Prints one JSON object, its fractions to four digits."""
  print(json.dumps(_rounded(out), indent=1))


def _rounded(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _rounded(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value
