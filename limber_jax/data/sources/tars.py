"""Tars, read where they lie: their members, and an index beside each that makes its records random-access."""

import contextlib
import hashlib
import io
import json
import mmap
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

from limber_jax.config import Source, choose
from limber_jax.errors import UserError

KEEP = "fetch it again, or read what is whole in it with source.incomplete=keep"

MAX_NAME = 255  # bytes of a member's name


class Member(NamedTuple):
  """A file in a tar."""

  name: bytes
  header: int  # where its last header block begins
  start: int   # where its contents begin
  size: int    # bytes
  flaw: str    # why it is not to be read; "" = it may be


class CutOff(ValueError):
  """A tar that stops before its end."""

  def __init__(self, message: str, position: int, inside: bytes = b""):
    super().__init__(message)
    self.position = position  # bytes that are whole
    self.inside = inside      # the name of the member that is not; b"" where it stops between two

  def lost(self, size: int) -> tuple[str, str]:
    """Returns (id, reason) of the damage to a tar of so many bytes."""
    if self.inside:
      return shown(self.inside), f"the tar is cut off inside it, at byte {size:,}; what came after it is lost too"
    return f"byte {self.position:,}", "the tar is cut off here; what came after it is lost"


def keeps(config: Source) -> bool:
  """Returns whether tars that are cut off are read; raises UserError if config.incomplete says nothing of it."""
  return choose("data.source.incomplete", config.incomplete, ("refuse", "keep")) == "keep"


def cut_off(path: str) -> CutOff | None:
  """Returns where a tar stops before its end, None where it does not or is damaged otherwise."""
  try:
    with open(path, "rb") as file, _mapped(file) as data:
      for _ in members(data):
        pass
  except CutOff as error:
    return error
  except (ValueError, OSError):
    pass  # what else is wrong is told by whoever reads it
  return None


def _mapped(file: BinaryIO) -> contextlib.AbstractContextManager[mmap.mmap | bytes]:
  """Returns the bytes of an open file."""
  if not os.fstat(file.fileno()).st_size:  # which no map can have
    return contextlib.nullcontext(b"")
  return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


_LINKS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
          b"7": "", b"0": "", b"\0": "", b"S": "a sparse file"}
_BLOCK = 512
_ZERO = bytes(_BLOCK)


def members(data: mmap.mmap | bytes) -> Iterator[Member]:
  """Yields what is in a tar, folders aside: ustar, with GNU's and pax' long names and sizes.

  Only headers are looked at. The end must be there: a tar that was cut off in its last file would else be one of fewer
  files (42 % of damaged tars are read so by Python's tarfile: 2,000 tried).

  Raises:
    CutOff: it stops before its end; what was yielded until then is whole.
    ValueError: damaged; the message says where.
  """
  position, length, more = 0, len(data), {}
  while True:
    block = data[position : position + _BLOCK]
    where = f"byte {position:,} of {length:,}"
    if len(block) < _BLOCK:
      raise CutOff(f"{where}: " + ("cut off before its end" if length else "an empty file is no tar"), position)
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
    if start + size > length:
      name = more.get("name", name)
      raise CutOff(f"{where}: cut off inside {shown(name)}", position, name)
    position = start + -(-size // _BLOCK) * _BLOCK
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


def shown(name: bytes) -> str:
  """Returns a name as a message can hold it."""
  text = name[:80].decode(errors="backslashreplace")
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text) + "…" * (len(name) > 80)


@dataclass(frozen=True)
class Rule:
  """How the members of a tar become records: a record is an image, and a text or a sidecar of the same key.

  The key is the name without its suffix, so that `trip.2020.jpg` belongs to `trip.2020.txt`. With first_dot it ends at
  the first dot of the name's last part, as webdataset has it, where both are parts "2020.jpg" and "2020.txt" of `trip`.
  Suffixes may have dots ("input.jpg"); letter case does not count. Names that begin with a dot are left out.
  """

  image: tuple[str, ...]         # suffixes, the one that is taken first
  text: tuple[str, ...] = ()
  sidecar: tuple[str, ...] = ()
  what: str = "caption"          # what texts and sidecars hold, for messages
  first_dot: bool = False
  tag: str = ""                  # in the name of the index; each rule has its own

  @property
  def digest(self) -> bytes:
    """16 bytes that tell rules apart; the index says by which it was made."""
    return hashlib.sha256(repr((self.image, self.text, self.sidecar, self.first_dot)).encode()).digest()[:16]

  @cached_property
  def places(self) -> dict[bytes, int]:
    """The number of each suffix, the longest first: what ends in ".input.jpg" does so in ".jpg" too."""
    suffixes = [s.encode() for s in (*self.image, *self.text, *self.sidecar)]
    return {s: suffixes.index(s) for s in sorted(suffixes, key=len, reverse=True)}

  def split(self, name: bytes) -> tuple[bytes, bytes]:
    """Returns (key, suffix in small letters) of a member; the suffix is b"" where it is no part of a record."""
    folder, slash, last = name.rpartition(b"/")
    low = last.lower()
    if low.startswith(b"."):  # ._0.jpg, which macOS puts beside 0.jpg
      return name, b""
    stem, _, suffix = low.partition(b".")
    if not self.first_dot:
      suffix = next((s for s in self.places if low.endswith(b"." + s)), b"")
      stem = low.removesuffix(b"." + suffix)
    return folder + slash + last[: len(stem)], suffix if stem and suffix in self.places else b""

  def lacks(self, found: "list[Member | None]") -> str:
    """Returns what a key without a record lacks: "no image (.jpg …)"."""
    if not any(found[: len(self.image)]):
      return f"no image (.{self.image[0]}{' …' * (len(self.image) > 1)})"
    names = [f".{s}" for s in self.text + self.sidecar]
    return f"no {self.what} ({' or '.join(filter(None, (', '.join(names[:-1]), names[-1])))})"


# An index: this header, a row of _ROW a record, the keys one behind the other, the damage as JSON. The header of
# version 1 was shorter: a process that still reads by one finds nothing where it looks, should this come in its place.
# Magic; bytes of the tar, records, bytes of keys, of damage, of the tar that are whole; digests of the rule, and of
# rows and keys; CRC of the damage, our CRC.
_HEAD = struct.Struct("<16s5Q16s32sII")
_MAGIC = b"limber_jax tar 2"
# Where image, text and sidecar begin, their bytes (0 bytes at 0: none) and the CRC of their headers; where its key
# begins and its bytes; the CRC of key and row.
_ROW = struct.Struct("<QIIQIIQIIQHI")


@dataclass(frozen=True)
class Shard:
  """A tar with its index: a file, or the bytes of one where none can be written."""

  path: str
  index: str | bytes
  bytes: int
  records: int
  keys: int      # bytes
  damage: bytes  # JSON, a list of [member or key, reason]
  digest: str

  def row(self, place: int) -> tuple[str, tuple[int, ...]]:
    """Returns (key, (start, bytes, CRC) of image, text and sidecar) of a record; raises UserError."""
    data = self._pread(_ROW.size, _HEAD.size + place * _ROW.size)
    *row, start, size, crc = _ROW.unpack(data)
    if start + size <= self.keys:
      key = self._pread(size, _HEAD.size + self.records * _ROW.size + start)
      if zlib.crc32(key, zlib.crc32(data[:-4])) == crc:
        return key.decode(), tuple(row)
    file = f"{self.path}.index" if isinstance(self.index, bytes) else self.index
    raise UserError(f"{file}: damaged at record {place}; remove it, and it is made again")

  def contents(self, key: str, start: int, size: int, crc: int) -> bytes:
    """Returns the contents of a member, whose header must be the one that was indexed."""
    data = _pread(self.path, size + _BLOCK, start - _BLOCK)
    if zlib.crc32(data[:_BLOCK]) != crc:
      raise UserError(f"{self.path}, byte {start - _BLOCK:,}: not the header of {key} that its index was made from; "
                      f"fetch it again, or remove {os.path.basename(self.path)}.index if it was replaced on purpose")
    return data[_BLOCK:]

  def _pread(self, size: int, offset: int) -> bytes:
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


def open_shards(paths: list[str], rule: Rule, keep: bool) -> tuple[list[Shard], list[dict[str, str]]]:
  """Returns tars with their indices, which are made where there are none, and what of their members is no record.

  Args:
    paths: of the tars.
    rule: how members become records.
    keep: a tar that is cut off gives its whole members, and the rest is damage.

  Raises:
    UserError: some are no whole tars; the message names the first.
  """
  found, damage, broken = [], [], []
  for path in paths:
    try:
      found.append(_open(path, rule, keep))
    except (ValueError, OSError) as error:
      hint = f"; {KEEP}" if isinstance(error, CutOff) else ""
      broken.append(f"{path}, {getattr(error, 'strerror', None) or error}{hint}")
  if broken:
    raise UserError(f"{len(broken)} of {len(paths)} tars cannot be used: {'; '.join(broken[:3])}"
                    f"{'; …' if len(broken) > 3 else ''}")
  for shard in found:
    name = os.path.basename(shard.path)
    damage += [{"file": name, "id": id_, "reason": reason} for id_, reason in json.loads(shard.damage)]
  return found, damage


def _open(path: str, rule: Rule, keep: bool) -> Shard:
  """Returns a shard with its index, which is made if there is none; raises ValueError if the tar is not whole."""
  file = f"{path}{f'.{rule.tag}' if rule.tag else ''}.index"
  size = os.path.getsize(path)
  index: str | bytes = file
  found = None
  if os.path.isfile(file):
    with open(file, "rb") as opened:
      found = _read(opened, rule)
  # Where what is whole is kept, the tar alone decides; else an index of a whole one says that it was longer.
  if found is not None and (found[0] != size if keep else not found[1]):
    found = None
  if found is None:
    made = _make(path, size, rule, keep)
    found = _read(io.BytesIO(made), rule)
    temporary = f"{file}.{os.getpid()}.tmp"
    try:
      with open(temporary, "wb") as opened:
        opened.write(made)
      os.replace(temporary, file)
    except OSError:  # a directory that is not to be written to, or a full one
      index = made
      with contextlib.suppress(OSError):
        os.remove(temporary)
  wanted, _, records, keys, digest, damage = found
  if wanted != size:
    raise ValueError(f"{size:,} bytes: {'shorter' if size < wanted else 'longer'} than the {wanted:,} of its index; "
                     f"{KEEP}, or remove {os.path.basename(file)} if it was replaced on purpose")
  return Shard(path, index, size, records, keys, damage, digest.hex())


def _read(file: BinaryIO, rule: Rule) -> tuple[int, bool, int, int, bytes, bytes] | None:
  """Returns (bytes of the tar, whether it was whole, records, bytes of keys, digest, damage) of an index.

  None if it is not a whole one, of another version or made by another rule.
  """
  data = file.read(_HEAD.size)
  if len(data) < _HEAD.size or zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
    return None
  magic, size, records, keys, told, good, made_by, digest, crc, _ = _HEAD.unpack(data)
  if magic != _MAGIC or made_by != rule.digest or (
      file.seek(0, os.SEEK_END) != _HEAD.size + records * _ROW.size + keys + told):
    return None
  file.seek(-told, os.SEEK_END)
  damage = file.read()
  return (size, good == size, records, keys, digest, damage) if zlib.crc32(damage) == crc else None


def _make(path: str, size: int, rule: Rule, keep: bool) -> bytes:
  """Returns the index of a tar; raises ValueError if it is not whole, and with `keep` only if it is damaged."""
  with open(path, "rb") as opened, _mapped(opened) as data:
    found = _Found(rule)
    good = size
    try:
      for member in members(data):
        found.add(member)
    except CutOff as error:
      if not keep:
        raise
      good = error.position
      found.cut(error, size)
    rows, names = bytearray(), bytearray()
    for key, parts in found.records():
      row = _ROW.pack(*(value for m in parts for value in (
        (m.start, m.size, zlib.crc32(data[m.header : m.start])) if m else (0, 0, 0))), len(names), len(key), 0)[:-4]
      rows += row + struct.pack("<I", zlib.crc32(key, zlib.crc32(row)))
      names += key
  told = json.dumps(found.damage).encode()
  body = bytes(rows + names)
  head = _HEAD.pack(_MAGIC, size, len(rows) // _ROW.size, len(names), len(told), good, rule.digest,
                    hashlib.sha256(body).digest(), zlib.crc32(told), 0)[:-4]
  return head + struct.pack("<I", zlib.crc32(head)) + body + told


class _Found:
  """The members of a tar by key, as they come."""

  def __init__(self, rule: Rule):
    self._rule = rule
    self._size = len(rule.places)
    # By the key without "./": its spelling, and a member or None for each suffix.
    self._keys: dict[bytes, tuple[bytes, list[Member | None]]] = {}
    self._strange: list[bytes] = []         # names of parts whose key has no such suffix, by the first dot
    self._lost: tuple[bytes, str] = b"", ""  # the key of what was cut off, and its name
    self.damage: list[tuple[str, str]] = []

  def add(self, member: Member) -> None:
    if member.flaw:
      self.damage.append((shown(member.name), member.flaw))
      return
    key, suffix = self._rule.split(member.name)
    if not suffix:
      low = member.name.lower().rpartition(b"/")[2]
      if self._rule.first_dot and any(low.endswith(b"." + s) for s in self._rule.places) and low[:1] != b".":
        self._strange.append(member.name)
      return
    found = self._keys.setdefault(_plain(key), (key, [None] * self._size))[1]
    place = self._rule.places[suffix]
    if found[place] is None:
      found[place] = member._replace(size=min(member.size, 2**32 - 1))
    else:
      self.damage.append((shown(member.name), "it is there twice, and the first counts"))

  def cut(self, error: CutOff, size: int) -> None:
    """Names what a tar of `size` bytes lost."""
    self._lost = _plain(self._rule.split(error.inside)[0]), shown(error.inside)
    self.damage.append(error.lost(size))

  def records(self) -> Iterator[tuple[bytes, tuple[Member | None, ...]]]:
    """Yields (key, (image, text, sidecar)) of each record; what is none goes into `damage`."""
    image, text = len(self._rule.image), len(self._rule.image) + len(self._rule.text)
    whole = set()
    for plain, (key, found) in self._keys.items():
      if any(found[:image]) and any(found[image:]):
        whole.add(plain)
        yield key, tuple(next(filter(None, part), None) for part in (found[:image], found[image:text], found[text:]))
    for plain, (key, found) in self._keys.items():
      if plain not in whole and not _belongs(plain, whole):
        self.damage.append((shown(key), self._reason(plain, found)))
    for name in self._strange:
      if not _belongs(_plain(name), whole):
        suffix = shown(name.rpartition(b"/")[2].partition(b".")[2])
        self.damage.append((shown(name), f"no part of a record: up to the first dot of the name, .{suffix} is none of "
                            f"{', '.join('.' + s.decode() for s in sorted(self._rule.places))}; key_dot=last reads on"))

  def _reason(self, plain: bytes, found: list[Member | None]) -> str:
    """Returns why a key is no record."""
    reason = self._rule.lacks(found)
    if plain == self._lost[0]:
      return f"{reason}: its {self._lost[1]} is cut off"
    last = plain.rpartition(b"/")[2]
    if b"." in last and not self._rule.first_dot:  # s0.input.jpg beside s0.output.txt
      member = next(filter(None, found))
      key = "image_key" if any(found[: len(self._rule.image)]) else "text_key"
      suffix = shown(member.name.rpartition(b"/")[2].partition(b".")[2])
      reason += f"; if .{suffix} is what it is called there, say so by {key}"
    return reason


def _plain(key: bytes) -> bytes:
  """Returns a key or name without the folders "." and those of no name."""
  *folders, last = key.split(b"/")
  return b"/".join([f for f in folders if f not in (b"", b".")] + [last])


def _belongs(key: bytes, whole: set[bytes]) -> bool:
  """Returns whether what has this key is a further file of a whole record, as 0.mask.png beside 0.jpg and 0.txt."""
  folder, slash, last = key.rpartition(b"/")
  parts = last.split(b".")
  return any(folder + slash + b".".join(parts[:n]) in whole for n in range(1, len(parts)))
