"""Weights in and out: every table both ways, other libraries opening what is written, and what is refused."""

import dataclasses
import importlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from limber_jax import config_json
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.checkpoints.state import TrainState
from limber_jax.config import Checkpoint, Compute, Config, Init
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.models import beit, clip, encoders, gptj, nfnet
from limber_jax.models.clip import ClipConfig
from limber_jax.models.encoders import Encoder
from limber_jax.models.gptj import GPTJ, GPTJSize
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.spec import EncoderConfig
from limber_jax.models.text import TextSize, check_end
from limber_jax.models.vit import ViTSize
from limber_jax.runtime import parallel
from limber_jax.weights import adopt, beside, convert, export, files, formats, load, parts

TEXT = TextSize(context=12, vocab=99, width=64, layers=2, heads=1)
SIZES = {  # heads 64 wide, as OpenAI's have them
  "vit": ClipConfig(32, ViTSize(image_size=32, patch=8, width=128, layers=3, heads=2), TEXT),
  "resnet": ClipConfig(32, ResNetSize(image_size=64, layers=(1, 2, 1, 3), width=16, heads=8), TEXT),
}


def random_model(size, logit_bias=False, seed=0):
  """Returns (params, stats), float32."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    return np.asarray(0.1 * rng.normal(size=x.shape), np.float32)

  params = jax.tree_util.tree_map_with_path(leaf, formats.shapes(size, logit_bias))
  return params, params.pop("stats", {})


@pytest.fixture
def published(monkeypatch):
  """As if OpenAI had published the sizes of these tests."""
  for name, size in SIZES.items():
    monkeypatch.setitem(clip.PUBLISHED, f"tiny_{name}", lambda size=size: size)


def said(tmp_path, size):
  """Returns what --model= says of a size: a file with its configuration, elsewhere than the weights."""
  (tmp_path / "said").mkdir(exist_ok=True)
  (tmp_path / "said" / "limber_config.json").write_text(json.dumps(config_json.flatten(size)))
  return str(tmp_path / "said")


def own(size):
  """Returns `size` with heads, activation, mean and std that only a configuration can tell."""
  image, text = (type(x)(**{**vars(x), "heads": 2 * x.heads}) for x in (size.image, size.text))
  return ClipConfig(size.embed_dim, image, text, "gelu", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a, b, err_msg=str(path), strict=True)


def rewrite(path, change):
  """Replaces the tensors of a safetensors file by change(tensors)."""
  tensors = load_file(path)
  save_file(change(tensors) or tensors, path)


def embed(size, params, stats, images, tokens):
  model = clip.build(size, Compute(dtype="float32"))

  @jax.jit
  def f(params):
    image, _ = model.encode_image(params["image"], stats.get("image", {}), images)
    return image.pooled, model.encode_text(params["text"], tokens).pooled

  return f(params)


def inputs(size):
  rng = np.random.default_rng(1)
  side, end = size.image.image_size, 60  # the end of a text need not be the last id of the vocabulary
  tokens = rng.integers(1, end, size=(4, size.text.context))
  tokens[np.arange(4), [2, 5, 7, 11]] = end
  return rng.normal(size=(4, side, side, 3)).astype(np.float32), tokens


@pytest.mark.parametrize("name,to", [("vit", "hf"), ("vit", "open_clip"), ("vit", "limber"), ("resnet", "open_clip"),
                                     ("resnet", "limber")])
def test_a_saved_model_loads_bit_for_bit_with_its_size(tmp_path, name, to):
  size = own(SIZES[name])
  params, stats = random_model(size, logit_bias=to != "hf")
  export.save(str(tmp_path / "out"), to, size, params, stats)
  loaded = load.load(str(tmp_path / "out"))
  # transformers knows but one way to round the place of a crop.
  assert loaded.size == dataclasses.replace(size, crop_rounding="down" if to == "hf" else "even")
  assert_equal((loaded.params, loaded.stats), (params, stats))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_state_dict_with_openais_marks_gives_back_weights_and_size(tmp_path, published, name, suffix):
  size = SIZES[name]
  params, stats = random_model(size)
  tensors = convert.export(clip.openai_weights(name), params | ({"stats": stats} if stats else {}))
  tensors |= {"input_resolution": np.array(size.image.image_size), "context_length": np.array(12),
              "vocab_size": np.array(99)}
  if name == "resnet":
    tensors |= {"visual.bn1.num_batches_tracked": np.array(7), "visual.layer1.0.bn3.num_batches_tracked": np.array(7)}
  path = str(tmp_path / f"model{suffix}")
  save_file(tensors, path) if suffix == ".safetensors" else np.savez_compressed(path, **tensors)
  loaded = load.load(path)
  assert loaded.size == size
  assert_equal((loaded.params, loaded.stats), (params, stats))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
  params, _ = random_model(SIZES["vit"])
  half = {k: v.astype(dtype) for k, v in convert.export(clip.openai_weights("vit"), params).items()}
  save_file(half, tmp_path / "model.safetensors")
  assert_equal(load.load(str(tmp_path / "model.safetensors"), said(tmp_path, SIZES["vit"])).params,
               jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params))


def test_every_exported_array_is_contiguous_in_memory():
  """safetensors 0.8 writes transposed arrays in the wrong order, without a word."""
  for name, rows in (("vit", clip.hf_weights()), *((kind, clip.openai_weights(kind)) for kind in ("vit", "resnet"))):
    params, stats = random_model(SIZES[name])
    tensors = convert.export(rows, params | ({"stats": stats} if stats else {}))
    assert all(x.flags.c_contiguous for x in tensors.values())


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_open_clip_opens_an_export_and_gives_the_same_embeddings(tmp_path, open_clip, name):
  import torch

  size = own(SIZES[name])
  params, stats = random_model(size, logit_bias=True)
  export.save(str(tmp_path / "out"), "open_clip", size, params, stats)
  model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
  images, tokens = inputs(size)
  got = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in embed(size, params, stats, images, tokens)]
  with torch.no_grad():
    want = model.eval()(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(tokens))[:2]  # unit vectors
  for a, b in zip(got, want, strict=True):
    assert np.abs(a - b.numpy()).max() <= 1e-5 * np.abs(b.numpy()).max()
  assert model.logit_bias.item() == params["logit_bias"]
  normalize = preprocess.transforms[-1]
  assert (tuple(normalize.mean), tuple(normalize.std)) == (size.mean, size.std)


def test_transformers_opens_an_export_and_gives_the_same_embeddings(tmp_path, transformers):
  import torch

  size = own(SIZES["vit"])
  params, stats = random_model(size)
  export.save(str(tmp_path / "out"), "hf", size, params, stats)
  model, info = transformers.CLIPModel.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  images, tokens = inputs(size)
  got = embed(size, params, stats, images, tokens)
  with torch.no_grad():
    want = (model.eval().get_image_features(pixel_values=torch.tensor(images).permute(0, 3, 1, 2)).pooler_output,
            model.get_text_features(input_ids=torch.tensor(tokens)).pooler_output)
  for a, b in zip(got, want, strict=True):
    assert np.abs(a - b.numpy()).max() <= 1e-5 * np.abs(b.numpy()).max()
  processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "out")
  assert (tuple(processor.image_mean), tuple(processor.image_std)) == (size.mean, size.std)


def test_a_text_is_pooled_at_the_first_end_of_a_vocabulary_with_ids_above_it(tmp_path, transformers, open_clip):
  """As transformers and open_clip do, which give the same embeddings of an export."""
  import torch

  end = 60
  config = transformers.CLIPConfig(
    text_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
                     max_position_embeddings=12, bos_token_id=0, eos_token_id=end),
    vision_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
                       image_size=32, patch_size=8), projection_dim=32)
  model = transformers.CLIPModel(config).eval()
  for parameter in model.parameters():
    parameter.data += 0.1 * torch.randn(parameter.shape)
  model.save_pretrained(tmp_path / "hf")
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 99, (6, 12))
  tokens[tokens == end] = 98                       # row 0 has no end: both take the first token
  for row, place in enumerate((3, 7, 11, 0, 5), 1):
    tokens[row, place:] = [end] * (12 - place)     # padded with ends, as transformers' tokenizer of CLIP does
  tokens[5, 6:] = 97                               # or with an id above them
  with torch.no_grad():
    want = model.get_text_features(input_ids=torch.tensor(tokens)).pooler_output.numpy()

  def ours(loaded):
    images = np.zeros((1, 32, 32, 3), np.float32)
    return embed(loaded.size, loaded.params, {}, images, tokens)[1]

  loaded = load.load(str(tmp_path / "hf"))
  assert loaded.size.text.eos == end
  assert np.abs(ours(loaded) - want).max() <= 1e-5 * np.abs(want).max()
  for to in export.FORMATS:
    path = str(tmp_path / f"to_{to}")
    export.save(path, to, loaded.size, loaded.params, {})
    assert load.load(path).size.text == loaded.size.text
  again = transformers.CLIPModel.from_pretrained(tmp_path / "to_hf").eval()
  other = open_clip.create_model(f"local-dir:{tmp_path / 'to_open_clip'}").eval()
  with torch.no_grad():
    theirs = (again.get_text_features(input_ids=torch.tensor(tokens)).pooler_output.numpy(),
              other.encode_text(torch.tensor(tokens)).numpy())
  for x in theirs:
    assert np.abs(x - want).max() <= 1e-5 * np.abs(want).max()
  plain = dataclasses.replace(loaded.size, text=dataclasses.replace(loaded.size.text, eos=-1))
  with pytest.raises(UserError, match=r"has text.eos=60, but this config's model has -1; set --config.model.text"):
    load.load_into(str(tmp_path / "hf"), "text", plain, formats.shapes(plain)["text"])
  two = dataclasses.replace(loaded.size, text=dataclasses.replace(loaded.size.text, eos=2))
  with pytest.raises(UserError, match="transformers takes an eos_token_id of 2 for the highest id"):
    export.save(str(tmp_path / "two"), "hf", two, loaded.params, {})


def test_a_size_of_before_there_was_an_end_of_its_own_is_read(tmp_path):
  size = SIZES["vit"]
  export.save(str(tmp_path / "out"), "limber", size, *random_model(size))
  config = json.loads((tmp_path / "out" / "limber_config.json").read_text())
  assert "text.eos" not in config and load.load(str(tmp_path / "out")).size.text.eos == -1
  run = Config("run", size)
  values = {k: v for k, v in config_json.flatten(run).items() if not k.endswith((".eos", "resample_positions"))}
  config_json.check_same(run, json.dumps(values), "a run of before")
  with pytest.raises(UserError, match="tokenizer ends a text with id 258, but the text tower is pooled at id 60"):
    check_end(TextSize(eos=60), ByteTokenizer().eot, "tokenizer")


def test_what_the_libraries_save_themselves_loads(tmp_path, open_clip, transformers):
  import torch

  config = transformers.CLIPConfig(
    text_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=99,
                     max_position_embeddings=12, bos_token_id=0, eos_token_id=98),
    vision_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                       image_size=32, patch_size=8), projection_dim=32)
  model = transformers.CLIPModel(config)
  model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
  assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
  loaded = load.load(str(tmp_path / "hf"))
  assert loaded.size == ClipConfig(32, ViTSize(image_size=32, patch=8, width=64, layers=2, heads=2),
                                 TextSize(context=12, vocab=99, width=64, layers=2, heads=2), crop_rounding="down")
  np.testing.assert_array_equal(loaded.params["text"]["blocks"]["attn"]["v"]["kernel"][1],
                                model.text_model.encoder.layers[1].self_attn.v_proj.weight.detach().numpy().T)

  model_cfg = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
               "text_cfg": {"context_length": 12, "vocab_size": 99, "width": 64, "heads": 2, "layers": 2}}
  model = open_clip.model.CLIP(**model_cfg)
  open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)})
  # By its path, because open_clip has a function of the module's name.
  importlib.import_module("open_clip.push_to_hf_hub").save_for_hf(
    model, tokenizer=mock.Mock(), model_config=model_cfg, save_directory=str(tmp_path / "open_clip"),
    safe_serialization=True)
  loaded = load.load(str(tmp_path / "open_clip"))
  assert (loaded.size.activation, loaded.size.image.heads, loaded.size.mean) == ("gelu", 1, (0.5, 0.4, 0.3))
  np.testing.assert_array_equal(loaded.params["image"]["blocks"]["attn"]["k"]["bias"][0],
                                model.visual.transformer.resblocks[0].attn.in_proj_bias[64:128].detach().numpy())
  torch.testing.assert_close(torch.tensor(loaded.params["logit_scale"]), model.logit_scale.detach(), rtol=0, atol=0)


@pytest.fixture
def saved(tmp_path):
  """A ViT in open_clip's format: (directory, file of weights, size, params)."""
  params, stats = random_model(SIZES["vit"])
  export.save(str(tmp_path / "saved"), "open_clip", SIZES["vit"], params, stats)
  return str(tmp_path / "saved"), str(tmp_path / "saved" / "open_clip_model.safetensors"), SIZES["vit"], params


@pytest.mark.parametrize("change,message", [
  (lambda t: t.pop("visual.ln_pre.bias") is None,
   r"image/ln_pre/bias: no tensor 'visual.ln_pre.bias'; did you mean 'visual.ln_p"),
  (lambda t: t.update({"visual.adapter.weight": np.zeros((3, 4), np.float32)}),
   r"nothing here reads 'visual.adapter.weight' \(3, 4\)"),
  (lambda t: t.update({"text_projection": np.zeros((64, 16), np.float32)}),
   r"text/head/kernel: expected \(64, 32\), got \(64, 16\) from text_projection"),
  (lambda t: t.update({"transformer.resblocks.1.mlp.c_fc.weight": np.zeros((256, 32), np.float32)}),
   r"text/blocks/fc/kernel: expected \(2, 64, 256\), got \(2, 32, 256\) from transformer.resblocks.{}.mlp.c_fc.weight"),
  (lambda t: t.update({"transformer.resblocks.0.attn.in_proj_weight": np.zeros((64, 64), np.float32)}),
   r"text/blocks/attn/k/kernel: expected \(2, 64, 64\), got \(64, 64\) from transformer.resblocks.0.attn.in_proj_w"),
  (lambda t: t.update({"visual.conv1.weight": np.zeros((128, 3), np.float32)}),
   r"image/patch/kernel: expected \(8, 8, 3, 128\), got \(128, 3\) from visual.conv1.weight"),
  (lambda t: t.update({"ln_final.bias": np.zeros(64, np.int32)}),
   "text/ln_final/bias: expected floating point, got I32 from ln_final.bias"),
])
def test_a_tensor_missing_extra_or_of_another_shape_raises_by_name(saved, change, message):
  path, weights, *_ = saved
  rewrite(weights, change)
  with pytest.raises(UserError, match=f"^{path}: {message}"):
    load.load(path)


def test_a_leaf_that_no_row_knows_raises_by_name():
  with pytest.raises(UserError, match="text/adapter: nothing in this format fills it"):
    convert.convert(clip.hf_weights(), {}, {"text": {"adapter": np.zeros(3)}})
  with pytest.raises(UserError, match="text/adapter: this format has no place for it"):
    convert.export(clip.hf_weights(), {"text": {"adapter": np.zeros(3)}})


def test_nothing_is_read_before_everything_is_checked():
  class Unreadable:
    shape, dtype = (3,), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
      raise AssertionError("read")

  rows = (("a", "x", ""), ("b", "y", ""))
  with pytest.raises(UserError, match="b: no tensor 'y'"):
    convert.convert(rows, {"x": Unreadable()}, {"a": np.zeros(3), "b": np.zeros(3)})


@pytest.mark.parametrize("part", ["image", "text"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_one_part_loads_into_a_model_of_other_sizes_elsewhere(tmp_path, name, part):
  size = SIZES[name]
  params, stats = random_model(size)
  export.save(str(tmp_path / "out"), "open_clip", size, params, stats)
  got, got_stats = load.load_into(str(tmp_path / "out"), part, size, formats.shapes(size)[part], stats.get(part))
  assert_equal((got, got_stats), (params[part], stats.get(part, {})))


def test_a_part_of_another_build_is_refused_by_name(saved):
  path, _, size, params = saved
  shallower = ClipConfig(32, ViTSize(image_size=32, patch=8, width=128, layers=2, heads=2), TEXT)
  with pytest.raises(UserError, match=r"nothing here reads 'visual.transformer.resblocks.2\..*, nor 11 other tensors"):
    load.load_into(path, "image", shallower, formats.shapes(shallower)["image"])
  wider = ClipConfig(32, ViTSize(image_size=32, patch=8, width=192, layers=3, heads=3), TEXT)
  with pytest.raises(UserError, match=r"image/blocks/attn/k/bias: expected \(3, 192\), got \(3, 128\) from visual"):
    load.load_into(path, "image", wider, formats.shapes(wider)["image"])
  with pytest.raises(UserError, match=r"activation='quick_gelu', but .* 'gelu'; set --config.model.activation=quick"):
    load.load_into(path, "text", own(size), params["text"])


@pytest.mark.parametrize("sizes,dtype", [(None, np.float32), ({"fsdp": 8}, ml_dtypes.bfloat16),
                                         ({"data": 2, "fsdp": 2, "tensor": 2}, np.float32)])
def test_weights_streamed_to_devices_equal_those_converted_on_the_host(tmp_path, sizes, dtype):
  params, _ = random_model(SIZES["vit"])
  rows = clip.openai_weights("vit")
  tensors = {k: v.astype(np.float16) for k, v in convert.export(rows, params).items()}
  np.savez(tmp_path / "x.npz", **tensors)
  save_file(tensors, tmp_path / "x.safetensors")
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
  if sizes:
    shardings = parallel.shardings(like, clip.sharding(SIZES["vit"]), parallel.make_mesh(sizes))
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), like, shardings)
  for name in ("x.npz", "x.safetensors"):
    got = convert.stream(rows, files.tensors(str(tmp_path / name)), like)
    want = jax.tree.map(lambda x: x.astype(np.float16).astype(dtype), params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, w, spec in zip(*map(jax.tree.leaves, (got, want, like)), strict=True):
      np.testing.assert_array_equal(np.asarray(x), w, strict=True)
      assert isinstance(x, jax.Array) and (spec.sharding is None or x.sharding == spec.sharding)


@pytest.mark.process
@pytest.mark.parametrize("suffix,dtype", [(".safetensors", "float32"), (".bin", "bfloat16")])
def test_streaming_holds_less_than_three_tensors_on_the_host(tmp_path, suffix, dtype):
  """Peak memory, less the model's own bytes, which lie in the same memory where the device is a CPU."""
  largest, blocks = 48 << 20, 4
  x = np.ones((2048, largest // 4 // 2048), np.float32)
  tensors = {f"block.{i}.weight": x for i in range(blocks)} | {"embedding": x.T.copy()}
  if suffix == ".bin":
    torch = pytest.importorskip("torch")
    torch.save({name: torch.tensor(x) for name, x in tensors.items()}, tmp_path / f"x{suffix}")
  else:
    save_file(tensors, tmp_path / f"x{suffix}")
  script = f"""if True:
    import jax, numpy as np
    from limber_jax.weights import convert, files
    def memory(what):
      return [int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what)][0]
    rows = (("kernel", "block.{{}}.weight", "OI>IO"), ("embedding", "embedding", ""))
    shape = {x.T.shape}
    like = {{"kernel": jax.ShapeDtypeStruct(({blocks}, *shape), "{dtype}"),
             "embedding": jax.ShapeDtypeStruct(shape, "{dtype}")}}
    source = files.tensors({str(tmp_path / f"x{suffix}")!r})
    small = {{name: np.zeros((2, 2), np.float32) for name in source}}  # what compiling takes is not counted
    convert.stream(rows, small, {{"kernel": jax.ShapeDtypeStruct(({blocks}, 2, 2), "{dtype}"),
                                 "embedding": jax.ShapeDtypeStruct((2, 2), "{dtype}")}})
    before = memory("VmRSS")
    params = convert.stream(rows, source, like)
    print(memory("VmHWM") - before - sum(x.nbytes for x in jax.tree.leaves(params)))
    assert all((x == 1).all() for x in jax.tree.leaves(params))
  """
  result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert result.returncode == 0, result.stderr
  assert int(result.stdout) < 3 * largest, f"{int(result.stdout) / largest:.2f} tensors"


def test_nothing_is_streamed_before_everything_is_checked():
  class Unreadable:
    shape, dtype = (3,), np.dtype(np.float32)

    def __array__(self, dtype=None, copy=None):
      raise AssertionError("read")

  like = {k: jax.ShapeDtypeStruct((3,), np.float32) for k in "ab"}
  with pytest.raises(UserError, match="b: no tensor 'y'"):
    convert.stream((("a", "x", ""), ("b", "y", "")), {"x": Unreadable()}, like)


# Parts of a LiMBeR

GPTJ_MU = gptj.SIZES["gptj_mu"]()


def random_tree(like, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: np.asarray(0.2 * rng.normal(size=x.shape), np.float32), like)


def lm_like(size=GPTJ_MU):
  return jax.eval_shape(lambda: gptj.init_params(GPTJ(size, Compute(dtype="float32")), jax.random.key(0)))


@pytest.fixture(scope="module")
def hf_gptj(transformers):
  config = transformers.GPTJConfig(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2, rotary_dim=16,
                                   bos_token_id=None, eos_token_id=None)
  return transformers.GPTJForCausalLM(config)


def save_gptj(model, path, kind):
  """Writes a transformers model as the hub has, or had, GPT-J."""
  import flax.serialization
  import flax.traverse_util
  import torch

  os.makedirs(path)
  state = {name: x.detach() for name, x in model.state_dict().items()}
  old = state | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool),
                 "transformer.h.1.attn.masked_bias": torch.tensor(-1e9)}
  if kind == "safetensors":
    model.save_pretrained(path)
  elif kind == "shards":
    model.save_pretrained(path, max_shard_size="100KB")
    assert os.path.exists(os.path.join(path, "model.safetensors.index.json"))
  elif kind == "bin":
    torch.save(old, os.path.join(path, "pytorch_model.bin"))
  elif kind == "bin shards":
    where = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(old)}
    for file in set(where.values()):
      torch.save({name: x for name, x in old.items() if where[name] == file}, os.path.join(path, file))
    with open(os.path.join(path, "pytorch_model.bin.index.json"), "w", encoding="utf-8") as file:
      json.dump({"weight_map": where}, file)
  else:
    tree = {row[1].replace("{}", str(i)): x for row in gptj.FLAX_WEIGHTS for leaf in [reference(state, row[0])]
            for i, x in (enumerate(leaf) if "{" in row[1] else [(0, leaf)])}
    data = flax.serialization.msgpack_serialize(flax.traverse_util.unflatten_dict(tree, sep="/"))
    with open(os.path.join(path, "flax_model.msgpack"), "wb") as file:
      file.write(data)
  model.config.save_pretrained(path)


def reference(state, ours):
  """Returns one of our leaves from a state dict of GPTJForCausalLM, written out without the table engine."""
  theirs = {row[0]: row for row in gptj.HF_WEIGHTS}[ours]
  out = [state[theirs[1].replace("{}", str(i))].numpy() for i in range(2 if "{" in theirs[1] else 1)]
  out = [x.T if ours.endswith("kernel") else x for x in out]
  return np.stack(out) if "{" in theirs[1] else out[0]


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin", "bin shards", "msgpack"])
def test_a_gptj_loads_from_every_form_that_it_is_published_in(tmp_path, hf_gptj, kind):
  path = str(tmp_path / "gptj")
  save_gptj(hf_gptj, path, kind)
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  like = lm_like()
  like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16, sharding=s), like,
                      parallel.shardings(like, gptj.SHARDING, mesh))
  state = {name: x.detach() for name, x in hf_gptj.state_dict().items()}
  got, stats = parts.load_part(path, "lm", GPTJ_MU, like)
  assert stats == {} and jax.tree.structure(got) == jax.tree.structure(like)
  for where, x in jax.tree_util.tree_leaves_with_path(got):
    np.testing.assert_array_equal(np.asarray(x), reference(state, parallel.path_name(where)).astype(ml_dtypes.bfloat16),
                                  strict=True)
  if kind in ("safetensors", "bin", "msgpack"):  # and from the file alone
    name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin", "msgpack": "flax_model.msgpack"}[kind]
    alone, _ = parts.load_part(os.path.join(path, name), "lm", GPTJ_MU, like)
    jax.tree.map(np.testing.assert_array_equal, alone, got)


@pytest.mark.parametrize("change,message", [
  (dict(vocab_size=50400), "vocab_size is 50400, but this config's language model has vocab=512"),
  (dict(rotary_dim=8), "rotary_dim is 8, but this config's language model has rotary=16"),
  (dict(n_head=4), "n_head is 4, .* heads=2"), (dict(n_inner=64), "n_inner is 64, expected 256"),
  (dict(activation_function="relu"), "activation_function is 'relu', expected 'gelu_new'"),
  (dict(model_type="gpt2"), r"this is a GPT-2 \(model_type 'gpt2'\), and the config asks for a GPT-J; what can"),
])
def test_a_gptj_of_another_build_is_refused_by_name(tmp_path, change, message):
  export.save_lm(str(tmp_path / "lm"), GPTJ_MU, random_tree(lm_like()))
  file = tmp_path / "lm" / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | change))
  with pytest.raises(UserError, match=f"^{file}: {message}"):
    parts.load_part(str(tmp_path / "lm"), "lm", GPTJ_MU, lm_like())


def test_the_configuration_beside_a_file_of_a_gptj_is_checked_if_it_is_its_own(tmp_path, capfd):
  params = random_tree(lm_like())
  export.save_lm(str(tmp_path / "lm"), GPTJ_MU, params)
  config, file = tmp_path / "lm" / "config.json", str(tmp_path / "lm" / "model.safetensors")
  values = json.loads(config.read_text())
  config.write_text(json.dumps(values | {"n_head": 4}))  # which shapes do not show
  with pytest.raises(UserError, match=r"config.json: n_head is 4, .* heads=2"):
    parts.load_part(file, "lm", GPTJ_MU, lm_like())
  for change, message in (({"rotary_dim": 8}, "rotary_dim is 8, .* rotary=16"),
                          ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
                          ({"activation_function": "relu"}, "activation_function is 'relu'")):
    config.write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=f"config.json: {message}"):
      parts.load_part(file, "lm", GPTJ_MU, lm_like())
  config.write_text(json.dumps(values))
  parts.load_part(file, "lm", GPTJ_MU, lm_like())
  assert "taken from the config" not in capfd.readouterr().err
  config.write_text(json.dumps(values | {"n_head": 4, "n_layer": 28}))
  jax.tree.map(np.testing.assert_array_equal, parts.load_part(file, "lm", GPTJ_MU, lm_like())[0], params)
  assert f"{file}: heads (2) and rotary dimensions (16) are taken from the config" in capfd.readouterr().err


def test_the_configuration_beside_a_file_of_an_encoder_is_checked_if_it_is_its_own(tmp_path, capfd):
  size = encoders.encoder_size("beit_l16_mu")
  like, _ = encoder_like(size)
  params, file, config = random_tree(like), str(tmp_path / "x.safetensors"), tmp_path / "config.json"
  save_file(convert.export(beit.HF_WEIGHTS, params), file)
  parts.load_part(file, "image", size, like)
  assert f"{file}: taken for a BEiT as published" in capfd.readouterr().err
  values = BEIT_CONFIG | {"model_type": "beit", "use_shared_relative_position_bias": True}
  for change, message in (({"num_attention_heads": 4}, "num_attention_heads is 4, .* has 2"),
                          ({"hidden_act": "relu"}, "hidden_act is 'relu', expected 'gelu'"),
                          ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
                          ({"use_mean_pooling": False}, "use_mean_pooling is False")):
    config.write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=f"config.json: {message}"):
      parts.load_part(file, "image", size, like)
  for own in (values, values | {"hidden_size": 768, "hidden_act": "relu"}):  # its own, and another model's
    config.write_text(json.dumps(own))
    jax.tree.map(np.testing.assert_array_equal, parts.load_part(file, "image", size, like)[0], params)
  config.write_text(json.dumps(values))
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(
    {"image_processor_type": "BeitImageProcessor", "size": {"height": 32, "width": 32}, "do_center_crop": False,
     "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}))
  assert adopt.beside(file, size) == adopt.beside(str(tmp_path), size)
  assert adopt.beside(file, size).mean == (0.1, 0.2, 0.3)
  size = encoders.encoder_size("nf_resnet50_mu")
  config.write_text(json.dumps({"architecture": "nf_resnet50", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}))
  assert adopt.beside(file, size).mean == (0.1, 0.2, 0.3)
  config.write_text(json.dumps({"architecture": "resnet50", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]}}))
  assert adopt.beside(file, size) is None


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps({
    "model_type": "gptj", "vocab_size": 512, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2,
    "rotary_dim": 16}))
  with pytest.raises(UserError, match=r"no weights there; looked for model.safetensors, .* and flax_model.msgpack"):
    parts.load_part(str(tmp_path), "lm", GPTJ_MU, lm_like())
  with pytest.raises(UserError, match="no such file or directory"):
    parts.load_part(str(tmp_path / "no"), "lm", GPTJ_MU, lm_like())


@pytest.mark.parametrize("shard_bytes", [10**9, 100_000])
def test_transformers_opens_an_exported_gptj_and_gives_the_same_logits(tmp_path, transformers, shard_bytes):
  import torch

  params = random_tree(lm_like())
  path = str(tmp_path / "lm")
  export.save_lm(path, GPTJ_MU, params, shard_bytes=shard_bytes)
  assert os.path.exists(os.path.join(path, "model.safetensors.index.json")) == (shard_bytes < 10**9)
  model, info = transformers.GPTJForCausalLM.from_pretrained(path, output_loading_info=True)
  assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
  tokens = np.random.default_rng(0).integers(0, 512, (2, 10))
  with torch.no_grad():
    want = model.eval()(torch.tensor(tokens)).logits.numpy()
  lm = GPTJ(GPTJ_MU, Compute(dtype="float32"))

  @jax.jit
  def logits(params, tokens):
    positions = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    x = lm.apply({"params": params}, tokens, method="embed")
    hidden, _ = lm.apply({"params": params}, x, positions, np.ones((2, 10), bool))
    return lm.apply({"params": params}, hidden, method="logits")

  got = np.asarray(logits(params, tokens))
  assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
  back, _ = parts.load_part(path, "lm", GPTJ_MU, lm_like())
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_gptj_is_exported_in_half_precision_and_over_nothing(tmp_path):
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  params = random_tree(lm_like())
  spread = jax.device_put(params, parallel.shardings(params, gptj.SHARDING, mesh))
  export.save_lm(str(tmp_path / "lm"), GPTJ_MU, spread, dtype="bfloat16")
  tensors = load_file(tmp_path / "lm" / "model.safetensors")
  assert {x.dtype for x in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
  assert json.loads((tmp_path / "lm" / "config.json").read_text())["dtype"] == "bfloat16"
  np.testing.assert_array_equal(tensors["transformer.h.1.mlp.fc_in.weight"],
                                params["blocks"]["fc"]["kernel"][1].T.astype(ml_dtypes.bfloat16))
  with pytest.raises(UserError, match="holds something already"):
    export.save_lm(str(tmp_path / "lm"), GPTJ_MU, params)
  with pytest.raises(UserError, match="adapter: this format has no place for it"):
    export.save_lm(str(tmp_path / "other"), GPTJ_MU, params | {"adapter": np.zeros(2)})


def encoder_like(size):
  params, stats = Encoder.from_config(size, Compute(dtype="float32", attention="xla")).shapes()
  return params, stats


BEIT_CONFIG = dict(image_size=32, patch_size=8, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=256)


@pytest.mark.parametrize("form", ["shared", "own", "headed"])
def test_a_beit_saved_by_transformers_loads(tmp_path, transformers, form):
  size = encoders.encoder_size("beit_l16_mu" if form == "shared" else "beit_l16_ft_mu")
  config = transformers.BeitConfig(use_shared_relative_position_bias=form == "shared",
                                   use_relative_position_bias=form != "shared", **BEIT_CONFIG)
  model = (transformers.BeitForImageClassification if form == "headed" else transformers.BeitModel)(config)
  for parameter in model.parameters():
    parameter.data.normal_()
  path = str(tmp_path / "beit")
  model.save_pretrained(path)
  transformers.BeitImageProcessor(do_resize=True).save_pretrained(path)
  like, _ = encoder_like(size)
  got, stats = parts.load_part(path, "image", size, like)
  assert stats == {}
  there = load_file(os.path.join(path, "model.safetensors"))
  start = "beit." if form == "headed" else ""
  np.testing.assert_array_equal(got["blocks"]["attn"]["q"]["kernel"][1],
                                there[f"{start}encoder.layer.1.attention.attention.query.weight"].T)
  np.testing.assert_array_equal(got["patch"]["kernel"], there[
    f"{start}embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize("change,message", [
  (dict(num_hidden_layers=24), "num_hidden_layers is 24, but this config's encoder has 2"),
  (dict(use_shared_relative_position_bias=False), "use_shared_relative_position_bias is False, .* True"),
  (dict(use_mean_pooling=False), "use_mean_pooling is False, expected True"),
  (dict(model_type="vit"), r"this is a ViT \(model_type 'vit'\), and the config asks for a BEiT; what can"),
])
def test_a_beit_of_another_build_is_refused_by_name(tmp_path, change, message):
  size = encoders.encoder_size("beit_l16_mu")
  like, _ = encoder_like(size)
  save_file(convert.export(beit.HF_WEIGHTS, random_tree(like)), tmp_path / "model.safetensors")
  config = BEIT_CONFIG | {"model_type": "beit", "use_shared_relative_position_bias": True}
  (tmp_path / "config.json").write_text(json.dumps(config | change))
  with pytest.raises(UserError, match=f"{tmp_path / 'config.json'}: {message}"):
    parts.load_part(str(tmp_path), "image", size, like)


TABLES = {  # by name: (size of the encoder, table, a tensor's name, our path of it)
  "beit": ("beit_l16_mu", beit.HF_WEIGHTS, "encoder.layer.1.lambda_2", "blocks/layer_scale_2"),
  "beit_headed": ("beit_l16_ft_mu", beit.HF_HEADED_WEIGHTS, "beit.encoder.layer.1.lambda_2", "blocks/layer_scale_2"),
  "nf_resnet": ("nf_resnet50_mu", nfnet.TIMM_WEIGHTS, "stages.1.1.conv2.bias", "stage2_rest/conv2/bias"),
}


@pytest.mark.parametrize("table,kind", [("beit", "directory"), ("beit_headed", "pth"), ("nf_resnet", "directory"),
                                        ("nf_resnet", "safetensors"), ("nf_resnet", "pth")])
def test_an_encoder_goes_through_its_table_and_back(tmp_path, table, kind):
  name, rows, tensor, ours = TABLES[table]
  size = encoders.encoder_size(name)
  like, _ = encoder_like(size)
  params = random_tree(like)
  tensors = convert.export(rows, params)

  def write(tensors):
    if kind == "pth":
      torch = pytest.importorskip("torch")
      torch.save({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "x.pth")
      return str(tmp_path / "x.pth")
    save_file(tensors, tmp_path / "model.safetensors")
    if table == "nf_resnet":
      (tmp_path / "config.json").write_text(json.dumps({"architecture": "nf_resnet50", "num_classes": 1000}))
    return str(tmp_path if kind == "directory" else tmp_path / "model.safetensors")

  got, stats = parts.load_part(write(tensors), "image", size, like)
  assert stats == {}
  jax.tree.map(np.testing.assert_array_equal, got, params)
  for change, message in (
      (lambda t: t.pop(tensor), f"{ours}: no tensor '{tensor}'"),
      (lambda t: t.update({f"{tensor}.more": np.zeros(3, np.float32)}), f"nothing here reads '{tensor}.more'"),
      (lambda t: t.update({tensor: np.zeros(3, np.float32)}), rf"{ours}: expected .*, got \(.*3,?\) from "),
      (lambda t: t.update({tensor: t[tensor].astype(np.int32)}), f"{ours}: expected floating point, got .*32")):
    changed = dict(tensors)
    change(changed)
    path = write(changed)
    with pytest.raises(UserError, match=f"^{path}: {message}"):
      parts.load_part(path, "image", size, like)


def test_the_references_nf_resnet_ignores_its_classifier_and_refuses_other_networks(tmp_path):
  size = encoders.encoder_size("nf_resnet50_mu")
  like, _ = encoder_like(size)
  tensors = convert.export(nfnet.TIMM_WEIGHTS, random_tree(like))
  save_file(tensors | {"head.fc.weight": np.zeros((9, 8), np.float32), "head.fc.bias": np.zeros(9, np.float32)},
            tmp_path / "model.safetensors")
  parts.load_part(str(tmp_path), "image", size, like)
  (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet50"}))
  with pytest.raises(UserError, match="this is 'resnet50' of timm, and the config asks for an NF-ResNet of timm's"):
    parts.load_part(str(tmp_path), "image", size, like)
  save_file({"w": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
  with pytest.raises(UserError, match=r"no weights of a 'nf_resnet' encoder: none of the tensors is stem.conv.weight"):
    parts.load_part(str(tmp_path / "other.safetensors"), "image", size, like)


def clip_encoder(size):
  return EncoderConfig(size.image, size.mean, size.std, embed_dim=size.embed_dim, activation=size.activation)


@pytest.mark.parametrize("name,to", [("vit", "hf"), ("resnet", "open_clip"), ("resnet", "limber")])
def test_an_image_tower_of_a_clip_is_an_encoder(tmp_path, name, to):
  size = own(SIZES[name])
  params, stats = random_model(size)
  export.save(str(tmp_path / "out"), to, size, params, stats)
  like, stats_like = encoder_like(clip_encoder(size))
  got, got_stats = parts.load_part(str(tmp_path / "out"), "image", clip_encoder(size), like, stats_like)
  assert_equal(jax.device_get((got, got_stats)), (params["image"], stats.get("image", {})))
  other = clip_encoder(size)
  other.activation = "quick_gelu"
  with pytest.raises(UserError, match=r"has activation='gelu', but this config's model has 'quick_gelu'; set --config"
                                      r".model.image.activation=gelu"):
    parts.load_part(str(tmp_path / "out"), "image", other, like, stats_like)
  other.activation, other.tower = "gelu", dataclasses.replace(size.image, heads=1)
  with pytest.raises(UserError, match=rf"set --config.model.image.tower.heads={size.image.heads}"):
    parts.load_part(str(tmp_path / "out"), "image", other, like, stats_like)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_an_image_tower_alone_is_an_encoder_and_no_clip(tmp_path, transformers, name):
  import torch

  torch.manual_seed(0)
  model = getattr(transformers, name)(transformers.CLIPVisionConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8,
    projection_dim=24, hidden_act="gelu")).eval()
  for parameter in model.parameters():
    parameter.data += 0.1 * torch.randn(parameter.shape)
  model.save_pretrained(tmp_path / "tower")
  size = EncoderConfig(ViTSize(image_size=32, patch=8, width=64, layers=2, heads=4), activation="gelu", embed_dim=24)
  if name == "CLIPVisionModel":
    size.embed_dim = 64
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    out = model(torch.tensor(images).permute(0, 3, 1, 2))
  want = (out.last_hidden_state[:, 1:], out.pooler_output if name == "CLIPVisionModel" else out.image_embeds)
  for source in ("tower", "tower/model.safetensors"):
    params, _ = parts.load_part(str(tmp_path / source), "image", size, encoder_like(size)[0])
    encoder = Encoder.from_config(size, Compute(dtype="float32"))
    got, _ = jax.jit(lambda params, encoder=encoder: encoder.encode(params, {}, images))(params)
    for ours, theirs in zip(got[:2], want, strict=True):
      assert np.abs(ours - theirs.numpy()).max() <= 1e-5 * np.abs(theirs.numpy()).max()
    with pytest.raises(UserError, match="only the image tower of a CLIP, but the text tower is needed here"):
      load.load(str(tmp_path / source), "" if source == "tower" else said(tmp_path, ClipConfig(
        24, size.tower, TextSize(), "gelu")))
  if name == "CLIPVisionModel":
    size.embed_dim, size.features = 512, "pooled"
    with pytest.raises(UserError, match=r"pooled output has a width of 64, .*; set --config.model.image.embed_dim=64"):
      parts.load_part(str(tmp_path / "tower"), "image", size, encoder_like(size)[0])
    size.features = "tokens"
    params, _ = parts.load_part(str(tmp_path / "tower"), "image", size, encoder_like(size)[0])
    assert params["head"]["kernel"].shape == (64, 512) and not params["head"]["kernel"].any()
  size.tower.heads = 2
  with pytest.raises(UserError, match=r"has image.heads=4, but this config's model has 2"):
    parts.load_part(str(tmp_path / "tower"), "image", size, encoder_like(size)[0])


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_text_tower_alone_starts_a_text_tower_if_it_is_projected(tmp_path, transformers, name):
  model = getattr(transformers, name)(transformers.CLIPTextConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=1, vocab_size=99,
    max_position_embeddings=12, projection_dim=32, eos_token_id=98))
  model.save_pretrained(tmp_path)
  size = SIZES["vit"]
  with pytest.raises(UserError, match="only the text tower of a CLIP, but the image tower is needed here"):
    load.load(str(tmp_path))
  if name == "CLIPTextModel":
    with pytest.raises(UserError, match=r"text/head/kernel: no tensor 'text_projection.weight'"):
      load.load_into(str(tmp_path), "text", size, formats.shapes(size)["text"])
  else:
    got, _ = load.load_into(str(tmp_path), "text", size, formats.shapes(size)["text"])
    np.testing.assert_array_equal(got["head"]["kernel"], model.text_projection.weight.detach().numpy().T)


def test_a_state_dict_of_pytorch_is_read_as_one_of_safetensors(tmp_path, open_clip):
  import torch

  size = SIZES["vit"]
  params, _ = random_model(size)
  tensors = {k: torch.tensor(v) for k, v in convert.export(clip.openai_weights("vit"), params).items()}
  torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "epoch_3.pt")
  model = said(tmp_path, size)
  assert_equal(load.load(str(tmp_path / "epoch_3.pt"), model).params, params)  # as open_clip's training writes

  export.save(str(tmp_path / "out"), "open_clip", size, params, {})
  os.remove(tmp_path / "out" / "open_clip_model.safetensors")
  torch.save(tensors, tmp_path / "out" / "open_clip_pytorch_model.bin")
  assert_equal(load.load(str(tmp_path / "out")).params, params)

  export.save(str(tmp_path / "hf"), "hf", size, params, {})
  torch.save({k: torch.tensor(v) for k, v in load_file(tmp_path / "hf" / "model.safetensors").items()},
             tmp_path / "hf" / "pytorch_model.bin")
  os.remove(tmp_path / "hf" / "model.safetensors")
  assert_equal(load.load(str(tmp_path / "hf")).params, params)


@pytest.mark.parametrize("table", ["beit", "nf_resnet"])
def test_wrappers_come_off_an_encoder_and_a_language_model_too(tmp_path, capsys, table):
  torch = pytest.importorskip("torch")
  size = encoders.encoder_size(TABLES[table][0])
  like, _ = encoder_like(size)
  params, lm = random_tree(like), random_tree(lm_like())
  for file, tensors in (("image.pth", convert.export(TABLES[table][1], params)),
                        ("lm.pt", convert.export(gptj.HF_WEIGHTS, lm))):
    state = {f"module.{k}": torch.tensor(v) for k, v in tensors.items()}
    torch.save({"model_ema": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
               tmp_path / file)
  got, _ = parts.load_part(str(tmp_path / "image.pth"), "image", size, like)
  jax.tree.map(np.testing.assert_array_equal, got, params)
  got, _ = parts.load_part(str(tmp_path / "lm.pt"), "lm", GPTJ_MU, lm_like())
  jax.tree.map(np.testing.assert_array_equal, got, lm)
  assert capsys.readouterr().err.count("names are taken without 'model_ema.module.'; optimizer set aside") == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself is deprecated
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_an_archive_of_torch_jit_in_openais_names_is_read(tmp_path, published, name):
  """As clip.load downloads them: half precision, and sizes and masks beside the weights."""
  torch = pytest.importorskip("torch")

  class Part(torch.nn.Module):
    def forward(self, x):
      return x

  root = Part()
  size = SIZES[name]
  params, stats = random_model(size)
  tensors = convert.export(clip.openai_weights(name), params | ({"stats": stats} if stats else {}))
  for key, x in tensors.items():
    *parents, last = key.split(".")
    module = root
    for parent in parents:
      if not hasattr(module, parent):
        module.add_module(parent, Part())
      module = getattr(module, parent)
    module.register_parameter(last, torch.nn.Parameter(torch.tensor(x).half()))
  for mark, value in (("input_resolution", size.image.image_size), ("context_length", 12), ("vocab_size", 99)):
    root.register_buffer(mark, torch.tensor(value))
  root.transformer.resblocks.get_submodule("0").attn_mask = torch.zeros(12, 12)
  torch.jit.save(torch.jit.trace(root, torch.zeros(1)), str(tmp_path / "model.pt"))
  loaded = load.load(str(tmp_path / "model.pt"))
  assert loaded.size == size
  assert_equal((loaded.params, loaded.stats),
               jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), (params, stats)))


def workdir(path, values, params, stats):
  """Writes what limber_jax.train leaves behind: config.json and a checkpoint."""
  checkpoints = Checkpoints(path, Checkpoint(), write=True)
  params, stats = jax.tree.map(jax.numpy.asarray, (params, stats))
  checkpoints.save(TrainState.create(params, stats, optax.sgd(1e-3)), {})
  checkpoints.wait()
  checkpoints.close()
  with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as file:
    json.dump(values, file)
  return path


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_an_encoder_loads_from_the_workdir_of_a_clip(tmp_path, name):
  size = SIZES[name]
  params, stats = random_model(size)
  path = workdir(str(tmp_path / "run"), json.loads(config_json.to_json(Config("run", size))), params, stats)
  like, stats_like = encoder_like(clip_encoder(size))
  mesh = parallel.make_mesh({"fsdp": 8})
  like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16, sharding=s), like,
                      parallel.shardings(like, clip.sharding(size), mesh))
  got, got_stats = parts.load_part(path, "image", clip_encoder(size), like, stats_like)
  assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(ml_dtypes.bfloat16)}
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b.astype(ml_dtypes.bfloat16)), got,
               params["image"])
  assert_equal(jax.device_get(got_stats), stats.get("image", {}))


@pytest.mark.parametrize("start,others", [("model.", {}), ("model.lm.", {"prompt": {"linear": {"bias": np.ones(3)}}})])
def test_a_language_model_loads_from_the_workdir_of_a_run_that_trained_it(tmp_path, start, others):
  params = random_tree(lm_like())
  values = {f"{start}{k}": v for k, v in config_json.flatten(GPTJ_MU).items()}
  values |= {"trainable": ["lm", *others], "checkpoint.best": ""}
  path = workdir(str(tmp_path / "run"), values, {"lm": params, **others}, {})
  mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2})
  like = lm_like()
  like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, ml_dtypes.bfloat16, sharding=s), like,
                      parallel.shardings(like, gptj.SHARDING, mesh))
  got, stats = parts.load_part(path, "lm", GPTJ_MU, like)
  assert stats == {}
  for x, w, spec in zip(*map(jax.tree.leaves, (got, params, like)), strict=True):
    np.testing.assert_array_equal(np.asarray(x), w.astype(ml_dtypes.bfloat16), strict=True)
    assert x.sharding == spec.sharding
  wider = GPTJSize(**{**vars(GPTJ_MU), "width": 128})
  with pytest.raises(UserError, match=rf"{start}width is 64, but this config's part 'lm' has 128"):
    parts.load_part(path, "lm", wider, lm_like(wider))
  with pytest.raises(UserError, match="a run whose model has no part 'image'"):
    parts.load_part(path, "image", encoders.encoder_size("beit_l16_mu"), {})


def test_a_clip_with_a_frozen_resnet_loads_with_the_statistics_that_it_started_from(tmp_path):
  size = SIZES["resnet"]
  params, stats = random_model(size)
  export.save(str(tmp_path / "start"), "open_clip", size, params, stats)
  config = Config("run", size, trainable=("text", "logit_scale"), init=Init(image=str(tmp_path / "start")))
  trained = {k: v for k, v in random_model(size, seed=1)[0].items() if k != "image"}
  path = workdir(str(tmp_path / "run"), json.loads(config_json.to_json(config)), trained, {})
  loaded = load.load(path)
  assert_equal((loaded.params, loaded.stats), (trained | {"image": params["image"]}, stats))


def test_a_part_that_was_frozen_in_a_run_comes_from_where_the_run_had_it(tmp_path):
  params = random_tree(lm_like())
  export.save_lm(str(tmp_path / "lm"), GPTJ_MU, params)
  values = {f"model.lm.{k}": v for k, v in config_json.flatten(GPTJ_MU).items()}
  values |= {"trainable": ["prompt"], "checkpoint.best": "", "init.lm": str(tmp_path / "lm")}
  prompt = {"linear": {"bias": np.ones(3, np.float32)}}
  path = workdir(str(tmp_path / "run"), values, {"prompt": prompt}, {})
  got, _ = parts.load_part(path, "lm", GPTJ_MU, lm_like())
  jax.tree.map(np.testing.assert_array_equal, got, params)
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), prompt)
  got, _ = parts.load_part(path, "prompt", None, like)
  jax.tree.map(np.testing.assert_array_equal, got, prompt)
  like["linear"]["bias"] = jax.ShapeDtypeStruct((4,), np.float32)
  with pytest.raises(UserError, match=r"linear/bias: expected \(4,\), got \(3,\)"):
    parts.load_part(path, "prompt", None, like)


# What is not a model, or not safe to open


class Bomb:
  def __reduce__(self):
    return (os.abort, ())


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.safetensors", "model.npz", "model"])
def test_a_pickle_with_code_is_refused_and_never_run_whatever_its_name(tmp_path, name):
  reason = f"holds {os.name}.abort, which only code could use"
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Bomb()}, protocol))
    known = protocol > 1 or name.endswith((".bin", ".pt"))  # the first two protocols have no mark
    with pytest.raises(UserError, match=reason if known else "none of safetensors, npz, torch.save and msgpack"):
      load.load(str(tmp_path / name))
  with zipfile.ZipFile(tmp_path / name, "w") as archive:  # as torch.save and torch.jit.save write
    archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    archive.writestr("archive/data/0", b"1234")
  with pytest.raises(UserError, match=reason):
    load.load(str(tmp_path / name))


def test_a_directory_of_pickles_with_code_is_refused(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(UserError, match=rf"pytorch_model.bin: holds {os.name}.abort"):
    load.load(str(tmp_path))


def test_an_npz_with_objects_is_refused(tmp_path):
  np.savez(tmp_path / "model.npz", weight=np.array([Bomb()], object))
  with pytest.raises(UserError, match=r"weight.npy: holds Python objects"):
    load.load(str(tmp_path / "model.npz"))


def test_an_npz_that_lies_about_its_sizes_is_refused(tmp_path):
  path = tmp_path / "model.npz"
  np.savez_compressed(path, weight=np.zeros(10**7, np.float32))
  with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
    load.load(str(path))
  with zipfile.ZipFile(path, "w") as archive, archive.open("weight.npy", "w") as file:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
  with pytest.raises(UserError, match=r"weight.npy is 128 bytes, not what its shape \(1000000000,\) takes"):
    load.load(str(path))


def test_a_damaged_npz_is_refused(tmp_path):
  params, _ = random_model(SIZES["vit"])
  path = tmp_path / "model.npz"
  np.savez(path, **convert.export(clip.openai_weights("vit"), params))
  data = bytearray(path.read_bytes())
  data[5000] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="is damaged"):
    load.load(str(path), said(tmp_path, SIZES["vit"]))
  path.write_bytes(data[:5000])
  with pytest.raises(UserError, match=r"none of safetensors, npz, torch.save and msgpack"):
    load.load(str(path))


@pytest.mark.parametrize("data", [
  b"", b"{}", (5).to_bytes(8, "little") + b"{oops", (10**9).to_bytes(8, "little") + b"{}",
  (64).to_bytes(8, "little") + json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode(),
])
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, data):
  (tmp_path / "model.safetensors").write_bytes(data)
  with pytest.raises(UserError, match=r"model.safetensors: (not a whole safetensors file|none of)") as error:
    load.load(str(tmp_path / "model.safetensors"))
  assert "\n" not in str(error.value)


def test_a_state_dict_of_something_else_is_refused(tmp_path):
  save_file({"fc.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"this is no model that is known here .*fc.weight.*; what can be loaded as"):
    load.load(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("to,file,change,message", [
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="vit_tiny"),
   r"this is a CLIP with an image tower of timm's, as SigLIPs have \('vit_tiny'\); what can be loaded as a CLIP"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"].update(multimodal_cfg={"layers": 12}),
   "this is a CoCa, by the layers of its decoder"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"]["text_cfg"].update(pool_type="last"),
   "text_cfg.pool_type='last'"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"].update(custom_text=True), "cfg.custom_text=True"),
  ("open_clip", "open_clip_config.json", lambda c: c.pop("model_cfg"), "'model_cfg' is missing"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(image_size=[32, 64]),
   r"expected a square, a positive number of pixels a side, got \[32, 64\]"),
  ("hf", "config.json", lambda c: c.update(model_type="siglip"), r"this is a SigLIP \(model_type 'siglip'\); what can"),
  ("hf", "config.json", lambda c: c["text_config"].update(hidden_act="gelu"),
   "hidden_act: expected one of quick_gelu, gelu for both towers, got 'quick_gelu' and 'gelu'"),
  ("hf", "config.json", lambda c: c["vision_config"].update(layer_norm_eps=1e-6), "layer_norm_eps: expected 1e-05"),
  ("hf", "config.json", lambda c: c["text_config"].update(eos_token_id=99),
   "text_config.eos_token_id is 99, which is no id of its vocabulary of 99"),
  ("hf", "config.json", lambda c: c["text_config"].update(hidden_size="64"), "'hidden_size' expected int, got str"),
  ("limber", "limber_config.json", lambda c: c.pop("text.vocab"), "text.vocab is missing"),
])
def test_a_configuration_that_is_not_this_model_is_refused(tmp_path, to, file, change, message):
  export.save(str(tmp_path / "out"), to, SIZES["vit"], *random_model(SIZES["vit"]))
  path = tmp_path / "out" / file
  config = json.loads(path.read_text())
  change(config)
  path.write_text(json.dumps(config))
  with pytest.raises(UserError, match=f"^{path}: .*{message}") as error:
    load.load(str(tmp_path / "out"))
  assert "\n" not in str(error.value)


def test_settings_that_change_nothing_are_taken(tmp_path):
  export.save(str(tmp_path / "out"), "open_clip", SIZES["vit"], *random_model(SIZES["vit"]))
  path = tmp_path / "out" / "open_clip_config.json"
  config = json.loads(path.read_text())
  vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
  vision |= {"timm_model_name": None, "timm_pool": "avg", "mlp_ratio": 4.0, "pool_type": "tok"}
  text |= {"hf_tokenizer_name": "some/name", "pool_type": "argmax", "no_causal_mask": False}
  path.write_text(json.dumps(config))
  assert load.load(str(tmp_path / "out")).size == SIZES["vit"]


def test_shards_outside_of_the_directory_are_refused(tmp_path):
  export.save(str(tmp_path / "out"), "hf", SIZES["vit"], *random_model(SIZES["vit"]))
  (tmp_path / "out" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
  index = {"weight_map": {"logit_scale": "../elsewhere.safetensors"}}
  (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(UserError, match=r"weight_map points outside of the directory: '../elsewhere.safetensors'"):
    load.load(str(tmp_path / "out"))


def test_a_model_that_a_format_cannot_hold_is_refused(tmp_path):
  with pytest.raises(UserError, match="CLIPModel has no resnet tower; use --to=open_clip"):
    export.save(str(tmp_path / "out"), "hf", SIZES["resnet"], *random_model(SIZES["resnet"]))
  with pytest.raises(UserError, match=r"CLIPModel has no logit_bias .*; use --to=open_clip"):
    export.save(str(tmp_path / "out"), "hf", SIZES["vit"], *random_model(SIZES["vit"], logit_bias=True))
  with pytest.raises(UserError, match="no format 'openclip'; did you mean 'open_clip'"):
    export.save(str(tmp_path / "out"), "openclip", SIZES["vit"], *random_model(SIZES["vit"]))
  assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(saved):
  path, _, size, params = saved
  with pytest.raises(UserError, match="holds something already; choose a new directory"):
    export.save(path, "limber", size, params, {})


def convert_command(*args):
  return subprocess.run([sys.executable, "-m", "limber_jax.convert", *map(str, args)], capture_output=True, text=True,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"})


@pytest.mark.process
def test_the_convert_command_rewrites_a_model(saved, tmp_path):
  path, _, size, params = saved
  result = convert_command(path, tmp_path / "out", "--to=hf")
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("--to=hf: where an odd number of pixels is to be cut off, it may cut one pixel f")
  assert result.stdout.endswith("M parameters for hf\n")
  loaded = load.load(str(tmp_path / "out"))
  assert loaded.size == dataclasses.replace(size, crop_rounding="down")
  assert_equal(loaded.params, params)


@pytest.mark.process
def test_the_convert_command_asks_of_a_state_dict_whose_it_is(saved, tmp_path):
  path, file, size, params = saved
  os.remove(os.path.join(path, "open_clip_config.json"))
  result = convert_command(file, tmp_path / "out", "--to=limber")
  assert result.returncode == 2 and result.stderr.count("\n") == 1
  assert "says neither how many heads nor which activation its model has; say it by --model=" in result.stderr
  result = convert_command(file, tmp_path / "out", "--to=limber", f"--model={said(tmp_path, size)}")
  assert result.returncode == 0, result.stderr
  assert_equal(load.load(str(tmp_path / "out")).params, params)


def test_what_lies_beside_converted_weights_is_kept_or_named(tmp_path):
  source, out = tmp_path / "source", tmp_path / "out"
  source.mkdir()
  out.mkdir()
  assert list(beside.keep(str(source / "x.pt"), str(out), "hf")) == []  # CLIP's own, which is the default everywhere
  (source / "tokenizer.json").write_text("{}")
  (source / "merges.txt").write_text("#version")
  (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": {
    "tokenizer_kwargs": {"strip_sep_token": True}, "hf_tokenizer_name": "some/body", "width": 64}}}))
  assert list(beside.keep(str(source / "x.pt"), str(out), "hf")) == [
    f"{out}: the tokenizer of {source}: tokenizer.json, merges.txt",
    "--to=hf: not kept: text_cfg.tokenizer_kwargs={'strip_sep_token': True}",
    "--to=hf: not kept: text_cfg.hf_tokenizer_name='some/body'"]
  assert (out / "merges.txt").read_text() == "#version" and not (out / "open_clip_config.json").exists()
  run = tmp_path / "run"
  (run / "checkpoints").mkdir(parents=True)
  (run / "config.json").write_text(json.dumps({
    "data.tokenizer.name": "bpe", "data.tokenizer.path": "tok", "data.exif": True, "data.formats": ["gif", "bmp"]}))
  lines = list(beside.keep(str(run), str(out), "limber"))
  assert lines[0].endswith("its tokenizer 'bpe', which no other library has; use it with --tokenizer=bpe "
                           "--tokenizer_path=tok")
  assert "not kept: data.exif=true" in lines[1] and "not kept: data.formats=gif,bmp" in lines[2] and len(lines) == 3


@pytest.mark.process
@pytest.mark.parametrize("args,message", [
  (["nowhere", "out", "--to=hf"], "error: nowhere: no such file or directory"),
  (["nowhere", "out"], "error: --to is missing; choose one of hf, open_clip, limber"),
  (["nowhere", "out", "--to=pickle"], "error: flag --to=pickle: value should be one of <hf|open_clip|limber|proj"),
])
def test_the_convert_command_tells_a_mistake_in_one_line(args, message):
  result = convert_command(*args)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.count("\n") == 1


def test_weights_that_are_no_numbers_are_refused_by_name():
  rows, like = (("a/kernel", "a.weight", "OI>IO"),), {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
  for bad in (np.nan, np.inf, -np.inf):
    tensor = np.ones((3, 2), np.float32)
    tensor[1, 1] = bad
    with pytest.raises(UserError, match=r"a\.weight holds numbers that are not finite"):
      convert.convert(rows, {"a.weight": tensor}, like)
