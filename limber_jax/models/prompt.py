"""The linear map from image features to the embeddings of a language model. Source: LiMBeR (arXiv 2209.15162).

The reference is ImagePrefix of jmerullo/limber, and of MAGMA (arXiv 2112.05253), from which it came.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax.config import Compute
from limber_jax.models.layers import LayerNorm, Rows, torch_uniform
from limber_jax.models.linear import Dense


class LinearPrompt(nn.Module):
  """One affine map for all tokens of an image. features [B, S, F] -> image_prefix [B, S·k, D].

  Attributes:
    dim: D, the width of the language model.
    per_feature: k, prefix tokens that each feature becomes.
    dropout: share of the outputs that is dropped when `train`; needs an rng "dropout" then.
    layer_norm: a LayerNorm comes last, after dropout: MAGMA's. LiMBeR has none.
    compute: float32 parameters, outputs in its dtype.
  """

  dim: int
  per_feature: int = 1
  dropout: float = 0.1
  layer_norm: bool = False
  compute: Compute = Compute()

  @nn.compact
  def __call__(self, features: jax.Array, train: bool = False) -> jax.Array:
    if features.ndim != 3:
      raise ValueError(f"features: expected [B, S, F], got {features.shape}")
    B, S, F = features.shape
    # PyTorch's defaults: nobody initialised it otherwise.
    x = Dense(self.per_feature * self.dim, dtype=self.compute.dtype, kernel_init=torch_uniform(),
                 bias_init=torch_uniform(F), name="linear")(features)
    x = x.reshape(B, S * self.per_feature, self.dim)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return LayerNorm(name="ln")(x) if self.layer_norm else x


def prefix_inputs(image_prefix: jax.Array, embeds: jax.Array, text_mask: jax.Array
                  ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns what a language model reads: an image's prefix, then a text padded on the right.

  Args:
    image_prefix: [B, P, D].
    embeds: [B, T, D], embedded tokens of the text.
    text_mask: bool [B, T], True where the text is.

  Returns:
    (x [B, P + T, D] in the type of `embeds`, positions int32 [B, P + T], mask bool [B, P + T], True where real).
    Positions count from 0 and go on through the padding, where the mask makes them harmless.

  Raises:
    ValueError: shapes that do not fit together, or a mask that is not bool.
  """
  if image_prefix.ndim != 3 or embeds.ndim != 3 or image_prefix.shape[::2] != embeds.shape[::2]:
    raise ValueError(f"expected image_prefix [B, P, D] and embeds [B, T, D], got {image_prefix.shape} and "
                     f"{embeds.shape}")
  if text_mask.shape != embeds.shape[:2] or text_mask.dtype != jnp.bool_:
    raise ValueError(f"text_mask: expected bool {embeds.shape[:2]}, got {text_mask.dtype} {text_mask.shape}")
  B, P, _ = image_prefix.shape
  x = jnp.concatenate([image_prefix.astype(embeds.dtype), embeds], axis=1)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
  return x, positions, jnp.concatenate([jnp.ones((B, P), bool), text_mask], axis=1)


# As after attention and MLP in a block of the language model: D is split over `tensor`.
SHARDING = (
  (r"linear/kernel$", jax.P("fsdp", "tensor")),
  (r"linear/bias$", jax.P("tensor")),
  (r"linear/bias$", jax.P()),
  (r"ln/(scale|bias)$", jax.P()),
)

# proj.ckpt of jmerullo/limber: the state of its nn.Linear alone.
REFERENCE_WEIGHTS: Rows = (
  ("linear/kernel", "weight", "OI>IO"),
  ("linear/bias", "bias", ""),
)
