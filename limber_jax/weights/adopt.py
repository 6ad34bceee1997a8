"""The preprocessing that belongs to an encoder's weights, put into the model of an experiment that starts from them.

It stays with the run from then on: config.json has it, and a run that was begun resumes as it is, whatever lies beside
its weights by then.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from limber_jax.checkpoints import workdirs
from limber_jax.config import Config
from limber_jax.errors import UserError
from limber_jax.map_names import join, split
from limber_jax.models import spec
from limber_jax.models.clip import ClipConfig
from limber_jax.models.encoders import as_clip
from limber_jax.models.spec import EncoderConfig, spec_of
from limber_jax.weights import configs, load, names, preprocessing, projection
from limber_jax.weights.configs import naming, read_json
from limber_jax.weights.preprocessing import Preprocessing


def adopt(config: Config, workdir: str = "", *, weights: str = "", log: Callable[[str], None] = print) -> Any:
  """Returns `config.model`, each encoder's preprocessing being that of the run, or else of its weights' directory.

  A field that is not what a model of its kind has by itself was meant, and stays; as all do of resize="native", which
  departs from any directory on purpose.

  Args:
    config: the experiment.
    workdir: of the run; if it was begun, what its config.json says is what holds.
    weights: a projection or a workdir that has one, in place of config.init.prompt: what its map learnt from holds.
    log: told in a line what is taken from a directory.

  Raises:
    UserError: a directory asks for what cannot be done, or the config contradicts it; the message names the setting.
  """
  values, map_ = _recorded(workdir), ""
  if not values and weights:
    values, map_ = _of_projection(weights)
  model = config.model
  for name, size in model.encoders().items():
    path = config.init.path_of(name)
    if size.resize == "native" or not (values or path):
      continue
    if values:
      said = _of_run(values, map_ if name == "image" and map_ else name)
      changes = {k: v for k, v in said.items() if getattr(size, k) == getattr(size.plain(), k)}
    else:
      changes = _agreed(path, name, size, config.model.encoder_field(name))
      if new := [f"{k}={v!r}" for k, v in changes.items() if v != getattr(size, k)]:
        log(f"{name}: preprocessing as {path} has it: {', '.join(new)}")
    model = model.with_encoder(name, dataclasses.replace(size, **changes))
  return model


def beside(path: str, size: ClipConfig | EncoderConfig) -> Preprocessing | None:
  """Returns the preprocessing that belongs to the image tower in a directory; None where nothing there says any.

  Args:
    path: of weights: a workdir, or a directory of limber_jax.convert, open_clip, transformers or timm; or a file.
    size: of the encoder that they are for.

  Raises:
    UserError: it cannot be done, contradicts the encoder, or cannot be read.
  """
  if os.path.isdir(os.path.join(path, "checkpoints")):
    values = _recorded(path)
    return Preprocessing(**_of_run(values, "image")) if values else None
  if given := as_clip(size):
    found = load.open_model(path, parts=("image",), given=given, role="image").size
    if found.resize_to and found.image.image_size != given.image.image_size:
      raise UserError(f"{path} resizes to {found.resize_to} pixels for a model of {found.image.image_size}; what that "
                      f"is for {given.image.image_size} it does not say")
    return Preprocessing.from_config(found)
  folder = path if os.path.isdir(path) else os.path.dirname(names.split(path)[0])
  tower, spec = size.tower, spec_of(size.tower.kind)
  if spec.processor != "timm":
    there = any(os.path.isfile(os.path.join(folder, name)) for name in configs.PROCESSORS)
    return configs.hf_preprocessing(folder, tower.image_size, spec.processor) if there and spec.processor else None
  if not os.path.isfile(config := os.path.join(folder, "config.json")):
    return None
  with naming(config):
    values = read_json(config)
    lone = folder != path and not spec.describes(values)
    return None if lone else preprocessing.from_timm(values, tower.image_size)


def _agreed(path: str, name: str, size: ClipConfig | EncoderConfig, at: str) -> dict[str, Any]:
  """Returns the fields that the directory of the weights asks for; raises UserError if the config contradicts one."""
  try:
    said = beside(path, size)
  except UserError as error:
    raise UserError(f"--config.init.{name}: {error}") from error
  if said is None:
    return {}
  plain, changes = size.plain(), dataclasses.asdict(said)
  for field, value in changes.items():
    ours = getattr(size, field)
    ours = tuple(ours) if isinstance(value, tuple) else ours
    if ours not in (value, getattr(plain, field)):
      raise UserError(f"{path} has {field}={value!r}, but this config's model has {ours!r}; set "
                      f"--config.model.{at}{field}={value}")
  return changes


def _recorded(workdir: str) -> dict[str, Any]:
  """Returns the values of a workdir's config.json; {} if no run was begun there, or if what will read it cannot."""
  if not workdirs.begun(workdir):
    return {}
  try:
    return read_json(os.path.join(workdir, workdirs.CONFIG))
  except (OSError, RecursionError, UserError, ValueError):
    return {}


def _of_projection(path: str) -> tuple[dict[str, Any], str]:
  """Returns (the values of the config that a projection was trained by, its encoder's part); ({}, "") if none says."""
  if os.path.isdir(path):
    return _recorded(path), ""
  try:
    metadata = projection.load(path)[1]
  except UserError:
    return {}, ""  # the authors' proj.ckpt, or nothing at all: what reads it will say
  values = json.loads(json.dumps(metadata["config"]))
  name = join("image", str(metadata.get("map", "")))
  return values, name if f"{_start(name)}mean" in values else "image"


def _of_run(values: dict[str, Any], name: str) -> dict[str, Any]:
  """Returns the preprocessing of a run's encoder: what it records, and of what came later what it did without."""
  starts = [_start(name), "model.encoder.", "model."] if name == "image" else [_start(name)]
  start = next((start for start in starts if f"{start}mean" in values), None)
  if start is None:
    return {}
  recorded = {k: values[start + k] for k in spec.PIXELS if start + k in values}
  return dataclasses.asdict(Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}))


def _start(name: str) -> str:
  """Returns what the settings of an encoder's part begin with in a config.json of task "captioning"."""
  return "model.image." if name == "image" else f"model.extra_projectors.{split(name)[1]}.image."
