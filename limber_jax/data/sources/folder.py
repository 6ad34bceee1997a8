"""Images by class: a directory or tar of class folders, or one of images with a list of their classes beside them."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources import tars
from limber_jax.data.sources.trees import Directory, Tar
from limber_jax.data.text import decode
from limber_jax.data.transforms import MAX_PIXELS
from limber_jax.errors import UserError, did_you_mean
from limber_jax.ranges import ranged
from limber_jax.runtime import inputs

# What counts as an image by its name. Some of these formats nobody decodes here: such files are named as damaged then.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".ppm", ".bmp", ".gif", ".tif", ".tiff", ".avif")
LISTS = (".txt", ".csv", ".tsv", ".jsonl")
IMAGE_KEYS = ("path", "filename", "filepath", "image", "img", "file", "file_name")  # of lists, the likeliest first
LABEL_KEYS = ("label", "classid", "class", "class_id", "target")
DEPTH = 4  # folders below a class
SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")

LAYOUTS = "a directory or .tar with a folder of images for each class, or one with images and a list of them"

Item = tuple[str, str]  # path and class of an image


@dataclass
class FolderConfig(Source):
  """A record an image; "text" is the name of its class, its id the path below `path`.

  path: a directory, or a tar that is not compressed, which is read in place; of a name without .tar that is not there,
    the tar. Around everything there may be one folder more, as most tars have it.
  split: a folder below path, whose folders are the classes; "" = those of path. They are ordered by their names, or by
    their numbers where all names are whole numbers. Or a list below path of the images that count:
      .txt: a path a line and, after a space, its class, which may have spaces; the first line may be the header "path"
      .csv, .tsv: a table with a header
      .jsonl: an object a line
    A path may lack its suffix, or have that of a video of which there is an image. Classes that are whole numbers are
    the labels themselves. Without a class, it is the folder that the image lies in.
  images: of a list, the folder below path that its paths start from; "" = path.
  image_key, label_key: of a list, the columns; "" = the first known name: path, filename, image … and label, ClassId …
    label_key=folder is the folder that the image lies in, whatever the list says.
  class_list: a file below path that names the classes, one a line, in the order of their numbers; "" = all there are.
  separator: between path and class, or columns; "" = a space in .txt, a tab in .tsv, and in .csv the semicolon if the
    first line has one, else the comma.
  incomplete: of a tar that is cut off: "refuse"; "keep" = what is whole in it is read, and the rest is named.

  What cannot be used is in `damage`: classes without images, folders that cannot be read, lines that are none, images
  that are not there or are listed twice, and what in a tar is a link or has a name that leads out of it.
  """

  name: str = "folder"
  path: str = ""        # the directory, or the tar
  split: str = Unnamed("train")  # a folder below it, whose folders are the classes, or a list below it; "" = all of it
  images: str = ""      # of a list: the folder below path that its paths start from; "" = path
  image_key: str = ""   # of a list: the column of paths; "" = the first known name
  label_key: str = ""   # of a list: the column of classes, or "folder", that of the image; "" = the first known name
  class_list: str = ""  # a file below path that names the classes, one a line, by their numbers; "" = all there are
  separator: str = ""   # of a list: between path and class, or columns; "" = by its name: a space, a tab, ; or a comma
  # of a tar that is cut off: refuse it | keep what is whole in it, and name the rest
  incomplete: str = ranged("refuse", choices=("refuse", "keep"))

  def open(self) -> "Folder":
    return Folder(self)

  def splits(self) -> tuple[str, ...]:
    return Folder.parts(self)


class Folder:
  """A `FolderConfig` whose data are open."""

  def __init__(self, config: FolderConfig):
    self._config, self._where = config, f"config.data.source.path={config.path!r}"
    self._file = os.path.basename(os.path.normpath(config.path))
    self.damage: list[dict[str, str]] = []
    self._tree = self._open(config.path)
    listed = config.split.lower().endswith(LISTS)
    self._start = self._outer(listed)
    if not config.split and (parts := _parts(self._tree, self._start)):
      raise UserError(f"{self._where}: its folders {', '.join(parts)} are no classes but parts of the data; name one: "
                      f"source.split={parts[0]}")
    given = self._class_list() if config.class_list else None
    items, names = self._listed() if listed else self._in_folders(given)
    for name, reason in self._tree.refused.items():
      self._damaged(name, reason)
    if listed and items and all(_whole(word) for _, word in items):
      self.classes = given
      number = {word: int(word) for _, word in items if given is None or int(word) < len(given)}
    else:
      self.classes = given or tuple(_ordered(names))
      number = {name: i for i, name in enumerate(self.classes)}
    self._paths = [path for path, word in items if word in number]
    self._labels = [number[word] for _, word in items if word in number]
    for path, word in items:
      if word not in number:
        self._damaged(path, f"its class {word!r} is not in {config.class_list}")
    if not self._paths:
      first = f"; of what cannot be used the first is {self.damage[0]['id']}: {self.damage[0]['reason']}"
      raise UserError(f"{self._where}, split={config.split!r}: no images; wanted {LAYOUTS}" + first * bool(self.damage))

  @classmethod
  def parts(cls, config: FolderConfig) -> tuple[str, ...]:
    """Returns what `FolderConfig.splits` does."""
    self = cls.__new__(cls)
    self._config, self._where = dataclasses.replace(config, split=""), f"source.path={config.path!r}"
    self._tree = self._open(config.path)
    return tuple(_parts(self._tree, self._outer(False))) or ("",)

  def _open(self, path: str) -> Directory | Tar:
    if os.path.isdir(path):
      return Directory(path)
    for file in (path, f"{path}.tar"):
      if os.path.isfile(file):
        return Tar(file, tars.keeps(self._config))
    what = inputs.what_is(path).replace("no such file", "no such file or directory")
    raise UserError(f"{self._where}: {what}; wanted {LAYOUTS}; point at yours with "
                    "--config.data.source.path=DIRECTORY")

  def _damaged(self, what: str, reason: str) -> None:
    self.damage.append({"file": self._file, "id": what, "reason": reason})

  def _outer(self, listed: bool) -> str:
    """Returns the one folder around everything; "" where there is none."""
    folders, _ = self._tree.entries("")
    if len(folders) != 1:
      return ""
    there = self._tree.has if listed else lambda path: bool(self._tree.entries(path)[0])
    split, inner = self._config.split, folders[0]
    return inner if there(posixpath.join(inner, split) if split else inner) and not (split and there(split)) else ""

  def _class_list(self) -> tuple[str, ...]:
    name = self._config.class_list
    words = [line.strip() for line in self._text(name).splitlines() if line.strip()]
    if len(words) > len(set(words)):
      twice = next(w for i, w in enumerate(words) if w in words[:i])
      raise UserError(f"{self._config.path}/{name}: class {twice!r} stands there twice")
    return tuple(words)

  def _text(self, name: str) -> str:
    """Returns the text of a file below path."""
    path = posixpath.join(self._start, name)
    if not self._tree.has(path):
      lists = [f for f in self._tree.entries(self._start)[1] if f.lower().endswith(LISTS)]
      raise UserError(f"{self._where}: no file {name!r} there{did_you_mean(name, lists)}")
    return decode(self._tree.read(path, inputs.LIST), f"{self._config.path}/{name}")

  def _in_folders(self, given: tuple[str, ...] | None) -> tuple[list[Item], list[str]]:
    """Returns the images in class folders, and the names of all of these folders."""
    tree, split = self._tree, self._config.split
    start = posixpath.join(self._start, split) if split else self._start
    folders = _ordered(tree.entries(start)[0])
    if not folders:
      what = f"no folder {split!r} with class folders in it" if split else "no class folders"
      raise UserError(f"{self._where}: {what}; wanted {LAYOUTS}"
                      + (did_you_mean(split, tree.entries(self._start)[0]) if split else ""))
    items = []
    for name in folders:
      found = [(path, name) for path in _images(tree, posixpath.join(start, name), DEPTH)]
      if given is not None and name not in given:
        self._damaged(posixpath.join(start, name), f"a folder of no class in {self._config.class_list}")
      elif found:
        items += found
      elif posixpath.join(start, name) not in tree.refused:
        self._damaged(posixpath.join(start, name), "a class without images")
    for name in given or ():
      if name not in folders:
        self._damaged(posixpath.join(start, name), "a class without a folder")
    return items, folders

  def _listed(self) -> tuple[list[Item], list[str]]:
    """Returns the images of a list, and the names of the classes there are."""
    images = posixpath.join(self._start, self._config.images)
    items: dict[str, str] = {}
    by_folder = False
    for where, listed, word in _rows(self._text(self._config.split), self._config):
      path = posixpath.normpath(posixpath.join(images, listed.replace("\\", "/")))
      if not listed:
        reason = word
      elif path.startswith(("/", "../")):
        reason = f"{listed!r} lies outside of the data"
      elif (found := next((p for p in _spellings(path) if self._tree.has(p)), None)) is None:
        reason = f"no image {listed!r} there"
      elif found in items:
        reason = f"{listed!r} is listed twice, and the first counts"
      else:
        by_folder |= not word
        items[found] = word or posixpath.basename(posixpath.dirname(found))
        continue
      self._damaged(where, reason)
    # A list need not have images of all classes: those whose folders are there count too.
    names = set(self._tree.entries(images.rstrip("/"))[0] if by_folder else ()) | set(items.values())
    return list(items.items()), sorted(names)

  def __len__(self) -> int:
    return len(self._paths)

  def annotation(self, index: int) -> dict[str, Any]:
    label = self._labels[index]
    text = str(label) if self.classes is None else self.classes[label].replace("_", " ")
    return {"id": self._paths[index], "text": text, "label": label}

  def __getitem__(self, index: int) -> dict[str, Any]:
    path = self._paths[index]
    data = self._tree.read(path)
    return {**self.annotation(index), "image": _pixels(data, path) if path.lower().endswith(".ppm") else data}

  def files(self) -> Iterator[str]:
    listed = (self._config.split,) * self._config.split.lower().endswith(LISTS)
    names = (posixpath.join(self._start, name) for name in (*listed, self._config.class_list) if name)
    yield from self._tree.files([*names, *self._paths])

  def fingerprint(self) -> str:
    digest = hashlib.sha256(repr(self.classes).encode())
    for path, label in zip(self._paths, self._labels, strict=True):
      digest.update(f"{path}\0{label}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def images_below(folder: str, suffixes: tuple[str, ...] = SUFFIXES) -> tuple[list[str], dict[str, str]]:
  """Returns (the paths of the images below a directory, however deep, sorted; what was left out there, and why).

  As of class folders: links are followed, a directory that several lead to is read once, and names that begin with a
  dot are left out.
  """
  tree, found, seen, todo = Directory(folder), [], set(), [""]
  while todo:
    here = todo.pop()
    real = os.path.realpath(os.path.join(folder, here))
    if real in seen:
      continue
    seen.add(real)
    folders, files = tree.entries(here)
    found += [os.path.join(folder, here, f) for f in files if f.lower().endswith(suffixes)]
    todo += [os.path.join(here, f) for f in reversed(folders)]
  return sorted(found), {os.path.join(folder, name): reason for name, reason in tree.refused.items()}


def read_image(path: str) -> bytes | np.ndarray:
  """Returns a file as a record's "image" holds it; raises OSError, or UserError if it is too large or a damaged PPM."""
  data = inputs.read(path, inputs.IMAGE)
  return _pixels(data, path) if path.lower().endswith(".ppm") else data


def _parts(tree: Directory | Tar, start: str) -> list[str]:
  """Returns the folders that are called as parts of data are, if these are not classes: they hold folders, and are
  several, or the only ones with images."""
  folders = tree.entries(start)[0]
  found = [n for n in folders if n.lower() in SPLITS and tree.entries(posixpath.join(start, n))[0]]
  rest = (n for n in folders if n not in found)
  alone = len(found) == 1 and not any(any(_images(tree, posixpath.join(start, n), DEPTH)) for n in rest)
  return found if len(found) > 1 or alone else []


def _images(tree: Directory | Tar, folder: str, depth: int) -> Iterator[str]:
  """Yields the paths of the images in a folder and in those below it."""
  folders, files = tree.entries(folder)
  yield from (posixpath.join(folder, f) for f in files if f.lower().endswith(SUFFIXES))
  if depth:
    for name in folders:
      yield from _images(tree, posixpath.join(folder, name), depth - 1)


def _spellings(path: str) -> Iterator[str]:
  """Yields the names that the file of a path in a list may have."""
  yield path
  for start in dict.fromkeys((path, posixpath.splitext(path)[0])):
    for suffix in SUFFIXES:
      yield start + suffix


def _whole(word: str) -> bool:
  return word.isascii() and word.isdecimal()


def _ordered(names: Iterable[str]) -> list[str]:
  """Returns names sorted as numbers, if all of them are whole numbers, else as words."""
  names = list(names)
  return sorted(names, key=(lambda n: (int(n), n)) if all(map(_whole, names)) else None)


def _rows(text: str, config: FolderConfig) -> Iterator[tuple[str, str, str]]:
  """Yields (where it stands, path, class or "") of the lines of a list; of a line that is none ("…", "", why)."""
  name, by_folder = posixpath.basename(config.split), config.label_key == "folder"
  kind, lines = posixpath.splitext(name)[1].lower(), text.split("\n")
  usual = " " if kind == ".txt" else "\t" if kind == ".tsv" else ";" if ";" in lines[0] else ","
  separator = config.separator.replace("\\t", "\t") or usual
  if kind == ".txt":
    for number, line in enumerate(lines):
      path, _, word = line.strip().partition(separator)
      if path and not (number == 0 and path.lower() in IMAGE_KEYS):
        yield f"{name}, line {number + 1}", path, "" if by_folder else word.strip()
  elif kind == ".jsonl":
    for number, line in enumerate(lines):
      if line.strip():
        yield f"{name}, line {number + 1}", *_object(line, config)
  else:
    try:
      rows = csv.reader(io.StringIO(text), delimiter=separator)
      header = next(rows, [])
      image, label = (_column(header, name, *c) for c in (("image_key", config.image_key, IMAGE_KEYS),
                                                          ("label_key", config.label_key, LABEL_KEYS)))
      for row in rows:
        where = f"{name}, line {rows.line_num}"
        if row and len(row) != len(header):
          yield where, "", f"wanted {len(header)} columns, got {len(row)}"
        elif row:
          yield where, row[image], row[label].strip() if label >= 0 else ""
    except (csv.Error, TypeError) as error:  # TypeError: of a separator that is more than one letter
      raise UserError(f"{name}: no table that can be read with separator {separator!r} ({error})") from error


def _column(header: list[str], name: str, field: str, wanted: str, known: tuple[str, ...]) -> int:
  """Returns the number of a column, -1 where there is none of classes."""
  if field == "label_key" and wanted == "folder":
    return -1
  if wanted and wanted not in header:
    raise UserError(f"{name}: no column {wanted!r}{did_you_mean(wanted, header)}")
  lower = [h.strip().lower() for h in header]
  found = [header.index(wanted)] if wanted else [lower.index(k) for k in known if k in lower]
  if not found and field == "image_key":
    raise UserError(f"{name}: none of the columns {', '.join(header)} is known to hold paths; set source.image_key")
  return found[0] if found else -1


def _object(line: str, config: FolderConfig) -> tuple[str, str]:
  """Returns the path and the class or "" of a line of JSON; of one that is none ("", why)."""
  try:
    entry = json.loads(line)
  except (ValueError, RecursionError) as error:
    return "", f"not JSON ({error})"
  if not isinstance(entry, dict):
    return "", f"wanted an object, got {type(entry).__name__}"
  image = [k for k in ((config.image_key,) if config.image_key else IMAGE_KEYS) if k in entry]
  if not image or not isinstance(entry[image[0]], str) or not entry[image[0]]:
    return "", "no path of an image"
  if config.label_key == "folder":
    return entry[image[0]], ""
  label = [k for k in ((config.label_key,) if config.label_key else LABEL_KEYS) if k in entry]
  if not label or not isinstance(entry[label[0]], str | int):
    return "", "no class"
  return entry[image[0]], str(entry[label[0]])


def _pixels(data: bytes, name: str) -> np.ndarray:
  """Returns uint8 [h, w, 3] of a PPM file, as GTSRB has them."""
  try:
    with Image.open(io.BytesIO(data), formats=("PPM",)) as image:
      if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{name}: image of {image.width} × {image.height} pixels; at most {MAX_PIXELS:,} are read")
      return np.asarray(image.convert("RGB"))
  except UserError:
    raise
  except Exception as error:  # as in transforms.decode
    raise UserError(f"{name}: image of {len(data):,} bytes cannot be decoded: {error}") from error
