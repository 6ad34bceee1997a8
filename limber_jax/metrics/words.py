"""Which words of the references stand in a model's captions, and how near the others are. Source: LiMBeR, section 5.1.

Words have one of three categories: nouns, modifiers (adjectives, colours, numbers), and relations (prepositions and
verbs of where things are and what they do). NLTK's tagger tells them apart where NLTK and its data are at hand, lists
of words where they are not. Neither is downloaded.
"""

import functools
import os
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np

CATEGORIES = ("nouns", "modifiers", "relations")
TOP = 50  # words of each category that LiMBeR looks at

Tagger = Callable[[str], list[tuple[str, str]]]  # text -> [(category, word)]
Similarity = Callable[[str, str], float]         # of two nouns, 0 to 1

SYSTEM_WORDNET = "/usr/share/wordnet"  # where the package wordnet-base of Debian puts it

WORDNET_FROM = ("WordNet's index.noun and data.noun: python -m nltk.downloader wordnet "
                "(https://www.nltk.org/data.html), or a directory with them in $WNSEARCHDIR "
                "(https://wordnet.princeton.edu/download)")
TAGGER_FROM = ("pip install limber_jax[words], and python -m nltk.downloader averaged_perceptron_tagger_eng "
               "(https://www.nltk.org/data.html)")


def tokens(text: str) -> list[str]:
  """Returns the words of a text in lower case, in order; hyphens stay inside words, and a final 's is cut off."""
  found = re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())
  return [re.sub(r"['’]s$", "", word) for word in found]


# Words that WordNet has as nouns (helium, arsenic, indium …) and captions as anything else.
FUNCTION_WORDS = frozenset(tokens("""
a an and are as be been being but can could did do does each either else every he her here hers him his how i if is it
its may me might more most much must my no nor not now or our own she should so some such than that the their them then
there these they this those thus too us very was we well were what when where which who whom whose why will would yes
you your am any all just also only even still together away s t
"""))

COPULAS = frozenset(tokens("is are was were be being been am"))

# Nouns in -ing; all others of this ending are taken for verbs.
ING = frozenset(tokens("""
building ceiling clothing painting railing wing king ring string morning evening wedding earring icing frosting topping
thing something anything everything nothing stuffing awning landing dressing pudding dumpling sibling lightning swing
covering siding sling spring
"""))

IRREGULAR = {
  "men": "man", "women": "woman", "children": "child", "grandchildren": "grandchild", "people": "person",
  "feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse", "oxen": "ox", "dice": "die", "buses": "bus",
  "gases": "gas", "lenses": "lens", "skis": "ski", "taxis": "taxi", "menus": "menu", "emus": "emu", "gnus": "gnu",
  "axes": "axe", "shoes": "shoe", "toes": "toe", "canoes": "canoe", "hoes": "hoe", "oboes": "oboe", "does": "doe",
  "ties": "tie", "pies": "pie", "lies": "lie", "cookies": "cookie", "movies": "movie", "brownies": "brownie",
  "collies": "collie", "smoothies": "smoothie", "selfies": "selfie", "zombies": "zombie", "hoodies": "hoodie",
  "veggies": "veggie", "birdies": "birdie", "genies": "genie", "calories": "calorie", "rookies": "rookie",
  "magpies": "magpie", "cacti": "cactus", "corgis": "corgi", "zebus": "zebu", "safaris": "safari", "kiwis": "kiwi",
  "bikinis": "bikini", "zucchinis": "zucchini", "tvs": "tv",
  "knives": "knife", "pocketknives": "pocketknife", "wives": "wife", "housewives": "housewife", "lives": "life",
  "loaves": "loaf", "leaves": "leaf", "shelves": "shelf", "bookshelves": "bookshelf", "calves": "calf",
  "halves": "half", "wolves": "wolf", "elves": "elf", "scarves": "scarf", "thieves": "thief", "hooves": "hoof",
}
INVARIABLE = frozenset(tokens("scissors pants jeans shorts trousers sunglasses binoculars series species moose"))
_COMPOUND = re.compile(r"(.{2,})(men|buses)$")  # policemen, minibuses


def singular(word: str) -> str:
  """Returns the singular of an English noun in lower case; what is no plural stays as it is, as far as one can tell."""
  if word in IRREGULAR:
    return IRREGULAR[word]
  if word in INVARIABLE or len(word) < 4:
    return word
  if compound := _COMPOUND.match(word):
    return compound[1] + IRREGULAR[compound[2]]
  for end, instead in (("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("zzes", "zz"), ("oes", "o"),
                       ("ies", "y")):
    if word.endswith(end):
      return word[: -len(end)] + instead
  return word if not word.endswith("s") or word.endswith(("ss", "us", "is")) else word[:-1]


def word_list(name: str) -> dict[str, str]:
  """Returns {form: word} of a list that comes with limber_jax: a line has a word and its other forms."""
  text = resources.files("limber_jax.metrics").joinpath(f"{name}.txt").read_text(encoding="utf-8")
  lines = [line.split(", ") for line in text.splitlines()]
  return {form: line[0] for line in lines for form in line}


class WordNet:
  """The nouns of WordNet and what is above them, from its own files.

  Wu-Palmer similarity equals that of NLTK's reader: 2 d / (d1 + d2 + 2 d), with the deepest common hypernym (by its
  shortest way to the root; of several, the first by name), d nodes on its longest way to the root, and d1 and d2 steps
  from it to the two synsets. Source: Wu and Palmer, Verb semantics and lexical selection, ACL 1994.
  """

  def __init__(self, index: Iterable[str], data: Iterable[str]):
    """Reads the lines of index.noun and data.noun; see wndb(5WN)."""
    self._senses: dict[str, list[str]] = {}  # lemma -> offsets, the most frequent sense first
    self._above: dict[str, list[str]] = {}   # offset -> offsets of hypernyms, those of instances too
    first: dict[str, str] = {}               # offset -> its first lemma
    for line in index:
      if not line.startswith(" "):  # the licence
        fields = line.split()
        self._senses[fields[0]] = fields[-int(fields[2]) :]
    for line in data:
      if not line.startswith(" "):
        fields = line.partition("|")[0].split()
        words = int(fields[3], 16)
        first[fields[0]] = fields[4].lower()
        pointers = fields[5 + 2 * words :]
        self._above[fields[0]] = [pointers[i + 1] for i in range(0, 4 * int(fields[4 + 2 * words]), 4)
                                  if pointers[i] in ("@", "@i")]
    self._name = {offset: (lemma, self._senses[lemma].index(offset)) for offset, lemma in first.items()}

  @classmethod
  def find(cls) -> "WordNet | None":
    """Returns the WordNet on this machine, None if there is none: see WORDNET_FROM."""
    for folder in _nltk_folders():
      path = os.path.join(folder, "corpora", "wordnet")
      if os.path.isfile(os.path.join(path, "data.noun")):
        return cls.read(path)
      if os.path.isfile(f"{path}.zip"):
        with zipfile.ZipFile(f"{path}.zip") as file:
          return cls(*(file.read(f"wordnet/{name}.noun").decode().splitlines() for name in ("index", "data")))
    for folder in (os.environ.get("WNSEARCHDIR", ""), SYSTEM_WORDNET):
      if os.path.isfile(os.path.join(folder, "data.noun")):
        return cls.read(folder)
    return None

  @classmethod
  def read(cls, folder: str) -> "WordNet":
    """Returns the WordNet in a directory with index.noun and data.noun."""
    with (open(os.path.join(folder, "index.noun"), encoding="utf-8") as index,
          open(os.path.join(folder, "data.noun"), encoding="utf-8") as data):
      return cls(index, data)

  def __contains__(self, noun: str) -> bool:
    return noun.replace(" ", "_") in self._senses

  @functools.cache  # noqa: B019 (there is one, and the words of captions are few)
  def similarity(self, one: str, other: str) -> float:
    """Returns the Wu-Palmer similarity of two nouns, the highest over all their senses; 0 if one is not there."""
    pairs = ((a, b) for a in self._of(one) for b in self._of(other))
    return max((self._wu_palmer(a, b) for a, b in pairs), default=0.0)

  def _of(self, noun: str) -> list[str]:
    return self._senses.get(noun.replace(" ", "_"), [])

  def _wu_palmer(self, one: str, other: str) -> float:
    here, there = self._distances(one), self._distances(other)
    common = here.keys() & there.keys()
    if not common:
      return 0.0
    deepest = max(self._depths(c)[0] for c in common)
    lowest = sorted((c for c in common if self._depths(c)[0] == deepest), key=self._name.__getitem__)
    above = one if one in lowest else lowest[0]
    depth = self._depths(above)[1] + 1
    ways = self._distances(above)
    steps = [min(d + ways[c] for c, d in each.items() if c in ways) for each in (here, there)]
    return 2 * depth / (sum(steps) + 2 * depth)

  @functools.cache  # noqa: B019 (likewise: it holds no more than the synsets of WordNet)
  def _distances(self, offset: str) -> dict[str, int]:
    """Returns the fewest steps to each synset above, {offset: 0} included."""
    found, layer, steps = {}, [offset], 0
    while layer:
      found |= {o: steps for o in layer if o not in found}
      layer, steps = [a for o in layer for a in self._above[o] if a not in found], steps + 1
    return found

  @functools.cache  # noqa: B019 (likewise)
  def _depths(self, offset: str) -> tuple[int, int]:
    """Returns the steps to the root on the shortest and on the longest way."""
    above = [self._depths(a) for a in self._above[offset]]
    return (1 + min(a[0] for a in above), 1 + max(a[1] for a in above)) if above else (0, 0)


def _nltk_folders() -> list[str]:
  """Returns the directories in which NLTK looks for its data."""
  own = os.environ.get("NLTK_DATA", "").split(os.pathsep)
  roots = (sys.prefix, f"{sys.prefix}/share", f"{sys.prefix}/lib", "/usr/share", "/usr/local/share", "/usr/lib",
           "/usr/local/lib")
  return [*filter(None, own), os.path.expanduser("~/nltk_data"), *(f"{root}/nltk_data" for root in roots)]


@dataclass(frozen=True)
class Lexicon:
  """A tagger by lists of words, of English captions: what `find_tagger` falls back on.

  A noun is what `is_noun` knows. Words that are something else too are nouns by their neighbours: a modifier where no
  modifier or noun follows ("an orange", but "is orange"), the plain form of a verb unless after "to" ("a park"), and
  its form in -s unless after a noun ("on skis", but "a man skis").
  """

  is_noun: Callable[[str], bool]
  prepositions: dict[str, str]  # form -> word, here and below
  verbs: dict[str, str]
  modifiers: dict[str, str]

  def __call__(self, text: str) -> list[tuple[str, str]]:
    words, out, before = tokens(text), [], ""
    for word, previous, following in zip(words, ["", *words], [*words[1:], ""], strict=False):
      before, word = self._one(word, before, previous, following)
      if before:
        out.append((before, word))
    return out

  def _one(self, word: str, before: str, previous: str, following: str) -> tuple[str, str]:
    """Returns (category, "" for none, and word) of a word after one of category `before`."""
    noun = self._noun(word)
    if word in self.prepositions:
      return "relations", self.prepositions[word]
    if word in self.verbs:
      if word == self.verbs[word]:
        verb = previous == "to" or (before == "nouns" and noun is None)
      else:
        verb = noun is None or before == "nouns" or not word.endswith("s")
      if verb:
        return "relations", self.verbs[word]
    if word in self.modifiers and (noun is None or previous in COPULAS or following in self.modifiers
                                   or self._noun(following) is not None):
      return "modifiers", self.modifiers[word]
    return ("", "") if noun is None else ("nouns", noun)

  def _noun(self, word: str) -> str | None:
    if not word or word in FUNCTION_WORDS or word in self.prepositions or (word.endswith("ing") and word not in ING):
      return None
    return next((w for w in (singular(word), word) if self.is_noun(w)), None)


@dataclass(frozen=True)
class Perceptron:
  """NLTK's averaged perceptron. Nouns are NN*, modifiers JJ* and CD, relations IN, TO, RP and VB* but forms of be."""

  tag: Callable[[list[str]], list[tuple[str, str]]]
  forms: dict[str, str]  # of verbs: "sitting" -> "sit"; a verb that is not there stays as it is

  def __call__(self, text: str) -> list[tuple[str, str]]:
    out = []
    for word, tag in self.tag(tokens(text)):
      if tag.startswith("NN"):
        out.append(("nouns", singular(word)))
      elif tag.startswith("JJ") or tag == "CD":
        out.append(("modifiers", word))
      elif (tag in ("IN", "TO", "RP") or tag.startswith("VB")) and word not in COPULAS:
        out.append(("relations", self.forms.get(word, word)))
    return out


def find_tagger(nouns: Sequence[str] = (), wordnet: WordNet | None = None) -> tuple[Tagger, str]:
  """Returns the best tagger at hand, and what it is, for results to say.

  Args:
    nouns: what counts as a noun, if NLTK's tagger is not to be asked.
    wordnet: whose nouns count where there is neither NLTK's tagger nor a list.
  """
  prepositions, verbs, modifiers = (word_list(name) for name in ("prepositions", "verbs", "modifiers"))
  if not nouns:
    try:
      from nltk import __version__
      from nltk.tag import PerceptronTagger
      return (Perceptron(PerceptronTagger(lang="eng").tag, verbs),
              f"NLTK {__version__}, averaged_perceptron_tagger_eng")
    except (ImportError, LookupError):  # LookupError: NLTK without its data
      pass
  if nouns:
    is_noun, what = frozenset(singular(n.lower()) for n in nouns).__contains__, f"the {len(nouns)} nouns given"
  elif wordnet is not None:
    is_noun, what = wordnet.__contains__, "the nouns of WordNet"
  else:
    objects = word_list("objects")
    is_noun, what = objects.__contains__, f"{len(objects)} names of COCO's objects"
  return Lexicon(is_noun, prepositions, verbs, modifiers), f"lists of words, and {what}"


@dataclass(frozen=True)
class Word:
  """One word of the references, counted by image."""

  category: str
  word: str
  references: int    # images with the word in one reference at least
  captions: int      # images with the word in the caption
  both: int
  wup: float | None  # of nouns, with a similarity: the mean over the images in `references`

  @property
  def precision(self) -> float:
    """The share of the captions with the word that are right; 0 of none."""
    return self.both / self.captions if self.captions else 0.0

  @property
  def recall(self) -> float:
    return self.both / self.references

  @property
  def f1(self) -> float:
    return 2 * self.both / (self.references + self.captions)


def transfer(references: Sequence[Sequence[str]], captions: Sequence[str], tagger: Tagger,
             similarity: Similarity | None = None, top: int = TOP) -> list[Word]:
  """Returns the words that most references have, and how they come through, category by category.

  Args:
    references: of each image.
    captions: one of each image, in the same order.
    tagger: text -> [(category, word)].
    similarity: of two nouns; for each image that has a noun in its references, the nearest noun of its caption counts,
      0 if there is none. None leaves it out.
    top: words of each category; of equally frequent ones the first in the alphabet.
  """
  said = [set(tagger(caption)) for caption in captions]
  meant, count = [], Counter()
  for texts in references:
    found = [set(tagger(text)) for text in texts]
    for one in found:
      count.update(one)
    meant.append(set().union(*found))
  out = []
  for category in CATEGORIES:
    ranked = sorted((key for key in count if key[0] == category), key=lambda key: (-count[key], key))[:top]
    for key in ranked:
      images = [i for i, all_ in enumerate(meant) if key in all_]
      both = sum(key in said[i] for i in images)
      wup = None
      if similarity is not None and category == "nouns":
        wup = float(np.mean([nearest(key[1], [w for c, w in said[i] if c == "nouns"], similarity) for i in images]))
      out.append(Word(*key, len(images), sum(key in words for words in said), both, wup))
  return out


def nearest(noun: str, others: Iterable[str], similarity: Similarity) -> float:
  """Returns the similarity of a noun and the nearest of others: 1 of itself, 0 if there are none."""
  return max((1.0 if noun == other else similarity(noun, other) for other in others), default=0.0)


def summary(words: Sequence[Word]) -> dict[str, float]:
  """Returns means over the words of each category: "nouns_precision", "nouns_recall", "nouns_f1", "nouns_wup", …"""
  out = {}
  for category in CATEGORIES:
    mine = [w for w in words if w.category == category]
    for name in ("precision", "recall", "f1", "wup"):
      values = [v for w in mine if (v := getattr(w, name)) is not None]
      if values:
        out[f"{category}_{name}"] = float(np.mean(values))
  return out
