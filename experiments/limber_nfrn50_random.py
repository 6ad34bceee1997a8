"""LiMBeR from an NF-ResNet50 with random weights, drawn from `seed`: a control. arXiv 2209.15162, table 1."""

from limber_jax import recipes
from limber_jax.config import Config


def get_config() -> Config:
  return recipes.limber("limber_nfrn50_random", "nf_resnet50")
