"""A trained projection as one file: its tensors, and metadata that say which frozen weights it was trained between.

The file is safetensors; the metadata are JSON in its header, under "card". Any reader of safetensors opens it.
"""

import json
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from limber_jax.errors import UserError
from limber_jax.runtime.atomic import atomic_write

KEYS = ("encoder", "lm", "digests", "config", "step", "version")
PARTS = {"image": "image encoder", "lm": "language model"}


def save(path: str, params: dict[str, Any], metadata: dict[str, Any]) -> None:
  """Writes the file `path`, whole or not at all.

  Args:
    path: of the file; one that is there is replaced.
    params: of the part "prompt"; written in float32.
    metadata: plain JSON with the keys
      "encoder", "lm": what they are, a name or sizes,
      "digests": {"image": …, "lm": …}, the `digest` of their frozen weights,
      "config": the experiment, "step": of the checkpoint, "version": of limber_jax.

  Raises:
    UserError: `path` cannot be written, or the metadata is not such.
  """
  _check_metadata(metadata, path)
  flat = flax.traverse_util.flatten_dict(jax.device_get(params), sep="/")
  tensors = {name: np.array(x, np.float32, order="C") for name, x in flat.items()}
  try:
    text = json.dumps(metadata, allow_nan=False)
  except (TypeError, ValueError) as error:
    raise UserError(f"{path}: the metadata is not plain JSON ({error})") from error
  with atomic_write(path, "wb") as file:
    # "format" is what readers of PyTorch's files ask for.
    file.write(serialize(tensors, metadata={"format": "pt", "card": text}))


def load(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns (params, metadata) of a file that `save` wrote: float32 numpy arrays.

  Raises:
    UserError: no such file, or another one.
  """
  try:
    with safe_open(path, framework="np") as file:
      metadata = (file.metadata() or {}).get("card")
      flat = {name: file.get_tensor(name) for name in file.keys()} if metadata else {}  # noqa: SIM118 (no mapping)
    metadata = json.loads(metadata) if metadata else None
  except (OSError, SafetensorError, ValueError, RecursionError) as error:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    raise UserError(f"{path}: no projection can be read there ({reason})") from error
  if metadata is None:
    raise UserError(f"{path}: a safetensors file, but not a projection: it has no metadata of one")
  _check_metadata(metadata, path)
  for name, x in flat.items():
    if x.dtype != np.float32:
      raise UserError(f"{path}: {name}: expected float32, got {x.dtype}")
  return flax.traverse_util.unflatten_dict(flat, sep="/"), metadata


def check(metadata: dict[str, Any], digests: dict[str, str], path: str) -> None:
  """Raises UserError if the frozen weights at hand are not those that the projection was trained between.

  Args:
    metadata: as `load` returns it.
    digests: {"image": …, "lm": …} of the weights at hand; a part left out is not compared.
    path: of the projection, for the message.
  """
  for part, got in digests.items():
    want = metadata["digests"][part]
    if got != want:
      what = metadata["encoder" if part == "image" else "lm"]
      named = f" ({what})" if isinstance(what, str) else ""
      raise UserError(f"{path} was trained on another {PARTS[part]}{named}: the weights of {part!r} have the digest "
                      f"{got}, expected {want}")


def _check_metadata(metadata: Any, path: str) -> None:
  for key in KEYS:
    if not isinstance(metadata, dict) or key not in metadata:
      raise UserError(f"{path}: its metadata have no {key!r}; expected {', '.join(KEYS)}")
  digests = metadata["digests"]
  if not isinstance(digests, dict) or digests.keys() != PARTS.keys() or not all(
      isinstance(value, str) for value in digests.values()):
    raise UserError(f"{path}: its metadata's digests are not those of {' and '.join(PARTS)}")
