"""Captions images: `python -m limber_jax.caption --workdir=runs/limber photo.jpg folder/`.

Prints a table, or with --json one object a line; --out=FILE writes these lines to a file, which appears once it is
whole: stopped or killed, the same command resumes. How captions are written is the run's own config.decoding, unless
flags say otherwise. Images that cannot be read are named on stderr and counted; the exit code is then 1.
"""

from absl import flags

from limber_jax import cli
from limber_jax.data.images import ImageOptions
from limber_jax.inference.captioner import captions
from limber_jax.inference.flags import Flags
from limber_jax.inference.images import find

if __name__ == "__main__":
  _flags = Flags()
  _prompt = flags.DEFINE_string("prompt", None, "What follows an image, such as 'A picture of'; no space at its end.")

  def _main(inputs: list[str]) -> int:
    paths = find(inputs, ImageOptions.from_config(_flags.config()[0].data))
    with _flags.output(paths) as output:
      model = _flags.open(len(paths), _prompt.value)
      done = output.resume(lambda: {"command": "caption", **model.key()}, [{"image": path} for path in paths],
                           model.batch_size)
      rows = ({"image": w.path, "error": w.error} if w.error else {"image": w.path, "caption": w.text}
              for w in captions(model, paths, done))
      widths = {"image": max(map(len, [*map(cli.printable, paths), "image"])), "caption": 0}
      return output.write(rows, widths, len(paths))

  cli.run(_main, prints=_flags.prints)
