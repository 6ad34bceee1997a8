"""Devices, meshes and shardings: the one place that knows how arrays lie over devices and processes.

Mesh axes: `data` (batch only), `fsdp` (batch, and parameters split), `tensor` (parameters split, batch repeated).
"""

import functools
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from limber_jax.errors import UserError
from limber_jax.runtime import peers

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that the batch dimension is spread over

# Set where JAX can find the other processes by itself: on TPU VMs (by JAX, at import), GKE, multislice and Open MPI.
_CLUSTERS = ("TPU_ML_PLATFORM", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE")

_meetings = itertools.count()  # the same in every process
_PATIENCE = 24 * 3600          # seconds

Rules = Sequence[tuple[str, P]]  # (regular expression on a leaf's path, its PartitionSpec)


# Of frozen networks of convolutions: split 8 to 16 ways, the TPU compiler makes of each kernel windows over a few
# channels, 16 to 22 % of the cycles of LiMBeR's step for 2 % of its FLOPs.
WHOLE: Rules = (("", P()),)


def start() -> None:
  """Joins the other processes of a multi-process run, if there are any; call before any other use of JAX.

  On TPU pods, SLURM, MPI and Kubernetes the others are found by themselves; elsewhere set JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID. A run of one process needs no coordinator: signals are then handled by
  `limber_jax.train` itself.
  """
  env = os.environ
  if jax.distributed.is_initialized():
    return
  # JAX would take SIGTERM for itself, and do nothing with it but tell Orbax.
  jax.config.update("jax_enable_preemption_service", False)
  if "JAX_COORDINATOR_ADDRESS" in env:
    try:
      count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
      raise UserError("JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers "
                      f"too; got {env.get('JAX_NUM_PROCESSES')!r} and {env.get('JAX_PROCESS_ID')!r}") from error
    peers.watch_stderr()
    jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index,
                               heartbeat_timeout_seconds=peers.HEARTBEAT)
  elif any(k in env for k in _CLUSTERS) or int(env.get("SLURM_NTASKS", "1")) > 1:
    peers.watch_stderr()
    jax.distributed.initialize(heartbeat_timeout_seconds=peers.HEARTBEAT)
  if jax.distributed.is_initialized() and jax.process_count() > 1:
    peers.listen()


def shutdown() -> NoReturn:
  """Ends this process with exit code 0, together with the others of the run, whatever its threads still wait for."""
  if jax.distributed.is_initialized():
    jax.distributed.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh with the axes `data`, `fsdp`, `tensor`.

  Neighbours along an axis are neighbours on a TPU's torus, so the order of the devices is not that of their numbers.
  TPU slices that are joined by the data centre's network are outermost on `data`: parameters are whole in each slice.

  Args:
    sizes: devices along each axis; one axis may be -1 and takes what the others leave. An axis left out is 1.
    devices: jax.devices() if None.

  Raises:
    UserError: the sizes do not multiply to the number of devices, `data` does not divide over the slices, or the torus
      has no such mesh.
  """
  devices = jax.devices() if devices is None else devices
  shape = [sizes.get(a, 1) for a in AXES]
  if unknown := set(sizes) - set(AXES):
    raise UserError(f"mesh: no axis {sorted(unknown)[0]!r}; known: {', '.join(AXES)}")
  if shape.count(-1) > 1 or any(s == 0 or s < -1 for s in shape):
    raise UserError(f"mesh {_named(shape)}: sizes are at least 1, and one of them may be -1")
  if -1 in shape:
    rest = int(np.prod([s for s in shape if s != -1]))
    shape[shape.index(-1)] = max(len(devices) // rest, 1)
  if int(np.prod(shape)) != len(devices):
    raise UserError(f"mesh {_named(shape)} needs {int(np.prod(shape))} devices, there are {len(devices)}")
  # Auto, because jax.make_mesh's default (Explicit) turns every constraint in a model into an assertion.
  return Mesh(_grid(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _named(shape: Sequence[int]) -> str:
  return str(dict(zip(AXES, shape, strict=True)))


def _grid(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
  """Returns the devices in the shape of a mesh; see `make_mesh`."""
  # Other platforms count as a slice what is one host, between which there is no slower network than within.
  slices = len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
  if shape[0] % slices:
    raise UserError(f"mesh {_named(shape)}: parameters are not split over the {slices} slices that there are, so data "
                    f"must be a multiple of {slices}; for example --config.mesh.data={slices} --config.mesh.fsdp=-1")
  try:
    if slices > 1:
      return mesh_utils.create_hybrid_device_mesh(
        (shape[0] // slices, *shape[1:]), (slices, 1, 1), devices, allow_split_physical_axes=True)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  except (NotImplementedError, ValueError, AssertionError) as error:
    raise UserError(f"mesh {_named(shape)}: these {len(devices)} devices cannot be laid out so "
                    f"({' '.join(str(error).split())[:200]}); choose another config.mesh") from error


def check_fits(tree: Any, mesh: Mesh, what: str) -> None:
  """Raises UserError if arrays are more than the devices of a mesh have memory for, all of them together.

  It is asked before anything is allocated, and refuses only what cannot be: one copy of the arrays, and nothing else.

  Args:
    tree: arrays or ShapeDtypeStructs.
    mesh: from `make_mesh`.
    what: they are, for the message, such as "config.model".
  """
  device = mesh.devices.flat[0]
  if device.platform == "cpu":
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * jax.process_count()
  else:
    memory = ((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit") or math.inf) * mesh.devices.size
  leaves = jax.tree.leaves(tree)
  count, size = (sum(f(x) for x in leaves) for f in (lambda x: math.prod(x.shape),
                                                     lambda x: math.prod(x.shape) * x.dtype.itemsize))
  if size > memory:
    raise UserError(f"{what} has {count / 1e9:,.1f} G parameters, {size / 1e9:,.1f} GB, and {mesh.devices.size} × "
                    f"{device.device_kind} have {memory / 1e9:,.1f} GB")


def compiler_options(mesh: Mesh) -> dict[str, Any]:
  """Returns options for jax.jit of large programs on a mesh.

  XLA's CPU scheduler overlaps independent work, such as the two towers: on few cores that thrashes caches (16 s
  against 8 s for a step of ViT-B/32 on 2 cores, and twice the time to compile). Simulated devices, of which each waits
  for the others, need the overlap (13 s of a test against 28 s).
  """
  alone = mesh.devices.flat[0].platform == "cpu" and jax.local_device_count() == 1
  return {"xla_cpu_enable_concurrency_optimized_scheduler": False} if alone else {}


def path_name(path: Sequence[Any]) -> str:
  """Returns "image/blocks/attn/q/kernel" for a key path of jax.tree_util."""
  return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def within(part: str, rules: Rules) -> Rules:
  """Returns `rules` so that they fit only leaves below a part of the model, such as "prompt"."""
  return tuple((rf"(^|/){re.escape(part)}/.*(?:{pattern})", spec) for pattern, spec in rules)


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """Returns a tree of NamedShardings, one for each leaf of `tree`.

  A rule fits a leaf if its expression is found in the leaf's path, so the same rules serve parameters and the two
  moments of Adam. The first rule that fits and whose axes divide the leaf's dimensions counts: a second row for the
  same leaves says how they lie where the first cannot be, such as P(), whole on every device. Scalars are always so.

  Args:
    tree: arrays or ShapeDtypeStructs.
    rules: the rows of a model's SHARDING table.
    mesh: from `make_mesh`.

  Raises:
    UserError: a leaf fits no rule, has fewer dimensions than its rule, or is not divided by any that fits.
  """
  compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

  def one(path, leaf):
    name = path_name(path)
    if leaf.ndim == 0:
      return NamedSharding(mesh, P())
    specs = [spec for pattern, spec in compiled if pattern.search(name)]
    if not specs:
      raise UserError(f"{name}: shape {leaf.shape} fits no row of the sharding table")
    problems = []
    for spec in specs:
      if len(spec) > leaf.ndim:
        raise UserError(f"{name}: sharding {spec} has more dimensions than the shape {leaf.shape}")
      uneven = _uneven(leaf.shape, spec, mesh)
      if not uneven:
        return NamedSharding(mesh, spec)
      problems.append(uneven)
    raise UserError(f"{name}: {problems[0]}; choose another config.mesh")

  return jax.tree_util.tree_map_with_path(one, tree)


def _uneven(shape: tuple[int, ...], spec: P, mesh: Mesh) -> str:
  """Returns which dimension the mesh axes of a spec do not divide, "" if they divide all."""
  for dim, axes in zip(shape, spec, strict=False):
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    parts = int(np.prod([mesh.shape[a] for a in axes]))
    if dim % parts:
      return f"dimension {dim} of {shape} does not divide over {parts} devices of mesh axis {'×'.join(axes)}"
  return ""


def constrain(x: jax.Array, *spec: Any) -> jax.Array:
  """Returns `x` with its sharding fixed to P(*spec) on the current mesh; unchanged where no mesh is set.

  Inside shard_map the axes are the caller's, and nothing is constrained. A dimension that its axes do not divide is
  left free: evaluation batches may be of any size.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or any(t != AxisType.Auto for t in mesh.axis_types):
    return x
  fixed = []
  for dim, axes in zip(x.shape, spec, strict=False):
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    parts = int(np.prod([mesh.shape[a] for a in names]))
    fixed.append(axes if dim % parts == 0 else None)
  return jax.lax.with_sharding_constraint(x, P(*fixed))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: its first dimension over data × fsdp."""
  return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def place(tree: Any, like: Any) -> Any:
  """Returns numpy arrays, which every process holds whole, as `like` (ShapeDtypeStructs with shardings) says."""

  def one(x, want):
    x = np.asarray(x, want.dtype)
    # device_put would want every device to be this process's own.
    return jax.make_array_from_callback(x.shape, want.sharding, lambda index: x[index])

  return jax.tree.map(one, tree, like)


def local_rows(batch_size: int, mesh: Mesh, process: int | None = None) -> np.ndarray:
  """Returns the rows of a global batch that the devices of a process hold, and that it must load: int64 [b], sorted.

  They need not adjoin: meshes follow a TPU's torus, and its hosts lie across it. Where the axis `tensor` reaches over
  several processes, each of them has the same rows.

  Args:
    batch_size: rows of the global batch.
    mesh: from `make_mesh`.
    process: the number of the process, this one if None.

  Raises:
    UserError: the batch does not divide over the devices.
  """
  parts = mesh.shape["data"] * mesh.shape["fsdp"]
  if batch_size % parts:
    raise UserError(f"a batch of {batch_size} does not divide over {parts} devices (mesh axes data × fsdp)")
  size = batch_size // parts
  blocks = _blocks(mesh, jax.process_index() if process is None else process)
  return (blocks[:, None] * size + np.arange(size)[None]).reshape(-1)


@functools.lru_cache(maxsize=16)
def _blocks(mesh: Mesh, process: int) -> np.ndarray:
  """Returns which of the equal blocks that a batch is cut into the devices of a process hold, sorted."""
  devices = mesh.devices.reshape(-1, mesh.shape["tensor"])  # a row of them holds the same rows of the batch
  return np.flatnonzero([any(d.process_index == process for d in row) for row in devices])


def global_batch(batch: Any, mesh: Mesh) -> Any:
  """Returns global arrays [B, ...] over data × fsdp, from this process's rows as numpy arrays [b, ...].

  The rows are those of `local_rows`, in its order.
  """
  if jax.process_count() == 1:
    return jax.device_put(batch, batch_sharding(mesh))
  return jax.tree.map(lambda x: _from_rows(x, batch_sharding(mesh), ()), batch)


def flags_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of `global_flags`: rows as in a batch, and a column for each device that holds a row."""
  return NamedSharding(mesh, P(BATCH, "tensor"))


def global_flags(flags: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Returns arrays [B, tensor] of what each process says of its rows [b], in the columns of its own devices.

  In a batch, what processes that hold the same rows say of them must be the same; here it need not: reduce it over
  the last axis.
  """
  return {k: _from_rows(x[:, None], flags_sharding(mesh), (mesh.shape["tensor"],)) for k, x in flags.items()}


def _from_rows(x: np.ndarray, sharding: NamedSharding, columns: tuple[int, ...]) -> jax.Array:
  """Returns the global array [B, ...] of this process's rows [b, ...]; a second axis of length 1 becomes `columns`."""
  blocks = _blocks(sharding.mesh, jax.process_index())
  size = len(x) // len(blocks)
  parts = sharding.mesh.shape["data"] * sharding.mesh.shape["fsdp"]

  def rows_of(index: tuple[slice, ...]) -> np.ndarray:
    at = np.searchsorted(blocks, (index[0].start or 0) // size) * size
    return x[at : at + size]

  return jax.make_array_from_callback((parts * size, *(columns or x.shape[1:])), sharding, rows_of)


def broadcast_from_process_0(function: Callable[[], Any]) -> Any:
  """Returns what function() gives in process 0, plain JSON, in every process; only process 0 calls it.

  Raises:
    UserError: in every process, if it does in process 0.
  """
  if jax.process_count() == 1:
    return json.loads(json.dumps(function()))
  out: dict[str, Any] = {}
  if jax.process_index() == 0:
    try:
      out = {"value": function()}
    except UserError as error:
      out = {"error": str(error)}
  _meet()
  out = json.loads(bytes(_from_first(json.dumps(out).encode())))
  if "error" in out:
    raise UserError(out["error"])
  return out["value"]


def _meet() -> None:
  """Returns when all processes are here, however long one of them takes: collectives on CPUs give up after 30 s."""
  from orbax.checkpoint import multihost  # here, because it takes a while to import and few need it

  multihost.sync_global_processes(f"limber_jax {next(_meetings)}", timeout=_PATIENCE,
                                  processes=set(range(jax.process_count())))


def allgather_objects(value: Any) -> list[Any]:
  """Returns the `value`, plain JSON, of every process, in the order of the processes."""
  if jax.process_count() == 1:
    return [json.loads(json.dumps(value))]
  mine = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(mine)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(mine)] = mine
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)]


def fail_together(problem: str | None) -> None:
  """Raises UserError in every process if there is a problem in one; all call this, each when it gets there."""
  if jax.process_count() > 1:
    _meet()
  for index, other in enumerate(allgather_objects(problem)):
    if other is not None:
      raise UserError(problem or f"process {index}: {other}")


def _from_first(data: bytes) -> np.ndarray:
  """Returns the bytes of process 0 as uint8 [n]; those of the others are not looked at."""
  length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  mine = np.zeros(length, np.uint8)
  if jax.process_index() == 0:
    mine[:] = np.frombuffer(data, np.uint8)
  return np.asarray(multihost_utils.broadcast_one_to_all(mine))
