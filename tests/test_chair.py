"""CHAIR: which objects captions name, and which of them are not there."""

import pytest

from limber_jax.metrics.chair import OBJECTS, chair, first_sentence, objects, shown


def named(caption):
  return [o for _, o in objects(caption)]


@pytest.mark.parametrize(("caption", "wanted"), [
  ("Two dogs and a puppy chase a CAT.", ["dog", "dog", "cat"]),
  ("a hot dog on a dining table", ["hot dog", "dining table"]),            # no dog
  ("people at the stop sign near a traffic light", ["person", "stop sign", "traffic light"]),
  ("a baby elephant and an adult giraffe", ["elephant", "giraffe"]),       # no person
  ("a baby with a giraffe", ["person", "giraffe"]),
  ("a passenger train on the train tracks", ["train"]),                    # the track is no train
  ("passengers on a train", ["person", "train"]),
  ("a man with a bow tie", ["person", "tie"]),
  ("a toilet seat", ["toilet"]),                                           # no chair
  ("the seat of the toilet, in a chair", ["toilet", "chair"]),
  ("a seat by the window", ["chair"]),
  ("wine glasses, knives and forks", ["wine glass", "knife", "fork"]),
  ("a laptop computer and an iPhone", ["laptop", "cell phone"]),
  ("teddy bears and bears", ["teddy bear", "bear"]),
  ("a man's umbrella; the geese", ["person", "umbrella", "bird"]),
  ("players on a home plate", ["person"]),
  ("a lovely sunset over the hills", []),
  ("", []),
])
def test_objects_of_captions_are_read_as_the_published_rules_say(caption, wanted):
  assert named(caption) == wanted


def test_there_are_80_objects_and_every_name_of_one_is_understood_alone_and_in_the_plural():
  assert len(set(OBJECTS.values())) == 80 and all(OBJECTS[o] == o for o in OBJECTS.values())
  for name, wanted in OBJECTS.items():
    last = name.split()[-1]
    end = "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    plural = name[:-1] + "ies" if last.endswith("y") and last[-2] not in "aeiou" else name + end
    # Of three words the rules know no more than two together.
    for text in (name,) if name in ("skis", "scissors", "people", "children", "oxen", "broccoli") else (name, plural):
      assert set(named(f"there is {text}")) == {wanted}, text


def test_figures_are_those_counted_by_hand():
  captions = ["a dog and a dog by a car", "a cat", "nothing at all", "two people with a kite and a frisbee"]
  truth = [shown(["dog"], ["a pup outside"]), shown([], ["a kitten sleeps"]), shown(["person"], []),
           shown(["person", "kite"], [])]
  found = chair(captions, truth)
  # Mentions 3, 1, 0, 3; wrong are the car and the frisbee.
  assert found.mentions == (("dog", "dog", "car"), ("cat",), (), ("person", "kite", "frisbee"))
  assert found.hallucinated == (("car",), (), (), ("frisbee",))
  assert (found.chair_i, found.chair_s, found.per_caption) == (2 / 7, 2 / 4, 7 / 4)


def test_each_mention_counts_by_itself_and_captions_without_objects_hallucinate_nothing():
  found = chair(["a car, a car and a van", "grass"], [(), ()])
  assert (found.chair_i, found.chair_s) == (1.0, 0.5)
  assert chair(["grass"], [()]).chair_i == 0


def test_an_image_has_what_its_segments_and_its_references_show():
  assert shown(["cell phone", "tv"], ["a man on the couch", "men watch television"]) == {
    "cell phone", "tv", "person", "couch"}


@pytest.mark.parametrize(("text", "wanted"), [
  ("a cat. A dog", "a cat"), (" a cat\nA dog", "a cat"), ("a cat! a dog", "a cat"), ("a cat on it", "a cat on it"),
  ("it is 2.5 m long. A", "it is 2.5 m long"), ("...a cat. A dog", "...a cat"), ("\n\na cat\nb", "a cat"), ("", ""),
  ("?!", "?!"),
])
def test_a_caption_is_cut_behind_its_first_sentence(text, wanted):
  assert first_sentence(text) == wanted
