"""Accuracy of answers to questions about images, as VQA v2 counts it. Source: its published evaluation, vqaEval.py.

Its quirks shaped every published number, so they are kept, and each is named where it stands. Metrics are equal to
those of the official code, which runs on Python 2: there \\d means the ten ASCII digits.
"""

import functools
import re
from collections.abc import Sequence

AGREEING = 3  # people who gave an answer, from which on it is wholly right

NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(
  ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # in this order; neither the period nor the colon nor the apostrophe

# Words that lost an apostrophe, and what they become. The table has mistakes ("somebody'd", "ow's'at"), keys in upper
# case that no lower-case word meets ("Im"), and gaps (no "lets", no "its"); all are as published.
_CONTRACTIONS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't
hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've I'dve:I'd've Im:I'm
Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am mightnt:mightn't
mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've neednt:needn't notve:not've
oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've
she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't shouldnt've:shouldn't've shouldn'tve:shouldn't've
somebody'd:somebodyd somebodyd've:somebody'd've somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's
someoned:someone'd someoned've:someone'd've someone'dve:someone'd've someonell:someone'll someones:someone's
somethingd:something'd somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's
thered:there'd thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've
weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd
wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've
whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've
wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've
y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _CONTRACTIONS.split())

_PERIOD = re.compile(r"\.(?![0-9])")
_COMMA_IN_NUMBER = re.compile(r"[0-9],[0-9]")
_PERIODS = int(re.UNICODE)  # 32


@functools.lru_cache(maxsize=2**16)  # the same few thousand answers come again and again
def normalise(answer: str) -> str:
  """Returns an answer as answers are compared: "The U.S., two dogs!" -> "us 2 dogs"."""
  return _words(_punctuation(answer))


def _punctuation(text: str) -> str:
  """Returns the text without punctuation: taken out where a space is beside it anywhere in the text, else a space."""
  out = text
  thousands = _COMMA_IN_NUMBER.search(text)  # a number like 1,000 has all punctuation taken out: "1,000; x/y" -> "… xy"
  for mark in PUNCTUATION:
    beside = f"{mark} " in text or f" {mark}" in text
    out = out.replace(mark, "" if beside or thousands else " ")
  # The published pattern wanted to spare periods after digits, too, but "(?!<=" is a typo that is always true. And the
  # flag re.UNICODE stands where the number of replacements belongs, so the 33rd period and those behind it stay.
  return _PERIOD.sub("", out, count=_PERIODS)


def _words(text: str) -> str:
  """Returns the text in lower case with numbers up to ten in digits, without articles, with apostrophes put back."""
  # "none" counts as 0. Articles go before contractions are looked up, so a single letter "a" is no answer at all.
  words = [NUMBERS.get(word, word) for word in text.lower().split()]
  return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, answers: Sequence[str]) -> float:
  """Returns how right an answer is, from 0 to 1: of 10 people, 1, 2, 3 and 4 who say it make 0.3, 0.6, 0.9 and 1.

  It is the mean of min(1, n / 3) over all ways to leave one of the people out, n the others who gave the same answer.
  Where all of them agree, answers are compared as they are, upper case and periods included: they are normalised only
  where people differ. Line breaks and tabs count as spaces, and spaces around an answer never count.

  Args:
    answer: what is scored.
    answers: what people answered, at least one.

  Source: arXiv 1505.00468, section 3, and vqaEval.py.
  """
  if not answers:
    raise ValueError("answers: expected at least one, got none")
  answer, answers = _bare(answer), [_bare(a) for a in answers]
  if len(set(answers)) > 1:
    answer, answers = normalise(answer), [normalise(a) for a in answers]
  same, others = answers.count(answer), len(answers) - answers.count(answer)
  # One of those who gave this answer is left out, or one of the others.
  return (same * min(1.0, (same - 1) / AGREEING) + others * min(1.0, same / AGREEING)) / len(answers)


def _bare(text: str) -> str:
  return text.replace("\n", " ").replace("\t", " ").strip()


def first_word(text: str) -> str:
  """Returns the first word of a text with the punctuation at it, "" if there is none: how LiMBeR takes an answer."""
  return next(iter(text.split()), "")


def truncate(text: str, answers: Sequence[str]) -> str:
  """Returns as many words of a text as the longest of `answers` has: how MAGMA takes an answer (arXiv 2112.05253).

  Neither paper says whether words or letters are counted. Words, because letters would cut a wrong "yesterday" down to
  a right "yes". One word of a text it never shortens, since no answer of the data set is empty.
  """
  return " ".join(text.split()[: max(len(a.split()) for a in answers)])
