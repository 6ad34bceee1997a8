"""Data sources, one file a format: a dataclass of settings, a `limber_jax.config.Source`, and the `Source` it opens.

A record is {"id": str, "image": encoded bytes | uint8 [h, w, 3], "text": str}, and may have
  "texts": tuple[str, ...]   every caption of the image, where a record has several; "text" is the first
  "label": int               the number of its class
  "labels": tuple[int, ...]  the numbers of its classes, where an image has several, and then also
  "difficult": tuple[int, ...]  those of classes that only difficult objects have: not to be counted either way
  "group": int             which part of the data it belongs to, for the metric of the worst
Records of texts alone, for language models, have no "image".

A source may have `damage`, a list of {"file", "id", "reason"}: what it found when it was opened that cannot be used and
is no record. It may have `notes`, a list of lines: what was chosen when it was opened that could have been chosen
otherwise. It may have `files()`, which yields the paths of all files that its records come from, in an order that does
not change with where they lie: see `limber_jax.data.contents`. It may have `shuffled_index(seed, position)`, as a
mixture does, which then decides the order in training. It may have `templates`, sentences with {} for the name of a
class, and `metrics`, the metrics that its own tables give.
"""

from typing import Any, Protocol

from limber_jax import config as config_lib
from limber_jax.errors import UserError


class Source(Protocol):
  """Records by index, the same for the same data, from any thread and, pickled, from any process."""

  classes: tuple[str, ...] | None
  """The names of the classes by label, where the source knows them."""

  def __len__(self) -> int:
    """Returns the number of records."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the record; raises UserError if it cannot be read."""

  def annotation(self, index: int) -> dict[str, Any]:
    """Returns the record without its image, which is not read where the format allows that."""

  def fingerprint(self) -> str:
    """Returns 16 hex digits that change with the data; the same wherever the data are kept."""


def check_undivided(config: config_lib.Source, what: str) -> None:
  """Raises UserError if a part is asked for of data that have none; `what` they are stands in the message."""
  if config.split not in ("train", ""):
    raise UserError(f"config.data.source.split={config.split!r}: {what} has no parts; leave it empty")
