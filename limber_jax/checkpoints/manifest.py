"""Which files a directory holds, and what they are: manifest.json, written last and compared before they are read.

    {"step": 20, "run": "9f…", "files": {"params/d/1f…": [bytes, SHA-256], …}}
"""

import concurrent.futures
import hashlib
import json
import os
import re
from typing import Any

from limber_jax.runtime.atomic import SUFFIX, atomic_write

NAME = "manifest.json"
# Orbax writes these two after the manifest, while it commits. No restore reads them.
_OF_THE_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt")
# What macOS leaves in a folder that was looked at or copied, and NFS where a file was removed that a process has open.
_OF_THE_SYSTEM = re.compile(r"(.*/)?(\.DS_Store|\._[^/]*|\.nfs[0-9a-f]+)")


def write(directory: str, **identity: Any) -> None:
  """Writes manifest.json of all files below `directory`, and what they are: a checkpoint of which step and run."""
  files = _files(directory)
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
    digests = pool.map(_sha256, files.values())
    listed = {name: [os.path.getsize(files[name]), digest] for name, digest in zip(files, digests, strict=True)}
  with atomic_write(os.path.join(directory, NAME)) as file:
    json.dump({**identity, "files": listed}, file, indent=0)


def compare(directory: str, within: str = "", **identity: Any) -> str | None:
  """Returns the first difference between files and the manifest.json beside them, or None.

  Args:
    directory: a checkpoint's; None is returned if it has no manifest.
    within: such as "metrics/": only files whose names begin so are compared.
    identity: what the manifest has to say of them where it says it; those of earlier releases do not.
  """
  try:
    with open(os.path.join(directory, NAME), encoding="utf-8") as file:
      said = json.load(file)
    listed = said["files"]
    for key, value in identity.items():
      if value and said.get(key, value) != value:
        return f"{NAME} says that it is of {key} {said[key]}, not {value}: it was moved or copied here"
    wanted = {name: (int(size), str(digest)) for name, (size, digest) in listed.items()
              if name.startswith(within) and not _OF_THE_SYSTEM.fullmatch(name)}
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    return f"{NAME} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
  there = {name: path for name, path in _files(directory).items() if name.startswith(within)}
  for name in sorted(wanted.keys() ^ there.keys()):
    return f"{name} is missing; it had {wanted[name][0]} bytes" if name in wanted else f"{name} was not saved there"
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    found = pool.map(lambda name: _difference(name, there[name], *wanted[name]), sorted(wanted))
    return next(filter(None, found), None)


def promised(directory: str) -> bool:
  """Returns whether a checkpoint's meta says that it has a manifest, or cannot say."""
  try:
    with open(os.path.join(directory, "meta", "metadata"), encoding="utf-8") as file:
      return "manifest" in json.load(file)
  except (OSError, ValueError, TypeError, RecursionError):
    return True


def _difference(name: str, path: str, size: int, digest: str) -> str | None:
  try:
    if (got := os.path.getsize(path)) != size:
      return f"{name} has {got} bytes, not the {size} that were saved"
    if (got := _sha256(path)) != digest:
      return f"{name} has the SHA-256 {got[:12]}…, not the {digest[:12]}… that was saved"
  except OSError as error:
    return f"{name} cannot be read ({error.strerror})"
  return None


def _files(directory: str) -> dict[str, str]:
  """Returns {name below `directory`: path} of what a manifest lists, in order."""
  names = (os.path.relpath(os.path.join(folder, file), directory).replace(os.sep, "/")
           for folder, _, files in os.walk(directory) for file in files)
  own = (*_OF_THE_COMMIT, NAME, NAME + SUFFIX)
  return {name: os.path.join(directory, name) for name in sorted(names)
          if name not in own and not _OF_THE_SYSTEM.fullmatch(name)}


def _sha256(path: str) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
