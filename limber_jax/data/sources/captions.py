"""Tables of captions and image files: Conceptual Captions' and open_clip's layouts."""

import array
import csv
import hashlib
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from limber_jax.config import Source
from limber_jax.data.sources.annotations import LONG
from limber_jax.data.transforms import check_bytes
from limber_jax.errors import UserError, did_you_mean

IMAGE_KEYS = ("filepath", "image", "image_path", "path", "file", "filename", "file_name")  # the likeliest first
TEXT_KEYS = ("title", "caption", "text")

LAYOUTS = ("a tab-separated table of caption and image path without a header (Conceptual Captions), or a table with a "
           "header such as filepath and title, separated by tabs or commas (open_clip)")


class Captions:
  """A text table in UTF-8 with one caption and the path of its image a row.

  With a header, columns have names and CSV quoting holds, line breaks inside quotes included. Without one, the columns
  are caption and path, separated by a tab, and quotes are letters like any other. Images stay on disk, and so do the
  captions: memory holds 8 bytes a row.

  path: the table.
  split: train = a record a row, as open_clip trains; images = a record an image, with the captions of all its rows
    (for retrieval; memory then holds the paths).
  images: the directory that paths start from, "" = that of the table; nothing outside it is read.
  image_key, text_key: columns; "" = the first known name: filepath, image, … and title, caption, text.
  label_key: a column of whole numbers; "" = no labels.
  separator: "" = tab for .tsv or where the first line has one, else comma.
  """

  classes = None

  def __init__(self, config: Source):
    self._path, self._name = config.path, os.path.basename(config.path)
    if not os.path.isfile(config.path):
      raise UserError(f"config.data.source.path={config.path!r}: no such file; wanted {LAYOUTS}; point at yours with "
                      "--config.data.source.path=FILE, and at its images with --config.data.source.images=DIRECTORY")
    if not os.path.getsize(config.path):
      raise UserError(f"config.data.source.path={config.path!r} is empty; wanted {LAYOUTS}")
    self._root = os.path.abspath(config.images or os.path.dirname(config.path) or ".")
    self._open()
    self._columns(config)
    self._groups = None
    if config.split == "images":
      groups: dict[str, list[int]] = {}
      for row in range(len(self._starts)):
        groups.setdefault(self._row(row)[self._image], []).append(row)
      self._groups = list(groups.values())
    elif config.split not in ("train", ""):
      raise UserError(f"config.data.source.split={config.split!r}: a table has no parts; train = a record a row, "
                      "images = a record an image with all its captions")

  def _open(self) -> None:
    with open(self._path, "rb") as file:
      self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_map"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def _columns(self, config: Source) -> None:
    """Finds out how the table is laid out, and where its rows start."""
    begin = 3 if self._map[:3] == b"\xef\xbb\xbf" else 0  # a byte-order mark
    self._map.seek(begin)
    first = self._map.readline()
    self._separator = config.separator.replace("\\t", "\t") or (
      "\t" if self._path.endswith(".tsv") or b"\t" in first else ",")
    if len(self._separator) != 1 or self._separator in '"\r\n':
      raise UserError(f"config.data.source.separator={config.separator!r}: wanted one character")

    self._quoted = True
    header = self._parse(first, "the first line")
    image = config.image_key or next((k for k in IMAGE_KEYS if k in header), "")
    text = config.text_key or next((k for k in TEXT_KEYS if k in header), "")
    named = any((config.image_key, config.text_key, config.label_key))
    missing = [k for k in (image, text, config.label_key or image) if k not in header]
    if not missing:
      self._image, self._text, self._width = header.index(image), header.index(text), len(header)
      self._label = header.index(config.label_key) if config.label_key else None
    elif not named and self._separator == "\t" and first.count(b"\t") == 1:
      self._text, self._image, self._label, self._width, self._quoted = 0, 1, None, 2, False
    else:
      what = f"column {missing[0]!r}" if missing[0] else "known column name in the first line"
      raise UserError(f"{self._path}: no {what}{did_you_mean(missing[0], header)}; wanted {LAYOUTS}; name others "
                      "with --config.data.source.image_key=… and text_key=…")
    quotes = self._quoted and self._map.find(b'"') >= 0
    starts = self._quoted_starts(begin) if quotes else line_starts(self._map, begin)
    self._starts = starts[1:] if self._quoted else starts
    if not len(self._starts):
      raise UserError(f"{self._path} has a header and no rows")

  def _quoted_starts(self, begin: int) -> np.ndarray:
    """Returns where rows start, int64 [rows], for a table whose quoted fields may hold line breaks."""
    position, starts = begin, array.array("q")

    def lines() -> Iterator[str]:
      nonlocal position
      self._map.seek(begin)
      while line := self._map.readline():
        position += len(line)
        yield line.decode("latin-1")  # a byte a letter: only quotes, separators and line breaks matter here

    start = begin
    reader = csv.reader(lines(), delimiter=self._separator.encode().decode("latin-1"))
    try:
      for row in reader:
        if row:
          starts.append(start)
        start = position
    except csv.Error as error:
      raise UserError(f"{self._path}, row {len(starts)}: {error}") from error
    return np.array(starts, np.int64)

  def _parse(self, line: bytes, where: str) -> list[str]:
    """Returns the fields of one row."""
    try:
      text = line.rstrip(b"\r\n").decode()
      return next(csv.reader([text], delimiter=self._separator)) if self._quoted else text.split(self._separator)
    except (UnicodeDecodeError, csv.Error) as error:
      raise UserError(f"{self._path}, {where}: {error}") from error

  def _row(self, row: int) -> list[str]:
    start = self._starts[row]
    stop = self._starts[row + 1] if row + 1 < len(self._starts) else len(self._map)
    fields = self._parse(self._map[start:stop], f"row {row + 1}")
    if len(fields) != self._width:
      raise UserError(f"{self._path}, row {row + 1}: wanted {self._width} columns, got {len(fields)}")
    return fields

  def __len__(self) -> int:
    return len(self._starts if self._groups is None else self._groups)

  def annotation(self, index: int) -> dict[str, Any]:
    rows = [index] if self._groups is None else self._groups[index]
    table = [self._row(row) for row in rows]
    if (longest := max(len(fields[self._text]) for fields in table)) >= LONG:
      raise UserError(f"{self._path}, row {rows[0] + 1}: caption of {longest:,} characters, wanted fewer than {LONG:,}")
    out = {"id": table[0][self._image], "text": table[0][self._text]}
    if self._groups is not None:
      out["texts"] = tuple(fields[self._text] for fields in table)
    if self._label is not None:
      label = table[0][self._label]
      if not label.strip().isdecimal():
        raise UserError(f"{self._path}, row {rows[0] + 1}: wanted a class number 0, 1, 2 …, got {label!r}")
      out["label"] = int(label)
    return out

  def __getitem__(self, index: int) -> dict[str, Any]:
    out = self.annotation(index)
    path, row = out["id"], index if self._groups is None else self._groups[index][0]
    where = f"{self._path}, row {row + 1}"
    if "://" in path:
      raise UserError(f"{where}: {path!r} is an address, and nothing is fetched during training; download the images "
                      "with img2dataset first, and give a table with their paths")
    full = os.path.normpath(os.path.join(self._root, path))
    if os.path.commonpath([full, self._root]) != self._root:
      raise UserError(f"{where}: {path!r} lies outside of {self._root}; set --config.data.source.images to a directory "
                      "that holds all images")
    try:
      with open(full, "rb") as file:
        check_bytes(os.fstat(file.fileno()).st_size)
        return out | {"image": file.read()}
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
      reason = getattr(error, "strerror", None) or error
      raise UserError(f"{where}: cannot read {full!r}: {reason}; relative paths start at "
                      "--config.data.source.images") from error

  def fingerprint(self) -> str:
    layout = (self._name, len(self._map), self._width, self._image, self._text, self._label, self._groups is None)
    return hashlib.sha256(repr(layout).encode() + self._starts.astype("<i8").tobytes()).hexdigest()[:16]


def line_starts(data: mmap.mmap, begin: int) -> np.ndarray:
  """Returns where the lines of a file start, int64 [rows], from the byte `begin` on; empty lines are left out."""
  data = np.frombuffer(data, np.uint8)
  step = 1 << 26  # bytes looked at together
  breaks = [np.flatnonzero(data[i : i + step] == ord("\n")) + i for i in range(0, len(data), step)]
  starts = np.concatenate([[begin], np.concatenate(breaks) + 1, [len(data) + 1]])
  length = np.diff(starts) - 1
  starts = starts[:-1]
  empty = (length <= 0) | ((length == 1) & (data[np.minimum(starts, len(data) - 1)] == ord("\r")))
  return starts[~empty]
