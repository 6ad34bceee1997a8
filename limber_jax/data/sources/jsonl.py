"""Lines of JSON: a caption and the path of its image a line, or a text alone for language models."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources import check_undivided
from limber_jax.data.sources.annotations import (
  OBJECT,
  captions_of,
  image_files,
  label_of,
  missing,
  one_object,
  read_image,
  readable,
)
from limber_jax.data.sources.captions import IMAGE_KEYS
from limber_jax.data.sources.tables import choice, line_starts
from limber_jax.data.text import check_encoding, clean, flaw, has_controls
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

TEXT_KEYS = ("caption", "captions", "text", "texts", "title")  # the likeliest first
LAYOUT = 'an object a line, {"image": path, "caption": …} or {"text": …}'


@dataclass
class JsonlConfig(Source):
  """A record a line of a file in UTF-8; empty lines do not count. Memory holds 8 bytes a line.

  path: the file.
  split: "train" or ""; a file has no parts.
  images: the directory that paths start from, "" = that of the file; nothing outside it is read.
  image_key, text_key: entries of the objects; "" = the first known name of each line: filepath, image, … and caption,
    captions, text … A list of captions is several. A line without a path of an image is a record without an image,
    whose text may be as long as a line: 1 MiB.
  label_key: an entry with a class number; "" = no labels.

  A record's id is the file's name and its number. A broken line is a record that cannot be read; it is named by its
  number too, counted from 1 among lines that are not empty.
  """

  paths = ("path", "images")

  name: str = "jsonl"
  path: str = ""        # the file
  split: str = Unnamed("train")  # train or "": there are no parts
  images: str = ""      # the directory that paths of images start from; "" = that of the file
  image_key: str = ""   # the entry with the path; "" = the first known name
  text_key: str = ""    # the entry with the caption, or a list of them; "" = the first known name
  label_key: str = ""   # an entry with a class number; "" = no labels

  def open(self) -> "Jsonl":
    return Jsonl(self)


class Jsonl:
  """A `JsonlConfig` whose data are open."""

  classes = None

  def __init__(self, config: JsonlConfig):
    self._config, self._path = config, config.path
    where = f"config.data.source.path={config.path!r}"
    if what := inputs.what_is(config.path) or ("" if os.path.getsize(config.path) else "is empty"):
      raise UserError(f"{where}: {what}; wanted {LAYOUT}; point at yours with --config.data.source.path=FILE")
    check_undivided(config, "a file of lines")
    self._name = os.path.basename(config.path)
    self._root = os.path.abspath(config.images or os.path.dirname(config.path) or ".")
    self._open()
    begin = check_encoding(self._map, self._path)
    self._starts = line_starts(self._map, begin)
    if not len(self._starts):
      raise UserError(f"{where} has no lines; wanted {LAYOUT}")
    self._check_lines()
    self.notes = self._choices()
    # Where texts are not as the file has them, which they were once.
    self._cleaned = ("cleaned",) * has_controls(self._map, begin, escaped=True)

  def _choices(self) -> list[str]:
    """Returns what is to be said of a choice between several captions, as the first line has them."""
    stop = int(self._starts[1]) if len(self._starts) > 1 else len(self._map)
    try:
      entry = one_object(self._map[int(self._starts[0]) : min(stop, int(self._starts[0]) + OBJECT)].rstrip(b"\r\n"))
    except UserError:
      return []
    found = [key for key in TEXT_KEYS if key in entry]
    return [] if self._config.text_key or len(found) < 2 else [choice(self._name, "captions", found, "text_key")]

  def _check_lines(self) -> None:
    """Raises UserError if the file is JSON, but no lines of it."""
    first = bytes(self._map[int(self._starts[0]) : int(self._starts[0]) + 64]).lstrip()
    last = bytes(self._map[-64:]).rstrip()
    if first.startswith(b"[") and last.endswith(b"]") and (len(self._starts) > 1 or b"{" in first):
      raise UserError(f"{self._path}: one JSON array, wanted {LAYOUT}; convert it: jq -c '.[]' OLD > NEW.jsonl")
    if first.split(b"\n")[0].strip() == b"{" and last.endswith(b"}"):
      raise UserError(f"{self._path}: objects over several lines each, wanted {LAYOUT}; convert it: jq -c . OLD > "
                      "NEW.jsonl")

  def _open(self) -> None:
    self._map = inputs.mapped(self._path)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_map"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return len(self._starts)

  def _read(self, index: int) -> tuple[dict[str, Any], str]:
    """Returns (annotation, path of the image or "") of a line."""
    config, start = self._config, int(self._starts[index])
    stop = int(self._starts[index + 1]) if index + 1 < len(self._starts) else len(self._map)
    if stop - start > OBJECT + 2:
      raise UserError(f"{stop - start:,} bytes; at most {OBJECT:,} are read of a line")
    entry = one_object(self._map[start:stop].rstrip(b"\r\n"))
    image = _find(entry, config.image_key, IMAGE_KEYS)
    text = _find(entry, config.text_key, TEXT_KEYS)
    if text is None or (config.image_key and image is None):
      wanted = (config.image_key if text is not None else config.text_key) or TEXT_KEYS[0]
      raise UserError(missing(wanted, entry))
    out = {"id": f"{self._name}/{index}"}
    if image is None and isinstance(entry[text], str):
      out["text"] = clean(entry[text])
      if reason := flaw(out["text"], "text", longest=0):
        raise UserError(reason)
    else:
      out |= captions_of(entry[text], "caption" if image is not None else "text")
    if config.label_key:
      out |= label_of(entry.get(config.label_key), config.label_key)
    if image is not None and not (isinstance(entry[image], str) and entry[image]):
      raise UserError(f"wanted a path in {image!r}, got {entry[image]!r:.80}")
    return out, entry[image] if image is not None else ""

  def annotation(self, index: int) -> dict[str, Any]:
    try:
      return self._read(index)[0]
    except UserError as error:
      raise UserError(f"{self._path}, line {index + 1}: {error}") from error

  def image_path(self, index: int) -> str:
    """Returns the path of a record's image, which other records may have too; raises UserError if there is none."""
    if path := self._read(index)[1]:
      return path
    raise UserError(f"{self._path}, line {index + 1}: a text without an image")

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      out, path = self._read(index)
      return out | {"image": read_image(self._root, path, ())} if path else out
    except UserError as error:
      raise UserError(f"{self._path}, line {index + 1}: {error}") from error

  def files(self) -> Iterator[str]:
    yield self._path
    yield from image_files(self._root, readable(self.image_path, len(self)))

  def fingerprint(self) -> str:
    c = self._config
    layout = (self._name, len(self._map), c.image_key, c.text_key, c.label_key, *self._cleaned)
    return hashlib.sha256(repr(layout).encode() + self._starts.astype("<i8").tobytes()).hexdigest()[:16]


def _find(entry: dict[str, Any], wanted: str, known: tuple[str, ...]) -> str | None:
  """Returns the name under which an object has something: `wanted`, or for "" the first known one; None without any."""
  return next((k for k in ((wanted,) if wanted else known) if k in entry), None)

