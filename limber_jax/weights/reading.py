"""The tensors of a path: of one file, or of the first file or set of shards that a directory has."""

import functools
import os
import sys

import jax

from limber_jax.errors import UserError
from limber_jax.weights import files, names
from limber_jax.weights.configs import naming, read_json

OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors",
                   "open_clip_pytorch_model.bin")
HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def check_exists(path: str) -> None:
  """Raises UserError if nothing is at `path`, or it chooses among the sets of weights of a directory."""
  file, key = names.split(path)
  if key and os.path.isdir(file):
    raise UserError(f"{path}: {file} is a directory; #{key} chooses among the sets of weights in a file")
  if not os.path.exists(file):
    raise UserError(f"{path}: no such file or directory; weights are read from disk, and a model of the Hugging Face "
                    f"hub is brought there by `hf download NAME --local-dir DIRECTORY`")


def read_tensors(path: str) -> dict[str, files.Tensor]:
  """Returns the tensors of a file by their model's own names, and says what was taken off them."""
  tensors, line = names.weights(path)
  if line:
    say(line)
  return tensors


@functools.cache  # the parts of a model are read one by one, and the line is for all of them
def say(line: str) -> None:
  """Prints a line to stderr, once, from process 0."""
  if jax.process_index() == 0:
    print(line, file=sys.stderr, flush=True)


def find_tensors(path: str, names: tuple[str, ...]) -> dict[str, files.Tensor] | None:
  """Returns the tensors of the first of these files that is in the directory, or of the shards it lists."""
  for name in names:
    if os.path.isfile(file := os.path.join(path, name)):
      return _shards(path, file) if name.endswith(".index.json") else read_tensors(file)
  return None


def _shards(path: str, index: str) -> dict[str, files.Tensor]:
  with naming(index):
    where = dict(read_json(index)["weight_map"])
    for file in set(where.values()):
      if os.path.basename(file) != file:
        raise UserError(f"weight_map points outside of the directory: {file!r}")
  shards = {file: files.tensors(os.path.join(path, file)) for file in sorted(set(where.values()))}
  for name, file in where.items():
    if name not in shards[file]:
      raise UserError(f"{index}: {name!r} is not in {file}")
  return names.unwrap({name: shards[file][name] for name, file in where.items()}, index)[0]
