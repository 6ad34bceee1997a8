"""Frames of videos, each with its neighbours in time: ImageNet-Vid-Robust and YTBB-Robust. Source: arXiv 1906.02168."""

import csv
import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from limber_jax.config import Source
from limber_jax.data.sources import annotations
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

VID = ("labels.json", "pmsets.json")
YTBB = ("anchor_labels.json", "pmk_labels.json", "ytbb_robustness_test_anchors_full.csv")
PAGE = "https://modestyachts.github.io/robust-vid/"
WANTED = (f"a directory with {VID[0]} and {VID[1]} of ImageNet-Vid-Robust, or with {YTBB[0]}, {YTBB[1]} and "
          f"{YTBB[2]} of YTBB-Robust ({PAGE}; the files are in github.com/modestyachts/imagenet-testbed too)")

NEIGHBOURS = 10               # frames on each side
JUDGED = ("good", "unsure", "bad")  # what the labels of YTBB-Robust say of a frame before they name classes
UNLIKE = ("dissimilar", "problematic", "incorrect", "dont know", "deformation", "background-change",
          "occlusion-increased", "blur-increase", "bad-anchor")  # what is said of a neighbour that is not to be used


@dataclass
class FramesConfig(Source):
  """The frames of a set of neighbourhoods, a record a frame. A frame may have several labels; "label" is the lowest.

  path: the directory of annotations, JSON as published (pickles are not read).
    ImageNet-Vid-Robust: labels.json {frame: [class, …]} and pmsets.json {anchor: [frame, …]}.
    YTBB-Robust: anchor_labels.json and pmk_labels.json {"annotations": [{"key", "labels"}], "labels": [name, …]}, and
      ytbb_robustness_test_anchors_full.csv with ytid, time_ms, label. Anchors that were judged good count, with the
      neighbours, up to 10 frames away, that were judged similar and nothing else; the classes are 23 names and "none".
  images: the directory that the names of frames start from; "" = that of the annotations.

  What cannot be used is in `damage`: anchors and frames without a class.
  """

  paths = ("path", "images")

  name: str = "frames"
  path: str = ""    # the directory of annotations
  images: str = ""  # the directory that names of frames start from; "" = that of the annotations

  def open(self) -> "Frames":
    return Frames(self)


class Frames:
  """A `FramesConfig` whose data are open."""

  def __init__(self, config: FramesConfig):
    self._root = os.path.abspath(config.images or config.path)
    self._path = config.path
    self.damage: list[dict[str, str]] = []
    files = set(os.listdir(config.path)) if os.path.isdir(config.path) else set()
    if files.issuperset(VID):
      self.classes, (labels, groups) = None, self._vid()
    elif files.issuperset(YTBB):
      self.classes, labels, groups = self._ytbb()
    else:
      raise UserError(f"config.source.path={config.path!r}: wanted {WANTED}")
    names = dict.fromkeys(frame for group in groups for frame in group)
    number = {frame: i for i, frame in enumerate(names)}
    self._names = list(names)
    self.labels: list[tuple[int, ...]] = [labels[frame] for frame in names]
    """The classes of each record, sorted."""
    self.neighbourhoods: list[tuple[int, ...]] = [tuple(number[frame] for frame in group) for group in groups]
    """The numbers of the records of each neighbourhood, its anchor first."""
    if not groups:
      raise UserError(f"{config.path}: none of its anchors can be used; wanted {WANTED}")

  def _load(self, name: str) -> dict[str, Any]:
    return annotations.load(os.path.join(self._path, name), WANTED)

  def _damaged(self, file: str, id_: str, reason: str) -> None:
    self.damage.append({"file": file, "id": id_, "reason": reason})

  def _vid(self) -> tuple[dict[str, tuple[int, ...]], list[list[str]]]:
    """Returns (classes by frame, neighbourhoods) of ImageNet-Vid-Robust."""
    labels: dict[str, tuple[int, ...]] = {}
    for frame, classes in self._load(VID[0]).items():
      if isinstance(classes, list) and classes and all(type(c) is int for c in classes):
        labels[frame] = tuple(sorted(set(classes)))
    groups, unlabelled = [], {}
    for anchor, frames in self._load(VID[1]).items():
      if not (isinstance(frames, list) and all(isinstance(f, str) for f in frames)):
        self._damaged(VID[1], f"anchor {anchor}", "wanted a list of names of frames")
        continue
      group = list(dict.fromkeys([anchor, *frames]))
      unlabelled |= dict.fromkeys(f for f in group if f not in labels)
      if anchor in labels:
        groups.append([f for f in group if f in labels])
    for frame in unlabelled:
      self._damaged(VID[0], f"frame {frame}", "no class")
    return labels, groups

  def _ytbb(self) -> tuple[tuple[str, ...], dict[str, tuple[int, ...]], list[list[str]]]:
    """Returns (names of the classes, classes by frame, neighbourhoods) of YTBB-Robust."""
    anchors, words = self._judged(YTBB[0])
    names = [w for w in words if w not in JUDGED]
    pairs, _ = self._judged(YTBB[1])
    first = self._first_labels(names)
    dropped, neighbours = set(), {}
    for key, said in pairs.items():
      anchor, _, frame = key.partition(",")
      if "bad-anchor" in said:
        dropped.add(anchor)
      if "similar" in said and not said.intersection(UNLIKE):
        neighbours.setdefault(anchor, []).append(frame)
    labels, groups = {}, []
    for anchor, said in anchors.items():
      if "good" not in said or said.intersection(("unsure", "bad")) or anchor in dropped:
        continue
      folder = anchor.partition("/")[0]
      classes = {names.index(w) for w in said.difference(JUDGED)} | ({first[folder]} if folder in first else set())
      if not classes:
        self._damaged(YTBB[0], f"anchor {anchor}", "no class")
        continue
      near = [f for f in neighbours.get(anchor, ()) if _near(anchor, f)]
      group = [anchor, *sorted(set(near), key=_frame)]
      labels |= dict.fromkeys(group, tuple(sorted(classes)))
      groups.append(group)
    return tuple(names), labels, groups

  def _judged(self, file: str) -> tuple[dict[str, set[str]], list[str]]:
    """Returns ({frame, or anchor and frame with a comma: what was said of it}, all words there are) of a file.

    Of a key that stands there several times the last counts. Frames are named by their last folder and their file.
    """
    path = os.path.join(self._path, file)
    table = self._load(file)
    words = annotations.entries(table, "labels", path)
    out = {}
    for number, entry in enumerate(annotations.entries(table, "annotations", path)):
      if reason := annotations.flaw(entry, key=str, labels=list):
        self._damaged(file, f"annotation {number}", reason)
      elif not all(type(i) is int and 0 <= i < len(words) for i in entry["labels"]):
        self._damaged(file, entry["key"], f"labels {entry['labels']}, wanted numbers from 0 to {len(words) - 1}")
      else:
        key = ",".join("/".join(part.split("/")[-2:]) for part in entry["key"].split(","))
        out[key] = {words[i] for i in entry["labels"]}
    return out, words

  def _first_labels(self, names: list[str]) -> dict[str, int]:
    """Returns the class that YouTube-BB itself gives an anchor, by its folder, which is called ytid_milliseconds."""
    path = os.path.join(self._path, YTBB[2])
    try:
      reader = csv.DictReader(io.StringIO(inputs.text(path, inputs.LIST).removeprefix("\ufeff"), newline=""))
      rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
      raise UserError(f"{path}: cannot be read ({error})") from error
    if missing := [c for c in ("ytid", "time_ms", "label") if c not in (reader.fieldnames or ())]:
      raise UserError(f"{path}: no column {missing[0]!r}; wanted {WANTED}")
    out = {}
    # In this file alone "none" is the last class; elsewhere "car" is.
    order = sorted(range(len(names)), key=lambda i: names[i] == "none")
    for number, row in enumerate(rows):
      label = row["label"] or ""
      if not (label.isdecimal() and int(label) < len(names) and row["ytid"] and row["time_ms"]):
        self._damaged(YTBB[2], f"row {number + 1}", f"wanted ytid, time_ms and a class below {len(names)}")
        continue
      out[f"{row['ytid']}_{row['time_ms']}"] = order[int(label)]
    return out

  def __len__(self) -> int:
    return len(self._names)

  def annotation(self, index: int) -> dict[str, Any]:
    return {"id": self._names[index], "text": "", "label": self.labels[index][0]}

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.annotation(index) | {"image": annotations.read_image(self._root, self._names[index], ())}

  def files(self) -> Iterator[str]:
    yield from (os.path.join(self._path, name) for name in (*VID, *YTBB))
    yield from annotations.image_files(self._root, self._names)

  def fingerprint(self) -> str:
    return hashlib.sha256(repr((self._names, self.labels, self.neighbourhoods)).encode()).hexdigest()[:16]


def _near(anchor: str, frame: str) -> bool:
  """Returns whether a frame is one of the NEIGHBOURS before or after an anchor, in the same folder."""
  same = anchor.partition("/")[0] == frame.partition("/")[0]
  return same and 0 < abs(_frame(anchor) - _frame(frame)) <= NEIGHBOURS


def _frame(name: str) -> int:
  """Returns 1393 for l4o-VeB4cqI_46466/frame-1393.jpg, -1 where there is no such number."""
  digits = os.path.splitext(name.rpartition("/")[2])[0].rpartition("-")[2]
  return int(digits) if digits.isdecimal() else -1
