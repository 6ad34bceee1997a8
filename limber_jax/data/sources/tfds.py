"""Prepared TensorFlow Datasets, read as random-access ArrayRecord files, without TensorFlow."""

import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax.config import Source, Unnamed
from limber_jax.data.sources.annotations import captions_of
from limber_jax.errors import UserError, did_you_mean

INFO = "dataset_info.json"
CERTAIN = "_no_difficult"  # of a second sequence of labels
TEXT_KEYS = ("caption", "captions", "text", "title", "sentence", "sentences", "description")  # the likeliest first


@dataclass
class TfdsConfig(Source):
  """A split of a dataset that TFDS has prepared with file_format="array_record".

  path: the dataset's directory (the one with dataset_info.json, or one above it that holds no other dataset), or its
    name below the TFDS data directory ($TFDS_DATA_DIR, or ~/tensorflow_datasets): food101, or coco_captions/2014.
  split: as TFDS has it: train, or train[:10%].
  image_key: "" = the first image feature.
  text_key: "" = the first of caption, captions, text, title …; "captions/text" for text inside a sequence. A sequence
    gives all its texts. With no text feature at all, the text is the name of the class.
  label_key: "" = the first class label, or sequence of class labels. Of a sequence such as "labels", with a second one
    "labels_no_difficult" beside it, records have these as "labels", and what only difficult objects have as
    "difficult". Of clevr it may be "count", how many objects there are, and of kitti "distance", that of the nearest
    vehicle: the classes "3" to "10", and "near", "nearby", "far" and "none".
  """

  name: str = "tfds"
  path: str = ""        # the data set's directory, or its name below the TFDS data directory
  split: str = Unnamed("train")  # as TFDS has it: train[:10%]
  image_key: str = ""   # an image feature; "" = the first
  text_key: str = ""    # a text feature; "" = the first known name
  label_key: str = ""   # a class label, or a sequence of them; "" = the first

  def open(self) -> "Tfds":
    return Tfds(self)

  def splits(self) -> tuple[str, ...]:
    return tuple(_library().builder_from_directory(_directory(self.path)).info.splits)


class Tfds:
  """A `TfdsConfig` whose data are open."""

  def __init__(self, config: TfdsConfig):
    self._config = config
    self._directory = _directory(config.path)
    tfds = _library()
    builder = tfds.builder_from_directory(self._directory)
    features, self._name = builder.info.features, builder.info.full_name
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(_inner(f), tfds.features.ClassLabel)
              and k.removesuffix(CERTAIN) not in features.keys() - {k}]
    derived = {key: made for name, key, *made in DERIVED if name == builder.name}
    texts = _texts(features)
    likely = [k for name in TEXT_KEYS for k in texts if k.split("/")[0] == name]
    self._image = self._choose("image_key", images, images)
    self._label = self._choose("label_key", [*labels, *derived], [*labels, *derived])
    self._text = self._choose("text_key", texts, likely)
    if self._image is None or (self._text is None and self._label is None):
      raise UserError(f"{self._name}: wanted an image feature and a text or class label; has {', '.join(features)}")
    self.classes = tuple(_inner(features[self._label]).names) if self._label in labels else None
    self._several = self._label in labels and _inner(features[self._label]) is not features[self._label]
    self._certain = f"{self._label}{CERTAIN}" if f"{self._label}{CERTAIN}" in features else self._label
    self._derive: Callable[[dict[str, Any]], int] | None = None
    if self._label in derived:
      self.classes, self._derive = derived[self._label]
    # Images stay encoded, so that decoding is done in one place (and TFDS does not ask for TensorFlow or OpenCV).
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    try:
      self._records = builder.as_data_source(split=config.split, decoders=decoders)
    except NotImplementedError as error:  # what TFDS says of a format without random access
      raise UserError(f"{self._name} was prepared as {builder.info.file_format}, which has no random access; prepare "
                      "it again with file_format='array_record'") from error
    except ValueError as error:
      raise UserError(f"config.data.source.split: {self._name} has no split {config.split!r}"
                      f"{did_you_mean(config.split, builder.info.splits)}") from error
    digest = hashlib.sha256(repr((self._name, config.split, len(self), self._image, self._text, self._label)).encode())
    for name, split in sorted(builder.info.splits.items()):
      digest.update(repr((name, split.shard_lengths, split.num_bytes)).encode())
    self._digest = digest.hexdigest()[:16]

  def _choose(self, field: str, fitting: list[str], likely: list[str]) -> str | None:
    """Returns the feature that a field of the configuration names; for "" the first likely one, None without any."""
    wanted = getattr(self._config, field)
    if wanted and wanted not in fitting:
      raise UserError(f"config.data.source.{field}: {self._name} has no such feature {wanted!r}"
                      f"{did_you_mean(wanted, fitting)}")
    return wanted or next(iter(likely), None)

  def __len__(self) -> int:
    return len(self._records)

  def annotation(self, index: int) -> dict[str, Any]:
    return {k: v for k, v in self[index].items() if k != "image"}

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self._records[index]
    out = {"id": f"{self._name}/{self._config.split}/{index}", "image": record[self._image]}
    if self._several:
      certain = tuple(int(i) for i in record[self._certain])
      out |= {"labels": certain, "difficult": tuple(int(i) for i in record[self._label] if i not in certain)}
    elif self._label is not None:
      try:
        out["label"] = self._derive(record) if self._derive else int(record[self._label])
      except UserError as error:
        raise UserError(f"{out['id']}: {error}") from error
    if self._text is None:
      names = [self.classes[i] for i in (out["labels"] if self._several else [out["label"]])]
      return out | {"text": ", ".join(names).replace("_", " ")}
    value = functools.reduce(lambda value, key: value[key], self._text.split("/"), record)
    texts = (value,) if isinstance(value, bytes) else tuple(value)
    if not texts:
      raise UserError(f"{self._name}: record {index} has no text in {self._text!r}")
    try:
      return out | captions_of([t.decode("utf-8", "replace") for t in texts])
    except UserError as error:
      raise UserError(f"{out['id']}: {error}") from error

  def files(self) -> Iterator[str]:
    yield from (os.path.join(self._directory, name) for name in sorted(os.listdir(self._directory)))

  def fingerprint(self) -> str:
    return self._digest


def _library() -> Any:
  """Returns the module tensorflow_datasets."""
  import tensorflow_datasets  # here: it takes a second, and who names this source may not open it

  return tensorflow_datasets


def _directory(path: str) -> str:
  """Returns the directory with dataset_info.json that `path` stands for."""
  root = os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets"))
  start = path if os.path.isdir(path) else os.path.join(root, path)
  found = sorted({os.path.dirname(f) for depth in ("", "*/", "*/*/", "*/*/*/")
                  for f in glob.glob(os.path.join(glob.escape(start), depth, INFO))}) if path else []
  if not found:
    raise UserError(
      f"config.data.source.path={path!r}: no prepared TFDS dataset there or in {root}; wanted a directory with {INFO} "
      f"such as {root}/food101/2.0.0. To prepare one: python -c \"import tensorflow_datasets as tfds; "
      "tfds.builder('food101', file_format='array_record').download_and_prepare()\"; then "
      "--config.data.source.path=food101, or its directory")
  if len(found) > 1:
    raise UserError(f"config.data.source.path={path!r} holds several datasets; choose one: {', '.join(found)}")
  return found[0]


def _inner(feature: Any) -> Any:
  """Returns what a sequence holds; of any other feature itself."""
  return feature.feature if isinstance(feature, _library().features.Sequence) else feature


def _count(record: dict[str, Any]) -> int:
  """Returns the class of a CLEVR image: its 3 to 10 objects less 3."""
  count = len(record["objects"]["size"])
  if not 3 <= count <= 10:
    raise UserError(f"wanted 3 to 10 objects, got {count}; the test split of CLEVR has none, for its scenes are secret")
  return count - 3


def _distance(record: dict[str, Any]) -> int:
  """Returns how far the nearest car, van or truck of a KITTI image is: 0 up to 8 m, 1 up to 20 m, 2 further, 3 none.

  Source: X. Zhai et al., arXiv 1910.04867, and its code.
  """
  vehicles = np.asarray(record["objects"]["type"]) < 3  # Car, Van, Truck
  if not vehicles.any():
    return 3
  return int(np.searchsorted([8, 20], np.asarray(record["objects"]["location"])[vehicles, 2].min()))


# Labels that are no features but follow from some: builder, label_key, classes, record -> label.
DERIVED = (
  ("clevr", "count", tuple(map(str, range(3, 11))), _count),
  ("kitti", "distance", ("near", "nearby", "far", "none"), _distance),
)


def _texts(features: Any, prefix: str = "") -> list[str]:
  """Returns the paths of all text features: "title", "captions/text"."""
  tfds, out = _library(), []
  for name, feature in features.items():
    feature = getattr(feature, "feature", feature)  # what a sequence holds
    if isinstance(feature, tfds.features.FeaturesDict):
      out += _texts(feature, f"{prefix}{name}/")
    elif isinstance(feature, tfds.features.Text):
      out.append(prefix + name)
  return out
