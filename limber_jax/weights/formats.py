"""Whole CLIPs as each library leaves them, with their tensors yet to be read; workdirs are those of `weights.load`."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models import clip, spec
from limber_jax.models.clip import ClipConfig
from limber_jax.models.layers import Rows
from limber_jax.weights import bare, configs, files, identify, names
from limber_jax.weights.configs import naming, read_json
from limber_jax.weights.convert import identity
from limber_jax.weights.preprocessing import Preprocessing
from limber_jax.weights.reading import HF_FILES, OPEN_CLIP_FILES, find_tensors, read_tensors, say

PARTS = ("image", "text")


@dataclass(frozen=True)
class Opened:
  """A model on disk, its tensors not yet read."""

  size: ClipConfig
  source: Mapping[str, Any]      # their name -> anything with `shape` and `dtype` that np.asarray reads
  rows: Rows                     # paths of statistics start with "stats/"
  ignored: tuple[str, ...] = ()  # patterns of tensors that carry no weights
  parts: tuple[str, ...] = PARTS  # that are there
  preprocessing: Callable[[], Preprocessing] | None = None  # what lies beside it says; None: what `size` has


def shapes(size: ClipConfig, logit_bias: bool = False) -> dict[str, Any]:
  """Returns ShapeDtypeStructs of all that a model holds: parameters by part, and statistics under "stats"."""
  model = clip.build(size, Compute(dtype="float32", attention="xla"))
  image = jax.eval_shape(lambda: model.init_image(jax.random.key(0)))
  text = jax.eval_shape(lambda: model.init_text(jax.random.key(0)))
  scalar = jax.ShapeDtypeStruct((), np.float32)
  like = {"image": image["params"], "text": text["params"], "logit_scale": scalar}
  if logit_bias:
    like["logit_bias"] = scalar
  return like | ({"stats": {"image": image["batch_stats"]}} if "batch_stats" in image else {})


def limber(path: str) -> Opened | None:
  """Returns what `weights.export` wrote, None if `path` is something else."""
  config = os.path.join(path, "limber_config.json")
  if not os.path.isfile(config):
    return None
  with naming(config):
    size = clip.size_from_dict(read_json(config))
  source = files.tensors(os.path.join(path, "params.safetensors"))
  return Opened(size, source, identity(shapes(size, "logit_bias" in source)))


def open_clip(path: str) -> Opened | None:
  """Returns the model of a directory of open_clip, None if `path` is something else."""
  config = os.path.join(path, "open_clip_config.json")
  if not os.path.isfile(config):
    return None
  source = find_tensors(path, OPEN_CLIP_FILES)
  if source is None:
    return None
  if "vision_model.embeddings.class_embedding" in source:
    return None  # a directory for both libraries, whose weights are in transformers' names
  with naming(config):
    size = configs.open_clip_size(read_json(config))
  return Opened(size, source, clip.openai_weights(size.image.kind), spec.OPENAI_IGNORED,
                preprocessing=functools.partial(configs.open_clip_preprocessing, config, size.image.image_size))


def hf(path: str) -> Opened | None:
  """Returns the CLIP or SigLIP of a directory of transformers, None if `path` is something else."""
  config = os.path.join(path, "config.json")
  if not os.path.isfile(config) or not any(os.path.isfile(os.path.join(path, name)) for name in HF_FILES):
    return None
  with naming(config):
    values = read_json(config)
    if (there := configs.HF_PARTS.get(str(values.get("model_type")))) is None:
      return None  # another model, which is named by whoever asked
    size = configs.hf_size(values)
  source = bare.whole_names(find_tensors(path, HF_FILES))
  prefixes = {"image": "vision_model.", "text": "text_model."}
  there = tuple(part for part in there if any(name.startswith(prefixes[part]) for name in source))
  said = functools.partial(configs.hf_preprocessing, path, size.image.image_size, "CLIP") if "image" in there else None
  return Opened(size, source, clip.hf_weights(), spec.HF_IGNORED, there, said)


def state_dict(path: str, model: str, parts: tuple[str, ...], given: ClipConfig | None, flag: str, role: str) -> Opened:
  """Returns the model of a state dict, which no configuration describes; see `load.open_model` of the arguments."""
  if os.path.isdir(path):
    config = os.path.join(path, "config.json")
    if os.path.isfile(config):
      with naming(config):
        values = read_json(config)
      if str(values.get("model_type")) not in configs.HF_PARTS:
        raise identify.foreign(config, identify.of_config(values), role)
    found = [os.path.join(path, name) for name in (*OPEN_CLIP_FILES, *HF_FILES)]
    path = next((file for file in found if os.path.isfile(file) and not file.endswith(".json")), "")
    if not path:
      raise UserError(f"{os.path.dirname(found[0])}: no model there; looked for limber_config.json, "
                      f"open_clip_config.json with open_clip_model.safetensors, and config.json with model.safetensors "
                      "or pytorch_model.bin")
  source, file = bare.whole_names(read_tensors(path)), names.split(path)[0]
  layout = bare.layout(source, file, role)
  there = bare.parts(source, layout)
  with naming(file):
    wanted = tuple(part for part in there if part in parts) or there
    size, who = bare.size(source, file, layout, wanted, model, given, flag)
    if who:
      say(f"{file}: heads and activation ({size.activation}) are taken from {who}")
  said = configs.preprocessing_beside(file, size) if "image" in there else None
  return Opened(size, source, layout.rows, layout.ignored, there, said)
