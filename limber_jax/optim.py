"""The optimizer and its schedule. Source: CLIP (arXiv 2103.00020), section 2.5 and Tables 18-20."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from limber_jax.config import Optim
from limber_jax.errors import UserError
from limber_jax.parallel import path_name

DECAYED = ("kernel", "embedding", "position")  # the last word of a parameter's path; the rest are gains and biases


def schedule(config: Optim, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates made.

  Linear from lr/warmup_steps (the first update is not lost to a rate of 0) to lr, then half a cosine to 0 at `steps`.

  Raises:
    UserError: the warm-up is as long as the run, or the settings are out of range.
  """
  if not 0 <= config.warmup_steps < steps:
    raise UserError(f"config.optim.warmup_steps={config.warmup_steps} must be at least 0 and less than "
                    f"config.steps={steps}")
  if config.lr <= 0:
    raise UserError(f"config.optim.lr={config.lr} must be more than 0")

  def lr(count):
    count = jnp.asarray(count, jnp.float32)
    warm = (count + 1) / max(config.warmup_steps, 1)
    done = (count - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * jnp.where(count < config.warmup_steps, warm, 0.5 * (1 + jnp.cos(jnp.pi * done)))

  return lr


def decay_mask(params: Any) -> Any:
  """Returns a tree of bools, True for what weight decay applies to: kernels and embeddings, not gains and biases."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).split("/")[-1] in DECAYED, params)


def make(config: Optim, steps: int) -> optax.GradientTransformation:
  """Returns AdamW with the schedule of `config`, decoupled decay by `decay_mask`, and clipping by global norm."""
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  return optax.chain(*clip, optax.adamw(schedule(config, steps), config.b1, config.b2, config.eps,
                                        weight_decay=config.weight_decay, mask=decay_mask))
