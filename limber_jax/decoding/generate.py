"""Text from a language model: greedy, sampled or by beam search, over an explicit cache of fixed shape.

Everything here is a pure function to be jitted by the caller, with `max_new_tokens`, `eos` and `settings` known before
tracing: one program serves every batch of one shape, however long its prompts are. Parameters are best passed in the
dtype that the model computes in, or every token casts them again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from limber_jax import ranges
from limber_jax.config import Decoding
from limber_jax.errors import UserError
from limber_jax.models.cache import Cache, constrain_cache, empty_cache

_NEVER = -1e9  # added to the scores of beams that may not be chosen; transformers' number


class Generated(NamedTuple):
  """What was generated, for each row."""

  tokens: jax.Array   # int32 [B, max_new_tokens], filled up with eos
  lengths: jax.Array  # int32 [B], tokens before the first eos
  scores: jax.Array   # float32 [B], log-probability, that of the eos included; beam: divided by the length penalty


def check(settings: Decoding) -> None:
  """Raises UserError, naming the field, for a setting that cannot be or that its method would not look at."""
  ranges.check(settings, "decoding.")
  fields = {"sample": ("temperature", "top_k", "top_p", "inverted_nucleus"), "beam": ("beams", "length_penalty")}
  for method, names in fields.items():
    for name in names:
      if method != settings.method and getattr(settings, name) != getattr(Decoding, name):
        raise UserError(f"decoding.{name}={getattr(settings, name)!r} is for method={method!r}, "
                        f"but the method is {settings.method!r}")


def row_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns keys [B], one for each int32 id [B]: what is drawn for a row then depends on no other row."""
  return jax.vmap(functools.partial(jax.random.fold_in, key))(ids)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
  """Returns the logits [B, V], -inf where k others are higher; all of them if k = 0."""
  if not 0 < k < logits.shape[-1]:
    return logits
  return jnp.where(logits >= jax.lax.top_k(logits, k)[0][:, -1:], logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: float, inverted: bool = False) -> jax.Array:
  """Returns the logits [B, V], -inf outside of the fewest likeliest tokens that have probability p together.

  Args:
    logits: [B, V].
    p: probability.
    inverted: do what the reference of LiMBeR does, which drops tokens after those that have more than 1 − p together.
  """
  order = jnp.argsort(logits, axis=-1, descending=True)  # stable: of equal tokens, those with the smaller ids stay
  probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1))
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  keep = before <= 1 - p if inverted else before < p
  keep = keep.at[:, 0].set(True)
  return jnp.where(jnp.take_along_axis(keep, jnp.argsort(order, axis=-1), axis=-1), logits, -jnp.inf)


def to_draw_from(logits: jax.Array, settings: Decoding) -> jax.Array:
  """Returns the logits [B, V] of the distribution that `settings` sample from."""
  if settings.inverted_nucleus:
    return keep_top_p(keep_top_k(logits, settings.top_k), settings.top_p, inverted=True) / settings.temperature
  logits = keep_top_k(logits / settings.temperature, settings.top_k)
  return keep_top_p(logits, settings.top_p) if settings.top_p < 1 else logits


def prefill(model: Any, params: dict, x: jax.Array, positions: jax.Array, mask: jax.Array) -> Cache:
  """Returns a cache of what prompts begin with, read once: `generate` goes on from it, for many rows from one.

  Args:
    model, params: as of `generate`.
    x: [B, R, D] embeddings, B = 1 where all rows of a later batch begin alike.
    positions: int32 [B, R].
    mask: bool [B, R], True where real. Padding may stand left or right.
  """
  cache = constrain_cache(empty_cache(model.size, *mask.shape, model.compute.dtype))
  return model.apply({"params": params}, x, positions, mask, cache)[1]


def generate(model: Any, params: dict, x: jax.Array, positions: jax.Array, mask: jax.Array, *, max_new_tokens: int,
             eos: int, settings: Decoding, keys: jax.Array | None = None, prefix: Cache | None = None) -> Generated:
  """Returns the tokens that follow each prompt, up to the first `eos`.

  No row depends on the others. It stops as soon as all are done; a row without a real token in its prompt is done from
  the start, whatever its prefix.

  Args:
    model: a language model with the methods of GPTJ.
    params: its parameters, adapters included.
    x: [B, P, D] embeddings of the prompts.
    positions: int32 [B, P]; behind a prefix they count on from the number of its real tokens. New tokens count on from
      the number of all real tokens of the row.
    mask: bool [B, P], True where real. Padding may stand left or right.
    max_new_tokens: at most so many, eos included.
    eos: the token that ends a text.
    settings: how to choose.
    keys: [B] random keys of threefry2x32, one for each row, for method="sample"; see `row_keys`.
    prefix: what stands before the prompts, from `read`: of B rows, or of one for all.

  Raises:
    UserError: a setting or the keys are wrong, or prompt and text are longer than the model's context.
    ValueError: a prefix of another number of rows.
  """
  check(settings)
  B, P = mask.shape
  R = 0 if prefix is None else prefix.mask.shape[1]
  if max_new_tokens < 1 or R + P + max_new_tokens > model.size.context:
    raise UserError(f"max_new_tokens={max_new_tokens}: expected at least 1, and with the {R + P} positions of the "
                    f"prompt at most the {model.size.context} of the model")
  if settings.method == "sample" and (keys is None or len(keys) != B):
    raise UserError(f"method='sample' needs {B} keys, one for each row; "
                    f"got {'none' if keys is None else len(keys)}")
  if keys is not None and "threefry" not in str(jax.random.key_impl(keys)):
    # Of the other generators, rows drawn together share one stream.
    raise UserError(f"keys: expected those of threefry2x32, JAX's default, got {jax.random.key_impl(keys)}")

  cache, before = _start(model, prefix, B, P + max_new_tokens - 1)
  hidden, cache = model.apply({"params": params}, x, positions, mask, cache)
  last = P - 1 - mask[:, ::-1].argmax(-1)  # [B], where the last real token stands
  hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]  # [B, D]
  logits = model.apply({"params": params}, hidden, method="logits")  # [B, V]
  real = before + mask.sum(-1, dtype=jnp.int32)  # [B]

  def forward(tokens, t, cache):
    """Returns the logits [R, V] after the t-th new tokens [R], R = B or B·beams, and the cache."""
    position = jnp.repeat(real, len(tokens) // B) + t
    x = model.apply({"params": params}, tokens[:, None], method="embed")
    hidden, cache = model.apply({"params": params}, x, position[:, None], jnp.ones_like(x[..., 0], bool), cache)
    return model.apply({"params": params}, hidden[:, 0], method="logits"), cache

  if settings.method == "beam":
    tokens, scores = _beam_search(forward, logits, cache, mask.any(-1), R + P, max_new_tokens, eos, settings)
  else:
    tokens, scores = _one_by_one(forward, logits, cache, mask.any(-1), max_new_tokens, eos, settings, keys)
  ends = tokens == eos
  return Generated(tokens, jnp.where(ends.any(-1), ends.argmax(-1), max_new_tokens).astype(jnp.int32), scores)


def _start(model, prefix, B, free):
  """Returns (a cache of B rows that holds the prefix and has `free` slots behind it, its real tokens int32 [B])."""
  if prefix is None:
    return constrain_cache(empty_cache(model.size, B, free, model.compute.dtype)), jnp.zeros(B, jnp.int32)
  rows, R = prefix.mask.shape
  if rows not in (1, B):
    raise ValueError(f"prefix: expected 1 row or {B}, got {rows}")

  def widen(x, row, slot):  # x with B rows on axis `row`, and free slots on axis `slot`
    x = jnp.broadcast_to(x, (*x.shape[:row], B, *x.shape[row + 1 :]))
    return jnp.pad(x, [(0, free * (axis == slot)) for axis in range(x.ndim)])

  cache = Cache(widen(prefix.k, 1, 3), widen(prefix.v, 1, 3), widen(prefix.mask, 0, 1), jnp.int32(R))
  return constrain_cache(cache), cache.mask.sum(-1, dtype=jnp.int32)


def _one_by_one(forward, logits, cache, live, N, eos, settings, keys):
  """Returns (tokens [B, N], log-probabilities [B]) by greedy decoding or sampling."""

  def choose_token(t, logits, live, tokens, scores):
    if settings.method == "greedy":
      token = logits.argmax(-1).astype(jnp.int32)
    else:
      draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row))
      token = draw(keys, to_draw_from(logits, settings)).astype(jnp.int32)
    token = jnp.where(live, token, eos)
    gain = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, t))
    return token, live & (token != eos), tokens, scores + jnp.where(live, gain, 0.0)

  def step(state):
    t, cache, token, *rest = state
    logits, cache = forward(token, t - 1, cache)
    return t + 1, cache, *choose_token(t, logits, *rest)

  tokens = jnp.full((len(live), N), eos, jnp.int32)
  state = (jnp.int32(1), cache, *choose_token(0, logits, live, tokens, jnp.zeros(len(live))))
  _, _, _, _, tokens, scores = jax.lax.while_loop(lambda s: (s[0] < N) & s[3].any(), step, state)
  return tokens, scores


class _Beams(NamedTuple):
  """K texts that go on and the K best that have ended, for each row."""

  tokens: jax.Array        # int32 [B, K, N], the likeliest first
  scores: jax.Array        # [B, K] log-probability
  source: jax.Array        # int32 [B, K], which beam of the step before each goes on from
  ended_tokens: jax.Array  # int32 [B, K, N], the best first
  ended_scores: jax.Array  # [B, K] log-probability / length ** length_penalty
  ended: jax.Array         # bool [B, K], whether there is one
  open: jax.Array          # bool [B], whether a text that goes on may still beat the worst that has ended


def _beam_search(forward, logits, cache, live, M, N, eos, settings):
  """Returns (tokens [B, N], scores [B]) of the best text of each row, as transformers' with early_stopping=False.

  The first M slots of the cache hold what all beams of a row begin with.
  """
  K = settings.beams
  B, V = logits.shape

  def pick(x, index):  # x [B, n, ...], index [B, m] -> [B, m, ...]
    return jax.vmap(lambda x, i: x[i])(x, index)

  def advance(t, logits, beams):  # logits [B, K, V]
    penalty = (t + 1.0) ** settings.length_penalty
    scores = jax.nn.log_softmax(logits) + beams.scores[..., None]
    # 2K, since K of them at most are an eos: K others go on.
    scores, index = jax.lax.top_k(scores.reshape(B, K * V), 2 * K)
    source, token = index // V, index % V
    tokens = jax.lax.dynamic_update_slice(pick(beams.tokens, source), token[..., None], (0, 0, t))
    ends = (token == eos) | (t + 1 == N)
    running, index = jax.lax.top_k(scores + jnp.where(ends, _NEVER, 0.0), K)

    # Of the 2K only the K likeliest may end, and only while that can change the outcome.
    may_end = ends & (jnp.arange(2 * K) < K)[None] & beams.open[:, None]
    merged = jnp.concatenate([beams.ended_scores, jnp.where(may_end, scores / penalty, _NEVER)], axis=1)
    ended_scores, best = jax.lax.top_k(merged, K)
    ended = pick(jnp.concatenate([beams.ended, may_end], axis=1), best)
    worst = jnp.where(ended, ended_scores[:, -1:], _NEVER).min(-1)
    return _Beams(pick(tokens, index), running, pick(source, index),
                  pick(jnp.concatenate([beams.ended_tokens, tokens], axis=1), best), ended_scores, ended,
                  beams.open & (running[:, 0] / penalty > worst))

  def follow(x, source):  # x [L, B·K, A, slots, K]: the rows of the beams that go on
    # The slots of the prompt are the same in all beams of a row, so only those of new tokens move.
    new = x[:, :, :, M:]
    moved = jax.vmap(lambda x, i: x[:, i], in_axes=(1, 0), out_axes=1)(
      new.reshape(new.shape[0], B, K, *new.shape[2:]), source)
    return jax.lax.dynamic_update_slice(x, moved.reshape(new.shape), (0, 0, 0, M, 0))

  def step(state):
    t, cache, beams = state
    cache = cache._replace(k=follow(cache.k, beams.source), v=follow(cache.v, beams.source))
    token = jax.lax.dynamic_slice_in_dim(beams.tokens, t - 1, 1, axis=2).reshape(B * K)
    logits, cache = forward(token, t - 1, constrain_cache(cache))
    return t + 1, cache, advance(t, logits.reshape(B, K, V), beams)

  texts = jnp.full((B, K, N), eos, jnp.int32)
  # All beams begin alike, so the first step takes its candidates from the first beam only.
  scores = jnp.where(jnp.arange(K) == 0, 0.0, _NEVER)
  beams = _Beams(texts, jnp.broadcast_to(scores, (B, K)), jnp.zeros((B, K), jnp.int32),
                 texts, jnp.full((B, K), _NEVER), jnp.zeros((B, K), bool), live)
  beams = advance(0, jnp.broadcast_to(logits[:, None], (B, K, V)), beams)
  cache = constrain_cache(Cache(*(jnp.repeat(x, K, axis=axis) for x, axis in zip(cache[:3], (1, 1, 0), strict=True)),
                                cache.next))
  *_, beams = jax.lax.while_loop(lambda s: (s[0] < N) & s[2].open.any(), step, (jnp.int32(1), cache, beams))
  return beams.ended_tokens[:, 0], jnp.where(live, beams.ended_scores[:, 0], 0.0)
