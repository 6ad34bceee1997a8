"""Answers to questions about images, as VQA v2 scores them, after a few examples or none.

Source: arXiv 2209.15162, section 4.2 and appendix, which follows MAGMA (2112.05253) and Frozen (2106.13884).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.config import COUNT, SEEDS, Evaluation, Source, choose, ranged
from limber_jax.data import sources as data_sources
from limber_jax.data.contents import contents
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.data.transforms import Record, Transform
from limber_jax.decoding import interleaved
from limber_jax.decoding.generate import row_keys
from limber_jax.decoding.interleaved import SEPARATOR, Layout, example_text, question_text
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.map_names import join, split
from limber_jax.metrics import vqa
from limber_jax.models.cache import Cache
from limber_jax.runtime.parallel import broadcast_from_process_0, replicated

METRICS = ("accuracy", "truncated", "blind_text", "blind_zeros")


@dataclasses.dataclass
class Vqa(Evaluation):
  """Accuracy of VQA v2 after config.shots examples: "accuracy_0shot", "accuracy_4shot", …

  The model reads an image and "Q: … A:". Of what it writes, the first word of the first line is its answer. Before that
  stand the examples, an image and "Q: … A: …" each, ended by a newline. Neither that newline nor how examples are drawn
  is in the paper. Here they are drawn from config.train by each of config.seeds, the same for all questions of a seed,
  and the first of the four are the two and the one. Those whose image cannot be read or that have no answer are passed
  over. A metric after examples is the mean over the seeds; "accuracy_4shot_sd" is the standard deviation between them,
  where there are several.

  Beside them: "accuracy_4shot/number" and so on by type of answer; "…@name" of extra projectors; "…@blind_text" of the
  language model that reads the texts alone; "…@blind_zeros" of the first map where all images are black, those of the
  examples too.

  config.metrics: () = accuracy, blind_text and blind_zeros. Accuracy is there always, the others where they are named.
    Of all of them "truncated" gives "truncated_4shot" and so on: in place of the first word as many words as the
    longest answer of people has, MAGMA's reading. To a first word that reading does nothing.
  config.source, config.train: of data source "vqa", or another whose records have "answers", "answer", "answer_type".
  """

  name = "vqa"
  needs = ("generate", "generate_blind", "prompt", "read")

  train: Source | None = None  # what examples are drawn from
  metrics: tuple[str, ...] = ()  # which of these; () = the evaluation's own choice
  # examples before a question
  shots: tuple[int, ...] = ranged((0,), at_least=0, at_most=COUNT, nonempty=True)
  # of what is drawn: a metric is the mean over them
  seeds: tuple[int, ...] = ranged((0,), at_least=0, at_most=SEEDS, nonempty=True)

  def open(self, context: Context) -> Eval:
    return VqaEval(self, context)


class VqaEval:
  """A `Vqa` whose data are open."""

  def __init__(self, config: Vqa, context: Context):
    name = context.name or config.name
    where = f"evaluation {name!r}"
    for metric in config.metrics:
      choose(f"evals.{name}.metrics", metric, METRICS)
    if not config.shots or min(config.shots) < 0 or not config.seeds:
      raise UserError(f"{where}: shots={config.shots}, seeds={config.seeds}: wanted numbers of examples, 0 or more, "
                      "and at least one seed")
    self._config, self._images = config, context.transform
    self._metrics = config.metrics or ("accuracy", "blind_text", "blind_zeros")
    self._shots, self._most = tuple(dict.fromkeys(config.shots)), max(config.shots)
    self._seeds = tuple(dict.fromkeys(config.seeds)) if self._most else ()
    self._train: data_sources.Source | None = None
    key = {"prompt": example_text("{}", "{}")}  # what answers depend on beside the configuration
    if self._most:
      if config.train is None:
        raise UserError(f"{where}: shots={config.shots}, and no `train` to draw examples from; wanted a data source "
                        "such as VQA v2's train2014")
      self._train = config.train.open()
      key["train"] = self._train.fingerprint()
      if context.results_dir:
        key["train_contents"] = broadcast_from_process_0(lambda: contents(self._train, config.train))
    transform = Ask(context.transform, context.tokenizer, context.length)
    self._runner = Runner(config, dataclasses.replace(context, transform=transform, key={**context.key, **key}))
    source = self._runner.source
    for field, opened in (("source", source), ("train", self._train)):
      if opened is not None and (missing := {"answers", "answer", "answer_type"} - opened.annotation(0).keys()):
        raise UserError(f"{where}: records of its {field} have no {min(missing)!r}; wanted those of data source 'vqa'")
    texts = (source.annotation(i)["text"] for i in range(len(source)))
    self._longest = min(context.length, max(len(context.tokenizer.encode(question_text(text))) for text in texts))
    self._examples = {seed: self._draw(seed, where) for seed in self._seeds}
    self._read: Callable[..., Any] | None = None
    self._types: dict[str, int] = {}

  def _draw(self, seed: int, where: str) -> list[dict[str, Any]]:
    """Returns {"id", "text", "images"} of the examples of a seed, as many as the most shots."""
    out: list[dict[str, Any]] = []
    # RandomState's stream is frozen for ever; that of default_rng may change with numpy.
    for index in np.random.RandomState(seed).permutation(len(self._train)).tolist():
      if len(out) == self._most:
        break
      try:
        record = self._train[index]
        images = {k: v for k, v in self._images(record, None).items() if k.startswith("image")}
      except UserError:
        continue
      if record["answer"].strip():
        out.append({"id": record["id"], "text": example_text(record["text"], record["answer"]), "images": images})
    if len(out) < self._most:
      raise UserError(f"{where}: wanted {self._most} examples, and its `train` has {len(out)} that can be used")
    return out

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    if self._read is None:
      self._read = jax.jit(predict["read"], out_shardings=replicated(self._runner.context.mesh))
    kinds = [split(name)[1] for name in predict if split(name)[0] == "generate"]
    kinds += [name for name in ("blind_text", "blind_zeros") if name in self._metrics]
    out: dict[str, float] = {}
    for kind in kinds:
      prompts = self._prompts(predict, params, stats, kind)
      for shots in self._shots:
        found = []  # by seed
        for seed in self._seeds if shots else (None,):
          prefix = self._prefix(params, stats, kind, prompts, shots, seed)
          found.append(self._scores(self._answers(predict, params, stats, kind, shots, seed, prefix)))
        for name, kind_of_answer in found[0]:
          values = [scores[name, kind_of_answer] for scores in found]
          start = f"{name}_{shots}shot"
          out[join(f"{start}{kind_of_answer and '/'}{kind_of_answer}", kind)] = float(np.mean(values))
          if len(values) > 1 and not kind_of_answer:
            out[join(f"{start}_sd", kind)] = float(np.std(values, ddof=1))
    return out

  def metadata(self) -> dict[str, Any]:
    """Returns Runner.metadata, how questions are put, ids of examples by seed, counts of questions by answer type."""
    out = self._runner.metadata() | {
      "prompt": question_text("{}"), "answer": "the first word of the first line", "answer_types": self._types}
    if self._train is None:
      return out
    return out | {
      "separator": SEPARATOR, "train": {"source": self._config.train.name, "split": self._config.train.split,
                                        "data": self._train.fingerprint()},
      "examples": {str(seed): [example["id"] for example in drawn] for seed, drawn in self._examples.items()}}

  def _prompts(self, predict, params, stats, kind) -> dict[int, np.ndarray]:
    """Returns the prompts [most shots, P, D] of the examples by seed; nothing where none are read."""
    if not self._seeds or kind == "blind_text":
      return {}
    name = "" if kind == "blind_zeros" else kind
    function = predict[join("prompt", name)]
    examples = [example["images"] for drawn in self._examples.values() for example in drawn]
    key = join("image", name) if join("image", name) in examples[0] else "image"
    images = np.stack([images[key] for images in examples])

    def prompt(params, stats, images):
      return function(params, stats, {key: images})

    rows = self._runner.embed_rows(join("prompt", name), prompt, params, stats,
                                   np.zeros_like(images) if kind == "blind_zeros" else images)
    return dict(zip(self._seeds, np.split(rows, len(self._seeds)), strict=True))

  def _prefix(self, params, stats, kind, prompts, shots, seed) -> Cache | None:
    """Returns the cache of what stands before every question, as long for all seeds; None if there is nothing."""
    if not shots and kind != "blind_text":
      return None
    begins = {s: self._before(kind, prompts, shots, s) for s in (self._seeds if shots else (seed,))}
    length, shared = max(len(layout.ids) for layout in begins.values()), np.zeros((0, 1), np.float32)
    if prompts:
      shared = prompts[seed][:shots].reshape(-1, prompts[seed].shape[2])  # [S, D]
    batch = interleaved.stack([begins[seed]], 1, length, self._runner.context.tokenizer.eot)
    with jax.set_mesh(self._runner.context.mesh):
      return self._read(params, stats, batch | {"shared": shared})

  def _before(self, kind, prompts, shots, seed) -> Layout:
    """Returns what stands before every question."""
    tokenizer = self._runner.context.tokenizer
    segments = [x for i in range(shots) for x in (i, self._examples[seed][i]["text"])]
    if kind != "blind_text":
      return Layout.of(tuple(segments), tokenizer, prompts[seed].shape[1])
    # Texts without an image between them are read as one, and what comes between two of them, such as the space that a
    # tokenizer makes of a newline, is only seen with the next one there: so with what all questions begin with.
    start = question_text("").split()[0]
    ids, source = Layout.of((*segments, start), tokenizer, 0)
    end = len(ids) - len(tokenizer.encode(start))
    return Layout(ids[:end], source[:end])

  def _answers(self, predict, params, stats, kind, shots, seed, prefix) -> list[dict[str, Any]]:
    """Returns {"index", "id", "answer", "raw"} of each question that can be put; "raw" is all that was written."""
    tokenizer, decoding = self._runner.context.tokenizer, self._runner.context.decoding
    function = predict[{"blind_text": "generate_blind", "blind_zeros": "generate"}.get(kind, join("generate", kind))]

    def write(params, stats, batch):
      batch = batch | {"tokens": batch["tokens"][:, : self._longest], "mask": batch["mask"][:, : self._longest]}
      if kind == "blind_zeros":
        batch |= {k: jnp.zeros_like(v) for k, v in batch.items() if k.startswith("image")}
      if decoding.method == "sample":
        batch |= {"key": row_keys(jax.random.key(decoding.seed), batch["index"])}
      generated = function(params["model"], stats, batch, tokenizer.eot, params["prefix"])
      return {"tokens": generated.tokens, "length": generated.lengths}

    def record(row: dict[str, np.ndarray]) -> dict[str, str]:
      raw = tokenizer.decode(row["tokens"][: row["length"]].tolist())
      return {"answer": vqa.first_word(_line(raw)), "raw": raw}

    program = join(f"{shots}shot", kind)
    return self._runner.collect(program if seed is None else join(f"{shots}shot_seed{seed}", kind), write,
                                {"model": params, "prefix": prefix}, stats, record=record, program=program).records

  def _scores(self, records) -> dict[tuple[str, str], float]:
    """Returns the mean accuracy by (reading, type of answer), "" for all types."""
    found: dict[tuple[str, str], list[float]] = {}
    for record in records:
      note = self._runner.source.annotation(record["index"])
      given = {"accuracy": record["answer"]}
      if "truncated" in self._metrics:
        given["truncated"] = vqa.truncate(_line(record["raw"]), note["answers"])
      for name, answer in given.items():
        score = vqa.accuracy(answer, note["answers"])
        for kind in ("", note["answer_type"]):
          found.setdefault((name, kind), []).append(score)
    self._types = {kind: len(found[name, kind]) for name, kind in sorted(found) if name == "accuracy" and kind}
    return {key: float(np.mean(found[key])) for key in sorted(found)}


@dataclasses.dataclass(frozen=True)
class Ask:
  """What another transform gives, with "tokens" int32 [length] and "mask" bool [length] of what asks the question."""

  images: Transform
  tokenizer: Tokenizer
  length: int

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    ids = self.tokenizer.encode(question_text(record["text"]))
    if len(ids) > self.length:
      raise UserError(f"a question of {len(ids):,} tokens; config.data.length lets {self.length} in")
    tokens = np.full(self.length, self.tokenizer.eot, np.int32)
    tokens[: len(ids)] = ids
    return self.images(record, rng) | {"tokens": tokens, "mask": np.arange(self.length) < len(ids)}


def _line(text: str) -> str:
  return text.partition("\n")[0]
