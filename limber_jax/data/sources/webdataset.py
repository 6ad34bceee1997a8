"""Tars of img2dataset and webdataset, read where they lie: nothing is ever extracted."""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from limber_jax.config import Source
from limber_jax.data.sources.annotations import OBJECT, captions_of, label_of, missing, one_object
from limber_jax.data.transforms import check_bytes
from limber_jax.errors import UserError, did_you_mean

WANTED = ("tars as img2dataset and webdataset write them (0000.jpg, 0000.txt, 0000.json …): a directory of them, one, "
          "or a pattern such as data/{00000..00099}.tar or 'data/*.tar'")
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXT_KEYS = ("caption", "captions", "text", "title")  # of .json
MAX_NAME = 255        # bytes of a member's name
MAX_TEXT = 2**16      # bytes of a .txt: 10,000 characters have fewer
MAX_SHARDS = 1_000_000


def shards(path: str, suffix: str, wanted: str) -> list[str]:
  """Returns the files that `path` stands for, sorted: a file, all in a directory, a glob or a pattern with braces.

  Args:
    path: as the user gave it.
    suffix: of the files in a directory, ".tar".
    wanted: what is expected there, for the message.

  Raises:
    UserError: there are none, or one that braces name is missing.
  """
  where = f"config.data.source.path={path!r}"
  point = f"wanted {wanted}; point at yours with --config.data.source.path=…"
  if not path or "\0" in path or "://" in path or path.startswith("pipe:"):
    raise UserError(f"{where}: no path of local files; {point}")
  if os.path.isfile(path):
    return [path]
  if os.path.isdir(path):
    found = sorted(f for f in glob.glob(os.path.join(glob.escape(path), f"*{suffix}")) if os.path.isfile(f))
    if not found:
      names = sorted(os.listdir(path))
      there = f"it has {', '.join(names[:5])}{' …' * (len(names) > 5)}" if names else "it is empty"
      raise UserError(f"{where}: no {suffix} in this directory, {there}; {point}")
    return found
  found = []
  for name in _braces(path):
    some = [name] if os.path.isfile(name) else sorted(f for f in glob.glob(name) if os.path.isfile(f))
    if not some:
      missing = "" if name == path else f", {name!r} of this pattern"
      raise UserError(f"{where}: no such file or directory{missing}; {point}")
    found += some
  return found


def _braces(pattern: str) -> list[str]:
  """Returns "a1 a2" of "a{1..2}" and "ab ac" of "a{b,c}", as a list; numbers keep leading zeros."""
  parts = re.split(r"\{([^{}]*)\}", pattern)
  options, count = [], 1
  for i, part in enumerate(parts):
    span = re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", part)
    if i % 2 and span:
      low, high = int(span[1]), int(span[2])
      width = max(map(len, span.groups())) if any(w.startswith("0") for w in span.groups()) else 0
      choices: Any = range(low, high + 1)
      option = (f"{n:0{width}d}" for n in choices)
    else:
      choices = option = part.split(",") if i % 2 else [part]
    count *= len(choices)
    if not count or count > MAX_SHARDS:
      raise UserError(f"config.data.source.path={pattern!r}: {{{part}}} stands for {len(choices):,} names; wanted 1 to "
                      f"{MAX_SHARDS:,}, as in {{00000..00099}}")
    options.append(option)
  return ["".join(names) for names in itertools.product(*options)]


class Member(NamedTuple):
  """A file in a tar."""

  name: bytes
  header: int  # where its last header block begins
  start: int   # where its contents begin
  size: int    # bytes
  flaw: str    # why it is not to be read; "" = it may be


_LINKS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
          b"7": "", b"0": "", b"\0": "", b"S": "a sparse file"}
_BLOCK = 512
_ZERO = bytes(_BLOCK)


def members(data: mmap.mmap | bytes) -> Iterator[Member]:
  """Yields what is in a tar, folders aside: ustar, with GNU's and pax' long names and sizes.

  Only headers are looked at. The end must be there: a tar that was cut off in its last file would else be one of fewer
  files (42 % of damaged tars are read so by Python's tarfile: 2,000 tried).

  Raises:
    ValueError: cut off or damaged; the message says where.
  """
  position, length, more = 0, len(data), {}
  while True:
    block = data[position : position + _BLOCK]
    where = f"byte {position:,} of {length:,}"
    if len(block) < _BLOCK:
      raise ValueError(f"{where}: cut off before its end; fetch it again")
    if block == _ZERO:
      for start in range(position, length, 1 << 20):
        if data[start : start + (1 << 20)].strip(b"\0"):
          raise ValueError(f"{where}: there is more behind its end: damaged, or several tars joined into one; fetch it "
                           "again, or keep them apart")
      return
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
      raise ValueError(f"{where}: no header of a tar; " + (
        "fetch it again" if position else "a compressed tar has no random access: unpack it with gunzip or zstd first"))
    kind, size, start = block[156:157], _number(block[124:136]), position + _BLOCK
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and prefix:
      name = prefix + b"/" + name
    if kind not in b"xgLK":
      size = more.get("size", size)
    if size is None or size < 0:
      raise ValueError(f"{where}: a header of a tar without a size; fetch it again")
    if kind in b"123456":  # what has no contents, whatever its size says
      size = 0
    position = start + -(-size // _BLOCK) * _BLOCK
    if start + size > length:
      raise ValueError(f"{where}: cut off inside {_shown(more.get('name', name))}; fetch it again")
    if kind == b"L":
      more["name"] = bytes(data[start : start + min(size, MAX_NAME + 2)]).removesuffix(b"\0")
    elif kind == b"x":
      more |= _pax(bytes(data[start : start + min(size, 2**16)]), where)
    elif kind not in b"gK":
      name = more.get("name", name)
      if kind != b"5":
        yield Member(name, start - _BLOCK, start, size, _flaw(name, kind, "sparse" in more))
      more = {}


def _number(field: bytes) -> int | None:
  """Returns a number of a header, octal or GNU's in base 256; None if it is none."""
  if field[0] == 0o200:
    return int.from_bytes(field[1:], "big")
  digits = field.split(b"\0")[0].strip()
  return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _pax(data: bytes, where: str) -> dict[str, Any]:
  """Returns the name and size in a pax header."""
  out, position = {}, 0
  while position < len(data) and data[position]:
    found = re.compile(rb"(\d{1,9}) ([^=\n]{1,64})=").match(data, position)
    if not found or int(found[1]) <= len(found[0]):
      raise ValueError(f"{where}: a damaged pax header of a tar; fetch it again")
    value, position = data[found.end() : position + int(found[1]) - 1], position + int(found[1])
    if found[2] == b"path":
      out["name"] = value
    elif found[2] == b"size":
      out["size"] = int(value) if re.fullmatch(rb"\d{1,18}", value) else None
    elif found[2].startswith(b"GNU.sparse"):
      out["sparse"] = True
  return out


def _flaw(name: bytes, kind: bytes, sparse: bool) -> str:
  """Returns why a member is not to be read."""
  if len(name) > MAX_NAME:
    return f"its name has more than {MAX_NAME} bytes"
  if b"\0" in name:
    return "its name holds a NUL"
  try:
    name.decode()
  except UnicodeDecodeError:
    return "its name is not UTF-8"
  if name.startswith((b"/", b"\\")) or re.match(rb"[A-Za-z]:", name) or b".." in re.split(rb"[/\\]", name):
    return "its name leads out of the tar"
  if reason := "a sparse file" if sparse else _LINKS.get(kind, f"of a type {kind!r} that is no file"):
    return f"{reason}, not a file"
  return ""


def _shown(name: bytes) -> str:
  """Returns a name as a message can hold it."""
  text = name[:80].decode(errors="backslashreplace")
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + "…" * (len(name) > 80)


# An index: this header, a row of _ROW a record, the keys one behind the other, the damage as JSON.
_HEAD = struct.Struct("<16s4Q32sII")  # magic, bytes of tar, records, bytes of keys, of damage; digest; its CRC, our CRC
_MAGIC = b"limber_jax tar 1"
# Where image, .txt and .json begin, their bytes (0 bytes at 0: none) and the CRC of their headers; where its key
# begins and its bytes; the CRC of key and row.
_ROW = struct.Struct("<QIIQIIQIIQHI")


@dataclass(frozen=True)
class _Shard:
  """A tar with its index: a file, or the bytes of one where none can be written."""

  path: str
  index: str | bytes
  bytes: int
  records: int
  keys: int      # bytes
  damage: bytes  # JSON
  digest: str

  def pread(self, size: int, offset: int) -> bytes:
    """Returns bytes of the index."""
    if isinstance(self.index, bytes):
      return self.index[offset : offset + size]
    return _pread(self.index, size, offset)


def _pread(path: str, size: int, offset: int) -> bytes:
  """Returns `size` bytes of a file; raises UserError if they are not there."""
  try:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
      data = os.pread(file, size, offset)
    finally:
      os.close(file)
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  if len(data) != size:
    raise UserError(f"{path}: {size:,} bytes at {offset:,} are not there: it was cut off")
  return data


class Webdataset:
  """A record for each key of tars, such as img2dataset downloads. A shard is a tar; all members of a key lie in one.

  path: a directory of tars, one tar, or a pattern with *, ? or {00000..00099}. Tars that are compressed as a whole have
    no random access and are refused.
  split: a folder below the directory `path`; "train" or "" where there is none such.
  image_key: what follows the first dot of the image's name; "" = the first of jpg, jpeg, png, webp.
  text_key: "" = the .txt, or where a key has none caption, captions, text or title in its .json; "txt"; or an entry of
    .json. A list there is several captions.
  label_key: an entry of .json with a class number; "" = no labels.

  A record's id is the tar's name and the key. Beside each tar lies NAME.tar.index, 62 bytes a record and its key, which
  makes it random-access; it is written once, from the headers alone, and kept in memory where it cannot be written.
  A tar that is shorter or longer than its index says, or that has no end, is named when the source is opened.

  In `damage` are members that are no files or whose names are absolute, lead out of the tar, hold a NUL, are not UTF-8
  or have more than 255 bytes, members that come twice, and keys without an image or without a caption.
  """

  classes = None

  def __init__(self, config: Source):
    self._config = config
    paths = shards(_split(config), ".tar", WANTED)
    self.damage: list[dict[str, str]] = []
    self._shards, broken = [], []
    for path in paths:
      try:
        self._shards.append(_open(path, config.image_key))
      except (ValueError, OSError) as error:
        broken.append(f"{path}, {getattr(error, 'strerror', None) or error}")
    if broken:
      raise UserError(f"{len(broken)} of {len(paths)} tars cannot be used: {'; '.join(broken[:3])}"
                      f"{'; …' if len(broken) > 3 else ''}")
    for shard in self._shards:
      name = os.path.basename(shard.path)
      self.damage += [{"file": name, "id": id_, "reason": reason} for id_, reason in json.loads(shard.damage)]
    self._starts = np.cumsum([0, *(shard.records for shard in self._shards)])
    if not len(self):
      first = "; the first flaw: {file}: {id}: {reason}".format(**self.damage[0]) if self.damage else ""
      raise UserError(f"config.data.source.path={config.path!r}: no image with a caption in {len(paths)} tars{first}; "
                      f"wanted {WANTED}")

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _row(self, index: int) -> tuple[_Shard, str, tuple[int, ...]]:
    """Returns (shard, key, row of the index) of a record."""
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    shard, place = self._shards[number], index - int(self._starts[number])
    data = shard.pread(_ROW.size, _HEAD.size + place * _ROW.size)
    *row, start, size, crc = _ROW.unpack(data)
    if start + size <= shard.keys:
      key = shard.pread(size, _HEAD.size + shard.records * _ROW.size + start)
      if zlib.crc32(key, zlib.crc32(data[:-4])) == crc:
        return shard, key.decode(), tuple(row)
    raise UserError(f"{shard.path}.index: damaged at record {place}; remove it, and it is made again")

  def _contents(self, shard: _Shard, key: str, start: int, size: int, crc: int) -> bytes:
    """Returns the contents of a member, whose header must be the one that was indexed."""
    data = _pread(shard.path, size + _BLOCK, start - _BLOCK)
    if zlib.crc32(data[:_BLOCK]) != crc:
      raise UserError(f"{shard.path}, byte {start - _BLOCK:,}: not the header of {key} that its index was made from; "
                      f"fetch it again, or remove {os.path.basename(shard.path)}.index if it was replaced on purpose")
    return data[_BLOCK:]

  def _annotation(self, shard: _Shard, key: str, row: tuple[int, ...]) -> dict[str, Any]:
    config, text, sidecar = self._config, row[3:6], row[6:9]
    where = f"{shard.path}: {key}"
    out = {"id": f"{os.path.basename(shard.path).removesuffix('.tar')}/{key}"}
    try:
      plain = config.text_key == "txt" or (not config.text_key and text[0])
      entries = {}
      if config.label_key or not plain:
        if sidecar[1] > OBJECT:
          raise UserError(f".json of {sidecar[1]:,} bytes; at most {OBJECT:,} are read")
        entries = one_object(self._contents(shard, key, *sidecar)) if sidecar[0] else {}
      if plain:
        if text[1] > MAX_TEXT:
          raise UserError(f"caption of {text[1]:,} bytes; at most {MAX_TEXT:,} are read")
        value: Any = self._contents(shard, key, *text).decode().rstrip("\r\n") if text[0] else None
      else:
        names = (config.text_key,) if config.text_key else TEXT_KEYS
        name = next((k for k in names if k in entries), None)
        if name is None:
          raise UserError(f".json: {missing(names[0], entries)}")
        value = entries[name]
      out |= captions_of(value)
      if config.label_key:
        out |= label_of(entries.get(config.label_key), config.label_key)
    except UnicodeDecodeError as error:
      raise UserError(f"{where}: caption is not UTF-8 ({error.reason})") from error
    except UserError as error:
      raise UserError(f"{where}: {error}") from error
    return out

  def annotation(self, index: int) -> dict[str, Any]:
    return self._annotation(*self._row(index))

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard, key, row = self._row(index)
    out = self._annotation(shard, key, row)
    try:
      check_bytes(row[1])
    except UserError as error:
      raise UserError(f"{shard.path}: {key}: {error}") from error
    return out | {"image": self._contents(shard, key, *row[:3])}

  def fingerprint(self) -> str:
    config = self._config
    digest = hashlib.sha256(repr((config.image_key, config.text_key, config.label_key)).encode())
    for shard in self._shards:
      digest.update(f"{os.path.basename(shard.path)}\0{shard.digest}\0".encode())
    return digest.hexdigest()[:16]


def _split(config: Source) -> str:
  """Returns the path with the split's folder, where there is one."""
  if not os.path.isdir(config.path) or not config.split:
    return config.path
  inner = os.path.join(config.path, config.split)
  if os.path.isdir(inner):
    return inner
  if config.split != "train":
    folders = [f.name for f in os.scandir(config.path) if f.is_dir()]
    raise UserError(f"config.data.source.split={config.split!r}: no such folder in {config.path}"
                    f"{did_you_mean(config.split, folders)}")
  return config.path


def _open(path: str, image_key: str) -> _Shard:
  """Returns a shard with its index, which is made if there is none; raises ValueError if the tar is not whole."""
  file = f"{path}{f'.{image_key}' if image_key else ''}.index"
  size = os.path.getsize(path)
  index: str | bytes = file
  found = None
  if os.path.isfile(file):
    with open(file, "rb") as opened:
      found = _read(opened)
  if found is None:
    with open(path, "rb") as opened:
      if not size:
        raise ValueError("byte 0 of 0: an empty file is no tar; fetch it again")
      with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        made = _make(data, image_key)
    found = _read(io.BytesIO(made))
    temporary = f"{file}.{os.getpid()}.tmp"
    try:
      with open(temporary, "wb") as opened:
        opened.write(made)
      os.replace(temporary, file)
    except OSError:  # a directory that is not to be written to, or a full one
      index = made
      with contextlib.suppress(OSError):
        os.remove(temporary)
  wanted, records, keys, digest, damage = found
  if wanted != size:
    raise ValueError(f"{size:,} bytes: {'shorter' if size < wanted else 'longer'} than the {wanted:,} of its index; "
                     f"fetch it again, or remove {os.path.basename(file)} if it was replaced on purpose")
  return _Shard(path, index, size, records, keys, damage, digest.hex())


def _read(file: BinaryIO) -> tuple[int, int, int, bytes, bytes] | None:
  """Returns (bytes of the tar, records, bytes of keys, digest, damage) of an index, None if it is not a whole one."""
  data = file.read(_HEAD.size)
  if len(data) < _HEAD.size or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
    return None
  magic, size, records, keys, told, digest, crc, _ = _HEAD.unpack(data)
  if magic != _MAGIC or file.seek(0, os.SEEK_END) != _HEAD.size + records * _ROW.size + keys + told:
    return None
  file.seek(-told, os.SEEK_END)
  damage = file.read()
  return (size, records, keys, digest, damage) if zlib.crc32(damage) == crc else None


def _make(data: mmap.mmap, image_key: str) -> bytes:
  """Returns the index of a tar; raises ValueError if it is not whole."""
  suffixes = (image_key.lower(),) if image_key else IMAGES
  places = {"txt": len(suffixes), "json": len(suffixes) + 1} | {s: i for i, s in enumerate(suffixes)}
  keys: dict[bytes, list[Member | None]] = {}
  damage = []
  for member in members(data):
    if member.flaw:
      damage.append((_shown(member.name), member.flaw))
      continue
    # As webdataset has it: a key ends at the first dot of the name's last part.
    folder, _, name = member.name.rpartition(b"/")
    stem, _, suffix = name.partition(b".")
    place = places.get(suffix.decode().lower())
    if not stem or place is None:
      continue
    found = keys.setdefault(folder + b"/" * bool(folder) + stem, [None] * (len(suffixes) + 2))
    if found[place] is None:
      found[place] = member._replace(size=min(member.size, 2**32 - 1))
    else:
      damage.append((_shown(member.name), "it is there twice, and the first counts"))
  rows, names = bytearray(), bytearray()
  for key, found in keys.items():
    image, text, sidecar = next(filter(None, found[:-2]), None), *found[-2:]
    if image is None or not (text or sidecar):
      damage.append((_shown(key), f"no {'caption (.txt or .json)' if image else f'image (.{suffixes[0]} …)'}"))
      continue
    row = _ROW.pack(*(value for m in (image, text, sidecar) for value in (
      (m.start, m.size, zlib.crc32(data[m.header : m.start])) if m else (0, 0, 0))), len(names), len(key), 0)[:-4]
    rows += row + struct.pack("<I", zlib.crc32(key, zlib.crc32(row)))
    names += key
  told = json.dumps(damage).encode()
  body = bytes(rows + names)
  head = _HEAD.pack(_MAGIC, len(data), len(rows) // _ROW.size, len(names), len(told), hashlib.sha256(body).digest(),
                    zlib.crc32(told), 0)[:-4]
  return head + struct.pack("<I", zlib.crc32(head)) + body + told
