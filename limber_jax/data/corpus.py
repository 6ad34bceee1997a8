"""The captions of a data source or of a file, one after the other."""

import io
from collections.abc import Iterator

from limber_jax.config import Source
from limber_jax.data import text
from limber_jax.errors import UserError
from limber_jax.runtime import inputs


def captions(settings: Source) -> Iterator[str]:
  """Yields every caption of a data source."""
  source = settings.open()
  for index in range(len(source)):
    record = source.annotation(index)
    yield from record.get("texts", (record["text"],))


def lines(path: str) -> Iterator[str]:
  """Yields every caption of a file."""
  if path.endswith((".tsv", ".csv")):
    yield from captions(Source(name="captions", path=path))
    return
  try:
    with inputs.opened(path) as file:
      text.check_encoding(file.read(64), f"--source={path}")
      file.seek(0)
      yield from map(text.clean, io.TextIOWrapper(file, "utf-8-sig"))
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--source={path}: {getattr(error, 'strerror', None) or error}") from error
