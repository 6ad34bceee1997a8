"""Tensors in files: safetensors and npz, never a pickle. Names and shapes first, each tensor when it is asked for."""

import functools
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError, safe_open

from limber_jax.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Tensor:
  """A tensor in a file, read when np.asarray is called on it."""

  shape: tuple[int, ...]
  dtype: str
  read: Callable[[], np.ndarray]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # always one
    return np.asarray(self.read(), dtype)


def tensors(path: str) -> dict[str, Tensor]:
  """Returns the tensors of a safetensors or npz file by name, not yet read.

  The format is taken from the content, so a renamed pickle is still refused.

  Raises:
    UserError: no such file, a pickle, or a damaged file.
  """
  try:
    with open(path, "rb") as file:
      head = file.read(9)
    if head[8:] == b"{":
      return _safetensors(path)
    if zipfile.is_zipfile(path):
      return _npz(path)
  except SafetensorError as error:
    raise UserError(f"{path}: not a whole safetensors file ({error})") from error
  except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
    raise UserError(f"{path}: not a whole npz file ({error})") from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  if head[:1] == b"\x80" or path.endswith(PICKLES):
    raise UserError(refusal(path))
  raise UserError(f"{path}: neither a safetensors nor an npz file")


def refusal(path: str) -> str:
  """Returns why the file at `path` is not opened, and what to do."""
  return (f"{path}: a pickle, and opening one runs whatever code it carries; only safetensors and npz are read. If you "
          "trust it, convert it by safetensors.torch.save_file(torch.load(path, weights_only=True), 'x.safetensors')"
          "; the state dict of an archive of OpenAI's is torch.jit.load(path).state_dict()")


def _safetensors(path: str) -> dict[str, Tensor]:
  numpy_names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
  handle = safe_open(path, framework="np")
  out = {}
  for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
    part = handle.get_slice(name)
    dtype = part.get_dtype()
    out[name] = Tensor(tuple(part.get_shape()), numpy_names.get(dtype, dtype),
                       functools.partial(handle.get_tensor, name))
  return out


def _npz(path: str) -> dict[str, Tensor]:
  """Reads the header of each array. What an array unpacks to is known before it is unpacked."""
  out = {}
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
    if not all(m.filename.endswith(".npy") for m in members):
      raise UserError(refusal(path) if any(m.filename.endswith(".pkl") for m in members)
                      else f"{path}: a zip file, but not an npz")
    if sum(m.file_size for m in members) > 100 * os.path.getsize(path):
      raise UserError(f"{path}: unpacks to more than 100 times its size; trained weights do not")
    for member in members:
      with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
          raise ValueError(f"{member.filename} has version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
          raise UserError(refusal(f"{path}/{member.filename}"))
        if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
          raise ValueError(f"{member.filename} is {member.file_size} bytes, not what its shape {shape} takes")
      out[member.filename[:-4]] = Tensor(shape, str(dtype), functools.partial(_read_npy, path, member.filename))
  return out


def _read_npy(path: str, member: str) -> np.ndarray:
  try:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
      return np.lib.format.read_array(file, allow_pickle=False)
  except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
    raise UserError(f"{member} is damaged ({error})") from error
