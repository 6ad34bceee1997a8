"""Animals with Attributes 2: photographs of 50 animals, and what each animal is like. Source: arXiv 1707.00600."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources import annotations
from limber_jax.errors import UserError, did_you_mean
from limber_jax.runtime import inputs

WANTED = ("Animals_with_Attributes2 with classes.txt, predicates.txt, predicate-matrix-binary.txt and "
          "JPEGImages/<animal>/*.jpg: the base package and the images of https://cvml.ista.ac.at/AwA2/")
SPLITS = {"all": "classes.txt", "train": "trainclasses.txt", "test": "testclasses.txt"}
SUFFIXES = (".jpg", ".jpeg", ".png")

# Names under which no other of the 50 goes: whoever says panda names the giant panda.
ALSO = {
  "giant panda": ("panda",), "grizzly bear": ("grizzly",), "killer whale": ("orca",), "hippopotamus": ("hippo",),
  "rhinoceros": ("rhino",), "chimpanzee": ("chimp",), "german shepherd": ("german shepherd dog", "alsatian"),
  "persian cat": ("persian",), "siamese cat": ("siamese",), "humpback whale": ("humpback",),
}


@dataclass
class Awa2Config(Source):
  """A record a photograph: "label" and "text" say its animal.

  path: the directory Animals_with_Attributes2 as it is unpacked, or the one above.
  split: all = the 37,322 images; train, test = those of the 40 and the 10 animals of trainclasses.txt and
    testclasses.txt, which have no animal in common. Labels are numbers of all 50.

  `classes` are the animals' names, with spaces ("grizzly bear"); `names` those and further names of each; `attributes`
  the 85 predicates; `has` bool [50, 85], which animal has which. `damage` lists folders of no known animal, and animals
  without any image.
  """

  name: str = "awa2"
  path: str = ""  # the directory Animals_with_Attributes2, or the one above it
  split: str = Unnamed("train")  # all | train | test: of which animals

  def open(self) -> "Awa2":
    return Awa2(self)

  def splits(self) -> tuple[str, ...]:
    return tuple(SPLITS)


class Awa2:
  """A `Awa2Config` whose data are open."""

  def __init__(self, config: Awa2Config):
    nested = os.path.join(config.path, "Animals_with_Attributes2")
    self._root = nested if os.path.isdir(nested) else config.path
    if config.split not in SPLITS:
      raise UserError(f"source.split: 'awa2' has no split {config.split!r}{did_you_mean(config.split, SPLITS)}")
    folders = self._numbered("classes.txt")  # grizzly+bear
    self.classes = tuple(name.replace("+", " ") for name in folders)
    self.names = tuple((name, *ALSO.get(name, ())) for name in self.classes)
    self.attributes = tuple(self._numbered("predicates.txt"))
    self.has = self._matrix("predicate-matrix-binary.txt")
    file = SPLITS[config.split]
    wanted = folders if config.split == "all" else self._lines(file)
    if unknown := next((name for name in wanted if name not in folders), None):
      raise UserError(f"{os.path.join(self._root, file)}: {unknown!r} is not in classes.txt"
                      f"{did_you_mean(unknown, folders)}")
    self.damage: list[dict[str, str]] = []
    there = self._folder("")
    for name in sorted(there - set(folders)):
      self._damaged(name, "no animal of classes.txt")
    self._files: list[tuple[int, str]] = []  # (label, "antelope/antelope_10001.jpg")
    for label, name in enumerate(folders):
      if name in wanted:
        images = [f for f in sorted(self._folder(name) if name in there else ()) if f.lower().endswith(SUFFIXES)]
        if not images:
          self._damaged(name, "no images of it")
        self._files += [(label, f"{name}/{file}") for file in images]

  def _damaged(self, name: str, reason: str) -> None:
    self.damage.append({"file": "JPEGImages", "id": name, "reason": reason})

  def _lines(self, name: str) -> list[str]:
    path = os.path.join(self._root, name)
    if what := inputs.what_is(path):
      raise UserError(f"source.path={self._root!r}: {what.replace('such file', f'file {name}')}; wanted {WANTED}")
    try:
      return [line.strip() for line in inputs.text(path, inputs.LIST).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error

  def _numbered(self, name: str) -> list[str]:
    """Returns the names of a file whose lines are a number from 1 and a name."""
    found = []
    for number, line in enumerate(self._lines(name), 1):
      fields = line.split()
      if len(fields) != 2 or fields[0] != str(number):
        raise UserError(f"{os.path.join(self._root, name)}, line {number}: wanted {number} and a name, got {line!r}")
      found.append(fields[1])
    return found

  def _matrix(self, name: str) -> np.ndarray:
    """Returns bool [classes, attributes] from lines of 0 and 1."""
    rows, path, wide = self._lines(name), os.path.join(self._root, name), len(self.attributes)
    if len(rows) != len(self.classes):
      raise UserError(f"{path}: wanted a line for each of {len(self.classes)} animals, got {len(rows)}")
    for number, row in enumerate(rows, 1):
      if len(row.split()) != wide or set(row.split()) - {"0", "1"}:
        raise UserError(f"{path}, line {number}: wanted {wide} numbers 0 or 1, got {row[:60]!r}")
    return np.array([row.split() for row in rows]) == "1"

  def _folder(self, name: str) -> set[str]:
    """Returns what is in JPEGImages/name, or in JPEGImages, hidden files left out."""
    path = os.path.join(self._root, "JPEGImages", name)
    try:
      return {entry for entry in os.listdir(path) if not entry.startswith(".")}
    except OSError as error:
      raise UserError(f"{path}: cannot be read ({error.strerror}); wanted {WANTED}") from error

  def __len__(self) -> int:
    return len(self._files)

  def annotation(self, index: int) -> dict[str, Any]:
    label, file = self._files[index]
    return {"id": file, "text": self.classes[label], "label": label}

  def __getitem__(self, index: int) -> dict[str, Any]:
    out = self.annotation(index)
    return out | {"image": annotations.read_image(os.path.abspath(os.path.join(self._root, "JPEGImages")), out["id"],
                                                  ())}

  def files(self) -> Iterator[str]:
    files = {*SPLITS.values(), "predicates.txt", "predicate-matrix-binary.txt"}
    yield from (os.path.join(self._root, name) for name in sorted(files))
    yield from (os.path.join(self._root, "JPEGImages", name) for _, name in self._files)

  def fingerprint(self) -> str:
    what = repr((self._files, self.classes, self.attributes)).encode() + np.packbits(self.has).tobytes()
    return hashlib.sha256(what).hexdigest()[:16]
