"""What other libraries' configurations say of a model, as sizes of ours; what these models lack is refused by name."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from limber_jax import config_json
from limber_jax.errors import UserError, did_you_mean
from limber_jax.models import clip
from limber_jax.models.clip import ClipConfig
from limber_jax.models.layers import ACTIVATIONS
from limber_jax.models.resnet import ResNetSize
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.runtime import inputs
from limber_jax.weights import identify, preprocessing
from limber_jax.weights.preprocessing import Preprocessing

WEIGHTS = (".safetensors", ".npz", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack")  # how their files are called
PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # transformers' files, in its order

# open_clip's defaults, of the settings that we have too.
_OPEN_CLIP_IMAGE = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64}
_OPEN_CLIP_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8, "eos_id": 2,
                   "pool_type": "argmax"}
_OPEN_CLIP_MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
# Of its other settings, those that change nothing here: values that say what we do anyway, and settings of a tokenizer,
# of training, or of a kind of tower that another setting would have to choose.
_OPEN_CLIP_SAME = {"vision_cfg.pool_type": "tok", "vision_cfg.pos_embed_type": "learnable", "vision_cfg.mlp_ratio": 4,
                   "text_cfg.proj_type": "linear", "text_cfg.mlp_ratio": 4}
_OPEN_CLIP_INERT = re.compile(r"timm_(?!model_name).*|hf_(?!model_name).*|attn_pooler_.*|tokenizer_.*|pad_id|"
                              r"patch_dropout|output_tokens")


def open_clip_size(values: dict[str, Any]) -> ClipConfig:
  """Returns the size of a CLIP of open_clip's, from its open_clip_config.json, with CLIP's own preprocessing.

  To be called inside of `naming`.
  """
  model = values["model_cfg"]
  for cfg, name, what in (("vision_cfg", "timm_model_name", "a CLIP with an image tower of timm's, as SigLIPs have"),
                          ("text_cfg", "hf_model_name", "a CLIP with a text tower of transformers'"),
                          ("multimodal_cfg", "layers", "a CoCa, by the layers of its decoder")):
    if value := (model.get(cfg) or {}).get(name):
      raise UserError(f"this is {what} ({value!r}); {identify.LOADABLE['clip']}")
  for where, given, known in (("model_cfg", model, _OPEN_CLIP_MODEL),
                              ("vision_cfg", model["vision_cfg"], _OPEN_CLIP_IMAGE),
                              ("text_cfg", model["text_cfg"], _OPEN_CLIP_TEXT)):
    for name, value in given.items():
      if not (name in known or not value or value == _OPEN_CLIP_SAME.get(f"{where}.{name}")
              or _OPEN_CLIP_INERT.fullmatch(name)):
        raise UserError(f"{where}.{name}={value!r}: the models here have no such setting")
  v, t = _OPEN_CLIP_IMAGE | model["vision_cfg"], _OPEN_CLIP_TEXT | model["text_cfg"]
  if t["pool_type"] not in ("argmax", "eos"):
    raise UserError(f"text_cfg.pool_type={t['pool_type']!r}: the models here have no such setting")
  side = _side(v["image_size"])
  if isinstance(v["layers"], list):
    image = ResNetSize(image_size=side, layers=tuple(v["layers"]), width=v["width"],
                       heads=32 * v["width"] // v["head_width"])
  else:
    image = ViTSize(image_size=side, patch=_side(v["patch_size"]), width=v["width"], layers=v["layers"],
                    heads=v["width"] // v["head_width"])
  text = TextSize(t["context_length"], t["vocab_size"], t["width"], t["layers"], t["heads"],
                  t["eos_id"] if t["pool_type"] == "eos" else -1)
  return ClipConfig(model["embed_dim"], image, text, "quick_gelu" if model.get("quick_gelu") else "gelu")


def open_clip_preprocessing(path: str, image_size: int) -> Preprocessing:
  """Returns what an open_clip_config.json says; raises UserError as `preprocessing.from_open_clip`, with its name."""
  with naming(path):
    return preprocessing.from_open_clip(read_json(path).get("preprocess_cfg") or {}, image_size)


# model_type of transformers -> the towers that such a model has.
HF_PARTS = {"clip": ("image", "text"), "clip_vision_model": ("image",), "clip_text_model": ("text",)}


def hf_size(values: dict[str, Any]) -> ClipConfig:
  """Returns the size of a CLIPModel of transformers, from its config.json, with CLIP's own preprocessing.

  Of one tower alone (`HF_PARTS`) the other is what it is by default. To be called inside of `naming`.
  """
  parts = HF_PARTS.get(kind) if isinstance(kind := values.get("model_type"), str) else None
  if parts is None:
    raise UserError(f"this is {identify.of_config(values)}, expected a CLIP (model_type 'clip')")
  # Only here, because it takes seconds; the defaults and older spellings of its configurations are its own matter.
  from huggingface_hub.errors import StrictDataclassError
  from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

  try:
    hf = (CLIPConfig if len(parts) == 2 else CLIPVisionConfig if parts == ("image",) else CLIPTextConfig).from_dict(
      values)
  except StrictDataclassError as error:
    raise UserError(" ".join(str(error).split())) from error
  v = hf.vision_config if len(parts) == 2 else hf if parts == ("image",) else None
  t = hf.text_config if len(parts) == 2 else hf if parts == ("text",) else None
  acts, epsilons = ([getattr(tower, name) for tower in (v, t) if tower] for name in ("hidden_act", "layer_norm_eps"))
  if len(set(acts)) > 1 or acts[0] not in ACTIVATIONS:
    raise UserError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)} for both towers, got "
                    f"{' and '.join(map(repr, acts))}")
  if set(epsilons) != {1e-5}:
    raise UserError(f"layer_norm_eps: expected 1e-05, got {' and '.join(map(str, epsilons))}")
  image, text = ViTSize(), TextSize()
  if v:
    image = ViTSize(image_size=_side(v.image_size), patch=_side(v.patch_size), width=v.hidden_size,
                    layers=v.num_hidden_layers, heads=v.num_attention_heads)
  if t:
    eos = t.eos_token_id
    if type(eos) is not int or not 0 <= eos < t.vocab_size:
      raise UserError(f"text_config.eos_token_id is {eos!r}, which is no id of its vocabulary of {t.vocab_size}")
    eos = -1 if eos in (2, t.vocab_size - 1) else eos  # 2 stands for the highest id of a text
    text = TextSize(t.max_position_embeddings, t.vocab_size, t.hidden_size, t.num_hidden_layers, t.num_attention_heads,
                    eos)
  return ClipConfig(hf.projection_dim, image, text, acts[0])


def hf_preprocessing(path: str, image_size: int, kind: str) -> Preprocessing:
  """Returns what the image processor beside a model of transformers does; without one, its default at `image_size`.

  Args:
    path: the directory.
    image_size, kind: as of `preprocessing.from_hf`, whose errors it raises with the name of the file.
  """
  for name in PROCESSORS:
    if os.path.isfile(file := os.path.join(path, name)):
      with naming(file):
        values = read_json(file)
        if name == "processor_config.json" and "image_processor" not in values:
          continue  # of a time when it held other settings only
        return preprocessing.from_hf(values.get("image_processor", values), image_size, kind)
  return preprocessing.of_hf(kind)


def preprocessing_beside(file: str, size: ClipConfig) -> Callable[[], Preprocessing] | None:
  """Returns what gives the preprocessing that lies beside a file of weights, None if none does.

  Args:
    file: of weights.
    size: of its model, from elsewhere; what that says of preprocessing must be the default, or the same.
  """
  folder = os.path.dirname(file)
  there = next((name for name in ("open_clip_config.json", *PROCESSORS) if os.path.isfile(os.path.join(folder, name))),
               None)
  if there is None:
    return None

  def beside() -> Preprocessing:
    config, side = os.path.join(folder, there), size.image.image_size
    found = (open_clip_preprocessing(config, side) if there == "open_clip_config.json" else
             hf_preprocessing(folder, side, "CLIP"))
    usual = ClipConfig(), preprocessing.of_hf("CLIP")  # what a configuration that says nothing of it gives
    for name, value in dataclasses.asdict(found).items():
      own = _plain(getattr(size, name))
      if own not in (_plain(value), *(_plain(getattr(x, name)) for x in usual)):
        raise UserError(f"{config} says {name}={value!r}, but the model that is named for its weights {own!r}")
    return found

  return beside


def _plain(value: Any) -> Any:
  return tuple(value) if isinstance(value, list) else value


def read_json(path: str) -> dict[str, Any]:
  """Returns the JSON object in a file; to be called inside of `naming`."""
  try:
    values = json.loads(inputs.text(path, inputs.CONFIG))
  except (ValueError, RecursionError) as error:
    what = "; these are weights, not their configuration" if path.endswith(WEIGHTS) else ""
    raise UserError(f"not JSON ({' '.join(str(error).split())[:200]}){what}") from error
  if not isinstance(values, dict):
    raise UserError("expected a JSON object")
  return values


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
  """Puts the file's name before what is found wrong with its content inside the block."""
  try:
    yield
  except KeyError as error:
    raise UserError(f"{path}: {error} is missing") from error
  except OSError as error:
    raise UserError(f"{path}: {error.strerror or error}") from error
  except (UserError, ArithmeticError, AttributeError, TypeError, ValueError) as error:
    raise UserError(str(error) if str(error).startswith(f"{path}: ") else f"{path}: {error}") from error


def _side(value: Any) -> int:
  """Returns n of n or of [n, n]: squares are written both ways."""
  sides = value if isinstance(value, list | tuple) else [value]
  if len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1:
    raise UserError(f"expected a square, a positive number of pixels a side, got {value!r}")
  return sides[0]


def described(model: str) -> ClipConfig:
  """Returns the size that --model= says: a name of `clip.SIZES`, or a file or directory with a CLIP's configuration.

  After either, fields may follow that differ: clip_vit_b32,activation=gelu,image.heads=8.

  Raises:
    UserError: no such name, file or field, or another model's configuration.
  """
  base, *changes = (part.strip() for part in re.split(r",(?=\s*[\w.]+\s*=)", model))
  if base in clip.SIZES:
    size = clip.SIZES[base]()
  elif os.path.isdir(base):
    found = [os.path.join(base, name) for name in CONFIGS if os.path.isfile(os.path.join(base, name))]
    if not found:
      raise UserError(f"{base}: no configuration of a CLIP there; looked for {', '.join(CONFIGS)}")
    size = size_in(found[0])
  elif os.path.lexists(base):
    if what := inputs.what_is(base):
      raise UserError(f"{base}: {what}; wanted a configuration of a CLIP")
    size = size_in(base)
  else:
    raise UserError(f"no model {base!r} is known here, and no file or directory{did_you_mean(base, clip.SIZES)}")
  if not changes:
    return size
  values = config_json.flatten(size)
  for name, value in (map(str.strip, change.split("=", 1)) for change in changes):
    if name not in values:
      raise UserError(f"a CLIP has no {name!r}{did_you_mean(name, values)}")
    try:
      values[name] = value if isinstance(values[name], str) else json.loads(value)
    except ValueError as error:
      raise UserError(f"{name}={value}: no number ({error})") from error
  return clip.size_from_dict(values)


CONFIGS = ("limber_config.json", "open_clip_config.json", "config.json")


def size_in(path: str) -> ClipConfig:
  """Returns the size of the CLIP that a configuration file describes: of ours, open_clip's or transformers'.

  Its preprocessing is what the file says, or the one that belongs to it in its directory.
  """
  with naming(path):
    values = read_json(path)
    if "image.kind" in values:
      return clip.size_from_dict(values)
    if "model.image.kind" in values and "model.text.vocab" in values:  # of a run of limber_jax.train
      return clip.size_from_dict({k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")})
    if "vision_cfg" in values:  # as in open_clip's own model_configs
      return open_clip_size({"model_cfg": values})
    size = open_clip_size(values) if "model_cfg" in values else hf_size(values)
  side = size.image.image_size
  said = (open_clip_preprocessing(path, side) if "model_cfg" in values
          else hf_preprocessing(os.path.dirname(path), side, "CLIP"))
  return dataclasses.replace(size, **dataclasses.asdict(said))
