"""CLIP's Vision Transformer. Source: CLIP (arXiv 2103.00020), section 2.4, and OpenAI's release."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax.config import Compute
from limber_jax.models.layers import (
  BLOCK_SHARDING,
  HF_BLOCK,
  OPENAI_BLOCK,
  Block,
  BlockInit,
  Features,
  LayerNorm,
  Rows,
  scan,
  torch_uniform,
  under,
)
from limber_jax.models.linear import Conv, Dense, broadcast
from limber_jax.models.spec import NOT_IMAGE, ClipTower, EncoderSpec, patches_fit
from limber_jax.ranges import ranged


@dataclass
class ViTSize:
  """Sizes of a Vision Transformer."""

  kind: str = ranged("vit", choices=("vit",))
  image_size: int = ranged(224, at_least=1, at_most=4096)  # pixels a side
  patch: int = ranged(32, at_least=1, at_most=4096)        # pixels a side; divides image_size
  width: int = ranged(768, at_least=1, at_most=10**6)
  layers: int = ranged(12, at_least=1, at_most=10_000)
  heads: int = ranged(12, at_least=1, at_most=10**6)  # divide the width

  @property
  def num_tokens(self) -> int:
    """Patches in an image."""
    return (self.image_size // self.patch) ** 2


def _xavier_qkv(key, shape, dtype=jnp.float32):
  # PyTorch draws q, k and v as one [3D, D] matrix, so its Xavier bound is √(6 / (D + 3D)).
  return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * (6 / (4 * shape[-1])) ** 0.5


# OpenAI defined no initialisation for the blocks of its ViT: PyTorch's defaults stand.
INIT = BlockInit(qkv=_xavier_qkv, out=torch_uniform(), fc=torch_uniform(), proj=torch_uniform())


class ViT(nn.Module):
  """Vision Transformer with a class token. images [B, H, W, 3], normalised -> tokens [B, S, F], pooled [B, E].

  The penultimate features [B, F] are the class token after its LayerNorm, before the projection.
  """

  size: ViTSize
  embed_dim: int
  activation: str
  compute: Compute

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Features:
    del train  # no dropout and no batch statistics
    size, D = self.size, self.size.width
    x = Conv(D, size.patch, size.patch, use_bias=False, dtype=self.compute.dtype, kernel_init=torch_uniform(),
             name="patch")(images)
    x = x.reshape(x.shape[0], -1, D)  # [B, S, D]
    normal = nn.initializers.normal(D**-0.5)
    cls = self.param("cls", normal, (D,))
    position = self.param("position", normal, (size.num_tokens + 1, D))
    x = jnp.concatenate([broadcast(cls, x[:, :1]), x], axis=1)  # [B, 1 + S, D]
    x = x + broadcast(position, x)
    x = LayerNorm(name="ln_pre")(x)
    x, _ = scan(Block, size.layers, self.compute)(size.heads, False, self.activation, INIT, self.compute,
                                                  name="blocks")(x)
    last = LayerNorm(name="ln_post")(x[:, 0])
    pooled = Dense(self.embed_dim, use_bias=False, dtype=self.compute.dtype, kernel_init=normal, name="head")(last)
    return Features(x[:, 1:], pooled, last)


SHARDING = (
  *BLOCK_SHARDING,
  (r"patch/kernel$", jax.P(None, None, None, "fsdp")),
  (r"patch/kernel$", jax.P()),
  (r"(cls|position|ln_pre/(scale|bias)|ln_post/(scale|bias))$", jax.P()),
  (r"head/kernel$", jax.P("fsdp", "tensor")),
)

OPENAI_WEIGHTS: Rows = (
  ("patch/kernel", "visual.conv1.weight", "OIHW>HWIO"),
  ("cls", "visual.class_embedding", ""),
  ("position", "visual.positional_embedding", ""),
  ("ln_pre/scale", "visual.ln_pre.weight", ""),
  ("ln_pre/bias", "visual.ln_pre.bias", ""),
  *under("blocks/", "visual.transformer.resblocks.{}.", OPENAI_BLOCK),
  ("ln_post/scale", "visual.ln_post.weight", ""),
  ("ln_post/bias", "visual.ln_post.bias", ""),
  ("head/kernel", "visual.proj", ""),
)

HF_WEIGHTS: Rows = (
  ("patch/kernel", "vision_model.embeddings.patch_embedding.weight", "OIHW>HWIO"),
  ("cls", "vision_model.embeddings.class_embedding", ""),
  ("position", "vision_model.embeddings.position_embedding.weight", ""),
  ("ln_pre/scale", "vision_model.pre_layrnorm.weight", ""),  # sic
  ("ln_pre/bias", "vision_model.pre_layrnorm.bias", ""),
  *under("blocks/", "vision_model.encoder.layers.{}.", HF_BLOCK),
  ("ln_post/scale", "vision_model.post_layernorm.weight", ""),
  ("ln_post/bias", "vision_model.post_layernorm.bias", ""),
  ("head/kernel", "visual_projection.weight", "OI>IO"),
)


def _mu(tower: ViTSize) -> ViTSize:
  grid = tower.image_size // tower.patch // 6 + 1
  return ViTSize(image_size=8 * grid, patch=8, width=64, layers=2, heads=2)


def _open_clip(tower: ViTSize) -> dict:
  return {"image_size": tower.image_size, "width": tower.width, "layers": tower.layers, "patch_size": tower.patch,
          "head_width": tower.width // tower.heads}


def _hf(tower: ViTSize) -> dict:
  return {"image_size": tower.image_size, "patch_size": tower.patch, "hidden_size": tower.width,
          "intermediate_size": 4 * tower.width, "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads}


ENCODER = EncoderSpec(
  size=ViTSize, module=lambda size, compute: ViT(size.tower, size.embed_dim, size.activation, compute),
  check=patches_fit, mu=_mu, width=lambda tower: tower.width, weights={"openai": OPENAI_WEIGHTS, "hf": HF_WEIGHTS},
  ignored=NOT_IMAGE, sharding=SHARDING, title="the image tower of a CLIP", clip=ClipTower(_open_clip, _hf))
