"""One optimizer step of any task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from limber_jax.checkpoints.state import Frozen, TrainState, split
from limber_jax.config import Spike
from limber_jax.tasks.base import Task
from limber_jax.training import optimizer


def make_init(task: Task, tx: optax.GradientTransformation, trainable: tuple[str, ...], window: int = 0
              ) -> Callable[..., Any]:
  """Returns init(rng) -> (TrainState, Frozen), all parts at random: a pure function."""

  def init(rng: jax.Array) -> tuple[TrainState, Frozen]:
    params, stats = task.init(rng)
    (trained, fixed), (moving, still) = split(params, trainable), split(stats, trainable)
    return TrainState.create(trained, moving, tx, window), Frozen(fixed, still)

  return init


def make_step(task: Task, tx: optax.GradientTransformation, lr: optax.Schedule, spike: Spike | None = None
              ) -> Callable[..., Any]:
  """Returns train_step(state, frozen, batch, rng) -> (state, metrics), a pure function.

  Where the loss, any gradient or any update is not finite, the step is skipped: parameters, statistics and optimizer
  come back untouched, `state.step` (the position in the data) goes on, and metrics["skipped"] is 1. With a window of
  `spike` so is a step whose loss or gradient norm is above `optimizer.outlier_threshold` of the last ones. A finite
  loss and gradient enter the window, even of skipped steps; others never do.
  """
  window = spike.window if spike else 0

  def train_step(state: TrainState, frozen: Frozen, batch: dict, rng: jax.Array):
    rng = jax.random.fold_in(rng, state.step)

    def loss_fn(params):
      return task.loss({**frozen.params, **params}, {**frozen.stats, **state.stats}, batch, rng)

    (loss, (metrics, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    stats = {part: stats[part] for part in state.stats}
    grad_norm = optax.tree.norm(grads)
    good = finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    history, limits = state.history, {}
    if window:
      seen = {"loss": loss, "grad_norm": grad_norm}
      limits = {f"{name}_limit": optimizer.outlier_threshold(history[name], spike.factor) for name in seen}
      for name, value in seen.items():
        good &= value <= limits[f"{name}_limit"]
      history = {name: optimizer.push(history[name], value, finite) for name, value in seen.items()}
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    good &= jnp.isfinite(optax.tree.norm(updates))  # a rate of NaN, or 0/0 of an epsilon of 0
    params = task.project(optax.apply_updates(state.params, updates))
    new = (params, stats, opt_state)
    old = (state.params, state.stats, state.opt_state)
    params, stats, opt_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
    bad = (~good).astype(jnp.int32)
    in_row = jnp.where(good, 0, state.skipped_in_row + 1)
    updates_made = state.step - state.skipped  # what the schedule counts
    metrics = {"loss": loss, "grad_norm": grad_norm, "lr": lr(updates_made), "skipped": bad, "skipped_in_row": in_row,
               **limits, **metrics}
    return TrainState(state.step + 1, params, stats, opt_state, state.skipped + bad, in_row, history), metrics

  return train_step
