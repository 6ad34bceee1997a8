"""What features and prompts hold, without the language model's help: probes, nearest words, shorter prompts, pictures.

Source: the probing of LiMBeR (arXiv 2209.15162), appendix, whose protocol is not published in numbers; ours is below.
"""

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.config import Evaluation, Source, choose
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Eval, Runner
from limber_jax.evals.result_store import Results
from limber_jax.evals.word_recall import references_of
from limber_jax.map_names import join, split
from limber_jax.metrics import probe
from limber_jax.metrics.classification import roc_auc
from limber_jax.metrics.logistic import fit_each
from limber_jax.metrics.words import FUNCTION_WORDS, tokens, word_list
from limber_jax.runtime.atomic import atomic_write, save_figure
from limber_jax.runtime.parallel import broadcast_from_process_0

METRICS = ("category", "attributes", "nearest", "length", "picture")
LENGTHS = (1, 4, 16, 64)  # prompt tokens that are left
WIDEST = 16_384           # numbers that a probe looks at: 4 tokens of GPT-J
NEAREST = 5               # vocabulary tokens kept of each prompt token
SHOWN = 40                # images in the table of tokens
CLASSES = 20              # that a picture names
SEED = 0                  # of which images probes are tested on, and which λ is chosen on


@dataclasses.dataclass
class PromptProbing(Evaluation):
  """Probes the features of the encoder and the prompts of each map.

  metrics: which of these; () = all that the data allow.
    category: accuracy of a linear probe for the label: "category_features" and "category_prompt", on the mean over
      tokens, and "category_prompt_k4", on the prompt's tokens pooled to 4 and laid side by side, for all k of LENGTHS
      that shorten the prompt and give at most WIDEST numbers. (k1 is the mean.)
    attributes: the same for each attribute of a class (source "awa2"), as the area under the ROC curve, averaged over
      attributes: "attributes_features", "attributes_prompt", "attributes_prompt_k4".
    nearest: of each prompt token the NEAREST vocabulary tokens, by cosine with the language model's embeddings. "hits":
      the share of prompt tokens that have a word of a reference among them (letters, 3 at least, no function word),
      "images_hit" of images with such a token, "hits_other" and "images_hit_other" the same by references of other
      images. NAME.tokens.jsonl and NAME.tokens.md in the workdir show them for the first SHOWN images.
    length: nats a token of the captions, "nll" under the whole prompt and "nll_k4" under one whose tokens are pooled to
      4. The map was not trained for pooled prompts: it is a bound on what they hold.
    picture: NAME.pca.png, and NAME.umap.png where the package umap is installed: means of features and prompts, by
      class.
  "count" is the number of images; "@name" metrics are of extra projectors.

  train: None = the source itself, but for a fifth of the images of each class, which is tested on.
    Of "awa2" the splits train and test have no animal in common, which asks whether attributes carry over to other
    animals, and leaves no category to probe for.

  Probes are those of CLIP, as of evaluation "linear_probe": see `metrics.probe`. λ is chosen for the category, on a
  fifth of the images of each class of the training set; an attribute's probe has that of the category's. Which fifths
  are held out is the same in every run. Pooling takes the mean over runs of neighbouring tokens, row by row, as equal
  in length as they can be.
  """

  name = "prompt_probing"
  needs = ("features", "prompt", "nll")

  train: Source | None = None  # what probes learn from; None = the source itself but for a part
  metrics: tuple[str, ...] = ()  # which of these; () = the evaluation's own choice

  def open(self, context: Context) -> Eval:
    return PromptProbingEval(self, context)


class PromptProbingEval:
  """A `PromptProbing` whose data are open."""

  def __init__(self, config: PromptProbing, context: Context):
    self._runner = Runner(config, context)
    self._train = config.train and Runner(dataclasses.replace(config, source=config.train), context)
    source = self._runner.source
    self._labels = "label" in source.annotation(0)
    able = dict.fromkeys(METRICS, True) | {"category": self._labels,
                                           "attributes": self._labels and hasattr(source, "has")}
    for metric in config.metrics:
      choose("evals.….metrics", metric, METRICS)
      if not able[metric]:
        raise UserError(f"evaluation 'prompt_probing' on data source {config.source.name!r}: metrics={metric!r} needs "
                        f"{'labels' if metric == 'category' else 'attributes of its classes, as awa2 has them'}")
    self._metrics = config.metrics or tuple(m for m in METRICS if able[m])
    self._metadata: dict[str, Any] = {}

  def __call__(self, predict: dict[str, Callable[..., Any]], params: dict, stats: dict) -> dict[str, float]:
    self._metadata = {}
    out, spread = {}, {}
    for map_ in [split(name)[1] for name in predict if split(name)[0] == "prompt"]:
      # What a prompt looks like, of any one record.
      record = self._runner.source.annotation(0) | {"image": np.zeros((1, 1, 3), np.uint8)}
      batch = {k: jax.ShapeDtypeStruct((1, *np.shape(v)), np.asarray(v).dtype)
               for k, v in self._runner.transform(record, None).items()}
      _, P, D = jax.eval_shape(predict[join("prompt", map_)], params, stats, batch).shape
      shorter = tuple(k for k in LENGTHS if k < P)
      wide = tuple(k for k in shorter if 1 < k <= WIDEST // D)
      kept = ["features", "prompt", *(f"prompt_k{k}" for k in wide)]
      parts = {name: predict[join(name, map_)] for name in ("features", "prompt", "nll")}
      length = shorter if "length" in self._metrics else None
      vocab = self._runner.context.tokenizer.vocab_size if "nearest" in self._metrics else 0
      found = self._runner.collect(join("probe", map_), _looker(parts, map_, wide, length, vocab), params, stats,
                                   record=_record, keep=kept)
      metrics = {}
      if length is not None:
        metrics |= _nats(found)
      if vocab:
        metrics |= self._hits(found, map_)
      if {"category", "attributes"} & set(self._metrics):
        look = _looker(parts, map_, wide, None, 0)
        learnt = self._train and self._train.collect(join("probe train", map_), look, params, stats, record=_record,
                                                     keep=kept)
        metrics |= broadcast_from_process_0(functools.partial(self._probes, found, learnt, kept))
      spread |= {f"features {map_}": found.arrays["features"], f"prompts {map_}": found.arrays["prompt"]}
      out |= {join(key, map_): value for key, value in metrics.items()}
    if "picture" in self._metrics and jax.process_index() == 0:
      self._draw(spread, found)
    return {**out, "count": float(len(found.records))}

  def metadata(self) -> dict[str, Any]:
    train = {"train": self._train.metadata()} if self._train else {}
    return {**self._runner.metadata(), **train, "metrics": list(self._metrics), **self._metadata}

  def _path(self, end: str) -> str:
    context = self._runner.context
    os.makedirs(context.workdir, exist_ok=True)
    return os.path.join(context.workdir, f"{context.name or 'prompt_probing'}.{end}")

  def _probes(self, found: Results, learnt: Results | None, kept: Sequence[str]) -> dict[str, float]:
    """Returns the metrics of category and attributes."""
    labels = np.array([r["label"] for r in found.records])
    held = _fifth(labels) if learnt is None else np.ones(len(labels), bool)
    seen_labels = labels[~held] if learnt is None else np.array([r["label"] for r in learnt.records])
    test_labels, chosen_on = labels[held], _fifth(seen_labels)
    if not len(test_labels) or not chosen_on.any():
      raise UserError(f"evaluation 'prompt_probing' on data source {self._runner.config.source.name!r}: {len(labels)} "
                      "images are too few to hold a fifth of them out")
    classes = 1 + int(max(labels.max(), seen_labels.max()))
    out = {}
    for name in kept:
      x = found.arrays[name]
      seen = x[~held] if learnt is None else learnt.arrays[name]
      own = probe.learn(*((seen[rows], seen_labels[rows]) for rows in (~chosen_on, chosen_on)), classes, probe.accuracy)
      if "category" in self._metrics and np.isin(test_labels, seen_labels).any():
        out[f"category_{name}"] = probe.accuracy(own.scores(x[held]), test_labels)
      if "attributes" in self._metrics:
        has = self._runner.source.has  # bool [C, A]
        both = [a for a in range(has.shape[1]) if len(set(has[seen_labels, a])) == len(set(has[test_labels, a])) == 2]
        if both:
          fits = fit_each(seen, np.where(has[seen_labels][:, both], 1, -1), [own.l2])
          scores = x[held] @ fits.weights[0] + fits.bias[0][None]
          out[f"attributes_{name}"] = float(np.mean([roc_auc(scores[:, i], has[test_labels, a].astype(int))
                                                     for i, a in enumerate(both)]))
    return out

  def _hits(self, found: Results, map_: str) -> dict[str, float]:
    """Returns the metrics of the nearest vocabulary tokens, and writes the tables of the first map."""
    tokenizer, source = self._runner.context.tokenizer, self._runner.source
    texts = [references_of(source.annotation(i)) for i in found.index.tolist()]
    words = [content_words(several) for several in texts]
    near = np.array([r["nearest"] for r in found.records])  # [n, P, NEAREST]
    said = {int(i): tokenizer.decode([int(i)]) for i in np.unique(near)}
    plain = {i: text.strip().lower() for i, text in said.items()}
    out = {}
    half = len(words) // 2  # neighbours may be of one class
    for end, of in (("", words), ("_other", words[half:] + words[:half])):
      if end and len(words) < 2:
        break
      hit = np.array([[any(plain[i] in wanted for i in token) for token in prompt]
                      for prompt, wanted in zip(near.tolist(), of, strict=True)])  # [n, P]
      out |= {f"hits{end}": float(hit.mean()), f"images_hit{end}": float(hit.any(axis=1).mean())}
    if not map_ and jax.process_index() == 0:
      rows = [{"id": r["id"], "texts": list(several), "tokens": [[said[i] for i in token] for token in prompt],
               "hits": sorted({plain[i] for token in prompt for i in token} & wanted)}
              for r, several, wanted, prompt in zip(found.records[:SHOWN], texts, words, near.tolist(), strict=False)]
      for name, text in (("tokens.jsonl", "".join(json.dumps(row) + "\n" for row in rows)), ("tokens.md", table(rows))):
        with atomic_write(self._path(name)) as file:
          file.write(text)
    return out

  def _draw(self, spread: dict[str, np.ndarray], found: Results) -> None:
    labels = np.array([r["label"] for r in found.records]) if self._labels else np.zeros(len(found.records), int)
    names = self._runner.source.classes or ()
    draw({name: plane(x) for name, x in spread.items()}, labels, names, self._path("pca.png"))
    self._metadata["umap"] = "not installed" if find_spec("umap") is None else "drawn"
    if self._metadata["umap"] == "drawn":
      from umap import UMAP
      draw({name: UMAP(random_state=0, n_jobs=1).fit_transform(x) for name, x in spread.items()}, labels, names,
           self._path("umap.png"))


def _fifth(labels: np.ndarray) -> np.ndarray:
  """Returns bool [n]: a fifth of the examples of each class, or of all where every class has too few for that."""
  held = probe.held_out(labels, SEED)
  return held if held.any() else probe.held_out(np.zeros_like(labels), SEED)


def _looker(parts: dict[str, Callable[..., Any]], map_: str, wide: Sequence[int], length: Sequence[int] | None,
            vocab: int) -> Callable[..., dict[str, jax.Array]]:
  """Returns (params, stats, batch) -> what is kept of a batch.

  Args:
    parts: the functions features, prompt and nll of one map.
    map_: its name.
    wide: numbers of pooled tokens to keep side by side.
    length: numbers of pooled tokens under which captions are scored; None scores none, not even under whole prompts.
    vocab: size of the vocabulary of which the nearest tokens are; 0 looks for none. A language model may have more
      embeddings, which no text ever used.
  """

  def look(params, stats, batch):
    prompt = parts["prompt"](params, stats, batch)  # [B, P, D]
    features = parts["features"](params, stats, batch)  # [B, S, F]
    out = {"features": pool(features, 1)[:, 0], "prompt": pool(prompt, 1)[:, 0]}
    out |= {f"prompt_k{k}": pool(prompt, k).reshape(len(prompt), -1) for k in wide}
    if "label" in batch:
      out["label"] = batch["label"]
    if vocab:
      out["nearest"] = nearest(prompt, params["lm"]["embedding"][:vocab], NEAREST)
    if length is not None:
      def nll(prompt):
        return parts["nll"](params, stats, batch | {join("prompt", map_): prompt})

      out |= {"tokens": batch["mask"].sum(-1), "nll": nll(prompt)}
      out |= {f"nll_k{k}": nll(pool(prompt, k).astype(prompt.dtype)) for k in length}
    return out

  return look


def _record(row: dict[str, np.ndarray]) -> dict[str, Any]:
  return {k: v.tolist() for k, v in row.items() if k in ("label", "nearest", "tokens") or k.startswith("nll")}


def _nats(found: Results) -> dict[str, float]:
  """Returns nats a token, over all captions together."""
  tokens_ = sum(r["tokens"] for r in found.records)
  return {k: sum(r[k] for r in found.records) / tokens_ for k in found.records[0] if k.startswith("nll")}


def pool(x: jax.Array, k: int) -> jax.Array:
  """Returns float32 [B, k, D]: means over k runs of neighbouring tokens of x [B, P, D], the longer runs first."""
  P = x.shape[1]
  if not 1 <= k <= P:
    raise ValueError(f"cannot pool {P} tokens to {k}")
  runs = np.repeat(np.arange(k), [P // k + (i < P % k) for i in range(k)])  # [P], the run of each token
  weights = (runs[None] == np.arange(k)[:, None]) / np.bincount(runs)[:, None]  # [k, P]
  return jnp.einsum("kp,bpd->bkd", jnp.asarray(weights, jnp.float32), x.astype(jnp.float32),
                    precision=jax.lax.Precision.HIGHEST)


def nearest(prompt: jax.Array, embedding: jax.Array, count: int) -> jax.Array:
  """Returns int32 [B, P, count]: the vocabulary tokens nearest by cosine, the nearest first.

  Args:
    prompt: [B, P, D].
    embedding: [V, D], a row a token.
  """
  table = embedding.astype(jnp.float32)
  table = table / jnp.maximum(jnp.linalg.norm(table, axis=-1, keepdims=True), 1e-12)
  # The length of a prompt token does not change its order. One position at a time: B × V scores, not B × P × V.
  found = jax.lax.map(lambda x: jax.lax.top_k(x.astype(jnp.float32) @ table.T, count)[1], prompt.swapaxes(0, 1))
  return found.swapaxes(0, 1)


def plane(x: np.ndarray) -> np.ndarray:
  """Returns float [n, 2]: the first two principal components of x [n, F]; 0 where x does not vary."""
  x = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
  axes = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :2]  # [F, up to 2], the widest first
  axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])[None]
  return np.pad(x @ axes, ((0, 0), (0, 2 - axes.shape[1])))


def content_words(texts: Sequence[str]) -> set[str]:
  """Returns the words of some texts that have letters only, 3 at least, and are no function words or prepositions."""
  prepositions = word_list("prepositions")
  return {word for text in texts for word in tokens(text)
          if word.isalpha() and len(word) > 2 and word not in FUNCTION_WORDS and word not in prepositions}


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Returns a Markdown table: an image a row, with the nearest token of each prompt token."""
  out = ["| image | reference | words of the references among the nearest | nearest token of each prompt token |",
         "|---|---|---|---|"]
  for row in rows:
    cells = [row["id"], row["texts"][0], ", ".join(row["hits"]) or "–",
             " ".join(f"`{json.dumps(t[0], ensure_ascii=False)[1:-1]}`" for t in row["tokens"])]
    out.append("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in cells) + " |")
  return "\n".join(out) + "\n"


def draw(spread: dict[str, np.ndarray], labels: np.ndarray, names: Sequence[str], path: str) -> None:
  """Writes a PNG: points [n, 2] of each title, coloured by label int [n], with a legend for up to CLASSES classes."""
  from matplotlib.figure import Figure  # here: who only reads a configuration waits for it otherwise

  columns = min(2, len(spread))
  rows = -(-len(spread) // columns)
  figure = Figure(figsize=(5 * columns + 2, 5 * rows), layout="constrained")
  axes = list(figure.subplots(rows, columns, squeeze=False).flat)
  known = np.unique(labels)
  for one, (title, points) in zip(axes, spread.items(), strict=False):
    for place, label in enumerate(known):
      mine = points[labels == label]
      one.scatter(mine[:, 0], mine[:, 1], s=6, color=_colour(place, len(known)),
                  label=str(names[label]) if label < len(names) else str(label))
    one.set(title=title, xticks=[], yticks=[])
  for empty in axes[len(spread) :]:
    empty.axis("off")
  if 1 < len(known) <= CLASSES:
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, markerscale=2)
  with warnings.catch_warnings(category=UserWarning, action="ignore"):  # a letter that no font here has is a box
    save_figure(figure, path)


def _colour(place: int, count: int) -> tuple[float, float, float]:
  from matplotlib.colors import hsv_to_rgb

  return tuple(hsv_to_rgb((place / count, 0.75, 0.55 + 0.3 * (place % 2))).tolist())
