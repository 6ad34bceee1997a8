"""Which rows of a batch a process loads: on the meshes of real TPU slices, where they do not adjoin."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from runs import environment, losses

from limber_jax.data.order import shuffled_index
from limber_jax.errors import UserError
from limber_jax.runtime import parallel


def recorded() -> dict[tuple[str, str], list[int]]:
  """Returns, by topology and mesh, the number of the process that holds each device of the mesh."""
  found = {}
  for line in (Path(__file__).parent / "topologies.tsv").read_text().splitlines():
    if not line.startswith("#"):
      topology, meshes, text = line.split("\t")
      processes = []
      for run in text.split(" "):
        process, _, times = run.partition("x")
        processes += [int(process)] * int(times or 1)
      found |= {(topology, mesh): processes for mesh in meshes.split(" ")}
  return found


ORDERS = recorded()


@dataclasses.dataclass(frozen=True)
class Device:
  """What a mesh knows of a device."""

  id: int
  process_index: int
  platform: str = "tpu"


def described(mesh: str, processes: list[int]) -> jax.sharding.Mesh:
  shape = [int(n) for n in mesh.split("x")]
  devices = np.array([Device(i, p) for i, p in enumerate(processes)], object).reshape(shape)
  return jax.sharding.Mesh(devices, parallel.AXES)


def test_the_rows_of_all_processes_cover_each_batch_and_each_device_gets_its_own():
  interleaved = shared = 0
  for (topology, mesh_name), processes in ORDERS.items():
    mesh = described(mesh_name, processes)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = 2 * parts
    rows = {p: parallel.local_rows(batch, mesh, p) for p in set(processes)}
    counts = np.bincount(np.concatenate(list(rows.values())), minlength=batch)
    assert len(counts) == batch and counts.min() >= 1, (topology, mesh_name)
    # What XLA puts on each device, by its own account.
    for device, index in NamedSharding(mesh, P(parallel.BATCH)).devices_indices_map((batch,)).items():
      assert set(range(batch)[index[0]]) <= set(rows[device.process_index].tolist()), (topology, mesh_name)
    for own in rows.values():
      assert (np.diff(own) > 0).all()
      wanted = {b for b in range(batch) for d in mesh.devices.reshape(parts, -1)[b // 2]
                if rows[d.process_index] is own}
      assert set(own.tolist()) == wanted, (topology, mesh_name)
    interleaved += any((np.diff(own) > 1).any() for own in rows.values())
    shared += counts.max() > 1
  assert len(ORDERS) > 400 and interleaved > 200 and shared > 50  # what simulated devices in a row never show


class Slice(Device):
  """A device of a TPU slice; a real one has coordinates too."""

  def __init__(self, id, index):
    super().__init__(id, 0)
    object.__setattr__(self, "slice_index", index)


def test_a_mesh_that_would_split_parameters_over_slices_is_refused():
  devices = [Slice(i, i // 4) for i in range(8)]
  with pytest.raises(UserError, match=r"'fsdp': 8.*over the 2 slices.*--config\.mesh\.data=2 --config\.mesh\.fsdp=-1"):
    parallel.make_mesh({"data": 1, "fsdp": -1}, devices)


def test_a_mesh_that_the_torus_does_not_have_is_one_line(monkeypatch):
  def none(*args, **kwargs):
    raise NotImplementedError("Failed to find assignment\nfor logical_axis_index 2")

  monkeypatch.setattr(parallel.mesh_utils, "create_device_mesh", none)
  with pytest.raises(UserError, match=r"^mesh .*'tensor': 4.* cannot be laid out so \(Failed to find assignment for"):
    parallel.make_mesh({"data": 2, "tensor": 4})


# One process of a run whose devices lie on the mesh as on a real slice. Arguments: workdir, mesh, processes of its
# devices, steps; or for encode its directory and "encode".
RUN = """
import dataclasses, json, sys
import jax
import numpy as np
from absl import flags
sys.path.insert(0, {tests!r})
flags.FLAGS.mark_as_parsed()
from limber_jax.training import loop
from limber_jax.inference import encoding
from limber_jax.runtime import parallel
from limber_jax.config import Checkpoint, Source
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.data.bad_records import BadRecords
from runs import tiny, tiny_limber

workdir, mesh, processes, what = sys.argv[1:]
mesh, processes = [int(n) for n in mesh.split("x")], json.loads(processes)

def grid(shape, devices):
  own = {{p: iter([d for d in devices if d.process_index == p]) for p in set(processes)}}
  return np.array([next(own[p]) for p in processes]).reshape(shape)

parallel.start()
if processes:
  parallel._grid = grid
config = tiny(mesh=mesh, batch_size=32, steps=10, checkpoint=Checkpoint(every=2, keep=20), evals={{
  "zeroshot": ZeroShot(source=Source(name="digits", split="test"), every=10, batch_size=64)}})
if what == "encode":
  limber = tiny_limber(mesh=mesh)
  limber.data.crop = "encoder"
  limber.model.lm = dataclasses.replace(limber.model.lm, vocab=260)  # divides over `tensor`
  encoding.encode(limber, workdir, batch_size=32, shard_mb=0.5)
else:
  rows = parallel.local_rows(config.batch_size, parallel.make_mesh(dict(zip(parallel.AXES, mesh))))
  log, read = open(f"{{workdir}}.rows{{jax.process_index()}}", "a", 1), BadRecords.read
  def logged(self, step, batch):
    log.write(json.dumps([step, rows.tolist(), batch["index"].tolist()]) + "\\n")
    return read(self, step, batch)
  BadRecords.read = logged
  loop.train(config, workdir, log=lambda line: print(line, flush=True))
"""


@pytest.fixture(scope="module")
def start():
  """Returns a function that starts the processes of a run, on devices in the order of a recorded mesh."""
  program = RUN.format(tests=os.path.dirname(__file__))

  def run(workdir, mesh, topology="", what="train"):
    processes = ORDERS[topology, mesh] if topology else []
    count = len(set(processes)) or 1
    devices = int(np.prod([int(n) for n in mesh.split("x")])) // count
    with socket.socket() as s:
      s.bind(("127.0.0.1", 0))
      port = s.getsockname()[1]
    return [subprocess.Popen(
      [sys.executable, "-c", program, str(workdir), mesh, json.dumps(processes), what], stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, env=environment(devices, count, i, port) | {"NPROC": "32"})
      for i in range(count)]

  return run


def finish(processes):
  outputs = [p.communicate(timeout=400)[0] for p in processes]
  assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(o[-3000:] for o in outputs)


def seen(workdir) -> dict[int, list[int]]:
  """Returns the number of the record in each row of each step; processes that hold the same row must agree."""
  steps: dict[int, dict[int, int]] = {}
  for path in Path(workdir).parent.glob(f"{Path(workdir).name}.rows*"):
    for line in path.read_text().splitlines():
      step, rows, index = json.loads(line)
      for row, i in zip(rows, index, strict=True):
        assert steps.setdefault(step, {}).setdefault(row, i) == i
  return {step: [rows[i] for i in sorted(rows)] for step, rows in steps.items()}


def metrics(workdir) -> tuple[list[float], dict[str, float]]:
  """Returns (the loss of each step, what the evaluation at the end found)."""
  with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as file:
    last = [r for line in file if "zeroshot/top1" in (r := json.loads(line))][-1]
  return [float.fromhex(x) for x in losses(workdir).values()], {k: v for k, v in last.items() if k.startswith("zero")}


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
  """What one process with one device finds."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  finish(start(workdir, "1x1x1"))
  return seen(workdir), *metrics(workdir)


def check(workdir, alone):
  steps, want, evaluated = alone
  assert seen(workdir) == steps and all(len(rows) == 32 for rows in steps.values())
  got, found = metrics(workdir)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert found == evaluated


@pytest.mark.process
def test_rows_that_do_not_adjoin_or_are_shared_train_as_one_process_does_after_a_kill(start, alone, tmp_path):
  steps = alone[0]
  assert steps == {s: [shuffled_index(1437, 0, 32 * (s - 1) + row) for row in range(32)] for s in range(1, 11)}
  pair = start(tmp_path / "run", "8x1x1", "v4-16")  # every other row
  for line in pair[0].stdout:
    if re.match("step 5 ", line):
      break
  for process in pair:
    process.send_signal(signal.SIGKILL)
  for process in pair:
    process.communicate()
  finish(start(tmp_path / "run", "1x1x8", "v4-16"))  # one host's devices have the same rows as the other's
  check(tmp_path / "run", alone)


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize(("topology", "mesh"), [
  ("v4-16", "8x1x1"), ("v4-16", "4x2x1"), ("v4-16", "1x4x2"), ("v5p-16", "8x1x1"), ("v5p-16", "1x8x1"),
  ("v4-32", "16x1x1"), ("v4-32", "8x2x1"), ("v4-32", "2x4x2"), ("v4-32", "2x1x8"),
  ("v5litepod-16", "16x1x1"), ("v5litepod-16", "8x2x1"), ("v5litepod-16", "1x4x4"), ("v5litepod-16", "4x1x4"),
  ("v4-16x2", "2x8x1"), ("v4-16x2", "16x1x1"), ("v4-16x2", "4x2x2"),
])
def test_a_real_slice_trains_and_evaluates_as_one_process_does(topology, mesh, start, alone, tmp_path):
  finish(start(tmp_path / "run", mesh, topology))
  check(tmp_path / "run", alone)


def records(directory):
  """Yields (the name of a shard, float32 [its records, numbers of one])."""
  for path in sorted(directory.glob("*.array_record")):
    reader = ArrayRecordReader(str(path))
    yield path.name, np.stack([np.frombuffer(r, np.float32) for r in reader.read_all()])


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize(("topology", "mesh"), [("v4-32", "16x1x1"), ("v5litepod-16", "4x1x4")])
def test_a_real_slice_encodes_as_one_process_does(topology, mesh, start, tmp_path):
  finish(start(tmp_path / "one", "1x1x1", what="encode"))
  finish(start(tmp_path / "some", mesh, topology, what="encode"))
  one, some = (dict(records(tmp_path / d)) for d in ("one", "some"))
  assert one.keys() == some.keys() and len(one) > 1
  for name, wanted in one.items():  # of 2 or 8 images at a time a product rounds otherwise than of 32
    np.testing.assert_allclose(some[name], wanted, rtol=1e-4, atol=1e-5)
