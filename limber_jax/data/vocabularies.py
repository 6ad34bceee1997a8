"""Vocabulary files of tokenizers: their two tables, ids and merges, read within bounds and looked at before use.

Nothing else in such a file has an effect here: no normalizer, regular expression, template or padding of it runs. Where
one of them would give other ids than ours, the file is refused.
"""

import contextlib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from limber_jax.data.text import decode
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

START, END = "<|startoftext|>", "<|endoftext|>"

# A byte's stand-in in vocabulary files: itself where it prints, else the next letter from 256 on.
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_ORDER = [*_PRINTING, *sorted(set(range(256)) - set(_PRINTING))]
LETTER = {byte: chr(byte if i < len(_PRINTING) else 256 + i - len(_PRINTING)) for i, byte in enumerate(_ORDER)}
BYTE = {letter: byte for byte, letter in LETTER.items()} | {" ": 0x20}

MAX_IDS = 10_000_000  # the largest vocabulary that is published has a million
UNPACKED = inputs.Kind("vocabulary, unpacked,", 2**25)  # OpenAI's has 3 MB

Merges = list[tuple[str, str]]


def read(path: str, kind: str) -> tuple[dict[str, int], Merges]:
  """Returns a vocabulary {token: id} and the merges in order.

  Args:
    path: a directory with tokenizer.json, or with vocab.json and merges.txt; OpenAI's file; or a hub id.
    kind: "clip" or "gpt2".

  Raises:
    UserError: nothing there, too large, or not two tables that fit each other; the message names the first flaw.
  """
  if os.path.isdir(path):
    return _folder(path, kind)
  if not os.path.lexists(path):
    return _folder(_fetch(path, kind), kind)
  if what := inputs.what_is(path) or ("" if kind == "clip" else "a file, not a directory"):
    raise UserError(f"config.data.tokenizer.path={path!r}: {what}; wanted a directory with tokenizer.json, or with "
                    "vocab.json and merges.txt")
  with naming(path):
    return _openai(path)


def read_own(file: str, pad: str) -> tuple[dict[str, int], Merges, str]:
  """Returns (vocabulary, merges, fingerprint) of a tokenizer.json of limber_jax.train_tokenizer; raises UserError."""
  with naming(file, flag=False):
    words = _text(file)
    whole = _object(words)
    vocab, merges = _model(whole)
    added = whole.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(t, dict) and isinstance(t.get("content"), str) for t in added):
      raise UserError("added_tokens is no list of tokens")
    vocab = vocab | {t["content"]: t.get("id") for t in added}
    ids = [vocab.get(t) for t in (pad, START, END)]
    if ids != [0, len(vocab) - 2, len(vocab) - 1]:
      raise UserError(f"wanted {pad}, {START}, {END} at 0 and the two highest ids, got {ids}; this tokenizer was not "
                      "made by limber_jax.train_tokenizer")
    _check(vocab, merges)
    if (top := max(vocab.values())) >= len(vocab):
      raise UserError(f"it has {len(vocab)} tokens, and one of id {top}")
    _check_splits(whole, "bpe", True)
    missing = next((letter for letter in LETTER.values() if letter not in vocab), None)
    if missing is not None:
      raise UserError(f"{missing!r}, which stands for a byte, is not among its tokens; this tokenizer was not made by "
                      "limber_jax.train_tokenizer")
  return vocab, merges, hashlib.sha256(words.encode()).hexdigest()[:16]


def check_has(vocab: dict[str, int], tokens: Iterable[str], path: str, what: str) -> None:
  """Raises UserError if one of the tokens is not there, so that a vocabulary is not `what` it should be."""
  missing = next((t for t in tokens if t not in vocab), None)
  if missing is not None:
    raise UserError(f"config.data.tokenizer.path={path!r}: not {what}, {missing!r} is not among its {len(vocab)} "
                    "tokens")


def check_stored(settings: Any, where: str) -> None:
  """Raises UserError if a tokenizer that a file names, not the user, would have to be fetched.

  Args:
    settings: a config.Tokenizer.
    where: it stands, for the message.
  """
  path = settings.path
  if settings.name not in ("clip", "gpt2") or not path or os.path.lexists(path) or _cached(path):
    return
  raise UserError(f"{where}: its tokenizer is {path!r}, which is no file or directory here, and nothing is fetched "
                  "because a file asks for it; if it is a repository of the hub that you trust: "
                  f"hf download {path} tokenizer.json")


@contextlib.contextmanager
def naming(path: str, flag: bool = True) -> Iterator[None]:
  """Puts a file's name before whatever is found wrong with its tables inside the block, panics of Rust among it."""
  where = f"config.data.tokenizer.path={path!r}" if flag else path
  try:
    yield
  except UserError as error:
    raise error if str(error).startswith(where) else UserError(f"{where}: {error}") from error
  except OSError as error:
    raise UserError(f"{where}: cannot be read ({error.strerror or error})") from error
  except Exception as error:  # tokenizers raises nothing narrower
    raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
  except BaseException as error:
    if type(error).__name__ != "PanicException":  # pyo3's, which cannot be imported, and is no Exception
      raise
    raise UserError(f"{where}: the library tokenizers fails on it ({' '.join(str(error).split())[:300]})") from error


def _folder(path: str, kind: str) -> tuple[dict[str, int], Merges]:
  whole, vocab, merges = (os.path.join(path, name) for name in ("tokenizer.json", "vocab.json", "merges.txt"))
  if os.path.lexists(whole):
    with naming(whole, flag=False):
      values = _object(_text(whole))
      tables = _model(values)
      _check(*tables)
      if kind == "gpt2":
        _check_splits(values, kind, False)
    return tables
  if not (os.path.lexists(vocab) and os.path.lexists(merges)):
    raise UserError(f"config.data.tokenizer.path={path!r}: no tokenizer.json there, nor vocab.json and merges.txt")
  with naming(vocab, flag=False):
    ids = _object(_text(vocab))
    _check(ids, [])
  with naming(merges, flag=False):
    lines = [line for line in _text(merges).split("\n") if line.strip() and not line.startswith("#version")]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines]
    _check(ids, pairs)
  return ids, pairs


def _text(path: str) -> str:
  return decode(inputs.read(path, inputs.TOKENIZER), "")


def _object(words: str) -> dict[str, Any]:
  try:
    found = json.loads(words)
  except (ValueError, RecursionError) as error:
    raise UserError(f"not JSON ({' '.join(str(error).split())[:200]})") from error
  if not isinstance(found, dict):
    raise UserError(f"wanted a JSON object, got {type(found).__name__}")
  return found


def _model(whole: dict[str, Any]) -> tuple[dict[str, int], Merges]:
  """Returns the tables of a tokenizer.json, not yet looked at."""
  model = whole.get("model")
  if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
    kind = model.get("type") if isinstance(model, dict) else model
    raise UserError(f"wanted a model of byte-pair encoding (BPE), got {kind!r:.80}")
  vocab, merges = model.get("vocab"), model.get("merges")
  if not isinstance(vocab, dict) or not isinstance(merges, list):
    raise UserError("its model has no vocab or no merges")
  for name in ("dropout", "ignore_merges", "continuing_subword_prefix"):
    if model.get(name):
      raise UserError(f"its model has {name}={model[name]!r:.80}, which is not done here")
  return vocab, [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) if isinstance(m, list) else (m,)
                 for m in merges]


def _check(vocab: dict[str, int], merges: Merges) -> None:
  """Raises UserError for ids that are none or two tokens', and for merges that are no pairs or make no token."""
  owner: dict[int, str] = {}
  for token, i in vocab.items():
    if type(i) is not int or not 0 <= i < MAX_IDS:
      raise UserError(f"token {token!r:.80} has the id {i!r:.80}, wanted a number from 0 to {MAX_IDS - 1:,}")
    if owner.setdefault(i, token) != token:
      raise UserError(f"tokens {owner[i]!r:.80} and {token!r:.80} have the same id {i}")
  for number, pair in enumerate(merges, 1):
    if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
      raise UserError(f"merge {number} is {' '.join(map(str, pair))!r:.80}, wanted two tokens")
    for part in (*pair, "".join(pair)):
      if part not in vocab:
        raise UserError(f"merge {number}, {' '.join(pair)!r:.80}: {part!r:.80} is not in the vocabulary")


def _check_splits(whole: dict[str, Any], kind: str, space: bool) -> None:
  """Raises UserError if a tokenizer.json changes or splits texts otherwise than GPT-2's byte-level encoding does."""
  if whole.get("normalizer") is not None:
    raise UserError(f"its normalizer is {json.dumps(whole['normalizer'])[:80]}; the tokenizer {kind!r} changes nothing "
                    "of a text so")
  found = whole.get("pre_tokenizer")
  while isinstance(found, dict) and found.get("type") == "Sequence" and len(found.get("pretokenizers") or ()) == 1:
    found = found["pretokenizers"][0]
  fits = isinstance(found, dict) and found.get("type") == "ByteLevel" and found.get("use_regex", True) is True
  if not fits or found.get("add_prefix_space", True) is not space:
    raise UserError(f"its pre_tokenizer is {json.dumps(found)[:80]}; the tokenizer {kind!r} splits texts by GPT-2's "
                    f"rule, ByteLevel with add_prefix_space {str(space).lower()}, and would give other ids")


def _openai(path: str) -> tuple[dict[str, int], Merges]:
  """Reads OpenAI's gzipped list of merges, whose order is that of the ids."""
  size = 49152 - 256 - 2  # merges in use; the file holds five times as many
  try:
    with inputs.opened(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
      data = unpacked.read(UNPACKED.most + 1)
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f"not OpenAI's gzipped vocabulary: {error}") from error
  inputs.check_size(len(data), UNPACKED)
  merges = [tuple(line.split()) for line in decode(data, "not OpenAI's vocabulary").split("\n")[1 : size + 1]]
  if len(merges) != size or any(len(m) != 2 for m in merges):
    raise UserError(f"wanted {size:,} merges of two tokens, got {sum(len(m) == 2 for m in merges):,}")
  letters = [LETTER[byte] for byte in _ORDER]
  tokens = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges), START, END]
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    raise UserError(f"{len(tokens) - len(vocab):,} of its merges make a token that another makes too")
  _check(vocab, merges)
  return vocab, merges


def _cached(name: str) -> str:
  """Returns where a hub repository's tokenizer.json lies on this machine, "" if nowhere; connects to nothing."""
  import huggingface_hub  # only here: it takes a while

  try:
    return huggingface_hub.hf_hub_download(name, "tokenizer.json", local_files_only=True)
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError):
    return ""


def _fetch(name: str, kind: str) -> str:
  """Returns the local directory of a hub repository's tokenizer.json, downloaded if it is not there yet."""
  import huggingface_hub

  huggingface_hub.logging.set_verbosity_error()  # it would tell each of its retries, twice
  try:
    file = _cached(name) or huggingface_hub.hf_hub_download(name, "tokenizer.json")
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
    raise UserError(
      f"tokenizer {kind!r}: {name!r} is no file or directory here, and the hub does not give its tokenizer.json "
      f"({' '.join(str(error).split())[:120]}); point at a local copy (a directory with tokenizer.json"
      + (", or OpenAI's bpe_simple_vocab_16e6.txt.gz" if kind == "clip" else "")
      + ") with --config.data.tokenizer.path=…, or use --config.data.tokenizer.name=bytes, which needs no file"
    ) from error
  return os.path.dirname(file)
