"""What a source's files hold, told cheaply: a digest of their state that changes whenever one of them is written.

Results are kept by this beside `Source.fingerprint`, which says *which* data they are, wherever these lie, and looks at
no image. The state of a file is its size and the times, in nanoseconds, at which it was last written and at which
anything of it was changed (mtime and ctime). Bytes are not read: of ImageNet's validation set that would be 6 GB before
each start. mtime alone would not do: `cp -p`, tar and rsync set it, so that an image may be put in another's place with
the same size and time, and nobody can set ctime. The price: data that were copied elsewhere, restored or whose
permissions were changed are measured anew, which is never wrong. The names count by their order alone.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from limber_jax.config import Source
from limber_jax.data import sources
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

READERS = 16   # threads: a network's file system answers many at a time
PIECE = 8192   # files that are asked for before the next ones are named


def contents(source: sources.Source, config: Source) -> str:
  """Returns 16 hex digits that change when a file is written, replaced, removed or made that the source reads.

  Args:
    source: says by `files` which these are; of one that does not, it is all that there is where `config` points.
    config: what it was opened with.
  """
  files = iter(source.files() if hasattr(source, "files") else _below(config))
  digest = hashlib.sha256()
  with ThreadPoolExecutor(READERS) as pool:
    while piece := list(itertools.islice(files, PIECE)):
      digest.update("".join(pool.map(_state, piece, chunksize=64)).encode())
  return digest.hexdigest()[:16]


def of_list(name: str) -> str:
  """Returns 16 hex digits of the bytes of a list of classes or templates; "" where the name is that of no file."""
  if not name or inputs.what_is(name):
    return ""
  try:
    return hashlib.sha256(inputs.read(name, inputs.LIST)).hexdigest()[:16]
  except (OSError, UserError):
    return ""  # whoever reads it says why it cannot be


def _state(path: str) -> str:
  try:
    found = os.stat(path)
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path
    return f"{type(error).__name__};"
  return f"{found.st_size},{found.st_mtime_ns},{found.st_ctime_ns};"


def _below(config: Source) -> Iterator[str]:
  for start in filter(None, (getattr(config, name) for name in config.paths)):
    yield start
    for folder, inner, names in os.walk(start):
      inner.sort()
      yield from (os.path.join(folder, name) for name in sorted(names))
