"""Zero-shot classification on several kinds of data: metrics, classes by name, prompts."""

import dataclasses
import json

import numpy as np
import pytest
import sklearn.metrics

from limber_jax.config import Source
from limber_jax.errors import UserError
from limber_jax.evals import datasets, prompts, zeroshot
from limber_jax.evals.base import Stopped
from limber_jax.evals.prompts import Class, class_names, load_classes, load_templates, places
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.metrics import classification
from tests.made import PREDICT, Made, config, context, install, tables, unit
from tests.test_sources_folder import write

MESHES = [(1, 1, 1), (4, 2, 1)]


@pytest.fixture
def made(monkeypatch):
  """Sets the records and classes of the data source "made"."""
  return install(monkeypatch)


# Metrics

def test_average_precision_of_eleven_points_is_that_counted_by_hand():
  # By score: found, wrong, difficult (not there), found, wrong, found; a fourth is never scored above 0.1.
  #   recall     1/4        1/4         2/4  2/4   3/4   4/4
  #   precision   1         1/2         2/3  2/4   3/5   4/6
  # The highest from a recall on: 1 up to 0.2, then 4/6 for 0.3 to 1.
  scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.1])
  truth = np.array([1, -1, 0, 1, -1, 1, 1])
  assert classification.average_precision(scores, truth) == pytest.approx((3 * 1 + 8 * 4 / 6) / 11)
  # With the difficult one counted as wrong it would be another metric.
  wrong = np.where(truth == 0, -1, truth)
  assert classification.average_precision(scores, wrong) == pytest.approx((3 + 8 * 4 / 7) / 11)
  assert classification.average_precision(scores, np.array([-1, -1, 0, -1, -1, -1, 1])) == pytest.approx(1 / 6)


def test_average_precision_reads_the_levels_off_scikit_learns_curve():
  rng = np.random.default_rng(0)
  for count, share in ((7, 0.5), (10, 0.4), (200, 0.05), (999, 0.3)):
    truth = np.where(rng.random(count) < share, 1, -1)
    truth[0] = 1
    scores = rng.normal(size=count)
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth > 0, scores, drop_intermediate=False)
    precision, recall = precision[:-1], recall[:-1]  # without the point that scikit-learn adds
    wanted = np.mean([precision[recall >= level - 1e-9].max() for level in np.arange(11) / 10])
    assert classification.average_precision(scores, truth) == pytest.approx(wanted, abs=1e-12)


def test_a_class_that_is_nowhere_has_no_average_precision_and_counts_for_nothing():
  truth = np.array([[1, -1, 0], [-1, -1, -1]])
  assert classification.mean_average_precision(np.array([[0.1, 0, 0], [0.2, 0, 0]]), truth) == 1 / 2
  with pytest.raises(ValueError, match="nowhere"):
    classification.average_precision(np.zeros(2), truth[:, 2])
  with pytest.raises(ValueError, match="nowhere"):
    classification.mean_average_precision(np.zeros((2, 2)), truth[:, 1:])


@pytest.mark.parametrize("decimals", [1, 6])
def test_roc_auc_equals_scikit_learn_with_and_without_ties(decimals):
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 2, 500)
  scores = np.round(rng.normal(size=500) + 0.5 * labels, decimals)
  wanted = sklearn.metrics.roc_auc_score(labels, scores)
  assert classification.roc_auc(scores, labels) == pytest.approx(wanted, abs=1e-12)
  with pytest.raises(ValueError, match="one class"):
    classification.roc_auc(scores, np.ones(500, int))


def test_scores_that_are_no_numbers_are_never_right():
  nan = np.full(4, np.nan)
  assert classification.average_precision(nan, np.array([1, -1, 1, -1])) == 0
  assert classification.roc_auc(nan, np.array([1, 0, 1, 0])) == 0
  assert zeroshot.rank(nan, 2) == 4
  assert zeroshot.rank(np.array([1, np.nan, 0]), 0) == 1


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_the_places_in_a_stable_sort(seed):
  scores = np.random.default_rng(seed).integers(0, 4, 20).astype(float)  # with ties
  order = np.argsort(-scores, kind="stable")
  assert [zeroshot.rank(scores, label) for label in range(20)] == np.argsort(order).tolist()


# The evaluation

@pytest.mark.parametrize("mesh", MESHES)
def test_several_classes_an_image_give_the_mean_average_precision(mesh, made):
  rng = np.random.default_rng(2)
  truth = np.where(rng.random((23, 4)) < 0.4, 1, -1)
  truth[rng.random((23, 4)) < 0.15] = 0
  truth[:, 3] = np.minimum(truth[:, 3], 0)  # a class that nothing but difficult objects have
  made([{"labels": tuple(np.flatnonzero(row > 0).tolist()), "difficult": tuple(np.flatnonzero(row == 0).tolist())}
        for row in truth], classes=tuple("abcd"))
  image, text = unit(rng.normal(size=(23, 6))), unit(rng.normal(size=(4, 6)))
  run = config(ZeroShot).open(context(mesh))
  found = run(PREDICT, tables(image, text), {})
  scores = image @ text.T
  each = []
  for c in range(3):
    clear = truth[:, c] != 0
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth[clear, c] > 0, scores[clear, c],
                                                                  drop_intermediate=False)
    each.append(np.mean([precision[:-1][recall[:-1] >= level - 1e-9].max() for level in np.arange(11) / 10]))
  assert found == {"map11": pytest.approx(np.mean(each)), "count": 23}


def test_of_two_classes_the_area_under_the_curve_can_be_had(made):
  rng = np.random.default_rng(3)
  labels = rng.integers(0, 2, 40)
  image, text = unit(rng.normal(size=(40, 5))), unit(rng.normal(size=(2, 5)))
  made([{"label": int(label)} for label in labels], classes=("a", "b"))
  found = config(ZeroShot, metrics=("roc_auc",)).open(context())(PREDICT, tables(image, text), {})
  wanted = sklearn.metrics.roc_auc_score(labels, image @ (text[1] - text[0]))
  assert found == {"roc_auc": pytest.approx(wanted), "count": 40}
  made([{"label": 1}], classes=("a", "b"))
  with pytest.raises(UserError, match="a ROC curve of one class only"):
    config(ZeroShot, metrics=("roc_auc",)).open(context())(PREDICT, tables(image, text), {})


def test_the_mean_of_top_1_and_top_5_is_that(made):
  rng = np.random.default_rng(4)
  image, text = unit(rng.normal(size=(30, 5))), unit(rng.normal(size=(9, 5)))
  made([{"label": int(label)} for label in rng.integers(0, 9, 30)], classes=tuple("abcdefghi"))
  found = config(ZeroShot, metrics=("mean_top1_top5", "top1", "top5")).open(context())(PREDICT, tables(image, text), {})
  assert 0 < found["top1"] < found["mean_top1_top5"] == (found["top1"] + found["top5"]) / 2


def test_the_papers_metric_of_a_set_is_among_those_of_its_list_of_classes():
  for key, s in datasets.CLIP.items():
    several = s.metric == "map11"
    found = zeroshot.chosen_metrics(config(classes=key), s.classes, several)
    assert s.metric in found and (several or {"top1", "mean_per_class"} <= set(found))


@pytest.mark.parametrize(("metrics", "classes", "message"), [
  (("top_1",), "ab", "no metric 'top_1' of 2 classes.*did you mean 'top1'"),
  (("top5",), "ab", "no metric 'top5' of 2 classes, one an image"),
  (("roc_auc",), "abc", "no metric 'roc_auc' of 3 classes"),
  (("map11",), "abc", "no metric 'map11' of 3 classes, one an image"),
])
def test_a_metric_that_cannot_be_had_is_refused_at_once(metrics, classes, message, made):
  made([{"label": 0}], classes=tuple(classes))
  with pytest.raises(UserError, match=message):
    config(ZeroShot, metrics=metrics).open(context())


def test_figures_of_several_splits_are_averaged(tmp_path):
  # Of the first list 1 of 2 is right, of the second 1 of 1, of the third 0 of 1. A pixel of value i has embedding i.
  write(tmp_path, {"frames/a/0.png": 0, "frames/a/1.png": 1, "frames/b/2.png": 2,
                   "list1.txt": "a/0.avi\na/1.avi\n", "list2.txt": "b/2.avi\n", "list3.txt": "a/1.avi\n"})
  source = Source(name="folder", path=str(tmp_path), split="list1.txt,list2.txt,list3.txt", images="frames")
  run = config(ZeroShot, source=source).open(context())
  found = run(PREDICT, tables([[1, 0], [0, 1], [0, 1]], [[1, 0], [0, 1]]), {})
  assert found == {"top1": pytest.approx((1 / 2 + 1 + 0) / 3), "mean_per_class": pytest.approx((1 / 2 + 1 + 0) / 3),
                   "count": 4}
  metadata = run.metadata()
  assert [metadata[k] for k in ("num_examples", "covered", "damaged", "split")] == [4, 4, 0, source.split]
  assert len(metadata["data"]) == 16 and json.loads(json.dumps(metadata)) == metadata


def test_a_run_that_was_stopped_resumes_where_it_was(tmp_path, made):
  made([{"label": i % 3} for i in range(40)], classes=tuple("abc"))
  params = tables(unit(np.random.default_rng(5).normal(size=(40, 4))), np.eye(4)[:3])
  wanted = config(ZeroShot).open(context())(PREDICT, params, {})
  left, traced = [3], []  # the texts, and two batches of images

  def stop():
    left[0] -= 1
    return left[0] < 0

  kept = dataclasses.replace(context(stop=stop), results_dir=str(tmp_path))
  with pytest.raises(Stopped):
    config(ZeroShot).open(kept)(PREDICT, params, {})
  lines = (tmp_path / "images.jsonl").read_text().splitlines()
  records = [r for r in map(json.loads, lines) if "rank" in r]
  assert [set(r) - {"crc"} for r in records] == [{"index", "id", "label", "rank", "predicted"}] * 16
  left = [100]

  def noting(params, stats, images):
    traced.append(images)
    return PREDICT["embed_image"](params, stats, images)

  assert config(ZeroShot).open(kept)(PREDICT | {"embed_image": noting}, params, {}) == wanted and left == [100 - 4]
  assert len((tmp_path / "images.jsonl").read_text().splitlines()) == len(lines) + 24


def test_damaged_images_are_left_out_and_counted(made):
  made([{"label": 0}, {"label": 0, "broken": True}, {"label": 1}], classes=("a", "b"))
  run = config(ZeroShot, max_bad_fraction=0.5).open(context())
  found = run(PREDICT, tables(np.eye(2)[[0, 0, 0]], np.eye(2)), {})
  assert found == {"top1": 1 / 2, "mean_per_class": 1 / 2, "count": 2}
  assert (run.metadata()["covered"], run.metadata()["damaged"]) == (2, 1)


# Classes and prompts

def test_a_class_of_several_names_is_the_mean_of_their_sentences(made, tmp_path):
  (tmp_path / "classes.txt").write_text("a\nb|c\tglad\n")
  made([{"label": 0}, {"label": 1}], classes=("glad", "A"))  # the other way round: label 0 is glad
  text = unit(np.array([[1, 0, 0], [0, 1, 0.2], [0, 0.2, 1]]))
  image = unit(np.array([[0.6, 0.7, 0.7], [1, 0, 0]]))
  run = config(ZeroShot, classes=str(tmp_path / "classes.txt")).open(context())
  assert run(PREDICT, tables(image, text), {})["top1"] == 1
  assert run.metadata()["classes"] == 2
  # Against either of its names alone the first image would be called a.
  assert image[0] @ text[0] > 0 and (image[0] @ text[1:].T < image[0] @ unit(text[1] + text[2])).all()
  weights = prompts.by_class(text, [Class(("a",)), Class(("b", "c"))])
  np.testing.assert_allclose(weights, [text[0], unit(text[1] + text[2])], atol=1e-6)


def sourced(names):
  source = Made(None)
  source.classes = tuple(names)
  return source


# What the data sets call some of their classes, in their own order, and how the prompts say it.
OWN_WORDS = {
  "eurosat": (["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop",
               "Residential", "River", "SeaLake"],
              {0: "annual crop land", 2: "brushland or shrubland", 3: "highway or road", 9: "lake or sea"}),
  "fer2013": (["angry", "disgust", "fear", "happy", "neutral", "sad", "surprise"],
              {1: "disgusted", 2: "fearful", 4: "neutral", 6: "surprised"}),
  "clevr_counts": ([str(i) for i in range(3, 11)], {0: "3", 7: "10"}),
  "kitti_distance": (["near", "nearby", "far", "none"], {3: "a photo i took with no car."}),
  "patch_camelyon": (["0", "1"], {1: "lymph node containing metastatic tumor tissue"}),
  "gtsrb": ([f"{i:05}" for i in range(43)], {14: "stop"}),
  "rendered_sst2": (["negative", "positive"], {0: "negative"}),
}


@pytest.mark.parametrize("key", OWN_WORDS)
def test_classes_come_in_the_order_of_the_sources_labels(key):
  own, wanted = OWN_WORDS[key]
  found = class_names(config(classes=key), sourced(own))
  assert {i: found[i] for i in wanted} == wanted and len(set(found)) == len(own)
  back = class_names(config(classes=key), sourced(own[::-1])) if key != "gtsrb" else found[::-1]
  assert back == found[::-1]


@pytest.mark.parametrize("key", [k for k, s in datasets.CLIP.items() if s.tfds])
def test_classes_are_those_of_the_tfds_builder(key):
  tfds = pytest.importorskip("tensorflow_datasets")
  s = datasets.CLIP[key]
  features = tfds.builder(s.tfds, data_dir="/nowhere").info.features
  labels = {k: getattr(f, "feature", f) for k, f in features.items()}
  labels = {k: f for k, f in labels.items() if isinstance(f, tfds.features.ClassLabel)}
  if s.source.label_key in ("count", "distance"):
    assert not labels  # the source derives them
    return
  own = labels[s.source.label_key or next(iter(labels))].names
  assert len(own) == s.classes
  found = class_names(config(classes=key), sourced(own))
  assert sorted(found) == sorted(c.names[0] for c in load_classes(key))
  if all(name.isdecimal() for name in own):  # TFDS learns the names only when it prepares the data
    return
  key_of = {c.names[0]: c.key or c.names[0] for c in load_classes(key)}
  letters = lambda name: "".join(filter(str.isalnum, name.lower()))  # noqa: E731
  for name, theirs in zip(found, own, strict=True):
    if key == "imagenet":
      continue  # its keys are looked at below
    theirs = theirs[3:] if key == "sun397" else theirs  # /a/abbey
    assert letters(key_of[name] if letters(name) != letters(theirs) else name) == letters(theirs)


def test_imagenets_classes_are_found_by_wordnet_id_and_a_part_of_them_keeps_its_numbers(open_clip):
  classes = load_classes("imagenet")
  assert [c.names[0] for c in classes] == list(open_clip.IMAGENET_CLASSNAMES)
  ids = [c.key for c in classes]
  assert ids == sorted(set(ids)) and ids[0] == "n01440764" and ids[-1] == "n15075141"
  assert places(classes, ["n01443537", "n15075141", "n01440764"], "x") == [1, 999, 0]
  assert places(classes, [str(i) for i in (10, 0, 999)], "x") == [10, 0, 999]  # as of ImageNetV2's folders
  assert classes[ids.index("n02099601")].names == ("Golden Retriever",)


def test_countries_are_found_by_their_codes():
  found = class_names(config(classes="country211"), sourced(sorted(c.key for c in load_classes("country211"))))
  assert found[0] == "Andorra" and found[-1] == "Zimbabwe" and found == [c.names[0] for c in load_classes("country211")]


@pytest.mark.parametrize(("own", "message"), [
  (["0"] * 10, "has classes '0' and '0', which are the same"),
  (["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "trucks"],
   "'made' has a class 'trucks', which is no name there; the nearest is 'truck'"),
  (["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"],
   "has 10 names, data source 'made' 9 classes; 'truck' is not among them"),
  ([str(i) for i in range(1, 11)], "has a class '1'"),
])
def test_classes_of_another_set_are_one_line_with_the_nearest_name(own, message):
  with pytest.raises(UserError, match=message) as caught:
    class_names(config(classes="cifar10"), sourced(own))
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_a_file_of_other_words_is_in_the_order_of_the_labels_and_one_of_the_same_words_in_any(tmp_path):
  (tmp_path / "x.txt").write_text("chat\nchien\n")
  assert class_names(config(classes=str(tmp_path / "x.txt")), sourced(["cat", "dog"])) == ["chat", "chien"]
  (tmp_path / "x.txt").write_text("big dog\tdog\na cat\tcat\n")
  assert class_names(config(classes=str(tmp_path / "x.txt")), sourced(["cat", "dog"])) == ["a cat", "big dog"]
  (tmp_path / "x.txt").write_text("dog\nchat\n")
  with pytest.raises(UserError, match="has a class 'cat', which is no name there; the nearest is 'chat'"):
    class_names(config(classes=str(tmp_path / "x.txt")), sourced(["cat", "dog"]))
  for line in ("a||b", "|", "a\tb\tc"):
    (tmp_path / "x.txt").write_text(f"ok\n{line}\n")
    with pytest.raises(UserError, match="line 2: wanted a name"):
      load_classes(str(tmp_path / "x.txt"))


@pytest.mark.parametrize("key", datasets.CLIP)
def test_every_list_of_classes_and_templates_can_be_read(key):
  classes = load_classes(key)
  assert len(classes) == datasets.CLIP[key].classes
  assert len({prompts.plain(c.key or c.names[0]) for c in classes}) == len(classes)
  for c in classes:
    assert all(name == name.strip() and name.isprintable() for name in (*c.names, c.key))
  if key != "imagenet":
    assert all("{}" in t for t in load_templates(key))


def test_the_single_prompt_and_the_number_of_templates_are_the_published_ones():
  assert load_templates("single") == ["A photo of a {}."]
  counts = {"food101": 1, "cifar10": 18, "caltech101": 34, "ucf101": 48, "kinetics700": 28, "gtsrb": 3, "fer2013": 6}
  assert {key: len(load_templates(key)) for key in counts} == counts  # openai/CLIP, data/prompts.md
  assert load_templates("mnist") == ['a photo of the number: "{}".']
  assert load_classes("fer2013")[3] == Class(("happy", "smiling"))
