"""Models that cannot be loaded here: each is named in one line, with what can be, whatever role it was given for."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from limber_jax.errors import UserError
from limber_jax.models import encoders, gptj
from limber_jax.weights import identify, load, names, parts

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
TOWER = dict(**SMALL, image_size=32, patch_size=16)
TEXT = dict(**SMALL, vocab_size=50)

# Of transformers: the class, its configuration, and what it is called.
TRANSFORMERS = {
  "SiglipModel": (dict(vision_config=TOWER, text_config=TEXT), "a SigLIP"),
  "Siglip2Model": (dict(vision_config=SMALL, text_config=TEXT), "a SigLIP"),
  "SiglipVisionModel": (TOWER, "the image tower of a SigLIP"),
  "Dinov2Model": (TOWER, "a DINOv2"),
  "ViTModel": (TOWER, "a ViT"),
  "ViTMAEForPreTraining": (TOWER | dict(decoder_num_hidden_layers=1, decoder_hidden_size=32), "a MAE"),
  "BlipForConditionalGeneration": (dict(vision_config=TOWER, text_config=TEXT), "a BLIP"),
  "BeitModel": (TOWER, "a BEiT"),
  "GPT2LMHeadModel": (dict(n_embd=32, n_layer=1, n_head=2, vocab_size=50), "a GPT-2"),
  "GPTNeoForCausalLM": (dict(hidden_size=32, num_layers=1, num_heads=2, vocab_size=50,
                             attention_types=[[["global"], 1]]), "a GPT-Neo"),
  "GPTJForCausalLM": (dict(n_embd=32, n_layer=1, n_head=2, vocab_size=50, rotary_dim=8), "a GPT-J"),
  "GPTNeoXForCausalLM": (TEXT, "a GPT-NeoX"),
  "OPTForCausalLM": (dict(**SMALL, vocab_size=50, ffn_dim=64, word_embed_proj_dim=32), "an OPT"),
  "LlamaForCausalLM": (TEXT, "a Llama"),
  "Qwen2ForCausalLM": (TEXT, "a Qwen2"),
  "Qwen3ForCausalLM": (TEXT | dict(head_dim=16), "a Qwen3"),
  "T5ForConditionalGeneration": (dict(d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=50), "a T5"),
  "BertModel": (TEXT, "a BERT"),
}

TIMM = {
  "vit_tiny_patch16_224": "a Vision Transformer in timm's names (timm, DINO, MAE or DeiT): vit_tiny_patch16_224, 12 b",
  "vit_base_patch32_384": "vit_base_patch32_384, 12 blocks 768 wide, patches of 32",
  "vit_small_patch14_reg4_dinov2": "a DINOv2", "beit_base_patch16_224": "a BEiT in timm's names",
  "resnet18": "a ResNet", "convnext_atto": "a ConvNeXt", "nf_resnet50": "an NF-ResNet of timm's",
  "swin_tiny_patch4_window7_224": "a Swin", "efficientnet_b0": "an EfficientNet",
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_of_transformers_is_named_by_its_tensors_and_by_its_configuration(tmp_path, transformers, name):
  fields, called = TRANSFORMERS[name]
  cls = getattr(transformers, name)
  cls(cls.config_class(**fields)).save_pretrained(tmp_path)  # in memory some have other names
  found = identify.of_tensors(names.weights(str(tmp_path / "model.safetensors"))[0])
  assert found.startswith(called.removeprefix("the image tower of ")), found
  values = json.loads((tmp_path / "config.json").read_text())
  assert identify.of_config(values).startswith(called) and f"(model_type {values['model_type']!r})" in (
    identify.of_config(values))


@pytest.mark.parametrize("name", TIMM)
def test_a_model_of_timm_is_named_by_its_tensors(name):
  torch = pytest.importorskip("torch")
  timm = pytest.importorskip("timm")
  with torch.device("meta"):
    model = timm.create_model(name)
  assert TIMM[name] in identify.of_tensors(model.state_dict())


def in_role(role, path):
  """Loads what is at `path` as a CLIP, an encoder of each kind or a language model; returns the message."""
  with pytest.raises(UserError) as error:
    if role == "clip":
      load.load(path)
    elif role == "lm":
      parts.load_part(path, "lm", gptj.SIZES["gptj_mu"](), {})
    else:
      parts.load_part(path, "image", encoders.encoder_size(role), {})
  return str(error.value)


ROLES = {"clip": "clip", "clip_vit_b32_mu": "image", "beit_l16_mu": "image", "nf_resnet50_mu": "image", "lm": "lm"}


@pytest.mark.parametrize("role", ROLES)
def test_a_foreign_model_is_named_in_one_line_with_what_can_be_loaded(tmp_path, role):
  def ends(message, what):
    assert what in message and message.endswith(identify.LOADABLE[ROLES[role]]), message
    assert "\n" not in message and "Errno" not in message

  for number, (config, what) in enumerate((
      ({"model_type": "siglip2"}, "this is a SigLIP 2 (model_type 'siglip2')"),
      ({"model_type": "dinov2"}, "this is a DINOv2 (model_type 'dinov2')"),
      ({"model_type": "llama"}, "this is a Llama (model_type 'llama')"),
      ({"model_type": "brand_new"}, "this is a model of model_type 'brand_new'"),
      ({"architecture": "vit_base_patch16_224", "num_classes": 1000}, "this is 'vit_base_patch16_224' of timm"))):
    for weights in ((), ("model.safetensors",)):
      folder = tmp_path / f"{number}{len(weights)}"
      folder.mkdir()
      (folder / "config.json").write_text(json.dumps(config))
      for file in weights:
        save_file({"x": np.zeros(3, np.float32)}, folder / file)
      ends(in_role(role, str(folder)), what)
  one = np.zeros(1, np.float32)
  for number, (tensors, what) in enumerate((
      ({"model.layers.0.self_attn.q_proj.weight": one, "model.layers.0.mlp.gate_proj.weight": one,
        "model.embed_tokens.weight": one}, "this is a Llama"),
      ({"vision_model.embeddings.patch_embedding.bias": one, "vision_model.head.probe": one}, "this is a SigLIP"),
      ({"module.blocks.0.attn.qkv.weight": one, "module.cls_token": one}, "this is a Vision Transformer in timm's names"
       ))):
    save_file(tensors, tmp_path / f"{number}.safetensors")
    ends(in_role(role, str(tmp_path / f"{number}.safetensors")), what)


def test_a_directory_without_a_configuration_is_reported_in_one_line(tmp_path):
  save_file({"transformer.h.0.attn.q_proj.weight": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
  message = in_role("lm", str(tmp_path))
  assert message == f"{tmp_path}: no config.json there, which says what model it is; {identify.LOADABLE['lm']}"


def test_a_clip_given_as_another_part_is_named(tmp_path):
  save_file({"visual.conv1.weight": np.zeros(1, np.float32), "token_embedding.weight": np.zeros(1, np.float32)},
            tmp_path / "x.safetensors")
  for role, wanted in (("lm", "a GPT-J"), ("beit_l16_mu", "a BEiT")):
    assert f"this is a CLIP in OpenAI's names, and the config asks for {wanted}" in in_role(
      role, str(tmp_path / "x.safetensors"))
