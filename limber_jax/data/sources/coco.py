"""Images with several captions each: COCO's, Karpathy's and NoCaps' JSON files."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from limber_jax.config import Source, Unnamed
from limber_jax.data import text
from limber_jax.data.sources import annotations
from limber_jax.errors import UserError, did_you_mean

WANTED = ("COCO's captions_val2014.json or captions_val2017.json (https://cocodataset.org/#download), Karpathy's "
          "dataset_coco.json or dataset_flickr30k.json (https://cs.stanford.edu/people/karpathy/deepimagesent/, with "
          "images from https://shannon.cs.illinois.edu/DenotationGraph/) or NoCaps' nocaps_val_4500_captions.json "
          "(https://nocaps.org/download)")
DOMAINS = ("in-domain", "near-domain", "out-domain")
_ID = (int, str)


class Entry(NamedTuple):
  """An image of a file."""

  id: str
  file: str                # as the file has it
  folder: str              # where else below the root it may lie; "" = nowhere
  domain: str              # of NoCaps; "" elsewhere
  texts: tuple[str, ...]


@dataclass
class CocoConfig(Source):
  """Captions of images, a record an image: "texts" holds all its captions, "text" the first, NoCaps' "domain" its own.

  path: the JSON file; which of the layouts it has is seen from what it holds.
    COCO's, also of NoCaps: {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}
    Karpathy's, of COCO and Flickr30k: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}, with "filepath"
      and "cocoid" where they are COCO's
  split: of Karpathy's train, val, test or restval, or several: train+restval has the 113,287 images that models train
    on. "" takes every image; the other files have no splits.
  images: the directory that image files start from; "" = that of the JSON file, or the one above where that is called
    annotations. The usual folders below it are looked through: val2014, images, flickr30k-images …

  What cannot be used is in `damage`: images that are listed twice (the first counts), captions of no image of the
  file, empty ones and those of 10,000 characters or more, images without any caption left, entries without their
  fields. A record's id is that of COCO or NoCaps, as a string, or of Flickr30k the name of its file.
  """

  paths = ("path", "images")

  name: str = "coco"
  path: str = ""    # the JSON file
  split: str = Unnamed("train")  # of Karpathy's: train, val, test or restval, several with + between; "" = every image
  images: str = ""  # the directory that paths of images start from; "" = that of the file, or the one above it

  def open(self) -> "Coco":
    return Coco(self)

  def splits(self) -> tuple[str, ...]:
    images = annotations.entries(annotations.load(self.path, WANTED), "images", self.path)
    return tuple(sorted({image["split"] for image in images if not annotations.flaw(image, split=str, sentences=list)}
                        )) or ("",)


class Coco:
  """A `CocoConfig` whose data are open."""

  classes = None

  def __init__(self, config: CocoConfig):
    self._path = config.path
    self._root = annotations.image_root(config.path, config.images)
    self.damage: list[dict[str, str]] = []
    table = annotations.load(config.path, WANTED)
    images = annotations.entries(table, "images", config.path)
    if "annotations" in table:
      if config.split:
        raise UserError(f"source.split={config.split!r}: {config.path} has no splits; leave it empty for all images")
      found = self._official(images, annotations.entries(table, "annotations", config.path))
    elif any(isinstance(image, dict) and "sentences" in image for image in images):
      found = self._karpathy(images, config.split)
    else:
      raise UserError(f"{config.path}: neither 'annotations' beside 'images' nor 'sentences' in them; wanted {WANTED}")
    self._entries = []
    for entry in found:
      if entry.texts:
        self._entries.append(entry)
      else:
        self._damaged(f"image {entry.id}", "no caption that can be used")
    if not self._entries:
      first = "; the first flaw: {id}: {reason}".format(**self.damage[0])
      raise UserError(f"{config.path}: none of its images has a caption{first}; wanted {WANTED}")

  def _damaged(self, id_: str, reason: str) -> None:
    self.damage.append({"file": os.path.basename(self._path), "id": id_, "reason": reason})

  def _official(self, images: list[Any], captions: list[Any]) -> list[Entry]:
    """Returns the images of COCO's layout, those without captions too."""
    texts: dict[str, list[str]] = {}
    kept = []
    with_domain = any("domain" in image for image in images if isinstance(image, dict))
    for number, image in enumerate(images):
      kinds = {"id": _ID, "file_name": str} | ({"domain": str} if with_domain else {})
      if reason := annotations.flaw(image, **kinds):
        self._damaged(_name("image", image, "id", number), reason)
      elif with_domain and image["domain"] not in DOMAINS:
        self._damaged(f"image {image['id']}", f"domain {image['domain']!r}, wanted {', '.join(DOMAINS)}")
      elif str(image["id"]) in texts:
        self._damaged(f"image {image['id']}", annotations.DUPLICATE_ID)
      else:
        texts[str(image["id"])] = []
        kept.append((str(image["id"]), image["file_name"], image["domain"] if with_domain else ""))
    seen = set()
    for number, caption in enumerate(captions):
      name = _name("annotation", caption, "id", number)
      caption = _cleaned(caption, "caption")
      reason = annotations.flaw(caption, id=_ID, image_id=_ID) or (
        annotations.DUPLICATE_ID if str(caption["id"]) in seen else
        f"of image {caption['image_id']}, which is not in the file" if str(caption["image_id"]) not in texts else
        "no 'caption'" if "caption" not in caption else text.flaw(caption["caption"], "caption"))
      if reason:
        self._damaged(name, reason)
      else:
        seen.add(str(caption["id"]))
        texts[str(caption["image_id"])].append(caption["caption"])
    return [Entry(id_, file, "", domain, tuple(texts[id_])) for id_, file, domain in kept]

  def _karpathy(self, images: list[Any], split: str) -> list[Entry]:
    """Returns the images of these splits of Karpathy's layout, those without captions too."""
    known = {image["split"] for image in images if not annotations.flaw(image, split=str)}
    wanted = split.split("+") if split else known
    if absent := next((s for s in wanted if s not in known), None):
      raise UserError(f"source.split: {self._path} has no split {absent!r}{did_you_mean(absent, known)}")
    out: dict[str, Entry] = {}
    for number, image in enumerate(images):
      if not (reason := annotations.flaw(image, split=str)) and image["split"] not in wanted:
        continue
      of_coco = isinstance(image, dict) and "cocoid" in image
      key = "cocoid" if of_coco else "filename"
      name = _name("image", image, key, number)
      kinds = {"cocoid": _ID, "filepath": str} if of_coco else {}
      if reason := reason or annotations.flaw(image, filename=str, sentences=list, **kinds):
        self._damaged(name, reason)
      elif str(image[key]) in out:
        self._damaged(name, annotations.DUPLICATE_ID)
      else:
        texts = []
        for place, sentence in enumerate(image["sentences"]):
          sentence = _cleaned(sentence, "raw")
          reason = annotations.flaw(sentence) or (
            "no 'raw'" if "raw" not in sentence else text.flaw(sentence["raw"], "caption"))
          if reason:
            self._damaged(f"{name}, sentence {place}", reason)
          else:
            texts.append(sentence["raw"])
        folder = image["filepath"] if of_coco else ""
        out[str(image[key])] = Entry(str(image[key]), image["filename"], folder, "", tuple(texts))
    return list(out.values())

  def __len__(self) -> int:
    return len(self._entries)

  def annotation(self, index: int) -> dict[str, Any]:
    entry = self._entries[index]
    domain = {"domain": entry.domain} if entry.domain else {}
    return {"id": entry.id, "text": entry.texts[0], "texts": entry.texts, **domain}

  def __getitem__(self, index: int) -> dict[str, Any]:
    entry = self._entries[index]
    folders = (entry.folder, *annotations.FOLDERS)
    return self.annotation(index) | {"image": annotations.read_image(self._root, entry.file, folders)}

  def files(self) -> Iterator[str]:
    yield self._path
    for entry in self._entries:
      yield from annotations.image_files(self._root, (entry.file,), (entry.folder, *annotations.FOLDERS))

  def fingerprint(self) -> str:
    return hashlib.sha256(repr([tuple(entry) for entry in self._entries]).encode()).hexdigest()[:16]


def _cleaned(entry: Any, key: str) -> Any:
  """Returns an entry with its text cleaned, where it has one."""
  there = isinstance(entry, dict) and isinstance(entry.get(key), str)
  return entry | {key: text.clean(entry[key])} if there else entry


def _name(what: str, entry: Any, key: str, number: int) -> str:
  """Returns "image 42" by the entry's own id, or "image at 7" by its place in the file where it has none."""
  own = entry[key] if isinstance(entry, dict) and key in entry else None
  return f"{what} {own}" if type(own) in _ID else f"{what} at {number}"
