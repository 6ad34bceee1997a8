"""Rewrites a model's weights for another library: `python -m limber_jax.convert SRC DST --to=hf|open_clip|limber`.

SRC is anything that `limber_jax.weights.load` reads. Tokenizer files are not part of it: copy them beside the result.
"""

import jax
from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.weights import export, load


def convert(source: str, destination: str, to: str) -> None:
  """Writes the model at `source` into the new directory `destination`; raises UserError as `load` and `save` do."""
  model = load.load(source)
  export.save(destination, to, model.size, model.params, model.stats)
  count = sum(x.size for x in jax.tree.leaves(model.params))
  print(f"{destination}: {count / 1e6:.2f} M parameters for {to}; tokenizer files are not part of it")


if __name__ == "__main__":
  _to = flags.DEFINE_enum("to", None, export.FORMATS, "Format to write.")

  def _main(argv: list[str]) -> None:
    if len(argv) != 2:
      raise UserError(f"expected SRC and DST, got {len(argv)} arguments; "
                      "for example python -m limber_jax.convert runs/b32 b32-hf --to=hf")
    if _to.value is None:
      raise UserError(f"--to is missing; choose one of {', '.join(export.FORMATS)}")
    convert(*argv, _to.value)

  cli.run(_main)
