"""Names a config may use, each pointing at "module:attribute", imported only when asked for.

A new task, evaluation, data source or tokenizer is one file and one line here.
"""

import importlib
from typing import Any

from limber_jax.errors import UserError, did_you_mean

TASKS = {
  "captioning": "limber_jax.tasks.captioning:Captioning",
  "contrastive": "limber_jax.tasks.contrastive:Contrastive",
  "language_modelling": "limber_jax.tasks.language_modelling:LanguageModelling",
}

# What config.model is, by task.
SIZES = {
  "captioning": "limber_jax.models.limber:LimberSize",
  "contrastive": "limber_jax.models.clip:ClipSize",
  "language_modelling": "limber_jax.models.gptj:GPTJSize",
}

SOURCES = {
  "captions": "limber_jax.data.sources.captions:Captions",
  "digits": "limber_jax.data.sources.digits:Digits",
  "tfds": "limber_jax.data.sources.tfds:Tfds",
}

TOKENIZERS = {
  "bytes": "limber_jax.data.tokenizers:ByteTokenizer",
  "clip": "limber_jax.data.tokenizers:ClipTokenizer",
  "bpe": "limber_jax.data.tokenizers:BpeTokenizer",
  "gpt2": "limber_jax.data.tokenizers:Gpt2Tokenizer",
}

EVALS = {
  "naming": "limber_jax.evals.naming:Naming",
  "retrieval": "limber_jax.evals.retrieval:Retrieval",
  "similarity": "limber_jax.evals.similarity:Similarity",
  "zeroshot": "limber_jax.evals.zeroshot:ZeroShot",
}


def lookup(kind: str, table: dict[str, str], name: str) -> Any:
  """Returns what `name` stands for in `table`.

  Args:
    kind: what the table holds, in the singular, for the message: "data source".
    table: one of the tables above.
    name: the user's word.

  Raises:
    UserError: the name is not there; the message gives the nearest one.
  """
  if name not in table:
    raise UserError(f"no {kind} {name!r}{did_you_mean(name, table)}")
  module, attribute = table[name].split(":")
  return getattr(importlib.import_module(module), attribute)
