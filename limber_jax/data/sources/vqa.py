"""Questions about images with the answers of ten people each: the JSON files of VQA v2. Source: arXiv 1612.00837."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from limber_jax.config import Source, Unnamed
from limber_jax.data import text
from limber_jax.data.sources import annotations
from limber_jax.data.sources.annotations import DUPLICATE_ID, flaw
from limber_jax.errors import UserError, did_you_mean

SPLITS = ("train2014", "val2014")  # those whose answers are public
QUESTIONS, ANSWERS = "v2_OpenEnded_mscoco_{}_questions.json", "v2_mscoco_{}_annotations.json"
PAGE = "https://visualqa.org/download.html"

_TEXTS = ("multiple_choice_answer", "answer_type", "question_type")


class Entry(NamedTuple):
  """A question of a file."""

  id: int
  image: int
  text: str
  answers: tuple[str, ...]
  answer: str               # the one that most people gave
  answer_type: str          # yes/no, number or other
  question_type: str        # how it begins: "what color is the"


@dataclass
class VqaConfig(Source):
  """Questions, a record each: "text" is the question, "answers" what ten people said, "answer" what most of them said.

  There are "answer_type" and "question_type" too, as the files have them; the id is that of the question.

  path: the directory with v2_OpenEnded_mscoco_SPLIT_questions.json and v2_mscoco_SPLIT_annotations.json, or the first
    of these files, whatever its name.
  split: val2014 (214,354 questions) or train2014 (443,757).
  images: the directory with SPLIT/COCO_SPLIT_000000000042.jpg, or with these files themselves; "" = that of the JSON
    files.

  What cannot be used is in `damage`: ids that are listed twice (the first counts), answers to no question, questions
  without answers, empty ones and those of 10,000 characters or more, entries without their fields.
  """

  paths = ("path", "images")

  name: str = "vqa"
  path: str = ""    # the directory of both files, or the file of questions
  split: str = Unnamed("train")  # train2014 | val2014
  images: str = ""  # the directory that holds SPLIT/COCO_SPLIT_….jpg, or these files; "" = that of the JSON files

  def open(self) -> "Vqa":
    return Vqa(self)

  def splits(self) -> tuple[str, ...]:
    folder = self.path if os.path.isdir(self.path) else os.path.dirname(self.path)
    return tuple(s for s in SPLITS if os.path.isfile(os.path.join(folder, QUESTIONS.format(s)))) or SPLITS


class Vqa:
  """A `VqaConfig` whose data are open."""

  classes = None

  def __init__(self, config: VqaConfig):
    if config.split not in SPLITS:
      raise UserError(f"source.split={config.split!r}: VQA v2 has answers to {' and '.join(SPLITS)}"
                      f"{did_you_mean(config.split, SPLITS)}")
    self._split = config.split
    names = QUESTIONS.format(config.split), ANSWERS.format(config.split)
    folder = config.path if os.path.isdir(config.path) else os.path.dirname(config.path)
    asks = os.path.join(folder, names[0]) if os.path.isdir(config.path) else config.path
    wanted = f"VQA v2's {names[0]} and beside it {names[1]} ({PAGE})"
    self._root = os.path.abspath(config.images or folder or ".")
    self.damage: list[dict[str, str]] = []
    questions, asked = self._by_id(annotations.load(asks, wanted), "questions", asks, _question_flaw)
    path = os.path.join(folder, names[1])
    self._paths = asks, path
    answers, answered = self._by_id(annotations.load(path, wanted), "annotations", path, _answers_flaw)

    words: dict[str, str] = {}  # ten answers a question, and few different ones: each is held once
    self._entries = []
    for id_, question in questions.items():
      if id_ not in answered:
        self._damaged(names[1], f"question {id_}", "no entry with its answers")
      elif id_ in answers:
        entry = answers[id_]
        said = tuple(words.setdefault(a["answer"], a["answer"]) for a in entry["answers"])
        rest = (words.setdefault(entry[k], entry[k]) for k in _TEXTS)
        self._entries.append(Entry(id_, question["image_id"], text.clean(question["question"]), said, *rest))
    for id_ in answers:
      if id_ not in asked:
        self._damaged(names[1], f"annotation {id_}", f"answers to a question that is not in {os.path.basename(asks)}")
    if not self._entries:
      first = "; the first flaw: {file}: {id}: {reason}".format(**self.damage[0])
      raise UserError(f"{path}: answers to none of the questions{first}; wanted {wanted}")

    digest = hashlib.sha256(config.split.encode())
    for entry in self._entries:
      digest.update(repr(tuple(entry)).encode())
    self._digest = digest.hexdigest()[:16]

  def _by_id(self, table: dict[str, Any], key: str, path: str, find_flaw: Callable[[dict[str, Any]], str]
             ) -> tuple[dict[int, dict[str, Any]], set[int]]:
    """Returns (the entries that can be used by the id of their question, the ids of all)."""
    good: dict[int, dict[str, Any]] = {}
    seen: set[int] = set()
    named: set[int] = set()
    for number, entry in enumerate(annotations.entries(table, key, path)):
      if reason := flaw(entry, question_id=int):
        self._damaged(os.path.basename(path), f"entry {number}", reason)
        continue
      id_ = entry["question_id"]
      reason = DUPLICATE_ID if id_ in seen else find_flaw(entry)
      if not reason:
        good[id_] = entry
      elif id_ not in named:
        named.add(id_)
        self._damaged(os.path.basename(path), f"question {id_}", reason)
      seen.add(id_)
    return good, seen

  def _damaged(self, file: str, id_: str, reason: str) -> None:
    self.damage.append({"file": file, "id": id_, "reason": reason})

  def __len__(self) -> int:
    return len(self._entries)

  def annotation(self, index: int) -> dict[str, Any]:
    entry = self._entries[index]
    return {"id": str(entry.id), "text": entry.text, "answers": entry.answers, "answer": entry.answer,
            "answer_type": entry.answer_type, "question_type": entry.question_type}

  def __getitem__(self, index: int) -> dict[str, Any]:
    name = f"COCO_{self._split}_{self._entries[index].image:012}.jpg"
    return self.annotation(index) | {"image": annotations.read_image(self._root, name, (self._split,))}

  def files(self) -> Iterator[str]:
    yield from self._paths
    names = (f"COCO_{self._split}_{entry.image:012}.jpg" for entry in self._entries)
    yield from annotations.image_files(self._root, names, (self._split,))

  def fingerprint(self) -> str:
    return self._digest


def _question_flaw(entry: dict[str, Any]) -> str:
  if "question" not in entry:
    return "no 'question'"
  return flaw(entry, image_id=int) or text.flaw(text.clean(entry["question"]), "question")


def _answers_flaw(entry: dict[str, Any]) -> str:
  reason = flaw(entry, answers=list, **dict.fromkeys(_TEXTS, str))
  if reason or not entry["answers"]:
    return reason or "no answers"
  return next((f"answer {place}: {reason}" for place, a in enumerate(entry["answers"])
               if (reason := flaw(a, answer=str))), "")
