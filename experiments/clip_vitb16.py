"""CLIP ViT-B/16 from scratch: arXiv 2103.00020, Tables 18-20."""

from limber_jax.config import Checkpoint, Compute, Config, Data, Optim, Source, Tokenizer
from limber_jax.evals import suites
from limber_jax.models import clip


def get_config() -> Config:
  return Config(
    name="clip_vitb16",
    model=clip.SIZES["clip_vit_b16"](),
    batch_size=32_768,
    steps=390_625,  # 32 epochs of 400 M pairs
    data=Data(
      # A table of captions and image paths, as img2dataset and open_clip write it; see docs/data.md for the layout.
      source=Source(name="captions", path="data/pairs/train.tsv"),
      tokenizer=Tokenizer(name="clip"),
      crop="random",
      workers=16,
    ),
    optim=Optim(lr=5e-4, warmup_steps=2000, weight_decay=0.2, b1=0.9, b2=0.98, eps=1e-6),
    compute=Compute(dtype="bfloat16", remat="full"),
    checkpoint=Checkpoint(every=1000, keep=2, best="imagenet/top1"),
    evals=suites.clip(every=5000),
  )
