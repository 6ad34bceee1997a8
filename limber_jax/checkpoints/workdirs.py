"""What a workdir says of its run: config.json, and run.json beside it.

A run claims its workdir with its first checkpoint, and not before: until then a command that was corrected simply
works. run.json holds what no config can:

    {"run": 32 hex digits that its checkpoints' manifests repeat, "workdir": "/…/runs/a", "folder": "/…"}

`folder` is where the command was started, from where relative paths of the config count; `workdir` is where it lay, so
that what lies beside it is found beside it again where both were moved.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from limber_jax import config_history, config_json
from limber_jax.checkpoints import manifest
from limber_jax.config import Config
from limber_jax.data import vocabularies
from limber_jax.errors import UserError
from limber_jax.runtime import atomic, inputs

CONFIG, RUN, CHECKPOINTS = "config.json", "run.json", "checkpoints"
WRITTEN = (CONFIG, RUN, "metrics.jsonl", "scores.json", "bad_records.jsonl")  # files of every run


def begun(workdir: str) -> bool:
  """Returns whether a run has claimed a workdir: whether there is a checkpoint in it, and what it is of."""
  if not workdir or not os.path.isfile(os.path.join(workdir, CONFIG)):
    return False
  try:
    return any(name.isdigit() for name in os.listdir(os.path.join(workdir, CHECKPOINTS)))
  except OSError:
    return False


def identity(workdir: str) -> str:
  """Returns the run of a workdir, "" where there is none, or one of before runs had names."""
  said = _read(workdir).get("run") or _of_newest(workdir)
  return said if isinstance(said, str) else ""


def check(config: Config, workdir: str) -> None:
  """Raises UserError unless the workdir is free, can be written to, or belongs to a run of the same experiment."""
  path = os.path.abspath(os.path.join(workdir, CHECKPOINTS))
  while not os.path.lexists(path):
    path = os.path.dirname(path)
  if not os.path.isdir(path):
    raise UserError(f"--workdir={workdir}: {path} is a file, where a directory belongs; move it away, or choose "
                    "another --workdir")
  if not os.access(path, os.W_OK | os.X_OK):
    raise UserError(f"--workdir={workdir}: cannot write there ({path}: Permission denied)")
  for name in WRITTEN if os.path.isdir(workdir) else ():
    atomic.check(os.path.join(workdir, name))
  if begun(workdir):
    check_same(config, workdir)


def check_same(config: Config, workdir: str) -> None:
  """Raises UserError if `config` would train something else than the run of a workdir, by its config.json.

  Frozen weights may lie elsewhere by now: that they are the same is seen from their digests, once they are loaded.
  """
  with open(os.path.join(workdir, CONFIG), encoding="utf-8") as file:
    saved = file.read()
  was, init = config_json.from_json(saved, workdir).init, copy.deepcopy(config.init)
  for part in ("image", "text", "prompt", "lm"):
    if part not in config.trainable and getattr(init, part):
      setattr(init, part, getattr(was, part) or getattr(init, part))
  for part in init.extra_projectors.keys() - set(config.trainable):
    path = init.extra_projectors[part]
    init.extra_projectors[part] = path and (was.extra_projectors.get(part) or path)
  config_json.check_same(dataclasses.replace(config, init=init), saved, workdir)


def claim(config: Config, workdir: str, run: str) -> None:
  """Writes both files of a run; raises UserError if it cannot."""
  said = {"run": run, "workdir": os.path.realpath(workdir), "folder": os.getcwd()}
  for name, text in ((RUN, json.dumps(said, indent=1)), (CONFIG, config_json.to_json(config))):
    with atomic.atomic_write(os.path.join(workdir, name)) as file:
      file.write(text)


def read_config(workdir: str) -> Config:
  """Returns the experiment of a workdir, its paths as they count from here.

  Raises:
    UserError: there is none, or one that cannot be read.
  """
  path = os.path.join(workdir, CONFIG)
  try:
    text = inputs.text(path, inputs.CONFIG)
  except (OSError, UnicodeDecodeError, UserError) as error:
    raise UserError(f"--workdir={workdir}: no run there ({CONFIG}: {getattr(error, 'strerror', None) or error}); "
                    f"train one with python -m limber_jax.train --config=… --workdir={workdir}") from error
  config, here = config_json.from_json(text, path), finder(workdir)
  init = dataclasses.replace(
    config.init, **{part: here(getattr(config.init, part)) for part in ("image", "text", "prompt", "lm")},
    extra_projectors={part: here(path) for part, path in config.init.extra_projectors.items()})
  tokenizer = dataclasses.replace(config.data.tokenizer, path=here(config.data.tokenizer.path))
  vocabularies.check_stored(tokenizer, path)
  return dataclasses.replace(config, init=init, data=dataclasses.replace(config.data, tokenizer=tokenizer))


def ignored_of_source(workdir: str) -> dict[str, Any]:
  """Returns what the config.json of a workdir says of its data beyond what the source reads; {} where there is none."""
  path = os.path.join(workdir, CONFIG)
  if not workdir or not os.path.isfile(path):
    return {}
  values = json.loads(inputs.text(path, inputs.CONFIG).removeprefix("\ufeff"))
  return config_history.ignored({name.removeprefix("data.source."): value for name, value in values.items()
                                 if name.startswith("data.source.")})


def finder(workdir: str) -> Callable[[str], str]:
  """Returns a function from a path in the config of a run to where that is now; what is not found stays as it is.

  Looked for are: what lies to the workdir as it did, where it was at training, and the same path from here.
  """
  said = _read(workdir)
  folder, was = (said.get(key) for key in ("folder", "workdir"))
  if not (isinstance(folder, str) and isinstance(was, str)):
    return lambda path: path

  def find(path: str) -> str:
    if not path:
      return path
    then = os.path.join(folder, path)
    beside = os.path.normpath(os.path.join(os.path.realpath(workdir), os.path.relpath(then, was)))
    return next((p for p in (beside, then) if os.path.exists(p)), path)

  return find


def check_clip(values: dict[str, Any], workdir: str) -> dict[str, Any]:
  """Returns what the config.json of a run holds; raises UserError if the run is of no CLIP."""
  if (task := values.get("task", "contrastive")) == "contrastive":
    return values
  use = {"captioning": "limber_jax.caption, vqa and evaluate use it, with --workdir=, and limber_jax.convert "
                       "--to=projection writes its map"}.get(task, "limber_jax.evaluate measures it, with --workdir=")
  raise UserError(f"{workdir} is a run of task {task!r}, and a CLIP is wanted here; {use}")


def _of_newest(workdir: str) -> str | None:
  """Returns the run that the newest checkpoint is of, None where it does not say."""
  folder = os.path.join(workdir, CHECKPOINTS)
  try:
    newest = max((name for name in os.listdir(folder) if name.isdigit()), key=int)
    with open(os.path.join(folder, newest, manifest.NAME), encoding="utf-8") as file:
      return json.load(file).get("run")
  except (OSError, ValueError, AttributeError, RecursionError):
    return None


def _read(workdir: str) -> dict[str, Any]:
  """Returns what run.json holds, {} where there is none; raises UserError if it is damaged."""
  path = os.path.join(workdir, RUN)
  try:
    found = json.loads(inputs.text(path, inputs.CONFIG))
    if not isinstance(found, dict):
      raise ValueError("no JSON object")
    return found
  except FileNotFoundError:
    return {}
  except (OSError, UserError, ValueError, RecursionError) as error:
    raise UserError(f"{path} is damaged ({error}); moved away, it is made anew") from error
