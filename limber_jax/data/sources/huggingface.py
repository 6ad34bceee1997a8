"""Data sets that the library `datasets` saved to disk, read without it: no code of theirs is run."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources import annotations
from limber_jax.data.sources.annotations import image_files
from limber_jax.data.sources.parquet import Columns, image_of, names_of
from limber_jax.errors import UserError, did_you_mean
from limber_jax.runtime import inputs

STATE, SPLITS = "state.json", "dataset_dict.json"
WANTED = f"what Dataset.save_to_disk or DatasetDict.save_to_disk wrote: a directory with {STATE} or {SPLITS}"
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream


@dataclass
class HuggingfaceConfig(Source):
  """A record a row. Files are mapped into memory: it holds no more than a few bytes for each 1,000 rows.

  path: the directory, of a Dataset or of a DatasetDict.
  split: of a DatasetDict; "" = the only one. Of a Dataset its own, "train" or "".
  images: the directory that paths of images start from, where a row has no bytes; "" = `path`.
  image_key, text_key, label_key: columns; see the source "parquet".

  A record's id is the split and its number. A file that was cut off is named when the source is opened.
  """

  paths = ("path", "images")

  name: str = "huggingface"
  path: str = ""        # the directory of a Dataset or a DatasetDict
  split: str = Unnamed("train")  # of a DatasetDict; "" = the only one
  images: str = ""      # the directory that paths of images start from; "" = path
  image_key: str = ""   # the column of images, or of their paths; "" = the first that fits
  text_key: str = ""    # the column of captions; "" = the first known name
  label_key: str = ""   # the column of class numbers; "" = the first of named classes

  def open(self) -> "Huggingface":
    return Huggingface(self)

  def splits(self) -> tuple[str, ...]:
    return () if os.path.isfile(os.path.join(self.path, STATE)) else tuple(_names(self.path))


class Huggingface:
  """A `HuggingfaceConfig` whose data are open."""

  def __init__(self, config: HuggingfaceConfig):
    self._directory = _split(config)
    self._root = os.path.abspath(config.images or config.path)
    state = annotations.load(os.path.join(self._directory, STATE), WANTED)
    files = annotations.entries(state, "_data_files", os.path.join(self._directory, STATE))
    self._files = []
    for file in files:
      reason = annotations.flaw(file, filename=str)
      if reason or file["filename"] != os.path.basename(file["filename"]) or "\0" in file["filename"]:
        raise UserError(f"{self._directory}/{STATE}: wanted names of files beside it in '_data_files', got {file!r:.80}"
                        + f" ({reason})" * bool(reason))
      self._files.append(file["filename"])
    own = state.get("_split")
    self._name = own if isinstance(own, str) else "data"
    if config.split not in ("", "train", own) and self._directory == config.path:
      raise UserError(f"config.data.source.split={config.split!r}: {config.path} is of the split {own!r}")
    self._open()
    self._columns = Columns.of(self._schema, config, self._directory)
    self.notes = self._columns.notes(self._schema, config, self._directory)
    self.classes = self._columns.classes
    if not len(self):
      raise UserError(f"{self._directory}: no rows; wanted {WANTED}")
    sizes = [(f, os.path.getsize(os.path.join(self._directory, f))) for f in self._files]
    what = (sizes, self._starts.tolist(), self._columns, self._name)
    self._digest = hashlib.sha256(repr(what).encode()).hexdigest()[:16]

  def _open(self) -> None:
    """Maps the files; raises UserError for those that are missing, cut off or damaged."""
    batches, broken, self._schema = [], [], None
    for file in self._files:
      path = os.path.join(self._directory, file)
      try:
        found = _batches(path)
        self._schema = self._schema or found[0]
        if not found[0].equals(self._schema):
          raise UserError(f"other columns than in {self._files[0]}")
        batches += found[1]
      except (pa.ArrowException, OSError, UserError, ValueError, MemoryError) as error:
        broken.append(f"{path}: {' '.join(str(error).split())}")
    if broken:
      raise UserError(f"{len(broken)} of {len(self._files)} files cannot be used: {'; '.join(broken[:3])}"
                      f"{'; …' if len(broken) > 3 else ''}; wanted {WANTED}")
    self._batches = batches
    self._starts = np.cumsum([0, *(b.num_rows for b in batches)])

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_batches", "_schema", "_starts")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _cells(self, index: int, columns: list[str]) -> dict[str, Any]:
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    row = index - int(self._starts[number])
    try:
      return {name: _cell(self._batches[number].column(name), row) for name in columns}
    except (pa.ArrowException, ValueError) as error:  # offsets that lead out of the file, texts that are not UTF-8
      raise UserError(f"damaged ({' '.join(str(error).split())})") from error

  def annotation(self, index: int) -> dict[str, Any]:
    return self._record(index, image=False)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._record(index, image=True)

  def _record(self, index: int, image: bool) -> dict[str, Any]:
    columns = self._columns
    try:
      out = columns.annotation(f"{self._name}/{index}", self._cells(index, columns.described))
      if image and columns.image:
        out["image"] = image_of(self._cells(index, [columns.image])[columns.image], columns.image, self._root)
      return out
    except UserError as error:
      raise UserError(f"{self._directory}, row {index}: {error}") from error

  def files(self) -> Iterator[str]:
    yield from (os.path.join(self._directory, name) for name in (STATE, *self._files))
    column = self._columns.image
    for batch in self._batches if column else ():
      yield from image_files(self._root, names_of(batch.column(column)))

  def fingerprint(self) -> str:
    return self._digest


def _split(config: HuggingfaceConfig) -> str:
  """Returns the directory with the rows."""
  path = os.path.normpath(config.path) if config.path else ""
  if path and os.path.isfile(os.path.join(path, STATE)):
    return config.path
  if not path or not os.path.isfile(os.path.join(path, SPLITS)):
    what = f"neither {STATE} nor {SPLITS} in it" if os.path.isdir(path) else "no such directory"
    raise UserError(f"config.data.source.path={config.path!r}: {what}; wanted {WANTED}; point at yours with "
                    "--config.data.source.path=DIRECTORY")
  known = _names(path)
  split = config.split or (known[0] if len(known) == 1 else "")
  if split not in known:
    raise UserError(f"config.data.source.split={config.split!r}: no such split in {config.path}"
                    f"{did_you_mean(split, known)}")
  return os.path.join(path, split)


def _names(path: str) -> list[str]:
  """Returns the splits of a DatasetDict, none where there is none."""
  file = os.path.join(path, SPLITS)
  if not os.path.isfile(file):
    return []
  names = annotations.entries(annotations.load(file, WANTED), "splits", file)
  return [n for n in names if isinstance(n, str) and n == os.path.basename(n) and n not in ("", ".", "..")]


def _batches(path: str) -> tuple[pa.Schema, list[pa.RecordBatch]]:
  """Returns the columns and the pieces of an Arrow stream, which stay on disk."""
  with inputs.opened(path) as file:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - len(END), 0))
    if file.read() != END:
      raise UserError(f"{size:,} bytes: it has no end, so it was cut off; fetch it again")
  with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
    batches = list(stream)
    if file.tell() != size:
      raise UserError(f"{size:,} bytes, of which {file.tell():,} can be read; fetch it again")
    schema = stream.schema
  for batch in batches:
    batch.validate()  # that what the columns say fits into the file; each row is looked at when it is read
  return schema, batches


def _cell(column: pa.Array, row: int) -> Any:
  """Returns the value of a row. Arrow trusts offsets in a file: those of this row are looked at first."""
  piece = column.slice(row, 1)
  if piece.null_count:
    return None
  if isinstance(column, pa.StructArray):
    return {f.name: _cell(column.field(i), row) for i, f in enumerate(column.type)}
  piece.validate(full=True)
  return piece[0].as_py()
