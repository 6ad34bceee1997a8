"""What a model is that cannot be loaded here, by its configuration or the names of its tensors; and what can be."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from limber_jax.errors import UserError

LOADABLE = {
  "clip": "what can be loaded as a CLIP: a file of OpenAI's, a directory of open_clip or of transformers' CLIPModel, a "
          "state dict with --model=, or a workdir of limber_jax.train",
  "image": "what can be loaded as an image encoder: the image tower of a CLIP (OpenAI, open_clip, transformers), a "
           "BEiT of transformers, timm's nf_resnet50, or a workdir of limber_jax.train",
  "lm": "what can be loaded as a language model: a GPT-J of transformers (safetensors, PyTorch or Flax), or a workdir "
        "of limber_jax.train that trained one",
}

GPTJ = "a GPT-J"

# model_type of a transformers configuration -> what people call it. Others are named by their model_type.
_TYPES = {
  "align": "an ALIGN", "altclip": "an AltCLIP", "aria": "an Aria", "bart": "a BART", "beit": "a BEiT", "bert": "a BERT",
  "blip": "a BLIP", "blip-2": "a BLIP-2", "bloom": "a BLOOM", "bridgetower": "a BridgeTower",
  "chinese_clip": "a Chinese-CLIP", "clap": "a CLAP", "clip": "a CLIP",
  "clip_text_model": "the text tower of a CLIP (CLIPTextModel)",
  "clip_vision_model": "the image tower of a CLIP (CLIPVisionModel)", "clipseg": "a CLIPSeg", "clvp": "a CLVP",
  "convnext": "a ConvNeXt", "convnextv2": "a ConvNeXt V2", "deit": "a DeiT", "dinov2": "a DINOv2",
  "dinov2_with_registers": "a DINOv2 with registers", "dinov3_convnext": "a DINOv3 ConvNeXt",
  "dinov3_vit": "a DINOv3", "falcon": "a Falcon", "flava": "a FLAVA", "florence2": "a Florence-2", "gemma": "a Gemma",
  "gemma2": "a Gemma 2", "gemma3": "a Gemma 3", "gemma3_text": "a Gemma 3", "git": "a GIT", "gpt2": "a GPT-2",
  "gpt_neo": "a GPT-Neo", "gpt_neox": "a GPT-NeoX (as Pythia is)", "gptj": "a GPT-J", "groupvit": "a GroupViT",
  "idefics": "an IDEFICS", "instructblip": "an InstructBLIP", "llama": "a Llama", "llava": "a LLaVA",
  "metaclip_2": "a MetaCLIP 2", "mistral": "a Mistral", "mixtral": "a Mixtral", "mpt": "an MPT", "opt": "an OPT",
  "owlvit": "an OWL-ViT", "paligemma": "a PaliGemma", "phi": "a Phi", "phi3": "a Phi-3", "qwen2": "a Qwen2",
  "qwen2_vl": "a Qwen2-VL", "qwen2_5_vl": "a Qwen2.5-VL", "qwen3": "a Qwen3", "resnet": "a ResNet",
  "roberta": "a RoBERTa", "sam": "a SAM", "siglip": "a SigLIP", "siglip2": "a SigLIP 2",
  "siglip_vision_model": "the image tower of a SigLIP", "siglip_text_model": "the text tower of a SigLIP",
  "siglip2_vision_model": "the image tower of a SigLIP 2", "swin": "a Swin", "swinv2": "a Swin V2", "t5": "a T5",
  "timm_wrapper": "a model of timm's", "vilt": "a ViLT", "vit": "a ViT", "vit_mae": "a MAE", "whisper": "a Whisper",
  "xclip": "an X-CLIP", "xlm-roberta": "an XLM-RoBERTa",
}

# Patterns that names of tensors must have, all of them, and what the model then is. The first that fits counts, so
# what has a part in common with others stands before them. ^ is the start of a name, wrappers and prefixes taken off.
_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
  ("a LoRA adapter (PEFT), which is no whole model", (r"\.lora_[AB]\.",)),
  ("a quantised model", (r"\.(qweight|weight_scale|quant_state)|\.SCB$",)),
  ("a LLaVA", (r"multi_modal_projector\.|mm_projector\.",)),
  ("a BLIP-2", (r"^query_tokens$", r"^(qformer|Qformer)\.")),
  ("a BLIP", (r"^visual_encoder\.blocks\.0\.attn\.qkv", r"^text_(de|en)coder\.")),
  ("a BLIP", (r"^vision_model\.encoder\.layers\.0\.self_attn\.qkv\.",)),
  ("a SigLIP", (r"^(vision_model\.)?head\.probe$",)),
  ("a SigLIP", (r"^(vision|text)_model\.head\.",)),
  ("a SigLIP", (r"^(vision_model\.)?embeddings\.patch_embedding\.bias$",)),
  ("a CoCa of open_clip", (r"^text_decoder\.", r"^visual\.")),
  ("an EVA-CLIP", (r"^visual\.blocks\.0\.attn\.(inner_attn_ln|q_proj|qkv)",)),
  ("a CLIP with an image tower of timm's (as SigLIP, EVA and ConvNeXt in open_clip)", (r"^visual\.trunk\.",)),
  ("a CLIP with an attention-pooled image tower (as open_clip's CoCa)", (r"^visual\.attn_pool\.",)),
  ("a CLIP with a text tower of its own kind (custom_text of open_clip)", (r"^visual\.", r"^text\.")),
  ("a GPT-J", (r"^(transformer\.)?h\.0\.attn\.q_proj\.", r"^(transformer\.)?h\.0\.mlp\.fc_in\.")),
  ("a GPT-J", (r"^transformer/h/0/attn/q_proj/",)),
  ("a GPT-Neo", (r"(^|\.)h\.0\.attn\.attention\.q_proj\.",)),
  ("a GPT-2", (r"(^|[./])h[./]0[./]attn[./]c_attn[./]",)),
  ("a BLOOM or Falcon", (r"(^|\.)h\.0\.self_attention\.query_key_value\.",)),
  ("a GPT-NeoX (as Pythia is)", (r"(^|\.)layers\.0\.attention\.query_key_value\.",)),
  ("a BART or Whisper", (r"(^|\.)encoder\.layers\.0\.self_attn\.", r"(^|\.)decoder\.layers\.0\.encoder_attn\.")),
  ("an OPT", (r"(^|\.)decoder\.layers\.0\.fc1\.", r"(^|\.)decoder\.embed_positions\.")),
  ("a T5", (r"(^|\.)(en|de)coder\.block\.0\.layer\.0\.SelfAttention\.",)),
  ("a Qwen3", (r"(^|\.)layers\.0\.self_attn\.q_norm\.", r"(^|\.)layers\.0\.mlp\.gate_proj\.")),
  ("a Gemma", (r"(^|\.)layers\.0\.pre_feedforward_layernorm\.",)),
  ("a Mixtral", (r"(^|\.)layers\.0\.block_sparse_moe\.",)),
  ("a Phi", (r"(^|\.)layers\.0\.self_attn\.(dense|qkv_proj)\.",)),
  ("a Qwen2", (r"(^|\.)layers\.0\.self_attn\.q_proj\.bias$", r"(^|\.)layers\.0\.mlp\.gate_proj\.")),
  ("a Llama (or one of its build, as Mistral and Qwen)", (r"(^|\.)layers\.0\.self_attn\.q_proj\.weight$",
                                                          r"(^|\.)layers\.0\.mlp\.gate_proj\.")),
  ("a MAE", (r"^decoder(_blocks\.0|\.decoder_(layers|encoder|embed))\.",)),
  ("a BEiT", (r"(^|\.)encoder\.layer\.0\.lambda_1$",)),
  ("a BEiT in timm's names", (r"^blocks\.0\.gamma_1$",)),
  ("a DINOv2", (r"(^|\.)encoder\.layer\.0\.layer_scale1\.lambda1$",)),
  ("a DINOv3", (r"(^|\.)layer\.0\.layer_scale1\.lambda1$",)),
  ("a DINOv2", (r"^blocks\.(0\.)?0\.ls1\.gamma$",)),
  ("a Swin", (r"attn\.relative_position_bias_table$", r"layers\.0\.")),
  ("an EVA of timm's", (r"^blocks\.0\.(attn\.(q_proj|q_bias)|mlp\.w12|mlp\.fc1_g)",)),
  ("a Vision Transformer", (r"^blocks\.0\.attn\.qkv\.weight$",)),
  ("a ViT", (r"(^|\.)encoder\.layer\.0\.layernorm_before\.",)),
  ("a BERT (or one of its build, as RoBERTa)", (r"(^|\.)encoder\.layer\.0\.attention\.self\.query\.",)),
  ("a ConvNeXt", (r"(^|\.)stages\.0\.(blocks|layers)\.0\.(conv_dw|dwconv)\.",)),
  ("an NF-ResNet of timm's", (r"^stages\.0\.0\.conv1\.gain$", r"^stem\.conv\.")),
  ("a ResNet of torchvision or timm", (r"^layer1\.0\.conv1\.weight$", r"^conv1\.")),
  ("an EfficientNet", (r"^conv_stem\.weight$", r"^blocks\.0\.0\.")),
  ("a latent diffusion model", (r"(^|\.)diffusion_model\.|^down_blocks\.0\.",)),
)

_CLIPS = (("a CLIP in OpenAI's names", (r"^visual\.", r"^token_embedding\.weight$")),
          ("a CLIP in transformers' names", (r"^vision_model\.embeddings\.class_embedding$",)))


def of_config(values: Mapping[str, Any]) -> str:
  """Returns what the model of a config.json is, of transformers or timm: "a SigLIP (model_type 'siglip')"."""
  if isinstance(values.get("architecture"), str):
    return f"{values['architecture']!r} of timm"
  kind = values.get("model_type")
  if kind is None:
    made = values.get("architectures")
    return f"of architecture {made[0]!r}" if isinstance(made, list) and made else "of no model_type and no architecture"
  named = _TYPES.get(kind) if isinstance(kind, str) else None
  return f"{named} (model_type {kind!r})" if named else f"a model of model_type {kind!r}"


def of_tensors(tensors: Mapping[str, Any], clip: bool = False) -> str:
  """Returns what the model with these tensors (by name, with a `shape`) is; "" if that is not known here.

  CLIPs of a build that can be loaded are among what is known only where `clip` says so.
  """
  for what, patterns in (*_NAMES, *(_CLIPS if clip else ())):
    if all(_some(pattern, tensors) for pattern in patterns):
      return _timm_vit(tensors) if what == "a Vision Transformer" else what
  return ""


def foreign(where: str, what: str, role: str, wanted: str = "") -> UserError:
  """Returns the error of a model that cannot be loaded in a role: "clip", "image" or "lm"; `wanted` is a config's."""
  asked = f", and the config asks for {wanted}" if wanted else ""
  return UserError(f"{where}: this is {what}{asked}; {LOADABLE[role]}")


def _some(pattern: str, names: Iterable[str]) -> bool:
  return any(re.search(pattern, name) for name in names)


_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}


def _timm_vit(tensors: Mapping[str, Any]) -> str:
  """Returns what a Vision Transformer in timm's names is, its architecture as far as shapes tell it."""
  kernel, positions = (getattr(tensors.get(name), "shape", ()) for name in ("patch_embed.proj.weight", "pos_embed"))
  what = "a Vision Transformer in timm's names (timm, DINO, MAE or DeiT)"
  if len(kernel) != 4 or len(positions) != 3:
    return what
  side = round(positions[1] ** 0.5 - 1e-9) * kernel[2] if positions[1] > 1 else 0
  blocks = len({m[1] for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))})
  size = f"vit_{_WIDTHS[kernel[0]]}_patch{kernel[2]}_{side}, " if kernel[0] in _WIDTHS else ""
  return f"{what}: {size}{blocks} blocks {kernel[0]} wide, patches of {kernel[2]}"
