"""What happens to a record on its way into a batch: decode, crop, tokenize. Pure functions of (record, rng)."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from limber_jax.config import choose
from limber_jax.data import bounds
from limber_jax.data.images import PLAIN, ImageOptions, sniff, to_rgb, turned
from limber_jax.data.tokenizers import Tokenizer
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

Record = dict[str, Any]
Transform = Callable[[Record, np.random.Generator | None], Record]

MAX_PIXELS = 32_000_000        # of an image, before and after scaling: 96 MB a reading thread
FAST_DECODE = 2                # times what is needed that a JPEG file has at least when it is decoded at a fraction
RATIO = (3 / 4, 4 / 3)         # width to height, of crop="resized"
CROPS = ("random", "center", "resized", "squash", "native", "longest")
RESAMPLES = {name: Image.Resampling[name.upper()]
             for name in ("bicubic", "bilinear", "nearest", "box", "hamming", "lanczos")}
ROUNDINGS = ("even", "down")


def train(image_size: int, tokenizer: Tokenizer, context: int, crop: str, crop_scale: Sequence[float],
          jpeg_fast_decode: bool = False) -> Transform:
  """Returns (record, rng) -> {"image": uint8 [image_size, image_size, 3], "tokens": int32 [context]}.

  Args:
    image_size: pixels.
    tokenizer: from `tokenizers.load`.
    context: T, tokens of a text; longer texts are cut.
    crop, crop_scale: see `ResizeCrop`.
    jpeg_fast_decode: see `config.Data`.
  """
  rule = ResizeCrop(image_size, crop, tuple(crop_scale))
  return pairs(rule, tokenizer, context, ("image", "tokens"), jpeg_fast_decode)


def pairs(rule: "ResizeCrop", tokenizer: Tokenizer, context: int, kept: Sequence[str], jpeg_fast_decode: bool = False
          ) -> Transform:
  """Returns (record, rng) -> what of {"image": uint8 [H, W, 3] by `rule`, "tokens": int32 [context], …} is `kept`."""
  return Compose((*images({"image": rule}, jpeg_fast_decode), Tokenize(tokenizer, context), Select(tuple(kept))))


def captioning(rules: dict[str, "ResizeCrop"], tokenizer: Tokenizer, length: int, start: bool = False,
               jpeg_fast_decode: bool = False) -> Transform:
  """Returns (record, rng) -> {name: uint8 [size, size, 3] for each rule, "tokens", "mask" [length], "label" if any}.

  Args:
    rules: what becomes of the image, by the name of the result; none where only the text is wanted.
    tokenizer: from `tokenizers.load`.
    length, start: see `TokenizeCaption`.
    jpeg_fast_decode: see `config.Data`.
  """
  kept = (*rules, "tokens", "mask", "label")
  return Compose((*images(rules, jpeg_fast_decode), TokenizeCaption(tokenizer, length, start), Select(kept)))


def images(rules: dict[str, "ResizeCrop"], jpeg_fast_decode: bool = False) -> tuple[Transform, ...]:
  """Returns what makes {name: uint8 [size, size, 3]} of a record's image, by `rules`; see `captioning`."""
  if not rules:
    return ()
  return Decode(max(rule.least for rule in rules.values()) if jpeg_fast_decode else 0), Images(tuple(rules.items()))


@dataclass(frozen=True)
class Compose:
  """One transform after the other."""

  steps: tuple[Transform, ...]

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    for step in self.steps:
      record = step(record, rng)
    return record


@dataclass(frozen=True)
class Decode:
  """"image": encoded bytes or uint8 [h, w, 3] -> PIL's, RGB: the way to an array and back takes a tenth of the time.

  Other modes are converted as PIL does it (alpha dropped), before any scaling: HF's order; see `images.to_rgb`.
  OpenAI's code converts after scaling, which differs for palettes and transparency only.

  With `least` a JPEG file may be decoded at a half, a quarter or an eighth of its sides, if they have as many pixels.
  """

  least: int = 0
  options: ImageOptions = PLAIN

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    if "image" not in record:
      raise UserError("a text without an image, where images are wanted")
    return record | {"image": decode_image(record["image"], self.least, self.options)}


def with_options(transform: Transform, options: ImageOptions) -> Transform:
  """Returns a transform that reads image files by these options, where it reads any."""
  if isinstance(transform, Decode):
    return replace(transform, options=options)
  if isinstance(transform, Compose):
    return Compose(tuple(with_options(t, options) for t in transform.steps))
  return transform


def decode(image: bytes | np.ndarray, options: ImageOptions = PLAIN) -> np.ndarray:
  """Returns uint8 [h, w, 3]; see `decode_image`."""
  return np.asarray(decode_image(image, 0, options))


def decode_image(image: bytes | np.ndarray, least: int = 0, options: ImageOptions = PLAIN) -> Image.Image:
  """Returns an image in RGB, decoded; raises UserError for what is not a whole JPEG, PNG or WEBP, or of `options`.

  More than `inputs.IMAGE` has, or MAX_PIXELS by its header, or what `bounds` does not allow, are refused
  before anything is decoded.

  Args:
    image: the bytes of a file, or uint8 [h, w, 3].
    least: pixels of each side that a JPEG file has at least if it is decoded at a fraction; 0 decodes all of it.
    options: further formats, and whether the image is turned.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
      raise UserError(f"image: wanted uint8 [h, w, 3], got {image.dtype} {list(image.shape)}")
    _check_size(image.shape[1], image.shape[0])
    return Image.fromarray(image)
  inputs.check_size(len(image), inputs.IMAGE)
  scans = bounds.check_parts(image)
  try:
    found = Image.open(io.BytesIO(image), formats=options.known)
    _check_size(*found.size)
    if found.format in ("JPEG", "MPO"):
      bounds.check_scans(image, scans, found.width * found.height)
    elif len(found.tile) > bounds.MAX_PARTS:
      raise UserError(f"{found.format} file of {len(found.tile):,} strips; at most {bounds.MAX_PARTS:,} are read")
    if least:
      found.draft("RGB", (least, least))
    found.info.pop("transparency", None)  # dropped by the conversion anyway, which would warn of it
    found.load()
    turn = turned(found) if options.exif else None
    return to_rgb(found) if turn is None else to_rgb(found).transpose(turn)
  except UserError:
    raise
  except Exception as error:  # a damaged file can raise anything, from OSError to struct.error
    reason: Any = error
    if isinstance(error, Image.UnidentifiedImageError):
      other, _ = sniff(image)
      reason = f"not one of {', '.join(options.known)}" + (
        f"; it is a {other}, read with config.data.formats or --formats={other.lower()}" if other else "")
    raise UserError(f"image of {len(image):,} bytes cannot be decoded: {reason}") from error


def _check_size(width: int, height: int) -> None:
  if width * height > MAX_PIXELS:
    raise UserError(f"image of {width} × {height} pixels; at most {MAX_PIXELS:,} are read")


@dataclass(frozen=True)
class ResizeCrop:
  """"image": PIL's or uint8 [h, w, 3] -> uint8 [size, size, 3], scaled by PIL's filter `resample` (antialiased).

  crop:
    center: the shortest side to `resize_to`, then the middle: CLIP's preprocessing, equal to torchvision's
      Resize(size, BICUBIC) and CenterCrop(size) to the bit.
    longest: the longest side to `resize_to`, then the middle, with `fill_color` beside it: open_clip's, to the bit.
    squash: both sides to `resize_to`, whatever the aspect, then the middle: BEiT's preprocessing.
    native: the middle at its own resolution, black where the image is smaller: how LiMBeR's code fed NF-ResNet50.
    random: the shortest side to `size`, then a random place: the paper's only augmentation (arXiv 2103.00020, 2.4).
    resized: a random box of a share `scale` of the area and a ratio of sides in RATIO, scaled: open_clip's.

  resize_to: pixels; 0 is `size`. Beside what is smaller than `size` comes `fill_color`, a grey of 0 to 255.
  crop_rounding: where the middle begins if the pixels that are cut off, or missing, are odd in number. even: half of
    them rounded to the even number, as torchvision does | down: rounded down, as transformers does.
  """

  size: int
  crop: str
  scale: tuple[float, ...] = (0.9, 1.0)
  resample: str = "bicubic"
  resize_to: int = 0
  crop_rounding: str = "even"
  fill_color: int = 0

  def __post_init__(self):
    choose("data.crop", self.crop, CROPS)
    choose("resample", self.resample, tuple(RESAMPLES))
    choose("crop_rounding", self.crop_rounding, ROUNDINGS)
    if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
      raise UserError(f"config.data.crop_scale={self.scale}: wanted two shares of the area, 0 < low <= high <= 1")

  def changes(self, crop: str = "") -> dict[str, Any]:
    """Returns the settings that came later than the first runs and are not what those did.

    Args:
      crop: the crop where no other filter than bicubic was there to choose; "" where bilinear was, too.
    """
    out = {name: value for name, default in (("resize_to", 0), ("crop_rounding", "even"), ("fill_color", 0))
           if (value := getattr(self, name)) != default}
    if self.resample not in (("bicubic",) if crop else ("bicubic", "bilinear")):
      out["resample"] = self.resample
    if self.crop != (crop or self.crop) or self.crop == "longest":
      out["crop"] = self.crop
    return out

  @property
  def least(self) -> int:
    """The least pixels of each side of an image decoded at a fraction: FAST_DECODE times what goes into the result."""
    if self.crop == "native":
      return MAX_PIXELS  # never
    smallest = math.sqrt(self.scale[0] * RATIO[0]) if self.crop == "resized" else 1  # box, as a share of a side
    return math.ceil(FAST_DECODE * max(self.size, self.resize_to) / smallest)

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    image = record["image"] if isinstance(record["image"], Image.Image) else Image.fromarray(record["image"])
    resample = RESAMPLES[self.resample]
    if self.crop == "resized":
      box = random_box(image.width, image.height, self.scale, rng)
      return record | {"image": np.asarray(image.crop(box).resize((self.size, self.size), resample))}
    width, height = self._scaled(image)
    left, top = (self._start(side - self.size, rng) for side in (width, height))
    if width > self.size and (width, height) != image.size and image.width >= image.height:
      # PIL scales rows, rounds to whole numbers, and then scales columns: only of those that are wanted here. Of images
      # that are higher than wide it may begin with the columns (Pillow 13), which rounds otherwise.
      image = image.resize((width, image.height), resample).crop((left, 0, left + self.size, image.height))
      width, left = self.size, 0
    if (width, height) != image.size:
      image = image.resize((width, height), resample)
    if self.fill_color and min(left, top) < 0:
      whole = Image.new("RGB", (self.size, self.size), (self.fill_color,) * 3)
      whole.paste(image, (-left, -top))
      return record | {"image": np.asarray(whole)}
    return record | {"image": np.asarray(image.crop((left, top, left + self.size, top + self.size)))}

  def _scaled(self, image: Image.Image) -> tuple[int, int]:
    """Returns the (width, height) that the whole image is scaled to."""
    side = self.resize_to or self.size
    if self.crop == "native":
      return image.size
    if self.crop == "squash":
      return side, side
    return longest(image, side) if self.crop == "longest" else resize_shortest_edge(image, side)

  def _start(self, slack: int, rng: np.random.Generator | None) -> int:
    """Returns where the result begins in an image that has `slack` more pixels in a row or column, below 0 fewer."""
    if self.crop == "random":
      return int(rng.integers(slack + 1))
    if self.crop == "longest" and slack < 0:
      return -(-slack // 2)  # torchvision pads before it crops
    return slack // 2 if self.crop_rounding == "down" else round(slack / 2)


def encoder_rule(size: Any, image_size: int) -> ResizeCrop:
  """Returns the preprocessing that a models.clip.ClipConfig or models.spec.EncoderConfig says."""
  return ResizeCrop(image_size, {"shortest": "center"}.get(size.resize, size.resize), resample=size.resample,
                    resize_to=size.resize_to, crop_rounding=size.crop_rounding, fill_color=size.fill_color)


def resize_shortest_edge(image: Image.Image, size: int) -> tuple[int, int]:
  """Returns (width, height) with the shortest side `size` pixels; raises UserError if the other is beyond measure."""
  width, height = image.size
  short = min(width, height)
  width, height = int(size * width / short), int(size * height / short)
  if width * height > MAX_PIXELS:
    raise UserError(f"image of {image.width} × {image.height} pixels would be scaled to {width} × {height}; "
                    f"at most {MAX_PIXELS:,} pixels are handled")
  return width, height


def longest(image: Image.Image, size: int) -> tuple[int, int]:
  """Returns (width, height) with the longest side `size` pixels; raises UserError if nothing is left of the other."""
  ratio = max(image.size) / size
  width, height = (round(side / ratio) for side in image.size)
  if not (width and height):
    raise UserError(f"image of {image.width} × {image.height} pixels would be scaled to {width} × {height}")
  return width, height


def random_box(width: int, height: int, scale: Sequence[float], rng: np.random.Generator) -> tuple[int, int, int, int]:
  """Returns (left, top, right, bottom) of a random box: a share `scale` of the area, sides in a ratio within RATIO.

  The ratio is drawn evenly in its logarithm. After ten draws that do not fit it is the largest central box of the
  nearest ratio. Source: torchvision.transforms.RandomResizedCrop.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
      return left, top, left + w, top + h
  ratio = min(max(width / height, RATIO[0]), RATIO[1])
  w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


@dataclass(frozen=True)
class Images:
  """Several images out of the one decoded, by name; each rule draws the same random numbers."""

  rules: tuple[tuple[str, ResizeCrop], ...]

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    start = rng.bit_generator.state if rng is not None else None
    out = dict(record)
    for name, rule in self.rules:
      if rng is not None:
        rng.bit_generator.state = start
      out[name] = rule(record, rng)["image"]
    return out


def one_text(record: Record, rng: np.random.Generator | None) -> str:
  """Returns a text of the record: of several a random one, or the first if there is no rng."""
  if rng is not None and "texts" in record:
    return record["texts"][rng.integers(len(record["texts"]))]
  return record["text"]


@dataclass(frozen=True)
class Tokenize:
  """Adds "tokens": int32 [length], start, ids, end, 0 …: what CLIP's text tower reads."""

  tokenizer: Tokenizer
  length: int

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    return record | {"tokens": self.tokenizer(one_text(record, rng), self.length)[0]}


@dataclass(frozen=True)
class TokenizeCaption:
  """Adds "tokens": int32 [length], ids, end, end …, and "mask": bool [length], True up to the first end.

  This is what a language model learns to write. A text too long loses its last ids and has no end then: it would teach
  to stop in the middle of a sentence. With `start` the end of another text comes first.
  """

  tokenizer: Tokenizer
  length: int
  start: bool = False

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    eot = self.tokenizer.eot
    ids = [*[eot] * self.start, *self.tokenizer.encode(one_text(record, rng)), eot][: self.length]
    tokens = np.full(self.length, eot, np.int32)
    tokens[: len(ids)] = ids
    return record | {"tokens": tokens, "mask": np.arange(self.length) < len(ids)}


@dataclass(frozen=True)
class Select:
  """Only these entries, those that are there; whole numbers as int32."""

  names: tuple[str, ...]

  def __call__(self, record: Record, rng: np.random.Generator | None) -> Record:
    kept = {k: record[k] for k in self.names if k in record}
    return {k: np.int32(v) if isinstance(v, int) else v for k, v in kept.items()}
