"""CLIP's text transformer. Source: CLIP (arXiv 2103.00020), section 2.4, and OpenAI's release."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax.config import Compute
from limber_jax.errors import UserError
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
  under,
)
from limber_jax.models.linear import Dense, broadcast
from limber_jax.ranges import COUNT, ranged


@dataclass
class TextSize:
  """Sizes of the text transformer."""

  context: int = ranged(77, at_least=2, at_most=10**6)   # tokens, start and end included
  vocab: int = ranged(49_408, at_least=2, at_most=COUNT)
  width: int = ranged(512, at_least=1, at_most=10**6)
  layers: int = ranged(12, at_least=1, at_most=10_000)
  heads: int = ranged(8, at_least=1, at_most=10**6)  # divide the width
  # The id that ends a text, which is pooled where it comes first; -1: the highest id that the text holds, as OpenAI
  # had it. A vocabulary with ids above that of the end needs the former.
  eos: int = ranged(-1, at_least=-1, at_most=COUNT, later=True)


def check_end(size: TextSize, eot: int, where: str) -> None:
  """Raises UserError if a tokenizer, named by `where`, ends texts with another id than the tower pools at."""
  if size.eos not in (-1, eot):
    raise UserError(f"{where} ends a text with id {eot}, but the text tower is pooled at id {size.eos}; take the "
                    "tokenizer that the model was trained with")


class TextTransformer(nn.Module):
  """Causal transformer pooled at the end-of-text token. tokens int32 [B, T] -> tokens [B, T, D], pooled [B, E].

  There is no padding mask: padding follows the end-of-text token, which causal attention never lets look ahead. Where
  the size names no end-of-text id it is the highest of the vocabulary, so the first maximum of the ids is where the
  text ends. A text without the id that is named is pooled at its first token, as transformers and open_clip do.
  """

  size: TextSize
  embed_dim: int
  activation: str
  compute: Compute

  @nn.compact
  def __call__(self, tokens: jax.Array, train: bool = False) -> Features:
    del train  # no dropout
    size, D = self.size, self.size.width
    if tokens.ndim != 2 or tokens.shape[1] > size.context:
      raise ValueError(f"tokens: expected [B, T] with T <= {size.context}, got {tokens.shape}")
    init = BlockInit(
      qkv=nn.initializers.normal(D**-0.5),
      out=nn.initializers.normal((D * 2 * size.layers) ** -0.5),
      fc=nn.initializers.normal((2 * D) ** -0.5),
      proj=nn.initializers.normal((D * 2 * size.layers) ** -0.5),
    )
    embedding = self.param("embedding", nn.initializers.normal(0.02), (size.vocab, D))
    position = self.param("position", nn.initializers.normal(0.01), (size.context, D))
    x = embedding[tokens].astype(self.compute.dtype)  # [B, T, D]
    x = x + broadcast(position[: tokens.shape[1]], x)
    x, _ = scan(Block, size.layers, self.compute)(size.heads, True, self.activation, init, self.compute,
                                                  name="blocks")(x)
    x = LayerNorm(name="ln_final")(x)
    end = (tokens if size.eos < 0 else tokens == size.eos).argmax(-1)  # [B]
    pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]  # [B, D]
    pooled = Dense(self.embed_dim, use_bias=False, dtype=self.compute.dtype,
                      kernel_init=nn.initializers.normal(D**-0.5), name="head")(pooled)
    return Features(x, pooled)


SHARDING = (
  *BLOCK_SHARDING,
  (r"embedding$", jax.P(None, ("fsdp", "tensor"))),  # by width: vocabularies need not divide
  (r"(position|ln_final/(scale|bias))$", jax.P()),
  (r"head/kernel$", jax.P("fsdp", "tensor")),
)

OPENAI_WEIGHTS: Rows = (
  ("embedding", "token_embedding.weight", ""),
  ("position", "positional_embedding", ""),
  *under("blocks/", "transformer.resblocks.{}.", OPENAI_BLOCK),
  ("ln_final/scale", "ln_final.weight", ""),
  ("ln_final/bias", "ln_final.bias", ""),
  ("head/kernel", "text_projection", ""),
)

HF_WEIGHTS: Rows = (
  ("embedding", "text_model.embeddings.token_embedding.weight", ""),
  ("position", "text_model.embeddings.position_embedding.weight", ""),
  *under("blocks/", "text_model.encoder.layers.{}.", HF_BLOCK),
  ("ln_final/scale", "text_model.final_layer_norm.weight", ""),
  ("ln_final/bias", "text_model.final_layer_norm.bias", ""),
  ("head/kernel", "text_projection.weight", "OI>IO"),
)
