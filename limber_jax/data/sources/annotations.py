"""JSON files of annotations: what is read of them, what cannot be used, and the images they name."""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from limber_jax.data import text
from limber_jax.errors import UserError, did_you_mean
from limber_jax.runtime import inputs

OBJECT = 2**20  # bytes of the JSON object of one record

DUPLICATE_ID = "its id is listed twice, and the first counts"  # a reason of damage

FOLDERS = ("train2014", "val2014", "test2015", "train2017", "val2017", "images", "val", "validation",
           "flickr30k-images", "flickr30k_images")  # where images lie that are named without their folder


def load(path: str, wanted: str) -> dict[str, Any]:
  """Returns the object in a JSON file.

  Args:
    path: the file, UTF-8.
    wanted: what is expected there and the page it comes from, for the message when it is missing.

  Raises:
    UserError: no such file, too large, or no JSON object; of a damaged file the message names the byte.
  """
  if what := inputs.what_is(path):
    beside = path if os.path.isdir(path) else os.path.dirname(path) or "."
    names = [f for f in os.listdir(beside) if f.endswith(".json")] if os.path.isdir(beside) else []
    near = did_you_mean(os.path.basename(path), names) if 0 < len(names) <= 20 else ""
    raise UserError(f"source.path={path!r}: {what}; wanted {wanted}{near}")
  try:
    data = inputs.read(path, inputs.ANNOTATIONS)
  except UserError as error:
    raise UserError(f"{error}; wanted {wanted}") from error
  except OSError as error:
    raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
  words = text.decode(data, path)
  try:
    found = json.loads(words)
  except json.JSONDecodeError as error:
    byte = len(data) - len(words.encode()) + len(words[: error.pos].encode())
    cut = "" if words.rstrip().endswith("}") else "; the file is cut off, fetch it again"
    raise UserError(f"{path}, byte {byte:,} of {len(data):,}: not JSON ({error.msg}){cut}") from error
  except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
    raise UserError(f"{path}: not JSON that can be read ({error})") from error
  if not isinstance(found, dict):
    raise UserError(f"{path}: wanted {wanted}; got a JSON {type(found).__name__}, not an object")
  return found


def entries(table: dict[str, Any], key: str, path: str) -> list[Any]:
  """Returns the list of a file under `key`, which is not empty; raises UserError naming the file if there is none."""
  if key not in table:
    raise UserError(f"{path}: wanted a list of {key!r}, got no such key{did_you_mean(key, table)}")
  if not isinstance(found := table[key], list) or not found:
    raise UserError(f"{path}: wanted a list of {key!r}, got {'an empty one' if found == [] else type(found).__name__}")
  return found


def flaw(entry: Any, **kinds: type | tuple[type, ...]) -> str:
  """Returns why an entry is not an object with fields of these types, "" if it is: "no 'file_name'"."""
  if not isinstance(entry, dict):
    return f"wanted an object, got {type(entry).__name__}"
  for name, kind in kinds.items():
    if name not in entry:
      return f"no {name!r}"
    if type(entry[name]) not in (kind if isinstance(kind, tuple) else (kind,)):  # not isinstance: true is no number
      return f"{name!r} is of type {type(entry[name]).__name__}"
  return ""


def one_object(data: bytes) -> dict[str, Any]:
  """Returns the JSON object of one record; raises UserError for anything else, and for more than OBJECT bytes."""
  if len(data) > OBJECT:
    raise UserError(f"JSON of {len(data):,} bytes; at most {OBJECT:,} are read for a record")
  try:
    found = json.loads(data.removeprefix(text.BOM).decode())
  except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, a number of thousands of digits
    raise UserError(f"not JSON ({' '.join(str(error).split())})") from error
  if not isinstance(found, dict):
    raise UserError(f"wanted a JSON object, got {type(found).__name__}")
  return found


def missing(name: str, entry: dict[str, Any]) -> str:
  """Returns what to say of an entry that an object of unknown origin lacks."""
  return f"no {name!r}{did_you_mean(name, [key for key in list(entry)[:20] if len(key) < 50 and key.isprintable()])}"


def captions_of(value: Any, what: str = "caption") -> dict[str, Any]:
  """Returns {"text", and of a list of several "texts"} of a record, cleaned: what every source makes of its captions.

  Raises UserError where a caption is none.
  """
  values = value if isinstance(value, list | tuple) else (value,)
  texts = tuple(text.clean(v) if isinstance(v, str) else v for v in values)
  flaws = [found for t in texts if (found := text.flaw(t, what))] if texts else [f"an empty list as {what}"]
  if flaws:
    raise UserError(flaws[0])
  return {"text": texts[0], "texts": texts} if len(texts) > 1 else {"text": texts[0]}


def label_of(value: Any, key: str) -> dict[str, int]:
  """Returns {"label"} of a record, whose field `key` has `value`; raises UserError where that is no class number."""
  if type(value) is not int or value < 0:
    raise UserError(f"wanted a class number 0, 1, 2 … in {key!r}, got {value!r:.80}")
  return {"label": value}


def image_root(path: str, images: str) -> str:
  """Returns where image paths start: `images`, else the directory of the file `path`.

  The directory "annotations", into which COCO's archives unpack, stands beside those of the images: of a file in it,
  images start from the one above.
  """
  beside = os.path.dirname(os.path.abspath(path))
  return os.path.abspath(images or (os.path.dirname(beside) if os.path.basename(beside) == "annotations" else beside))


def readable(tell: Callable[[int], str], count: int) -> Iterator[str]:
  """Yields what is reported of each record 0 … count - 1, but of those of which nothing can be."""
  for index in range(count):
    with contextlib.suppress(UserError):
      yield tell(index)


def image_files(root: str, names: Iterable[str], folders: Sequence[str] = ()) -> Iterator[str]:
  """Yields the file that `read_image` would read of each name, each once; of one that is nowhere the likeliest."""
  for name in dict.fromkeys(names):
    full = [path for folder in ("", *folders) if (path := inputs.below(root, os.path.join(folder, name))) is not None]
    if full:
      yield next(filter(os.path.exists, full), full[0]) if len(full) > 1 else full[0]


def read_image(root: str, name: str, folders: Sequence[str] = FOLDERS) -> bytes:
  """Returns the bytes of an image file: root/name, else the first of root/folder/name that is there.

  Raises:
    UserError: it is nowhere, too large, cannot be read, or its name leads out of the root; nothing outside is read.
  """
  for folder in ("", *folders):
    full = inputs.below(root, os.path.join(folder, name))
    if full is None:
      raise UserError(f"image {name!r} lies outside of {root}; set source.images to a directory that holds all images")
    try:
      return inputs.read(full, inputs.IMAGE)
    except (FileNotFoundError, NotADirectoryError):
      continue
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
      raise UserError(f"cannot read image {full!r}: {getattr(error, 'strerror', None) or error}") from error
  raise UserError(f"no image {name!r} in {root} or its usual sub-folders; set source.images to where images lie")
