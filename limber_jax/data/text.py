"""Text as users' files hold it: its encoding, what is taken out of captions, and which of them say nothing."""

import mmap
import re
from typing import Any

from limber_jax.errors import UserError

MAX_CAPTION_LENGTH = 10_000  # characters from which on a text is none that a person wrote about an image
BOM = b"\xef\xbb\xbf"

# What programs write where there is no caption: pandas' list, in small letters. They are texts, and are counted.
PLACEHOLDERS = frozenset(("nan", "none", "na", "null", "n/a", "<na>", "#n/a", "#n/a n/a", "#na", "-nan", "1.#ind",
                          "-1.#ind", "1.#qnan", "-1.#qnan", "undefined"))

# Control characters but tab and line ends: those that are white space become a space, the others go.
_CONTROLS = dict.fromkeys((*range(9), *range(14, 28), *range(127, 160)), "") | dict.fromkeys(
  (11, 12, *range(28, 32), 0x85), " ")
_CONTROL = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
# The same in the bytes of a file: as they are, and as JSON writes them.
_RAW = re.compile(b"[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")
_RAW_WIDE = re.compile(b"\xc2[\x80-\x9f]")
_ESCAPED = re.compile(rb"\\(?:u00(?:0[0-8bcefBCEF]|1|7[fF]|[89])|u[fF][eE][fF][fF]|[bf])")


def clean(text: str) -> str:
  """Returns a text without control characters, and without the byte-order marks it begins with.

  Tabs and line ends stay; other controls that are white space become a space.
  """
  if text.startswith("\ufeff"):
    text = text.lstrip("\ufeff")
  return text.translate(_CONTROLS) if _CONTROL.search(text) else text


def is_placeholder(text: str) -> bool:
  """Returns whether a text is what programs write where there is none: "nan", "NULL", "N/A" …"""
  return len(text) < 20 and text.strip().lower() in PLACEHOLDERS


def flaw(text: Any, what: str, longest: int = MAX_CAPTION_LENGTH) -> str:
  """Returns why a value, cleaned, is no text, "" if it is one: "empty caption" for `what` "caption".

  Args:
    text: of a file.
    what: it is, for the message.
    longest: characters, from which on it is too long; 0 = never.
  """
  if not isinstance(text, str):
    return f"{what} is of type {type(text).__name__}"
  if not text.strip():
    return f"empty {what}"
  if longest and len(text) >= longest:
    return f"{what} of {len(text):,} characters, wanted fewer than {longest:,}"
  try:
    text.encode()
  except UnicodeEncodeError:  # "\ud800" in JSON
    return f"{what} holds half a character (a lone surrogate)"
  return ""


def encoding(head: bytes) -> str:
  """Returns which encoding other than UTF-8 the first bytes of a file show: "UTF-16" or "UTF-32"; "" where they do not.

  A byte-order mark shows it, and without one that every second byte of the first letters is a zero, or three of four.
  """
  if head[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
    return "UTF-32"
  if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
    return "UTF-16"
  zeros = tuple(len(head) >= 8 and not any(head[i::4]) for i in range(4))
  names = {(0, 1, 1, 1): "UTF-32LE", (1, 1, 1, 0): "UTF-32BE", (0, 1, 0, 1): "UTF-16LE", (1, 0, 1, 0): "UTF-16BE"}
  return names.get(zeros, "")


def check_encoding(data: bytes | mmap.mmap, where: str) -> int:
  """Returns at which byte the text of a file begins: behind a byte-order mark, if it has one.

  Raises:
    UserError: it is UTF-16 or UTF-32; the message begins with `where` and says how to convert it.
  """
  if name := encoding(bytes(data[:64])):
    raise UserError(f"{where}: {name}, wanted UTF-8; convert it: iconv -f {name} -t UTF-8 OLD > NEW")
  return len(BOM) if data[: len(BOM)] == BOM else 0


def decode(data: bytes, where: str, whole: bool = True) -> str:
  """Returns the text of a file, without a byte-order mark, or of a part of one.

  Args:
    data: bytes.
    where: they stand, for messages.
    whole: they are a file, whose beginning shows its encoding.

  Raises:
    UserError: it is not UTF-8; the message says what it probably is.
  """
  begin = check_encoding(data, where) if whole else 0
  try:
    return data[begin:].decode()
  except UnicodeDecodeError as error:
    hint = "" if whole and error.reason == "unexpected end of data" else (
      "; is it Latin-1 or Windows-1252? Convert it then: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW")
    raise UserError(f"{where}, byte {begin + error.start:,} of {len(data):,}: not UTF-8 ({error.reason}){hint}"
                    ) from error


def has_controls(data: mmap.mmap, begin: int, escaped: bool = False) -> bool:
  """Returns whether `clean` may change texts of a file; with `escaped` as JSON writes them."""
  if _RAW_WIDE.search(data, begin) or data.find(BOM, begin) >= 0:
    return True
  return bool((_ESCAPED if escaped else _RAW).search(data, begin))
