"""A machine that runs a pickle of PyTorch's over records of its own: it can neither import nor call.

It has the stack and the memory of Python's, but a fixed list of names stands for records that are defined here, and
whatever else a file asks for is refused by name.
"""

import io
import pickletools
import struct
import warnings
from typing import Any, NamedTuple

MAX_STEPS = 4_000_000  # opcodes of a pickle; those of weights have fewer


class Refused(ValueError):
  """What is wrong with a pickle; `pickles.tensors` puts the file's name before it."""


class Global(NamedTuple):
  name: str  # one that is known here; it is never looked up


class Storage(NamedTuple):
  dtype: str
  key: str
  count: int  # elements


class Tensor(NamedTuple):
  storage: Storage
  offset: int  # in elements
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Ordered(dict):
  """An OrderedDict of the file's: the only thing that may be given attributes (a state dict's versions), unread."""


class Module(dict):
  """A module of a TorchScript archive."""


_DTYPES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Double": "float64", "Int": "int32",
           "Long": "int64", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
_STORAGES = {f"{module}.{name}Storage": dtype for module in ("torch", "torch.storage") for name, dtype in
             _DTYPES.items()} | {"torch.storage.UntypedStorage": "uint8"}
ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int32": 4, "int64": 8, "int16": 2, "int8": 1,
              "uint8": 1, "bool": 1}
_CALLS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
# In TorchScript's pickles alone: typed lists and dicts, whose first argument is the value.
_SCRIPT_CALLS = tuple(f"torch.jit._pickle.{name}" for name in (
  "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING",
             "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_MARK = object()


class Machine:
  """Runs one pickle over records of our own."""

  def __init__(self, script: bool = False):
    self.storages: dict[str, Storage] = {}
    self._script = script  # a TorchScript archive: names below __torch__ are modules
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}

  def run(self, file: io.BytesIO) -> Any:
    """Returns the object that the pickle at the file's position builds; the position is then after it."""
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pickletools' about strange escapes in a damaged name
        return self._run(file)
    except Refused:
      raise
    # A broken pickle takes from an empty stack, asks for a memo that was never made, or is no pickle at all.
    except (ValueError, IndexError, KeyError, TypeError, struct.error, UnicodeError, OverflowError) as error:
      raise Refused(f"not a whole pickle ({short(str(error))})") from error

  def _run(self, file: io.BytesIO) -> Any:
    stack, memo = self._stack, self._memo
    for steps, (opcode, arg, _) in enumerate(pickletools.genops(file)):  # which parses, and runs nothing
      op = opcode.name
      if steps > MAX_STEPS:
        raise Refused(f"a pickle of more than {MAX_STEPS} steps")
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
          raise Refused(f"appends to a {kind_of(self._top())}")
        self._top().extend(items)
      elif op in ("SETITEM", "SETITEMS"):
        self._set(self._take(2) if op == "SETITEM" else self._since_mark())
      elif op == "GLOBAL":
        stack.append(self._global(*arg.split(" ", 1)))
      elif op == "STACK_GLOBAL":
        module, name = self._take(2)
        if type(module) is not str or type(name) is not str:
          raise Refused(f"imports a {kind_of(module)} and a {kind_of(name)}, which no pickle of torch's does")
        stack.append(self._global(module, name))
      elif op == "REDUCE":
        function, args = self._take(2)
        stack.append(self._call(function, args))
      elif op == "NEWOBJ":
        cls, args = self._take(2)
        if not (isinstance(cls, Global) and cls.name.startswith("__torch__.")) or args != ():
          raise Refused(f"makes an object of {kind_of(cls)}, which only code could do; {_ADVICE}")
        stack.append(Module())
      elif op == "BUILD":
        target, state = self._top(-2), stack.pop()
        if isinstance(target, Module) and type(state) is dict:
          target.update(state)
        elif not (isinstance(target, Ordered) and type(state) is dict):
          raise Refused(f"sets the state of a {kind_of(target)} by BUILD, which only code could do; {_ADVICE}")
      elif op == "BINPERSID":
        stack.append(self._storage(stack.pop()))
      elif op == "INST":
        raise Refused(f"makes an object of {_dotted(*arg.split(' ', 1))} by INST, which only code could do; {_ADVICE}")
      elif op in ("PROTO", "FRAME"):
        pass
      elif op == "STOP":
        root = stack.pop()
        if stack or root is _MARK:
          raise Refused("a pickle that leaves more than one object")
        return root
      else:  # among them OBJ, NEWOBJ_EX, PERSID, EXT1, bytes and sets
        raise Refused(f"uses the opcode {op}, which no file of weights needs; {_ADVICE}")
    raise Refused("a pickle without an end")

  def _top(self, index: int = -1) -> Any:
    if self._stack[index] is _MARK:
      raise Refused("a pickle that takes its own mark for a value")
    return self._stack[index]

  def _take(self, count: int) -> list[Any]:
    items = self._stack[-count:]
    if len(items) != count or any(item is _MARK for item in items):
      raise Refused("a pickle that takes more from its stack than there is")
    del self._stack[-count:]
    return items

  def _since_mark(self) -> list[Any]:
    at = len(self._stack) - 1
    while at >= 0 and self._stack[at] is not _MARK:
      at -= 1
    if at < 0:
      raise Refused("a pickle that asks for a mark it never set")
    items = self._stack[at + 1 :]
    del self._stack[at:]
    return items

  def _set(self, items: list[Any]) -> None:
    target = self._top()
    if type(target) not in (dict, Ordered):
      raise Refused(f"sets an item of a {kind_of(target)}")
    if len(items) % 2:
      raise Refused("a dict with a key but no value")
    _update(target, zip(items[::2], items[1::2], strict=True))

  def _global(self, module: str, name: str) -> Global:
    full = _dotted(module, name)
    if not (full in _STORAGES or full in _CALLS or (self._script and (full.startswith("__torch__.")
                                                                      or full in _SCRIPT_CALLS))):
      raise Refused(f"holds {short(full)}, which only code could use; {_ADVICE}")
    return Global(full)

  def _storage(self, pid: Any) -> Storage:
    if not (type(pid) is tuple and len(pid) in (5, 6) and pid[0] == "storage" and isinstance(pid[1], Global)
            and pid[1].name in _STORAGES and type(pid[2]) is str and type(pid[3]) is str and type(pid[4]) is int
            and pid[4] >= 0 and pid[5:] in ((), (None,))):
      what = f"kind {short(pid[0])}" if type(pid) is tuple and pid and type(pid[0]) is str else f"a {kind_of(pid)}"
      raise Refused(f"refers to something outside of it that is no storage of torch's ({what})")
    storage = Storage(_STORAGES[pid[1].name], pid[2], pid[4])
    if self.storages.setdefault(storage.key, storage) != storage:
      raise Refused(f"storage {short(storage.key)} is said to be of two types or lengths")
    return storage

  def _call(self, function: Any, args: Any) -> Any:
    if not isinstance(function, Global) or type(args) is not tuple:
      raise Refused(f"calls a {kind_of(function)}, which only code could do; {_ADVICE}")
    match function.name:
      case "collections.OrderedDict" if not args:
        return Ordered()
      case "collections.OrderedDict" if len(args) == 1 and type(args[0]) is list and all(
          type(pair) in (list, tuple) and len(pair) == 2 for pair in args[0]):
        out = Ordered()
        _update(out, args[0])
        return out
      case "torch._utils._rebuild_tensor_v2" if len(args) in (6, 7) and not any(args[5:]):
        return _tensor(*args[:4])
      case "torch._utils._rebuild_parameter" if len(args) == 3 and isinstance(args[0], Tensor) and not args[2]:
        return args[0]
      case name if name in _SCRIPT_CALLS and args:
        return args[0]
    raise Refused(f"calls {short(function.name)} with arguments that torch.save does not write; {_ADVICE}")


_ADVICE = "weights need none of that, and nothing of the file was run"


def _dotted(module: str, name: str) -> str:
  return f"{module}.{name}"


def _update(target: dict, pairs: Any) -> None:
  for key, value in pairs:
    # Small whole numbers, because large ones can be chosen to share one hash, and tuples to take forever to hash.
    if not (type(key) is str or (type(key) is int and abs(key) < 1 << 31)):
      raise Refused(f"a dict with a {kind_of(key)} for a key")
    target[key] = value


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
  def whole(values):
    return type(values) is tuple and len(values) <= 32 and all(type(n) is int and 0 <= n < 1 << 62 for n in values)

  if not isinstance(storage, Storage):
    raise Refused(f"a tensor over a {kind_of(storage)} in place of a storage")
  if not (whole((offset,)) and whole(shape) and whole(strides) and len(shape) == len(strides)):
    raise Refused(f"a tensor of storage {short(storage.key)} whose offset, shape or strides are not whole numbers "
                   "from 0 up")
  return Tensor(storage, offset, shape, strides)


def kind_of(value: Any) -> str:
  """Returns what a value of the machine is, in a word; its content may be without end."""
  if isinstance(value, Global):
    return short(value.name)
  return {Ordered: "OrderedDict", Module: "module", Storage: "storage", Tensor: "tensor", object: "mark"}.get(
    type(value), type(value).__name__)


def short(text: str) -> str:
  """Returns untrusted text on one line, not too long."""
  text = " ".join(text.split())
  return "".join(c if c.isprintable() else "?" for c in (text if len(text) <= 100 else f"{text[:100]}…"))
