"""Which source reads a path, and the flags that say how."""

import dataclasses
import glob
import os

from absl import flags

from limber_jax import registry
from limber_jax.config import Source, source_of
from limber_jax.data.sources import packed
from limber_jax.errors import UserError
from limber_jax.runtime import inputs

_SUFFIXES = {".tar": "webdataset", ".parquet": "parquet", ".jsonl": "jsonl", ".tsv": "captions", ".csv": "captions",
             ".txt": "captions"}
_INSIDE = (("huggingface", ("state.json", "dataset_dict.json")), ("tfds", ("features.json", "*/features.json")),
           ("clip_benchmark", ("*/nshards.txt",)), ("webdataset", ("*.tar",)),
           ("parquet", ("*.parquet", "*/*.parquet")), ("folder", ("*/",)))

_DEFINE = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float}  # others are words


def guess(path: str) -> str:
  """Returns the name of the data source that reads `path`; raises UserError if that cannot be told."""
  if path == "digits":
    return path
  if os.path.isdir(path):
    if os.path.isfile(os.path.join(path, packed.MANIFEST)) or os.path.isfile(os.path.join(path, packed.UNFINISHED)):
      return "packed"
    for name, patterns in _INSIDE:
      if any(glob.glob(os.path.join(glob.escape(path), pattern)) for pattern in patterns):
        return name
  suffix = os.path.splitext(path)[1].lower()
  if suffix == ".json" and os.path.isfile(path):
    with inputs.opened(path) as file:
      return "mixture" if b'"sources"' in file.read(2**16) else "coco"
  if suffix in _SUFFIXES:
    return _SUFFIXES[suffix]
  what = "cannot tell what it is" if os.path.exists(path) or set("*?[{") & set(path) else "no such file or directory"
  raise UserError(f"{path}: {what}; say what it is with --source=NAME; known: {', '.join(sorted(registry.SOURCES))}")


class SourceFlags:
  """The flags that say how SRC is read."""

  def __init__(self):
    self._name = flags.DEFINE_enum("source", None, sorted(registry.SOURCES), "Data source; seen from SRC if left out.")
    flags.DEFINE_string("split", None, "Part of the data; 'train' if left out, where there are parts.")
    fields = {f.name: f for name in registry.SOURCES for f in dataclasses.fields(source_of(name))}
    self._fields = fields.keys() - {"name", "path"}
    for field in self._fields - {"split"}:
      define = _DEFINE.get(fields[field].type, flags.DEFINE_string)
      define(field, None, f"As config.data.source.{field}.")

  def source(self, path: str) -> Source:
    """Returns the configuration of the source at `path`; raises UserError if a flag is of no field that it has."""
    name = self._name.value or guess(path)
    given = {field: value for field in self._fields if (value := flags.FLAGS[field].value) is not None}
    if name in ("clip_benchmark", "coco", "folder"):  # of which "" means everything
      given.setdefault("split", "")
    known = {f.name for f in dataclasses.fields(source_of(name))}
    return Source(name, **given | ({"path": path} if "path" in known else {}))
