"""Directories and tars of images by class: layouts, and what cannot be used."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Source
from limber_jax.data.sources.folder import Folder
from limber_jax.data.transforms import decode
from limber_jax.errors import UserError


def encoded(value, kind="PNG"):
  out = io.BytesIO()
  Image.fromarray(np.full((6, 5, 3), value, np.uint8)).save(out, kind)
  return out.getvalue()


def write(root, files):
  """Writes {path: value of a picture's pixels, or text} below a directory."""
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "PPM" if name.endswith(".ppm") else "PNG"
    path.write_bytes(content.encode() if isinstance(content, str) else encoded(content, kind))
  return root


def pack(root, target, top=""):
  """Packs a directory into a tar, in a folder `top` if there is one."""
  with tarfile.open(target, "w") as tar:
    tar.add(root, arcname=top or ".")
  return target


def opened(path, split="", **fields):
  return Folder(Source(name="folder", path=str(path), split=split, **fields))


def found(source):
  """Returns {id: (class by name or number, value of the pixels)}."""
  out = {}
  for i in range(len(source)):
    record = source[i]
    assert {k: v for k, v in record.items() if k != "image"} == source.annotation(i)
    label = record["label"] if source.classes is None else source.classes[record["label"]]
    out[record["id"]] = label, int(decode(record["image"])[0, 0, 0])
  return out


def damage(source):
  return {d["id"]: d["reason"] for d in source.damage}


CLASSES = {"n02/a.png": 1, "n02/b.JPEG": 2, "n01/deep/er/c.png": 3, "n01/notes.txt": "x", "n01/._c.png": "x"}
WANTED = {"n01/deep/er/c.png": ("n01", 3), "n02/a.png": ("n02", 1), "n02/b.JPEG": ("n02", 2)}


@pytest.mark.parametrize("form", ["directory", "split", "tar", "tar with a folder around", "tar by its name"])
def test_class_folders_are_classes_in_the_order_of_their_names(form, tmp_path):
  inside = "val/" if form == "split" else ""
  root = write(tmp_path / "set", {f"{inside}{name}": value for name, value in CLASSES.items()})
  if "tar" in form:
    pack(root, tmp_path / "set.tar", "imagenet-r" if "around" in form else "")
    inside = "imagenet-r/" if "around" in form else ""
    if "by its name" in form:
      root.rename(tmp_path / "elsewhere")
    else:
      root = tmp_path / "set.tar"
  source = opened(root, "val" if form == "split" else "")
  assert source.classes == ("n01", "n02") and [source.annotation(i)["label"] for i in range(3)] == [0, 1, 1]
  assert found(source) == {inside + name: value for name, value in WANTED.items()}
  assert not source.damage
  assert found(pickle.loads(pickle.dumps(source))) == found(source)


def test_a_tar_and_the_directory_it_was_made_of_have_one_fingerprint(tmp_path):
  root = write(tmp_path / "set", CLASSES)
  pack(root, tmp_path / "x.tar")
  prints = [opened(p).fingerprint() for p in (root, tmp_path / "x.tar")]
  write(root, {"n03/d.png": 4})
  assert prints[0] == prints[1] != opened(root).fingerprint()


def test_class_folders_with_numbers_are_in_the_order_of_the_numbers(tmp_path):
  root = write(tmp_path, {f"{i}/x.png": i for i in (0, 1, 2, 10, 11, 9)})
  source = opened(root)
  assert source.classes == ("0", "1", "2", "9", "10", "11")
  assert found(source)["10/x.png"] == ("10", 10)


def test_a_file_of_class_names_says_which_count_and_in_which_order(tmp_path):
  root = write(tmp_path, CLASSES | {"n03/d.png": 4, "order.txt": "n02\nn01\nn09\n"})
  source = opened(root, class_list="order.txt")
  assert source.classes == ("n02", "n01", "n09") and set(found(source).values()) == {("n01", 3), ("n02", 1), ("n02", 2)}
  assert damage(source) == {"n03": "a folder of no class in order.txt", "n09": "a class without a folder"}


def test_what_cannot_be_used_is_named_and_the_rest_is_read(tmp_path, monkeypatch):
  root = write(tmp_path, CLASSES | {"n03/readme.md": "no image", "n04/x.png": 5})
  scandir = os.scandir

  def refusing(path):
    if str(path).endswith("n04"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  source = opened(root)
  assert found(source) == WANTED and source.classes == ("n01", "n02", "n03", "n04")
  assert damage(source) == {"n03": "a class without images", "n04": "cannot be read (Permission denied)"}


def test_a_list_chooses_images_and_may_leave_out_suffixes_and_classes(tmp_path):
  # As of FGVC Aircraft: names without a suffix, classes with spaces.
  aircraft = write(tmp_path / "aircraft", {"images/01.png": 1, "images/02.png": 2, "images/03.png": 3,
                                           "test.txt": "02 DC-10\n01 Cessna 172\n"})
  source = opened(aircraft, "test.txt", images="images")
  assert source.classes == ("Cessna 172", "DC-10")
  assert found(source) == {"images/02.png": ("DC-10", 2), "images/01.png": ("Cessna 172", 1)}
  # As of UCF101: names of videos, no class; a class without a video in the list counts all the same.
  ucf = write(tmp_path / "ucf", {"frames/Archery/v1.jpg": 1, "frames/Biking/v2.jpg": 2, "frames/Diving/v3.jpg": 3,
                                 "testlist01.txt": "Diving/v3.avi\r\nArchery/v1.avi\r\n",
                                 "trainlist01.txt": "Biking/v2.avi 2"})
  source = opened(ucf, "testlist01.txt", images="frames")
  assert source.classes == ("Archery", "Biking", "Diving")
  assert found(source) == {"frames/Diving/v3.jpg": ("Diving", 3), "frames/Archery/v1.jpg": ("Archery", 1)}
  assert opened(ucf, "trainlist01.txt", images="frames").classes is None
  assert found(opened(ucf, "trainlist01.txt", images="frames", label_key="folder")) == {
    "frames/Biking/v2.jpg": ("Biking", 2)}
  # As of Birdsnap: a header, and the class is the folder.
  birds = write(tmp_path / "birds", {"images/Blue_Jay/1.png": 7, "test_images.txt": "path\nBlue_Jay/1.png\n"})
  assert found(opened(birds, "test_images.txt", images="images")) == {"images/Blue_Jay/1.png": ("Blue_Jay", 7)}
  assert opened(birds, "test_images.txt", images="images").annotation(0)["text"] == "Blue Jay"


@pytest.mark.parametrize("form", ["directory", "tar"])
def test_tables_and_json_lines_are_lists_too(form, tmp_path):
  # As of GTSRB: semicolons, a class number, PPM images; and of Hateful Memes: objects.
  root = write(tmp_path / "set", {
    "GT.csv": "Filename;Width;ClassId\r\n0.ppm;5;14\r\n1.ppm;5;2\r\n", "Images/0.ppm": 10, "Images/1.ppm": 20,
    "dev.jsonl": '{"id": 1, "img": "img/1.png", "label": 1, "text": "x"}\n{"img": "img/2.png", "label": 0}\n',
    "img/1.png": 30, "img/2.png": 40, "signs.txt": "\n".join(f"sign {i}" for i in range(15))})
  if form == "tar":
    root = pack(root, tmp_path / "set.tar", "around")
  at = "around/" if form == "tar" else ""
  source = opened(root, "GT.csv", images="Images")
  assert source.classes is None and source.annotation(0)["text"] == "14"
  assert found(source) == {f"{at}Images/0.ppm": (14, 10), f"{at}Images/1.ppm": (2, 20)}
  assert opened(root, "GT.csv", images="Images", class_list="signs.txt").annotation(0)["text"] == "sign 14"
  assert found(opened(root, "dev.jsonl")) == {f"{at}img/1.png": (1, 30), f"{at}img/2.png": (0, 40)}


def test_lines_that_cannot_be_used_are_named_and_the_others_are_read(tmp_path):
  root = write(tmp_path / "set", {
    "a.png": 1, "b.png": 2, "../secret.png": 9, "names.txt": "zero\none\n",
    "x.txt": "a.png 0\nb.png 1\na.png 1\n../secret.png 0\n/etc/hostname 0\nmissing.png 0\nb 1\n",
    "x.csv": "path,label\na.png,0\nb.png\nb.png,7\n",
    "x.jsonl": '{"img": "a.png", "label": 0}\n{"img": "b.png"}\n[1]\n{"img": 3, "label": 0}\n{"img": "b.png", "la'})
  source = opened(root, "x.txt")
  assert found(source) == {"a.png": (0, 1), "b.png": (1, 2)}
  assert damage(source) == {
    "x.txt, line 3": "'a.png' is listed twice, and the first counts",
    "x.txt, line 4": "'../secret.png' lies outside of the data",
    "x.txt, line 5": "'/etc/hostname' lies outside of the data",
    "x.txt, line 6": "no image 'missing.png' there", "x.txt, line 7": "'b' is listed twice, and the first counts"}
  source = opened(root, "x.csv", class_list="names.txt")
  assert found(source) == {"a.png": ("zero", 1)}
  assert damage(source) == {"x.csv, line 3": "wanted 2 columns, got 1", "b.png": "its class '7' is not in names.txt"}
  source = opened(root, "x.jsonl")
  assert found(source) == {"a.png": (0, 1)}
  reasons = damage(source)
  assert reasons.pop("x.jsonl, line 5").startswith("not JSON")
  assert reasons == {"x.jsonl, line 2": "no class", "x.jsonl, line 3": "wanted an object, got list",
                     "x.jsonl, line 4": "no path of an image"}


def test_links_and_names_that_lead_out_of_a_tar_are_refused(tmp_path):
  root = write(tmp_path / "set", CLASSES)
  secret = tmp_path / "secret.png"
  secret.write_bytes(encoded(9))
  with tarfile.open(tmp_path / "x.tar", "w") as tar:
    tar.add(root, arcname=".")
    links = {"n01/link.png": tarfile.SYMTYPE, "n01/hard.png": tarfile.LNKTYPE, "n02/dev.png": tarfile.CHRTYPE}
    for name, kind in links.items():
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, str(secret)
      tar.addfile(member)
    for name in ("../out.png", "/abs.png", "n01/../../out2.png"):
      member = tarfile.TarInfo(name)
      member.size = len(encoded(9))
      tar.addfile(member, io.BytesIO(encoded(9)))
  source = opened(tmp_path / "x.tar")
  assert found(source) == WANTED
  reasons = damage(source)
  assert {n for n, r in reasons.items() if "leads out" in r} == {"../out.png", "/abs.png", "n01/../../out2.png"}
  assert {n for n, r in reasons.items() if "a link" in r} == links.keys() and len(reasons) == 6


def test_a_tar_that_is_cut_off_or_damaged_is_refused_and_never_read_in_part(tmp_path):
  whole = pack(write(tmp_path / "set", CLASSES), tmp_path / "x.tar").read_bytes()
  count = len(opened(tmp_path / "x.tar"))
  with tarfile.open(tmp_path / "x.tar") as tar:
    last = max(tar.getmembers(), key=lambda m: m.offset)
  end = last.offset_data + -(-last.size // 512) * 512
  broken = tmp_path / "broken.tar"
  with tarfile.open(tmp_path / "x.tar") as tar:
    ends = {m.name.removeprefix("./"): m.offset_data + m.size for m in tar if m.isfile()}
  whole_set = opened(tmp_path / "x.tar")
  ids = [whole_set.annotation(i)["id"] for i in range(count)]
  for length in (0, 100, 700, *range(1024, end, 397)):
    broken.write_bytes(whole[:length])
    with pytest.raises(UserError, match=r"broken\.tar.*source\.incomplete=keep") as caught:
      opened(broken)
    assert "\n" not in str(caught.value), length
    there = {id_ for id_ in ids if ends[id_] <= length}
    if not there:
      with pytest.raises(UserError, match=r"no class folders|no images"):
        opened(broken, incomplete="keep")
      continue
    source = opened(broken, incomplete="keep")
    assert {source.annotation(i)["id"] for i in range(len(source))} == there
    assert any("cut off" in reason for reason in damage(source).values())
  broken.write_bytes(whole[:last.offset] + b"\x07" * 512 + whole[last.offset + 512:])
  for incomplete in ("refuse", "keep"):  # damaged, not cut off
    with pytest.raises(UserError, match=rf"byte {last.offset:,} of"):
      opened(broken, incomplete=incomplete)
  broken.write_bytes(whole[:end])  # without the two empty blocks at the end, which not every program writes
  assert len(opened(broken)) == count
  import gzip
  broken.write_bytes(gzip.compress(whole))
  with pytest.raises(UserError, match="compressed one has no random access"):
    opened(broken)


def test_a_ppm_image_that_is_damaged_or_a_bomb_is_one_line(tmp_path):
  root = write(tmp_path, {"a/x.ppm": "P6 9 9 255\nshort", "a/y.ppm": "P6 8000 8000 255\n", "a/z.ppm": 3})
  source = opened(root)
  for index, match in enumerate(("cannot be decoded", "at most")):
    with pytest.raises(UserError, match=match):
      source[index]
  np.testing.assert_array_equal(source[2]["image"], np.full((6, 5, 3), 3, np.uint8))


@pytest.mark.parametrize(("files", "split", "fields", "message"), [
  ({}, "", {}, "no class folders; wanted a directory or .tar with a folder of images"),
  ({"x/a.md": "", "y/b.md": ""}, "", {}, "no images; .*the first is x: a class without images"),
  ({"test/a/x.png": 1, "train/a/x.png": 1}, "tset", {},
   "no folder 'tset' with class folders in it; wanted .*did you mean 'test'"),
  ({"a/x.png": 1, "list.txt": "x"}, "lits.txt", {}, "no file 'lits.txt' there; did you mean 'list.txt'"),
  ({"a/x.png": 1, "names.txt": "a\na"}, "", {"class_list": "names.txt"}, "class 'a' stands there twice"),
  ({"a.png": 1, "t.csv": "fille,label\na.png,1"}, "t.csv", {}, "none of the columns fille, label .* source.image_key"),
  ({"a.png": 1, "t.csv": "path,label\na.png,1"}, "t.csv", {"label_key": "lable"}, "did you mean 'label'"),
  ({"a.png": 1, "t.csv": "path,label\na.png,1"}, "t.csv", {"separator": "ab"}, "separator 'ab'"),
  ({"a.png": 1, "t.txt": "b.png 1"}, "t.txt", {}, "no images; .*t.txt, line 1: no image 'b.png' there"),
])
def test_what_does_not_fit_is_reported_in_one_line(files, split, fields, message, tmp_path):
  with pytest.raises(UserError, match=message) as caught:
    opened(write(tmp_path, files), split, **fields)
  assert "\n" not in str(caught.value)


def test_a_missing_directory_and_a_list_in_another_encoding_are_named(tmp_path):
  with pytest.raises(UserError, match=r"no such file or directory; wanted .*--config\.data\.source\.path="):
    opened(tmp_path / "none")
  (tmp_path / "t.txt").write_bytes(b"a.png 0\n\xff\xfe")
  with pytest.raises(UserError, match=r"t\.txt, byte 8 of 10: not UTF-8"):
    opened(tmp_path, "t.txt")
