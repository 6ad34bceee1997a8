"""Sets as CLIP_benchmark and DataComp keep them, evaluated by the command: the metrics are those of their programs."""

import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image
from runs import environment

from limber_jax.config import Source
from limber_jax.data.guess import guess
from limber_jax.data.inspection import inspect
from limber_jax.data.packing import pack
from limber_jax.data.sources.clip_benchmark import ClipBenchmark
from limber_jax.errors import UserError
from limber_jax.evals import clip_benchmark, suites
from limber_jax.metrics import classification
from tests import layouts

CLASSES = ["tench", "golden retriever", "St. Bernard's dog", "crane", "ice cream", "crane", "a {} in braces"]
TEMPLATES = ["a photo of a {c}.", "the {{old}} {c}, a kind of {c}", "{c}"]
EXPERIMENT = """
import sys
sys.path.insert(0, {tests!r})
from runs import tiny
from limber_jax.config import Tokenizer
from limber_jax.evals import suites

def get_config():
  config = tiny(mesh=(-1, 1, 1), evals=suites.clip_benchmark({sets!r}))
  config.data.tokenizer = Tokenizer("clip", {bpe!r})
  for evaluation in config.evals.values():
    evaluation.batch_size = 16
  return config
"""


def write_set(folder, split, samples, *, image_format="webp", per_shard=1000, classes=None, templates=None, kind="",
              metadata=None):
  """Writes a set as CLIP_benchmark's exporter does: samples are (image bytes, suffix, label) in shards of so many."""
  os.makedirs(folder / split)
  shards = [samples[i : i + per_shard] for i in range(0, len(samples), per_shard)]
  number = 0
  for shard, some in enumerate(shards):
    with tarfile.open(folder / split / f"{shard}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
      for image, suffix, label in some:
        more = [] if metadata is None else [("npy", encoded(metadata[number]))]
        for name, data in ((suffix, encoded(label)), *more, (image_format, image)):  # sorted, as webdataset has them
          member = tarfile.TarInfo(f"s{number:07d}.{name}")
          member.size, member.uname, member.gname, member.mode = len(data), "bigdata", "bigdata", 0o444
          tar.addfile(member, io.BytesIO(data))
        number += 1
  (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
  for name, lines in (("classnames", classes), ("zeroshot_classification_templates", templates)):
    if lines:
      (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
  if kind:
    (folder / "dataset_type.txt").write_text(f"{kind}\n")
  return folder


def encoded(label):
  """Returns what webdataset's writer makes of a .cls, .npy or .txt."""
  if isinstance(label, np.ndarray):
    file = io.BytesIO()
    np.save(file, label)
    return file.getvalue()
  return str(label).encode()


def labelled(count, format="webp", classes=7, seed=0):
  rng = np.random.default_rng(seed)
  options = {"lossless": True} if format == "webp" else {}
  return [(layouts.jpeg(*rng.integers(20, 60, 2).tolist(), seed * 1000 + i, format.upper(), **options), "cls",
           int(rng.integers(classes))) for i in range(count)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
  """Returns a directory of sets in the folders that their programs make."""
  root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
  write_set(root / "wds_vtab-flowers_test", "test", labelled(70), per_shard=30, classes=CLASSES, templates=TEMPLATES)
  write_set(root / "wds_mnist_test", "test", labelled(20, "png", 4, 1), image_format="png", classes=CLASSES[:4],
            templates=TEMPLATES[:1])
  write_set(root / "wds_voc2007_multilabel", "test",
            [(image, "npy", (rng.random(5) < 0.4).astype(np.float32)) for image, *_ in labelled(40, seed=2)],
            classes=CLASSES[:5], templates=TEMPLATES[:2], kind="multilabel")
  regions = rng.integers(0, 3, (30, 2))  # of a .npy beside a .cls, as DataComp's metadata
  write_set(root / "wds_wilds-fmow_test", "test", labelled(30, seed=4), classes=CLASSES, templates=TEMPLATES,
            metadata=regions)
  captions = ["\n".join(f"{i} {words}" for words in (f"is {i * i}", CLASSES[i % 5], "a third", "more")[: 4 - i % 2])
              for i in range(24)]
  write_set(root / "wds_flickr8k", "test", [(image, "txt", text) for (image, *_), text in zip(
    labelled(24, "jpeg", seed=3), captions, strict=True)], image_format="jpg", per_shard=10, kind="retrieval")
  return root


def open_clip_model(open_clip, folder):
  """Writes a random model of open_clip's as it keeps them, and returns (model, preprocess, tokenizer)."""
  import torch
  from safetensors.torch import save_file

  torch.manual_seed(0)
  config = {"model_cfg": {
    "embed_dim": 16, "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}},
    "preprocess_cfg": {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}}
  model = open_clip.model.CLIP(**config["model_cfg"])
  with torch.no_grad():
    for name, value in model.named_parameters():
      if value.ndim > 1:  # else all images have nearly the same embedding
        value.mul_(3 if "visual" in name else 1.5)
  folder.mkdir()
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  save_file(model.state_dict(), folder / "open_clip_model.safetensors")
  model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
  return model.eval(), preprocess, open_clip.get_tokenizer("ViT-B-32")


def theirs(model, preprocess, tokenizer, folder):
  """Returns (metrics, ranks of the right class, classes named) of a set as CLIP_benchmark computes them."""
  import torch
  import torch.nn.functional as F

  images, labels, groups = [], [], []
  for i in range(int((folder / "test" / "nshards.txt").read_text())):
    with tarfile.open(folder / "test" / f"{i}.tar") as tar:
      for member in tar:
        data = tar.extractfile(member).read()
        match member.name.rpartition(".")[2]:
          case "cls":
            labels.append(int(data))
          case "npy" if "fmow" not in folder.name:
            labels.append(np.load(io.BytesIO(data)))
          case "npy":
            groups.append(int(np.load(io.BytesIO(data))[0]))
          case "txt":
            labels.append(data.decode().splitlines())
          case _:
            images.append(preprocess(Image.open(io.BytesIO(data)).convert("RGB")))
  with torch.no_grad():
    image = F.normalize(model.encode_image(torch.stack(images)), dim=-1)
    if isinstance(labels[0], list):
      text = F.normalize(model.encode_text(tokenizer([t for some in labels for t in some])), dim=-1)
      scores = text @ image.T
      positive = torch.zeros_like(scores, dtype=torch.bool)
      positive[torch.arange(len(scores)), [i for i, some in enumerate(labels) for _ in some]] = True
      metrics = {}
      for k in (1, 5, 10):
        for way, s, p in (("image", scores, positive), ("text", scores.T, positive.T)):
          top = torch.zeros_like(p).scatter_(1, torch.topk(s, k, dim=1)[1], True)
          metrics[f"{way}_retrieval_recall@{k}"] = (top & p).any(dim=1).float().mean().item()
      return metrics, None, None
    weights = []
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    for name in (folder / "classnames.txt").read_text().splitlines():
      embedded = F.normalize(model.encode_text(tokenizer([t.format(c=name) for t in templates])), dim=-1).mean(dim=0)
      weights.append(embedded / embedded.norm())
    logits = 100.0 * image @ torch.stack(weights, dim=1)
  if isinstance(labels[0], np.ndarray):
    target = np.stack(labels)
    each = [sklearn.metrics.average_precision_score(target[:, c], logits[:, c]) for c in range(target.shape[1])]
    return {"mean_average_precision": float(np.mean(each))}, None, None
  labels = np.array(labels)
  order = logits.argsort(dim=1, descending=True, stable=True).numpy()
  ranks = np.argmax(order == labels[:, None], axis=1)
  acc5 = float(np.mean(ranks < 5)) if logits.shape[1] >= 5 else float("nan")
  each = [np.mean(ranks[np.array(groups) == g] < 1) for g in set(groups)]
  return {"acc1": float(np.mean(ranks < 1)), "acc5": acc5,
          "mean_per_class_recall": sklearn.metrics.balanced_accuracy_score(labels, order[:, 0]),
          **({"acc_worst_region": min(each)} if each else {})}, ranks, order[:, 0]


@pytest.mark.process
def test_the_command_gives_the_metrics_of_their_programs_image_by_image(open_clip, sets, tmp_path):
  model = open_clip_model(open_clip, tmp_path / "model")
  bpe = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
  experiment = tmp_path / "sets.py"
  experiment.write_text(EXPERIMENT.format(tests=os.path.dirname(__file__), sets=str(sets), bpe=bpe))
  done = subprocess.run(
    [sys.executable, "-m", "limber_jax.evaluate", f"--config={experiment}", f"--workdir={tmp_path}/w",
     f"--weights={tmp_path}/model"], capture_output=True, text=True, check=False, env=environment())
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "w" / "results.json").read_text())["evaluations"]
  assert set(found) == {"wds_vtab_flowers", "wds_mnist", "wds_voc2007_multilabel", "wds_flickr8k",
                        "wds_wilds_fmow"}
  written = {}
  for path in (tmp_path / "w" / "clip_benchmark").iterdir():
    told = json.loads(path.read_text())
    assert told.keys() == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    assert path.name == "_".join([told["dataset"][4:].replace("/", "_"), told["pretrained"], told["model"], "en",
                                  told["task"]]) + ".json"
    written[told["dataset"]] = told
  assert written.keys() == {"wds/vtab/flowers", "wds/mnist", "wds/voc2007_multilabel", "wds/flickr8k",
                             "wds/wilds/fmow"}
  lines = [json.loads(line) for line in (tmp_path / "w" / "eval_results.jsonl").read_text().splitlines()]
  assert {line["key"]: line["dataset"] for line in lines} == {
    "vtab/flowers": "Oxford Flowers-102", "mnist": "MNIST", "wilds/fmow": "FMoW"}
  for folder, name in (("wds_vtab-flowers_test", "vtab/flowers"), ("wds_mnist_test", "mnist"),
                       ("wds_voc2007_multilabel", "voc2007_multilabel"), ("wds_flickr8k", "flickr8k"),
                       ("wds_wilds-fmow_test", "wilds/fmow")):
    metrics, ranks, named = theirs(*model, sets / folder)
    worst = metrics.pop("acc_worst_region", None)
    assert written[f"wds/{name}"]["metrics"] == pytest.approx(metrics, abs=1e-6, nan_ok=True), name
    for line in lines:
      if line["key"] == name:
        main = metrics["mean_per_class_recall" if name == "vtab/flowers" else "acc1"] if worst is None else worst
        assert line["metrics"]["main_metric"] == pytest.approx(main, abs=1e-6)
        assert worst is None or line["metrics"]["acc_worst_region"] == line["metrics"]["main_metric"]
        assert (line["metrics"]["acc5"] is None) == (name == "mnist")
    if ranks is not None:
      items = tmp_path / "w" / "evaluation" / f"wds_{name.replace('/', '_')}" / "images.jsonl"
      rows = [json.loads(line) for line in items.read_text().splitlines()[1:]]
      assert [row["rank"] for row in rows] == ranks.tolist() and len(set(ranks.tolist())) > 2
      assert [row["predicted"] for row in rows] == named.tolist()
  assert written["wds/flickr8k"]["task"] == "zeroshot_retrieval"


def test_mean_area_is_scikit_learns_average_precision_and_theirs_for_a_class_that_is_nowhere():
  rng = np.random.default_rng(0)
  scores = rng.normal(size=(60, 6)).astype(np.float32)
  truth = rng.random((60, 6)) < 0.3
  each = [sklearn.metrics.average_precision_score(truth[:, c], scores[:, c]) for c in range(6)]
  signs = np.where(truth, 1, -1)
  assert classification.mean_area(scores, signs) == pytest.approx(np.mean(each), abs=1e-12)
  signs[:, 2] = -1
  assert classification.mean_area(scores, signs) == pytest.approx(np.mean([*each[:2], 0, *each[3:]]), abs=1e-12)
  signs[:30, 3] = 0  # difficult ones do not count
  part = sklearn.metrics.average_precision_score(truth[30:, 3], scores[30:, 3])
  assert classification.mean_area(scores[:, 3:4], signs[:, 3:4]) == pytest.approx(part, abs=1e-12)
  assert classification.mean_area(np.full((4, 1), np.nan), np.ones((4, 1))) == 0


def test_macro_f1_is_scikit_learns_over_the_classes_there_are():
  rng = np.random.default_rng(0)
  labels, named = rng.integers(0, 5, 80), rng.integers(0, 7, 80)
  named = np.where(rng.random(80) < 0.5, labels, named)
  wanted = sklearn.metrics.f1_score(labels, named, average="macro", labels=np.unique(labels))
  assert classification.f1_macro(labels, named) == pytest.approx(wanted, abs=1e-12)
  assert classification.worst_group(np.array([0, 0, 3, 3]), np.array([True, False, True, True])) == 0.5


def opened(path, split="", **fields):
  return ClipBenchmark(Source("clip_benchmark", str(path), split, **fields))


def test_records_are_what_was_exported_in_the_order_of_the_tars(sets):
  source = opened(sets / "wds_vtab-flowers_test")
  assert source.classes == tuple(CLASSES) and source.metrics == ()
  assert source.templates == ("a photo of a {}.", "the {old} {}, a kind of {}", "{}")
  samples = labelled(70)
  assert [(source[i]["image"], source[i]["label"]) for i in range(70)] == [(s[0], s[2]) for s in samples]
  assert source[31]["id"] == "1/s0000031" and source[31]["text"] == CLASSES[samples[31][2]] and not source.damage
  several = opened(sets / "wds_voc2007_multilabel", "test")
  rng = np.random.default_rng(0)
  for i in range(40):
    wanted = np.flatnonzero(rng.random(5) < 0.4).tolist()
    assert several[i]["labels"] == tuple(wanted) and several[i]["difficult"] == () and several.metrics == ("map",)
    assert several[i]["text"] == (", ".join(CLASSES[c] for c in wanted) or "none of the classes")
  captions = opened(sets / "wds_flickr8k")
  assert captions.classes is captions.templates is None
  assert captions[3]["texts"] == ("3 is 9", "3 crane", "3 a third")
  for source in (several, captions):
    again = pickle.loads(pickle.dumps(source))
    assert again[5] == source[5] and again.annotation(5) == {k: v for k, v in source[5].items() if k != "image"}
    assert again.fingerprint() == source.fingerprint()


def test_a_split_is_never_chosen_where_there_are_several(sets, tmp_path):
  write_set(tmp_path / "s", "test", labelled(4), classes=CLASSES, templates=TEMPLATES)
  write_set(tmp_path / "s", "train", labelled(6, seed=1))
  with pytest.raises(UserError, match=r"it has the splits test, train; choose one with source\.split"):
    opened(tmp_path / "s")
  assert (len(opened(tmp_path / "s", "test")), len(opened(tmp_path / "s", "train"))) == (4, 6)
  with pytest.raises(UserError, match=r"no such split .*did you mean 'test'"):
    opened(tmp_path / "s", "tset")
  with pytest.raises(UserError, match=r"no such split .*known: test"):
    opened(sets / "wds_mnist_test", "train")


def test_a_suite_lists_every_set_below_a_directory_with_its_own_words_and_metrics(sets, tmp_path):
  found = suites.clip_benchmark(str(sets))
  assert {k: (e.name, e.source.split, e.every) for k, e in found.items()} == {
    "wds_vtab_flowers": ("zeroshot", "test", -1), "wds_mnist": ("zeroshot", "test", -1),
    "wds_voc2007_multilabel": ("zeroshot", "test", -1), "wds_flickr8k": ("retrieval", "test", -1),
    "wds_wilds_fmow": ("zeroshot", "test", -1)}
  labelled_sets = {k: e for k, e in found.items() if e.name == "zeroshot"}
  assert {(e.classes, e.templates) for e in labelled_sets.values()} == {("", "")}
  assert {k: e.metrics for k, e in labelled_sets.items() if e.metrics} == {
    "wds_wilds_fmow": ("top1", "top5", "mean_per_class", "worst_group")}
  write_set(tmp_path / "vtab" / "pets", "test", labelled(4), classes=CLASSES, templates=TEMPLATES)
  write_set(tmp_path / "vtab" / "pets", "train", labelled(6, seed=1))
  nested = suites.clip_benchmark(str(tmp_path), probes=True)
  assert list(nested) == ["wds_vtab_pets", "wds_vtab_pets_probe"]
  assert nested["wds_vtab_pets_probe"].train.split == "train" and nested["wds_vtab_pets_probe"].source.split == "test"
  assert [clip_benchmark.set_name(p) for p in (
    "wds_vtab-cifar10_test", "x/vtab/cifar10", "wds_imagenet-a_test", "wds_wilds-fmow_test", "a/wds_vtab-dtd/")] == [
      "vtab/cifar10", "vtab/cifar10", "imagenet-a", "wilds/fmow", "vtab/dtd"]
  with pytest.raises(UserError, match=r"no sets there; wanted directories with SPLIT/nshards\.txt"):
    suites.clip_benchmark(str(tmp_path / "none"))
  write_set(tmp_path / "wds_mnist", "val", labelled(4)).joinpath("dataset_type.txt").write_text("x")
  found = suites.clip_benchmark(str(tmp_path), split="val")  # each set that cannot be read says so for itself
  assert [e.source.split for e in found.values()] == ["val", "val"]
  for evaluation, message in zip(found.values(), ("no type 'x'", "no such split"), strict=True):
    with pytest.raises(UserError, match=message):
      ClipBenchmark(evaluation.source)
  write_set(tmp_path / "wds_vtab-pets_test", "test", labelled(4))
  with pytest.raises(UserError, match="are both the set 'vtab/pets'"):
    suites.clip_benchmark(str(tmp_path))


@pytest.mark.parametrize(("change", "message"), [
  (lambda f: (f / "test" / "nshards.txt").unlink(), r"no folder with nshards\.txt in it"),
  (lambda f: (f / "test" / "nshards.txt").write_text("two"), r"nshards\.txt: wanted the number of tars, got 'two'"),
  (lambda f: (f / "test" / "nshards.txt").write_text("0"), "wanted the number of tars, got '0'"),
  (lambda f: (f / "test" / "nshards.txt").write_text("5"), r"3 of the 5 tars that nshards\.txt counts .* 2\.tar"),
  (lambda f: (f / "dataset_type.txt").write_text("retreival"), "no type 'retreival'; did you mean 'retrieval'"),
  (lambda f: (f / "dataset_type.txt").write_text("retrieval"), r"no image with captions \(\.txt\) in 2 tars"),
  (lambda f: (f / "dataset_type.txt").write_text("multilabel"), r"no image with labels \(\.npy\)"),
  (lambda f: (f / "classnames.txt").write_text("a\n\nb\n"), r"classnames\.txt, line 2: empty"),
  (lambda f: (f / "classnames.txt").write_bytes(b"a\xff\n"), r"classnames\.txt, byte 1: not UTF-8"),
  (lambda f: (f / "zeroshot_classification_templates.txt").write_text("a {c}\na {}\n"), r"line 2: wanted .*\{c\}"),
  (lambda f: (f / "zeroshot_classification_templates.txt").write_text("a {c.__class__}\n"), r"line 1: wanted .*\{c\}"),
  (lambda f: (f / "zeroshot_classification_templates.txt").write_text("a dog\n"), r"line 1: wanted .*\{c\}"),
  (lambda f: (f / "zeroshot_classification_templates.txt").write_text("a {c\n"), "line 1: no template"),
  (lambda f: [(f / f"{name}.txt").write_text("race:{c}\nage:{c}\n")
              for name in ("classnames", "zeroshot_classification_templates")], r"several questions \(age, race\)"),
  (lambda f: os.truncate(f / "test" / "1.tar", 700), r"1 of 2 tars .*source\.incomplete=keep"),
])
def test_a_set_that_does_not_fit_is_reported_in_one_line(change, message, tmp_path):
  folder = write_set(tmp_path / "s", "test", labelled(6), per_shard=3, classes=CLASSES, templates=TEMPLATES)
  opened(folder)
  change(folder)
  with pytest.raises(UserError, match=message) as caught:
    opened(folder)
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match="point at the directory above it" if (folder / "test" / "nshards.txt").exists()
                     else "no folder with"):
    opened(folder / "test")


def test_labels_that_are_none_are_named_and_nothing_is_dropped_in_silence(tmp_path):
  image = labelled(1)[0][0]
  bad = {"x": "label", "7": "label", "-1": "label", "": "label", "tensor(3)": "label", "²": "label"}
  folder = write_set(tmp_path / "a", "test", [(image, "cls", label) for label in (3, " 4\n", *bad)], classes=CLASSES)
  source = opened(folder)
  assert source.annotation(0)["label"] == 3 and source.annotation(1)["label"] == 4 and len(source) == 8
  for i in range(2, 8):
    with pytest.raises(UserError, match=r"0\.tar: s000000\d: wanted a class number, 0 to 6, in \.cls, got"):
      source[i]
  pickled = io.BytesIO()
  np.save(pickled, np.array([{}]), allow_pickle=True)
  arrays = [encoded(a) for a in (np.zeros(4), np.zeros((5, 1)), np.full(5, 0.5), np.full(5, np.nan),
                                 np.array(["a"] * 5))]
  arrays += [pickled.getvalue(), encoded(np.zeros(5)).replace(b"(5,), ", b"(10**9,)"), b"\x93NUMPY", b"",
             encoded(np.zeros(5)).replace(b"(5,), ", b"(9999,)"), encoded(np.zeros(5))[:-1]]
  folder = tmp_path / "b"
  write_set(folder, "test", [], classes=CLASSES[:5], kind="multilabel")
  with tarfile.open(folder / "test" / "0.tar", "w") as tar:
    for i, data in enumerate([encoded(np.eye(5, dtype=bool)[2]), encoded(np.eye(5, dtype=np.int64)[1]), *arrays]):
      for name, content in ((f"{i}.npy", data), (f"{i}.png", image)):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
  (folder / "test" / "nshards.txt").write_text("1")
  source = opened(folder)
  assert (source[0]["labels"], source[1]["labels"]) == ((2,), (1,)) and len(source) == 2 + len(arrays)
  for i in range(2, len(source)):
    with pytest.raises(UserError, match=rf"0\.tar: {i}: (wanted|\.npy cannot be read)") as caught:
      source[i]
    assert "\n" not in str(caught.value)


def test_what_is_left_of_a_set_is_named_by_inspect_and_kept_by_pack(tmp_path):
  folder = write_set(tmp_path / "s", "test", labelled(30, "png"), per_shard=10, image_format="png", classes=CLASSES,
                     templates=TEMPLATES)
  (folder / "test" / "3.tar").write_bytes((folder / "test" / "2.tar").read_bytes())
  whole = (folder / "test" / "2.tar").read_bytes()
  (folder / "test" / "2.tar").write_bytes(whole[: whole.index(b"s0000029.png") + 600])
  assert guess(str(folder)) == "clip_benchmark"
  config = Source("clip_benchmark", str(folder), "", incomplete="keep")
  found = inspect(ClipBenchmark(config))[0]
  assert (found["records"], found["classes"], found["templates"], found["found_at_opening"]) == (29, 7, 3, 3)
  assert {d["file"]: d["id"] for d in ClipBenchmark(config).damage} == {"3.tar": "tar", "2.tar": "s0000029"}
  pack(config, str(tmp_path / "packed"), log=lambda _: None)
  from limber_jax.data.sources.packed import Packed

  packed, source = Packed(Source("packed", str(tmp_path / "packed"))), ClipBenchmark(config)
  assert (packed.classes, packed.templates) == (source.classes, source.templates)
  assert [packed[i] for i in range(29)] == [source[i] for i in range(29)]
  other = dataclasses.replace(config, path=str(write_set(tmp_path / "t", "test", labelled(30, "png"), per_shard=10,
                              image_format="png", classes=CLASSES, templates=TEMPLATES[:1])))
  pack(other, str(tmp_path / "other"), log=lambda _: None)
  assert Packed(Source("packed", str(tmp_path / "other"))).fingerprint() != packed.fingerprint()


def test_the_source_of_tars_says_which_one_reads_these(sets):
  from limber_jax.data.sources.webdataset import Webdataset

  with pytest.raises(UserError, match=r"CLIP_benchmark's layout: read it with source\.name=clip_benchmark"):
    Webdataset(Source("webdataset", str(sets / "wds_mnist_test" / "test"), ""))


def test_figures_are_written_in_their_forms_without_those_that_are_not_theirs():
  def entry(evaluation, path, metrics, classes=10, name="clip_benchmark"):
    return {"evaluation": evaluation, "metrics": metrics, "metadata": {"classes": classes},
            "protocol": {"source.name": name, "source.path": path}}

  results = {"model": "clip_vit_b32", "name": "x", "step": 7, "evaluations": {
    "a": entry("zeroshot", "/d/wds_cars_test", {"top1": 0.5, "top5": 0.75, "mean_per_class": 0.25, "count": 8.0}),
    "b": entry("zeroshot", "/d/wds_vtab-pcam", {"top1": 0.5, "mean_per_class": 0.5}, 2),
    "c": entry("zeroshot", "/d/five", {"top1": 0.5}, 5), "d": entry("zeroshot", "/d/x", {"top1": 1.0}, 10, "folder"),
    "e": entry("linear_probe", "/d/wds_cars_test", {"accuracy": 1.0}),
    "f": entry("retrieval", "/d/wds_flickr30k", {"t2i_r1": 0.1, "i2t_r1": 0.2, "images": 3.0})}}
  found = clip_benchmark.files(results, "run-7")
  told = {k: json.loads(v)["metrics"] for k, v in found.items() if k.startswith("clip_benchmark/")}
  assert told == {
    "clip_benchmark/cars_run-7_clip_vit_b32_en_zeroshot_classification.json": {
      "acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.25},
    "clip_benchmark/vtab_pcam_run-7_clip_vit_b32_en_zeroshot_classification.json": {
      "acc1": 0.5, "acc5": pytest.approx(float("nan"), nan_ok=True), "mean_per_class_recall": 0.5},
    "clip_benchmark/five_run-7_clip_vit_b32_en_zeroshot_classification.json": {"acc1": 0.5, "acc5": 1.0},
    "clip_benchmark/flickr30k_run-7_clip_vit_b32_en_zeroshot_retrieval.json": {
      "image_retrieval_recall@1": 0.1, "text_retrieval_recall@1": 0.2}}
  lines = [json.loads(line) for line in found["eval_results.jsonl"].splitlines()]
  assert lines == [
    {"key": "cars", "dataset": "Stanford Cars",
     "metrics": {"acc1": 0.5, "acc5": 0.75, "mean_per_class_recall": 0.25, "main_metric": 0.5}},
    {"key": "vtab/pcam", "dataset": "PatchCamelyon",
     "metrics": {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.5, "main_metric": 0.5}}]
