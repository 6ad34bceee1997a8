"""Pixels as other libraries make them, from the settings beside their weights, and those settings written out again."""

import dataclasses
import importlib
import json
import math

import numpy as np
import pytest
from PIL import Image

from limber_jax.data.transforms import RESAMPLES, encoder_rule
from limber_jax.errors import UserError
from limber_jax.models import spec
from limber_jax.models.clip import ClipConfig, normalise
from limber_jax.models.vit import ViTSize
from limber_jax.weights import configs, preprocessing
from limber_jax.weights.preprocessing import FILTERS, PROCESSORS, from_hf, from_open_clip, from_timm

SIDE = 32
# Wide, tall, small, one pixel wide, square, already of the size, with an odd number of pixels to cut.
SHAPES = [(180, 80), (61, 133), (97, 71), (9, 14), (1, 40), (40, 1), (64, 64), (32, 32), (33, 35), (39, 36), (31, 200)]
HF = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


def image(width, height):
  """Returns blocks of random colours: a shift by one pixel, or another filter, changes many of them by much."""
  blocks = np.random.default_rng(width * 1000 + height).integers(
    0, 256, (math.ceil(height / 3), math.ceil(width / 3), 3), dtype=np.uint8)
  return Image.fromarray(blocks.repeat(3, 0).repeat(3, 1)[:height, :width])


def sized(said):
  """Returns the size of a CLIP for SIDE pixels with this preprocessing."""
  return ClipConfig(image=ViTSize(image_size=SIDE, patch=8), **dataclasses.asdict(said))


def pixels(size, picture):
  """Returns what the tower makes of an image, float32 [SIDE, SIDE, 3]."""
  return np.asarray(normalise(encoder_rule(size, SIDE)({"image": picture}, None)["image"], size.mean, size.std))


def assert_pixels(size, theirs, shapes=SHAPES):
  """Asserts that all pixels equal `theirs(image)` [3, SIDE, SIDE] to a thousandth of a step of 255."""
  for shape in shapes:
    gap = np.abs(pixels(size, image(*shape)) - np.asarray(theirs(image(*shape))).transpose(1, 2, 0))
    assert (gap * size.std * 255).max() < 1e-3, shape


def processor(transformers, name, values):
  """Returns what a processor of transformers makes of an image, by its PIL backend."""
  kind = getattr(transformers, f"{name}ImageProcessorPil")
  return lambda picture: kind(**values)(picture, return_tensors="np")["pixel_values"][0]


@pytest.mark.parametrize("changes", [
  {}, {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}, {"resample": 2},
  {"size": {"shortest_edge": 40}}, {"size": 40, "crop_size": SIDE}, {"rescale_factor": 1}, {"do_normalize": False},
  {"do_rescale": False}, {"do_rescale": False, "do_normalize": False}, {"size": {"shortest_edge": 27}},
  {"do_resize": False}, {"size": [45, 45]}, {"resample": 1}, {"resample": 0}, {"resample": 5}, {"resample": 4},
  {"rescale_factor": 1 / 127.5, "image_mean": 1, "image_std": [1, 1.5, -2]}, {"do_convert_rgb": False},
  {"do_normalize": None, "image_mean": None}, {"do_resize": None, "size": None, "resample": None},
], ids=str)
def test_pixels_equal_those_of_transformers(transformers, changes):
  assert_pixels(sized(from_hf(HF | changes, SIDE)), processor(transformers, "CLIP", HF | changes))


@pytest.mark.parametrize("changes", [
  {}, {"interpolation": "bilinear"}, {"interpolation": "random"}, {"resize_mode": "squash"},
  {"resize_mode": "squash", "interpolation": "bilinear"}, {"resize_mode": "longest"},
  {"resize_mode": "longest", "interpolation": "bilinear", "fill_color": 77}, {"mean": 0.5, "std": [0.5, 0.4, 0.3]},
], ids=str)
def test_pixels_equal_those_of_open_clip(open_clip, changes):
  theirs = open_clip.image_transform(SIDE, is_train=False, **changes)
  reachable = [s for s in SHAPES if changes.get("resize_mode") != "longest" or max(s) < 2 * SIDE * min(s)]
  assert_pixels(sized(from_open_clip({"size": SIDE, "mode": "RGB"} | changes, SIDE)), theirs, reachable)


@pytest.mark.parametrize("changes", [
  {}, {"crop_pct": 0.94}, {"crop_pct": 1.0, "crop_mode": "squash"}, {"crop_pct": 0.7, "crop_mode": "squash"},
  {"interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.5] * 3}, {"interpolation": "lanczos", "crop_pct": 0.9},
], ids=str)
def test_pixels_equal_those_of_timm(open_clip, changes):
  data = importlib.import_module("timm.data")
  theirs = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"} | changes
  transform = data.create_transform((3, SIDE, SIDE), **{"mean": data.IMAGENET_DEFAULT_MEAN,
                                                        "std": data.IMAGENET_DEFAULT_STD} | theirs)
  config = {"mean": None, "interpolation": "bicubic"} | changes
  said = from_timm({"architecture": "nf_resnet50", "pretrained_cfg": config}, SIDE)
  assert_pixels(sized(said), transform)


def test_a_longest_side_that_leaves_nothing_of_the_other_is_reported():
  size = sized(from_open_clip({"resize_mode": "longest"}, SIDE))
  with pytest.raises(UserError, match="image of 1 × 200 pixels would be scaled to 0 × 32"):
    pixels(size, image(1, 200))


@pytest.mark.parametrize("name", PROCESSORS)
def test_what_is_not_said_is_what_each_processor_does_by_itself(transformers, name):
  theirs = getattr(transformers, f"{name}ImageProcessorPil")()
  side = theirs.crop_size.height if theirs.do_center_crop else theirs.size.height
  said = from_hf({"image_processor_type": f"{name}ImageProcessorFast"}, side)
  np.testing.assert_allclose((said.mean, said.std), (theirs.image_mean, theirs.image_std))
  assert said.resample == FILTERS[theirs.resample] and RESAMPLES[said.resample] == theirs.resample
  assert PROCESSORS[name].crop == getattr(theirs.crop_size, "height", None)
  assert PROCESSORS[name].square is bool(getattr(theirs, "default_to_square", True))
  picture = image(300, 260)
  ours = np.asarray(encoder_rule(said, side)({"image": picture}, None)["image"])
  want = theirs(picture, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
  np.testing.assert_array_equal(ours, want.transpose(1, 2, 0))


@pytest.mark.parametrize(("changes", "message"), [
  ({"do_pad": True}, "do_pad is True, which is not done here"),
  ({"do_reduce_labels": True}, "do_reduce_labels is True"), ({"reduce_labels": True}, "reduce_labels is True"),
  ({"do_flip_channel_order": True}, "do_flip_channel_order is True"),
  ({"do_center_crop": False}, "do_center_crop is false, and size is the shortest edge: images would come out of diff"),
  ({"do_resize": False, "do_center_crop": False}, "do_center_crop is false, and do_resize too"),
  ({"crop_size": 40}, "crop_size is 40, but the model takes 32 pixels a side"),
  ({"size": {"height": 40, "width": 40}, "do_center_crop": False}, "size is 40, but the model takes 32"),
  ({"crop_size": None}, "crop_size: expected a number of pixels, got None"), ({"image_std": None}, "image_std is None"),
  ({"crop_size": 224}, "crop_size is 224, but the model takes 32"),
  ({"size": {"height": 32, "width": 48}}, "size is 32 × 48, expected a square"),
  ({"size": {"longest_edge": 32}}, r"size is \{'longest_edge': 32\}; those read here: height and width, or shortest"),
  ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size is .*; those read here"),
  ({"size": {"shortest_edge": "32"}}, "size: expected a number of pixels, got '32'"), ({"size": 0}, "size: expected"),
  ({"size": True}, "size: expected a number of pixels, got True"),
  ({"crop_size": {"shortest_edge": 32}}, r"crop_size is \{'shortest_edge': 32\}, expected height and width"),
  ({"resample": 6}, "resample is 6, expected one of PIL's numbers, 0 to 5"), ({"resample": None}, "resample is N"),
  ({"do_resize": 1}, "do_resize is 1, expected true or false"), ({"do_normalize": "no"}, "do_normalize is 'no'"),
  ({"rescale_factor": 0}, "rescale_factor is 0, expected a number above 0"), ({"rescale_factor": "1"}, "rescale_f"),
  ({"rescale_factor": math.nan}, "rescale_factor is nan"), ({"image_mean": [0.5, 0.5]}, "image_mean is .*three num"),
  ({"image_mean": [0.5, math.inf, 0.5]}, "image_mean is inf, expected a number"),
  ({"image_std": [0.5, 0.0, 0.5]}, r"image_std is \[0.5, 0.0, 0.5\], and nothing can be divided by 0"),
  ({"image_std": 0}, "image_std is 0, and"), ({"image_mean": "0.5"}, "image_mean is '0.5', expected a number"),
  ({"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type is 'ConvNextImageProcessor'; those read"),
  ({"image_processor_type": "ViTImageProcessor", "do_center_crop": True, "crop_size": None}, "crop_size: expected"),
  ({"image_processor_type": 3}, "image_processor_type is 3"), ({"use_square_size": True}, "use_square_size is True"),
], ids=str)
def test_what_cannot_be_done_as_transformers_does_is_refused_by_name(tmp_path, changes, message):
  for name, values in (("preprocessor_config.json", HF | changes),
                       ("processor_config.json", {"image_processor": HF | changes})):
    (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as caught:
      configs.hf_preprocessing(str(tmp_path), SIDE, "CLIP")
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    (tmp_path / name).unlink()


@pytest.mark.parametrize(("changes", "message"), [
  ({"resize_mode": "fit"}, "preprocess_cfg.resize_mode is 'fit', expected shortest or squash or longest"),
  ({"interpolation": "lanczos"}, "preprocess_cfg.interpolation is 'lanczos'"), ({"mode": "L"}, "preprocess_cfg.mode"),
  ({"size": 224}, "preprocess_cfg.size is 224, but the model takes 32"), ({"size": [32, 64]}, "is 32 × 64, expected a"),
  ({"fill_color": [1, 2, 3]}, r"preprocess_cfg.fill_color is \[1, 2, 3\]"), ({"fill_color": 256}, "fill_color is 256"),
  ({"std": [0.5, 0.5, 0.0]}, "preprocess_cfg.std is .*divided by 0"), ({"mean": [math.nan] * 3}, "mean is nan"),
], ids=str)
def test_what_cannot_be_done_as_open_clip_does_is_refused_by_name(changes, message):
  with pytest.raises(UserError, match=message):
    from_open_clip(changes, SIDE)


@pytest.mark.parametrize(("changes", "message"), [
  ({"crop_mode": "border"}, "crop_mode is 'border'"), ({"crop_pct": 1.2}, "crop_pct is 1.2"),
  ({"interpolation": "random"}, "interpolation is 'random'"), ({"std": [0.1, 0.0, 0.1]}, "std is"),
  ({"fixed_input_size": True, "input_size": [3, 224, 224], "crop_pct": 0.9}, "input_size is 224, but the model takes"),
], ids=str)
def test_what_cannot_be_done_as_timm_does_is_refused_by_name(changes, message):
  with pytest.raises(UserError, match=message):
    from_timm({"pretrained_cfg": changes}, SIDE)
  assert from_timm({"architecture": "nf_resnet50", "num_classes": 0}, SIDE) is None


def test_transformers_newer_file_counts_where_both_are_there_and_an_older_one_of_its_name_does_not(tmp_path):
  (tmp_path / "preprocessor_config.json").write_text(json.dumps(HF | {"resample": 2}))
  (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor", "resample": 1}))
  assert configs.hf_preprocessing(str(tmp_path), SIDE, "CLIP").resample == "bilinear"
  (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": HF | {"resample": 1}}))
  assert configs.hf_preprocessing(str(tmp_path), SIDE, "CLIP").resample == "lanczos"


@pytest.mark.parametrize("changes", [
  {}, {"resize": "squash"}, {"resize": "squash", "resize_to": 45, "resample": "bilinear"},
  {"resize_to": 40, "crop_rounding": "down", "resample": "lanczos"}, {"resize": "native", "crop_rounding": "down"},
  {"mean": (0.0,) * 3, "std": (1 / 255,) * 3},
], ids=str)
def test_what_is_written_for_transformers_gives_it_the_same_pixels(transformers, changes):
  size = sized(preprocessing.Preprocessing(**changes))
  values = json.loads(json.dumps(preprocessing.to_hf(size, SIDE)))
  # Its crops round down always: shapes with an even number of pixels to cut are the same to both.
  shapes = SHAPES if size.crop_rounding == "down" else [(180, 80), (64, 64), (32, 32), (40, 1)]
  assert_pixels(size, processor(transformers, "CLIP", {k: v for k, v in values.items() if k != "image_processor_type"}),
                [s for s in shapes if size.resize_to == 0 or changes.get("crop_rounding") or s[0] == s[1]])
  back = sized(from_hf(values, SIDE))
  assert dataclasses.replace(back, crop_rounding=size.crop_rounding, resample=size.resample) == size


@pytest.mark.parametrize("changes", [{}, {"resize": "squash", "resample": "bilinear"},
                                     {"resize": "longest", "fill_color": 9, "mean": (0.5,) * 3}], ids=str)
def test_what_is_written_for_open_clip_gives_it_the_same_pixels(open_clip, changes):
  size = sized(preprocessing.Preprocessing(**changes))
  values = json.loads(json.dumps(preprocessing.to_open_clip(size, SIDE)))
  theirs = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**values), is_train=False)
  assert_pixels(size, theirs, [(180, 80), (61, 133), (9, 14), (33, 35)])
  assert sized(from_open_clip(values, SIDE)) == size


def test_what_another_library_cannot_do_is_not_written_for_it():
  for write, changes, message in [
      (preprocessing.to_hf, {"resize": "longest"}, "transformers' .* cannot do what this model has, resize='longest'"),
      (preprocessing.to_hf, {"resize_to": 20, "fill_color": 9}, "cannot do what this model has, fill_color=9"),
      (preprocessing.to_open_clip, {"resize_to": 40}, "cannot say what this model has, resize_to=40"),
      (preprocessing.to_open_clip, {"resize": "native"}, "resize='native'; use --to=hf or limber"),
      (preprocessing.to_open_clip, {"resample": "box"}, "resample='box'")]:
    with pytest.raises(UserError, match=message):
      write(sized(preprocessing.Preprocessing(**changes)), SIDE)


def test_the_words_of_the_sizes_are_those_of_the_transforms():
  assert set(spec.RESAMPLES) == set(RESAMPLES) == set(FILTERS)
  for resize in spec.RESIZES:
    for rounding in spec.ROUNDINGS:
      encoder_rule(dataclasses.replace(ClipConfig(), resize=resize, crop_rounding=rounding), SIDE)
  assert [f.name for f in dataclasses.fields(preprocessing.Preprocessing)] == list(spec.PIXELS)
