"""BEiT's Vision Transformer. Source: BEiT (arXiv 2106.08254), and `BeitModel` of HF transformers.

Against CLIP's: positions enter as biases of the attention, one for each pair of places and head; keys have no bias;
each branch of a block is scaled by a learned vector (layer scale). One table of biases serves all blocks in the
pre-trained form (pt22k), one a block in the fine-tuned form (ft22k).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models.layers import ACTIVATIONS, BLOCK_SHARDING, Features, LayerNorm, Rows, scan, under
from limber_jax.models.linear import Conv, Dense, broadcast
from limber_jax.models.spec import EncoderConfig, EncoderSpec, patches_fit, same
from limber_jax.ranges import ranged
from limber_jax.runtime.parallel import BATCH, constrain


@dataclass
class BeitSize:
  """Sizes of a BEiT."""

  kind: str = ranged("beit", choices=("beit",))
  image_size: int = ranged(224, at_least=1, at_most=4096)  # pixels a side
  patch: int = ranged(16, at_least=1, at_most=4096)        # pixels a side; divides image_size
  width: int = ranged(1024, at_least=1, at_most=10**6)
  layers: int = ranged(24, at_least=1, at_most=10_000)
  heads: int = ranged(16, at_least=1, at_most=10**6)  # divide the width
  mlp_ratio: int = ranged(4, at_least=1, at_most=1000)
  shared_positions: bool = True  # one table of position biases for all blocks (pt22k), or one a block (ft22k)
  pooler: bool = False           # LayerNorm on the mean of the tokens; only fine-tuned weights have one
  # Share of samples for which the last block skips a branch, when `train`; it falls linearly to 0 at the first. HF's
  # checkpoints say 0.1, and LiMBeR's code, which put the frozen encoder in train mode, dropped them.
  drop_path: float = ranged(0.0, at_least=0, below=1)

  @property
  def num_tokens(self) -> int:
    """Patches in an image."""
    return (self.image_size // self.patch) ** 2


EPS = 1e-12
INIT = nn.initializers.normal(0.02)
LAYER_SCALE = 0.1


def relative_positions(side: int) -> np.ndarray:
  """Returns int [1 + side², 1 + side²]: the row of the table of biases for each (query, key); the class token is 0.

  Rows count (query - key) over a window of (2 side - 1)² places, y first; the last three are class to patch, patch to
  class, and class to class.
  """
  y, x = np.divmod(np.arange(side * side), side)
  span = 2 * side - 1
  index = np.full((side * side + 1, side * side + 1), span * span)
  index[1:, 1:] = (y[:, None] - y + side - 1) * span + (x[:, None] - x + side - 1)
  index[:, 0] = span * span + 1
  index[0, 0] = span * span + 2
  return index


def _table(module: nn.Module, side: int, heads: int) -> jax.Array:
  """Returns the biases [1, A, 1 + S, 1 + S] of `module`'s own table, which starts at zero."""
  table = module.param("positions", nn.initializers.zeros, ((2 * side - 1) ** 2 + 3, heads))
  return table[relative_positions(side)].transpose(2, 0, 1)[None]


class Attention(nn.Module):
  """Multi-head self-attention with a bias. x [B, T, D], bias [1, A, T, T] -> [B, T, D]."""

  heads: int
  compute: Compute

  @nn.compact
  def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
    B, T, D = x.shape

    def project(name, use_bias=True):
      return Dense(D, use_bias=use_bias, dtype=self.compute.dtype, kernel_init=INIT, name=name)(x).reshape(
        B, T, self.heads, D // self.heads)

    # Never cuDNN's kernel: it has no gradient of the bias at an odd number of tokens, and 1 + 14² is odd.
    y = jax.nn.dot_product_attention(project("q"), project("k", use_bias=False), project("v"), bias=bias,
                                     implementation="xla")  # [B, T, A, K]
    return Dense(D, dtype=self.compute.dtype, kernel_init=INIT, name="out")(y.reshape(B, T, D))


class Block(nn.Module):
  """Pre-norm transformer block. (x [B, T, D], bias [1, A, T, T]), keep [2, B] or None -> ((x, bias), None).

  `keep` scales the two branches of each sample: 0 skips. The bias is carried along unchanged, and is None where the
  block has its own table.
  """

  side: int
  heads: int
  mlp_ratio: int
  compute: Compute

  @nn.compact
  def __call__(self, carry: tuple[jax.Array, jax.Array | None], keep: jax.Array | None = None):
    x, bias = carry
    D = x.shape[-1]
    dense = {"dtype": self.compute.dtype, "kernel_init": INIT}
    x = constrain(x, BATCH, None, None)

    def add(i, y):
      scale = self.param(f"layer_scale_{i + 1}", nn.initializers.constant(LAYER_SCALE), (D,))
      y = y * broadcast(scale, y)
      return x + (y if keep is None else y * keep[i].astype(y.dtype)[:, None, None])

    own = _table(self, self.side, self.heads) if bias is None else bias
    x = add(0, Attention(self.heads, self.compute, name="attn")(LayerNorm(EPS, name="ln_1")(x), own))
    y = Dense(self.mlp_ratio * D, name="fc", **dense)(LayerNorm(EPS, name="ln_2")(x))
    x = add(1, Dense(D, name="proj", **dense)(ACTIVATIONS["gelu"](y)))
    return (x, bias), None


class Beit(nn.Module):
  """BEiT. images [B, H, W, 3], normalised -> tokens [B, S, F], pooled [B, F].

  The tokens are those of the patches after the last block: without the class token and without a final LayerNorm, as
  `BeitModel(...).last_hidden_state[:, 1:]` has them. Pooled is their mean, through a LayerNorm if `size.pooler`.
  With `size.drop_path`, training needs an rng "drop_path".
  """

  size: BeitSize
  compute: Compute

  @nn.compact
  def __call__(self, images: jax.Array, train: bool = False) -> Features:
    size, D = self.size, self.size.width
    x = Conv(D, size.patch, size.patch, dtype=self.compute.dtype, kernel_init=INIT, name="patch")(images)
    side = x.shape[1]
    B, x = x.shape[0], x.reshape(x.shape[0], -1, D)  # [B, S, D]
    cls = self.param("cls", nn.initializers.zeros, (1, 1, D))
    x = jnp.concatenate([broadcast(cls, x[:, :1]), x], axis=1)  # [B, 1 + S, D]
    bias = _table(self, side, size.heads) if size.shared_positions else None
    args = (_keep(self.make_rng("drop_path"), size.drop_path, size.layers, B),) if train and size.drop_path else ()
    blocks = scan(Block, size.layers, self.compute)(side, size.heads, size.mlp_ratio, self.compute, name="blocks")
    (x, _), _ = blocks((x, bias), *args)
    tokens = x[:, 1:]
    pooled = tokens.astype(jnp.float32).mean(1).astype(x.dtype)
    return Features(tokens, LayerNorm(EPS, name="pooler")(pooled) if size.pooler else pooled)


def _keep(rng: jax.Array, rate: float, layers: int, batch: int) -> jax.Array:
  """Returns [L, 2, B], float32: 0 where a sample skips a branch, else what keeps the mean: 1 / (share that stays)."""
  stay = 1 - jnp.linspace(0.0, rate, layers).reshape(layers, 1, 1)
  return jax.random.bernoulli(rng, stay, (layers, 2, batch)) / stay


SHARDING = (
  (r"positions$", jax.P()),
  (r"blocks/layer_scale_\d$", jax.P()),
  *BLOCK_SHARDING,
  (r"patch/kernel$", jax.P(None, None, None, "fsdp")),
  (r"patch/kernel$", jax.P()),
  (r"(cls|patch/bias|pooler/(scale|bias))$", jax.P()),
)

_BLOCK: Rows = (
  ("ln_1/scale", "layernorm_before.weight", ""),
  ("ln_1/bias", "layernorm_before.bias", ""),
  ("attn/q/kernel", "attention.attention.query.weight", "OI>IO"),
  ("attn/q/bias", "attention.attention.query.bias", ""),
  ("attn/k/kernel", "attention.attention.key.weight", "OI>IO"),
  ("attn/v/kernel", "attention.attention.value.weight", "OI>IO"),
  ("attn/v/bias", "attention.attention.value.bias", ""),
  ("attn/out/kernel", "attention.output.dense.weight", "OI>IO"),
  ("attn/out/bias", "attention.output.dense.bias", ""),
  ("positions", "attention.attention.relative_position_bias.relative_position_bias_table", ""),
  ("layer_scale_1", "lambda_1", ""),
  ("layer_scale_2", "lambda_2", ""),
  ("ln_2/scale", "layernorm_after.weight", ""),
  ("ln_2/bias", "layernorm_after.bias", ""),
  ("fc/kernel", "intermediate.dense.weight", "OI>IO"),
  ("fc/bias", "intermediate.dense.bias", ""),
  ("proj/kernel", "output.dense.weight", "OI>IO"),
  ("proj/bias", "output.dense.bias", ""),
)

# The names in files, for both forms: a size has only one of the two tables. In memory transformers 5 has other names.
HF_WEIGHTS: Rows = (
  ("cls", "embeddings.cls_token", ""),
  ("patch/kernel", "embeddings.patch_embeddings.projection.weight", "OIHW>HWIO"),
  ("patch/bias", "embeddings.patch_embeddings.projection.bias", ""),
  ("positions", "encoder.relative_position_bias.relative_position_bias_table", ""),
  *under("blocks/", "encoder.layer.{}.", _BLOCK),
  ("pooler/scale", "pooler.layernorm.weight", ""),
  ("pooler/bias", "pooler.layernorm.bias", ""),
)

# Of BeitForImageClassification and BeitForMaskedImageModeling, as both published checkpoints are.
HF_HEADED_WEIGHTS: Rows = under("", "beit.", HF_WEIGHTS)

# The heads, what only masked images need, the LayerNorm that belongs to the head of masked modeling, a pooler where the
# size has none (random in a pt22k that went through BeitModel), and the index that older files carry.
HF_IGNORED = (r"(classifier|lm_head|layernorm)\.(weight|bias)", r"(beit\.)?embeddings\.mask_token",
              r"(beit\.)?pooler\.layernorm\.(weight|bias)", r"(beit\.)?encoder\..*relative_position_index")

# BeitConfig's own defaults, of the settings that we have too.
_DEFAULTS = {"image_size": 224, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12,
             "num_attention_heads": 12, "intermediate_size": 3072, "use_shared_relative_position_bias": False,
             "use_relative_position_bias": False}
# use_mean_pooling: without it BeitModel ends in a LayerNorm.
_FIXED = {"hidden_act": ("gelu",), "layer_norm_eps": (1e-12,), "use_absolute_position_embeddings": (False,),
          "use_mean_pooling": (True,)}


def _check_config(values: dict[str, Any], tower: BeitSize) -> None:
  ours = {"image_size": tower.image_size, "patch_size": tower.patch, "hidden_size": tower.width,
          "num_hidden_layers": tower.layers, "num_attention_heads": tower.heads,
          "intermediate_size": tower.mlp_ratio * tower.width,
          "use_shared_relative_position_bias": tower.shared_positions,
          "use_relative_position_bias": not tower.shared_positions}
  for name, value in ours.items():
    if (theirs := values.get(name, _DEFAULTS[name])) not in (value, [value, value]):
      raise UserError(f"{name} is {theirs!r}, but this config's encoder has {value!r}")
  same(values, _FIXED)


def _visible_fields(tower: BeitSize) -> dict[str, tuple[Any, Any]]:
  return {"hidden_size": (tower.width, 768), "num_hidden_layers": (tower.layers, 12), "patch_size": (tower.patch, 16)}


def _named(**form: Any) -> Callable[[], EncoderConfig]:
  # resample: its preprocessor_config.json says 2, PIL's bilinear filter.
  return lambda: EncoderConfig(BeitSize(**form), (0.5,) * 3, (0.5,) * 3, "squash", "bilinear")


ENCODER = EncoderSpec(
  size=BeitSize, module=lambda size, compute: Beit(size.tower, compute), check=patches_fit,
  mu=lambda tower: replace(tower, image_size=32, patch=8, width=64, layers=2, heads=2),
  width=lambda tower: tower.width, weights={"hf": HF_WEIGHTS, "hf_headed": HF_HEADED_WEIGHTS}, ignored=HF_IGNORED,
  sharding=SHARDING, title="a BEiT", processor="Beit", describes=lambda values: values.get("model_type") == "beit",
  check_config=_check_config, shown=_visible_fields,
  named={"beit_l16": _named(), "beit_l16_ft": _named(shared_positions=False, pooler=True)})
