"""What sources of data may be told: each its own fields, in experiments, by flags and in files of earlier releases."""

import ast
import copy
import dataclasses
import hashlib
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from limber_jax import config_history, registry
from limber_jax.checkpoints import workdirs
from limber_jax.config import Data, Source, check, source_of
from limber_jax.config_json import check_same, flatten, from_json, to_json
from limber_jax.data.pipeline import data_fingerprint
from limber_jax.data.sources.digits import DigitsConfig
from limber_jax.data.sources.folder import FolderConfig
from limber_jax.data.sources.jsonl import JsonlConfig
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.zeroshot import ZeroShot

ROOT = Path(__file__).parent.parent
# What stood in the JSON of every source until 0.1.
BEFORE = {"name": "digits", "path": "", "split": "train", "images": "", "image_key": "", "text_key": "",
          "label_key": "", "separator": "", "quoting": "", "key_dot": "last", "incomplete": "refuse"}


def fields_of(cls):
  return {f.name for f in dataclasses.fields(cls)}


@pytest.mark.parametrize("name", registry.SOURCES)
def test_a_source_has_its_own_fields_and_no_others(name):
  cls = source_of(name)
  known = fields_of(cls)
  assert cls.name == name and Source(name) == cls() and type(Source(name)) is cls and set(cls.paths) <= known
  for field in {*config_history.SOURCE_UNION, "pairs", "nam"} - known:
    with pytest.raises(UserError, match=rf"^data source '{name}' has no field '{field}'; .*known: ") as caught:
      Source(name, **{field: ""})
    assert all(f in str(caught.value) for f in known) and "\n" not in str(caught.value)
    values = json.loads(to_json(runs.tiny(data=Data(source=Source(name)))))
    assert from_json(json.dumps(values), "x").data.source == cls()
    if field in config_history.SOURCE_UNION and known | {field} >= config_history.SOURCE_FIRST:  # as one of then
      continue
    with pytest.raises(UserError, match=rf"^x: data\.source\.{field}: no such field(; did you mean|; known: )"):
      from_json(json.dumps(values | {f"data.source.{field}": ""}), "x")


@pytest.mark.parametrize("name", registry.SOURCES)
def test_every_field_of_a_source_is_read_where_it_is_opened(name):
  module = inspect.getmodule(source_of(name))
  used = {module.__name__}
  tree = ast.parse(inspect.getsource(module))
  for node in (n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and "data.sources" in n.module):
    used |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)} - {"limber_jax.data.sources"}
  read = set()
  for node in (n for m in used & sys.modules.keys() for n in ast.walk(ast.parse(inspect.getsource(sys.modules[m])))):
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
      read.add(node.attr)
    elif isinstance(node, ast.Call):  # choose("text_key", …), which reads it
      read |= {a.value for a in node.args if isinstance(a, ast.Constant)}
  shared = {"split"} if "check_undivided" in {getattr(n, "id", "") for n in ast.walk(tree)} else set()
  assert fields_of(source_of(name)) - {"name"} <= read | shared


def test_a_source_is_copied_pickled_and_replaced_as_what_it_is():
  source = Source("jsonl", "a.jsonl", "", text_key="caption")
  assert source == JsonlConfig(path="a.jsonl", split="", text_key="caption") and Source() == DigitsConfig()
  for same in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), dataclasses.replace(source)):
    assert same == source and type(same) is JsonlConfig
  assert Source("digits", "test", True) == DigitsConfig(split="test", pairs=True)
  assert source.where == "a.jsonl" and Source().where == "digits"
  with pytest.raises(UserError, match=r"^no data source 'jsnol'; did you mean 'jsonl'"):
    Source("jsnol")
  with pytest.raises(UserError, match=r"^data source 'awa2' takes name, path, split, got 4 values$"):
    Source("awa2", "data/awa2", "all", "images")


def test_a_source_that_was_renamed_is_told():
  config = runs.tiny(evals={"a": LinearProbe(train=Source(split="train"))})
  check(config)
  config.evals["a"].train.name = "jsonl"
  message = r"^config\.evals\.a\.train\.name='jsonl': this is 'digits'; wanted Source\('jsonl', …\) in its place$"
  with pytest.raises(UserError, match=message):
    check(config)


def test_another_source_keeps_the_fields_that_both_have():
  table = Source("captions", "t.csv", "images", images="i", text_key="words", separator=";", quoting="csv")
  assert table.of_name("jsonl") == JsonlConfig(path="t.csv", split="images", images="i", text_key="words")
  assert table.of_name("digits") == DigitsConfig(split="images")
  assert table.of_name("digits").of_name("captions") == Source("captions", split="images")


EXPERIMENT = """
from limber_jax.config import Data, Source
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.zeroshot import ZeroShot
from runs import tiny


def get_config():
  return tiny(data=Data(source=Source(split="test")), evals={"z": ZeroShot(every=-1), "p": LinearProbe(every=-1)})
"""
# One process for all, for starting one takes seconds.
SHOW = """if True:
  import json, os, sys
  from limber_jax import cli
  from limber_jax.config_json import flatten
  holder = cli.define_config()

  def main(argv):
    print(json.dumps(flatten(cli.get_config(holder))))

  for line in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
      sys.argv = ["x", *line]
      os.dup2(1, 2)
      cli.run(main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def parsed(folder, *lines):
  """Returns of each command line the configuration that a command has, or the line that it ends with at code 2."""
  (folder / "x.py").write_text(EXPERIMENT)
  argv = [[f"--config={folder}/x.py", *line] for line in lines]
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", SHOW, json.dumps(argv)], text=True,
                        timeout=300, capture_output=True, cwd=ROOT, check=True,
                        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
  shown = done.stdout.splitlines()
  assert not done.stderr and len(shown) == 2 * len(lines), done
  for text, code in zip(shown[::2], shown[1::2], strict=True):
    assert code == ("2" if text.startswith("error: ") else "0"), (text, code)
  return [text if text.startswith("error: ") else json.loads(text) for text in shown[::2]]


def source_in(values, where):
  return {k.removeprefix(f"{where}."): v for k, v in values.items() if k.startswith(f"{where}.")}


@pytest.mark.process
def test_flags_put_another_source_in_place_of_the_experiments_in_any_order(tmp_path):
  name, key, path = "--config.{}.name=jsonl", "--config.{}.text_key=words", "--config.{}.path=a.jsonl"
  places = ("data.source", "evals.z.source", "evals.p.train")
  orders = [(name, key, path), (key, path, name), (path, name, key)]
  lines = [[flag.format(place) for flag in order] for place in places for order in orders]
  lines += [["--config.data.source.name", "jsonl", "--config.data.source.text_key", "words",
             "--config.data.source.path", "a.jsonl"],
            ["--config.evals.p.train=build", *(flag.format("evals.p.train") for flag in (name, key, path))]]
  found = parsed(tmp_path, *lines)
  for values, place in zip(found, [p for p in places for _ in orders] + ["data.source", "evals.p.train"], strict=True):
    split = "test" if place == "data.source" else "train"  # as in the experiment
    assert source_in(values, place) == flatten(JsonlConfig(path="a.jsonl", split=split, text_key="words")), place


@pytest.mark.process
def test_a_flag_of_another_sources_field_is_one_line_with_those_there_are(tmp_path):
  digits = "has no field {!r}; known: name, pairs, split"
  cases = {
    ("data.source.separator=;",): "data.source.separator: data source 'digits' " + digits.format("separator"),
    ("evals.z.source.path=x",): "evals.z.source.path: data source 'digits' " + digits.format("path"),
    ("data.source.splt=x",): "data.source.splt: data source 'digits' has no field 'splt'; did you mean 'split'? known:",
    ("data.source.text_key=pair",): "data.source.text_key: data source 'digits' has no field 'text_key'; did you mean "
                                    "'pairs'? known: ",
    ("data.source.pairs=true", "data.source.name=jsonl"): "data.source.pairs: data source 'jsonl' has no field 'pairs'",
    ("data.source.name=jsnol",): "data.source.name: no data source 'jsnol'; did you mean 'jsonl'?",
    ("data.source.name=",): "data.source.name: no data source ''; known: awa2, ",
    ("evals.p.train.split=x",): "evals.p.train.split: no such field",
    ("data.source=jsonl",): "data.source is a group of settings; set one of: --config.data.source.name, ",
  }
  found = parsed(tmp_path, *([f"--config.{flag}" for flag in flags] for flags in cases))
  for line, message in zip(found, cases.values(), strict=True):
    assert isinstance(line, str) and line.startswith(f"error: --config.{message}"), line
  wrong, = parsed(tmp_path, ["--config.data.source.name=webdataset", "--config.data.source.key_dot=x"])
  assert wrong == "error: config.data.source.key_dot='x': choose one of last, first"


def test_a_run_of_an_earlier_release_goes_on_whatever_its_source_ignored(tmp_path):
  """The experiment named a key and a path that digits never read: both stood in its config.json, one in what it was
  compared by."""
  then = BEFORE | {"label_key": "n", "path": "/data/t.tsv"}
  (tmp_path / "config.json").write_text(json.dumps({f"data.source.{k}": v for k, v in then.items()}))
  assert workdirs.ignored_of_source(str(tmp_path)) == {
    k: v for k, v in then.items() if k not in ("name", "split", "text_key")}
  source, tokenizer, data = Source().open(), ByteTokenizer(), Data()
  settings = dataclasses.asdict(data) | {"source": {k: then[k] for k in (
    "name", "split", "image_key", "text_key", "label_key", "separator")}}
  for name in ("workers", "threads", "prefetch", "features", "max_bad_fraction", "repeat", "formats", "exif",
               "jpeg_fast_decode"):
    del settings[name]
  del settings["tokenizer"]["path"]
  what = [source.fingerprint(), tokenizer.fingerprint(), settings, 8, 1]
  wanted = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
  ignored = workdirs.ignored_of_source(str(tmp_path))
  assert data_fingerprint(source, tokenizer, data, 8, 1, ignored=ignored) == wanted
  assert data_fingerprint(source, tokenizer, data, 8, 1) != wanted
  values = json.loads(to_json(runs.tiny()))
  (tmp_path / "config.json").write_text(json.dumps(values))
  assert workdirs.ignored_of_source(str(tmp_path)) == workdirs.ignored_of_source(str(tmp_path / "none")) == {}


def before(prefix="", **fields):
  return {f"{prefix}{k}": v for k, v in (BEFORE | fields).items()}


def test_a_source_of_an_earlier_release_is_read_and_what_it_ignored_is_dropped():
  values = json.loads(to_json(runs.tiny(evals={"a": LinearProbe(train=Source(split="train"))})))
  values = {k: v for k, v in values.items() if not k.startswith(("data.source.", "evals.a.source.", "evals.a.train."))}
  values |= before("data.source.", text_key="pair", path="/data/t.tsv", separator=";", key_dot="first")
  values |= before("evals.a.source.", name="folder", path="f", split="", text_key="names.txt", quoting="csv")
  values |= before("evals.a.train.", name="captions", split="images", label_key="n", separator=";", incomplete="keep")
  config = from_json(json.dumps(values), "x")
  assert config.data.source == DigitsConfig(pairs=True)
  assert config.evals["a"].source == FolderConfig(path="f", split="", class_list="names.txt")
  assert config.evals["a"].train == Source("captions", split="images", label_key="n", separator=";")
  check_same(config, json.dumps(values), "x")
  for field, told in (("text_key", "pairs: expected bool, got 'x'"), ("nam", "nam: no such field")):
    with pytest.raises(UserError, match=rf"^x: data\.source\.{told}"):  # no run of then can have had these
      from_json(json.dumps(values | {f"data.source.{field}": "x"}), "x")


@pytest.mark.parametrize(("source", "then"), [
  (Source(), {}), (Source("digits", "test", pairs=True), {"split": "test", "text_key": "pair"}),
  (Source("folder", "f", class_list="c.txt"), {"name": "folder", "path": "f", "text_key": "c.txt"}),
  (Source("webdataset", "w", key_dot="first"), {"name": "webdataset", "path": "w", "key_dot": "first"}),
  (Source("captions", "t", "images", "i", "a", "b", "c", ";", "csv"), {
    "name": "captions", "path": "t", "split": "images", "images": "i", "image_key": "a", "text_key": "b",
    "label_key": "c", "separator": ";", "quoting": "csv"})])
def test_fingerprints_are_of_what_earlier_releases_wrote_of_a_source(source, then):
  assert config_history.source_before(vars(source)) == BEFORE | then
  assert config_history.source(BEFORE | then) == vars(source)
  of_evaluation = config_history.sources(flatten(ZeroShot(source)), config_history.source_before)
  assert {k: v for k, v in of_evaluation.items() if k.startswith("source.")} == {
    f"source.{k}": v for k, v in (BEFORE | then).items()}
