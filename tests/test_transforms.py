"""Transforms: pixels equal to torchvision's, hostile image files, random crops within their bounds."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from limber_jax.data import transforms
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.data.transforms import (
  CROPS,
  MAX_PIXELS,
  RATIO,
  RESAMPLES,
  ResizeCrop,
  Tokenize,
  decode,
  random_box,
)
from limber_jax.errors import UserError
from limber_jax.runtime.inputs import IMAGE


def picture(width, height, seed=0):
  """Returns uint8 [height, width, 3] with noise and edges, so that every wrong filter or offset shows."""
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (height, width, 3), np.uint8)
  image[: height // 2, : width // 3] = 255
  return image


def encoded(image, format="PNG", **options):
  out = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format, **options)
  return out.getvalue()


@pytest.fixture(scope="module")
def torchvision(open_clip):
  from torchvision import transforms as theirs
  return theirs


SIZES = [(32, 32), (33, 32), (32, 33), (224, 300), (301, 225), (7, 5), (5, 8), (64, 1000), (999, 31), (97, 71), (1, 1)]


class TestResizeCrop:

  @pytest.mark.parametrize("size", [32, 33, 224])
  @pytest.mark.parametrize(("width", "height"), SIZES)
  def test_center_equals_clips_preprocessing_to_the_bit(self, torchvision, width, height, size):
    bicubic = torchvision.InterpolationMode.BICUBIC
    theirs = torchvision.Compose([torchvision.Resize(size, bicubic), torchvision.CenterCrop(size)])
    image = picture(width, height)
    ours = ResizeCrop(size, "center")({"image": image}, None)["image"]
    np.testing.assert_array_equal(ours, np.asarray(theirs(Image.fromarray(image))))

  def test_center_equals_open_clips_own_transform(self, open_clip):
    pipeline = open_clip.image_transform(48, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    image = picture(101, 77)
    theirs = pipeline(Image.fromarray(image)).numpy().transpose(1, 2, 0) * 255
    np.testing.assert_array_equal(ResizeCrop(48, "center")({"image": image}, None)["image"], np.rint(theirs))

  @pytest.mark.parametrize(("width", "height"), SIZES)
  def test_random_is_a_window_of_the_scaled_image(self, torchvision, width, height):
    image = picture(width, height)
    whole = np.asarray(torchvision.Resize(24, torchvision.InterpolationMode.BICUBIC)(Image.fromarray(image)))
    windows = {whole[y : y + 24, x : x + 24].tobytes()
               for y in range(whole.shape[0] - 23) for x in range(whole.shape[1] - 23)}
    rng = np.random.default_rng(0)
    seen = {ResizeCrop(24, "random")({"image": image}, rng)["image"].tobytes() for _ in range(60)}
    assert seen <= windows
    assert len(seen) >= min(len(windows), 10) / 2

  def test_columns_that_are_cut_off_change_none_that_are_kept(self):
    rng = np.random.default_rng(0)
    for seed in range(200):
      width, height, size = (int(n) for n in rng.integers(8, 90, 3))
      image = Image.fromarray(picture(width, height))
      for name, filter_ in RESAMPLES.items():
        short = min(width, height)
        scaled = image.resize((int(size * width / short), int(size * height / short)), filter_)
        draw = np.random.default_rng(seed)
        left, top = (int(draw.integers(side - size + 1)) for side in scaled.size)
        want = np.asarray(scaled)[top : top + size, left : left + size]
        ours = ResizeCrop(size, "random", resample=name)({"image": image}, np.random.default_rng(seed))["image"]
        np.testing.assert_array_equal(ours, want)

  def test_random_reaches_both_ends(self):
    image = picture(24, 26)
    rng = np.random.default_rng(0)
    seen = {ResizeCrop(24, "random")({"image": image}, rng)["image"].tobytes() for _ in range(100)}
    assert seen == {image[y : y + 24].tobytes() for y in range(3)}

  @pytest.mark.parametrize(("width", "height"), SIZES)
  def test_resized_scales_a_random_box_as_torchvision_does(self, torchvision, width, height):
    image = picture(width, height)
    left, top, right, bottom = random_box(width, height, (0.9, 1.0), np.random.default_rng(3))
    theirs = torchvision.functional.resized_crop(
      Image.fromarray(image), top, left, bottom - top, right - left, [32, 32], torchvision.InterpolationMode.BICUBIC)
    ours = ResizeCrop(32, "resized")({"image": image}, np.random.default_rng(3))["image"]
    np.testing.assert_array_equal(ours, np.asarray(theirs))

  @pytest.mark.parametrize("scale", [(0.9, 1.0), (0.08, 1.0), (0.5, 0.5)])
  def test_boxes_keep_to_the_share_of_the_area_and_the_ratio_of_sides(self, scale):
    rng = np.random.default_rng(0)
    for _ in range(500):
      width, height = rng.integers(200, 400, 2)
      left, top, right, bottom = random_box(width, height, scale, rng)
      w, h = right - left, bottom - top
      assert 0 <= left < right <= width and 0 <= top < bottom <= height
      fallback = (left, top) == ((width - w) // 2, (height - h) // 2)
      assert fallback or scale[0] - 0.02 <= w * h / (width * height) <= scale[1] + 0.02
      assert RATIO[0] - 0.02 <= w / h <= RATIO[1] + 0.02

  def test_boxes_are_spread_like_torchvisions(self, torchvision):
    import torch
    torch.manual_seed(0)
    rng, image = np.random.default_rng(0), Image.new("RGB", (300, 200))
    ours = np.array([random_box(300, 200, (0.2, 1.0), rng) for _ in range(3000)])
    theirs = np.array([torchvision.RandomResizedCrop.get_params(image, (0.2, 1.0), RATIO) for _ in range(3000)])
    theirs = np.stack([theirs[:, 1], theirs[:, 0], theirs[:, 1] + theirs[:, 3], theirs[:, 0] + theirs[:, 2]], axis=1)
    for share in (10, 50, 90):  # 3000 draws: the middle of each coordinate is known to about 2 pixels
      np.testing.assert_allclose(np.percentile(ours, share, axis=0), np.percentile(theirs, share, axis=0), atol=8)

  @pytest.mark.parametrize(("width", "height", "box"), [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506))])
  def test_a_box_that_never_fits_is_the_central_one(self, width, height, box):
    assert random_box(width, height, (0.9, 1.0), np.random.default_rng(0)) == box

  @pytest.mark.parametrize("crop", CROPS)
  def test_every_crop_gives_contiguous_bytes_of_the_size(self, crop):
    out = ResizeCrop(16, crop)({"image": picture(50, 20)}, np.random.default_rng(0))["image"]
    assert out.shape == (16, 16, 3) and out.dtype == np.uint8 and out.flags.c_contiguous

  def test_an_image_beyond_measure_is_refused_before_it_is_scaled(self):
    with pytest.raises(UserError, match=r"1 × 20000 pixels would be scaled"):
      ResizeCrop(224, "center")({"image": picture(1, 20000)}, None)

  @pytest.mark.parametrize(("arguments", "message"), [
    ((32, "middle"), "choose one of random, center, resized"), ((32, "resized", (1.0, 0.9)), "crop_scale"),
    ((32, "resized", (0.0, 1.0)), "crop_scale"), ((32, "resized", (0.9,)), "crop_scale"),
  ])
  def test_a_wrong_setting_is_reported(self, arguments, message):
    with pytest.raises(UserError, match=message):
      ResizeCrop(*arguments)


def chunk(name, data):
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height):
  """A PNG that promises width × height pixels and holds none."""
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
          + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


class TestDecode:

  @pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
  def test_pixels_are_pils(self, format):
    data = encoded(picture(40, 30), format, **({"lossless": True} if format == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    if format != "JPEG":
      np.testing.assert_array_equal(decode(data), picture(40, 30))

  @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
  def test_other_modes_become_rgb(self, mode):
    image = Image.fromarray(np.full((6, 5), 1000, np.uint16)) if mode == "I;16" else (
      Image.fromarray(picture(5, 6)).convert(mode))
    out = decode(encoded(image))
    assert out.shape == (6, 5, 3) and out.dtype == np.uint8

  def test_a_cmyk_jpeg_becomes_rgb(self):
    assert decode(encoded(Image.fromarray(picture(8, 8)).convert("CMYK"), "JPEG")).shape == (8, 8, 3)

  def test_a_palette_with_transparency_loses_it_without_a_warning(self):
    image = Image.fromarray(picture(5, 6)).convert("P")
    data = encoded(image, transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode(data), np.asarray(image.convert("RGB")))

  def test_the_exif_orientation_is_not_applied(self):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(picture(10, 4), "JPEG", exif=exif)).shape == (4, 10, 3)

  @pytest.mark.parametrize("data", [
    b"", b"\0", b"not an image", b"<html>404</html>", encoded(picture(9, 9), "GIF"), encoded(picture(9, 9), "BMP"),
    encoded(picture(9, 9), "TIFF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png_header(10, 10),
    png_header(0, 10), b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP",
  ])
  def test_what_is_no_image_of_the_three_formats_is_refused(self, data):
    with pytest.raises(UserError, match=r"cannot be decoded"):
      decode(data)

  @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
  def test_a_damaged_file_is_refused_or_read_and_never_anything_else(self, format):
    whole, rng = encoded(picture(60, 40), format), np.random.default_rng(0)
    for _ in range(150):
      data = bytearray(whole[: rng.integers(len(whole) + 1)] if rng.random() < 0.5 else whole)
      for _ in range(rng.integers(4)):
        if data:
          data[rng.integers(len(data))] = rng.integers(256)
      try:
        assert decode(bytes(data)).dtype == np.uint8
      except UserError as error:
        assert "image of" in str(error)

  def test_a_bomb_is_refused_by_its_header(self):
    for width, height in ((8000, 8000), (200_000, 200_000), (2**31 - 1, 2**31 - 1)):
      with pytest.raises(UserError, match="image of"):
        decode(png_header(width, height))
    assert MAX_PIXELS < 8000 * 8000

  def test_a_file_of_too_many_bytes_is_refused_before_it_is_decoded(self):
    whole = encoded(picture(9, 9), "JPEG")
    assert decode(whole + bytes(IMAGE.most - len(whole))).shape == (9, 9, 3)
    with pytest.raises(UserError, match=r"image of 20,000,001 bytes; at most 20,000,000"):
      decode(whole + bytes(IMAGE.most + 1 - len(whole)))

  def test_a_text_where_an_image_is_wanted_is_reported(self):
    with pytest.raises(UserError, match="a text without an image"):
      transforms.Decode()({"id": "x", "text": "a"}, None)

  @pytest.mark.parametrize("image", [
    np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8),
    np.zeros((0, 4, 3), np.uint8), np.broadcast_to(np.uint8(0), (6000, 6000, 3)),
  ])
  def test_an_array_of_another_form_is_refused(self, image):
    with pytest.raises(UserError, match="image"):
      decode(image)


RECORD = {"id": "x", "image": encoded(picture(50, 40)), "text": "A dog", "label": 7}


def test_training_gives_image_and_tokens_and_evaluation_the_label_too():
  tokenizer = ByteTokenizer()
  out = transforms.train(32, tokenizer, 16, "random", (0.9, 1.0))(RECORD, np.random.default_rng(0))
  assert {k: (v.shape, v.dtype) for k, v in out.items()} == {
    "image": ((32, 32, 3), np.uint8), "tokens": ((16,), np.int32)}
  np.testing.assert_array_equal(out["tokens"], tokenizer("a dog", 16)[0])
  out = transforms.pairs(ResizeCrop(32, "center"), tokenizer, 16, ("image", "tokens", "label"))(RECORD, None)
  assert out["label"] == 7 and out["label"].dtype == np.int32
  np.testing.assert_array_equal(out["image"], ResizeCrop(32, "center")({"image": picture(50, 40)}, None)["image"])


class TestDraft:
  """JPEG files decoded at a fraction of their sides, where that is asked for."""

  def at(self, side, crop, fast, scale=(0.9, 1.0)):
    data = encoded(load_sample_image("china.jpg")[:side, :side], "JPEG", quality=90)
    transform = transforms.train(32, ByteTokenizer(), 16, crop, scale, fast)
    return transform(RECORD | {"image": data}, np.random.default_rng(0))["image"].astype(int)

  @pytest.mark.parametrize(("crop", "mean", "most"), [
    ("random", 0.6, 8), ("center", 0.6, 8), ("squash", 0.6, 8),
    ("resized", 4, 64)])  # its box has whole pixels, which are larger here
  def test_large_files_come_out_nearly_the_same(self, crop, mean, most):
    exact, fast = self.at(420, crop, False), self.at(420, crop, True)
    assert 0 < np.abs(exact - fast).mean() < mean and np.abs(exact - fast).max() < most

  @pytest.mark.parametrize(("side", "crop"), [(127, "random"), (127, "squash"), (150, "resized"), (420, "native")])
  def test_files_of_less_than_twice_what_is_needed_come_out_the_same(self, side, crop):
    np.testing.assert_array_equal(self.at(side, crop, False), self.at(side, crop, True))

  def test_the_smallest_box_of_a_random_crop_still_has_twice_what_is_needed(self):
    assert ResizeCrop(32, "center").least == 64 and ResizeCrop(32, "resized", (0.25, 1.0)).least == 148
    assert ResizeCrop(32, "center", resize_to=40).least == 80
    exact, fast = (self.at(290, "resized", fast, (0.25, 1.0)) for fast in (False, True))
    np.testing.assert_array_equal(exact, fast)


def test_training_draws_one_of_several_texts_and_evaluation_takes_the_first():
  record = {"text": "a", "texts": ("a", "b", "c")}
  step, rng = Tokenize(ByteTokenizer(), 4), np.random.default_rng(0)
  drawn = {ByteTokenizer().decode(step(record, rng)["tokens"]) for _ in range(50)}
  assert drawn == {"a", "b", "c"}
  assert ByteTokenizer().decode(step(record, None)["tokens"]) == "a"


@pytest.mark.parametrize("crop", CROPS)
def test_the_same_random_state_gives_the_same_example_also_after_pickling(crop):
  transform = transforms.train(32, ByteTokenizer(), 16, crop, (0.5, 1.0))
  copy = pickle.loads(pickle.dumps(transform))
  a, b = transform(RECORD, np.random.default_rng(5)), copy(RECORD, np.random.default_rng(5))
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


def test_transforms_leave_the_record_as_it_was():
  record = dict(RECORD)
  transforms.train(32, ByteTokenizer(), 16, "random", (0.9, 1.0))(record, np.random.default_rng(0))
  assert record == RECORD


# What LiMBeR's encoders and language models get

def test_squash_takes_both_sides_whatever_the_aspect():
  image = np.random.default_rng(0).integers(0, 256, (30, 70, 3), np.uint8)
  for resample in ("bilinear", "bicubic"):
    got = ResizeCrop(16, "squash", resample=resample)({"image": image}, None)["image"]
    want = Image.fromarray(image).resize((16, 16), getattr(Image.Resampling, resample.upper()))
    np.testing.assert_array_equal(got, want)


def test_native_takes_the_middle_as_it_is_and_pads_with_black():
  image = np.random.default_rng(0).integers(1, 256, (10, 40, 3), np.uint8)
  got = ResizeCrop(20, "native")({"image": image}, None)["image"]
  np.testing.assert_array_equal(got[5:15], image[:, 10:30])
  assert not got[:5].any() and not got[15:].any()


def test_several_encoders_see_the_same_crop_of_an_image():
  rules = {"image": ResizeCrop(8, "random"), "image@other": ResizeCrop(16, "random")}
  image = np.zeros((16, 64, 3), np.uint8)
  image[:, 32:] = 255
  transform = transforms.captioning(rules, ByteTokenizer(), 4)
  for seed in range(5):
    row = transform({"image": image, "text": "a"}, np.random.default_rng(seed))
    assert row["image"].shape == (8, 8, 3) and row["image@other"].shape == (16, 16, 3)
  alone = ResizeCrop(8, "random")({"image": image}, np.random.default_rng(4))["image"]
  np.testing.assert_array_equal(row["image"], alone)


@pytest.mark.parametrize(("text", "start", "tokens", "real"), [
  ("ab", False, [98, 99, 258, 258, 258], 3),
  ("ab", True, [258, 98, 99, 258, 258], 4),
  ("abcd", False, [98, 99, 100, 101, 258], 5),
  ("abcdef", False, [98, 99, 100, 101, 102], 5),  # cut, and so without an end
  ("", False, [258] * 5, 1),
])
def test_a_caption_ends_once_and_a_cut_one_never(text, start, tokens, real):
  row = transforms.TokenizeCaption(ByteTokenizer(), 5, start)({"text": text}, None)
  assert row["tokens"].tolist() == tokens and row["mask"].tolist() == [i < real for i in range(5)]
