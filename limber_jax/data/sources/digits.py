"""scikit-learn's bundled handwritten digits with captions in words: real images, no download."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from limber_jax.config import Source, Unnamed
from limber_jax.errors import UserError, did_you_mean

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Nine, because the data run through the digits in order: ten would give each digit a caption of its own.
TEMPLATES = (
  "{}", "the digit {}", "the number {}", "a handwritten {}", "a handwritten digit {}", "a photo of the digit {}",
  "a photo of the number {}", "a bad photo of the {}", "a photo of the small {}",
)

SIZE = 32  # pixels
SPLITS = ("train", "test", "all")


@dataclass
class DigitsConfig(Source):
  """The 1,797 images of sklearn.datasets.load_digits, 8 × 8 grey levels 0..16, as uint8 RGB of 32 × 32 (bicubic).

  The caption is a sentence around the digit's name, chosen by the record's number.

  split: train (1,437 records), test (360) or all: a fixed fifth of each digit is held out. Both splits hold digits of
    the same 13 writers.
  pairs: captions are two such sentences about the same digit, with a semicolon between, as in a text that stays with
    what it speaks of.

  Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
  """

  paths = ()  # the library has them

  name: str = "digits"
  split: str = Unnamed("train")  # train | test | all
  pairs: bool = False  # captions are two sentences about the same digit

  def open(self) -> "Digits":
    return Digits(self)

  def splits(self) -> tuple[str, ...]:
    return SPLITS


class Digits:
  """A `DigitsConfig` whose data are open."""

  classes = CLASSES

  def __init__(self, config: DigitsConfig):
    from sklearn.datasets import load_digits  # here: it takes seconds, and who names this source may not open it

    data = load_digits()
    self._label = data.target
    # RandomState's stream is frozen for ever; that of default_rng may change with numpy.
    shuffled = np.random.RandomState(0).permutation(len(self._label))
    ordered = shuffled[np.argsort(self._label[shuffled], kind="stable")]  # by digit, shuffled within each
    held_out = np.zeros(len(ordered), bool)
    held_out[ordered[::5]] = True
    splits = dict(zip(SPLITS, (np.flatnonzero(~held_out), np.flatnonzero(held_out), np.arange(len(held_out))),
                      strict=True))
    if config.split not in splits:
      raise UserError(f"config.data.source.split: 'digits' has no split {config.split!r}"
                      f"{did_you_mean(config.split, splits)}")
    self._pairs = config.pairs
    self._number = splits[config.split]  # of each record among all images
    small = np.round(data.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    self._images = np.stack([Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for i in small])

  def __len__(self) -> int:
    return len(self._number)

  def annotation(self, index: int) -> dict[str, Any]:
    number = int(self._number[index])
    label = int(self._label[number])
    first = number % len(TEMPLATES)
    second = (first + 1 + number // len(TEMPLATES) % (len(TEMPLATES) - 1)) % len(TEMPLATES)  # any but the first
    texts = [TEMPLATES[i].format(CLASSES[label]) for i in ((first, second) if self._pairs else (first,))]
    return {"id": f"digits/{number}", "text": "; ".join(texts), "label": label}

  def __getitem__(self, index: int) -> dict[str, Any]:
    grey = self._images[self._number[index]]  # [32, 32]
    return {**self.annotation(index), "image": np.repeat(grey[..., None], 3, axis=-1)}

  def files(self) -> Iterator[str]:
    yield from ()

  def fingerprint(self) -> str:
    digest = hashlib.sha256(self._images.tobytes() + self._number.astype("<i8").tobytes())
    digest.update(repr([self.annotation(i)["text"] for i in range(len(self))]).encode())
    return digest.hexdigest()[:16]
