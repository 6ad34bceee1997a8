"""scikit-learn's bundled handwritten digits with captions in words: real images, no download."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from limber_jax.config import Source
from limber_jax.errors import UserError, did_you_mean

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Nine, because the data run through the digits in order: ten would give each digit a caption of its own.
TEMPLATES = (
  "{}", "the digit {}", "the number {}", "a handwritten {}", "a handwritten digit {}", "a photo of the digit {}",
  "a photo of the number {}", "a bad photo of the {}", "a photo of the small {}",
)

SIZE = 32  # pixels


class Digits:
  """The 1,797 images of sklearn.datasets.load_digits, 8 × 8 grey levels 0..16, as uint8 RGB of 32 × 32 (bicubic).

  `split` is train (1,437 records), test (360) or all: a fixed fifth of each digit is held out. Both splits hold
  digits of the same 13 writers. The caption is a sentence around the digit's name, chosen by the record's number.
  `text_key` is empty or "pair": two captions of the same digit, with a semicolon between, as in a text that stays with
  what it speaks of. No other field of the configuration is used.

  Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
  """

  classes = CLASSES

  def __init__(self, config: Source):
    data = load_digits()
    self._label = data.target
    # RandomState's stream is frozen for ever; that of default_rng may change with numpy.
    shuffled = np.random.RandomState(0).permutation(len(self._label))
    ordered = shuffled[np.argsort(self._label[shuffled], kind="stable")]  # by digit, shuffled within each
    held_out = np.zeros(len(ordered), bool)
    held_out[ordered[::5]] = True
    splits = {"train": np.flatnonzero(~held_out), "test": np.flatnonzero(held_out), "all": np.arange(len(held_out))}
    if config.split not in splits:
      raise UserError(f"config.data.source.split: 'digits' has no split {config.split!r}"
                      f"{did_you_mean(config.split, splits)}")
    if config.text_key not in ("", "pair"):
      raise UserError(f"config.data.source.text_key={config.text_key!r}: 'digits' has only 'pair', or leave it empty")
    self._pair = config.text_key == "pair"
    self._number = splits[config.split]  # of each record among all images
    small = np.round(data.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    self._images = np.stack([Image.fromarray(i).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for i in small])

  @staticmethod
  def splits(config: Source) -> tuple[str, ...]:
    del config
    return "train", "test", "all"

  def __len__(self) -> int:
    return len(self._number)

  def annotation(self, index: int) -> dict[str, Any]:
    number = int(self._number[index])
    label = int(self._label[number])
    first = number % len(TEMPLATES)
    second = (first + 1 + number // len(TEMPLATES) % (len(TEMPLATES) - 1)) % len(TEMPLATES)  # any but the first
    texts = [TEMPLATES[i].format(CLASSES[label]) for i in ((first, second) if self._pair else (first,))]
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
