"""`bench loss`: the loss and its gradient in chunks, beside the plain ones with all N×N logits, on one device.

Time is taken at --n: plain, chunked, plain, chunked …, so that a machine that slows down slows both; the ratio is the
median of the pairs'. Memory is taken at --large: of plain only what XLA says it would need, of chunked also what
a run takes. The share of peak counts the three products that any way needs; the chunked softmax loss makes a fourth.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from limber_jax import losses
from limber_jax.bench import measure
from limber_jax.errors import UserError

_N = flags.DEFINE_integer("n", 8192, "Pairs in the batch whose loss is timed.", lower_bound=1)
_LARGE = flags.DEFINE_integer("large", 32_768, "Pairs in the batch whose memory is measured; 0 leaves it out.",
                              lower_bound=0)
_E = flags.DEFINE_integer("e", 512, "Width of the embeddings.", lower_bound=1)
_CHUNK = flags.DEFINE_integer("chunk", 1024, "Rows of logits at a time.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed pairs of runs, after one that warms up.", lower_bound=1)
_KIND = flags.DEFINE_enum("kind", "softmax", ["softmax", "sigmoid"], "Which loss.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the embeddings.")


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench loss: unexpected argument {argv[0]!r}")
  out = measure.surroundings(("jax", "jaxlib")) | {
    "kind": _KIND.value, "dtype": _DTYPE.value, "n": _N.value, "width": _E.value, "chunk": _CHUNK.value}
  if _LARGE.value:  # first: the process has not used more memory before, so its peak is this run's
    out[f"at_{_LARGE.value}"] = _memory(_LARGE.value)
  measure.show(out | _times(_N.value))


def _memory(n: int) -> dict[str, Any]:
  """Returns the bytes that the loss and gradient of n pairs need beside their inputs and outputs."""
  plain, _ = _compile(n, None)
  chunked, _ = _compile(n, _CHUNK.value)
  batch = jax.block_until_ready(_batch(n))
  before = measure.memory_in_use()
  start = time.perf_counter()
  result = jax.block_until_ready(chunked(*batch))
  seconds = time.perf_counter() - start
  return {"plain_temp_bytes": _temp(plain), "chunked_temp_bytes": _temp(chunked), "chunked_seconds": seconds,
          "chunked_extra_bytes_measured": None if before is None else (
            measure.peak_memory() - before - measure.bytes_of(result))}


def _times(n: int) -> dict[str, Any]:
  """Returns the times of both ways for n pairs, and the device's limit between them."""
  batch = _batch(n)
  product, product_flops, peak = measure.matrix_product(
    _DTYPE.value, "highest" if _DTYPE.value == "float32" else None)  # as the loss has it
  (plain, plain_compile), (chunked, chunked_compile) = _compile(n, None), _compile(n, _CHUNK.value)
  runs = [lambda: plain(*batch), lambda: chunked(*batch), product]
  for run in runs:
    measure.timed(run)
  seconds = [[measure.timed(run) for run in runs] for _ in range(_REPEATS.value)]
  plains, chunks, products = zip(*seconds, strict=True)
  limit = product_flops / min(products)
  ratio, each = measure.ratios(chunks, plains)
  flops = 3 * 2 * n * n * _E.value

  def facts(compiled, compile_seconds, time):
    return {"seconds": time, "compile_seconds": compile_seconds, "temp_bytes": _temp(compiled),
            "share_of_peak": flops / time / limit}

  return {
    "plain": facts(plain, plain_compile, statistics.median(plains)),
    "chunked": facts(chunked, chunked_compile, statistics.median(chunks)),
    "chunked_time_over_plain": ratio, "ratio_of_each_pair": each,
    "device_peak_flops_per_second": limit, "device_peak": peak,
  }


def _batch(n: int) -> tuple[jax.Array, ...]:
  """Returns image and text embeddings [n, E] that are somewhat alike, and the parameters of the loss."""
  keys = jax.random.split(jax.random.key(0))
  image, noise = (jax.random.normal(k, (n, _E.value)) for k in keys)
  return image.astype(_DTYPE.value), (noise + 0.3 * image).astype(_DTYPE.value), *_parameters()


def _parameters() -> tuple[jax.Array, ...]:
  if _KIND.value == "softmax":
    return (jnp.exp(losses.INITIAL_LOG_SCALE),)
  return jnp.exp(losses.SIGLIP_LOG_SCALE), jnp.float32(losses.SIGLIP_BIAS)


def _compile(n: int, chunk: int | None) -> tuple[Callable, float]:
  """Returns the compiled loss and gradient of n pairs, and the seconds that compiling it took."""
  loss = losses.contrastive_loss if _KIND.value == "softmax" else losses.sigmoid_loss
  row = jax.ShapeDtypeStruct((n, _E.value), _DTYPE.value)
  shapes = row, row, *_parameters()
  f = jax.value_and_grad(lambda *a: loss(*a, chunk_size=chunk), argnums=tuple(range(len(shapes))), has_aux=True)
  return measure.compiled(f, *shapes)


def _temp(compiled) -> int:
  return compiled.memory_analysis().temp_size_in_bytes
