"""The linear prompt against PyTorch, its initialisation and dropout, and what it puts before a text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from limber_jax.config import Compute
from limber_jax.models import prompt
from limber_jax.models.prompt import LinearPrompt, prefix_inputs
from limber_jax.runtime.parallel import make_mesh, shardings
from limber_jax.weights import convert

FP32 = Compute(dtype="float32")
B, S, F, D = 3, 5, 24, 16


def features(seed=0):
  return np.random.default_rng(seed).normal(size=(B, S, F)).astype(np.float32)


def error(got, want):
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_prompt_is_that_of_the_reference(k, layer_norm):
  """Linear, "b (s d) -> b s d", LayerNorm if any: the order of ImagePrefix.project, with weights of a proj.ckpt."""
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  linear, ln = torch.nn.Linear(F, k * D), torch.nn.LayerNorm(D)
  with torch.no_grad():
    ln.weight.uniform_(0.5, 1.5)
    ln.bias.normal_()
  module = LinearPrompt(D, k, layer_norm=layer_norm, compute=FP32)
  like = jax.eval_shape(module.init, jax.random.key(0), features())["params"]
  source = {name: x.detach().numpy() for name, x in linear.state_dict().items()}
  params = convert.convert(prompt.REFERENCE_WEIGHTS, source, {"linear": like["linear"]})
  if layer_norm:
    params["ln"] = {"scale": ln.weight.detach().numpy(), "bias": ln.bias.detach().numpy()}

  x = torch.tensor(features(), requires_grad=True)
  want = linear(x).reshape(B, S * k, D)
  want = ln(want) if layer_norm else want
  weights = np.random.default_rng(1).normal(size=want.shape).astype(np.float32)
  (torch.tensor(weights) * want).sum().backward()

  def f(params, x):
    y = module.apply({"params": params}, x)
    return (weights * y).sum(), y

  (_, got), (grads, grad_x) = jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(params, features())
  assert error(got, want.detach()) <= 1e-5
  assert error(grad_x, x.grad) <= 1e-5
  assert error(grads["linear"]["kernel"], linear.weight.grad.T) <= 1e-5
  assert error(grads["linear"]["bias"], linear.bias.grad) <= 1e-5
  back = convert.export(prompt.REFERENCE_WEIGHTS, {"linear": params["linear"]})
  assert back.keys() == source.keys() and all(np.array_equal(back[n], source[n]) for n in source)


@pytest.mark.parametrize("name,s,f,k,count", [("CLIP", 144, 3072, 1, 12_587_008), ("BEiT", 196, 1024, 1, 4_198_400),
                                              ("NF-ResNet", 1, 2048, 1, 8_392_704),
                                              ("NF-ResNet, the paper's k", 1, 2048, 2, 16_785_408)])
def test_published_prompts_have_the_published_sizes(name, s, f, k, count):
  module = LinearPrompt(4096, k)
  x = jax.ShapeDtypeStruct((2, s, f), jnp.bfloat16)
  out, variables = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x), x)
  assert (out.shape, out.dtype) == ((2, s * k, 4096), jnp.bfloat16)
  assert sum(x.size for x in jax.tree.leaves(variables)) == count
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))


def test_initialisation_is_pytorchs_for_weight_and_bias():
  params = LinearPrompt(512, compute=FP32).init(jax.random.key(0), np.zeros((1, 1, 100), np.float32))["params"]
  bound = 100**-0.5
  for leaf in params["linear"].values():  # uniform: its largest of n is within a few / n of the bound
    leaf = np.asarray(leaf)
    assert bound * (1 - 20 / leaf.size) < np.abs(leaf).max() <= bound
    assert abs(leaf.std() / (bound / 3**0.5) - 1) < 5 / leaf.size**0.5


def test_dropout_drops_a_tenth_of_single_values_and_only_in_training():
  module = LinearPrompt(256, compute=FP32)
  x = np.random.default_rng(0).normal(size=(4, 50, F)).astype(np.float32)
  variables = module.init(jax.random.key(0), x)
  still = np.asarray(module.apply(variables, x))
  np.testing.assert_array_equal(module.apply(variables, x, rngs={"dropout": jax.random.key(1)}), still)
  got = np.asarray(module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)}))
  dropped = got == 0
  n = dropped.size
  assert abs(dropped.mean() - 0.1) < 5 * (0.1 * 0.9 / n) ** 0.5  # five sigma
  np.testing.assert_allclose(got[~dropped], still[~dropped] / 0.9, rtol=1e-6)
  assert 0 < dropped[0, 0].mean() < 1  # single values, not whole tokens
  off = LinearPrompt(256, dropout=0.0, compute=FP32)
  np.testing.assert_array_equal(off.apply(variables, x, train=True), still)


def test_layer_norm_comes_after_dropout():
  module = LinearPrompt(64, dropout=0.5, layer_norm=True, compute=FP32)
  variables = module.init(jax.random.key(0), features())
  got = np.asarray(module.apply(variables, features(), train=True, rngs={"dropout": jax.random.key(1)}))
  np.testing.assert_allclose(got.mean(-1), 0, atol=1e-6)  # zeros put in after it would move the mean
  np.testing.assert_allclose(got.std(-1), 1, atol=1e-3)


def test_prompt_and_text_follow_each_other():
  rng = np.random.default_rng(0)
  p, t = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 2, 4)).astype(np.float32)
  x, positions, mask = jax.jit(prefix_inputs)(p, t, np.array([[True, True], [True, False]]))
  np.testing.assert_array_equal(x, np.concatenate([p, t], 1))
  np.testing.assert_array_equal(positions, [[0, 1, 2, 3, 4]] * 2)
  np.testing.assert_array_equal(mask, [[True] * 5, [True] * 4 + [False]])
  assert (positions.dtype, mask.dtype) == (jnp.int32, jnp.bool_)
  x, _, _ = prefix_inputs(p, t.astype(jnp.bfloat16), np.ones((2, 2), bool))
  assert x.dtype == jnp.bfloat16  # that of the language model


@pytest.mark.parametrize("p,t,mask,message", [
  ((2, 3, 4), (2, 2, 5), (2, 2), r"expected image_prefix \[B, P, D\] and embeds \[B, T, D\], got \(2, 3, 4\) and"),
  ((1, 3, 4), (2, 2, 4), (2, 2), "expected image_prefix"),
  ((3, 4), (2, 2, 4), (2, 2), "expected image_prefix"),
  ((2, 3, 4), (2, 2, 4), (2, 5), r"text_mask: expected bool \(2, 2\)"),
])
def test_inputs_that_do_not_fit_together_are_refused(p, t, mask, message):
  with pytest.raises(ValueError, match=message):
    prefix_inputs(np.zeros(p, np.float32), np.zeros(t, np.float32), np.zeros(mask, bool))


def test_a_mask_of_numbers_and_features_without_tokens_are_refused():
  with pytest.raises(ValueError, match="text_mask: expected bool"):
    prefix_inputs(np.zeros((2, 3, 4)), np.zeros((2, 2, 4)), np.ones((2, 2), np.int32))
  with pytest.raises(ValueError, match=r"features: expected \[B, S, F\], got \(2, 4\)"):
    LinearPrompt(8).init(jax.random.key(0), np.zeros((2, 4), np.float32))


def test_a_prompt_is_spread_over_fsdp_and_tensor():
  like = jax.eval_shape(LinearPrompt(4096, layer_norm=True).init, jax.random.key(0), np.zeros((1, 1, 3072)))["params"]
  specs = shardings(like, prompt.SHARDING, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
  assert specs["linear"]["kernel"].spec == jax.P("fsdp", "tensor")
  assert specs["linear"]["bias"].spec == jax.P("tensor")
