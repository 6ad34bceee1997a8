"""`bench train`: one optimizer step of an experiment on a random batch, beside open_clip's on the same device.

The two steps are timed in turn, JAX, PyTorch, JAX, PyTorch …, so that a machine that slows down slows both; the ratio
is the median of the pairs'. On a CPU PyTorch gets one thread where that is faster. Input is the same for both: a batch
that already lies on the host. Weights are random, and what is not trained is held in the precision of activations, as
in a run.

Model FLOPs are those of `training.flops`.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from limber_jax import cli, registry
from limber_jax.bench import measure
from limber_jax.checkpoints.state import Frozen, check_trainable
from limber_jax.config import Config
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip, encoders, gptj
from limber_jax.models.limber import Limber, LimberConfig
from limber_jax.runtime import parallel
from limber_jax.tasks.base import Task
from limber_jax.training import optimizer
from limber_jax.training.flops import model_flops
from limber_jax.training.setup import example_row
from limber_jax.training.train_step import make_init, make_step
from limber_jax.weights import export

_CONFIG = cli.define_config()
_BATCH = flags.DEFINE_integer("batch_size", 0, "Rows a step; 0: 16 on a CPU, else 256 a device.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each, after two that warm up.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "", ["", "float32", "bfloat16"],
                           "Of activations; empty: float32 on a CPU, else bfloat16.")
_PEER = flags.DEFINE_bool("peer", True, "Time open_clip's step too, if it is installed and has one like this.")
_SIZE = flags.DEFINE_string("size", "", "Another size than the experiment's: a name, or mu for its smallest build.")


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench train: unexpected argument {argv[0]!r}")
  config = cli.get_config(_CONFIG)
  cpu = jax.default_backend() == "cpu"
  if _SIZE.value:
    resize(config, _SIZE.value)
  config.batch_size = _BATCH.value or (16 if cpu else 256 * jax.device_count())
  config.compute.dtype = _DTYPE.value or ("float32" if cpu else "bfloat16")

  task = task_of(config)
  batch = random_batch(task, config)
  ours, facts = jax_step(task, config, batch)
  ours(), ours()
  facts["peak_memory_bytes"] = measure.peak_memory()  # before PyTorch comes into the same process
  theirs = torch_step(config, batch) if _PEER.value else None
  product, product_flops, peak = measure.matrix_product(config.compute.dtype)
  runs = [run for run in (ours, theirs, product) if run]
  product(), product()
  threads = measure.choose_threads(theirs) if theirs else 0
  seconds = list(zip(*([measure.timed(run) for run in runs] for _ in range(_REPEATS.value)), strict=True))
  step_time = statistics.median(seconds[0])
  limit = product_flops / min(seconds[-1]) * (1 if cpu else jax.device_count())
  forward, flops = model_flops(config, batch)
  out = measure.surroundings(("jax", "flax", "optax")) | {
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    "config": config.name, "task": config.task, "dtype": config.compute.dtype, "remat": config.compute.remat,
    "batch": config.batch_size, "num_microbatches": config.loss.num_microbatches,
    "shapes": {name: list(x.shape) for name, x in batch.items()}, "trainable": list(config.trainable),
    "examples_per_second": config.batch_size / step_time, "step_seconds": step_time,
    **facts,
    "model_flops": flops, "model_flops_over_forward": flops / forward, "model_flops_per_second": flops / step_time,
    "device_peak_flops_per_second": limit, "device_peak": peak, "share_of_peak": flops / step_time / limit,
  }
  if theirs:
    import open_clip
    import torch
    ratio, each = measure.ratios(seconds[1], seconds[0])
    out |= {"open_clip_step_seconds": statistics.median(seconds[1]), "open_clip_threads": threads,
            "speed_against_open_clip": ratio, "speed_of_each_pair": each}
    out["versions"] |= {"torch": torch.__version__, "open_clip": open_clip.__version__}
  measure.show(out)


def resize(config: Config, name: str) -> None:
  """Puts a model of another size into `config`: "mu" for the smallest of the same build, or a name that its task has.

  Raises:
    UserError: no such size; the message gives those there are.
  """
  named = {"contrastive": clip.SIZES, "language_modelling": gptj.SIZES}.get(config.task, {})
  if name != "mu" and name not in named:
    raise UserError(f"--size: no size {name!r} for task {config.task!r}{did_you_mean(name, ['mu', *named])}")
  if name != "mu":
    config.model = named[name]()
  elif config.task == "contrastive":
    config.model = clip.mu(config.model)
  elif config.task == "language_modelling":
    config.model = gptj.SIZES["gptj_mu"]()
  else:
    config.model = limber_mu(config.model)
  if config.task != "contrastive":  # the text must fit into a smaller context
    free = config.model.context if config.task == "language_modelling" else text_room(config)
    config.data = dataclasses.replace(config.data, length=min(config.data.length, free))


def limber_mu(size: LimberConfig) -> LimberConfig:
  """Returns the smallest LiMBeR of the same build: its maps, between the smallest encoders and language model."""
  extra = {name: dataclasses.replace(p, image=p.image and encoders.mu(p.image))
           for name, p in size.extra_projectors.items()}
  return dataclasses.replace(size, image=encoders.mu(size.image), lm=gptj.SIZES["gptj_mu"](),
                             extra_projectors=extra)


def text_room(config: Config) -> int:
  """Returns the tokens that the language model's context leaves beside the longest prompt, at least 1."""
  model = Limber.from_config(config.model, config.compute)
  return max(1, config.model.lm.context - max(map(model.prefix_length, model.maps)))


def task_of(config: Config) -> Task:
  """Returns the task of an experiment; raises UserError if its settings cannot go together."""
  return registry.lookup("task", registry.TASKS, config.task).from_config(config)


def random_batch(task: Task, config: Config) -> dict[str, np.ndarray]:
  """Returns a batch as the task's own transform makes its rows: noise, and texts that end at random places.

  Pixels are anything; tokens too, up to the highest id, which is the end of a text, and stands nowhere before it.
  """
  row = example_row(task, config)
  rng, n = np.random.default_rng(0), config.batch_size
  length = row["tokens"].shape[0]
  end = rng.integers(min(1, length - 1), length, n)  # where it stands
  tokens = rng.integers(1, task.vocab - 1, (n, length), dtype=np.int32)
  tokens[np.arange(n), end] = task.vocab - 1

  def draw(name, like):
    shape = (n, *like.shape)
    if name in ("tokens", "mask"):
      return tokens if name == "tokens" else np.arange(length)[None] <= end[:, None]
    if like.dtype == np.uint8:
      return rng.integers(0, 256, shape, np.uint8)
    return rng.normal(size=shape).astype(like.dtype)

  return {name: draw(name, like) for name, like in row.items()}


def jax_step(task: Task, config: Config, batch: dict[str, np.ndarray]) -> tuple[Callable[[], None], dict[str, Any]]:
  """Returns (a function that makes one step and waits for it, {"compile_seconds", "parameters", …_bytes})."""
  mesh = parallel.make_mesh(vars(config.mesh))
  parallel.local_rows(config.batch_size, mesh)
  check_trainable(config.trainable, jax.eval_shape(task.init, jax.random.key(0))[0])
  tx = optimizer.make(config.optim, config.steps)
  rng = jax.random.key(config.seed)
  init = make_init(task, tx, config.trainable)

  def create(rng):
    state, frozen = init(rng)
    cast = jax.tree.map(lambda x: x.astype(config.compute.dtype) if x.ndim else x, frozen.params)
    return state, Frozen(cast, frozen.stats)

  layout = parallel.shardings(jax.eval_shape(create, rng), task.sharding, mesh)
  with jax.set_mesh(mesh):
    state, frozen = jax.jit(create, out_shardings=layout)(rng)
    compiled, seconds = measure.compiled(
      make_step(task, tx, optimizer.schedule(config.optim, config.steps)), state, frozen,
      parallel.global_batch(batch, mesh), rng, donate_argnums=0,
      out_shardings=(layout[0], parallel.replicated(mesh)), compiler_options=parallel.compiler_options(mesh))
  facts = {
    "compile_seconds": seconds,
    "parameters": measure.size_of((state.params, frozen.params)), "trained_parameters": measure.size_of(state.params),
    "frozen_bytes": measure.bytes_of(frozen), "optimizer_bytes": measure.bytes_of(state.opt_state),
  }

  def run():
    nonlocal state
    state, metrics = compiled(state, frozen, parallel.global_batch(batch, mesh), rng)
    if not math.isfinite(float(metrics["loss"])):
      raise RuntimeError(f"the loss of the step is {float(metrics['loss'])}")

  return run, facts


def torch_step(config: Config, batch: dict[str, np.ndarray]) -> Callable[[], None] | None:
  """Returns the same for open_clip's model, ClipLoss and AdamW; None, with a line on stderr, where it cannot be."""
  same = config.task == "contrastive" and config.loss.kind == "softmax" and config.loss.num_microbatches == 1
  if not same or set(config.trainable) != {"image", "text", "logit_scale"}:
    measure.no_peer("open_clip", "it has no step like this one")
    return None
  if (open_clip := measure.import_peer("open_clip")) is None:
    return None
  import torch
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
