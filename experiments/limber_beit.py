"""LiMBeR from BEiT-L/16, which saw no words (pt22k): 196 prompt tokens an image. arXiv 2209.15162, table 1."""

from limber_jax import recipes
from limber_jax.config import Config


def get_config() -> Config:
  return recipes.limber("limber_beit", "beit_l16", "data/weights/beit-large-patch16-224-pt22k")
