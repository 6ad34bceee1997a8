"""A small CLIP on scikit-learn's handwritten digits: real images, captions in words, no download, two minutes."""

from limber_jax.config import Checkpoint, Compute, Config, Data, Optim, Source, Tokenizer
from limber_jax.evals.contamination import Contamination
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.retrieval import Retrieval
from limber_jax.evals.similarity import Similarity
from limber_jax.evals.zeroshot import ZeroShot
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
      "zeroshot": ZeroShot(source=HELD_OUT, every=150),
      "retrieval": Retrieval(source=HELD_OUT, every=0),
      "similarity": Similarity(source=HELD_OUT, every=0),
      # By limber_jax.evaluate only:
      "probe": LinearProbe(source=HELD_OUT, train=TRAIN, every=-1, shots=(0, 1, 2, 4, 8, 16), seeds=(0, 1, 2)),
      "contamination": Contamination(source=HELD_OUT, train=TRAIN, every=-1, threshold=0.995),
    },
    log_every=10,
  )
