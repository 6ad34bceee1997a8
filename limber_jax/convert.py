"""Rewrites a model's weights for another library: `python -m limber_jax.convert SRC DST --to=hf|open_clip|limber`.

SRC is anything that `limber_jax.weights.load` reads; of a state dict say by --model=clip_vit_b32, or a configuration
file, what it is of. Files of its tokenizer that lie beside it are copied; what else of its settings the result cannot
hold, of the tokenizer or of how images are read, is named in a line each.

With --to=projection SRC is a workdir where a linear map was trained between frozen models, and DST the one file that
holds it; `limber_jax.caption --projection=DST` captions with it wherever these models are.
"""

from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.inference import destination, projections
from limber_jax.weights import export
from limber_jax.weights.rewrite import rewrite

if __name__ == "__main__":
  _FORMATS = (*export.FORMATS, "projection")
  _to = flags.DEFINE_enum("to", None, _FORMATS, "Format to write.")
  _model = cli.define_model()
  _checkpoint = flags.DEFINE_string("checkpoint", "", "Of a projection: latest, best, or a step; if empty, the best "
                                   "of those that there are, or the latest where nothing was measured.")
  _map = flags.DEFINE_string("map", "", "Of a projection: the name of an extra projector; empty: the first.")

  def _main(argv: list[str]) -> None:
    if len(argv) != 2:
      raise UserError(f"expected SRC and DST, got {len(argv)} arguments; "
                      "for example python -m limber_jax.convert runs/b32 b32-hf --to=hf")
    if _to.value is None:
      raise UserError(f"--to is missing; choose one of {', '.join(_FORMATS)}")
    if _to.value == "projection" and _model.value:
      raise UserError("--model is for CLIPs; a projection's models are those of its run")
    if _to.value == "projection":
      destination.file(argv[1], what=argv[1], reads=[argv[0]])
      step = projections.export_projection(*argv, checkpoint=_checkpoint.value, name=_map.value)
      print(f"{argv[1]}: the linear map of step {step}")
    elif _checkpoint.present or _map.present:
      raise UserError("--checkpoint and --map are for --to=projection")
    else:
      destination.directory(argv[1], what=argv[1])
      for line in rewrite(*argv, _to.value, _model.value):
        print(line)

  cli.run(_main)
