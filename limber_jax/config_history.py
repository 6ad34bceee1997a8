"""What configurations of earlier releases say, in the words of this one: read from config.json, and from results.

All of it stands in the tables below. Of a field that is gone nothing is guessed: what is not in a table is refused by
whoever reads the configuration, as any field that is not there.
"""

import dataclasses
import re
from collections.abc import Collection
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


def upgrade(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of a configuration, by their dotted names, from those of this or an earlier release."""
  out, evals = {}, {}
  for name, value in values.items():
    if name.startswith("evals.") and name.count(".") > 1:
      key, _, field = name.removeprefix("evals.").partition(".")
      evals.setdefault(key, {})[field] = value
    else:
      out[renamed(name)] = value
  for key, fields in evals.items():
    out |= {f"evals.{key}.{field}": value for field, value in evaluation(fields).items()}
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


def evaluation(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the fields of an evaluation, {"name": …, "source.path": …}, from those of this or an earlier release."""
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
  metadata = {METADATA.get(key, key): value for key, value in values.get("metadata", {}).items()}
  protocol = evaluation({"name": values["evaluation"]} | values["protocol"])
  return values | {"evaluation": protocol["name"], "metadata": metadata,
                   "protocol": {k: v for k, v in protocol.items() if k != "name" or k in values["protocol"]}}
