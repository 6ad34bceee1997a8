"""Names of what is of one of several maps: "prompt" of the first map, "prompt@random" of the extra projector "random".

Parts of a model, keys of batches, functions of a task and metrics of an evaluation are named so, on disk too. The first
map has the name "". Here alone names are joined and split.
"""

from collections.abc import Mapping
from typing import Any

BLIND = "blind"  # metrics "@blind" are of the language model alone


def join(what: str, name: str) -> str:
  """Returns what `what` is called of the map `name`.

  >>> join("prompt", ""), join("prompt", "random"), join("", "random")
  ('prompt', 'prompt@random', '@random')
  """
  return f"{what}@{name}" if name else what


def split(joined: str) -> tuple[str, str]:
  """Returns (what, the name of its map), from which `join` gives `joined` again.

  >>> split("prompt"), split("cider_d/in@random")
  (('prompt', ''), ('cider_d/in', 'random'))
  """
  what, _, name = joined.partition("@")
  return what, name


def by_map(joined: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Returns the values by the name of their map, then by what they are.

  >>> by_map({"image": 1, "prompt": 2, "prompt@random": 3})
  {'': {'image': 1, 'prompt': 2}, 'random': {'prompt': 3}}
  """
  out: dict[str, dict[str, Any]] = {}
  for key, value in joined.items():
    what, name = split(key)
    out.setdefault(name, {})[what] = value
  return out
