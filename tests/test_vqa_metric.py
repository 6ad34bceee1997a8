"""Answers to questions about images, scored: against what the official code of VQA v2 gave, run on Python 2.7.18."""

import pytest

from limber_jax.metrics import vqa

# An answer, and what the official code makes of it.
NORMALISED = (
  ("yes", "yes"), ("Yes", "yes"), ("YES!", "yes"), ("no.", "no"), ("No...", "no"), ("two", "2"), ("Two", "2"),
  ("ten", "10"), ("eleven", "eleven"), ("none", "0"), ("None", "0"), ("zero", "0"), ("nothing", "nothing"),
  ("one hundred", "1 hundred"), ("a dog", "dog"), ("an apple", "apple"), ("the the end", "end"), ("A", ""),
  ("the", ""), ("another", "another"), ("athe", "athe"), ("dont", "don't"), ("Don't", "don't"), ("don't", "don't"),
  ("cant", "can't"), ("couldnt've", "couldn't've"), ("couldn'tve", "couldn't've"), ("shouldve", "should've"),
  ("its", "its"), ("it's", "it's"), ("Im", "im"), ("im", "im"), ("Ive", "ive"), ("Id've", "id've"),
  ("id've", "id've"), ("lets", "lets"), ("let's", "let's"), ("ow's'at", "'ow's'at"), ("'ow'sat", "'ow's'at"),
  ("somebody'd", "somebodyd"), ("somebodyd've", "somebody'd've"), ("twas", "'twas"), ("oclock", "o'clock"),
  ("5 oclock", "5 o'clock"), ("o'clock", "o'clock"), ("5 o'clock", "5 o'clock"), ("yall'll", "y'all'll"),
  ("maam", "ma'am"), ("isnt it", "isn't it"), ("she's", "she's"), ("wont", "won't"), ("hes", "he's"),
  ("1,000", "1000"), ("10,000 people", "10000 people"), ("1, 000", "1 000"), ("1,a", "1"), ("red,blue", "red blue"),
  ("red, blue", "red blue"), ("red ,blue", "red blue"), ("a,b,c", "b c"), ("1,2,3", "123"),
  ("1,000; red/blue", "1000 redblue"), ("10.5", "10.5"), ("3.5.", "3.5"), ("3.", "3"), ("U.S.A.", "usa"),
  ("U.S. flag", "us flag"), (".5", ".5"), ("p.m.", "pm"), ("5:30", "5:30"), ("5:30 p.m.", "5:30 pm"),
  ("$5.00", "$5.00"), ("5%", "5%"), ("50% off", "50% off"), ("#1", "#1"), ("a.b", "ab"), ("...", ""),
  ("1...2", "1.2"), ("left-right", "left right"), ("left - right", "left right"), ("left -right", "left right"),
  ("t-shirt", "t shirt"), ("mother/daughter", "mother daughter"), ("and/or", "and or"), ("yes/no", "yes no"),
  ("yes / no", "yes no"), ("(red)", "red"), ("red (dark)", "red dark"), ("[1]", "1"), ("{x}", "x"), ("a_b", "b"),
  ("snake_case", "snake case"), ("\"quoted\"", "quoted"), ("say \"hi\"", "say hi"), ("what?", "what"),
  ("what ?", "what"), ("wow!!", "wow"), ("e-mail@home.com", "e mail homecom"), ("x=y", "x y"), ("x = y", "x y"),
  ("1+1", "1 1"), ("1 + 1", "1 1"), ("back\\slash", "back slash"), ("`tick`", "tick"), ("<b>", "b"), ("a<b>c", "b c"),
  ("man's", "man's"), ("mens'", "mens'"), ("'tis", "'tis"), ("two's", "two's"), ("one-way", "1 way"),
  ("two dogs and three cats", "2 dogs and 3 cats"), ("nine,ten", "9 10"), ("one,two", "1 2"), ("Four  five", "4 5"),
  ("  spaced  out ", "spaced out"), ("tab\there", "tab here"), ("", ""), ("   ", ""), ("!", ""), ("-", ""),
  ("?!", ""), ("a an the", ""), ("theatre", "theatre"), ("rock'n'roll", "rock'n'roll"), ("7-eleven", "7 eleven"),
  ("21st", "21st"), ("1st", "1st"), ("no, yes", "no yes"), ("no,yes", "no yes"), ("can't", "can't"),
  ("we've", "we've"), ("wed", "wed"), ("wed've", "we'd've"), ("there're", "there're"), ("café", "café"),
  ("naïve.", "naïve"), ("5,0", "50"), ("x,5", "x 5"), ("5,x", "5 x"), ("100,000,000", "100000000"),
  ("black & white", "black & white"), ("black and white", "black and white"), ("him/her.", "him her"),
  ("it’s", "it’s"), ("٣,٤", "٣ ٤"), ("２.５", "２５"),
)

# An answer, what ten people said, and the percentage of the official code.
SCORED = (
  ("yes", {"no": 10}, 0), ("yes", {"yes": 1, "no": 9}, 30), ("yes", {"yes": 2, "no": 8}, 60),
  ("yes", {"yes": 3, "no": 7}, 90), ("yes", {"yes": 4, "no": 6}, 100), ("yes", {"yes": 9, "no": 1}, 100),
  ("yes", {"yes": 10}, 100),
  # All agree: compared as they are.
  ("Yes", {"yes": 10}, 0), ("yes.", {"yes": 10}, 0), (" yes\n", {"yes": 10}, 100), ("2", {"two": 10}, 0),
  ("two", {"two": 10}, 100), ("dog", {"dog\n": 5, "\tdog": 5}, 100), ("Dog", {"dog": 5, "dog ": 5}, 0),
  # They differ: normalised.
  ("Yes.", {"yes": 9, "no": 1}, 100), ("2", {"two": 9, "2": 1}, 100), ("two", {"2": 9, "two": 1}, 100),
  ("none", {"0": 5, "none": 5}, 100), ("the dog", {"dog": 5, "a dog": 5}, 100),
  ("Dont", {"don't": 3, "dont": 3, "no": 4}, 100), ("", {"a": 2, "the": 3, "x": 5}, 100),
  ("1,000", {"1000": 2, "1,000": 2, "many": 6}, 100), ("blue", {"blue": 2, "light blue": 8}, 60),
  # Fewer people than ten.
  ("yes", {"yes": 3}, 200 / 3), ("yes", {"yes": 1, "no": 1}, 100 / 6), ("no", {"yes": 3, "no": 1}, 25),
)


@pytest.mark.parametrize(("answer", "expected"), NORMALISED)
def test_an_answer_is_normalised_as_the_official_code_does(answer, expected):
  assert vqa.normalise(answer) == expected


def test_only_32_periods_are_taken_out():
  assert vqa.normalise("." * 40) == "." * 8
  assert vqa.normalise("b." * 40) == "b" * 33 + "." + "b." * 7


@pytest.mark.parametrize(("answer", "people", "percent"), SCORED)
def test_an_answer_is_scored_as_the_official_code_does(answer, people, percent):
  answers = [said for said, count in people.items() for _ in range(count)]
  assert 100 * vqa.accuracy(answer, answers) == pytest.approx(percent)
  assert vqa.accuracy(answer, answers[::-1]) == vqa.accuracy(answer, answers)


def test_an_answer_without_people_is_refused():
  with pytest.raises(ValueError, match="answers: expected at least one, got none"):
    vqa.accuracy("yes", [])


@pytest.mark.parametrize(("text", "word"), [
  ("a dog and a cat", "a"), (" yes, it is", "yes,"), ("two\nQ: what", "two"), ("", ""), (" \n", ""),
])
def test_the_first_word_of_a_text(text, word):
  assert vqa.first_word(text) == word


def test_a_text_is_cut_to_the_words_of_the_longest_answer():
  assert vqa.truncate(" a  light blue sky", ["blue", "light blue"]) == "a light"
  assert vqa.truncate("yesterday", ["yes", "no"]) == "yesterday"
  assert vqa.truncate("red", ["a very long answer"]) == "red"
