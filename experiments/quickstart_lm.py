"""A small GPT-J on the digits' captions alone: the language model of quickstart_limber, from nothing in a minute.

A text is two captions of one digit: so the model learns to stay with what a text speaks of, and can then be told by a
prompt. On single captions, nothing in a text says what comes, and a linear map onto it named 4 of 5 digits at best.
"""

from limber_jax.config import Checkpoint, Compute, Config, Data, Optim, Source, Tokenizer
from limber_jax.models import gptj


def get_config() -> Config:
  return Config(
    name="quickstart_lm",
    task="language_modelling",
    trainable=("lm",),
    model=gptj.SIZES["gptj_digits"](),
    batch_size=64,
    steps=300,
    data=Data(source=Source(name="digits", split="train", pairs=True), tokenizer=Tokenizer(name="bytes"),
              length=60),
    optim=Optim(lr=2e-3, warmup_steps=30, weight_decay=0.1, b2=0.95, eps=1e-8, clip_norm=1.0),
    compute=Compute(dtype="float32"),  # CPUs have no fast bfloat16
    checkpoint=Checkpoint(every=150, keep=1),
    log_every=25,
  )
