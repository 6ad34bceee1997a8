"""LiMBeR from NF-ResNet50, the encoder tuned at its own rate: a substitute for Frozen. arXiv 2209.15162, table 1."""

import dataclasses

from limber_jax import recipes
from limber_jax.config import Config


def get_config() -> Config:
  return recipes.limber(
    "limber_nfrn50_tuned", "nf_resnet50", "data/weights/nf_resnet50_ra2-9f236009.pth",
    trainable=("image", "prompt"),
    optim=dataclasses.replace(recipes.OPTIM, part_lr={"image": 2e-6}),
  )
