"""Losses over image-text pairs and over captions. Importable alone: pulls in jax and nothing else of limber_jax.

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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

INITIAL_LOG_SCALE = math.log(1 / 0.07)  # CLIP, section 2.5
# CLIP keeps scale <= 100. This is the largest float32 that does: ln 100 rounds to 4.60517025, whose exp is 100.000008.
MAX_LOG_SCALE = 4.605169773101807
SIGLIP_LOG_SCALE = math.log(10)  # SigLIP, section 3.2, with the bias
SIGLIP_BIAS = -10.0
_LOWEST = -1e30  # below every logit; −inf less itself would be NaN

AxisName = str | tuple[str, ...] | None
Metrics = dict[str, jax.Array]


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
  return _apply(_softmax, image, text, {"scale": scale}, axis_name, chunk_size, forward_mode)


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
  return _apply(_sigmoid, image, text, {"scale": scale, "bias": bias}, axis_name, chunk_size, forward_mode)


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


class _How(NamedTuple):
  """How the work is laid out: all that a loss needs to know besides its numbers."""

  names: tuple[str, ...]  # mapped axes that the rows are spread over
  chunk: int | None       # rows of logits at a time
  dtype: Any              # of the operands of matrix products
  forward: bool = False   # differentiated by a rule that JAX can read forwards too

  @property
  def gathers(self) -> bool:
    """Whether each device meets all columns at once; else they come one block after the other."""
    return bool(self.names) and self.chunk is None

  @property
  def devices(self) -> int:
    return lax.axis_size(self.names) if self.names else 1


def _apply(loss: Callable, image, text, parameters: dict, axis_name: AxisName, chunk_size: int | None,
           forward: bool):
  """Checks the arguments, finds the devices, and returns (loss, metrics) of `loss` over normalised rows."""
  _check(image, text, parameters, chunk_size)
  names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  both_bf16 = image.dtype == text.dtype == jnp.bfloat16
  if names and forward:
    raise ValueError(f"forward_mode: not with axis_name={axis_name!r}; without it global arrays on a mesh work too")
  how = _How(names, chunk_size, jnp.dtype(jnp.bfloat16 if both_bf16 else jnp.float32), forward)

  def local(image, text, *scalars):
    operands = (_normalise(image), _normalise(text), *(jnp.asarray(s, jnp.float32) for s in scalars))
    # shard_map tracks which values differ over which axes. All operands get to differ over the same ones: so the
    # gradient of a shared scalar is summed over the devices, and loops carry values of one kind.
    zero = sum(lax.full_like(o, 0, shape=()) for o in operands)
    zero += sum(0.0 * lax.axis_index(name) for name in names)
    return loss(how, *(o + zero for o in operands))

  if names and not _mapped(names):
    local = _shard_map(local, names, len(image), len(parameters))
  value, metrics = local(image, text, *parameters.values())
  scalars = {k: lax.stop_gradient(jnp.asarray(v, jnp.float32)) for k, v in parameters.items()}
  return value, metrics | scalars


def _check(image, text, parameters, chunk_size) -> None:
  for name, x in (("image", image), ("text", text)):
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name}: expected floating-point embeddings [N, E], got {x.dtype}{list(x.shape)}")
  if image.shape != text.shape or image.shape[0] == 0:
    raise ValueError("image and text: expected the same shape [N, E] with at least one row, "
                     f"got {list(image.shape)} and {list(text.shape)}")
  for name, x in parameters.items():
    if jnp.shape(x):
      raise ValueError(f"{name}: expected a scalar, got shape {list(jnp.shape(x))}")
  if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
    raise ValueError(f"chunk_size: expected None or a whole number of rows, at least 1, got {chunk_size!r}")


def _mapped(names) -> bool:
  """Whether shard_map or pmap has bound these axes here."""
  try:
    return lax.axis_size(names) > 0
  except NameError:
    return False


def _shard_map(local: Callable, names, rows: int, scalars: int) -> Callable:
  """Returns `local` mapped over the current mesh: rows spread over the axes `names`, the same work along the others."""
  mesh = jax.sharding.get_abstract_mesh()
  if missing := [n for n in names if n not in mesh.axis_names]:
    raise ValueError(f"axis_name: {missing[0]!r} is neither an axis of shard_map or pmap here, nor of the mesh set by "
                     f"jax.set_mesh, which has {', '.join(mesh.axis_names) or 'not been called'}")
  devices = math.prod(mesh.shape[n] for n in names)
  if rows % devices:
    raise ValueError(f"image and text: {rows} rows do not divide over the {devices} devices of mesh axis "
                     f"{'×'.join(names)}")
  return jax.shard_map(local, in_specs=(P(names), P(names)) + (P(),) * scalars, out_specs=P(),
                       axis_names=set(mesh.axis_names) - set(mesh.manual_axes))


def _normalise(x):
  """Returns the rows of x [n, E] at length 1, in float32. Rows of length < 1e-12 become zeros, without gradient.

  Of shorter ones the gradient's length^−3 is no float32; PyTorch's `normalize` stops growing there as well.
  """
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, axis=1, keepdims=True)  # [n, 1]
  long = square > 1e-24
  return x * jnp.where(long, lax.rsqrt(jnp.where(long, square, 1.0)), 0.0)


def _own_gradient(compute: Callable) -> Callable:
  """Makes compute(how, with_gradient, *operands) -> ((loss, metrics), gradients) a function of (how, *operands).

  A loss ends the computation, so its gradient is known as soon as its value is: both come out of the forward pass, the
  logits die there, and the backward pass only multiplies. Automatic differentiation would keep every chunk's
  logits, and inside pmap and unchecked shard_map it would count each psum once for every device. Without mapped axes
  there is none to count, and `how.forward` takes a rule that JAX can read forwards too (1.1 GB where the other one
  takes 0.6, at 32,768 pairs in chunks of 1,024).
  """

  def value(how, *operands):
    return compute(how, False, *operands)[0]

  def forward(how, *operands):
    return compute(how, True, *operands)

  def backward(how, gradients, cotangents):
    return tuple(g * cotangents[0] for g in gradients)

  def both(how, operands, tangents):
    (loss, metrics), gradients = compute(how, True, *operands)
    tangent = sum(jnp.sum(g * t) for g, t in zip(gradients, tangents, strict=True))
    return (loss, metrics), (tangent, jax.tree.map(jnp.zeros_like, metrics))

  loss = jax.custom_vjp(value, nondiff_argnums=(0,))
  loss.defvjp(forward, backward)
  forwards = jax.custom_jvp(value, nondiff_argnums=(0,))
  forwards.defjvp(both)
  return lambda how, *operands: (forwards if how.forward else loss)(how, *operands)


@_own_gradient
def _softmax(how: _How, with_gradient: bool, x, y, scale):
  """`contrastive_loss` of normalised x, y [n, E] in two sweeps: one for each line's log-sum-exp, one for the gradient.

  A line's own logit d is kept apart from the others', whose log-sum-exp is o: its cross-entropy is softplus(o − d), and
  the gradient of d is −σ(o − d). Both stay exact however well a pair is told apart; p_ii − 1 would leave nothing but
  rounding, the more of it since the two sweeps need not round alike.
  """
  n, total = len(x), len(x) * how.devices
  x, y = x.astype(how.dtype), _columns(how, y.astype(how.dtype))

  def measure(x, y, same, rows, cols):
    logits = scale * _product(x, y.T)  # [r, m]
    return tuple(_add_line(line, logits, same, axis) for axis, line in ((1, rows), (0, cols)))

  row, col = _sweep(how, measure, x, y, *((_line(a, _LOWEST), _line(a, 0), _line(a, 0)) for a in (x, y)))
  if how.gathers:  # each device has seen its rows of every column
    peak = lax.pmax(col[0], how.names)
    col = peak, *lax.psum((col[1] * jnp.exp(col[0] - peak), col[2]), how.names)
  own = _own(how, col, n)
  loss = _sum(how, sum(jax.nn.softplus(_margin(line)) for line in (row, own))) / (2 * total)
  metrics = _metrics(how, row[2], row[0], own[0])
  if not with_gradient:
    return (loss, metrics), None

  def differentiate(x, y, same, rows, cols):
    ((row_peak, row_share, row_wrong), dx), ((col_peak, col_share, col_wrong), dy) = rows, cols
    logits = scale * _product(x, y.T)
    g = jnp.where(same, -(row_wrong[:, None] + col_wrong[None, :]),
                  jnp.exp(logits - row_peak[:, None]) * row_share[:, None] +
                  jnp.exp(logits - col_peak[None, :]) * col_share[None, :]).astype(how.dtype)
    return (rows[0], dx + _product(g, y)), (cols[0], dy + _product(g.T, x))

  (_, dx), (_, dy) = _sweep(how, differentiate, x, y, (_shares(row), _zeros(x)), (_shares(col), _zeros(y)))
  return (loss, metrics), _gradients(how, scale, x, dx, dy, 2 * total)


def _add_line(line, logits, same, axis: int):
  """Returns `line` with more logits in it: the peak of the others', Σ exp(others − peak), and the line's own logit."""
  others = jnp.where(same, _LOWEST, logits)
  peak = jnp.maximum(line[0], jnp.max(others, axis))
  mass = jnp.sum(jnp.where(same, 0.0, jnp.exp(others - jnp.expand_dims(peak, axis))), axis)
  return peak, line[1] * jnp.exp(line[0] - peak) + mass, line[2] + jnp.sum(jnp.where(same, logits, 0.0), axis)


def _margin(line):
  """Returns by how much the others' log-sum-exp exceeds the line's own logit, −inf where there are no others."""
  peak, mass, own = line
  none = mass == 0  # and not "> 0", which is false of NaN too
  return jnp.where(none, -jnp.inf, (peak - own) + jnp.log(jnp.where(none, 1.0, mass)))


def _shares(line):
  """Returns (peak, share, wrong): another's probability is exp(logit − peak) · share, all the others' is wrong."""
  peak, mass, _ = line
  wrong = jax.nn.sigmoid(_margin(line))
  return peak, wrong / jnp.where(mass == 0, 1.0, mass), wrong


@_own_gradient
def _sigmoid(how: _How, with_gradient: bool, x, y, scale, bias):
  """`sigmoid_loss` of normalised x, y [n, E], in one sweep: no logit needs to know another."""
  n, total = len(x), len(x) * how.devices
  x, y = x.astype(how.dtype), _columns(how, y.astype(how.dtype))

  def visit(x, y, same, rows, cols):
    (peak, diagonal, nats, gradient), (col_peak, dy) = rows, cols
    logits = scale * _product(x, y.T) + bias  # [r, m]
    wrong = jnp.where(same, -logits, logits)  # −z l
    peak, col_peak = jnp.maximum(peak, jnp.max(logits, 1)), jnp.maximum(col_peak, jnp.max(logits, 0))
    diagonal += jnp.sum(jnp.where(same, logits, 0.0), axis=1)
    nats += jnp.sum(jax.nn.softplus(wrong), axis=1)
    if with_gradient:
      dx, dbias = gradient
      g = jnp.where(same, -1.0, 1.0) * jax.nn.sigmoid(wrong)
      dbias += jnp.sum(g, axis=1)
      g = g.astype(how.dtype)
      gradient, dy = (dx + _product(g, y), dbias), dy + _product(g.T, x)
    return (peak, diagonal, nats, gradient), (col_peak, dy)

  gradient, dy = ((_zeros(x), _line(x, 0)), _zeros(y)) if with_gradient else (None, None)
  rows, cols = _sweep(how, visit, x, y, (_line(x, -jnp.inf), _line(x, 0), _line(x, 0), gradient),
                      (_line(y, -jnp.inf), dy))
  (peak, diagonal, nats, gradient), (col_peak, dy) = rows, cols
  if how.gathers:
    col_peak = lax.pmax(col_peak, how.names)
  out = _sum(how, nats) / total, _metrics(how, diagonal, peak, _own(how, col_peak, n))
  if not with_gradient:
    return out, None
  dx, dbias = gradient
  return out, (*_gradients(how, scale, x, dx, dy, total), jnp.sum(dbias) / total)


def _sweep(how: _How, visit: Callable, x, y, rows, cols):
  """Returns `rows` and `cols` after `visit` has seen every logit between this device's x and all columns once.

  Args:
    visit: (x [r, E], y [m, E], same bool[r, m], rows, cols) -> (rows, cols), for one block of logits and what belongs
      to its rows and its columns. `same` is true where row and column are a pair.
    x: [n, E]
    y: [m, E] the columns from `_columns`. In the ring each device starts with its own, and then meets the others'.
    rows: a tree of arrays [n, ...].
    cols: a tree of arrays [m, ...]; it travels with y.
  """
  n = len(x)

  def against(y, partner, rows, cols):
    def visit_chunk(cols, chunk):
      x, partner, rows = chunk
      rows, cols = visit(x, y, partner[:, None] == jnp.arange(len(y))[None, :], rows, cols)
      return cols, rows
    cols, rows = _by_chunks(visit_chunk, cols, (x, partner, rows), how.chunk or n)
    return rows, cols

  partner = jnp.arange(n)  # the column that is row i's pair
  if not how.names:
    return against(y, partner, rows, cols)
  if how.gathers:
    return against(y, partner + n * lax.axis_index(how.names), rows, cols)

  def hop(carry, k):
    rows, (y, cols) = carry
    rows, cols = against(y, jnp.where(k == 0, partner, -1), rows, cols)
    return (rows, lax.ppermute((y, cols), how.names, ring)), None

  ring = [(d, (d + 1) % how.devices) for d in range(how.devices)]
  (rows, (_, cols)), _ = lax.scan(hop, (rows, (y, cols)), jnp.arange(how.devices))  # the last hop brings all home
  return rows, cols


def _by_chunks(step: Callable, carry, rows, size: int):
  """Returns (carry, outs [n, ...]) of carry, outs = step(carry, rows[i : i + size]) over a tree of arrays [n, ...]."""
  n = len(jax.tree.leaves(rows)[0])
  if size >= n:
    return step(carry, rows)
  even = n - n % size
  chunks = jax.tree.map(lambda a: a[:even].reshape(even // size, size, *a.shape[1:]), rows)
  carry, outs = lax.scan(step, carry, chunks)
  outs = jax.tree.map(lambda a: a.reshape(even, *a.shape[2:]), outs)
  if even < n:
    carry, rest = step(carry, jax.tree.map(lambda a: a[even:], rows))
    outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outs, rest)
  return carry, outs


def _columns(how: _How, y):
  """Returns the columns that this device starts with: all of them where devices gather, else its own."""
  return lax.all_gather(y, how.names, tiled=True) if how.gathers else y


def _own(how: _How, cols, n: int):
  """Returns this device's part [n] of a tree of arrays [m] that `_sweep` returned for the columns."""
  if not how.gathers:
    return cols
  return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, n * lax.axis_index(how.names), n), cols)


def _sum(how: _How, x):
  """Returns the sum over the rows of all devices."""
  return lax.psum(jnp.sum(x), how.names) if how.names else jnp.sum(x)


def _metrics(how: _How, diagonal, row_peak, col_peak) -> Metrics:
  """Returns the share of rows and of columns whose own logit is a largest one."""
  total = len(diagonal) * how.devices
  return {"i2t": _sum(how, diagonal >= row_peak) / total, "t2i": _sum(how, diagonal >= col_peak) / total}


def _gradients(how: _How, scale, x, dx, dy, count: int):
  """Returns the gradients of x, y [n, E] and scale [] from products dx [n, E], dy [m, E] with the logits' gradient."""
  if how.gathers:
    dy = lax.psum_scatter(dy, how.names, tiled=True)
  # Σ_ij g_ij cos_ij = Σ_i x_i · Σ_j g_ij y_j spares a pass over the logits.
  return dx * (scale / count), dy * (scale / count), jnp.sum(x.astype(jnp.float32) * dx) / count


def _product(a, b):
  """Returns a @ b in float32."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _zeros(x):
  return lax.full_like(x, 0, jnp.float32)


def _line(x, value: float):
  """Returns float32[n] full of `value`, one for each row of x [n, E]."""
  return lax.full_like(x, value, jnp.float32, shape=(len(x),))
