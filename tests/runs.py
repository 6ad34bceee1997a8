"""Tiny experiments for the tests of training: mu towers, digits, bytes."""

import functools
import json
import os
import resource
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.checkpoints.state import SHARDING, TrainState
from limber_jax.config import Checkpoint, Compute, Config, Data, Decoding, Mesh, Optim, Source, Tokenizer
from limber_jax.config_json import from_json, to_json
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.models import clip, encoders
from limber_jax.models.gptj import GPTJSize
from limber_jax.models.limber import LimberConfig, Projector, ProjectorConfig
from limber_jax.runtime import parallel
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training import optimizer
from limber_jax.training.setup import setup
from limber_jax.training.train_step import make_init, make_step


def tiny(size: str = "clip_vit_b32_mu", *, mesh: tuple[int, int, int] = (1, 1, 1), **changes: Any) -> Config:
  """Returns an experiment of a few steps; `changes` replace fields of Config."""
  defaults = {
    "name": "tiny", "model": clip.SIZES[size](), "batch_size": 16, "steps": 6, "log_every": 1,
    "data": Data(source=Source(name="digits"), tokenizer=Tokenizer(name="bytes"), crop="random", threads=2),
    "optim": Optim(lr=1e-3, warmup_steps=2, clip_norm=1.0), "compute": Compute(dtype="float32"),
    "mesh": Mesh(*mesh), "checkpoint": Checkpoint(every=100, keep=100)}
  return Config(**(defaults | changes))


def tiny_limber(**changes: Any) -> Config:
  """Returns an experiment of captioning, three steps between random frozen models; `changes` replace fields of it."""
  image = encoders.encoder_size("clip_vit_b32_mu")
  model = LimberConfig(image=image, lm=GPTJSize(vocab=259, context=160, width=64, layers=2, heads=2, rotary=16),
                     extra_projectors={"other": Projector(image, ProjectorConfig(per_feature=2))})
  defaults = {
    "name": "tiny_limber", "task": "captioning", "model": model, "trainable": ("prompt", "prompt@other"), "steps": 3,
    "mesh": (-1, 1, 1), "data": Data(source=Source(name="digits"), tokenizer=Tokenizer(name="bytes"), threads=2),
    "decoding": Decoding(prompt="a b", max_new_tokens=8), "optim": Optim(lr=1e-2, warmup_steps=1, weight_decay=0.0)}
  return tiny(**(defaults | changes))


def untrained(config: Config, workdir: str) -> None:
  """Makes the workdir of a run whose checkpoint is of before the first step."""
  s = setup(config)
  checkpoints = Checkpoints(workdir, config.checkpoint, write=True)
  checkpoints.save(s.init(), {"frozen": s.digests})
  checkpoints.close()
  with open(os.path.join(workdir, "config.json"), "w", encoding="utf-8") as file:
    file.write(to_json(config))


def pictures(folder: Any, count: int) -> list[str]:
  """Writes images of random blocks into a folder and returns their paths."""
  paths = []
  for i in range(count):
    blocks = np.random.default_rng(i).integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255
    paths.append(str(folder / f"{i:02}.png"))
    Image.fromarray(blocks.repeat(5, 0).repeat(5 + i % 3, 1)).save(paths[-1])
  return paths


def environment(devices: int = 1, processes: int = 1, index: int = 0, port: int = 0) -> dict[str, str]:
  """Returns the environment of a command on simulated devices, one of several processes if there are more.

  Its programs are compiled once, into the cache of all tests.
  """
  env = os.environ | {
    "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1",
    "JAX_COMPILATION_CACHE_DIR": os.environ["LIMBER_TEST_CACHE"], "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
  if processes > 1:
    env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index)}
  return env


def resident() -> int:
  """Returns the bytes of memory that this process holds."""
  with open("/proc/self/statm", encoding="ascii") as file:
    return int(file.read().split()[1]) * resource.getpagesize()


def zeroshot(every: int = 2) -> dict[str, ZeroShot]:
  """Returns one evaluation on held-out digits."""
  return {"zeroshot": ZeroShot(source=Source(name="digits", split="test"), every=every, batch_size=64)}


def losses(workdir: Any, torn: bool = False) -> dict[int, str]:
  """Returns the loss of each step in metrics.jsonl, exactly; a kill may have torn the last line."""
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    records = [json.loads(line) for line in file if line.endswith("\n") or not torn]
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


def run(config: Config, data: list[dict[str, np.ndarray]], task: type[Contrastive] = Contrastive,
        start: TrainState | None = None) -> tuple[list[dict[str, float]], list[TrainState]]:
  """Returns (metrics, states) after each batch of `data`, on the mesh of `config` over the first devices.

  The state before it is `start`, or a fresh one.
  """
  mesh, step, shardings, first, frozen = _program(task, to_json(config), optimizer.make)
  state = jax.device_put(first if start is None else start, shardings)
  rng, metrics, states = jax.random.key(0), [], []
  with jax.set_mesh(mesh):
    for batch in data:
      state, values = step(state, frozen, parallel.global_batch(batch, mesh), rng)
      metrics.append({k: float(v) for k, v in values.items()})
      states.append(jax.device_get(state))
  return metrics, states


@functools.lru_cache(maxsize=8)  # most tests run the same twice or more, and tracing takes longer than the steps
def _program(task: type[Contrastive], config: str, make: Callable[..., Any]) -> tuple[Any, ...]:
  """Returns (mesh, jitted step, shardings of the state, first state, frozen parts) of a configuration's JSON."""
  config = from_json(config, "a test's configuration")
  sizes = vars(config.mesh)
  mesh = parallel.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
  task = task.from_config(config)
  tx = make(config.optim, config.steps)
  # Drawn on one device and then spread: drawing takes longer to compile than a step, and so is compiled only once.
  state, frozen = jax.jit(make_init(task, tx, config.trainable, config.optim.spike.window))(jax.random.key(0))
  shardings = parallel.shardings(state, (*SHARDING, *task.sharding), mesh)
  step = jax.jit(make_step(task, tx, optimizer.schedule(config.optim, config.steps), config.optim.spike),
                 out_shardings=(shardings, parallel.replicated(mesh)), compiler_options=parallel.compiler_options(mesh))
  return mesh, step, shardings, jax.device_get(state), frozen
