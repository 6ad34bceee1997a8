"""Looks at a data source before it is trained on: `python -m limber_jax.inspect SRC`.

Prints how many records there are, their formats, sizes and caption lengths, and what cannot be read, by reason; with
--out=FILE.png writes a contact sheet of images with their captions. SRC and its flags are those of limber_jax.pack. Of
large data a random sample is looked at, --sample=10000 records; 0 looks at all. Of a packed directory the shards'
digests are compared too, which reads all of it. The exit code is 1 if there is damage.
"""

import json

from absl import flags

from limber_jax import cli
from limber_jax.data.guess import SourceFlags
from limber_jax.data.images import ImageFlags
from limber_jax.data.inspection import SAMPLE, contact_sheet, inspect, lines
from limber_jax.errors import UserError
from limber_jax.inference import destination

if __name__ == "__main__":
  _source = SourceFlags()
  _sample = flags.DEFINE_integer("sample", SAMPLE, "Records to look at; 0: all.", lower_bound=0)
  _out = flags.DEFINE_string("out", "", "PNG file for a contact sheet of images with their captions; none if empty.")
  _images = ImageFlags()
  _json = flags.DEFINE_bool("json", False, "Print one JSON object.")

  def _main(argv: list[str]) -> int:
    if len(argv) != 1:
      raise UserError(f"expected SRC, got {len(argv)} arguments; for example python -m limber_jax.inspect tars/")
    config = _source.source(argv[0])
    if _out.value:
      destination.file(_out.value, what=f"--out={_out.value}", reads=destination.data(config))
    told, looks = inspect(config.open(), _sample.value, _images.options())
    print(json.dumps(told) if _json.value else
          "\n".join(lines(told, f"{config.name} {config.path}")), flush=True)
    if _out.value and looks:
      contact_sheet(looks, _out.value)
      if not _json.value:
        print(f"contact sheet: {_out.value}")
    return int(bool(told["damage"]))

  cli.run(_main, prints=lambda: not _out.value)
