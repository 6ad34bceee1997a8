"""Names of tensors as training left them: what stands before all of them comes off, and one set of weights is chosen.

A file is named by its path, or as `PATH#KEY` where it holds several sets of weights: KEY is what the names of the one
that is meant begin with, such as `epoch_3.pt#state_dict_ema`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from limber_jax.errors import UserError, did_you_mean
from limber_jax.weights import files

# What holds a set of weights beside other things, as training scripts call it.
WRAPPERS = ("state_dict", "state_dict_ema", "model_state_dict", "ema_state_dict", "ema", "model_ema", "ema_model",
            "params", "params_ema", "net", "network", "weights", "model_weights")
# What a module's name leaves before the names of another that it holds; wrappers too. `module` is DataParallel's.
PREFIXES = ("model", "module", "_orig_mod", "clip", "clip_model", "_forward_module", "_fsdp_wrapped_module")
# Left by torch.compile, FSDP and checkpointed activations wherever they were applied.
INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# What lies beside the weights in a checkpoint, and is none.
BESIDE = re.compile(r"(optim(izer)?s?|opt|scaler|grad_scaler|amp|(lr_)?schedulers?)(_states?|_state_dict)?|"
                    r"epoch|(global_)?step|iter(ation)?|(cuda_|random_)?rng_states?|args|config|cfg|hparams|"
                    r"hyper_parameters|loops|callbacks|best_\w+|loss(es)?|metrics")


def split(path: str) -> tuple[str, str]:
  """Returns (file, key) of `PATH#KEY`, and (path, "") of a path that is there, whatever its name, or without a key."""
  if "#" not in path or os.path.exists(path):
    return path, ""
  file, _, key = path.rpartition("#")
  return file, key


def weights(path: str) -> tuple[dict[str, files.Tensor], str]:
  """Returns (the tensors of a file by their model's own names, what was done to get there: a line or "").

  Raises:
    UserError: as `files.tensors`, or it is not clear which of several sets of weights is meant.
  """
  file, key = split(path)
  tensors, off, aside = unwrap(files.tensors(file), file, key)
  parts = [f"names are taken without {off!r}"] * bool(off) + [f"{', '.join(aside)} set aside"] * bool(aside)
  return tensors, f"{file}: {'; '.join(parts)}" if parts else ""


def unwrap(tensors: Mapping[str, Any], path: str, key: str = "") -> tuple[dict[str, Any], str, list[str]]:
  """Returns (tensors without what stands before their names, what came off, groups of tensors that are no weights).

  Args:
    tensors: by names whose parts are joined by dots or slashes.
    path: of their file, for messages.
    key: what the names of the set that is meant begin with; "" where there is but one.

  Raises:
    UserError: several sets of weights, or no tensor below the key.
  """
  out, off, aside = dict(tensors), "", []
  if key:
    out = _below(out, key)
    if not out:
      raise UserError(f"{path}: no tensors below {key!r}{did_you_mean(key, {_first(name) for name in tensors})}")
    off = f"{key}."
  while True:
    groups: dict[str, list[str]] = {}
    for name in out:
      groups.setdefault(_first(name), []).append(name)
    known = [g for g in groups if g in WRAPPERS + PREFIXES and all(len(name) > len(g) for name in groups[g])]
    others = [g for g in groups if g not in known]
    beside = [g for g in others if BESIDE.fullmatch(g)]
    wrappers = [g for g in known if g in WRAPPERS]
    if len(known) == 1 and len(beside) == len(others):
      out, off, aside = _below(out, known[0]), f"{off}{known[0]}.", aside + beside
    elif wrappers or (len(known) > 1 and len(beside) == len(others)):
      raise UserError(f"{path}: not clear what is meant of {', '.join(sorted(groups))}; name one of them as "
                      f"{path}#{off}{(wrappers or known)[0]}")
    else:
      break
  plain = {re.sub(rf"(?<![^./])({'|'.join(INNER)})[./]", "", name): tensor for name, tensor in out.items()}
  if len(plain) < len(out):
    raise UserError(f"{path}: two tensors have one name without {' and '.join(INNER)}")
  inner = sorted({part for name in out for part in name.split(".") if part in INNER})
  return plain, off + "".join(f"…{part}." for part in inner), aside


def _first(name: str) -> str:
  return re.split(r"[./]", name, maxsplit=1)[0]


def _below(tensors: Mapping[str, Any], key: str) -> dict[str, Any]:
  return {name[len(key) + 1 :]: tensor for name, tensor in tensors.items()
          if name.startswith(key) and name[len(key) : len(key) + 1] in (".", "/") and len(name) > len(key) + 1}
