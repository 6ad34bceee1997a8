"""The tensors that PyTorch's pickles hold, found without running any of them.

A pickle is a program for a small stack machine, and Python's own machine lets it call anything. The machine below has
the same stack and the same memory, but knows neither how to import nor how to call: a fixed list of names stands for
records of its own, and whatever else a file asks for is refused by name. Bytes are only ever reached through lengths
and offsets that were checked against the file's size.

Three files are read: the zip archives of torch.save (since 1.6) and of torch.jit.save (its modules as nested dicts, its
program unread), and the older pickles of torch.save that are followed by their storages.
"""

import io
import math
import os
import pickletools
import struct
import warnings
import zipfile
from typing import Any, NamedTuple

from limber_jax.errors import UserError

# What a file may hold besides its tensors. Of the weights this is for, GPT-J's pickle is the largest: 30 KB.
MAX_PICKLE = 16 << 20  # bytes of pickle
MAX_STEPS = 4_000_000  # its opcodes
MAX_NAMES = 200_000    # tensors and other values, however often the same one is referred to
MAX_DEPTH = 32         # dicts in dicts


class View(NamedTuple):
  """Where a tensor's elements lie in its file; all of them do."""

  dtype: str                  # a name of numpy's, or "bfloat16"
  shape: tuple[int, ...]
  strides: tuple[int, ...]    # in elements
  offset: int                 # of the first element, in bytes from the start of the file


class _Refused(ValueError):
  """What is wrong with a pickle; `tensors` puts the file's name before it."""


class _Global(NamedTuple):
  name: str  # one that is known here; it is never looked up


class _Storage(NamedTuple):
  dtype: str
  key: str
  count: int  # elements


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int  # in elements
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class _Ordered(dict):
  """An OrderedDict of the file's: the only thing that may be given attributes (a state dict's versions), unread."""


class _Module(dict):
  """A module of a TorchScript archive."""


_DTYPES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Int": "int32",
           "Long": "int64", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
_STORAGES = {f"{module}.{name}Storage": dtype for module in ("torch", "torch.storage") for name, dtype in
             _DTYPES.items()} | {"torch.storage.UntypedStorage": "uint8"}
_ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int32": 4, "int64": 8, "int16": 2, "int8": 1,
              "uint8": 1, "bool": 1}
_CALLS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
# In TorchScript's pickles alone: typed lists and dicts, whose first argument is the value.
_SCRIPT_CALLS = tuple(f"torch.jit._pickle.{name}" for name in (
  "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"))

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
             "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_MARK = object()


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
                       where[tensor.storage.key] + tensor.offset * _ITEMSIZES[tensor.storage.dtype])
    return out
  except _Refused as error:
    raise UserError(f"{path}: {error}") from error


# Files


def _archive(file: Any, size: int) -> tuple[Any, dict[str, int]]:
  """Returns (the object, {storage: its bytes from the start of the file}) of a zip archive."""
  with zipfile.ZipFile(file) as archive:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
      if member.filename in members:
        raise _Refused(f"two members are named {_short(member.filename)}")
      members[member.filename] = member
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise _Refused(f"a zip file with {len(pickles)} files data.pkl; torch.save writes one, in one folder")
    top = pickles[0].removesuffix("data.pkl")
    if members[pickles[0]].file_size > MAX_PICKLE:
      raise _Refused(f"data.pkl is {members[pickles[0]].file_size} bytes; that of weights is below {MAX_PICKLE}")
    _stored(members[pickles[0]])
    order = members.get(f"{top}byteorder")
    if order is not None and order.file_size <= 16 and b"big" in archive.read(order):
      raise _Refused("its tensors are big-endian; save them on a little-endian machine")
    machine = _Machine(script=f"{top}constants.pkl" in members)
    root = machine.run(io.BytesIO(archive.read(pickles[0])))
    where = {}
    for key, storage in machine.storages.items():
      member = members.get(f"{top}data/{key}")
      if member is None:
        raise _Refused(f"storage {_short(key)} is not in the archive")
      _stored(member)
      if storage.count * _ITEMSIZES[storage.dtype] > member.file_size:
        raise _Refused(f"storage {_short(key)} claims {storage.count} × {storage.dtype}, but has {member.file_size} "
                       "bytes")
      where[key] = _data_offset(file, member, size)
  return root, where


def _stored(member: zipfile.ZipInfo) -> None:
  """Raises if the member is compressed: torch's are not, and what is not cannot unpack to more than the file."""
  if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
    raise _Refused(f"{_short(member.filename)} is compressed or encrypted; what torch.save writes never is")


def _data_offset(file: Any, member: zipfile.ZipInfo, size: int) -> int:
  """Returns where the bytes of a stored member begin."""
  file.seek(member.header_offset)
  header = file.read(30)
  if len(header) != 30 or header[:4] != b"PK\3\4":
    raise _Refused(f"{_short(member.filename)} is not where the archive's directory says")
  name, extra = struct.unpack("<HH", header[26:])
  start = member.header_offset + 30 + name + extra
  if start + member.file_size > size:
    raise _Refused(f"{_short(member.filename)} reaches past the end of the file")
  return start


def _legacy(file: Any, size: int) -> tuple[Any, dict[str, int]]:
  """Returns what `_archive` does of the format before torch 1.6: five pickles, then each storage after its length."""
  file.seek(0)
  data = io.BytesIO(file.read(MAX_PICKLE))
  file.seek(257)
  if file.read(5) == b"ustar":
    raise _Refused("a tar file, as torch wrote before 0.1.10; load it with torch and save it again")
  magic = _Machine().run(data)
  if magic != 0x1950A86A20F9469CFC6C:
    raise _Refused("a pickle, but not one that torch.save wrote; only those are read, and safetensors, npz and msgpack")
  if (version := _Machine().run(data)) != 1001:
    raise _Refused(f"torch.save's format {version if type(version) is int else '?'}; expected 1001")
  system = _Machine().run(data)
  if not isinstance(system, dict) or system.get("little_endian") is not True:
    raise _Refused("its tensors are not little-endian; save them on a little-endian machine")
  machine = _Machine()
  root = machine.run(data)
  keys = _Machine().run(data)
  if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
    raise _Refused("its list of storages is not one of different names")
  where, at = {}, data.tell()
  for key in keys:
    storage = machine.storages.get(key)
    if storage is None:
      raise _Refused(f"storage {_short(key)} belongs to no tensor")
    file.seek(at)
    head = file.read(8)
    count = int.from_bytes(head, "little", signed=True)
    if len(head) != 8 or count != storage.count:
      raise _Refused(f"storage {_short(key)} claims {storage.count} elements, but has {count}")
    where[key] = at + 8
    at += 8 + count * _ITEMSIZES[storage.dtype]
    if at > size:
      raise _Refused(f"storage {_short(key)} reaches past the end of the file")
  if missing := machine.storages.keys() - where.keys():
    raise _Refused(f"storage {_short(min(missing))} is not in the file")
  return root, where


# The machine


class _Machine:
  """Runs one pickle over records of our own."""

  def __init__(self, script: bool = False):
    self.storages: dict[str, _Storage] = {}
    self._script = script  # a TorchScript archive: names below __torch__ are modules
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self, file: io.BytesIO) -> Any:
    """Returns the object that the pickle at the file's position builds; the position is then after it."""
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pickletools' about strange escapes in a damaged name
        return self._run(file)
    except _Refused:
      raise
    # A broken pickle takes from an empty stack, asks for a memo that was never made, or is no pickle at all.
    except (ValueError, IndexError, KeyError, TypeError, struct.error, UnicodeError, OverflowError) as error:
      raise _Refused(f"not a whole pickle ({_short(str(error))})") from error

  def _run(self, file: io.BytesIO) -> Any:
    stack, memo = self._stack, self._memo
    for steps, (opcode, arg, _) in enumerate(pickletools.genops(file)):  # which parses, and runs nothing
      op = opcode.name
      if steps > MAX_STEPS:
        raise _Refused(f"a pickle of more than {MAX_STEPS} steps")
      if op in _LITERALS:
        stack.append(arg)
      elif op in _CONSTANTS:
        stack.append(_CONSTANTS[op])
      elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[arg] = self._top()
      elif op == "MEMOIZE":
        memo[len(memo)] = self._top()
      elif op in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[arg])
      elif op == "MARK":
        stack.append(_MARK)
      elif op == "POP":
        stack.pop()
      elif op == "POP_MARK":
        self._since_mark()
      elif op == "DUP":
        stack.append(self._top())
      elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
        stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op]())
      elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack.append(tuple(self._take(int(op[-1]))))
      elif op == "TUPLE":
        stack.append(tuple(self._since_mark()))
      elif op == "LIST":
        stack.append(self._since_mark())
      elif op == "DICT":
        items = self._since_mark()
        stack.append({})
        self._set(items)
      elif op in ("APPEND", "APPENDS"):
        items = self._take(1) if op == "APPEND" else self._since_mark()
        if type(self._top()) is not list:
          raise _Refused(f"appends to a {_kind(self._top())}")
        self._top().extend(items)
      elif op in ("SETITEM", "SETITEMS"):
        self._set(self._take(2) if op == "SETITEM" else self._since_mark())
      elif op == "GLOBAL":
        stack.append(self._global(*arg.split(" ", 1)))
      elif op == "STACK_GLOBAL":
        module, name = self._take(2)
        if type(module) is not str or type(name) is not str:
          raise _Refused(f"imports a {_kind(module)} and a {_kind(name)}, which no pickle of torch's does")
        stack.append(self._global(module, name))
      elif op == "REDUCE":
        function, args = self._take(2)
        stack.append(self._call(function, args))
      elif op == "NEWOBJ":
        cls, args = self._take(2)
        if not (isinstance(cls, _Global) and cls.name.startswith("__torch__.")) or args != ():
          raise _Refused(f"makes an object of {_kind(cls)}, which only code could do; {_ADVICE}")
        stack.append(_Module())
      elif op == "BUILD":
        target, state = self._top(-2), stack.pop()
        if isinstance(target, _Module) and type(state) is dict:
          target.update(state)
        elif not (isinstance(target, _Ordered) and type(state) is dict):
          raise _Refused(f"sets the state of a {_kind(target)} by BUILD, which only code could do; {_ADVICE}")
      elif op == "BINPERSID":
        stack.append(self._storage(stack.pop()))
      elif op == "INST":
        raise _Refused(f"makes an object of {_dotted(*arg.split(' ', 1))} by INST, which only code could do; {_ADVICE}")
      elif op in ("PROTO", "FRAME"):
        pass
      elif op == "STOP":
        root = stack.pop()
        if stack or root is _MARK:
          raise _Refused("a pickle that leaves more than one object")
        return root
      else:  # among them OBJ, NEWOBJ_EX, PERSID, EXT1, bytes and sets
        raise _Refused(f"uses the opcode {op}, which no file of weights needs; {_ADVICE}")
    raise _Refused("a pickle without an end")

  def _top(self, index: int = -1) -> Any:
    if self._stack[index] is _MARK:
      raise _Refused("a pickle that takes its own mark for a value")
    return self._stack[index]

  def _take(self, count: int) -> list[Any]:
    items = self._stack[-count:]
    if len(items) != count or any(item is _MARK for item in items):
      raise _Refused("a pickle that takes more from its stack than there is")
    del self._stack[-count:]
    return items

  def _since_mark(self) -> list[Any]:
    at = len(self._stack) - 1
    while at >= 0 and self._stack[at] is not _MARK:
      at -= 1
    if at < 0:
      raise _Refused("a pickle that asks for a mark it never set")
    items = self._stack[at + 1 :]
    del self._stack[at:]
    return items

  def _set(self, items: list[Any]) -> None:
    target = self._top()
    if type(target) not in (dict, _Ordered):
      raise _Refused(f"sets an item of a {_kind(target)}")
    if len(items) % 2:
      raise _Refused("a dict with a key but no value")
    _update(target, zip(items[::2], items[1::2], strict=True))

  def _global(self, module: str, name: str) -> _Global:
    full = _dotted(module, name)
    if not (full in _STORAGES or full in _CALLS or (self._script and (full.startswith("__torch__.")
                                                                      or full in _SCRIPT_CALLS))):
      raise _Refused(f"holds {_short(full)}, which only code could use; {_ADVICE}")
    return _Global(full)

  def _storage(self, pid: Any) -> _Storage:
    if not (type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[1], _Global)
            and pid[1].name in _STORAGES and type(pid[2]) is str and type(pid[3]) is str and type(pid[4]) is int
            and pid[4] >= 0 and pid[5:] in ((), (None,))):
      what = f"kind {_short(pid[0])}" if type(pid) is tuple and pid and type(pid[0]) is str else f"a {_kind(pid)}"
      raise _Refused(f"refers to something outside of it that is no storage of torch's ({what})")
    storage = _Storage(_STORAGES[pid[1].name], pid[2], pid[4])
    if self.storages.setdefault(storage.key, storage) != storage:
      raise _Refused(f"storage {_short(storage.key)} is said to be of two types or lengths")
    return storage

  def _call(self, function: Any, args: Any) -> Any:
    if not isinstance(function, _Global) or type(args) is not tuple:
      raise _Refused(f"calls a {_kind(function)}, which only code could do; {_ADVICE}")
    match function.name:
      case "collections.OrderedDict" if not args:
        return _Ordered()
      case "collections.OrderedDict" if len(args) == 1 and type(args[0]) is list and all(
          type(pair) in (list, tuple) and len(pair) == 2 for pair in args[0]):
        out = _Ordered()
        _update(out, args[0])
        return out
      case "torch._utils._rebuild_tensor_v2" if len(args) in (6, 7) and not any(args[5:]):
        return _tensor(*args[:4])
      case "torch._utils._rebuild_parameter" if len(args) == 3 and isinstance(args[0], _Tensor) and not args[2]:
        return args[0]
      case name if name in _SCRIPT_CALLS and args:
        return args[0]
    raise _Refused(f"calls {_short(function.name)} with arguments that torch.save does not write; {_ADVICE}")


_ADVICE = "weights need none of that, and nothing of the file was run"


def _dotted(module: str, name: str) -> str:
  return f"{module}.{name}"


def _update(target: dict, pairs: Any) -> None:
  for key, value in pairs:
    # Small whole numbers, because large ones can be chosen to share one hash, and tuples to take forever to hash.
    if not (type(key) is str or (type(key) is int and abs(key) < 1 << 31)):
      raise _Refused(f"a dict with a {_kind(key)} for a key")
    target[key] = value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor:
  def whole(values):
    return type(values) is tuple and len(values) <= 32 and all(type(n) is int and 0 <= n < 1 << 62 for n in values)

  if not isinstance(storage, _Storage):
    raise _Refused(f"a tensor over a {_kind(storage)} in place of a storage")
  if not (whole((offset,)) and whole(shape) and whole(strides) and len(shape) == len(strides)):
    raise _Refused(f"a tensor of storage {_short(storage.key)} whose offset, shape or strides are not whole numbers "
                   "from 0 up")
  return _Tensor(storage, offset, shape, strides)


def _check(name: str, tensor: _Tensor, size: int) -> None:
  """Raises if a tensor reaches out of its storage, or takes more room than the file."""
  storage, offset, shape, strides = tensor
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if 0 in shape:
    last = offset - 1
  if last >= storage.count:
    raise _Refused(f"{_short(name)}: element {last} of a storage of {storage.count}")
  if math.prod(shape) * _ITEMSIZES[storage.dtype] > size:
    raise _Refused(f"{_short(name)}: shape {shape} takes more than the whole file of {size} bytes")


def _kind(value: Any) -> str:
  """Returns what a value of the machine is, in a word; its content may be without end."""
  if isinstance(value, _Global):
    return _short(value.name)
  return {_Ordered: "OrderedDict", _Module: "module", _Storage: "storage", _Tensor: "tensor", object: "mark"}.get(
    type(value), type(value).__name__)


def _short(text: str) -> str:
  """Returns untrusted text on one line, not too long."""
  text = " ".join(text.split())
  return "".join(c if c.isprintable() else "?" for c in (text if len(text) <= 100 else f"{text[:100]}…"))


# From nested values to names


def _named(root: Any) -> dict[str, _Tensor]:
  out: dict[str, _Tensor] = {}
  if not isinstance(root, dict | list | tuple) or isinstance(root, _Global | _Storage | _Tensor):
    raise _Refused(f"holds a {_kind(root)}; expected tensors by name")
  _flatten(root, (), out, [MAX_NAMES])
  if not out:
    raise _Refused("holds no tensors")
  return out


def _flatten(value: Any, path: tuple[str, ...], out: dict[str, _Tensor], budget: list[int]) -> None:
  budget[0] -= 1
  if budget[0] < 0 or len(path) > MAX_DEPTH:
    raise _Refused(f"holds more than {MAX_NAMES} values, or some nested more than {MAX_DEPTH} deep")
  if isinstance(value, _Tensor):
    name = ".".join(path)
    if name in out:
      raise _Refused(f"two tensors are named {_short(name)}")
    out[name] = value
  elif isinstance(value, _Global | _Storage):
    pass
  elif isinstance(value, dict):
    for key, item in value.items():
      _flatten(item, (*path, str(key)), out, budget)
  elif isinstance(value, list | tuple):
    for i, item in enumerate(value):
      _flatten(item, (*path, str(i)), out, budget)
