"""Captions against the captions that people wrote: COCO and NoCaps, as in section 5.1 of arXiv 2209.15162."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from limber_jax.config import Compute, Evaluation, choose
from limber_jax.data import tokenizers, transforms
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.class_mention import SHEET, draw
from limber_jax.evals.generation import CaptionGenerator, map_of
from limber_jax.evals.result_store import Results
from limber_jax.evals.word_recall import references_of
from limber_jax.map_names import join
from limber_jax.metrics import captions as metric
from limber_jax.metrics.clipscore import PREFIX, clip_score, ref_clip_score
from limber_jax.models import clip, spec
from limber_jax.models.text import check_end
from limber_jax.runtime.atomic import atomic_write
from limber_jax.runtime.parallel import broadcast_from_process_0, place, replicated
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.weights import load
from limber_jax.weights.digest import digest

CLIP_METRICS = ("clip_s", "ref_clip_s")
METRICS = (*metric.METRICS, *CLIP_METRICS)
DOMAINS = {"in-domain": "in", "near-domain": "near", "out-domain": "out"}  # of NoCaps -> behind the name of a metric
NO_SCORER = "needs a CLIP, and the evaluation's `scorer` names none"


@dataclasses.dataclass
class Captions(Evaluation):
  """Writes a caption for every image and scores it against the image's references.

  Returns "cider_d" (0 to 10: the papers print 100 times it), "bleu_1" to "bleu_4", "meteor", "rouge_l", "spice", with a
  scorer "clip_s" and "ref_clip_s" too, and "count", the number of images. What cannot be had here is left out, and
  metadata say why. Metrics "@name" are of extra projectors, "@blind" of the language model without any image.

  Where records have domains (NoCaps), beside the metrics of all stand "cider_d/in", "/near" and "/out", with word
  frequencies from the references of that domain alone, and "clip_s/in", "ref_clip_s/in", "count/in" and so on.

  metrics: some of these names; () = all.
  scorer: weights of the CLIP behind CLIPScore, anything that weights.load reads. The papers' is OpenAI's ViT-B/32.
  scorer_model: what they are of, where nothing beside them says it: a size or a configuration file, as of weights.load.

  captions_NAME.png in the workdir shows the first 40 images; scores.jsonl in the results' folder has a line an image.
  """

  name = "captions"
  needs = ("generate",)

  metrics: tuple[str, ...] = ()  # which of these; () = the evaluation's own choice
  scorer: str = ""        # weights of the CLIP behind CLIPScore; "" leaves CLIPScore out
  scorer_model: str = ""  # what those are of, if nothing beside them says it: a size or a configuration file

  def open(self, context: Context) -> Eval:
    return CaptionsEval(self, context)


class CaptionsEval:
  """A `Captions` whose data are open."""

  def __init__(self, config: Captions, context: Context):
    for name in config.metrics:
      choose("evals.….metrics", name, METRICS)
    wanted = config.metrics or METRICS
    self._metrics = [m for m in metric.METRICS if m in wanted]
    self._clip_metrics = [m for m in CLIP_METRICS if m in wanted]
    if config.metrics and self._clip_metrics and not config.scorer:
      raise UserError(f"evaluation 'captions': {self._clip_metrics[0]!r} {NO_SCORER}; set it to weights of OpenAI's "
                      "ViT-B/32, as the papers have it")
    self._scorer = Scorer(config.scorer, config.scorer_model, context) if config.scorer and self._clip_metrics else None
    if self._scorer:
      sees = transforms.with_options(self._scorer.transform, context.images)
      context = dataclasses.replace(context, transform=WithScorer(context.transform, sees))
    self._runner = Runner(config, context, grouped=True)
    self._write = CaptionGenerator(self._runner)
    self._metadata: dict[str, Any] = {}

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    metrics: dict[str, float] = {}
    self._metadata, judge = {"empty": {}}, None
    for name, function in predict.items():
      if not name.startswith("generate"):
        continue
      found = self._write(name, function, params, stats)
      if not found.records:
        raise UserError(f"evaluation 'captions': no image of data source {self._runner.config.source.name!r} can be "
                        "read")
      captions = [r["caption"] for r in found.records]
      records = [self._runner.source.annotation(i) for i in found.index.tolist()]
      references = [list(references_of(r)) for r in records]
      domains = [DOMAINS[r["domain"]] if "domain" in r else "" for r in records]
      map_ = map_of(name)
      scored = broadcast_from_process_0(partial(self._score, captions, references, domains))
      scores = scored["per_image"]
      if self._scorer:
        judge = judge or self._scorer.judge(self._runner, found.index, references)
        for one, more in zip(scores, judge(captions), strict=True):
          one |= {m: more[m] for m in self._clip_metrics}
      parts = {"": [True] * len(scores), **{f"/{d}": [x == d for x in domains] for d in DOMAINS.values()}}
      for part, rows in parts.items():
        inside = [one for one, there in zip(scores, rows, strict=True) if there]
        if inside:
          own = scored["metrics"][part] | {m: math.fsum(i[m] for i in inside) / len(inside) for m in self._clip_metrics
                                           if self._scorer}
          metrics |= {join(f"{key}{part}", map_): value for key, value in own.items()}
          metrics[f"count{part}"] = float(len(inside))
      self._metadata["empty"][join("", map_) or "first"] = sum(not caption.strip() for caption in captions)
      self._metadata |= {"references": sum(map(len, references)), "tokenizer": scored["tokenizer"],
                         "skipped": scored["skipped"]}
      if jax.process_index() == 0:
        self._save(found, scores, map_)
    return metrics

  def metadata(self) -> dict[str, Any]:
    """Returns `Runner.metadata`, how captions were written and cut into tokens, and which metrics are left out and why.

    "empty" counts captions without a word, by map: "first", "@name", "@blind".
    """
    scorer = {"scorer": {"digest": self._scorer.digest, "prefix": PREFIX}} if self._scorer else {}
    absent = {} if self._scorer else dict.fromkeys(self._clip_metrics, NO_SCORER)
    return {**self._runner.metadata(), **self._metadata, "skipped": self._metadata["skipped"] | absent, **scorer,
            "decoding": dataclasses.asdict(self._runner.context.decoding)}

  def _score(self, captions: Sequence[str], references: Sequence[Sequence[str]], domains: Sequence[str]
             ) -> dict[str, Any]:
    """Returns {"metrics" (by part of the images), "per_image" (a dict an image), "tokenizer", "skipped"}."""
    wrote = {str(row): text for row, text in enumerate(captions)}
    given = {str(row): texts for row, texts in enumerate(references)}
    whole = metric.score(wrote, given, self._metrics)
    metrics = {"": whole.metrics}
    for domain in DOMAINS.values():
      if rows := [str(row) for row, d in enumerate(domains) if d == domain]:
        part = metric.score({i: wrote[i] for i in rows}, {i: given[i] for i in rows},
                            [m for m in self._metrics if m == "cider_d"])
        metrics[f"/{domain}"] = part.metrics
    return {"metrics": metrics, "per_image": list(whole.per_image.values()), "tokenizer": whole.tokenizer,
            "skipped": whole.skipped}

  def _save(self, found: Results, scores: Sequence[dict[str, float]], map_: str) -> None:
    """Writes the scores of each image beside its other results, and of the first map the picture."""
    context = self._runner.context
    if context.results_dir:
      os.makedirs(context.results_dir, exist_ok=True)
      path = os.path.join(context.results_dir, f"{join('scores', map_)}.jsonl")
      with atomic_write(path) as file:
        for record, one in zip(found.records, scores, strict=True):
          kept = {key: record[key] for key in ("index", "id", "caption")}
          file.write(json.dumps(kept | one) + "\n")
    if not map_:
      shown = found.records[: SHEET[0] * SHEET[1]]
      images = [context.transform(self._runner.source[r["index"]], None)["image"] for r in shown]
      os.makedirs(context.workdir, exist_ok=True)
      draw(images, [r["caption"] for r in shown], [True] * len(shown),
           f"The first {len(shown)} of {len(found.records):,} captions",
           os.path.join(context.workdir, f"captions_{context.name or 'captions'}.png"))


@dataclasses.dataclass(frozen=True)
class WithScorer:
  """What the model sees of a record, and as "scorer_image" what the scorer sees of it."""

  own: transforms.Transform
  scorer: transforms.Transform

  def __call__(self, record: dict[str, Any], rng: np.random.Generator | None) -> dict[str, Any]:
    return self.own(record, rng) | {"scorer_image": self.scorer(record, rng)["image"]}


class Scorer:
  """The CLIP behind CLIPScore, in float32 on the mesh of an evaluation."""

  def __init__(self, weights: str, model: str, context: Context):
    """Reads the model at `weights`, of which `model` may say what it is.

    Raises:
      UserError: it or its tokenizer is not there, or they do not fit.
    """
    loaded = load.load(weights, model, flag=f"--config.evals.{context.name or 'captions'}.scorer_model")
    size, settings = loaded.size, load.own_tokenizer(weights)
    self._tokenizer, self._length = tokenizers.load(settings), size.text.context
    if self._tokenizer.vocab_size > size.text.vocab:
      raise UserError(f"scorer {weights}: its tokenizer {settings.name!r} has {self._tokenizer.vocab_size} ids, the "
                      f"model only {size.text.vocab}")
    check_end(size.text, self._tokenizer.eot, f"scorer {weights}: its tokenizer {settings.name!r}")
    self.transform = transforms.Compose((transforms.Decode(), transforms.encoder_rule(size, size.image.image_size)))
    self.digest = digest((loaded.params, loaded.stats))
    # What is kept of images depends on their preprocessing too; CLIP's own, as ever, has no name there.
    pixels = {name: value for name in spec.PIXELS if (value := getattr(size, name)) != getattr(clip.ClipConfig, name)}
    self._pixels = f"_{hashlib.sha256(json.dumps(pixels).encode()).hexdigest()[:8]}" if pixels else ""
    self._predict = Contrastive(clip.build(size, Compute(dtype="float32")), "softmax", 0, 1, ()).predict()
    whole = replicated(context.mesh)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.float32, sharding=whole),
                        (loaded.params, loaded.stats))
    self._variables = place((loaded.params, loaded.stats), like)

  def judge(self, runner: Runner, index: np.ndarray, references: Sequence[Sequence[str]]
            ) -> Callable[[Sequence[str]], list[dict[str, float]]]:
    """Returns what gives {"clip_s", "ref_clip_s"} of a caption for each of these images.

    Args:
      runner: of the images, whose transform is a `WithScorer`.
      index: numbers [N] of the images in its source.
      references: of each.

    Raises:
      UserError: one of the images cannot be read.
      Stopped: between two batches, the run was asked to end.
    """

    def embed(params, stats, batch):
      return {"embedding": self._predict["embed_image"](params, stats, batch["scorer_image"])}

    found = runner.collect(f"scorer_{self.digest[:16]}{self._pixels}", embed, *self._variables, keep=("embedding",))
    if len(lost := np.setdiff1d(index, found.index)):
      raise UserError(f"evaluation 'captions': image {lost[0]} could be read for its caption, and not for CLIPScore")
    images = found.arrays["embedding"][np.searchsorted(found.index, index)]
    given = np.split(self._texts(runner, [text for texts in references for text in texts]),
                     np.cumsum([len(texts) for texts in references])[:-1])

    def score(captions: Sequence[str]) -> list[dict[str, float]]:
      wrote = self._texts(runner, captions)
      both = zip(clip_score(images, wrote), ref_clip_score(images, wrote, given), strict=True)
      return [{"clip_s": float(a), "ref_clip_s": float(b)} for a, b in both]

    return score

  def _texts(self, runner: Runner, texts: Sequence[str]) -> np.ndarray:
    """Returns unit embeddings [n, E]; the same text has the same one, whichever batch it is in."""
    tokens = self._tokenizer([PREFIX + text for text in texts], self._length)
    distinct, which = np.unique(tokens, axis=0, return_inverse=True)
    return runner.embed_rows("scorer_text", self._predict["embed_text"], *self._variables, distinct)[which.reshape(-1)]
