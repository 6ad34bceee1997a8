"""How long an image file may take to decode, seen from its parts before anything is decoded.

Bytes and pixels are bounded elsewhere; these two do not bound time. A progressive JPEG goes over all of its pixels once
a scan, and a scan may have 51 bytes: 25 ms each at 31 megapixels (2026, libjpeg-turbo), so that 143 kB take 10 s and
20 MB hours. And Pillow goes over segments, chunks and blocks in Python, at a microsecond each: 20 MB of empty ones
take 10 s.
"""

import re
import struct

from limber_jax.errors import UserError

# Scans of a JPEG: libjpeg writes 10, mozjpeg and jpegrescan, which search for the smallest file, up to about 30.
MAX_SCANS = 100
# Their pixels all together, at about a nanosecond each: 31 scans of the largest image that is read, 10 of 100 million.
MAX_SCANNED = 1_000_000_000
# Segments of a JPEG before its pixels, chunks of a PNG, blocks of a GIF before its first frame, strips of a TIFF, and
# bytes between them that mean nothing: 0.1 s. A PNG of 20 MB has 2,500 chunks, or of 4 kB 5,000.
MAX_PARTS = 100_000

_PNG = b"\x89PNG\r\n\x1a\n"
_NEXT = re.compile(rb"(?:[^\xff]|\xff+\x00)*\xff+([^\x00\xff])")  # a JPEG's next marker, as Pillow looks for it
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # and as libjpeg does among the data of a scan
_BARE = frozenset((0x01, *range(0xD0, 0xDA)))  # markers without a segment
_SOS, _EOI = 0xDA, 0xD9
_SEQUENTIAL = frozenset((0xC0, 0xC1, 0xC9))  # frames whose only scan is decoded as it comes, if all colours are in it


def check_parts(data: bytes) -> int:
  """Returns where the first of several scans begins, 0 in a file of one or none; to be asked before Pillow opens it.

  Raises:
    UserError: an image file that Pillow would take long to open.
  """
  if data.startswith(b"\xff\xd8"):
    return _first_scan(data)
  if data.startswith(_PNG):
    at = len(_PNG)
    for _ in range(MAX_PARTS):
      if at + 8 > len(data) or data[at + 4 : at + 8] == b"IEND":
        return 0
      at += 12 + int.from_bytes(data[at : at + 4], "big")
    raise _too_many("PNG", "chunks")
  if data.startswith((b"GIF87a", b"GIF89a")):
    _gif(data)
  return 0


def check_scans(data: bytes, start: int, pixels: int) -> None:
  """Raises UserError for a JPEG file of so many pixels whose scans, as `check_parts` found them, take long to decode.

  For the usual file, whose only scan has all colours, this costs what finding that scan does: ten microseconds.
  """
  most = min(MAX_SCANS, MAX_SCANNED // max(pixels, 1))
  if not start or data.count(b"\xff\xda", start) <= most:  # no fewer than there are: segments may hold these bytes too
    return
  scans = steps = 0
  while (found := _MARKER.search(data, start)) and found[1][0] != _EOI:
    scans, steps = scans + (found[1][0] == _SOS), steps + 1
    if scans > most:
      raise UserError(f"JPEG file of more than {most} scans over {pixels:,} pixels; at most {MAX_SCANS} scans are "
                      f"decoded, and {MAX_SCANNED:,} pixels in all of them; write it again: jpegtran -progressive")
    if steps > MAX_PARTS:
      raise _too_many("JPEG", "segments")
    start = found.end() + (0 if found[1][0] in _BARE else _length(data, found.end()))


def _first_scan(data: bytes) -> int:
  """Returns where the first of several scans of a JPEG begins, 0 if there is but one, or none that can be found."""
  at, left, colours = 2, MAX_PARTS, 0
  while left > 0:
    if data[at : at + 1] == b"\xff" and data[at + 1 : at + 2] not in (b"", b"\0", b"\xff"):
      marker, at, left = data[at + 1], at + 2, left - 1
    elif found := _NEXT.match(data, at, min(at + left, len(data))):
      marker, at, left = found[1][0], found.end(), left - (found.end() - at - 1)
    elif len(data) - at > left:
      break
    else:
      return 0  # damaged, as its decoder will say
    if marker in _SEQUENTIAL:
      colours = data[at + 7] if at + 7 < len(data) else 0
    elif marker == _SOS:
      alone = at + 2 < len(data) and data[at + 2] == colours
      return 0 if alone else at - 2
    if marker not in _BARE:
      at += _length(data, at)
  raise _too_many("JPEG", "segments")


def _length(data: bytes, at: int) -> int:
  """Returns the bytes of a JPEG's segment behind its marker."""
  return max(struct.unpack_from(">H", data, at)[0], 2) if at + 2 <= len(data) else 2


def _gif(data: bytes) -> None:
  """Raises UserError for a GIF of more than MAX_PARTS blocks before its first frame."""
  flags = data[10] if len(data) > 10 else 0
  at = 13 + (3 * (2 << (flags & 7)) if flags & 0x80 else 0)
  inside = False  # of the blocks of an extension
  for _ in range(MAX_PARTS):
    if at >= len(data):
      return
    size = data[at]
    if inside:
      inside = size > 0
      at += 1 + size
    elif size == 0x2C or size == 0x3B:  # a frame, the end
      return
    elif size == 0x21:  # an extension, and its kind
      inside, at = True, at + 2
    else:
      at += 1
  raise _too_many("GIF", "blocks")


def _too_many(what: str, parts: str) -> UserError:
  return UserError(f"{what} file of more than {MAX_PARTS:,} {parts}, or bytes between them that mean nothing; such a "
                   "file is not opened")
