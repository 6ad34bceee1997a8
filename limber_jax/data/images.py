"""Image files: which formats are read, and how their pixels become RGB of 8 bits."""

import io
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from absl import flags
from PIL import Image

from limber_jax.data import bounds
from limber_jax.errors import UserError, did_you_mean

FORMATS = ("JPEG", "PNG", "WEBP")
MORE = ("gif", "bmp", "tiff", "avif")  # read where they are asked for; of several frames or pages the first

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")  # of FORMATS
_SUFFIXES = {"tiff": (".tif", ".tiff")}

# What the EXIF orientations 2 to 8 ask for.
_TURNS = dict(enumerate((
  Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
  Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), 2))
_ORIENTATION, _SHORT = 0x0112, 3  # a tag of EXIF, and its type


class _Data(Protocol):
  formats: tuple[str, ...]
  exif: bool


@dataclass(frozen=True)
class ImageOptions:
  """Which image files are read and which way up; the defaults are what open_clip and torchvision do.

  formats: those of MORE that are read beside FORMATS.
  exif: images are turned as their EXIF orientation says.
  """

  formats: tuple[str, ...] = ()
  exif: bool = False

  def __post_init__(self):
    for name in self.formats:
      if name not in MORE:
        raise UserError(f"config.data.formats={self.formats!r}: no format {name!r}{did_you_mean(name, MORE)}")

  @classmethod
  def from_config(cls, data: _Data) -> "ImageOptions":
    """Returns those of `config.Data`, a flag's "gif,bmp" as two; raises UserError if there is no such format."""
    return cls(tuple(name.strip() for given in data.formats for name in given.split(",")), data.exif)

  @property
  def suffixes(self) -> tuple[str, ...]:
    """How the names of such files end."""
    return SUFFIXES + tuple(s for name in self.formats for s in _SUFFIXES.get(name, (f".{name}",)))

  @property
  def known(self) -> tuple[str, ...]:
    """The formats, as Pillow names them."""
    return FORMATS + tuple(name.upper() for name in self.formats)

  def changes(self) -> dict[str, object]:
    """Returns the options that are not the defaults, as JSON has them."""
    return ({"formats": sorted(self.formats)} if self.formats else {}) | ({"exif": True} if self.exif else {})


PLAIN = ImageOptions()


class ImageFlags:
  """The flags of commands that read image files of no experiment."""

  def __init__(self):
    """Defines them."""
    self._formats = flags.DEFINE_list("formats", None, f"Read beside JPEG, PNG and WebP: {', '.join(MORE)}; as "
                                      "config.data.formats.")
    self._exif = flags.DEFINE_bool("exif", None, "Turn images as their EXIF orientation says; as config.data.exif.")

  def options(self, own: ImageOptions = PLAIN) -> ImageOptions:
    """Returns what the flags say, and `own` where they say nothing; raises UserError if there is no such format."""
    formats = own.formats if self._formats.value is None else tuple(f.lower() for f in self._formats.value if f)
    return ImageOptions(formats, own.exif if self._exif.value is None else self._exif.value)


def turned(file: Image.Image) -> Image.Transpose | None:
  """Returns what the EXIF orientation of an opened file asks for; None where it says nothing, or what is none.

  Pillow turns TIFF files by itself when it loads them.
  """
  exif = file.info.get("exif", b"")
  return _TURNS.get(_orientation(exif.removeprefix(b"Exif\0\0"))) if isinstance(exif, bytes) else None


def _orientation(tiff: bytes) -> int:
  """Returns the orientation in EXIF data, 0 where there is none or they are damaged, of which Pillow would warn."""
  order = {b"II": "<", b"MM": ">"}.get(tiff[:2], "")
  try:
    start = struct.unpack_from(f"{order}I", tiff, 4)[0]
    for entry in range(struct.unpack_from(f"{order}H", tiff, start)[0] if order else 0):
      tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
      if (tag, kind) == (_ORIENTATION, _SHORT):
        return value
  except struct.error:
    pass  # cut short: as if it said nothing
  return 0


def to_rgb(image: Image.Image) -> Image.Image:
  """Returns a decoded image in RGB: 16 bits of grey scaled to 8, every other mode as PIL's convert("RGB") has it.

  The upper byte is taken of 16 bits, which is what PIL itself does to colours of 16 bits and OpenCV to both: so what
  was recorded with 12 bits and stored with 16 is dark. PIL's conversion of 16-bit grey would clip it at 255, to white.

  Raises:
    UserError: pixels of 32 bits, of which nothing says what is white.
  """
  if image.mode == "RGB":
    return image
  if image.mode.startswith("I;16"):
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
  if image.mode in ("I", "F") or image.mode.startswith("I;"):
    what = "floating-point numbers" if image.mode == "F" else "whole numbers of 32 bits"
    raise UserError(f"image of mode {image.mode!r}: its pixels are {what}, and nothing says which is white; convert it "
                    "to 8 or 16 bits first")
  return image.convert("RGB")


def sniff(data: bytes) -> tuple[str, Image.Transpose | None]:
  """Returns (which of FORMATS and MORE a file is, as Pillow names it, or ""; what its EXIF orientation asks for)."""
  try:
    bounds.check_parts(data)
    with Image.open(io.BytesIO(data), formats=[*FORMATS, *(name.upper() for name in MORE)]) as image:
      return {"MPO": "JPEG"}.get(image.format, image.format), turned(image)  # JPEG files that hold several images
  except Exception:  # as in transforms.decode_image
    return "", None
