"""The table of data sets: what it says, and that the sets which need more than a class label are read as it says."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limber_jax import registry
from limber_jax.config import Source
from limber_jax.errors import UserError
from limber_jax.evals import datasets, prompts, suites
from limber_jax.evals.zeroshot import ZeroShot
from tests.made import PREDICT, config, context
from tests.test_sources_folder import write

PAGE = Path(__file__).parent.parent / "docs/datasets.md"
START, END = "<!-- data sets: limber_jax.evals.datasets.markdown() -->\n", "<!-- end of data sets -->"


def test_the_documentation_has_the_table_of_all_data_sets():
  text = PAGE.read_text()
  assert START in text and END in text, f"put {START!r}, datasets.markdown() and {END!r} into {PAGE.name}"
  assert text.split(START)[1].split(END)[0] == datasets.markdown()


def test_there_are_the_papers_27_and_the_others_and_each_says_all_that_it_must():
  assert len(datasets.CLIP) == 27 and set(datasets.CLIP) < set(datasets.SETS)
  others = {"coco", "nocaps", "vqa2", "flickr30k", "awa2", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch",
            "objectnet", "imagenet_vid_robust", "ytbb_robust", "cc3m"}
  assert set(datasets.SETS) == set(datasets.CLIP) | others
  for key, s in datasets.SETS.items():
    assert s.source.name in registry.SOURCES and s.source.path.startswith("data/"), key
    assert s.page.startswith("http") and s.licence.startswith("http") and len(s.sizes) == 3 and any(s.sizes), key
    assert (s.source.name == "tfds") == bool(s.tfds) == (s.layout == datasets.PREPARED), key
    assert (key in datasets.CLIP) == bool(s.metric), key
    assert datasets.of(s.source) is s, key
  places = {s.source.path for s in datasets.SETS.values()}
  assert len(places) == len(datasets.SETS)


def test_the_metrics_are_those_of_the_papers_table():
  by_metric = {m: {k for k, s in datasets.CLIP.items() if s.metric == m}
               for m in ("mean_per_class", "map11", "mean_top1_top5", "roc_auc")}
  assert by_metric == {"mean_per_class": {"fgvc_aircraft", "oxford_pets", "caltech101", "flowers102"},
                       "map11": {"voc2007"}, "mean_top1_top5": {"kinetics700"}, "roc_auc": {"hateful_memes"}}
  assert {s.metric for k, s in datasets.CLIP.items() if not any(k in v for v in by_metric.values())} == {"top1"}


def test_a_builder_of_tfds_is_called_what_tfds_calls_it():
  tfds = pytest.importorskip("tensorflow_datasets")
  for key, s in datasets.SETS.items():
    if s.tfds:
      builder = tfds.builder(s.tfds, data_dir="/nowhere")
      assert builder.info.full_name.rpartition("/")[0] in (s.tfds, f"{s.tfds}/{builder.builder_config.name}" if (
        builder.builder_config) else s.tfds), key
      assert f"data/tfds/{s.tfds}" == s.source.path, key


def test_zero_shot_evaluations_are_of_all_27_and_never_run_in_training():
  found = {name: e for name, e in suites.clip().items() if e.name == "zeroshot"}
  assert found.keys() == datasets.CLIP.keys()
  for key, e in found.items():
    assert (e.name, e.every, e.classes) == ("zeroshot", -1, key) and e.source == datasets.CLIP[key].source
    assert prompts.load_classes(e.classes) and prompts.load_templates(e.templates)
  assert len(prompts.load_templates(found["imagenet"].templates)) == 80


@pytest.mark.parametrize("key", datasets.CLIP)
def test_missing_data_are_one_line_that_says_what_is_expected_where_and_from_which_page(key, tmp_path):
  e = suites.clip()[key]
  s = datasets.CLIP[key]
  e.batch_size = 8
  e.source = Source(**{**vars(e.source), "path": e.source.path.replace("data/", f"{tmp_path}/", 1)})
  with pytest.raises(UserError) as caught:
    e.open(context())
  message = str(caught.value)
  assert message.startswith(f"{e.source.path}: no such") and s.name in message and s.page in message
  assert ("download_and_prepare" in message) == bool(s.tfds) and "\n" not in message
  assert all(name in message for name in s.layout.split() if "." in name and "TFDS" not in name) or s.tfds


def test_data_of_the_users_own_are_reported_as_their_source_tells_it(tmp_path):
  with pytest.raises(UserError, match=r"no such file or directory; wanted a directory or \.tar"):
    config(ZeroShot, source=Source(name="folder", path=str(tmp_path / "mine"))).open(context())


# The sets that TFDS prepares with more than a class label

def png(value):
  out = io.BytesIO()
  Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "PNG")
  return out.getvalue()


def prepare(root, name, features, records, split="test"):
  """Prepares a dataset of the features that the stock builder `name` has, without TensorFlow."""
  tfds = pytest.importorskip("tensorflow_datasets")

  class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, downloads):
      return {split: self._generate_examples()}

    def _generate_examples(self):
      yield from enumerate(records)

  Prepared.name = name
  Prepared(data_dir=str(root), file_format="array_record").download_and_prepare()


def stock(name):
  tfds = pytest.importorskip("tensorflow_datasets")
  return tfds.builder(name, data_dir="/nowhere").info.features


def opened(key, root, **fields):
  s = datasets.CLIP[key].source
  path = os.path.join(root, s.path.removeprefix("data/tfds/").split("/")[0])
  return Source(**{**vars(s), "path": path, **fields}).open()


def by_value(source):
  """Returns {value of the pixels: record}; TFDS shuffles."""
  return {int(np.asarray(Image.open(io.BytesIO(r["image"])))[0, 0, 0]): r for r in map(source.__getitem__,
                                                                                      range(len(source)))}


BOX = np.array([0.0, 0.0, 1.0, 1.0])


def test_voc_has_several_classes_an_image_and_those_of_difficult_objects_apart(tmp_path):
  # Image 0 has a dog and a difficult cat, 1 a cat and a difficult cat, 2 a difficult dog only.
  objects = [[("dog", False), ("cat", True)], [("cat", False), ("cat", True)], [("dog", True)]]
  sheet = []
  for i, each in enumerate(objects):
    box = {"bbox": BOX, "is_truncated": False, "pose": 0}
    sheet.append({
      "image": png(i), "image/filename": f"{i}.jpg", "labels": sorted({n for n, _ in each}),
      "labels_no_difficult": sorted({n for n, difficult in each if not difficult}),
      "objects": [{**box, "label": n, "is_difficult": difficult} for n, difficult in each]})
  prepare(tmp_path, "voc", stock("voc/2007"), sheet)
  source = opened("voc2007", tmp_path)
  found = by_value(source)
  cat, dog = source.classes.index("cat"), source.classes.index("dog")
  assert {i: (r["labels"], r["difficult"]) for i, r in found.items()} == {
    0: ((dog,), (cat,)), 1: ((cat,), ()), 2: ((), (dog,))}
  assert found[0]["text"] == "dog" and "label" not in found[0]
  # The evaluation: cat scores 0.9 on image 0 (not counted), 0.5 on 1, 0.7 on 2; dog is counted on 0 and 1 only.
  run = ZeroShot(source=Source(name="tfds", path=str(tmp_path), split="test"), batch_size=8, classes="voc2007",
                 templates="{}").open(context())
  order = [c.names[0] for c in run._classes]
  weights = np.zeros((3, 20))
  weights[:, order.index("cat")], weights[:, order.index("dog")] = (0.9, 0.5, 0.7), (0.2, 0.6, 0.9)
  # A text's embedding is looked up by its first letter: here each class is made an axis of its own instead.
  run._tokens = np.arange(20, dtype=np.int32)[:, None, None].repeat(2, axis=2)
  predict = PREDICT | {"embed_text": lambda params, stats, tokens: params["text"][tokens[:, 1]]}
  params = {"image": weights.astype(np.float32), "text": np.eye(20, dtype=np.float32)}
  # Cat: image 2 first and wrong, then 1: 1/2 at every level. Dog: 1 first and wrong, then 0: 1/2.
  assert run(predict, params, {}) == {"map11": pytest.approx(1 / 2), "count": 3}


def test_clevr_counts_are_the_numbers_of_objects(tmp_path):
  box = {"3d_coords": (0.0, 0.0, 0.0), "color": 0, "material": 0, "pixel_coords": (0.0, 0.0, 0.0), "rotation": 0.0,
         "shape": 0, "size": 0}
  prepare(tmp_path, "clevr", stock("clevr"), [
    {"image": png(n), "file_name": "x", "objects": [box] * n, "question_answer": []} for n in (3, 5, 10, 0)], "train")
  source = opened("clevr_counts", tmp_path, split="train")
  readable = {}
  for i in range(4):
    try:
      record = source[i]
      readable[int(source.classes[record["label"]])] = record
    except UserError as error:
      assert "wanted 3 to 10 objects, got 0" in str(error)
  assert set(readable) == {3, 5, 10}
  assert all(by == int(np.asarray(Image.open(io.BytesIO(r["image"])))[0, 0, 0]) for by, r in readable.items())
  names = prompts.class_names(ZeroShot(classes="clevr_counts"), source)
  assert [names[readable[n]["label"]] for n in (3, 5, 10)] == ["3", "5", "10"]
  assert len(opened("clevr_counts", tmp_path, split="train[2:4]")) == 2  # as 500 of the 2,500 are


def test_kitti_distances_are_those_of_the_nearest_vehicle(tmp_path):
  def thing(kind, z):
    return {"alpha": 0.0, "bbox": BOX, "dimensions": (1.0, 1.0, 1.0), "location": (0.0, 0.0, z),
            "occluded": 0, "rotation_y": 0.0, "truncated": 0.0, "type": kind}

  scenes = {1: [thing("Car", 30.0), thing("Van", 7.5)], 2: [thing("Truck", 20.0), thing("Pedestrian", 3.0)],
            3: [thing("Car", 20.5)], 4: [thing("Cyclist", 2.0), thing("Tram", 5.0)], 5: [thing("Car", 8.0)]}
  prepare(tmp_path, "kitti", stock("kitti"),
          [{"image": png(i), "image/file_name": "x", "objects": things} for i, things in scenes.items()])
  source = opened("kitti_distance", tmp_path)
  assert {i: source.classes[r["label"]] for i, r in by_value(source).items()} == {
    1: "near", 2: "nearby", 3: "far", 4: "none", 5: "near"}
  assert prompts.class_names(ZeroShot(classes="kitti_distance"), source)[1] == "a photo i took with a car nearby."


def layout(key):
  """Returns ({path below data/: number of the class in the list of classes, or text}, images that count)."""
  names = [c.key or c.names[0] for c in prompts.load_classes(key)]
  many = range(len(names))
  match key:
    case "ucf101":
      tfds = pytest.importorskip("tensorflow_datasets")
      folders = (Path(tfds.__file__).parent / "video/ucf101_labels.txt").read_text().split()
      number = {"".join(n.lower().split()): k for k, n in enumerate(names)}
      lists = {f"testlist0{i}.txt": "".join(f"{n}/v_{n}_g01_c0{i}.avi\n" for n in folders) for i in (1, 2, 3)}
      return lists | {f"frames/{n}/v_{n}_g01_c0{i}.jpg": number[n.lower()] for n in folders for i in (1, 2, 3)}, 303
    case "fgvc_aircraft":
      return {"images_variant_test.txt": "".join(f"{k:07} {names[k]}\n" for k in many)} | {
        f"images/{k:07}.jpg": k for k in many}, 100
    case "birdsnap":
      folders = [n.replace(" ", "_") for n in names]
      return {"test_images.txt": "path\n" + "".join(f"{n}/1.jpg\n" for n in folders[:200])} | {
        f"images/{n}/{i}.jpg": min(k, 255) for k, n in enumerate(folders) for i in (1, 2)}, 200
    case "gtsrb":
      rows = "".join(f"{k:05}.ppm;53;54;6;5;48;49;{k}\r\n" for k in many)
      return {"GT-final_test.csv": "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\r\n" + rows} | {
        f"Final_Test/Images/{k:05}.ppm": k for k in many}, 43
    case "hateful_memes":
      return {"dev.jsonl": "".join(f'{{"id":{k},"img":"img/{k}.png","label":{k},"text":"x"}}\n' for k in many)} | {
        f"img/{k}.png": k for k in many}, 2
    case "fer2013":
      folders = ["angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"]
      return {f"test/{n}/1.png": k for k, n in enumerate(folders)} | {"train/angry/1.png": 0}, 7
  return {f"test/{n}/1.jpg": k for k, n in enumerate(names)}, len(names)  # country211, rendered_sst2


@pytest.mark.parametrize("key", ["ucf101", "fgvc_aircraft", "birdsnap", "gtsrb", "hateful_memes", "fer2013",
                                 "country211", "rendered_sst2"])
def test_what_no_builder_prepares_is_read_in_its_own_layout(key, tmp_path):
  e = suites.clip()[key]
  e.source = Source(**{**vars(e.source), "path": e.source.path.replace("data/", f"{tmp_path}/", 1)})
  e.templates, e.batch_size = "{}", 128
  files, count = layout(key)
  write(Path(e.source.path), files)
  run = e.open(context())
  assert not run._runners[0].source.damage
  # An image of class k of the list has that axis as its embedding, and so have the names of the class.
  numbers = {c.names: k for k, c in enumerate(prompts.load_classes(key))}
  axes = np.array([numbers[c.names] for c in run._classes for _ in c.names], np.int32)
  run._tokens = axes[:, None, None].repeat(2, axis=2)  # [names, templates, T]
  eye = np.eye(len(numbers), dtype=np.float32)
  found = run(PREDICT, {"image": eye, "text": eye}, {})
  assert found.pop("count") == count and set(found.values()) == {1.0}
  assert datasets.CLIP[key].metric in found and run.metadata()["num_examples"] == count


def test_a_set_is_known_by_the_end_of_its_path():
  assert datasets.of(Source(name="folder", path="/mnt/x/country211/")) is datasets.SETS["country211"]
  assert datasets.of(Source(name="folder", path="/mnt/x/mycountry211")) is None
  assert datasets.of(Source(name="tfds", path="/mnt/tfds/food101")) is datasets.SETS["food101"]
  assert datasets.of(Source(name="digits")) is None
