"""GPT-J and its adapters against PyTorch with random weights; the cache; settings that must not change a result."""

import dataclasses
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models import adapters, gptj
from limber_jax.models.adapters import AdapterConfig
from limber_jax.models.cache import CACHE_SHARDING, empty_cache
from limber_jax.models.gptj import GPTJ, GPTJSize
from limber_jax.runtime import parallel
from limber_jax.weights import convert

FP32 = Compute(dtype="float32")
MODULE, MODEL = 1e-5, 1e-4  # relative errors of float32 here against float64 in PyTorch
SIZE = GPTJSize(vocab=99, context=64, width=64, layers=3, heads=4, rotary=8)
B, T = 4, 9
LENGTHS = (9, 6, 2, 1)  # real tokens of each row


def shapes(size, adapter_size=None):
  return jax.eval_shape(lambda key: gptj.init_params(GPTJ(size, FP32, adapter_size), key), jax.random.key(0))


def random_params(size, adapter_size=None):
  rng = np.random.default_rng(0)

  def leaf(path, x):
    if path[-1].key == "scale":
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    return (rng.normal(size=x.shape) * 0.15).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes(size, adapter_size))


def by_transformers(transformers, size, params):
  """Returns transformers' model of the same size and parameters, in float64."""
  import torch

  model = transformers.GPTJForCausalLM(transformers.GPTJConfig(
    vocab_size=size.vocab, n_positions=size.context, n_embd=size.width, n_layer=size.layers, n_head=size.heads,
    rotary_dim=size.rotary, bos_token_id=0, eos_token_id=0))
  missing, unexpected = model.load_state_dict(
    {name: torch.tensor(x) for name, x in convert.export(gptj.HF_WEIGHTS, params).items()}, strict=False)
  assert [*missing, *unexpected] == []
  return model.eval().double()


def prompts(side, width=SIZE.width):
  """Returns (x [B, T, D], positions, mask [B, T]) of rows of unequal length, padded on one side with noise."""
  mask = np.arange(T)[None] < np.array(LENGTHS)[:, None]
  if side == "left":
    mask = np.flip(mask, axis=1).copy()
  rng = np.random.default_rng(1)
  x = np.zeros((B, T, width), np.float32)
  x[mask] = rng.normal(size=(sum(LENGTHS), width))
  x[~mask] = 10 * rng.normal(size=((~mask).sum(), width))
  return x, np.maximum(mask.cumsum(-1) - 1, 0).astype(np.int32), mask


def run(params, x, positions, mask, compute=FP32, adapter_size=None, size=SIZE):
  """Returns (hidden, logits)."""
  model = GPTJ(size, compute, adapter_size)
  hidden, cache = model.apply({"params": params}, x, positions, mask)
  assert cache is None
  return hidden, model.apply({"params": params}, hidden, method="logits")


def error(got, want):
  """Returns the largest difference, relative to the largest value wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_logits_and_gradients_of_embeddings_are_those_of_transformers(transformers, side):
  import torch

  params = random_params(SIZE)
  theirs = by_transformers(transformers, SIZE, params)
  x, positions, mask = prompts(side)
  weights = np.random.default_rng(2).normal(size=(B, T, SIZE.vocab)).astype(np.float32) * mask[..., None]

  def f(x):
    hidden, logits = run(params, x, positions, mask)
    return (logits * weights).sum(), (hidden, logits)

  (_, (hidden, logits)), grad = jax.jit(jax.value_and_grad(f, has_aux=True))(x)

  x_torch = torch.tensor(x, dtype=torch.float64, requires_grad=True)
  out = theirs(inputs_embeds=x_torch, attention_mask=torch.tensor(mask), position_ids=torch.tensor(positions),
               output_hidden_states=True)
  (out.logits * torch.tensor(weights)).sum().backward()
  assert error(hidden[mask], out.hidden_states[-1].detach()[mask]) <= MODULE
  assert error(logits[mask], out.logits.detach()[mask]) <= MODULE
  assert error(grad, x_torch.grad) <= MODEL
  assert logits.dtype == jnp.float32
  assert not np.asarray(grad)[~mask].any()  # padding is never attended to


def test_tokens_are_embedded_as_in_transformers(transformers):
  import torch

  params = random_params(SIZE)
  tokens = np.random.default_rng(0).integers(0, SIZE.vocab, (2, 7))
  x = GPTJ(SIZE, FP32).apply({"params": params}, tokens, method="embed")
  np.testing.assert_array_equal(
    x, by_transformers(transformers, SIZE, params).transformer.wte(torch.tensor(tokens)).detach())


def test_padding_on_either_side_changes_nothing():
  params = random_params(SIZE)
  model = jax.jit(lambda *args: run(params, *args)[0])
  (x, p, m), (y, q, n) = prompts("left"), prompts("right")
  left, right = model(x, p, m), model(y, q, n)
  assert error(left[m], right[n]) <= MODULE
  for row in (1, 3):
    alone = tuple(a[row : row + 1, : LENGTHS[row]] for a in (y, q, n))
    assert error(right[row : row + 1, : LENGTHS[row]], model(*alone)) <= MODULE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunks", [(9,), (5, 1, 1, 2), (1,) * 9])
def test_tokens_through_a_cache_are_those_of_one_pass(side, chunks):
  params = random_params(SIZE)
  x, positions, mask = prompts(side)
  want = run(params, x, positions, mask)[0]
  model = GPTJ(SIZE, FP32)
  forward = jax.jit(lambda *args: model.apply({"params": params}, *args))
  cache = empty_cache(SIZE, B, 12, "float32")
  got, start = [], 0
  for size in chunks:
    part = slice(start, start + size)
    hidden, cache = forward(x[:, part], positions[:, part], mask[:, part], cache)
    got.append(hidden)
    start += size
  assert error(np.concatenate(got, axis=1)[mask], want[mask]) <= MODULE
  assert int(cache.next) == T
  np.testing.assert_array_equal(cache.mask[:, :T], mask)
  assert not cache.mask[:, T:].any()
  assert not np.asarray(cache.k[:, :, :, T:]).any()


def test_the_cache_of_a_first_pass_need_not_be_known_to_be_empty():
  """Under jit its `next` is a traced number; outside it is a Python 0, and the free slots are not looked at."""
  params = random_params(SIZE)
  x, positions, mask = prompts("left")
  model = GPTJ(SIZE, FP32)
  cache = empty_cache(SIZE, B, 12, "float32")
  known = model.apply({"params": params}, x, positions, mask, cache)
  traced = jax.jit(model.apply)({"params": params}, x, positions, mask, cache)
  for a, b in zip(jax.tree.leaves((known[0] * mask[..., None], known[1].k)),
                  jax.tree.leaves((traced[0] * mask[..., None], traced[1].k)), strict=True):
    assert np.abs(a - b)[..., -3:, :].max() < 1e-4


@pytest.mark.parametrize("settings", [{"remat": "dots"}, {"remat": "full", "unroll": 2}, {"unroll": 3}])
def test_remat_and_unrolling_change_neither_hidden_states_nor_gradients(settings):
  params = random_params(SIZE)
  x, positions, mask = prompts("right")

  def f(compute):
    def loss(x):
      hidden, _ = run(params, x, positions, mask, compute)
      return jnp.square(hidden[:, ::2, :7]).sum(), hidden
    (_, hidden), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    return hidden, grad

  for a, b in zip(f(dataclasses.replace(FP32, **settings)), f(FP32), strict=True):
    assert error(a, b) <= MODULE


def test_bfloat16_stays_close_to_float32():
  """bfloat16 keeps 8 bits, so each of some ten roundings in a row moves a value by up to 2⁻⁹ of itself."""
  params = random_params(SIZE)
  x, positions, mask = prompts("right")
  low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  want = run(params, x, positions, mask)
  got = run(low, x, positions, mask, Compute(dtype="bfloat16"))
  assert got[0].dtype == jnp.bfloat16
  assert got[1].dtype == jnp.float32
  assert error(got[0][mask], want[0][mask]) < 10 * 2**-9


def matrix_products(jaxpr):
  """Returns the shapes of the products of a program, those inside its loops too."""
  found = {tuple(sorted(e.outvars[0].aval.shape)) for e in jaxpr.eqns if e.primitive.name == "dot_general"}
  return found.union(*(matrix_products(inner) for e in jaxpr.eqns for inner in jaxprs_in_params(e.params)))


def test_no_gradient_of_a_weight_is_computed_for_that_of_the_embeddings():
  params = random_params(SIZE)
  x, positions, mask = prompts("right")

  def loss(params, x):
    return jnp.square(run(params, x, positions, mask)[1]).sum()

  kernels = {(64, 64), (64, 256), (64, 99)}
  of_weights, of_embeddings = (matrix_products(jax.make_jaxpr(jax.grad(loss, wrt))(params, x).jaxpr) for wrt in (0, 1))
  assert kernels <= of_weights
  assert not kernels & of_embeddings


@pytest.mark.parametrize("name,parameters", [
  ("gptj_6b", 6_050_882_784), ("gptj_100m", 97_591_808), ("gptj_10m", 9_649_024), ("gptj_mu", 165_376)])
def test_a_size_has_the_parameters_that_its_name_says(name, parameters):
  assert sum(x.size for x in jax.tree.leaves(shapes(gptj.SIZES[name]()))) == parameters


@pytest.mark.parametrize("name,meshes", [
  ("gptj_mu", [(2, 2, 1), (1, 4, 1), (1, 1, 4), (1, 8, 1), (2, 2, 2), (1, 1, 8), (8, 1, 1)]),
  ("gptj_6b", [(2, 2, 1), (1, 4, 1), (1, 1, 4), (1, 8, 1), (2, 2, 2), (1, 1, 8), (64, 1, 1), (1, 64, 1), (1, 8, 8),
               (4, 4, 4), (2, 16, 2), (1, 4, 16)]),
])
def test_sharding_rows_fit_every_parameter_and_the_cache(name, meshes):
  size = gptj.SIZES[name]()
  like = shapes(size, AdapterConfig("normal", "scaled_parallel", layer_norm=True))
  cache = jax.eval_shape(lambda: empty_cache(size, 64, size.context, "bfloat16"))
  for sizes in meshes:
    mesh = jax.sharding.AbstractMesh(sizes, parallel.AXES)
    parallel.shardings(like, (*gptj.SHARDING, *adapters.SHARDING), mesh)
    parallel.shardings(adapters.split_adapters(like)[0], gptj.SHARDING, mesh)
    if sizes[2] <= size.heads:
      for leaf, spec in zip(cache, CACHE_SHARDING, strict=True):
        jax.sharding.NamedSharding(mesh, spec).shard_shape(leaf.shape)


def test_every_sharding_row_is_used():
  like = shapes(gptj.SIZES["gptj_mu"](), AdapterConfig("normal", "normal"))
  names = ["/".join(p) for p in flax.traverse_util.flatten_dict(like)]
  rows = (*gptj.SHARDING, *adapters.SHARDING)
  first = [next(i for i, (pattern, _) in enumerate(rows) if re.search(pattern, name)) for name in names]
  assert set(first) == set(range(len(rows)))
  for name, i in zip(names, first, strict=True):  # every kernel is split
    assert (rows[i][1] != jax.P()) == (name.endswith("kernel") or name in (
      "embedding", "blocks/fc/bias", "head/bias")), name


def test_weights_of_transformers_go_round_unchanged(transformers):
  params = random_params(SIZE)
  model = by_transformers(transformers, SIZE, params).float()
  source = {name: x.numpy() for name, x in model.state_dict().items()}
  source |= {"transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), bool),
             "transformer.h.2.attn.masked_bias": np.float32(-1e9)}  # in older files
  back = convert.convert(gptj.HF_WEIGHTS, source, shapes(SIZE), gptj.HF_IGNORED)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_weights_of_the_old_flax_model_are_read():
  params = random_params(SIZE)
  b = params["blocks"]
  source = {
    "transformer/wte/embedding": params["embedding"],
    "transformer/ln_f/scale": params["ln_f"]["scale"],
    "transformer/ln_f/bias": params["ln_f"]["bias"],
    "lm_head/kernel": params["head"]["kernel"],
    "lm_head/bias": params["head"]["bias"],
  }
  for i in range(SIZE.layers):
    h = f"transformer/h/{i}"
    source |= {f"{h}/ln_1/{x}": b["ln_1"][x][i] for x in ("scale", "bias")}
    source |= {f"{h}/attn/{x}_proj/kernel": b["attn"][x]["kernel"][i] for x in ("q", "k", "v", "out")}
    source |= {f"{h}/mlp/fc_in/{x}": b["fc"][x][i] for x in ("kernel", "bias")}
    source |= {f"{h}/mlp/fc_out/{x}": b["proj"][x][i] for x in ("kernel", "bias")}
  jax.tree.map(np.testing.assert_array_equal, convert.convert(gptj.FLAX_WEIGHTS, source, shapes(SIZE)), params)


def test_random_parameters_are_as_published():
  params = jax.jit(lambda key: gptj.init_params(GPTJ(SIZE, FP32), key))(jax.random.key(0, impl="rbg"))
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  for name, x in flat.items():
    if name.endswith(("kernel", "embedding")):
      assert abs(x.std() / 0.02 - 1) < 5 / x.size**0.5, name
    else:
      assert (np.asarray(x) == name.endswith("scale")).all(), name
  assert not np.array_equal(*flat["blocks/attn/q/kernel"][:2])


class TorchAdapter:
  """MAGMA's adapters in PyTorch, written from the paper and its repository, around a module of one of our layers."""

  def __init__(self, module, kind, params, layer):
    import torch

    self.module, self.kind, self.torch = module, kind, torch
    self.p = {k: torch.tensor(np.asarray(v[layer]), dtype=torch.float64)
              for k, v in flax.traverse_util.flatten_dict(params, sep="/").items()}

  def bottleneck(self, x):
    p, F = self.p, self.torch.nn.functional
    if "ln/scale" in p:
      x = F.layer_norm(x, x.shape[-1:], p["ln/scale"], p["ln/bias"], 1e-5)
    x = F.linear(x, p["down/kernel"].T, p["down/bias"]).relu()
    return F.linear(x, p["up/kernel"].T, p["up/bias"])

  def forward(self, hidden_states, **kwargs):
    x = hidden_states
    out = self.module(x, **kwargs)
    y = out[0] if isinstance(out, tuple) else out
    y = y + (self.bottleneck(y) if self.kind == "normal" else self.p.get("scale", 1.0) * self.bottleneck(x))
    return (y, *out[1:]) if isinstance(out, tuple) else y


@pytest.mark.parametrize("size", [
  AdapterConfig("normal", ""), AdapterConfig("parallel", "", layer_norm=True), AdapterConfig("scaled_parallel", ""),
  AdapterConfig("", "normal", 8), AdapterConfig("", "parallel"),
  AdapterConfig("normal", "scaled_parallel", layer_norm=True)],
  ids=lambda s: f"mlp={s.mlp},attention={s.attention}")
def test_adapters_are_those_of_magma(transformers, size):
  import torch

  params = random_params(SIZE, size)
  lm, parts = adapters.split_adapters(params)
  theirs = by_transformers(transformers, SIZE, lm)
  for layer, block in enumerate(theirs.transformer.h):
    for place, kind, key in (("mlp", size.mlp, "adapter_mlp"), ("attn", size.attention, "adapter_attn")):
      if kind:
        original = getattr(block, place)
        wrapped = TorchAdapter(original.forward, kind, parts["blocks"][key], layer)
        original.forward = wrapped.forward
  x, positions, mask = prompts("right")
  _, got = run(params, x, positions, mask, adapter_size=size)
  want = theirs(inputs_embeds=torch.tensor(x, dtype=torch.float64), attention_mask=torch.tensor(mask),
                position_ids=torch.tensor(positions)).logits.detach()
  assert error(got[mask], want[mask]) <= MODULE
  assert error(got[mask], run(lm, x, positions, mask)[1][mask]) > 1e-2


def test_adapters_come_off_and_go_back_on():
  params = random_params(SIZE, AdapterConfig("normal", "parallel"))
  lm, parts = adapters.split_adapters(params)
  assert jax.tree.structure(lm) == jax.tree.structure(shapes(SIZE))
  assert set(parts) == {"blocks"}
  assert set(parts["blocks"]) == {"adapter_attn", "adapter_mlp"}
  jax.tree.map(np.testing.assert_array_equal, adapters.merge_adapters(lm, parts), params)
  assert adapters.split_adapters(lm) == (lm, {})


def test_new_adapters_hardly_change_the_model():
  size = AdapterConfig("normal", "scaled_parallel", 4, True)
  params = jax.jit(lambda key: gptj.init_params(GPTJ(SIZE, FP32, size), key))(jax.random.key(0, impl="rbg"))
  parts = flax.traverse_util.flatten_dict(adapters.split_adapters(params)[1]["blocks"], sep="/")
  for name, x in parts.items():
    if "/ln/" in name or name.endswith("/scale"):
      assert (np.asarray(x) == name.endswith("scale")).all(), name
    else:
      assert abs(x).max() <= np.float32(2e-3), name
      if x.size > 1000:  # clamped at two sigma: 4.6 % of the numbers lie there
        assert abs(np.mean(abs(x) == np.float32(2e-3)) - 0.0455) < 5 * (0.0455 / x.size) ** 0.5, name
  count = sum(x.size for x in jax.tree.leaves(adapters.split_adapters(shapes(GPTJSize(), AdapterConfig("normal")))[1]))
  assert round(count / 1e6, 1) == 235.0


@pytest.mark.parametrize("size,adapter_size,message", [
  (dataclasses.replace(SIZE, heads=5), None, "5 heads do not divide a width of 64"),
  (dataclasses.replace(SIZE, rotary=18), None, "rotary=18: expected an even number up to .* 16"),
  (SIZE, AdapterConfig("serial"), "adapters.mlp='serial': choose one of"),
  (SIZE, AdapterConfig("normal", downsample=5), "downsample=5 does not divide a width of 64"),
])
def test_sizes_that_do_not_fit_together_are_refused(size, adapter_size, message):
  with pytest.raises(UserError, match=message):
    shapes(size, adapter_size)


def test_inputs_of_another_shape_are_refused():
  params = random_params(SIZE)
  x, positions, mask = prompts("left")
  with pytest.raises(ValueError, match=r"x: expected \[B, T, 64\] with T <= 64, got \(4, 9, 63\)"):
    run(params, x[..., 1:], positions, mask)
  with pytest.raises(ValueError, match=r"positions, mask: expected int32 and bool \(4, 9\)"):
    run(params, x, positions[:1], mask)
