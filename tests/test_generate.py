"""Generation against transformers token for token, against hand-computed distributions, and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gptj import FP32, by_transformers, random_params

from limber_jax.config import Decoding
from limber_jax.decoding import generate
from limber_jax.errors import UserError
from limber_jax.models import gptj
from limber_jax.models.cache import CACHE_SHARDING, constrain_cache, empty_cache
from limber_jax.models.gptj import GPTJ, GPTJSize
from limber_jax.runtime import parallel

# Few tokens, so that texts end early and beams compete.
SIZE = GPTJSize(vocab=17, context=48, width=64, layers=2, heads=4, rotary=8)
EOS, B, P, N = 3, 8, 7, 12
MODEL = GPTJ(SIZE, FP32)
LENGTHS = (7, 4, 1, 6, 2, 7, 3, 5)  # real positions of each prompt
BEAMS = [Decoding("beam", beams=2), Decoding("beam", beams=3, length_penalty=2.0),
         Decoding("beam", beams=4, length_penalty=0.0), Decoding("beam", beams=4, length_penalty=-1.0)]


def params_of():
  params = random_params(SIZE)
  params["head"]["kernel"] *= 0.5
  params["head"]["bias"][EOS] += 1.0
  return params


def prompts(side):
  """Returns (x [B, P, D], positions, mask [B, P]): embeddings that belong to no token, padded on one side."""
  mask = np.arange(P)[None] < np.array(LENGTHS)[:, None]
  if side == "left":
    mask = np.flip(mask, axis=1).copy()
  rng = np.random.default_rng(1)
  x = np.full((B, P, SIZE.width), 7.0, np.float32)
  x[mask] = rng.normal(size=(sum(LENGTHS), SIZE.width))
  return x, np.maximum(mask.cumsum(-1) - 1, 0).astype(np.int32), mask


@functools.cache
def program(settings, model, tokens):
  return jax.jit(lambda params, x, positions, mask, keys: generate.generate(
    model, params, x, positions, mask, max_new_tokens=tokens, eos=EOS, settings=settings, keys=keys))


def ours(params, x, positions, mask, settings, keys=None, model=MODEL, tokens=N):
  return jax.tree.map(np.asarray, program(settings, model, tokens)(params, x, positions, mask, keys))


R = 5  # slots of a prefix


@functools.cache
def with_prefix(settings, tokens=N):
  def run(params, before, x, positions, mask, keys):
    prefix = generate.prefill(MODEL, params, *before)
    return generate.generate(MODEL, params, x, positions, mask, max_new_tokens=tokens, eos=EOS, settings=settings,
                             keys=keys, prefix=prefix)
  return jax.jit(run)


def prefixes(rows, real, side):
  """Returns (x [rows, R, D], positions, mask [rows, R]) of `real` embeddings a row, padded on one side."""
  mask = np.tile(np.arange(R) < real, (rows, 1))
  if side == "left":
    mask = np.flip(mask, axis=1).copy()
  x = np.full((rows, R, SIZE.width), 7.0, np.float32)
  x[mask] = np.random.default_rng(2).normal(size=(rows * real, SIZE.width))
  return x, np.maximum(mask.cumsum(-1) - 1, 0).astype(np.int32), mask


def by_hf(transformers, params, settings):
  """Returns (tokens [B, N], scores [B] or None) by transformers, whose prompts are padded on the left."""
  import torch

  x, _, mask = prompts("left")
  beam = settings.method == "beam"
  out = by_transformers(transformers, SIZE, params).generate(
    inputs_embeds=torch.tensor(x, dtype=torch.float64), attention_mask=torch.tensor(mask).long(), max_new_tokens=N,
    do_sample=False, eos_token_id=EOS, pad_token_id=EOS, num_beams=settings.beams if beam else 1,
    return_dict_in_generate=True, output_scores=True, **({"length_penalty": settings.length_penalty} if beam else {}))
  tokens = np.full((B, N), EOS)
  tokens[:, : out.sequences.shape[1]] = out.sequences
  return tokens, out.sequences_scores.numpy() if beam else None


@pytest.mark.parametrize("settings", [Decoding(), *BEAMS], ids=lambda s: f"{s.method}{s.beams},{s.length_penalty}")
def test_tokens_are_those_of_transformers_wherever_the_padding_stands(transformers, settings):
  params = params_of()
  tokens, scores = by_hf(transformers, params, settings)
  for side in ("left", "right"):
    got = ours(params, *prompts(side), settings)
    np.testing.assert_array_equal(got.tokens, tokens)
    if scores is not None:
      np.testing.assert_allclose(got.scores, scores, rtol=1e-4)
  assert (got.lengths < N).any()  # some end early
  if settings.length_penalty > 0:
    assert got.lengths.max() > 2
  ends = [list(row).index(EOS) if EOS in row else N for row in tokens]
  np.testing.assert_array_equal(got.lengths, ends)


@pytest.mark.parametrize("settings", [Decoding(), Decoding("sample", 0.8, 9, 0.9), BEAMS[1]], ids=lambda s: s.method)
@pytest.mark.parametrize(("rows", "real", "side"), [(1, R, "right"), (1, 3, "right"), (1, 3, "left"), (B, 4, "left")])
def test_a_prefix_read_once_is_as_if_every_row_began_with_it(settings, rows, real, side):
  params = params_of()
  before = prefixes(rows, real, side)
  keys = generate.row_keys(jax.random.key(0), jnp.arange(B))
  for own in ("left", "right"):
    x, positions, mask = prompts(own)
    start = [np.broadcast_to(a, (B, *a.shape[1:])) for a in before]
    # The whole without padding inside: each row's real tokens, then what fills it up.
    whole = [np.concatenate([a, b], axis=1) for a, b in zip(start, (x, positions + real, mask), strict=True)]
    order = np.argsort(~whole[2], axis=1, kind="stable")
    whole = [np.take_along_axis(a, order.reshape(B, R + P, *[1] * (a.ndim - 2)), axis=1) for a in whole]
    assert (whole[1][whole[2]] == np.concatenate([np.arange(real + n) for n in LENGTHS])).all()
    want = ours(params, *whole, settings, keys)
    got = jax.device_get(with_prefix(settings)(params, before, x, positions + real, mask, keys))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4)
  assert (got.tokens != ours(params, x, positions, mask, settings, keys).tokens).any()  # the prefix counts


def test_a_prefix_on_a_mesh_changes_no_token():
  params, before = params_of(), prefixes(1, R, "right")
  x, positions, mask = prompts("right")
  want = jax.device_get(with_prefix(BEAMS[1])(params, before, x, positions + R, mask, None))
  mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = [(p, jax.P() if p.startswith("head") else spec) for p, spec in gptj.SHARDING]  # 17 does not divide
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, parallel.shardings(params, rules, mesh))
    batch = parallel.global_batch((x, positions + R, mask), mesh)
    got = jax.device_get(with_prefix(BEAMS[1], N)(sharded, before, *batch, None))
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4)


@pytest.mark.parametrize("settings", [Decoding(), BEAMS[1]], ids=lambda s: s.method)
def test_a_mesh_changes_no_token(settings):
  params = params_of()
  batch = prompts("left")
  want = ours(params, *batch, settings)
  mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = [(p, jax.P() if p.startswith("head") else spec) for p, spec in gptj.SHARDING]  # 17 does not divide
  with jax.set_mesh(mesh):
    sharded = jax.device_put(params, parallel.shardings(params, rules, mesh))
    got = ours(sharded, *parallel.global_batch(batch, mesh), settings)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4)


def test_the_cache_lies_over_the_mesh():
  mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  with jax.set_mesh(mesh):
    cache = jax.jit(lambda: constrain_cache(empty_cache(SIZE, B, 16, "float32")))()
  assert cache.k.sharding.spec == CACHE_SHARDING.k
  assert cache.k.addressable_shards[0].data.shape == (2, 2, 2, 16, 16)


@pytest.mark.parametrize("settings", [Decoding(), Decoding("sample", 0.8, 9, 0.9), BEAMS[0]], ids=lambda s: s.method)
def test_a_row_does_not_depend_on_the_others(settings):
  params = params_of()
  x, positions, mask = prompts("left")
  ids = jnp.arange(B, dtype=jnp.int32)
  keys = generate.row_keys(jax.random.key(0), ids)
  want = ours(params, x, positions, mask, settings, keys)
  order = np.random.default_rng(0).permutation(B)
  got = ours(params, x[order], positions[order], mask[order], settings, keys[order])
  np.testing.assert_array_equal(got.tokens, want.tokens[order])
  for row in (0, 2):
    one = slice(row, row + 1)
    alone = ours(params, x[one], positions[one], mask[one], settings, keys[one])
    np.testing.assert_array_equal(alone.tokens[0], want.tokens[row])
    np.testing.assert_allclose(alone.scores[0], want.scores[row], rtol=1e-4)


def test_keys_that_would_tie_rows_together_are_refused():
  with pytest.raises(UserError, match="keys: expected those of threefry2x32, JAX's default, got rbg"):
    keys = generate.row_keys(jax.random.key(0, impl="rbg"), jnp.arange(B))
    ours({}, *prompts("left"), Decoding("sample"), keys)


def test_other_keys_draw_other_texts():
  params = params_of()
  keys = [generate.row_keys(jax.random.key(seed), jnp.arange(B)) for seed in (0, 1)]
  a, b = (ours(params, *prompts("left"), Decoding("sample"), k).tokens for k in keys)
  assert (a != b).any()


class Scripted:
  """A language model that says what it is told: after token a, token b has the logit table[a, b]."""

  size = GPTJSize(vocab=4, context=64, width=4, layers=1, heads=2, rotary=2)
  compute = FP32

  def __init__(self, table):
    self.table, self.steps = jnp.asarray(table, jnp.float32), 0

  def apply(self, variables, *args, method=None):
    if method == "embed":
      return jax.nn.one_hot(args[0], 4)
    if method == "logits":
      return args[0] @ self.table
    x, _, mask, cache = args
    jax.debug.callback(self._count)
    return x, cache._replace(mask=jax.lax.dynamic_update_slice(cache.mask, mask, (0, cache.next)),
                             next=jnp.int32(cache.next + x.shape[1]))

  def _count(self):
    self.steps += 1


def start_from(*tokens):
  """Returns prompts of one token each."""
  rows = len(tokens)
  return jax.nn.one_hot(jnp.array(tokens)[:, None], 4), jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows, 1), bool)


def test_it_stops_when_every_row_is_done():
  table = 9 * np.eye(4)[[1, 2, EOS, EOS]]  # 0 -> 1 -> 2 -> EOS
  model = Scripted(table)
  for settings in (Decoding(), Decoding("beam", beams=2, length_penalty=-9.0)):
    model.steps = 0
    x, positions, mask = start_from(0, 2, 0)
    got = ours({}, x, positions, mask.at[2].set(False), settings, model=model, tokens=40)
    jax.effects_barrier()
    assert got.tokens[:, :4].tolist() == [[1, 2, EOS, EOS], [EOS] * 4, [EOS] * 4]
    assert got.lengths.tolist() == [2, 0, 0]  # the last is no prompt at all, as what fills up the last batch
    assert model.steps < 12
  assert ours({}, *start_from(0, 2), Decoding(), model=model, tokens=1).tokens.tolist() == [[1], [EOS]]
  assert ours({}, *start_from(0, 2), Decoding("beam"), model=model, tokens=1).tokens.tolist() == [[1], [EOS]]


def test_beams_find_what_greed_misses():
  """From 0, greedily to 1 (0.6) and then EOS (0.4): 0.24; better to 2 (0.4) and then EOS (0.9): 0.36."""
  tiny = 1e-6
  table = np.log([[tiny, 0.6, 0.4, tiny], [0.3, 0.15, 0.15, 0.4], [0.04, 0.03, 0.03, 0.9], [tiny] * 3 + [1]])
  model = Scripted(table)
  x, positions, mask = start_from(0)
  greedy = ours({}, x, positions, mask, Decoding(), model=model, tokens=2)
  beam = ours({}, x, positions, mask, Decoding("beam", beams=2, length_penalty=1.0), model=model, tokens=2)
  assert greedy.tokens.tolist() == [[1, EOS]]
  assert beam.tokens.tolist() == [[2, EOS]]
  np.testing.assert_allclose(greedy.scores, np.log([0.24]), rtol=1e-4)
  np.testing.assert_allclose(beam.scores, np.log([0.36]) / 2, rtol=1e-4)


def test_samples_follow_the_distribution():
  p = np.array([0.5, 0.3, 0.15, 0.05])
  model = Scripted(np.log(np.tile(p, (4, 1))))
  rows = 4000
  x, positions, mask = start_from(*[0] * rows)
  keys = generate.row_keys(jax.random.key(0), jnp.arange(rows))
  for settings, want in (
    (Decoding("sample", temperature=0.5), p**2 / (p**2).sum()),
    (Decoding("sample", top_k=2), np.array([5, 3, 0, 0]) / 8),
    (Decoding("sample", top_p=0.9), np.array([50, 30, 15, 0]) / 95),
  ):
    tokens = ours({}, x, positions, mask, settings, keys, model, tokens=2).tokens
    for drawn in (tokens[:, 0], tokens[tokens[:, 0] != EOS, 1]):
      counts = np.bincount(drawn, minlength=4) / len(drawn)
      assert np.abs(counts - want).max() < 4 * (0.25 / len(drawn)) ** 0.5
      assert not counts[want == 0].any()


PEAKED = np.array([0.6, 0.2, 0.08, 0.07, 0.05])
FLAT = np.array([0.08, 0.06, 0.04, 0.02] + [0.008] * 100)


def kept(p, f):
  """Returns the ranks of the tokens that f keeps, of a distribution given by rank, shuffled."""
  order = np.random.default_rng(0).permutation(len(p))
  logits = np.log(p)[order]
  out = np.asarray(f(jnp.asarray(logits[None], jnp.float32)))[0]
  np.testing.assert_allclose(out[np.isfinite(out)], logits[np.isfinite(out)], rtol=1e-6)
  return sorted(order[np.isfinite(out)])


def test_the_nucleus_is_the_fewest_tokens_with_that_probability():
  assert kept(PEAKED, lambda x: generate.keep_top_p(x, 0.9)) == [0, 1, 2, 3]
  assert kept(PEAKED, lambda x: generate.keep_top_p(x, 0.5)) == [0]
  assert kept(PEAKED, lambda x: generate.keep_top_p(x, 1e-9)) == [0]
  flat = kept(FLAT, lambda x: generate.keep_top_p(x, 0.9))
  assert len(flat) == 92
  assert flat[:4] == [0, 1, 2, 3]
  assert kept(PEAKED, lambda x: generate.keep_top_k(x, 2)) == [0, 1]
  assert kept(PEAKED, lambda x: generate.keep_top_k(x, 0)) == [0, 1, 2, 3, 4]
  assert kept(PEAKED, lambda x: generate.keep_top_k(x, 9)) == [0, 1, 2, 3, 4]


def test_the_inverted_nucleus_is_what_the_reference_of_limber_keeps():
  """Its top_p=0.9 is a nucleus of 0.1."""
  assert kept(PEAKED, lambda x: generate.keep_top_p(x, 0.9, inverted=True)) == [0]
  assert kept(FLAT, lambda x: generate.keep_top_p(x, 0.9, inverted=True)) == [0, 1]
  # The temperature comes last there: divided by it before, the flat one would keep its first only.
  settings = Decoding("sample", temperature=0.7, top_p=0.9, inverted_nucleus=True)
  got = np.asarray(generate.to_draw_from(jnp.log(jnp.asarray(FLAT, jnp.float32))[None], settings))[0]
  np.testing.assert_allclose(got[:2], np.log(FLAT[:2]) / 0.7, rtol=1e-5)
  assert np.isinf(got[2:]).all()
  sane = Decoding("sample", temperature=0.3, top_p=0.1)
  assert np.isfinite(generate.to_draw_from(jnp.log(jnp.asarray(FLAT, jnp.float32))[None], sane)).sum() == 1


def test_filters_are_those_of_transformers(transformers):
  import torch

  logits = np.random.default_rng(0).normal(size=(5, 300)).astype(np.float32) * 3
  warpers = [transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(40),
             transformers.TopPLogitsWarper(0.8)]
  want = torch.tensor(logits)
  for warper in warpers:
    want = warper(None, want)
  got = generate.to_draw_from(jnp.asarray(logits), Decoding("sample", 0.7, 40, 0.8))
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("settings,message", [
  (Decoding("gready"), "decoding.method='gready': choose one of greedy, sample, beam"),
  (Decoding("sample", temperature=0.0), "decoding.temperature=0.0: wanted more than 0"),
  (Decoding("sample", top_k=-1), "decoding.top_k=-1"),
  (Decoding("sample", top_p=1.5), "decoding.top_p=1.5: wanted 1 or less"),
  (Decoding("beam", beams=0), "decoding.beams=0: wanted 1 or more"),
  (Decoding(temperature=0.7), "decoding.temperature=0.7 is for method='sample', but the method is 'greedy'"),
  (Decoding("beam", top_p=0.9), "decoding.top_p=0.9 is for method='sample', but the method is 'beam'"),
  (Decoding("sample", beams=3), "decoding.beams=3 is for method='beam'"),
  (Decoding("sample"), "method='sample' needs 8 keys, one for each row; got none"),
])
def test_a_wrong_setting_is_named(settings, message):
  with pytest.raises(UserError, match=message):
    ours({}, *prompts("left"), settings)


def test_a_text_longer_than_the_context_is_refused():
  with pytest.raises(UserError, match=r"max_new_tokens=42: .* with the 7 positions of the prompt at most the 48"):
    ours({}, *prompts("left"), Decoding(), tokens=42)
  before = prefixes(1, R, "right")
  x, positions, mask = prompts("left")
  with pytest.raises(UserError, match=r"max_new_tokens=37: .* with the 12 positions of the prompt at most the 48"):
    with_prefix(Decoding(), 37)(params_of(), before, x, positions, mask, None)


def test_a_prefix_of_another_number_of_rows_is_refused():
  x, positions, mask = prompts("left")
  with pytest.raises(ValueError, match="prefix: expected 1 row or 8, got 3"):
    with_prefix(Decoding())(params_of(), prefixes(3, R, "right"), x, positions, mask, None)
