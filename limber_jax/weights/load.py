"""Weights from disk, in any of the formats below; which one is seen from the files themselves.

    a directory   limber_config.json + params.safetensors                          written by `weights.export`
                  open_clip_config.json + open_clip_model.safetensors              open_clip
                  config.json + model.safetensors (or its shards and their index)  CLIPModel of HF transformers
                  config.json + checkpoints                                        a workdir of limber_jax.train: its
                                                                                   best checkpoint, or else its newest
    a file        *.safetensors, *.npz                                             a state dict in OpenAI's names

A state dict has no configuration: its sizes are recovered from its shapes, with heads 64 wide and QuickGELU, as all of
OpenAI's models have. A further format is one function in `FORMATS`.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from limber_jax.checkpoint import Checkpoints
from limber_jax.config import Checkpoint, Compute
from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.models.clip import ClipSize
from limber_jax.models.layers import ACTIVATIONS, Rows
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.weights import files
from limber_jax.weights.convert import convert, identity, pattern


@dataclass(frozen=True)
class Loaded:
  """A model from disk; leaves are float32 numpy arrays."""

  size: ClipSize
  params: dict[str, Any]  # {"image": …, "text": …, "logit_scale": [], and of a SigLIP "logit_bias": []}
  stats: dict[str, Any]   # {"image": …} of a ResNet, {} of a ViT


@dataclass(frozen=True)
class Opened:
  """A model on disk, its tensors not yet read."""

  size: ClipSize
  source: Mapping[str, Any]      # their name -> anything with `shape` and `dtype` that np.asarray reads
  rows: Rows                     # paths of statistics start with "stats/"
  ignored: tuple[str, ...] = ()  # patterns of tensors that carry no weights


def load(path: str) -> Loaded:
  """Returns the model at `path`.

  Raises:
    UserError: nothing there, a pickle, a model of another build, or tensors that do not fit it exactly.
  """
  opened = open_model(path)
  with _naming(path):
    like = shapes(opened.size, "logit_bias" in opened.source)
    params = convert(opened.rows, opened.source, like, opened.ignored)
  stats = params.pop("stats", {})
  return Loaded(opened.size, params, stats)


def load_into(path: str, part: str, size: ClipSize, params: dict[str, Any],
              stats: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (params, stats) of one part of the model at `path`, float32 numpy arrays.

  Args:
    path: as of `load`.
    part: "image" or "text".
    size: the model that they are for. What shapes cannot show is compared with it: activation, heads, mean and std.
    params: shapes that the parameters of the part shall have.
    stats: shapes that its statistics shall have; None or {} if it has none.

  Raises:
    UserError: as of `load`, or a leaf has another shape; the message names it.
  """
  opened = open_model(path)
  # What belongs to another part need not be read.
  others = (pattern(theirs) for ours, theirs, _ in opened.rows if ours.removeprefix("stats/").split("/")[0] != part)
  with _naming(path):
    tree = convert(opened.rows, opened.source, {part: params} | ({"stats": {part: stats}} if stats else {}),
                   (*opened.ignored, *others))
  theirs, ours = ({"activation": s.activation, f"{part}.heads": getattr(s, part).heads}
                  | ({"mean": tuple(s.mean), "std": tuple(s.std)} if part == "image" else {})
                  for s in (opened.size, size))
  for name, value in theirs.items():
    if value != ours[name]:
      raise UserError(f"{path} has {name}={value!r}, but this config's model has {ours[name]!r}; "
                      f"set --config.model.{name}={value}")
  return tree[part], tree.get("stats", {}).get(part, {})


def open_model(path: str) -> Opened:
  """Returns the model at `path` with its tensors yet to be read; raises UserError as `load` does."""
  if not os.path.exists(path):
    raise UserError(f"{path}: no such file or directory; weights are read from disk, and a model of the Hugging Face "
                    f"hub is brought there by `hf download NAME --local-dir DIRECTORY`")
  for read in FORMATS:
    if (opened := read(path)) is not None:
      return opened
  for name in sorted(os.listdir(path)):
    if name.endswith(files.PICKLES):
      raise UserError(files.refusal(os.path.join(path, name)))
  raise UserError(f"{path}: no model there; looked for limber_config.json, open_clip_config.json with "
                  f"open_clip_model.safetensors, and config.json with model.safetensors")


def shapes(size: ClipSize, logit_bias: bool = False) -> dict[str, Any]:
  """Returns ShapeDtypeStructs of all that a model holds: parameters by part, and statistics under "stats"."""
  model = clip.build(size, Compute(dtype="float32", attention="xla"))
  image = jax.eval_shape(lambda: model.init_image(jax.random.key(0)))
  text = jax.eval_shape(lambda: model.init_text(jax.random.key(0)))
  scalar = jax.ShapeDtypeStruct((), np.float32)
  like = {"image": image["params"], "text": text["params"], "logit_scale": scalar}
  if logit_bias:
    like["logit_bias"] = scalar
  return like | ({"stats": {"image": image["batch_stats"]}} if "batch_stats" in image else {})


def _limber(path: str) -> Opened | None:
  config = os.path.join(path, "limber_config.json")
  if not os.path.isfile(config):
    return None
  with _naming(config):
    size = clip.size_from_dict(_json(config))
  source = files.tensors(os.path.join(path, "params.safetensors"))
  return Opened(size, source, identity(shapes(size, "logit_bias" in source)))


def _run(path: str) -> Opened | None:
  if not os.path.isdir(os.path.join(path, "checkpoints")):
    return None
  config = os.path.join(path, "config.json")
  with _naming(config):
    values = _json(config)
    size = clip.size_from_dict({k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")})
  like = shapes(size, values["loss.kind"] == "sigmoid")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
  stats = like.pop("stats", {})
  trained = {k: v for k, v in like.items() if k in values["trainable"]}
  checkpoints = Checkpoints(path, Checkpoint(best=values["checkpoint.best"]))
  try:
    params, stats = checkpoints.restore_params(checkpoints.find("best"), trained, stats)
  finally:
    checkpoints.close()
  for part in like.keys() - trained.keys():  # what was frozen is in no checkpoint
    if not values.get(f"init.{part}"):
      raise UserError(f"{path}: its {part!r} was frozen at random values, which no checkpoint holds")
    params[part], _ = load_into(values[f"init.{part}"], part, size, like[part], stats.get(part))
  tree = params | ({"stats": stats} if stats else {})
  return Opened(size, flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/"), identity(tree))


# open_clip's defaults, of the settings that we have too.
_OPEN_CLIP_IMAGE = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64}
_OPEN_CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8}
_OPEN_CLIP_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
# Of its other settings, those that change nothing here: values that say what we do anyway, and settings of a tokenizer,
# of training, or of a kind of tower that another setting would have to choose.
_OPEN_CLIP_SAME = {"vision_cfg.pool_type": "tok", "vision_cfg.pos_embed_type": "learnable", "vision_cfg.mlp_ratio": 4,
                   "text_cfg.pool_type": "argmax", "text_cfg.proj_type": "linear", "text_cfg.mlp_ratio": 4}
_OPEN_CLIP_INERT = re.compile(r"timm_(?!model_name).*|hf_(?!model_name).*|attn_pooler_.*|tokenizer_.*|pad_id|eos_id|"
                              r"patch_dropout|output_tokens")


def _open_clip(path: str) -> Opened | None:
  config = os.path.join(path, "open_clip_config.json")
  names = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
  weights = [f for name in names if os.path.isfile(f := os.path.join(path, name))]
  if not os.path.isfile(config) or not weights:
    return None
  source = files.tensors(weights[0])
  if "vision_model.embeddings.class_embedding" in source:
    return None  # a directory for both libraries, whose weights are in transformers' names
  with _naming(config):
    values = _json(config)
    model, preprocess = values["model_cfg"], values.get("preprocess_cfg") or {}
    for where, given, known in (("model_cfg", model, _OPEN_CLIP_MODEL),
                                ("vision_cfg", model["vision_cfg"], _OPEN_CLIP_IMAGE),
                                ("text_cfg", model["text_cfg"], _OPEN_CLIP_TEXT)):
      for name, value in given.items():
        if not (name in known or not value or value == _OPEN_CLIP_SAME.get(f"{where}.{name}")
                or _OPEN_CLIP_INERT.fullmatch(name)):
          raise UserError(f"{where}.{name}={value!r}: the models here have no such setting")
    v, t = _OPEN_CLIP_IMAGE | model["vision_cfg"], _OPEN_CLIP_TEXT | model["text_cfg"]
    side = _side(v["image_size"])
    if isinstance(v["layers"], list):
      image = ResNetSize(image_size=side, layers=tuple(v["layers"]), width=v["width"],
                         heads=32 * v["width"] // v["head_width"])
    else:
      image = ViTSize(image_size=side, patch=_side(v["patch_size"]), width=v["width"], layers=v["layers"],
                      heads=v["width"] // v["head_width"])
    text = TextSize(t["context_length"], t["vocab_size"], t["width"], t["layers"], t["heads"])
    size = ClipSize(model["embed_dim"], image, text, "quick_gelu" if model.get("quick_gelu") else "gelu",
                    tuple(preprocess.get("mean") or clip.MEAN), tuple(preprocess.get("std") or clip.STD))
    return Opened(size, source, clip.OPENAI_WEIGHTS[image.kind], clip.OPENAI_IGNORED)


def _hf(path: str) -> Opened | None:
  config, index = os.path.join(path, "config.json"), os.path.join(path, "model.safetensors.index.json")
  single = os.path.join(path, "model.safetensors")
  if not os.path.isfile(config) or not (os.path.isfile(index) or os.path.isfile(single)):
    return None
  # Only here, because it takes seconds; the defaults and older spellings of its configurations are its own matter.
  from huggingface_hub.errors import StrictDataclassError
  from transformers import CLIPConfig

  with _naming(config):
    values = _json(config)
    if values.get("model_type") != "clip":
      raise UserError(f"model_type is {values.get('model_type')!r}, expected 'clip'")
    try:
      hf = CLIPConfig.from_dict(values)
    except StrictDataclassError as error:
      raise UserError(" ".join(str(error).split())) from error
    v, t = hf.vision_config, hf.text_config
    if v.hidden_act != t.hidden_act or t.hidden_act not in ACTIVATIONS:
      raise UserError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)} for both towers, got {v.hidden_act!r} and "
                      f"{t.hidden_act!r}")
    if (v.layer_norm_eps, t.layer_norm_eps) != (1e-5, 1e-5):
      raise UserError(f"layer_norm_eps: expected 1e-05, got {v.layer_norm_eps} and {t.layer_norm_eps}")
    if t.eos_token_id not in (2, t.vocab_size - 1):  # 2 stands for the highest id of a text
      raise UserError(f"text_config.eos_token_id is {t.eos_token_id}, but the text tower here is pooled at the highest "
                      f"id of a text; set it to 2 if no text of yours holds an id above {t.eos_token_id}")
    image = ViTSize(image_size=_side(v.image_size), patch=_side(v.patch_size), width=v.hidden_size,
                    layers=v.num_hidden_layers, heads=v.num_attention_heads)
    text = TextSize(t.max_position_embeddings, t.vocab_size, t.hidden_size, t.num_hidden_layers, t.num_attention_heads)
  size = ClipSize(hf.projection_dim, image, text, t.hidden_act, *_hf_mean_std(path))
  source = files.tensors(single) if os.path.isfile(single) else _shards(path, index)
  return Opened(size, source, clip.HF_WEIGHTS["vit"], clip.HF_IGNORED)


def _hf_mean_std(path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns what the image processor beside a CLIPModel says; without one, CLIP's, as transformers does."""
  for name in ("preprocessor_config.json", "processor_config.json"):
    if os.path.isfile(file := os.path.join(path, name)):
      with _naming(file):
        values = _json(file)
        values = values.get("image_processor", values)
        return tuple(values.get("image_mean", clip.MEAN)), tuple(values.get("image_std", clip.STD))
  return clip.MEAN, clip.STD


def _shards(path: str, index: str) -> dict[str, files.Tensor]:
  with _naming(index):
    where = dict(_json(index)["weight_map"])
    for file in set(where.values()):
      if os.path.basename(file) != file:
        raise UserError(f"weight_map points outside of the directory: {file!r}")
  shards = {file: files.tensors(os.path.join(path, file)) for file in sorted(set(where.values()))}
  for name, file in where.items():
    if name not in shards[file]:
      raise UserError(f"{index}: {name!r} is not in {file}")
  return {name: shards[file][name] for name, file in where.items()}


def _openai(path: str) -> Opened | None:
  if os.path.isdir(path):
    return None
  source = files.tensors(path)

  def shape(name: str) -> tuple[int, ...]:
    if name not in source:
      raise UserError(f"no tensor {name!r}, so this is no CLIP in OpenAI's names; of a model of another library "
                      "give the directory")
    return source[name].shape

  def count(start: str) -> int:
    return len({match[1] for name in source if (match := re.match(rf"{re.escape(start)}(\d+)\.", name))})

  with _naming(path):
    if "visual.proj" in source:
      width, _, _, patch = shape("visual.conv1.weight")
      grid = math.isqrt(shape("visual.positional_embedding")[0])
      image = ViTSize(image_size=grid * patch, patch=patch, width=width, layers=count("visual.transformer.resblocks."),
                      heads=max(width // 64, 1))
    else:
      width = shape("visual.layer1.0.conv1.weight")[0]
      grid = math.isqrt(shape("visual.attnpool.positional_embedding")[0])
      image = ResNetSize(image_size=32 * grid, layers=tuple(count(f"visual.layer{i}.") for i in (1, 2, 3, 4)),
                         width=width, heads=max(width // 2, 1))
    vocab, text_width = shape("token_embedding.weight")
    text = TextSize(shape("positional_embedding")[0], vocab, text_width, count("transformer.resblocks."),
                    max(text_width // 64, 1))
    size = ClipSize(shape("text_projection")[-1], image, text)
  return Opened(size, source, clip.OPENAI_WEIGHTS[image.kind], clip.OPENAI_IGNORED)


FORMATS: tuple[Callable[[str], Opened | None], ...] = (_limber, _open_clip, _run, _hf, _openai)
"""Each returns None if `path` is not of its format."""


def _json(path: str) -> dict[str, Any]:
  with open(path, encoding="utf-8") as file:
    values = json.load(file)
  if not isinstance(values, dict):
    raise UserError("expected a JSON object")
  return values


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Puts the file's name before what is found wrong with its content inside the block."""
  try:
    yield
  except KeyError as error:
    raise UserError(f"{path}: {error} is missing") from error
  except (UserError, ArithmeticError, AttributeError, OSError, TypeError, ValueError) as error:
    raise UserError(f"{path}: {error}") from error


def _side(value: Any) -> int:
  """Returns n of n or of [n, n]: squares are written both ways."""
  sides = value if isinstance(value, list | tuple) else [value]
  if len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1:
    raise UserError(f"expected a square, a positive number of pixels a side, got {value!r}")
  return sides[0]
