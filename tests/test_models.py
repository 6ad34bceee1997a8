"""The towers against PyTorch with random weights, their initialisation, and settings that must not change a result."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from limber_jax import losses
from limber_jax.config import Compute
from limber_jax.config_json import flatten
from limber_jax.errors import UserError
from limber_jax.models import clip, spec
from limber_jax.models.clip import ClipConfig
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.weights import convert, formats

FP32 = Compute(dtype="float32")
EMBEDDING, GRADIENT = 1e-5, 1e-4  # relative errors of float32 here against float64 in PyTorch
SIZES = {
  "vit": ClipConfig(32, ViTSize(image_size=32, patch=8, width=64, layers=2, heads=2),
                  TextSize(context=12, vocab=99, width=64, layers=2, heads=2)),
  "vit_gelu": ClipConfig(24, ViTSize(image_size=42, patch=14, width=48, layers=3, heads=3),
                       TextSize(context=20, vocab=300, width=32, layers=1, heads=4), "gelu"),
  "resnet": ClipConfig(32, ResNetSize(image_size=64, layers=(1, 2, 1, 1), width=16, heads=8),
                     TextSize(context=12, vocab=99, width=64, layers=2, heads=2)),
  "resnet_gelu": ClipConfig(16, ResNetSize(image_size=96, layers=(2, 1, 1, 3), width=8, heads=4),
                          TextSize(context=9, vocab=50, width=32, layers=1, heads=1), "gelu"),
}


# Of images for which no ReLU of the random ResNet sees a number so close to 0 that float32 and float64 may disagree on
# its sign: each that does changes a gradient by 0.5 %. One seed of a hundred has this margin, of the inputs' deviation.
FAR_FROM_KINKS, MARGIN = 143, 8e-6


def margin(model, images):
  """Returns how near to 0 the inputs of the ReLUs of open_clip's image tower come, as a share of their deviation."""
  import torch

  seen = []
  hooks = [m.register_forward_pre_hook(lambda m, args: seen.append((args[0].abs() / args[0].std()).min().item()))
           for m in model.visual.modules() if isinstance(m, torch.nn.ReLU)]
  state = {k: v.clone() for k, v in model.state_dict().items()}
  with torch.no_grad():
    model.encode_image(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  for hook in hooks:
    hook.remove()
  model.load_state_dict(state)  # of BatchNorm
  return min(seen)


def inputs(size, batch=6):
  """Returns (images [B, H, W, 3], tokens [B, T]): texts that end early before pads, twice, at the last position."""
  rng = np.random.default_rng(0)
  images = np.random.default_rng(FAR_FROM_KINKS if size.image.kind == "resnet" else 0).normal(
    size=(batch, size.image.image_size, size.image.image_size, 3)).astype(np.float32)
  end = size.text.vocab - 1
  tokens = rng.integers(1, end, size=(batch, size.text.context))
  tokens[0, 3], tokens[0, 4:] = end, 0
  tokens[1, 5], tokens[1, 7] = end, end
  tokens[2, -1] = end
  tokens[3, 1:] = end  # as transformers pads
  tokens[4:, 2] = end
  return images, tokens


def randomise(model):
  """Moves every parameter and statistic of a torch model away from values that hide errors; returns it in float64."""
  import torch

  torch.manual_seed(1)
  with torch.no_grad():
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
      if name.endswith("running_var"):
        x.uniform_(0.5, 2.0)
      elif name.endswith("running_mean"):
        x.normal_(0, 0.3)
      elif name.endswith("attnpool.positional_embedding"):
        x.normal_(0, 1)  # what attention can tell apart; without that its gradients are differences of equal numbers
      elif x.ndim == 1 and name.endswith("weight"):
        x.uniform_(0.5, 1.5)  # gains, that of bn3 too
      elif x.ndim == 1 and name.endswith("bias"):
        x.normal_(0, 0.2)
  return model.double()


def by_open_clip(open_clip, size):
  """Returns open_clip's model of the same size, as it initialises it."""
  import torch

  torch.manual_seed(0)
  lib = open_clip.model
  i, t = size.image, size.text
  channels, layers, patch = (i.width, i.layers, i.patch) if i.kind == "vit" else (32 * i.width, list(i.layers), None)
  return lib.CLIP(
    size.embed_dim,
    lib.CLIPVisionCfg(layers=layers, width=i.width, head_width=channels // i.heads, patch_size=patch,
                      image_size=i.image_size),
    lib.CLIPTextCfg(context_length=t.context, vocab_size=t.vocab, width=t.width, heads=t.heads, layers=t.layers),
    quick_gelu=size.activation == "quick_gelu")


def by_transformers(transformers, size):
  """Returns transformers' CLIPModel of the same size, as it initialises it."""
  i, t = size.image, size.text
  both = {"hidden_act": size.activation, "projection_dim": size.embed_dim}
  return transformers.CLIPModel(transformers.CLIPConfig(
    text_config={"vocab_size": t.vocab, "hidden_size": t.width, "intermediate_size": 4 * t.width,
                 "num_hidden_layers": t.layers, "num_attention_heads": t.heads, "max_position_embeddings": t.context,
                 "bos_token_id": 0, "eos_token_id": t.vocab - 1, **both},
    vision_config={"hidden_size": i.width, "intermediate_size": 4 * i.width, "num_hidden_layers": i.layers,
                   "num_attention_heads": i.heads, "image_size": i.image_size, "patch_size": i.patch, **both},
    projection_dim=size.embed_dim))


def to_ours(model, size, rows, ignored):
  """Returns (params, stats of the image tower) of a torch model's state."""
  source = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
  params = convert.convert(rows, source, formats.shapes(size), ignored)
  return params, params.pop("stats", {"image": {}})["image"]


def by_jax(size, params, stats, images, tokens, weights, train=False, compute=FP32):
  """Returns ((value, (image features, text features, stats)), gradients) of the weighted sum of the logits."""
  model = clip.build(size, compute)

  def f(params):
    image, new_stats = model.encode_image(params["image"], stats, images, train=train)
    text = model.encode_text(params["text"], tokens)
    i, t = (x.pooled.astype(jnp.float32) for x in (image, text))
    i, t = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (i, t))
    return (weights * jnp.exp(params["logit_scale"]) * (i @ t.T)).sum(), (image, text, new_stats)

  return jax.jit(jax.value_and_grad(f, has_aux=True))(params)


def by_torch(model, encode_image, encode_text, images, tokens, weights):
  """Returns (image [B, E], text [B, E], {name: gradient}) of the same in torch."""
  import torch

  image = encode_image(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2))
  text = encode_text(torch.tensor(tokens))
  i, t = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
  (torch.tensor(weights) * (model.logit_scale.exp() * i @ t.T)).sum().backward()
  return image.detach().numpy(), text.detach().numpy(), {n: p.grad.numpy() for n, p in model.named_parameters()}


def error(got, want, scale=None):
  """Returns the largest difference, relative to the largest value of `scale`, by default of what is wanted."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want if scale is None else scale).max()


def assert_same_gradients(got, want, tolerance=GRADIENT):
  assert got.keys() == want.keys()
  for name in want:
    # Attention does not see a constant added to every key, so the gradient of a key's bias is zero but for rounding;
    # it is measured against that of the query's.
    assert error(got[name], want[name], want[name.replace("k_proj.bias", "q_proj.bias")]) <= tolerance, name


def weights_of_logits(n):
  return np.random.default_rng(1).normal(size=(n, n)).astype(np.float32)


@pytest.mark.parametrize("name,train", [("vit", False), ("vit_gelu", True), ("resnet", True),
                                        pytest.param("resnet", False, marks=pytest.mark.long),
                                        pytest.param("resnet_gelu", True, marks=pytest.mark.long)])
def test_features_gradients_and_statistics_are_those_of_open_clip(open_clip, name, train):
  size = SIZES[name]
  model = randomise(by_open_clip(open_clip, size)).train(train)
  seen = {}
  for key, module in (("image", model.visual.transformer if size.image.kind == "vit" else model.visual.layer4),
                      ("text", model.ln_final)):
    module.register_forward_hook(lambda module, args, out, key=key: seen.update({key: out.detach().numpy()}))
  rows = clip.openai_weights(size.image.kind)
  params, stats = to_ours(model, size, rows, spec.OPENAI_IGNORED)
  images, tokens = inputs(size)
  if name == "resnet" and train:
    assert margin(model, images) > MARGIN
  weights = weights_of_logits(len(images))

  (_, (image, text, new_stats)), grads = by_jax(size, params, stats, images, tokens, weights, train)
  want_image, want_text, want_grads = by_torch(model, model.encode_image, model.encode_text, images, tokens, weights)
  assert error(image.pooled, want_image) <= EMBEDDING
  assert error(text.pooled, want_text) <= EMBEDDING
  grid = seen["image"][:, 1:] if size.image.kind == "vit" else np.moveaxis(seen["image"], 1, -1)
  assert error(image.tokens, grid.reshape(len(images), size.image.num_tokens, -1)) <= EMBEDDING
  assert error(text.tokens, seen["text"]) <= EMBEDDING
  assert_same_gradients(convert.export(rows, grads), want_grads)

  _, want_stats = to_ours(model, size, rows, spec.OPENAI_IGNORED)
  new_stats, want_stats = map(flax.traverse_util.flatten_dict, (new_stats, want_stats))
  assert new_stats.keys() == want_stats.keys()
  for path, leaf in want_stats.items():
    assert error(new_stats[path], leaf) <= EMBEDDING, path
    assert train == (error(new_stats[path], flax.traverse_util.flatten_dict(stats)[path]) > 1e-3), path


@pytest.mark.parametrize("name", ["vit", "vit_gelu"])
def test_features_and_gradients_are_those_of_transformers(transformers, name):
  size = SIZES[name]
  model = randomise(by_transformers(transformers, size)).eval()
  rows = clip.hf_weights()
  params, stats = to_ours(model, size, rows, spec.HF_IGNORED)
  images, tokens = inputs(size)
  tokens = tokens[:, :-1]  # shorter texts than the context are the rule there
  tokens[2, -1] = size.text.vocab - 1
  weights = weights_of_logits(len(images))

  (_, (image, text, _)), grads = by_jax(size, params, stats, images, tokens, weights)
  want_image, want_text, want_grads = by_torch(
    model, lambda x: model.get_image_features(pixel_values=x).pooler_output,
    lambda x: model.get_text_features(input_ids=x).pooler_output, images, tokens, weights)
  assert error(image.pooled, want_image) <= EMBEDDING
  assert error(text.pooled, want_text) <= EMBEDDING
  assert_same_gradients(convert.export(rows, grads), want_grads)


@pytest.mark.parametrize("size", [
  ClipConfig(128, ViTSize(image_size=64, patch=8, width=128, layers=2, heads=2), TextSize(40, 512, 128, 3, 2)),
  ClipConfig(128, ResNetSize(image_size=96, layers=(2, 2, 1, 1), width=16, heads=8), TextSize(40, 512, 128, 3, 2)),
], ids=["vit", "resnet"])
def test_initialisation_is_open_clips(open_clip, size):
  import torch

  torch.manual_seed(0)
  theirs, _ = to_ours(by_open_clip(open_clip, size), size, clip.openai_weights(size.image.kind), spec.OPENAI_IGNORED)
  model = clip.build(size, FP32)
  image, text = (jax.random.key(seed, impl="rbg") for seed in (0, 1))  # threefry takes half a minute to compile
  ours = {"image": jax.jit(model.init_image)(image)["params"], "text": jax.jit(model.init_text)(text)["params"]}
  assert error(losses.INITIAL_LOG_SCALE, theirs.pop("logit_scale")) <= 1e-7
  ours, theirs = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (ours, theirs))
  assert ours.keys() == theirs.keys()
  for path, want in theirs.items():
    got = np.asarray(ours[path])
    if np.ptp(want) == 0:
      np.testing.assert_array_equal(got, want, err_msg=path)
      continue
    # Standard deviations of n normal numbers differ by √(1/n) of themselves, one sigma; of uniform ones by less.
    assert abs(got.std() / want.std() - 1) < 5 / want.size**0.5, path
    assert abs(got.mean() - want.mean()) < 5 * want.std() * (2 / want.size) ** 0.5, path
    if want.size >= 1000:  # uniform numbers end at √3 standard deviations, a thousand normal ones go beyond 2.5
      assert (np.abs(got).max() / got.std() < 2) == (np.abs(want).max() / want.std() < 2), path
    if "blocks/" in path:
      assert not np.array_equal(got[0], got[1]), path


@pytest.mark.parametrize("name,millions", [
  ("clip_rn50", 102.01), ("clip_rn101", 119.69), ("clip_rn50x4", 178.30), ("clip_rn50x16", 290.98),
  ("clip_rn50x64", 623.26), ("clip_vit_b32", 151.28), ("clip_vit_b16", 149.62), ("clip_vit_l14", 427.62),
  ("clip_vit_l14_336", 427.94)])
def test_published_sizes_have_the_published_parameters_and_tokens(name, millions):
  size = clip.SIZES[name]()
  like = formats.shapes(size)
  stats = like.pop("stats", {"image": {}})["image"]
  assert round(sum(x.size for x in jax.tree.leaves(like)) / 1e6, 2) == millions

  model = clip.build(size, FP32)
  side = size.image.image_size
  image, _ = jax.eval_shape(model.encode_image, like["image"], stats,
                            jax.ShapeDtypeStruct((2, side, side, 3), np.uint8))
  text = jax.eval_shape(model.encode_text, like["text"], jax.ShapeDtypeStruct((2, 77), np.int32))
  assert image.pooled.shape == text.pooled.shape == (2, size.embed_dim)
  assert image.tokens.shape[1] == size.image.num_tokens
  if name == "clip_rn50x16":
    assert image.tokens.shape == (2, 144, 3072)


def random_model(size):
  """Returns (params, stats of the image tower) from numpy, quicker than by init: gains and variances round 1."""
  rng = np.random.default_rng(0)

  def leaf(path, x):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    return (0.1 * rng.normal(size=x.shape)).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(leaf, formats.shapes(size))
  return params, params.pop("stats", {"image": {}})["image"]


@pytest.mark.parametrize("name,settings", [("vit", {"remat": "dots"}), ("vit", {"remat": "full", "unroll": 2}),
                                           pytest.param("resnet", {"remat": "full", "unroll": 2},
                                                        marks=pytest.mark.long)])
def test_remat_and_unrolling_change_neither_features_nor_gradients(name, settings):
  size = SIZES[name]
  params, stats = random_model(size)
  images, tokens = inputs(size)
  (want, want_grads), (got, grads) = (
    by_jax(size, params, stats, images, tokens, weights_of_logits(len(images)), train=True, compute=compute)
    for compute in (FP32, dataclasses.replace(FP32, **settings)))
  for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
    assert error(a, b) <= EMBEDDING
  rows = clip.openai_weights(size.image.kind)
  assert_same_gradients(convert.export(rows, grads), convert.export(rows, want_grads))


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_bfloat16_stays_close_to_float32(name):
  """bfloat16 keeps 8 bits, so each of some ten roundings in a row moves a value by up to 2⁻⁹ of itself."""
  size = SIZES[name]
  params, stats = random_model(size)
  images, tokens = inputs(size)
  fp32, bf16 = (clip.build(size, Compute(dtype=dtype)) for dtype in ("float32", "bfloat16"))
  for encode in (lambda model: model.encode_image(params["image"], stats, images)[0],
                 lambda model: model.encode_text(params["text"], tokens)):
    want, got = (jax.jit(lambda model=model, encode=encode: encode(model))() for model in (fp32, bf16))
    assert want.pooled.dtype == want.tokens.dtype == jnp.float32
    assert got.pooled.dtype == got.tokens.dtype == jnp.bfloat16
    assert error(got.pooled, want.pooled) < 10 * 2**-9


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_uint8_images_are_normalised_with_the_models_own_mean_and_std(name):
  size = dataclasses.replace(SIZES[name], mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
  params, stats = random_model(size)
  side = size.image.image_size
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  encode = jax.jit(lambda x: clip.build(size, FP32).encode_image(params["image"], stats, x)[0].pooled)
  by_hand = ((images / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).astype(np.float32)
  assert error(encode(images), encode(by_hand)) <= 1e-6


def test_inputs_of_another_shape_are_refused():
  size = SIZES["vit"]
  model = clip.build(size, FP32)
  params, _ = random_model(size)
  with pytest.raises(ValueError, match=r"images: expected \[B, 32, 32, 3\], got \(2, 32, 30, 3\)"):
    model.encode_image(params["image"], {}, np.zeros((2, 32, 30, 3), np.float32))
  with pytest.raises(ValueError, match=r"tokens: expected \[B, T\] with T <= 12, got \(2, 13\)"):
    model.encode_text(params["text"], np.zeros((2, 13), np.int32))


@pytest.mark.parametrize("change,message", [
  (lambda s: dataclasses.replace(s, activation="relu"), "model.activation='relu': choose one of"),
  (lambda s: dataclasses.replace(s, image=dataclasses.replace(s.image, patch=7)), "patches of 7 do not tile 32"),
  (lambda s: dataclasses.replace(s, image=dataclasses.replace(s.image, heads=3)), "3 heads do not divide a width"),
  (lambda s: dataclasses.replace(s, text=dataclasses.replace(s.text, heads=5)), "5 heads do not divide a width of 64"),
  (lambda s: dataclasses.replace(s, image=ResNetSize(image_size=100)), "image_size=100; a ResNet needs a multiple of"),
])
def test_sizes_that_do_not_fit_together_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    clip.build(change(SIZES["vit"]), FP32)


@pytest.mark.parametrize("name", [*clip.SIZES])
def test_a_size_comes_back_from_its_flat_form(name):
  size = clip.SIZES[name]()
  assert clip.size_from_dict(flatten(size)) == size


@pytest.mark.parametrize("change,message", [
  ({"image.kind": "vitt"}, "image.kind: expected one of vit, resnet, got 'vitt'"),
  ({"text.vocab": None}, "text.vocab is missing"),
  ({"text.vocabulary": 3}, "text.vocabulary: no such field; did you mean 'text.vocab'"),
  ({"embed_dim": "32"}, "embed_dim: expected int, got '32'"),
  ({"mean": [0.5, 0.5]}, r"^mean=\[0.5, 0.5\]: wanted 3 of them, got 2$"),
])
def test_a_flat_size_with_a_mistake_is_refused(change, message):
  values = {k: v for k, v in (flatten(SIZES["vit"]) | change).items() if v is not None}
  with pytest.raises(UserError, match=message):
    clip.size_from_dict(values)
