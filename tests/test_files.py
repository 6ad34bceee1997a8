"""Files of weights whose headers were changed (S2): refused in one line, or read within their bounds."""

import io
import json
import random
import resource
import struct
import time

import flax.serialization
import numpy as np
import pytest
from safetensors.numpy import save

from limber_jax.errors import UserError
from limber_jax.weights import files

TREE = {"a.kernel": np.arange(12, dtype=np.float32).reshape(3, 4), "a.bias": np.ones(4, np.float16),
        "b": np.arange(6, dtype=np.int32).reshape(2, 3)}


def npz(compressed):
  file = io.BytesIO()
  (np.savez_compressed if compressed else np.savez)(file, **TREE)
  return file.getvalue()


def pickled(zipped):
  torch = pytest.importorskip("torch")
  file = io.BytesIO()
  torch.save({name: torch.from_numpy(x.copy()) for name, x in TREE.items()}, file,
             _use_new_zipfile_serialization=zipped)
  return file.getvalue()


FORMATS = {
  "safetensors": lambda: save(TREE), "npz": lambda: npz(False), "npz compressed": lambda: npz(True),
  "msgpack": lambda: flax.serialization.msgpack_serialize(dict(TREE)),
  "torch": lambda: pickled(True), "torch before 1.6": lambda: pickled(False)}
# What a random byte seldom hits: lengths far too large, less than nothing, other types, ends of strings and lists.
PIECES = [b"\xff" * 8, b"\x00" * 8, b"9" * 20, b"-1", b"1e9", b"[", b"{", b'"', b"]", b"}", b"null", b"F64",
          b"\xdf\xff", b"O8", b"<f8", b"True", b"(", b")", struct.pack("<Q", 2**63), struct.pack("<I", 2**31)]


def mutated(good, rng):
  """Returns a file with a few bytes changed, overwritten, put in, left out or repeated, most often near an end."""
  data = bytearray(good)
  for _ in range(rng.randint(1, 4)):
    size = max(len(data), 1)
    at = rng.choice((rng.randrange(size), min(rng.randrange(300), size - 1), max(size - 1 - rng.randrange(300), 0)))
    match rng.randrange(6):
      case 0:
        data[at : at + 1] = bytes([rng.randrange(256)])
      case 1:
        piece = rng.choice(PIECES)
        data[at : at + len(piece)] = piece
      case 2:
        data[at:at] = rng.choice(PIECES)
      case 3:
        del data[at : at + rng.randint(1, 40)]
      case 4:
        data[at:at] = data[at : at + rng.randint(1, 40)]
      case 5 if rng.random() < 0.3:
        del data[at:]
  return bytes(data)


def read_mutated(name, path, seeds):
  """Reads a file changed by each seed; returns how many were refused, and by how many MB the process grew."""
  good, refused = FORMATS[name](), 0
  path.write_bytes(good)
  got = {key: np.asarray(tensor) for key, tensor in files.tensors(str(path)).items()}
  assert got.keys() == TREE.keys() and all((got[key] == TREE[key]).all() for key in TREE)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for seed in seeds:
    path.write_bytes(data := mutated(good, random.Random(seed)))
    start = time.monotonic()
    try:
      total = sum(np.asarray(tensor).nbytes for tensor in files.tensors(str(path)).values())
      assert total <= 100 * len(data), (name, seed)
    except UserError as error:
      refused += 1
      assert str(path) in str(error) or "is damaged" in str(error), (name, seed, error)
      assert "\n" not in str(error) and len(str(error)) < 1000, (name, seed, error)
    except Exception as error:
      raise AssertionError(f"{name}, seed {seed}: {json.dumps(repr(error))}") from error
    assert time.monotonic() < start + 2, (name, seed)
  return refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_header_is_refused_or_read_within_its_bounds(name, tmp_path):
  refused, grown = read_mutated(name, tmp_path / "weights", range(250))
  print(f"S2: {name}: {refused} of 250 refused, {grown} MB more memory")
  assert refused > 50 and grown < 256


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_10_000_changed_headers_end_no_process(name, tmp_path):
  refused, grown = read_mutated(name, tmp_path / "weights", range(1000, 3000))
  print(f"S2: {name}: {refused} of 2,000 refused, {grown} MB more memory")
  assert grown < 256
