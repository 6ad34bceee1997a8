"""Tars, read where they lie: their members, and where one that is cut off stops."""

import mmap
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from limber_jax import ranges
from limber_jax.config import Source
from limber_jax.runtime import inputs

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
  ranges.check(config, "config.data.source.")
  return config.incomplete == "keep"


def cut_off(path: str) -> CutOff | None:
  """Returns where a tar stops before its end, None where it does not or is damaged otherwise."""
  try:
    for _ in members(inputs.mapped(path)):
      pass  # going over them is what finds the end
  except CutOff as error:
    return error
  except (ValueError, OSError):
    pass  # what else is wrong is reported by whoever reads it
  return None


_LINKS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe",
          b"7": "", b"0": "", b"\0": "", b"S": "a sparse file"}
BLOCK = 512
_ZERO = bytes(BLOCK)


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
    block = data[position : position + BLOCK]
    where = f"byte {position:,} of {length:,}"
    if len(block) < BLOCK:
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
    kind, size, start = block[156:157], _number(block[124:136]), position + BLOCK
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
    position = start + -(-size // BLOCK) * BLOCK
    if kind == b"L":
      more["name"] = bytes(data[start : start + min(size, MAX_NAME + 2)]).removesuffix(b"\0")
    elif kind == b"x":
      more |= _pax(bytes(data[start : start + min(size, 2**16)]), where)
    elif kind not in b"gK":
      name = more.get("name", name)
      if kind != b"5":
        yield Member(name, start - BLOCK, start, size, _flaw(name, kind, "sparse" in more))
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
