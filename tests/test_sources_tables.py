"""What users have: tars, Parquet, saved data sets, lines of JSON and mixtures, whole, damaged and hostile."""

import io
import itertools
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from limber_jax.config import Data, Source, Tokenizer
from limber_jax.data import pipeline, transforms
from limber_jax.data.guess import guess
from limber_jax.data.packing import pack
from limber_jax.data.sources import tars
from limber_jax.data.sources.mixture import Mixture
from limber_jax.data.sources.packed import from_bytes, to_bytes
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.runtime import parallel
from limber_jax.training.loop import train
from tests import layouts
from tests.runs import losses, tiny

RECORDS = layouts.digits(120)


def opened(name, path, **fields):
  return Source(name, str(path), **fields).open()


def texts(source):
  return [source.annotation(i)["text"] for i in range(len(source))]


def contents(source):
  """Returns all records, without their ids."""
  return [{k: v for k, v in source[i].items() if k != "id"} for i in range(len(source))]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The same 120 digits in every layout: {name: (source, path)}."""
  root = tmp_path_factory.mktemp("layouts")
  layouts.write_webdataset(root / "tar", RECORDS, 50, "png")
  layouts.write_img2dataset_parquet(root / "img2dataset", RECORDS, 50)
  layouts.write_hub_parquet(root / "hub", {"train": RECORDS, "test": RECORDS[:7]})
  layouts.write_saved(root / "saved", RECORDS, shards=3, batch=7)
  layouts.write_saved_splits(root / "splits", {"train": RECORDS, "test": RECORDS[:7]})
  found = {
    "tar": ("webdataset", root / "tar"), "img2dataset": ("parquet", root / "img2dataset"),
    "hub": ("parquet", root / "hub"), "saved": ("huggingface", root / "saved"),
    "splits": ("huggingface", root / "splits"), "tsv": ("captions", layouts.write_tsv(root / "tsv", RECORDS)),
    "jsonl": ("jsonl", layouts.write_jsonl(root / "jsonl", RECORDS))}
  pack(Source("webdataset", str(root / "tar")), str(root / "packed"), per_shard=50, log=lambda _: None)
  return found | {"packed": ("packed", root / "packed")}


LAYOUTS = ("tar", "img2dataset", "hub", "saved", "splits", "tsv", "jsonl", "packed")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_records_to_the_bit(written, layout):
  source = opened(*written[layout])
  assert contents(source) == [{"text": r["text"], "image": r["image"]} for r in RECORDS]
  assert len({source[i]["id"] for i in range(len(source))}) == len(RECORDS)
  assert not getattr(source, "damage", [])
  with ThreadPoolExecutor(8) as threads:
    assert list(threads.map(lambda i: source[i]["image"], range(119, -1, -1))) == [r["image"] for r in RECORDS[::-1]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_path_holds_is_seen_from_it(written, layout):
  name, path = written[layout]
  assert guess(str(path)) == name


def test_losses_are_bit_equal_from_every_layout(written, tmp_path, monkeypatch):
  make = parallel.make_mesh
  monkeypatch.setattr(parallel, "make_mesh", lambda sizes: make(sizes, jax.devices()[:1]))
  found = {}
  for layout in ("tar", "img2dataset", "tsv", "packed"):
    name, path = written[layout]
    config = tiny(steps=3, data=Data(source=Source(name, str(path)), tokenizer=Tokenizer(name="bytes"), threads=2))
    train(config, str(tmp_path / layout), log=lambda _: None)
    found[layout] = losses(str(tmp_path / layout))
  assert len(found["tar"]) == 3 and all(f == found["tar"] for f in found.values()), found
  assert len({opened(*written[layout]).fingerprint() for layout in found}) == len(found)


# Tars

def add(tar, name, data=b"", **fields):
  member = tarfile.TarInfo(name)
  member.size = len(data)
  for key, value in fields.items():
    setattr(member, key, value)
  tar.addfile(member, io.BytesIO(data))


def test_headers_are_read_as_tarfile_reads_them(tmp_path):
  rng = np.random.default_rng(0)
  for format, trial in itertools.product((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT), range(20)):
    path = tmp_path / f"{format}-{trial}.tar"
    with tarfile.open(path, "w", format=format) as tar:
      for i in range(rng.integers(1, 12)):
        name = "".join(rng.choice(list("ab.ü "), rng.integers(1, 9))).strip() + f"x{i}.jpg"
        name = "/".join(["d" * int(rng.integers(1, 60))] * int(rng.integers(0, 3)) + [name])
        add(tar, name, rng.bytes(int(rng.integers(0, 2000))))
        if rng.random() < 0.3:
          add(tar, f"folder{i}", type=tarfile.DIRTYPE)
    with tarfile.open(path) as tar:
      wanted = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    got = list(tars.members(path.read_bytes()))
    assert [(m.name.decode(), m.start, m.size) for m in got] == wanted
    assert not any(m.flaw for m in got)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_that_was_cut_off_anywhere_is_named_at_start(tmp_path, indexed):
  layouts.write_webdataset(tmp_path, RECORDS[:20], suffix="png")
  whole = (tmp_path / "00000.tar").read_bytes()
  opened("webdataset", tmp_path)
  contents_end = max(m.start + m.size for m in tars.members(whole))
  rng, found = np.random.default_rng(0), 0
  cuts = [*rng.integers(0, len(whole), 200).tolist(), *range(contents_end - 3, contents_end + 3), len(whole) - 1]
  cuts = cuts if indexed else [c for c in cuts if c < contents_end]  # later on only zeros are lost
  for cut in cuts:
    (tmp_path / "00000.tar").write_bytes(whole[:cut])
    if not indexed:
      os.remove(tmp_path / "00000.tar.index")
    with pytest.raises(UserError, match=r"1 of 1 tars cannot be used: .*00000\.tar") as caught:
      opened("webdataset", tmp_path)
    assert "\n" not in str(caught.value)
    found += 1
    if not indexed:
      (tmp_path / "00000.tar").write_bytes(whole)
      opened("webdataset", tmp_path)
  assert found == len(cuts) > 150
  print(f"R20: {found} of {len(cuts)} short tars named at start")


def second_header(data, block):
  start = list(tars.members(data))[1].header
  return data[:start] + block + data[start + 512 :]


@pytest.mark.parametrize(("change", "message"), [
  (lambda data: data + data, "there is more behind its end"),
  (lambda data: b"\x1f\x8b" + data, "unpack it with gunzip"),
  (lambda data: b"", "an empty file"),
  (lambda data: second_header(data, bytes(512)), "there is more behind its end"),  # zeros look like an end
  (lambda data: second_header(data, b"\xff" * 512), "no header of a tar"),
])
def test_what_is_no_whole_tar_is_reported_with_the_byte(tmp_path, change, message):
  layouts.write_webdataset(tmp_path, RECORDS[:3], suffix="png")
  data = (tmp_path / "00000.tar").read_bytes()
  (tmp_path / "00000.tar").write_bytes(change(data))
  with pytest.raises(UserError, match=message):
    opened("webdataset", tmp_path)


ESCAPES = [
  "../x.jpg", "../../x.jpg", "a/../../x.jpg", "a/../x.jpg", "..", "/x.jpg", "//x.jpg", "/etc/x.jpg", "/tmp/x.jpg",
  "..\\x.jpg", "a\\..\\..\\x.jpg", "\\x.jpg", "\\\\host\\x.jpg", "C:/x.jpg", "C:\\x.jpg", "c:x.jpg", "x\0.jpg",
  "x.jpg\0../y", "\0", "a/\0/x.jpg", "l" * 300 + ".jpg", "d/" * 200 + "x.jpg", "n" * 100_000, "ü" * 150 + ".jpg",
  "./../x.jpg", "a/./../../x.jpg", "a//../../x.jpg", "../", "a/..", "~/../x.jpg",
]
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE,
         b"V", b"M", b"Z", b"A"]


def test_links_devices_and_names_that_lead_out_are_named_and_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  os.mkdir("data")
  with tarfile.open("data/00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
    for name in ESCAPES:
      # As a pax header has it, which alone may hold any name: tarfile itself would cut it at a NUL.
      record = f" path={name}\n".encode()
      length = next(n for n in itertools.count(len(record)) if len(str(n)) + len(record) == n)
      add(tar, "pax", str(length).encode() + record, type=b"x")
      member = tarfile.TarInfo("plain.jpg")
      member.size = 4
      tar.fileobj.write(member.tobuf(tarfile.USTAR_FORMAT) + b"evil" + bytes(508))
      tar.offset = tar.fileobj.tell()
    for i, kind in enumerate(KINDS):
      add(tar, f"kind{i}.jpg", type=kind, linkname="/etc/passwd")
    for record in RECORDS[:2]:
      add(tar, f"{record['key']}.png", record["image"])
      add(tar, f"{record['key']}.txt", record["text"].encode())
  source = opened("webdataset", "data")
  assert len(ESCAPES) + len(KINDS) == 40 == len(source.damage)
  assert all(len(d["id"]) < 400 and d["id"].isprintable() and d["reason"] for d in source.damage)
  assert contents(source) == [{"text": r["text"], "image": r["image"]} for r in RECORDS[:2]]
  assert sorted(os.listdir("data")) == ["00000.tar", "00000.tar.index"] and os.listdir() == ["data"]
  print("S4: 40 of 40 names refused, 0 bytes written but for the index")


def tar_of(folder, *members):
  folder.mkdir(exist_ok=True)
  with tarfile.open(folder / "a.tar", "w") as tar:
    for name, data in members:
      add(tar, name, data if isinstance(data, bytes) else data.encode())
  return folder


def test_captions_come_from_txt_or_json_and_there_may_be_several(tmp_path):
  image = RECORDS[0]["image"]
  folder = tar_of(tmp_path / "a", ("x/1.JPG", image), ("x/1.txt", "plain\n"), ("x/1.json", '{"caption": "no", "n": 3}'),
                  ("x/2.webp", image), ("x/2.json", '{"caption": ["one", "two"], "n": 0, "other": "o"}'))
  source = opened("webdataset", folder)
  assert [source.annotation(i) for i in range(2)] == [
    {"id": "a/x/1", "text": "plain"}, {"id": "a/x/2", "text": "one", "texts": ("one", "two")}]
  source = opened("webdataset", folder, text_key="caption", label_key="n")
  assert [(source[i]["text"], source[i]["label"]) for i in range(2)] == [("no", 3), ("one", 0)]
  with pytest.raises(UserError, match=r"a\.tar: x/1: \.json: no 'other'"):
    opened("webdataset", folder, text_key="other")[0]


def test_what_a_key_lacks_or_has_twice_is_damage(tmp_path):
  image = RECORDS[0]["image"]
  source = opened("webdataset", tar_of(
    tmp_path / "a", ("1.jpg", image), ("2.txt", "alone"), ("3.jpg", image), ("3.txt", "first"), ("3.txt", "second"),
    ("._3.jpg", b"AppleDouble"), ("readme", b"")))
  assert texts(source) == ["first"]
  assert {d["id"]: d["reason"] for d in source.damage} == {
    "1": "no caption (.txt, .caption or .json)", "2": "no image (.jpg …)",
    "3.txt": "it is there twice, and the first counts"}
  assert opened("webdataset", tmp_path / "a").damage == source.damage  # from the index


@pytest.mark.parametrize(("name", "data", "message"), [
  ("1.txt", "x" * 10_000, "caption of 10,000 characters"), ("1.txt", b"\xff", "not UTF-8"),
  ("1.txt", " \n", "empty caption"), ("1.txt", "x" * 70_000, "at most 65,536"),
  ("1.json", "[" * 100_000, "not JSON"), ("1.json", '{"caption": 3}', "caption is of type int"),
  ("1.json", '{"caption": []}', "an empty list"), ("1.json", '{"x": ' + "9" * 10_000 + "}", "not JSON"),
  ("1.json", '{"titel": "x"}', r"\.json: no 'caption'"),
  ("1.json", '{"a": "' + "x" * 2**20 + '"}', "at most 1,048,576"),
  ("1.json", '{"caption": "\\ud800"}', "half a character"),
])
def test_a_caption_beyond_bounds_is_refused_with_its_tar_and_key(tmp_path, name, data, message):
  source = opened("webdataset", tar_of(tmp_path / "a", ("1.jpg", RECORDS[0]["image"]), (name, data)))
  with pytest.raises(UserError, match=rf"a\.tar: 1: .*{message}"):
    source[0]


def test_an_index_is_made_once_and_again_where_it_is_damaged(tmp_path, monkeypatch):
  layouts.write_webdataset(tmp_path, RECORDS[:10], 5, "png")
  source = opened("webdataset", tmp_path)
  records, index = contents(source), tmp_path / "00001.tar.index"
  whole, made = index.read_bytes(), os.stat(index).st_mtime_ns
  assert opened("webdataset", tmp_path).fingerprint() == source.fingerprint() and os.stat(index).st_mtime_ns == made
  found = 0
  for bit in np.random.default_rng(0).integers(0, len(whole) * 8, 300).tolist():
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    index.write_bytes(data)
    again = opened("webdataset", tmp_path)  # a header that does not fit is made again
    for i in range(5, 10):
      try:
        assert again[i]["image"] == RECORDS[i]["image"]
      except UserError as error:
        assert "00001.tar.index: damaged" in str(error)
        found += 1
  assert found > 200
  index.unlink()
  monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
  held = opened("webdataset", tmp_path)
  assert sorted(os.listdir(tmp_path)) == ["00000.tar", "00000.tar.index", "00001.tar"]
  assert contents(pickle.loads(pickle.dumps(held))) == records
  assert held.fingerprint() == source.fingerprint()


def test_a_tar_of_the_same_size_that_is_another_is_named_when_it_is_read(tmp_path):
  layouts.write_webdataset(tmp_path, RECORDS[:5], suffix="png")
  opened("webdataset", tmp_path)
  data = (tmp_path / "00000.tar").read_bytes().replace(b"000000002.png", b"00000000X.png")
  (tmp_path / "00000.tar").write_bytes(data)
  source = opened("webdataset", tmp_path)
  with pytest.raises(UserError, match="not the header of 000000002"):
    source[2]
  assert source[1]["text"] == RECORDS[1]["text"]


def test_paths_may_be_patterns(tmp_path):
  layouts.write_webdataset(tmp_path, RECORDS[:40], 10, "png")
  for pattern, count in (("*.tar", 40), ("0000[01].tar", 20), ("{00001..00003}.tar", 30), ("0000{0,3}.tar", 20),
                         ("00002.tar", 10)):
    assert len(opened("webdataset", tmp_path / pattern)) == count
  for pattern, message in (("{00002..00009}.tar", "00004.tar.* of this pattern"), ("{0..999999999}.tar", "1,000,000"),
                           ("x*.tar", "no such file"), ("{5..1}.tar", "stands for"), ("", "is a directory|no .tar")):
    with pytest.raises(UserError, match=message):
      opened("webdataset", tmp_path / pattern if pattern else tmp_path / "..", split="")
  for path in ("https://example.com/{0..9}.tar", "pipe:curl x"):
    with pytest.raises(UserError, match="no path of local files"):
      opened("webdataset", path)
  with pytest.raises(UserError, match="no such folder"):
    opened("webdataset", tmp_path, split="val")


# Parquet

def test_rows_that_img2dataset_could_not_download_are_left_out_and_counted(tmp_path):
  layouts.write_img2dataset_parquet(tmp_path, RECORDS, 50, failed=3)
  source = opened("parquet", tmp_path)
  assert contents(source) == [{"text": r["text"], "image": r["image"]} for r in RECORDS]
  assert [d["reason"] for d in source.damage] == [f"3 of {n} were not downloaded" for n in (53, 53, 23)]


def test_img2datasets_tables_without_images_lead_to_where_the_images_are(tmp_path):
  layouts.write_img2dataset_parquet(tmp_path, RECORDS[:5])
  table = pq.read_table(tmp_path / "00000.parquet").drop(["jpg"])
  pq.write_table(table, tmp_path / "00000.parquet")
  with pytest.raises(UserError, match="no images in it; nor a folder"):
    opened("parquet", tmp_path)
  (tmp_path / "00000.tar").touch()
  with pytest.raises(UserError, match="read these, with source"):
    opened("parquet", tmp_path)
  (tmp_path / "00000").mkdir()
  for record in RECORDS[:4]:
    (tmp_path / "00000" / f"{record['key']}.jpg").write_bytes(record["image"])
  source = opened("parquet", tmp_path)
  assert [source[i]["image"] for i in range(4)] == [r["image"] for r in RECORDS[:4]]
  with pytest.raises(UserError, match=r"row 4: no image '000000004\.jpg'"):
    source[4]


CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight_nine", "eight_nine_")


@pytest.mark.parametrize("name", ["parquet", "huggingface"])
def test_the_hubs_splits_several_captions_and_classes_are_read(tmp_path, name):
  several = [r | {"texts": (r["text"], f"again {r['key']}")} for r in RECORDS[:20]]
  write = layouts.write_hub_parquet if name == "parquet" else layouts.write_saved_splits
  write(tmp_path / "a", {"train": several, "test": several[:3]}, classes=CLASSES, shards=2)
  source = opened(name, tmp_path / "a", split="test")
  assert len(source) == 3 and len(opened(name, tmp_path / "a")) == 20 and source.classes == CLASSES
  found = sorted((source[i] for i in range(3)), key=lambda r: r["texts"][1])
  assert [(r["texts"], r["label"]) for r in found] == [(r["texts"], r["label"]) for r in several[:3]]
  with pytest.raises(UserError, match="did you mean 'train'"):
    opened(name, tmp_path / "a", split="trian")
  with pytest.raises(UserError, match="did you mean 'caption'"):
    opened(name, tmp_path / "a", text_key="captoin")


def test_parquet_of_texts_alone_and_of_paths(tmp_path):
  pq.write_table(pa.table({"text": ["long " * 5000, "b"]}), tmp_path / "t.parquet")
  source = opened("parquet", tmp_path / "t.parquet")
  assert source[0] == {"id": "t/0", "text": "long " * 5000}
  layouts.write_tsv(tmp_path, RECORDS[:2])
  names = [f"{RECORDS[0]['key']}.png", "../x.png"]
  pq.write_table(pa.table({"image_path": names, "caption": ["a", "b"]}), tmp_path / "p.parquet")
  source = opened("parquet", tmp_path / "p.parquet")
  assert source[0]["image"] == RECORDS[0]["image"]
  with pytest.raises(UserError, match=r"row 1: .*lies outside"):
    source[1]


@pytest.mark.parametrize(("columns", "message"), [
  ({"jpg": [b"x"]}, "no column of captions such as caption"), ({"n": [1]}, "it has no texts"),
])
def test_parquet_of_other_columns_is_reported(tmp_path, columns, message):
  pq.write_table(pa.table(columns), tmp_path / "a.parquet")
  with pytest.raises(UserError, match=message) as caught:
    opened("parquet", tmp_path)
  assert "\n" not in str(caught.value)


def test_a_file_of_other_columns_than_the_first_is_named(tmp_path):
  layouts.write_img2dataset_parquet(tmp_path, RECORDS[:10], 5)
  pq.write_table(pq.read_table(tmp_path / "00001.parquet").drop(["jpg"]), tmp_path / "00001.parquet")
  with pytest.raises(UserError, match=r"1 of 2 files cannot be used: .*00001\.parquet: column 'jpg'"):
    opened("parquet", tmp_path)


# Saved data sets

def test_a_saved_file_that_was_cut_off_anywhere_is_named_at_start(tmp_path):
  layouts.write_saved(tmp_path / "a", RECORDS[:30], batch=5)
  path = tmp_path / "a" / "data-00000-of-00001.arrow"
  whole = path.read_bytes()
  for cut in np.random.default_rng(0).integers(0, len(whole), 100).tolist():
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"1 of 1 files cannot be used: .*data-00000"):
      opened("huggingface", tmp_path / "a")
  path.unlink()
  with pytest.raises(UserError, match="data-00000"):
    opened("huggingface", tmp_path / "a")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "a/../../x", "x\0", 3])
def test_a_saved_data_set_reads_no_files_but_its_own(tmp_path, name):
  layouts.write_saved(tmp_path / "a", RECORDS[:3])
  (tmp_path / "a" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_split": None}))
  with pytest.raises(UserError, match="wanted names of files beside it"):
    opened("huggingface", tmp_path / "a")


# Lines

def test_lines_of_text_alone_train_a_language_model(tmp_path):
  rows = [{"text": "ab"}, {"text": "word " * 9000}, {"id": 4, "text": "ü"}]
  (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\r\n" for r in rows))
  source = opened("jsonl", tmp_path / "a.jsonl")
  assert [source[i]["text"] for i in range(3)] == [r["text"] for r in rows] and "image" not in source[0]
  transform = transforms.captioning({}, ByteTokenizer(), 5, start=True)
  assert transform(source[0], None)["tokens"].tolist() == [258, 98, 99, 258, 258]


def test_broken_lines_are_named_and_the_others_are_read(tmp_path):
  layouts.write_tsv(tmp_path, RECORDS[:1])
  good = json.dumps({"image": f"{RECORDS[0]['key']}.png", "caption": "c"})
  bad = ["{", "[1]", '{"image": "a.png"}', "[" * 100_000, '{"caption": ""}', '{"caption": 3}',
         '{"image": 3, "text": "x"}', '{"image": "../a.png", "text": "x"}',
         '{"image": "missing.png", "text": "x"}', '{"text": "\\ud800"}', "\xff",
         '{"image": "a\\u0000", "text": "x"}', '{"text": "' + "x" * 2**20 + '"}',
         '{"image": "a", "text": "' + "x" * 10_000 + '"}']
  data = "\n".join([good, "", *bad, good]).encode("latin-1")
  (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + data)
  source = opened("jsonl", tmp_path / "a.jsonl")
  assert len(source) == len(bad) + 2 and source[0]["image"] == source[len(bad) + 1]["image"] == RECORDS[0]["image"]
  for i in range(1, len(bad) + 1):
    with pytest.raises(UserError, match=rf"a\.jsonl, line {i + 1}: ") as caught:
      source[i]
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


# Mixtures

def mixture(folder, *members):
  (folder / "mix.json").write_text(json.dumps({"sources": list(members)}))
  return Mixture(Source("mixture", str(folder / "mix.json")))


@pytest.fixture
def lines(tmp_path):
  """Files of lines; each line is its file's name and its number."""

  def write(name, count):
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count)))
    return {"name": "jsonl", "path": f"{name}.jsonl"}

  return write


def test_shares_are_exact_in_every_window_and_members_are_permuted_each_on_its_own(tmp_path, lines):
  sizes, weights = {"a": 50, "b": 7, "c": 7}, (6, 2, 4)
  source = mixture(tmp_path, *(lines(n, s) | {"weight": w} for (n, s), w in zip(sizes.items(), weights, strict=True)))
  assert len(source) == 64 and len({source[i]["id"] for i in range(64)}) == 64
  stream = [source.annotation(source.shuffled_index(5, p))["text"] for p in range(1200)]
  for start in range(300):
    for rounds in (1, 3):
      window = stream[start : start + 6 * rounds]
      assert Counter(t[0] for t in window) == {"a": 3 * rounds, "b": rounds, "c": 2 * rounds}
  epochs = {}
  for name, size in sizes.items():
    own = [t for t in stream if t[0] == name]
    for i in range(0, len(own) - size + 1, size):
      assert len(set(own[i : i + size])) == size
    epochs[name] = [[int(t[1:]) for t in own[i : i + size]] for i in range(0, 2 * size, size)]
    assert epochs[name][0] != epochs[name][1]
  assert epochs["b"] != epochs["c"]
  start = time.perf_counter()
  source.shuffled_index(5, 10**15)
  assert time.perf_counter() - start < 1
  assert stream != [source.annotation(source.shuffled_index(6, p))["text"] for p in range(1200)]


@pytest.mark.long
def test_a_million_positions_of_a_mixture_have_exact_shares_and_each_record_once_an_epoch(tmp_path, lines):
  sizes, weights = (300_000, 20_011, 7), (13, 6, 1)
  source = mixture(tmp_path, *(lines(n, s) | {"weight": w} for n, s, w in zip("abc", sizes, weights, strict=True)))
  starts, stream = np.cumsum([0, *sizes]), np.array([source.shuffled_index(9, p) for p in range(1_000_000)])
  member = np.searchsorted(starts, stream, "right") - 1
  for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
    assert (np.add.reduceat(member == number, np.arange(0, 1_000_000, 20)) == weight).all()
    own = stream[member == number] - starts[number]
    assert len(own) == 50_000 * weight
    for i in range(0, len(own) - size + 1, size):
      assert np.array_equal(np.sort(own[i : i + size]), np.arange(size))
  assert (np.bincount(stream[member == 2] - starts[2]) >= 50_000 // 7).all()
  print("R21: shares of 13, 6 and 1 exact in each of 50,000 rounds of 20")


def test_batches_of_a_mixture_keep_its_shares_on_any_hosts(tmp_path, lines):
  source = mixture(tmp_path, lines("a", 50) | {"weight": 3}, lines("b", 7) | {"weight": 1})
  transform = transforms.captioning({}, ByteTokenizer(), 5)

  def batches(rows, start=0):
    with pipeline.train_batches(source, transform, batch_size=8, rows=rows, seed=3, start_step=start,
                                threads=0) as found:
      return [next(found)["index"] for _ in range(10)]

  whole = batches(np.arange(8))
  assert all((b < 50).sum() == 6 for b in whole)
  assert np.concatenate(whole).tolist() == [source.shuffled_index(3, p) for p in range(80)]
  halves = zip(batches(np.arange(4)), batches(np.arange(4, 8)), strict=True)
  assert [np.concatenate(h).tolist() for h in halves] == [b.tolist() for b in whole]
  np.testing.assert_array_equal(batches(np.arange(8), start=4)[:6], whole[4:])


def test_a_mixture_has_classes_where_all_members_have_the_same(tmp_path, lines):
  digits = {"name": "digits", "split": "test", "weight": 1}
  source = mixture(tmp_path, digits, digits | {"split": "train"})
  assert source.classes and source[0]["label"] in range(10) and len(source) == 1797
  source = mixture(tmp_path, digits, lines("a", 3) | {"weight": 1})
  assert source.classes is None and "label" not in source[0] and source[360]["text"] == "a0"


@pytest.mark.parametrize(("entry", "message"), [
  ({"name": "jsonl"}, "no 'weight'"), ({"name": "jsonl", "weight": 0}, "weight=0"), ({"weight": 1}, "no 'name'"),
  ({"name": "jsnl", "weight": 1}, "did you mean 'jsonl'"), ({"name": "mixture", "weight": 1}, "a mixture in a mixture"),
  ({"name": "jsonl", "weight": 1, "pth": "x"}, "did you mean 'path'"), ({"name": "jsonl", "weight": True}, "'weight'"),
  ({"name": "jsonl", "weight": 1, "path": "none.jsonl"}, "source 0: .*no such file"),
  ({"name": "jsonl", "weight": 1, "path": 3}, "path: expected str, got 3"),
  ({"name": "digits", "weight": 1, "pairs": 1}, "pairs: expected bool, got 1"),
  ({"name": "digits", "weight": 1, "path": "x"}, "'digits' has no field 'path'; known: name, pairs, split"),
])
def test_a_mixture_that_does_not_fit_is_reported(tmp_path, entry, message):
  with pytest.raises(UserError, match=message):
    mixture(tmp_path, entry)


# Packed records

def test_every_flipped_bit_of_a_packed_record_is_found():
  data = to_bytes({"id": "x", "text": "ü", "texts": ("ü", "b"), "label": 3, "image": RECORDS[0]["image"]})
  assert from_bytes(data)["texts"] == ("ü", "b") and from_bytes(data)["image"] == RECORDS[0]["image"]
  for bit in range(len(data) * 8):
    broken = bytearray(data)
    broken[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UserError, match="checksum"):
      from_bytes(bytes(broken))
  print(f"R19: {len(data) * 8:,} of {len(data) * 8:,} single flipped bits found by the record's checksum")


@pytest.fixture
def packed(written, tmp_path):
  shutil.copytree(written["packed"][1], tmp_path / "packed")
  return tmp_path / "packed"


def test_no_flipped_bit_of_a_packed_file_gives_another_record(packed):
  path = packed / "records-00002-of-00003.array_record"
  whole, wanted = path.read_bytes(), RECORDS[100:]
  rng, damaged = np.random.default_rng(0), 0
  for _ in range(400):
    data = bytearray(whole)
    bit = int(rng.integers(len(data) * 8))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    try:
      source = opened("packed", packed)
    except UserError as error:
      assert "records-00002" in str(error)
      damaged += 1
      continue
    for i, record in enumerate(wanted):
      try:
        found = source[100 + i]
        assert (found["image"], found["text"]) == (record["image"], record["text"])
      except UserError as error:
        assert f"records-00002-of-00003.array_record, record {i}: " in str(error)
        damaged += 1
    assert [d["file"] for d in source.changed()] == [path.name]  # padding too
  assert damaged > 50


def test_a_packed_shard_that_is_short_missing_or_another_is_named_at_start(packed):
  path = packed / "records-00001-of-00003.array_record"
  whole = path.read_bytes()
  for cut in np.random.default_rng(0).integers(0, len(whole), 200).tolist():
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"1 of 3 shards are not as packed: .*records-00001.*50 records in"):
      opened("packed", packed)
  path.write_bytes(bytes(len(whole)))
  with pytest.raises(UserError, match="records-00001"):
    opened("packed", packed)
  path.unlink()
  with pytest.raises(UserError, match=r"records-00001.* is missing"):
    opened("packed", packed)


@pytest.mark.parametrize(("change", "message"), [
  (lambda m: m | {"kind": "features"}, "wanted 'limber_jax pack'"), (lambda m: m | {"version": 9}, "of version 9"),
  (lambda m: m | {"records": 3}, "wanted 3 records, got 120"), (lambda m: m | {"shards": []}, "a list of 'shards'"),
  (lambda m: m | {"shards": [m["shards"][0] | {"file": "../x"}]}, "a shard that is none"),
])
def test_a_manifest_that_does_not_fit_is_reported(packed, change, message):
  path = packed / "manifest.json"
  path.write_text(json.dumps(change(json.loads(path.read_text()))))
  with pytest.raises(UserError, match=message):
    opened("packed", packed)


# Bombs and mutations

def png_bomb(side):
  """Returns a whole PNG of side × side grey pixels, all zero: about a thousandth of what it takes unpacked."""
  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  pack_, out, rows = zlib.compressobj(1), b"", bytes((side + 1) * 100)
  for _ in range(side // 100):
    out += pack_.compress(rows)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
          + chunk(b"IDAT", out + pack_.flush()) + chunk(b"IEND", b""))


BOMBS = """if True:
  import os, resource, sys, time, warnings
  warnings.simplefilter("ignore")
  from limber_jax.runtime import parallel
  from limber_jax.config import Source
  from limber_jax.data.transforms import decode
  from limber_jax.errors import UserError
  source = Source(sys.argv[1], sys.argv[2]).open()
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
  for i in range(len(source)):
    before, start = peak(), time.perf_counter()
    try:
      decode(source[i]["image"])
      print("read", end=" ")
    except UserError as error:
      print("refused", end=" ")
    print(round(time.perf_counter() - start, 3), peak() - before)
"""


@pytest.mark.process
def test_bombs_are_refused_in_two_seconds_and_256_megabytes(tmp_path):
  gif = io.BytesIO()
  frames = [layouts.Image.new("P", (1000, 1000), i) for i in range(20)]
  frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
  webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8L" + struct.pack("<I", 9) + b"\x2f" + struct.pack(
    "<I", 16382 | 16382 << 14) + bytes(5)
  images = {"png9000": png_bomb(9000), "png13000": png_bomb(13000), "png14000": png_bomb(14000), "gif": gif.getvalue(),
            "webp": webp, "fits": b"SIMPLE  =                    T" + bytes(10**6), "large": b"\xff\xd8\xff" + bytes(
              30_000_000), "zip": b"PK\x03\x04" + bytes(10**6), "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}
  rows = []
  for name, data in images.items():
    (tmp_path / f"{name}.png").write_bytes(data)
    rows.append(json.dumps({"image": f"{name}.png", "text": name}))
  rows += ["[" * 100_000, '{"a":' * 100_000, '{"text": ' + "9" * 10**6 + "}", '{"text": "' + "x" * (50 << 20) + '"}']
  (tmp_path / "a.jsonl").write_text("\n".join(rows))
  with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
    add(tar, "n" * (50 << 20) + ".jpg", b"x")
    for name, data in images.items():
      add(tar, f"{name}.png", data)
      add(tar, f"{name}.txt", b"caption")
  for name, file, count in (("jsonl", "a.jsonl", len(rows)), ("webdataset", "a.tar", len(images))):
    out = subprocess.run([sys.executable, "-c", BOMBS, name, str(tmp_path / file)], capture_output=True, text=True,
                         check=True).stdout.splitlines()
    assert len(out) == count
    worst = max(float(line.split()[1]) for line in out), max(int(line.split()[2]) for line in out)
    assert {line.split()[0] for line in out} == {"refused"} and worst[0] < 2 and worst[1] < 256, out
    print(f"S3: {count} bombs by {name} refused, at most {worst[0]} s and {worst[1]} MB each")


MUTATED = ("webdataset", "parquet", "huggingface", "jsonl")


def mutate(name, folder, seeds):
  """Opens and reads `name` with one file damaged by each seed; returns what happened, by its kind."""
  write = {"webdataset": lambda f: layouts.write_webdataset(f, RECORDS[:8], suffix="png") / "00000.tar",
           "parquet": lambda f: layouts.write_img2dataset_parquet(f, RECORDS[:8]) / "00000.parquet",
           "huggingface": lambda f: layouts.write_saved(f, RECORDS[:8], batch=3) / "data-00000-of-00001.arrow",
           "jsonl": lambda f: layouts.write_jsonl(f, RECORDS[:8])}[name]
  file = write(folder / name)
  whole, counts = file.read_bytes(), Counter()
  for seed in seeds:
    rng = np.random.default_rng(seed)
    data = bytearray(whole)
    match rng.integers(4):
      case 0:
        del data[int(rng.integers(len(data))) :]
      case 1:
        for place in rng.integers(0, len(data), rng.integers(1, 20)):
          data[place] = rng.integers(256)
      case 2:
        start = int(rng.integers(len(data)))
        del data[start : start + int(rng.integers(1, 600))]
      case 3:
        start = int(rng.integers(len(data)))
        data[start : start + 64] = rng.bytes(64)
    file.write_bytes(data)
    (file.parent / f"{file.name}.index").unlink(missing_ok=True)
    path = file if name == "jsonl" else file.parent
    try:
      source = opened(name, path)
    except UserError as error:
      assert "\n" not in str(error) and (file.name in str(error) or str(path) in str(error)), error
      counts["at start"] += 1
      continue
    flawed = bool(getattr(source, "damage", []))
    for i in range(len(source)):
      try:
        transforms.Decode()(source[i], None)
      except UserError as error:
        assert "\n" not in str(error), error
        flawed = True
    counts["a record" if flawed else "nothing"] += 1
  return counts


@pytest.mark.parametrize("name", MUTATED)
def test_damaged_files_are_refused_or_read_and_never_anything_else(tmp_path, name):
  start = time.perf_counter()
  counts = mutate(name, tmp_path, range(150))
  assert counts["at start"] + counts["a record"] > 15
  print(f"R19: {name}: {dict(counts)} of 150 mutated files, {time.perf_counter() - start:.1f} s")


@pytest.mark.long
@pytest.mark.parametrize("name", MUTATED)
def test_2500_damaged_files_of_each_layout_end_no_process(tmp_path, name):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  counts = mutate(name, tmp_path, range(1000, 3500))
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
  assert sum(counts.values()) == 2500 and grown < 1024
  print(f"R19: {name}: {dict(counts)} of 2,500 mutated files, {grown} MB more memory")
