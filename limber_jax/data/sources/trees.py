"""The files below a directory and those of a tar, which are looked at in the same way."""

import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator

from limber_jax.data.sources import tars
from limber_jax.errors import UserError
from limber_jax.runtime import inputs


class Directory:
  """The files below a directory. Names that begin with a dot are left out."""

  def __init__(self, root: str):
    self._root = root
    self.refused: dict[str, str] = {}  # what cannot be used, and why

  def entries(self, folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of the folders and of the files in a folder, sorted; of none that is there, none."""
    folders, files = [], []
    try:
      with os.scandir(os.path.join(self._root, folder)) as found:
        for entry in found:
          if not entry.name.startswith("."):
            (folders if os.path.isdir(entry) else files).append(entry.name)  # of a link in a circle is_dir raises
    except (FileNotFoundError, NotADirectoryError):
      pass  # no folder of this name: an empty one
    except OSError as error:
      self.refused[folder] = f"cannot be read ({error.strerror or error})"
    return sorted(folders), sorted(files)

  def has(self, path: str) -> bool:
    return "\0" not in path and os.path.isfile(os.path.join(self._root, path))

  def files(self, paths: Iterable[str]) -> Iterator[str]:
    """Yields the files that hold what is at these paths."""
    yield from (os.path.join(self._root, path) for path in paths)

  def read(self, path: str, kind: inputs.Kind = inputs.IMAGE) -> bytes:
    """Returns the bytes of a file; raises UserError if it cannot be read or has more than are read of its kind."""
    full = os.path.join(self._root, path)
    try:
      return inputs.read(full, kind)
    except OSError as error:
      raise UserError(f"{full}: cannot be read ({error.strerror or error})") from error


class Tar:
  """The files of a tar, found once and then read where they lie; nothing is unpacked."""

  def __init__(self, path: str, keep: bool):
    self._path, size = path, os.path.getsize(path)
    self.refused: dict[str, str] = {}
    self._at: dict[str, tuple[int, int]] = {}  # where the contents of a file begin, and their bytes
    broken = ""
    try:
      with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
          tar.members = []  # they would all be kept
          name = posixpath.normpath(member.name)
          if member.isdir() or any(part.startswith(".") and part != ".." for part in name.split("/")):
            continue
          if member.name.startswith("/") or name.split("/")[0] == "..":
            self.refused[member.name] = "its name leads out of the tar"
          elif member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            self.refused[name] = "a link or device, no file"
          elif member.offset_data + member.size <= size:
            self._at[name] = member.offset_data, member.size  # of a name that comes twice the last counts, as in tar
        end = tar.offset
      with inputs.opened(path) as file:
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
      why = ("cut off or damaged; fetch it again" if self._at else
             "no tar; a compressed one has no random access: unpack it with gunzip, xz or zstd first")
      broken = f"{path}, {size:,} bytes: {why} ({error})"
    else:
      if any(rest):  # where tarfile stops at a damaged header, and says nothing
        broken = f"{path}, byte {end:,} of {size:,}: no header of a tar; fetch it again"
    if broken:
      lost = tars.cut_off(path)
      if not (lost and keep):
        raise UserError(broken + f"; it is cut off: {tars.KEEP}" * bool(lost))
      id_, reason = lost.lost(size)
      self.refused[id_] = reason
    self._inside: dict[str, tuple[set[str], set[str]]] = {"": (set(), set())}
    for name in self._at:
      parts = name.split("/")
      for depth in range(len(parts)):
        inside = self._inside.setdefault("/".join(parts[:depth]), (set(), set()))
        inside[depth == len(parts) - 1].add(parts[depth])

  def entries(self, folder: str) -> tuple[list[str], list[str]]:
    folders, files = self._inside.get(folder, ((), ()))
    return sorted(folders), sorted(files)

  def has(self, path: str) -> bool:
    return path in self._at

  def files(self, paths: Iterable[str]) -> Iterator[str]:
    """Yields the tar: the one file that holds what is at any path."""
    del paths
    yield self._path

  def read(self, path: str, kind: inputs.Kind = inputs.IMAGE) -> bytes:
    """Returns the bytes of a file; raises UserError if it cannot be read or has more than are read of its kind."""
    start, size = self._at[path]
    try:
      inputs.check_size(size, kind)
      with inputs.opened(self._path) as file:
        file.seek(start)
        return file.read(size)
    except UserError as error:
      raise UserError(f"{self._path}: {path}: {error}") from error
    except OSError as error:
      raise UserError(f"{self._path}: cannot be read ({error.strerror or error})") from error
