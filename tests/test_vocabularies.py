"""Vocabulary files with flaws: each is one line, read within bounds, and nothing but ids and merges has an effect."""

import gzip
import json
import os

import pytest

from limber_jax.config import Tokenizer
from limber_jax.data import tokenizers, vocabularies
from limber_jax.data.tokenizers import BpeTokenizer, ClipTokenizer, Gpt2Tokenizer
from limber_jax.errors import UserError
from limber_jax.weights import load


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Returns {kind: the JSON of a good tokenizer.json, as its own library writes it}."""
  transformers = pytest.importorskip("transformers")
  folder = tmp_path_factory.mktemp("whole")
  BpeTokenizer.train(["a red dog", "two blue cats"] * 4, 290, str(folder / "bpe"))
  letters = list(vocabularies.LETTER.values())
  end = [*letters, "do", "dog", "<|endoftext|>"]
  merges = [("d", "o"), ("do", "g")]
  transformers.GPT2Tokenizer(vocab={t: i for i, t in enumerate(end)}, merges=merges).save_pretrained(folder / "gpt2")
  clip = [*letters, *(f"{c}</w>" for c in letters), "do", "dog</w>", vocabularies.START, vocabularies.END]
  transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(clip)}, merges=[("d", "o"), ("do", "g</w>")]
                             ).save_pretrained(folder / "clip")
  return {kind: json.loads((folder / kind / "tokenizer.json").read_text()) for kind in KINDS}


KINDS = {"bpe": BpeTokenizer, "gpt2": Gpt2Tokenizer, "clip": ClipTokenizer}

# What is done to the JSON or to its model, and what is said of it. A text is the whole file.
FLAWS = {
  "not JSON": ("{", "not JSON"), "deep": ("[" * 10**5, "not JSON"), "a list": ("[]", "wanted a JSON object, got list"),
  "a number of thousands of digits": ('{"model": ' + "1" * 5000 + "}", "not JSON"),
  "not UTF-8": (b"\xff\xfe", "UTF-16"), "nothing": ("{}", r"wanted a model of byte-pair encoding \(BPE\), got None"),
  "another model": (lambda m: m.update(type="WordPiece"), "got 'WordPiece'"),
  "no merges": (lambda m: m.pop("merges"), "no vocab or no merges"),
  "vocab a list": (lambda m: m.update(vocab=[]), "no vocab or no merges"),
  "an id of text": (lambda m: m["vocab"].update(d="1"), "token 'd' has the id '1', wanted a number"),
  "an id below 0": (lambda m: m["vocab"].update(d=-1), "token 'd' has the id -1"),
  "a boolean": (lambda m: m["vocab"].update(d=True), "token 'd' has the id True"),
  "an id of 1e11": (lambda m: m["vocab"].update(d=10**11), "the id 100000000000, wanted a number from 0 to 9,999,999"),
  "an id twice": (lambda m: m["vocab"].update(d=m["vocab"]["o"]), "'d' and 'o' have the same id|'o' and 'd' have"),
  "a merge of one": (lambda m: m["merges"].append("dog"), "merge [0-9]+ is 'dog', wanted two tokens"),
  "a merge of three": (lambda m: m["merges"].append("d o g"), "merge [0-9]+ is 'd o g', wanted two tokens"),
  "a merge of numbers": (lambda m: m["merges"].append([1, 2]), "merge [0-9]+ is '1 2', wanted two tokens"),
  "a merge that is none": (lambda m: m["merges"].append(3), "merge [0-9]+ is '3', wanted two tokens"),
  "a merge of nothing": (lambda m: m["merges"].append(["", "d"]), "merge [0-9]+ is ' d', wanted two tokens"),
  "a merge of unknowns": (lambda m: m["merges"].append("d ☃"), "'d ☃': '☃' is not in the vocabulary"),
  "a merge to an unknown": (lambda m: m["merges"].append("d ~"), "'d ~': 'd~' is not in the vocabulary"),
  "dropout": (lambda m: m.update(dropout=0.5), "dropout=0.5, which is not done here"),
  "merges left out": (lambda m: m.update(ignore_merges=True), "ignore_merges=True, which is not done here"),
}


def write(folder, kind, whole, change):
  if isinstance(change, str | bytes):
    (folder / "tokenizer.json").write_bytes(change if isinstance(change, bytes) else change.encode())
  else:
    values = json.loads(json.dumps(whole[kind]))
    change(values["model"])
    (folder / "tokenizer.json").write_text(json.dumps(values))
  return str(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_in_a_tokenizer_is_one_line_that_names_the_file(kind, flaw, whole, tmp_path):
  change, message = FLAWS[flaw]
  with pytest.raises(UserError, match=rf"tokenizer\.json: .*(?:{message})") as caught:
    KINDS[kind](write(tmp_path, kind, whole, change))
  assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


GROWING = {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 1000}
EXPLODING = {"type": "Split", "pattern": {"Regex": "(a|a)*(a|aa)*(x+x+)+$"}, "behavior": "Isolated", "invert": False}
PADDING = {"strategy": {"Fixed": 10**8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
           "pad_type_id": 0, "pad_token": "!"}
CUTTING = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), [("normalizer", GROWING), ("pre_tokenizer", EXPLODING),
                                             ("padding", PADDING), ("truncation", CUTTING)])
def test_rules_that_grow_texts_or_never_end_are_refused_or_have_no_effect(kind, name, value, whole, tmp_path):
  (tmp_path / "tokenizer.json").write_text(json.dumps(whole[kind]))
  texts = ["a dog", "a" * 5000]
  wanted = [KINDS[kind](str(tmp_path)).encode(text) for text in texts]
  assert 1 < len(wanted[0]) < 6
  (tmp_path / "tokenizer.json").write_text(json.dumps(whole[kind] | {name: value}))
  try:
    found = [KINDS[kind](str(tmp_path)).encode(text) for text in texts]
  except UserError as error:
    assert kind != "clip" and f"its {name} is {{" in str(error)
  else:
    assert found == wanted and (kind == "clip" or name in ("padding", "truncation"))


def test_a_tokenizer_of_another_regular_expression_is_no_gpt2(whole, tmp_path):
  """As Qwen's is, whose vocabulary has <|endoftext|> too."""
  splits = {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "\\p{L}+"}, "behavior": "Isolated", "invert": False},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}
  (tmp_path / "tokenizer.json").write_text(json.dumps(whole["gpt2"] | {"pre_tokenizer": splits}))
  with pytest.raises(UserError, match=r"its pre_tokenizer is .*splits texts by GPT-2's rule"):
    Gpt2Tokenizer(str(tmp_path))
  one = {"type": "Sequence", "pretokenizers": [whole["gpt2"]["pre_tokenizer"]]}
  (tmp_path / "tokenizer.json").write_text(json.dumps(whole["gpt2"] | {"pre_tokenizer": one}))
  assert Gpt2Tokenizer(str(tmp_path)).decode(Gpt2Tokenizer(str(tmp_path)).encode("a dog")) == "a dog"


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("merges.txt",)])
def test_flaws_of_two_files_are_reported_too(names, whole, tmp_path):
  model = whole["gpt2"]["model"]
  (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nd o\n")
  assert Gpt2Tokenizer(str(tmp_path)).encode("do") == [model["vocab"]["do"]]
  (tmp_path / names[0]).write_text("d\n")
  with pytest.raises(UserError, match=rf"{names[0]}: (not JSON|merge 1 is 'd')"):
    Gpt2Tokenizer(str(tmp_path))
  (tmp_path / names[0]).unlink()
  os.mkfifo(tmp_path / names[0])
  with pytest.raises(UserError, match="a named pipe, not a file"):
    Gpt2Tokenizer(str(tmp_path))


def test_a_compressed_vocabulary_is_unpacked_up_to_a_bound(tmp_path, monkeypatch):
  file = tmp_path / "x.txt.gz"
  file.write_bytes(gzip.compress(bytes(100_000)) * 400)  # 40 MB in 50 kB
  with pytest.raises(UserError, match=r"vocabulary, unpacked, of 33,554,433 bytes; at most 33,554,432 are read"):
    ClipTokenizer(str(file))
  with open(file, "wb") as opened:
    opened.truncate(3 << 30)
  with pytest.raises(UserError, match="not OpenAI's gzipped vocabulary"):
    ClipTokenizer(str(file))
  file.write_bytes(gzip.compress(("\n" + "a b\n" * 48894).encode()))
  with pytest.raises(UserError, match="48,893 of its merges make a token that another makes too"):
    ClipTokenizer(str(file))


def test_a_panic_of_the_library_is_one_line(whole, tmp_path, monkeypatch):
  panic = type("PanicException", (BaseException,), {})

  def fails(**_):
    raise panic("called `Option::unwrap()` on a `None` value\n  at src/lib.rs")

  (tmp_path / "tokenizer.json").write_text(json.dumps(whole["bpe"]))
  monkeypatch.setattr(tokenizers.tokenizers.models, "BPE", fails)
  with pytest.raises(UserError, match=r"the library tokenizers fails on it \(called .* a `None` value at src/lib\.rs"):
    BpeTokenizer(str(tmp_path))


def test_no_file_makes_a_connection(tmp_path, monkeypatch):
  import huggingface_hub

  asked = []

  def download(name, file, local_files_only=False):
    asked.append(local_files_only)
    raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  (tmp_path / "checkpoints").mkdir()
  stored = {"data.tokenizer.name": "clip", "data.tokenizer.path": "some/body"}
  (tmp_path / "config.json").write_text(json.dumps(stored))
  with pytest.raises(UserError, match=r"config\.json: its tokenizer is 'some/body', .* hf download some/") as caught:
    load.own_tokenizer(str(tmp_path))
  assert asked == [True] and "\n" not in str(caught.value)
  with pytest.raises(UserError, match="the hub does not give its tokenizer"):
    tokenizers.load(Tokenizer("gpt2", "some/body"))  # the user's own
  assert asked == [True, True, False]
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "tokenizer.json"))
  assert load.own_tokenizer(str(tmp_path)).path == "some/body"  # it is there already
