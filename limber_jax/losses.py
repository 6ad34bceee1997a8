"""Losses over image-text pairs and over captions. Importable alone: pulls in jax and no more of limber_jax.

    from limber_jax.losses import contrastive_loss
    loss, metrics = contrastive_loss(image, text, jnp.exp(log_scale))

`caption_loss` is a language model's. The two losses over pairs compare every image with every text: N×N logits. They
work in these ways, with the same value and gradient:

    plain arrays                          one device, or global arrays under `jax.jit` on a mesh: XLA splits the work
    axis_name="i" in shard_map or pmap    each device passes its own rows [n, E]; N = n × devices
    axis_name=("data", "fsdp")            global arrays under `jax.set_mesh` of a mesh with these axes: wraps itself in
                                          `jax.shard_map`, for those who want the ring below in a jitted step
    chunk_size=c                          in any of them: c rows of logits at a time, and never N×N. With `axis_name` a
                                          ring: the texts travel from device to device and are never gathered.

**Gradients over devices.** Every device gets the global mean loss, and for its own rows exactly d(global loss)/d(rows):
no factor of the device count, whatever the kind of map. So take the gradient inside the map, and *add up* what
the devices say about shared parameters: `lax.psum`, not `lax.pmean`. shard_map does so by itself (unless
`check_vma=False`; pmap does not). The gradient may be taken outside of shard_map too, but not with `check_vma=False`,
which would divide it by the number of devices. Forward mode (`jax.jvp`, `jax.hessian`) needs
`forward_mode=True`, and works without `axis_name` only.

**Precision.** Rows are normalised, and everything is summed, in float32. If both inputs are bfloat16, matrix products
have bfloat16 operands (the logits' gradient too) and float32 sums. Otherwise their operands are float32 at
`Precision.HIGHEST`, since the default of TPUs and GPUs rounds them to bfloat16 or TF32: next to the towers it is cheap.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from limber_jax import losses_engine as engine
from limber_jax.losses_engine import AxisName, How, Metrics, cross_entropy, no_logits, product, row_stats, shares

INITIAL_LOG_SCALE = math.log(1 / 0.07)  # CLIP, section 2.5
# CLIP keeps scale <= 100. This is the largest float32 that does: ln 100 rounds to 4.60517025, whose exp is 100.000008.
MAX_LOG_SCALE = 4.605169773101807
SIGLIP_LOG_SCALE = math.log(10)  # SigLIP, section 3.2, with the bias
SIGLIP_BIAS = -10.0


def contrastive_loss(image: jax.Array, text: jax.Array, scale: jax.Array, *, axis_name: AxisName = None,
                     chunk_size: int | None = None, forward_mode: bool = False) -> tuple[jax.Array, Metrics]:
  """Returns CLIP's loss: the mean, in nats, of the cross-entropies image -> text and text -> image.

  With logits l_ij = scale · cos(image_i, text_j): 1/2N · [Σ_i lse_j l_ij + Σ_j lse_i l_ij − 2 Σ_i l_ii].

  Args:
    image: [N, E] embeddings, of any length: they are normalised here. A row of zeros, or shorter than 1e-12, has
      cosine 0 and gradient 0.
    text: [N, E]; row i belongs to row i of `image`.
    scale: [] 1/temperature: exp(min(log_scale, MAX_LOG_SCALE)), where log_scale starts at INITIAL_LOG_SCALE.
    axis_name: the mapped axes (of shard_map or pmap) or the axes of the current mesh that the rows are spread over.
      The rows then lie over the devices in equal numbers. See the head of this file, also for the gradients.
    chunk_size: rows of logits to hold at a time, which need not divide N; None holds all N×N, spread over the devices.
      Global arrays on a mesh need `axis_name` with it, or XLA gathers them.
    forward_mode: lets `jax.jvp`, `jax.jacfwd` and `jax.hessian` through, for which JAX else raises a TypeError about
      custom_vjp; `jax.grad`, also of itself, needs it not. Not with `axis_name`; chunks then take twice the memory.

  Returns:
    loss: [] float32, the same on every device.
    metrics: "i2t" and "t2i", the share of images (texts) with no text (image) nearer than their own, and "scale". They
      are over the whole batch, too, and have no gradient.

  Raises:
    ValueError: a shape, a dtype, `chunk_size`, `axis_name` or `forward_mode` does not fit.

  Source: CLIP, arXiv 2103.00020, figure 3. Without N×N logits: GradCache, 2101.06983, and Inf-CL, 2410.17243.
  """
  return engine.apply(_figure_3, engine.softmax, image, text, {"scale": scale}, axis_name, chunk_size, forward_mode)


@engine.own_gradient
def _figure_3(how: How, with_gradient: bool, image, text, scale):
  """The loss of CLIP's figure 3, of normalised image, text [N, E], and its gradient."""
  count, labels = len(image), jnp.arange(len(image))
  image, text = image.astype(how.dtype), text.astype(how.dtype)
  logits = scale * product(image, text.T)  # [N, N]: scaled cosines
  same = labels[:, None] == labels[None]   # text i belongs to image i
  rows, cols = row_stats(no_logits(image), logits, same, 1), row_stats(no_logits(text), logits, same, 0)
  loss = jnp.sum(cross_entropy(rows) + cross_entropy(cols)) / (2 * count)
  out = loss, engine.metrics(how, rows.diagonal, rows.peak, cols.peak)
  if not with_gradient:
    return out, None
  g = engine.softmax_gradient(logits, same, shares(rows), shares(cols)).astype(how.dtype)
  return out, engine.gradients(how, scale, image, product(g, text), product(g.T, image), 2 * count)


def sigmoid_loss(image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array, *, axis_name: AxisName = None,
                 chunk_size: int | None = None, forward_mode: bool = False) -> tuple[jax.Array, Metrics]:
  """Returns SigLIP's loss, in nats per pair: every image-text combination is a yes-or-no question of its own.

  With logits l_ij = scale · cos(image_i, text_j) + bias, and z_ij = 1 if i = j, else −1: −1/N · Σ_ij log σ(z_ij l_ij).

  Args:
    image: [N, E], as in `contrastive_loss`.
    text: [N, E]; row i belongs to row i of `image`.
    scale: [] 1/temperature; its logarithm starts at SIGLIP_LOG_SCALE.
    bias: [] starts at SIGLIP_BIAS: nearly all combinations are no pair.
    axis_name: as in `contrastive_loss`.
    chunk_size: as in `contrastive_loss`.
    forward_mode: as in `contrastive_loss`.

  Returns:
    loss: [] float32, the same on every device.
    metrics: as in `contrastive_loss`, and "bias".

  Raises:
    ValueError: a shape, a dtype, `chunk_size`, `axis_name` or `forward_mode` does not fit.

  Source: SigLIP, arXiv 2303.15343, algorithm 1; the ring is its section 3.3.
  """
  return engine.apply(_algorithm_1, engine.sigmoid, image, text, {"scale": scale, "bias": bias}, axis_name, chunk_size,
                      forward_mode)


@engine.own_gradient
def _algorithm_1(how: How, with_gradient: bool, image, text, scale, bias):
  """The loss of SigLIP's algorithm 1, of normalised image, text [N, E], and its gradient."""
  count, labels = len(image), jnp.arange(len(image))
  image, text = image.astype(how.dtype), text.astype(how.dtype)
  logits = scale * product(image, text.T) + bias  # [N, N]
  same = labels[:, None] == labels[None]          # text i belongs to image i
  sign = jnp.where(same, -1.0, 1.0)               # −z
  loss = jnp.sum(jnp.sum(jax.nn.softplus(sign * logits), axis=1)) / count
  out = loss, engine.metrics(how, jnp.sum(jnp.where(same, logits, 0.0), 1), jnp.max(logits, 1), jnp.max(logits, 0))
  if not with_gradient:
    return out, None
  g = sign * jax.nn.sigmoid(sign * logits)
  dbias, g = jnp.sum(jnp.sum(g, axis=1)) / count, g.astype(how.dtype)
  return out, (*engine.gradients(how, scale, image, product(g, text), product(g.T, image), count), dbias)


def caption_loss(logits: jax.Array, tokens: jax.Array, mask: jax.Array, *,
                 total: jax.Array | float | None = None) -> tuple[jax.Array, Metrics]:
  """Returns the mean cross-entropy of the tokens, in nats a token.

  Args:
    logits: [B, T, V]; logits[:, t] are those that predict tokens[:, t]. Any floating-point type: reduced in float32.
    tokens: integers [B, T]; where one that counts is no id, below 0 or V and above, the loss is NaN.
    mask: [B, T], True where a token counts; or floating-point weights.
    total: [] what the weighted sum is divided by; None = the sum of `mask`. A part of a batch, with the sum over the
      whole batch here, gives its share of the batch's mean: so parts can be added up.

  Returns:
    loss: [] float32; 0 where nothing counts.
    metrics: "accuracy", the share of the counted tokens that are the likeliest of their logits; no gradient.

  Raises:
    ValueError: shapes or types that do not fit together.

  Source: LiMBeR, arXiv 2209.15162, section 3.2.
  """
  if logits.ndim != 3 or not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f"logits: expected floating-point [B, T, V], got {logits.dtype}{list(logits.shape)}")
  for name, x in (("tokens", tokens), ("mask", mask)):
    if x.shape != logits.shape[:2]:
      raise ValueError(f"{name}: expected shape {list(logits.shape[:2])}, got {list(x.shape)}")
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens: expected integers, got {tokens.dtype}")
  weights = mask.astype(jnp.float32)
  total = jnp.sum(weights) if total is None else jnp.asarray(total, jnp.float32)
  logits = logits.astype(jnp.float32)
  ids = jnp.where(tokens < 0, logits.shape[-1], tokens).astype(jnp.int32)  # −1 would be the last one
  own = jnp.take_along_axis(logits, ids[..., None], axis=-1, mode="fill", fill_value=jnp.nan)[..., 0]  # [B, T]
  # Not 0 · NaN: what does not count may be anything.
  nats = jnp.where(weights > 0, jax.nn.logsumexp(logits, axis=-1) - own, 0.0)
  right = jnp.where(weights > 0, own >= jnp.max(logits, axis=-1), False)
  share = 1 / jnp.where(total > 0, total, 1.0)
  return jnp.sum(nats * weights) * share, {"accuracy": lax.stop_gradient(jnp.sum(right * weights) * share)}
