"""Results of evaluations on disk: results.json, the report of it, and what CLIP_benchmark's tables read."""

import itertools
import json
import os
import sys
from typing import Any

from limber_jax import config_history
from limber_jax.evals import clip_benchmark
from limber_jax.reports import report
from limber_jax.runtime import atomic, lock
from limber_jax.training.results import FILE, earlier_results

WAIT = 60.0  # seconds, until others have written their results


def write(found: dict[str, Any], out: str) -> None:
  """Writes results.json, in which other evaluations of the same weights stay, report.md and its pictures.

  Results of the same run at another step, or by other versions, are kept beside, as results-step100.json. Of sets of
  CLIP_benchmark and DataComp also what their tables read is written: `limber_jax.evals.clip_benchmark.files`.

  Raises UserError if it cannot, or if the results.json there is no such file, or of something else.
  """
  path = os.path.join(out, FILE)
  with lock.Lock(f"{path}{lock.NAME}", wait=WAIT):  # another evaluation may end at this moment
    _write(found, out, path)


def _write(found: dict[str, Any], out: str, path: str) -> None:
  earlier, same = earlier_results(found, path)
  if same:
    for key in ("evaluations", "failed"):
      found[key] = {n: config_history.keys(e) for n, e in earlier[key].items()
                    if n not in found["evaluations"] and n not in found["failed"]} | found[key]
  elif earlier is not None:
    step = int(earlier["step"])
    ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (os.path.join(out, f"results-step{step}{end}.json") for end in ends)
    kept = next(name for name in names if not os.path.exists(name))
    os.replace(path, kept)
    what = f"step {step}" if step != found["step"] else "other versions, or another name or seed"
    print(f"{path} was of {what}; it is kept as {os.path.basename(kept)}", file=sys.stderr, flush=True)
  with atomic.atomic_write(path) as file:
    file.write(json.dumps(found, indent=1))
  report.write(found, out)
  clip_benchmark.write(found, out)
