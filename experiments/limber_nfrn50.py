"""LiMBeR from NF-ResNet50 (ImageNet-1k): one prompt token an image. arXiv 2209.15162, table 1.

Pixels are normalised as timm trained it. The authors fed it others: encoder "nf_resnet50_reference" does as they did.
The released projection has one token an image; set `model={"prompt": ProjectorConfig(per_feature=2)}` for
the paper's two.
"""

from limber_jax import recipes
from limber_jax.config import Config


def get_config() -> Config:
  return recipes.limber("limber_nfrn50", "nf_resnet50", "data/weights/nf_resnet50_ra2-9f236009.pth")
