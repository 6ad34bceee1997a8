"""Parquet files: img2dataset's, and those of the Hugging Face hub."""

import glob
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources import tables
from limber_jax.data.sources.annotations import captions_of, image_files, label_of, read_image
from limber_jax.data.sources.webdataset import shards
from limber_jax.data.text import clean, flaw
from limber_jax.errors import UserError, did_you_mean
from limber_jax.runtime import inputs

WANTED = ("Parquet files with images: img2dataset's with --output_format=parquet or files, or a data set of the "
          "Hugging Face hub")
BYTES = ("jpg", "jpeg", "png", "webp", "image", "img")               # columns of encoded images, the likeliest first
PATHS = ("image", "image_path", "filepath", "file_name", "filename")  # … and of their paths
TEXTS = ("caption", "captions", "text", "txt", "title", "sentence", "sentences")
CACHE = 2**28      # bytes of row groups that are kept, to read the next records of one from
MAX_GROUP = 2**30  # bytes of one: the images of 100 to 1,000 records

DOWNLOADED = "success"  # img2dataset's status of a row with an image


@dataclass(frozen=True)
class Columns:
  """Which columns hold what; "" where none does."""

  image: str
  text: str
  label: str
  classes: tuple[str, ...] | None

  @classmethod
  def of(cls, schema: pa.Schema, config: Source, where: str) -> "Columns":
    """Returns the columns that the configuration names, or else the likeliest; raises UserError if there are none."""
    try:
      names = [n for f in schema for n in (f.name, *_inner_names(f.type))]
    except UnicodeDecodeError:
      names = ["\0"]
    if not all(n.isprintable() for n in names):
      raise UserError(f"{where}: a column's name is damaged")
    if len(set(schema.names)) < len(schema.names):
      raise UserError(f"{where}: two columns of one name, among {', '.join(schema.names)}")
    images = [f.name for f in schema if _is_bytes(f.type) or _is_struct(f.type)]
    paths = [f.name for f in schema if _is_text(f.type)]
    texts = paths + [f.name for f in schema if pa.types.is_list(f.type) and _is_text(f.type.value_type)]
    labels = [f.name for f in schema if pa.types.is_integer(f.type)]

    def choose(field: str, fitting: list[str], likely: list[str]) -> str:
      wanted = getattr(config, field)
      if wanted and wanted not in fitting:
        kind = schema.field(wanted).type if wanted in schema.names else "missing"
        raise UserError(f"config.data.source.{field}={wanted!r}: no such column of {where} ({kind})"
                        f"{did_you_mean(wanted, fitting)}")
      return wanted or next(iter(likely), "")

    image = choose("image_key", images + paths, [n for n in BYTES if n in images] + images +
                   [n for n in PATHS if n in paths])
    text = choose("text_key", texts, [n for n in TEXTS if n in texts and n != image])
    names = _class_names(schema)
    label = choose("label_key", labels, [n for n in labels if n in names])
    if not text and label not in names:
      raise UserError(f"{where}: no column of captions such as {', '.join(TEXTS[:3])}, and none of named classes; set "
                      f"config.data.source.text_key to one of {', '.join(texts) or 'none: it has no texts'}")
    return cls(image, text, label, names.get(label))

  def notes(self, schema: pa.Schema, config: Source, where: str) -> list[str]:
    """Returns what is to be said of a choice between several columns of captions."""
    texts = [f.name for f in schema if _is_text(f.type) or (pa.types.is_list(f.type) and _is_text(f.type.value_type))]
    known = [n for n in TEXTS if n in texts and n != self.image]
    return [] if config.text_key or len(known) < 2 else [tables.choice(where, "captions", known, "text_key")]

  @property
  def described(self) -> list[str]:
    """The columns without the image."""
    return [n for n in (self.text, self.label) if n]

  def annotation(self, id_: str, values: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without its image, of a row's values by column; raises UserError if they are none."""
    out = {"id": id_}
    if self.label and (self.classes is None or (values[self.label] or 0) >= 0):
      out |= label_of(values[self.label], self.label)  # the hub has -1 where a class is not known
      if self.classes is not None and out["label"] >= len(self.classes):
        raise UserError(f"class {out['label']} in {self.label!r}, of {len(self.classes)}")
    if self.text:
      return out | (captions_of(values[self.text]) if self.image else _whole_text(values[self.text]))
    if "label" not in out:
      raise UserError(f"no class in {self.label!r}")
    return out | {"text": self.classes[out["label"]].replace("_", " ")}


def image_of(value: Any, column: str, root: str) -> bytes:
  """Returns the encoded image of a cell: bytes, the hub's {"bytes", "path"}, or a path below root."""
  path = None
  if isinstance(value, dict):
    value, path = value.get("bytes"), value.get("path")
  elif isinstance(value, str):
    value, path = None, value
  if value is None:
    if not path:
      raise UserError(f"no image in {column!r}")
    return read_image(root, path, ())
  inputs.check_size(len(value), inputs.IMAGE)
  return value


def names_of(column: pa.Array | pa.ChunkedArray) -> list[str]:
  """Returns the paths in a column of images, in rows' order; of one of bytes none."""
  if not _has_names(column.type):
    return []
  values = column.to_pylist() if _is_text(column.type) else [
    v for piece in getattr(column, "chunks", [column]) for v in piece.field("path").to_pylist()]
  return [v for v in values if isinstance(v, str)]


def _has_names(kind: pa.DataType) -> bool:
  """Returns whether images of a column may be named in place of being there."""
  return _is_text(kind) or (pa.types.is_struct(kind) and any(f.name == "path" and _is_text(f.type) for f in kind))


def _whole_text(value: Any) -> dict[str, str]:
  """Returns {"text"} of a record without an image, of any length."""
  value = clean(value) if isinstance(value, str) else value
  if reason := flaw(value, "text", longest=0):
    raise UserError(reason)
  return {"text": value}


def _is_bytes(kind: pa.DataType) -> bool:
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_struct(kind: pa.DataType) -> bool:
  """Returns whether a column holds the hub's images."""
  return pa.types.is_struct(kind) and any(f.name == "bytes" and _is_bytes(f.type) for f in kind)


def _inner_names(kind: pa.DataType) -> list[str]:
  return [f.name for f in kind] if pa.types.is_struct(kind) else []


def _class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
  """Returns the names of classes by column, from what the library `datasets` writes into a schema."""
  try:
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    return {name: tuple(f["names"]) for name, f in features.items()
            if isinstance(f, dict) and f.get("_type") == "ClassLabel" and all(isinstance(n, str) for n in f["names"])}
  except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
    return {}


@dataclass
class ParquetConfig(Source):
  """A record a row of Parquet files.

  path: a directory of them, or with folders of them as the hub has it; a file; or a pattern with *, ? or {0000..0099}.
  split: of the hub's names, train-00000-of-00002.parquet or a folder train; "train" or "" where names have no split.
  images: the directory that image paths start from; "" = `path`, or the directory it lies in.
  image_key: a column of encoded images, of the hub's {"bytes", "path"}, or of paths; "" = the first that fits: jpg,
    image … Without one, rows of img2dataset's layout "files" have their image in the folder beside the file. Files
    of texts alone give records without images, whose texts may be of any length.
  text_key: a column of captions, or lists of them; "" = caption, captions, text, txt, title …
  label_key: a column of class numbers; "" = the first of the hub's named classes. Without captions, the text is the
    name of the class.

  Of img2dataset's rows only those count whose status is "success"; `damage` says how many are left out of each file.
  Reading one record at random reads its row group, 100 of img2dataset's records: python -m limber_jax.pack makes the
  same records faster to read.
  """

  paths = ("path", "images")

  name: str = "parquet"
  path: str = ""        # a directory, a file, or a pattern with *, ? or {0000..0099}
  split: str = Unnamed("train")  # of the hub's names
  images: str = ""      # the directory that paths of images start from; "" = path, or the directory it lies in
  image_key: str = ""   # the column of images, or of their paths; "" = the first that fits
  text_key: str = ""    # the column of captions; "" = the first known name
  label_key: str = ""   # the column of class numbers; "" = the first of named classes

  def open(self) -> "Parquet":
    return Parquet(self)

  def splits(self) -> tuple[str, ...]:
    names = _splits(self.path) if os.path.isdir(self.path) else {}
    return () if {"", "data"} & names.keys() else tuple(sorted(names))


class Parquet:
  """A `ParquetConfig` whose data are open."""

  def __init__(self, config: ParquetConfig):
    self._config = config
    self._start = (config.path if os.path.isdir(config.path) else os.path.dirname(config.path)) or "."
    self._root = os.path.abspath(config.images or self._start)
    self._paths = _files(config)
    self.damage: list[dict[str, str]] = []
    self._rows: list[np.ndarray | None] = []  # of each file those that are records; None = all
    counts, groups, digest = [], [], hashlib.sha256()
    schema, broken = None, []
    for path in self._paths:
      name = os.path.basename(path)
      try:
        with pq.ParquetFile(path) as file:
          found, meta = file.schema_arrow, file.metadata
          if schema is None:
            self._columns = Columns.of(found, config, name)
            self._beside = self._layout(found, path)
            self.notes = self._columns.notes(found, config, name)
            schema = found
          missing = [c for c in self._needed() if c not in found.names or found.field(c).type != schema.field(c).type]
          if missing:
            raise UserError(f"column {missing[0]!r} is not there, or is not what it is in "
                            f"{os.path.basename(self._paths[0])}")
          sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
          large = max((meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)), default=0)
          if large > MAX_GROUP:
            raise UserError(f"a row group of {large:,} bytes; at most {MAX_GROUP:,} are read, so write smaller ones")
          rows = None
          if "status" in found.names and "key" in found.names and _is_text(found.field("status").type):
            status = file.read(["status"], use_threads=False).column(0).to_pylist()
            rows = np.flatnonzero([s == DOWNLOADED for s in status])
            if left := len(status) - len(rows):
              self.damage.append({"file": name, "id": "rows", "reason": f"{left:,} of {len(status):,} were not "
                                  "downloaded"})
            rows = rows if left else None
        if sum(sizes) != meta.num_rows or min(sizes, default=0) < 0:
          raise UserError(f"{meta.num_rows:,} rows, but {sum(sizes):,} in its row groups")
      except (pa.ArrowException, OSError, UserError, ValueError, MemoryError) as error:
        broken.append(f"{path}: {' '.join(str(error).split())}")
        continue
      self._rows.append(rows)
      groups.append(np.cumsum([0, *sizes]))
      counts.append(meta.num_rows if rows is None else len(rows))
      digest.update(repr((name, os.path.getsize(path), sizes, counts[-1])).encode())
    if broken:
      raise UserError(f"{len(broken)} of {len(self._paths)} files cannot be used: {'; '.join(broken[:3])}"
                      f"{'; …' if len(broken) > 3 else ''}; wanted {WANTED}")
    self.classes = self._columns.classes
    self._groups, self._starts = groups, np.cumsum([0, *counts])
    if not len(self):
      raise UserError(f"config.data.source.path={config.path!r}: no rows with images in {len(self._paths)} files; "
                      f"wanted {WANTED}")
    digest.update(repr(self._columns).encode())
    self._digest = digest.hexdigest()[:16]
    self._reset()

  def _layout(self, schema: pa.Schema, path: str) -> bool:
    """Returns whether images lie in folders beside; raises UserError for img2dataset's tables without any."""
    if self._columns.image or not {"key", "url"} <= set(schema.names):
      return False
    stem = path.removesuffix(".parquet")
    if os.path.isdir(stem):
      return True
    hint = ("they lie in the tars beside it: read these, with source.name=webdataset" if os.path.isfile(f"{stem}.tar")
            else f"nor a folder {stem} with them")
    raise UserError(f"img2dataset's table, with no images in it; {hint}")

  def _needed(self) -> list[str]:
    return [c for c in (self._columns.image, *self._columns.described, "key" if self._beside else "") if c]

  def _reset(self) -> None:
    self._lock, self._cache, self._held = threading.Lock(), {}, 0  # row groups, and their bytes

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_held")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _cells(self, index: int, image: bool) -> tuple[str, str, dict[str, Any]]:
    """Returns (path of the file, id, values by column) of a record."""
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    row, path = index - int(self._starts[number]), self._paths[number]
    row = row if self._rows[number] is None else int(self._rows[number][row])
    group = int(np.searchsorted(self._groups[number], row, "right")) - 1
    table = self._group(number, group, image)
    place = row - int(self._groups[number][group])
    try:
      cells = {name: table.column(name)[place].as_py() for name in table.column_names}
    except (pa.ArrowException, ValueError) as error:  # a text that is not UTF-8
      raise UserError(f"{path}, row {row}: damaged ({' '.join(str(error).split())})") from error
    return path, f"{os.path.relpath(path, self._start).removesuffix('.parquet')}/{row}", cells

  def _group(self, number: int, group: int, image: bool) -> pa.Table:
    """Returns a row group, with or without its images."""
    key = number, group, image
    with self._lock:
      if key in self._cache:
        self._cache[key] = table = self._cache.pop(key)  # the last is the one used last
        return table
    columns = self._needed() if image else [c for c in self._needed() if c != self._columns.image]
    path = self._paths[number]
    try:
      with pq.ParquetFile(path, page_checksum_verification=True) as file:
        table = file.read_row_group(group, columns, use_threads=False)
      rows = int(self._groups[number][group + 1] - self._groups[number][group])
      if table.num_rows != rows:
        raise UserError(f"{path}: {table.num_rows} rows in row group {group}, wanted {rows}")
      table.validate()
    except (pa.ArrowException, OSError, ValueError, IndexError, MemoryError) as error:
      raise UserError(f"{path}: row group {group} cannot be read ({' '.join(str(error).split())})") from error
    with self._lock:
      self._held += table.nbytes * (key not in self._cache)
      self._cache[key] = table
      while len(self._cache) > 1 and self._held > CACHE:
        self._held -= self._cache.pop(next(iter(self._cache))).nbytes
    return table

  def annotation(self, index: int) -> dict[str, Any]:
    path, id_, cells = self._cells(index, image=False)
    return self._read_named(path, id_, lambda: self._columns.annotation(id_, cells))

  def __getitem__(self, index: int) -> dict[str, Any]:
    path, id_, cells = self._cells(index, image=True)
    out = self._read_named(path, id_, lambda: self._columns.annotation(id_, cells))
    if self._columns.image:
      column = self._columns.image
      out["image"] = self._read_named(path, id_, lambda: image_of(cells[column], column, self._root))
    elif self._beside:
      folder = path.removesuffix(".parquet")
      out["image"] = self._read_named(path, id_, lambda: read_image(os.path.abspath(folder), f"{cells['key']}.jpg", ()))
    return out

  def _read_named(self, path: str, id_: str, read: Any) -> Any:
    try:
      return read()
    except UserError as error:
      raise UserError(f"{path}, row {id_.rpartition('/')[2]}: {error}") from error

  def files(self) -> Iterator[str]:
    yield from self._paths
    column = self._columns.image
    for path in self._paths:
      if self._beside:
        folder = path.removesuffix(".parquet")
        yield from (os.path.join(folder, name) for name in sorted(os.listdir(folder)))
      elif column:
        with pq.ParquetFile(path) as file:
          kind = file.schema_arrow.field(column).type
          leaf = f"{column}.path" if _is_struct(kind) else column
          # The bytes of images are not read: of the hub's columns the paths alone.
          for group in range(file.num_row_groups if _has_names(kind) else 0):
            names = names_of(file.read_row_group(group, [leaf], use_threads=False).column(0))
            yield from image_files(self._root, names)

  def fingerprint(self) -> str:
    return self._digest


def _files(config: ParquetConfig) -> list[str]:
  """Returns the files of the split; raises UserError if there are none."""
  if not os.path.isdir(config.path):
    return shards(config.path, ".parquet", WANTED)
  splits = _splits(config.path)
  found = sorted(path for paths in splits.values() for path in paths)
  if config.split in splits:
    return splits[config.split]
  if not found:
    return shards(config.path, ".parquet", WANTED)  # which says what is there instead
  if config.split and (config.split != "train" or set(splits) - {"", "data"}):
    raise UserError(f"config.data.source.split={config.split!r}: no such split in {config.path}"
                    f"{did_you_mean(config.split, splits)}")
  return found


def _splits(directory: str) -> dict[str, list[str]]:
  """Returns the files in and below a directory by their split: of the hub's names, else the folder they are in."""
  splits: dict[str, list[str]] = {}
  for path in sorted(p for depth in ("*", "*/*", "*/*/*")
                     for p in glob.glob(os.path.join(glob.escape(directory), f"{depth}.parquet")) if os.path.isfile(p)):
    inside, name = os.path.split(os.path.relpath(path, directory))
    named = re.fullmatch(r"(\w+)-\d+-of-\d+(-\w+)?\.parquet", name)
    splits.setdefault(named[1] if named else os.path.basename(inside), []).append(path)
  return splits
