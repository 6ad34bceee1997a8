"""Evaluations, on embeddings made by hand and on a tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from limber_jax import parallel, registry
from limber_jax.config import Compute, Decoding, Evaluation, Source
from limber_jax.data import transforms
from limber_jax.data.sources.digits import CLASSES
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.evals import base, similarity
from limber_jax.evals.base import Context, Runner, Stopped, ranks
from limber_jax.evals.naming import Naming, named
from limber_jax.evals.retrieval import Retrieval, recalls
from limber_jax.evals.similarity import Similarity
from limber_jax.evals.zeroshot import ZeroShot, class_names, classifier, load_templates
from limber_jax.generate import Generated
from limber_jax.models import clip
from limber_jax.tasks.contrastive import Contrastive

NAMES = "abcdefghijklmnop"


class Made:
  """A data source of `records`, set by `made`; the image of record i is 8 × 8 pixels of the value i."""

  records, classes = (), None

  def __init__(self, config):
    del config

  def __len__(self):
    return len(self.records)

  def annotation(self, index):
    return {"id": str(index), "text": "?", **self.records[index]}

  def __getitem__(self, index):
    return {**self.annotation(index), "image": np.full((8, 8, 3), index, np.uint8)}


@pytest.fixture
def made(monkeypatch):
  """Sets the records and classes of the data source "made"."""
  monkeypatch.setitem(registry.SOURCES, "made", f"{__name__}:Made")

  def set_(records, classes=None):
    monkeypatch.setattr(Made, "records", records)
    monkeypatch.setattr(Made, "classes", classes)

  return set_


def config(**fields):
  return Evaluation(**{"source": Source(name="made"), "batch_size": 8, "templates": "{}", **fields})


def context(mesh=(1, 1, 1), image_size=8, length=16, workdir="", stop=lambda: False):
  devices = jax.devices()[: int(np.prod(mesh))]
  return Context(ByteTokenizer(), transforms.evaluation(image_size, ByteTokenizer(), length), length, Decoding(),
                 parallel.make_mesh(dict(zip(parallel.AXES, mesh, strict=True)), devices), str(workdir), stop)


# Looks embeddings up: of image i in row i of params["image"], of a text by its first byte in params["text"].
PREDICT = {
  "embed_image": lambda params, stats, images: params["image"][images[:, 0, 0, 0]],
  "embed_text": lambda params, stats, tokens: params["text"][tokens[:, 1]],
}


def tables(image, text):
  """Returns parameters for PREDICT: [N, E] of the images, [M, E] of the texts "a", "b", …"""
  image, text = np.asarray(image, np.float32), np.asarray(text, np.float32)
  rows = np.zeros((259, text.shape[1]), np.float32)
  rows[ord("a") + 1 : ord("a") + 1 + len(text)] = text
  return {"image": image, "text": rows}


def unit(x):
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


MESHES = [(1, 1, 1), (4, 2, 1), (2, 1, 4)]


@pytest.mark.parametrize("mesh", MESHES)
def test_zeroshot_figures_are_those_counted_by_hand(mesh, made):
  # Classes a: right, b: up, c: left. Images 0, 1 (a) right and up; 2, 3, 4 (c) left, left, up: 3 of 5 are named right,
  # a half of class a and two thirds of class c; b has no image.
  made([{"label": label} for label in (0, 0, 2, 2, 2)], classes=("a", "b", "c"))
  params = tables([[1, 0], [0, 1], [-1, 0], [-1, 0], [0, 1]], [[1, 0], [0, 1], [-1, 0]])
  found = ZeroShot(config(), context(mesh))(PREDICT, params, {})
  assert found == {"top1": 3 / 5, "mean_per_class": pytest.approx((1 / 2 + 2 / 3) / 2), "count": 5}


@pytest.mark.parametrize("count", [1, 8, 37])
def test_zeroshot_equals_scikit_learn(count, made):
  rng = np.random.default_rng(count)
  labels = rng.integers(0, 11, count)
  image, text = unit(rng.normal(size=(count, 6))), unit(rng.normal(size=(11, 6)))
  made([{"label": int(label)} for label in labels], classes=tuple(NAMES[:11]))
  found = ZeroShot(config(), context((4, 2, 1)))(PREDICT, tables(image, text), {})
  scores, all_ = image @ text.T, np.arange(11)
  for k in (1, 5):
    assert found[f"top{k}"] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, scores, k=k, labels=all_))
  assert found["mean_per_class"] == pytest.approx(sklearn.metrics.recall_score(
    labels, scores.argmax(axis=1), labels=np.unique(labels), average="macro"))
  assert found["count"] == count


def test_zeroshot_gives_equal_scores_to_the_first_class(made):
  made([{"label": 0}, {"label": 1}], classes=("a", "b"))
  assert ZeroShot(config(), context())(PREDICT, tables([[1, 0], [1, 0]], [[1, 0], [1, 0]]), {})["top1"] == 1 / 2


def test_a_model_that_gives_no_numbers_is_never_right(made):
  made([{"label": i, "text": NAMES[i]} for i in range(8)], classes=tuple(NAMES[:8]))
  params = tables(np.full((8, 2), np.nan), np.ones((8, 2)))
  found = ZeroShot(config(), context())(PREDICT, params, {}) | Retrieval(config(), context())(PREDICT, params, {})
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
      kind(config(**fields), context(mesh))(PREDICT, tables([[1, 0]], [[1, 0]]), {})

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


@pytest.mark.parametrize("mesh", MESHES)
def test_retrieval_figures_are_those_counted_by_hand(mesh, made):
  # Image 0 has captions a and b, image 1 c, image 2 d and e. Scores, image by caption:
  #        a   b   c   d   e
  #   0    5   9   8   1   0    best is b, its own: found at 1
  #   1    7   3   6   2   1    best is a; its own c comes second: found at 5
  #   2    4   5   3   2   1    its own d comes fourth: found at 5
  # By column, each caption's own image: a second, b first, c second, d first (equal to image 1's, which comes earlier:
  # so second), e first (equal to image 1's: so second).
  scores = np.array([[5, 9, 8, 1, 0], [7, 3, 6, 2, 1], [4, 5, 3, 2, 1]])
  made([{"text": "a", "texts": ("a", "b")}, {"text": "c"}, {"text": "d", "texts": ("d", "e")}])
  found = Retrieval(config(), context(mesh))(PREDICT, tables(scores, np.eye(5)), {})
  assert found == {"i2t_r1": pytest.approx(1 / 3), "t2i_r1": pytest.approx(1 / 5), "images": 3, "captions": 5}


def full_ranks(scores, mine):
  """Returns the place of the first own key in a stable sort of each whole row."""
  order = np.argsort(-scores, axis=1, kind="stable")
  found = np.take_along_axis(mine, order, axis=1)
  return np.where(found.any(axis=1), found.argmax(axis=1), scores.shape[1])


@pytest.mark.parametrize("chunk", [1, 100, 2**24])
def test_ranks_in_chunks_equal_a_stable_sort_of_all_scores(chunk, monkeypatch):
  monkeypatch.setattr(base, "CHUNK", chunk)
  rng = np.random.default_rng(0)
  # Whole numbers, so that sums are exact and many scores are equal.
  queries, keys = (rng.integers(-2, 3, (n, 4)).astype(np.float32) for n in (29, 41))
  own, groups = rng.integers(0, 12, 29), rng.integers(0, 11, 41)
  assert 11 in own  # a query without any key
  np.testing.assert_array_equal(ranks(queries, own, keys, groups),
                                full_ranks(queries @ keys.T, own[:, None] == groups))


def test_retrieval_with_many_captions_equals_the_full_matrix(monkeypatch):
  monkeypatch.setattr(base, "CHUNK", 1000)
  rng = np.random.default_rng(1)
  owner = np.repeat(np.arange(60), rng.integers(1, 6, 60))
  image = unit(rng.normal(size=(60, 16)))
  text = unit(image[owner] + rng.normal(size=(len(owner), 16)))
  found = recalls(image, text, owner)
  scores, mine = image @ text.T, owner == np.arange(60)[:, None]
  for way, rank in {"i2t": full_ranks(scores, mine), "t2i": full_ranks(scores.T, mine.T)}.items():
    for k in (1, 5, 10):
      assert found[f"{way}_r{k}"] == np.mean(rank < k)
  assert 0 < found["t2i_r1"] < found["t2i_r5"] < found["t2i_r10"]


def test_equal_keys_have_equal_scores_whatever_the_rounding():
  rng = np.random.default_rng(2)
  queries = rng.normal(size=(360, 32)).astype(np.float32)
  keys = np.repeat(rng.normal(size=(1, 32)).astype(np.float32), 360, axis=0)
  np.testing.assert_array_equal(ranks(queries, np.arange(360), keys, np.arange(360)), np.arange(360))


def test_captions_of_the_same_words_are_different_captions():
  # Both images have the caption of the same embedding: the first image's stands first, so the second image misses.
  found = recalls(np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32), np.array([0, 1]))
  assert found == {"i2t_r1": 1 / 2, "t2i_r1": 1 / 2, "images": 2, "captions": 2}


def test_a_recall_that_could_not_fail_is_left_out():
  found = recalls(np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32), np.arange(6))
  assert set(found) == {"i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "images", "captions"}


def test_functions_are_jitted_once_and_parameters_are_read_each_time(made):
  made([{"label": i % 2} for i in range(20)], classes=("a", "b"))
  traced = []

  def noting(name):
    def run(*args):
      traced.append(name)
      return PREDICT[name](*args)
    return run

  run = ZeroShot(config(), context((8, 1, 1)))
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
  run = kind(config(), context(workdir=tmp_path, stop=stop))
  with pytest.raises(Stopped):
    run(PREDICT, params, {})
  left = [1000]
  assert run(PREDICT, params, {}) == kind(config(), context(workdir=tmp_path))(PREDICT, params, {})


def test_similarity_draws_one_image_of_each_class(tmp_path, made):
  made([{"label": label} for label in (1, 1, 0, 2)], classes=("a", "b", "c"))
  # Images 2 (a), 0 (b) and 3 (c) are drawn; that of c is nearest to b.
  params = tables([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0.8, 0.6]], np.eye(3))
  run = Similarity(config(), context((4, 2, 1), workdir=tmp_path / "new"))
  assert run(PREDICT, params, {}) == {"own": pytest.approx(2 / 3)}
  with Image.open(tmp_path / "new" / "similarity.png") as image:
    assert image.format == "PNG" and min(image.size) > 200
    assert len(image.convert("L").getcolors()) > 20


def test_similarity_draws_captions_where_there_are_no_labels(tmp_path, made, monkeypatch):
  made([{"text": letter} for letter in NAMES + "qr"])
  drawn, names = {}, ("cosine", "captions", "images")
  monkeypatch.setattr(similarity, "draw", lambda *args: drawn.update(zip(names, args, strict=False)))
  params = tables(np.eye(18), np.eye(18))
  assert Similarity(config(batch_size=6), context(workdir=tmp_path))(PREDICT, params, {}) == {"own": 1}
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
    placed = jax.device_put(params, parallel.shardings(params, clip.SHARDING, where.mesh))
    kinds = {"zeroshot": ZeroShot, "retrieval": Retrieval, "similarity": Similarity}
    found[mesh] = {name: kind(config(source=source, batch_size=64, templates="imagenet7"), where)(predict, placed, {})
                   for name, kind in kinds.items()}
  assert found[1, 1, 1] == found[4, 2, 1]
  assert found[1, 1, 1]["zeroshot"]["count"] == found[1, 1, 1]["retrieval"]["captions"] == 360


def test_embeddings_of_padded_batches_are_those_of_whole_ones(model):
  size, predict, params = model
  where = context((2, 2, 2), size.image.image_size, size.text.context)
  runner = Runner(config(source=Source(name="digits", split="test"), batch_size=128), where)
  batches = list(runner.embed_source(predict["embed_image"], params, {}))
  assert [len(b["index"]) for b in batches] == [128, 128, 104]
  np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), np.arange(360))
  np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches]),
                                [runner.source.annotation(i)["label"] for i in range(360)])
  images = np.stack([runner.transform(runner.source[i], None)["image"] for i in range(360)])
  whole = jax.jit(predict["embed_image"])(params, {}, jnp.asarray(images))
  np.testing.assert_allclose(np.concatenate([b["embedding"] for b in batches]), whole, atol=1e-6)
  np.testing.assert_allclose(runner.embed_rows("rows", predict["embed_image"], params, {}, images[:5]), whole[:5],
                             atol=1e-6)


# Naming

@pytest.mark.parametrize(("caption", "classes"), [
  ("a photo of the digit Seven.", {7}), ("seventy", set()), ("one or two", {1, 2}), ("", set()), ("number\nzero", {0}),
])
def test_a_class_is_named_by_its_whole_name(caption, classes):
  assert named(caption, CLASSES) == classes


def test_captions_are_counted_by_map_and_without_an_image(made, tmp_path):
  made([{"label": label} for label in (0, 1, 2, 1)], classes=("cat", "dog", "bird"))
  texts = np.array([ByteTokenizer()(text, 8)[0][1:] for text in ("a cat", "a dog", "a bird", "a fish")])

  def generate(which, params, stats, batch, eos):
    assert eos == ByteTokenizer.eot and batch["tokens"].shape == batch["mask"].shape == (8, 1)
    tokens = jnp.asarray(texts)[which(batch)]
    return Generated(tokens, (tokens != eos).argmin(-1), tokens[:, 0])

  right = lambda batch: batch["label"]  # noqa: E731
  never = lambda batch: jnp.full_like(batch["label"], 1)  # noqa: E731
  predict = {"nll": None, "generate": functools.partial(generate, right),
             "generate@b": functools.partial(generate, lambda batch: batch["label"] + 1),
             "generate_blind": functools.partial(generate, never)}
  settings = dataclasses.replace(context(workdir=tmp_path), decoding=Decoding(prompt=""))
  found = Naming(config(name="naming"), settings)(predict, {}, {})
  assert found == {"right": 1.0, "right@b": 0.0, "blind": 0.5, "count": 4.0}
  with Image.open(tmp_path / "captions.png") as sheet:
    assert sheet.width > 300
