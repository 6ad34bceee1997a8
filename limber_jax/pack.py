"""Packs any data source into ArrayRecord shards: `python -m limber_jax.pack SRC DST --shrink=256`.

SRC is what --source reads: tars, Parquet, a table, JSON lines, COCO's JSON, class folders … Which of them is seen from
SRC, unless --source=NAME says so; --split, --images and the other fields of a source are flags too. DST is a directory,
read with source.name=packed.

Every image is decoded once. With --shrink=256 those whose shorter side is longer are scaled down to it (bicubic, as
training does) and encoded again: PNG as PNG, JPEG and WebP as JPEG of --quality=95; none is enlarged, and the others
stay bit for bit as they are. Images that are not files (the source "digits"), and those of --formats=gif,bmp,tiff,avif,
become PNG; with --exif those that are to be turned are turned and encoded again.

What cannot be read is left out and listed in DST/dropped.jsonl: file, index, id, reason; the exit code is then 1. Past
the share --damaged=0.01 of all records it stops. Shard k holds what can be read of records k * per_shard and on, so
the same command writes the same bytes whatever --workers is, and after a kill it resumes with the next shard.
"""

import os

from absl import flags

from limber_jax import cli
from limber_jax.data.guess import SourceFlags
from limber_jax.data.images import ImageFlags
from limber_jax.data.packing import PER_SHARD, QUALITY, pack
from limber_jax.errors import UserError
from limber_jax.inference import destination

if __name__ == "__main__":
  _source = SourceFlags()
  _shrink = flags.DEFINE_integer("shrink", 0, "Pixels that the shorter side is scaled down to, such as 256; 0: none.",
                                 lower_bound=0)
  _quality = flags.DEFINE_integer("quality", QUALITY, "Of the JPEG files of shrunk images.", 1, 100)
  _per_shard = flags.DEFINE_integer("per_shard", PER_SHARD, "Records of a shard.", 1)
  _damaged = flags.DEFINE_float("damaged", 0.01, "The share of records that may be unreadable.", 0, 1)
  _images = ImageFlags()
  _workers = flags.DEFINE_integer("workers", 2, "Processes; 0 packs in this one.", 0, 1024)

  def _main(argv: list[str]) -> int:
    if len(argv) != 2:
      raise UserError(f"expected SRC and DST, got {len(argv)} arguments; for example python -m limber_jax.pack "
                      "'tars/{00000..00099}.tar' packed --shrink=256")
    destination.directory(argv[1], what=argv[1])
    manifest = pack(
      _source.source(argv[0]), os.path.normpath(argv[1]), shrink=_shrink.value, quality=_quality.value,
      per_shard=_per_shard.value, damaged=_damaged.value, workers=_workers.value, images=_images.options())
    return int(bool(manifest and manifest["dropped"]))

  cli.run(_main)
