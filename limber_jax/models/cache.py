"""What a language model keeps of the tokens that it has read: an explicit cache of fixed shape."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from limber_jax.runtime.parallel import BATCH, constrain


class Cache(NamedTuple):
  """Keys and values of the tokens so far, in M slots; `next` is the same for all rows."""

  k: jax.Array           # [L, B, A, M, K], turned by their positions
  v: jax.Array           # [L, B, A, M, K]
  mask: jax.Array        # bool [B, M], True where a slot holds a real token
  next: jax.Array | int  # int32 [], the first slot that is free; a Python 0 says before tracing that all are


# Of a cache on a mesh: the specs of its arrays.
CACHE_SHARDING = Cache(k=jax.P(None, BATCH, "tensor"), v=jax.P(None, BATCH, "tensor"), mask=jax.P(BATCH), next=jax.P())


def empty_cache(size: Any, batch: int, length: int, dtype: str) -> Cache:
  """Returns a cache of `batch` rows and `length` slots, all free, for a language model of a size."""
  shape = (size.layers, batch, size.heads, length, size.width // size.heads)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), bool), 0)


def constrain_cache(cache: Cache) -> Cache:
  """Returns the cache spread over the current mesh by CACHE_SHARDING: rows over data × fsdp, heads over tensor."""
  return Cache(*(x if isinstance(x, int) else constrain(x, *spec)
                 for x, spec in zip(cache, CACHE_SHARDING, strict=True)))
