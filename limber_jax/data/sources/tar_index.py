"""Records of tars: which members are one, and an index beside each tar that makes them random-access."""

import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

from limber_jax.data.sources.tars import BLOCK, KEEP, CutOff, Member, members, shown
from limber_jax.errors import UserError
from limber_jax.runtime import inputs
from limber_jax.runtime.atomic import atomic_write


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
  settable: bool = True          # the source's image_key may name another suffix

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


_FURTHER = (b"gif", b"bmp", b"tif", b"tiff", b"avif")  # suffixes of the formats that are read where they are asked for

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
    raise UserError(f"{self._file}: damaged at record {place}; remove it, and it is made again")

  def contents(self, key: str, start: int, size: int, crc: int) -> bytes:
    """Returns the contents of a member, whose header must be the one that was indexed."""
    data = _pread(self.path, size + BLOCK, start - BLOCK)
    if zlib.crc32(data[:BLOCK]) != crc:
      raise UserError(f"{self.path}, byte {start - BLOCK:,}: not the header of {key} that its index was made from; "
                      f"fetch it again, or remove {os.path.basename(self._file)} if it was replaced on purpose")
    return data[BLOCK:]

  @property
  def _file(self) -> str:
    return f"{self.path}.index" if isinstance(self.index, bytes) else self.index

  def _pread(self, size: int, offset: int) -> bytes:
    if isinstance(self.index, bytes):
      return self.index[offset : offset + size]
    return _pread(self.index, size, offset)


def _pread(path: str, size: int, offset: int) -> bytes:
  """Returns `size` bytes of a file; raises UserError if they are not there."""
  try:
    file = os.open(path, inputs.FLAGS)
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
    with inputs.opened(file) as opened:
      found = _read(opened, rule)
  # Where what is whole is kept, the tar alone decides; else an index of a whole one says that it was longer.
  if found is not None and (found[0] != size if keep else not found[1]):
    found = None
  if found is None:
    made = _make(path, size, rule, keep)
    found = _read(io.BytesIO(made), rule)
    try:
      with atomic_write(file, "wb") as opened:
        opened.write(made)
    except UserError:  # a directory that is not to be written to, or a full one
      index = made
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
  magic, size, records, keys, damage_size, good, made_by, digest, crc, _ = _HEAD.unpack(data)
  if magic != _MAGIC or made_by != rule.digest or (
      file.seek(0, os.SEEK_END) != _HEAD.size + records * _ROW.size + keys + damage_size):
    return None
  file.seek(-damage_size, os.SEEK_END)
  damage = file.read()
  return (size, good == size, records, keys, digest, damage) if zlib.crc32(damage) == crc else None


def _make(path: str, size: int, rule: Rule, keep: bool) -> bytes:
  """Returns the index of a tar; raises ValueError if it is not whole, and with `keep` only if it is damaged."""
  found, data, good = _Found(rule), inputs.mapped(path), size
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
  damage = json.dumps(found.damage).encode()
  body = bytes(rows + names)
  head = _HEAD.pack(_MAGIC, size, len(rows) // _ROW.size, len(names), len(damage), good, rule.digest,
                    hashlib.sha256(body).digest(), zlib.crc32(damage), 0)[:-4]
  return head + struct.pack("<I", zlib.crc32(head)) + body + damage


class _Found:
  """The members of a tar by key, as they come."""

  def __init__(self, rule: Rule):
    self._rule = rule
    self._size = len(rule.places)
    # By the key without "./": its spelling, and a member or None for each suffix.
    self._keys: dict[bytes, tuple[bytes, list[Member | None]]] = {}
    self._strange: list[bytes] = []         # names of parts whose key has no such suffix, by the first dot
    self._lost: tuple[bytes, str] = b"", ""  # the key of what was cut off, and its name
    self._longer: dict[bytes, bytes] = {}    # by a key, one that goes on after a dot
    self._others: dict[bytes, str] = {}      # by key, the suffix of an image of a further format
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
      stem, _, last = member.name.rpartition(b".")
      if last.lower() in _FURTHER:
        self._others.setdefault(_plain(stem), last.lower().decode())
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
    for plain in self._keys.keys() - whole:
      folder, slash, last = plain.rpartition(b"/")
      if b"." in last:
        self._longer.setdefault(folder + slash + last.partition(b".")[0], plain)
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
      key, suffix = self._called(found)
      reason += f"; if .{suffix} is what it is called there, say so by {key}={suffix}"
    elif (longer := self._longer.get(plain)) and not self._rule.first_dot:  # 0.jpg beside 0.caption.txt
      key, suffix = self._called(self._keys[longer][1])
      reason += f"; .{suffix} is read with {key}={suffix}"
    if not any(found[: len(self._rule.image)]) and (other := self._others.get(plain)):
      name = {"tif": "tiff"}.get(other, other)
      reason += f"; its .{other} is " + (
        f"read with image_key={other} and config.data.formats={name} (--formats={name})" if self._rule.settable else
        f"not read: such sets hold {', '.join(self._rule.image)} alone")
    return reason

  def _called(self, found: list[Member | None]) -> tuple[str, str]:
    """Returns (the setting that names them, all suffixes) of the first member of a key."""
    member = next(filter(None, found))
    key = "image_key" if any(found[: len(self._rule.image)]) else "text_key"
    return key, shown(member.name.rpartition(b"/")[2].partition(b".")[2])


def _plain(key: bytes) -> bytes:
  """Returns a key or name without the folders "." and those of no name."""
  *folders, last = key.split(b"/")
  return b"/".join([f for f in folders if f not in (b"", b".")] + [last])


def _belongs(key: bytes, whole: set[bytes]) -> bool:
  """Returns whether what has this key is a further file of a whole record, as 0.mask.png beside 0.jpg and 0.txt."""
  folder, slash, last = key.rpartition(b"/")
  parts = last.split(b".")
  return any(folder + slash + b".".join(parts[:n]) in whole for n in range(1, len(parts)))
