"""What lies beside weights and is no weight: a tokenizer's files, and settings of how texts and images are read."""

import os
from collections.abc import Iterator
from typing import Any

from limber_jax.errors import UserError
from limber_jax.runtime import inputs
from limber_jax.runtime.atomic import atomic_write
from limber_jax.weights import load, names
from limber_jax.weights.configs import naming, read_json

TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def keep(source: str, destination: str, to: str) -> Iterator[str]:
  """Copies the tokenizer beside converted weights; yields a line of what was copied, and of each thing that is lost.

  Args:
    source: the weights, as of `load.load`.
    destination: the directory that `export.save` wrote.
    to: its format.

  Raises:
    UserError: a file beside the weights cannot be read, or not be written.
  """
  file, _ = names.split(source)
  folder = file if os.path.isdir(file) else os.path.dirname(file)
  tokenizer = load.own_tokenizer(source)
  if tokenizer.name != "clip":
    path = f" --tokenizer_path={tokenizer.path}" if tokenizer.path else ""
    yield (f"--to={to}: not kept: its tokenizer {tokenizer.name!r}, which no other library has; use it with "
           f"--tokenizer={tokenizer.name}{path}")
  elif os.path.isdir(tokenizer.path or os.curdir) and tokenizer.path:
    if copied := [name for name in TOKENIZER if _copy(tokenizer.path, destination, name)]:
      yield f"{destination}: the tokenizer of {tokenizer.path}: {', '.join(copied)}"
  elif tokenizer.path:
    yield f"--to={to}: not kept: its tokenizer; use it with --tokenizer_path={tokenizer.path}"
  yield from (f"--to={to}: not kept: {what}" for what in _lost(folder))


def _copy(folder: str, destination: str, name: str) -> bool:
  """Returns whether there was such a file to copy."""
  path = os.path.join(folder, name)
  if not os.path.lexists(path):
    return False
  with naming(path):
    data = inputs.read(path, inputs.TOKENIZER)
  try:
    with atomic_write(os.path.join(destination, name), "wb") as file:
      file.write(data)
  except OSError as error:
    raise UserError(f"{destination}: cannot write there ({error.strerror})") from error
  return True


def _lost(folder: str) -> Iterator[str]:
  """Yields what a directory says of texts and images that no converted model can hold."""
  config = os.path.join(folder, "open_clip_config.json")
  if os.path.isfile(config):
    with naming(config):
      text = (read_json(config).get("model_cfg") or {}).get("text_cfg") or {}
    yield from (f"text_cfg.{name}={value!r:.100}" for name, value in text.items()
                if value and (name.startswith("tokenizer_") or name == "hf_tokenizer_name"))
  run: dict[str, Any] = {}
  config = os.path.join(folder, "config.json")
  if os.path.isfile(config):
    with naming(config):
      run = read_json(config)
  if run.get("data.exif"):
    yield "data.exif=true; give --exif wherever the model is used here, and turn images before any other library's"
  if run.get("data.formats"):
    yield f"data.formats={','.join(run['data.formats'])}; give --formats wherever the model is used here"
