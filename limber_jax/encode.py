"""Writes the features of frozen encoders once: `python -m limber_jax.encode --config=experiments/x.py --out=DIR`.

Training with --config.data.features=DIR reads them in place of images. The same command resumes after any kind of end,
a kill too, and repairs a directory from which shards were lost. Of several processes each writes shards of its own,
into one directory that all of them see.
"""

import os

from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.inference import destination
from limber_jax.inference.encoding import SHARD_MB, encode
from limber_jax.runtime import parallel

if __name__ == "__main__":
  _config = cli.define_config()
  _out = flags.DEFINE_string("out", None, "Directory for the features; made if missing.")
  _batch_size = flags.DEFINE_integer("batch_size", 0, "Images at a time, over all devices; 0: as in training.",
                                     lower_bound=0)
  _shard_mb = flags.DEFINE_float("shard_mb", SHARD_MB, "Size of a file in 10⁶ bytes.", lower_bound=0)

  def _main(argv: list[str]) -> None:
    if argv:
      raise UserError(f"unexpected argument {argv[0]!r}; settings are given as --config.field=value")
    if not _out.value:
      raise UserError("--out is missing; for example --out=features/coco")
    destination.directory(_out.value, what=f"--out={_out.value}")
    config = cli.get_config(_config)
    parallel.start()
    encode(config, os.path.normpath(_out.value), batch_size=_batch_size.value, shard_mb=_shard_mb.value)

  cli.run(_main)
