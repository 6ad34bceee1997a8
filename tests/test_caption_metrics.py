"""Scores of captions, against pycocoevalcap, its Java tokenizer and numbers computed by hand."""

import contextlib
import io
import json
import os
import random
import stat
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from limber_jax.errors import UserError
from limber_jax.metrics import captions, ptb
from limber_jax.metrics.captions import one_line, score, tokenize
from limber_jax.metrics.clipscore import clip_score, ref_clip_score

java = pytest.mark.skipif(not captions.has_java(), reason="there is no Java")
FAST = ("cider_d", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l")
TOKENIZERS = [pytest.param(True, marks=java, id="java"), pytest.param(False, id="python")]

THINGS = """
dog|cat|man|woman|fire hydrant|t-shirt|jack-o'-lantern|double-decker bus|Shih Tzu|hot dog
|tennis racket|baseball player|stop sign|skateboarder|teddy bear|pizza|laptop|café|crème brûlée|piñata
|bunch of bananas|flat-screen TV|O'Reilly book|McDonald's sign|iPhone|M&M's|BBQ|4x4|U.S. flag
|Mercedes-Benz|well-dressed couple|black-and-white cow|air-conditioner|DVD|remote control|toilet|kite
|wine glass|motorcycle|St. Bernard|Coca-Cola truck|giraffe|7-Eleven|salt & pepper|R2-D2"""
WHO = """
A|a|The|the|Two|two|Three|3|10|An old|One|A large|Several|A pair of|A man's|A woman's|The dogs'
|This|That's a|Black and white photo of a|A close-up of a|A well-lit|A half-eaten|A red-and-white
|A 2-year-old|A 1950's|An '80s|Dr. Smith's|Mr. Bean's|There are|It's a|Here's a"""
DOES = """
sitting on|standing next to|riding|is holding|are looking at|jumping over|that's parked in front of
|isn't near|doesn't have|can't reach|w/|with|without|and/or|is on top of|on|in|made of|full of
|they're eating|he's throwing|who'd like|cannot see|is going to|gonna eat|who will've seen"""
END = (".", ".", ".", ".", "", "", " .", "!", "?", "...", ";", ", and a dog.", ", on a table.", " in the U.S.",
       " at 10:30 a.m.", " in St. Louis.", " on 5th Ave.", " for $5.00.", ", 100% cotton.", " (old).", " [blurry]",
       ' "hello".', " 'stop'.", " - black & white", " -- vintage", " -vintage", " 6' tall", " 6'2\" tall", " 1/2 full",
       ", 2 1/2 feet long", " at 10 o'clock", " with 1,000 people", " No. 5", " #1", " :)", " etc.", " e.g. a car",
       " in the '90s.", " on the beach, Fla.", " in plan b. The dog sits")
TRICKY = r"""
dog's dogs' it's I'm they've she'd we'll isn't can't cannot gonna gotta wanna o'clock rock 'n' roll y'all 'em 'til 'tis
90's 1990s '90s T-shirt mother-in-law and/or w/ w/o A/C x-ray 2 3/4 1/2 1,000 10,000.50 5:30 10:30am 5ft 6'2" #1 No. $5
$1,000.50 5% 50 % R&B AT&T M&M's b&w & U.S. U.S U.S.A. D.C. Mr. Dr. St. Jr. Inc. etc. e.g. a.m. p.m. vs. - -- --- ...
.. . , ; : ! ? !! ?! " ' '' `` “ ” ‘ ’ ( ) [ ] { } (old) [sic] "hello" 'hello' “hi” (a) 1) 1. http://flickr.com/photos/1
www.flickr.com photo.jpg IMG_1234.JPG me@mail.com @user #tag café naïve jalapeño 日本 ☀ ❤️ 😀 👍🏽 ™ ® ° 25°C — – … • / \
| ~ * ** _ + = < > <b> </b> &amp; &quot; :) ;-) :( <3 X q sky. sky, sky... (sky) McDonald's O'Neill D'Angelo 4x4 3D
20th double-decker ¼ £5 €10 5¢ 100% on in the a"""


def words(table):
  return [" ".join(part.split()) for part in table.split("|")]


def caption_like(count, seed=0):
  """Returns captions as people write them: contractions, hyphens, abbreviations, quotes, numbers, typing mistakes."""
  rng = random.Random(seed)
  things, who, does = (words(table) for table in (THINGS, WHO, DOES))
  out = []
  for _ in range(count):
    text = f"{rng.choice(who)} {rng.choice(things)} {rng.choice(does)} {rng.choice(who).lower()} {rng.choice(things)}"
    text += f", {rng.choice(does)} the {rng.choice(things)}" * (rng.random() < 0.3) + rng.choice(END)
    out.append({0: text.upper(), 1: text.lower(), 2: f"{text} {text}"}.get(rng.randrange(12), text))
  return out


def adversarial(count, seed=0):
  """Returns lines that glue the worst of captions together, often without a space."""
  rng = random.Random(seed)
  pieces, glue = TRICKY.split(), (" ",) * 6 + ("", ".", "-", "/", "'", '"', ",")
  return ["".join(f"{rng.choice(pieces)}{rng.choice(glue)}" for _ in range(rng.randint(1, 9))).strip()
          for _ in range(count)]


def made(images, seed=0):
  """Returns ({id: caption}, {id: five references}): captions share words with their references, two are unlike any."""
  rng = random.Random(seed)
  pool = caption_like(6 * images, seed)
  references = {str(i): pool[5 * i : 5 * i + 5] for i in range(images)}
  candidates = {str(i): " ".join(rng.choice(references[str(i)]).split()[: rng.randint(3, 12)]) for i in range(images)}
  return candidates | {"1": "", "2": ("a dog on the mat, " * 600)[:10_000]}, references


def processes():
  """Returns the Java processes that this one started and that still run."""
  found = []
  for folder in Path("/proc").iterdir():
    if folder.name.isdecimal():
      with contextlib.suppress(OSError):
        name, rest = (folder / "stat").read_text().split("(", 1)[1].rsplit(")", 1)
        if name == "java" and int(rest.split()[1]) == os.getpid():
          found.append(int(folder.name))
  return found


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Puts a `java` of a test's own before all others."""

  def put(script):
    path = tmp_path / "bin" / "java"
    path.parent.mkdir()
    alone = "if '-jar' in sys.argv: assert os.getsid(0) == os.getpid()"  # what a terminal sends is for the parent
    path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{alone}\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)
    captions.has_java.cache_clear()

  yield put
  captions.has_java.cache_clear()


# Tokens

@java
def test_tokens_are_those_of_pycocoevalcap():
  texts = caption_like(400) + adversarial(400) + ["", "", "(old)", "a (very) old [cat]", "ends in nothing", ""]
  texts = [one_line(t) for t in texts]
  theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
  assert tokenize(texts, java=True) == [theirs[i][0] for i in range(len(texts))]


@java
def test_the_port_gives_every_caption_the_tokens_that_java_gives_it():
  texts = caption_like(6000, seed=1)
  wrong = [(text, ours, theirs) for text, ours, theirs in zip(
    texts, tokenize(texts, java=False), tokenize(texts, java=True), strict=True) if ours != theirs]
  assert wrong == []


@java
def test_the_port_errs_on_few_of_the_worst_lines():
  # Lines end in a word: of a full stop after "No" the program asks whether the next line begins with a number.
  texts = [f"{text} x" for text in adversarial(6000, seed=1)]
  pairs = zip(tokenize(texts, java=False), tokenize(texts, java=True), strict=True)
  assert np.mean([ours == theirs for ours, theirs in pairs]) > 0.985


@java
def test_letters_and_signs_have_the_tokens_that_java_gives_them():
  signs = [chr(c) for c in (*range(0x21, 0x7F), *range(0xA1, 0x250), *range(0x391, 0x3CA), *range(0x410, 0x450),
                            *range(0x2010, 0x2016), *range(0x2018, 0x2027), 0x20AC, *range(0x2190, 0x2800, 7),
                            *range(0x3041, 0x3097), *range(0x4E00, 0x9FA5, 97), 0x1F600, 0x1F44D)
           if unicodedata.category(chr(c)) != "Cn"]
  texts = [text for sign in signs for text in (f"a {sign} b", f"a{sign} b", f"a{sign}b x")]
  wrong = [(text, ours, theirs) for text, ours, theirs in zip(
    texts, tokenize(texts, java=False), tokenize(texts, java=True), strict=True) if ours != theirs]
  assert wrong == []


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize(("text", "tokens"), [
  ("A man's dog (old) isn't here.", "a man 's dog -lrb- old -rrb- is n't here"),
  ("[x] {y}", "-lsb- x -rsb- -lcb- y -rcb-"),
  ("w/ 2 1/2 dogs -- cannot... \"stop\"!", "w / 2\xa01/2 dogs can not stop"),
  ("Mr. Smith, in the U.S., at 5 p.m.", "mr. smith in the u.s. at 5 p.m."),
  ("R&B & rock 'n' roll, $5", "r&b & rock 'n' roll $ 5"),
  ("a T-shirt: 1,000 people; 100%", "a t-shirt 1,000 people 100 %"),
  ("", ""), (" \t\n", ""), ("...!?", "!?"), ("\ud800", ""),
])
def test_tokens_by_hand(which, text, tokens):
  assert tokenize(["x", text, "y"], java=which) == ["x", tokens, "y"]


@pytest.mark.parametrize("which", TOKENIZERS)
def test_nothing_inside_a_caption_moves_the_others(which):
  separators = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x00", "\x1a",
                "\ufeff", "\ud800", "<!--", "<a "]
  texts = [text for s in separators for text in (f"a{s}", f"{s}{s}", f"b {s} c", "the end")]
  cut = tokenize(texts, java=which)
  assert cut[3::4] == ["the end"] * len(separators)
  assert all(line.startswith("a") for line in cut[::4])
  for separator, line in zip(separators[:11], cut[2::4], strict=False):
    assert line == "b c", f"{separator!r}"


@pytest.mark.parametrize("text", ["a" * 10_000, "a.b" * 3333, "a-" * 5000, "<a " * 3333, "1.1," * 2500, "'" * 10_000,
                                  "a@" * 5000, "www." * 2500, "\"a=" * 3333, "don't " * 1666])
def test_the_port_is_done_with_ten_thousand_letters_in_time(text):
  start = time.process_time()
  ptb.tokenize(text)
  assert time.process_time() - start < 10


# Scores

@pytest.fixture(scope="module")
def scored():
  """Our scores of made captions, and those of pycocoevalcap's own programs in the order of its COCOEvalCap."""
  candidates, references = made(120)
  ours = score(candidates, references)
  cut = PTBTokenizer()
  given = cut.tokenize({i: [{"caption": one_line(r)} for r in refs] for i, refs in references.items()})
  wrote = cut.tokenize({i: [{"caption": one_line(c)}] for i, c in candidates.items()})
  meteor = Meteor()
  try:
    theirs = {"cider_d": Cider().compute_score(given, wrote), "rouge_l": Rouge().compute_score(given, wrote),
              "meteor": meteor.compute_score(given, wrote)}
  finally:
    meteor.__del__()
    meteor.meteor_p.stdout.close()
    meteor.meteor_p.stderr.close()
  with contextlib.redirect_stdout(io.StringIO()):
    overall, each = Bleu(4).compute_score(given, wrote)
  return ours, theirs | {f"bleu_{n}": pair for n, pair in enumerate(zip(overall, each, strict=True), 1)}


@pytest.mark.process
@java
def test_figures_are_exactly_those_of_pycocoevalcap(scored):
  ours, theirs = scored
  assert ours.metrics == {m: theirs[m][0] for m in captions.METRICS if m in theirs}
  for name, (_, each) in theirs.items():
    assert [item[name] for item in ours.per_image.values()] == list(each), name
  assert ours.tokenizer == "java" and 0.05 < ours.metrics["meteor"] < 1 < ours.metrics["cider_d"]
  assert list(ours.skipped) == ["spice"] and "stanford-corenlp-3.6.0" in ours.skipped["spice"]


@java
def test_an_empty_caption_and_a_very_long_one_are_scored(scored):
  ours, _ = scored
  assert len(ours.per_image) == 120 and all(np.isfinite(list(item.values())).all() for item in ours.per_image.values())
  assert ours.per_image["1"] == dict.fromkeys(ours.metrics, 0.0)


@java
def test_no_java_process_is_left(scored, monkeypatch):
  del scored
  assert processes() == []
  started = []

  class Broken:
    def compute_score(self, targets, hypotheses):
      while not processes():  # METEOR's, which runs meanwhile
        time.sleep(0.01)
      started.extend(processes())
      raise RuntimeError("broken")

  monkeypatch.setattr(captions, "Cider", Broken)
  with pytest.raises(RuntimeError, match="broken"):
    score({"a": "a dog"}, {"a": ["a cat"]}, ("cider_d", "meteor"))
  assert started and processes() == []


@pytest.mark.parametrize("which", TOKENIZERS)
def test_captions_like_their_references_have_a_cider_of_ten(which, monkeypatch):
  monkeypatch.setattr(captions, "has_java", lambda: which)
  texts = {"1": "a red dog runs over the grass", "2": "two people sit (old) on a bench", "3": "white kites fly up high"}
  found = score(texts, {i: [text] * 5 for i, text in texts.items()}, FAST)
  assert found.metrics == pytest.approx({"cider_d": 10.0, **dict.fromkeys(FAST[1:], 1.0)}, abs=1e-6)
  assert {i: item["cider_d"] for i, item in found.per_image.items()} == pytest.approx(dict.fromkeys("123", 10.0))


def test_one_image_has_a_cider_of_zero_and_a_part_has_frequencies_of_its_own(monkeypatch):
  monkeypatch.setattr(captions, "has_java", lambda: False)
  texts = {"1": "a red dog runs over the grass", "2": "a red dog sits down there", "3": "white kites fly up high"}
  references = {i: [text, f"{text} today"] for i, text in texts.items()}
  assert score({"1": texts["1"]}, {"1": references["1"]}, ("cider_d",)).metrics == {"cider_d": 0.0}
  part = {i: texts[i] for i in "12"}
  found = score(part, {i: references[i] for i in part}, ("cider_d",)).metrics
  # In the first two "a red dog" is in both: it weighs nothing among them, and ln 3/2 among all.
  theirs = Cider().compute_score({i: references[i] for i in part}, {i: [text] for i, text in part.items()})[0]
  assert found == {"cider_d": theirs}
  everything = score(texts, references, ("cider_d",)).per_image
  assert np.mean([everything[i]["cider_d"] for i in part]) != pytest.approx(theirs, abs=0.01)


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("separator", ["\r", "\u2028", "\x85", "\v", "\r\n"])
def test_a_line_separator_in_a_caption_changes_no_other_score(which, separator, monkeypatch):
  monkeypatch.setattr(captions, "has_java", lambda: which)
  candidates, references = made(12, seed=3)
  there = score({**candidates, "0": "a dog on the mat"}, references, FAST)
  broken = score({**candidates, "0": f"a dog{separator}on the{separator}mat"}, references, FAST)
  assert broken == there


def test_without_java_captions_have_the_same_scores_and_meteor_is_left_out(monkeypatch):
  candidates, references = made(60, seed=5)
  with_java = score(candidates, references, FAST) if captions.has_java() else None
  monkeypatch.setattr(captions, "has_java", lambda: False)
  without = score(candidates, references)
  assert without.tokenizer == "python"
  assert without.skipped == {"meteor": captions.NO_JAVA, "spice": captions.NO_JAVA}
  assert set(without.metrics) == set(FAST)
  assert with_java is None or without.metrics == with_java.metrics


@pytest.mark.parametrize(("candidates", "references", "metrics", "message"), [
  ({"a": "x"}, {"a": ["x"]}, ("cider",), "no metric 'cider'"),
  ({"a": "x"}, {"b": ["x"]}, ("cider_d",), "not of the same images: 2 have only one of them, such as 'a'"),
  ({"a": "x", "b": "y"}, {"a": ["x"], "b": []}, ("cider_d",), "image 'b' has no references"),
  ({}, {}, ("cider_d",), "no captions to score"),
])
def test_what_cannot_be_scored_is_named(candidates, references, metrics, message):
  with pytest.raises(UserError, match=message):
    score(candidates, references, metrics)


# Programs that do not do what they should

@pytest.mark.parametrize("script", ["sys.exit(1)", "print('install Java'); sys.exit(3)"])
def test_a_java_that_does_not_run_is_none(program, script):
  program(script)
  assert not captions.has_java()
  assert score({"a": "x"}, {"a": ["x"]}, ("rouge_l", "meteor")).skipped == {"meteor": captions.NO_JAVA}


CUT = "'PTBTokenizer' in str(sys.argv) and print(open(sys.argv[-1]).read().lower(), end='')"


def test_a_tokenizer_that_loses_a_line_is_found_out(program):
  program("'-version' in sys.argv or (print('one line'), print('out of memory', file=sys.stderr))")
  with pytest.raises(UserError, match="gave 2 lines for 1 captions: out of memory"):
    score({"a": "x"}, {"a": ["y"]}, ("rouge_l",))


@pytest.mark.parametrize("script", [
  "sys.exit('no memory')", "print('abc', flush=True)\n  sys.exit('no memory')",
  "print('no memory', file=sys.stderr, flush=True)\n  print('1\\nabc', flush=True); input()"])
def test_a_meteor_that_dies_or_babbles_says_why(program, script):
  program(f"{CUT}\nif 'meteor-1.5.jar' in sys.argv:\n  {script}")
  with pytest.raises(UserError, match=r"METEOR's program failed .*no memory"):
    score({"a": "x"}, {"a": ["y"]}, ("meteor",))


def test_spice_is_read_as_its_program_writes_it(program, monkeypatch):
  monkeypatch.setattr(captions, "_missing_models", lambda: "")
  program(f"""{CUT}
if 'spice-1.0.jar' in sys.argv:
  given = json.load(open(sys.argv[sys.argv.index('spice-1.0.jar') + 1]))
  assert [g['test'] for g in given] == ['x b', 'y', 'z'] and given[1]['refs'] == ['r', 's']
  rows = [{{'image_id': g['image_id'], 'scores': {{'All': {{'f': f}}}}}} for g, f in zip(given, (0.25, 0.5, 0.0))]
  json.dump(rows[::-1], open(sys.argv[sys.argv.index('-out') + 1], 'w'))""")
  found = score({"a": "X b", "b": "y", "c": "z"}, {"a": ["q"], "b": ["r", "s"], "c": ["t"]},
                ("spice",))
  assert found.metrics == {"spice": 0.25}
  assert found.per_image == {"a": {"spice": 0.25}, "b": {"spice": 0.5}, "c": {"spice": 0.0}}


def test_a_scene_without_anything_has_no_spice_and_a_failure_is_reported(program, monkeypatch):
  monkeypatch.setattr(captions, "_missing_models", lambda: "")
  program(f"""{CUT}
if 'spice-1.0.jar' in sys.argv:
  given = json.load(open(sys.argv[sys.argv.index('spice-1.0.jar') + 1]))
  if given[0]['test'] == 'fail': sys.exit('InaccessibleObjectException')
  rows = [{{'image_id': g['image_id'], 'scores': {{'All': {{'f': f}}}}}} for g, f in zip(given, (None, 0.5))]
  json.dump(rows, open(sys.argv[sys.argv.index('-out') + 1], 'w'))""")
  found = score({"a": "x", "b": "y"}, {"a": ["q"], "b": ["r"]}, ("spice",))
  assert np.isnan(found.metrics["spice"]) and found.per_image == {"a": {}, "b": {"spice": 0.5}}
  with pytest.raises(UserError, match="SPICE's program failed: InaccessibleObjectException"):
    score({"a": "fail"}, {"a": ["q"]}, ("spice",))


# CLIPScore

def test_clip_score_by_hand():
  images = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]], np.float32)
  texts = np.array([[4.0, 3.0], [0.0, 5.0], [-1.0, 1.0], [0.0, 7.0]], np.float32)
  # Cosines: (12 + 12) / 25, 0, -0.707 and 1.
  np.testing.assert_allclose(clip_score(images, texts), [2.5 * 24 / 25, 0, 0, 2.5], atol=1e-7)


def test_ref_clip_score_by_hand():
  images = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
  texts = np.array([[4.0, 3.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
  references = [np.array([[0.0, 2.0], [4.0, 0.0]]), np.array([[0.0, 1.0]]), np.array([[-1.0, 0.0]]),
                np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])]
  # 1: CLIPScore 2.4, the better reference 0.8: 2 * 2.4 * 0.8 / 3.2. 2: CLIPScore 0. 3: the only reference points away.
  # 4: 2.5 and 1.
  np.testing.assert_allclose(ref_clip_score(images, texts, references), [1.2, 0, 0, 5 / 3.5], atol=1e-12)


@pytest.mark.parametrize(("images", "texts", "references"), [
  ((2, 3), (2, 4), [(1, 4)] * 2), ((2, 3), (3, 3), [(1, 3)] * 3), ((2, 3), (2, 3), [(1, 3)]),
  ((2, 3), (2, 3), [(1, 3), (0, 3)]), ((2, 3), (2, 3), [(1, 3), (1, 2)]),
])
def test_embeddings_that_do_not_belong_together_are_refused(images, texts, references):
  with pytest.raises(ValueError, match="expected"):
    ref_clip_score(np.ones(images), np.ones(texts), [np.ones(r) for r in references])


# Bench

@pytest.mark.parametrize("with_java", [False, pytest.param(True, marks=[java, pytest.mark.long])])
def test_scoring_is_measured(with_java):
  words = ["--images=20", "--references=2"] + ["--nopeer"] * (not with_java)
  done = subprocess.run([sys.executable, "-m", "limber_jax.bench", "captions", *words], capture_output=True, text=True,
                        env=os.environ | ({} if with_java else {"PATH": ""}), check=True)
  out = json.loads(done.stdout)
  assert out["seconds"] > 0 and out["tokenizer"] == ("java" if with_java else "python")
  assert set(captions.METRICS) == set(out["metrics"]) | set(out["skipped"]) | {"spice"}
  assert ("ratio" in out) == ("meteor" in out["metrics"]) == with_java
