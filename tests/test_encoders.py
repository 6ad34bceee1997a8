"""The image encoders against PyTorch with random weights, their initialisation, and what all of them promise."""

import dataclasses
import functools
import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models import beit, encoders, nfnet
from limber_jax.models.beit import BeitSize
from limber_jax.models.encoders import Encoder
from limber_jax.models.nfnet import NfResNetSize
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.spec import EncoderConfig
from limber_jax.models.vit import ViTSize
from limber_jax.runtime.parallel import make_mesh, shardings
from limber_jax.weights import convert

FP32 = Compute(dtype="float32")
FEATURE, GRADIENT = 1e-5, 1e-4  # relative errors of float32 here against float64 in PyTorch
KEY = jax.random.key(0, impl="rbg")  # threefry takes long to compile


def error(got, want, scale=None):
  """Returns the largest difference, relative to the largest value of `scale`, by default of what is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want if scale is None else scale).max()


def randomise(model):
  """Moves every parameter and statistic of a torch model away from values that hide errors."""
  import torch

  torch.manual_seed(1)
  with torch.no_grad():
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
      if name.endswith("running_var"):
        x.uniform_(0.5, 2.0)
      elif name.endswith("running_mean"):
        x.normal_(0, 0.3)
      elif name.endswith("gain") or (x.ndim == 1 and not name.endswith("bias")):
        x.uniform_(0.5, 1.5)
      elif name.endswith("bias"):
        x.normal_(0, 0.2)
      elif x.ndim >= 2 and name.endswith("weight"):
        x.normal_(0, x[0].numel() ** -0.5)
      elif x.is_floating_point():  # class token, tables of positions
        x.normal_(0, 1)
  return model


@functools.cache
def built(name):
  """Returns (encoder, shapes of its params, shapes of its stats): tracing takes most of the time of a test."""
  encoder = Encoder.from_config(encoders.encoder_size(name), FP32)
  return encoder, *encoder.shapes()


@functools.cache
def initialised(name):
  """Returns the random parameters of an encoder, each compiled once."""
  return jax.jit(built(name)[0].init)(KEY)[0]


def random_images(size, batch=2):
  return np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)


def random_variables(encoder, seed=0):
  """Returns (params, stats) from numpy: every leaf away from the values that hide errors."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    if path[-1].key in ("scale", "var", "gain", "layer_scale_1", "layer_scale_2"):
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    fan_in = np.prod(x.shape[-4:-1] if path[-1].key == "kernel" else 25)
    return (rng.normal(size=x.shape) / fan_in**0.5).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, encoder.shapes())


def from_torch(encoder, source):
  """Returns (params, stats) of tensors by name."""
  params, stats = encoder.shapes()
  like = params | ({"stats": stats} if stats else {})
  tree = convert.convert(encoder.rows(source), source, like, encoder.spec.ignored)
  return tree, tree.pop("stats", {})


def on_disk(model, folder):
  """Returns the state of a transformers model by the names of its files, which are not those in memory."""
  model.save_pretrained(folder)
  return load_file(folder / "model.safetensors")


def features_of(encoder, params, stats, images):
  return jax.jit(lambda params, x: encoder.encode(params, stats, x)[0])(params, images)


def by_jax(encoder, params, stats, images, w_tokens, w_pooled):
  """Returns (features, gradients) of the weighted sum of tokens and pooled."""

  def f(params):
    features, _ = encoder.encode(params, stats, images)
    return (w_tokens * features.tokens).sum() + (w_pooled * features.pooled).sum(), features

  (_, features), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params)
  return features, grads


def weights_like(*shapes):
  rng = np.random.default_rng(2)
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


def assert_same_gradients(got, want):
  got, want = (flax.traverse_util.flatten_dict(x, sep="/") for x in (got, want))
  assert got.keys() == want.keys()
  for path in want:
    assert error(got[path], want[path]) <= GRADIENT, path


# --- BEiT ---

BEIT = {"image_size": 32, "patch": 8, "width": 48, "layers": 3, "heads": 3, "mlp_ratio": 2}


def beit_of_transformers(transformers, kind, t):
  shared = t.shared_positions
  return getattr(transformers, kind)(transformers.BeitConfig(**{
    "image_size": t.image_size, "patch_size": t.patch, "hidden_size": t.width, "num_hidden_layers": t.layers,
    "num_attention_heads": t.heads, "intermediate_size": t.mlp_ratio * t.width, "use_mask_token": shared,
    "use_shared_relative_position_bias": shared, "use_relative_position_bias": not shared, "vocab_size": 11}))


PUBLISHED_BEIT = [("BeitForMaskedImageModeling", BeitSize(**BEIT)),  # pt22k and, fine-tuned, pt22k-ft22k
                  ("BeitForImageClassification", BeitSize(**BEIT, shared_positions=False, pooler=True))]


@pytest.mark.parametrize("kind,tower", PUBLISHED_BEIT, ids=["pt22k", "ft22k"])
def test_beit_has_the_features_and_gradients_of_transformers(transformers, tmp_path, kind, tower):
  import torch

  model = randomise(beit_of_transformers(transformers, kind, tower)).eval()
  encoder = Encoder.from_config(EncoderConfig(tower), FP32)
  params, _ = from_torch(encoder, on_disk(model, tmp_path / "weights"))
  images = random_images(32)
  w_tokens, w_pooled = weights_like((2, 16, 48), (2, 48))

  features, grads = by_jax(encoder, params, {}, images, w_tokens, w_pooled)
  model = model.double()
  out = model.beit(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  tokens = out.last_hidden_state[:, 1:]
  pooled = out.pooler_output if tower.pooler else tokens.mean(1)
  assert error(features.tokens, tokens.detach()) <= FEATURE
  assert error(features.pooled, pooled.detach()) <= FEATURE

  ((torch.tensor(w_tokens) * tokens).sum() + (torch.tensor(w_pooled) * pooled).sum()).backward()
  with torch.no_grad():  # so that the gradients are saved under the names of files too
    for p in model.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
  want, _ = from_torch(encoder, on_disk(model.float(), tmp_path / "gradients"))
  assert_same_gradients(grads, want)


def test_layer_norms_of_a_beit_have_its_epsilon(transformers, tmp_path):
  """Faint images through random weights: an eps of 1e-5 instead of 1e-12 would drown their variance."""
  import torch

  torch.manual_seed(0)
  encoder, _, _ = built("beit_l16_ft_mu")
  model = beit_of_transformers(transformers, "BeitModel", encoder.size.tower).eval()
  params, _ = from_torch(encoder, on_disk(model, tmp_path))
  images = 0.01 * random_images(32)
  with torch.no_grad():
    want = model.double()(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  got = features_of(encoder, params, {}, images)
  assert error(got.tokens, want.last_hidden_state[:, 1:]) <= FEATURE
  assert error(got.pooled, want.pooler_output) <= FEATURE


@pytest.mark.parametrize("kind,tower", PUBLISHED_BEIT, ids=["pt22k", "ft22k"])
def test_beit_is_read_with_and_without_its_head(transformers, tmp_path, kind, tower):
  model = randomise(beit_of_transformers(transformers, kind, tower))
  encoder = Encoder.from_config(EncoderConfig(tower), FP32)
  headed = on_disk(model, tmp_path / "headed")
  base = transformers.BeitModel(model.config)  # with a pooler, although pt22k has none to give
  base.load_state_dict(model.beit.state_dict(), strict=tower.pooler)
  bare = on_disk(base, tmp_path / "bare")
  # Buffers that transformers saved until 2023.
  bare |= {f"encoder.{where}relative_position_bias.relative_position_index": np.zeros((17, 17), np.int64)
           for where in ("", "layer.0.attention.attention.")}
  assert "beit.embeddings.cls_token" in headed and "embeddings.cls_token" in bare
  jax.tree.map(np.testing.assert_array_equal, from_torch(encoder, bare), from_torch(encoder, headed))


def test_a_pooler_that_the_weights_lack_is_named(transformers, tmp_path):
  source = on_disk(beit_of_transformers(transformers, "BeitForMaskedImageModeling", BeitSize(**BEIT)), tmp_path)
  encoder = Encoder.from_config(EncoderConfig(BeitSize(**BEIT, pooler=True)), FP32)
  with pytest.raises(UserError, match=r"pooler/(scale|bias): no tensor 'beit.pooler.layernorm"):
    from_torch(encoder, source)


def test_relative_positions_by_hand_and_as_transformers_counts_them(transformers):
  module = transformers.models.beit.modeling_beit.BeitRelativePositionBias
  for side in (1, 2, 5, 14):
    np.testing.assert_array_equal(beit.relative_positions(side), module.generate_relative_position_index((side, side)))
  # A window of 2 × 2: offsets 0..8 in reading order, of which 4 is no offset; then the three of the class token.
  np.testing.assert_array_equal(beit.relative_positions(2), [
    [11, 9, 9, 9, 9],
    [10, 4, 3, 1, 0],
    [10, 5, 4, 2, 1],
    [10, 7, 6, 4, 3],
    [10, 8, 7, 5, 4]])
  assert beit.relative_positions(14).max() == 731


@pytest.mark.parametrize("name", ["beit_l16_mu", "beit_l16_ft_mu"])
def test_beits_initialisation_is_that_of_transformers(transformers, tmp_path, name):
  import torch

  torch.manual_seed(0)
  encoder, _, _ = built(name)
  source = on_disk(beit_of_transformers(transformers, "BeitModel", encoder.size.tower), tmp_path)
  assert_same_distributions(initialised(name), from_torch(encoder, source)[0])


def assert_same_distributions(got, want):
  got, want = (flax.traverse_util.flatten_dict(x, sep="/") for x in (got, want))
  assert got.keys() == want.keys()
  for path, w in want.items():
    g = np.asarray(got[path])
    if np.ptp(w) == 0:
      np.testing.assert_array_equal(g, w, err_msg=path)
      continue
    assert abs(g.std() / w.std() - 1) < 5 / w.size**0.5, path  # normal numbers: one sigma is √(1/n)
    assert abs(g.mean() - w.mean()) < 5 * w.std() * (2 / w.size) ** 0.5, path
    if g.ndim > 2 and len(g) > 1 and re.search("blocks|_rest", path):
      assert not np.array_equal(g[0], g[1]), path


def test_a_random_beit_does_not_know_where_a_patch_is():
  """Tables start at zero and there are no other positions: patches that move take their tokens along."""
  encoder, params = built("beit_l16_mu")[0], initialised("beit_l16_mu")
  encode = jax.jit(lambda params, x: encoder.encode(params, {}, x)[0].tokens)
  order = np.random.default_rng(0).permutation(16)

  def moved(images):  # [B, 32, 32, 3], patches of 8 in another order
    patches = images.reshape(-1, 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, 8, 8, 3)[:, order]
    return patches.reshape(-1, 4, 4, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)

  images = random_images(32)
  assert error(encode(params, moved(images)), encode(params, images)[:, order]) <= FEATURE
  table = np.random.default_rng(1).normal(size=params["positions"].shape).astype(np.float32)
  with_positions = params | {"positions": table}
  assert error(encode(with_positions, moved(images)), encode(with_positions, images)[:, order]) > 1e-3


def test_drop_path_skips_whole_branches_of_samples_and_keeps_their_mean():
  """Rates 0 and 0.5 in two blocks: each sample has the branches of the last at twice their size, or not at all."""
  size = EncoderConfig(BeitSize(**(BEIT | {"layers": 2}), drop_path=0.5))
  encoder = Encoder.from_config(size, FP32)
  params, _ = random_variables(encoder)
  n = 64
  images = np.repeat(random_images(32, 1), n, axis=0)
  got = jax.jit(lambda rng: encoder.encode(params, {}, images, train=True, rng=rng)[0].tokens)
  one = jax.jit(lambda params: encoder.encode(params, {}, images[:1])[0].tokens)

  def scaled(attention, mlp):
    blocks = dict(params["blocks"])
    for name, factor in (("layer_scale_1", attention), ("layer_scale_2", mlp)):
      blocks[name] = blocks[name] * np.float32([[1], [factor]])
    return np.asarray(one(params | {"blocks": blocks}))[0]

  tokens = np.asarray(got(jax.random.key(0)))
  cases = {(a, m): scaled(a, m) for a in (0, 2) for m in (0, 2)}
  counts = {case: sum(error(t, want) <= FEATURE for t in tokens) for case, want in cases.items()}
  assert sum(counts.values()) == n  # every sample is one of the four
  assert all(abs(c - n / 4) < 4 * (n * 3 / 16) ** 0.5 for c in counts.values()), counts  # four sigma
  assert not np.array_equal(tokens, got(jax.random.key(1)))

  with pytest.raises(ValueError, match="rng"):
    encoder.encode(params, {}, images, train=True)
  plain = Encoder.from_config(EncoderConfig(dataclasses.replace(size.tower, drop_path=0.0)), FP32)
  programs = {str(jax.make_jaxpr(lambda x, e=e, train=train: e.encode(params, {}, x, train=train, rng=KEY)[0])(images))
              for e, train in ((plain, False), (plain, True), (encoder, False), (encoder, True))}
  assert len(programs) == 2  # without a rate, or without train, nothing is dropped


# --- NF-ResNet ---


def small_nf_resnet(t):
  """Returns timm's nf_resnet50 with the depths and widths of `t`."""
  from timm.models.nfnet import NormFreeNet, _nfres_cfg

  channels = tuple(4 * t.width * 2**i for i in range(4))
  return NormFreeNet(_nfres_cfg(depths=t.layers, channels=channels), stem_chs=t.width, num_classes=5)


def by_timm(model, images):
  """Returns the reference's features [B, F]: all children but the head, then the mean over the grid."""
  import torch

  encoder = torch.nn.Sequential(*list(model.children())[:-1], torch.nn.AdaptiveAvgPool2d(1))
  return encoder(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))[:, :, 0, 0]


def state(model):
  return {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}


NF = NfResNetSize(image_size=33, layers=(1, 3, 1, 1), width=8)  # after stem and pool 9 -> 5 -> 3 -> 2


def test_nf_resnet_has_the_features_and_gradients_of_timm(open_clip):
  """Small, because a ReLU whose input float32 sees on the other side of zero moves gradients by more than rounding."""
  import torch

  model = randomise(small_nf_resnet(NF)).eval()
  encoder = Encoder.from_config(EncoderConfig(NF), FP32)
  params, _ = from_torch(encoder, state(model))
  images = random_images(33)
  w_tokens, w_pooled = weights_like((2, 1, 256), (2, 256))

  features, grads = by_jax(encoder, params, {}, images, w_tokens, w_pooled)
  model = model.double()
  want = by_timm(model, images)
  assert error(features.pooled, want.detach()) <= FEATURE
  assert error(features.tokens, want.detach()[:, None]) <= FEATURE
  ((torch.tensor(w_tokens)[:, 0] + torch.tensor(w_pooled)) * want).sum().backward()
  want_grads, _ = from_torch(encoder, {name: p.grad.numpy() for name, p in model.named_parameters()
                                       if not name.startswith("head.")})
  assert_same_gradients(grads, want_grads)


@pytest.mark.parametrize("image_size", [64, 87])  # 16 -> 8 -> 4 -> 2, and 44 -> 22 -> 11 -> 6 -> 3
def test_nf_resnet_takes_images_of_any_size(open_clip, image_size):
  import torch

  model = randomise(small_nf_resnet(NF)).eval()
  encoder = Encoder.from_config(EncoderConfig(dataclasses.replace(NF, image_size=image_size)), FP32)
  params, _ = from_torch(encoder, state(model))
  images = random_images(image_size)
  with torch.no_grad():
    assert error(features_of(encoder, params, {}, images).pooled, by_timm(model.double(), images)) <= FEATURE


def test_nf_resnet50_is_timms(open_clip):
  import timm
  import torch

  model = randomise(timm.create_model("nf_resnet50")).eval()
  size = encoders.encoder_size("nf_resnet50")
  encoder = Encoder.from_config(dataclasses.replace(size, tower=dataclasses.replace(size.tower, image_size=40)), FP32)
  params, _ = from_torch(encoder, state(model))
  images = random_images(40, 1)
  with torch.no_grad():
    assert error(features_of(encoder, params, {}, images).tokens[:, 0], by_timm(model.double(), images)) <= FEATURE


def test_nf_resnets_initialisation_is_timms(open_clip):
  import torch

  torch.manual_seed(0)
  encoder, _, _ = built("nf_resnet50_mu")
  want, _ = from_torch(encoder, state(small_nf_resnet(encoder.size.tower)))
  assert_same_distributions(initialised("nf_resnet50_mu"), want)


def test_a_random_nf_resnet_is_its_shortcuts():
  """conv3 starts at gain zero, so no residual branch counts; what is left is linear but for a ReLU a stage."""
  encoder, params = built("nf_resnet50_mu")[0], initialised("nf_resnet50_mu")
  other, _ = random_variables(encoder)
  images = random_images(64)
  encode = jax.jit(lambda params: encoder.encode(params, {}, images)[0].pooled)

  def with_branches(*names):
    return {stage: {name: (other if name in names else params)[stage][name] for name in convs}
            if stage != "stem" else convs for stage, convs in params.items()}

  want = encode(params)
  assert np.ptp(want) > 0.1
  np.testing.assert_array_equal(encode(with_branches("conv1", "conv2")), want)
  assert error(encode(with_branches("conv1", "conv2", "conv3")), want) > 0.1

  def standardised(conv, x, stride=1):  # by hand, in float64
    kernel = np.asarray(conv["kernel"], np.float64)
    k = kernel.shape[0]
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + nfnet.EPS)
    kernel *= nfnet.GAMMA / np.sqrt(k * k * kernel.shape[2])
    x = np.pad(x, ((0, 0), ((k - 1) // 2,) * 2, ((k - 1) // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel)

  x = standardised(params["stem"], images.astype(np.float64), 2)
  x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
  x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2].max((-1, -2))
  variance = 1.0
  for i, blocks in enumerate((1, 2, 1, 1), start=1):
    x = np.maximum(x, 0) / np.sqrt(variance)
    if i > 1:
      x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean((2, 4))
    x = standardised(params[f"stage{i}_first"]["downsample"], x)
    variance = 1 + 0.04 * blocks
  assert error(want, np.maximum(x, 0).mean((1, 2))) <= FEATURE


def test_kernels_are_standardised_in_float32_when_computing_in_bfloat16():
  """A mean far from zero: in bfloat16 nothing would be left of a kernel's differences."""
  x = random_images(8, 2)
  conv = nfnet.StdConv(4, 3, FP32)
  params = {"params": {"kernel": 100 + np.random.default_rng(0).normal(size=(3, 3, 3, 4)).astype(np.float32),
                       "gain": np.ones((1, 1, 1, 4), np.float32), "bias": np.zeros(4, np.float32)}}
  got = nfnet.StdConv(4, 3, Compute(dtype="bfloat16")).apply(params, x)
  assert got.dtype == jnp.bfloat16
  assert error(got, conv.apply(params, x)) < 4 * 2**-9  # rounded inputs, kernels and outputs


# --- CLIP's towers on their own ---


@pytest.mark.parametrize("tower", [ResNetSize(image_size=64, layers=(1, 2, 1, 1), width=16, heads=8),
                                   ViTSize(image_size=32, patch=8, width=64, layers=2, heads=1)],
                         ids=["resnet", "vit"])
def test_clips_grid_and_patches_are_those_of_open_clip(open_clip, tower):
  """A ResNet's grid before attention pooling, row by row, as the reference taps it; a ViT's patches."""
  import torch

  vision = {"image_size": tower.image_size, "width": tower.width, "layers": tower.layers, "head_width": 64}
  if tower.kind == "vit":
    vision["patch_size"] = tower.patch
  model = open_clip.model.CLIP(32, open_clip.model.CLIPVisionCfg(**vision),
                               open_clip.model.CLIPTextCfg(context_length=8, vocab_size=32, width=16, heads=1,
                                                           layers=1), quick_gelu=True)
  model = randomise(model).eval()
  encoder = Encoder.from_config(EncoderConfig(tower, embed_dim=32), FP32)
  params, stats = from_torch(encoder, state(model))  # the text tower's tensors are ignored
  images = random_images(tower.image_size)
  features = features_of(encoder, params, stats, images)

  model = model.double()
  seen = []
  tap = model.visual.transformer if tower.kind == "vit" else model.visual.layer4
  tap.register_forward_hook(lambda module, args, out: seen.append(out))
  with torch.no_grad():
    pooled = model.encode_image(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  want = seen[0][:, 1:] if tower.kind == "vit" else seen[0].flatten(2).transpose(1, 2)  # b d h w -> b (h w) d
  assert error(features.tokens, want) <= FEATURE
  assert error(features.pooled, pooled) <= FEATURE


def test_a_vits_patches_are_those_of_transformers(transformers):
  import torch

  both = {"hidden_act": "quick_gelu", "projection_dim": 32, "num_attention_heads": 2, "hidden_size": 64,
          "intermediate_size": 256, "num_hidden_layers": 2}
  model = randomise(transformers.CLIPModel(transformers.CLIPConfig(
    text_config=both | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 19},
    vision_config=both | {"image_size": 32, "patch_size": 8}, projection_dim=32))).eval()
  encoder = Encoder.from_config(
    EncoderConfig(ViTSize(image_size=32, patch=8, width=64, layers=2, heads=2), embed_dim=32), FP32)
  params, _ = from_torch(encoder, state(model))
  images = random_images(32)
  features = features_of(encoder, params, {}, images)
  with torch.no_grad():
    out = model.double().vision_model(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  assert error(features.tokens, out.last_hidden_state[:, 1:]) <= FEATURE


# --- Every encoder ---


@pytest.mark.parametrize("name", [*encoders.known()])
def test_an_encoder_returns_the_tokens_that_it_promises(name):
  encoder, params, stats = built(name)
  side = encoder.image_size
  images = jax.ShapeDtypeStruct((2, side, side, 3), np.uint8)
  frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
  for features, given in (("tokens", params), ("pooled", frozen)):
    encoder = Encoder.from_config(dataclasses.replace(encoders.encoder_size(name), features=features), Compute())
    out, after = jax.eval_shape(encoder.encode, given, stats, images)
    assert out.tokens.shape == (2, encoder.num_tokens, encoder.feature_dim)
    assert out.tokens.dtype == out.pooled.dtype == jnp.bfloat16
    assert after == stats
  assert out.tokens.shape == (2, 1, out.pooled.shape[1])


@pytest.mark.parametrize("name", [*encoders.known()])
def test_every_leaf_of_an_encoder_has_a_sharding_that_divides_it(name):
  encoder, *trees = built(name)
  for mesh in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}):
    for tree in trees:
      specs = jax.tree.leaves(shardings(tree, encoder.spec.sharding, make_mesh(mesh)))
      for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(tree), specs, strict=True):
        assert x.size <= 2**20 or any(axes is not None for axes in spec.spec), path  # nothing large is held whole


@pytest.mark.parametrize("name", [n for n in encoders.known() if n.endswith("_mu") or "digits" in n])
def test_an_encoders_weights_return_from_every_format(name):
  encoder, _, _ = built(name)
  params, stats = random_variables(encoder)
  for rows in encoder.spec.weights.values():
    source = convert.export(rows, params | ({"stats": stats} if stats else {}))
    assert encoder.rows(source) == rows
    jax.tree.map(np.testing.assert_array_equal, from_torch(encoder, source), (params, stats))


@pytest.mark.parametrize("name,tokens,millions", [
  ("clip_rn50x16", (144, 3072), 167.33), ("clip_vit_l14", (256, 1024), 303.97), ("beit_l16", (196, 1024), 303.13),
  ("beit_l16_ft", (196, 1024), 303.41), ("nf_resnet50", (1, 2048), 23.51)])
def test_published_encoders_have_the_published_shapes_and_parameters(name, tokens, millions):
  encoder, params, _ = built(name)
  assert (encoder.num_tokens, encoder.feature_dim) == tokens
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree)) / 1e6  # noqa: E731
  assert round(count(params), 2) == millions
  if name == "clip_rn50x16":
    assert round(count(params) - count(params["pool"]), 1) == 136.2


@pytest.mark.parametrize("name", ["clip_vit_b32_mu", "beit_l16_ft_mu"])
def test_uint8_images_are_normalised_and_pooled_features_are_one_token(name):
  size = dataclasses.replace(encoders.encoder_size(name), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
  encoder, pooled = (Encoder.from_config(dataclasses.replace(size, features=f), FP32) for f in ("tokens", "pooled"))
  params, _ = random_variables(encoder)
  side = encoder.image_size
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  by_hand = ((images / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).astype(np.float32)
  want = features_of(encoder, params, {}, by_hand)
  assert error(features_of(encoder, params, {}, images).tokens, want.tokens) <= FEATURE
  assert error(features_of(pooled, params, {}, images).tokens[:, 0], want.pooled) <= FEATURE


def test_only_training_moves_the_statistics_of_a_resnet():
  encoder, _, _ = built("clip_rn50_mu")
  params, stats = random_variables(encoder)
  images = random_images(encoder.image_size)
  trained, after = jax.jit(lambda: encoder.encode(params, stats, images, train=True, rng=KEY))()
  assert all(np.abs(a - b).max() > 0 for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True))
  still, same = jax.jit(lambda: encoder.encode(params, stats, images, rng=KEY))()
  jax.tree.map(np.testing.assert_array_equal, same, stats)
  assert error(trained.tokens, still.tokens) > 1e-2


def test_remat_and_unrolling_change_neither_features_nor_gradients_of_a_beit():
  encoder, _, _ = built("beit_l16_mu")
  params, _ = random_variables(encoder)
  images, w = random_images(32), weights_like((2, 16, 64), (2, 64))
  want, want_grads = by_jax(encoder, params, {}, images, *w)
  other = Encoder.from_config(encoder.size, dataclasses.replace(FP32, remat="full", unroll=2))
  got, grads = by_jax(other, params, {}, images, *w)
  assert error(got.tokens, want.tokens) <= FEATURE
  assert_same_gradients(grads, want_grads)


@pytest.mark.parametrize("name", ["beit_l16_mu", "nf_resnet50_mu"])
def test_devices_and_bfloat16_change_features_by_rounding_only(name):
  encoder, _, _ = built(name)
  params, _ = random_variables(encoder)
  images = random_images(encoder.image_size, 4)
  want = features_of(encoder, params, {}, images)
  mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  with jax.set_mesh(mesh):
    spread = jax.device_put(params, shardings(params, encoder.spec.sharding, mesh))
    got = features_of(encoder, spread, {}, images)
  assert error(got.tokens, want.tokens) <= FEATURE

  # bfloat16 keeps 8 bits: each of some ten roundings in a row moves a value by up to 2⁻⁹ of itself.
  got = features_of(Encoder.from_config(encoder.size, Compute(dtype="bfloat16")), params, {}, images)
  assert error(got.tokens, want.tokens) < 10 * 2**-9


@pytest.mark.parametrize("change,message", [
  ({"resize": "fit"}, "model.resize='fit': choose one of shortest, longest, squash, native"),
  ({"resample": "cubic"}, "model.resample='cubic'"), ({"std": (0.1, 0.0, 0.1)}, "model.std="),
  ({"features": "cls"}, "model.features='cls'"),
  ({"tower": BeitSize(patch=15)}, "patches of 15 do not tile 224"),
  ({"tower": BeitSize(heads=3)}, "3 heads do not divide a width of 1024"),
  ({"tower": ResNetSize(image_size=100)}, "image_size=100; a ResNet needs a multiple of 32"),
  ({"activation": "relu"}, "model.activation='relu'"),
])
def test_sizes_that_do_not_fit_together_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    Encoder.from_config(EncoderConfig(**change), FP32)


def test_names_images_and_weights_that_do_not_fit_are_refused():
  with pytest.raises(UserError, match="no encoder 'beit_l_16'; did you mean 'beit_l16'"):
    encoders.encoder_size("beit_l_16")
  encoder, _, _ = built("beit_l16_mu")
  with pytest.raises(ValueError, match=r"images: expected \[B, 32, 32, 3\], got \(2, 32, 30, 3\)"):
    encoder.encode({}, {}, np.zeros((2, 32, 30, 3), np.float32))
  with pytest.raises(UserError, match="no weights of a 'beit' encoder: none of the tensors is"):
    encoder.rows(["visual.conv1.weight"])


def test_preprocessing_is_that_of_the_published_models(transformers, open_clip):
  import timm

  beit_size, clip_size, nf_size = (encoders.encoder_size(n) for n in ("beit_l16", "clip_rn50x16", "nf_resnet50"))
  processor = transformers.BeitImageProcessor
  assert (beit_size.mean, beit_size.std) == (tuple(processor.image_mean), tuple(processor.image_std))
  assert (clip_size.mean, clip_size.std) == (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
  config = timm.create_model("nf_resnet50").default_cfg
  assert (nf_size.mean, nf_size.std, nf_size.resample) == (config["mean"], config["std"], config["interpolation"])
  reference = encoders.encoder_size("nf_resnet50_reference")
  assert (reference.mean, reference.std, reference.resize) == ((0, 0, 0), (1, 1, 1), "native")
