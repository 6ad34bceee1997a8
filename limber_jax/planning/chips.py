"""TPU slices by the names of their accelerator types, and what a chip of each kind can do."""

import dataclasses
import difflib
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from limber_jax.errors import UserError
from limber_jax.training.flops import PEAKS


@dataclasses.dataclass(frozen=True)
class Chip:
  """A kind of chip: rates of its maker's data sheet, memory and clock as the compiler has them."""

  compiler: str     # what libtpu calls it
  kind: str         # what JAX calls a device of it
  options: dict[str, str] = dataclasses.field(hash=False)  # of libtpu: "megacore" makes the two cores one device
  memory: float     # GiB of HBM that a program may use, as libtpu 0.0.42 says where one wants more
  bandwidth: float  # of it, bytes/s
  links: float      # ICI, bytes/s out of a chip over all links at once
  axes: int         # of the torus
  cores: int        # that the name of an accelerator type counts a chip as
  clock: float      # Hz, to turn the compiler's cycles into seconds

  @property
  def flops(self) -> float:
    """FLOP/s of dense products in bfloat16, at most."""
    return PEAKS[self.kind]


_MEGACORE = {"chip_config_name": "megacore"}
CHIPS = {
  "v4": Chip("v4", "TPU v4", _MEGACORE, 30.75, 1200e9, 270e9, 3, 2, 1.05e9),
  "v5p": Chip("v5", "TPU v5", _MEGACORE, 95.74, 2765e9, 540e9, 3, 2, 1.75e9),
  "v5litepod": Chip("v5e", "TPU v5 lite", {}, 15.75, 819e9, 180e9, 2, 1, 1.5e9),
  "v6e": Chip("v6e", "TPU v6 lite", {}, 31.25, 1640e9, 360e9, 2, 1, 1.75e9),
}
_TORUS = {3: {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"},
          2: {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}}
TOPOLOGIES = {f"{kind}-{chips * chip.cores}": (chip, chips) for kind, chip in CHIPS.items()
              for chips in _TORUS[chip.axes]}

# What libtpu would ask of a machine with TPUs; it only compiles here, beside others that may do the same.
_ALONE = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def chip_of(name: str) -> tuple[Chip, int]:
  """Returns (the kind of chip, how many there are) of an accelerator type.

  Args:
    name: such as v4-128, which has 64 chips: on v4 and v5p it counts cores. v5e-16 is v5litepod-16.

  Raises:
    UserError: there is no such type, or none that is known here.
  """
  if (known := _canonical(name)) not in TOPOLOGIES:
    raise UserError(f"--topology={name}: no such TPU slice; did you mean {_nearest(name)!r}? known: "
                    f"{', '.join(TOPOLOGIES)}")
  return TOPOLOGIES[known]


def _canonical(name: str) -> str:
  return re.sub("^v5e(?=-|$)", "v5litepod", name)


def _nearest(name: str) -> str:
  """Returns the accelerator type of the most similar kind, and of that the one of the nearest size."""
  kind, _, count = _canonical(name).partition("-")
  kind = difflib.get_close_matches(kind, CHIPS, n=1, cutoff=0.0)[0]
  sizes = [t for t in TOPOLOGIES if t.startswith(f"{kind}-")]
  wanted = int(count) if count.isdecimal() else 0
  return min(sizes, key=lambda t: abs(int(t.rpartition("-")[2]) - wanted))


def devices_of(name: str, slices: int, logs: str) -> list[Any]:
  """Returns the devices of TPU slices that need not be there: programs are compiled for them, and cannot be run.

  Args:
    name: of an accelerator type; see `chip_of`.
    slices: how many such slices work together.
    logs: the directory where libtpu writes its log, which it chooses once in a process.

  Raises:
    UserError: no such type, libtpu is not installed, or it does not know such slices.
  """
  chip, count = chip_of(name)
  if importlib.util.find_spec("libtpu") is None:
    raise UserError("libtpu, the compiler for TPUs, is not installed; pip install -e '.[aot]' brings it")
  os.environ.update(_ALONE, TPU_ACCELERATOR_TYPE=_canonical(name), TPU_LOG_DIR=logs)
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=f"{chip.compiler}:{_TORUS[chip.axes][count]}", chips_per_host_bounds=(2, 2, 1),
      num_slices=slices, **chip.options).devices
  except jax.errors.JaxRuntimeError as error:
    raise UserError(f"--topology={name} --slices={slices}: libtpu has no such slices "
                    f"({' '.join(str(error).split())[:200]})") from error
