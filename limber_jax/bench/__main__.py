"""Measures one part beside a peer or a limit of the same run: `python -m limber_jax.bench NAME [--flags]`."""

import importlib
import sys

from limber_jax import cli, help
from limber_jax.errors import did_you_mean

BENCHES = {name: f"limber_jax.bench.{name}" for name in ("captions", "data", "generate", "loss", "probe", "train")}

if __name__ == "__main__":
  name = sys.argv[1] if len(sys.argv) > 1 else ""
  if name not in BENCHES and help.asked(sys.argv) is not None:
    print(f"{__doc__}\n\nNAME is one of {', '.join(BENCHES)}; NAME --help lists the flags of each.")
    sys.exit(0)
  if name not in BENCHES:
    print(f"error: bench: no measurement {name!r}{did_you_mean(name, BENCHES)}", file=sys.stderr)
    sys.exit(2)
  del sys.argv[1]
  cli.run(importlib.import_module(BENCHES[name]).main, prints=lambda: True)
