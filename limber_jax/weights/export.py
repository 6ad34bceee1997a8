"""Weights to disk, for other libraries and for us. Tokenizer files are not part of it."""

import json
import os
from typing import Any

from safetensors.numpy import save_file

from limber_jax.config import flatten
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip
from limber_jax.models.clip import ClipSize
from limber_jax.models.layers import Rows
from limber_jax.models.vit import ViTSize
from limber_jax.weights import convert


def save(path: str, to: str, size: ClipSize, params: dict[str, Any], stats: dict[str, Any]) -> None:
  """Writes a model into the new or empty directory `path`; `weights.load.load(path)` gives it back bit for bit.

  Args:
    path: the directory.
    to: "hf": opens with transformers' CLIPModel.from_pretrained(path) | "open_clip": opens with
      open_clip.create_model("local-dir:" + path) | "limber".
    size: of the model.
    params: {"image": …, "text": …, "logit_scale": []}, and of a SigLIP "logit_bias": [].
    stats: {"image": …} of a ResNet, {} of a ViT.

  Raises:
    UserError: the format cannot hold this model, or `path` cannot be written or holds something already.
  """
  if to not in FORMATS:
    raise UserError(f"no format {to!r}{did_you_mean(to, FORMATS)}")
  tree = params | ({"stats": stats} if stats else {})
  configs, weights, rows = FORMATS[to](size, tree)
  tensors = convert.export(rows, tree)
  try:
    os.makedirs(path, exist_ok=True)
    if os.listdir(path):
      raise UserError(f"{path} holds something already; choose a new directory")
    for name, values in configs.items():
      with open(os.path.join(path, name), "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
    save_file(tensors, os.path.join(path, weights), metadata={"format": "pt"})  # transformers asks for the entry
  except OSError as error:
    raise UserError(f"{path}: cannot write there ({error.strerror})") from error


def _limber(size: ClipSize, tree: dict[str, Any]) -> tuple[dict[str, dict], str, Rows]:
  return {"limber_config.json": flatten(size)}, "params.safetensors", convert.identity(tree)


def open_clip_config(size: ClipSize) -> dict[str, Any]:
  """Returns the arguments of open_clip's CLIP for a model of this size: its "model_cfg"."""
  i, t = size.image, size.text
  vision = {"image_size": i.image_size, "width": i.width}
  if isinstance(i, ViTSize):
    vision |= {"layers": i.layers, "patch_size": i.patch, "head_width": i.width // i.heads}
  else:
    vision |= {"layers": list(i.layers), "patch_size": None, "head_width": 32 * i.width // i.heads}
  return {
    "embed_dim": size.embed_dim,
    "quick_gelu": size.activation == "quick_gelu",
    "vision_cfg": vision,
    "text_cfg": {"context_length": t.context, "vocab_size": t.vocab, "width": t.width, "heads": t.heads,
                 "layers": t.layers},
  }


def _open_clip(size: ClipSize, tree: dict[str, Any]) -> tuple[dict[str, dict], str, Rows]:
  i, model = size.image, open_clip_config(size)
  if "logit_bias" in tree:
    model["init_logit_bias"] = float(tree["logit_bias"])
  preprocess = {"size": i.image_size, "mode": "RGB", "mean": list(size.mean), "std": list(size.std),
                "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
  config = {"model_cfg": model, "preprocess_cfg": preprocess}
  return {"open_clip_config.json": config}, "open_clip_model.safetensors", clip.OPENAI_WEIGHTS[i.kind]


def _hf(size: ClipSize, tree: dict[str, Any]) -> tuple[dict[str, dict], str, Rows]:
  i, t = size.image, size.text
  if not isinstance(i, ViTSize):
    raise UserError("transformers' CLIPModel has no ResNet tower; use --to=open_clip")
  if "logit_bias" in tree:
    raise UserError("transformers' CLIPModel has no logit_bias (this model was trained with loss.kind='sigmoid'); "
                    "use --to=open_clip")
  both = {"hidden_act": size.activation, "layer_norm_eps": 1e-5, "projection_dim": size.embed_dim}
  config = {
    "architectures": ["CLIPModel"],
    "model_type": "clip",
    "dtype": "float32",
    "projection_dim": size.embed_dim,
    "text_config": {
      "model_type": "clip_text_model", "vocab_size": t.vocab, "max_position_embeddings": t.context,
      "hidden_size": t.width, "intermediate_size": 4 * t.width, "num_hidden_layers": t.layers,
      "num_attention_heads": t.heads, **both,
      # As in OpenAI's own configurations: 2 makes CLIPModel pool at the highest id, which is our rule for any
      # vocabulary. Any other number makes it look for that id, and take the first token where it finds none.
      "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2,
    },
    "vision_config": {
      "model_type": "clip_vision_model", "image_size": i.image_size, "patch_size": i.patch, "hidden_size": i.width,
      "intermediate_size": 4 * i.width, "num_hidden_layers": i.layers, "num_attention_heads": i.heads, **both,
    },
  }
  preprocess = {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"shortest_edge": i.image_size}, "resample": 3,  # bicubic
    "do_center_crop": True, "crop_size": {"height": i.image_size, "width": i.image_size},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(size.mean), "image_std": list(size.std),
  }
  return {"config.json": config, "preprocessor_config.json": preprocess}, "model.safetensors", clip.HF_WEIGHTS["vit"]


FORMATS = {"hf": _hf, "open_clip": _open_clip, "limber": _limber}
