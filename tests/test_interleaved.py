"""Images and texts in turn: what stands where, and that what all rows begin with may be read once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from limber_jax.config import Decoding
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.decoding import interleaved
from limber_jax.decoding.generate import row_keys
from limber_jax.decoding.interleaved import Layout
from limber_jax.models.limber import Limber
from tests import runs

EOT = ByteTokenizer.eot


def ids(text):
  return [byte + 1 for byte in text.encode()]


def layout(*segments, length=2):
  return Layout.of(segments, ByteTokenizer(), length)


def test_a_layout_says_what_stands_where():
  assert layout(0, "a", "b", 1, "") == Layout([EOT, EOT, *ids("ab"), EOT, EOT], [0, 1, -1, -1, 2, 3])
  assert layout("a", 1, 0) == Layout([*ids("a"), EOT, EOT, EOT, EOT], [-1, 2, 3, 0, 1])
  # Without images the texts beside them are one, and come after the end of another.
  assert layout(0, "a\n", 1, "b", length=0) == Layout([EOT, *ids("a b")], [-1] * 4)
  assert layout(0, length=0) == Layout([EOT], [-1])


def test_questions_and_examples_are_put_in_the_words_of_the_paper():
  assert interleaved.question_text(" what is it? ") == "Q: what is it? A:"
  assert interleaved.example_text("what is it?", " a dog\n") == "Q: what is it? A: a dog\n"


@pytest.mark.parametrize(("layouts", "shared", "expected"), [
  ([layout(0, "ab", 1, "c"), layout(0, "ab", 1, "d")], 2, 4),   # up to the rows' own image
  ([layout(0, "ab", 1, "c"), layout(0, "ab", 1, "d")], 4, 6),   # which here is shared, too
  ([layout(0, "ab", 1, "c"), layout(0, "ax", 1, "c")], 2, 3),
  ([layout(0, "ab"), layout(1, "ab")], 4, 0),
  ([layout(0, "ab")], 0, 0),                                    # a caption: its own image comes first
  ([layout(0, "ab", 1, "c")], 2, 4),
  ([layout("ab", length=0)], 0, 2),                             # one is always left over
  ([layout("abc", length=0), layout("ab", length=0)], 0, 2),
  ([layout(length=0)], 0, 0),
])
def test_what_layouts_begin_with(layouts, shared, expected):
  assert interleaved.common(layouts, shared) == expected


def test_layouts_are_padded_on_the_right():
  batch = interleaved.stack([layout(0, "a"), layout("b")], 3, 4, EOT)
  assert batch["tokens"].tolist() == [[EOT, EOT, *ids("a"), EOT], [*ids("b"), EOT, EOT, EOT], [EOT] * 4]
  assert batch["source"].tolist() == [[0, 1, -1, -1], [-1] * 4, [-1] * 4]
  assert batch["mask"].sum(1).tolist() == [3, 1, 0]


SETTINGS = (Decoding(max_new_tokens=6), Decoding("sample", temperature=0.8, max_new_tokens=6),
            Decoding("beam", beams=3, max_new_tokens=6))


@pytest.fixture(scope="module")
def model():
  """(a tiny LiMBeR, its parameters, large enough that what is far away counts, prompt tokens of two images)."""
  config = runs.tiny_limber()
  limber = Limber.from_config(config.model, config.compute)
  shapes = jax.eval_shape(limber.init, jax.random.key(0))[0]
  rng = np.random.default_rng(0)
  lm = jax.tree.map(lambda x: jnp.asarray(0.15 * rng.normal(size=x.shape), x.dtype), shapes["lm"])
  lm["blocks"]["attn"] = jax.tree.map(lambda x: 3 * x, lm["blocks"]["attn"])
  return limber, {"lm": lm}, jnp.asarray(rng.normal(size=(4, config.model.lm.width)), jnp.float32)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.method)
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_that_go_on_from_what_was_read_once_write_what_whole_ones_do(model, settings, padding):
  limber, params, shared = model
  rng = np.random.default_rng(1)
  own = jnp.asarray(rng.normal(size=(4, 2, shared.shape[1])), jnp.float32)
  begin = (0, "q: a? a: b", 1, "q: what? a: two")
  rows = [(2, "q: is it? a:"), (2, "q: no? a:"), ("the image", 2, "q: which colour has it? a:"), ("q: why?",)]
  wholes = [layout(*begin, *row) for row in rows]
  length = max(len(whole.ids) for whole in wholes)
  start = len(layout(*begin).ids)
  keys = {"key": row_keys(jax.random.key(0), jnp.arange(4))} if settings.method == "sample" else {}

  @jax.jit
  def write(batch, prefix):
    return interleaved.decode(limber, params, batch | keys, shared, own, eos=EOT, settings=settings, prefix=prefix)

  # Neighbouring texts are encoded as one, so the rows are cut out of the wholes.
  rests = [Layout(whole.ids[start:], whole.source[start:]) for whole in wholes]
  prefix = jax.jit(lambda batch: interleaved.prefill(limber, params, batch, shared))(
    interleaved.stack([layout(*begin)], 1, start + padding, EOT))
  got = write(interleaved.stack(rests, 4, length - start, EOT), prefix)
  want = write(interleaved.stack(wholes, 4, length, EOT), None)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_allclose(got.scores, want.scores, rtol=1e-4)
  alone = write(interleaved.stack(rests, 4, length - start, EOT), None)
  assert (np.abs(got.scores - alone.scores) > 5e-3).any()  # what comes before counts
