"""Tables of captions and image files: Conceptual Captions' and open_clip's layouts."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax.config import Source, Unnamed
from limber_jax.data import text
from limber_jax.data.sources import tables
from limber_jax.data.sources.annotations import captions_of, image_files, readable
from limber_jax.errors import UserError
from limber_jax.ranges import ranged
from limber_jax.runtime import inputs

IMAGE_KEYS = ("filepath", "image", "image_path", "path", "file", "filename", "file_name")  # the likeliest first
TEXT_KEYS = ("caption", "captions", "title", "text")  # where a caption is there, a title is often a file's name

LAYOUTS = ("a tab-separated table of caption and image path without a header (Conceptual Captions), or a table with a "
           "header such as filepath and title, separated by tabs or commas (open_clip)")


@dataclass
class CaptionsConfig(Source):
  """A text table in UTF-8 with one caption and the path of its image a row.

  With a header, columns have names, in any letter case. Without one, the columns are caption and path, separated by a
  tab, and quotes are letters like any other. Images stay on disk, and so do the captions: memory holds 8 bytes a row.
  A row whose caption is empty is a record that cannot be read.

  path: the table.
  split: train = a record a row, as open_clip trains; images = a record an image, with the captions of all its rows
    (memory then holds the paths).
  images: the directory that paths start from, "" = that of the table; nothing outside it is read.
  image_key, text_key: columns; "" = the first known name: filepath, image, … and caption, title, text. Where several
    are there, `notes` says which was taken.
  label_key: a column of whole numbers; "" = no labels.
  separator: "" = tab for .tsv or where the first line has one, else comma, semicolon or bar. Where a space follows each
    of them, it is left out.
  quoting: csv = a field may stand in quotes, in which quotes are doubled, and separators and line breaks are letters;
    none = quotes are letters. "" = csv where no tab separates; of tabs see `tables.quoting`.
  """

  paths = ("path", "images")

  name: str = "captions"
  path: str = ""        # the table
  split: str = Unnamed("train")  # train: a record a row | images: a record an image, with all its captions
  images: str = ""      # the directory that paths of images start from; "" = that of the file
  image_key: str = ""   # the column of paths; "" = the first known name
  text_key: str = ""    # the column of captions; "" = the first known name
  label_key: str = ""   # a column of class numbers; "" = no labels
  separator: str = ""   # of columns; "" = by file name and first line: tab, comma, ; or |
  # none: quotes are letters | csv: a field may stand in them; "" = csv unless tabs separate
  quoting: str = ranged("", choices=("", "none", "csv"))

  def open(self) -> "Captions":
    return Captions(self)


class Captions:
  """A `CaptionsConfig` whose data are open."""

  classes = None

  def __init__(self, config: CaptionsConfig):
    self._path, self._name = config.path, os.path.basename(config.path)
    if what := inputs.what_is(config.path):
      raise UserError(f"config.data.source.path={config.path!r}: {what}; wanted {LAYOUTS}; point at yours with "
                      "--config.data.source.path=FILE, and at its images with --config.data.source.images=DIRECTORY")
    if not os.path.getsize(config.path):
      raise UserError(f"config.data.source.path={config.path!r} is empty; wanted {LAYOUTS}")
    self._root = os.path.abspath(config.images or os.path.dirname(config.path) or ".")
    self.notes: list[str] = []
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
    self._map = inputs.mapped(self._path)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_map", "_table")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()
    self._table = tables.Table(self._map, self._path, *self._layout)

  def _columns(self, config: CaptionsConfig) -> None:
    """Finds out how the table is laid out, and where its rows start."""
    known = (*IMAGE_KEYS, *TEXT_KEYS, config.image_key.lower(), config.text_key.lower())
    table, header = tables.open_table(self._map, self._path, config.separator, known)
    self._table, self._layout = table, (table.begin, table.end, table.separator, table.spaced)
    image, images = tables.choose(header, config.image_key, IMAGE_KEYS)
    caption, captions = tables.choose(header, config.text_key, TEXT_KEYS)
    label = tables.column(header, config.label_key) if config.label_key else None
    named = any((config.image_key, config.text_key, config.label_key))
    self._label, self._quoted, matters = None, False, False
    if image is not None and caption is not None and (label is not None or not config.label_key):
      self._image, self._text, self._width = header.index(image), header.index(caption), len(header)
      self._label = None if label is None else header.index(label)
      self._quoted, matters, why = tables.quoting(table, header, config.quoting)
      self._note(images, captions, why)
      if self._quoted and self._map.find(b'"') >= 0:
        starts = tables.quoted_starts(table, self._width, self._image, config.quoting == "csv")
        self._note_breaks(starts, config.quoting)
        starts = starts[1:]
      else:
        starts = tables.line_starts(self._map, table.begin, table.end)[1:]
    else:
      tables.check_columns(table, header, (*TEXT_KEYS, config.text_key))
      # Quotes are letters here, unless the user says that they are not.
      self._quoted = tables.is_csv(config.quoting)
      first_row = table.fields(table.line(table.begin), self._quoted, f"{self._path}, line 1")
      if named or table.separator != "\t" or len(first_row) != 2:
        first = config.image_key if image is None else config.text_key if caption is None else config.label_key
        raise tables.missing(table, first, header, LAYOUTS)
      self._text, self._image, self._width = 0, 1, 2
      starts = (tables.quoted_starts(table, 2, 1, True) if self._quoted else
                tables.line_starts(self._map, table.begin, table.end))
      tables.check_order(table, starts)
    self._starts = starts
    if not len(starts):
      raise UserError(f"{self._path} has a header and no rows")
    # What the captions of the same bytes depend on, where it was not always so read.
    self._reading = ("none",) * (matters and not self._quoted) + ("cleaned",) * text.has_controls(
      self._map, table.begin)

  def _note(self, images: list[str], captions: list[str], why: str) -> None:
    """Says what was chosen where another choice was possible."""
    for found, what, field in ((images, "images", "image_key"), (captions, "captions", "text_key")):
      if len(found) > 1:
        self.notes.append(tables.choice(self._name, what, found, field))
    if why:
      letters = "fields are quoted as in CSV" if self._quoted else "quotes are letters"
      self.notes.append(f"{self._name}: {letters}, for {why}; source.quoting says otherwise")

  def _note_breaks(self, starts: np.ndarray, quoting: str) -> None:
    """Says how many lines are inside quotes, where the user did not say that there are any."""
    inner = np.setdiff1d(tables.line_starts(self._map, self._table.begin, self._table.end), starts)
    if len(inner) and quoting != "csv":
      self.notes.append(f"{self._name}: {len(inner):,} lines are taken for parts of a quoted field, the first line "
                        f"{self._table.number(int(inner[0]))}; source.quoting=none reads quotes as letters")

  def _row(self, row: int) -> list[str]:
    start = self._starts[row]
    stop = self._starts[row + 1] if row + 1 < len(self._starts) else len(self._map)
    fields = self._table.fields(self._map[start:stop], self._quoted, f"{self._path}, row {row + 1}")
    if len(fields) != self._width:
      hint = "; a line break in a field?" if len(fields) < self._width and not self._quoted else ""
      raise UserError(f"{self._path}, row {row + 1}: wanted {self._width} columns, got {len(fields)}{hint} (line "
                      f"{self._table.number(start)})")
    return fields

  def __len__(self) -> int:
    return len(self._starts if self._groups is None else self._groups)

  def annotation(self, index: int) -> dict[str, Any]:
    rows = [index] if self._groups is None else self._groups[index]
    table = [self._row(row) for row in rows]
    out: dict[str, Any] = {"id": table[0][self._image].strip()}
    try:
      # Where quotes are letters, what a CSV writer leaves of an empty field is an empty field too.
      none = "" if self._quoted else '""'
      out |= captions_of([fields[self._text] if fields[self._text] != none else "" for fields in table])
    except UserError as error:
      raise UserError(f"{self._path}, row {rows[0] + 1}: {error}") from error
    if self._groups is not None:
      out.setdefault("texts", (out["text"],))
    if self._label is not None:
      label = table[0][self._label]
      if not label.strip().isdecimal():
        raise UserError(f"{self._path}, row {rows[0] + 1}: wanted a class number 0, 1, 2 …, got {label!r}")
      out["label"] = int(label)
    return out

  def image_path(self, index: int) -> str:
    """Returns the path of a record's image, which other records may have too."""
    return self._row(index if self._groups is None else self._groups[index][0])[self._image].strip()

  def __getitem__(self, index: int) -> dict[str, Any]:
    out = self.annotation(index)
    path, row = out["id"], index if self._groups is None else self._groups[index][0]
    where = f"{self._path}, row {row + 1}"
    if "://" in path:
      raise UserError(f"{where}: {path!r} is an address, and nothing is fetched during training; download the images "
                      "with img2dataset first, and give a table with their paths")
    full = inputs.below(self._root, path)
    if full is None:
      raise UserError(f"{where}: {path!r} lies outside of {self._root}; set --config.data.source.images to a directory "
                      "that holds all images")
    try:
      return out | {"image": inputs.read(full, inputs.IMAGE)}
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
      reason = getattr(error, "strerror", None) or error
      raise UserError(f"{where}: cannot read {full!r}: {reason}; relative paths start at "
                      "--config.data.source.images") from error

  def files(self) -> Iterator[str]:
    yield self._path
    yield from image_files(self._root, readable(self.image_path, len(self)))

  def fingerprint(self) -> str:
    layout = (self._name, len(self._map), self._width, self._image, self._text, self._label, self._groups is None,
              *self._reading)
    return hashlib.sha256(repr(layout).encode() + self._starts.astype("<i8").tobytes()).hexdigest()[:16]
