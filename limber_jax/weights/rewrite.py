"""A model's weights, rewritten for another library."""

from collections.abc import Iterator

import jax

from limber_jax.weights import beside, export, load, preprocessing


def rewrite(source: str, destination: str, to: str, model: str = "") -> Iterator[str]:
  """Writes the model at `source` into the new directory `destination`; yields lines on what it holds and cannot hold.

  Args:
    source: as of `load.load`.
    destination: the directory.
    to: its format, one of `export.FORMATS`.
    model: as of `load.load`.

  Raises:
    UserError: as `load.load` and `export.save` do.
  """
  export.check_new(destination)
  loaded = load.load(source, model)
  export.save(destination, to, loaded.size, loaded.params, loaded.stats)
  if note := preprocessing.otherwise(loaded.size, loaded.size.image.image_size, to):
    yield f"--to={to}: {note}"
  yield from beside.keep(source, destination, to)
  count = sum(x.size for x in jax.tree.leaves(loaded.params))
  yield f"{destination}: {count / 1e6:.2f} M parameters for {to}"
