"""A whole LiMBeR on scikit-learn's digits, from nothing: no download, a few minutes on two cores.

It trains the quickstart's CLIP and a small GPT-J on captions alone (or takes them where they are), freezes both, trains
the linear map between them, and captions held-out digits; beside it a map from a random encoder, and no image at all.
"""

import dataclasses

from limber_jax.config import Checkpoint, Compute, Config, Data, Decoding, Init, Optim, Source, Tokenizer
from limber_jax.evals.captions import Captions
from limber_jax.evals.class_mention import ClassMention
from limber_jax.evals.prompt_probing import PromptProbing
from limber_jax.evals.word_recall import WordRecall
from limber_jax.models import encoders, gptj
from limber_jax.models.limber import LimberConfig, Projector, ProjectorConfig

CLIP, LM = "runs/quickstart", "runs/quickstart_lm"
# The embedding that CLIP was trained to give says more of so small a model's images than its patches do.
ENCODER = dataclasses.replace(encoders.encoder_size("clip_vit_digits"), features="pooled")
HELD_OUT = Source(name="digits", split="test")
PROMPT = ProjectorConfig(per_feature=8, dropout=0.0)


def get_config() -> Config:
  return Config(
    name="quickstart_limber",
    task="captioning",
    trainable=("prompt", "prompt@random"),
    model=LimberConfig(
      image=ENCODER,
      prompt=PROMPT,
      lm=gptj.SIZES["gptj_digits"](),
      extra_projectors={"random": Projector(image=ENCODER, prompt=PROMPT)},
    ),
    prerequisites={CLIP: "experiments/quickstart.py", LM: "experiments/quickstart_lm.py"},
    init=Init(image=CLIP, lm=LM),
    batch_size=64,
    steps=300,
    data=Data(source=Source(name="digits", split="train"), tokenizer=Tokenizer(name="bytes"), crop="encoder",
              length=30),
    optim=Optim(lr=1e-2, schedule="linear", warmup_steps=20, weight_decay=0.0, b2=0.95, eps=1e-8, clip_norm=1.0),
    compute=Compute(dtype="float32"),  # CPUs have no fast bfloat16
    decoding=Decoding(prompt="", max_new_tokens=30),
    checkpoint=Checkpoint(every=100, keep=1),
    evals={
      "digits": ClassMention(source=HELD_OUT, every=0, batch_size=60),
      # By limber_jax.evaluate only:
      "captions": Captions(source=HELD_OUT, every=-1, batch_size=60),
      "word_recall": WordRecall(source=HELD_OUT, every=-1, batch_size=60),
      "prompt_probing": PromptProbing(source=HELD_OUT, every=-1, batch_size=60),
    },
    log_every=20,
  )
