"""What limber_jax.pack writes: records in ArrayRecord shards, a checksum each, and a manifest of them all.

manifest.json says how many records, bytes and which SHA-256 each shard has. A record is its CRC-32, the length of a
JSON object with all that it has but its image, this object, and the image as an encoded file.
"""

import hashlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources import annotations, check_undivided
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

VERSION = 1
KIND = "limber_jax pack"
MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
OPEN = 256  # shards, at most, that a reading process holds open: systems often allow 1,024 files
WANTED = f"a directory with {MANIFEST}, written by python -m limber_jax.pack SRC DST"
_HEAD = struct.Struct("<II")  # CRC-32 of what follows it; bytes of JSON


def to_bytes(record: dict[str, Any]) -> bytes:
  """Returns a record as a shard holds it.

  Args:
    record: {"id", "text", …} of JSON's types and tuples, and "image": bytes, or none.

  Raises:
    UserError: its texts have more bytes than `from_bytes` reads.
  """
  fields = {k: v for k, v in record.items() if k != "image"}
  if "image" in record:
    fields["image"] = len(record["image"])
  text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
  if len(text) > annotations.OBJECT:
    raise UserError(f"texts of {len(text):,} bytes; at most {annotations.OBJECT:,} are packed in a record")
  body = struct.pack("<I", len(text)) + text + record.get("image", b"")
  return struct.pack("<I", zlib.crc32(body)) + body


def from_bytes(data: bytes) -> dict[str, Any]:
  """Returns the record of `to_bytes`; raises UserError if a bit of it is not as it was written."""
  if len(data) < _HEAD.size:
    raise UserError(f"{len(data)} bytes are no record")
  crc, length = _HEAD.unpack_from(data)
  if zlib.crc32(data[4:]) != crc:
    raise UserError("its checksum does not fit: it was damaged after it was packed")
  out = annotations.one_object(data[_HEAD.size : _HEAD.size + length])
  out = {k: tuple(v) if isinstance(v, list) else v for k, v in out.items()}
  size = out.pop("image", None)
  image = data[_HEAD.size + length :]
  if len(image) != (size or 0) or not all(isinstance(out.get(k), str) for k in ("id", "text")):
    raise UserError("its checksum fits, but it is no record of limber_jax.pack")
  out |= annotations.captions_of(out.get("texts", out["text"])) if size is not None else {}
  if size is not None:
    inputs.check_size(size, inputs.IMAGE)
    out["image"] = image
  return out


def load(directory: str) -> dict[str, Any]:
  """Returns the manifest of a directory; raises UserError if it is none."""
  path = os.path.join(directory, MANIFEST)
  if os.path.exists(os.path.join(directory, UNFINISHED)) and not os.path.exists(path):
    raise UserError(f"{directory} is not finished: run the same python -m limber_jax.pack again, and it resumes")
  manifest = annotations.load(path, WANTED)
  if manifest.get("kind") != KIND or manifest.get("version") != VERSION:
    raise UserError(f"{path}: {manifest.get('kind')!r} of version {manifest.get('version')!r}, wanted {KIND!r} of "
                    f"version {VERSION}")
  shards = annotations.entries(manifest, "shards", path)
  for shard in shards:
    reason = annotations.flaw(shard, file=str, records=int, bytes=int, sha256=str)
    if reason or shard["file"] != os.path.basename(shard["file"]) or "\0" in shard["file"] or shard["records"] < 0:
      raise UserError(f"{path}: a shard that is none ({reason or shard['file']!r})")
  if sum(s["records"] for s in shards) != manifest.get("records"):
    raise UserError(f"{path}: wanted {manifest.get('records')} records, got {sum(s['records'] for s in shards)} in all "
                    "shards")
  return manifest


def digest(path: str) -> str:
  """Returns the SHA-256 of a file, 64 hex digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass
class PackedConfig(Source):
  """Records as they were packed, with all that the source had; their images are encoded files.

  path: the directory.
  split: "train" or "": a packed directory has no parts.

  The bytes and the number of records of every shard are compared with the manifest when the source is opened, each
  record's checksum when it is read. `python -m limber_jax.inspect` compares the digests of shards too.
  """

  name: str = "packed"
  path: str = ""  # the directory
  split: str = Unnamed("train")  # train or "": there are no parts

  def open(self) -> "Packed":
    return Packed(self)


class Packed:
  """A `PackedConfig` whose data are open."""

  def __init__(self, config: PackedConfig):
    self._directory = config.path
    manifest = load(config.path)
    check_undivided(config, "a packed directory")
    self._shards = manifest["shards"]
    broken = []
    for shard in self._shards:
      path = os.path.join(config.path, shard["file"])
      size = os.path.getsize(path) if os.path.isfile(path) else None
      if size is None:
        broken.append(f"{path} is missing")
      elif size != shard["bytes"]:
        broken.append(f"{path}: wanted {shard['records']:,} records in {shard['bytes']:,} bytes, got {size:,}")
      else:
        try:
          _open(path, shard["records"])
        except UserError as error:
          broken.append(str(error))
    if broken:
      raise UserError(f"{len(broken)} of {len(self._shards)} shards are not as packed: {'; '.join(broken[:3])}"
                      f"{'; …' if len(broken) > 3 else ''}; copy them again")
    classes = manifest.get("classes")
    self.classes = None if classes is None else tuple(classes)
    self.templates = tuple(manifest.get("templates") or ()) or None
    self._starts = np.cumsum([0, *(s["records"] for s in self._shards)])
    if not len(self):
      raise UserError(f"{config.path}: no records")
    what = [s["sha256"] for s in self._shards] + [repr(self.classes), *map(repr, self.templates or ())]
    self._digest = hashlib.sha256("\0".join(what).encode()).hexdigest()[:16]
    self._reset()

  def _reset(self) -> None:
    self._lock, self._readers = threading.Lock(), {}

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _reader(self, number: int) -> ArrayRecordReader:
    with self._lock:
      shard = self._shards[number]
      reader = self._readers.pop(number, None) or _open(os.path.join(self._directory, shard["file"]), shard["records"])
      self._readers[number] = reader  # the last is the one used last
      if len(self._readers) > OPEN:
        del self._readers[next(iter(self._readers))]  # closes itself once no thread reads from it
    return reader

  def annotation(self, index: int) -> dict[str, Any]:
    return {k: v for k, v in self[index].items() if k != "image"}

  def __getitem__(self, index: int) -> dict[str, Any]:
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    row = index - int(self._starts[number])
    where = f"{os.path.join(self._directory, self._shards[number]['file'])}, record {row}"
    try:
      data = self._reader(number).read([row])[0]
    except (RuntimeError, IndexError, ValueError) as error:
      raise UserError(f"{where}: cannot be read ({error})") from error
    try:
      return from_bytes(data)
    except UserError as error:
      raise UserError(f"{where}: {error}") from error

  def changed(self) -> list[dict[str, str]]:
    """Returns the shards that are not bit for bit as they were packed, as entries of damage; reads all of them."""
    found = ((s, digest(os.path.join(self._directory, s["file"]))) for s in self._shards)
    return [{"file": s["file"], "id": "shard", "reason": "its SHA-256 is not that of the manifest"}
            for s, got in found if got != s["sha256"]]

  def files(self) -> Iterator[str]:
    yield from (os.path.join(self._directory, file) for file in (MANIFEST, *(s["file"] for s in self._shards)))

  def fingerprint(self) -> str:
    return self._digest


def _open(path: str, records: int) -> ArrayRecordReader:
  """Returns a reader of a shard, safe in threads; raises UserError if it has not as many records."""
  try:
    reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15)
    found = reader.num_records()
  except RuntimeError as error:
    raise UserError(f"{path} cannot be read: {error}") from error
  if found != records:
    raise UserError(f"{path}: wanted {records:,} records, got {found:,}")
  return reader
