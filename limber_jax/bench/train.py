"""`bench train`: one optimizer step of an experiment on random pairs, beside open_clip's on the same device.

The two steps are timed in turn, JAX, PyTorch, JAX, PyTorch …, so that a machine that slows down slows both; the ratio
is the median of the pairs'. Input is the same for both: a batch that already lies on the host. Model FLOPs are three
times the forward pass's (twice for the backward pass, nothing for recomputation), counted in the traced program.
"""

import importlib.metadata
import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from limber_jax import cli, optim, parallel, registry
from limber_jax.config import Config
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip
from limber_jax.state import TrainState, split
from limber_jax.tasks.step import make_step
from limber_jax.weights import export

_CONFIG = cli.define_config()
_BATCH = flags.DEFINE_integer("batch_size", 0, "Pairs a step; 0: 16 on a CPU, else 256 a device.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each, after two that warm up.")
_DTYPE = flags.DEFINE_string("dtype", "", "Of activations; empty: float32 on a CPU, else bfloat16.")
_PEER = flags.DEFINE_bool("peer", True, "Time open_clip's step too, if it is installed and has these towers.")
_KEPT: list[Any] = []  # torch forgets a library's operators with the library
_SIZE = flags.DEFINE_string("size", "", "Another size than the experiment's: a name, or mu for its smallest build.")


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench train: unexpected argument {argv[0]!r}")
  config = cli.get_config(_CONFIG)
  cpu = jax.default_backend() == "cpu"
  if _SIZE.value:
    if _SIZE.value != "mu" and _SIZE.value not in clip.SIZES:
      raise UserError(f"--size: no size {_SIZE.value!r}{did_you_mean(_SIZE.value, ['mu', *clip.SIZES])}")
    config.model = clip.mu(config.model) if _SIZE.value == "mu" else clip.SIZES[_SIZE.value]()
  config.batch_size = _BATCH.value or (16 if cpu else 256 * jax.device_count())
  config.compute.dtype = _DTYPE.value or ("float32" if cpu else "bfloat16")
  if _REPEATS.value < 1:
    raise UserError(f"--repeats={_REPEATS.value}: at least 1")
  batch = random_batch(config)
  limit = matmul_limit(config.compute.dtype)
  ours, facts = jax_step(config, batch)
  theirs = torch_step(config, batch) if _PEER.value else None
  for step in filter(None, (ours, theirs)):
    step(), step()  # the first compiles, or builds its caches
  seconds: list[tuple[float, float]] = []
  for _ in range(_REPEATS.value):
    seconds.append((_timed(ours), _timed(theirs) if theirs else math.nan))
  step_time = statistics.median(s[0] for s in seconds)
  flops = 3 * forward_flops(config) * config.batch_size
  out = {
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}", "cores": os.cpu_count(),
    "config": config.name, "dtype": config.compute.dtype, "remat": config.compute.remat,
    "batch": config.batch_size, "accumulate": config.loss.accumulate,
    "examples_per_second": config.batch_size / step_time, "step_seconds": step_time,
    **facts, "peak_memory_bytes": _peak_memory(), "model_flops_per_second": flops / step_time,
    "device_peak_flops_per_second": limit, "device_peak": f"{config.compute.dtype} matrix product measured in this run",
    "share_of_peak": flops / step_time / limit,
    "versions": {n: importlib.metadata.version(n) for n in ("jax", "flax", "optax")},
  }
  if theirs:
    import open_clip
    import torch
    out |= {"open_clip_step_seconds": statistics.median(s[1] for s in seconds),
            "speed_against_open_clip": statistics.median(b / a for a, b in seconds),
            "speed_of_each_pair": [b / a for a, b in seconds]}
    out["versions"] |= {"torch": torch.__version__, "open_clip": open_clip.__version__}
  print(json.dumps({k: _short(v) for k, v in out.items()}, indent=1))


def random_batch(config: Config) -> dict[str, np.ndarray]:
  """Returns a batch {"image": uint8 [N, H, W, 3], "tokens": int32 [N, T]} whose texts end at random places."""
  rng = np.random.default_rng(0)
  side, text, n = config.model.image.image_size, config.model.text, config.batch_size
  tokens = rng.integers(1, text.vocab - 1, (n, text.context), dtype=np.int32)
  tokens[np.arange(n), rng.integers(1, text.context, n)] = text.vocab - 1
  return {"image": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), "tokens": tokens}


def jax_step(config: Config, batch: dict[str, np.ndarray]) -> tuple[Callable[[], None], dict[str, Any]]:
  """Returns (a function that makes one step and waits for it, {"compile_seconds", "parameters"})."""
  mesh = parallel.make_mesh(vars(config.mesh))
  parallel.local_rows(config.batch_size, mesh)
  task = registry.lookup("task", registry.TASKS, config.task).of(config)
  tx = optim.make(config.optim, config.steps)
  rng = jax.random.key(config.seed)

  def create(rng):
    params, stats = task.init(rng)
    trained, frozen = split(params, config.trainable)
    return TrainState.create(trained, stats, tx), frozen

  layout = parallel.shardings(jax.eval_shape(create, rng), task.sharding, mesh)
  with jax.set_mesh(mesh):
    state, frozen = jax.jit(create, out_shardings=layout)(rng)
    step = jax.jit(make_step(task, tx, optim.schedule(config.optim, config.steps)), donate_argnums=0,
                   out_shardings=(layout[0], parallel.replicated(mesh)),
                   compiler_options=parallel.compiler_options())
    start = time.perf_counter()
    compiled = step.lower(state, frozen, parallel.global_batch(batch, mesh), rng).compile()
  facts = {"compile_seconds": time.perf_counter() - start,
           "parameters": sum(x.size for x in jax.tree.leaves((state.params, frozen)))}

  def run():
    nonlocal state
    state, metrics = compiled(state, frozen, parallel.global_batch(batch, mesh), rng)
    if not math.isfinite(float(metrics["loss"])):
      raise RuntimeError(f"the loss of the step is {float(metrics['loss'])}")

  return run, facts


def torch_step(config: Config, batch: dict[str, np.ndarray]) -> Callable[[], None] | None:
  """Returns the same for open_clip's model, ClipLoss and AdamW; None, with a line on stderr, where it cannot be."""
  if config.loss.kind != "softmax" or config.loss.accumulate > 1 or len(config.trainable) < 3:
    print("open_clip: not timed; it has no step like this one", file=sys.stderr)
    return None
  try:
    import torch
    # torchvision's CUDA build dies at import beside a torch for CPUs unless these operators are declared.
    if not torch.cuda.is_available() and not hasattr(torch.ops.torchvision, "nms"):
      _KEPT.append(library := torch.library.Library("torchvision", "DEF"))
      library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
      library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip
  except (ImportError, RuntimeError) as error:  # a torchvision that does not fit its torch raises RuntimeError
    print(f"open_clip: not timed ({' '.join(str(error).split())[:200]}); pip install -e '.[test]' brings it",
          file=sys.stderr)
    return None
  device = "cuda" if torch.cuda.is_available() else "cpu"
  model = open_clip.model.CLIP(**export.open_clip_config(config.model)).to(device).train()
  if device == "cuda":
    model = torch.compile(model)
  o = config.optim
  decayed = [p for n, p in model.named_parameters() if p.ndim >= 2]
  plain = [p for n, p in model.named_parameters() if p.ndim < 2]
  tx = torch.optim.AdamW([{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}],
                         lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, foreach=True)
  loss_fn = open_clip.ClipLoss()
  dtype = getattr(torch, config.compute.dtype)
  mean, std = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (config.model.mean, config.model.std))

  def run():
    images = torch.from_numpy(batch["image"]).to(device, non_blocking=True).permute(0, 3, 1, 2)
    tokens = torch.from_numpy(batch["tokens"]).to(device, non_blocking=True).long()
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
      loss = loss_fn(*model((images.float() / 255 - mean) / std, tokens)[:3])
    tx.zero_grad()
    loss.backward()
    tx.step()
    with torch.no_grad():
      model.logit_scale.clamp_(0, math.log(100))
    if not math.isfinite(loss.item()):
      raise RuntimeError(f"the loss of open_clip's step is {loss.item()}")

  return run


def forward_flops(config: Config) -> int:
  """Returns the floating-point operations of matrix products and convolutions of one pair's forward pass."""
  model = clip.build(config.model, config.compute)
  image, text = (jax.eval_shape(init, jax.random.key(0)) for init in (model.init_image, model.init_text))
  side = config.model.image.image_size

  def forward(image, text, pixels, tokens):
    features, _ = model.encode_image(image["params"], image.get("batch_stats", {}), pixels)
    return features.pooled, model.encode_text(text["params"], tokens).pooled

  return count_flops(jax.make_jaxpr(forward)(image, text, jnp.zeros((1, side, side, 3)),
                                             jnp.zeros((1, config.model.text.context), jnp.int32)).jaxpr)


def count_flops(jaxpr: Any) -> int:
  """Returns twice the multiplications of every matrix product and convolution in a jaxpr, loops counted out.

  XLA's own cost analysis counts the body of a loop once.
  """
  total = 0
  for eqn in jaxpr.eqns:
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += 2 * out.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    elif name == "conv_general_dilated":
      kernel = eqn.invars[1].aval
      features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
      total += 2 * out.size * kernel.size // features
    else:
      times = eqn.params["length"] if name == "scan" else 1
      for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          total += times * count_flops(inner)
  return total


def matmul_limit(dtype: str, size: int = 0) -> float:
  """Returns the FLOP/s of the largest square matrix product that is quick to time here, over all devices."""
  size = size or (2048 if jax.default_backend() == "cpu" else 8192)
  a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  best = min(_timed(lambda: product(a).block_until_ready()) for _ in range(5))
  return 2 * size**3 / best * (1 if jax.default_backend() == "cpu" else jax.device_count())


def _timed(function: Callable[[], Any]) -> float:
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def _peak_memory() -> int:
  """Returns the most bytes in use on a device, or, on a CPU, by this process with everything in it."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _short(value: Any) -> Any:
  if isinstance(value, list):
    return [_short(v) for v in value]
  return float(f"{value:.4g}") if isinstance(value, float) else value
