"""LiT: a text tower trained against a locked CLIP ViT-B/16 image tower. Source: arXiv 2111.07991.

The image tower is read from `init.image` (Hugging Face, open_clip or OpenAI weights, or a limber_jax directory), has no
gradient and no optimizer state, and is in no checkpoint.
"""

from limber_jax.config import Checkpoint, Compute, Config, Data, Init, Optim, Source, Tokenizer
from limber_jax.evals import suites
from limber_jax.models import clip


def get_config() -> Config:
  return Config(
    name="lit_vitb",
    model=clip.SIZES["clip_vit_b16"](),
    trainable=("text", "logit_scale"),
    init=Init(image="data/weights/clip-vit-base-patch16"),
    batch_size=16_384,
    steps=55_000,
    data=Data(
      source=Source(name="captions", path="data/pairs/train.tsv"),
      tokenizer=Tokenizer(name="clip"),
      crop="resized",  # open_clip's: RandomResizedCrop of 90 to 100 % of the area
      workers=16,
    ),
    optim=Optim(lr=1e-3, warmup_steps=10_000, weight_decay=1e-4, b1=0.9, b2=0.999, eps=1e-8, clip_norm=1.0),
    compute=Compute(dtype="bfloat16"),
    checkpoint=Checkpoint(every=1000, keep=2, best="imagenet/top1"),
    evals=suites.clip(every=5000),
  )
