"""Whole CLIPs from disk, in any of the formats below; which one is seen from the files themselves.

    a directory   limber_config.json + params.safetensors                          written by `weights.export`
                  open_clip_config.json + open_clip_model.safetensors              open_clip
                  config.json + model.safetensors (or its shards and their index)  CLIPModel of HF transformers
                  config.json + checkpoints                                        a workdir of limber_jax.train: its
                                                                                   best checkpoint, or else its newest
    a file        safetensors, npz, torch.save, torch.jit.save                     a state dict in OpenAI's names, or
                                                                                   in those of transformers

Parts of a LiMBeR are read by `weights.parts`.

Where a directory has no safetensors, PyTorch's pickles are read (`weights.pickles` says how that is safe), and of a
GPT-J Flax's msgpack. What training scripts put before the names of a file comes off, and of several sets of weights one
is chosen by `PATH#KEY` (`weights.names`). A state dict has no configuration: its shapes show the sizes of a CLIP, and
heads and activation are said by `model`, by a configuration beside it or by OpenAI's own marks, or it is refused
(`weights.bare`). A further format of CLIP is one function in `FORMATS`.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from limber_jax.checkpoints import workdirs
from limber_jax.checkpoints.manager import Checkpoints
from limber_jax.config import Checkpoint, Tokenizer
from limber_jax.config_json import flatten
from limber_jax.data import vocabularies
from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.models.clip import ClipConfig
from limber_jax.weights import bare, configs, names, positions
from limber_jax.weights.configs import naming, read_json
from limber_jax.weights.convert import convert, identity, pattern
from limber_jax.weights.formats import PARTS, Opened, hf, limber, open_clip, shapes, state_dict
from limber_jax.weights.reading import check_exists

RESAMPLE = "--config.init.resample_positions=True"


@dataclass(frozen=True)
class Loaded:
  """A model from disk; leaves are float32 numpy arrays."""

  size: ClipConfig
  params: dict[str, Any]  # {"image": …, "text": …, "logit_scale": [], and of a SigLIP "logit_bias": []}
  stats: dict[str, Any]   # {"image": …} of a ResNet, {} of a ViT


def load(path: str, model: str = "", *, flag: str = "--model") -> Loaded:
  """Returns the model at `path`.

  Args:
    path: one of the sources above.
    model: what the user says of it, see `configs.described`; "" if nothing. Needed where nothing else says it.
    flag: how the user says it, for messages.

  Raises:
    UserError: nothing there, a file that is not only weights, a model of another build or of one that is not said, or
      tensors that do not fit it exactly.
  """
  opened = open_model(path, model, flag=flag)
  with naming(path):
    like = shapes(opened.size, "logit_bias" in opened.source)
    params = convert(opened.rows, opened.source, like, opened.ignored)
  stats = params.pop("stats", {})
  return Loaded(opened.size, params, stats)


def load_into(path: str, part: str, size: ClipConfig, params: dict[str, Any],
              stats: dict[str, Any] | None = None, resample: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (params, stats) of one part of the model at `path`, float32 numpy arrays.

  Args:
    path: as of `load`.
    part: "image" or "text".
    size: the model that they are for. What shapes cannot show is compared with it: activation and heads; a state dict,
      beside which nothing says them, is taken for such a model. Its preprocessing is what `adopt` made it.
    params: shapes that the parameters of the part shall have.
    stats: shapes that its statistics shall have; None or {} if it has none.
    resample: resample the positions of another image size or context length, see `weights.positions`.

  Raises:
    UserError: as of `load`, or a leaf has another shape; the message names it.
  """
  opened = open_model(path, parts=(part,), given=size, preprocessing=False)
  with naming(path):
    source = positions.fitted(opened.source, opened.rows, {f"{part}/position": np.shape(params.get("position", ()))},
                              resample, RESAMPLE)
    tree = convert(opened.rows, source, {part: params} | ({"stats": {part: stats}} if stats else {}),
                   ignored_beside(opened, part))
  check_clip(path, part, opened.size, {"activation": size.activation, f"{part}.heads": getattr(size, part).heads})
  if part == "text" and opened.size.text.eos != size.text.eos:
    raise UserError(f"{path} has text.eos={opened.size.text.eos}, but this config's model has {size.text.eos}; "
                    f"set --config.model.text.eos={opened.size.text.eos}")
  return tree[part], tree.get("stats", {}).get(part, {})


def open_model(path: str, model: str = "", *, parts: tuple[str, ...] = PARTS, given: ClipConfig | None = None,
               flag: str = "--model", role: str = "clip", preprocessing: bool = True) -> Opened:
  """Returns the model at `path` with its tensors yet to be read; raises UserError as `load` does.

  Args:
    path, model, flag: as of `load`.
    parts: that will be read; without the others a source will do.
    given: the model that they are for: believed of a state dict of which nothing says heads and activation.
    role: what is asked for, "clip" or "image", for messages.
    preprocessing: give the size the preprocessing that lies beside the weights; without, it is not looked at.
  """
  check_exists(path)
  for read in FORMATS:
    if (opened := read(path)) is not None:
      break
  else:
    opened = state_dict(path, model, parts, given, flag, role)
  if missing := [part for part in parts if part not in opened.parts]:
    raise UserError(f"{path}: only the {' and '.join(opened.parts)} tower of a CLIP, but the {missing[0]} tower is "
                    "needed here")
  if preprocessing and opened.preprocessing is not None:
    size = dataclasses.replace(opened.size, **dataclasses.asdict(opened.preprocessing()))
    opened = dataclasses.replace(opened, size=size)
  if model:
    said = configs.described(model)
    for field in (f for f in bare.UNSEEN if f.partition(".")[0] in ("activation", *opened.parts)):
      ours, theirs = (flatten(size)[field] for size in (said, opened.size))
      if ours != theirs:
        raise UserError(f"{path} has {field}={theirs!r}, but {flag}={model} says {ours!r}")
  return opened


def own_tokenizer(weights: str) -> Tokenizer:
  """Returns the tokenizer that lies or is recorded beside the weights, else CLIP's."""
  weights, _ = names.split(weights)
  folder = weights if os.path.isdir(weights) else os.path.dirname(weights)
  path = os.path.join(folder, "config.json")
  if os.path.isdir(os.path.join(folder, "checkpoints")) and os.path.isfile(path):  # a run of limber_jax.train
    try:
      recorded = read_json(path)
      found = Tokenizer(recorded["data.tokenizer.name"], workdirs.finder(folder)(recorded["data.tokenizer.path"]))
    except (OSError, UserError, ValueError, KeyError) as error:
      raise UserError(f"{path} names no tokenizer ({error})") from error
    vocabularies.check_stored(found, path)
    return found
  beside = any(os.path.isfile(os.path.join(folder, name)) for name in ("tokenizer.json", "merges.txt"))
  return Tokenizer("clip", folder if beside else "")


def ignored_beside(opened: Opened, part: str) -> tuple[str, ...]:
  """Returns the patterns of what need not be read for one part: the others' tensors too."""
  others = (pattern(theirs) for ours, theirs, _ in opened.rows if ours.removeprefix("stats/").split("/")[0] != part)
  return (*opened.ignored, *others)


def check_clip(path: str, part: str, theirs: ClipConfig, ours: dict[str, Any], encoder: bool = False) -> None:
  """Raises if the CLIP at `path` computes something else than `ours` says: of a CLIP's config, or of an encoder's."""
  has = {"activation": theirs.activation, f"{part}.heads": getattr(theirs, part).heads}
  for name, value in has.items():
    if value != ours[name]:
      field = f"image.{name}".replace("image.image", "image.tower") if encoder else name
      raise UserError(f"{path} has {name}={value!r}, but this config's model has {ours[name]!r}; "
                      f"set --config.model.{field}={value}")


def _run(path: str) -> Opened | None:
  if not os.path.isdir(os.path.join(path, "checkpoints")):
    return None
  config = os.path.join(path, "config.json")
  with naming(config):
    values = workdirs.check_clip(read_json(config), path)
    size = clip.size_from_dict({k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")})
  like = shapes(size, values["loss.kind"] == "sigmoid")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
  stats_like = like.pop("stats", {})
  trained, trained_stats = ({k: v for k, v in tree.items() if k in values["trainable"]} for tree in (like, stats_like))
  checkpoints = Checkpoints(path, Checkpoint(best=values["checkpoint.best"]))
  try:
    params, stats = checkpoints.read("", lambda step: checkpoints.restore_params(step, trained, trained_stats))
  finally:
    checkpoints.close()
  for part in like.keys() - trained.keys():  # what was frozen is in no checkpoint
    if not values.get(f"init.{part}"):
      raise UserError(f"{path}: its {part!r} was frozen at random values, which no checkpoint holds")
    weights = workdirs.finder(path)(values[f"init.{part}"])
    params[part], found = load_into(weights, part, size, like[part], stats_like.get(part),
                                    values.get("init.resample_positions", False))
    stats = stats | ({part: found} if found else {})
  tree = params | ({"stats": stats} if stats else {})
  return Opened(size, flax.traverse_util.flatten_dict(jax.device_get(tree), sep="/"), identity(tree))


FORMATS: tuple[Callable[[str], Opened | None], ...] = (limber, open_clip, _run, hf)
"""Each returns None if `path` is not of its format; what is of none is a state dict, or no model."""
