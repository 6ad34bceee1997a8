"""Plans a run on TPUs that are not there: `python -m limber_jax.plan --config=FILE --topology=v4-128`.

The run's own step is compiled for the slice by the TPU's compiler (pip install -e ".[aot]"), on any machine, and never
run: no number here is a measurement. Printed are the mesh, memory against the chip's, FLOPs of the model and of the
hardware, bytes, collectives, the compiler's cycles, what compute, HBM and ICI allow at most, and the heaviest parts of
the model. The exit code is 1 if there is a problem: rows that processes cannot supply, too little memory, donation that
is not used, all logits on one chip, involuntary rematerialisation, products in float32. --search compiles policies of
remat, microbatches and meshes one after the other, minutes each, and names the best that fits.
"""

import json
import sys
import tempfile

import jax
from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.planning.chips import TOPOLOGIES, chip_of, devices_of
from limber_jax.planning.plan import Slices, plan
from limber_jax.planning.search import search
from limber_jax.planning.text import COLUMNS, lines, search_lines, variant

if __name__ == "__main__":
  _config = cli.define_config()
  _topology = flags.DEFINE_string("topology", "", f"The accelerator type: {', '.join(TOPOLOGIES)}.")
  _slices = flags.DEFINE_integer("slices", 1, "How many such slices.", lower_bound=1)
  _search = flags.DEFINE_bool("search", False, "Try other remat, microbatches and meshes too, and name the best.")
  _json = flags.DEFINE_bool("json", False, "Print one JSON object.")

  def _main(argv: list[str]) -> int:
    if argv:
      raise UserError(f"unexpected argument {argv[0]!r}; settings are given as --config.field=value")
    if not _topology.value:
      raise UserError("--topology is missing; for example --topology=v4-128")
    config = cli.get_config(_config)
    chip, _ = chip_of(_topology.value)
    jax.config.update("jax_platforms", "cpu")  # whatever is there stays free
    with tempfile.TemporaryDirectory() as logs:
      devices = devices_of(_topology.value, _slices.value, logs)
      slices = Slices(_topology.value, _slices.value, chip, devices, logs)
      if not _search.value:
        found = plan(config, slices)
        return _tell(found, lines(found), found["problems"])
      print(COLUMNS, file=sys.stderr, flush=True)
      found = search(config, slices, lambda row: print(variant(row), file=sys.stderr, flush=True))
      return _tell(found, search_lines(found), not found["best"] or found["best"]["problems"])

  def _tell(found: dict, text: list[str], problems: object) -> int:
    print(json.dumps(found) if _json.value else "\n".join(text), flush=True)
    return int(bool(problems))

  cli.run(_main, prints=lambda: True)
