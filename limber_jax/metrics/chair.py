"""Objects that a caption names and its image does not show: CHAIR. Source: Rohrbach et al., EMNLP 2018.

objects.txt, COCO's 80 objects and their synonyms, holds the list of LisaAnne/Hallucination (BSD 2-clause): an object a
line, its name first. Three entries that cannot match there (of capitals or double spaces) do here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from limber_jax.metrics.words import singular, tokens, word_list

# Two words that are one thing: none of the objects that one of the words alone may be (a train on its track).
PAIRS = (
  "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
  "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
  "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier", "potted plant",
  "bow tie", "laptop computer", "home plate", "train track")
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
VEHICLES = ("jet", "train")

# What two words stand for: a baby elephant is no baby, the passenger of a passenger train none.
MEANS = ({pair: pair for pair in PAIRS} | {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
         | {f"passenger {vehicle}": vehicle for vehicle in VEHICLES}
         | {"bow tie": "tie", "toilet seat": "toilet"})

OBJECTS = word_list("objects")  # name -> object


def objects(caption: str) -> list[tuple[str, str]]:
  """Returns (the name, the object) of each object that a caption names, as often as it does, in order."""
  words = [singular(word) for word in tokens(caption)]
  found, i = [], 0
  while i < len(words):
    pair = " ".join(words[i : i + 2])
    found.append(MEANS[pair] if pair in MEANS else words[i])
    i += 2 if pair in MEANS else 1
  if "toilet" in found:  # "the seat of the toilet" is no chair
    found = [word for word in found if word != "seat"]
  return [(word, OBJECTS[word]) for word in found if word in OBJECTS]


@dataclass(frozen=True)
class Chair:
  """What captions name, and how much of it is not in their images."""

  mentions: tuple[tuple[str, ...], ...]      # of each caption, the objects it names
  hallucinated: tuple[tuple[str, ...], ...]  # those of them that its image does not have

  @property
  def chair_i(self) -> float:
    """The share of mentions that are hallucinated; 0 if there are no mentions."""
    count = sum(map(len, self.mentions))
    return sum(map(len, self.hallucinated)) / count if count else 0.0

  @property
  def chair_s(self) -> float:
    """The share of captions with one hallucinated object at least."""
    return sum(map(bool, self.hallucinated)) / len(self.mentions)

  @property
  def per_caption(self) -> float:
    """Mentions in a caption, on average: who names nothing hallucinates nothing."""
    return sum(map(len, self.mentions)) / len(self.mentions)


def chair(captions: Sequence[str], truth: Sequence[Iterable[str]]) -> Chair:
  """Returns what captions hallucinate.

  Args:
    captions: at least one.
    truth: the objects of each one's image: see `shown`.
  """
  mentions = [tuple(o for _, o in objects(caption)) for caption in captions]
  wrong = [tuple(o for o in each if o not in there) for each, there in zip(mentions, map(set, truth), strict=True)]
  return Chair(tuple(mentions), tuple(wrong))


def shown(categories: Iterable[str], references: Iterable[str]) -> frozenset[str]:
  """Returns the objects of an image: those of its segments (COCO's category names), and those its references name."""
  return frozenset(OBJECTS[c] for c in categories) | {o for text in references for _, o in objects(text)}


def first_sentence(text: str) -> str:
  """Returns a text up to its first full stop, question or exclamation mark or line break, if words stand before it."""
  return re.match(r"\W*(?:[^.!?\n]|[.](?=\d))*", text)[0].strip()
