"""Sets of evaluations as CLIP_benchmark and DataComp keep them: tars of images and labels, class names and templates.

Source: https://github.com/LAION-AI/CLIP_benchmark, datasets/builder.py and webdataset_builder.py.
"""

import hashlib
import io
import os
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources.annotations import captions_of
from limber_jax.data.sources.tar_index import Rule, Shard, open_shards
from limber_jax.data.sources.tars import keeps
from limber_jax.data.sources.webdataset import MAX_SHARDS, MAX_TEXT
from limber_jax.errors import UserError, did_you_mean
from limber_jax.ranges import ranged
from limber_jax.runtime import inputs

COUNT, TYPE = "nshards.txt", "dataset_type.txt"
CLASSES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"
WANTED = f"a directory with SPLIT/{COUNT}, SPLIT/0.tar …, {CLASSES} and {TEMPLATES}, as CLIP_benchmark exports it"
IMAGES = ("webp", "png", "jpg", "jpeg")  # in the order in which CLIP_benchmark takes them
# To (suffix of what is told of an image, other parts, what it is), by what TYPE says; without that file the first.
KINDS = {"classification": ("cls", ("npy",), "label"), "multilabel": ("npy", (), "labels"),
         "retrieval": ("txt", (), "captions")}
LIST = inputs.Kind("list", 2**20)  # a file beside the tars
_QUESTION = re.compile(r"[a-z]+:")


@dataclass
class ClipBenchmarkConfig(Source):
  """A record an image, tar after tar as their programs stream them.

  path: the directory of one set.
  split: a folder below it, such as test; "" = the only one there is.
  incomplete: of a tar that is cut off: "refuse"; "keep" = what is whole in it is read, and the rest is named.

  dataset_type.txt says what tars hold beside the images: .cls, the number of a class, if it is "classification" or not
  there; .npy, ones and zeros for all classes, if it is "multilabel"; .txt, a caption a line, if it is "retrieval". A
  .npy beside a .cls is DataComp's metadata of WILDS, Dollar Street and GeoDE: its first number is the "group", such as
  the region, if that of the first record is a whole number.
  "text" is the name of the class, the names of the classes, or the first caption. `classes` and `templates` are those
  of classnames.txt and zeroshot_classification_templates.txt, whose {c} is our {}; None where there is no such file.

  In `damage` are keys without an image or a label, members that webdataset's source names too, tars that nshards.txt
  does not count, and what a tar that is cut off lost.
  """

  name: str = "clip_benchmark"
  path: str = ""  # the directory of one set
  split: str = Unnamed("train")  # a folder below it; "" = the only one there is
  # of a tar that is cut off: refuse it | keep what is whole in it, and name the rest
  incomplete: str = ranged("refuse", choices=("refuse", "keep"))

  def open(self) -> "ClipBenchmark":
    return ClipBenchmark(self)

  def splits(self) -> tuple[str, ...]:
    return tuple(splits(self.path)) if os.path.isdir(self.path) else ()


class ClipBenchmark:
  """A `ClipBenchmarkConfig` whose data are open."""

  def __init__(self, config: ClipBenchmarkConfig):
    self._root = config.path
    where = f"config.data.source.path={config.path!r}"
    if not os.path.isdir(config.path):
      raise UserError(f"{where}: no such directory; wanted {WANTED}")
    split = _split(config, where)
    kind = kind_of(config.path)
    self._kind, (self._suffix, others, what) = kind, KINDS[kind]
    self.classes, self.templates = (None, None) if kind == "retrieval" else _words(config.path)
    self.metrics = ("map",) if kind == "multilabel" else ()  # what their tables give, where it is not the usual
    rule = Rule(IMAGES, (self._suffix,), others, what, tag=self._suffix, settable=False)
    paths, self.damage = _tars(os.path.join(config.path, split))
    self._shards, damage = open_shards(paths, rule, keeps(config))
    self.damage += damage
    self._starts = np.cumsum([0, *(shard.records for shard in self._shards)])
    if not len(self):
      first = "; the first flaw: {file}: {id}: {reason}".format(**damage[0]) if damage else ""
      there = f"{TYPE} says {kind!r}" if _lines(config.path, TYPE) else (
        f"without {TYPE} it is a set of classes; one of captions has the line retrieval there")
      raise UserError(f"{where}: no image with {what} (.{self._suffix}) in {len(paths)} tars; {there}{first}")

    self._grouped = kind == "classification" and self._has_groups()

  def _has_groups(self) -> bool:
    """Returns whether the first record has a whole number at the start of a .npy."""
    shard, key, row = self._row(0)
    try:
      return bool(row[6]) and _first(shard.contents(key, *row[6:9])) is not None
    except UserError:
      return False

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _row(self, index: int) -> tuple[Shard, str, tuple[int, ...]]:
    """Returns (shard, key, row of the index) of a record."""
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    shard = self._shards[number]
    return shard, *shard.row(index - int(self._starts[number]))

  def _annotation(self, shard: Shard, key: str, row: tuple[int, ...]) -> dict[str, Any]:
    out = {"id": f"{os.path.basename(shard.path).removesuffix('.tar')}/{key}"}
    try:
      start, size, crc = row[3:6]
      if not start or size > MAX_TEXT:
        raise UserError(f".{self._suffix} of {size:,} bytes; at most {MAX_TEXT:,} are read" if start else
                        f"no .{self._suffix}")
      data = shard.contents(key, start, size, crc)
      match self._kind:
        case "retrieval":
          return out | captions_of(data.decode().splitlines())
        case "multilabel":
          labels = self._several(data)
          return out | {"text": ", ".join(map(self._name, labels)) or "none of the classes", "labels": labels,
                        "difficult": ()}
      label = self._one(data)
      group = {"group": _first(shard.contents(key, *row[6:9]))} if self._grouped else {}
      return out | {"text": self._name(label), "label": label} | group
    except UnicodeDecodeError as error:
      raise UserError(f"{shard.path}: {key}: captions are not UTF-8 ({error.reason})") from error
    except UserError as error:
      raise UserError(f"{shard.path}: {key}: {error}") from error

  def _name(self, label: int) -> str:
    return self.classes[label] if self.classes else str(label)

  def _one(self, data: bytes) -> int:
    """Returns the label in a .cls; raises UserError."""
    word, last = data.strip()[:40].decode(errors="replace"), len(self.classes) - 1 if self.classes else None
    if not re.fullmatch(r"\d{1,9}", word, re.ASCII) or (last is not None and int(word) > last):
      raise UserError(f"wanted a class number, 0 to {last if last is not None else '…'}, in .cls, got {word!r}")
    return int(word)

  def _several(self, data: bytes) -> tuple[int, ...]:
    """Returns the labels in a .npy of ones and zeros; raises UserError."""
    values = _array(data)
    wanted = f"[{len(self.classes) if self.classes else 'classes'}]"
    if values.ndim != 1 or (self.classes and len(values) != len(self.classes)):
      raise UserError(f"wanted ones and zeros {wanted} in .npy, got an array {list(values.shape)}")
    if not np.isin(values, (0, 1)).all():
      raise UserError(f"wanted ones and zeros {wanted} in .npy, got {values[~np.isin(values, (0, 1))][0]}")
    return tuple(np.flatnonzero(values).tolist())

  def annotation(self, index: int) -> dict[str, Any]:
    return self._annotation(*self._row(index))

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard, key, row = self._row(index)
    out = self._annotation(shard, key, row)
    try:
      inputs.check_size(row[1], inputs.IMAGE)
    except UserError as error:
      raise UserError(f"{shard.path}: {key}: {error}") from error
    return out | {"image": shard.contents(key, *row[:3])}

  def files(self) -> Iterator[str]:
    yield from (shard.path for shard in self._shards)

  def fingerprint(self) -> str:
    digest = hashlib.sha256(repr((self._kind, self.classes, self.templates)).encode())
    for shard in self._shards:
      digest.update(f"{os.path.basename(shard.path)}\0{shard.digest}\0".encode())
    return digest.hexdigest()[:16]


def kind_of(path: str) -> str:
  """Returns what a set is, one of KINDS; raises UserError."""
  kind = (_lines(path, TYPE) or ["classification"])[0].lower()
  if kind not in KINDS:
    raise UserError(f"{os.path.join(path, TYPE)}: no type {kind!r}{did_you_mean(kind, KINDS)}")
  return kind


def splits(path: str) -> list[str]:
  """Returns the names of the splits of a set, sorted: the folders with a COUNT."""
  return sorted(f.name for f in os.scandir(path) if f.is_dir() and os.path.isfile(os.path.join(f.path, COUNT)))


def _split(config: ClipBenchmarkConfig, where: str) -> str:
  """Returns the split that is meant; raises UserError if there is none, or several to choose from."""
  found = splits(config.path)
  if not found:
    above = "; point at the directory above it" if os.path.isfile(os.path.join(config.path, COUNT)) else ""
    raise UserError(f"{where}: no folder with {COUNT} in it; wanted {WANTED}{above}")
  if config.split in found:
    return config.split
  if config.split:
    raise UserError(f"config.data.source.split={config.split!r}: no such split in {config.path}"
                    f"{did_you_mean(config.split, found)}")
  if len(found) > 1:
    raise UserError(f"{where}: it has the splits {', '.join(found)}; choose one with source.split")
  return found[0]


def _tars(folder: str) -> tuple[list[str], list[dict[str, str]]]:
  """Returns the tars that COUNT counts, in order, and as damage those that it does not; raises UserError if one is
  missing."""
  word = " ".join(_lines(folder, COUNT) or ()).strip()
  if not re.fullmatch(r"\d{1,9}", word, re.ASCII) or not 1 <= int(word) <= MAX_SHARDS:
    raise UserError(f"{os.path.join(folder, COUNT)}: wanted the number of tars, got {word[:40]!r}")
  names = [f"{i}.tar" for i in range(int(word))]
  there = {f for f in os.listdir(folder) if f.endswith(".tar")}
  if missing := [name for name in names if name not in there]:
    raise UserError(f"{folder}: {len(missing)} of the {len(names)} tars that {COUNT} counts are missing; the first is "
                    f"{missing[0]}")
  more = sorted(there - set(names))
  reason = f"{COUNT} counts {len(names)} tars, and this is none of them"
  return [os.path.join(folder, name) for name in names], [{"file": f, "id": "tar", "reason": reason} for f in more]


def _lines(folder: str, name: str) -> list[str] | None:
  """Returns the lines of a file as their programs read them, without white space around them; None if there is none."""
  path = os.path.join(folder, name)
  try:
    lines = [line.strip() for line in inputs.read(path, LIST).decode("utf-8-sig").splitlines()]
  except FileNotFoundError:
    return None
  except UnicodeDecodeError as error:
    raise UserError(f"{path}, byte {error.start:,}: not UTF-8") from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  while lines and not lines[-1]:
    lines.pop()
  if "" in lines:
    raise UserError(f"{path}, line {lines.index('') + 1}: empty; the lines after it would be another's")
  return lines


def _words(path: str) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
  """Returns (class names, templates with {} for the class) of a set, None where there are none.

  Raises:
    UserError: a line is no template, or the set asks several questions at once.
  """
  classes, lines = _lines(path, CLASSES), _lines(path, TEMPLATES)
  if classes and lines and all(map(_QUESTION.match, classes + lines)):
    questions = ", ".join(sorted({c.partition(":")[0] for c in classes}))
    raise UserError(f"{path}: its classes answer several questions ({questions}), as those of DataComp's FairFace and "
                    "UTKFace do; such sets are not read")
  templates = None
  if lines:
    templates = tuple(_template(line, f"{os.path.join(path, TEMPLATES)}, line {i + 1}") for i, line in enumerate(lines))
  return tuple(classes) if classes else None, templates


def _template(line: str, where: str) -> str:
  """Returns a template with {} in place of {c}, as str.format would fill it; raises UserError if it is none."""
  try:
    parts = list(string.Formatter().parse(line))
  except ValueError as error:
    raise UserError(f"{where}: no template ({error}); got {line!r}") from error
  fields = [(field, spec, conversion) for _, field, spec, conversion in parts if field is not None]
  if not fields or any(f != ("c", "", None) for f in fields) or any("{}" in text for text, *_ in parts):
    raise UserError(f"{where}: wanted a sentence with {{c}} for the class, got {line!r}")
  return "".join(text + "{}" * (field is not None) for text, field, *_ in parts)


def _first(data: bytes) -> int:
  """Returns the first number in a .npy of metadata; raises UserError."""
  values = _array(data).reshape(-1)[:1].tolist()
  if not values or values[0] not in range(-2**31, 2**31):
    raise UserError(f"wanted whole numbers in .npy, got {values[0] if values else 'none'}")
  return int(values[0])


def _array(data: bytes) -> np.ndarray:
  """Returns the array of numbers in a .npy; raises UserError. Nothing is unpickled, nor held that is not there."""
  try:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, kind = read(file)
    if kind.kind not in "biuf":
      raise UserError(f"wanted numbers in .npy, got {kind}")
    return np.frombuffer(data[file.tell() :], kind).reshape(shape)
  except (ValueError, KeyError, EOFError, TypeError, OverflowError) as error:
    raise UserError(f".npy cannot be read ({' '.join(str(error).split())[:200]})") from error
