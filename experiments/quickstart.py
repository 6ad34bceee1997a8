"""A small CLIP on scikit-learn's handwritten digits: real images, captions in words, no download, two minutes."""

from limber_jax.config import Checkpoint, Compute, Config, Data, Evaluation, Optim, Source, Tokenizer
from limber_jax.models import clip

TRAIN, HELD_OUT = Source(name="digits", split="train"), Source(name="digits", split="test")


def get_config() -> Config:
  return Config(
    name="quickstart",
    model=clip.SIZES["clip_vit_digits"](),
    batch_size=128,
    steps=450,
    data=Data(source=Source(name="digits", split="train"), tokenizer=Tokenizer(name="bytes"), crop="resized",
              crop_scale=(0.7, 1.0)),
    optim=Optim(lr=2e-3, warmup_steps=40, weight_decay=0.1, clip_norm=1.0),
    compute=Compute(dtype="float32"),  # CPUs have no fast bfloat16
    checkpoint=Checkpoint(every=150, keep=2, best="zeroshot/top1"),
    evals={
      "zeroshot": Evaluation(name="zeroshot", source=HELD_OUT, every=150),
      "retrieval": Evaluation(name="retrieval", source=HELD_OUT, every=0),
      "similarity": Evaluation(name="similarity", source=HELD_OUT, every=0),
      # By limber_jax.evaluate only:
      "probe": Evaluation(name="linear_probe", source=HELD_OUT, train=TRAIN, every=-1, shots=(0, 1, 2, 4, 8, 16),
                          seeds=(0, 1, 2)),
      "overlap": Evaluation(name="overlap", source=HELD_OUT, train=TRAIN, every=-1, threshold=0.995),
    },
    log_every=10,
  )
