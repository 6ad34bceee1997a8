"""Files of captions: COCO's, Karpathy's and NoCaps' layouts, whole and damaged, and where images are looked for."""

import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Source
from limber_jax.data import transforms
from limber_jax.data.sources.coco import Coco
from limber_jax.data.sources.digits import CLASSES, Digits
from limber_jax.errors import UserError
from limber_jax.runtime import inputs
from tests import standins

WRITERS = {"coco": standins.write_coco, "karpathy": standins.write_karpathy, "nocaps": standins.write_nocaps,
           "flickr30k": lambda folder, **fields: standins.write_karpathy(folder, "flickr30k", **fields),
           "coco2017": lambda folder, **fields: standins.write_coco(folder, year="2017", **fields)}


def coco(path, **fields):
  return Coco(Source(name="coco", path=str(path), **{"split": "", **fields}))


def opened(written, kind):
  return coco(written.path, images=written.images, split="test" if kind in ("karpathy", "flickr30k") else "")


def records(source):
  return [source.annotation(i) for i in range(len(source))]


def official(folder, images, captions, name="x.json"):
  path = folder / name
  path.write_text(json.dumps({"images": images, "annotations": captions}))
  return path


IMAGE = {"id": 1, "file_name": "a.jpg"}
CAPTION = {"id": 1, "image_id": 1, "caption": "a cat"}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_layout_gives_an_image_with_all_its_captions(kind, tmp_path):
  written = WRITERS[kind](tmp_path)
  source, digits = opened(written, kind), Digits(Source(split="test"))
  assert len(source) == written.records and not source.damage and source.classes is None
  # Karpathy's test images are the last that the writer made: 16 of other splits come first, 12 of Flickr30k.
  first = {"karpathy": 16, "flickr30k": 12}.get(kind, 0)
  for i in range(len(source)):
    record = source[i]
    word = CLASSES[digits.annotation(first + i)["label"]]
    assert len(record["texts"]) == (10 if kind == "nocaps" else 5)
    assert record["text"] == record["texts"][0] and all(word in text.split() for text in record["texts"])
    difference = transforms.decode(record["image"]).astype(int) - digits[first + i]["image"]
    assert np.abs(difference).mean() < 8  # a JPEG of it, and of no other
  assert len({r["id"] for r in records(source)}) == len(source)


def test_records_have_the_ids_and_the_domains_of_the_file(tmp_path):
  written = standins.write_nocaps(tmp_path, count=6)
  table = json.loads(Path(written.path).read_bytes())
  found = records(coco(written.path))
  assert [(r["id"], r["domain"]) for r in found] == [(str(i["id"]), i["domain"]) for i in table["images"]]
  assert [r["domain"] for r in found[:4]] == ["in-domain", "near-domain", "out-domain", "in-domain"]
  for record in found:
    assert list(record["texts"]) == [a["caption"] for a in table["annotations"] if str(a["image_id"]) == record["id"]]
  plain = standins.write_nocaps(tmp_path / "plain", count=6, domains=False)
  assert all(set(r) == {"id", "text", "texts"} for r in records(coco(plain.path)))


def test_captions_are_those_that_pycocotools_finds(tmp_path):
  pycocotools = pytest.importorskip("pycocotools.coco")
  written = standins.write_coco(tmp_path)
  theirs = pycocotools.COCO(written.path)
  for record in records(coco(written.path)):
    own = theirs.loadAnns(theirs.getAnnIds(imgIds=int(record["id"])))
    assert list(record["texts"]) == [a["caption"] for a in own]


def test_splits_of_karpathy_part_the_file_and_may_be_joined(tmp_path):
  path = standins.write_karpathy(tmp_path, counts={"train": 5, "restval": 3, "val": 2, "test": 4}).path
  ids = {split: [r["id"] for r in records(coco(path, split=split))]
         for split in ("train", "restval", "val", "test", "train+restval", "")}
  assert {split: len(i) for split, i in ids.items()} == {
    "train": 5, "restval": 3, "val": 2, "test": 4, "train+restval": 8, "": 14}
  assert ids["train+restval"] == ids["train"] + ids["restval"] and len(set(ids[""])) == 14
  with pytest.raises(UserError, match="no split 'tets'; did you mean 'test'"):
    coco(path, split="tets")
  with pytest.raises(UserError, match="no split 'restvall'; did you mean 'restval'"):
    coco(path, split="train+restvall")


def test_a_file_without_splits_wants_none(tmp_path):
  path = standins.write_coco(tmp_path).path
  with pytest.raises(UserError, match=r"split='test': .*captions_val2014.json has no splits"):
    coco(path, split="test")


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_damaged_is_named_once_and_the_rest_is_as_without_it(kind, tmp_path):
  clean = opened(WRITERS[kind](tmp_path / "clean"), kind)
  written = WRITERS[kind](tmp_path / "hostile", hostile=True)
  source = opened(written, kind)
  assert sorted(d["id"] for d in source.damage) == sorted(written.damage)
  assert {d["file"] for d in source.damage} == {os.path.basename(written.path)}
  assert all(d["reason"] and len(d["reason"]) < 200 for d in source.damage)
  assert len(source) == written.records
  readable, unreadable = [], []
  for i in range(len(source)):
    try:
      record = source[i]
      readable.append(record | {"image": transforms.decode(record["image"]).tobytes()})
    except UserError:
      unreadable.append(source.annotation(i)["id"])
  assert unreadable == list(written.unreadable)
  assert readable == [r | {"image": transforms.decode(r["image"]).tobytes()} for r in map(clean.__getitem__,
                                                                                          range(len(clean)))]


@pytest.mark.parametrize(("images", "captions", "named"), [
  ([{"id": 2}], [], {"image 2": "no 'file_name'"}),
  ([{"file_name": "b.jpg"}, 3], [], {"image at 1": "no 'id'", "image at 2": "wanted an object, got int"}),
  ([{"id": True, "file_name": "b.jpg"}], [], {"image at 1": "'id' is of type bool"}),
  ([{"id": 2, "file_name": 5}], [], {"image 2": "'file_name' is of type int"}),
  ([{"id": "1", "file_name": "b.jpg"}], [], {"image 1": "listed twice"}),
  ([{"id": 2, "file_name": "b.jpg"}], [], {"image 2": "no caption that can be used"}),
  ([], [{"id": 2, "image_id": 7, "caption": "x"}], {"annotation 2": "of image 7, which is not in the file"}),
  ([], [{"id": 2, "image_id": 1}], {"annotation 2": "no 'caption'"}),
  ([], [{"id": 2, "image_id": 1, "caption": None}], {"annotation 2": "caption is of type NoneType"}),
  ([], [{"id": 2, "image_id": 1, "caption": ["x"]}], {"annotation 2": "caption is of type list"}),
  ([], [{"id": 2, "image_id": 1, "caption": "\u2028\t"}], {"annotation 2": "empty caption"}),
  ([], [{"id": 2, "image_id": 1, "caption": "x" * 10_000}], {"annotation 2": "caption of 10,000 characters"}),
  ([], [{"id": 2, "image_id": 1, "caption": "\ud800"}], {"annotation 2": "a lone surrogate"}),
  ([], [{"image_id": 1, "caption": "x"}, None], {"annotation at 1": "no 'id'", "annotation at 2": "got NoneType"}),
  ([], [{"id": 1, "image_id": 1, "caption": "again"}], {"annotation 1": "listed twice"}),
  ([{"id": 2, "file_name": "b.jpg"}], [{"id": 2, "image_id": 2, "caption": ""}],
   {"annotation 2": "empty caption", "image 2": "no caption"}),
])
def test_an_entry_that_cannot_be_used_is_named_with_its_reason(images, captions, named, tmp_path):
  source = coco(official(tmp_path, [IMAGE, *images], [CAPTION, *captions]))
  assert records(source) == [{"id": "1", "text": "a cat", "texts": ("a cat",)}]
  assert {d["id"] for d in source.damage} == set(named) and {d["file"] for d in source.damage} == {"x.json"}
  for damage in source.damage:
    assert named[damage["id"]] in damage["reason"]


@pytest.mark.parametrize(("image", "named"), [
  ({"filename": "b.jpg", "split": "test", "sentences": "x"}, {"image b.jpg": "'sentences' is of type str"}),
  ({"filename": "b.jpg", "split": 3, "sentences": []}, {"image b.jpg": "'split' is of type int"}),
  ({"split": "test", "sentences": [{"raw": "x"}]}, {"image at 1": "no 'filename'"}),
  ({"filename": "b.jpg", "cocoid": 9, "split": "test", "sentences": [{"raw": "x"}]}, {"image 9": "no 'filepath'"}),
  (7, {"image at 1": "wanted an object"}),
  ({"filename": "a.jpg", "split": "test", "sentences": [{"raw": "x"}]}, {"image a.jpg": "listed twice"}),
  ({"filename": "b.jpg", "split": "test", "sentences": [{"raw": 1}, {"x": 1}, 2]},
   {"image b.jpg, sentence 0": "of type int", "image b.jpg, sentence 1": "no 'raw'",
    "image b.jpg, sentence 2": "wanted an object", "image b.jpg": "no caption"}),
])
def test_a_damaged_image_of_karpathy_is_named_with_its_reason(image, named, tmp_path):
  good = {"filename": "a.jpg", "split": "test", "sentences": [{"raw": "a cat"}]}
  (tmp_path / "dataset_x.json").write_text(json.dumps({"images": [good, image]}))
  source = coco(tmp_path / "dataset_x.json", split="test")
  assert records(source) == [{"id": "a.jpg", "text": "a cat", "texts": ("a cat",)}]
  assert {d["id"] for d in source.damage} == set(named)
  for damage in source.damage:
    assert named[damage["id"]] in damage["reason"]


def test_a_cut_file_is_named_with_its_last_byte(tmp_path):
  data = Path(standins.write_coco(tmp_path, count=3).path).read_bytes()
  for length in (1, len(data) // 3, len(data) // 2, len(data) - 1):
    (tmp_path / "cut.json").write_bytes(data[:length])
    with pytest.raises(UserError, match=rf"cut.json, byte [\d,]+ of {length:,}: not JSON .*cut off") as caught:
      coco(tmp_path / "cut.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("data", "message"), [
  ('{"é": [1, 2, x]}'.encode(), r"byte 14 of 17: not JSON"),
  (b'\xef\xbb\xbf{"images": x}', r"byte 14 of 16: not JSON"),
  ('{"a": "é"}'.encode()[:8], r"byte 7 of 8: not UTF-8 \(unexpected end of data\)"),
  (b'{"a": "\xff"}', r"byte 7 of 10: not UTF-8"),
  (b"[" * 100_000, r"not JSON that can be read"),
  (b'{"a": ' + b"1" * 5000 + b"}", r"not JSON that can be read"),
  (b"", r"byte 0 of 0"),
  (b"[1]", r"got a JSON list, not an object"),
  (b"{}", r"wanted a list of 'images', got no such key"),
  (b'{"images": {}}', r"wanted a list of 'images', got dict"),
  (b'{"images": []}', r"wanted a list of 'images', got an empty one"),
  (b'{"images": [{"id": 1}], "annotations": 3}', r"wanted a list of 'annotations', got int"),
  (b'{"imagse": [{"id": 1}]}', r"did you mean 'imagse'"),
  (b'{"images": [{"id": 1}]}', r"neither 'annotations' beside 'images' nor 'sentences'"),
  (b'{"images": [3], "annotations": [{"id": 1, "bbox": []}]}', r"none of its images has a caption; the first flaw"),
])
def test_a_file_of_another_form_is_reported_in_one_line(data, message, tmp_path):
  (tmp_path / "x.json").write_bytes(data)
  with pytest.raises(UserError, match=rf"x\.json.*{message}|{message}.*x\.json") as caught:
    coco(tmp_path / "x.json")
  assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported_with_what_belongs_there_and_its_page(tmp_path):
  standins.write_coco(tmp_path, count=1)
  with pytest.raises(UserError, match=r"captions_val2014.json or .*cocodataset.org/#download.*karpathy/deepimagesent.*"
                                      r"nocaps.org/download.*did you mean 'captions_val2014.json'") as caught:
    coco(tmp_path / "annotations" / "captions_val204.json")
  assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match=r"a directory, not a file; wanted .*known: captions_val2014\.json"):
    coco(tmp_path / "annotations")


def test_a_file_too_large_is_refused_before_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, "ANNOTATIONS", inputs.Kind("file of annotations", 10))
  with pytest.raises(UserError, match="at most 10 are read"):
    coco(official(tmp_path, [IMAGE], [CAPTION]))


def test_images_are_found_in_the_usual_folders_and_where_the_source_says(tmp_path):
  written = standins.write_coco(tmp_path / "a", count=2)
  first = coco(written.path)[0]["image"]
  shutil.copytree(tmp_path / "a" / "val2014", tmp_path / "b")
  for images in (tmp_path / "a", tmp_path / "a" / "val2014", tmp_path / "b"):
    assert coco(written.path, images=str(images))[0]["image"] == first
  shutil.move(tmp_path / "a" / "val2014", tmp_path / "a" / "elsewhere")
  with pytest.raises(UserError, match=r"no image 'COCO_val2014_000000001000.jpg' in .*set source.images"):
    coco(written.path)[0]
  karpathy = standins.write_karpathy(tmp_path / "k", counts={"train": 1, "test": 1})
  assert coco(karpathy.path, split="train")[0]["image"]


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "images/../../secret.jpg", "a\0b.jpg", "", "\ud800"])
def test_nothing_outside_of_the_root_is_read(name, tmp_path):
  root = tmp_path / "root"
  root.mkdir()
  Image.new("RGB", (4, 4)).save(tmp_path / "secret.jpg")
  source = coco(official(root, [IMAGE | {"file_name": name}], [CAPTION]))
  with pytest.raises(UserError, match=r"outside of|cannot read"):
    source[0]


def test_fingerprints_change_with_the_captions_and_not_with_the_place(tmp_path):
  a, b = (coco(standins.write_nocaps(tmp_path / place, count=4).path) for place in "ab")
  assert a.fingerprint() == b.fingerprint() == pickle.loads(pickle.dumps(a)).fingerprint()
  assert len(a.fingerprint()) == 16 and int(a.fingerprint(), 16) >= 0
  others = [standins.write_nocaps(tmp_path / "c", count=5), standins.write_nocaps(tmp_path / "d", count=4, captions=9),
            standins.write_nocaps(tmp_path / "e", count=4, domains=False)]
  prints = [coco(o.path).fingerprint() for o in others]
  karpathy = standins.write_karpathy(tmp_path / "k").path
  prints += [a.fingerprint(), *(coco(karpathy, split=s).fingerprint() for s in ("train", "val", "test", ""))]
  assert len(set(prints)) == 8


def test_a_pickled_source_gives_the_same_records(tmp_path):
  source = opened(standins.write_karpathy(tmp_path, hostile=True), "karpathy")
  copy = pickle.loads(pickle.dumps(source))
  assert records(copy) == records(source) and copy.damage == source.damage and copy[5] == source[5]


def test_a_source_of_every_caption_trains(tmp_path):
  source = coco(standins.write_coco(tmp_path, count=1).path)
  seen = {transforms.one_text(source.annotation(0), np.random.default_rng(i)) for i in range(40)}
  assert seen == set(source.annotation(0)["texts"])


# The other writers of stand-in data: what they write is what they say.

def test_questions_have_annotations_with_ten_answers_and_images(tmp_path):
  for subset in ("val2014", "train2014"):
    written = standins.write_vqa2(tmp_path, images=4, subset=subset)
    questions = json.loads((tmp_path / f"v2_OpenEnded_mscoco_{subset}_questions.json").read_bytes())["questions"]
    found = json.loads((tmp_path / f"v2_mscoco_{subset}_annotations.json").read_bytes())["annotations"]
    assert written.records == len(questions) == 12
    assert [q["question_id"] for q in questions] == [a["question_id"] for a in found]
    assert all(len(a["answers"]) == 10 and a["multiple_choice_answer"] for a in found)
    assert {a["answer_type"] for a in found} == {"number", "yes/no", "other"}
    for question in questions:
      Image.open(tmp_path / subset / f"COCO_{subset}_{question['image_id']:012}.jpg").load()


def test_folders_and_tables_are_complete(tmp_path):
  written = standins.write_imagenet_folders(tmp_path, ["n01443537", "n01484850"], each=2, hostile=True)
  assert written.records == 6 and len(written.unreadable) == 2
  found = sorted(p.relative_to(written.path).as_posix() for p in (tmp_path / "imagenet-r").rglob("*.jpg"))
  assert len(found) == 6 and set(written.unreadable) < set(found)
  assert standins.write_awa2(tmp_path, each=2).records == 20
  root = tmp_path / "Animals_with_Attributes2"
  matrix = np.loadtxt(root / "predicate-matrix-binary.txt", dtype=int)
  assert matrix.shape == (10, len(standins.PREDICATES))
  assert matrix[:, list(standins.PREDICATES).index("even")].tolist() == [1, 0] * 5
  names = [line.split("\t")[1] for line in (root / "classes.txt").read_text().splitlines()]
  assert tuple(names) == CLASSES
  assert all((root / "JPEGImages" / name / f"{name}_10002.jpg").is_file() for name in names)


def test_a_prepared_dataset_serves_classes_and_captions(tmp_path):
  from limber_jax.data.sources.tfds import Tfds

  classes = standins.write_tfds(tmp_path, "digits_in_classes", count=4, hostile=True)
  captions = standins.write_tfds(tmp_path, "digits_in_captions", captions=3, count=4)
  source = Tfds(Source(name="tfds", path=classes.path, split="test"))
  assert source.classes == CLASSES and len(source) == classes.records == 5
  damaged = 0
  for i in range(5):
    try:
      assert transforms.decode(source[i]["image"]).shape == (32, 32, 3)
    except UserError:
      damaged += 1
  assert damaged == 1
  source = Tfds(Source(name="tfds", path=captions.path, split="test"))
  assert all(len(source.annotation(i)["texts"]) == 3 for i in range(4))


def test_the_same_call_writes_the_same_bytes(tmp_path):
  for place in "ab":
    standins.write_coco(tmp_path / place, hostile=True)
    standins.write_vqa2(tmp_path / place, hostile=True)
    standins.write_awa2(tmp_path / place, hostile=True)
  files = [{p.relative_to(tmp_path / place): p.read_bytes() for p in (tmp_path / place).rglob("*") if p.is_file()}
           for place in "ab"]
  assert files[0] == files[1] and len(files[0]) > 60
  assert dataclasses.asdict(standins.write_coco(tmp_path / "a"))["records"] == 20
