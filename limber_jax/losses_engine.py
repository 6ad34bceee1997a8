"""How `limber_jax.losses` works on many devices and in chunks: a sweep over blocks of logits that N×N never fit into.

Each device holds rows x [n, E] of the images, and meets all texts y: at once, where devices gather them, or one block
after the other as they travel round a ring. Of what came by, a loss keeps a few numbers a row and a column.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

_LOWEST = -1e30  # below every logit; −inf less itself would be NaN

AxisName = str | tuple[str, ...] | None
Metrics = dict[str, jax.Array]


class How(NamedTuple):
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


def apply(plain: Callable, sweeping: Callable, image, text, parameters: dict, axis_name: AxisName,
          chunk_size: int | None, forward: bool):
  """Checks the arguments, finds the devices, and returns (loss, metrics) of normalised rows.

  Args:
    plain: (how, *operands) -> (loss, metrics), which holds all logits.
    sweeping: the same in chunks, or around a ring; taken where `axis_name` or `chunk_size` are given.
    image, text, axis_name, chunk_size, forward: as of the losses.
    parameters: their scalars by name.
  """
  _check(image, text, parameters, chunk_size)
  names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
  both_bf16 = image.dtype == text.dtype == jnp.bfloat16
  if names and forward:
    raise ValueError(f"forward_mode: not with axis_name={axis_name!r}; without it global arrays on a mesh work too")
  how = How(names, chunk_size, jnp.dtype(jnp.bfloat16 if both_bf16 else jnp.float32), forward)

  def local(image, text, *scalars):
    operands = (_normalise(image), _normalise(text), *(jnp.asarray(s, jnp.float32) for s in scalars))
    # shard_map tracks which values differ over which axes. All operands get to differ over the same ones: so the
    # gradient of a shared scalar is summed over the devices, and loops carry values of one kind.
    zero = sum(lax.full_like(o, 0, shape=()) for o in operands)
    zero += sum(0.0 * lax.axis_index(name) for name in names)
    loss = sweeping if names or chunk_size is not None else plain
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


def own_gradient(compute: Callable) -> Callable:
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


class RowStats(NamedTuple):
  """What the softmax of a row (or of a column) of logits leaves behind, [n] each.

  The pair's own logit d is kept apart from the negatives', whose log-sum-exp is o: the cross-entropy is
  softplus(o − d), and the gradient of d is −σ(o − d). Both stay exact however well a pair is told apart; p_ii − 1 would
  leave nothing but rounding, the more of it since the two sweeps need not round alike.
  """

  peak: jax.Array      # the largest logit of a negative
  mass: jax.Array      # Σ exp(negatives − peak)
  diagonal: jax.Array  # the pair's own logit


class Shares(NamedTuple):
  """Of each row or column: a negative's probability is exp(logit − peak) · share, all the negatives' is p_negative."""

  peak: jax.Array
  share: jax.Array
  p_negative: jax.Array


def no_logits(x) -> RowStats:
  """Returns the stats of rows x [n, E] that have met no columns."""
  return RowStats(_full(x, _LOWEST), _full(x, 0), _full(x, 0))


def row_stats(before: RowStats, logits, same, axis: int) -> RowStats:
  """Returns the stats with more logits [r, m] in them: of rows (axis 1) or columns (0). `same` is true of pairs."""
  negatives = jnp.where(same, _LOWEST, logits)
  peak = jnp.maximum(before.peak, jnp.max(negatives, axis))
  mass = jnp.sum(jnp.where(same, 0.0, jnp.exp(negatives - jnp.expand_dims(peak, axis))), axis)
  return RowStats(peak, before.mass * jnp.exp(before.peak - peak) + mass,
                  before.diagonal + jnp.sum(jnp.where(same, logits, 0.0), axis))


def log_odds(stats: RowStats):
  """Returns log p_negative / p_own [n]: the negatives' log-sum-exp less the own logit, −inf where there are none."""
  none = stats.mass == 0  # and not "> 0", which is false of NaN too
  return jnp.where(none, -jnp.inf, (stats.peak - stats.diagonal) + jnp.log(jnp.where(none, 1.0, stats.mass)))


def cross_entropy(stats: RowStats):
  """Returns −log p_own [n], in nats."""
  return jax.nn.softplus(log_odds(stats))


def shares(stats: RowStats) -> Shares:
  p_negative = jax.nn.sigmoid(log_odds(stats))
  return Shares(stats.peak, p_negative / jnp.where(stats.mass == 0, 1.0, stats.mass), p_negative)


def softmax_gradient(logits, same, rows: Shares, cols: Shares):
  """Returns the gradient [r, m] of all cross-entropies, of rows and of columns, by logits [r, m]."""
  return jnp.where(same, -(rows.p_negative[:, None] + cols.p_negative[None, :]),
                   jnp.exp(logits - rows.peak[:, None]) * rows.share[:, None] +
                   jnp.exp(logits - cols.peak[None, :]) * cols.share[None, :])


@own_gradient
def softmax(how: How, with_gradient: bool, x, y, scale):
  """`losses.contrastive_loss` of normalised x, y [n, E] in two sweeps: one for the stats, one for the gradient."""
  total = len(x) * how.devices
  x, y = x.astype(how.dtype), _columns(how, y.astype(how.dtype))

  def measure(x, y, same, rows, cols):
    logits = scale * product(x, y.T)  # [r, m]
    return row_stats(rows, logits, same, 1), row_stats(cols, logits, same, 0)

  rows, cols = _sweep(how, measure, x, y, no_logits(x), no_logits(y))
  if how.gathers:  # each device has seen its rows of every column
    peak = lax.pmax(cols.peak, how.names)
    cols = RowStats(peak, *lax.psum((cols.mass * jnp.exp(cols.peak - peak), cols.diagonal), how.names))
  here = _part(how, cols, len(x))
  loss = _sum(how, cross_entropy(rows) + cross_entropy(here)) / (2 * total)
  found = metrics(how, rows.diagonal, rows.peak, here.peak)
  if not with_gradient:
    return (loss, found), None

  def differentiate(x, y, same, rows, cols):
    (row_shares, dx), (col_shares, dy) = rows, cols
    g = softmax_gradient(scale * product(x, y.T), same, row_shares, col_shares).astype(how.dtype)
    return (row_shares, dx + product(g, y)), (col_shares, dy + product(g.T, x))

  (_, dx), (_, dy) = _sweep(how, differentiate, x, y, (shares(rows), _zeros(x)), (shares(cols), _zeros(y)))
  return (loss, found), gradients(how, scale, x, dx, dy, 2 * total)


@own_gradient
def sigmoid(how: How, with_gradient: bool, x, y, scale, bias):
  """`losses.sigmoid_loss` of normalised x, y [n, E], in one sweep: no logit needs to know another."""
  total = len(x) * how.devices
  x, y = x.astype(how.dtype), _columns(how, y.astype(how.dtype))

  def visit(x, y, same, rows, cols):
    (peak, diagonal, nats, gradient), (col_peak, dy) = rows, cols
    logits = scale * product(x, y.T) + bias  # [r, m]
    sign = jnp.where(same, -1.0, 1.0)        # −z
    peak, col_peak = jnp.maximum(peak, jnp.max(logits, 1)), jnp.maximum(col_peak, jnp.max(logits, 0))
    diagonal += jnp.sum(jnp.where(same, logits, 0.0), axis=1)
    nats += jnp.sum(jax.nn.softplus(sign * logits), axis=1)
    if with_gradient:
      dx, dbias = gradient
      g = sign * jax.nn.sigmoid(sign * logits)
      dbias += jnp.sum(g, axis=1)
      g = g.astype(how.dtype)
      gradient, dy = (dx + product(g, y), dbias), dy + product(g.T, x)
    return (peak, diagonal, nats, gradient), (col_peak, dy)

  gradient, dy = ((_zeros(x), _full(x, 0)), _zeros(y)) if with_gradient else (None, None)
  rows, cols = _sweep(how, visit, x, y, (_full(x, -jnp.inf), _full(x, 0), _full(x, 0), gradient),
                      (_full(y, -jnp.inf), dy))
  (peak, diagonal, nats, gradient), (col_peak, dy) = rows, cols
  if how.gathers:
    col_peak = lax.pmax(col_peak, how.names)
  out = _sum(how, nats) / total, metrics(how, diagonal, peak, _part(how, col_peak, len(x)))
  if not with_gradient:
    return out, None
  dx, dbias = gradient
  return out, (*gradients(how, scale, x, dx, dy, total), jnp.sum(dbias) / total)


def _sweep(how: How, visit: Callable, x, y, rows, cols):
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


def _columns(how: How, y):
  """Returns the columns that this device starts with: all of them where devices gather, else its own."""
  return lax.all_gather(y, how.names, tiled=True) if how.gathers else y


def _part(how: How, cols, n: int):
  """Returns this device's part [n] of a tree of arrays [m] that `_sweep` returned for the columns."""
  if not how.gathers:
    return cols
  return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, n * lax.axis_index(how.names), n), cols)


def _sum(how: How, x):
  """Returns the sum over the rows of all devices."""
  return lax.psum(jnp.sum(x), how.names) if how.names else jnp.sum(x)


def metrics(how: How, diagonal, row_peak, col_peak) -> Metrics:
  """Returns the share of rows and of columns whose own logit is a largest one."""
  total = len(diagonal) * how.devices
  return {"i2t": _sum(how, diagonal >= row_peak) / total, "t2i": _sum(how, diagonal >= col_peak) / total}


def gradients(how: How, scale, x, dx, dy, count: int):
  """Returns the gradients of x, y [n, E] and scale [] from products dx [n, E], dy [m, E] with the logits' gradient."""
  if how.gathers:
    dy = lax.psum_scatter(dy, how.names, tiled=True)
  # Σ_ij g_ij cos_ij = Σ_i x_i · Σ_j g_ij y_j spares a pass over the logits.
  return dx * (scale / count), dy * (scale / count), jnp.sum(x.astype(jnp.float32) * dx) / count


def product(a, b):
  """Returns a @ b in float32."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jnp.matmul(a, b, precision=precision, preferred_element_type=jnp.float32)


def _zeros(x):
  return lax.full_like(x, 0, jnp.float32)


def _full(x, value: float):
  """Returns float32[n] full of `value`, one for each row of x [n, E]."""
  return lax.full_like(x, value, jnp.float32, shape=(len(x),))
