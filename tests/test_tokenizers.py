"""Tokenizers: ids equal to open_clip's on hostile Unicode, round trips, and vocabularies that are not there."""

import gzip
import html
import json
import pickle
import subprocess
import sys

import ftfy
import numpy as np
import pytest

from limber_jax import registry
from limber_jax.config import Tokenizer
from limber_jax.data.tokenizers import (
  END,
  START,
  BpeTokenizer,
  ByteTokenizer,
  ClipTokenizer,
  Gpt2Tokenizer,
  clean,
  load,
)
from limber_jax.errors import UserError

# Planes and blocks whose letters, digits, marks, spaces or cases are treated differently by one library or another.
BLOCKS = [
  (0x00, 0x20), (0x20, 0x7F), (0x7F, 0xA1), (0xA1, 0x250), (0x250, 0x300), (0x300, 0x370), (0x370, 0x400),
  (0x400, 0x530), (0x590, 0x600), (0x600, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200), (0x1680, 0x16A0),
  (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x20D0), (0x20D0, 0x2200), (0x2460, 0x2500), (0x2C00, 0x2C60),
  (0x3000, 0x3100), (0x4E00, 0x4F00), (0xA640, 0xA720), (0xA720, 0xA800), (0xAC00, 0xAD00), (0xE000, 0xE010),
  (0xFB00, 0xFB50), (0xFE00, 0xFE10), (0xFF00, 0x10000), (0x10400, 0x10450), (0x1D400, 0x1D500), (0x1E900, 0x1E960),
  (0x1F1E6, 0x1F200), (0x1F300, 0x1F650), (0x20000, 0x20100), (0x31350, 0x31400), (0xE0000, 0xE0080),
  (0x10FFF0, 0x110000),
]

HOSTILE = [
  "", " ", "\t\n\r\v\f", "a photo of a dog", "A  Photo\nof\ta DOG ", "wow!", "$!%", "!@#", "!", "a!", "!!!!!!!!!!!!",
  "&amp;amp;", "&amp;amp;amp;", "&lt;b&gt; &#x27;s &#39;s &nbsp; &NotAnEntity; &#xD800; &#0; &", "a &amp b",
  "<a>&amp;", "it's he'll they've I'm we'd don't you're 's 't", "IT'S HE'LL", "it\u2019s it\u02bcs",
  "'\u017f '\u017f'\u212a", "'S'T'RE", "0123456789 1,000.50 1st \u0661\u0662\u0663 \u2460\u2461 \u00b2\u00bd \u216b",
  "\u0130stanbul I\u0131\u0130i", "\u1e9e \u00df \u03a3\u03c3\u03c2",
  "e\u0301 \u00e9 \u0065\u0301\u0327 \u1112\u1161\u11ab \u0300\u0301 \u0e01\u0e33",
  "\u212b \u00c5 A\u030a \ufb01 \ufb03 \u0132 \u01c6 \u01c5",
  "\U0001f469\u200d\U0001f4bb \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
  "\U0001f1e9\U0001f1ea 1\ufe0f\u20e3 \U0001f44d\U0001f3fd",
  "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c \u0645\u0631\u062d\u0628\u0627\u064b \u200f\u200e",
  "\uff26\uff55\uff4c\uff4c \uff57\uff49\uff44\uff54\uff48\u3000\uff11\uff12",
  "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4", "a\x00b", "\x00", "\x1b[31mred\x1b[0m",
  "a\x1cb\x1db\x1eb\x1fb\x85b\u2028b\u2029b\u180eb\u200bb\ufeffb", "\ufeffbom",
  "caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d l\u00e2\u20ac\u2122humanit\u00c3\u00a9",
  "\u00ef\u00bb\u00bf", "sch\u00c3\u00b6n", "\u00c2\u00a0", "\x91smart\x92", "<|startoftext|>", "<|endoftext|>",
  "a<|endoftext|>b <|EndOfText|>", "<start_of_text>", "a <end_of_text> b", "<START_OF_TEXT>", "<\u017ftart_of_text>",
  "<end_of_text><end_of_text>", "<start_of_text", "</w>", "a</w>b </w></w>", "\ufffd \ufffe \uffff \U0010ffff \ue000",
  "\U00010400\U00010428 \U0001d400\U0001d7ce \U00020000", "\ud83d\ude00 \ud800 \udfff", "\u0130\u0307",
  "\u0345 \u1f80 \u0390", "x" * 5000, "ab " * 3000, "\u00e9" * 3000, "\U0001f415" * 500, "a" * 63 + " " + "a" * 64,
  "-" * 100, "http://example.com/a_b?c=d&amp;e=f#g", "C:\\Users\\x", "a_b-c.d,e;f:g",
  "\u201c\u2018\u2019\u201d \u2014 \u2026 \u2122", "\u00a0\u2003\u3000x\u00a0",
]


def hostile_texts(count=2500):
  rng = np.random.default_rng(0)
  out = list(HOSTILE)
  while len(out) < count:
    blocks = [BLOCKS[i] for i in rng.integers(len(BLOCKS), size=rng.integers(1, 4))] + [(0x20, 0x7F)] * rng.integers(3)
    picks = rng.integers(len(blocks), size=rng.integers(1, 30))
    out.append("".join(chr(rng.integers(*blocks[p])) for p in picks))
    if rng.random() < 0.3:
      i = rng.integers(len(out))
      out.append(out[i][:50] + HOSTILE[rng.integers(len(HOSTILE))][:50])
    if rng.random() < 0.1:  # mojibake: UTF-8 read as Latin-1 or Windows-1252
      out.append(out[-1].encode("utf-8", "replace").decode(("latin-1", "cp1252")[int(rng.integers(2))], "replace"))
  return out


@pytest.fixture(scope="module")
def vocabulary(open_clip):
  """OpenAI's vocabulary file, which the open_clip wheel carries."""
  return open_clip.tokenizer.default_bpe()


@pytest.fixture(scope="module")
def clip(vocabulary):
  return ClipTokenizer(vocabulary)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  texts = [f"a photo of {n} {c} {a} in the Garden, {n} o'clock" for n in range(9) for c in ("red", "blue", "grün")
           for a in ("dog", "cat", "鳥")]
  return BpeTokenizer.train(texts, 310, str(tmp_path_factory.mktemp("bpe")))


class TestClean:

  def test_it_equals_clips_cleaning_written_out(self):
    for text in hostile_texts():
      plain = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
      assert clean(text) == " ".join(plain.split()).strip().lower()

  def test_the_short_way_for_plain_text_changes_nothing(self):
    rng = np.random.default_rng(1)
    for _ in range(2000):
      text = "".join(chr(c) for c in rng.integers(0x20, 0x7F, size=rng.integers(60)))
      assert clean(text) == " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


class TestClip:

  def test_ids_equal_open_clips_on_hostile_text(self, clip, open_clip):
    theirs = open_clip.tokenizer.SimpleTokenizer()
    texts = hostile_texts()
    assert len(texts) >= 2000
    for text in texts:
      assert clip.encode(text) == theirs.encode(text), ascii(text[:200])
    np.testing.assert_array_equal(clip(texts, 77), theirs(texts, 77).numpy())

  def test_ids_equal_the_published_ones(self, clip):
    for text, ids in {"a diagram": [320, 22697], "a dog": [320, 1929], "a cat": [320, 2368], "wow!": [2781, 256],
                      "$!%": [3, 0, 260], "!@#": [0, 39397]}.items():
      assert clip.encode(text) == ids
    assert (clip.sot, clip.eot, clip.vocab_size) == (49406, 49407, 49408)

  def test_decoding_equals_open_clips_up_to_the_last_space(self, clip, open_clip):
    theirs = open_clip.tokenizer.SimpleTokenizer()
    for text in hostile_texts(600):
      ids = clip.encode(text)
      if "</w>" in text or {clip.sot, clip.eot} & set(ids):  # theirs drops the one, ours stops at the other
        continue
      assert clip.decode([clip.sot, *ids, clip.eot, 0, 0]) == theirs.decode(ids).rstrip()

  @pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json and merges.txt"])
  def test_a_directory_of_transformers_gives_the_same_tokenizer(self, clip, layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = {token: i for i, token in clip._token.items()}
    if layout == "tokenizer.json":
      transformers.CLIPTokenizer(vocab=vocab, merges=clip._merges).save_pretrained(tmp_path)
    else:
      (tmp_path / "vocab.json").write_text(json.dumps(vocab))
      (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in clip._merges) + "\n")
    same = ClipTokenizer(str(tmp_path))
    assert same.fingerprint() == clip.fingerprint()
    for text in hostile_texts(300):
      assert same.encode(text) == clip.encode(text)

  @pytest.mark.parametrize("damage", ["empty", "cut", "text", "other"])
  def test_a_damaged_vocabulary_file_is_reported_in_one_line(self, vocabulary, damage, tmp_path):
    file = tmp_path / "x.txt.gz"
    with open(vocabulary, "rb") as opened:
      whole = opened.read()
    other = gzip.compress(b"a\nb c\n")
    file.write_bytes({"empty": b"", "cut": whole[:5000], "text": b"#version\n", "other": other}[damage])
    with pytest.raises(UserError, match=r"config\.data\.tokenizer\.path=.*x\.txt\.gz") as caught:
      ClipTokenizer(str(file))
    assert "\n" not in str(caught.value)

  def test_a_directory_without_a_tokenizer_is_reported_and_never_an_empty_tokenizer(self, tmp_path):
    # transformers 5.23 makes a tokenizer of two tokens of such a directory, without a word.
    with pytest.raises(UserError, match=r"no tokenizer\.json there"):
      ClipTokenizer(str(tmp_path))

  def test_a_vocabulary_that_is_not_clips_is_refused(self, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTokenizer(vocab={"a": 0, "b": 1, START: 2, END: 3}, merges=[]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a CLIP vocabulary"):
      ClipTokenizer(str(tmp_path))

  def test_an_end_that_is_not_the_highest_id_is_refused(self, clip, tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = {token: i for i, token in clip._token.items()}
    vocab[START], vocab[END] = vocab[END], vocab[START]
    transformers.CLIPTokenizer(vocab=vocab, merges=clip._merges).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="must have the highest id"):
      ClipTokenizer(str(tmp_path))

  @pytest.mark.parametrize("path", ["", "nobody/nothing", "/no/such/directory"])
  def test_without_a_vocabulary_the_ways_to_get_one_are_reported(self, path, monkeypatch, tmp_path):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"--config\.data\.tokenizer\.path=.*name=bytes") as caught:
      ClipTokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="session")
def gpt2_directory(tmp_path_factory):
  """A GPT-2 vocabulary of our own in the layout of the hub: vocab.json, merges.txt, tokenizer.json; as GPT-J's are."""
  import tokenizers
  directory = tmp_path_factory.mktemp("gpt2")
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator([f"A photo of the number {i}, isn't it? It's\n  {i * 37} dogs' cafés." for i in range(300)],
                          vocab_size=600, special_tokens=[])
  bpe.add_special_tokens(["<|endoftext|>"])
  vocab = json.loads(bpe.to_str())["model"]["vocab"] | {"<|endoftext|>": len(bpe.get_vocab()) - 1}
  bpe.save_model(str(directory))
  (directory / "vocab.json").write_text(json.dumps(vocab))
  return directory


@pytest.fixture
def gpt2(gpt2_directory):
  return Gpt2Tokenizer(str(gpt2_directory))


class TestGpt2:

  def test_ids_equal_those_of_transformers_on_hostile_text(self, gpt2_directory):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(str(gpt2_directory))
    ours = Gpt2Tokenizer(str(gpt2_directory))
    assert ours.vocab_size == len(theirs) and ours.eot == theirs.eos_token_id == ours.vocab_size - 1
    for text in hostile_texts(800):
      if "endoftext" in text.lower() or any("\ud800" <= c <= "\udfff" for c in text):
        continue  # transformers takes the mark for itself; half a surrogate is no text
      ids = ours.encode(text)
      assert ids == theirs.encode(text), repr(text)
      assert ours.decode(ids) == text

  def test_a_clip_text_tower_may_not_have_it(self, gpt2):
    with pytest.raises(UserError, match="would take the start for the end"):
      gpt2("a dog", 12)

  def test_the_end_inside_a_text_is_letters(self, gpt2):
    ours = gpt2
    assert ours.eot not in ours.encode("a<|endoftext|>b")
    assert ours.decode(ours.encode("a<|endoftext|>b")) == "a<|endoftext|>b"

  def test_tokenizer_json_gives_the_same_ids(self, gpt2_directory, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Tokenizer.from_pretrained(str(gpt2_directory)).save_pretrained(str(tmp_path))
    assert (tmp_path / "tokenizer.json").is_file() and not (tmp_path / "merges.txt").is_file()
    one, other = Gpt2Tokenizer(str(gpt2_directory)), Gpt2Tokenizer(str(tmp_path))
    assert one.encode("A photo of 3 dogs.") == other.encode("A photo of 3 dogs.")
    assert one.fingerprint() == other.fingerprint()

  def test_other_directories_are_reported(self, tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json there, nor vocab\.json and merges\.txt"):
      Gpt2Tokenizer(str(tmp_path))
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match=r"not GPT-2's vocabulary, '<\|endoftext\|>' is not among its 1 tokens"):
      Gpt2Tokenizer(str(tmp_path))


class TestBytes:

  def test_ids_are_the_bytes_plus_one(self):
    assert ByteTokenizer().encode("aé\0") == [0x61 + 1, 0xC3 + 1, 0xA9 + 1]  # ftfy drops control characters
    assert ByteTokenizer()("A", 4).tolist() == [[257, 0x62, 258, 0]]

  def test_a_path_is_refused(self):
    with pytest.raises(UserError, match="reads no file"):
      ByteTokenizer("x")


class TestBpe:

  def test_frequent_words_are_one_token_wherever_they_stand(self, bpe):
    assert len(bpe.encode("dog")) == 1
    assert bpe.encode("dog dog Dog") == bpe.encode("dog") * 3

  def test_marks_inside_a_text_are_text(self, bpe):
    ids = bpe.encode(f"{START} {END} {BpeTokenizer.PAD}")
    assert not {0, bpe.sot, bpe.eot} & set(ids)
    assert bpe.decode(ids) == f"{START} {END} {BpeTokenizer.PAD}"

  def test_training_twice_gives_the_same_file(self, tmp_path):
    texts = ["a photo of a dog", "zwei Katzen 12 猫", "x y z xy yz"] * 3
    for name in "ab":
      BpeTokenizer.train(iter(texts), 280, str(tmp_path / name))
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()

  def test_the_vocabulary_has_the_size_asked_for(self, bpe):
    assert bpe.vocab_size == 310

  @pytest.mark.parametrize(("content", "message"), [
    (None, r"no tokenizer\.json there; .*train_tokenizer"),
    ("{", r"tokenizer\.json: "),
    ('{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}', "not made by limber_jax"),
  ])
  def test_a_directory_that_does_not_fit_is_reported(self, content, message, tmp_path):
    if content is not None:
      (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
      BpeTokenizer(str(tmp_path))

  def test_nothing_is_overwritten_and_a_vocabulary_holds_all_bytes(self, tmp_path):
    BpeTokenizer.train(["a"], 300, str(tmp_path))
    with pytest.raises(UserError, match="is there already"):
      BpeTokenizer.train(["a"], 300, str(tmp_path))
    with pytest.raises(UserError, match="at least 259"):
      BpeTokenizer.train(["a"], 258, str(tmp_path / "other"))


@pytest.fixture(params=sorted(registry.TOKENIZERS))
def tokenizer(request):
  return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


@pytest.fixture(params=sorted(registry.TOKENIZERS.keys() - {"gpt2"}))
def tower_tokenizer(request):
  """A tokenizer that a CLIP text tower may have."""
  return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue(request.param)


def test_every_tokenizer_writes_start_ids_end_and_zeros(tower_tokenizer):
  tokenizer = tower_tokenizer
  rows = tokenizer(["a dog", "", "a photo of a dog " * 50], 12)
  assert rows.shape == (3, 12) and rows.dtype == np.int32
  for row, text in zip(rows, ["a dog", ""], strict=False):
    ids = tokenizer.encode(text)
    assert row.tolist() == [tokenizer.sot, *ids, tokenizer.eot] + [0] * (10 - len(ids))
  assert rows[2, 0] == tokenizer.sot and rows[2, -1] == tokenizer.eot and (rows[2, 1:-1] < tokenizer.sot).all()
  assert tokenizer("a dog", 12).tolist() == rows[:1].tolist()
  assert tokenizer([], 12).shape == (0, 12)


def test_every_tokenizer_ends_texts_with_its_highest_id(tower_tokenizer):
  tokenizer = tower_tokenizer
  assert tokenizer.eot == tokenizer.vocab_size - 1 and tokenizer.sot == tokenizer.eot - 1
  for text in hostile_texts(400):
    if "of_text" not in clean(text):  # open_clip's marks, see ClipTokenizer
      row = tokenizer(text, 32)[0]
      ids = tokenizer.encode(text)
      assert row.argmax() == min(len(ids) + 1, 31) and row.max() == tokenizer.eot
      assert all(0 <= i < tokenizer.sot for i in ids)


def test_every_tokenizer_refuses_long_texts_only_if_told_to(tower_tokenizer):
  tokenizer = tower_tokenizer
  text = "dog " * 40
  assert tokenizer(text, 10).shape == (1, 10)
  with pytest.raises(UserError, match="at most 10 fit"):
    tokenizer(text, 10, truncate=False)
  with pytest.raises(UserError, match="no room"):
    tokenizer(text, 1)


def test_every_tokenizer_survives_pickling(tokenizer):
  copy = pickle.loads(pickle.dumps(tokenizer))
  assert copy.fingerprint() == tokenizer.fingerprint() and copy.vocab_size == tokenizer.vocab_size
  for text in hostile_texts(200):
    assert copy.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_decoding_gives_the_cleaned_text_back(name, request):
  tokenizer = ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)
  for text in hostile_texts():
    assert tokenizer.decode(tokenizer.encode(text)) == clean(text)
    if len(clean(text)) < 50:
      assert tokenizer.decode(tokenizer(text, 1000)[0]) == clean(text)


def test_a_text_cut_within_a_letter_still_decodes(bpe):
  for tokenizer in (ByteTokenizer(), bpe):
    assert tokenizer.decode(tokenizer("é" * 30, 12)[0]).startswith("éé")


def test_fingerprints_tell_tokenizers_apart(clip, bpe, tmp_path):
  other = BpeTokenizer.train(["something else altogether"], 300, str(tmp_path))
  assert len({t.fingerprint() for t in (clip, bpe, other, ByteTokenizer())}) == 4


def test_load_tells_the_nearest_name():
  assert load(Tokenizer(name="bytes")).vocab_size == 259
  with pytest.raises(UserError, match="did you mean 'bytes'"):
    load(Tokenizer(name="byte"))


@pytest.mark.process
@pytest.mark.parametrize("given", ["table", "lines", "config"])
def test_the_command_trains_on_the_users_captions(given, tmp_path):
  (tmp_path / "x.tsv").write_text("title\tfilepath\nmany dogs\tmissing.png\nmany cats\tmissing.png\n")
  (tmp_path / "x.txt").write_text("many dogs\nmany cats\n")
  flag = {"table": f"--source={tmp_path}/x.tsv", "lines": f"--source={tmp_path}/x.txt",
          "config": "--config=experiments/quickstart.py"}[given]
  command = [sys.executable, "-m", "limber_jax.train_tokenizer", flag, "--vocab_size=300", f"--out={tmp_path}/out"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "--config.data.tokenizer.name=bpe" in done.stdout and "--config.model.text.vocab=" in done.stdout
  assert ("(of a language model --config.model.vocab=" in done.stdout) == (given != "config")
  tokenizer = BpeTokenizer(f"{tmp_path}/out")
  word = "digit" if given == "config" else "many"
  assert tokenizer.vocab_size <= 300 and len(tokenizer.encode(word)) < len(word)


@pytest.mark.process
@pytest.mark.parametrize(("flags", "message"), [
  ([], "either --source=FILE"), (["--source=x.txt"], "--out=DIR is missing"), (["x.txt"], "wanted flags only"),
  (["--source=/nowhere.txt", "--out=/tmp/never"], "No such file"),
])
def test_the_command_tells_a_mistake_in_one_line(flags, message):
  done = subprocess.run([sys.executable, "-m", "limber_jax.train_tokenizer", *flags], capture_output=True, text=True,
                        check=False)
  assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
