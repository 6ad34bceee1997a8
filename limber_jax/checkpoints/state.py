"""The state of a training run: all that a checkpoint holds, and nothing frozen."""

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from limber_jax.errors import UserError, did_you_mean

SHARDING = ((r"^history/", P()),)  # of what is the same for every task; parameters have the rows of theirs


class TrainState(flax.struct.PyTreeNode):
  """Everything that changes from step to step."""

  step: jax.Array            # [] int32: batches consumed, which is also the position in the data
  params: dict[str, Any]     # the trainable parts only
  stats: dict[str, Any]      # BatchNorm statistics of the trainable parts
  opt_state: optax.OptState
  skipped: jax.Array         # [] int32: steps not taken, because of what loss and gradient were
  skipped_in_row: jax.Array  # [] int32: how many of them end at this step
  history: dict[str, jax.Array]  # what tells spikes, by name, float32 [W], NaN where nothing is yet; {} where W = 0

  @classmethod
  def create(cls, params: dict, stats: dict, tx: optax.GradientTransformation, window: int = 0) -> "TrainState":
    """Returns the state before the first step; `window` is config.optim.spike.window."""
    step, skipped, in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: all are donated
    history = {name: jnp.full(window, jnp.nan) for name in ("loss", "grad_norm")} if window else {}
    return cls(step, params, stats, tx.init(params), skipped, in_row, history)


class Frozen(flax.struct.PyTreeNode):
  """What no step changes and no checkpoint holds."""

  params: dict[str, Any]  # the other parts, in the precision they are computed in
  stats: dict[str, Any]   # their BatchNorm statistics, float32


def optimizer_item(state: TrainState) -> dict[str, Any]:
  """Returns what of a state is kept apart from parameters and statistics: the item "optimizer" of a checkpoint."""
  return {"step": state.step, "opt_state": state.opt_state, "skipped": state.skipped,
          "skipped_in_row": state.skipped_in_row, **({"history": state.history} if state.history else {})}


def split(params: dict[str, Any], trainable: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (trained, frozen): the parts named in `trainable`, and the others; of parameters or anything else."""
  return {k: v for k, v in params.items() if k in trainable}, {k: v for k, v in params.items() if k not in trainable}


def check_trainable(trainable: tuple[str, ...], parts: Iterable[str]) -> None:
  """Raises UserError if a name is no part, or none is given."""
  if not trainable:
    raise UserError(f"config.trainable names no part; there are {', '.join(parts)}")
  for name in trainable:
    if name not in parts:
      raise UserError(f"config.trainable: no part {name!r}{did_you_mean(name, parts)}")
