"""Scores of captions against references, by the COCO caption evaluation: CIDEr-D, BLEU, METEOR, ROUGE-L, SPICE.

pycocoevalcap computes them. What is around it is ours: line separators inside a caption cannot move the captions behind
it to other images, nothing is written beside the package, no Java process outlives a call, whatever happens, and
without Java captions are cut into tokens by `ptb`, and METEOR and SPICE are left out.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import util

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

from limber_jax.errors import UserError, did_you_mean
from limber_jax.metrics import ptb

METRICS = ("cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "spice")
NO_JAVA = "needs Java, and there is no `java` that runs"
_SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")  # of SPICE, in its lib directory
_JAVA = ("java", "-Dfile.encoding=UTF-8")


@dataclass(frozen=True)
class Scores:
  """What captions got: CIDEr-D from 0 to 10, all others from 0 to 1."""

  metrics: dict[str, float]           # by metric, of all images together
  per_image: dict[str, dict[str, float]]  # by id and metric; where SPICE cannot tell, the image has none
  tokenizer: str                      # java: the Stanford tokenizer | python: limber_jax.metrics.ptb
  skipped: dict[str, str]             # metric -> why it is not there


def score(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]],
          metrics: Sequence[str] = METRICS) -> Scores:
  """Returns the scores of one caption an image against its references.

  CIDEr-D weighs words by how many of these images have them in a reference: a part of the images has scores of its
  own, and a single image has 0. An empty caption counts like any other.

  Args:
    candidates: caption by the id of its image.
    references: one or more by the id of the same images.
    metrics: some of METRICS.

  Raises:
    UserError: a metric is unknown, the ids differ, an image has no references, or Java fails.
  """
  if unknown := next((m for m in metrics if m not in METRICS), None):
    raise UserError(f"no metric {unknown!r} of captions{did_you_mean(unknown, METRICS)}")
  if candidates.keys() != references.keys():
    only = sorted(candidates.keys() ^ references.keys())
    raise UserError(f"captions and references are not of the same images: {len(only)} have only one of them, such as "
                    f"{only[0]!r}")
  if bare := next((i for i in candidates if not references[i]), None):
    raise UserError(f"image {bare!r} has no references to score its caption against")
  if not candidates:
    raise UserError("no captions to score")
  java = has_java()
  skipped = {} if java else {m: NO_JAVA for m in ("meteor", "spice") if m in metrics}
  if java and "spice" in metrics and (missing := _missing_models()):
    skipped["spice"] = f"needs {missing}, which pycocoevalcap downloads and we do not"
  ids = list(candidates)
  hypotheses = {i: [text] for i, text in zip(ids, tokenize([candidates[i] for i in ids], java=java), strict=True)}
  cut = iter(tokenize([text for i in ids for text in references[i]], java=java))
  targets = {i: [next(cut) for _ in references[i]] for i in ids}

  found: dict[str, tuple[float, Sequence[float]]] = {}
  with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as programs:
    waiting = None
    if "meteor" in metrics and "meteor" not in skipped:  # its program reads for seconds, while Python counts
      waiting = pool.submit(programs.enter_context(_meteor()), hypotheses, targets)
    if "cider_d" in metrics:
      found["cider_d"] = Cider().compute_score(targets, hypotheses)
    if any(m.startswith("bleu") for m in metrics):
      overall, each = Bleu(4).compute_score(targets, hypotheses, verbose=0)
      found |= {f"bleu_{n}": pair for n, pair in enumerate(zip(overall, each, strict=True), 1)}
    if "rouge_l" in metrics:
      found["rouge_l"] = Rouge().compute_score(targets, hypotheses)
    if "spice" in metrics and "spice" not in skipped:
      found["spice"] = _spice(hypotheses, targets)
    if waiting:
      found["meteor"] = waiting.result()
  wanted = [m for m in metrics if m in found]
  return Scores(
    metrics={m: float(found[m][0]) for m in wanted},
    per_image={i: {m: float(found[m][1][row]) for m in wanted if math.isfinite(found[m][1][row])}
           for row, i in enumerate(ids)},
    tokenizer="java" if java else "python", skipped=skipped)


def tokenize(texts: Sequence[str], *, java: bool) -> list[str]:
  """Returns the tokens of each text with spaces between them, in lower case and without punctuation.

  Brackets stay, as "-lrb-" and "-rrb-": the evaluation drops upper-case ones and the tokens are lower-case.

  Args:
    texts: captions, on any number of lines each.
    java: whether the Stanford tokenizer does it, or `ptb`.

  Raises:
    UserError: Java fails.
  """
  lines = [one_line(text) for text in texts]
  cut = _stanford(lines) if java else [" ".join(ptb.tokenize(line)) for line in lines]
  return [" ".join(w for w in line.rstrip().split(" ") if w not in PUNCTUATIONS) for line in cut]


def one_line(text: str) -> str:
  """Returns the text without anything that ends a line to Java or Python, with single spaces, as valid UTF-8."""
  return " ".join(text.split()).encode(errors="replace").decode()


@functools.cache
def has_java() -> bool:
  """Returns whether there is a Java that runs."""
  if not shutil.which("java"):
    return False
  return subprocess.run(["java", "-version"], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def _package(name: str) -> str:
  """Returns the directory of a part of pycocoevalcap, where its jars lie."""
  return next(iter(util.find_spec(f"pycocoevalcap.{name}").submodule_search_locations))


def _stanford(lines: Sequence[str]) -> list[str]:
  """Returns the tokens of each line by the Stanford tokenizer, punctuation included."""
  jar = os.path.join(_package("tokenizer"), STANFORD_CORENLP_3_4_1_JAR)
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "captions.txt")
    with open(path, "w", encoding="utf-8", newline="") as file:
      file.write("\n".join(lines))
    done = subprocess.run([*_JAVA, "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase",
                           path], capture_output=True, stdin=subprocess.DEVNULL, start_new_session=True)
  out = done.stdout.decode().split("\n")
  if done.returncode or len(out) != len(lines):
    raise UserError(f"the Stanford tokenizer gave {len(out)} lines for {len(lines)} captions: {_last(done.stderr)}")
  return out


@contextlib.contextmanager
def _meteor() -> Iterator[Callable[..., tuple[float, list[float]]]]:
  """Starts METEOR's program; gives the function of hypotheses and references that asks it for all and for each."""
  command = [*_JAVA, "-Xmx2G", "-jar", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
  with tempfile.TemporaryFile() as errors, subprocess.Popen(
      command, cwd=_package("meteor"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
      start_new_session=True) as program:  # what a terminal sends, Ctrl-C or SIGHUP, is this process's to answer

    def tell(*fields: str) -> None:
      program.stdin.write(f"{' ||| '.join(fields)}\n".encode())
      program.stdin.flush()

    def answer() -> str:
      if not (line := program.stdout.readline().decode()):
        raise EOFError("it ended")
      return line.strip()

    def ask(hypotheses: Mapping[str, list[str]], targets: Mapping[str, list[str]]) -> tuple[float, list[float]]:
      try:
        statistics = []
        for i, (text,) in hypotheses.items():
          tell("SCORE", *targets[i], text.replace("|||", "").replace("  ", " "))
          statistics.append(answer())
        tell("EVAL", *statistics)
        each = [float(answer()) for _ in statistics]
        return float(answer()), each
      except (OSError, EOFError, ValueError) as error:
        program.kill()
        program.wait()
        errors.seek(0)
        raise UserError(f"METEOR's program failed ({error}): {_last(errors.read())}") from error

    try:
      yield ask
    finally:
      program.kill()  # it would wait for more
      with contextlib.suppress(OSError):  # of what it did not read
        program.stdin.close()


def _spice(hypotheses: Mapping[str, list[str]], targets: Mapping[str, list[str]]) -> tuple[float, list[float]]:
  """Returns SPICE of all images together and of each, NaN where a scene has nothing to compare."""
  inputs = [{"image_id": number, "test": hypotheses[i][0], "refs": targets[i]} for number, i in enumerate(hypotheses)]
  with tempfile.TemporaryDirectory() as folder:
    given, got, cache = (os.path.join(folder, name) for name in ("in.json", "out.json", "cache"))
    os.mkdir(cache)
    with open(given, "w", encoding="utf-8") as file:
      json.dump(inputs, file)
    # Java has kept its own classes from SPICE since version 16; version 8 does not know the variable that opens them.
    done = subprocess.run(
      [*_JAVA, "-Xmx8G", "-jar", "spice-1.0.jar", given, "-cache", cache, "-out", got, "-subset", "-silent"],
      cwd=_package("spice"), capture_output=True, stdin=subprocess.DEVNULL, start_new_session=True,
      env=os.environ | {"JDK_JAVA_OPTIONS": "--add-opens=java.base/java.lang=ALL-UNNAMED"})
    if done.returncode or not os.path.exists(got):
      raise UserError(f"SPICE's program failed: {_last(done.stderr)}")
    with open(got, encoding="utf-8") as file:
      found = {row["image_id"]: row["scores"]["All"]["f"] for row in json.load(file)}
  each = [math.nan if found[number] is None else float(found[number]) for number in range(len(inputs))]
  return sum(each) / len(each), each


def _missing_models() -> str:
  """Returns the first of SPICE's models that is not there, "" if all are."""
  return next((m for m in _SPICE_MODELS if not os.path.exists(os.path.join(_package("spice"), "lib", m))), "")


def _last(output: bytes) -> str:
  lines = output.decode(errors="replace").strip().splitlines()
  return lines[-1] if lines else "it said nothing"
