"""Weights to disk, for other libraries and for us. Tokenizer files are the matter of `beside`."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from limber_jax.config_json import flatten
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip, gptj
from limber_jax.models.clip import ClipConfig
from limber_jax.models.gptj import GPTJSize
from limber_jax.models.layers import Rows
from limber_jax.models.spec import spec_of
from limber_jax.runtime.atomic import SUFFIX, atomic_write, check, commit, refusal
from limber_jax.weights import convert, preprocessing

HALF = tuple(f"{kind}{SUFFIX}" for kind in (".safetensors", ".json"))  # of files that are not whole


def save(path: str, to: str, size: ClipConfig, params: dict[str, Any], stats: dict[str, Any]) -> None:
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
  with _new(path, configs):
    _save(path, weights, tensors)


def save_lm(path: str, size: GPTJSize, params: dict[str, Any], *, dtype: str = "float32",
            shard_bytes: int = 5_000_000_000) -> None:
  """Writes a GPT-J into the new or empty directory `path`, as GPTJForCausalLM.from_pretrained(path) opens it.

  Args:
    path: the directory.
    size: of the model.
    params: of the part "lm", on the host or on devices of this process.
    dtype: of the file: float32, bfloat16 or float16.
    shard_bytes: the most that one file holds, unless a single tensor is larger; the host holds one file at a time.

  Raises:
    UserError: a leaf that a GPT-J has no place for, such as adapters, or `path` cannot be written or holds something.
  """
  if dtype not in (known := ("float32", "bfloat16", "float16")):
    raise UserError(f"no dtype {dtype!r}{did_you_mean(dtype, known)}")
  leaves = flax.traverse_util.flatten_dict(params, sep="/")
  width = jnp.dtype(dtype).itemsize
  shards: list[list[tuple[str, str, str, int | None]]] = [[]]  # (their name, our path, how, block)
  used = total = 0
  for ours, theirs, how in convert.plan_export(gptj.HF_WEIGHTS, params):
    blocks = range(leaves[ours].shape[0]) if "{" in theirs else (None,)
    for i in blocks:
      one = width * math.prod(leaves[ours].shape[i is not None :])
      if used + one > shard_bytes and shards[-1]:
        shards.append([])
        used = 0
      used += one
      total += one
      shards[-1].append((theirs.replace("{}", str(i)), ours, how, i))
  single = len(shards) == 1
  names = ["model.safetensors" if single else f"model-{n:05}-of-{len(shards):05}.safetensors"
           for n in range(1, len(shards) + 1)]
  configs = {"config.json": _gptj_config(size, dtype)}
  if not single:
    configs["model.safetensors.index.json"] = {
      "metadata": {"total_size": total},
      "weight_map": {entry[0]: name for name, shard in zip(names, shards, strict=True) for entry in shard}}
  with _new(path, configs):
    for name, shard in zip(names, shards, strict=True):
      tensors: dict[str, np.ndarray] = {}
      for theirs, ours, how, i in shard:
        leaf = jax.device_get(leaves[ours] if i is None else leaves[ours][i])
        tensors |= convert.export(((ours, theirs, how),), flax.traverse_util.unflatten_dict({ours: leaf}, sep="/"))
        tensors[theirs] = tensors[theirs].astype(jnp.dtype(dtype), copy=False)
      _save(path, name, tensors)


def check_new(path: str) -> None:
  """Raises UserError if `path` holds something already, or cannot be a directory to write to."""
  try:
    made = not os.path.isdir(path)
    os.makedirs(path, exist_ok=True)
    try:
      if any(not name.endswith(HALF) for name in os.listdir(path)):  # else a kill was this command's end
        raise UserError(f"{path} holds something already; choose a new directory")
      check(os.path.join(path, "config.json"), what=path)
    finally:
      if made:
        os.rmdir(path)
  except OSError as error:
    raise refusal(path, error) from error


@contextlib.contextmanager
def _new(path: str, configs: dict[str, dict]) -> Iterator[None]:
  """Makes a directory that what is done within fills with weights; the configurations come last, so that only what is
  whole can be opened, and after an error nothing is left."""
  check_new(path)
  made = not os.path.isdir(path)
  try:
    os.makedirs(path, exist_ok=True)
    for name in os.listdir(path):
      os.remove(os.path.join(path, name))
    yield
    for name, values in configs.items():
      with atomic_write(os.path.join(path, name)) as file:
        json.dump(values, file, indent=1)
  except BaseException as error:
    with contextlib.suppress(OSError):
      for name in os.listdir(path):
        if name.endswith((*HALF, ".safetensors", *configs)):
          os.remove(os.path.join(path, name))
      if made:
        os.rmdir(path)
    if isinstance(error, OSError | SafetensorError):
      raise refusal(path, error) from error
    raise


def _save(path: str, name: str, tensors: dict[str, np.ndarray]) -> None:
  file = os.path.join(path, name)
  save_file(tensors, file + SUFFIX, metadata={"format": "pt"})  # transformers asks for the entry
  commit(file + SUFFIX, file)


def _gptj_config(size: GPTJSize, dtype: str) -> dict[str, Any]:
  end = 50_256 if size.vocab > 50_256 else None  # GPT-2's; of another vocabulary the end is not known here
  return {
    "architectures": ["GPTJForCausalLM"], "model_type": "gptj", "dtype": dtype,
    "vocab_size": size.vocab, "n_positions": size.context, "n_embd": size.width, "n_layer": size.layers,
    "n_head": size.heads, "rotary_dim": size.rotary, "n_inner": None, "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
    "tie_word_embeddings": False, "bos_token_id": end, "eos_token_id": end,
  }


def _limber(size: ClipConfig, tree: dict[str, Any]) -> tuple[dict[str, dict], str, Rows]:
  return {"limber_config.json": flatten(size, known=True)}, "params.safetensors", convert.identity(tree)


def open_clip_config(size: ClipConfig) -> dict[str, Any]:
  """Returns the arguments of open_clip's CLIP for a model of this size: its "model_cfg"."""
  i, t = size.image, size.text
  return {
    "embed_dim": size.embed_dim,
    "quick_gelu": size.activation == "quick_gelu",
    "vision_cfg": spec_of(i.kind).clip.open_clip(i),
    "text_cfg": {"context_length": t.context, "vocab_size": t.vocab, "width": t.width, "heads": t.heads,
                 "layers": t.layers} | ({"pool_type": "eos", "eos_id": t.eos} if t.eos >= 0 else {}),
  }


def _open_clip(size: ClipConfig, tree: dict[str, Any]) -> tuple[dict[str, dict], str, Rows]:
  i, model = size.image, open_clip_config(size)
  if "logit_bias" in tree:
    model["init_logit_bias"] = float(tree["logit_bias"])
  config = {"model_cfg": model, "preprocess_cfg": preprocessing.to_open_clip(size, i.image_size)}
  return {"open_clip_config.json": config}, "open_clip_model.safetensors", clip.openai_weights(i.kind)


def _hf(size: ClipConfig, tree: dict[str, Any]) -> tuple[dict[str, dict], str, Rows]:
  i, t = size.image, size.text
  if (vision := spec_of(i.kind).clip.hf) is None:
    raise UserError(f"transformers' CLIPModel has no {i.kind} tower; use --to=open_clip")
  if "logit_bias" in tree:
    raise UserError("transformers' CLIPModel has no logit_bias (this model was trained with loss.kind='sigmoid'); "
                    "use --to=open_clip")
  if t.eos == 2:
    raise UserError("transformers takes an eos_token_id of 2 for the highest id of a text; use --to=open_clip")
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
      # vocabulary without an end of its own. Any other number makes it look for that id, as ours does then.
      "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2 if t.eos < 0 else t.eos,
    },
    "vision_config": {
      "model_type": "clip_vision_model", **vision(i), **both,
    },
  }
  configs = {"config.json": config, "preprocessor_config.json": preprocessing.to_hf(size, i.image_size)}
  return configs, "model.safetensors", clip.hf_weights(i.kind)


FORMATS = {"hf": _hf, "open_clip": _open_clip, "limber": _limber}
