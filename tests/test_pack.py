"""Packing: what is written, what is dropped, and that workers and kills change nothing."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Source
from limber_jax.data.guess import guess
from limber_jax.data.packing import pack
from limber_jax.data.sources.packed import Packed
from limber_jax.data.transforms import decode
from limber_jax.errors import UserError
from limber_jax.runtime.lock import Lock
from tests import layouts


def quiet(line):
  del line


def digests(folder):
  """Returns the digest of each file, by its name."""
  return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))}


def images(count=12):
  """Returns records of JPEG, PNG and WebP files of several sizes."""
  out = []
  for i in range(count):
    format = ("JPEG", "PNG", "WEBP")[i % 3]
    out.append({"key": f"{i:05d}", "image": layouts.jpeg(40 + 9 * i, 30 + 5 * i, i, format), "text": f"picture {i}"})
  return out


@pytest.fixture
def tars(tmp_path):
  return Source("webdataset", str(layouts.write_webdataset(tmp_path / "tars", images(), 5)))


def test_images_stay_as_they_are_unless_they_are_shrunk(tmp_path, tars):
  pack(tars, str(tmp_path / "whole"), log=quiet)
  manifest = pack(tars, str(tmp_path / "small"), shrink=48, per_shard=5, log=quiet)
  whole, small = (Packed(Source("packed", str(tmp_path / name))) for name in ("whole", "small"))
  assert [whole[i]["image"] for i in range(12)] == [r["image"] for r in images()]
  assert [s["records"] for s in manifest["shards"]] == [5, 5, 2] and manifest["dropped"] == 0
  for i, record in enumerate(images()):
    found = small[i]["image"]
    with Image.open(io.BytesIO(record["image"])) as before, Image.open(io.BytesIO(found)) as after:
      if min(before.size) <= 48:
        assert found == record["image"]
        continue
      assert min(after.size) == 48 and max(after.size) == int(48 * max(before.size) / min(before.size))
      assert after.format == ("PNG" if before.format == "PNG" else "JPEG")
      wanted = np.asarray(before.convert("RGB").resize(after.size, Image.Resampling.BICUBIC), int)
    assert np.abs(decode(found) - wanted).mean() < (0.001 if i % 3 == 1 else 2)
  assert sum(min(decode(r["image"]).shape[:2]) > 48 for r in images()) > 6


def test_all_that_a_source_says_of_a_record_is_kept(tmp_path):
  pack(Source("digits", split="test"), str(tmp_path / "digits"), log=quiet)
  source = Source(split="test").open()
  copy = Packed(Source("packed", str(tmp_path / "digits")))
  assert copy.classes == source.classes and len(copy) == len(source)
  for i in range(0, 360, 7):
    assert copy.annotation(i) == source.annotation(i)
    np.testing.assert_array_equal(decode(copy[i]["image"]), source[i]["image"])


def test_texts_alone_and_several_captions_are_packed(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ["a", "b"]}\n')
  pack(Source("jsonl", str(tmp_path / "a.jsonl")), str(tmp_path / "out"), log=quiet)
  source = Packed(Source("packed", str(tmp_path / "out")))
  assert source[0] == {"id": "a.jsonl/0", "text": "one"} and source[1]["texts"] == ("a", "b")


@pytest.fixture
def damaged(tmp_path):
  """A table of 40 images, of which 3, 17 and 31 cannot be used, and tars of the same with a link in it."""
  records = layouts.digits(40)
  records[3]["image"] = records[3]["image"][:200]
  records[17]["text"] = " "
  records[31]["image"] = b"GIF89a"
  return Source("captions", str(layouts.write_tsv(tmp_path / "damaged", records)))


def test_what_is_dropped_is_listed_with_its_reason(tmp_path, damaged):
  manifest = pack(damaged, str(tmp_path / "out"), per_shard=16, damaged=0.1, log=quiet)
  assert (manifest["records"], manifest["dropped"]) == (37, 3)
  assert [s["records"] for s in manifest["shards"]] == [15, 14, 8]
  with open(tmp_path / "out" / "dropped.jsonl", encoding="utf-8") as file:
    lines = [json.loads(line) for line in file]
  assert [(d["file"], d["index"], d["id"]) for d in lines] == [
    ("train.tsv", i, f"{i:09d}.png" * (i != 17)) for i in (3, 17, 31)]  # 17 has no caption
  assert "cannot be decoded" in lines[0]["reason"] and lines[1]["reason"].endswith("train.tsv, row 18: empty caption")
  assert sorted(os.listdir(tmp_path / "out")) == [
    "dropped.jsonl", "manifest.json", *(f"records-{k:05d}-of-00003.array_record" for k in range(3))]


def test_what_the_source_left_out_at_opening_is_listed_too(tmp_path):
  folder = layouts.write_img2dataset_parquet(tmp_path / "a", layouts.digits(5), failed=2)
  pack(Source("parquet", str(folder)), str(tmp_path / "out"), log=quiet)
  assert json.loads((tmp_path / "out" / "dropped.jsonl").read_text()) == {
    "file": "00000.parquet", "index": None, "id": "rows", "reason": "2 of 7 were not downloaded"}


def test_past_the_share_of_damage_it_stops_and_resumes_with_a_larger_one(tmp_path, damaged):
  with pytest.raises(UserError, match=r"more than 1 of 40 records cannot be read.*the first is 3: image of 200 bytes"):
    pack(damaged, str(tmp_path / "out"), per_shard=16, damaged=0.04, log=quiet)
  assert not (tmp_path / "out" / "manifest.json").exists()
  with pytest.raises(UserError, match="is not finished"):
    Packed(Source("packed", str(tmp_path / "out")))
  pack(damaged, str(tmp_path / "out"), per_shard=16, damaged=0.1, log=quiet)
  pack(damaged, str(tmp_path / "once"), per_shard=16, damaged=0.1, log=quiet)
  assert digests(tmp_path / "out") == digests(tmp_path / "once")


def test_two_do_not_pack_into_one_directory(tmp_path, tars):
  with Lock(tmp_path / "out" / ".lock", what="it"):
    with pytest.raises(UserError, match=f"out is in use by process {os.getpid()} on host .*choose another directory"):
      pack(tars, str(tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == [".lock"]
  assert pack(tars, str(tmp_path / "out"))["records"] > 0
  assert ".lock" not in os.listdir(tmp_path / "out")


def test_a_directory_of_something_else_is_refused_and_a_finished_one_is_left(tmp_path, tars):
  out = str(tmp_path / "out")
  pack(tars, out, log=quiet)
  before, said = digests(tmp_path / "out"), []
  pack(tars, out, log=said.append)
  assert "is complete: 12 records in 1 shards" in said[0] and digests(tmp_path / "out") == before
  with pytest.raises(UserError, match=r"begun with other data or settings \(shrink: 0, now 32\)"):
    pack(tars, out, shrink=32, log=quiet)
  with pytest.raises(UserError, match="is not empty, it has 00000"):
    pack(tars, tars.path, log=quiet)
  for name, value in (("shrink", -1), ("quality", 0), ("damaged", 2.0), ("per_shard", 0), ("workers", -1)):
    with pytest.raises(UserError, match=f"--{name}={value}: wanted"):
      pack(tars, str(tmp_path / "x"), log=quiet, **{name: value})


@pytest.mark.parametrize("full", ["record", "manifest"])
def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(tmp_path, tars, monkeypatch, full):
  with monkeypatch.context() as patch:
    if full == "record":
      def fail(self, data):
        raise UserError(f"{self._path}: cannot write there (No space left on device)")
      patch.setattr("limber_jax.data.features.ShardWriter.write", fail)
    else:
      replace, calls = os.replace, []

      def fail(a, b):
        calls.append(b)
        if b.endswith("manifest.json"):
          raise OSError(28, "No space left on device")
        replace(a, b)
      patch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot (be written|write there) .No space left on device"):
      pack(tars, str(tmp_path / "out"), per_shard=5, log=quiet)
  pack(tars, str(tmp_path / "out"), per_shard=5, log=quiet)
  pack(tars, str(tmp_path / "once"), per_shard=5, log=quiet)
  assert digests(tmp_path / "out") == digests(tmp_path / "once")


def command(*arguments):
  return subprocess.Popen([sys.executable, "-m", "limber_jax.pack", *map(str, arguments)], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)


def children(pid):
  """Returns the processes below a process."""
  out = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
  rows = [tuple(map(int, line.split())) for line in out.splitlines()[1:]]
  found = [p for p, parent in rows if parent == pid]
  return found + [c for p in found for c in children(p)]


def alive(pid):
  try:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
      return file.read().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def kill_and_go_on(tmp_path, count, kills):
  """Packs `count` images by the command, killing it `kills` times, anew whenever it got to its end.

  Returns how often shards were there already.
  """
  records = [r | {"key": f"{i:05d}"} for i, r in enumerate(images() * (count // 12))]
  folder = layouts.write_webdataset(tmp_path / "many", records, 100)
  pack(Source("webdataset", str(folder)), str(tmp_path / "once"), shrink=48, per_shard=6, log=quiet)
  arguments = (folder, tmp_path / "killed", "--shrink=48", "--per_shard=6", "--workers=2")
  rng, killed, went_on = np.random.default_rng(0), 0, 0
  while killed < kills:
    process = command(*arguments)
    process.stdout.readline()  # it has begun
    time.sleep(rng.uniform(0.5, 3))
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    if process.returncode != -signal.SIGKILL:
      assert process.returncode == 0, output
      assert digests(tmp_path / "killed") == digests(tmp_path / "once")
      shutil.rmtree(tmp_path / "killed")
      continue
    killed += 1
    deadline = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < deadline:
      time.sleep(0.1)
    assert not any(map(alive, workers)), "a worker outlives its parent"
    went_on += any(name.endswith(".json") and "records-" in name for name in os.listdir(tmp_path / "killed"))
  process = command(*arguments)
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0 and ("done: " in output or "is complete" in output), output
  assert digests(tmp_path / "killed") == digests(tmp_path / "once")
  return went_on


@pytest.mark.process
def test_the_bytes_are_the_same_after_a_kill_and_with_any_workers_none_of_which_outlives_it(tmp_path):
  kill_and_go_on(tmp_path, 1200, 1)


@pytest.mark.process
@pytest.mark.long
def test_30_kills_change_no_byte(tmp_path):
  went_on = kill_and_go_on(tmp_path, 12_000, 30)
  assert went_on > 10
  print(f"pack: 30 kills, {went_on} of them with shards there: every byte as without")


@pytest.mark.process
def test_sigterm_ends_it_after_what_is_whole(tmp_path):
  folder = layouts.write_webdataset(tmp_path / "many", [r | {"key": f"{i:05d}"} for i, r in enumerate(images() * 500)])
  process = command(folder, tmp_path / "out", "--shrink=32", "--per_shard=10", "--workers=1")
  process.stdout.readline()
  deadline = time.monotonic() + 60
  while time.monotonic() < deadline and not any("records-" in n for n in os.listdir(tmp_path / "out")):
    time.sleep(0.05)
  process.terminate()
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 0 and "stopped by SIGTERM" in output and "Traceback" not in output, output
  assert not (tmp_path / "out" / "manifest.json").exists()
  assert not [n for n in os.listdir(tmp_path / "out") if n.endswith(".tmp")]


@pytest.mark.process
def test_the_command_says_in_one_line_what_is_wrong_and_exits_1_where_records_were_dropped(tmp_path, damaged):
  process = command(damaged.path, tmp_path / "out", "--damaged=0.1", "--workers=0")
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 1 and "37 records in 1 shards, 3 dropped" in output
  for arguments, message in (((tmp_path / "nothing", tmp_path / "x"), "no such file or directory; say what it is with"),
                             ((damaged.path,), "expected SRC and DST, got 1")):
    process = command(*arguments)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and message in output and output.count("\n") == 1


def test_what_src_is_is_seen_from_it(tmp_path):
  for name in ("a.csv", "a.jsonl", "coco.json", "cats/1.jpg"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
  (tmp_path / "mix.json").write_text('{"sources": []}')
  for path, name in (("a.csv", "captions"), ("a.jsonl", "jsonl"), ("coco.json", "coco"), ("mix.json", "mixture"),
                     ("", "folder"), ("{0..9}.tar", "webdataset"), ("*.parquet", "parquet")):
    assert guess(str(tmp_path / path)) == name
  assert guess("digits") == "digits"
