"""The one way in which bytes of a user's files are read: regular files only, and no more bytes than are expected.

A name leads to what the operating system says: links are followed, wherever they lead, and what they lead to is held to
the same rule. Names that stand *in* data (a table's paths, a list's) must not lead out of the folder they start from:
see `below`. Nothing here waits: a pipe without a writer, a socket or a device is named for what it is.
"""

import errno
import mmap
import os
import stat
from dataclasses import dataclass
from typing import BinaryIO

from limber_jax.errors import UserError


@dataclass(frozen=True)
class Kind:
  """What a file is expected to be, and the most bytes that are read of one."""

  what: str
  most: int


IMAGE = Kind("image", 20_000_000)        # a photo of 32 megapixels has fewer
ANNOTATIONS = Kind("file of annotations", 2**30)  # the largest that is published, Karpathy's COCO, has 0.14 GB
LIST = Kind("list", 2**28)               # of classes, templates, labels, questions, captions
TOKENIZER = Kind("tokenizer file", 2**27)  # of 256,000 ids: 0.03 GB
CONFIG = Kind("configuration", 2**25)    # the index of a thousand shards has 0.01 GB

FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # opens at once, whatever is there
_KINDS = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
          (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def what_is(path: str) -> str:
  """Returns why a path is not to be read: "no such file", "a directory, not a file" …; "" if it is a regular file."""
  try:
    check_regular(os.stat(path).st_mode)
  except (FileNotFoundError, NotADirectoryError):
    return "no such file"
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path
    return str(getattr(error, "strerror", None) or error)
  return ""


def check_regular(mode: int) -> None:
  """Raises OSError, whose strerror says what it is instead, if the mode of a file is not that of a regular one."""
  if not stat.S_ISREG(mode):
    what = next((name for test, name in _KINDS if test(mode)), "something else")
    raise OSError(errno.EINVAL, f"{what}, not a file")


def opened(path: str) -> BinaryIO:
  """Returns a regular file, opened; raises OSError, whose strerror says what is there instead.

  It is looked at before it is opened, for opening alone may change a device, and again after, for it may be replaced.
  """
  check_regular(os.stat(path).st_mode)
  file = os.fdopen(os.open(path, FLAGS), "rb")
  try:
    check_regular(os.fstat(file.fileno()).st_mode)
  except OSError:
    file.close()
    raise
  return file


def read(path: str, kind: Kind) -> bytes:
  """Returns the bytes of a regular file.

  Raises:
    OSError: it cannot be read, or is none.
    UserError: it has more bytes than are read of its kind; none of them was. The message begins with the path.
  """
  with opened(path) as file:
    size = os.fstat(file.fileno()).st_size
    try:
      check_size(size, kind)
    except UserError as error:
      raise UserError(f"{path}: {error}") from error
    return file.read(size)


def text(path: str, kind: Kind) -> str:
  """Returns the text of a file in UTF-8; raises as `read`, and UnicodeDecodeError."""
  return read(path, kind).decode()


def check_size(size: int, kind: Kind) -> None:
  """Raises UserError for more bytes than are read of a kind; to be asked before they are read."""
  if size > kind.most:
    raise UserError(f"{kind.what} of {size:,} bytes; at most {kind.most:,} are read")


def mapped(path: str) -> mmap.mmap | bytes:
  """Returns the bytes of a regular file, of which memory holds those that are looked at; raises OSError as `opened`."""
  with opened(path) as file:
    if not os.fstat(file.fileno()).st_size:  # which no map can have
      return b""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def below(root: str, name: str) -> str | None:
  """Returns the path of a file that data name, from the absolute path `root`; None if the name leads out of it."""
  full = os.path.normpath(os.path.join(root, name))
  return full if os.path.commonpath([full, root]) == root else None
