"""What configurations of earlier releases say, in the words of this one: read from config.json, and from results.

All of it stands in the tables below. Of a field that is gone nothing is guessed: what is not in a table is refused by
whoever reads the configuration, as any field that is not there.
"""

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from limber_jax import registry

# Fields that are called otherwise now, outside of evaluations; of a command's flags too.
RENAMED = {"data.damaged": "data.max_bad_fraction", "data.draft": "data.jpeg_fast_decode", "first": "prerequisites",
           "init.others": "init.extra_projectors", "loss.accumulate": "loss.num_microbatches",
           "model.others": "model.extra_projectors"}
CROPS = {"own": "encoder"}  # values of data.crop
# Evaluations that are called otherwise now. What an experiment calls its own stays, but for flags: `named`.
EVALUATIONS = {"naming": "class_mention", "overlap": "contamination", "probing": "prompt_probing",
               "shift": "robustness", "words": "word_recall"}
# Until 0.1 all evaluations were one dataclass: these fields stood in the JSON of each, whether it used them or not.
UNION = ("classes", "templates", "train", "validation", "metrics", "scorer", "scorer_model", "shots", "seeds",
         "threshold")
# Keys of results.json and scores.json that are called otherwise now, and those within the metadata.
RESULTS = {"facts": "metadata", "figures": "metrics"}
METADATA = {"items": "num_examples"}
# evaluation -> metric or key within its metadata -> its name now
METRICS = {"linear_probe": {"strength": "l2", "strengths": "l2"}}
# evaluation -> field -> its name now; "" is of all. Without `max_bad_fraction` an evaluation is of before.
FIELDS = {
  "": {"damaged": "max_bad_fraction"},
  "hallucination": {"classes": "segments"},
  "retrieval": {"templates": "prompt"},
  "robustness": {"classes": "dataset"},
  "word_recall": {"classes": "nouns"},
}
# evaluation -> field, as it is called now -> value -> what it meant. Templates of classes were once the default of all.
VALUES = {"retrieval": {"prompt": {"imagenet7": ""}}}

# Until 0.1 all sources of data were one dataclass, too: these fields and defaults stood in the JSON of each. Most
# sources read a few of them; the fields that one has now are those that it read.
SOURCE_UNION = {"path": "", "split": "train", "images": "", "image_key": "", "text_key": "", "label_key": "",
                "separator": "", "quoting": "", "key_dot": "last", "incomplete": "refuse"}
# Which of them the first release wrote. A source that has all of them is taken for one of then; of a source that reads
# all of them now, as captions does, it comes to the same.
SOURCE_FIRST = {"path", "split", "images", "image_key", "text_key", "label_key", "separator"}
# source -> field -> its name now
SOURCE_FIELDS = {"digits": {"text_key": "pairs"}, "folder": {"text_key": "class_list"}}
# source -> field, as it is called now -> value -> what it meant
SOURCE_VALUES: dict[str, dict[str, dict[str, Any]]] = {"digits": {"pairs": {"": False, "pair": True}}}


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a configuration, by their dotted names, from those of this or an earlier release."""
  groups: dict[str, dict[str, Any]] = {}
  for name, value in values.items():
    name = name if name.startswith("evals.") else renamed(name)  # `evaluation` knows how each one's were called
    start = re.match(r"(data\.|evals\.[^.]+\.|)", name)[0]
    groups.setdefault(start, {})[name.removeprefix(start)] = value
  out = {}
  for start, fields in groups.items():
    fields = sources(fields, source) if start == "data." else evaluation(fields) if start else fields
    out |= {f"{start}{field}": value for field, value in fields.items()}
  return out


def sources(values: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
  """Returns {"source.path": …, …}, where the fields of each group with a name are what `change` makes of them."""
  out: dict[str, Any] = {}
  groups: dict[str, dict[str, Any]] = {}
  for name, value in values.items():
    group, _, field = name.partition(".")
    if f"{group}.name" in values:
      groups.setdefault(group, {})[field] = value
    else:
      out[name] = value
  for group, fields in groups.items():
    out |= {f"{group}.{field}": value for field, value in change(fields).items()}
  return out


def renamed(name: str) -> str:
  """Returns what a field is called now, "loss.num_microbatches", by what it is or was called: "loss.accumulate"."""
  if m := re.fullmatch(r"(evals\.[^.]+\.)(\w+)", name):
    return m[1] + FIELDS[""].get(m[2], m[2])
  old = next((old for old in RENAMED if f"{name}.".startswith(f"{old}.")), "")
  return RENAMED[old] + name.removeprefix(old) if old else name


def named(name: str, known: Collection[str]) -> str:
  """Returns what an experiment calls one of its evaluations, which are `known`, by its name or its earlier one."""
  return EVALUATIONS[name] if name not in known and EVALUATIONS.get(name) in known else name


def source(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a source, {"name": …, "path": …}, from those of this or an earlier release."""
  name = values.get("name")
  if not isinstance(name, str) or name not in registry.SOURCES or not values.keys() >= SOURCE_FIRST:
    return values
  known = {f.name for f in dataclasses.fields(registry.lookup("data source", registry.SOURCES, name))}
  out = {}
  for field, value in values.items():
    field = SOURCE_FIELDS.get(name, {}).get(field, field)
    # Dropped, whatever it was set to: a field that the source has not now it did not read then.
    if field in known or field not in SOURCE_UNION:
      meant = SOURCE_VALUES.get(name, {}).get(field, {})
      out[field] = meant.get(value, value) if isinstance(value, str) else value
  return out


def ignored(values: dict[str, Any]) -> dict[str, Any]:
  """Returns those fields of a source of an earlier release that it did not read, {} of one of this release.

  What the data are was once written down of them too, so the fingerprints of runs of then are of their values.
  """
  kept, renamed = source(values), SOURCE_FIELDS.get(values.get("name", ""), {})
  return {field: value for field, value in values.items() if renamed.get(field, field) not in kept}


def source_before(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a source as they were until 0.1: what fingerprints are of, those of runs of then included."""
  name = values["name"]
  old = {now: then for then, now in SOURCE_FIELDS.get(name, {}).items()}
  meant = {field: {now: then for then, now in v.items()} for field, v in SOURCE_VALUES.get(name, {}).items()}
  return {"name": name} | SOURCE_UNION | {
    old.get(field, field): meant[field][value] if field in meant else value for field, value in values.items()}


def evaluation(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of an evaluation, {"name": …, "source.path": …}, from those of this or an earlier release."""
  values = sources(values, source)
  name = values.get("name")
  if isinstance(name, str) and name in EVALUATIONS:
    name = EVALUATIONS[name]
    values = values | {"name": name}
  if "max_bad_fraction" in values or not isinstance(name, str) or name not in registry.EVALS:
    return values
  renamed = FIELDS[""] | FIELDS.get(name, {})
  known = {f.name for f in dataclasses.fields(registry.lookup("evaluation", registry.EVALS, name))}
  out = {}
  for path, value in values.items():
    field, dot, rest = path.partition(".")
    field = renamed.get(field, field)
    if field in known or field not in UNION:
      meant = VALUES.get(name, {}).get(field, {})
      out[f"{field}{dot}{rest}"] = meant.get(value, value) if isinstance(value, str) else value
  return out


def keys(values: Any) -> Any:
  """Returns an entry of results.json or scores.json by the keys of this release; what is no such entry as it is."""
  return {RESULTS.get(key, key): value for key, value in values.items()} if isinstance(values, dict) else values


def entry(values: dict[str, Any]) -> dict[str, Any]:
  """Returns an entry of results.json, {"evaluation", "protocol", …}, from one of this or an earlier release."""
  values = keys(values)
  protocol = evaluation({"name": values["evaluation"]} | values["protocol"])
  own = METRICS.get(protocol["name"], {})
  metrics = {own.get(key, key): value for key, value in values["metrics"].items()}
  metadata = _renamed_within(values.get("metadata", {}), METADATA | own)
  return values | {"evaluation": protocol["name"], "metrics": metrics, "metadata": metadata,
                   "protocol": {k: v for k, v in protocol.items() if k != "name" or k in values["protocol"]}}


def _renamed_within(values: Any, names: dict[str, str]) -> Any:
  """Returns nested dicts by other names of their keys."""
  if not isinstance(values, dict):
    return values
  return {names.get(key, key): _renamed_within(value, names) for key, value in values.items()}
