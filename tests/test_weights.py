"""Weights in and out: every table both ways, other libraries opening what is written, and what is refused."""

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
import pytest
from safetensors.numpy import load_file, save_file

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.models.clip import ClipSize
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.weights import convert, export, load

TEXT = TextSize(context=12, vocab=99, width=64, layers=2, heads=1)
SIZES = {  # heads 64 wide, as a state dict without a configuration must have them
  "vit": ClipSize(32, ViTSize(image_size=32, patch=8, width=128, layers=3, heads=2), TEXT),
  "resnet": ClipSize(32, ResNetSize(image_size=64, layers=(1, 2, 1, 3), width=16, heads=8), TEXT),
}


def random_model(size, logit_bias=False, seed=0):
  """Returns (params, stats), float32."""
  rng = np.random.default_rng(seed)

  def leaf(path, x):
    if path[-1].key in ("scale", "var"):
      return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
    return np.asarray(0.1 * rng.normal(size=x.shape), np.float32)

  params = jax.tree_util.tree_map_with_path(leaf, load.shapes(size, logit_bias))
  return params, params.pop("stats", {})


def own(size):
  """Returns `size` with heads, activation, mean and std that only a configuration can tell."""
  image, text = (type(x)(**{**vars(x), "heads": 2 * x.heads}) for x in (size.image, size.text))
  return ClipSize(size.embed_dim, image, text, "gelu", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


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
  assert loaded.size == size
  assert_equal((loaded.params, loaded.stats), (params, stats))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_state_dict_in_openais_names_gives_back_weights_and_size(tmp_path, name, suffix):
  size = SIZES[name]
  params, stats = random_model(size)
  tensors = convert.export(clip.OPENAI_WEIGHTS[name], params | ({"stats": stats} if stats else {}))
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
  half = {k: v.astype(dtype) for k, v in convert.export(clip.OPENAI_WEIGHTS["vit"], params).items()}
  save_file(half, tmp_path / "model.safetensors")
  assert_equal(load.load(str(tmp_path / "model.safetensors")).params,
               jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params))


def test_every_exported_array_is_contiguous_in_memory():
  """safetensors 0.8 writes transposed arrays in the wrong order, without a word."""
  for name, rows in (("vit", clip.HF_WEIGHTS["vit"]), *clip.OPENAI_WEIGHTS.items()):
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
  assert loaded.size == ClipSize(32, ViTSize(image_size=32, patch=8, width=64, layers=2, heads=2),
                                 TextSize(context=12, vocab=99, width=64, layers=2, heads=2))
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
    convert.convert(clip.HF_WEIGHTS["vit"], {}, {"text": {"adapter": np.zeros(3)}})
  with pytest.raises(UserError, match="text/adapter: this format has no place for it"):
    convert.export(clip.HF_WEIGHTS["vit"], {"text": {"adapter": np.zeros(3)}})


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
  got, got_stats = load.load_into(str(tmp_path / "out"), part, size, load.shapes(size)[part], stats.get(part))
  assert_equal((got, got_stats), (params[part], stats.get(part, {})))


def test_a_part_of_another_build_is_refused_by_name(saved):
  path, _, size, params = saved
  shallower = ClipSize(32, ViTSize(image_size=32, patch=8, width=128, layers=2, heads=2), TEXT)
  with pytest.raises(UserError, match=r"nothing here reads 'visual.transformer.resblocks.2\..*, nor 11 other tensors"):
    load.load_into(path, "image", shallower, load.shapes(shallower)["image"])
  wider = ClipSize(32, ViTSize(image_size=32, patch=8, width=192, layers=3, heads=3), TEXT)
  with pytest.raises(UserError, match=r"image/blocks/attn/k/bias: expected \(3, 192\), got \(3, 128\) from visual"):
    load.load_into(path, "image", wider, load.shapes(wider)["image"])
  with pytest.raises(UserError, match=r"activation='quick_gelu', but .* 'gelu'; set --config.model.activation=quick"):
    load.load_into(path, "text", own(size), params["text"])


# What is not a model, or not safe to open


class Bomb:
  def __reduce__(self):
    return (os.abort, ())


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.safetensors", "model.npz", "model"])
def test_a_pickle_is_refused_and_never_opened_whatever_its_name(tmp_path, name):
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Bomb()}, protocol))
    known = protocol > 1 or name.endswith((".bin", ".pt"))  # the first two protocols have no mark
    reason = "a pickle, and opening one runs" if known else "neither a safetensors nor an npz file"
    with pytest.raises(UserError, match=reason):
      load.load(str(tmp_path / name))
  with zipfile.ZipFile(tmp_path / name, "w") as archive:  # as torch.save and torch.jit.save write
    archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    archive.writestr("archive/data/0", b"1234")
  with pytest.raises(UserError, match=r"a pickle, .*safetensors.torch.save_file.*torch.jit.load"):
    load.load(str(tmp_path / name))


def test_a_directory_with_nothing_but_pickles_says_so(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "clip"}')
  (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
  with pytest.raises(UserError, match=r"pytorch_model.bin: a pickle"):
    load.load(str(tmp_path))


def test_an_npz_with_objects_is_refused(tmp_path):
  np.savez(tmp_path / "model.npz", weight=np.array([Bomb()], object))
  with pytest.raises(UserError, match=r"weight.npy: a pickle"):
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
  np.savez(path, **convert.export(clip.OPENAI_WEIGHTS["vit"], params))
  data = bytearray(path.read_bytes())
  data[5000] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="is damaged"):
    load.load(str(path))
  path.write_bytes(data[:5000])
  with pytest.raises(UserError, match="neither a safetensors nor an npz file"):
    load.load(str(path))


@pytest.mark.parametrize("data", [
  b"", b"{}", (5).to_bytes(8, "little") + b"{oops", (10**9).to_bytes(8, "little") + b"{}",
  (64).to_bytes(8, "little") + json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode(),
])
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path, data):
  (tmp_path / "model.safetensors").write_bytes(data)
  with pytest.raises(UserError, match=r"model.safetensors: (not a whole safetensors file|neither)") as error:
    load.load(str(tmp_path / "model.safetensors"))
  assert "\n" not in str(error.value)


def test_a_state_dict_of_something_else_is_refused(tmp_path):
  save_file({"fc.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
  with pytest.raises(UserError, match=r"no tensor 'visual.layer1.0.conv1.weight', so this is no CLIP in OpenAI's"):
    load.load(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("to,file,change,message", [
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="vit_tiny"),
   "vision_cfg.timm_model_name='vit_tiny': the models here have no such setting"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"]["text_cfg"].update(pool_type="last"),
   "text_cfg.pool_type='last'"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"].update(custom_text=True), "cfg.custom_text=True"),
  ("open_clip", "open_clip_config.json", lambda c: c.pop("model_cfg"), "'model_cfg' is missing"),
  ("open_clip", "open_clip_config.json", lambda c: c["model_cfg"]["vision_cfg"].update(image_size=[32, 64]),
   r"expected a square, a positive number of pixels a side, got \[32, 64\]"),
  ("hf", "config.json", lambda c: c.update(model_type="siglip"), "model_type is 'siglip', expected 'clip'"),
  ("hf", "config.json", lambda c: c["text_config"].update(hidden_act="gelu"),
   "hidden_act: expected one of quick_gelu, gelu for both towers, got 'quick_gelu' and 'gelu'"),
  ("hf", "config.json", lambda c: c["vision_config"].update(layer_norm_eps=1e-6), "layer_norm_eps: expected 1e-05"),
  ("hf", "config.json", lambda c: c["text_config"].update(eos_token_id=70), "text_config.eos_token_id is 70"),
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
  with pytest.raises(UserError, match="CLIPModel has no ResNet tower; use --to=open_clip"):
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


def test_the_convert_command_rewrites_a_model(saved, tmp_path):
  path, _, size, params = saved
  result = convert_command(path, tmp_path / "out", "--to=hf")
  assert result.returncode == 0, result.stderr
  assert result.stdout.endswith("M parameters for hf; tokenizer files are not part of it\n")
  loaded = load.load(str(tmp_path / "out"))
  assert loaded.size == size
  assert_equal(loaded.params, params)


@pytest.mark.parametrize("args,message", [
  (["nowhere", "out", "--to=hf"], "error: nowhere: no such file or directory"),
  (["nowhere", "out"], "error: --to is missing; choose one of hf, open_clip, limber"),
  (["nowhere", "out", "--to=pickle"], "error: flag --to=pickle: value should be one of <hf|open_clip|limber>"),
])
def test_the_convert_command_tells_a_mistake_in_one_line(args, message):
  result = convert_command(*args)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.count("\n") == 1
