"""`bench generate`: text from a GPT-J with random weights, beside transformers' on the same weights and device.

All write --new_tokens after a prompt of --prompt positions, in turn, JAX, PyTorch, JAX, PyTorch …, so that a machine
that slows down slows both; ratios are medians of the pairs', above 1 where this is faster. No token ends a text. The
peer is `generate` of GPTJForCausalLM as a user gets it, from the weights that `weights.export.save_lm` writes; on a CPU
with one thread if that is faster.

Decoding is also measured apart from the prompt's pass: here by a program of its own, which gets the cache of that pass
(and copies it, once) and goes through the same loop; there from the first token on. A step writes one token of every
row. It cannot do without reading all weights (of the embedding only its rows) and the keys and values written so far:
these are the bytes of a step, on average over the steps. The share is that of the bandwidth measured in the same run.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from limber_jax.bench import measure
from limber_jax.config import Compute, Decoding
from limber_jax.decoding import generate
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import gptj
from limber_jax.models.cache import Cache, empty_cache
from limber_jax.models.gptj import GPTJ, GPTJSize
from limber_jax.weights import export

_SIZE = flags.DEFINE_string("size", "gptj_100m", "Of the language model: a name.")
_BATCHES = flags.DEFINE_list("batch_sizes", ["1", "16"], "Prompts at a time, best in rising order: memory is a peak.")
_PROMPT = flags.DEFINE_integer("prompt", 144, "Positions of a prompt.", lower_bound=1)
_NEW = flags.DEFINE_integer("new_tokens", 32, "Tokens to write.", lower_bound=2)
_BEAMS = flags.DEFINE_integer("beams", 1, "Beams of each prompt; 1: greedy.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each, after one that warms up.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"],
                           "Of weights and activations; empty: float32 on a CPU, else bfloat16.")
_PEER = flags.DEFINE_bool("peer", True, "Time transformers too, if PyTorch is installed; it holds the weights again.")
_NO_END = -1  # a token that no model writes


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench generate: unexpected argument {argv[0]!r}")
  if _SIZE.value not in gptj.SIZES:
    raise UserError(f"--size: no size {_SIZE.value!r}{did_you_mean(_SIZE.value, gptj.SIZES)}")
  if not all(b.isdecimal() and int(b) for b in _BATCHES.value) or not _BATCHES.value:
    raise UserError(f"--batch_sizes={','.join(_BATCHES.value)}: expected whole numbers, at least 1, such as 1,16")
  batches = [int(b) for b in _BATCHES.value]
  size = gptj.SIZES[_SIZE.value]()
  dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
  model = GPTJ(size, Compute(dtype=dtype))

  def draw(key):
    return jax.tree.map(lambda x: x.astype(dtype), gptj.init_params(model, key))

  params = jax.jit(draw)(jax.random.key(0, impl="rbg"))
  move, moved, limit = measure.memory_pass()
  ours = {b: Ours(model, params, b) for b in batches}  # before PyTorch comes into the same process
  peer = load_peer(size, params, dtype) if _PEER.value else None
  out = measure.surroundings(("jax", "jaxlib", "flax")) | {
    "size": _SIZE.value, "parameters": measure.size_of(params), "weight_bytes": measure.bytes_of(params),
    "dtype": dtype, "decoding": settings().method, "beams": _BEAMS.value,
    "prompt": _PROMPT.value, "new_tokens": _NEW.value,
  }
  if peer is not None:
    import torch
    import transformers
    out["versions"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
    out["transformers_attention"] = peer.config._attn_implementation
  moves = [measure.timed(move) for _ in range(3)]
  times = {b: in_turn(ours[b], peer, lambda: moves.append(measure.timed(move))) for b in batches}
  bandwidth = moved / min(moves)
  out |= {"device_bytes_per_second": bandwidth, "device_bandwidth": limit}
  for b in batches:
    out[f"at_{b}"] = ours[b].metadata | rates(times[b], b, step_bytes(params, size, b, dtype), bandwidth)
  measure.show(out)


def settings() -> Decoding:
  """Returns how tokens are chosen."""
  return Decoding() if _BEAMS.value == 1 else Decoding("beam", beams=_BEAMS.value)


class _Read:
  """A GPTJ whose pass through the prompts is done: for it, `generate` does nothing but write."""

  def __init__(self, model: GPTJ, hidden: jax.Array, cache: Cache):
    self.size, self.compute = model.size, model.compute
    self._model, self._first = model, (hidden, cache)

  def apply(self, variables, *inputs, method=None):
    if method is None and isinstance(inputs[3].next, int):  # the one cache that is empty before tracing
      return self._first
    return self._model.apply(variables, *inputs, method=method)


class Ours:
  """`generate` for a batch of B prompts, compiled and run once: `metadata` says what that took."""

  def __init__(self, model: GPTJ, params: dict, B: int):
    P, N = _PROMPT.value, _NEW.value
    tokens = jax.random.randint(jax.random.key(1), (B, P), 0, model.size.vocab)
    self.x = model.apply({"params": params}, tokens, method="embed")  # [B, P, D]
    positions = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[None], (B, P))
    rest = positions, jnp.ones((B, P), bool)

    def write(model, params, x, *rest):
      return generate.generate(model, params, x, *rest, max_new_tokens=N, eos=_NO_END, settings=settings())

    def read(params, x, *rest):
      cache = empty_cache(model.size, B, P + N - 1, model.compute.dtype)
      return model.apply({"params": params}, x, *rest, cache)

    def go_on(first, params, x, *rest):
      return write(_Read(model, *first), params, x, *rest)

    inputs = params, self.x, *rest
    whole, seconds = measure.compiled(lambda *a: write(model, *a), *inputs)
    self.whole = lambda: whole(*inputs)
    self.tokens = np.asarray(self.whole().tokens)
    memory = whole.memory_analysis()
    self.metadata = {"compile_seconds": seconds, "peak_memory_bytes": measure.peak_memory(),
                  "temporary_bytes": memory.temp_size_in_bytes if memory else None}
    prefill, _ = measure.compiled(read, *inputs)
    decode, _ = measure.compiled(go_on, prefill(*inputs), *inputs)
    self.prefill = lambda: prefill(*inputs)
    self.decode = lambda first: decode(first, *inputs)
    self.metadata["rows_decoded_otherwise"] = unlike(self.decode(self.prefill()).tokens, self.tokens)


def unlike(a: Any, b: Any) -> int:
  """Returns in how many rows [B, N] two arrays of tokens differ."""
  return int((np.asarray(a) != np.asarray(b)).any(1).sum())


def load_peer(size: GPTJSize, params: dict, dtype: str) -> Any:
  """Returns transformers' model of these weights; None, with a line on stderr, where it cannot be."""
  if (transformers := measure.import_peer("transformers")) is None:
    return None
  import torch
  transformers.utils.logging.disable_progress_bar()
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "lm")
    export.save_lm(path, size, params, dtype=dtype)
    model = transformers.GPTJForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    try:
      model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    except torch.OutOfMemoryError:
      measure.no_peer("transformers", "no memory for its weights beside ours; XLA_PYTHON_CLIENT_PREALLOCATE=false "
                      "leaves it what we do not use")
      return None
  model.generation_config.eos_token_id = None
  return model


def run_peer(model: Any, x: np.ndarray) -> tuple[np.ndarray, float, float]:
  """Returns (tokens [B, N], the seconds of all, the seconds after the first token) by transformers."""
  import torch

  stamps = []

  def stamp(tokens, scores, **_):
    if tokens.is_cuda:
      torch.cuda.synchronize()
    stamps.append(time.perf_counter())
    return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

  x = torch.from_numpy(x).to(model.device, model.dtype)  # [B, P, D]
  start = time.perf_counter()
  with torch.inference_mode():
    tokens = model.generate(
      inputs_embeds=x, attention_mask=torch.ones(x.shape[:2], dtype=torch.long, device=model.device), do_sample=False,
      max_new_tokens=_NEW.value, num_beams=_BEAMS.value, pad_token_id=0, stopping_criteria=[stamp]).cpu().numpy()
  end = time.perf_counter()
  if tokens.shape != (len(x), _NEW.value):
    raise RuntimeError(f"transformers wrote {tokens.shape}, wanted {(len(x), _NEW.value)}")
  return tokens, end - start, end - stamps[0]


def in_turn(ours: Ours, peer: Any, between: Callable[[], None]) -> dict[str, Any]:
  """Returns the seconds of every run by what was run; "unlike": rows that differ from the peer's; "threads": of it."""
  out: dict[str, Any] = {"whole": [], "prefill": [], "decode": [], "peer": [], "peer_decode": [], "unlike": []}
  x = np.array(ours.x.astype(jnp.float32))  # a copy: torch wants arrays that may be written
  if peer is not None:
    out["threads"] = measure.choose_threads(lambda: run_peer(peer, x))
  for _ in range(_REPEATS.value):
    out["whole"].append(measure.timed(ours.whole))
    if peer is not None:
      tokens, whole, decode = run_peer(peer, x)
      out["peer"].append(whole)
      out["peer_decode"].append(decode)
      out["unlike"].append(unlike(tokens, ours.tokens))
    start = time.perf_counter()
    first = jax.block_until_ready(ours.prefill())
    out["prefill"].append(time.perf_counter() - start)
    out["decode"].append(measure.timed(lambda first=first: ours.decode(first)))
    between()
  return out


def step_bytes(params: dict, size: GPTJSize, B: int, dtype: str) -> int:
  """Returns the bytes that a step of decoding must read."""
  rows, width = B * _BEAMS.value, jnp.dtype(dtype).itemsize
  weights = measure.bytes_of(params) - (size.vocab - rows) * size.width * width
  slots = _PROMPT.value + (_NEW.value - 2) / 2  # of the N - 1 steps, the t-th finds P + t tokens
  return int(weights + 2 * size.layers * rows * slots * size.width * width)


def rates(times: dict[str, Any], B: int, bytes_of_step: int, bandwidth: float) -> dict[str, Any]:
  """Returns the times and rates of B prompts."""
  N = _NEW.value
  whole, step = statistics.median(times["whole"]), statistics.median(times["decode"]) / (N - 1)
  out = {
    "tokens_per_second": B * N / whole, "seconds": whole, "prefill_seconds": statistics.median(times["prefill"]),
    "decode_seconds_per_token": step, "decode_tokens_per_second": B / step,
    "bytes_per_token": bytes_of_step / B, "bytes_per_step": bytes_of_step,
    "share_of_bandwidth": bytes_of_step / step / bandwidth,
  }
  if not times["peer"]:
    return out
  speed, each = measure.ratios(times["peer"], times["whole"])
  decode, each_decode = measure.ratios(times["peer_decode"], times["decode"])
  return out | {
    "transformers_tokens_per_second": B * N / statistics.median(times["peer"]),
    "transformers_decode_seconds_per_token": statistics.median(times["peer_decode"]) / (N - 1),
    "speed_against_transformers": speed, "speed_of_each_pair": each,
    "decode_speed_against_transformers": decode, "decode_speed_of_each_pair": each_decode,
    "transformers_threads": times["threads"], "rows_with_other_tokens": max(times["unlike"]),
  }
