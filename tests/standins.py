"""Small data sets of digits in the real layouts of published ones, written to disk for the tests.

Images are scikit-learn's digits, 32 × 32 pixels as JPEG files, and captions speak of them in the words of the source
"digits", so that a model of the quickstarts can be measured on them. The same call writes the same bytes.

With hostile=True a writer adds what its docstring lists, some of it before what it would write anyway, and takes
nothing away: metrics on what can be read of the one are metrics on the other. Of so few records the damage is more than
the share that an evaluation allows by default.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from limber_jax.config import Source
from limber_jax.data.sources.digits import CLASSES, TEMPLATES, Digits

DOMAINS = ("in-domain", "near-domain", "out-domain")
LONG_TEXT = "a very long " * 1000  # 12,000 characters

# By digit, for AWA2: what its strokes are like, and what kind of number it is.
PREDICATES = {
  "round": "0 3 6 8 9", "straight": "1 4 7", "closed": "0 6 8 9", "open": "1 2 3 5 7", "even": "0 2 4 6 8",
  "odd": "1 3 5 7 9", "prime": "2 3 5 7", "small": "0 1 2 3 4", "big": "5 6 7 8 9", "square": "0 1 4 9",
}


@dataclass(frozen=True)
class Written:
  """What a writer wrote."""

  path: str                         # a Source's path …
  images: str                       # … and images
  records: int                      # that the source gives, the unreadable ones included
  damage: tuple[str, ...] = ()      # ids of the annotations that cannot be used
  unreadable: tuple[str, ...] = ()  # ids of the records whose images cannot be read


def write_coco(folder: Path, count: int = 20, captions: int = 5, year: str = "2014", hostile: bool = False) -> Written:
  """Writes annotations/captions_val2014.json and val2014/COCO_val2014_….jpg of `count` images into a folder.

  hostile: an image cut in half and a missing one, with captions; an image without captions, an image listed twice; a
    caption listed twice, one of a missing image, an empty one and one of 12,000 characters.
  """
  part = f"val{year}"
  prefix = f"COCO_{part}_" if year == "2014" else ""
  return _official(folder, f"annotations/captions_{part}.json", part, prefix, count, captions, False, hostile)


def write_nocaps(folder: Path, count: int = 21, captions: int = 10, domains: bool = True, hostile: bool = False
                 ) -> Written:
  """Writes nocaps_val_4500_captions.json and images/….jpg; images take turns through the three domains.

  hostile: as `write_coco`; and an image of a domain that there is not, where there are domains.
  """
  return _official(folder, "nocaps_val_4500_captions.json", "images", "", count, captions, domains, hostile)


def _official(folder: Path, name: str, images: str, prefix: str, count: int, captions: int, domains: bool,
              hostile: bool) -> Written:
  rows, texts = [], []

  def add(id_: int, number: int, several: Sequence[str], **fields: Any) -> None:
    rows.append({"license": 1, "file_name": f"{prefix}{id_:012}.jpg", "height": 32, "width": 32, "id": id_,
                 "coco_url": f"http://images.cocodataset.org/{images}/{prefix}{id_:012}.jpg"}
                | ({"domain": DOMAINS[number % 3]} if domains else {}) | fields)
    texts.extend({"image_id": id_, "id": 10 * id_ + i, "caption": text} for i, text in enumerate(several))

  digits = Digits(Source(split="test"))
  ids = [1000 + 7 * i for i in range(count)]
  files = {f"{images}/{prefix}{id_:012}.jpg": jpeg(digits[i]["image"]) for i, id_ in enumerate(ids)}
  damage, unreadable = [], []
  if hostile:
    add(1, 0, ["the digit zero, cut in half"])
    add(2, 0, ["the digit zero, lost"])
    add(3, 0, [])
    files[f"{images}/{prefix}{1:012}.jpg"] = cut(jpeg(digits[0]["image"]))
    files[f"{images}/{prefix}{3:012}.jpg"] = jpeg(digits[0]["image"])
    unreadable, damage = ["1", "2"], ["image 3"]
    if domains:
      add(4, 0, ["the digit zero, of nowhere"], domain="elsewhere")
      damage += ["image 4", "annotation 40"]
    texts += [{"image_id": 999, "id": 5, "caption": "the digit of no image"},
              {"image_id": ids[0], "id": 6, "caption": " \n"}, {"image_id": ids[0], "id": 7, "caption": LONG_TEXT}]
    damage += ["annotation 5", "annotation 6", "annotation 7"]
  for i, id_ in enumerate(ids):
    add(id_, i, sentences(digits, i, captions))
  if hostile:
    rows.append({**rows[-1], "file_name": "twice.jpg"})
    texts.append({**texts[-1], "caption": "the same id again"})
    damage += [f"image {ids[-1]}", f"annotation {texts[-1]['id']}"]
  _write(folder, files | {name: {"info": {"description": "digits"}, "licenses": [], "images": rows,
                                 "annotations": texts}})
  return Written(str(folder / name), "", count + len(unreadable), tuple(damage), tuple(unreadable))


def write_karpathy(folder: Path, name: str = "coco", counts: dict[str, int] | None = None, captions: int = 5,
                   hostile: bool = False) -> Written:
  """Writes dataset_coco.json with train2014/ and val2014/, or dataset_flickr30k.json with flickr30k-images/.

  `counts` are images by split, {"train": 6, "restval": 4, "val": 6, "test": 20} if None; of Flickr30k there is no
  restval. The result speaks of the split test.

  hostile, all in test: an image cut in half and a missing one, with captions; an image without captions, an image
    listed twice; an empty caption and one of 12,000 characters.
  """
  counts = counts or {"train": 6, "restval": 4, "val": 6, "test": 20}
  of_coco = name == "coco"
  rows, files, damage, unreadable = [], {}, [], []

  def add(number: int, split: str, several: Sequence[str], image: bytes | None) -> str:
    part = "train2014" if split == "train" else "val2014"
    file = f"COCO_{part}_{number:012}.jpg" if of_coco else f"{number}.jpg"
    where = {"filepath": part, "cocoid": number} if of_coco else {}
    rows.append({**where, "filename": file, "imgid": len(rows), "split": split, "sentids": list(range(len(several))),
                 "sentences": [{"raw": text, "tokens": text.split(), "imgid": len(rows), "sentid": i}
                               for i, text in enumerate(several)]})
    if image is not None:
      files[f"{part if of_coco else 'flickr30k-images'}/{file}"] = image
    return str(number) if of_coco else file

  digits = Digits(Source(split="test"))
  picture = jpeg(digits[0]["image"])
  if hostile:
    unreadable = [add(1, "test", ["the digit zero, cut in half"], cut(picture)),
                  add(2, "test", ["the digit zero, lost"], None)]
    damage.append(f"image {add(3, 'test', [], picture)}")
  number = 0
  for split, count in counts.items():
    if split == "restval" and not of_coco:
      continue
    for i in range(count):
      texts = sentences(digits, number, captions)
      if hostile and split == "test" and not i:
        id_ = add(1000 + 7 * number, split, ["", LONG_TEXT, *texts], jpeg(digits[number]["image"]))
        damage += [f"image {id_}", f"image {id_}, sentence 0", f"image {id_}, sentence 1"]
        again = {**rows[-1]}
      else:
        add(1000 + 7 * number, split, texts, jpeg(digits[number]["image"]))
      number += 1
  if hostile:
    rows.append(again)
  file = f"dataset_{name}.json"
  _write(folder, files | {file: {"images": rows, "dataset": name}})
  return Written(str(folder / file), "", counts["test"] + len(unreadable), tuple(damage), tuple(unreadable))


def write_vqa2(folder: Path, images: int = 12, subset: str = "val2014", hostile: bool = False) -> Written:
  """Writes v2_OpenEnded_mscoco_<subset>_questions.json, v2_mscoco_<subset>_annotations.json and the images' folder.

  An image has three questions of the three types of answers: which digit it is (number), whether it is a certain one
  (yes/no), what is shown (other); some of the ten people disagree. The images of train2014 are others than those of
  val2014. `path` of the result is the file of questions.

  hostile: a question on an image cut in half and one on a missing image, with answers; a question whose annotation has
    no answers and one that has no annotation; an annotation of no question, a question listed twice, an empty one and
    one of 12,000 characters.
  """
  digits = Digits(Source(split="train" if subset == "train2014" else "test"))
  questions, annotations, files = [], [], {}

  def picture(id_: int) -> str:
    return f"{subset}/COCO_{subset}_{id_:012}.jpg"

  def ask(id_: int, image: int, text: str) -> None:
    questions.append({"image_id": image, "question": text, "question_id": id_})

  def answer(id_: int, image: int, kind: str, start: str, answers: Sequence[str]) -> None:
    best = max(answers, key=answers.count) if answers else ""
    people = [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]
    annotations.append({"question_type": start, "multiple_choice_answer": best, "answers": people, "image_id": image,
                        "answer_type": kind, "question_id": id_})

  damage, unreadable = [], []
  if hostile:
    zero = jpeg(digits[0]["image"])
    files |= {picture(1): cut(zero), picture(3): zero}
    for id_, image, text, answers in (
        (1000, 1, "What digit is cut in half?", ["0"] * 10), (2000, 2, "What digit is lost?", ["0"] * 10),
        (3000, 3, "What has no answers?", []), (3001, 3, "What has no annotation?", None),
        (3002, 3, " ", ["0"] * 10), (3003, 3, LONG_TEXT + "?", ["0"] * 10)):
      ask(id_, image, text)
      if answers is not None:
        answer(id_, image, "number", "what", answers)
    answer(9000, 3, "number", "what", ["0"] * 10)
    unreadable = ["1000", "2000"]
    damage = ["question 3000", "question 3001", "question 3002", "question 3003", "annotation 9000"]
  for i in range(images):
    id_, label = 1000 + 7 * i, digits.annotation(i)["label"]
    files[picture(id_)] = jpeg(digits[i]["image"])
    asked = (label + i % 2) % 10
    yes = "yes" if asked == label else "no"
    no = "no" if asked == label else "yes"
    for place, (kind, start, text, answers) in enumerate((
        ("number", "what number is", "What number is this?", [str(label)] * (10 - i % 4) + ["8"] * (i % 4)),
        ("yes/no", "is this a", f"Is this a {CLASSES[asked]}?", [yes] * (9 - i % 3) + [no] * (1 + i % 3)),
        ("other", "what is", "What is shown?", [CLASSES[label]] * 4 + ["a digit"] * 3 + ["digit"] * 2 + ["number"]))):
      ask(1000 * id_ + place, id_, text)
      answer(1000 * id_ + place, id_, kind, start, answers)
  records = len(questions) - (4 if hostile else 0)
  if hostile:
    questions.append({**questions[-1], "question": "Is this id listed twice?"})
    damage.append(f"question {questions[-1]['question_id']}")
  head = {"info": {"version": "2.0"}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
  file = f"v2_OpenEnded_mscoco_{subset}_questions.json"
  _write(folder, files | {file: {**head, "task_type": "Open-Ended", "questions": questions},
                          f"v2_mscoco_{subset}_annotations.json": {**head, "annotations": annotations}})
  return Written(str(folder / file), "", records, tuple(damage), tuple(unreadable))


def write_imagenet_folders(folder: Path, wnids: Sequence[str], each: int = 4, name: str = "imagenet-r",
                           hostile: bool = False) -> Written:
  """Writes `each` images of every class into <name>/<wnid>/, with file names as in -r, -a or sketch, and a README.

  The image of class number c is a digit c % 10. `path` of the result is the folder with the classes.

  hostile: in the first class an image cut in half and an empty one; what lies about in such folders, Thumbs.db.
  """
  files = {f"{name}/README.txt": b"digits"} if name != "sketch" else {}
  pattern = {"imagenet-r": "art_{}.jpg", "imagenet-a": "0.{:06}_digit _ number_0.9.jpg", "sketch": "sketch_{}.JPEG"}
  digits = _by_class()
  damaged = []
  for number, wnid in enumerate(wnids):
    for i in range(each):
      file = pattern.get(name, "{}.jpeg").format(i)
      files[f"{name}/{wnid}/{file}"] = jpeg(digits[number % 10][i % len(digits[number % 10])])
  if hostile:
    start = f"{name}/{wnids[0]}"
    files |= {f"{start}/ a.jpg": cut(jpeg(digits[0][0])), f"{start}/ b.jpg": b"", f"{start}/Thumbs.db": b"\xd0\xcf"}
    damaged = [f"{wnids[0]}/ a.jpg", f"{wnids[0]}/ b.jpg"]
  _write(folder, files)
  return Written(str(folder / name), "", len(wnids) * each + len(damaged), (), tuple(damaged))


def write_awa2(folder: Path, each: int = 3, hostile: bool = False) -> Written:
  """Writes Animals_with_Attributes2/ with its tables, and `each` images of the ten digits, which stand for animals.

  classes.txt, predicates.txt: number, tab, name; trainclasses.txt, testclasses.txt: the first eight and the last two
  names; predicate-matrix-binary.txt: a row a class, 0 and 1. Images are JPEGImages/<class>/<class>_10001.jpg and on.

  hostile: of zero an image cut in half and an empty one.
  """
  root = "Animals_with_Attributes2"
  rows = [[int(str(c) in digits.split()) for digits in PREDICATES.values()] for c in range(10)]
  files = {
    f"{root}/classes.txt": "".join(f"{i:6}\t{name}\n" for i, name in enumerate(CLASSES, 1)).encode(),
    f"{root}/trainclasses.txt": "".join(f"{name}\n" for name in CLASSES[:8]).encode(),
    f"{root}/testclasses.txt": "".join(f"{name}\n" for name in CLASSES[8:]).encode(),
    f"{root}/predicates.txt": "".join(f"{i:6}\t{name}\n" for i, name in enumerate(PREDICATES, 1)).encode(),
    f"{root}/predicate-matrix-binary.txt": "".join(" ".join(map(str, row)) + "\n" for row in rows).encode(),
    f"{root}/README-attributes.txt": b"digits"}
  digits = _by_class()
  for c, name in enumerate(CLASSES):
    for i in range(each):
      files[f"{root}/JPEGImages/{name}/{name}_{10001 + i}.jpg"] = jpeg(digits[c][i])
  unreadable = ()
  if hostile:
    files |= {f"{root}/JPEGImages/zero/zero_09998.jpg": cut(jpeg(digits[0][0])),
              f"{root}/JPEGImages/zero/zero_09999.jpg": b""}
    unreadable = ("zero/zero_09998.jpg", "zero/zero_09999.jpg")
  _write(folder, files)
  return Written(str(folder / root), "", 10 * each + len(unreadable), (), unreadable)


def write_tfds(folder: Path, name: str = "digits_in_classes", captions: int = 0, count: int = 20, split: str = "test",
               hostile: bool = False) -> Written:
  """Prepares a TFDS dataset as ArrayRecord files, without TensorFlow: folder/<name>/1.0.0.

  Its features are image and label, or with `captions` > 0 image and as many captions, as coco_captions has them.
  TFDS shuffles records by their keys.

  hostile: an image cut in half. `unreadable` is empty, for the place of a record is known only to TFDS.
  """
  import tensorflow_datasets as tfds

  digits = Digits(Source(split="test"))

  class StandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for a list of downloads beside this file

    def _info(self):
      f = tfds.features
      rest = {"captions": f.Sequence({"id": np.int64, "text": f.Text()})} if captions else {
        "label": f.ClassLabel(names=list(CLASSES))}
      features = f.FeaturesDict({"image": f.Image(shape=(None, None, 3)), **rest})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, downloads):
      return {split: self._generate_examples()}

    def _generate_examples(self):
      for i in range(count + hostile):
        image, record = jpeg(digits[i]["image"]), digits.annotation(i)
        rest = {"captions": [{"id": j, "text": text} for j, text in enumerate(sentences(digits, i, captions))]} if (
          captions) else {"label": record["label"]}
        yield i, {"image": image if i < count else cut(image), **rest}

  StandIn.name = name
  StandIn(data_dir=str(folder), file_format="array_record").download_and_prepare()
  return Written(str(folder / name), "", count + hostile)


def sentences(digits: Digits, index: int, count: int) -> list[str]:
  """Returns `count` captions of a record, each from another template while there are any left."""
  word = CLASSES[digits.annotation(index)["label"]]
  return [TEMPLATES[(index + i) % len(TEMPLATES)].format(word) for i in range(count)]


def jpeg(image: np.ndarray) -> bytes:
  """Returns a JPEG file of uint8 [h, w, 3]."""
  out = io.BytesIO()
  Image.fromarray(image).save(out, "JPEG", quality=95)
  return out.getvalue()


def cut(data: bytes) -> bytes:
  """Returns the first two thirds of a file: of a JPEG the head and a part of the picture."""
  return data[: len(data) * 2 // 3]


def _by_class() -> list[list[np.ndarray]]:
  """Returns the images of each digit, of the split test."""
  digits = Digits(Source(split="test"))
  out: list[list[np.ndarray]] = [[] for _ in range(10)]
  for i in range(len(digits)):
    record = digits[i]
    out[record["label"]].append(record["image"])
  return out


def _write(folder: Path, files: dict[str, Any]) -> None:
  """Writes files by their paths below a folder: bytes as they are, anything else as JSON."""
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
