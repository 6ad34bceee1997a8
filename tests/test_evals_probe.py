"""Linear probes: on made features against scikit-learn, few-shot and zero-shot beside them, and bad settings."""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from limber_jax import registry
from limber_jax.config import Compute, Source, Unnamed
from limber_jax.errors import UserError
from limber_jax.evals import linear_probe
from limber_jax.evals.linear_probe import LinearProbe, draw_shots, figure
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.metrics.logistic import fit
from limber_jax.metrics.probe import held_out
from limber_jax.models import clip
from limber_jax.tasks.contrastive import Contrastive
from tests.made import config, context, install

NAMES = ("a", "b", "c", "d")
SPLITS = ("train", "validation", "test")
SIZES = (200, 60, 100)


@dataclasses.dataclass
class SplitConfig(Source):
  """Of the data source "split"."""

  name: str = "split"
  split: str = Unnamed("train")

  def open(self):
    return Split(self)


class Split:
  """A data source of labels of 4 classes in three splits; an image says which record of which split it is."""

  classes = NAMES

  def __init__(self, config):
    self._split = SPLITS.index(config.split)

  def __len__(self):
    return SIZES[self._split]

  def annotation(self, index):
    return {"id": str(index), "text": "?", "label": int(DATA[1][self._split][index])}

  def __getitem__(self, index):
    return {**self.annotation(index), "image": np.full((8, 8, 3), (index, self._split, 0), np.uint8)}

  def fingerprint(self):
    return f"{self._split:016}"


def _made():
  """Returns (features float32 [3, 200, 30], labels int [3, 200], centres [4, 30])."""
  rng = np.random.default_rng(0)
  labels = rng.permuted(np.tile(np.arange(200) % 4, (3, 1)), axis=1)
  centres = rng.normal(size=(4, 30)) * 0.4
  # Noise of several sizes: with the strongest regularisation the loudest features have the most to say.
  noise = rng.normal(size=(3, 200, 30)) * np.geomspace(0.5, 4, 30)
  return (centres[labels] + noise).astype(np.float32), labels, centres


DATA = _made()


def features(params, stats, images):
  return jnp.asarray(DATA[0])[images[:, 0, 0, 1], images[:, 0, 0, 0]]


def texts(params, stats, tokens):  # by the first byte, which is the class's name
  return jnp.asarray(DATA[2] / np.linalg.norm(DATA[2], axis=1, keepdims=True), jnp.float32)[tokens[:, 1] - ord("a") - 1]


PREDICT = {"penultimate": features, "embed_image": features, "embed_text": texts}


def part(split):
  """Returns (features [n, 30], labels [n]) of a split."""
  i = SPLITS.index(split)
  return DATA[0][i, : SIZES[i]], DATA[1][i, : SIZES[i]]


@pytest.fixture(autouse=True)
def source(monkeypatch):
  monkeypatch.setitem(registry.SOURCES, "split", f"{__name__}:SplitConfig")


def split(name):
  return Source(name="split", split=name)


def probe(workdir, predict=None, mesh=(1, 1, 1), **fields):
  """Returns (metrics, metadata) of a probe."""
  evaluation = config(LinearProbe, **{"source": split("test"), "train": split("train"), **fields}).open(
    context(mesh, workdir=workdir))
  return evaluation(predict or PREDICT, {}, {}), evaluation.metadata()


def theirs(x, y, l2):
  """Returns the predict of scikit-learn at its optimum."""
  with threadpool_limits(1):
    model = LogisticRegression(C=1 / l2, solver="newton-cg", tol=1e-8, max_iter=1000)
    return model.fit(x.astype(float), y).predict


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 2, 1)])
def test_probe_is_scikit_learns_at_the_l2_that_validation_chose(mesh, tmp_path):
  metrics, metadata = probe(tmp_path, {"penultimate": features}, mesh)
  (x, y), (seen, labels) = part("train"), part("test")
  held = held_out(y, 0)
  assert (metrics["count"], metrics["train"], metrics["validation"]) == (100, 160, 40)
  np.testing.assert_allclose(metadata["searched"][:7], np.logspace(-6, 6, 7))
  # Among the λ of the search that scikit-learn finds the optimum of.
  strong = [s for s in metadata["searched"] if s > 1e-2]
  right = [np.mean(theirs(x[~held], y[~held], s)(x[held]) == y[held]) for s in strong]
  chosen = max(zip(right, strong, strict=True))[1]
  assert metrics["l2"] == chosen and 1e-2 < chosen < 1e6
  assert metrics["accuracy"] == np.mean(theirs(x, y, chosen)(seen) == labels) > 0.7
  assert "zeroshot" not in metrics and not list(tmp_path.iterdir())  # the model has no texts; nothing to draw


def test_a_validation_set_is_chosen_on_and_then_learnt_from(tmp_path):
  metrics, metadata = probe(tmp_path, validation=split("validation"))
  x, y = (np.concatenate(parts) for parts in zip(part("train"), part("validation"), strict=True))
  seen, labels = part("test")
  assert metrics["accuracy"] == np.mean(theirs(x, y, metrics["l2"])(seen) == labels)
  assert (metrics["train"], metrics["validation"], metadata["validation"]["num_examples"]) == (200, 60, 60)


def test_few_shot_is_the_mean_over_draws_and_zero_shot_stands_beside(tmp_path):
  metrics, metadata = probe(tmp_path, shots=(0, 1, 8), seeds=(3, 5))
  zeroshot = config(ZeroShot, source=split("test")).open(context())(PREDICT, {}, {})
  assert metrics["zeroshot"] == zeroshot["top1"] > 0.5
  (x, y), (seen, labels) = part("train"), part("test")
  held = held_out(y, 3)
  x, y = x[~held], y[~held]
  for shots in (1, 8):
    found = metadata["shots"][str(shots)]
    for seed, l2, share in zip((3, 5), found["l2"], found["each"], strict=True):
      rows = draw_shots(y, shots, seed, "")
      alone = fit(x[rows], y[rows], 4, [l2])
      assert share == pytest.approx(np.mean((seen @ alone.weights[0] + alone.bias).argmax(1) == labels), abs=0.011)
    assert metrics[f"few_shot_{shots}"] == pytest.approx(np.mean(found["each"]))
    assert found["deviation"] == pytest.approx(np.std(found["each"]))
  assert 0.25 < metrics["few_shot_1"] < metrics["few_shot_8"] < metrics["accuracy"]
  with Image.open(tmp_path / "linear_probe.png") as picture:
    assert np.asarray(picture.convert("L")).std() > 10


def test_the_picture_has_a_place_for_each_number_of_shots(monkeypatch, tmp_path):
  figures = []

  class Kept(matplotlib.figure.Figure):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      figures.append(self)

  monkeypatch.setattr(matplotlib.figure, "Figure", Kept)
  linear_probe.draw({16: 0.7, 1: 0.3, 4: 0.5}, {1: 0.1, 4: 0.0, 16: 0.0}, 0.5, 0.8, "accuracy", str(tmp_path / "a.png"))
  linear_probe.draw({2: 0.7}, {2: 0.0}, None, 0.8, "accuracy", str(tmp_path / "b.png"))
  (with_zero,), (without,) = (f.axes for f in figures)
  assert [t.get_text() for t in with_zero.get_xticklabels()] == ["0", "1", "4", "16"]
  assert [t.get_text() for t in without.get_xticklabels()] == ["2"]
  bars = with_zero.containers[0].lines[0]
  assert (bars.get_xdata().tolist(), bars.get_ydata().tolist()) == ([1, 2, 3], [30, 50, 70])


def test_more_shots_add_to_fewer():
  labels = np.random.default_rng(0).permutation(np.repeat([1, 3], 20))
  one, four = (draw_shots(labels, k, 7, "") for k in (1, 4))
  assert set(one) < set(four) and np.bincount(labels[four]).tolist() == [0, 4, 0, 4]
  assert set(draw_shots(labels, 4, 8, "")) != set(four)


def test_figures_are_scikit_learns():
  rng = np.random.default_rng(0)
  labels, scores = rng.integers(0, 8, 60), rng.normal(size=(60, 8))
  best, everything = scores.argmax(axis=1), np.arange(8)
  assert figure("accuracy", scores, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, best))
  assert figure("mean_per_class", scores, labels) == pytest.approx(
    sklearn.metrics.recall_score(labels, best, labels=np.unique(labels), average="macro"))
  five = sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=everything)
  assert figure("mean_top1_top5", scores, labels) == pytest.approx((np.mean(best == labels) + five) / 2)
  two = labels % 2
  assert figure("roc_auc", scores[:, :2], two) == pytest.approx(
    sklearn.metrics.roc_auc_score(two, scores[:, 1] - scores[:, 0]))
  assert figure("accuracy", np.zeros((2, 2)), np.array([0, 1])) == 0.5  # equal scores go to the first class


def test_metrics_are_what_was_asked_for(tmp_path):
  metrics, _ = probe(tmp_path, metrics=("mean_per_class", "accuracy"), shots=(1,))
  assert list(metrics) == ["mean_per_class", "accuracy", "few_shot_1", "l2", "count", "train", "validation"]


@pytest.mark.parametrize(("fields", "message"), [
  ({"train": None}, "no `train`, the data that the probe learns from"),
  ({"metrics": ("acuracy",)}, "no figure 'acuracy' of 4 classes; did you mean 'accuracy'"),
  ({"metrics": ("roc_auc",)}, "no figure 'roc_auc' of 4 classes"),
  ({"shots": (-1,)}, r"shots=\(-1,\)"),
  ({"shots": (1000,)}, "shots=1000, but class 0 has 40 images to learn from"),
], ids=lambda v: v if isinstance(v, str) else "")
def test_settings_that_cannot_be_are_refused(fields, message, tmp_path):
  with pytest.raises(UserError, match=message):
    probe(tmp_path, **fields)


def test_other_classes_to_learn_from_are_refused(monkeypatch, tmp_path):
  install(monkeypatch)([{"label": 0}, {"label": 1}], classes=("a", "be", "c", "d"))
  with pytest.raises(UserError, match="train: its class 1 is 'be', that of the test set 'b'"):
    probe(tmp_path, train=Source(name="made"))


def test_data_without_labels_are_refused(monkeypatch, tmp_path):
  install(monkeypatch)([{"text": "a"}])
  with pytest.raises(UserError, match="train: its records have no label"):
    probe(tmp_path, train=Source(name="made"))


def test_features_that_are_no_numbers_are_named(tmp_path):
  def broken(params, stats, images):
    return jnp.where((images[:, :1, 0, 1] == 0) & (images[:, :1, 0, 0] == 7), jnp.nan, features(params, stats, images))

  with pytest.raises(UserError, match="train: the features of record 7 are no numbers"):
    probe(tmp_path, {"penultimate": broken})


@pytest.mark.parametrize("size", ["clip_vit_b32_mu", pytest.param("clip_rn50_mu", marks=pytest.mark.long)])
def test_penultimate_features_are_what_the_projection_gets(size):
  model = clip.SIZES[size]()
  task = Contrastive(clip.build(model, Compute(dtype="float32")), "softmax", 0, 1, ())
  params, stats = jax.jit(task.init)(jax.random.key(0))
  side = model.image.image_size
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
  predict = {name: jax.jit(task.predict()[name]) for name in ("penultimate", "embed_image")}
  before = predict["penultimate"](params, stats, images)
  if model.image.kind == "vit":
    assert before.shape == (2, model.image.width)
    after = before @ params["image"]["head"]["kernel"]
    np.testing.assert_allclose(before.mean(axis=1), np.zeros(2), atol=1e-5)  # of a LayerNorm, its gains still 1
  else:
    assert before.shape == (2, 32 * model.image.width)
    after = before @ params["image"]["pool"]["out"]["kernel"] + params["image"]["pool"]["out"]["bias"][None]
  unit = after / np.linalg.norm(after, axis=1, keepdims=True)
  np.testing.assert_allclose(unit, predict["embed_image"](params, stats, images), atol=1e-5)


@dataclasses.dataclass
class SeveralConfig(SplitConfig):
  """Of the data source "several"."""

  name: str = "several"

  def open(self):
    return Several(self)


class Several(Split):
  """The same images with several classes each, those of TRUTH."""

  def annotation(self, index):
    row = TRUTH[self._split][index]
    return {"id": str(index), "text": "?", "labels": tuple(np.flatnonzero(row > 0).tolist()),
            "difficult": tuple(np.flatnonzero(row == 0).tolist())}


def _truth():
  """Returns int [3, 200, 4]: a class is there where the features lean its way, difficult where it is close."""
  lean = DATA[0] @ DATA[2].T + np.random.default_rng(1).normal(size=(3, 200, 4)) - 1.5
  return np.where(np.abs(lean) < 0.15, 0, np.where(lean > 0, 1, -1))


TRUTH = _truth()


def eleven_points(scores, truth):
  """The average precision as one would do it by hand: down the list, the best precision at each recall or beyond."""
  order = [i for i in np.argsort(-scores) if truth[i] != 0]
  points, found = [], 0
  for seen, i in enumerate(order, 1):
    found += truth[i] > 0
    points.append((found, found / seen))
  return sum(max((p for n, p in points if 10 * n >= level * found), default=0) for level in range(11)) / 11


def test_of_several_classes_an_image_each_is_told_from_the_rest(tmp_path, monkeypatch):
  monkeypatch.setitem(registry.SOURCES, "several", f"{__name__}:SeveralConfig")
  test, train, validation = (Source(name="several", split=s) for s in ("test", "train", "validation"))
  evaluation = config(LinearProbe, source=test, train=train, validation=validation).open(context(workdir=tmp_path))
  metrics = evaluation(PREDICT, {}, {})
  assert evaluation.metadata()["metrics"] == ["map11"] and 1e-6 <= metrics["l2"] <= 1e6
  x, y = (np.concatenate([v[0], v[1][:60]]) for v in (DATA[0], TRUTH))
  each = []
  for c in range(4):
    learnt = y[:, c] != 0
    with threadpool_limits(1):
      model = LogisticRegression(C=1 / metrics["l2"], solver="newton-cg", tol=1e-8, max_iter=1000)
      model.fit(x[learnt].astype(float), y[learnt, c] > 0)
    each.append(eleven_points(model.decision_function(DATA[0][2, :100]), TRUTH[2, :100, c]))
  assert metrics["map11"] == pytest.approx(np.mean(each), abs=1e-9) and 0.5 < metrics["map11"] < 1
  assert (TRUTH == 0).any() and metrics["zeroshot"] > 0 and not list(tmp_path.iterdir())
  for changes, message in (({"shots": (1,)}, r"several classes each; wanted their names, and shots=\(0,\), got"),
                           ({"metrics": ("accuracy",)}, "no figure 'accuracy' of 4 classes"),
                           ({"train": split("train")}, "its images have one class each, those of the test set not")):
    with pytest.raises(UserError, match=message):
      config(LinearProbe, **({"source": test, "train": train} | changes)).open(context(workdir=tmp_path))
