"""The optimizer and its schedules. Source: CLIP (arXiv 2103.00020), section 2.5 and Tables 18-20; LiMBeR (2209.15162).

A part "prompt@name" belongs to an extra projector, which is trained as if it were alone: it is clipped apart.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from limber_jax import ranges
from limber_jax.config import Optim
from limber_jax.errors import UserError
from limber_jax.map_names import by_map, join
from limber_jax.runtime.parallel import path_name

DECAYED = ("kernel", "embedding", "position")  # the last word of a parameter's path; the rest are gains and biases


def schedule(config: Optim, steps: int) -> optax.Schedule:
  """Returns the learning rate as a function of the number of updates made.

  cosine: linear from lr/warmup_steps (the first update is not lost to a rate of 0) to lr, then half a cosine to 0 at
    `steps`.
  linear: the same, but straight to 0.
  deepspeed: lr · ln(n + 1) / ln(warmup_steps), from 0, then straight to 0. It is DeepSpeed 0.6's WarmupDecayLR, which
    LiMBeR's code ran with, though its configuration speaks of another.

  Raises:
    UserError: the warm-up is as long as the run, or the settings are out of range.
  """
  ranges.check(config, "config.optim.")
  if config.warmup_steps >= steps:
    raise UserError(f"config.optim.warmup_steps={config.warmup_steps}: wanted less than config.steps={steps}")
  kind = config.schedule

  def lr(count):
    count = jnp.asarray(count, jnp.float32)
    done = (count - config.warmup_steps) / (steps - config.warmup_steps)
    down = 0.5 * (1 + jnp.cos(jnp.pi * done)) if kind == "cosine" else 1 - done
    warm = (count + 1) / max(config.warmup_steps, 1)
    if kind == "deepspeed":
      warm = jnp.log(count + 1) / math.log(max(config.warmup_steps, 2))
    return config.lr * jnp.where(count < config.warmup_steps, warm, down)

  return lr


def decay_mask(params: Any) -> Any:
  """Returns a tree of bools, True for what weight decay applies to: kernels and embeddings, not gains and biases."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).split("/")[-1] in DECAYED, params)


def make(config: Optim, steps: int) -> optax.GradientTransformation:
  """Returns AdamW with the schedule of `config`, decoupled decay by `decay_mask`, and clipping by global norm.

  Raises:
    UserError: as of `schedule`, or a decay by which weights would change their sign.
  """
  ranges.check(config, "config.optim.")
  for name, lr in {"lr": config.lr, **{f"part_lr.{part}": lr for part, lr in config.part_lr.items()}}.items():
    if lr * config.weight_decay > 1:
      raise UserError(f"config.optim.weight_decay={config.weight_decay}: times config.optim.{name}={lr} it is more "
                      "than 1, and each step would turn the signs of the weights")
  clip = [_clip(config.clip_norm)] if config.clip_norm else []
  rates = [_scale_parts({part: lr / config.lr for part, lr in config.part_lr.items()})] if config.part_lr else []
  return optax.chain(*clip, optax.adamw(schedule(config, steps), config.b1, config.b2, config.eps,
                                        weight_decay=config.weight_decay, mask=decay_mask), *rates)


def outlier_threshold(history: jax.Array, factor: float) -> jax.Array:
  """Returns what a value must not exceed to be usual: the median + factor · deviation; [] float32.

  The deviation is 1.4826 · the median distance from the median, which is the standard deviation where values are
  normally distributed; of n values it is taken for at least the median / n, since few values say little. Neither moves
  by much for a few outliers, so what was skipped may stay in the window, and a lasting change becomes usual.

  Args:
    history: float32 [W], NaN where there is no value yet; without any value the limit is infinite.
    factor: k.
  """
  count = jnp.isfinite(history).sum()
  median = jnp.nanmedian(history)
  deviation = 1.4826 * jnp.nanmedian(jnp.abs(history - median))
  bound = median + factor * jnp.maximum(deviation, jnp.abs(median) / jnp.maximum(count, 1))
  return jnp.where(count > 0, bound, jnp.inf)


def push(history: jax.Array, value: jax.Array, keep: jax.Array) -> jax.Array:
  """Returns `history` [W] with `value` [] in the place of the oldest, where `keep` [] is True."""
  return jnp.where(keep, jnp.append(history[1:], value), history)


def _clip(norm: float) -> optax.GradientTransformation:
  """Clips the gradients of each map's parts by their norm; where there is one map, by the global norm."""
  one = optax.clip_by_global_norm(norm)

  def update(grads, state, params=None):
    clipped = {}
    for name, parts in by_map(grads).items():
      clipped |= {join(kind, name): leaves for kind, leaves in one.update(parts, state)[0].items()}
    return {part: clipped[part] for part in grads}, state

  return optax.GradientTransformation(one.init, update)


def _scale_parts(factors: dict[str, float]) -> optax.GradientTransformation:
  """Multiplies the updates of some parts: Adam's update is proportional to its rate, decay included."""

  def scale(updates, params):
    del params
    return {part: optax.tree.scale(factors.get(part, 1.0), leaves) for part, leaves in updates.items()}

  return optax.stateless(scale)
