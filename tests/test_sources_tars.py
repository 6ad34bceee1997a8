"""Tars whose names have dots, whose indices are old, and that are cut off: what is a record, and what is named."""

import base64
import dataclasses
import io
import os
import random
import tarfile

import pytest

from limber_jax import config_json
from limber_jax.config import Data, Source
from limber_jax.data import pipeline
from limber_jax.data.inspection import inspect
from limber_jax.data.packing import pack
from limber_jax.data.sources.tar_index import Rule, open_shards
from limber_jax.data.sources.tars import members
from limber_jax.data.sources.webdataset import Webdataset
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from tests import layouts
from tests.runs import tiny

IMAGE = layouts.jpeg(8, 8)


def write(path, *names, **contents):
  """Writes a tar of members with these names; a caption is its own name unless `contents` has another."""
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
    for name in names:
      data = IMAGE if name.lower().endswith(("jpg", "png")) else contents.get(name, name).encode()
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return path


def opened(path, **fields):
  return Webdataset(Source(name="webdataset", path=str(path), **fields))


def pairs(source):
  """Returns the texts of the records by key."""
  found = [source[i] for i in range(len(source))]
  assert all(r["image"] == IMAGE for r in found)
  return {r["id"].partition("/")[2]: r["text"] for r in found}


def damage(source):
  return {d["id"]: d["reason"] for d in source.damage}


def test_a_key_is_the_name_before_its_suffix_whatever_dots_it_has(tmp_path):
  stems = ["0", "IMG 3.5", "trip.2020", "x.y/1", "a.b/c.d", "ü.é", "v1..2"]
  source = opened(write(tmp_path / "a.tar", *(f"{s}{e}" for s in stems for e in (".JPG", ".txt"))))
  assert pairs(source) == {s: f"{s}.txt" for s in stems} and not source.damage


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdatasets_own_rule_gives_its_records_and_names_the_others(tmp_path):
  webdataset = pytest.importorskip("webdataset")
  rng = random.Random(0)
  for trial in range(60):
    names = {"".join(rng.choices(["a", "B", ".", "/", "-", "ü"], k=rng.randint(1, 5))).strip("/.").replace("//", "/")
             .replace("..", ".") or "k" for _ in range(8)}
    names = {f"{n}.{e}" for n in names for e in rng.sample(["jpg", "png", "txt", "json", "5.jpg"], 3)}
    path = write(tmp_path / f"{trial}.tar", *sorted(names), **{n: '{"caption": "c"}' for n in names if "json" in n})
    theirs = {}
    for sample in webdataset.WebDataset(str(path), shardshuffle=False):
      theirs.setdefault(sample["__key__"], {}).update(sample)
    theirs = {k for k, s in theirs.items() if s.keys() & {"jpg", "png"} and s.keys() & {"txt", "json"}}
    try:
      source = opened(path, key_dot="first")
    except UserError as error:
      assert "no image with a caption" in str(error) and not theirs
      continue
    assert set(pairs(source)) == theirs
    for name in names:  # each is a part of a record, or named; a hidden one is neither
      key = name.rpartition("/")[0] + "/" * ("/" in name) + name.rpartition("/")[2].partition(".")[0]
      assert key in theirs or name in damage(source) or key in damage(source) or name.rpartition("/")[2][0] == "."


@pytest.mark.parametrize(("names", "fields", "texts"), [
  (["s0.input.jpg", "s0.output.txt", "s0.other.jpg"], {"image_key": "input.jpg", "text_key": "output.txt"},
   {"s0": "s0.output.txt"}),
  (["3.5.input.jpg", "3.5.output.txt"], {"image_key": ".input.jpg", "text_key": "output.TXT"},
   {"3.5": "3.5.output.txt"}),
  (["0.jpg", "0.jpg.txt"], {"text_key": "jpg.txt"}, {"0": "0.jpg.txt"}),
  (["0.jpg", "0.caption", "1.jpg", "1.caption", "1.txt"], {}, {"0": "0.caption", "1": "1.txt"}),
  (["1.jpg", "1.caption", "1.txt"], {"text_key": ".caption"}, {"1": "1.caption"}),
  (["./0.jpg", "0.txt"], {}, {"./0": "0.txt"}),
  (["./0.jpg", "./0.txt", "a/./1.jpg", "a//1.txt"], {}, {"./0": "./0.txt", "a/./1": "a//1.txt"}),
  (["a/0.jpg", "b/0.jpg", "a/0.txt", "b/0.txt"], {}, {"a/0": "a/0.txt", "b/0": "b/0.txt"}),
])
def test_parts_are_found_by_suffix_and_keys_by_folder(names, fields, texts, tmp_path):
  source = opened(write(tmp_path / "a.tar", *names), **fields)
  assert pairs(source) == texts and not source.damage
  assert len({source[i]["id"] for i in range(len(source))}) == len(texts)


def test_of_a_key_that_lacks_a_part_it_is_reported_what_there_is_in_its_place(tmp_path):
  path = write(tmp_path / "a.tar", "0.jpg", "0.caption.txt", "1.gif", "1.txt", "b/2.TIF", "b/2.txt", "3.png", "3.txt")
  found = damage(opened(path))
  assert found["0"].endswith("; .caption.txt is read with text_key=caption.txt")
  assert found["1"] == (
    "no image (.jpg …); its .gif is read with image_key=gif and config.data.formats=gif (--formats=gif)")
  assert found["b/2"].endswith("its .tif is read with image_key=tif and config.data.formats=tiff (--formats=tiff)")
  assert pairs(opened(path, text_key="caption.txt")) == {"0": "0.caption.txt"}
  assert opened(path, image_key="gif")[0] == {"id": "a/1", "text": "1.txt", "image": b"1.gif"}
  rule = Rule(("webp", "png"), ("cls",), settable=False)
  assert rule.digest == Rule(("webp", "png"), ("cls",)).digest
  [damaged] = open_shards([write(tmp_path / "b.tar", "0.gif", "0.cls")], rule, False)[1]
  assert damaged["reason"] == "no image (.webp …); its .gif is not read: such sets hold webp, png alone"


def test_what_is_no_record_is_named_and_further_files_of_a_record_are_not(tmp_path):
  path = write(tmp_path / "a.tar", "0.jpg", "0.txt", "0.mask.png", "0.depth.1.png", "0.url", "._0.jpg", "._0.txt",
               "s1.input.jpg", "s1.output.txt", "lone.2.jpg")
  assert pairs(opened(path)) == {"0": "0.txt"}
  assert damage(opened(path)) == {
    "s1.input": "no caption (.txt, .caption or .json); if .input.jpg is what it is called there, say so by "
                "image_key=input.jpg",
    "s1.output": "no image (.jpg …); if .output.txt is what it is called there, say so by "
                 "text_key=output.txt",
    "lone.2": "no caption (.txt, .caption or .json); if .2.jpg is what it is called there, say so by "
              "image_key=2.jpg"}
  first = damage(opened(path, key_dot="first"))
  assert set(first) == {"s1.input.jpg", "s1.output.txt", "lone.2.jpg"}
  assert all("key_dot=last" in reason for reason in first.values())
  assert pairs(opened(path, image_key="mask.png")) == {"0": "0.txt"}
  found = inspect(opened(path))[0]
  assert found["records"] == 1 and found["found_at_opening"] == 3 and sum(d["count"] for d in found["damage"]) == 3
  for fields, message in (({"key_dot": "frist"}, "choose one of last, first"),
                          ({"image_key": "a/b.jpg"}, "wanted a suffix"),
                          ({"incomplete": "yes"}, "choose one of refuse, keep")):
    with pytest.raises(UserError, match=message):
      opened(path, **fields)


# The index that version 81b353f made of the tar in the test below, by the first dot; its fields were the same.
OLD_INDEX = base64.b64decode(
  "bGltYmVyX2pheCB0YXIgMQBQAAAAAAAABAAAAAAAAAAKAAAAAAAAACUAAAAAAAAAKwWHfqsekvbwkHLXuKw6INvjOvr6i0sSgASHs4ktnK857kFLFK"
  "2/NAACAAAAAAAABwAAAF0zXT4ABgAAAAAAAAcAAADUxYUZAAoAAAAAAAAYAAAAvBmOlAAAAAAAAAAAAwBgQ9rsAA4AAAAAAAAJAAAAViXKgQASAAAA"
  "AAAACQAAAFIjYfUAAAAAAAAAAAAAAAAAAAAAAwAAAAAAAAAFAAkSoYEAFgAAAAAAAAUAAAA3uWKtAAAAAAAAAAAAAAAAAAAAAAAeAAAAAAAAGAAAAB"
  "xvBfgIAAAAAAAAAAEADnTTjgAmAAAAAAAABgAAALn92/QAAAAAAAAAAAAAAAAAAAAAACoAAAAAAAAYAAAAr/3v9gkAAAAAAAAAAQAXOtvVLi8weC55"
  "LzEyNFtbIjMiLCAibm8gY2FwdGlvbiAoLnR4dCBvciAuanNvbikiXV0=")


def test_old_indices_are_made_again_and_runs_on_plain_names_keep_their_fingerprints(tmp_path):
  path = tmp_path / "a.tar"
  with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
    for name in ("./0.jpg", "./0.txt", "./0.json", "x.y/1.PNG", "x.y/1.txt", "2.jpg", "2.mask.png", "2.json", "3.jpg",
                 "4.webp", "4.json", "._4.webp"):
      data = b'{"caption": "c", "n": 1}' if name.endswith("json") else name.encode()
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  (tmp_path / "a.tar.index").write_bytes(OLD_INDEX)
  # By version 81b353f: of the source, and of the data of a run on it.
  for fields, own, run in (({}, "e5dff85ec175c01c", "e87672fd7116a362"),
                           ({"text_key": "caption", "label_key": "n"}, "89f9450ba503c38c", "95d4c961c9c04b70"),
                           ({"image_key": "mask.png"}, "2f38ee1a944ea72f", "11ae66bbbbd6dc52"),
                           ({"key_dot": "first", "incomplete": "keep"}, "e5dff85ec175c01c", "e87672fd7116a362")):
    source = opened(path, **fields)
    assert source.fingerprint() == own
    data = Data(source=Source(name="webdataset", path=str(path), **fields))
    assert pipeline.data_fingerprint(source, ByteTokenizer(), data, 8, 0)[:16] == run
  index = (tmp_path / "a.tar.index").read_bytes()
  assert index != OLD_INDEX and opened(path).fingerprint() == "e5dff85ec175c01c"
  assert (tmp_path / "a.tar.index").read_bytes() == index  # once
  dotted = opened(write(tmp_path / "b.tar", "a.1.jpg", "a.1.txt", "a.jpg", "a.txt"))
  assert len(dotted) == 2
  first = opened(tmp_path / "b.tar", key_dot="first")  # beside it, in an index of its own
  assert len(first) == 1 and first.fingerprint() != dotted.fingerprint()
  assert pairs(dotted) == {"a.1": "a.1.txt", "a": "a.txt"}


def test_a_run_on_tars_with_dots_resumes_by_the_old_rule():
  config = tiny(data=Data(source=Source(name="webdataset", path="x.tar")))
  saved = config_json.to_json(config)
  old = "\n".join(line for line in saved.splitlines() if "key_dot" not in line and "incomplete" not in line)
  config.data.source = dataclasses.replace(config.data.source, key_dot="first", incomplete="keep")
  config_json.check_same(config, old, "runs/x")


# Cut off

def test_a_tar_that_is_cut_off_anywhere_gives_its_whole_members_and_names_the_rest(tmp_path):
  names = [f"{i}.{e}" for i in range(6) for e in ("jpg", "txt")]
  whole = write(tmp_path / "whole.tar", *names).read_bytes()
  ends = {m.name.decode(): m.start + m.size for m in members(whole)}
  end = max(ends.values())
  rng = random.Random(0)
  cuts = [*rng.sample(range(1, len(whole)), 60), *ends.values(), *(e - 1 for e in ends.values()), 0, 512, len(whole)]
  path = tmp_path / "cut.tar"
  other = write(tmp_path / "other.tar", "z.jpg", "z.txt")
  for cut in cuts:
    path.write_bytes(whole[:cut])
    records = {str(i): f"{i}.txt" for i in range(6) if ends[f"{i}.txt"] <= cut}
    pattern = tmp_path / "{cut,other}.tar"
    for name in ("cut.tar.index", "other.tar.index"):
      (tmp_path / name).unlink(missing_ok=True)
    if cut - cut % 512 >= end + (-end % 512) + 512:  # the end is there
      assert pairs(opened(pattern)) == {**records, "z": "z.txt"}
      continue
    with pytest.raises(UserError, match=r"1 of 2 tars .*cut\.tar.*source\.incomplete=keep"):
      opened(pattern)
    source = opened(pattern, incomplete="keep")
    assert pairs(source) == {**records, "z": "z.txt"} and len(source) == len(records) + 1
    found = damage(source)
    inside = next((n for n in names if ends[n] - len(IMAGE if "jpg" in n else n) <= cut < ends[n]), None)
    half = inside and inside.endswith("txt") and inside[0]
    assert any("cut off" in r for r in found.values()) and (inside is None or "cut off inside it" in found[inside])
    if half:
      assert found[half] == f"no caption (.txt, .caption or .json): its {inside} is cut off"
    again = opened(pattern, incomplete="keep")
    os.remove(f"{path}.index")
    anew = opened(pattern, incomplete="keep")
    assert again.damage == anew.damage == source.damage
    assert again.fingerprint() == anew.fingerprint() == source.fingerprint()
  path.write_bytes(whole)  # fetched again: its index is of less
  assert len(opened(path)) == len(opened(path, incomplete="keep")) == 6 and not opened(path).damage
  assert opened(path).fingerprint() == opened(path, incomplete="keep").fingerprint()
  path.write_bytes(whole[:3000])  # an index of the whole one is there
  assert len(opened(path, incomplete="keep")) == sum(e <= 3000 for n, e in ends.items() if "txt" in n)
  with pytest.raises(UserError, match=r"cut off before its end.*source\.incomplete=keep"):
    opened(path)
  assert other.exists()


def test_a_damaged_tar_is_refused_though_what_is_cut_off_is_kept(tmp_path):
  whole = write(tmp_path / "a.tar", "0.jpg", "0.txt", "1.jpg", "1.txt").read_bytes()
  start = list(members(whole))[2].header
  for data, message in ((whole[:start] + b"\xff" * 512 + whole[start + 512 :], "no header of a tar"),
                        (whole + whole, "more behind its end"), (b"\x1f\x8b" + whole, "unpack it")):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=message):
      opened(tmp_path / "a.tar", incomplete="keep")


def test_inspect_and_pack_read_what_is_whole_where_they_are_asked_to(tmp_path):
  path = write(tmp_path / "a.tar", *(f"{i}.{e}" for i in range(4) for e in ("jpg", "txt")))
  cut = next(m for m in members(path.read_bytes()) if m.name == b"3.txt")
  path.write_bytes(path.read_bytes()[: cut.start + 2])
  config = Source("webdataset", str(path), incomplete="keep")
  found = inspect(Webdataset(config))[0]
  assert found["records"] == 3 and found["found_at_opening"] == 2
  manifest = pack(config, str(tmp_path / "packed"), log=lambda _: None)
  assert manifest["records"] == 3
  dropped = (tmp_path / "packed" / "dropped.jsonl").read_text()
  assert "3.txt" in dropped and "cut off" in dropped
  with pytest.raises(UserError, match=r"source\.incomplete=keep"):
    pack(dataclasses.replace(config, incomplete="refuse"), str(tmp_path / "other"), log=lambda _: None)
