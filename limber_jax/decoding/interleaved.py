"""Images and texts in turn, as a language model reads them, and what many such sequences begin with, read once.

Each text between two images is encoded for itself. Where the prefix tokens of an image stand, `source` says which they
are; what all rows begin with, such as examples before questions, goes through the language model once (`read`), and
every row goes on from its cache (`write`).
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from limber_jax.config import Decoding
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.decoding import generate
from limber_jax.decoding.generate import Generated
from limber_jax.models.cache import Cache
from limber_jax.models.limber import Limber

# Ends an example. Tokenizers that clean texts of needless spaces (bytes, bpe, clip) leave it out before an image.
SEPARATOR = "\n"

Segments = tuple[int | str, ...]  # what the language model reads: texts, and images by their numbers


def question_text(question: str) -> str:
  """Returns what asks the question; the answer comes after a space, which the language model writes itself."""
  return f"Q: {question.strip()} A:"


def example_text(question: str, answer: str) -> str:
  """Returns what stands after the image of an example: the question as it is asked, its answer and SEPARATOR."""
  return f"{question_text(question)} {answer.strip()}{SEPARATOR}"


class Layout(NamedTuple):
  """What stands at each position."""

  ids: list[int]     # of tokens
  source: list[int]  # which of all the images' prefix tokens, one image after the other; -1 where it is text

  @classmethod
  def of(cls, segments: Segments, tokenizer: Tokenizer, prefix_length: int) -> "Layout":
    """Returns the layout of texts and images, `prefix_length` tokens each; neighbouring texts are encoded as one.

    With prefix_length = 0 the images are left out. A text must start somewhere then: where texts start in training, at
    the end of another.
    """
    ids, source = ([], []) if prefix_length else ([tokenizer.eot], [-1])
    wanted = [s for s in segments if prefix_length or isinstance(s, str)]
    for is_text, run in itertools.groupby(wanted, key=lambda s: isinstance(s, str)):
      if is_text:
        text = "".join(run)
        found = tokenizer.encode(text) if text else []
        ids, source = ids + found, source + [-1] * len(found)
      else:
        for image in run:
          ids = ids + [tokenizer.eot] * prefix_length
          source = source + list(range(image * prefix_length, (image + 1) * prefix_length))
    return cls(ids, source)


def common(layouts: Sequence[Layout], shared: int) -> int:
  """Returns with how many positions all layouts begin alike; at least one of each is left over.

  Args:
    layouts: at least one.
    shared: prefix tokens that are the same for all rows; those from this one on are a row's own.
  """
  shortest = min(len(layout.ids) for layout in layouts)
  first = layouts[0]
  for i in range(shortest - 1):
    here = first.ids[i], first.source[i]
    if here[1] >= shared or any((layout.ids[i], layout.source[i]) != here for layout in layouts):
      return i
  return max(shortest - 1, 0)


def stack(layouts: Sequence[Layout], rows: int, length: int, eot: int) -> dict[str, np.ndarray]:
  """Returns {"tokens", "source" int32, "mask" bool [rows, length]}: layouts, padded on the right, then empty rows."""
  batch = {"tokens": np.full((rows, length), eot, np.int32), "source": np.full((rows, length), -1, np.int32),
           "mask": np.zeros((rows, length), bool)}
  for i, (ids, source) in enumerate(layouts):
    batch["tokens"][i, : len(ids)], batch["source"][i, : len(ids)], batch["mask"][i, : len(ids)] = ids, source, True
  return batch


def embed(model: Limber, params: dict, batch: dict, shared: jax.Array, own: jax.Array | None = None) -> jax.Array:
  """Returns what the language model reads, [B, L, D].

  Args:
    model: whose language model reads.
    params: its parameters, by part.
    batch: "tokens" and "source", int32 [B, L].
    shared: [S, D], prefix tokens of images that all rows have; the first of `source`.
    own: [B, P, D], those of each row's own image; the next.
  """
  x = model.lm.apply(model.lm_params(params), batch["tokens"], method="embed")
  source, S = batch["source"][..., None], len(shared)
  if S:
    x = jnp.where((source >= 0) & (source < S), shared.astype(x.dtype)[jnp.clip(source[..., 0], 0, S - 1)], x)
  if own is not None:
    x = jnp.where(source >= S, jnp.take_along_axis(own.astype(x.dtype), jnp.maximum(source - S, 0), axis=1), x)
  return x


def prefill(model: Limber, params: dict, batch: dict, shared: jax.Array) -> Cache:
  """Returns the cache of what rows begin with, for `write`; the arguments are as of `embed`, and "mask" bool [B, L]."""
  x, mask = embed(model, params, batch, shared), batch["mask"]
  return generate.prefill(model.lm, model.lm_params(params)["params"], x, position_ids(mask), mask)


def decode(model: Limber, params: dict, batch: dict, shared: jax.Array, own: jax.Array | None, *, eos: int,
          settings: Decoding, prefix: Cache | None = None) -> Generated:
  """Returns what the language model writes after each row.

  Args:
    model, params, shared, own: as of `embed`.
    batch: "tokens", "source", int32 [B, L] and "mask" bool [B, L]; "key" [B] where `settings` sample.
    eos: the token that ends a text.
    settings: how to write.
    prefix: what stands before all rows, from `read`.
  """
  x = embed(model, params, batch, shared, own)
  return generate.generate(
    model.lm, model.lm_params(params)["params"], x, position_ids(batch["mask"], prefix), batch["mask"], eos=eos,
    settings=settings, max_new_tokens=settings.max_new_tokens, keys=batch.get("key"), prefix=prefix)


def position_ids(mask: jax.Array, prefix: Cache | None = None) -> jax.Array:
  """Returns positions int32 [B, L] that count from the first, or on from the real tokens of a prefix.

  They go on through the padding on the right, where the mask makes them harmless.
  """
  positions = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32)[None], mask.shape)
  return positions if prefix is None else positions + prefix.mask.sum(-1, dtype=jnp.int32)[:, None]
