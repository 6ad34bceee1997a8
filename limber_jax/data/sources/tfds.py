"""Prepared TensorFlow Datasets, read as random-access ArrayRecord files, without TensorFlow."""

import functools
import glob
import hashlib
import os
from typing import Any

import tensorflow_datasets as tfds

from limber_jax.config import Source
from limber_jax.errors import UserError, did_you_mean

INFO = "dataset_info.json"
TEXT_KEYS = ("caption", "captions", "text", "title", "sentence", "sentences", "description")  # the likeliest first


class Tfds:
  """A split of a dataset that TFDS has prepared with file_format="array_record".

  path: the dataset's directory (the one with dataset_info.json, or one above it that holds no other dataset), or its
    name below the TFDS data directory ($TFDS_DATA_DIR, or ~/tensorflow_datasets): food101, or coco_captions/2014.
  split: as TFDS has it: train, or train[:10%].
  image_key: "" = the first image feature.
  text_key: "" = the first of caption, captions, text, title …; "captions/text" for text inside a sequence. A sequence
    gives all its texts. With no text feature at all, the text is the name of the class.
  label_key: "" = the first class label.
  """

  def __init__(self, config: Source):
    self._config = config
    builder = tfds.builder_from_directory(_directory(config.path))
    features, self._name = builder.info.features, builder.info.full_name
    images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
    labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    texts = _texts(features)
    likely = [k for name in TEXT_KEYS for k in texts if k.split("/")[0] == name]
    self._image = self._choose("image_key", images, images)
    self._label = self._choose("label_key", labels, labels)
    self._text = self._choose("text_key", texts, likely)
    if self._image is None or (self._text is None and self._label is None):
      raise UserError(f"{self._name}: wanted an image feature and a text or class label; has {', '.join(features)}")
    self.classes = tuple(features[self._label].names) if self._label else None
    # Images stay encoded, so that decoding is done in one place (and TFDS does not ask for TensorFlow or OpenCV).
    decoders = {key: tfds.decode.SkipDecoding() for key in images}
    try:
      self._records = builder.as_data_source(split=config.split, decoders=decoders)
    except NotImplementedError as error:
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
    if self._label is not None:
      out["label"] = int(record[self._label])
    if self._text is None:
      return out | {"text": self.classes[out["label"]].replace("_", " ")}
    value = functools.reduce(lambda value, key: value[key], self._text.split("/"), record)
    texts = (value,) if isinstance(value, bytes) else tuple(value)
    if not texts:
      raise UserError(f"{self._name}: record {index} has no text in {self._text!r}")
    texts = tuple(t.decode("utf-8", "replace") for t in texts)
    return out | ({"text": texts[0], "texts": texts} if len(texts) > 1 else {"text": texts[0]})

  def fingerprint(self) -> str:
    return self._digest


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


def _texts(features: Any, prefix: str = "") -> list[str]:
  """Returns the paths of all text features: "title", "captions/text"."""
  out = []
  for name, feature in features.items():
    feature = getattr(feature, "feature", feature)  # what a sequence holds
    if isinstance(feature, tfds.features.FeaturesDict):
      out += _texts(feature, f"{prefix}{name}/")
    elif isinstance(feature, tfds.features.Text):
      out.append(prefix + name)
  return out
