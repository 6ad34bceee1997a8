"""The recipe that all rows of LiMBeR's tables share. Source: arXiv 2209.15162, appendix A, and the authors' code."""

import dataclasses
from typing import Any

from limber_jax.config import Checkpoint, Compute, Config, Data, Decoding, Init, Loss, Mesh, Optim, Source, Tokenizer
from limber_jax.evals import suites
from limber_jax.models import gptj
from limber_jax.models.encoders import encoder_size
from limber_jax.models.limber import LimberConfig

GPTJ = "data/weights/gpt-j-6b"
OPTIM = Optim(lr=8e-4, schedule="linear", warmup_steps=100, weight_decay=0.0, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0)


def limber(name: str, encoder: str, image: str = "", *, model: dict[str, Any] | None = None, **changes: Any) -> Config:
  """Returns the experiment that maps from `encoder` into GPT-J 6B, trained on Conceptual Captions 3M.

  Args:
    name: of the experiment.
    encoder: a name in models.encoders.known.
    image: where its weights are; "" leaves it at random.
    model: fields of LimberConfig besides image and lm.
    changes: fields of Config.
  """
  defaults = {
    "name": name,
    "task": "captioning",
    "trainable": ("prompt",),
    "model": LimberConfig(image=encoder_size(encoder), lm=gptj.SIZES["gptj_6b"](), **model or {}),
    "init": Init(image=image, lm=GPTJ),
    # What ran: 256 a step over all GPUs, times 8 by accumulation, though the configuration says 256.
    "batch_size": 2048,
    "loss": Loss(num_microbatches=8),
    "steps": 15_000,
    "data": Data(
      source=Source(name="captions", path="data/cc3m/train.tsv"),
      tokenizer=Tokenizer(name="gpt2", path=GPTJ),
      crop="encoder",
      length=64,
      workers=16,
    ),
    "optim": dataclasses.replace(OPTIM),
    "mesh": Mesh(data=1, fsdp=-1),  # 12 GB of frozen weights, spread: cheaper than tensor parallelism here
    "compute": Compute(dtype="bfloat16", remat="full"),
    "checkpoint": Checkpoint(every=1000, keep=2),
    "decoding": Decoding(prompt="A picture of", max_new_tokens=20),
    "evals": suites.limber(),
  }
  return Config(**(defaults | changes))
