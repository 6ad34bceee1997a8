"""A plan, and the table of a search, as lines for a terminal."""

import re
from typing import Any

from limber_jax.planning.plan import LABEL
from limber_jax.planning.problems import GIB

_NAMES = {"compute": "compute", "hbm": "HBM", "ici": "ICI"}


def lines(plan: dict[str, Any]) -> list[str]:
  """Returns the lines of what `plan.plan` gives."""
  slices = f"{plan['slices']} × " if plan["slices"] > 1 else ""
  out = [f"{plan['config']} on {slices}{plan['topology']}, {plan['chips']} chips: {LABEL}",
         _row("mesh", f"{mesh(plan['mesh'])}; batch {plan['batch_size']:,}, {plan['dtype']}, remat {plan['remat']}"
              + (f", {plan['num_microbatches']} microbatch{'es' * (plan['num_microbatches'] > 1)}"
                 if "num_microbatches" in plan else ""))]
  if "hosts" in plan:
    hosts = plan["hosts"]
    out.append(_row("hosts", f"{hosts['count']}, each loads {hosts['rows']:,} rows of a batch"
                    + (f", and {hosts['copies']} load the same" if hosts["copies"] > 1 else "")))
  out += _measures(plan) if plan["compiled"] else []
  out += [_row("PROBLEM", problem) for problem in plan["problems"]]
  count = len(plan["problems"])
  verdict = f"{count} problem{'s' * (count > 1)}" if count else "no problem found"
  seconds = f"compiled in {plan['compile_seconds']:.0f} s" if plan["compiled"] else "not compiled"
  versions = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
  return [*out, f"{verdict}; {seconds} by {versions}; nothing was run"]


def _measures(plan: dict[str, Any]) -> list[str]:
  """Returns the lines of a step that was compiled."""
  memory = {k: f"{v / GIB:.3g}" for k, v in plan["memory"].items()}
  flops, seconds, share = plan["flops"], plan["seconds"], plan["share_of_peak"]
  out = [
    _row("memory", f"peak {memory['peak']} of {plan['memory']['limit'] / GIB:.2f} GiB a chip (arguments "
         f"{memory['arguments']}, of which donated {memory['donated']}; temporaries {memory['temporary']})"),
    _row("FLOPs", f"{flops['model'] / 1e12:.4g} T a chip of the model, {flops['hardware'] / 1e12:.4g} T of the "
         f"hardware ({flops['hardware'] / max(flops['model'], 1):.2f} ×), "
         f"{flops['float32'] / max(flops['hardware'], 1):.1%} of them with float32"),
    _row("HBM", f"{plan['hbm_bytes'] / 1e9:.4g} GB a chip")]
  for kind, c in plan["collectives"].items():
    out.append(_row("ICI", f"{kind}: {c['ops']} in the program, {c['runs']} in a step, {c['bytes'] / 1e9:.3g} GB a "
                    f"chip, {c['asynchronous']} asynchronous"))
  if plan["slices"] > 1:
    out.append(_row("", "what goes between slices is counted as ICI; their network is slower"))
  bounds = ", ".join(f"{name} {seconds[key]:.3g} s" for key, name in _NAMES.items())
  out += [
    _row("bounds", f"{bounds}: {_NAMES[plan['bound']]} allows {share['bound']:.0%} of the peak at most"),
    _row("cycles", f"{plan['cycles'] / 1e6:.4g} M by the compiler, {seconds['cycles']:.3g} s at "
         f"{plan['clock'] / 1e9:g} GHz without collectives; with ICI {seconds['estimate']:.3g} s, "
         f"{share['estimate']:.0%} of the peak"),
    _row("heaviest", f"{'of the cycles':>13}{'HBM GB':>9}{'TFLOP':>9}  module, pass")]
  for part in plan["heaviest"]:
    out.append(_row("", f"{part['cycles'] / max(plan['cycles'], 1):13.1%}{part['hbm_bytes'] / 1e9:9.3g}"
                    f"{part['flops'] / 1e12:9.3g}  {part['module']}{', ' * bool(part['pass'])}{part['pass']}"))
  return out


COLUMNS = f"{'data×fsdp×tensor':>16} {'remat':>5} {'microbatches':>12} {'peak GiB':>8} {'compute':>8} {'HBM':>8} " \
          f"{'ICI':>8} {'cycles':>8} {'estimate':>8} {'of peak':>7}"


def variant(row: dict[str, Any]) -> str:
  """Returns the line of one row of `search.search` in a table with COLUMNS; times are seconds."""
  name = "×".join(map(str, row["mesh"].values()))
  start = f"{name:>16} {row['remat']:>5} {row['num_microbatches']:>12} "
  if not row["compiled"]:
    return start + f"cannot be: {row['problems'][0][:160]}"
  seconds = [row["seconds"][key] for key in ("compute", "hbm", "ici", "cycles", "estimate")]
  problems = [re.split("[:,]", problem)[0] for problem in row["problems"]]
  return (start + f"{row['memory']['peak'] / GIB:8.3g} " + " ".join(f"{s:8.3g}" for s in seconds)
          + f" {row['share_of_peak']['estimate']:7.0%}  {', '.join(problems)}").rstrip()


def search_lines(found: dict[str, Any]) -> list[str]:
  """Returns the lines of what `search.search` gives: its table, and the flags of the best."""
  slices = f"{found['slices']} × " if found["slices"] > 1 else ""
  best, limit = found["best"], max((r["memory"]["limit"] for r in found["variants"] if r["compiled"]), default=0)
  count = len(found["variants"])
  out = [f"{found['config']} on {slices}{found['topology']}, {found['chips']} chips"
         f"{f' of {limit / GIB:.2f} GiB' if limit else ''}, batch {found['batch_size']:,}: {count} ways, {LABEL}",
         COLUMNS, *map(variant, found["variants"])]
  if best is None:
    return [*out, "none of them fits"]
  out.append(f"the best that fits, by the compiler's estimate: {' '.join(best['flags'])}")
  return [*out, *(_row("PROBLEM", problem) for problem in best["problems"])]


def mesh(sizes: dict[str, int]) -> str:
  """Returns "data=32 fsdp=2 tensor=1"."""
  return " ".join(f"{axis}={size}" for axis, size in sizes.items())


def _row(name: str, text: str) -> str:
  return f"  {name:<9} {text}"
