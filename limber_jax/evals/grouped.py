"""Records by image, of data that have a record a caption: what retrieval and captions are measured on."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from limber_jax.data.sources import Source
from limber_jax.errors import UserError

READERS = 16  # threads that read image files


class Grouped:
  """A source with a record an image, of one with a record a caption; "texts" are the captions of all its records."""

  def __init__(self, source: Source, groups: list[list[int]], damage: list[dict[str, str]]):
    """Takes the records of each image, and those that cannot be read, which belong to none."""
    self._source, self._groups = source, groups
    self.classes = source.classes
    self.damage = [*getattr(source, "damage", []), *damage]
    self.notes = [*getattr(source, "notes", []), f"{sum(map(len, groups)):,} records show {len(groups):,} images: each "
                  "image is taken once, with the captions of all of its records"]

  def __len__(self) -> int:
    return len(self._groups)

  def _with_texts(self, index: int, record: dict[str, Any]) -> dict[str, Any]:
    return record | {"texts": tuple(self._source.annotation(i)["text"] for i in self._groups[index])}

  def annotation(self, index: int) -> dict[str, Any]:
    return self._with_texts(index, self._source.annotation(self._groups[index][0]))

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._with_texts(index, self._source[self._groups[index][0]])

  def fingerprint(self) -> str:
    return hashlib.sha256(repr((self._source.fingerprint(), self._groups)).encode()).hexdigest()[:16]


def by_image(source: Source) -> Source:
  """Returns a source with a record an image: `source` itself where no two of its records show the same.

  Images are the same whose files are, by their paths where the source has `image_path`, else by their bytes. A source
  whose records have several captions has records by image already, and stays as it is.
  """
  groups: dict[Any, list[int]] = {}
  lost: list[int] = []
  for index in range(len(source)):
    try:
      if "texts" in source.annotation(index):
        return source
    except UserError:
      lost.append(index)
  there = sorted(set(range(len(source))) - set(lost))
  with ThreadPoolExecutor(READERS) as pool:
    for index, key in zip(there, pool.map(lambda i: _image(source, i), there), strict=True):
      groups.setdefault(key, []).append(index)
  if len(groups) == len(there):
    return source
  return Grouped(source, list(groups.values()), [_why(source, i) for i in lost])


def _image(source: Source, index: int) -> Any:
  """Returns what two records have in common that show the same image."""
  try:
    if hasattr(source, "image_path"):
      return os.path.normpath(source.image_path(index))
    image = source[index]["image"]
    what = (image.shape, image.tobytes()) if isinstance(image, np.ndarray) else (None, image)
    return what[0], hashlib.sha256(what[1]).digest()
  except (UserError, KeyError):  # which the evaluation names when it reads the image
    return index


def _why(source: Source, index: int) -> dict[str, str]:
  """Returns what is reported of a record that cannot be read."""
  try:
    source.annotation(index)
  except UserError as error:
    return {"file": type(source).__name__, "id": f"record {index}", "reason": str(error)}
  raise AssertionError(f"record {index} could not be read before")
