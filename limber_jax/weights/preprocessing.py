"""How an image becomes the pixels of a model, as other libraries write it beside their weights, and back.

    transformers  preprocessor_config.json, or "image_processor" of processor_config.json
    open_clip     "preprocess_cfg" of open_clip_config.json
    timm          "pretrained_cfg" of config.json

What comes out are the fields `models.spec.PIXELS` of a size. Whatever these files ask for that cannot be done here, and
whatever contradicts the model, is refused by its name: nothing is guessed.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from limber_jax.errors import UserError
from limber_jax.models import spec
from limber_jax.models.spec import IMAGENET_MEAN, IMAGENET_STD

HALF = (0.5,) * 3
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers


@dataclass(frozen=True)
class Preprocessing:
  """The fields `models.spec.PIXELS` of a size, and what they are where nothing is said: CLIP's own."""

  mean: tuple[float, ...] = spec.MEAN  # of uint8 / 255
  std: tuple[float, ...] = spec.STD
  resize: str = "shortest"
  resample: str = "bicubic"
  resize_to: int = 0
  crop_rounding: str = "even"
  fill_color: int = 0

  @classmethod
  def from_config(cls, size: Any) -> "Preprocessing":
    """Returns that of a ClipConfig or EncoderConfig."""
    return cls(**{name: getattr(size, name) for name in spec.PIXELS})


@dataclass(frozen=True)
class _Processor:
  """What an image processor of transformers does where its file is silent."""

  size: dict[str, int]
  square: bool           # what a size of one number means: both sides, or the shortest
  crops: bool
  crop: int | None       # pixels
  resample: int
  mean: tuple[float, ...]
  std: tuple[float, ...]


_CLIP = _Processor({"shortest_edge": 224}, False, True, 224, 3, spec.MEAN, spec.STD)
# Those that resize, crop, rescale and normalise and do nothing else, by the start of their name.
PROCESSORS = {
  "CLIP": _CLIP, "ChineseCLIP": _CLIP, "Bit": _CLIP,
  "ViT": _Processor({"height": 224, "width": 224}, True, False, None, 2, HALF, HALF),
  "DeiT": _Processor({"height": 256, "width": 256}, True, True, 224, 3, HALF, HALF),
  "Beit": _Processor({"height": 224, "width": 224}, True, False, 224, 3, HALF, HALF),
  "Siglip": _Processor({"height": 224, "width": 224}, False, False, None, 3, HALF, HALF),
  "Blip": _Processor({"height": 384, "width": 384}, True, False, None, 3, spec.MEAN, spec.STD),
  "Pvt": _Processor({"height": 224, "width": 224}, True, False, None, 3, IMAGENET_MEAN, IMAGENET_STD),
}
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def of_hf(kind: str) -> Preprocessing:
  """Returns what the image processor of this name does by default: "CLIP" or "Beit"."""
  default = PROCESSORS[kind]
  squash = "shortest_edge" not in default.size
  return Preprocessing(default.mean, default.std, "squash" if squash else "shortest", FILTERS[default.resample],
                       crop_rounding="even" if squash else "down")


def from_hf(values: Any, image_size: int, kind: str = "CLIP") -> Preprocessing:
  """Returns what an image processor of transformers does.

  The reference is its PIL backend (CLIPImageProcessorPil). A rescale_factor is part of mean and std here.

  Args:
    values: its preprocessor_config.json.
    image_size: pixels a side that the model takes.
    kind: "CLIP" or "Beit": which one it is where the file does not say.

  Raises:
    UserError: it does something else than is done here, or contradicts the model; the message names the field.
  """
  if not isinstance(values, dict):
    raise UserError(f"image_processor: expected a JSON object, got {values!r}")
  named = values.get("image_processor_type") or values.get("feature_extractor_type") or f"{kind}ImageProcessor"
  known = re.fullmatch(r"(.*)(ImageProcessor|FeatureExtractor)(Fast|Pil)?", str(named))
  if not known or known[1] not in PROCESSORS:
    raise UserError(f"image_processor_type is {named!r}; those read here: "
                    + ", ".join(f"{name}ImageProcessor" for name in PROCESSORS))
  default = PROCESSORS[known[1]]
  for name, value in values.items():
    if name in _SWITCHES and value is not None and type(value) is not bool:  # null is no, there
      raise UserError(f"{name} is {value!r}, expected true or false")
    if value and name not in _SWITCHES and (name.startswith("do_") or name in ("reduce_labels", "use_square_size")):
      raise UserError(f"{name} is {value!r}, which is not done here")
  resizes, crops = values.get("do_resize", True), values.get("do_center_crop", default.crops)
  resize, side = "native", 0
  if resizes:
    square = values.get("default_to_square", default.square)
    resize, side = _resize("size", values.get("size", default.size), square)
  if crops:
    end, field = _resize("crop_size", values.get("crop_size", default.crop), True), "crop_size"
    if end[0] != "squash":
      raise UserError(f"crop_size is {values['crop_size']!r}, expected height and width")
    final = end[1]
  elif resize == "squash":
    final, field = side, "size"
  else:
    raise UserError(f"do_center_crop is false, and {'size is the shortest edge' if resizes else 'do_resize too'}: "
                    "images would come out of different sizes, and the model takes one")
  _fits(field, final, image_size)
  mean, std = _folded(values, default)
  exact = resize == "squash" and side == final
  return Preprocessing(mean, std, resize, _filter(values.get("resample", default.resample)) if resizes else "bicubic",
                       side if resizes and side != image_size else 0, "even" if exact else "down")


def _resize(name: str, value: Any, square: bool) -> tuple[str, int]:
  """Returns ("squash" or "shortest", pixels) of a size as transformers has it."""
  if isinstance(value, dict):
    if value.keys() == {"shortest_edge"}:
      return "shortest", _pixels(name, value["shortest_edge"])
    if value.keys() != {"height", "width"}:
      raise UserError(f"{name} is {value!r}; those read here: height and width, or shortest_edge")
    value = [value["height"], value["width"]]
  if isinstance(value, list | tuple) and len(value) == 2:
    if value[0] != value[1]:
      raise UserError(f"{name} is {value[0]!r} × {value[1]!r}, expected a square")
    return "squash", _pixels(name, value[0])
  return "squash" if square else "shortest", _pixels(name, value)


def _folded(values: dict[str, Any], default: _Processor) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Returns mean and std of uint8 / 255, by which the numbers of another scale come out."""
  factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) else 1
  scale = 255 * _number("rescale_factor", factor)
  if scale <= 0:
    raise UserError(f"rescale_factor is {factor!r}, expected a number above 0")
  mean, std = (0.0,) * 3, (1.0,) * 3
  if values.get("do_normalize", True):
    mean = _triple("image_mean", values.get("image_mean", default.mean))
    std = _triple("image_std", values.get("image_std", default.std))
  return tuple(x / scale for x in mean), tuple(x / scale for x in std)


def _filter(value: Any) -> str:
  if type(value) is not int or not 0 <= value < len(FILTERS):
    raise UserError(f"resample is {value!r}, expected one of PIL's numbers, 0 to {len(FILTERS) - 1}")
  return FILTERS[value]


def from_open_clip(values: Any, image_size: int) -> Preprocessing:
  """Returns what open_clip does at test with a "preprocess_cfg"; raises UserError as `from_hf`.

  "random" as interpolation is for training: at test it is bicubic.
  """
  if not isinstance(values, dict):
    raise UserError(f"preprocess_cfg: expected a JSON object, got {values!r}")
  values = {name: value for name, value in values.items() if value is not None}
  what = "preprocess_cfg."
  for name, allowed in (("mode", ("RGB",)), ("resize_mode", ("shortest", "squash", "longest")),
                        ("interpolation", ("bicubic", "bilinear", "random"))):
    if name in values and values[name] not in allowed:
      raise UserError(f"{what}{name} is {values[name]!r}, expected {' or '.join(allowed)}")
  if "size" in values:
    _fits(f"{what}size", _resize(f"{what}size", values["size"], True)[1], image_size)
  fill = values.get("fill_color", 0)
  if type(fill) is not int or not 0 <= fill <= 255:
    raise UserError(f"{what}fill_color is {fill!r}, expected a grey, 0 to 255")
  # What is empty or 0 counts as not given there.
  mean, std = (_triple(f"{what}{name}", values.get(name) or default)
               for name, default in (("mean", spec.MEAN), ("std", spec.STD)))
  return Preprocessing(mean, std, values.get("resize_mode", "shortest"),
                       "bilinear" if values.get("interpolation") == "bilinear" else "bicubic", fill_color=fill)


def from_timm(values: dict[str, Any], image_size: int) -> Preprocessing | None:
  """Returns what timm does at test with the "pretrained_cfg" of a config.json; None if nothing is said there.

  Raises UserError as `from_hf`.
  """
  values = values.get("pretrained_cfg", values)
  if not isinstance(values, dict):
    raise UserError(f"pretrained_cfg: expected a JSON object, got {values!r}")
  said = {name: values[name] for name in ("crop_pct", "crop_mode", "interpolation", "mean", "std")
          if values.get(name) is not None}
  if not said:
    return None
  if values.get("fixed_input_size"):
    _fits("input_size", _resize("input_size", list(values.get("input_size", ()))[1:], True)[1], image_size)
  share = _number("crop_pct", said.get("crop_pct") or 0.875)
  if not 0 < share <= 1:
    raise UserError(f"crop_pct is {share!r}, expected a share of the side, above 0 and at most 1")
  mode, resample = said.get("crop_mode", "center"), said.get("interpolation", "bicubic")
  if mode not in ("center", "squash"):
    raise UserError(f"crop_mode is {mode!r}, expected center or squash")
  if resample not in FILTERS:
    raise UserError(f"interpolation is {resample!r}, expected one of {', '.join(FILTERS)}")
  side = math.floor(image_size / share)
  return Preprocessing(_triple("mean", said.get("mean", IMAGENET_MEAN)), _triple("std", said.get("std", IMAGENET_STD)),
                       {"center": "shortest"}.get(mode, mode), resample, side if side != image_size else 0)


def to_hf(size: Any, image_size: int) -> dict[str, Any]:
  """Returns the preprocessor_config.json of a ClipConfig; raises UserError if a CLIPImageProcessor cannot do it.

  It rounds the place of its crop down: of a model that rounds to even, images with an odd number of pixels to cut
  may come out one pixel further up or left.
  """
  pads = size.resize == "native" or 0 < size.resize_to < image_size
  if size.resize == "longest" or (size.fill_color and pads):
    what = f"fill_color={size.fill_color}" if size.resize != "longest" else "resize='longest'"
    raise UserError(f"transformers' CLIPImageProcessor cannot do what this model has, {what}; use --to=open_clip or "
                    "limber")
  side = size.resize_to or image_size
  squash = size.resize == "squash"
  return {
    "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True,
    "do_resize": size.resize != "native", "resample": FILTERS.index(size.resample),
    "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
    "do_center_crop": not squash or side != image_size, "crop_size": {"height": image_size, "width": image_size},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(size.mean), "image_std": list(size.std),
  }


def to_open_clip(size: Any, image_size: int) -> dict[str, Any]:
  """Returns the "preprocess_cfg" of a ClipConfig; raises UserError if open_clip cannot do it.

  It rounds the place of its crop to even: see `to_hf`.
  """
  allowed = {"resize": ("shortest", "squash", "longest"), "resample": ("bicubic", "bilinear"),
             "resize_to": (0, image_size)}
  for name, values in allowed.items():
    if (ours := getattr(size, name)) not in values:
      raise UserError(f"open_clip's preprocess_cfg cannot say what this model has, "
                      f"{name}={ours!r}; use --to=hf or limber")
  return {"size": image_size, "mode": "RGB", "mean": list(size.mean), "std": list(size.std),
          "interpolation": size.resample, "resize_mode": size.resize, "fill_color": size.fill_color}


def otherwise(size: Any, image_size: int, to: str) -> str:
  """Returns what another library makes of an exported ClipConfig otherwise, in a sentence; "" if it does the same."""
  theirs = {"hf": "down", "open_clip": "even"}.get(to, size.crop_rounding)
  cuts = size.resize in ("shortest", "native") or (size.resize == "squash" and size.resize_to not in (0, image_size))
  if theirs == size.crop_rounding or not cuts:
    return ""
  where = "up or left" if theirs == "down" else "down or right"
  return f"where an odd number of pixels is to be cut off, it may cut one pixel further {where} than here"


def _fits(name: str, side: int, image_size: int) -> None:
  if side != image_size:
    raise UserError(f"{name} is {side}, but the model takes {image_size} pixels a side")


def _pixels(name: str, value: Any) -> int:
  if type(value) is not int or value < 1:
    raise UserError(f"{name}: expected a number of pixels, got {value!r}")
  return value


def _number(name: str, value: Any) -> float:
  if type(value) not in (int, float) or not math.isfinite(value):
    raise UserError(f"{name} is {value!r}, expected a number")
  return float(value)


def _triple(name: str, value: Any) -> tuple[float, ...]:
  """Returns a number for each of red, green and blue; of one number three times it. None of a std's may be 0."""
  values = list(value) if isinstance(value, list | tuple) else [value] * 3
  if len(values) != 3:
    raise UserError(f"{name} is {value!r}, expected three numbers")
  out = tuple(_number(name, x) for x in values)
  if name.endswith("std") and 0 in out:
    raise UserError(f"{name} is {value!r}, and nothing can be divided by 0")
  return out
