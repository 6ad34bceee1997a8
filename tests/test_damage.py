"""What cannot be read is named once, others substitute by a rule, and too much ends the run; data workers that die."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Checkpoint, Data, Source, Tokenizer
from limber_jax.data import bad_records, images, transforms
from limber_jax.data.order import shuffled_index
from limber_jax.data.packing import pack
from limber_jax.data.pipeline import train_batches
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.training.loop import train
from tests import layouts
from tests.runs import environment, losses, tiny

ROOT = os.path.dirname(os.path.dirname(__file__))
RECORDS = layouts.digits(100)


class Numbers:
  """n records, of which those in `bad` cannot be read; those in `gone` have no annotation either."""

  classes = None

  def __init__(self, n, bad=(), gone=()):
    self.n, self.bad, self.gone = n, frozenset(bad), frozenset(gone)

  def __len__(self):
    return self.n

  def annotation(self, index):
    if index in self.gone:
      raise UserError("the line is lost")
    return {"id": f"n{index}", "index": index}

  def __getitem__(self, index):
    if index in self.bad | self.gone:
      raise UserError(f"no image of {index}")
    return self.annotation(index)


class Shares(Numbers):
  """A mixture: even positions are of the first half of the records, odd ones of the second."""

  def shuffled_index(self, seed, position):
    half = self.n // 2
    return position % 2 * half + shuffled_index(half, seed, position // 2)


def draw(record, rng):
  return {"draw": rng.random(2), "copy": np.int32(record["index"])}


def stream(source, count, *, batch_size=8, rows=None, start=0, **options):
  """Returns the arrays of `count` batches, joined."""
  with train_batches(source, draw, batch_size=batch_size, seed=5, start_step=start,
                     rows=np.arange(batch_size) if rows is None else rows, **{"threads": 2, **options}) as batches:
    found = [next(batches) for _ in range(count)]
  return {k: np.concatenate([b[k] for b in found]) for k in found[0]}


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


BAD = frozenset(np.random.default_rng(0).permutation(200)[:20].tolist())


def test_another_record_stands_in_and_no_other_position_changes():
  whole, found = stream(Numbers(200), 75), stream(Numbers(200, BAD), 75)  # three epochs
  hit = np.isin(whole["index"], list(BAD))
  assert hit.sum() == 60 and not np.isin(found["index"], list(BAD)).any()
  np.testing.assert_array_equal(found["index"][~hit], whole["index"][~hit])
  np.testing.assert_array_equal(found["draw"], whole["draw"])  # the random numbers are the position's
  np.testing.assert_array_equal(found["copy"], found["index"])
  assert (found["damage"] != "").tolist() == hit.tolist()
  for position in np.flatnonzero(hit):
    tried = json.loads(found["damage"][position])
    assert tried[0] == {"index": whole["index"][position], "id": f"n{whole['index'][position]}",
                        "reason": f"no image of {whole['index'][position]}"}
    assert {t["index"] for t in tried} <= BAD and len({t["index"] for t in tried}) == len(tried)
  stand_ins = found["index"][hit]
  assert len(set(stand_ins.tolist())) > 40  # not always the same few


@pytest.mark.parametrize("hosts", [2, 4])
def test_who_stands_in_depends_on_seed_and_position_alone(hosts):
  whole = stream(Numbers(200, BAD), 30)
  size = 8 // hosts
  parts = [stream(Numbers(200, BAD), 30, rows=np.arange(i * size, (i + 1) * size), threads=hosts % 3)
           for i in range(hosts)]
  for key in ("index", "draw", "damage"):
    rows = np.concatenate([p[key].reshape(30, size, -1) for p in parts], axis=1)
    np.testing.assert_array_equal(rows.reshape(240, -1), whole[key].reshape(240, -1))
  assert_same(stream(Numbers(200, BAD), 10, start=20), {k: v[160:] for k, v in whole.items()})


@pytest.mark.process
def test_two_workers_give_what_threads_give_damage_included():
  assert_same(stream(Numbers(200, BAD), 12, workers=2), stream(Numbers(200, BAD), 12))


def test_a_mixture_keeps_its_shares_where_records_are_damaged():
  found = stream(Shares(200, BAD), 75)
  assert ((found["index"] < 100) == (np.arange(600) % 2 == 0)).all()
  assert not np.isin(found["index"], list(BAD)).any()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_which_nothing_can_be_read_are_one_line(workers):
  with pytest.raises(UserError, match=r"none of 100 tries .*; Numbers record \d+: no image of \d+") as caught:
    stream(Numbers(50, gone=range(50)), 1, workers=workers)
  assert "\n" not in str(caught.value)


class Defect(Numbers):
  """A source that does what none may."""

  def __getitem__(self, index):
    if index in self.bad:
      raise KeyError("no such\nkey")
    return self.annotation(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_raises_what_it_may_not_ends_the_run_in_one_line(workers):
  with pytest.raises(UserError, match=r"Defect record \d+: KeyError: .* \(test_damage\.py, line \d+\)") as caught:
    stream(Defect(50, bad=range(10)), 10, workers=workers)
  assert "\n" not in str(caught.value)


# bad_records.jsonl

def tracker(folder, records=1000, allowed=0.01, found=(), batch_size=10):
  source = Numbers(records)
  source.damage = list(found)
  data = Data(source=Source("captions", "x/data.tsv"), max_bad_fraction=allowed)
  return bad_records.BadRecords(str(folder), source, data, batch_size)


def batch_with(*indices, size=10):
  told = [json.dumps([{"index": i, "id": f"n{i}", "reason": "torn"}]) for i in indices]
  return {"damage": np.array(told + [""] * (size - len(told))), "index": np.arange(size)}


def feed(tracker, step, *indices):
  rest, damaged = tracker.read(step, batch_with(*indices))
  assert rest.keys() == {"index"} and damaged.tolist() == [1] * len(indices) + [0] * (
    10 - len(indices))
  tracker.count(int(damaged.sum()))
  return tracker.flush(step)


def lines(folder):
  with open(os.path.join(str(folder), bad_records.FILE), encoding="utf-8") as file:
    return [json.loads(line) for line in file]


def test_a_record_is_named_once_and_again_only_where_a_kill_took_the_steps_back(tmp_path):
  first = tracker(tmp_path)
  first.start(0)
  assert not os.path.exists(tmp_path / bad_records.FILE)
  assert [line["index"] for line in feed(first, 1, 7, 3)] == [3, 7]
  assert feed(first, 2, 3) == [] and [line["index"] for line in feed(first, 3, 9, 7)] == [9]
  whole = lines(tmp_path)
  assert whole[0] == {"step": 1, "file": "data.tsv", "index": 3, "id": "n3", "reason": "torn"}
  with open(tmp_path / bad_records.FILE, "a", encoding="utf-8") as file:
    file.write('{"step": 4, "file": "data.tsv", "ind')  # cut short by a kill
  again = tracker(tmp_path)
  again.start(2)  # the last checkpoint
  assert [line["index"] for line in lines(tmp_path)] == [3, 7]
  assert [line["index"] for line in feed(again, 3, 9, 7)] == [9] and lines(tmp_path) == whole
  assert again.share(3) == first.share(3) == 0.1


def test_what_was_read_for_later_steps_waits_for_them(tmp_path):
  d = tracker(tmp_path)
  d.start(0)
  d.read(1, batch_with(1))
  d.read(2, batch_with(2))  # while step 1 is being computed
  d.count(1)
  assert [line["index"] for line in d.flush(1)] == [1]
  d.count(1)
  assert [line["index"] for line in d.flush(2)] == [2]


def test_few_end_no_run_but_too_large_a_share_does(tmp_path):
  d = tracker(tmp_path, allowed=0.5)
  d.start(0)
  feed(d, 1, *range(10))  # all that was seen: still only ten
  with pytest.raises(UserError) as caught:
    feed(d, 2, 10)
  assert str(caught.value) == (
    f"11 of the data's records cannot be used, 55.00% of what was seen, more than config.data.max_bad_fraction=0.5 "
    f"allows; the first: data.tsv: record 0 (n0): torn; all are in {tmp_path}/bad_records.jsonl")
  assert len(lines(tmp_path)) == 11
  again = tracker(tmp_path, allowed=0.6)
  again.start(2)
  assert len(feed(again, 3, 11)) == 1  # 12 of 30


def test_none_is_allowed_where_the_share_is_0(tmp_path):
  d = tracker(tmp_path, allowed=0.0)
  d.start(0)
  with pytest.raises(UserError, match=r"^1 of .*fraction=0\.0 allows; the first: data\.tsv: record 4 \(n4\): torn"):
    feed(d, 1, 4)
  with pytest.raises(UserError, match="max_bad_fraction=2: wanted a share"):
    tracker(tmp_path, allowed=2)


def test_after_an_epoch_the_share_is_that_of_all_records(tmp_path):
  d = tracker(tmp_path, records=50, allowed=0.4)
  d.start(0)
  for step in range(1, 21):  # four epochs, a tenth of the records damaged
    feed(d, step, *[i for i in (5, 15, 25, 35, 45) if i // 10 == (step - 1) % 5])
  assert d.share(20) == 0.1 and len(lines(tmp_path)) == 5


def test_what_the_source_found_at_its_opening_is_named_first_and_counts(tmp_path):
  found = [{"file": "00000.tar", "id": f"k{i}", "reason": "no image"} for i in range(11)]
  d = tracker(tmp_path, records=1089, allowed=0.01, found=found)
  d.start(0)
  wanted = [{"step": 0, "file": "00000.tar", "index": None, "id": f"k{i}", "reason": "no image"} for i in range(11)]
  assert lines(tmp_path) == wanted and d.share(0) == 0.01
  with pytest.raises(UserError, match=r"^12 of .* first: 00000\.tar: k0: no image; all are in"):
    feed(d, 1, 3)
  assert len(lines(tmp_path)) == 12
  again = tracker(tmp_path, records=1089, allowed=0.2, found=found)
  again.start(1)
  assert len(lines(tmp_path)) == 12
  with pytest.raises(UserError, match=r"11 of .*, 1\.01% .* first: 00000\.tar: k0: no image$"):
    tracker(tmp_path, records=1080, allowed=0.01, found=found)


# The run

def write_damaged(folder):
  """Writes a table of 100 digits, of which 4 images and a caption cannot be read, and returns (path, their numbers)."""
  path = layouts.write_tsv(folder, RECORDS)
  (folder / f"{RECORDS[10]['key']}.png").unlink()
  (folder / f"{RECORDS[20]['key']}.png").write_bytes(RECORDS[20]["image"][:100])
  (folder / f"{RECORDS[30]['key']}.png").write_bytes(b"GIF89a" + bytes(100))
  (folder / f"{RECORDS[40]['key']}.png").write_bytes(b"")
  table = path.read_bytes().split(b"\n")
  table[50] = table[50].split(b"\t")[0] + b"\xff\t" + table[50].split(b"\t")[1]
  path.write_bytes(b"\n".join(table))
  return path, [10, 20, 30, 40, 50]


def config(path, workers=0, **changes):
  data = Data(source=Source("captions", str(path)), tokenizer=Tokenizer(name="bytes"), threads=2, workers=workers)
  return tiny(**{"steps": 14, "data": data, "checkpoint": Checkpoint(every=2, keep=100), "mesh": (1, 1, 1), **changes})


@pytest.mark.process
def test_a_run_on_damaged_data_names_all_and_resumes_to_the_bit(tmp_path, only_the_devices_of_the_mesh):
  path, bad = write_damaged(tmp_path / "data")
  said = []
  train(config(path), str(tmp_path / "whole"), log=said.append)
  whole = lines(tmp_path / "whole")  # 14 steps of 16 are two epochs of 100 and more
  assert sorted(line["index"] for line in whole) == bad
  assert [line["step"] for line in whole] == sorted(line["step"] for line in whole)
  reasons = {line["index"]: (line["file"], line["id"], line["reason"]) for line in whole}
  for index, reason in zip(bad, ("No such file", "cannot be decoded", "not one of JPEG", "image of 0 bytes", "UTF-8"),
                           strict=True):
    assert reason in reasons[index][2] and reasons[index][0] == "train.tsv"
  assert reasons[10][1] == f"{RECORDS[10]['key']}.png" and reasons[50][1] == ""
  assert sum("cannot be read, others are substituted" in line for line in said) == len({line["step"] for line in whole})

  for stop in (4, 10):
    workdir = tmp_path / f"resumed{stop}"
    shutil.copytree(tmp_path / "whole", workdir)
    for step in range(stop + 2, 15, 2):
      shutil.rmtree(workdir / "checkpoints" / str(step))
    train(config(path, workers=stop // 10), str(workdir), log=lambda _: None)
    assert losses(str(workdir)) == losses(str(tmp_path / "whole"))
    assert (workdir / bad_records.FILE).read_bytes() == (tmp_path / "whole" / bad_records.FILE).read_bytes()


def test_a_run_on_too_much_damage_stops_in_one_line(tmp_path, only_the_devices_of_the_mesh):
  path = layouts.write_tsv(tmp_path / "data", RECORDS)
  for record in RECORDS[:40]:
    (tmp_path / "data" / f"{record['key']}.png").unlink()
  with pytest.raises(UserError, match=r"of the data's records cannot be used, \d+\.\d+% .* first: train") as caught:
    train(config(path), str(tmp_path / "run"), log=lambda _: None)
  assert "\n" not in str(caught.value) and len(lines(tmp_path / "run")) > bad_records.ALWAYS_ALLOWED


EXPERIMENT = """
import sys
sys.path.insert(0, {root!r})
from tests.test_damage import config

def get_config():
  return config({path!r}, mesh=(-1, 1, 1))
"""


@pytest.mark.process
@pytest.mark.long
def test_two_processes_name_what_one_names(tmp_path):
  from tests.test_faults import free_port
  path, bad = write_damaged(tmp_path / "data")
  file = tmp_path / "experiment.py"
  file.write_text(EXPERIMENT.format(root=ROOT, path=str(path)))

  def start(workdir, **options):
    return subprocess.Popen([sys.executable, "-m", "limber_jax.train", f"--config={file}", f"--workdir={workdir}"],
                            env=environment(**options), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)

  port = free_port()
  runs = [start(tmp_path / "pair", processes=2, index=i, port=port) for i in range(2)]
  runs.append(start(tmp_path / "alone", devices=2))
  outputs = [run.communicate(timeout=240)[0] for run in runs]
  assert [run.returncode for run in runs] == [0, 0, 0], outputs
  pair, alone = ((tmp_path / name / bad_records.FILE).read_bytes() for name in ("pair", "alone"))
  assert pair == alone and sorted(line["index"] for line in lines(tmp_path / "pair")) == bad


# Mutated files (R19)

def mutated(whole, rng):
  """Returns bytes cut off, with some changed, with some left out, or with some overwritten."""
  data, start = bytearray(whole), int(rng.integers(len(whole)))
  match rng.integers(4):
    case 0:
      del data[start:]
    case 1:
      for place in rng.integers(0, len(data), rng.integers(1, 20)):
        data[place] = rng.integers(256)
    case 2:
      del data[start : start + int(rng.integers(1, 600))]
    case 3:
      data[start : start + 64] = rng.bytes(64)
  return bytes(data)


SMALL = RECORDS[:8]
TRANSFORM = transforms.train(32, ByteTokenizer(), 40, "random", (0.9, 1.0))


def write_images(folder, format):
  """Writes a table of 8 pictures as files of a format, and returns (path of the table, that of the first picture)."""
  folder.mkdir()
  for i in range(8):
    options = {"lossless": i % 2} if format == "WEBP" else {}
    (folder / f"{i}.img").write_bytes(layouts.jpeg(90, 70, i, format, **options))
  (folder / "pairs.tsv").write_text("".join(f"picture {i}\t{i}.img\n" for i in range(8)))
  return folder / "pairs.tsv", folder / "0.img"


def write_coco(folder):
  """Writes COCO's layout and returns (path, path)."""
  layouts.write_tsv(folder, SMALL)
  table = {"images": [{"id": i, "file_name": f"{r['key']}.png"} for i, r in enumerate(SMALL)],
           "annotations": [{"id": i, "image_id": i, "caption": r["text"]} for i, r in enumerate(SMALL)]}
  (folder / "captions.json").write_text(json.dumps(table))
  return folder / "captions.json", folder / "captions.json"


def write_packed(folder):
  """Writes packed shards and returns (their directory, the only one)."""
  layouts.write_webdataset(folder / "tar", SMALL, suffix="png")
  pack(Source("webdataset", str(folder / "tar")), str(folder / "packed"), log=lambda _: None)
  return folder / "packed", folder / "packed" / "records-00000-of-00001.array_record"


FORMATS = {
  "jpeg": ("captions", lambda folder: write_images(folder, "JPEG")),
  "png": ("captions", lambda folder: write_images(folder, "PNG")),
  "webp": ("captions", lambda folder: write_images(folder, "WEBP")),
  "tsv": ("captions", lambda folder: (layouts.write_tsv(folder, SMALL), folder / "train.tsv")),
  "json": ("coco", write_coco), "array_record": ("packed", write_packed)}


def readable(data):
  """Returns whether Pillow itself reads a file to its end."""
  try:
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
      image.convert("RGB")
    return True
  except Exception:
    return False


def read_mutated(name, folder, seeds):
  """Trains on a data set of 8 records with one file mutated by each seed; returns what became of it, by kind."""
  kind, write = FORMATS[name]
  path, file = write(folder / name)
  open_, whole, counts = Source(kind, str(path), split="").open, file.read_bytes(), Counter()
  wanted = [open_()[i] for i in range(8)]
  for seed in seeds:
    data, start = mutated(whole, np.random.default_rng(seed)), time.monotonic()
    file.write_bytes(data)
    try:
      found = open_()
    except UserError as error:
      assert "\n" not in str(error) and str(path) in str(error), error
      counts["told at start"] += 1
      continue
    named = {}
    try:
      with train_batches(found, TRANSFORM, batch_size=len(found), rows=np.arange(len(found)), seed=seed, threads=0,
                         prefetch=0) as batches:
        batch = next(batches)
      assert len(batch["image"]) == len(found)
      for text in filter(None, batch["damage"].tolist()):
        named |= {d["index"]: d["reason"] for d in json.loads(text)}
    except UserError as error:  # nothing that can be read is left
      assert str(error).startswith("none of 100 tries") and "\n" not in str(error), error
      named = {i: "" for i in range(len(found))}
    assert time.monotonic() < start + 10, (name, seed)
    assert all("\n" not in reason for reason in named.values())
    if name in ("jpeg", "png", "webp"):
      assert named.keys() == ({0} if not readable(data) else set()), (name, seed, named)
    if name == "array_record":  # has checksums: whatever is not named is what was written
      assert len(found) == 8 and all(found[i] == wanted[i] for i in range(8) if i not in named), (name, seed)
    counts["a record named" if named else "an annotation named" if getattr(found, "damage", ()) else "read"] += 1
  return counts


@pytest.mark.process
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_damaged_in_a_mutated_file_is_named_and_nothing_else(tmp_path, name):
  counts = read_mutated(name, tmp_path, range(60))
  assert counts["told at start"] + counts["a record named"] + counts["an annotation named"] > 10
  print(f"R19: {name}: {dict(counts)} of 60 mutated files")


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_1700_mutated_files_of_each_format_end_no_process(tmp_path, name):
  start = time.perf_counter()
  counts = read_mutated(name, tmp_path, range(1000, 2700))
  assert sum(counts.values()) == 1700
  print(f"R19: {name}: {dict(counts)} of 1,700 mutated files, {time.perf_counter() - start:.0f} s")


# Data workers (R18)

READER = """
import numpy as np
from limber_jax import cli
from limber_jax.data.pipeline import train_batches

class Numbers:
  def __len__(self):
    return 10**6

  def __getitem__(self, index):
    return {"id": "", "index": np.int32(index)}

def main(argv):
  with train_batches(Numbers(), lambda record, rng: {"copy": record["index"]}, batch_size=64, rows=np.arange(64),
                     seed=0, workers=2, threads=1) as batches:
    for step in range(10**6):
      next(batches)
      if step == 3:
        print("reading", flush=True)

if __name__ == "__main__":
  cli.run(main)
"""


def children(pid):
  """Returns {process number: its command line} of all descendants of a process, the dead aside."""
  found = {}
  for name in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/stat", "rb") as file:
        state, parent = file.read().rpartition(b")")[2].split()[:2]
      with open(f"/proc/{name}/cmdline", "rb") as file:
        command = file.read().replace(b"\0", b" ").decode()
    except OSError:
      continue
    if int(parent) == pid and state != b"Z":
      found |= {int(name): command, **children(int(name))}
  return found


def alive(pid):
  try:
    with open(f"/proc/{pid}/stat", "rb") as file:
      return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
  except OSError:
    return False


@pytest.fixture
def reading(tmp_path):
  """Returns a function that starts a process with two data workers and waits until it reads.

  It gives (the process, the numbers of its workers). By "train" it is the real command.
  """
  started = []

  def start(what="reader"):
    env, arguments = os.environ | {"JAX_PLATFORMS": "cpu"}, [str(tmp_path / "reader.py")]
    (tmp_path / "reader.py").write_text(READER)
    if what == "train":
      path, _ = write_damaged(tmp_path / "data")
      file = tmp_path / "experiment.py"
      file.write_text(EXPERIMENT.format(root=ROOT, path=str(path)).replace("mesh=", "workers=2, steps=10**6, mesh="))
      env = environment()
      arguments = ["-m", "limber_jax.train", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    started.append(process)
    word = {"reader": "reading", "train": "step 3/"}[what]
    assert any(word in line for line in process.stdout), process.communicate()
    found = [child for child, command in children(process.pid).items() if "spawn_main" in command]
    assert len(found) == 2
    return process, found

  yield start
  for process in started:
    for pid in children(process.pid):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


COMMANDS = ["reader", pytest.param("train", marks=pytest.mark.long)]


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("number", "wanted"), [
  (signal.SIGKILL, "was ended by SIGKILL, perhaps for want of memory"),
  (signal.SIGSTOP, "was stopped for 10 seconds by a signal")])
def test_a_worker_that_is_killed_or_stopped_is_one_line_within_30_seconds(reading, command, number, wanted):
  process, workers = reading(command)
  start = time.monotonic()
  os.kill(workers[1], number)
  _, errors = process.communicate(timeout=60)
  seconds = time.monotonic() - start
  assert process.returncode == 2 and seconds < 30, (seconds, errors)
  [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
  assert f"data worker (process {workers[1]}) {wanted}" in line and "Traceback" not in errors, errors
  assert not any(map(alive, workers))
  print(f"R18: {command}: {signal.Signals(number).name} of a worker told after {seconds:.1f} s")


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
def test_workers_leave_signals_to_their_parent_and_never_outlive_it_by_5_seconds(reading, command):
  process, workers = reading(command)
  others = list(children(process.pid))
  for pid in workers:  # as Ctrl-C and a service manager send them, to all processes at once
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
  time.sleep(2)
  assert all(map(alive, workers)) and process.poll() is None
  start = time.monotonic()
  process.kill()
  process.wait()
  while any(map(alive, others)) and time.monotonic() < start + 20:
    time.sleep(0.05)
  seconds = time.monotonic() - start
  left = [pid for pid in others if alive(pid)]
  for pid in left:
    os.kill(pid, signal.SIGKILL)
  assert not left and seconds < 5
  print(f"R18: {command}: 0 of {len(others)} processes left {seconds:.1f} s after their parent was killed")
