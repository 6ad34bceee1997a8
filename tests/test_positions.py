"""Position embeddings at other sizes: as open_clip resamples them, and only when asked."""

import dataclasses

import jax
import numpy as np
import pytest

from limber_jax.errors import UserError
from limber_jax.models.clip import ClipConfig
from limber_jax.models.spec import EncoderConfig
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.weights import export, formats, load, parts, positions


def resized(open_clip, state, grid, context):
  """Returns (image, text) positions as open_clip loads them into a model of another size."""
  import torch

  width = state["visual.positional_embedding"].shape[1]
  model = open_clip.model.CLIP(16, dict(image_size=8 * grid, patch_size=8, width=width, layers=1, head_width=width),
                               dict(context_length=context, vocab_size=50, width=32, heads=1, layers=1))
  state = {name: torch.tensor(x) for name, x in state.items()}
  open_clip.model.resize_pos_embed(state, model)
  open_clip.model.resize_text_pos_embed(state, model)
  return state["visual.positional_embedding"].numpy(), state["positional_embedding"].numpy()


@pytest.mark.parametrize("old,new", [((7, 77), (12, 64)), ((16, 8), (14, 77)), ((24, 77), (7, 12)), ((3, 5), (1, 1)),
                                     ((1, 3), (5, 4))])
def test_resampled_positions_equal_open_clips(open_clip, old, new):
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(1 + old[0] ** 2, 16)), rng.normal(size=(old[1], 32))
  state = {"visual.positional_embedding": image.astype(np.float32), "positional_embedding": text.astype(np.float32)}
  want = resized(open_clip, state, *new)
  got = (positions.grid(state["visual.positional_embedding"], 1 + new[0] ** 2),
         positions.line(state["positional_embedding"], new[1]))
  for ours, theirs in zip(got, want, strict=True):
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_a_run_of_another_image_size_and_context_asks_for_resampled_positions(tmp_path, open_clip):
  rng = np.random.default_rng(0)
  text = TextSize(context=12, vocab=50, width=32, layers=1, heads=1)
  small = ClipConfig(16, ViTSize(image_size=24, patch=8, width=32, layers=1, heads=1), text)
  large = dataclasses.replace(small, image=dataclasses.replace(small.image, image_size=40),
                              text=dataclasses.replace(text, context=9))
  params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), formats.shapes(small))
  path = str(tmp_path / "small")
  export.save(path, "open_clip", small, params, {})
  want = resized(open_clip, {"visual.positional_embedding": params["image"]["position"],
                             "positional_embedding": params["text"]["position"]}, 5, 9)
  like = formats.shapes(large)
  for part, theirs, other in (("image", want[0], "image size"), ("text", want[1], "context length")):
    with pytest.raises(UserError, match=rf"^{path}: .* positions, .* another {other}; --config.init.resample"):
      load.load_into(path, part, large, like[part])
    got, _ = load.load_into(path, part, large, like[part], resample=True)
    assert np.abs(got.pop("position") - theirs).max() <= 1e-6 * np.abs(theirs).max()
    rest = {name: leaf for name, leaf in params[part].items() if name != "position"}
    jax.tree.map(np.testing.assert_array_equal, got, rest)
  size = EncoderConfig(large.image, embed_dim=16)
  got, _ = parts.load_part(path, "image", size, like["image"], resample=True)
  assert np.abs(got["position"] - want[0]).max() <= 1e-6 * np.abs(want[0]).max()
  with pytest.raises(UserError, match=r"another image size; --config\.init\.resample_positions=True resamples"):
    parts.load_part(path, "image", size, like["image"])


def test_positions_that_are_no_square_are_refused():
  with pytest.raises(UserError, match="7 and 5 positions are not both a class token's and a square grid's"):
    positions.grid(np.zeros((7, 4), np.float32), 5)
