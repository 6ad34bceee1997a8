"""Which module of a model, and which pass through it, an operation of a compiled program comes from."""

import re

# What JAX puts between the modules of an op_name.
_STRUCTURE = re.compile(
  r"while|body|cond|closed_call|checkpoint|remat\w*|rematted_computation|custom_[jv][vj]p_call\w*|branch_\d+_fun|"
  r"shard_map|pjit|core_call|\w+\(.*\)")


def part_of(op_name: str) -> tuple[str, str]:
  """Returns (the module, the pass) of an op_name: ("ViT/blocks/attn/q", "backward").

  Passes are "forward", "backward", "recomputed" (again in the backward pass) and "" of what is outside of modules:
  "loss", "update" (the optimizer, with the norms that are logged), and "unnamed", what the compiler added by itself:
  copies between memories and layouts.
  """
  op_name = op_name.partition(";")[0]  # of what the compiler made one, the first
  if not re.match(r"jit\(|checkpoint/|while/", op_name):
    return "unnamed", ""
  parts = _split(re.sub(r"^jit\(\w+\)/", "", op_name))
  tower = next((found[1] for p in parts if (found := re.fullmatch(r"(?:transpose\()?jvp\((\w+)\)+", p))), "")
  path = [p for p in (tower, *parts[:-1]) if p and not _STRUCTURE.fullmatch(p)]
  if not path:
    return ("loss" if "jvp(" in op_name else "update"), ""
  back = "transpose(" in op_name or op_name.startswith("checkpoint/")
  return "/".join(path), "recomputed" if "rematted_computation" in op_name else "backward" if back else "forward"


def _split(op_name: str) -> list[str]:
  """Returns what stands between the slashes that are in no parentheses."""
  out, depth = [""], 0
  for c in op_name:
    depth += (c == "(") - (c == ")")
    if c == "/" and depth == 0:
      out.append("")
    else:
      out[-1] += c
  return out
