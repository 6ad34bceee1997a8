"""Retrieval: ranks and recalls against the whole matrix, on embeddings made by hand, and on files of captions."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from limber_jax.config import Source
from limber_jax.errors import UserError
from limber_jax.evals import base
from limber_jax.evals.base import Stopped, ranks
from limber_jax.evals.grouped import by_image
from limber_jax.evals.retrieval import Retrieval, recalls
from tests import layouts, standins
from tests.made import PREDICT, config, context, install, tables, unit

MESHES = [(1, 1, 1), (4, 2, 1), (2, 1, 4)]


@pytest.fixture
def made(monkeypatch):
  """Sets the records of the data source "made"."""
  return install(monkeypatch)


@pytest.mark.parametrize("mesh", MESHES)
def test_retrieval_metrics_are_those_counted_by_hand(mesh, made):
  # Image 0 has captions a and b, image 1 c, image 2 d and e. Scores, image by caption:
  #        a   b   c   d   e
  #   0    5   9   8   1   0    best is b, its own: found at 1
  #   1    7   3   6   2   1    best is a; its own c comes second: found at 5
  #   2    4   5   3   2   1    its own d comes fourth: found at 5
  # By column, each caption's own image: a second, b first, c second, d first (equal to image 1's, which comes earlier:
  # so second), e first (equal to image 1's: so second).
  scores = np.array([[5, 9, 8, 1, 0], [7, 3, 6, 2, 1], [4, 5, 3, 2, 1]])
  made([{"text": "a", "texts": ("a", "b")}, {"text": "c"}, {"text": "d", "texts": ("d", "e")}])
  found = config(Retrieval).open(context(mesh))(PREDICT, tables(scores, np.eye(5)), {})
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


def test_equal_keys_have_equal_scores_whatever_the_rounding():
  rng = np.random.default_rng(2)
  queries = rng.normal(size=(360, 32)).astype(np.float32)
  keys = np.repeat(rng.normal(size=(1, 32)).astype(np.float32), 360, axis=0)
  np.testing.assert_array_equal(ranks(queries, np.arange(360), keys, np.arange(360)), np.arange(360))


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


def test_captions_of_the_same_words_are_different_captions():
  # Both images have the caption of the same embedding: the first image's stands first, so the second image misses.
  found = recalls(np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32), np.array([0, 1]))
  assert found == {"i2t_r1": 1 / 2, "t2i_r1": 1 / 2, "images": 2, "captions": 2}


def test_a_recall_that_could_not_fail_is_left_out():
  found = recalls(np.eye(6, dtype=np.float32), np.eye(6, dtype=np.float32), np.arange(6))
  assert set(found) == {"i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "images", "captions"}


@pytest.mark.parametrize("chunk", [1, 50, 2**24])
@pytest.mark.parametrize("seed", range(5))
def test_recalls_in_chunks_equal_the_full_matrix_with_ties(chunk, seed, monkeypatch):
  monkeypatch.setattr(base, "CHUNK", chunk)
  rng = np.random.default_rng(seed)
  owner = np.sort(rng.integers(0, 30, 90))  # some images have no caption
  image, text = (rng.integers(-1, 2, (n, 3)).astype(np.float32) for n in (30, 90))  # 27 vectors: most scores are tied
  found = recalls(image, text, owner)
  scores, mine = image @ text.T, owner == np.arange(30)[:, None]
  assert len(np.unique(scores)) < 10
  for way, rank in {"i2t": full_ranks(scores, mine), "t2i": full_ranks(scores.T, mine.T)}.items():
    for k in (1, 5, 10):
      assert found[f"{way}_r{k}"] == np.mean(rank < k)


def test_an_image_that_cannot_be_read_takes_its_captions_with_it(made, tmp_path):
  # The images of the test above at 0, 2 and 5, with their embeddings; what is broken would be the best of everything.
  scores = np.full((6, 8), 99.0)
  scores[[0, 2, 5], :5] = [[5, 9, 8, 1, 0], [7, 3, 6, 2, 1], [4, 5, 3, 2, 1]]
  whole = [{"text": "a", "texts": ("a", "b")}, {"text": "c"}, {"text": "d", "texts": ("d", "e")}]
  made([whole[0], {"text": "f", "texts": ("f", "g"), "broken": True}, whole[1], {"lost": True},
        {"text": "h", "broken": True}, whole[2]])
  run = config(Retrieval, max_bad_fraction=0.5).open(dataclasses.replace(context(), results_dir=str(tmp_path)))
  found = run(PREDICT, tables(scores, np.eye(8)), {})
  assert found == {"i2t_r1": pytest.approx(1 / 3), "t2i_r1": pytest.approx(1 / 5), "images": 3, "captions": 5}
  metadata = run.metadata()
  assert [metadata[k] for k in ("num_examples", "covered", "damaged", "prompt")] == [6, 3, 3, "{}"]
  with pytest.raises(UserError, match="of 6 examples cannot be used"):
    config(Retrieval, max_bad_fraction=0.4).open(context())(PREDICT, tables(scores, np.eye(8)), {})
  made([{"text": "a", "broken": True}])
  with pytest.raises(UserError, match=r"cannot be read|none of the images"):
    config(Retrieval, max_bad_fraction=1.0).open(context())(PREDICT, tables(scores, np.eye(8)), {})
  made([{"lost": True}])
  with pytest.raises(UserError, match="has no captions"):
    config(Retrieval, max_bad_fraction=1.0).open(context())


def test_captions_stand_in_the_prompt(made):
  made([{"text": letter, "texts": (letter, "{}" + letter)} for letter in "ab"])
  seen = []

  def embed_text(params, stats, tokens):
    jax.debug.callback(lambda t: seen.extend(bytes(int(i) - 1 for i in row[1:] if 0 < i < 257) for row in t), tokens)
    return jnp.ones((len(tokens), 2))

  run = config(Retrieval, prompt="see {}.").open(context())
  run({**PREDICT, "embed_text": embed_text}, tables(np.eye(2), np.eye(2)), {})
  jax.effects_barrier()
  assert set(seen) == {b"see a.", b"see {}a.", b"see b.", b"see {}b."}
  assert run.metadata()["prompt"] == "see {}."


def test_a_prompt_that_is_no_sentence_for_a_caption_is_refused(made):
  made([{"text": "a"}])
  for bad in ("imagenet80", "a photo of", "{} and {}"):
    with pytest.raises(UserError, match=r"retrieval wants one sentence with one \{\}"):
      config(Retrieval, prompt=bad).open(context())


def test_what_was_embedded_before_a_kill_is_not_embedded_again(made, tmp_path):
  made([{"text": "abcdefgh"[i % 8]} for i in range(40)])
  rng = np.random.default_rng(0)
  params = tables(rng.normal(size=(40, 4)), rng.normal(size=(8, 4)))
  whole = config(Retrieval).open(context())(PREDICT, params, {})
  left = [3]

  def stop():
    left[0] -= 1
    return left[0] < 0

  first = config(Retrieval).open(dataclasses.replace(context(stop=stop), results_dir=str(tmp_path / "x")))
  with pytest.raises(Stopped):
    first(PREDICT, params, {})
  wrong = {**params, "image": np.where(np.arange(40)[:, None] < 24, 0, params["image"])}  # read only where not embedded
  again = config(Retrieval).open(dataclasses.replace(context(), results_dir=str(tmp_path / "x")))
  assert again(PREDICT, wrong, {}) == whole
  assert len(whole) == 8


def _by_pixels(params, stats, images):
  return images.reshape(len(images), -1).astype(jnp.float32) @ params["image"]


def _by_bytes(params, stats, tokens):
  return jax.nn.one_hot(tokens, 259).mean(axis=1) @ params["text"]


@pytest.mark.parametrize(("write", "split"), [
  (standins.write_coco, ""), (standins.write_nocaps, ""), (standins.write_karpathy, "test"),
  (lambda folder, **fields: standins.write_karpathy(folder, "flickr30k", **fields), "test")],
  ids=["coco", "nocaps", "karpathy", "flickr30k"])
def test_files_of_captions_with_damage_give_the_metrics_of_those_without(write, split, tmp_path):
  rng = np.random.default_rng(0)
  params = {"image": rng.normal(size=(16 * 16 * 3, 8)).astype(np.float32),
            "text": rng.normal(size=(259, 8)).astype(np.float32)}
  predict = {"embed_image": _by_pixels, "embed_text": _by_bytes}
  found, metadata = [], []
  for hostile in (False, True):
    written = write(tmp_path / str(hostile), hostile=hostile)
    source = Source(name="coco", path=written.path, images=written.images, split=split)
    run = config(Retrieval, source=source, prompt="a photo of {}", max_bad_fraction=0.5 * hostile).open(
      context(image_size=16, length=40))
    found.append(run(predict, params, {}))
    metadata.append(run.metadata())
  assert found[0] == found[1] and 0 < found[0]["i2t_r10"] < 1
  assert metadata[0]["covered"] == metadata[0]["num_examples"] == metadata[1]["covered"] == found[0]["images"]
  assert metadata[1]["damaged"] == len(written.damage) + len(written.unreadable) and metadata[0]["damaged"] == 0
  for id_ in (*written.damage, *written.unreadable):
    assert sum(id_ + ":" in line for line in metadata[1]["damage"]) >= 1
  json.dumps(metadata)


def test_tables_and_prepared_datasets_serve_retrieval_too(tmp_path):
  rng = np.random.default_rng(0)
  params = {"image": rng.normal(size=(16 * 16 * 3, 8)).astype(np.float32),
            "text": rng.normal(size=(259, 8)).astype(np.float32)}
  predict = {"embed_image": _by_pixels, "embed_text": _by_bytes}
  written = standins.write_coco(tmp_path, count=12, captions=3)
  from limber_jax.data.sources.coco import Coco

  coco = Coco(Source(name="coco", path=written.path, split=""))
  rows = [f"val2014/COCO_val2014_{int(coco.annotation(i)['id']):012}.jpg\t{text}"
          for i in range(12) for text in coco.annotation(i)["texts"]]
  (tmp_path / "table.tsv").write_text("filepath\ttitle\n" + "\n".join(rows) + "\n")
  sources = [Source(name="coco", path=written.path, split=""),
             Source(name="captions", path=str(tmp_path / "table.tsv"), split="images")]
  metrics = [config(Retrieval, source=s).open(context(image_size=16, length=40))(predict, params, {}) for s in sources]
  assert metrics[0] == metrics[1] and metrics[0]["captions"] == 36
  prepared = standins.write_tfds(tmp_path, "retrieved_digits", captions=3, count=12)
  source = Source(name="tfds", path=prepared.path, split="test")
  found = config(Retrieval, source=source).open(context(image_size=16, length=40))(predict, params, {})
  assert (found["images"], found["captions"]) == (12, 36)


# Rows of one image

FIVE = 5


def several(folder, name):
  """Writes twelve images with five captions each, a record a caption in an order of its own; returns (source, path)."""
  records = layouts.digits(12)
  order = np.random.default_rng(0).permutation(12 * FIVE)
  rows = [records[i // FIVE] | {"key": f"{i:04}", "text": f"{i // FIVE:02} {i % FIVE}"} for i in order]
  match name:
    case "captions" | "jsonl":
      for i, record in enumerate(records):
        (folder / f"{i}.png").write_bytes(record["image"])
      lines = [{"image": f"{'./' * (j % 2)}{int(r['text'][:2])}.png", "caption": r["text"]} for j, r in enumerate(rows)]
      path = folder / f"t.{name}"
      path.write_text("filepath\ttitle\n" + "".join(f"{r['image']}\t{r['caption']}\n" for r in lines)
                      if name == "captions" else "".join(json.dumps(r) + "\n" for r in lines))
      return path
    case "webdataset":
      return layouts.write_webdataset(folder / "tars", rows, 25, "png")
    case "parquet":
      return layouts.write_img2dataset_parquet(folder / "parquet", rows)
  raise AssertionError(name)


@pytest.mark.parametrize("name", ["captions", "jsonl", "webdataset", "parquet"])
def test_a_perfect_model_has_a_recall_of_1_on_data_with_a_record_a_caption(tmp_path, name, capsys):
  config = Retrieval(Source(name, str(several(tmp_path, name))), batch_size=8)
  runs = config.open(context(image_size=32))
  vectors = np.eye(12, dtype=np.float32)
  pixels = [Source().open()[i]["image"].sum() for i in range(12)]
  assert len(set(pixels)) == 12
  predict = {  # an image is known by the sum of its pixels, a caption by its two digits
    "embed_image": lambda params, stats, images: params["v"][jnp.argmax(
      images.astype(jnp.int32).sum((1, 2, 3))[:, None] == params["sums"][None], axis=1)],
    "embed_text": lambda params, stats, tokens: params["v"][(tokens[:, 1] - 49) * 10 + tokens[:, 2] - 49]}
  found = runs(predict, {"v": vectors, "sums": np.array(pixels, np.int32)}, {})
  assert found == {"i2t_r1": 1, "i2t_r5": 1, "i2t_r10": 1, "t2i_r1": 1, "t2i_r5": 1, "t2i_r10": 1, "images": 12,
                   "captions": 60}
  assert "60 records show 12 images" in capsys.readouterr().err and runs.metadata()["num_examples"] == 12


def test_a_row_that_cannot_be_read_is_named_and_the_others_of_its_image_count(tmp_path):
  path = several(tmp_path, "captions")
  path.write_text(path.read_text() + "0.png\t \nmissing.png\ta\nmissing.png\tb\n")
  source = by_image(Source("captions", str(path)).open())
  assert len(source) == 13 and [len(source.annotation(i)["texts"]) for i in range(13)] == [5] * 12 + [2]
  assert [d["id"] for d in source.damage] == ["record 60"] and "empty caption" in source.damage[0]["reason"]
  with pytest.raises(UserError, match="No such file"):
    source[12]


def test_data_without_such_records_stay_what_they_are(tmp_path):
  digits = Source().open()
  assert by_image(digits) is digits
  table = Source("captions", str(several(tmp_path, "captions")), "images").open()
  assert by_image(table) is table and len(table) == 24  # of two spellings of each path
