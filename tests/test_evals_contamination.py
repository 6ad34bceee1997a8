"""Duplicates between training and evaluation data: metrics by hand, and one pass over any amount of training data."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from limber_jax import registry
from limber_jax.config import Source
from limber_jax.errors import UserError
from limber_jax.evals import contamination
from limber_jax.evals.base import Stopped
from limber_jax.evals.contamination import NOTHING, Contamination, Nearest, measure, shown, summary
from tests.made import PREDICT, Made, MadeConfig, context, tables, unit

CLASSES = ("a", "b", "c")


@dataclasses.dataclass
class EvaluatedConfig(MadeConfig):
  """Of the data source "evaluated"."""

  name: str = "evaluated"


@dataclasses.dataclass
class TrainedConfig(MadeConfig):
  """Of the data source "trained"."""

  name: str = "trained"

  def open(self):
    return Trained(self)


class Trained(Made):
  """The training data; the image of record i has the value 100 + i."""

  def annotation(self, index):
    return {**super().annotation(index), "id": f"train {index}"}

  _broken = frozenset()

  def __getitem__(self, index):
    if index in self._broken:
      raise UserError("the disk is away")
    return {**super().__getitem__(index), "image": np.full((8, 8, 3), 100 + index, np.uint8)}


@pytest.fixture
def data(monkeypatch):
  """Sets the records of the data sources "evaluated" and "trained"."""
  monkeypatch.setitem(registry.SOURCES, "evaluated", f"{__name__}:EvaluatedConfig")
  monkeypatch.setitem(registry.SOURCES, "trained", f"{__name__}:TrainedConfig")

  def set_(evaluated, trained):
    monkeypatch.setattr(Made, "records", evaluated)
    monkeypatch.setattr(Made, "classes", CLASSES)
    monkeypatch.setattr(Trained, "records", trained, raising=False)

  return set_


def settings(**fields):
  return Contamination(**{"source": Source("evaluated"), "train": Source("trained"), "batch_size": 8, "templates": "{}",
                    "threshold": 0.9, **fields})


def place(workdir="", mesh=(1, 1, 1), results_dir="", **fields):
  return dataclasses.replace(context(mesh, workdir=workdir, **fields), results_dir=str(results_dir), name="birds")


def embeddings(evaluated, trained, text=((1, 0, 0), (0, 1, 0), (0, 0, 1))):
  image = np.zeros((256, 3), np.float32)
  image[: len(evaluated)], image[100 : 100 + len(trained)] = unit(np.array(evaluated)), unit(np.array(trained))
  return tables(image, text)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 2, 1)])
def test_figures_and_pairs_are_those_found_by_hand(mesh, data, tmp_path):
  # Images 0 (right) and 2 (wrong) are in the training data, 1 (right), 3 (wrong) and 4 (right) are not.
  data([{"label": label} for label in (0, 1, 2, 2, 2)], [{}] * 11)
  x, y, z = np.eye(3)
  train = [y + z, *[-x - y] * 8, x, 0.99 * x + 0.02 * y]  # 9 is image 0 itself, and in the second batch
  params = embeddings([x, x + 2 * y, x + 0.02 * y, y + 0.1 * z, z], train)
  run = settings(threshold=0.99).open(place(tmp_path, mesh))
  found = run(PREDICT, params, {})
  assert (found["top1"], found["clean"], found["overlap"]) == (3 / 5, 2 / 3, 1 / 2)
  assert found["gain"] == pytest.approx(3 / 5 - 2 / 3)
  assert (found["share"], found["count"], found["overlap_count"]) == (2 / 5, 5, 2)
  assert found["p"] == pytest.approx(1 - (1 / 3) ** 2)  # one or two of two are right
  want = stats.binomtest(1, 2).proportion_ci(confidence_level=0.995, method="exact")
  assert (found["overlap_low"], found["overlap_high"]) == pytest.approx((want.low, want.high))
  pairs = [json.loads(line) for line in (tmp_path / "birds_pairs.jsonl").read_text().splitlines()]
  by_id = {p["id"]: p for p in pairs}
  assert [p["cosine"] for p in pairs] == sorted((p["cosine"] for p in pairs), reverse=True)
  assert {i: (p["train_id"], p["overlap"], p["right"]) for i, p in by_id.items()} == {
    "0": ("train 9", True, True), "1": ("train 0", False, True), "2": ("train 10", True, False),
    "3": ("train 0", False, False), "4": ("train 0", False, True)}
  assert by_id["3"]["cosine"] == pytest.approx(1.1 / np.sqrt(2 * 1.01), abs=1e-6)
  with Image.open(tmp_path / "birds_pairs.png") as image:
    assert image.format == "PNG" and min(image.size) > 200
  metadata = run.metadata()
  assert (metadata["num_examples"], metadata["train_num_examples"], metadata["threshold"]) == (5, 11, 0.99)


@pytest.mark.parametrize("count", [1, 8, 37])
def test_the_nearest_are_those_of_all_cosines_at_once(count, data):
  rng = np.random.default_rng(count)
  known, train = (rng.integers(-1, 2, (n, 3)) + 1e-3 for n in (29, count))  # few directions: many are equal
  data([{"label": 0}] * 29, [{}] * count)
  run = Nearest(dataclasses.replace(settings(), source=Source("trained")), place(mesh=(2, 1, 4)))
  params = embeddings(known, train)
  known, train = unit(known), unit(train)
  cosine, index = run.nearest(PREDICT["embed_image"], params, {}, known, "x")
  whole = known @ train.T
  np.testing.assert_allclose(cosine, whole.max(axis=1), atol=1e-6)
  np.testing.assert_allclose(np.take_along_axis(whole, index[:, None], 1)[:, 0], whole.max(axis=1), atol=1e-6)
  assert index.dtype == np.int64 and index.max() < count


def test_of_equal_training_images_the_first_is_the_nearest(data):
  data([{"label": 0}], [{}] * 20)
  run = Nearest(dataclasses.replace(settings(), source=Source("trained")), place())
  x, y, _ = np.eye(3)
  train = [y, *[x] * 19]
  _, index = run.nearest(PREDICT["embed_image"], embeddings([x], train), {}, np.float32([x]), "x")
  assert index.tolist() == [1]


def test_what_cannot_be_read_of_the_training_data_is_counted(data, capsys, tmp_path):
  x, y, z = np.eye(3)
  data([{"label": 0}, {"label": 1}], [{}, {"broken": 1}, {}])
  params = embeddings([x, y], [z, x, y])
  run = settings(max_bad_fraction=0.4).open(place(tmp_path))
  found = run(PREDICT, params, {})
  assert (found["overlap_count"], found["top1"]) == (1, 1)  # the twin of image 0 is broken
  assert "train 1: the image is broken" in capsys.readouterr().err
  assert (run.metadata()["train_damaged"], run.metadata()["train_covered"], run.metadata()["damaged"]) == (1, 2, 0)
  with pytest.raises(UserError, match=r"1 of 3 examples cannot be used, more than its `max_bad_fraction` of 1\.0% al"):
    settings().open(place(tmp_path))(PREDICT, params, {})


def test_embeddings_that_are_no_numbers_are_like_nothing(data, tmp_path):
  data([{"label": 0}, {"label": 1}], [{}, {}])
  params = embeddings([[1, 0, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 0]])
  params["image"][100:] = np.nan
  found = settings().open(place(tmp_path))(PREDICT, params, {})
  assert found["share"] == 0 and "p" not in found and "overlap" not in found and found["gain"] == 0
  pairs = [json.loads(line) for line in (tmp_path / "birds_pairs.jsonl").read_text().splitlines()]
  assert [(p["cosine"], p["train_id"], p["train_index"]) for p in pairs] == [(None, None, None)] * 2
  assert not (tmp_path / "birds_pairs.png").exists()


def test_one_embedding_that_is_no_number_hides_no_other(data, tmp_path):
  x, y, z = np.eye(3)
  data([{"label": 0}, {"label": 1}], [{}] * 3)
  params = embeddings([x, y], [x, z, y])
  params["image"][101] = np.nan
  assert settings().open(place(tmp_path))(PREDICT, params, {})["overlap_count"] == 2


def counted(passes):
  """Returns predictions that note the number of images that they were asked for, and when traced."""
  import jax

  def embed(params, stats, images):
    jax.debug.callback(lambda first: passes.append(int(first)), images[0, 0, 0, 0])
    return PREDICT["embed_image"](params, stats, images)

  return {**PREDICT, "embed_image": embed}


def test_a_stopped_pass_resumes_where_it_was(data, tmp_path):
  rng = np.random.default_rng(0)
  data([{"label": i % 3} for i in range(10)], [{"broken": 1} if i == 5 else {} for i in range(50)])
  params = embeddings(rng.normal(size=(10, 3)), rng.normal(size=(50, 3)))
  whole = settings(max_bad_fraction=0.1).open(place(tmp_path / "whole"))
  want = whole(PREDICT, params, {})
  left = [6]  # one batch of texts, two of the evaluation set, three of the training data

  def stop():
    left[0] -= 1
    return left[0] < 0

  with pytest.raises(Stopped):
    run = settings(max_bad_fraction=0.1).open(place(tmp_path, results_dir=tmp_path / "results", stop=stop))
    run(PREDICT, params, {})
  assert json.loads((tmp_path / "results" / "nearest.json").read_text())["done"] == 24
  passes = []
  run = settings(max_bad_fraction=0.1).open(place(tmp_path, results_dir=tmp_path / "results"))
  assert run(counted(passes), params, {}) == want
  assert sorted(passes) == [124, 132, 140, 148]
  assert {**run.metadata(), **whole.metadata()} == run.metadata()
  assert (tmp_path / "birds_pairs.jsonl").read_text() == (tmp_path / "whole" / "birds_pairs.jsonl").read_text()


def test_another_threshold_reads_no_image_again_and_other_data_or_another_model_all(data, tmp_path):
  x, y, z = np.eye(3)
  data([{"label": 0}, {"label": 1}], [{}] * 9)
  params = embeddings([x, y], [x, x + y, *[z] * 7])

  def run(key="a", **fields):
    passes = []
    at = dataclasses.replace(place(tmp_path, results_dir=tmp_path / "results"), key={"weights": key})
    found = settings(**fields).open(at)(counted(passes), params, {})
    return found["overlap_count"], len(passes)

  assert run() == (1, 3)
  assert run(threshold=0.5) == (2, 0)
  assert run(key="b") == (1, 3)
  data([{"label": 0}, {"label": 2}], [{}] * 9)  # the second image is another one now
  params["image"][1] = z
  assert run(key="b") == (2, 3)


def test_a_damaged_state_and_a_record_that_can_be_read_again_begin_the_pass_anew(data, tmp_path, capsys, monkeypatch):
  x, y, z = np.eye(3)
  broken = {1}
  monkeypatch.setattr(Trained, "_broken", broken)
  data([{"label": 0}, {"label": 1}], [{}] * 9)
  params = embeddings([x, y], [z, x, *[z] * 7])

  def run():
    passes = []
    run = settings(max_bad_fraction=0.4).open(place(tmp_path, results_dir=tmp_path / "results"))
    return run(counted(passes), params, {})["overlap_count"], len(passes), capsys.readouterr().err

  assert run()[:2] == (0, 3) and run()[:2] == (0, 0)
  state = tmp_path / "results" / "nearest.json"
  state.write_text(state.read_text().replace('"done": 9', '"done": 8'))
  count, passes, told = run()
  assert (count, passes) == (0, 2) and "its checksum does not fit" in told  # both batches of the training data
  broken.clear()  # as where a disk that is shared was away
  count, passes, told = run()
  assert (count, passes) == (1, 2) and "record 1 of the training data can be read now" in told


def test_the_state_is_saved_now_and_then(data, tmp_path, monkeypatch):
  data([{"label": 0}], [{}] * 50)
  monkeypatch.setattr(contamination, "SAVE", 2)
  saved, save = [], contamination._save
  monkeypatch.setattr(contamination, "_save", lambda path, state: (saved.append(state["done"]), save(path, state)))
  params = embeddings([[1, 0, 0]], np.random.default_rng(0).normal(size=(50, 3)))
  settings().open(place(tmp_path, results_dir=tmp_path / "results"))(PREDICT, params, {})
  assert saved == [16, 32, 48, 50]


def test_figures_of_one_side_only():
  right = np.array([True, False, True, True])
  none, all_ = measure(right, np.zeros(4, bool)), measure(right, np.ones(4, bool))
  assert (none["top1"], none["clean"], none["gain"], none["share"]) == (0.75, 0.75, 0, 0)
  assert (all_["top1"], all_["overlap"], all_["share"]) == (0.75, 0.75, 1)
  assert not {"overlap", "p"} & none.keys() and not {"clean", "gain", "p"} & all_.keys()
  want = stats.binomtest(3, 4).proportion_ci(confidence_level=0.995, method="exact")
  assert (none["top1_low"], none["top1_high"]) == pytest.approx((want.low, want.high))


def test_an_easy_overlap_is_significant_and_equals_scipys_test():
  right = np.concatenate([np.ones(50, bool), np.arange(200) % 2 == 0])
  found = measure(right, np.arange(250) < 50)
  assert found["gain"] == pytest.approx(150 / 250 - 0.5)
  assert found["p"] == pytest.approx(stats.binomtest(50, 50, 0.5, alternative="greater").pvalue)


def test_several_evaluations_are_corrected_for_their_number():
  found = summary({"a": {"share": 0.1, "gain": 0.006, "p": 0.02}, "b": {"share": 0.02, "gain": -0.0005, "p": 0.4},
                   "c": {"share": 0.0, "gain": 0.0}, "d": {"share": 1.0}})
  assert found == {"a": {"p_corrected": pytest.approx(0.08)}, "b": {"p_corrected": 1.0},
                   "": {"evaluations": 4, "median_share": pytest.approx(0.06), "mean_share": pytest.approx(0.28),
                        "moved": 1, "significant": 0}}
  assert summary({"a": {"share": 0.1, "gain": 0.006, "p": 0.02}})[""]["significant"] == 1


def test_the_picture_shows_the_top_and_both_sides_of_the_threshold():
  cosine = np.linspace(1, 0, 101)

  def pairs(threshold):
    return [cosine[part].round(2).tolist() for part in shown(cosine, threshold).values()]

  first, above, below = pairs(0.5)
  assert (first[0], above[-1], below[0]) == (1.0, 0.5, 0.49) and len(first) == len(above) == len(below) == 12
  first, above, below = pairs(0.9)  # only 11 are above
  assert (len(first), above, below[0]) == (11, [], 0.89)
  first, above, below = pairs(0.85)  # 16 are
  assert (first[-1], above[0], len(above)) == (0.89, 0.88, 4)
  assert [len(part) for part in pairs(2)] == [0, 0, 12]


def test_what_does_not_fit_is_one_line(data):
  def refused(match, evaluated=({"label": 0},), trained=({},), **fields):
    data(evaluated, trained)
    with pytest.raises(UserError, match=match):
      settings(**fields).open(place())(PREDICT, embeddings([[1, 0, 0]], [[1, 0, 0]]), {})

  refused("its `train` names no training data", train=None)
  refused("have no labels", evaluated=({},))
  refused("no records", trained=())
  refused("has label 3, wanted 0 to 2", evaluated=({"label": 3},))
  assert NOTHING < -1
