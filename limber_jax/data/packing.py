"""Packs any data source into ArrayRecord shards: what `limber_jax.pack` calls, and says."""

import io
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from PIL import Image

from limber_jax.config import Source
from limber_jax.data import checks, sources, text
from limber_jax.data.features import ShardWriter
from limber_jax.data.images import FORMATS, PLAIN, ImageOptions, sniff
from limber_jax.data.sources import annotations, packed
from limber_jax.data.transforms import decode, resize_shortest_edge
from limber_jax.data.workers import end_with_parent
from limber_jax.errors import UserError
from limber_jax.runtime import lock
from limber_jax.runtime.atomic import atomic_write
from limber_jax.runtime.signals import StopRequest

DROPPED = "dropped.jsonl"
PER_SHARD = 10_000
QUALITY = 95       # img2dataset's
PROGRESS = 10.0    # seconds between two lines of progress


@dataclass(frozen=True)
class Packing:
  """How records are packed, and where."""

  directory: str
  records: int
  per_shard: int
  shrink: int = 0          # pixels of the shorter side; 0 = as they are
  quality: int = QUALITY   # of JPEG
  allowed: int = 0         # records that may be dropped
  images: ImageOptions = PLAIN

  @property
  def count(self) -> int:
    """The number of shards."""
    return -(-self.records // self.per_shard)

  def path(self, number: int, suffix: str = ".array_record") -> str:
    return os.path.join(self.directory, f"records-{number:05d}-of-{self.count:05d}{suffix}")

  def rows(self, number: int) -> range:
    """Returns the numbers of the source's records that a shard is made of."""
    return range(number * self.per_shard, min((number + 1) * self.per_shard, self.records))

  def done(self, number: int) -> dict[str, Any] | None:
    """Returns what is known of a shard that is whole: its line of the manifest, and "dropped"; None if it is not."""
    try:
      with open(self.path(number, ".json"), encoding="utf-8") as file:
        shard = json.load(file)
      return shard if os.path.getsize(self.path(number)) == shard["bytes"] else None
    except (OSError, ValueError, KeyError):
      return None


def prepared(record: dict[str, Any], shrink: int, quality: int, images: ImageOptions = PLAIN
             ) -> dict[str, Any]:
  """Returns a record as it is packed, its image decoded once; raises UserError if image or captions cannot be read."""
  if "image" not in record:
    return record
  for caption in record.get("texts", (record["text"],)):
    if reason := text.flaw(caption, "caption"):
      raise UserError(reason)
  image = record["image"]
  pixels = decode(image, images)
  shrunk = bool(shrink) and min(pixels.shape[:2]) > shrink
  kind, turn = sniff(image) if isinstance(image, bytes) else ("", None)
  if not shrunk and kind in FORMATS and not (images.exif and turn is not None):
    return record
  picture = Image.fromarray(pixels)
  if shrunk:
    picture = picture.resize(resize_shortest_edge(picture, shrink), Image.Resampling.BICUBIC)
  out = io.BytesIO()
  if kind not in ("JPEG", "WEBP"):
    picture.save(out, "PNG")
  else:
    picture.save(out, "JPEG", quality=quality)
  return record | {"image": out.getvalue()}


def write_shard(source: sources.Source, packing: Packing, number: int, stop: Callable[[], bool]) -> list[dict] | None:
  """Writes a shard and then what is known of it; both appear once they are whole.

  Returns:
    What was dropped; None if it was stopped. Of more than `packing.allowed` the rest is not tried.

  Raises:
    UserError: it cannot be written.
  """
  dropped: list[dict[str, Any]] = []
  writer, records = ShardWriter(packing.path(number)), 0
  empty: list[str] = []  # captions that say nothing
  try:
    for index in packing.rows(number):
      if stop():
        return None
      record: dict[str, Any] = {}
      try:
        record = source[index]
        data = packed.to_bytes(prepared(record, packing.shrink, packing.quality, packing.images))
      except UserError as error:
        dropped.append({"index": index, "id": record.get("id", ""), "reason": str(error)})
        if len(dropped) > packing.allowed:
          return dropped
        continue
      writer.write(data)
      records += 1
      empty += checks.placeholders(record.get("texts", (record["text"],)))
    writer.close()
    writer = None
  finally:
    if writer is not None:
      writer.detach()
  path = packing.path(number)
  _write(packing.path(number, ".json"), [{
    "file": os.path.basename(path), "records": records, "bytes": os.path.getsize(path), "sha256": packed.digest(path),
    "dropped": dropped} | ({"placeholders": empty} if empty else {})])
  return dropped


def pack(config: Source, out: str, *, shrink: int = 0, quality: int = QUALITY, per_shard: int = PER_SHARD,
         damaged: float = 0.01, workers: int = 0, images: ImageOptions = PLAIN,
         log: Callable[[str], None] = print) -> dict[str, Any] | None:
  """Packs a source into the directory `out`, resuming where an earlier run ended.

  Args:
    config: of the source.
    out: new, empty, or of an earlier run with the same data and settings.
    shrink: pixels that the shorter side of an image is scaled down to; 0 leaves images as they are.
    quality: of the JPEG files of shrunk images.
    per_shard: records of the source that a shard is made of.
    damaged: the share of records that may be dropped.
    workers: processes; 0 packs in this one.
    images: which image files are read, and which way up.
    log: prints a line.

  Returns:
    The manifest; None if a signal stopped it.

  Raises:
    UserError: too much damage, something else in `out`, another process that packs there, no room, or a worker that
      died.
  """
  for name, value, low, high in (("shrink", shrink, 0, 10_000), ("quality", quality, 1, 100),
                                 ("damaged", damaged, 0, 1), ("per_shard", per_shard, 1, 10**9),
                                 ("workers", workers, 0, 1024)):
    if not low <= value <= high:
      raise UserError(f"--{name}={value}: wanted {low} to {high:,}")
  with lock.Lock(f"{out}/{lock.NAME}", what=out, otherwise="choose another directory"), StopRequest() as stop:
    source = config.open()
    packing = Packing(out, len(source), per_shard, shrink, quality, int(damaged * len(source)), images)
    what = {"kind": packed.KIND, "version": packed.VERSION, "source": config.name, "fingerprint": source.fingerprint(),
            "records_of_source": len(source), "per_shard": per_shard, "shrink": shrink, "quality": quality,
            "classes": source.classes, **images.changes()}
    if getattr(source, "templates", None):
      what["templates"] = source.templates
    what = json.loads(json.dumps(what))
    if manifest := _claim(out, what):
      log(f"{out} is complete: {manifest['records']:,} records in {len(manifest['shards'])} shards")
      return manifest
    whole = [packing.done(k) for k in range(packing.count)]
    todo = [k for k, shard in enumerate(whole) if shard is None]
    dropped = [d for shard in whole if shard for d in shard["dropped"]]
    log(f"{config.name} {config.path}: {len(source):,} records, {len(todo)} of {packing.count} shards to write")
    for note in getattr(source, "notes", ()):
      log(note)
    total = sum(len(packing.rows(k)) for k in todo)
    records, start, said = 0, time.perf_counter(), time.perf_counter()
    for number, found in _written(source, packing, todo, workers, stop):
      records += len(packing.rows(number))
      dropped += found
      if len(dropped) > packing.allowed:
        _write(os.path.join(out, DROPPED), _lines(config, source, dropped))
        first = min(dropped, key=lambda d: d["index"])
        raise UserError(f"more than {packing.allowed:,} of {len(source):,} records cannot be read, which is what "
                        f"--damaged={damaged} allows; the first is {first['index']}: {first['reason']}; all so far are "
                        f"in {out}/{DROPPED}")
      now = time.perf_counter()
      if now - said >= PROGRESS:
        rate, said = records / (now - start), now
        log(f"{records:,} of {total:,} records  {rate:,.0f} records/s  dropped {len(dropped):,}  "
            f"left {math.ceil((total - records) / rate):,} s")
    if stop() and any(packing.done(k) is None for k in todo):
      log(f"stopped by {stop.name}; the same command resumes after the shards that are whole")
      return None
    manifest = _finish(config, source, packing, what, log)
  log(f"done: {manifest['records']:,} records in {packing.count} shards, {manifest['dropped']:,} dropped; train with "
      f"--config.data.source.name=packed --config.data.source.path={out}")
  return manifest


def _claim(out: str, what: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the manifest of a finished directory; of another writes down what it is for, and returns None.

  Raises:
    UserError: it holds something else.
  """
  try:
    os.makedirs(out, exist_ok=True)
    for name in (packed.MANIFEST, packed.UNFINISHED):
      if os.path.exists(path := os.path.join(out, name)):
        old = annotations.load(path, packed.WANTED)
        if different := [k for k in what if old.get(k) != what[k]]:
          changes = "; ".join(f"{k}: {old.get(k)!r:.40}, now {what[k]!r:.40}" for k in different[:3])
          raise UserError(f"{out} was begun with other data or settings ({changes}); choose another directory, or "
                          "remove this one")
        if name == packed.MANIFEST:
          packed.Packed(Source("packed", out))
          _clear(out)
          return packed.load(out)
        _clear(out, keep=".json")
        return None
    if there := sorted(name for name in os.listdir(out) if not name.startswith(lock.NAME)):
      raise UserError(f"{out} is not empty, it has {there[0]}; choose another directory")
    _write(os.path.join(out, packed.UNFINISHED), [what])
  except OSError as error:
    raise UserError(f"{out}: cannot write there ({error.strerror})") from error
  return None


def _clear(out: str, keep: str = "") -> None:
  """Removes what an earlier run left behind; `keep` is the suffix of what is known of whole shards."""
  for name in os.listdir(out):
    ours = name.startswith("records-") and name.endswith((".tmp", *([] if keep else [".json"])))
    if ours or (not keep and name == packed.UNFINISHED):
      os.remove(os.path.join(out, name))


def _finish(config: Source, source: sources.Source, packing: Packing, what: dict[str, Any],
            log: Callable[[str], None]) -> dict[str, Any]:
  """Writes the manifest and the list of what was dropped, now that all shards are there."""
  shards = [packing.done(k) for k in range(packing.count)]
  dropped = [d for shard in shards for d in shard.pop("dropped")]
  empty = [text for shard in shards for text in shard.pop("placeholders", ())]
  manifest = what | {"records": sum(s["records"] for s in shards), "dropped": len(dropped), "shards": shards}
  if not manifest["records"]:
    raise UserError(f"none of {packing.records:,} records can be read; the first: {dropped[0]['reason']}")
  if empty:
    manifest["placeholders"] = len(empty)
    log(f"captions that say nothing: {len(empty):,}, such as {empty[0]!r}; they are kept")
  _write(os.path.join(packing.directory, DROPPED), _lines(config, source, dropped))
  _write(os.path.join(packing.directory, packed.MANIFEST), [manifest], indent=1)
  _clear(packing.directory)
  return manifest


def _lines(config: Source, source: sources.Source, dropped: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns the lines of dropped.jsonl: what the source found when it was opened, and then records by their numbers."""
  file = os.path.basename(os.path.normpath(config.path)) if config.path else config.name
  found = [{"file": d["file"], "index": None, "id": d["id"], "reason": d["reason"]}
           for d in getattr(source, "damage", [])]
  return found + [{"file": file, **d} for d in sorted(dropped, key=lambda d: d["index"])]


def _write(path: str, rows: Sequence[Any], indent: int | None = None) -> None:
  """Writes a row of JSON a line into a file that appears once it is whole; raises UserError if it cannot."""
  with atomic_write(path) as file:
    file.writelines(json.dumps(row, indent=indent) + "\n" for row in rows)


def _written(source: sources.Source, packing: Packing, todo: Sequence[int], workers: int, stop: StopRequest
             ) -> Iterator[tuple[int, list[dict[str, Any]]]]:
  """Yields (number, what was dropped) of each shard once it is written, until `stop` says so."""
  if not workers or not todo:
    for number in todo:
      if (dropped := write_shard(source, packing, number, stop)) is None:
        return
      yield number, dropped
    return
  context = multiprocessing.get_context("spawn")
  end = context.Event()
  pool = ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (source, packing, end))
  try:
    waiting = {pool.submit(_work, number): number for number in todo}
    while waiting and not stop():
      done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
      for future in done:
        if (dropped := future.result()) is not None:
          yield waiting[future], dropped
        del waiting[future]
  except BrokenProcessPool as error:
    if not stop():
      raise UserError("a worker process died: killed, perhaps for want of memory; the same command resumes after the "
                      "shards that are whole") from error
  finally:
    end.set()
    pool.shutdown(cancel_futures=True)


_own: dict[str, Any] = {}  # of a worker process


def _begin(source: sources.Source, packing: Packing, end: Any) -> None:
  _own.update(source=source, packing=packing, end=end)
  for number in (signal.SIGINT, signal.SIGHUP):  # both go to all of them: the parent ends them in order
    signal.signal(number, signal.SIG_IGN)
  end_with_parent()


def _work(number: int) -> list[dict[str, Any]] | None:
  return write_shard(_own["source"], _own["packing"], number, _own["end"].is_set)
