"""The pairwise sigmoid loss of SigLIP (arXiv 2303.15343) on CLIP's ViT-B/16 towers, from scratch.

The loss, its temperature and bias, and the optimizer are SigLIP's. The towers are CLIP's: a class token and causal
text, where SigLIP pools by attention and reads text both ways.
"""

from limber_jax.config import Checkpoint, Compute, Config, Data, Loss, Optim, Source, Tokenizer
from limber_jax.evals import suites
from limber_jax.models import clip


def get_config() -> Config:
  return Config(
    name="siglip_vitb",
    model=clip.SIZES["clip_vit_b16"](),
    trainable=("image", "text", "logit_scale", "logit_bias"),
    loss=Loss(kind="sigmoid", chunk_size=1024),
    batch_size=32_768,
    steps=122_070,  # 4 billion pairs
    data=Data(
      source=Source(name="captions", path="data/pairs/train.tsv"),
      tokenizer=Tokenizer(name="clip"),
      crop="resized",
      workers=16,
    ),
    optim=Optim(lr=1e-3, warmup_steps=10_000, weight_decay=1e-4, b1=0.9, b2=0.95, eps=1e-8, clip_norm=1.0),
    compute=Compute(dtype="bfloat16", remat="full"),
    checkpoint=Checkpoint(every=1000, keep=2, best="imagenet/top1"),
    evals=suites.clip(every=5000),
  )
