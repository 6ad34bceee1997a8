"""Names images: `python -m limber_jax.classify --weights=DIR --labels="a dog,a cat" photo.jpg folder/`.

Prints a table, or with --json one object a line; --out=FILE writes these lines to a file, which appears once it is
whole: stopped or killed, the same command resumes. Labels are used as they are written; --templates puts them into
sentences. Images that cannot be read are named on stderr and counted; the exit code is then 1.
"""

from absl import flags

from limber_jax import cli, config
from limber_jax.data.images import ImageFlags
from limber_jax.errors import UserError
from limber_jax.evals.prompts import load_templates
from limber_jax.inference import destination
from limber_jax.inference.classifier import Classifier, read_labels, row, shown
from limber_jax.inference.images import find, own_images
from limber_jax.inference.output import OutFlags
from limber_jax.weights import load

if __name__ == "__main__":
  _weights = flags.DEFINE_string("weights", None, "A workdir of limber_jax.train, or weights of Hugging Face, "
                                 "open_clip or OpenAI.")
  _model = cli.define_model()
  _labels = flags.DEFINE_list("labels", [], "Labels, with commas between them.")
  _labels_file = flags.DEFINE_string("labels_file", "", "File with one label a line.")
  _templates = flags.DEFINE_string("templates", "{}", "A sentence with {} for the label, a file with one a line, "
                                   "imagenet80 or imagenet7.")
  _tokenizer = flags.DEFINE_string("tokenizer", "", "clip, bytes or bpe; empty: the weights' own.")
  _tokenizer_path = flags.DEFINE_string("tokenizer_path", "", "Directory or hub id of the tokenizer.")
  _images = ImageFlags()
  _out = OutFlags("Print one JSON object a line, with the probabilities of all labels.")

  def _main(inputs: list[str]) -> int:
    if not _weights.value:
      raise UserError("--weights is missing; for example --weights=runs/quickstart")
    images = _images.options(own_images(_weights.value))
    labels, paths = read_labels(_labels.value, _labels_file.value), find(inputs, images)
    tokenizer = load.own_tokenizer(_weights.value)
    if _tokenizer.value or _tokenizer_path.value:
      tokenizer = config.Tokenizer(_tokenizer.value or tokenizer.name, _tokenizer_path.value)
    wide = max(map(len, [*map(cli.printable, paths), "image"]))
    widths = {"image": wide, "label": max(map(len, [*labels, "label"])), "p": -6, "next": 0}
    named = [_labels_file.value, _templates.value, _model.value, *destination.weights(_weights.value),
             *destination.weights(_tokenizer_path.value)]
    with _out.output([*paths, *named]) as output:
      model = Classifier(_weights.value, labels, load_templates(_templates.value), tokenizer, model=_model.value,
                         images=images)
      done = output.resume(lambda: {"command": "classify", **model.key()}, [{"image": p} for p in paths],
                           model.batch_size)
      rows = (row(path, labels, result) for path, result in model.classify(paths[done:]))
      return output.write(rows, widths, len(paths), shown=shown)

  cli.run(_main, prints=_out.prints)
