"""LiMBeR from CLIP RN50x16, its grid before attention pooling: 144 prompt tokens. arXiv 2209.15162, table 1."""

from limber_jax import recipes
from limber_jax.config import Config


def get_config() -> Config:
  return recipes.limber("limber_clip", "clip_rn50x16", "data/weights/clip-rn50x16")
