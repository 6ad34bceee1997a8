"""LiMBeR from BEiT-L/16 fine-tuned to name ImageNet-22k's classes: 196 prompt tokens. arXiv 2209.15162, table 1."""

from limber_jax import recipes
from limber_jax.config import Config


def get_config() -> Config:
  return recipes.limber("limber_beit_ft", "beit_l16_ft", "data/weights/beit-large-patch16-224-pt22k-ft22k")
