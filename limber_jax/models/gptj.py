"""GPT-J, the language model of LiMBeR and MAGMA, with an explicit cache.

Source: EleutherAI's gpt-j-6B and mesh-transformer-jax. Rotary positions: RoFormer, arXiv 2104.09864.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from limber_jax import ranges
from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.models.adapters import AdapterConfig, adapted
from limber_jax.models.cache import Cache, constrain_cache
from limber_jax.models.layers import BLOCK_SHARDING, REMAT, LayerNorm, Rows, under
from limber_jax.models.linear import Dense, broadcast, matmul
from limber_jax.models.spec import DecoderSpec
from limber_jax.ranges import COUNT, ranged
from limber_jax.runtime.parallel import BATCH, constrain


@dataclass(unsafe_hash=True)  # an attribute of linen modules, which are hashed; not to be changed once built
class GPTJSize:
  """Sizes of a GPT-J; the defaults are those of the published 6B."""

  kind: str = ranged("gptj", choices=("gptj",))
  vocab: int = ranged(50_400, at_least=2, at_most=COUNT)  # 50,257 of GPT-2 and rows that no text uses
  context: int = ranged(2048, at_least=1, at_most=10**7)  # tokens
  width: int = ranged(4096, at_least=1, at_most=10**6)
  layers: int = ranged(28, at_least=1, at_most=10_000)
  heads: int = ranged(16, at_least=1, at_most=10**6)      # divide the width
  rotary: int = ranged(64, at_least=2, at_most=10**6)     # even; dimensions of each head that positions turn

  def encoders(self) -> dict[str, Any]:
    """Returns no image encoders."""
    return {}


SIZES: dict[str, Callable[[], GPTJSize]] = {
  "gptj_6b": GPTJSize,
  "gptj_mu": lambda: GPTJSize(vocab=512, context=64, width=64, layers=2, heads=2, rotary=16),
  # For the digits' captions in bytes: 259 of them, and what makes the vocabulary divide.
  "gptj_digits": lambda: GPTJSize(vocab=264, context=128, width=128, layers=4, heads=4, rotary=16),
  "gptj_10m": lambda: GPTJSize(vocab=1024, context=512, width=384, layers=5, heads=6, rotary=32),
  "gptj_100m": lambda: GPTJSize(vocab=8192, context=1024, width=768, layers=12, heads=12, rotary=32),
}


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Returns x [B, A, T, K] with its first dimensions turned, in neighbouring pairs; cos and sin [B, 1, T, R/2]."""
  R = 2 * cos.shape[-1]
  pairs = x[..., :R].astype(jnp.float32).reshape(*x.shape[:-1], R // 2, 2)
  a, b = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(*x.shape[:-1], R)
  return jnp.concatenate([turned.astype(x.dtype), x[..., R:]], axis=-1)


class Attention(nn.Module):
  """Attention of new tokens to the past and to each other. x [B, T, D] -> (y [B, T, D], k, v [B, A, T, K])."""

  size: GPTJSize
  compute: Compute

  @nn.compact
  def __call__(self, x, cos, sin, mask, past_mask, past):
    B, T, D = x.shape
    A = self.size.heads
    normal = nn.initializers.normal(0.02)

    def project(name):
      y = Dense(D, use_bias=False, dtype=self.compute.dtype, kernel_init=normal, name=name)(x)
      return y.reshape(B, T, A, D // A).swapaxes(1, 2)  # [B, A, T, K]

    q, k, v = project("q"), project("k"), project("v")
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)

    def scores(keys, seen):  # [B, A, T, M] in float32
      s = jnp.einsum("batk,bamk->batm", q, keys, preferred_element_type=jnp.float32) * (D // A) ** -0.5
      return jnp.where(seen, s, jnp.finfo(jnp.float32).min)  # not -inf: the rows of padding see nothing

    # The past is only read here, and what is new is written once for all layers: scanning over a cache that each layer
    # changes would copy all of it at every token.
    if past is None:
      weights = jax.nn.softmax(scores(k, mask)).astype(v.dtype)
      y = jnp.einsum("batm,bamk->batk", weights, v)
    else:
      weights = jnp.concatenate([scores(past[0], past_mask), scores(k, mask)], axis=-1)
      weights = jax.nn.softmax(weights).astype(v.dtype)
      M = past[0].shape[2]
      y = (jnp.einsum("batm,bamk->batk", weights[..., :M], past[1])
           + jnp.einsum("batm,bamk->batk", weights[..., M:], v))
    y = y.swapaxes(1, 2).reshape(B, T, D)
    return Dense(D, use_bias=False, dtype=self.compute.dtype, kernel_init=normal, name="out")(y), k, v


class Block(nn.Module):
  """One LayerNorm, then attention and MLP side by side. x [B, T, D] -> (x [B, T, D], its (k, v) if keep)."""

  size: GPTJSize
  compute: Compute
  adapters: AdapterConfig | None
  keep: bool

  @nn.compact
  def __call__(self, x, cos, sin, mask, past_mask, past):
    D = x.shape[-1]
    dense = {"dtype": self.compute.dtype, "kernel_init": nn.initializers.normal(0.02)}
    x = constrain(x, BATCH, None, None)
    h = LayerNorm(name="ln_1")(x)
    y, k, v = Attention(self.size, self.compute, name="attn")(h, cos, sin, mask, past_mask, past)
    y = adapted(self.adapters, "attention", self.compute)(h, y)
    z = nn.gelu(Dense(4 * D, name="fc", **dense)(h), approximate=True)
    z = adapted(self.adapters, "mlp", self.compute)(h, Dense(D, name="proj", **dense)(z))
    return x + y + z, (k, v) if self.keep else None


class Head(nn.Module):
  """Logits in float32. hidden [..., D] -> [..., V]."""

  vocab: int

  @nn.compact
  def __call__(self, hidden: jax.Array) -> jax.Array:
    kernel = self.param("kernel", nn.initializers.normal(0.02), (hidden.shape[-1], self.vocab))
    bias = self.param("bias", nn.initializers.zeros, (self.vocab,))
    y = matmul(hidden, kernel, "float32")
    return y + broadcast(bias, y)


class GPTJ(nn.Module):
  """GPT-J over embeddings: `embed` makes them from tokens, and prompts of any other origin take their place.

  Raises UserError when it is first used with sizes that do not fit together.
  """

  size: GPTJSize
  compute: Compute
  adapters: AdapterConfig | None = None

  def setup(self):
    size = self.size
    check(size, self.adapters)
    ranges.check(self.compute, "config.compute.")
    self.embedding = self.param("embedding", nn.initializers.normal(0.02), (size.vocab, size.width))
    self.ln_f = LayerNorm()
    self.head = Head(size.vocab)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Returns the embeddings [B, T, D] of tokens int32 [B, T]."""
    return self.embedding[tokens].astype(self.compute.dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns float32 [..., V], the logits of the token after each of the hidden states [..., D]."""
    return self.head(hidden)

  @nn.compact
  def __call__(self, x: jax.Array, positions: jax.Array, mask: jax.Array,
               cache: Cache | None = None) -> tuple[jax.Array, Cache | None]:
    """Returns hidden states, and the cache with the new tokens in it.

    A token sees the real tokens in slots up to its own. Padding may stand anywhere; its hidden states mean nothing.

    Args:
      x: [B, T, D] embeddings.
      positions: int32 [B, T], counted from 0 at the first real token of a row.
      mask: bool [B, T], True where real.
      cache: what came before; None keeps nothing. T slots must be free: where they are not, the last ones are
        overwritten, for jitted code cannot raise.

    Returns:
      (hidden [B, T, D] after the last LayerNorm, Cache | None).

    Raises:
      ValueError: shapes that do not fit each other or the model.
    """
    size = self.size
    B, T = x.shape[:2]
    if x.ndim != 3 or x.shape[2] != size.width or size.context < T:
      raise ValueError(f"x: expected [B, T, {size.width}] with T <= {size.context}, got {x.shape}")
    if positions.shape != (B, T) or mask.shape != (B, T) or mask.dtype != bool:
      raise ValueError(f"positions, mask: expected int32 and bool {(B, T)}, got {positions.dtype}{positions.shape} and "
                       f"{mask.dtype}{mask.shape}")
    x = x.astype(self.compute.dtype)
    frequency = 10_000.0 ** (-jnp.arange(0, size.rotary, 2, dtype=jnp.float32) / size.rotary)
    angle = positions.astype(jnp.float32)[:, None, :, None] * frequency.reshape(1, 1, 1, -1)  # [B, 1, T, R/2]
    seen = jnp.tril(jnp.ones((T, T), bool))[None, None] & mask[:, None, None, :]  # [B, 1, T, T]
    past = past_mask = None
    if cache is not None and not (isinstance(cache.next, int) and cache.next == 0):
      past, past_mask = (cache.k, cache.v), cache.mask[:, None, None, :]  # [B, 1, 1, M]

    blocks = _scan(size.layers, self.compute)(size, self.compute, self.adapters, cache is not None, name="blocks")
    x, new = blocks(x, jnp.cos(angle), jnp.sin(angle), seen, past_mask, past)
    if cache is not None:
      def write(old, new):
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, 0, cache.next, 0))
      cache = constrain_cache(Cache(
        write(cache.k, new[0]), write(cache.v, new[1]),
        jax.lax.dynamic_update_slice(cache.mask, mask, (0, cache.next)), jnp.int32(cache.next + T)))
    return self.ln_f(x), cache


def _scan(length: int, compute: Compute) -> Callable[..., nn.Module]:
  """Returns the block `length` times, as models.layers.scan does; of its arguments all but the past are shared."""
  block, policy = Block, REMAT[compute.remat]
  if policy is not None:
    block = nn.remat(block, prevent_cse=False, policy=policy)
  shared = (nn.broadcast,) * 4
  return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=length, in_axes=(*shared, 0),
                 unroll=min(compute.unroll, length))


def check(size: GPTJSize, adapters: AdapterConfig | None = None) -> None:
  """Raises UserError if the sizes cannot be, or do not fit together."""
  ranges.check(size, "model.")
  if adapters is not None:
    ranges.check(adapters, "adapters.")
  if size.width % size.heads:
    raise UserError(f"model: {size.heads} heads do not divide a width of {size.width}")
  if size.rotary % 2 or not 0 < size.rotary <= size.width // size.heads:
    raise UserError(f"model.rotary={size.rotary}: expected an even number up to the width of a head, "
                    f"{size.width // size.heads}")
  if adapters is not None and size.width % adapters.downsample:
    raise UserError(f"adapters.downsample={adapters.downsample} does not divide a width of {size.width}")


def init_params(model: GPTJ, rng: jax.Array) -> dict:
  """Returns random parameters {"embedding", "blocks", "ln_f", "head"}, N(0, 0.02) as the published model began."""

  def everything(model):
    x = model.embed(jnp.zeros((1, 1), jnp.int32))
    hidden, _ = model(x, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))
    return model.logits(hidden)

  return model.init(rng, method=everything)["params"]


SHARDING = (
  *BLOCK_SHARDING,
  (r"embedding$", jax.P(None, ("fsdp", "tensor"))),  # by width: vocabularies need not divide
  (r"ln_f/(scale|bias)$", jax.P()),
  (r"head/kernel$", jax.P("fsdp", "tensor")),
  (r"head/bias$", jax.P("tensor")),
)
HF_WEIGHTS: Rows = (
  ("embedding", "transformer.wte.weight", ""),
  *under("blocks/", "transformer.h.{}.", (
    ("ln_1/scale", "ln_1.weight", ""),
    ("ln_1/bias", "ln_1.bias", ""),
    ("attn/q/kernel", "attn.q_proj.weight", "OI>IO"),
    ("attn/k/kernel", "attn.k_proj.weight", "OI>IO"),
    ("attn/v/kernel", "attn.v_proj.weight", "OI>IO"),
    ("attn/out/kernel", "attn.out_proj.weight", "OI>IO"),
    ("fc/kernel", "mlp.fc_in.weight", "OI>IO"),
    ("fc/bias", "mlp.fc_in.bias", ""),
    ("proj/kernel", "mlp.fc_out.weight", "OI>IO"),
    ("proj/bias", "mlp.fc_out.bias", ""),
  )),
  ("ln_f/scale", "transformer.ln_f.weight", ""),
  ("ln_f/bias", "transformer.ln_f.bias", ""),
  ("head/kernel", "lm_head.weight", "OI>IO"),
  ("head/bias", "lm_head.bias", ""),
)
# Causal masks that older files carry, as patterns of their whole names.
HF_IGNORED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)
# The Flax model that transformers had until version 5, and in which the 6B is still published: flax_model.msgpack.
FLAX_WEIGHTS: Rows = (
  ("embedding", "transformer/wte/embedding", ""),
  *under("blocks/", "transformer/h/{}/", (
    ("ln_1/scale", "ln_1/scale", ""),
    ("ln_1/bias", "ln_1/bias", ""),
    ("attn/q/kernel", "attn/q_proj/kernel", ""),
    ("attn/k/kernel", "attn/k_proj/kernel", ""),
    ("attn/v/kernel", "attn/v_proj/kernel", ""),
    ("attn/out/kernel", "attn/out_proj/kernel", ""),
    ("fc/kernel", "mlp/fc_in/kernel", ""),
    ("fc/bias", "mlp/fc_in/bias", ""),
    ("proj/kernel", "mlp/fc_out/kernel", ""),
    ("proj/bias", "mlp/fc_out/bias", ""),
  )),
  ("ln_f/scale", "transformer/ln_f/scale", ""),
  ("ln_f/bias", "transformer/ln_f/bias", ""),
  ("head/kernel", "lm_head/kernel", ""),
  ("head/bias", "lm_head/bias", ""),
)

DECODER = DecoderSpec(
  size=GPTJSize, module=lambda size, compute, adapters=None: GPTJ(size, compute, adapters), check=check,
  init=init_params, mu=lambda size: SIZES["gptj_mu"](), sharding=SHARDING, adapter_sharding=BLOCK_SHARDING, named=SIZES)
