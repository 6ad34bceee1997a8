"""Proves that this machine's devices compute, talk to each other, and save."""

import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from limber_jax.runtime import parallel


def check_devices(expect_devices: int | None, expect_kind: str | None) -> dict[str, Any]:
  """Returns the names of this process's devices; raises RuntimeError if kind or count is not the expected one."""
  kind, count = jax.default_backend(), jax.device_count()
  wrong = [f"expected {wanted} {what}, got {got}" for what, wanted, got in (
    ("as the kind", expect_kind, kind), ("devices", expect_devices, count)) if wanted not in (None, got)]
  if wrong:
    raise RuntimeError("; ".join(wrong))
  return {"names": [str(d) for d in jax.local_devices()]}


_matmul = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))


def check_matmul() -> dict[str, Any]:
  """Returns the checksum of one product [512, 512], the same on every device of this process and in numpy.

  The factors are whole numbers in [-8, 8], exact in bf16, and so is their sum over 512 in fp32, in any order: the
  same bits are due from every chip of every kind, and a chip that adds wrongly is found even if all do.

  Raises:
    RuntimeError: a device has another checksum; all such devices are named.
  """
  a, b = np.random.default_rng(0).integers(-8, 9, (2, 512, 512))
  expected = zlib.crc32((a @ b).astype(np.int32))
  factors = jnp.asarray(a, jnp.bfloat16), jnp.asarray(b, jnp.bfloat16)
  products = {d: _matmul(*jax.device_put(factors, d)) for d in jax.local_devices()}  # all at work before one is read
  sums = {d: zlib.crc32(np.asarray(p).astype(np.int32)) for d, p in products.items()}
  if wrong := [f"{d} has {s:08x}" for d, s in sums.items() if s != expected]:
    raise RuntimeError(f"expected checksum {expected:08x} on every device; {', '.join(wrong)}")
  return {"checksum": f"{expected:08x}"}


def check_psum() -> dict[str, Any]:
  """Returns the sum over all devices of all processes, as each device got it; raises RuntimeError if one is wrong."""
  count, width = jax.device_count(), 1 << 16
  mesh = Mesh(np.array(jax.devices()), ("all",))
  sharding = NamedSharding(mesh, P("all"))
  ranks = np.repeat(np.arange(1, count + 1, dtype=np.int32)[:, None], width, axis=1)
  x = jax.make_array_from_callback(ranks.shape, sharding, lambda index: ranks[index])  # device i holds i + 1
  total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "all"), mesh=mesh, in_specs=P("all"), out_specs=P("all")))(x)
  expected = count * (count + 1) // 2
  if wrong := [str(s.device) for s in total.addressable_shards if not np.all(np.asarray(s.data) == expected)]:
    raise RuntimeError(f"expected {expected} on every device; another sum on {', '.join(wrong)}")
  return {"sum": expected}


def check_checkpoint(directory: str) -> dict[str, Any]:
  """Returns the bytes that Orbax wrote and read back, with equal values onto the same devices.

  Several processes need a directory that all of them see, as a training run does. Without one, process 0 saves what
  it holds to its own disk, and the others have nothing to check.

  Args:
    directory: where to write, and to delete afterwards; "" is the system's own for temporary files.

  Raises:
    RuntimeError: a leaf came back with other values, another type or another sharding.
  """
  together = bool(directory) or jax.process_count() == 1
  token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31))))
  if not together and jax.process_index():
    return {"skipped": "process 0 alone checked its own disk: no --checkpoint-dir that all processes see"}
  devices = jax.devices() if together else jax.local_devices()
  ramp = np.linspace(-1, 1, 4096 * len(devices), dtype=np.float32)
  host = {"float32": ramp, "bfloat16": ramp.astype(jnp.bfloat16), "int32": np.arange(ramp.size, dtype=np.int32)}
  sharding = NamedSharding(Mesh(np.array(devices), ("all",)), P("all"))
  saved = jax.device_put(host, sharding)
  options = ocp.options.MultiprocessingOptions()
  if not together:  # Orbax refuses arrays of one process among several, and then lets only process 0 write numpy's
    saved, options = jax.device_get(saved), ocp.options.MultiprocessingOptions(active_processes={0})
  path = os.path.join(os.path.abspath(directory or tempfile.gettempdir()), f"limber_health_{token:08x}")
  handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
  try:
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
      checkpointer.save(path, args=ocp.args.StandardSave(saved))
      like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
      read = checkpointer.restore(path, args=ocp.args.StandardRestore(like))
    for name, leaf in saved.items():
      if read[name].dtype != leaf.dtype or getattr(read[name], "sharding", None) != getattr(leaf, "sharding", None) or (
          not jax.jit(jnp.array_equal)(read[name], leaf)):
        raise RuntimeError(f"{name}: what was read from {path} is not what was written")
  finally:
    if jax.process_index() == 0:
      shutil.rmtree(path, ignore_errors=True)
  return {"bytes": sum(leaf.nbytes for leaf in host.values())}


def examine(expect_devices: int | None, expect_kind: str | None, checkpoint_dir: str, verdict: dict[str, Any]) -> None:
  """Runs every check, those after a failed one too, and fills `verdict` as it goes: a watchdog may have to print it.

  Args:
    expect_devices: over all processes; None takes any number.
    expect_kind: "cpu", "gpu" or "tpu"; None takes any.
    checkpoint_dir: see `check_checkpoint`.
    verdict: empty at first; "ok", "reasons" and "checks" grow, and "at" is the check in progress.
  """
  verdict |= {"ok": False, "reasons": [], "at": "start", "host": socket.gethostname(), "jax": jax.__version__,
              "python": platform.python_version(), "checks": {}}

  def attempt(name: str, check: Callable[[], dict[str, Any]]) -> bool:
    verdict["at"], start, found, ok = name, time.monotonic(), {}, True
    try:
      found = check()
    except Exception as error:  # whatever a driver, a compiler or a disk may raise is what the verdict is about
      ok = False
      verdict["reasons"].append(f"{name}: {' '.join(str(error).split()) or type(error).__name__}")
    verdict["checks"][name] = {"ok": ok, "seconds": round(time.monotonic() - start, 3), **found}
    return ok

  def start() -> dict[str, Any]:
    parallel.start()
    verdict.update(devices=jax.device_count(), kind=jax.default_backend(), device_kind=jax.devices()[0].device_kind,
                   process=jax.process_index(), processes=jax.process_count())
    return {}

  if attempt("start", start):  # without a backend nothing else can be said
    attempt("devices", lambda: check_devices(expect_devices, expect_kind))
    attempt("matmul", check_matmul)
    attempt("psum", check_psum)
    attempt("checkpoint", lambda: check_checkpoint(checkpoint_dir))
  verdict["ok"] = not verdict["reasons"]
  del verdict["at"]
