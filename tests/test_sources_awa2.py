"""Animals with Attributes 2: its files, as they are published."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Source
from limber_jax.data.sources.awa2 import Awa2
from limber_jax.data.sources.digits import CLASSES
from limber_jax.errors import UserError
from tests.standins import write_awa2

ANIMALS = ("antelope", "grizzly+bear", "giant+panda", "cow")
PREDICATES = ("black", "white", "furry")
MATRIX = ((0, 0, 1), (1, 0, 1), (1, 1, 1), (1, 1, 0))


def jpeg(value):
  out = io.BytesIO()
  Image.fromarray(np.full((6, 5, 3), value, np.uint8)).save(out, "JPEG")
  return out.getvalue()


@pytest.fixture
def root(tmp_path):
  """The directory of a data set of four animals, two images each, the cow held out."""
  folder = tmp_path / "Animals_with_Attributes2"
  folder.mkdir()
  numbered = lambda names: "".join(f"{i:9}\t{name}\n" for i, name in enumerate(names, 1))  # noqa: E731
  (folder / "classes.txt").write_text(numbered(ANIMALS))
  (folder / "predicates.txt").write_text(numbered(PREDICATES))
  (folder / "predicate-matrix-binary.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in MATRIX))
  (folder / "trainclasses.txt").write_text("antelope\ngiant+panda\ngrizzly+bear\n")
  (folder / "testclasses.txt").write_text("cow\n")
  for name in ANIMALS:
    images = folder / "JPEGImages" / name
    images.mkdir(parents=True)
    for number in (10002, 10001):
      (images / f"{name}_{number}.jpg").write_bytes(jpeg(number % 100))
  (folder / "JPEGImages" / ".DS_Store").write_bytes(b"")
  return folder


def source(path, split="all"):
  return Awa2(Source(name="awa2", path=str(path), split=split))


def test_images_classes_and_attributes_are_read(root):
  found = source(root)
  assert len(found) == 8 and found.damage == []
  assert found.classes == ("antelope", "grizzly bear", "giant panda", "cow") and found.attributes == PREDICATES
  np.testing.assert_array_equal(found.has, np.array(MATRIX, bool))
  assert found.annotation(3) == {"id": "grizzly+bear/grizzly+bear_10002.jpg", "text": "grizzly bear", "label": 1}
  assert found[3]["image"] == (root / "JPEGImages/grizzly+bear/grizzly+bear_10002.jpg").read_bytes()
  assert found.names[1] == ("grizzly bear", "grizzly") and found.names[0] == ("antelope",)


def test_the_directory_above_and_a_pickled_source_are_the_same(root):
  found = source(root.parent)
  assert found.fingerprint() == source(root).fingerprint() == pickle.loads(pickle.dumps(found)).fingerprint()
  assert found[0] == source(root)[0]


def test_splits_have_no_animal_in_common(root):
  train, test = source(root, "train"), source(root, "test")
  assert {train.annotation(i)["label"] for i in range(len(train))} == {0, 1, 2}
  assert [test.annotation(i)["label"] for i in range(len(test))] == [3, 3]
  assert train.classes == test.classes and train.fingerprint() != test.fingerprint()
  with pytest.raises(UserError, match="did you mean 'test'"):
    source(root, "tests")


def test_the_fingerprint_changes_with_images_and_attributes(root):
  before = source(root).fingerprint()
  (root / "JPEGImages/cow/cow_10003.jpg").write_bytes(jpeg(3))
  with_image = source(root).fingerprint()
  text = (root / "predicate-matrix-binary.txt").read_text()
  (root / "predicate-matrix-binary.txt").write_text(text.replace("0 0 1", "0 1 1"))
  assert len({before, with_image, source(root).fingerprint()}) == 3


def test_folders_that_do_not_fit_are_named_and_the_rest_is_used(root):
  (root / "JPEGImages/unicorn").mkdir()
  for file in (root / "JPEGImages/cow").iterdir():
    file.unlink()
  found = source(root)
  assert len(found) == 6
  assert found.damage == [{"file": "JPEGImages", "id": "unicorn", "reason": "no animal of classes.txt"},
                          {"file": "JPEGImages", "id": "cow", "reason": "no images of it"}]


def test_what_is_missing_or_damaged_is_one_line(root, tmp_path):
  with pytest.raises(UserError, match=r"no file classes.txt; wanted Animals_with_Attributes2 .*cvml.ista.ac.at/AwA2"):
    source(tmp_path / "nowhere")

  def refused(name, text, match):
    kept = (root / name).read_text()
    (root / name).write_text(text)
    with pytest.raises(UserError, match=match):
      source(root, "train")
    (root / name).write_text(kept)

  refused("classes.txt", "1\tantelope\n3\tcow\n", r"classes.txt, line 2: wanted 2 and a name, got '3\\tcow'")
  refused("predicate-matrix-binary.txt", "0 0 1\n", "a line for each of 4 animals, got 1")
  refused("predicate-matrix-binary.txt", "0 0 1\n1 0 2\n1 1 1\n1 1 0\n", "line 2: wanted 3 numbers 0 or 1, got '1 0 2'")
  refused("predicate-matrix-binary.txt", "0 0 1\n1 0\n1 1 1\n1 1 0\n", "line 2: wanted 3 numbers")
  refused("trainclasses.txt", "antilope\n", "trainclasses.txt: 'antilope' is not in classes.txt; did you mean 'antel")
  image = root / "JPEGImages/cow/cow_10001.jpg"
  found = source(root)
  image.unlink()
  with pytest.raises(UserError, match=r"no image 'cow/cow_10001.jpg'"):
    found[6]


def test_digits_in_the_same_layout_are_read(tmp_path):
  written = write_awa2(tmp_path, each=2, hostile=True)
  found = source(written.path)
  assert len(found) == written.records and found.classes == CLASSES
  assert found.has[:, found.attributes.index("even")].tolist() == [True, False] * 5
  assert {found.annotation(i)["label"] for i in range(len(found))} == set(range(10))
  assert len(source(written.path, "train")) + len(source(written.path, "test")) == len(found)
