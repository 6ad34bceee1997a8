"""All evaluations of each paper, as an experiment lists them, for limber_jax.evaluate."""

import dataclasses
import re

from limber_jax.config import Evaluation, Source
from limber_jax.data.sources import clip_benchmark as wds
from limber_jax.errors import UserError
from limber_jax.evals import clip_benchmark as benchmark
from limber_jax.evals import datasets, robustness
from limber_jax.evals.captions import Captions
from limber_jax.evals.class_mention import ClassMention
from limber_jax.evals.hallucination import Hallucination
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.prompt_probing import PromptProbing
from limber_jax.evals.retrieval import Retrieval
from limber_jax.evals.robustness import Robustness
from limber_jax.evals.vqa import Vqa
from limber_jax.evals.word_recall import WordRecall
from limber_jax.evals.zeroshot import ZeroShot

SCORER = "data/weights/clip-vit-base-patch32"  # ViT-B/32, behind CLIPScore
SEEDS = (0, 1, 2)


def clip(every: int = -1) -> dict[str, Evaluation]:
  """Returns CLIP's: zero-shot and probes on 27 data sets, natural distribution shifts, and retrieval.

  Args:
    every: steps between two zero-shot accuracies on ImageNet in training; -1 = none. The others are never in training.
  """
  zeroshot = {key: ZeroShot(s.source, every=every if key == "imagenet" else -1, classes=key,
                            templates="imagenet80" if key == "imagenet" else key)
              for key, s in datasets.CLIP.items()}
  # No probe of Birdsnap, which lists no training set here.
  probes = {f"{key}_probe": _probe(key, s) for key, s in datasets.CLIP.items() if s.train}
  shifts = {f"shift_{key}": Robustness(datasets.SETS[key].source, every=-1, dataset=key, templates="imagenet80")
            for key in robustness.SETS}
  retrieval = {f"{key}_retrieval": Retrieval(datasets.SETS[key].source, every=-1, prompt="a photo of {}")
               for key in ("coco", "flickr30k")}
  return {**zeroshot, **probes, **shifts, **retrieval}


def _probe(key: str, s: datasets.DataSet) -> LinearProbe:
  source = dataclasses.replace(s.source, split=s.source.split.partition(",")[0])  # of UCF101's three the first
  return LinearProbe(
    source, every=-1, classes=key, templates="imagenet80" if key == "imagenet" else key,
    train=dataclasses.replace(source, split=s.train),
    validation=dataclasses.replace(source, split=s.validation) if s.validation else None,
    shots=(0,) if s.metric == "map11" else (0, 1, 2, 4, 8, 16), seeds=SEEDS)  # map11: of several classes an image


def clip_benchmark(path: str, split: str = "test", every: int = -1, probes: bool = False) -> dict[str, Evaluation]:
  """Returns those of the sets of CLIP_benchmark and DataComp that lie at or below a directory, as "wds_vtab_cifar10".

  Zero-shot with a set's own class names and templates, or retrieval. Their metrics are also written in the form of
  those programs, see `limber_jax.evals.clip_benchmark`.

  Args:
    path: the directory, which is looked at now.
    split: what is evaluated; of a set with one split only, that one.
    every: steps between two evaluations in training; -1 = none.
    probes: linear probes too, of sets of one class an image that have a split "train" as well.

  A set that cannot be read fails its own evaluation, when that is run, and no other.

  Raises:
    UserError: there are none.
  """
  out = {}
  for name, folder in benchmark.sets(path).items():
    there = wds.splits(folder)
    try:
      kind = wds.kind_of(folder)
    except UserError:  # which the evaluation says of this set alone
      kind = "classification"
    key = f"wds_{re.sub(r'[^0-9A-Za-z]', '_', name)}"
    tested = Source("clip_benchmark", folder, there[0] if len(there) == 1 else split)
    out[key] = (Retrieval(tested, every=every) if kind == "retrieval" else
                ZeroShot(tested, every=every, metrics=benchmark.metrics_of(name) if kind == "classification" else ()))
    if probes and kind == "classification" and "train" in there and tested.split != "train":
      learnt = dataclasses.replace(tested, split="train")
      out[f"{key}_probe"] = LinearProbe(tested, every=-1, train=learnt)
  return out


def limber() -> dict[str, Evaluation]:
  """Returns LiMBeR's: captions of COCO and NoCaps, VQA2, animals, words, hallucinated objects, and probes."""
  coco, nocaps, vqa2, awa2 = (datasets.SETS[key].source for key in ("coco", "nocaps", "vqa2", "awa2"))
  val2014 = Source(name="coco", path="data/coco/annotations/captions_val2014.json", split="")
  return {
    "coco": Captions(coco, every=-1, scorer=SCORER),
    "coco_val2014": Captions(val2014, every=-1, scorer=SCORER),
    "nocaps": Captions(nocaps, every=-1, scorer=SCORER),
    "vqa2": Vqa(vqa2, train=dataclasses.replace(vqa2, split="train2014"), every=-1, batch_size=64, shots=(0, 1, 2, 4),
                seeds=SEEDS),
    "awa2": ClassMention(awa2, every=-1),
    "word_recall": WordRecall(coco, every=-1),
    "hallucination": Hallucination(coco, every=-1, segments="data/coco/annotations/instances_val2014.json"),
    "prompt_probing": PromptProbing(awa2, every=-1),
  }
