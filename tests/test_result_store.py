"""Results of examples on disk: whatever was cut off, the results are those of a run that never stopped."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Decoding, Source
from limber_jax.data import transforms
from limber_jax.data.sources.digits import Digits
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.evals.base import Context, Runner, Stopped
from limber_jax.evals.result_store import ResultStore
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.runtime import parallel

BAD = (3, 70, 359)  # records that cannot be read, of 360


@pytest.fixture
def damaged(monkeypatch):
  whole = Digits.__getitem__

  def read(self, index):
    if index in BAD:
      raise UserError(f"no such file, {'x' * index}")
    return whole(self, index)

  monkeypatch.setattr(Digits, "__getitem__", read)


def runner(results_dir="", *, stop=lambda: False, key="a", **changes):
  transform = transforms.pairs(transforms.ResizeCrop(32, "center"), ByteTokenizer(), 16, ("image", "tokens", "label"))
  context = Context(ByteTokenizer(), transform, 16, Decoding(),
                    parallel.make_mesh({"data": -1}), "", stop, name="digits", results_dir=str(results_dir),
                    key={"weights": key})
  return Runner(ZeroShot(**{"source": Source(split="test"), "batch_size": 64} | changes), context)


def look(params, stats, batch):
  return {"mean": batch["image"].astype("float32").mean((1, 2)), "label": batch["label"]}


def collect(runner, name="look", keep=("mean",)):
  return runner.collect(name, look, {}, {}, record=lambda row: {"label": int(row["label"])}, keep=keep)


def same(a, b):
  return a.records == b.records and a.damage == b.damage and np.array_equal(a.arrays["mean"], b.arrays["mean"])


def test_what_cannot_be_read_is_named_counted_and_left_out(damaged, capsys):
  r = runner()
  found = collect(r)
  source = Digits(Source(split="test"))
  assert [d["index"] for d in found.damage] == list(BAD)
  assert [line["index"] for line in found.records] == [i for i in range(360) if i not in BAD]
  assert all(line["label"] == source.annotation(line["index"])["label"] for line in found.records)
  want = [source._images[source._number[i]].mean() for i in found.index]
  np.testing.assert_allclose(found.arrays["mean"], np.repeat(np.array(want)[:, None], 3, 1), rtol=1e-6)
  metadata = r.metadata()
  assert (metadata["num_examples"], metadata["covered"], metadata["damaged"]) == (360, 357, 3)
  named = capsys.readouterr().err.splitlines()
  assert [line.split(": ")[1] for line in named] == [source.annotation(i)["id"] for i in BAD]
  collect(r)
  assert capsys.readouterr().err == "" and r.metadata() == metadata  # once


def test_too_much_damage_ends_the_evaluation(damaged):
  with pytest.raises(UserError, match=r"'digits': 2 of 360 examples .* `max_bad_fraction` of 0.3% allows; the first"):
    collect(runner(max_bad_fraction=0.003))


@pytest.mark.parametrize("cut", [0, 1, 40, 100, 4000, 8000, 10**9])
def test_results_go_on_wherever_the_files_end(damaged, tmp_path, cut, monkeypatch):
  want = collect(runner(tmp_path / "a"))
  collect(runner(tmp_path / "b"))
  lines, rows = tmp_path / "b/look.jsonl", tmp_path / "b/look.mean.f32"
  lines.write_bytes(lines.read_bytes()[:cut])
  whole = [line for line in lines.read_bytes().split(b"\n")[:-1] if line]
  done = 0 if not whole else len(whole) - 1
  done = done if done == 360 else done // 64 * 64
  counted = []
  monkeypatch.setattr(Runner, "_call", lambda self, *a, call=Runner._call: counted.append(1) or call(self, *a))
  found = collect(runner(tmp_path / "b"))
  assert same(found, want) and len(counted) == -(-(360 - done) // 64)
  assert lines.read_bytes() == (tmp_path / "a/look.jsonl").read_bytes()
  assert rows.read_bytes() == (tmp_path / "a/look.mean.f32").read_bytes()


def test_lost_rows_of_arrays_are_made_again(damaged, tmp_path):
  want = collect(runner(tmp_path))
  rows = tmp_path / "look.mean.f32"
  rows.write_bytes(rows.read_bytes()[:1000])
  assert same(collect(runner(tmp_path)), want) and rows.stat().st_size == 357 * 12


def test_a_line_that_is_no_json_ends_what_is_believed(tmp_path):
  want = collect(runner(tmp_path))
  path = tmp_path / "look.jsonl"
  lines = path.read_bytes().split(b"\n")
  lines[200] = b"\0" * 40
  path.write_bytes(b"\n".join(lines))
  assert same(collect(runner(tmp_path)), want)


@pytest.mark.parametrize("changes", [{"key": "b"}, {"batch_size": 32}, {"source": Source(split="train")},
                                     {"templates": "{}"}])
def test_results_of_something_else_are_not_taken(tmp_path, changes):
  collect(runner(tmp_path))
  first = json.loads((tmp_path / "look.jsonl").read_text().split("\n")[0])
  want, found = collect(runner(**changes)), collect(runner(tmp_path, **changes))
  assert same(found, want)
  lines = (tmp_path / "look.jsonl").read_text().splitlines()
  assert json.loads(lines[0]) != first and len(lines) == 1 + len(want.records)


@pytest.mark.parametrize(("file", "place"), [
  ("look.jsonl", 0.0), ("look.jsonl", 0.001), ("look.jsonl", 0.3), ("look.jsonl", 0.999), ("look.mean.f32", 0.5)])
@pytest.mark.parametrize("bit", [1, 4])
def test_a_flipped_bit_is_reported_and_what_follows_it_measured_again(damaged, tmp_path, capsys, file, place, bit):
  want = collect(runner(tmp_path))
  capsys.readouterr()
  path = tmp_path / file
  data = bytearray(path.read_bytes())
  data[int(place * len(data))] ^= bit
  path.write_bytes(data)
  assert same(collect(runner(tmp_path)), want)
  told = [line for line in capsys.readouterr().err.splitlines() if "look.jsonl" in line]
  assert len(told) == 1 and "not as it was written" in told[0] and "measured again" in told[0]
  assert same(collect(runner(tmp_path)), want)
  assert "look.jsonl" not in capsys.readouterr().err


def test_lines_in_each_others_places_are_not_believed(tmp_path):
  want = collect(runner(tmp_path))
  path = tmp_path / "look.jsonl"
  lines = path.read_bytes().splitlines(True)
  path.write_bytes(b"".join([*lines[:100], lines[101], lines[100], *lines[102:]]))
  assert same(collect(runner(tmp_path)), want)


def test_what_could_not_be_read_is_tried_again_and_not_believed_for_ever(damaged, tmp_path, monkeypatch, capsys):
  collect(runner(tmp_path))
  kept = (tmp_path / "look.jsonl").read_bytes()
  counted = []
  monkeypatch.setattr(Runner, "_call", lambda self, *a, call=Runner._call: counted.append(1) or call(self, *a))
  again = collect(runner(tmp_path))
  assert [d["index"] for d in again.damage] == list(BAD) and not counted  # tried, in vain
  monkeypatch.setitem(globals(), "BAD", (3, 359))
  found = collect(runner(tmp_path))
  assert [d["index"] for d in found.damage] == [3, 359] and len(counted) == 5  # from the batch of record 70 on
  assert same(found, collect(runner()))
  assert (tmp_path / "look.jsonl").read_bytes() != kept
  assert same(collect(runner(tmp_path)), found)


def test_results_of_changed_images_or_lists_are_not_taken(tmp_path):
  source = Source("folder", str(tmp_path / "data"), "")
  for name, value in (("a/0.png", 0), ("b/0.png", 255)):
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(tmp_path / "data" / name)
  (tmp_path / "classes.txt").write_text("one\ntwo\n")
  fields = {"source": source, "batch_size": 8, "max_bad_fraction": 1.0}

  def means(**more):
    return collect(runner(tmp_path / "results", **fields, **more)).arrays["mean"][:, 0].tolist()

  assert means() == [0, 255]
  a, b, c = (tmp_path / "data" / name for name in ("a/0.png", "b/0.png", "c"))
  for before, after in ((a, c), (b, a), (c, b)):
    before.rename(after)
  assert means() == [255, 0]
  keys = []
  for words in ("one\ntwo\n", "two\none\n"):
    (tmp_path / "classes.txt").write_text(words)
    keys.append(runner(tmp_path / "results", classes=str(tmp_path / "classes.txt"), **fields)._key("look", False))
  assert keys[0] != keys[1]


def test_a_run_that_was_stopped_resumes(tmp_path):
  answers = iter([False, False, True])
  with pytest.raises(Stopped):
    collect(runner(tmp_path, stop=lambda: next(answers)))
  assert len((tmp_path / "look.jsonl").read_text().splitlines()) == 1 + 2 * 64
  assert same(collect(runner(tmp_path)), collect(runner()))


def test_evaluations_of_the_same_data_share_results_where_they_may(tmp_path):
  record = lambda row: {"label": int(row["label"])}  # noqa: E731
  one = runner(tmp_path / "one").collect("look", look, {}, {}, record=record, shared=True)
  other = runner(tmp_path / "other", templates="{}", stop=lambda: True)
  assert other.collect("look", look, {}, {}, record=record, shared=True).records == one.records
  with pytest.raises(Stopped):
    runner(tmp_path / "other", key="b", stop=lambda: True).collect("look", look, {}, {}, shared=True)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=re.escape(f"{tmp_path}/file")):
    ResultStore(str(tmp_path / "file/x/look.jsonl"), {}, 1, 1)


def test_results_that_evaluations_share_are_written_by_one_command_at_a_time(tmp_path):
  path = str(tmp_path / "shared" / "embed.jsonl")
  first = ResultStore(path, {"a": 1}, 8, 16, shared=True)
  first.append([{"index": i, "id": str(i)} for i in range(8)], {})
  with pytest.raises(UserError, match=r"embed.jsonl is in use by process \d+ on host"):
    ResultStore(path, {"a": 1}, 8, 16, shared=True)
  first.close()
  second = ResultStore(path, {"a": 1}, 8, 16, shared=True)
  assert second.done == 8
  second.close()
