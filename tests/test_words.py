"""Words of captions: what they are, how they come through, and how near the others are on WordNet."""

import importlib
import sys
import types
import zipfile

import pytest

from limber_jax.metrics import words
from limber_jax.metrics.words import Lexicon, Perceptron, Word, WordNet, find_tagger, singular, tokens, transfer

# A small WordNet by hand: key -> (lemmas, [(pointer, key above)]). Numbers of nodes from the root, by the shortest and
# the longest way: entity 1, animal 2, pet 3, carnivore 3, feline 4, dog 4, cat 4 or 5.
SYNSETS = {
  "entity": ("entity", []),
  "animal": ("animal beast", [("@", "entity")]),
  "pet": ("pet", [("@", "animal")]),
  "carnivore": ("carnivore", [("@", "animal")]),
  "feline": ("feline felid", [("@", "carnivore")]),
  "cat": ("cat true_cat", [("@", "feline"), ("@", "pet")]),
  "dog": ("dog domestic_dog", [("@", "carnivore"), ("@", "pet")]),
  "rex": ("Rex", [("@i", "dog")]),
  "thing": ("thing", [("@", "entity")]),
  "furniture": ("furniture", [("@", "thing")]),
  "table": ("table", [("@", "furniture")]),
  "bat": ("bat", [("@", "animal")]),
  "club": ("bat club", [("@", "thing")]),
}


def write_wordnet(folder):
  """Writes index.noun and data.noun as WordNet 3.0 lays them out: the number of a synset is where its line starts."""
  def lines(offsets):
    for key, (lemmas, above) in SYNSETS.items():
      below = [("~", k) for k, (_, hypernyms) in SYNSETS.items() if key in [h for _, h in hypernyms]]
      pointers = [f"{symbol} {offsets[k]:08} n 0000" for symbol, k in [*above, *below]]
      names = [f"{lemma} 0" for lemma in lemmas.split()]
      fields = [f"{offsets[key]:08} 03 n {len(names):02x}", *names, f"{len(pointers):03}", *pointers, f"| a {key}  \n"]
      yield key, " ".join(fields)

  licence = "  1 This database is made by hand.  \n"
  offsets, start = dict.fromkeys(SYNSETS, 0), len(licence)
  for key, line in lines(dict(offsets)):
    offsets[key], start = start, start + len(line)
  senses = {}
  for key, (lemmas, _) in SYNSETS.items():
    for lemma in lemmas.lower().split():
      senses.setdefault(lemma, []).append(offsets[key])
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "data.noun").write_text(licence + "".join(line for _, line in lines(offsets)))
  (folder / "index.noun").write_text(licence + "".join(
    f"{lemma} n {len(found)} 1 @ {len(found)} 0 {' '.join(f'{o:08}' for o in found)}  \n"
    for lemma, found in sorted(senses.items())))


@pytest.fixture
def wordnet(tmp_path):
  write_wordnet(tmp_path / "wordnet")
  return WordNet.read(str(tmp_path / "wordnet"))


@pytest.mark.parametrize(("one", "other", "wanted"), [
  # Above both and deepest by the shortest way are carnivore and pet, 3 nodes each; carnivore is the first by name. It
  # is 2 steps above the cat and 1 above the dog.
  ("cat", "dog", 2 * 3 / (2 + 1 + 2 * 3)),
  ("cat", "feline", 2 * 4 / (1 + 0 + 2 * 4)),
  ("feline", "cat", 2 * 4 / (1 + 0 + 2 * 4)),
  ("cat", "table", 2 * 1 / (3 + 3 + 2 * 1)),       # to the root the cat's shorter way, as a pet, counts
  ("dog", "dog", 1.0),
  ("rex", "dog", 2 * 4 / (1 + 0 + 2 * 4)),          # an instance
  ("bat", "dog", 2 * 2 / (1 + 2 + 2 * 2)),          # the animal, of two senses
  ("bat", "table", 2 * 2 / (1 + 2 + 2 * 2)),        # the club
  ("true cat", "felid", 2 * 4 / (1 + 0 + 2 * 4)),
  ("cat", "unicorn", 0.0),
])
def test_wu_palmer_is_what_one_counts_by_hand(one, other, wanted, wordnet):
  assert wordnet.similarity(one, other) == pytest.approx(wanted)


def test_wu_palmer_equals_nltk(wordnet, tmp_path, monkeypatch):
  nltk = pytest.importorskip("nltk")
  reader = importlib.import_module("nltk.corpus.reader.wordnet")
  folder = tmp_path / "wordnet"
  for part in ("verb", "adj", "adv"):
    (folder / f"data.{part}").write_text("  1 WordNet 3.0  \n")
    (folder / f"index.{part}").write_text("")
  for part in ("noun", "verb", "adj", "adv"):
    (folder / f"{part}.exc").write_text("")
  (folder / "lexnames").write_text("".join(f"{i:02}\tnoun.{i}\t1\n" for i in range(45)))
  monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
  monkeypatch.setattr(reader.WordNetCorpusReader, "map_wn", lambda self, *_: None, raising=False)
  with pytest.warns(UserWarning, match="multilingual"):
    theirs = reader.WordNetCorpusReader(str(folder), None)
  names = [lemma for lemmas, _ in SYNSETS.values() for lemma in lemmas.lower().split()]
  for one in names:
    for other in names:
      pairs = [a.wup_similarity(b) for a in theirs.synsets(one, "n") for b in theirs.synsets(other, "n")]
      assert wordnet.similarity(one, other) == pytest.approx(max(pairs)), (one, other)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
  """Hides what this machine has of NLTK and WordNet."""
  monkeypatch.setattr(words, "_nltk_folders", lambda: [str(tmp_path / "nltk_data")])
  monkeypatch.setenv("WNSEARCHDIR", "")
  monkeypatch.setattr(words, "SYSTEM_WORDNET", str(tmp_path / "none"))
  monkeypatch.setitem(sys.modules, "nltk", None)


def test_wordnet_is_found_in_nltks_data_zipped_or_not_and_in_its_own_directory(nowhere, tmp_path, monkeypatch):
  assert WordNet.find() is None
  write_wordnet(tmp_path / "own")
  monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "own"))
  assert "cat" in WordNet.find()
  monkeypatch.setenv("WNSEARCHDIR", "")
  corpora = tmp_path / "nltk_data" / "corpora"
  corpora.mkdir(parents=True)
  with zipfile.ZipFile(corpora / "wordnet.zip", "w") as file:
    for name in ("index.noun", "data.noun"):
      file.write(tmp_path / "own" / name, f"wordnet/{name}")
  found = WordNet.find()
  assert "true cat" in found and "unicorn" not in found
  assert found.similarity("cat", "feline") == pytest.approx(8 / 9)
  write_wordnet(corpora / "wordnet")
  assert "cat" in WordNet.find()


def test_words_are_read_without_signs_and_possessives():
  assert tokens("A man's T-shirt, “two dogs’ bowls” — and 3_cats!") == [
    "a", "man", "t-shirt", "two", "dogs", "bowls", "and", "3", "cats"]
  assert tokens("\u2028 ... \n") == []


@pytest.mark.parametrize(("plural", "wanted"), [
  ("dogs", "dog"), ("buses", "bus"), ("bus", "bus"), ("glasses", "glass"), ("glass", "glass"), ("dress", "dress"),
  ("boxes", "box"), ("benches", "bench"), ("toothbrushes", "toothbrush"), ("babies", "baby"), ("ties", "tie"),
  ("potatoes", "potato"), ("shoes", "shoe"), ("knives", "knife"), ("giraffes", "giraffe"), ("wolves", "wolf"),
  ("gloves", "glove"), ("women", "woman"), ("firemen", "fireman"), ("people", "person"), ("children", "child"),
  ("geese", "goose"), ("mice", "mouse"), ("sheep", "sheep"), ("oxen", "ox"), ("skis", "ski"), ("tennis", "tennis"),
  ("scissors", "scissors"), ("vases", "vase"), ("horses", "horse"), ("oranges", "orange"), ("tvs", "tv"),
  ("gas", "gas"),
])
def test_plurals_are_brought_to_the_singular(plural, wanted):
  assert singular(plural) == wanted and singular(wanted) == wanted


NOUNS = frozenset(["man", "horse", "park", "dog", "orange", "ski", "table", "cat", "building", "hill", "drink"])


@pytest.mark.parametrize(("text", "wanted"), [
  ("A man rides a brown horse in the park.", "n:man r:ride m:brown n:horse r:in n:park"),
  ("Two small dogs are sitting next to an orange", "m:two m:small n:dog r:sit r:next r:to n:orange"),
  ("an orange cat", "m:orange n:cat"),
  ("the cat is orange", "n:cat m:orange"),
  ("a man skis down a snowy hill on skis", "n:man r:ski r:down m:snowy n:hill r:on n:ski"),
  ("dogs drink", "n:dog n:drink"),
  ("men walk to drink", "n:man r:walk r:to r:drink"),
  ("a grey building, parking", "m:gray n:building r:park"),
  ("it is what it is", ""),
  ("", ""),
])
def test_lists_of_words_tell_nouns_modifiers_and_relations_apart(text, wanted):
  tagger = Lexicon(NOUNS.__contains__, *(words.word_list(n) for n in ("prepositions", "verbs", "modifiers")))
  short = {"nouns": "n", "modifiers": "m", "relations": "r"}
  assert " ".join(f"{short[category]}:{word}" for category, word in tagger(text)) == wanted


def test_tags_of_the_penn_treebank_are_sorted_into_three_categories():
  tags = {"two": "CD", "dogs": "NNS", "are": "VBP", "sitting": "VBG", "quietly": "RB", "near": "IN", "a": "DT",
          "bigger": "JJR", "boat": "NN", "to": "TO", "frobbing": "VBG"}
  tagger = Perceptron(lambda text: [(word, tags[word]) for word in text], {"sitting": "sit"})
  assert tagger("Two dogs are sitting quietly near a bigger boat to frobbing") == [
    ("modifiers", "two"), ("nouns", "dog"), ("relations", "sit"), ("relations", "near"), ("modifiers", "bigger"),
    ("nouns", "boat"), ("relations", "to"), ("relations", "frobbing")]


def test_the_best_tagger_at_hand_is_taken_and_named(nowhere, wordnet, monkeypatch):
  tagger, what = find_tagger()
  assert "COCO" in what and tagger("zebras on a carnivore") == [("nouns", "zebra"), ("relations", "on")]
  tagger, what = find_tagger((), wordnet)
  assert "WordNet" in what and tagger("zebras on a carnivore") == [("relations", "on"), ("nouns", "carnivore")]
  tagger, what = find_tagger(["Carnivores"], wordnet)
  assert "1 nouns given" in what and tagger("a cat and carnivores") == [("nouns", "carnivore")]

  class Tagger:
    data = True

    def __init__(self, lang):
      assert lang == "eng"
      if not self.data:
        raise LookupError("Resource not found")

    def tag(self, text):
      return [(word, "NN") for word in text]

  nltk, tag = types.ModuleType("nltk"), types.ModuleType("nltk.tag")
  nltk.__version__, tag.PerceptronTagger = "9.9", Tagger
  monkeypatch.setitem(sys.modules, "nltk", nltk)
  monkeypatch.setitem(sys.modules, "nltk.tag", tag)
  tagger, what = find_tagger((), wordnet)
  assert what == "NLTK 9.9, averaged_perceptron_tagger_eng"
  assert tagger("odd dogs") == [("nouns", "odd"), ("nouns", "dog")]
  Tagger.data = False
  assert "WordNet" in find_tagger((), wordnet)[1]


# Three images. The dog is in the references of two and in the captions of two, of which one is right; a cat is in one
# and said nowhere; red is in all and said once, rightly; on is in one and said there and elsewhere.
REFERENCES = [["a red dog", "one dog on a table"], ["a red dog and a cat"], ["the red table"]]
CAPTIONS = ["a red dog on it", "a table on it", "a dog"]


def counted(**fields):
  tagger = find_tagger(["dog", "cat", "table"])[0]
  return {(w.category, w.word): w for w in transfer(REFERENCES, CAPTIONS, tagger, **fields)}


def test_words_are_counted_by_image():
  found = counted()
  assert found["nouns", "dog"] == Word("nouns", "dog", references=2, captions=2, both=1, wup=None)
  dog, cat, red, on = (found[key] for key in (("nouns", "dog"), ("nouns", "cat"), ("modifiers", "red"),
                                              ("relations", "on")))
  assert (dog.precision, dog.recall, dog.f1) == (1 / 2, 1 / 2, 1 / 2)
  assert (cat.references, cat.captions, cat.precision, cat.recall, cat.f1) == (1, 0, 0, 0, 0)
  assert (red.precision, red.recall, red.f1) == (1, 1 / 3, 1 / 2)
  assert (on.precision, on.recall, on.f1) == (1 / 2, 1, 2 / 3)
  # By how many references have it; of equal ones the first in the alphabet.
  assert [key[1] for key in found if key[0] == "nouns"] == ["dog", "table", "cat"]
  assert [w.word for w in counted(top=1).values()] == ["dog", "red", "on"]


def test_f1_equals_scikit_learn():
  from sklearn.metrics import precision_recall_fscore_support

  in_references, in_captions = [1, 1, 0], [1, 0, 1]  # the dog
  want = precision_recall_fscore_support(in_references, in_captions, average="binary")
  dog = counted()["nouns", "dog"]
  assert (dog.precision, dog.recall, dog.f1) == pytest.approx(want[:3])


def test_the_nearest_noun_of_a_caption_counts(wordnet):
  found = counted(similarity=wordnet.similarity)
  table_to_dog = 2 * 1 / (3 + 3 + 2)
  assert found["nouns", "dog"].wup == pytest.approx((1 + table_to_dog) / 2)  # images 0 and 1
  assert found["nouns", "cat"].wup == pytest.approx(wordnet.similarity("cat", "table"))
  assert found["modifiers", "red"].wup is None
  means = words.summary(list(found.values()))
  assert means["nouns_wup"] == pytest.approx(sum(found["nouns", w].wup for w in ("dog", "cat", "table")) / 3)
  assert means["nouns_recall"] == pytest.approx((1 / 2 + 0 + 0) / 3)
  assert means["modifiers_precision"] == pytest.approx(1 / 2) and "modifiers_wup" not in means


def test_a_caption_without_nouns_is_near_nothing(wordnet):
  found = transfer([["a dog"]], [""], find_tagger(["dog"])[0], wordnet.similarity)
  assert [(w.word, w.wup) for w in found] == [("dog", 0.0)]
