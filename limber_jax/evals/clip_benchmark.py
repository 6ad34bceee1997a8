"""CLIP_benchmark's and DataComp's sets on disk, and metrics as files that their own tables read.

Sources: https://github.com/LAION-AI/CLIP_benchmark, cli.py and benchmark/webdatasets.txt;
https://github.com/mlfoundations/datacomp, tasklist.yml and evaluate.py.
"""

import json
import os
import re
from dataclasses import dataclass
from typing import Any

from limber_jax.data.sources import clip_benchmark as source
from limber_jax.errors import UserError
from limber_jax.runtime.atomic import atomic_write, refusal

FOLDER = "clip_benchmark"           # of a workdir, where results in CLIP_benchmark's form go
DATACOMP = "eval_results.jsonl"     # in a workdir, as DataComp writes it
DEPTH = 2                           # folders down to a set: vtab/cifar10

# The folder of a set is its name with - for /, mostly in wds_…_test.
PREFIXES = ("vtab-", "wilds-")


@dataclass(frozen=True)
class Task:
  """A task of DataComp's on a set in this form."""

  title: str
  metric: str = "acc1"      # its main metric, by their name …
  ours: str = "top1"        # … and as evaluation "zeroshot" calls it
  key: str = ""             # where it is not the name of the set


# By the name of the set. FairFace and UTKFace ask several questions of an image, and have no main metric.
TASKS = {name: Task(title) for name, title in {
  "cifar10": "CIFAR-10", "vtab/cifar100": "CIFAR-100", "vtab/clevr_count_all": "CLEVR Counts",
  "vtab/clevr_closest_object_distance": "CLEVR Distance", "country211": "Country211",
  "vtab/dtd": "Describable Textures", "vtab/eurosat": "EuroSAT", "food101": "Food-101", "gtsrb": "GTSRB",
  "imagenet1k": "ImageNet 1k", "imagenet_sketch": "ImageNet Sketch", "imagenetv2": "ImageNet v2",
  "imagenet-a": "ImageNet-A", "imagenet-o": "ImageNet-O", "imagenet-r": "ImageNet-R",
  "vtab/kitti_closest_vehicle_distance": "KITTI Vehicle Distance", "mnist": "MNIST", "objectnet": "ObjectNet",
  "voc2007": "Pascal VOC 2007", "vtab/pcam": "PatchCamelyon", "renderedsst2": "Rendered SST2",
  "vtab/resisc45": "RESISC45", "cars": "Stanford Cars", "stl10": "STL-10", "sun397": "SUN397",
  "vtab/svhn": "SVHN", "wilds/camelyon17": "Camelyon17",
}.items()} | {name: Task(title, "mean_per_class_recall", "mean_per_class") for name, title in {
  "vtab/caltech101": "Caltech-101", "fgvc_aircraft": "FGVC Aircraft", "vtab/flowers": "Oxford Flowers-102",
  "vtab/pets": "Oxford-IIIT Pet"}.items()} | {
  "wilds/iwildcam": Task("iWildCam", "F1-macro_all", "f1_macro"),
  "wilds/fmow": Task("FMoW", "acc_worst_region", "worst_group"),
  "dollar_street": Task("Dollar Street", "acc_top5_wg", "worst_group_top5", "fairness/dollar_street"),
  "geode": Task("GeoDE", "acc_wg", "worst_group", "fairness/geode"),
}
USUAL = {"acc1": "top1", "acc5": "top5", "mean_per_class_recall": "mean_per_class", "mean_average_precision": "map"}


def metrics_of(name: str) -> tuple[str, ...]:
  """Returns the metrics of a set of classes, () for the usual ones."""
  own = TASKS[name].ours if name in TASKS else ""
  return ("top1", "top5", "mean_per_class", own) if own and own not in USUAL.values() else ()


def sets(root: str) -> dict[str, str]:
  """Returns the directories of the sets at or below `root` by their names; raises UserError if there are none."""
  found: dict[str, str] = {}

  def look(path: str, depth: int) -> None:
    if source.splits(path):
      name = set_name(path)
      if name in found:
        raise UserError(f"{found[name]} and {path} are both the set {name!r}; move one of them away")
      found[name] = path
    elif depth:
      for folder in sorted(f.path for f in os.scandir(path) if f.is_dir() and not f.name.startswith(".")):
        look(folder, depth - 1)

  if os.path.isdir(root):
    look(root, DEPTH)
  if not found:
    raise UserError(f"{root}: no sets there; wanted directories with SPLIT/{source.COUNT} in them, as CLIP_benchmark "
                    "exports and DataComp downloads them")
  return dict(sorted(found.items()))


def set_name(path: str) -> str:
  """Returns what CLIP_benchmark calls the set in a folder: "vtab/cifar10" of wds_vtab-cifar10_test and vtab/cifar10."""
  parent, folder = os.path.split(os.path.abspath(path))
  name = folder.removeprefix("wds_").removesuffix("_test")
  above = f"{os.path.basename(parent).removeprefix('wds_')}-"
  name = above + name if above in PREFIXES else name
  prefix = next((p for p in PREFIXES if name.startswith(p)), "")
  return prefix.replace("-", "/") + name.removeprefix(prefix)


def files(results: dict[str, Any], pretrained: str) -> dict[str, str]:
  """Returns what is to be written into a workdir of the metrics on sets of source "clip_benchmark": {path there: text}.

  Args:
    results: as in results.json.
    pretrained: what these weights are to be called.
  """
  out, lines = {}, []
  model = results["model"] or results["name"]
  for entry in results["evaluations"].values():
    if entry["protocol"]["source.name"] != "clip_benchmark" or entry["evaluation"] not in ("zeroshot", "retrieval"):
      continue
    name, metrics = set_name(entry["protocol"]["source.path"]), _metrics(entry)
    task = "zeroshot_retrieval" if entry["evaluation"] == "retrieval" else "zeroshot_classification"
    result = {"dataset": f"wds/{name}", "model": model, "pretrained": pretrained, "task": task, "metrics": metrics,
            "language": "en"}
    slug = "_".join(re.sub(r"[/\\\s]", "_", part) for part in (name, pretrained, model, "en", task))
    out[os.path.join(FOLDER, f"{slug}.json")] = json.dumps(result)
    task = TASKS.get(name)
    if task and task.ours in entry["metrics"]:
      main = entry["metrics"][task.ours]
      found = {k: None if v != v else v for k, v in metrics.items()}  # theirs has no NaN
      lines.append(json.dumps({"key": task.key or name, "dataset": task.title,
                               "metrics": found | {task.metric: main, "main_metric": main}}))
  return out | ({DATACOMP: "".join(f"{line}\n" for line in lines)} if lines else {})


def _metrics(entry: dict[str, Any]) -> dict[str, float]:
  """Returns the metrics of an evaluation by their names."""
  metrics = entry["metrics"]
  if entry["evaluation"] == "retrieval":
    return {f"{what}_retrieval_recall@{k}": metrics[f"{way}_r{k}"] for k in (1, 5, 10)
            for what, way in (("image", "t2i"), ("text", "i2t")) if f"{way}_r{k}" in metrics}
  out = {theirs: metrics[ours] for theirs, ours in USUAL.items() if ours in metrics}
  if "acc1" in out and "acc5" not in out and entry["metadata"]["classes"] <= 5:
    out["acc5"] = 1.0 if entry["metadata"]["classes"] == 5 else float("nan")
  return out


def write(results: dict[str, Any], workdir: str) -> list[str]:
  """Writes `files` into a workdir, and returns their paths; raises UserError if it cannot."""
  name = os.path.basename(os.path.abspath(workdir))
  paths = []
  for path, text in files(results, f"{name}-{results['step']}").items():
    path = os.path.join(workdir, path)
    try:
      os.makedirs(os.path.dirname(path), exist_ok=True)
    except OSError as error:
      raise refusal(path, error) from error
    with atomic_write(path) as file:
      file.write(text)
    paths.append(path)
  return paths
