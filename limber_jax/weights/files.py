"""Tensors in files: safetensors, npz, PyTorch's pickles and Flax's msgpack, none of which can run code here.

Names and shapes come first, and each tensor is read when it is asked for. What lies in a file as it is in memory is
mapped, so that of a slice only its own bytes are read.
"""

import functools
import json
import math
import mmap
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from limber_jax.errors import UserError
from limber_jax.runtime import inputs
from limber_jax.weights import pickles

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MAX_DEPTH = 32         # maps in maps of a msgpack file
MAX_VALUES = 1_000_000  # its values


@dataclass(frozen=True)
class Tensor:
  """A tensor in a file, read when np.asarray is called on it."""

  shape: tuple[int, ...]
  dtype: str
  view: Callable[[], np.ndarray]  # read-only, in any order in memory, and on the file itself where that is possible

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy  # always one
    return np.array(self.view(), dtype, order="C")


def tensors(path: str) -> dict[str, Tensor]:
  """Returns the tensors of a file by name, not yet read.

  The format is taken from the content: a file is what it holds, whatever its name. Names are those in the file; of a
  pickle as `pickles.tensors` says, of msgpack the keys joined by slashes.

  Raises:
    UserError: no such file, of another format, damaged, or a pickle that asks for anything but tensors.
  """
  what = "safetensors"
  try:
    with inputs.opened(path) as file:
      head = file.read(9)
    if head[8:] == b"{":
      return _safetensors(path)
    if zipfile.is_zipfile(path):
      what = "zip"
      return _zip(path)
    if head[:1] == b"\x80" or path.endswith(PICKLES):
      what = "pickle"
      return _pickle(path)
    if head and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
      what = "msgpack"
      return _Msgpack(path).tensors()
  except SafetensorError as error:
    raise UserError(f"{path}: not a whole safetensors file ({error!s:.300})") from error
  except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
    raise UserError(f"{path}: not a whole {what} file ({error!s:.300})") from error  # it may quote the file
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  raise UserError(f"{path}: none of safetensors, npz, torch.save and msgpack")


def mapped(path: str, offset: int, dtype: str, shape: tuple[int, ...],
           strides: tuple[int, ...] | None = None) -> np.ndarray:
  """Returns a read-only array on the bytes of a file; memory holds only what of it is looked at.

  Args:
    path: a file that shall not change meanwhile.
    offset: bytes before the first element.
    dtype: a name of numpy's, or "bfloat16".
    shape: of the array.
    strides: in elements; None for row-major.
  """
  kind = np.dtype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
  if 0 in shape:
    return np.zeros(shape, kind)
  if strides is None:
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
  span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))  # elements
  try:
    flat = np.memmap(path, np.uint8, "r", offset, (span * kind.itemsize,)).view(np.ndarray).view(kind)
  except (OSError, ValueError) as error:
    raise UserError(f"{path}: cannot be read ({error})") from error
  return np.lib.stride_tricks.as_strided(flat, shape, tuple(kind.itemsize * n for n in strides), writeable=False)


def _safetensors(path: str) -> dict[str, Tensor]:
  numpy_names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
  handle = safe_open(path, framework="np")  # checks that all offsets fit the shapes and the file
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  out = {}
  for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
    shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
    if dtype in numpy_names:
      view = functools.partial(mapped, path, 8 + length + header[name]["data_offsets"][0], numpy_names[dtype], shape)
    else:
      view = functools.partial(handle.get_tensor, name)
    out[name] = Tensor(shape, numpy_names.get(dtype, dtype), view)
  return out


def _pickle(path: str) -> dict[str, Tensor]:
  return {name: Tensor(view.shape, view.dtype,
                       functools.partial(mapped, path, view.offset, view.dtype, view.shape, view.strides))
          for name, view in pickles.tensors(path).items()}


def _zip(path: str) -> dict[str, Tensor]:
  """Reads an archive of PyTorch's, or the header of each array of an npz: its size is known before it is unpacked."""
  out = {}
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
    if any(m.filename.endswith(".pkl") for m in members):
      return _pickle(path)
    if not all(m.filename.endswith(".npy") for m in members):
      raise UserError(f"{path}: a zip file, but neither an npz nor one of torch.save")
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
          raise UserError(f"{path}/{member.filename}: holds Python objects, as a pickle that could run any code; only "
                          "arrays of numbers are read")
        if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
          raise ValueError(f"{member.filename} is {member.file_size} bytes, not what its shape {shape} takes")
      out[member.filename[:-4]] = Tensor(shape, str(dtype), functools.partial(_read_npy, path, member.filename))
  return out


def _read_npy(path: str, member: str) -> np.ndarray:
  try:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
      return np.lib.format.read_array(file, allow_pickle=False)
  except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
    raise UserError(f"{member:.100} is damaged ({error!s:.300})") from error


# Of msgpack: the first byte of a number -> how it is packed; of something with a length -> (what, bytes of the length).
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h",
            0xD2: ">i", 0xD3: ">q"}
_SIZED = {0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xC7: ("ext", 1), 0xC8: ("ext", 2), 0xC9: ("ext", 4),
          0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("array", 2), 0xDD: ("array", 4),
          0xDE: ("map", 2), 0xDF: ("map", 4)}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32",
           "uint16", "uint8", "bool")


class _Msgpack:
  """Finds the arrays of a file of flax.serialization, without reading them.

  It is a map of maps, and each array an extension of type 1 that holds, packed again, (shape, dtype, bytes). An array
  above 1 GiB is a map {"__msgpack_chunked_array__": True, "shape": {"0": …}, "chunks": {"0": …}} of flat arrays.
  """

  def __init__(self, path: str):
    self._path, self._at, self._left = path, 0, MAX_VALUES

  def tensors(self) -> dict[str, Tensor]:
    """Returns the arrays by their keys, joined by slashes; raises ValueError at what flax does not write."""
    with open(self._path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
      tree = self._value(0)
      if self._at != len(self._data):
        raise ValueError(f"{len(self._data) - self._at} bytes after its end")
    out: dict[str, Tensor] = {}
    self._flatten(tree, "", out)
    if not out:
      raise ValueError("no arrays in it")
    return out

  def _bytes(self, count: int) -> bytes:
    self._skip(count)
    return self._data[self._at - count : self._at]

  def _skip(self, count: int) -> None:
    if self._at + count > len(self._data):
      raise ValueError(f"{count} bytes announced at {self._at}, {len(self._data) - self._at} are there")
    self._at += count

  def _head(self) -> tuple[str, Any]:
    """Returns (kind, length) of what comes next, or ("value", it)."""
    b = self._bytes(1)[0]
    for first, last, kind in ((0x80, 0x8F, "map"), (0x90, 0x9F, "array"), (0xA0, 0xBF, "str")):
      if first <= b <= last:
        return kind, b - first
    if b <= 0x7F or b >= 0xE0:
      return "value", b if b <= 0x7F else b - 0x100
    if b in (0xC0, 0xC2, 0xC3):
      return "value", {0xC0: None, 0xC2: False, 0xC3: True}[b]
    if b in _NUMBERS:
      return "value", struct.unpack(_NUMBERS[b], self._bytes(struct.calcsize(_NUMBERS[b])))[0]
    if 0xD4 <= b <= 0xD8:
      return "ext", 1 << (b - 0xD4)
    if b not in _SIZED:
      raise ValueError(f"byte {b:#x} at {self._at - 1} begins nothing")
    kind, width = _SIZED[b]
    return kind, int.from_bytes(self._bytes(width), "big")

  def _value(self, depth: int) -> Any:
    self._left -= 1
    if depth > MAX_DEPTH or self._left < 0:
      raise ValueError(f"more than {MAX_VALUES} values, or some nested more than {MAX_DEPTH} deep")
    kind, n = self._head()
    if kind == "value":
      return n
    if kind == "str":
      return self._bytes(n).decode()
    if kind == "array":
      return [self._value(depth + 1) for _ in range(n)]
    if kind == "map":
      out = {}
      for _ in range(n):
        key = self._value(depth + 1)
        if not isinstance(key, str) or key in out:
          raise ValueError(f"{key!r:.100} for a key, or twice")
        out[key] = self._value(depth + 1)
      return self._chunked(out) if "__msgpack_chunked_array__" in out else out
    if kind == "bin":
      self._skip(n)
      return None
    code = self._bytes(1)[0]
    if code not in (1, 3):  # an array, and a scalar of numpy's
      raise ValueError(f"extension {code} at {self._at}; those of arrays are 1 and 3")
    end = self._at + n
    array = self._array()
    if self._at != end:
      raise ValueError(f"an array that ends at {self._at} in place of {end}")
    return array

  def _array(self) -> Tensor:
    if self._head() != ("array", 3):
      raise ValueError(f"no array at {self._at}")
    kind, n = self._head()
    if kind != "array" or n > 32:
      raise ValueError(f"no shape at {self._at}")
    shape = tuple(self._head() for _ in range(n))
    kinds = [kind for kind, _ in shape]
    shape = tuple(n for _, n in shape)
    if any(kind != "value" for kind in kinds) or not all(type(n) is int and n >= 0 for n in shape):
      raise ValueError(f"no shape at {self._at}")
    kind, n = self._head()
    dtype = self._bytes(n).decode("ascii", "replace") if kind in ("str", "bin") and n <= 32 else kind
    if dtype not in _DTYPES:
      raise ValueError(f"an array of {dtype!r}")
    kind, n = self._head()
    itemsize = 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize
    if kind != "bin" or n != math.prod(shape) * itemsize:
      raise ValueError(f"an array of shape {shape} and {dtype} with {n} bytes")
    at = self._at
    self._skip(n)
    return Tensor(shape, dtype, functools.partial(mapped, self._path, at, dtype, shape))

  def _chunked(self, value: dict[str, Any]) -> Tensor:
    sizes, chunks = value.get("shape"), value.get("chunks")
    if not isinstance(sizes, dict) or not isinstance(chunks, dict) or not chunks:
      raise ValueError("a chunked array without shape or chunks")
    shape = tuple(sizes.get(str(i)) for i in range(len(sizes)))
    parts = [chunks.get(str(i)) for i in range(len(chunks))]
    if not (all(type(n) is int and n >= 0 for n in shape) and all(isinstance(part, Tensor) for part in parts)
            and len({part.dtype for part in parts}) == 1 and all(len(part.shape) == 1 for part in parts)
            and sum(part.shape[0] for part in parts) == math.prod(shape)):
      raise ValueError(f"a chunked array whose chunks do not make up its shape {shape}")
    return Tensor(shape, parts[0].dtype, functools.partial(_join, parts, shape))

  def _flatten(self, value: Any, path: str, out: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
      if path in out:
        raise ValueError(f"two arrays are named {path}")
      out[path] = value
    elif isinstance(value, dict):
      for key, item in value.items():
        self._flatten(item, f"{path}/{key}" if path else key, out)


def _join(parts: list[Tensor], shape: tuple[int, ...]) -> np.ndarray:
  """Returns the array whose flat pieces are `parts`, with one of them in sight at a time."""
  out = None
  at = 0
  for part in parts:
    piece = part.view()
    if out is None:
      out = np.empty(math.prod(shape), piece.dtype)
    out[at : at + piece.size] = piece
    at += piece.size
  return out.reshape(shape)
