"""Names a config may use, each pointing at "module:attribute", imported only when asked for.

A new task, encoder, evaluation, data source or tokenizer is one file and one line here.
"""

import importlib
from typing import Any

from limber_jax.errors import UserError, did_you_mean

TASKS = {
  "captioning": "limber_jax.tasks.captioning:Captioning",
  "contrastive": "limber_jax.tasks.contrastive:Contrastive",
  "language_modelling": "limber_jax.tasks.language_modelling:LanguageModelling",
}

# Image encoders, by the kind of their tower; a name of one, such as clip_vit_b32, is in its `named`.
ENCODERS = {
  "vit": "limber_jax.models.vit:ENCODER",
  "resnet": "limber_jax.models.resnet:ENCODER",
  "beit": "limber_jax.models.beit:ENCODER",
  "nf_resnet": "limber_jax.models.nfnet:ENCODER",
}

# Language models, by the kind of their size; a name of one, such as gptj_6b, is in its `named`.
LANGUAGE_MODELS = {
  "gptj": "limber_jax.models.gptj:DECODER",
}

SOURCES = {
  "awa2": "limber_jax.data.sources.awa2:Awa2Config",
  "captions": "limber_jax.data.sources.captions:CaptionsConfig",
  "clip_benchmark": "limber_jax.data.sources.clip_benchmark:ClipBenchmarkConfig",
  "coco": "limber_jax.data.sources.coco:CocoConfig",
  "digits": "limber_jax.data.sources.digits:DigitsConfig",
  "folder": "limber_jax.data.sources.folder:FolderConfig",
  "frames": "limber_jax.data.sources.frames:FramesConfig",
  "huggingface": "limber_jax.data.sources.huggingface:HuggingfaceConfig",
  "jsonl": "limber_jax.data.sources.jsonl:JsonlConfig",
  "mixture": "limber_jax.data.sources.mixture:MixtureConfig",
  "packed": "limber_jax.data.sources.packed:PackedConfig",
  "parquet": "limber_jax.data.sources.parquet:ParquetConfig",
  "tfds": "limber_jax.data.sources.tfds:TfdsConfig",
  "vqa": "limber_jax.data.sources.vqa:VqaConfig",
  "webdataset": "limber_jax.data.sources.webdataset:WebdatasetConfig",
}

TOKENIZERS = {
  "bytes": "limber_jax.data.tokenizers:ByteTokenizer",
  "clip": "limber_jax.data.tokenizers:ClipTokenizer",
  "bpe": "limber_jax.data.tokenizers:BpeTokenizer",
  "gpt2": "limber_jax.data.tokenizers:Gpt2Tokenizer",
}

EVALS = {
  "captions": "limber_jax.evals.captions:Captions",
  "class_mention": "limber_jax.evals.class_mention:ClassMention",
  "contamination": "limber_jax.evals.contamination:Contamination",
  "hallucination": "limber_jax.evals.hallucination:Hallucination",
  "linear_probe": "limber_jax.evals.linear_probe:LinearProbe",
  "prompt_probing": "limber_jax.evals.prompt_probing:PromptProbing",
  "retrieval": "limber_jax.evals.retrieval:Retrieval",
  "robustness": "limber_jax.evals.robustness:Robustness",
  "similarity": "limber_jax.evals.similarity:Similarity",
  "vqa": "limber_jax.evals.vqa:Vqa",
  "word_recall": "limber_jax.evals.word_recall:WordRecall",
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
