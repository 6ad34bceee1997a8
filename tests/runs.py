"""Tiny experiments for the tests of training: mu towers, digits, bytes."""

import json
import os
from typing import Any

import jax
import numpy as np

from limber_jax import optim, parallel
from limber_jax.config import Checkpoint, Compute, Config, Data, Evaluation, Mesh, Optim, Source, Tokenizer
from limber_jax.models import clip
from limber_jax.state import TrainState, split
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.tasks.step import make_step


def tiny(size: str = "clip_vit_b32_mu", *, mesh: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> Config:
  """Returns an experiment of a few steps; `changes` replace fields of Config."""
  defaults = {
    "name": "tiny", "model": clip.SIZES[size](), "batch_size": 16, "steps": 6, "log_every": 1,
    "data": Data(source=Source(name="digits"), tokenizer=Tokenizer(name="bytes"), crop="random", threads=2),
    "optim": Optim(lr=1e-3, warmup_steps=2, clip_norm=1.0), "compute": Compute(dtype="float32"),
    "mesh": Mesh(*mesh), "checkpoint": Checkpoint(every=100, keep=100)}
  return Config(**(defaults | changes))


def zeroshot(every: int = 2) -> dict[str, Evaluation]:
  """Returns one evaluation on held-out digits."""
  return {"zeroshot": Evaluation(source=Source(name="digits", split="test"), every=every, batch_size=64)}


def losses(workdir: str) -> dict[int, str]:
  """Returns the loss of each step in metrics.jsonl, exactly."""
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  return {r["step"]: float(r["loss"]).hex() for r in records if "lr" in r}


def batches(config: Config, count: int) -> list[dict[str, np.ndarray]]:
  """Returns `count` random batches; `poison` is where a test may put a NaN."""
  rng = np.random.default_rng(0)
  side, text, n = config.model.image.image_size, config.model.text, config.batch_size
  out = []
  for _ in range(count):
    tokens = rng.integers(1, text.vocab - 1, (n, text.context), dtype=np.int32)
    ends = rng.integers(4, text.context, n)
    tokens[np.arange(n), ends] = text.vocab - 1
    out.append({"image": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8), "tokens": tokens,
                "poison": np.zeros(n, np.float32)})
  return out


class Poisoned(Contrastive):
  """The contrastive task, with `poison` added to the loss of a batch."""

  def loss(self, params, stats, batch, rng):
    loss, rest = super().loss(params, stats, batch, rng)
    return loss + batch["poison"].mean(), rest


def run(config: Config, data: list[dict[str, np.ndarray]], task: type[Contrastive] = Contrastive
        ) -> tuple[list[dict[str, float]], list[TrainState]]:
  """Returns (metrics, states) after each batch of `data`, on the mesh of `config` over the first devices."""
  sizes = vars(config.mesh)
  mesh = parallel.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
  task = task.of(config)
  tx = optim.make(config.optim, config.steps)
  rng = jax.random.key(0)

  def create(rng):
    params, stats = task.init(rng)
    trained, frozen = split(params, config.trainable)
    return TrainState.create(trained, stats, tx), frozen

  # Drawn on one device and then spread: drawing takes longer to compile than a step, and so is compiled only once.
  state, frozen = jax.jit(create)(rng)
  shardings = parallel.shardings(state, task.sharding, mesh)
  state = jax.device_put(state, shardings)
  metrics, states = [], []
  with jax.set_mesh(mesh):
    step = jax.jit(make_step(task, tx, optim.schedule(config.optim, config.steps)),
                   out_shardings=(shardings, parallel.replicated(mesh)), compiler_options=parallel.compiler_options())
    for batch in data:
      state, values = step(state, frozen, parallel.global_batch(batch, mesh), rng)
      metrics.append({k: float(v) for k, v in values.items()})
      states.append(jax.device_get(state))
  return metrics, states
