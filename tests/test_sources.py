"""Data sources: layouts, hostile tables, and what is reported to the user."""

import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from limber_jax import registry
from limber_jax.config import Source
from limber_jax.data.contents import contents
from limber_jax.data.packing import pack
from limber_jax.data.sources.captions import Captions
from limber_jax.data.sources.digits import CLASSES, TEMPLATES, Digits
from limber_jax.errors import UserError
from tests import layouts, test_clip_benchmark
from tests.standins import write_awa2, write_coco, write_imagenet_folders, write_vqa2


def png(value, height=5, width=4):
  out = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(out, "PNG")
  return out.getvalue()


@pytest.fixture
def folder(tmp_path):
  for name in ("a.png", "b.png", "ü c.png"):
    (tmp_path / name).write_bytes(png(len(name)))
  return tmp_path


def table(folder, text, name="x.tsv", **fields):
  path = folder / name
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return Captions(Source(name="captions", path=str(path), **fields))


def texts(source):
  return [source.annotation(i)["text"] for i in range(len(source))]


class TestDigits:

  def test_splits_part_all_images_and_every_digit(self):
    train, test, everything = (Digits(Source(split=s)) for s in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    ids = [{s.annotation(i)["id"] for i in range(len(s))} for s in (train, test, everything)]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == ids[2]
    for source in (train, test):
      counts = np.bincount([source.annotation(i)["label"] for i in range(len(source))])
      assert len(counts) == 10 and counts.max() - counts.min() <= 8

  def test_records_show_scikit_learns_images_and_say_their_digit(self):
    from sklearn.datasets import load_digits
    source, data = Digits(Source(split="all")), load_digits()
    for i in range(0, len(source), 97):
      record = source[i]
      assert record["image"].shape == (32, 32, 3) and record["image"].dtype == np.uint8
      small = record["image"].reshape(8, 4, 8, 4, 3).mean((1, 3, 4))
      assert np.corrcoef(small.ravel(), data.images[i].ravel())[0, 1] > 0.98
      assert record["label"] == data.target[i]
      assert CLASSES[record["label"]] in record["text"].split()

  def test_no_digit_has_a_caption_of_its_own(self):
    source = Digits(Source(split="train"))
    pairs = {(source.annotation(i)["label"], len(source.annotation(i)["text"].split())) for i in range(len(source))}
    assert len(pairs) == 10 * len({len(t.split()) for t in TEMPLATES})

  def test_a_wrong_split_is_reported_with_the_nearest_right_one(self):
    with pytest.raises(UserError, match="did you mean 'train'"):
      Digits(Source(split="trian"))


class TestCaptions:

  def test_conceptual_captions_layout_is_read_without_a_header_and_without_quoting(self, folder):
    source = table(folder, 'a "quoted" dog\ta.png\n"lone quote\tb.png\n')
    assert texts(source) == ['a "quoted" dog', '"lone quote']
    assert source[1]["image"] == (folder / "b.png").read_bytes()
    assert source[1]["id"] == "b.png"

  @pytest.mark.parametrize("separator", ["\t", ","])
  def test_open_clips_layout_is_read_as_pandas_reads_it(self, folder, separator):
    rows = [("filepath", "title"), ("a.png", "plain"), ("b.png", '"two\nlines, and ""quotes"""'), ("ü c.png", "ünï")]
    source = table(folder, "\n".join(separator.join(r) for r in rows) + "\n", name="x.csv")
    assert texts(source) == ["plain", 'two\nlines, and "quotes"', "ünï"]
    assert source[2]["image"] == (folder / "ü c.png").read_bytes()

  def test_both_ways_of_finding_rows_agree(self, folder):
    rng = np.random.default_rng(0)
    words = [" ".join("".join(rng.choice(list("abcüé漢🐕"), 4)) for _ in range(rng.integers(1, 5))) for _ in range(500)]
    plain = "title,filepath\n" + "".join(f"{w},a.png\n" for w in words)
    source, quoted = table(folder, plain, "p.csv"), table(folder, plain + '"q",a.png\n', "q.csv")
    assert texts(source) == words and texts(quoted) == [*words, "q"]

  @pytest.mark.parametrize("end", ["\n", "\r\n"])
  @pytest.mark.parametrize("last", ["", "\n", "\n\n\n"])
  @pytest.mark.parametrize("quote", ["", '"'])
  def test_empty_lines_line_ends_and_a_missing_last_one_do_not_count(self, folder, end, last, quote):
    text = f"filepath,title\n\n\na.png,{quote}one{quote}\n\nb.png,two{last}".replace("\n", end)
    assert texts(table(folder, b"\xef\xbb\xbf" + text.encode(), "x.csv")) == ["one", "two"]

  def test_columns_are_chosen_by_name_and_labels_are_numbers(self, folder):
    text = "n,file,words,filepath\n3,a.png,yes,no\nx,b.png,yes,no\n-1,b.png,yes,no\n"
    source = table(folder, text, "x.csv", image_key="file", text_key="words", label_key="n")
    assert source.annotation(0) == {"id": "a.png", "text": "yes", "label": 3}
    for row in (1, 2):
      with pytest.raises(UserError, match=rf"row {row + 1}: wanted a class number"):
        source[row]

  def test_split_images_gives_a_record_an_image_with_all_its_captions(self, folder):
    source = table(folder, "title,filepath\n1,a.png\n2,b.png\n3,a.png\n", "x.csv", split="images")
    assert len(source) == 2
    assert source[0]["texts"] == ("1", "3") and source[0]["text"] == "1"
    assert source[0]["image"] == (folder / "a.png").read_bytes()
    assert source.annotation(1)["texts"] == ("2",)

  def test_paths_start_at_images_and_stay_inside(self, folder):
    inner = folder / "inner"
    inner.mkdir()
    rows = ["../a.png", "inner/../../a.png", f"{folder}/a.png", "/etc/hostname", "a.png\0", "missing.png", ".", ""]
    source = table(inner, "".join(f"t\t{r}\n" for r in rows))
    for i in range(len(rows)):
      with pytest.raises(UserError, match=rf"row {i + 1}: .*config\.data\.source\.images"):
        source[i]
    source = table(inner, "".join(f"t\t{r}\n" for r in rows), images=str(folder))
    assert source[2]["image"] == (folder / "a.png").read_bytes()
    sideways = table(inner, "t\tinner2/a.png\nt\t../inner2/a.png\n", images=str(inner))
    with pytest.raises(UserError, match="lies outside"):
      sideways[1]

  def test_addresses_are_not_fetched(self, folder):
    source = table(folder, "a dog\thttps://example.com/a.jpg\n")
    with pytest.raises(UserError, match=r"row 1: .*img2dataset"):
      source[0]

  @pytest.mark.parametrize(("text", "fields", "message"), [
    ("a,b,c\n1,2,3\n", {}, "no known column name"),
    ("filepath,titel\n1,2\n", {"text_key": "title"}, "did you mean 'titel'"),
    ("filepath,title\n1,2\n", {"label_key": "tilte"}, "did you mean 'title'"),
    ("filepath,title\n", {}, "no rows"),
    ("", {}, "is empty"),
    ("filepath,title\n1,2\n", {"separator": "::"}, "wanted one character"),
    ("filepath,title\n1,2\n", {"split": "test"}, "split='test'"),
    (b"filepath,title\na.png,\xff\n", {"split": "images"}, "row 1, byte 6 of 7: not UTF-8"),
    ('filepath,title\na.png,"a\n' + "long line without an end " * 9000, {}, "line 2: field larger.*a quote that never"),
  ])
  def test_a_table_that_does_not_fit_is_reported_in_one_line(self, folder, text, fields, message):
    with pytest.raises(UserError, match=message) as caught:
      table(folder, text, "x.csv", **fields)
    assert "\n" not in str(caught.value)

  def test_a_caption_of_10_000_characters_is_refused(self, folder):
    source = table(folder, f"{'x' * 9_999}\ta.png\n{'x' * 10_000}\ta.png\n")
    assert len(source[0]["text"]) == 9_999
    with pytest.raises(UserError, match=r"row 2: caption of 10,000 characters"):
      source[1]

  @pytest.mark.parametrize("row", ["only one", "a\tb\tc"])
  def test_a_row_of_another_width_is_named(self, folder, row):
    source = table(folder, f"one\ta.png\n{row}\n")
    with pytest.raises(UserError, match=r"row 2: wanted 2 columns"):
      source[1]

  def test_a_missing_table_is_reported_with_the_layout_and_the_way_to_point_elsewhere(self):
    with pytest.raises(UserError, match=r"no such file; wanted .*filepath.*--config\.data\.source\.path="):
      Captions(Source("captions", "/nowhere/cc3m.tsv"))

  def test_the_index_takes_eight_bytes_a_row(self, folder):
    source = table(folder, "t\ta.png\n" * 10_000)
    assert len(source) == 10_000 and len(pickle.dumps(source)) < 8 * 10_000 + 2_000

  def test_the_separator_may_be_written_as_backslash_t(self, folder):
    assert texts(table(folder, "title\tfilepath\nx\ta.png\n", "x.txt", separator="\\t")) == ["x"]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
  """A TFDS directory of two tiny datasets, prepared without TensorFlow."""
  tfds = pytest.importorskip("tensorflow_datasets")
  root = str(tmp_path_factory.mktemp("tfds"))

  class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, downloads):
      return {"train": self._generate_examples(7), "test": self._generate_examples(3)}

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(self.features(tfds.features)))

  class TinyCaptions(Tiny):
    def features(self, f):
      return {"image": f.Image(shape=(None, None, 3)), "captions": f.Sequence({"text": f.Text(), "id": np.int64}),
              "title": f.Text(), "file_name": f.Text()}

    def _generate_examples(self, n):
      for i in range(n):
        yield i, {"image": png(i), "captions": [{"text": f"é {i} {j}", "id": j} for j in range(2)], "title": f"t{i}",
                  "file_name": "x"}

  class TinyClasses(Tiny):
    def features(self, f):
      return {"image": f.Image(shape=(None, None, 3)), "label": f.ClassLabel(names=["cat", "golden_retriever"]),
              "file_name": f.Text()}

    def _generate_examples(self, n):
      for i in range(n):
        yield i, {"image": png(i), "label": i % 2, "file_name": "x"}

  for builder in (TinyCaptions, TinyClasses):
    builder(data_dir=root, file_format="array_record").download_and_prepare()
  return root


def tfds_source(path, **fields):
  return Source(name="tfds", path=path, **fields).open()


class TestTfds:

  def test_images_stay_encoded_and_a_sequence_gives_all_its_texts(self, prepared):
    source = tfds_source(f"{prepared}/tiny_captions/1.0.0")
    assert len(source) == 7 and source.classes is None
    records = sorted((source[i] for i in range(7)), key=lambda r: r["text"])
    assert records[3]["texts"] == ("é 3 0", "é 3 1") and records[3]["text"] == "é 3 0"
    assert records[3]["image"] == png(3)
    assert "image" not in source.annotation(0)

  def test_a_class_names_the_image_where_there_is_no_caption(self, prepared):
    source = tfds_source(f"{prepared}/tiny_classes", split="test")
    assert source.classes == ("cat", "golden_retriever") and len(source) == 3
    assert {(r["label"], r["text"]) for r in map(source.__getitem__, range(3))} == {(0, "cat"), (1, "golden retriever")}

  def test_features_and_parts_of_splits_are_chosen_by_name(self, prepared):
    source = tfds_source(f"{prepared}/tiny_captions", split="train[:2]", text_key="title")
    assert len(source) == 2 and source[0]["text"][0] == "t"

  def test_a_name_is_found_in_the_tfds_directory(self, prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", prepared)
    assert len(tfds_source("tiny_captions")) == 7

  def test_files_without_random_access_are_refused_with_the_way_out(self, prepared, tmp_path):
    shutil.copytree(f"{prepared}/tiny_classes", tmp_path, dirs_exist_ok=True)
    info = tmp_path / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match="file_format='array_record'"):
      tfds_source(str(tmp_path))

  @pytest.mark.parametrize(("path", "fields", "message"), [
    ("", {"split": "trian"}, "several datasets; choose one: .*tiny_captions/1.0.0.*tiny_classes/1.0.0"),
    ("nope", {}, r"no prepared TFDS dataset there .*download_and_prepare.*--config\.data\.source\.path="),
    ("tiny_captions", {"split": "trian"}, "did you mean 'train'"),
    ("tiny_captions", {"text_key": "titel"}, "did you mean 'title'"),
    ("tiny_captions", {"label_key": "label"}, "no such feature 'label'"),
  ])
  def test_what_does_not_fit_is_reported_in_one_line(self, prepared, path, fields, message):
    with pytest.raises(UserError, match=message) as caught:
      tfds_source(os.path.join(prepared, path), **fields)
    assert "\n" not in str(caught.value)


def test_a_pair_of_captions_speaks_of_one_digit_in_two_ways():
  one, pair = Digits(Source()), Digits(Source(pairs=True))
  for i in range(0, len(one), 7):
    first, second = pair.annotation(i)["text"].split("; ")
    name = CLASSES[one.annotation(i)["label"]]
    assert first == one.annotation(i)["text"] and first != second and name in second.split()
  assert one.fingerprint() != pair.fingerprint()
  with pytest.raises(UserError, match="'digits' has no field 'text_key'; did you mean 'pairs'"):
    Source(text_key="pair")


def opened(name, written, split):
  return Source(name, written.path, split, **{"images": written.images} if written.images else {}).open()


def read_as(name, path):
  return Source(name, str(path)).open()


@pytest.fixture(params=sorted(registry.SOURCES))
def source(request, folder):
  match request.param:
    case "captions":
      return table(folder, "filepath\ttitle\na.png\t\"o\"\"ne\"\nb.png\ttwo\n")
    case "tfds":
      return tfds_source(f"{request.getfixturevalue('prepared')}/tiny_classes")
    case "coco":
      return opened("coco", write_coco(folder, count=3), "")
    case "vqa":
      return opened("vqa", write_vqa2(folder, images=2), "val2014")
    case "awa2":
      return opened("awa2", write_awa2(folder, each=1), "all")
    case "folder":
      return opened("folder", write_imagenet_folders(folder, ["n01443537", "n01484850"], each=1), "")
    case "frames":
      (folder / "labels.json").write_text('{"a.png": [1], "b.png": [2, 0]}')
      (folder / "pmsets.json").write_text('{"a.png": ["b.png"]}')
      return Source("frames", str(folder)).open()
    case "digits":
      return Digits(Source())
    case "webdataset":
      return read_as("webdataset", layouts.write_webdataset(folder, layouts.digits(3)))
    case "clip_benchmark":
      test_clip_benchmark.write_set(folder / "s", "train", test_clip_benchmark.labelled(3), classes=list("abcdefg"))
      return read_as("clip_benchmark", folder / "s")
    case "parquet":
      return read_as("parquet", layouts.write_img2dataset_parquet(folder, layouts.digits(3)))
    case "huggingface":
      return read_as("huggingface", layouts.write_saved(folder / "saved", layouts.digits(3)))
    case "jsonl":
      return read_as("jsonl", layouts.write_jsonl(folder, layouts.digits(3)))
    case "packed":
      pack(Source("digits", split="test"), str(folder / "packed"), per_shard=200, log=lambda _: None)
      return read_as("packed", folder / "packed")
    case "mixture":
      members = [{"name": "digits", "split": split, "weight": 1} for split in ("train", "test")]
      (folder / "mix.json").write_text(json.dumps({"sources": members}))
      return read_as("mixture", folder / "mix.json")
  raise AssertionError(f"no example of the source {request.param!r} is tested here")


def test_every_source_survives_pickling_with_the_same_records(source):
  copy = pickle.loads(pickle.dumps(source))
  for i in range(0, len(source), 50):
    for key, value in source[i].items():
      np.testing.assert_array_equal(copy[i][key], value)
  assert copy.fingerprint() == source.fingerprint()


def test_every_source_gives_records_of_the_agreed_form(source):
  for i in range(0, len(source), 50):
    record = source[i]
    assert isinstance(record["id"], str) and isinstance(record["text"], str)
    assert isinstance(record["image"], bytes) or (record["image"].dtype == np.uint8 and record["image"].shape[2] == 3)
    assert isinstance(record.get("label", 0), int) and isinstance(record.get("texts", ()), tuple)
    assert source.annotation(i) == {k: v for k, v in record.items() if k != "image"}
    if source.classes:
      assert source.classes[record["label"]]
  assert len({source.annotation(i)["id"] for i in range(len(source))}) == len(source)


def test_every_file_that_a_source_reads_is_one_of_its_files(source, monkeypatch):
  files = list(source.files())
  read, real = set(), os.open
  monkeypatch.setattr(os, "open", lambda path, *args, **kwargs: read.add(path) or real(path, *args, **kwargs))
  for i in range(len(source)):
    source[i]
  wanted = {os.path.abspath(path) for path in read if isinstance(path, str) and not path.endswith(".index")}
  assert wanted <= set(map(os.path.abspath, files)) and len(set(files)) == len(files)
  assert files or isinstance(source, Digits)
  config = Source()
  before = [contents(source, config) for _ in range(2)]
  assert before[0] == before[1]
  for path in filter(os.path.exists, files):
    os.utime(path, ns=(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))  # nothing but ctime
    before.append(contents(source, config))
  assert len(set(before)) == len(before) - 1


def test_what_a_file_holds_shows_in_its_state_however_it_is_put_there(folder):
  source = table(folder, "filepath\ttitle\na.png\tone\nb.png\ttwo\nnone.png\tthree\n")
  found = [contents(source, Source())]

  def changed():
    found.append(contents(source, Source()))
    assert len(set(found)) == len(found)

  os.rename(folder / "a.png", folder / "c.png")  # images in each other's places
  os.rename(folder / "b.png", folder / "a.png")
  os.rename(folder / "c.png", folder / "b.png")
  changed()
  shutil.copy2(folder / "a.png", folder / "none.png")
  changed()
  before = os.stat(folder / "x.tsv")
  (folder / "x.tsv").write_text("filepath\ttitle\na.png\tsix\nb.png\ttwo\nnone.png\tthree\n")
  os.utime(folder / "x.tsv", ns=(before.st_atime_ns, before.st_mtime_ns))  # as long, and of the same time
  changed()
  (folder / "b.png").unlink()
  changed()


def test_of_a_source_that_names_no_files_all_that_lies_there_counts(tmp_path):
  (tmp_path / "deep" / "er").mkdir(parents=True)
  (tmp_path / "deep" / "er" / "x").write_text("1")
  config = Source("packed", str(tmp_path / "deep"))
  before = contents(object(), config)
  assert contents(object(), config) == before
  (tmp_path / "deep" / "er" / "x").write_text("2")
  assert contents(object(), config) != before


def test_fingerprints_tell_data_apart_and_not_places(folder, prepared, tmp_path):
  rows = ["filepath,title\na.png,x\n", "filepath,title\na.png,yy\n"]
  tables = [table(folder, text, f"{i}.csv") for i, text in enumerate(rows)]
  moved = tmp_path / "elsewhere"
  moved.mkdir()
  assert table(moved, rows[0], "0.csv").fingerprint() == tables[0].fingerprint()
  prints = [s.fingerprint() for s in (
    *tables, Digits(Source(split="train")), Digits(Source(split="test")), tfds_source(f"{prepared}/tiny_classes"),
    tfds_source(f"{prepared}/tiny_captions"), tfds_source(f"{prepared}/tiny_captions", split="test"))]
  assert len(set(prints)) == len(prints) and all(len(p) == 16 and int(p, 16) >= 0 for p in prints)
