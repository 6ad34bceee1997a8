"""The tensors that PyTorch's pickles hold, found without running any of them.

A pickle is a program for a small stack machine, and Python's own machine lets it call anything. That of
`weights.pickle_machine` can do neither that nor import. Bytes are only ever reached through lengths and offsets that
were checked against the file's size.

Three files are read: the zip archives of torch.save (since 1.6) and of torch.jit.save (its modules as nested dicts, its
program unread), and the older pickles of torch.save that are followed by their storages.
"""

import io
import math
import os
import struct
import zipfile
from typing import Any, NamedTuple

from limber_jax.errors import UserError
from limber_jax.weights.pickle_machine import ITEMSIZES, Global, Machine, Refused, Storage, Tensor, kind_of, short

# What a file may hold besides its tensors. Of the weights this is for, GPT-J's pickle is the largest: 30 KB.
MAX_PICKLE = 16 << 20  # bytes of pickle
MAX_NAMES = 200_000    # tensors and other values, however often the same one is referred to
MAX_DEPTH = 32         # dicts in dicts


class View(NamedTuple):
  """Where a tensor's elements lie in its file; all of them do."""

  dtype: str                  # a name of numpy's, or "bfloat16"
  shape: tuple[int, ...]
  strides: tuple[int, ...]    # in elements
  offset: int                 # of the first element, in bytes from the start of the file


def tensors(path: str) -> dict[str, View]:
  """Returns the tensors of a file of torch.save or torch.jit.save by name.

  Names are the keys on the way to a tensor, joined by dots, a list's being its indices; what is no tensor is left out.

  Raises:
    UserError: the file asks for anything but tensors and plain values, lies about a size, or is no file of torch's.
    OSError, zipfile.BadZipFile: it cannot be read.
  """
  try:
    with open(path, "rb") as file:
      size = os.fstat(file.fileno()).st_size
      root, where = _archive(file, size) if zipfile.is_zipfile(file) else _legacy(file, size)
    found = _named(root)
    out = {}
    for name, tensor in found.items():
      _check(name, tensor, size)
      out[name] = View(tensor.storage.dtype, tensor.shape, tensor.strides,
                       where[tensor.storage.key] + tensor.offset * ITEMSIZES[tensor.storage.dtype])
    return out
  except Refused as error:
    raise UserError(f"{path}: {error}") from error


# Files


def _archive(file: Any, size: int) -> tuple[Any, dict[str, int]]:
  """Returns (the object, {storage: its bytes from the start of the file}) of a zip archive."""
  with zipfile.ZipFile(file) as archive:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
      if member.filename in members:
        raise Refused(f"two members are named {short(member.filename)}")
      members[member.filename] = member
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise Refused(f"a zip file with {len(pickles)} files data.pkl; torch.save writes one, in one folder")
    top = pickles[0].removesuffix("data.pkl")
    if members[pickles[0]].file_size > MAX_PICKLE:
      raise Refused(f"data.pkl is {members[pickles[0]].file_size} bytes; that of weights is below {MAX_PICKLE}")
    _stored(members[pickles[0]])
    order = members.get(f"{top}byteorder")
    if order is not None and order.file_size <= 16 and b"big" in archive.read(order):
      raise Refused("its tensors are big-endian; save them on a little-endian machine")
    machine = Machine(script=f"{top}constants.pkl" in members)
    root = machine.run(io.BytesIO(archive.read(pickles[0])))
    where = {}
    for key, storage in machine.storages.items():
      member = members.get(f"{top}data/{key}")
      if member is None:
        raise Refused(f"storage {short(key)} is not in the archive")
      _stored(member)
      if storage.count * ITEMSIZES[storage.dtype] > member.file_size:
        raise Refused(f"storage {short(key)} claims {storage.count} × {storage.dtype}, but has {member.file_size} "
                       "bytes")
      where[key] = _data_offset(file, member, size)
  return root, where


def _stored(member: zipfile.ZipInfo) -> None:
  """Raises if the member is compressed: torch's are not, and what is not cannot unpack to more than the file."""
  if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
    raise Refused(f"{short(member.filename)} is compressed or encrypted; what torch.save writes never is")


def _data_offset(file: Any, member: zipfile.ZipInfo, size: int) -> int:
  """Returns where the bytes of a stored member begin."""
  file.seek(member.header_offset)
  header = file.read(30)
  if len(header) != 30 or header[:4] != b"PK\3\4":
    raise Refused(f"{short(member.filename)} is not where the archive's directory says")
  name, extra = struct.unpack("<HH", header[26:])
  start = member.header_offset + 30 + name + extra
  if start + member.file_size > size:
    raise Refused(f"{short(member.filename)} reaches past the end of the file")
  return start


def _legacy(file: Any, size: int) -> tuple[Any, dict[str, int]]:
  """Returns what `_archive` does of the format before torch 1.6: five pickles, then each storage after its length."""
  file.seek(0)
  data = io.BytesIO(file.read(MAX_PICKLE))
  file.seek(257)
  if file.read(5) == b"ustar":
    raise Refused("a tar file, as torch wrote before 0.1.10; load it with torch and save it again")
  magic = Machine().run(data)
  if magic != 0x1950A86A20F9469CFC6C:
    raise Refused("a pickle, but not one that torch.save wrote; only those are read, and safetensors, npz and msgpack")
  if (version := Machine().run(data)) != 1001:
    raise Refused(f"torch.save's format {version if type(version) is int else '?'}; expected 1001")
  system = Machine().run(data)
  if not isinstance(system, dict) or system.get("little_endian") is not True:
    raise Refused("its tensors are not little-endian; save them on a little-endian machine")
  machine = Machine()
  root = machine.run(data)
  keys = Machine().run(data)
  if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
    raise Refused("its list of storages is not one of different names")
  where, at = {}, data.tell()
  for key in keys:
    storage = machine.storages.get(key)
    if storage is None:
      raise Refused(f"storage {short(key)} belongs to no tensor")
    file.seek(at)
    head = file.read(8)
    count = int.from_bytes(head, "little", signed=True)
    if len(head) != 8 or count != storage.count:
      raise Refused(f"storage {short(key)} claims {storage.count} elements, but has {count}")
    where[key] = at + 8
    at += 8 + count * ITEMSIZES[storage.dtype]
    if at > size:
      raise Refused(f"storage {short(key)} reaches past the end of the file")
  if missing := machine.storages.keys() - where.keys():
    raise Refused(f"storage {short(min(missing))} is not in the file")
  return root, where


def _check(name: str, tensor: Tensor, size: int) -> None:
  """Raises if a tensor reaches out of its storage, or takes more room than the file."""
  storage, offset, shape, strides = tensor
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if 0 in shape:
    last = offset - 1
  if last >= storage.count:
    raise Refused(f"{short(name)}: element {last} of a storage of {storage.count}")
  if math.prod(shape) * ITEMSIZES[storage.dtype] > size:
    raise Refused(f"{short(name)}: shape {shape} takes more than the whole file of {size} bytes")


# From nested values to names


def _named(root: Any) -> dict[str, Tensor]:
  out: dict[str, Tensor] = {}
  if not isinstance(root, dict | list | tuple) or isinstance(root, Global | Storage | Tensor):
    raise Refused(f"holds a {kind_of(root)}; expected tensors by name")
  _flatten(root, (), out, [MAX_NAMES])
  if not out:
    raise Refused("holds no tensors")
  return out


def _flatten(value: Any, path: tuple[str, ...], out: dict[str, Tensor], budget: list[int]) -> None:
  budget[0] -= 1
  if budget[0] < 0 or len(path) > MAX_DEPTH:
    raise Refused(f"holds more than {MAX_NAMES} values, or some nested more than {MAX_DEPTH} deep")
  if isinstance(value, Tensor):
    name = ".".join(path)
    if name in out:
      raise Refused(f"two tensors are named {short(name)}")
    out[name] = value
  elif isinstance(value, Global | Storage):
    pass
  elif isinstance(value, dict):
    for key, item in value.items():
      _flatten(item, (*path, str(key)), out, budget)
  elif isinstance(value, list | tuple):
    for i, item in enumerate(value):
      _flatten(item, (*path, str(i)), out, budget)
