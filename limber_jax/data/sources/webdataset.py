"""Tars of img2dataset and webdataset, read where they lie: nothing is ever extracted."""

import glob
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from limber_jax import ranges
from limber_jax.config import Source, Unnamed
from limber_jax.data.sources.annotations import OBJECT, captions_of, label_of, missing, one_object
from limber_jax.data.sources.tar_index import Rule, Shard, open_shards
from limber_jax.data.sources.tars import keeps
from limber_jax.data.text import decode
from limber_jax.errors import UserError, did_you_mean
from limber_jax.ranges import ranged
from limber_jax.runtime import inputs

WANTED = ("tars as img2dataset and webdataset write them (0000.jpg, 0000.txt, 0000.json …): a directory of them, one, "
          "or a pattern such as data/{00000..00099}.tar or 'data/*.tar'")
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = ("txt", "caption")
TEXT_KEYS = ("caption", "captions", "text", "title")  # of .json
MAX_TEXT = 2**16      # bytes of a .txt: 10,000 characters have fewer
MAX_SHARDS = 1_000_000


def shards(path: str, suffix: str, wanted: str) -> list[str]:
  """Returns the files that `path` stands for, sorted: a file, all in a directory, a glob or a pattern with braces.

  Args:
    path: as the user gave it.
    suffix: of the files in a directory, ".tar".
    wanted: what is expected there, for the message.

  Raises:
    UserError: there are none, or one that braces name is missing.
  """
  where = f"config.data.source.path={path!r}"
  point = f"wanted {wanted}; point at yours with --config.data.source.path=…"
  if not path or "\0" in path or "://" in path or path.startswith("pipe:"):
    raise UserError(f"{where}: no path of local files; {point}")
  if os.path.isfile(path):
    return [path]
  if os.path.isdir(path):
    found = sorted(f for f in glob.glob(os.path.join(glob.escape(path), f"*{suffix}")) if os.path.isfile(f))
    if not found:
      names = sorted(os.listdir(path))
      there = f"it has {', '.join(names[:5])}{' …' * (len(names) > 5)}" if names else "it is empty"
      raise UserError(f"{where}: no {suffix} in this directory, {there}; {point}")
    return found
  found = []
  for name in _braces(path):
    some = [name] if os.path.isfile(name) else sorted(f for f in glob.glob(name) if os.path.isfile(f))
    if not some:
      missing = "" if name == path else f", {name!r} of this pattern"
      raise UserError(f"{where}: no such file or directory{missing}; {point}")
    found += some
  return found


def _braces(pattern: str) -> list[str]:
  """Returns "a1 a2" of "a{1..2}" and "ab ac" of "a{b,c}", as a list; numbers keep leading zeros."""
  parts = re.split(r"\{([^{}]*)\}", pattern)
  options, count = [], 1
  for i, part in enumerate(parts):
    span = re.fullmatch(r"(\d{1,15})\.\.(\d{1,15})", part)
    if i % 2 and span:
      low, high = int(span[1]), int(span[2])
      width = max(map(len, span.groups())) if any(w.startswith("0") for w in span.groups()) else 0
      choices: Any = range(low, high + 1)
      option = (f"{n:0{width}d}" for n in choices)
    else:
      choices = option = part.split(",") if i % 2 else [part]
    count *= len(choices)
    if not count or count > MAX_SHARDS:
      raise UserError(f"config.data.source.path={pattern!r}: {{{part}}} stands for {len(choices):,} names; wanted 1 to "
                      f"{MAX_SHARDS:,}, as in {{00000..00099}}")
    options.append(option)
  return ["".join(names) for names in itertools.product(*options)]


@dataclass
class WebdatasetConfig(Source):
  """A record for each key of tars, such as img2dataset downloads. A shard is a tar; all members of a key lie in one.

  path: a directory of tars, one tar, or a pattern with *, ? or {00000..00099}. Tars that are compressed as a whole have
    no random access and are refused.
  split: a folder below the directory `path`; "train" or "" where there is none such.
  image_key: the suffix of the image's name, such as png or input.jpg; "" = the first of jpg, jpeg, png, webp.
  text_key: "" = the .txt or .caption, or where a key has none caption, captions, text or title in its .json; "txt"; a
    suffix with a dot in it, such as output.txt or .prompt; or an entry of .json. A list there is several captions.
  label_key: an entry of .json with a class number; "" = no labels.
  key_dot: "last" = a key is the name before its suffix, so that IMG 3.5.jpg goes with IMG 3.5.txt; "first" = it ends at
    the first dot of the name's last part, as webdataset has it.
  incomplete: of a tar that is cut off: "refuse"; "keep" = what is whole in it is read, and the rest is named.

  A record's id is the tar's name and the key. ./0.jpg and 0.txt have one key, a/0.jpg and b/0.jpg two. Beside each tar
  lies NAME.tar.index, 62 bytes a record and its key, which makes it random-access; it is written once, from the headers
  alone, and kept in memory where it cannot be written. A tar that is shorter or longer than its index says, or that has
  no end, is named when the source is opened.

  In `damage` are members that are no files or whose names are absolute, lead out of the tar, hold a NUL, are not UTF-8
  or have more than 255 bytes, members that come twice, keys without an image or without a caption, and what a tar that
  is cut off lost. What has a suffix of another kind, as 0.url or 0.mask.png beside 0.jpg and 0.txt, counts for nothing.
  """

  name: str = "webdataset"
  path: str = ""        # a directory of tars, one tar, or a pattern with *, ? or {00000..00099}
  split: str = Unnamed("train")  # a folder below the directory
  image_key: str = ""   # the suffix of images; "" = jpg, jpeg, png or webp
  text_key: str = ""    # a suffix with a dot in it, txt, or an entry of .json; "" = what a key has
  label_key: str = ""   # an entry of .json with a class number; "" = no labels
  # the dot of a name where its key ends, last | first, as webdataset has it
  key_dot: str = ranged("last", choices=("last", "first"))
  # of a tar that is cut off: refuse it | keep what is whole in it, and name the rest
  incomplete: str = ranged("refuse", choices=("refuse", "keep"))

  def open(self) -> "Webdataset":
    return Webdataset(self)

  def splits(self) -> tuple[str, ...]:
    if not os.path.isdir(self.path) or glob.glob(os.path.join(glob.escape(self.path), "*.tar")):
      return ()
    found = glob.glob(os.path.join(glob.escape(self.path), "*", "*.tar"))
    return tuple(sorted({os.path.basename(os.path.dirname(path)) for path in found}))


class Webdataset:
  """A `WebdatasetConfig` whose data are open."""

  classes = None

  def __init__(self, config: WebdatasetConfig):
    self._config = config
    paths = shards(_split(config), ".tar", WANTED)
    self._shards, self.damage = open_shards(paths, _rule(config), keeps(config))
    self._starts = np.cumsum([0, *(shard.records for shard in self._shards)])
    if not len(self):
      first = "; the first flaw: {file}: {id}: {reason}".format(**self.damage[0]) if self.damage else ""
      folder = os.path.dirname(paths[0])
      layout = ("; this is CLIP_benchmark's layout: read it with source.name=clip_benchmark and the directory above as "
                "source.path" if os.path.isfile(os.path.join(folder, "nshards.txt")) else f"; wanted {WANTED}")
      raise UserError(f"config.data.source.path={config.path!r}: no image with a caption in {len(paths)} tars{first}"
                      f"{layout}")

  def __len__(self) -> int:
    return int(self._starts[-1])

  def _row(self, index: int) -> tuple[Shard, str, tuple[int, ...]]:
    """Returns (shard, key, row of the index) of a record."""
    number = int(np.searchsorted(self._starts, index, "right")) - 1
    shard = self._shards[number]
    return shard, *shard.row(index - int(self._starts[number]))

  def _annotation(self, shard: Shard, key: str, row: tuple[int, ...]) -> dict[str, Any]:
    config, text, sidecar = self._config, row[3:6], row[6:9]
    where = f"{shard.path}: {key}"
    out = {"id": f"{os.path.basename(shard.path).removesuffix('.tar')}/{key}"}
    try:
      plain = config.text_key == "txt" or (text[0] and (not config.text_key or "." in config.text_key))
      entries = {}
      if config.label_key or not plain:
        if sidecar[1] > OBJECT:
          raise UserError(f".json of {sidecar[1]:,} bytes; at most {OBJECT:,} are read")
        entries = one_object(shard.contents(key, *sidecar)) if sidecar[0] else {}
      if plain:
        if text[1] > MAX_TEXT:
          raise UserError(f"caption of {text[1]:,} bytes; at most {MAX_TEXT:,} are read")
        value: Any = decode(shard.contents(key, *text), ".txt").rstrip("\r\n") if text[0] else None
      else:
        names = (config.text_key,) if config.text_key else TEXT_KEYS
        name = next((k for k in names if k in entries), None)
        if name is None:
          raise UserError(f".json: {missing(names[0], entries)}")
        value = entries[name]
      out |= captions_of(value)
      if config.label_key:
        out |= label_of(entries.get(config.label_key), config.label_key)
    except UserError as error:
      raise UserError(f"{where}: {error}") from error
    return out

  def annotation(self, index: int) -> dict[str, Any]:
    return self._annotation(*self._row(index))

  def __getitem__(self, index: int) -> dict[str, Any]:
    shard, key, row = self._row(index)
    out = self._annotation(shard, key, row)
    try:
      inputs.check_size(row[1], inputs.IMAGE)
    except UserError as error:
      raise UserError(f"{shard.path}: {key}: {error}") from error
    return out | {"image": shard.contents(key, *row[:3])}

  def files(self) -> Iterator[str]:
    yield from (shard.path for shard in self._shards)

  def fingerprint(self) -> str:
    config = self._config
    digest = hashlib.sha256(repr((config.image_key, config.text_key, config.label_key)).encode())
    for shard in self._shards:
      digest.update(f"{os.path.basename(shard.path)}\0{shard.digest}\0".encode())
    return digest.hexdigest()[:16]


def _split(config: WebdatasetConfig) -> str:
  """Returns the path with the split's folder, where there is one."""
  if not os.path.isdir(config.path) or not config.split:
    return config.path
  inner = os.path.join(config.path, config.split)
  if os.path.isdir(inner):
    return inner
  if config.split != "train":
    folders = [f.name for f in os.scandir(config.path) if f.is_dir()]
    raise UserError(f"config.data.source.split={config.split!r}: no such folder in {config.path}"
                    f"{did_you_mean(config.split, folders)}")
  return config.path


def _rule(config: WebdatasetConfig) -> Rule:
  """Returns how members become records; raises UserError of keys that no name can end in."""
  ranges.check(config, "config.data.source.")
  first = config.key_dot == "first"
  image, text = config.image_key.strip(".").lower(), config.text_key.strip(".").lower() * ("." in config.text_key)
  for name, suffix in (("image_key", config.image_key), ("text_key", text)):
    if suffix and not re.fullmatch(r"\.?[^/\0]{1,100}", suffix):
      raise UserError(f"config.data.source.{name}={suffix!r}: wanted a suffix of names, such as jpg or input.jpg")
  tag = "-".join(filter(None, (image, text, "first_dot" * first)))
  return Rule((image,) if image else IMAGES, (text,) if text else TEXTS, ("json",), first_dot=first, tag=tag)
