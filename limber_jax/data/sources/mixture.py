"""Several sources as one, in shares that are exact."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax import ranges
from limber_jax.config import Source
from limber_jax.data.order import shuffled_index
from limber_jax.data.sources import annotations
from limber_jax.errors import UserError

WANTED = '{"sources": [{"weight": 3, "name": "webdataset", "path": …}, {"weight": 1, …}]}'
LABELS = ("label", "labels", "difficult", "group")
MAX_ROUND = 1_000_000


@dataclass
class MixtureConfig(Source):
  """The records of all its members, one member after the other; in training they come in shares.

  path: a JSON file, {"sources": [{"weight": 3, "name": "webdataset", "path": …, "split": …}, …]}. Each member has a
    weight, a whole number, and the fields of its source; relative paths start at the file's directory.

  `order` substitutes for the pipeline's own, which would draw from all records alike. It repeats a round of as many
  positions as all weights together (divided by what they have in common), in which each member has as many as its
  weight, spread evenly. So any window that is a whole number of rounds long has exact shares, wherever it begins. The
  records of a member come in permutations of its own, by the seed: each exactly once before any comes again. It takes
  no memory, and any position at once. A pass in order, as evaluations make it, sees every record once.

  A record's id begins with the number of its member. Records have "label" only if all members have the same classes.
  """

  name: str = "mixture"
  path: str = ""  # the JSON file of members

  def open(self) -> "Mixture":
    return Mixture(self)


class Mixture:
  """A `MixtureConfig` whose data are open."""

  def __init__(self, config: MixtureConfig):
    self._path = path = config.path
    entries = annotations.entries(annotations.load(path, WANTED), "sources", path)
    self.damage: list[dict[str, str]] = []
    self.notes: list[str] = []
    self._members, weights = [], []
    for number, entry in enumerate(entries):
      where = f"{path}, source {number}"
      if reason := annotations.flaw(entry, name=str, weight=int):
        raise UserError(f"{where}: {reason}; wanted {WANTED}")
      fields = {k: v for k, v in entry.items() if k not in ("name", "weight")}
      if not 1 <= entry["weight"] <= MAX_ROUND:
        raise UserError(f"{where}: weight={entry['weight']}: wanted a whole number from 1 to {MAX_ROUND:,}")
      if entry["name"] == "mixture":
        raise UserError(f"{where}: a mixture in a mixture; name its sources here instead")
      try:
        settings = Source(entry["name"], **fields)
        ranges.check(settings, "")
        for key in settings.paths:
          if (own := getattr(settings, key)) and not os.path.isabs(own):
            setattr(settings, key, os.path.join(os.path.dirname(path), own))
        member = settings.open()
      except UserError as error:
        raise UserError(f"{where}: {error}") from error
      if not len(member):
        raise UserError(f"{where}: it has no records")
      self._members.append(member)
      weights.append(entry["weight"])
      self.notes += getattr(member, "notes", [])
      self.damage += [d | {"id": f"{number}/{d['id']}"} for d in getattr(member, "damage", [])]
    self._weights = [w // int(np.gcd.reduce(weights)) for w in weights]
    if sum(self._weights) > MAX_ROUND:
      raise UserError(f"{path}: weights of {sum(self._weights):,} in all; wanted at most {MAX_ROUND:,}")
    self._round, self._turn = _spread(self._weights)
    self._starts = np.cumsum([0, *map(len, self._members)])
    same = all(m.classes is not None and m.classes == self._members[0].classes for m in self._members)
    self.classes = self._members[0].classes if same else None

  def shuffled_index(self, seed: int, position: int) -> int:
    """Returns the index of the record at a position of the endless training stream; see `limber_jax.data.pipeline`.

    Args:
      seed: at least 0.
      position: at least 0.
    """
    rounds, place = divmod(position, len(self._round))
    number = int(self._round[place])
    own = rounds * self._weights[number] + int(self._turn[place])  # how many of this member have been before
    return int(self._starts[number]) + shuffled_index(len(self._members[number]), _own_seed(seed, number), own)

  def shares(self, batch_size: int) -> list[tuple[str, int, int]]:
    """Returns (name, records, how many of them a batch holds at most) of each member."""
    return [(f"source {i} of the mixture", len(member), -(-batch_size * weight // len(self._round)))
            for i, (member, weight) in enumerate(zip(self._members, self._weights, strict=True))]

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _at(self, index: int) -> tuple[int, int]:
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    return number, index - int(self._starts[number])

  def _named(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
    kept = record if self.classes is not None else {k: v for k, v in record.items() if k not in LABELS}
    return kept | {"id": f"{number}/{record['id']}"}

  def annotation(self, index: int) -> dict[str, Any]:
    number, place = self._at(index)
    return self._named(number, self._members[number].annotation(place))

  def __getitem__(self, index: int) -> dict[str, Any]:
    number, place = self._at(index)
    return self._named(number, self._members[number][place])

  def files(self) -> Iterator[str]:
    yield self._path
    for member in self._members:
      yield from member.files()

  def fingerprint(self) -> str:
    what = [(weight, member.fingerprint()) for weight, member in zip(self._weights, self._members, strict=True)]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _own_seed(seed: int, number: int) -> int:
  """Returns the seed of a member: those of the same length would else come in the same order."""
  return int(np.random.SeedSequence((seed, number), spawn_key=(2,)).generate_state(1, np.uint64)[0])


def _spread(weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns (the member at each place of a round, how many of this member came before it in the round).

  Place k of a member with weight w stands at (k + 1/2) / w of the round; of two at the same the first member comes
  first.
  """
  members = np.repeat(np.arange(len(weights)), weights)
  turns = np.concatenate([np.arange(w) for w in weights])
  places = np.lexsort((members, (2 * turns + 1) / np.repeat(weights, weights)))
  return members[places].astype(np.int32), turns[places].astype(np.int32)
