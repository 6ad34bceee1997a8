"""Inspection: metrics counted by hand, damage by its reason, and the contact sheet."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Source
from limber_jax.data.inspection import _kind, contact_sheet, inspect, lines
from limber_jax.data.packing import pack
from limber_jax.errors import UserError
from tests import layouts, standins


@pytest.fixture
def table(tmp_path):
  """Nine images of widths 10, 20 … 90 with captions of 1, 2 … 9 letters; a tenth and an eleventh are no images."""
  records = [{"key": str(i), "image": layouts.jpeg(10 * i, 7, i, "PNG" if i == 1 else "JPEG"), "text": "x" * i}
             for i in range(1, 10)]
  records += [{"key": str(i), "image": b"GIF89a", "text": "y"} for i in (10, 11)]
  return layouts.write_tsv(tmp_path / "table", records)


def opened(name, path):
  return Source(name, str(path)).open()


def test_figures_are_those_counted_by_hand(table):
  told, looks = inspect(opened("captions", table))
  assert told["records"] == told["looked_at"] == 11 and told["unreadable"] == 2
  assert told["formats"] == {"JPEG": 8, "PNG": 1}
  assert told["width"] == [10, 50, 90] and told["height"] == [7, 7, 7]
  assert told["characters"] == [1, 5, 9] and told["captions"] == [1, 1, 1]
  assert [d["count"] for d in told["damage"]] == [2]
  assert told["damage"][0]["first"] == "record 9: image of 6 bytes cannot be decoded: not one of JPEG, PNG, WEBP"
  assert [found.index for found in looks] == list(range(9))
  said = list(lines(told, "captions x"))
  assert said[0] == "captions x: 11 records" and "width       10 to 90 pixels, median 50" in said
  assert "damage      2 of 11 records" in said


def test_a_sample_is_the_same_each_time_and_holds_no_record_twice(table):
  source, seen = opened("captions", table), []

  class Counted:
    classes = None

    def __len__(self):
      return len(source)

    def __getitem__(self, index):
      seen.append(index)
      return source[index]

  for _ in range(2):
    told, _ = inspect(Counted(), sample=6)
    assert told["looked_at"] == 6 and told["records"] == 11
  assert sorted(seen[:6]) == sorted(seen[6:]) and len(set(seen[:6])) == 6 and sorted(seen[:6]) != list(range(6))


def test_damage_that_differs_in_names_and_numbers_alone_counts_as_one_reason(tmp_path):
  (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": f"no{i}.png", "text": "x"}) + "\n" for i in range(5))
                                    + '{"text": "fine"}\n{\n')
  told, looks = inspect(opened("jsonl", tmp_path / "a.jsonl"))
  assert [d["count"] for d in told["damage"]] == [5, 1] and not looks and told["formats"] == {"no image": 1}
  assert "no image 'no0.png'" in told["damage"][0]["first"]
  assert list(lines(told, "x"))[-3].split()[0] == "5" and list(lines(told, "x"))[-1].startswith("         1  ")
  assert _kind("a/b.png: image of 1,234 bytes is 3 x 4.5: 'utf-8' codec, byte 0xff in utf-8 at 7") == (
    "image of N bytes is N x N: '…' codec, byte N in utf-8 at N")


def test_a_flipped_bit_of_a_packed_directory_is_found(tmp_path, table):
  pack(Source("captions", str(table)), str(tmp_path / "out"), damaged=0.5, log=lambda _: None)
  assert inspect(opened("packed", tmp_path / "out"))[0]["damage"] == []
  path = tmp_path / "out" / "records-00000-of-00001.array_record"
  data = bytearray(path.read_bytes())
  data[data.index(b"xxxxx")] ^= 1  # a caption
  path.write_bytes(data)
  told, _ = inspect(opened("packed", tmp_path / "out"))
  assert told["unreadable"] == told["found_at_opening"] == 1
  assert told["damage"][1]["first"] == f"{path.name}: shard: its SHA-256 is not that of the manifest"


def test_the_contact_sheet_shows_each_image_above_its_caption(tmp_path):
  records = [{"key": str(i), "image": layouts.jpeg(40, 30, i), "text": "many words " * 40} for i in range(60)]
  _, looks = inspect(opened("captions", layouts.write_tsv(tmp_path, records)))
  assert len(looks) == 48
  contact_sheet(looks, str(tmp_path / "sheet.png"))
  with Image.open(tmp_path / "sheet.png") as sheet:
    pixels = np.asarray(sheet.convert("L"), int)
  assert pixels.shape[1] == 8 * 168 + 8 and pixels.shape[0] == 6 * (160 + 8 + 42 + 8) + 8
  for place, found in enumerate(looks):
    left, top = place % 8 * 168 + 8, place // 8 * 218 + 8 + 40  # 160 × 120, at the bottom of its square
    wanted = np.asarray(found.small.convert("L"), int)
    np.testing.assert_array_equal(pixels[top : top + 120, left : left + 160], wanted)
    below = pixels[top + 120 : top + 166, left : left + 160]
    assert (below < 128).sum() > 100  # the caption …
    assert (pixels[top + 120 : top + 166, left + 160 : left + 168] == 255).all()  # … which stays below its image
  with pytest.raises(UserError, match="cannot be written"):
    contact_sheet(looks, str(tmp_path / "none" / "sheet.png"))


@pytest.mark.process
def test_the_command_prints_metrics_and_exits_1_where_there_is_damage(tmp_path, table):
  def run(*arguments):
    return subprocess.run([sys.executable, "-m", "limber_jax.inspect", *map(str, arguments)], capture_output=True,
                          text=True, check=False)

  done = run(table, f"--out={tmp_path}/sheet.png")
  assert done.returncode == 1 and done.stdout.startswith(f"captions {table}: 11 records\n"), done.stderr
  assert "2 of 11 records" in done.stdout and (tmp_path / "sheet.png").stat().st_size > 1000
  done = run("digits", "--json", "--out=", "--sample=20")
  assert done.returncode == 0 and json.loads(done.stdout)["looked_at"] == 20


RECORDS = layouts.digits(60)


def packed(folder):
  layouts.write_webdataset(folder / "tars", RECORDS, 25, "png")
  pack(Source("webdataset", str(folder / "tars")), str(folder / "packed"), per_shard=25, log=lambda _: None)
  return folder / "packed"


def mixture(folder):
  layouts.write_tsv(folder / "a", RECORDS[:20])
  layouts.write_jsonl(folder / "b", RECORDS[20:])
  sources = [{"weight": 3, "name": "captions", "path": "a/train.tsv"},
             {"weight": 1, "name": "jsonl", "path": "b/train.jsonl"}]
  (folder / "mixture.json").write_text(json.dumps({"sources": sources}))
  return folder / "mixture.json"


def texts(folder):
  (folder / "texts.jsonl").write_text("".join(json.dumps({"text": r["text"]}) + "\n" for r in RECORDS))
  return folder / "texts.jsonl"


def standin(write, **options):
  def written(folder):
    out = write(folder, **options)
    return out.path, f"--images={out.images}" if out.images else ""

  return written


# To (source, writer of 60 records; flags that the command needs).
LAYOUTS = {
  "img2dataset tars": ("webdataset", lambda f: layouts.write_webdataset(f / "t", RECORDS, 25, "png"), ""),
  "img2dataset parquet": ("parquet", lambda f: layouts.write_img2dataset_parquet(f / "p", RECORDS, 25), ""),
  "hub parquet": ("parquet", lambda f: layouts.write_hub_parquet(f / "h", {"train": RECORDS}, 2), ""),
  "datasets": ("huggingface", lambda f: layouts.write_saved(f / "s", RECORDS, shards=3, batch=7), ""),
  "table": ("captions", lambda f: layouts.write_tsv(f / "t", RECORDS), ""),
  "json lines": ("jsonl", lambda f: layouts.write_jsonl(f / "j", RECORDS), ""),
  "texts": ("jsonl", texts, ""), "packed": ("packed", packed, ""), "mixture": ("mixture", mixture, ""),
  "coco": ("coco", standin(standins.write_coco, count=60), ""),
  "karpathy": ("coco", standin(standins.write_karpathy, counts={"train": 6, "test": 60}), "--split=test"),
  "folders": ("folder", standin(standins.write_imagenet_folders, wnids=[f"n{i:08}" for i in range(15)]), ""),
  "tfds": ("tfds", standin(standins.write_tfds, count=60), "--split=test"),
}


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_counts_each_layout_exactly(layout, tmp_path):
  name, write, more = LAYOUTS[layout]
  path = write(tmp_path)
  path, images = path if isinstance(path, tuple) else (path, "")
  done = subprocess.run([sys.executable, "-m", "limber_jax.inspect", str(path), f"--source={name}", "--json", "--out=",
                         *filter(None, (images, more))], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  assert {k: found[k] for k in ("records", "looked_at", "unreadable", "found_at_opening")} == {
    "records": 60, "looked_at": 60, "unreadable": 0, "found_at_opening": 0}
