"""What a command finds around it as it starts: an encoding, a home, a limit on memory, devices."""

import codecs
import os
import resource
import sys
import traceback
from collections.abc import Sequence

from limber_jax.errors import UserError

# Bytes of address space that a limit (ulimit -v) has to leave. Dozens of threads have a stack and an arena each, and
# where one gets no memory libraries die in many ways or wait for ever: training the quickstart on two cores stood still
# in OpenBLAS as it loads at 2.2 GB and in XLA's compiler at 3.0 GB; with 5.1 GB it took 3.2 GB and went to its end.
NEEDED = 4_000_000_000
_TEXTS = ("prompt", "labels", "config.decoding.prompt", "config.name")  # flags whose values are no paths


def speak_utf8() -> None:
  """Starts this program again, as itself, in Python's UTF-8 mode where the locale says another encoding.

  Under LC_ALL=C with PYTHONUTF8=0, say, "é" would reach a tokenizer as two surrogates, and a name of a file that a
  table holds could not be opened: labels, prompts, names and files are UTF-8 whatever the locale.
  """
  if codecs.lookup(sys.getfilesystemencoding()).name != "utf-8":
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ["PYTHONUTF8"] = "1"  # of the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def at_home(argv: Sequence[str]) -> list[str]:
  """Returns arguments in which ~ at the start of a path is the home, which shells leave behind a = and in quotes."""
  out = list(argv[:1])
  for argument in argv[1:]:
    head, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    name = head.lstrip("-")
    if name == "init":  # PART=PATH
      part, equals_too, value = value.partition("=")
      head += equals + part
      equals = equals_too
    if value.startswith("~") and name not in _TEXTS:
      value = os.path.expanduser(value)
    out.append(f"{head}{equals}{value}")
  return out


def check_memory() -> None:
  """Raises UserError where a limit on address space is below what is needed to start."""
  limit = resource.getrlimit(resource.RLIMIT_AS)[0]
  if limit != resource.RLIM_INFINITY and limit < NEEDED:
    raise UserError(f"the address space of this process is limited to {limit / 1e9:.1f} GB (ulimit -v, or the batch "
                    f"system's), and {NEEDED / 1e9:.0f} GB are needed to start the threads of JAX; raise the limit: "
                    "ulimit -v unlimited")


def no_device(error: BaseException) -> str:
  """Returns the line for an error of JAX that finds no device of the kind that JAX_PLATFORMS asks for; "" of others."""
  jax = sys.modules.get("jax")
  asked = jax and jax.config.jax_platforms
  code = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
  if not asked or not any(c.co_name == "backends" and c.co_filename.endswith("xla_bridge.py") for c in code):
    return ""
  why = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0] or "no such device"
  line = f"JAX_PLATFORMS={asked}: JAX cannot start on that here ({why})"
  if jax.distributed.is_initialized():  # another backend would wait for the other processes
    return f"{line}; unset it to have JAX choose"
  try:
    jax.config.update("jax_platforms", "")
    there = dict.fromkeys((jax.devices()[0].platform, "cpu"))
    return f"{line}; there is {' and '.join(there)}: set it to {' or '.join(there)}, or unset it to have JAX choose"
  except Exception:
    return f"{line}; set JAX_PLATFORMS=cpu, or unset it to have JAX choose"
  finally:
    jax.config.update("jax_platforms", asked)
