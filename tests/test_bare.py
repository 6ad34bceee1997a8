"""Weights without a configuration: who may say heads and activation, what comes off names, and what is refused."""

import json
import os

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from limber_jax.config import Compute
from limber_jax.config_json import flatten
from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.models.clip import ClipConfig
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.weights import bare, configs, convert, formats, load, names

SAYS_NEITHER = "a state dict says neither how many heads nor which activation its model has"


def random_config(number):
  """Returns the keyword arguments of open_clip's CLIP of a small random build: two of three are ViTs."""
  rng = np.random.default_rng(number)
  pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
  text_heads = pick(1, 2, 3, 4)
  text = {"context_length": pick(8, 12, 16), "vocab_size": pick(60, 101), "heads": text_heads,
          "width": text_heads * pick(8, 16, 32, 64), "layers": pick(1, 2, 3)}
  head = pick(8, 16, 32, 64, 80)
  if number % 3:
    vision = {"image_size": pick(16, 32, 48), "patch_size": pick(4, 8, 16), "head_width": head,
              "width": head * pick(1, 2, 3), "layers": pick(1, 2, 4)}
  else:
    width = pick(8, 16)
    vision = {"image_size": pick(32, 64), "width": width, "layers": [pick(1, 2) for _ in range(4)],
              "head_width": pick(*[w for w in (8, 16, 32, 64) if 32 * width % w == 0]), "patch_size": None}
  return {"embed_dim": pick(16, 32), "vision_cfg": vision, "text_cfg": text, "quick_gelu": bool(rng.integers(2))}


def open_clip_model(open_clip, config):
  """Returns a model of open_clip's in which heads and activation matter."""
  import torch

  torch.manual_seed(0)
  model = open_clip.model.CLIP(**config).eval()
  rng = np.random.default_rng(0)
  for name, x in [*model.named_parameters(), *model.named_buffers()]:
    if name == "logit_scale" or not x.is_floating_point() or name == "attn_mask":
      continue
    value = rng.normal(size=x.shape) * (2 / x[0].numel()) ** 0.5 if x.ndim > 1 else rng.uniform(0.5, 1.5, x.shape)
    x.data = torch.tensor(value, dtype=torch.float32)
  return model


WRAPS = (lambda s: s, lambda s: {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in s.items()}},
         lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()}, lambda s: {"state_dict_ema": s},
         lambda s: s | {"logit_scale": s["logit_scale"].reshape(1)})


def save_bare(path, model, number, marks):
  """Writes a state dict as training scripts do; some with what an archive of OpenAI's holds beside."""
  import torch

  state = model.state_dict()
  if marks:
    sizes = (model.visual.image_size, model.context_length, model.vocab_size)
    state |= {name: torch.tensor(n[0] if isinstance(n, tuple) else n)
              for name, n in zip(bare.MARKS, sizes, strict=True)}
  torch.save(WRAPS[number % len(WRAPS)](state), path)


def worst_cosine(open_clip_model, loaded, number):
  """Returns the lowest cosine between embeddings of random images and texts by open_clip and by us."""
  import torch

  size = loaded.size
  rng = np.random.default_rng(number)
  images = rng.normal(size=(3, size.image.image_size, size.image.image_size, 3)).astype(np.float32)
  tokens = rng.integers(1, size.text.vocab, (3, size.text.context))
  with torch.no_grad():
    want = (open_clip_model.encode_image(torch.tensor(images).permute(0, 3, 1, 2)).numpy(),
            open_clip_model.encode_text(torch.tensor(tokens)).numpy())
  model = clip.build(size, Compute(dtype="float32"))
  got = jax.jit(lambda params, stats: (model.encode_image(params["image"], stats, images)[0].pooled,
                                       model.encode_text(params["text"], tokens).pooled))(
    loaded.params, loaded.stats.get("image", {}))
  unit = [[x / np.linalg.norm(x, axis=-1, keepdims=True) for x in map(np.asarray, pair)] for pair in (got, want)]
  return min(float((a * b).sum(-1).min()) for a, b in zip(*unit, strict=True))


@pytest.mark.parametrize("count,compared", [(10, (3, 5)), pytest.param(40, range(40), marks=pytest.mark.long)],
                         ids=["10", "40"])
def test_a_state_dict_of_any_build_is_right_or_refused_and_right_with_its_model(tmp_path, open_clip, count, compared):
  """Of `count` builds; with their models so many are `compared`."""
  refused = 0
  for number in range(count):
    config = random_config(number)
    model = open_clip_model(open_clip, config)
    file, said = tmp_path / f"{number}.pt", tmp_path / f"{number}.json"
    save_bare(file, model, number, marks=number % 4 == 1)
    said.write_text(json.dumps(config))
    try:
      assert worst_cosine(model, load.load(str(file)), number) > 0.9999, config
    except UserError as error:
      assert SAYS_NEITHER in str(error) and "--model=" in str(error) and "\n" not in str(error)
      refused += 1
    if number in compared:
      assert worst_cosine(model, load.load(str(file), str(said)), number) > 0.99999, config
  assert refused == count


def test_the_configuration_beside_a_state_dict_is_read_and_checked(tmp_path, open_clip, capsys):
  config = random_config(1)
  model = open_clip_model(open_clip, config)
  save_bare(tmp_path / "epoch_1.pt", model, 1, marks=False)
  beside = tmp_path / "open_clip_config.json"
  beside.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
  loaded = load.load(str(tmp_path / "epoch_1.pt"))
  assert flatten(loaded.size) == flatten(configs.described(str(beside)))
  said = f"heads and activation ({loaded.size.activation}) are taken from {beside}\n"
  assert capsys.readouterr().err.endswith(said)
  assert loaded.size.activation == ("quick_gelu" if config["quick_gelu"] else "gelu")
  other = {**config, "vision_cfg": config["vision_cfg"] | {"layers": 7}}
  beside.write_text(json.dumps({"model_cfg": other, "preprocess_cfg": {}}))
  with pytest.raises(UserError, match=rf"{SAYS_NEITHER}, .*open_clip_config.json is of another model \(image.layers=7"):
    load.load(str(tmp_path / "epoch_1.pt"))


def test_two_that_say_different_things_are_refused(tmp_path, open_clip):
  config = random_config(1)
  save_bare(tmp_path / "epoch_1.pt", open_clip_model(open_clip, config), 0, marks=False)
  (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
  (tmp_path / "other.json").write_text(json.dumps(config | {"quick_gelu": not config["quick_gelu"]}))
  with pytest.raises(UserError, match=r"--model=.*other.json says activation='.*', but .*open_clip_config.json says"):
    load.load(str(tmp_path / "epoch_1.pt"), str(tmp_path / "other.json"))
  with pytest.raises(UserError, match=r"has image.kind='vit', but --model=clip_rn50 'resnet'"):
    load.load(str(tmp_path / "epoch_1.pt"), "clip_rn50")
  with pytest.raises(UserError, match=r"no model 'clip_vit_b_32' .*did you mean 'clip_vit_b32"):
    load.load(str(tmp_path / "epoch_1.pt"), "clip_vit_b_32")


def test_a_model_is_said_by_a_name_with_what_differs(tmp_path):
  size = configs.described("clip_vit_b32,activation=gelu,image.heads=8")
  assert (size.activation, size.image.heads, size.text.heads) == ("gelu", 8, 8)
  assert flatten(configs.described("clip_vit_b32, activation=gelu , image.heads = 8")) == flatten(size)
  (tmp_path / "x.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      \xff")
  (tmp_path / "x.json").write_text("heads: 8\n")
  for name, message in (("x.safetensors", r"not JSON \(.*\); these are weights, not their configuration$"),
                        ("x.json", r"not JSON \(Expecting value: line 1 column 1 \(char 0\)\)$")):
    with pytest.raises(UserError, match=rf"^{tmp_path / name}: {message}"):
      configs.described(str(tmp_path / name))
  assert flatten(configs.described("clip_rn50")) == flatten(clip.SIZES["clip_rn50"]())
  for model, message in (("clip_vit_b32,heads=8", "a CLIP has no 'heads'"), ("clip_vit_b32,image.heads=x", "no number"),
                         ("clip_vit_b32,image.heads=1.5", "image.heads: expected int"), ("b32", "no model 'b32'")):
    with pytest.raises(UserError, match=message):
      configs.described(model)


OPENAI = {"RN50": "clip_rn50", "RN101": "clip_rn101", "RN50x4": "clip_rn50x4", "RN50x16": "clip_rn50x16",
          "RN50x64": "clip_rn50x64", "ViT-B-32": "clip_vit_b32", "ViT-B-16": "clip_vit_b16",
          "ViT-L-14": "clip_vit_l14", "ViT-L-14-336": "clip_vit_l14_336"}


@pytest.mark.parametrize("theirs", ["RN50x4", "ViT-L-14-336", "ViT-H-14"])
def test_only_openais_marks_on_a_published_size_stand_for_a_configuration(open_clip, theirs):
  """By shapes alone: these models are not made."""
  import torch

  config = open_clip.get_model_config(theirs)
  with torch.device("meta"):
    source = open_clip.model.CLIP(**config).state_dict()
  layout = bare.layout(source, "x.pt")
  marks = {"input_resolution": np.array(config["vision_cfg"]["image_size"]), "context_length": np.array(77),
           "vocab_size": np.array(49408)}
  size = lambda tensors, model="": bare.size(tensors, "x.pt", layout, ("image", "text"), model, None, "--model")[0]  # noqa: E731
  published = clip.PUBLISHED.get(OPENAI.get(theirs, ""))
  with pytest.raises(UserError, match=SAYS_NEITHER) as error:
    size(source)
  assert (f"--model={OPENAI[theirs]} (QuickGELU" in str(error.value)) == (published is not None) if published else True
  if published:
    assert size(source | marks) == published()
    with pytest.raises(UserError, match="says activation='gelu', but OpenAI, whose own file this is, says"):
      size(source | marks, f"{OPENAI[theirs]},activation=gelu")
  for changed in (marks | {"input_resolution": np.array(225)}, {"vocab_size": marks["vocab_size"]}) if published else (
      marks,):
    with pytest.raises(UserError, match=SAYS_NEITHER):
      size(source | changed)
  path = os.path.join(os.path.dirname(open_clip.__file__), "model_configs", f"{theirs}.json")
  said = size(source, path)
  assert said.image.heads == (16 if theirs != "RN50x4" else 40) and said.activation == "gelu"


TINY = ClipConfig(16, ViTSize(image_size=16, patch=8, width=64, layers=1, heads=2),
                TextSize(context=8, vocab=60, width=32, layers=1, heads=4), "gelu")


@pytest.fixture(scope="module")
def tiny_params():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), formats.shapes(TINY))


@pytest.fixture
def tiny(tmp_path, tiny_params):
  """The tensors of a tiny CLIP in OpenAI's names, the same as our parameters, and a file that says what it is."""
  (tmp_path / "said").mkdir()
  (tmp_path / "said" / "limber_config.json").write_text(json.dumps(flatten(TINY)))
  return convert.export(clip.openai_weights("vit"), tiny_params), tiny_params, str(tmp_path / "said")


def test_a_run_takes_a_state_dict_for_the_model_of_its_config(tmp_path, tiny, capsys):
  tensors, params, _ = tiny
  path = str(tmp_path / "x.safetensors")
  save_file(tensors, path)
  for part in ("image", "text"):
    got, _ = load.load_into(path, part, TINY, formats.shapes(TINY)[part])
    jax.tree.map(np.testing.assert_array_equal, got, params[part])
  said = f"{path}: heads and activation (gelu) are taken from the config, for nothing beside the file says them\n"
  assert capsys.readouterr().err == said


def nested(prefix):
  return lambda tensors: {f"{prefix}{name}": x for name, x in tensors.items()}


@pytest.mark.parametrize("before,suffix", [
  *((before, "pt") for before in ("module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod.", "model.",
                                  "clip_model.model.", "clip.", "state_dict.module.", "model.state_dict_ema.", "ema.",
                                  "model_ema.", "params.", "net.", "weights.")),
  *((before, suffix) for suffix in ("safetensors", "npz", "msgpack") for before in ("module.", "params.model."))])
def test_known_prefixes_and_wrappers_come_off_in_every_format(tmp_path, capsys, tiny, suffix, before):
  tensors, params, said = tiny
  path = str(tmp_path / f"x.{suffix}")
  wrapped = nested(before)(tensors)
  if suffix == "safetensors":
    save_file(wrapped, path)
  elif suffix == "npz":
    np.savez(path, **wrapped)
  elif suffix == "msgpack":
    import flax.serialization
    with open(path, "wb") as file:
      file.write(flax.serialization.msgpack_serialize(wrapped))
  else:
    import torch
    tree = {name: torch.tensor(x) for name, x in tensors.items()}
    for key in reversed(before.split(".")[:-1]):
      tree = {key: tree}
    torch.save(tree, path)
  got = load.load(path, said).params
  jax.tree.map(np.testing.assert_array_equal, got, params)
  assert capsys.readouterr().err == f"{path}: names are taken without '{before}'\n"


def test_what_torch_leaves_inside_of_names_comes_off_too():
  got, off, _ = names.unwrap({"visual._orig_mod.conv1.weight": 1, "transformer.resblocks.0._checkpoint_wrapped_module."
                              "ln_1.weight": 2, "logit_scale": 3}, "x")
  assert got == {"visual.conv1.weight": 1, "transformer.resblocks.0.ln_1.weight": 2, "logit_scale": 3}
  assert off == "…_checkpoint_wrapped_module.…_orig_mod."


def test_of_several_sets_of_weights_one_is_named(tmp_path, tiny):
  torch = pytest.importorskip("torch")
  tensors, params, said = tiny
  one = {name: torch.tensor(x) for name, x in tensors.items()}
  path = str(tmp_path / "x.pt")
  torch.save({"state_dict": {k: x + 1 for k, x in one.items()}, "state_dict_ema": one, "epoch": torch.tensor(3),
              "optimizer": {"state": {0: {"exp_avg": one["ln_final.bias"]}}}}, path)
  with pytest.raises(UserError, match=r"not clear what is meant of .*state_dict, state_dict_ema; name one of them as "
                                      rf"{path}#state_dict$"):
    load.load(path, said)
  jax.tree.map(np.testing.assert_array_equal, load.load(f"{path}#state_dict_ema", said).params, params)
  with pytest.raises(UserError, match="no tensors below 'ema'; known: epoch, optimizer, state_dict, state_dict_ema"):
    load.load(f"{path}#ema", said)
  torch.save({"state_dict": one, "extra": {"head": one["ln_final.bias"]}}, path)
  with pytest.raises(UserError, match=f"not clear what is meant of extra, state_dict; name one of them as {path}#"):
    load.load(path, said)


def test_what_lies_beside_weights_is_set_aside_and_said(tmp_path, tiny, capsys):
  torch = pytest.importorskip("torch")
  tensors, params, said = tiny
  one = {name: torch.tensor(x) for name, x in tensors.items()}
  path = str(tmp_path / "x.ckpt")
  torch.save({"state_dict": nested("module.")(one), "optimizer": {"state": {0: {"exp_avg": one["ln_final.bias"]}}},
              "epoch": torch.tensor(3), "args": ["x", None, 1.5]}, path)
  jax.tree.map(np.testing.assert_array_equal, load.load(path, said).params, params)
  said = f"{path}: names are taken without 'state_dict.module.'; optimizer, epoch set aside\n"
  assert capsys.readouterr().err == said


@pytest.mark.parametrize("change,message", [
  (lambda t: t.pop("visual.proj") is None, "image/head/kernel: no tensor 'visual.proj'"),
  (lambda t: t.update({"visual.conv1.weight": np.zeros((64, 3), np.float32)}),
   r"this is most like a CLIP with a ViT in OpenAI's names, but 'visual.conv1.weight' has shape \(64, 3\)"),
  (lambda t: t.update({"visual.positional_embedding": np.zeros((7, 64), np.float32)}), "6 positions of patches"),
  (lambda t: t.pop("token_embedding.weight") is None,
   "this is most like a CLIP with a ViT in OpenAI's names, but has no tensor 'token_embedding.weight'"),
])
def test_a_state_dict_that_almost_fits_is_compared_with_the_nearest_model(tmp_path, tiny, change, message):
  tensors, _, said = tiny
  change(tensors)
  path = str(tmp_path / "x.safetensors")
  save_file(tensors, path)
  with pytest.raises(UserError, match=f"^{path}: .*({message})") as error:
    load.load(path, said)
  assert "layer1" not in str(error.value) and "\n" not in str(error.value)


def test_a_state_dict_in_the_names_of_transformers_is_read(tmp_path, tiny):
  _, params, said = tiny
  save_file(convert.export(clip.hf_weights(), params), tmp_path / "x.safetensors")
  jax.tree.map(np.testing.assert_array_equal, load.load(str(tmp_path / "x.safetensors"), said).params, params)
  with pytest.raises(UserError, match=SAYS_NEITHER):
    load.load(str(tmp_path / "x.safetensors"))


def test_a_resnet_reads_the_heads_of_its_pooling_from_what_is_said():
  said = configs.open_clip_size({"model_cfg": {"embed_dim": 8, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16,
                                                                            "image_size": 64, "head_width": 32},
                                               "text_cfg": {"width": 32, "heads": 4}}})
  assert said.image == ResNetSize(image_size=64, layers=(1, 1, 1, 1), width=16, heads=16)
