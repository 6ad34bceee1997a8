"""PyTorch's pickles: what torch saved is read as torch reads it, and what would run code is refused by name."""

import collections
import functools
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from limber_jax.errors import UserError
from limber_jax.weights import files


@pytest.fixture(scope="module")
def torch():
  return pytest.importorskip("torch")


def assert_reads(path, want):
  """Checks names, types and values against a dict of torch's tensors."""
  import torch

  got = files.tensors(str(path))
  assert got.keys() == want.keys()
  for name, tensor in want.items():
    tensor = tensor.detach()
    assert (got[name].shape, f"torch.{got[name].dtype}") == (tuple(tensor.shape), str(tensor.dtype)), name
    x = np.asarray(got[name])
    assert x.flags.c_contiguous and x.flags.owndata
    if tensor.dtype == torch.bfloat16:
      assert x.dtype == ml_dtypes.bfloat16
      x, tensor = x.view(np.int16), tensor.contiguous().view(torch.int16)
    np.testing.assert_array_equal(x, tensor.numpy(), err_msg=name, strict=True)


def state(torch):
  """Tensors of every type, shape and layout that a state dict may hold."""
  x = torch.arange(-30.0, 30.0).reshape(3, 4, 5) / 7
  return collections.OrderedDict(
    plain=x, view=x[1:, ::2, 3], transposed=x.permute(2, 0, 1), shared=x.view(-1)[7:31].reshape(4, 6),
    half=x.half(), bfloat16=x.bfloat16(), double=x.double(), parameter=torch.nn.Parameter(x[0].clone()),
    int=torch.tensor([1, -2], dtype=torch.int32), long=torch.tensor(2**40), short=torch.tensor([-3], dtype=torch.int16),
    byte=torch.tensor([255], dtype=torch.uint8), char=torch.tensor([-1], dtype=torch.int8),
    bool=torch.tensor([True, False]), scalar=torch.tensor(1.5), empty=torch.zeros(0, 3), broken_up=x[:, ::3][::2])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_kind_of_tensor_equals_what_torch_saved(tmp_path, torch, zipped, protocol):
  want = state(torch)
  torch.save(want, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
  assert_reads(tmp_path / "x.bin", want)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_modules_state_dict_is_read_whatever_the_files_name(tmp_path, torch, zipped):
  model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3))  # OrderedDict with _metadata
  for name in ("x.bin", "x.safetensors", "x"):
    torch.save(model.state_dict(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_reads(tmp_path / name, model.state_dict())


def test_nesting_becomes_dotted_names(tmp_path, torch):
  x = torch.arange(4.0)
  torch.save({"vision": {"w": x, "list": [x[:1], {"deep": x[1:2]}]}, "model": {"b": x[2:3]}, "bias": x[3:]},
             tmp_path / "x.pt")
  assert_reads(tmp_path / "x.pt", {"vision.w": x, "vision.list.0": x[:1], "vision.list.1.deep": x[1:2],
                                   "model.b": x[2:3], "bias": x[3:]})


@pytest.mark.parametrize("how", ["trace", "script"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit itself is deprecated; OpenAI's files remain
def test_an_archive_of_torch_jit_gives_its_modules_tensors(tmp_path, torch, how):
  class Tower(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
      self.register_buffer("input_resolution", torch.tensor(224))
      self.projection = torch.nn.Parameter(torch.randn(2, 2).half())
      self.sizes = [1, 2]

    def forward(self, x):
      return self.model(x) @ self.projection.float()

  model = torch.nn.Sequential(collections.OrderedDict(model=Tower(), other=torch.nn.Linear(2, 1)))  # no wrapper here
  module = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.zeros(1, 2))
  torch.jit.save(module, str(tmp_path / "x.pt"))
  assert_reads(tmp_path / "x.pt", model.state_dict())


def test_only_what_is_asked_for_is_read(tmp_path, torch):
  torch.save({"large": torch.zeros(40_000_000), "small": torch.arange(5.0)}, tmp_path / "x.bin")
  script = f"""if True:
    import numpy as np
    from limber_jax.weights import files
    def peak():
      return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
    before = peak()
    tensors = files.tensors({str(tmp_path / "x.bin")!r})
    assert np.asarray(tensors["small"])[4] == 4
    assert np.array(tensors["large"].view()[1000:2000]).sum() == 0
    print(peak() - before)
  """
  out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                       env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert int(out.stdout) < 20_000  # KiB, of a file of 160 MB


# What would run code. Each file would make `canary` if anything in it were run.


def string(text):
  data = text.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def name(full):
  module, attribute = full.rsplit(".", 1)
  return b"c" + f"{module}\n{attribute}\n".encode()


def storage(kind="torch.FloatStorage", key="0", count=4):
  return b"(" + string("storage") + name(kind) + string(key) + string("cpu") + b"J" + struct.pack("<i", count) + b"tQ"


def numbers(*values):
  return b"(" + b"".join(b"\x8a\x09" + v.to_bytes(9, "little", signed=True) for v in values) + b"t"


EMPTY = name("collections.OrderedDict") + b")R"


def tensor(of=None, offset=0, shape=(4,), strides=(1,), hooks=EMPTY):
  return (name("torch._utils._rebuild_tensor_v2") + b"(" + (storage() if of is None else of)
          + numbers(offset)[1:-1] + numbers(*shape) + numbers(*strides) + b"\x89" + hooks + b"tR")


def weights(*more):
  """A dict of one good tensor and what is given, as a pickle of protocol 2."""
  return b"\x80\x02}(" + string("w") + tensor() + b"".join(string(f"x{i}") + m for i, m in enumerate(more)) + b"u."


class Call:
  """What pickle.dumps writes as a call."""

  def __init__(self, function, *args, state=None, items=None):
    self.parts = (function, args) + ((state, items) if items else (state,) if state else ())

  def __reduce__(self):
    return self.parts


def dumped(value, protocol=2):
  return lambda canary: pickle.dumps({"w": value(canary)}, protocol)


def raw(*more):
  return lambda canary: weights(*(m(canary) if callable(m) else m for m in more))


def touch(canary):
  return string(f"touch {canary}")


SYSTEM = f"{os.name}.system"
REFUSED = {
  "os.system by REDUCE": (dumped(lambda c: Call(os.system, f"touch {c}")), f"holds {SYSTEM}, which only code"),
  "os.system, protocol 4": (dumped(lambda c: Call(os.system, f"touch {c}"), 4), f"holds {SYSTEM}"),
  "os.system, protocol 0": (dumped(lambda c: Call(os.system, f"touch {c}"), 0), f"holds {SYSTEM}"),
  "eval": (dumped(lambda c: Call(eval, f"open({c!r}, 'w')")), r"holds (__builtin__|builtins).eval"),
  "exec": (raw(lambda c: name("builtins.exec") + string(f"open({c!r}, 'w')") + b"\x85R"), "holds builtins.exec"),
  "getattr": (dumped(lambda c: Call(getattr, "x", "upper")),
              r"holds (__builtin__|builtins).getattr"),
  "subprocess": (raw(lambda c: name("subprocess.Popen") + touch(c) + b"\x85R"), "holds subprocess.Popen"),
  "runpy": (raw(lambda c: name("runpy.run_path") + string(c) + b"\x85R"), "holds runpy.run_path"),
  "numpy's own scalars": (dumped(lambda c: np.float32(1)), r"holds numpy\._?core\.multiarray\.scalar"),
  "torch.load itself": (raw(lambda c: name("torch.load") + string(c) + b"\x85R"), "holds torch.load"),
  "torch.hub": (raw(lambda c: name("torch.hub.load") + string(c) + b"\x85R"), "holds torch.hub.load"),
  "a storage that unpickles": (raw(lambda c: name("torch.storage._load_from_bytes") + touch(c) + b"\x85R"),
                               "holds torch.storage._load_from_bytes"),
  "another rebuild of torch's": (raw(lambda c: name("torch._utils._rebuild_wrapper_subclass") + b")R"),
                                 "holds torch._utils._rebuild_wrapper_subclass"),
  "an attribute of an allowed name": (raw(b"\x8c\x05torch\x8c\x14FloatStorage.__new__\x93"),
                                      r"holds torch\.FloatStorage\.__new__"),
  "a relative of an allowed name": (raw(name("torch._utils._rebuild_tensor_v2.__globals__")), "v2.__globals__"),
  "STACK_GLOBAL": (raw(b"\x8c" + bytes([len(os.name)]) + os.name.encode() + b"\x8c\x06system\x93"), f"holds {SYSTEM}"),
  "STACK_GLOBAL from memory": (raw(b"\x8c\x05posix\x94\x8c\x06system\x94h\x00h\x01\x93"), "holds posix.system"),
  "STACK_GLOBAL of no names": (raw(b"]]\x93"), "imports a list and a list"),
  "INST": (raw(lambda c: b"(" + touch(c) + b"iposix\nsystem\n"), "posix.system by INST"),
  "OBJ": (raw(lambda c: b"(" + EMPTY + touch(c) + b"o"), "the opcode OBJ"),
  "NEWOBJ": (raw(name("collections.OrderedDict") + b")\x81"), "an object of collections.OrderedDict"),
  "NEWOBJ of something else": (raw(name("os.PathLike") + b")\x81"), "holds os.PathLike"),
  "NEWOBJ_EX": (raw(name("collections.OrderedDict") + b")}\x92"), "the opcode NEWOBJ_EX"),
  "a TorchScript class outside of an archive": (raw(name("__torch__.M") + b")\x81"), "holds __torch__.M"),
  "EXT1": (raw(b"\x82\x01"), "the opcode EXT1"),
  "PERSID": (raw(b"Pposix.system\n"), "the opcode PERSID"),
  "BUILD with __setstate__": (raw(b"]}(" + string("__setstate__") + name("collections.OrderedDict") + b"ub"),
                              "sets the state of a list by BUILD"),
  "BUILD of a name": (raw(name("torch.FloatStorage") + b"}(" + string("__reduce__") + b"Nub"),
                      "sets the state of a torch.FloatStorage by BUILD"),
  "BUILD of a tensor": (raw(tensor() + b"}b"), "sets the state of a tensor by BUILD"),
  "BUILD with slots": (raw(EMPTY + b"}}\x86b"), "sets the state of a OrderedDict by BUILD"),
  "a call of a string": (raw(lambda c: string("os.system") + touch(c) + b"\x85R"), "calls a str"),
  "a call of a memo": (raw(lambda c: string("os.system") + b"q\x07" + b"0h\x07" + touch(c) + b"\x85R"), "calls a str"),
  "a call of a storage type": (raw(name("torch.FloatStorage") + b")R"), "calls torch.FloatStorage"),
  "OrderedDict of something": (raw(lambda c: name("collections.OrderedDict") + touch(c) + b"\x85R"),
                               "calls collections.OrderedDict with arguments"),
  "hooks of a tensor": (raw(tensor(hooks=EMPTY + string("k") + string("v") + b"s")),
                        "_rebuild_tensor_v2 with arguments"),
  "a parameter of a list": (raw(name("torch._utils._rebuild_parameter") + b"]\x89" + EMPTY + b"\x87R"),
                            "_rebuild_parameter with arguments"),
  "a memo never made": (raw(b"h\x63"), "not a whole pickle"),
  "an empty stack": (raw(b"000000000000R"), "stack|whole pickle"),
  "the mark as a value": (raw(b"(q\x00"), "its own mark"),
  "the mark as an argument": (raw(b"(\x85"), "more from its stack"),
  "a list for a key": (raw(b"}]Ns"), "a list for a key"),
  "bytes": (raw(b"C\x01x"), "the opcode SHORT_BINBYTES"),
  "a set": (raw(b"\x8f"), "the opcode EMPTY_SET"),
  "two results": (raw(b"u]}("), "more than one|a dict with a key|mark"),
  "no end": (lambda c: weights()[:-1], "not a whole pickle"),
  "nothing": (lambda c: b"", "not a whole pickle"),
  "a persistent id that is no storage": (raw(b"(" + string("module") + name("torch.FloatStorage") + string("0")
                                             + string("cpu") + b"K\x04tQ"), "kind module"),
  "a persistent id of a string": (raw(string("posix.system") + b"Q"), "no storage of torch's"),
  "a storage of a function": (raw(storage("torch._utils._rebuild_parameter")), "no storage of torch's"),
  "a storage of two types": (raw(storage("torch.HalfStorage")), "of two types or lengths"),
  "a storage that is not there": (raw(storage(key="7")), "storage 7 is not in the archive"),
  "a storage elsewhere": (raw(storage(key="../../data.pkl")), "data.pkl is not in the archive"),
  "a huge storage": (raw(storage(key="1", count=2**31 - 1)), "claims 2147483647 × float32, but has 16 bytes"),
  "a storage of negative length": (raw(storage(key="1", count=-1)), "no storage of torch's"),
  "an offset past the end": (raw(tensor(offset=1)), "x0: element 4 of a storage of 4"),
  "a negative offset": (raw(tensor(offset=-1)), "not whole numbers from 0 up"),
  "negative strides": (raw(tensor(offset=3, strides=(-1,))), "not whole numbers from 0 up"),
  "a stride past the end": (raw(tensor(shape=(2, 2), strides=(3, 1))), "x0: element 4 of a storage of 4"),
  "a negative shape": (raw(tensor(shape=(-4,))), "not whole numbers from 0 up"),
  "a shape without bounds": (raw(tensor(shape=(2**60,), strides=(0,))), "takes more than the whole file"),
  "a tensor of a list": (raw(tensor(of=b"]")), "a tensor over a list in place of a storage"),
  "a dict in itself": (raw(b"}q\x01" + string("a") + b"h\x01s"), "nested more than 32 deep"),
  "a billion names": (raw(b"}q\x00" + b"".join(
    b"0}" + b"".join(string(key) + b"h" + bytes([i]) + b"s" for key in "abcdefgh") + b"q" + bytes([i + 1])
    for i in range(12))), "more than 200000 values"),
}


def archive(path, data, members=(("archive/data/0", b"0123456789abcdef"), ("archive/data/1", b"0123456789abcdef")),
            compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("archive/data.pkl", data)
    for member, content in members:
      file.writestr(member, content)


def assert_refused(path, canary, reason):
  before = set(sys.modules)
  with pytest.raises(UserError, match=reason) as error:
    files.tensors(str(path))
  assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and len(str(error.value)) < 500
  assert not os.path.exists(canary)
  # Nor is anything imported. (linecache and the like come with the traceback.)
  assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("torch", "subprocess", "runpy")}


def test_the_raw_pieces_of_these_tests_make_a_good_file(tmp_path):
  archive(tmp_path / "x.bin", weights(tensor(offset=1, shape=(3,))))
  got = files.tensors(str(tmp_path / "x.bin"))
  data = np.frombuffer(b"0123456789abcdef", np.float32)
  np.testing.assert_array_equal(got["w"], data)
  np.testing.assert_array_equal(got["x0"], data[1:])


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_file_that_could_run_code_or_lies_is_refused_by_name(tmp_path, case, suffix):
  make, reason = REFUSED[case]
  canary = str(tmp_path / "canary")
  archive(tmp_path / f"x{suffix}", make(canary))
  assert_refused(tmp_path / f"x{suffix}", canary, reason)


@pytest.mark.parametrize("case", ["os.system by REDUCE", "eval", "INST", "BUILD with __setstate__", "NEWOBJ"])
def test_the_old_format_refuses_the_same(tmp_path, case):
  make, reason = REFUSED[case]
  canary = str(tmp_path / "canary")
  head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
  for data in (head + make(canary), make(canary), head[:-5] + make(canary)):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(UserError) as error:
      files.tensors(str(tmp_path / "x.pt"))
    assert not os.path.exists(canary)
  (tmp_path / "x.pt").write_bytes(head + make(canary))
  assert_refused(tmp_path / "x.pt", canary, reason)
  assert error.value


def test_these_files_are_not_harmless(tmp_path):
  """The canary is alive: Python's own unpickler runs the first of them."""
  canary = tmp_path / "canary"
  pickle.loads(REFUSED["os.system by REDUCE"][0](str(canary)))
  assert canary.exists()


@pytest.mark.parametrize("change,reason", [
  (dict(members=()), "storage 0 is not in the archive"),
  (dict(members=(("archive/data/0", b"0123"),)), "claims 4 × float32, but has 4 bytes"),
  (dict(compression=zipfile.ZIP_DEFLATED), "data.pkl is compressed or encrypted"),
  (dict(members=(("archive/data/0", bytes(16)), ("archive/byteorder", b"big"))), "big-endian"),
  (dict(members=(("archive/data/0", bytes(16)), ("other/data.pkl", weights()))), "a zip file with 2 files data.pkl"),
])
def test_an_archive_that_torch_would_not_write_is_refused(tmp_path, change, reason):
  archive(tmp_path / "x.bin", weights(), **change)
  assert_refused(tmp_path / "x.bin", tmp_path / "canary", reason)


def test_a_compressed_storage_is_refused(tmp_path):
  archive(tmp_path / "x.bin", weights(), members=())
  with zipfile.ZipFile(tmp_path / "x.bin", "a") as file:
    file.writestr("archive/data/0", bytes(10**7), zipfile.ZIP_DEFLATED)
  assert_refused(tmp_path / "x.bin", tmp_path / "canary", "data/0 is compressed or encrypted")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
  archive(tmp_path / "x.bin", weights(), members=(("archive/data/0", bytes(16)), ("archive/data/0", bytes(16))))
  assert_refused(tmp_path / "x.bin", tmp_path / "canary", "two members are named archive/data/0")


def test_an_archive_in_an_archive_is_not_looked_into(tmp_path):
  canary = str(tmp_path / "canary")
  inner = io.BytesIO()
  archive(inner, REFUSED["os.system by REDUCE"][0](canary))
  archive(tmp_path / "x.bin", weights(), members=(("archive/data/0", inner.getvalue()[:16]),
                                                  ("archive/inner.pt", inner.getvalue())))
  assert files.tensors(str(tmp_path / "x.bin")).keys() == {"w"}
  with zipfile.ZipFile(tmp_path / "y.bin", "w") as file:
    file.writestr("archive/inner/data.pkl", REFUSED["os.system by REDUCE"][0](canary))
  assert_refused(tmp_path / "y.bin", canary, "a zip file with 0 files data.pkl")


def test_a_bomb_of_pickle_is_refused_by_its_size(tmp_path):
  archive(tmp_path / "x.bin", weights() + bytes(17 << 20))
  assert_refused(tmp_path / "x.bin", tmp_path / "canary", "that of weights is below")
  archive(tmp_path / "x.bin", b"\x80\x02" + b"N" * 4_000_100)
  assert_refused(tmp_path / "x.bin", tmp_path / "canary", "more than 4000000 steps")


@pytest.mark.parametrize("value,reason", [
  ({"a": [1, 2.5, "x"]}, "a pickle, but not one that torch.save wrote"),
  (collections.OrderedDict(a=1), "a pickle, but not one that torch.save wrote"),
  (np.zeros(3), r"holds numpy\._?core"),
  (pickle.PickleBuffer, "holds .*PickleBuffer"),
  (functools.partial, "holds functools.partial"),
])
def test_a_pickle_of_anything_else_is_refused(tmp_path, value, reason):
  (tmp_path / "x.pkl").write_bytes(pickle.dumps(value))
  assert_refused(tmp_path / "x.pkl", tmp_path / "canary", reason)


def test_a_file_without_tensors_is_refused(tmp_path, torch):
  for value, reason in (({"a": 1}, "holds no tensors"), (torch.zeros(2), "holds a tensor; expected tensors by name"),
                        (3, "holds a int")):
    torch.save(value, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", tmp_path / "canary", reason)


def test_kinds_that_cannot_be_read_are_refused_by_name(tmp_path, torch):
  for value, reason in ((torch.zeros(2, dtype=torch.complex64), "holds torch.ComplexFloatStorage"),
                        (torch.zeros(2).to_sparse(), "holds torch._utils._rebuild_sparse_tensor"),
                        (torch.zeros(1).expand(10_000), "takes more than the whole file"),
                        (torch.nn.Linear(2, 2), "holds torch.nn.modules.linear.Linear")):
    torch.save({"w": value}, tmp_path / "x.pt")
    assert_refused(tmp_path / "x.pt", tmp_path / "canary", reason)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_damaged_file_is_refused_or_read_within_its_bounds(tmp_path, torch, zipped):
  torch.save(state(torch), tmp_path / "good", _use_new_zipfile_serialization=zipped)
  good = (tmp_path / "good").read_bytes()
  rng = random.Random(0)
  refused = 0
  for _ in range(300):
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
      data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.2:
      del data[rng.randrange(len(data)):]
    (tmp_path / "x.bin").write_bytes(data)
    try:
      for one in files.tensors(str(tmp_path / "x.bin")).values():
        np.asarray(one)
    except UserError as error:
      refused += 1
      assert "\n" not in str(error)
  assert refused > 50


def test_a_damaged_pickle_within_a_whole_archive_is_refused_or_read_within_its_bounds(tmp_path):
  rng = random.Random(0)
  good = weights(tensor(offset=1, shape=(3,)), tensor(shape=(2, 2), strides=(2, 1)))
  refused = 0
  for _ in range(1000):
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
      data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), ord("("), ord("b"), ord("R"), ord("t"), 0x81))
    archive(tmp_path / "x.bin", bytes(data))
    try:
      for one in files.tensors(str(tmp_path / "x.bin")).values():
        np.asarray(one)
    except UserError:
      refused += 1
  assert refused > 500


# Flax's msgpack


def test_a_file_of_flax_serialization_is_read(tmp_path, monkeypatch):
  import flax.serialization

  rng = np.random.default_rng(0)
  tree = {"a": {"kernel": rng.normal(size=(3, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float16)},
          "b": {"bf": rng.normal(size=(70, 300)).astype(ml_dtypes.bfloat16), "scalar": np.float32(2), "step": 3,
                "empty": np.zeros((0, 2), np.float32), "ids": np.arange(300)}}
  for chunk in (2**30, 1000):  # as it is, and with arrays above 1000 bytes in chunks
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    (tmp_path / "x.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    got = files.tensors(str(tmp_path / "x.msgpack"))
    assert got.keys() == {"a/kernel", "a/bias", "b/bf", "b/scalar", "b/empty", "b/ids"}
    for path, tensor in got.items():
      part, leaf = path.split("/")
      np.testing.assert_array_equal(np.asarray(tensor), np.asarray(tree[part][leaf]), strict=True)
      assert tensor.shape == np.shape(tree[part][leaf])


def test_a_damaged_msgpack_is_refused_or_read_within_its_bounds(tmp_path):
  import flax.serialization

  good = flax.serialization.msgpack_serialize({"a": {"kernel": np.zeros((3, 4), np.float32)}, "b": np.zeros(3)})
  rng = random.Random(0)
  refused = 0
  for _ in range(500):
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
      data[rng.randrange(1, len(data))] = rng.randrange(256)
    (tmp_path / "x.msgpack").write_bytes(data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data)
    try:
      for one in files.tensors(str(tmp_path / "x.msgpack")).values():
        np.asarray(one)
    except UserError:
      refused += 1
  assert refused > 100


@pytest.mark.parametrize("data,reason", [
  (b"\x81\xa1a" + b"\xdf\xff\xff\xff\xff", "bytes announced"),
  (b"\x81\xa1a" + b"\xc7\x03\x02abc", "extension 2"),
  (b"\x81\xa1a" * 40 + b"\xc0", "nested more than 32 deep"),
  (b"\x82\xa1a\xc0\xa1a\xc0", "twice"),
  (b"\x81\xa1a\xc7\x0b\x01\x93\x91\xce\xff\xff\xff\xff\xa1O\xc4\x00", "an array of 'O'"),
  (b"\x81\xa1a\xc7\x11\x01\x93\x91\xce\xff\xff\xff\xff\xa7float32\xc4\x00", "with 0 bytes"),
  (b"\x81\xa1a\xc0", "no arrays"),
])
def test_a_msgpack_that_flax_would_not_write_is_refused(tmp_path, data, reason):
  (tmp_path / "x.msgpack").write_bytes(data)
  with pytest.raises(UserError, match=reason):
    files.tensors(str(tmp_path / "x.msgpack"))
