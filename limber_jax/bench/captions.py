"""`bench captions`: --images captions scored against --references each, beside pycocoevalcap used as its own example.

Both score the same made-up captions by the same metrics: all but SPICE. The peer is what its COCOEvalCap does: cut the
references and the captions into tokens, then one metric after the other. They take turns, ours, theirs, ours, theirs …,
and the ratio is the median of the pairs', above 1 where ours is faster. Metrics must be equal, or the run fails.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from limber_jax.bench import measure
from limber_jax.errors import UserError
from limber_jax.metrics import captions

_IMAGES = flags.DEFINE_integer("images", 5000, "Captions to score.", lower_bound=2)
_REFERENCES = flags.DEFINE_integer("references", 5, "References of each.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 1, "Timed pairs of runs.", lower_bound=1)
_PEER = flags.DEFINE_bool("peer", True, "Time pycocoevalcap too; it needs Java.")
_WORDS = 3000  # of which the captions are made


def main(argv: list[str]) -> None:
  """Prints one JSON object."""
  if argv:
    raise UserError(f"bench captions: unexpected argument {argv[0]!r}")
  java = captions.has_java()
  if _PEER.value and not java:
    raise UserError(f"bench captions: pycocoevalcap {captions.NO_JAVA}; leave it out with --nopeer")
  candidates, references = made(_IMAGES.value, _REFERENCES.value)
  metrics = [m for m in captions.METRICS if m != "spice"]
  times: dict[str, list[float]] = {"ours": [], "theirs": []}
  scores: dict[str, Any] = {}
  for _ in range(_REPEATS.value):
    seconds, found = _timed(lambda: captions.score(candidates, references, metrics))
    times["ours"].append(seconds)
    scores["ours"] = found.metrics
    if _PEER.value:
      seconds, scores["theirs"] = _timed(lambda: peer(candidates, references))
      times["theirs"].append(seconds)
      if scores["ours"] != scores["theirs"]:
        raise UserError(f"bench captions: the metrics differ: {scores}")
  out = measure.surroundings(("pycocoevalcap",)) | {
    "images": _IMAGES.value, "references": _REFERENCES.value, "tokenizer": found.tokenizer, "skipped": found.skipped,
    "metrics": scores["ours"], "seconds": statistics.median(times["ours"]), "seconds_each": times["ours"]}
  if _PEER.value:
    ratio, each = measure.ratios(times["theirs"], times["ours"])
    out |= {"pycocoevalcap_seconds": statistics.median(times["theirs"]), "ratio": ratio, "ratios": each}
  measure.show(out)


def made(images: int, references: int) -> tuple[dict[str, str], dict[str, list[str]]]:
  """Returns ({id: caption}, {id: references}) of 8 to 14 words, frequent and rare as words of a language are."""
  rng = np.random.default_rng(0)
  odds = 1 / np.arange(1, _WORDS + 1)
  words = np.array(["".join(rng.choice(list("aeiourstlnmdkp"), rng.integers(2, 9))) for _ in range(_WORDS)])
  texts = [[" ".join(rng.choice(words, rng.integers(8, 15), p=odds / odds.sum())).capitalize() + "."
            for _ in range(references + 1)] for _ in range(images)]
  return {str(i): t[0] for i, t in enumerate(texts)}, {str(i): t[1:] for i, t in enumerate(texts)}


def peer(candidates: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
  """Returns the metrics as pycocoevalcap's COCOEvalCap computes them, without SPICE."""
  with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
    tokenizer = PTBTokenizer()
    given = tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in references.items()})
    wrote = tokenizer.tokenize({i: [{"caption": text}] for i, text in candidates.items()})
    bleu, _ = Bleu(4).compute_score(given, wrote)
    program = Meteor()
    try:
      meteor, _ = program.compute_score(given, wrote)
    finally:
      program.__del__()  # ends its Java
      program.meteor_p.stdout.close()
      program.meteor_p.stderr.close()
    out = {"meteor": meteor, "rouge_l": Rouge().compute_score(given, wrote)[0],
           "cider_d": Cider().compute_score(given, wrote)[0], **{f"bleu_{n}": b for n, b in enumerate(bleu, 1)}}
  return {name: float(value) for name, value in out.items()}


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
  start = time.perf_counter()
  out = run()
  return time.perf_counter() - start, out
