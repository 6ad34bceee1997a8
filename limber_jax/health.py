"""`python -m limber_jax.health` proves that this machine's devices compute, talk to each other, and save.

It prints one JSON object on one line of stdout, the verdict:

    {"ok": true, "reasons": [], "devices": 8, "kind": "tpu", …, "checks": {"devices": {…}, "matmul": {…}, …}}

and exits with 0, or with 1 where a check failed or time ran out: `reasons` then says which, what was expected and what
came. On a pod slice it runs on every worker at once (`tpu_setup.sh --all-workers` does that); each prints its own.
"""

import json
import os
import threading
from typing import Any

from absl import flags

from limber_jax import cli
from limber_jax.runtime.health import examine

if __name__ == "__main__":
  _expect_devices = flags.DEFINE_integer("expect-devices", None, "Devices there must be, over all processes.", 1)
  _expect_kind = flags.DEFINE_enum("expect-kind", None, ["cpu", "gpu", "tpu"], "What the devices must be.")
  _checkpoint_dir = flags.DEFINE_string("checkpoint-dir", "", "Where to write the test checkpoint; all processes see "
                                        "it. Default: where the system keeps temporary files.")
  _timeout = flags.DEFINE_float("timeout", 300, "Seconds until the verdict is that something hangs.", 0)

  def _main(argv: list[str]) -> int:
    """Prints the verdict; returns 0 if all is well, ends the process with 1 if not."""
    del argv
    verdict: dict[str, Any] = {}
    stdout = os.dup(1)
    os.dup2(2, 1)  # Gloo tells of its connections on stdout, from C++, where only the verdict may be

    def say() -> None:
      os.write(stdout, (json.dumps(verdict) + "\n").encode())

    def expire() -> None:
      # A worker that never joins blocks the others inside the runtime, where no exception reaches them.
      verdict["reasons"].append(f"{verdict.pop('at', 'end')}: no answer in {_timeout.value:g} s")
      say()
      os._exit(1)

    watchdog = threading.Timer(_timeout.value, expire)
    watchdog.daemon = True
    watchdog.start()
    examine(_expect_devices.value, _expect_kind.value, _checkpoint_dir.value, verdict)
    watchdog.cancel()
    say()
    if not verdict["ok"]:
      os._exit(1)  # a thread that a failed check left behind, or a peer that is gone, must not hold the exit up
    return 0

  cli.run(_main)
