"""The one error a user may meet, and how it names the nearest right thing."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """A mistake of the user's, told in one line: what, where, got, wanted. Commands print it and exit with 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'? known: …` for a name that is not among `known`; meant to end a message."""
  known = sorted(known)
  close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
  guess = f"; did you mean {close[0]!r}?" if close else ";"
  return f"{guess} known: {', '.join(known) or 'none'}"
