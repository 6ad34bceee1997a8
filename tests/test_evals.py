"""Evaluations, on embeddings made by hand and on a tiny model."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from limber_jax.config import Compute, Source
from limber_jax.errors import UserError
from limber_jax.evals import similarity
from limber_jax.evals.base import Runner, Stopped
from limber_jax.evals.prompts import class_names, load_templates
from limber_jax.evals.retrieval import Retrieval
from limber_jax.evals.similarity import Similarity
from limber_jax.evals.zeroshot import ZeroShot, classifier
from limber_jax.models import clip
from limber_jax.runtime import parallel
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training.setup import evaluate
from tests.made import PREDICT, Made, config, context, install, tables, unit

NAMES = "abcdefghijklmnop"


@pytest.fixture
def made(monkeypatch):
  """Sets the records and classes of the data source "made"."""
  return install(monkeypatch)


MESHES = [(1, 1, 1), (4, 2, 1), (2, 1, 4)]


@pytest.mark.parametrize("mesh", MESHES)
def test_zeroshot_metrics_are_those_counted_by_hand(mesh, made):
  # Classes a: right, b: up, c: left. Images 0, 1 (a) right and up; 2, 3, 4 (c) left, left, up: 3 of 5 are named right,
  # a half of class a and two thirds of class c; b has no image.
  made([{"label": label} for label in (0, 0, 2, 2, 2)], classes=("a", "b", "c"))
  params = tables([[1, 0], [0, 1], [-1, 0], [-1, 0], [0, 1]], [[1, 0], [0, 1], [-1, 0]])
  found = config(ZeroShot).open(context(mesh))(PREDICT, params, {})
  assert found == {"top1": 3 / 5, "mean_per_class": pytest.approx((1 / 2 + 2 / 3) / 2), "count": 5}


@pytest.mark.parametrize("count", [1, 8, 37])
def test_zeroshot_equals_scikit_learn(count, made):
  rng = np.random.default_rng(count)
  labels = rng.integers(0, 11, count)
  image, text = unit(rng.normal(size=(count, 6))), unit(rng.normal(size=(11, 6)))
  made([{"label": int(label)} for label in labels], classes=tuple(NAMES[:11]))
  found = config(ZeroShot).open(context((4, 2, 1)))(PREDICT, tables(image, text), {})
  scores, all_ = image @ text.T, np.arange(11)
  for k in (1, 5):
    assert found[f"top{k}"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=all_))
  assert found["mean_per_class"] == pytest.approx(sklearn.metrics.recall_score(
    labels, scores.argmax(axis=1), labels=np.unique(labels), average="macro"))
  assert found["count"] == count


def test_zeroshot_gives_equal_scores_to_the_first_class(made):
  made([{"label": 0}, {"label": 1}], classes=("a", "b"))
  assert config(ZeroShot).open(context())(PREDICT, tables([[1, 0], [1, 0]], [[1, 0], [1, 0]]), {})["top1"] == 1 / 2


def test_a_model_that_gives_no_numbers_is_never_right(made):
  made([{"label": i, "text": NAMES[i]} for i in range(8)], classes=tuple(NAMES[:8]))
  params = tables(np.full((8, 2), np.nan), np.ones((8, 2)))
  found = config(ZeroShot).open(context())(PREDICT, params, {}) | config(Retrieval).open(context())(PREDICT, params, {})
  assert {k for k, v in found.items() if v} == {"count", "images", "captions"}


def test_classifier_equals_open_clip(open_clip):
  import torch

  rng = np.random.default_rng(0)
  table = rng.normal(size=(64, 5)).astype(np.float32)
  seen = {}

  def tokenize(texts, length=1):
    return np.array([[seen.setdefault(text, len(seen))] for text in texts], np.int32)

  class Model:
    def encode_text(self, tokens, normalize):
      assert normalize
      return torch.from_numpy(unit(table[np.asarray(tokens)[:, 0]]))

  classes, templates = ["cat", "dog", "{}", "ice cream"], ["a {}.", "many {}", "the {} of {}"]
  ours = classifier(lambda tokens: unit(table[tokens[:, 0]]), tokenize, classes, templates, 1)
  theirs = open_clip.build_zero_shot_classifier(
    Model(), lambda texts: torch.from_numpy(tokenize(texts)), classes,
    [lambda c, t=t: t.replace("{}", c) for t in templates], num_classes_per_batch=3)
  np.testing.assert_allclose(ours, theirs.numpy().T, atol=1e-6)


def test_templates_and_class_names_are_the_published_ones(open_clip):
  assert load_templates("imagenet80") == [t("{}") for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
  assert load_templates("imagenet7") == [t("{}") for t in open_clip.SIMPLE_IMAGENET_TEMPLATES]
  assert class_names(config(classes="imagenet"), Made(None)) == list(open_clip.IMAGENET_CLASSNAMES)


def test_templates_and_classes_are_read_from_files(tmp_path, made):
  (tmp_path / "templates.txt").write_text("a {}\n\n  the {} \n")
  (tmp_path / "classes.txt").write_text("snow leopard\nкошка\n", encoding="utf-8")
  assert load_templates(str(tmp_path / "templates.txt")) == ["a {}", "the {}"]
  assert load_templates("one {} only") == ["one {} only"]
  assert class_names(config(classes=str(tmp_path / "classes.txt")), Made(None)) == ["snow leopard", "кошка"]


def test_what_does_not_fit_is_one_line(tmp_path, made):
  bad, empty, two = tmp_path / "bad.txt", tmp_path / "empty.txt", tmp_path / "two.txt"
  bad.write_text("a {}\na cat\n")
  empty.write_text("\n")
  two.write_text("a\nb\n")

  def refused(match, fields, records=({"label": 0},), classes=("a",), kind=ZeroShot, mesh=(1, 1, 1)):
    made(records, classes)
    with pytest.raises(UserError, match=match):
      config(kind, **fields).open(context(mesh))(PREDICT, tables([[1, 0]], [[1, 0]]), {})

  refused("did you mean 'imagenet80'", {"templates": "imagnet80"})
  refused("has the line 'a cat', without {}", {"templates": str(bad)})
  refused("is empty", {"templates": str(empty)})
  refused("cannot read", {"classes": str(tmp_path / "none.txt")})
  refused("has 2 names, data source 'made' 1 classes", {"classes": str(two)})
  refused("names no classes", {}, classes=None)
  refused("have no labels", {}, records=({},))
  refused("have no labels", {"classes": str(two)}, records=({},), classes=None)
  refused("no records", {}, records=())
  for kind in (ZeroShot, Similarity):
    refused("record 0 has label 3, wanted 0 to 0", {}, records=({"label": 3},), kind=kind)
    refused("record 0 has label -1", {}, records=({"label": -1},), kind=kind)
  refused("does not divide over 8 devices", {"batch_size": 12}, mesh=(8, 1, 1))


def test_functions_are_jitted_once_and_parameters_are_read_each_time(made):
  made([{"label": i % 2} for i in range(20)], classes=("a", "b"))
  traced = []

  def noting(name):
    def run(*args):
      traced.append(name)
      return PREDICT[name](*args)
    return run

  run = config(ZeroShot).open(context((8, 1, 1)))
  image, text = np.eye(2)[np.arange(20) % 2], np.eye(2)
  found = [run({name: noting(name) for name in PREDICT}, tables(x, text), {})["top1"] for x in (image, image[::-1])]
  assert found == [1, 0] and sorted(traced) == ["embed_image", "embed_text"]


@pytest.mark.parametrize("kind", [ZeroShot, Retrieval, Similarity])
def test_a_signal_stops_between_batches_and_the_next_call_is_whole(kind, made, tmp_path):
  made([{"label": i % 2, "text": "ab"[i % 2]} for i in range(20)], classes=("a", "b"))
  left = [2]

  def stop():
    left[0] -= 1
    return left[0] < 0

  params = tables(np.eye(2)[np.arange(20) % 2], np.eye(2))
  left = [1]
  run = config(kind).open(context(workdir=tmp_path, stop=stop))
  with pytest.raises(Stopped):
    run(PREDICT, params, {})
  left = [1000]
  assert run(PREDICT, params, {}) == config(kind).open(context(workdir=tmp_path))(PREDICT, params, {})


def test_similarity_draws_one_image_of_each_class(tmp_path, made):
  made([{"label": label} for label in (1, 1, 0, 2)], classes=("a", "b", "c"))
  # Images 2 (a), 0 (b) and 3 (c) are drawn; that of c is nearest to b.
  params = tables([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0.8, 0.6]], np.eye(3))
  run = config(Similarity).open(context((4, 2, 1), workdir=tmp_path / "new"))
  assert run(PREDICT, params, {}) == {"own": pytest.approx(2 / 3)}
  with Image.open(tmp_path / "new" / "similarity.png") as image:
    assert image.format == "PNG" and min(image.size) > 200
    assert len(image.convert("L").getcolors()) > 20


def test_similarity_draws_captions_where_there_are_no_labels(tmp_path, made, monkeypatch):
  made([{"text": letter} for letter in NAMES + "qr"])
  drawn, names = {}, ("cosine", "captions", "images")
  monkeypatch.setattr(similarity, "draw", lambda *args: drawn.update(zip(names, args, strict=False)))
  params = tables(np.eye(18), np.eye(18))
  assert config(Similarity, batch_size=6).open(context(workdir=tmp_path))(PREDICT, params, {}) == {"own": 1}
  assert drawn["captions"] == list(NAMES)
  np.testing.assert_array_equal(drawn["cosine"], np.eye(16))
  np.testing.assert_array_equal(drawn["images"][:, 0, 0, 0], np.arange(16))


@pytest.mark.parametrize("cosine", [np.eye(2), np.zeros((2, 2)), np.full((2, 2), np.nan)])
def test_any_caption_and_any_number_can_be_drawn(cosine, tmp_path):
  captions = ["$5 and $\\frac{", "日本語 \n\t" + "a very long caption " * 20]
  similarity.draw(cosine, captions, np.zeros((2, 8, 8, 3), np.uint8), "100 % of $x$", str(tmp_path / "x.png"))
  assert [f.name for f in tmp_path.iterdir()] == ["x.png"]


@pytest.fixture(scope="module")
def model():
  """A tiny CLIP: its size, its functions and its parameters, large so that its embeddings lie far apart."""
  size = clip.SIZES["clip_vit_b32_mu"]()
  task = Contrastive(clip.build(size, Compute(dtype="float32")), "softmax", 0, 1, ())
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype),
                        jax.eval_shape(task.init, jax.random.key(0))[0])
  return size, task.predict(), params


def test_a_tiny_model_is_measured_the_same_on_8_devices_as_on_1(model, tmp_path):
  size, predict, params = model
  source = Source(name="digits", split="test")  # 360 images, which 64 does not divide
  found = {}
  for mesh in ((1, 1, 1), (4, 2, 1)):
    where = context(mesh, size.image.image_size, size.text.context, tmp_path)
    placed = jax.device_put(params, parallel.shardings(params, clip.sharding(size), where.mesh))
    evals = (ZeroShot(source, batch_size=64), Retrieval(source, batch_size=64), Similarity(source, batch_size=64))
    found[mesh] = {e.name: e.open(where)(predict, placed, {}) for e in evals}
  assert found[1, 1, 1] == found[4, 2, 1]
  assert found[1, 1, 1]["zeroshot"]["count"] == found[1, 1, 1]["retrieval"]["captions"] == 360


def test_embeddings_of_padded_batches_are_those_of_whole_ones(model):
  size, predict, params = model
  where = context((2, 2, 2), size.image.image_size, size.text.context)
  runner = Runner(config(source=Source(name="digits", split="test"), batch_size=128), where)

  def look(params, stats, batch):
    return {"embedding": predict["embed_image"](params, stats, batch["image"]), "label": batch["label"]}

  found = runner.collect("image", look, params, {}, record=lambda row: {"label": int(row["label"])},
                         keep=("embedding",))
  assert found.index.tolist() == list(range(360))
  assert [r["label"] for r in found.records] == [runner.source.annotation(i)["label"] for i in range(360)]
  images = np.stack([runner.transform(runner.source[i], None)["image"] for i in range(360)])
  whole = jax.jit(predict["embed_image"])(params, {}, jnp.asarray(images))
  np.testing.assert_allclose(found.arrays["embedding"], whole, atol=1e-6)
  np.testing.assert_allclose(runner.embed_rows("rows", predict["embed_image"], params, {}, images[:5]), whole[:5],
                             atol=1e-6)


def test_numbers_of_numpy_are_metrics_too():
  """JSON, which results are written as, has none of them."""
  of_task = SimpleNamespace(task=SimpleNamespace(predict=dict), frozen=SimpleNamespace(params={}, stats={}),
                            config=SimpleNamespace(evals={"own": ZeroShot()}))
  metrics = evaluate(of_task, {"own": lambda *_: {"a": np.float32(0.5), "b": np.int64(3), "c": 1}}, {}, {})
  assert json.loads(json.dumps(metrics)) == {"own/a": 0.5, "own/b": 3.0, "own/c": 1.0}
