"""The optimizer against PyTorch's AdamW and open_clip's schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from limber_jax.config import Optim, Spike
from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training import optimizer


def test_the_schedule_is_open_clips():
  from open_clip_train.scheduler import cosine_lr
  config, steps = Optim(lr=5e-4, warmup_steps=20), 100
  weights = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
  theirs = cosine_lr(weights, config.lr, config.warmup_steps, steps)
  ours = optimizer.schedule(config, steps)
  np.testing.assert_allclose([ours(s) for s in range(steps)], [theirs(s) for s in range(steps)], rtol=1e-4, atol=1e-10)
  assert ours(0) == pytest.approx(5e-4 / 20)
  assert ours(steps) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("change", [{"warmup_steps": 100}, {"warmup_steps": -1}, {"lr": 0.0}])
def test_an_impossible_schedule_is_refused(change):
  with pytest.raises(UserError, match="config\\.optim"):
    optimizer.schedule(Optim(**change), 100)


def test_steps_equal_adamw_of_pytorch():
  config, steps = Optim(lr=1e-2, warmup_steps=2, weight_decay=0.2, clip_norm=0.5), 10
  rng = np.random.default_rng(0)
  params = {"fc": {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}}
  kernel, bias = (torch.nn.Parameter(torch.tensor(params["fc"][k])) for k in ("kernel", "bias"))
  theirs = torch.optim.AdamW([{"params": [kernel], "weight_decay": 0.2}, {"params": [bias], "weight_decay": 0.0}],
                             betas=(0.9, 0.98), eps=1e-6)
  tx, lr = optimizer.make(config, steps), optimizer.schedule(config, steps)
  params, state = jax.tree.map(jnp.asarray, params), tx.init(params)
  for step in range(5):
    grads = {"fc": {k: rng.normal(size=v.shape).astype(np.float32) for k, v in params["fc"].items()}}
    kernel.grad, bias.grad = torch.tensor(grads["fc"]["kernel"]), torch.tensor(grads["fc"]["bias"])
    torch.nn.utils.clip_grad_norm_([kernel, bias], 0.5)
    for group in theirs.param_groups:
      group["lr"] = float(lr(step))
    theirs.step()
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
  np.testing.assert_allclose(params["fc"]["kernel"], kernel.detach().numpy(), rtol=1e-5)
  np.testing.assert_allclose(params["fc"]["bias"], bias.detach().numpy(), rtol=1e-5)


@pytest.mark.parametrize("size", ["clip_vit_b32_mu", "clip_rn50_mu"])
def test_decay_spares_exactly_gains_biases_and_temperature(size):
  """open_clip's rule: what has fewer than two dimensions is not decayed (here, apart from the stacking of blocks)."""
  from runs import tiny
  params, _ = jax.eval_shape(Contrastive.from_config(tiny(size)).init, jax.random.key(0))
  assert isinstance(clip.SIZES[size](), clip.ClipConfig)
  mask = optimizer.decay_mask(params)
  for (path, leaf), decayed in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(mask), strict=True):
    name = "/".join(str(k.key) for k in path)
    stacked = "blocks/" in name or "_rest/" in name
    assert decayed == (leaf.ndim - stacked >= 2), name


def window(*values):
  return jnp.array([np.nan] * (8 - len(values)) + list(values), jnp.float32)


@pytest.mark.parametrize(("values", "limit"), [
  ((), np.inf),
  ((2.0,), 2 + 10 * 2),                                   # of one value the deviation counts as the value itself
  ((1.0, 2.0, 3.0, 4.0, 50.0), 3 + 10 * 1.4826),          # median 3; distances 2 1 0 1 47, their median 1
  ((4.0,) * 8, 4 + 10 * 4 / 8),                           # no deviation at all: the median over the count
  ((-4.0,) * 8, -4 + 10 * 4 / 8),
])
def test_the_limit_of_what_is_usual(values, limit):
  with jax.debug_nans(False):
    assert optimizer.outlier_threshold(window(*values), 10.0) == pytest.approx(limit, rel=1e-6)


def test_a_window_takes_the_newest_in_the_place_of_the_oldest():
  seen = window()
  for value in range(10):
    seen = optimizer.push(seen, jnp.float32(value), jnp.bool_(value != 5))
  np.testing.assert_array_equal(seen, [1, 2, 3, 4, 6, 7, 8, 9])


@pytest.mark.parametrize("change", [{"window": -1}, {"window": 8, "factor": 0.0}])
def test_an_impossible_window_is_refused(change):
  with pytest.raises(UserError, match="config\\.optim\\.spike"):
    optimizer.make(Optim(spike=Spike(**change)), 3000)
