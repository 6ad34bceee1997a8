"""MAGMA as LiMBeR trained it: adapters in the language model, a tuned encoder, a LayerNorm on the prompt.

Source: arXiv 2209.15162, table 1, "MAGMA (ours)", and 2112.05253. The adapters stand after attention, as LiMBeR's
appendix is remembered to say; MAGMA's own first version has them after the MLP (`AdapterConfig(mlp="normal")`).
"""

import dataclasses

from limber_jax import recipes
from limber_jax.config import Config
from limber_jax.models.adapters import AdapterConfig
from limber_jax.models.limber import ProjectorConfig


def get_config() -> Config:
  return recipes.limber(
    "magma", "clip_rn50x16", "data/weights/clip-rn50x16",
    model={"prompt": ProjectorConfig(layer_norm=True), "adapters": AdapterConfig(attention="normal", downsample=4)},
    trainable=("image", "prompt", "adapters"),
    optim=dataclasses.replace(recipes.OPTIM, part_lr={"image": 2e-6}),
  )
