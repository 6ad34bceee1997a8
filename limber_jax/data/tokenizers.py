"""Tokenizers: text -> ids [B, T], start … end, then 0.

The id that ends a text is the highest of all: the text tower pools at the first maximum of the ids.
"""

import abc
import functools
import hashlib
import html
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import ftfy
import numpy as np
import regex
import tokenizers

from limber_jax import config, registry
from limber_jax.data import vocabularies
from limber_jax.data.vocabularies import BYTE, LETTER
from limber_jax.errors import UserError
from limber_jax.runtime import inputs
from limber_jax.runtime.atomic import SUFFIX, atomic_write, check, refusal

START, END = vocabularies.START, vocabularies.END


def load(settings: config.Tokenizer) -> "Tokenizer":
  """Returns the tokenizer of a configuration; raises UserError if it is unknown or its files are not there."""
  return registry.lookup("tokenizer", registry.TOKENIZERS, settings.name)(settings.path)


def clean(text: str) -> str:
  """Returns the text as CLIP reads it: encoding repaired, HTML entities resolved, single spaces, lower case.

  Source: OpenAI's simple_tokenizer.py, basic_clean and whitespace_clean.
  """
  # On printable ASCII ftfy does nothing that is not done below; it would take 30 times as long.
  if not (text.isascii() and text.isprintable()) or "&" in text:
    text = ftfy.fix_text(text)
  text = html.unescape(html.unescape(text))
  return " ".join(text.split()).lower()


class Tokenizer(abc.ABC):
  """Text to ids and back. Safe in threads, and small to pickle."""

  vocab_size: int
  sot: int
  """The id that starts every text."""
  eot: int
  """The id that ends every text, the highest."""

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """Returns the ids of the cleaned text, without start and end."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids up to the first end; starts are left out."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Returns 16 hex digits that change with the vocabulary."""

  def __call__(self, texts: str | Sequence[str], length: int, truncate: bool = True) -> np.ndarray:
    """Returns int32 [B, length]: start, ids, end, then 0; B = 1 for a single string.

    Args:
      texts: one or more.
      length: T, at least 2.
      truncate: a text too long loses its last ids; the end stays.

    Raises:
      UserError: a text is too long, and truncate is False.
    """
    if length < 2:
      raise UserError(f"a text of {length} tokens has no room for its start and end")
    texts = [texts] if isinstance(texts, str) else texts
    out = np.zeros((len(texts), length), np.int32)
    for row, text in zip(out, texts, strict=True):
      ids = self.encode(text)
      if len(ids) > length - 2 and not truncate:
        raise UserError(f"text of {len(ids) + 2} tokens, at most {length} fit: {text[:60]!r}")
      ids = ids[: length - 2]
      row[: len(ids) + 2] = [self.sot, *ids, self.eot]
    return out

  def _body(self, ids: Iterable[int]) -> Iterator[int]:
    for i in ids:
      if i == self.eot:
        return
      if i != self.sot:
        yield int(i)


class ByteTokenizer(Tokenizer):
  """The bytes of the cleaned text in UTF-8, plus one: 0 is left to the padding. Needs no file."""

  vocab_size, sot, eot = 259, 257, 258

  def __init__(self, path: str = ""):
    if path:
      raise UserError(f"config.data.tokenizer.path={path!r}: the tokenizer 'bytes' reads no file; leave it empty")

  def encode(self, text: str) -> list[int]:
    return [b + 1 for b in clean(text).encode()]

  def decode(self, ids: Iterable[int]) -> str:
    return bytes(i - 1 for i in self._body(ids) if 0 < i <= 256).decode("utf-8", "replace")  # others: padding rows

  def fingerprint(self) -> str:
    return hashlib.sha256(b"bytes").hexdigest()[:16]


class ClipTokenizer(Tokenizer):
  """CLIP's byte-pair encoding, with ids equal to open_clip's for every text.

  `path` is a directory with tokenizer.json, or with vocab.json and merges.txt; a hub id; or OpenAI's vocabulary file
  bpe_simple_vocab_16e6.txt.gz. "" = openai/clip-vit-base-patch32 on the hub.

  A text that holds "<start_of_text>" or "<end_of_text>" gets their ids, and "<|endoftext|>" is read letter by letter:
  so does open_clip; OpenAI's own code has it the other way round.
  """

  # IGNORECASE matters after lower(), too: 'ſ is read as 's.
  _WORDS = regex.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
                         regex.IGNORECASE)

  def __init__(self, path: str = ""):
    self._vocab, self._merges = vocabularies.read(path or "openai/clip-vit-base-patch32", "clip")
    vocabularies.check_has(self._vocab, (START, END, *LETTER.values(), *(f"{c}</w>" for c in LETTER.values())), path,
                           "a CLIP vocabulary")
    with vocabularies.naming(path):
      self._prepare()
    if self.eot != self.vocab_size - 1:
      raise UserError(f"config.data.tokenizer.path={path!r}: {END!r} must have the highest id {self.vocab_size - 1}, "
                      f"got {self.eot}: CLIP's text tower finds the end of a text by it")

  def _prepare(self) -> None:
    self.vocab_size = max(self._vocab.values()) + 1
    self.sot, self.eot = self._vocab[START], self._vocab[END]
    self._bpe = tokenizers.models.BPE(vocab=self._vocab, merges=self._merges, end_of_word_suffix="</w>")
    self._special = {"<start_of_text>": (self.sot,), "<end_of_text>": (self.eot,)}
    self._cached = functools.lru_cache(1 << 16)(self._word)
    self._token = {i: token for token, i in self._vocab.items()}

  def __getstate__(self):
    return self._vocab, self._merges

  def __setstate__(self, state):
    self._vocab, self._merges = state
    self._prepare()

  def _word(self, word: str) -> tuple[int, ...]:
    if word in self._special:
      return self._special[word]
    return tuple(token.id for token in self._bpe.tokenize(word.encode().decode("latin-1").translate(LETTER)))

  def encode(self, text: str) -> list[int]:
    out: list[int] = []
    for word in self._WORDS.findall(clean(text)):
      out += self._cached(word) if len(word) < 64 else self._word(word)  # long ones are rare and would fill the cache
    return out

  def decode(self, ids: Iterable[int]) -> str:
    tokens = (self._token.get(i, "") for i in self._body(ids))
    letters = "".join(f"{t[:-4]} " if t.endswith("</w>") else t for t in tokens)
    spelled = b"".join(bytes((BYTE[c],)) if c in BYTE else c.encode() for c in letters)
    return spelled.decode("utf-8", "replace").rstrip()

  def fingerprint(self) -> str:
    vocab = sorted((i, token) for token, i in self._vocab.items() if token not in (START, END))
    return hashlib.sha256(json.dumps([vocab, list(map(list, self._merges))]).encode()).hexdigest()[:16]


class Gpt2Tokenizer(Tokenizer):
  """GPT-2's byte-pair encoding, which GPT-J reads too; the text is taken as it is, case and spaces included.

  `path` is a directory with tokenizer.json, or with vocab.json and merges.txt; or a hub id. "" = EleutherAI/gpt-j-6B on
  the hub. "<|endoftext|>" starts and ends texts; inside of one it is letters like any others.
  """

  def __init__(self, path: str = ""):
    vocab, merges = vocabularies.read(path or "EleutherAI/gpt-j-6B", "gpt2")
    vocabularies.check_has(vocab, (END, *LETTER.values()), path, "GPT-2's vocabulary")
    self._tables = vocab, merges
    with vocabularies.naming(path):
      self._prepare()

  def _prepare(self) -> None:
    vocab, merges = self._tables
    self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    self._bpe.decoder = tokenizers.decoders.ByteLevel()
    self.vocab_size = max(vocab.values()) + 1
    self.sot = self.eot = vocab["<|endoftext|>"]

  def __getstate__(self):
    return self._tables

  def __setstate__(self, state):
    self._tables = state
    self._prepare()

  def __call__(self, texts: str | Sequence[str], length: int, truncate: bool = True) -> np.ndarray:
    raise UserError("tokenizer 'gpt2' starts and ends texts with one id: a CLIP text tower would take the start for "
                    "the end; choose clip, bpe or bytes for --config.data.tokenizer.name")

  def encode(self, text: str) -> list[int]:
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a surrogate pair is no text
    return self._bpe.encode(text).ids

  def decode(self, ids: Iterable[int]) -> str:
    return self._bpe.decode(list(self._body(ids)), skip_special_tokens=False)

  def fingerprint(self) -> str:
    vocab, merges = self._tables
    return hashlib.sha256(json.dumps([sorted(vocab.items()), list(map(list, merges))]).encode()).hexdigest()[:16]


class BpeTokenizer(Tokenizer):
  """A byte-level BPE from `python -m limber_jax.train_tokenizer`; any text encodes, and decodes to its cleaned self.

  `path` is its directory. The id 0 is padding only; start and end are the two highest ids.
  """

  PAD = "<|pad|>"
  FILE = "tokenizer.json"

  def __init__(self, path: str = ""):
    file = os.path.join(path, self.FILE)
    if what := inputs.what_is(file) if path else "no such file":
      what = inputs.what_is(path) or what if path and not os.path.isdir(path) else what
      what = what.replace("no such file", f"no {self.FILE} there")
      raise UserError(f"config.data.tokenizer.path={path!r}: {what}; make one from your captions with "
                      "`python -m limber_jax.train_tokenizer --source=FILE --vocab_size=8192 --out=DIR`, then "
                      "--config.data.tokenizer.path=DIR")
    vocab, merges, self._fingerprint = vocabularies.read_own(file, self.PAD)
    self._tables = vocab, merges
    with vocabularies.naming(path):
      self._prepare()

  def _prepare(self) -> None:
    vocab, merges = self._tables
    self._bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    # A word takes the space before it along, the first one too: "dog" is the same token wherever it stands.
    self._bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    self._bpe.decoder = tokenizers.decoders.ByteLevel()
    self.vocab_size = len(vocab)
    self.sot, self.eot = self.vocab_size - 2, self.vocab_size - 1

  def __getstate__(self):
    return self._tables, self._fingerprint

  def __setstate__(self, state):
    self._tables, self._fingerprint = state
    self._prepare()

  def encode(self, text: str) -> list[int]:
    return self._bpe.encode(clean(text)).ids

  def decode(self, ids: Iterable[int]) -> str:
    return self._bpe.decode([i for i in self._body(ids) if i > 0], skip_special_tokens=False).removeprefix(" ")

  def fingerprint(self) -> str:
    return self._fingerprint

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int, directory: str) -> "BpeTokenizer":
    """Trains on the cleaned texts, writes tokenizer.json into `directory`, and returns the tokenizer.

    Args:
      texts: captions.
      vocab_size: ids in all; fewer if the texts do not hold that many pairs of letters.
      directory: made if it is not there; raises UserError if it holds a tokenizer already.
    """
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(letters) + 3:
      raise UserError(f"--vocab_size={vocab_size}: at least {len(letters) + 3}, for 256 bytes and 3 marks")
    file = os.path.join(directory, cls.FILE)
    if os.path.exists(file):
      raise UserError(f"{file} is there already; choose another --out")
    try:
      os.makedirs(directory, exist_ok=True)
      if there := sorted(name for name in os.listdir(directory) if name != cls.FILE + SUFFIX):
        raise UserError(f"--out={directory} is not empty, it has {there[0]}; choose another directory")
    except OSError as error:
      raise refusal(f"--out={directory}", error) from error
    check(file)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # A word takes the space before it along, the first one too: "dog" is the same token wherever it stands.
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(map(clean, texts), tokenizers.trainers.BpeTrainer(
      vocab_size=vocab_size - 2, special_tokens=[cls.PAD], initial_alphabet=letters, show_progress=False))
    bpe.add_special_tokens([START, END])
    with atomic_write(file) as opened:
      opened.write(bpe.to_str(pretty=True))
    return cls(directory)
