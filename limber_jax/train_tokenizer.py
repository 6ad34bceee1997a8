"""Trains a byte-pair encoding on captions: `python -m limber_jax.train_tokenizer --source=captions.tsv --out=DIR`.

The captions come from an experiment's data (--config=experiments/x.py) or from files (--source=FILE, more than once):
tables as the source `captions` reads them (.tsv, .csv), or any other text with one caption a line. Use the result with
--config.data.tokenizer.name=bpe --config.data.tokenizer.path=DIR.
"""

from absl import flags

from limber_jax import cli
from limber_jax.data.corpus import captions, lines
from limber_jax.data.tokenizers import BpeTokenizer
from limber_jax.errors import UserError
from limber_jax.inference import destination


def _vocab(task: str, size: int) -> str:
  """Returns the setting that must be as large as a tokenizer, for a task, "" where none is known."""
  clip, lm = f"--config.model.text.vocab={size}", f"--config.model.vocab={size}"
  fields = {"contrastive": clip, "language_modelling": lm, "captioning": f"--config.model.lm.vocab={size}"}
  return fields.get(task, f"{clip} (of a language model {lm})")


if __name__ == "__main__":
  _config = cli.define_config()
  _source = flags.DEFINE_multi_string("source", [], "Table (.tsv, .csv) or text file with one caption a line.")
  _vocab_size = flags.DEFINE_integer("vocab_size", 8192, "Ids in all, start, end and padding included.", lower_bound=1)
  _out = flags.DEFINE_string("out", None, "Directory for tokenizer.json.")

  def _main(args: list[str]) -> None:
    if args:
      raise UserError(f"{args[0]!r}: wanted flags only; more files with more --source=…")
    if (flags.FLAGS["config"].value is None) == (not _source.value):
      raise UserError("wanted either --source=FILE, once or more, or --config=experiments/x.py, whose data are used")
    if not _out.value:
      raise UserError("--out=DIR is missing: where tokenizer.json goes")
    destination.directory(_out.value, what=f"--out={_out.value}")
    task = ""
    if _source.value:
      texts = (text for path in _source.value for text in lines(path))
    else:
      config = cli.get_config(_config)
      task, texts = config.task, captions(config.data.source)
    tokenizer = BpeTokenizer.train(texts, _vocab_size.value, _out.value)
    print(f"{_out.value}: {tokenizer.vocab_size} ids; use it with --config.data.tokenizer.name=bpe "
          f"--config.data.tokenizer.path={_out.value} {_vocab(task, tokenizer.vocab_size)}")

  cli.run(_main)
