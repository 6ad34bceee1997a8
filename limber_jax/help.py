"""What `--help` prints: what the command does, its own flags, and by --help=config every field of a configuration."""

import ast
import dataclasses
import inspect
import io
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Sequence
from typing import Any

from absl import flags

from limber_jax import ranges, registry
from limber_jax.config import Config, Evaluation, Source, evaluation_of, models_of, source_of

WIDTH = 100


def asked(argv: Sequence[str]) -> str | None:
  """Returns the page that the arguments of a command ask for: "" of the command, "config" of a configuration, or None.

  Further words, such as --help=steps, ask for the fields with that in their names.
  """
  for argument in argv[1:]:
    if argument == "--":
      break
    if argument in ("-h", "-?") or (m := re.fullmatch(r"--?help(short)?(?:=(.*))?", argument)):
      word = "" if argument in ("-h", "-?") else m[2] or ""
      return "" if word.lower() in ("true", "1") else word
  return None


def command(name: str = "__main__") -> str:
  """Returns the page of the running command: its docstring, and the flags that it and what it shares define.

  Args:
    name: of the module whose docstring says what the command does.
  """
  found = {}
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module in (sys.argv[0], "__main__") or module.startswith("limber_jax."):  # not those of the libraries
      found |= {f.name: f for f in defined}
  if "config" in flags.FLAGS:
    found |= {"config": flags.FLAGS["config"]}
  out = [inspect.cleandoc(sys.modules[name].__doc__ or ""), "", "Flags:"]
  for f in sorted(found.values(), key=lambda f: f.name):
    out += _entry(f"--{'[no]' if f.boolean else ''}{f.name}", f.help or "",
                  "" if f.boolean or f.default in (None, "", []) else f"default: {f.default_as_str}")
  if "config" in found:
    out += _entry("--config.FIELD=VALUE", "A field of the experiment, in place of what its file says; --help=config "
                  "lists them, --help=optim those with optim in their names.")
  return "\n".join(out)


def configuration(word: str = "config") -> str:
  """Returns a line for every field that a configuration can have, with its type, default, range and comment.

  Args:
    word: only the fields with this in their names; "config" for all.
  """
  out: list[str] = []
  for name, f, hint, comment in fields():
    if word != "config" and word not in name:
      continue
    default = "" if f.default is dataclasses.MISSING else repr(f.default)
    default = "{}" if not default and f.default_factory is dict else default
    range_ = str(ranges.range_of(f))
    details = ", ".join(filter(None, [_type(hint), default and f"default {default}", range_]))
    out += _entry(f"--{name}", comment, details)
  return "\n".join(out or [f"no field of a configuration has {word!r} in its name; --help=config lists all"])


def fields() -> list[tuple[str, dataclasses.Field, Any, str]]:
  """Returns (dotted name, field, type, comment) of every field of a configuration; sizes come last, by task."""
  out = _fields(Config, "config.")
  for task in registry.TASKS:
    for model in models_of(task):
      out += [(n, f, h, f"[task {task}] {c}".strip()) for n, f, h, c in _fields(model, "config.model.")]
  return out


def _fields(cls: type, start: str) -> list[tuple[str, dataclasses.Field, Any, str]]:
  """Returns (dotted name, field, type, comment) of the fields of a dataclass that are no groups, but Config.model."""
  out, comments, hints = [], comments_of(cls), ranges.hints_of(cls)
  for f in dataclasses.fields(cls):
    name, hint = f"{start}{f.name}", hints[f.name]
    inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
    options = typing.get_args(inner) if isinstance(inner, types.UnionType) else (inner,)
    groups = [o for o in options if dataclasses.is_dataclass(o)]
    if cls is Config and f.name == "model":
      continue
    if not groups or (issubclass(cls, Evaluation) and types.NoneType in options):  # whose fields are those of `source`
      out.append((name, f, hint, comments[f.name]))
      continue
    name += ".NAME" if inner is not hint else ""
    if Source in groups:
      out += _source_fields(f"{name}.")
      continue
    for group in groups:
      found = _fields(group, f"{name}.")
      out += [(n, x, h, f"[{group.__name__}] {c}".strip() if len(groups) > 1 else c) for n, x, h, c in found]
    if Evaluation in groups:  # what each of them has beside
      for own in map(evaluation_of, registry.EVALS):
        out += [(n, x, h, f"[{own.name}] {c}".strip()) for n, x, h, c in _fields(own, f"{name}.")
                if n.split(".")[3] not in Evaluation.__dataclass_fields__]
  return out


def _source_fields(start: str) -> list[tuple[str, dataclasses.Field, Any, str]]:
  """Returns the fields of all sources, those that are the same in several of them once; comments begin with whose."""
  found: dict[Any, tuple[list[str], tuple[str, dataclasses.Field, Any, str]]] = {}
  for source in registry.SOURCES:
    for name, f, hint, comment in _fields(source_of(source), start):
      if f.name != "name":
        key = name, hint, f.default, ranges.range_of(f), comment
        found.setdefault(key, ([], (name, f, hint, comment)))[0].append(source)
  name = dataclasses.fields(Source)[0]
  out = [(f"{start}name", name, str, comments_of(Source)["name"])]
  of = [(n, f, h, f"[{' '.join(whose)}] {c}") for whose, (n, f, h, c) in found.values()]
  return out + sorted(of, key=lambda x: [x[0] for x in of].index(x[0]))


def comments_of(cls: type) -> dict[str, str]:
  """Returns the comment of each field of a dataclass: what stands behind it, after what stands in lines before it."""
  own = {f.name: "" for f in dataclasses.fields(cls)}
  for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
    own |= {name: comment for name, comment in _comments_in(base).items() if name in own}
  return own


def _comments_in(cls: type) -> dict[str, str]:
  """Returns the comments of the fields that stand in the body of a dataclass itself."""
  source = textwrap.dedent(inspect.getsource(cls))
  comments = {t.start[0]: (t.string.lstrip("# ").rstrip(), t.line.lstrip().startswith("#"))
              for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
  out = {}
  for node in ast.parse(source).body[0].body:
    if isinstance(node, ast.AnnAssign):
      above = []
      line = node.lineno - 1
      while line in comments and comments[line][1]:
        above.insert(0, comments[line][0])
        line -= 1
      behind = [comments[n][0] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
      out[node.target.id] = " ".join(above + behind)
  return out


def _type(hint: Any) -> str:
  if isinstance(hint, type) and not typing.get_args(hint):
    return hint.__name__
  return re.sub(r"[\w.]+\.(\w+)", r"\1", str(hint)) if hint is not Any else "a size"


def _entry(name: str, text: str, details: str = "") -> list[str]:
  """Returns the lines of one flag or field."""
  words = " ".join(filter(None, [text, details and f"({details})"]))
  return [f"  {name}", *textwrap.wrap(words, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6,
                                     break_on_hyphens=False)]
