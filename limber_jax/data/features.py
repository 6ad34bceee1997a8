"""Features of frozen encoders on disk, read in place of the images that they were computed from.

A directory holds shards, which are ArrayRecord files of the same number of records but for the last, and manifest.json,
which says what they hold and of what; while limber_jax.encode still writes them it is called unfinished.json. Record i,
counted through all shards, belongs to record i of the data source: the arrays [S, F] of its encoders, little-endian,
one behind the other.
"""

import json
import os
import threading
from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401 (numpy then knows "bfloat16")
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from limber_jax.config_json import flatten
from limber_jax.data.sources import Source
from limber_jax.errors import UserError
from limber_jax.map_names import join, split
from limber_jax.runtime import lock
from limber_jax.runtime.atomic import SUFFIX as HALF
from limber_jax.runtime.atomic import atomic_write, commit

VERSION = 1
FINISHED, UNFINISHED = "manifest.json", "unfinished.json"
SUFFIX = ".array_record"
OPEN = 256  # shards, at most, that a reading process holds open: systems often allow 1,024 files
ENCODE_AGAIN = "encode again, with python -m limber_jax.encode --config=… --out=DIRECTORY"

Spec = dict[str, Any]


def describe(source: Source, encoders: dict[str, Spec]) -> Spec:
  """Returns all that features depend on, as JSON holds it.

  Args:
    source: whose images they are of.
    encoders: by the name of the part ("image", "image@name"): "shape" [S, F], "dtype", "weights" (a digest), and
      whatever else decides what comes out.
  """
  what = {"version": VERSION, "source": source.fingerprint(), "records": len(source), "encoders": encoders}
  return json.loads(json.dumps(what))


def key_of(part: str) -> str:
  """Returns "features" for the part "image", and "features@name" for "image@name"."""
  return join("features", split(part)[1])


def record_bytes(what: Spec) -> int:
  """Returns the bytes of one record: features of all encoders."""
  return sum(_bytes(spec) for spec in what["encoders"].values())


def _bytes(spec: Spec) -> int:
  return int(np.prod(spec["shape"])) * np.dtype(spec["dtype"]).itemsize


@dataclass(frozen=True)
class Shards:
  """Where the records lie: `records` of them in files of `per_shard`."""

  directory: str
  records: int
  per_shard: int

  @property
  def count(self) -> int:
    """The number of shards."""
    return -(-self.records // self.per_shard)

  def path(self, number: int) -> str:
    return os.path.join(self.directory, f"features-{number:05d}-of-{self.count:05d}{SUFFIX}")

  def rows(self, number: int) -> range:
    """Returns the numbers of the records in a shard."""
    return range(number * self.per_shard, min((number + 1) * self.per_shard, self.records))

  def open(self, number: int) -> ArrayRecordReader:
    """Returns a reader of a shard, safe in threads; raises UserError if it is missing or cut short."""
    path, wanted = self.path(number), len(self.rows(number))
    if not os.path.isfile(path):
      raise UserError(f"{path} is missing; {ENCODE_AGAIN}")
    try:
      reader = ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=2**15)
      found = reader.num_records()
    except RuntimeError as error:
      raise UserError(f"{path} cannot be read: {error}") from error
    if found != wanted:  # a file that was cut short opens like an empty one
      raise UserError(f"{path}: wanted {wanted} records, got {found}: the file was cut short; {ENCODE_AGAIN}")
    return reader

  def is_whole(self, number: int) -> bool:
    """Returns whether a shard is there with all its records."""
    try:
      self.open(number)
    except UserError:
      return False
    return True


class ShardWriter:
  """Writes one shard, which gets its name once it is whole and on disk; raises UserError if it cannot."""

  def __init__(self, path: str):
    self._path, self._writer = path, None
    # Compressing features takes long and gains little; a group of one is what random access wants.
    self._try(lambda: setattr(self, "_writer", ArrayRecordWriter(f"{path}.tmp", "group_size:1,uncompressed")))

  def write(self, record: bytes) -> None:
    self._try(lambda: self._writer.write(record))

  def close(self) -> None:
    """Ends the shard."""

    def end():
      self._writer.close()
      commit(f"{self._path}.tmp", self._path)

    self._try(end)

  def detach(self) -> None:
    """Leaves nothing behind."""
    self._try(lambda: (self._writer.close(), os.remove(f"{self._path}.tmp")))

  def _try(self, action):
    try:
      action()
    except (OSError, RuntimeError) as error:
      raise UserError(f"{self._path}: cannot write there ({error})") from error


def claim(directory: str, what: Spec, per_shard: int, *, write: bool) -> tuple[Shards, bool]:
  """Returns (where the features go, whether a finished manifest is there); makes the directory if it is new.

  Args:
    directory: new, empty, or of an earlier run for the same features, whose division into shards is then kept.
    what: from `describe`.
    per_shard: records in a shard, if the directory is new.
    write: this is the one process of several that writes down what the directory is for.

  Raises:
    UserError: the directory holds features of something else.
  """
  try:
    stray = os.path.isdir(directory) and any(name.endswith(SUFFIX) for name in os.listdir(directory))
    finished = _read(directory, FINISHED)
    manifest = finished or _read(directory, UNFINISHED)
    if manifest is None:
      if stray:
        raise UserError(f"--out={directory} holds shards but no {FINISHED} that says of what; choose another directory")
      names = os.listdir(directory) if os.path.isdir(directory) else ()
      if there := sorted(n for n in names if not n.startswith(lock.NAME) and n != UNFINISHED + HALF):
        raise UserError(f"--out={directory} is not empty, it has {there[0]}; choose another directory")
      manifest = what | {"records_per_shard": per_shard}
      if write:
        os.makedirs(directory, exist_ok=True)
        _write(directory, UNFINISHED, manifest)
    else:
      _check(f"--out={directory}", what, manifest, "choose another directory, or remove this one", whole=True)
    if write:  # what a run that was killed left behind
      for name in os.listdir(directory):
        if (name.startswith("features-") and name.endswith(".tmp")) or (finished and name == UNFINISHED):
          os.remove(os.path.join(directory, name))
  except OSError as error:
    raise UserError(f"--out={directory}: cannot write there ({error.strerror})") from error
  return Shards(directory, what["records"], manifest["records_per_shard"]), finished is not None


def finish(shards: Shards, what: Spec) -> None:
  """Writes the manifest, now that all shards are there; raises UserError if one is not whole."""
  rows = []
  for number in range(shards.count):
    shards.open(number)
    path = shards.path(number)
    rows.append({"file": os.path.basename(path), "records": len(shards.rows(number)), "bytes": os.path.getsize(path)})
  _write(shards.directory, FINISHED, what | {"records_per_shard": shards.per_shard, "shards": rows})
  if os.path.exists(unfinished := os.path.join(shards.directory, UNFINISHED)):
    os.remove(unfinished)


class FeatureSource:
  """A data source whose images are replaced by features from a directory; see this file's first lines.

  A record is the annotation of the source with "features" [S, F] (and "features@name" of further encoders). It may be
  pickled and read from in threads. Images are never read. The fingerprint is that of the source itself, so that a run
  may resume with features where it began with images, and the other way round.
  """

  def __init__(self, source: Source, directory: str, encoders: dict[str, Spec]):
    """Opens the features in `directory`.

    Args:
      source: whose images they stand for.
      directory: written by limber_jax.encode.
      encoders: as `describe` takes them; the directory may hold others besides.

    Raises:
      UserError: nothing there, not finished, damaged, or of something else; the message says what differs.
    """
    where = f"config.data.features={directory!r}"
    manifest = _read(directory, FINISHED)
    if manifest is None:
      if os.path.exists(os.path.join(directory, UNFINISHED)):
        raise UserError(f"{where} is not finished: run the same python -m limber_jax.encode … --out={directory} again, "
                        "it resumes where it was")
      raise UserError(f"{where}: no {FINISHED} there; make it with python -m limber_jax.encode --config=… "
                      f"--out={directory}")
    what = describe(source, encoders)
    _check(where, what, manifest, ENCODE_AGAIN)
    self.classes = source.classes
    if hasattr(source, "order"):  # a mixture's
      self.order = source.order
    self._source = source
    self._shards = Shards(directory, what["records"], manifest["records_per_shard"])
    self._record_bytes = record_bytes(manifest)
    self._arrays = []  # (key, first byte, shape, type)
    start = 0
    for part, spec in manifest["encoders"].items():
      if part in encoders:
        self._arrays.append((key_of(part), start, tuple(spec["shape"]), spec["dtype"]))
      start += _bytes(spec)
    for row in manifest["shards"]:
      path = os.path.join(directory, row["file"])
      size = os.path.getsize(path) if os.path.isfile(path) else None
      if size != row["bytes"]:
        got = "it is missing" if size is None else f"got {size:,}: the file was cut short or changed"
        raise UserError(f"{path}: wanted {row['records']} records in {row['bytes']:,} bytes, {got}; {ENCODE_AGAIN}")
    self._reset()

  def _reset(self):
    self._lock, self._readers = threading.Lock(), {}

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers")}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return len(self._source)

  def annotation(self, index: int) -> dict[str, Any]:
    return self._source.annotation(index)

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard, row = divmod(index, self._shards.per_shard)
    try:
      record = self._reader(shard).read([row])[0]
    except (RuntimeError, IndexError, ValueError) as error:  # every record has a checksum
      raise UserError(f"{self._shards.path(shard)}: record {row} cannot be read ({error}); {ENCODE_AGAIN}") from error
    if len(record) != self._record_bytes:
      raise UserError(f"{self._shards.path(shard)}: wanted records of {self._record_bytes} bytes, got {len(record)}")
    arrays = {key: np.frombuffer(record, dtype, int(np.prod(shape)), start).reshape(shape)
              for key, start, shape, dtype in self._arrays}
    return {**self._source.annotation(index), **arrays}

  def _reader(self, shard: int) -> ArrayRecordReader:
    with self._lock:
      reader = self._readers.pop(shard, None) or self._shards.open(shard)
      self._readers[shard] = reader  # the last is the one used last
      if len(self._readers) > OPEN:
        del self._readers[next(iter(self._readers))]  # closes itself once no thread reads from it
    return reader

  def fingerprint(self) -> str:
    return self._source.fingerprint()


def _check(where: str, what: Spec, manifest: Spec, hint: str, whole: bool = False) -> None:
  """Raises UserError if a manifest is not of `what`; unless `whole`, it may have more encoders."""
  got, wanted = manifest["encoders"], what["encoders"]
  if missing := sorted(wanted.keys() - got.keys()) or (whole and sorted(got.keys() - wanted.keys())):
    raise UserError(f"{where} holds features of {', '.join(got)}, wanted of {', '.join(wanted)}: not the same "
                    f"{missing[0]!r}; {hint}")
  old = flatten({k: manifest.get(k) for k in ("version", "source", "records")} | {k: got[k] for k in wanted})
  new = flatten({k: what[k] for k in ("version", "source", "records")} | wanted)
  different = [k for k in {**new, **old} if new.get(k) != old.get(k)]
  if different:
    changes = "; ".join(
      f"{k}: got {_format_value(old.get(k))}, wanted {_format_value(new.get(k))}" for k in different[:3])
    raise UserError(f"{where} holds features of something else than this experiment's ({changes}"
                    f"{'; …' if len(different) > 3 else ''}); {hint}")


def _format_value(value: Any) -> str:
  return value[:12] if isinstance(value, str) else str(value)


def _read(directory: str, name: str) -> Spec | None:
  """Returns a manifest, or None if there is none; raises UserError if it is no manifest."""
  path = os.path.join(directory, name)
  if not os.path.exists(path):
    return None
  try:
    with open(path, encoding="utf-8") as file:
      manifest = json.load(file)
    if "encoders" not in manifest and "kind" in manifest:
      raise UserError(f"{path}: what {manifest['kind']} wrote, and no features; choose another directory for these")
    if manifest["version"] != VERSION:
      raise UserError(f"{path}: features of version {manifest['version']}, this program reads {VERSION}; "
                      f"{ENCODE_AGAIN}")
    wanted = {"source", "records", "encoders", "records_per_shard"} | ({"shards"} if name == FINISHED else set())
    if missing := sorted(wanted - manifest.keys()):
      raise UserError(f"{path}: no {missing[0]!r} in it; {ENCODE_AGAIN}")
    return manifest
  except (OSError, ValueError, TypeError, KeyError) as error:
    raise UserError(f"{path} is no manifest of features ({error}); {ENCODE_AGAIN}") from error


def _write(directory: str, name: str, manifest: Spec) -> None:
  with atomic_write(os.path.join(directory, name)) as file:
    json.dump(manifest, file, indent=1)
