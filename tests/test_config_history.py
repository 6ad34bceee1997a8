"""Runs and results of earlier releases are read, in the words of this one."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from limber_jax import config_history, registry
from limber_jax.config import Data, Evaluation, Source, check, evaluation_of
from limber_jax.config_json import flatten, from_json, to_json
from limber_jax.errors import UserError
from limber_jax.evals.captions import Captions
from limber_jax.evals.class_mention import ClassMention
from limber_jax.evals.contamination import Contamination
from limber_jax.evals.hallucination import Hallucination
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.prompt_probing import PromptProbing
from limber_jax.evals.retrieval import Retrieval
from limber_jax.evals.robustness import Robustness
from limber_jax.evals.similarity import Similarity
from limber_jax.evals.vqa import Vqa
from limber_jax.evals.word_recall import WordRecall
from limber_jax.evals.zeroshot import ZeroShot

DATA = Path(__file__).parent / "data"
DIGITS, TRAIN = Source(split="test"), Source(split="train")
COCO, AWA2 = Source("coco", "data/coco.json", "test"), Source("awa2", "data/awa2", "all")
TEMPLATES = {"templates": "imagenet7"}  # the default then, which was written down

# What the config.json of version 0.1.0 say, which that release wrote itself.
EVALS = {
  "contrastive": {
    "zeroshot": ZeroShot(DIGITS, every=2, batch_size=64, classes="cifar10", templates="single", metrics=("top1",),
                         max_bad_fraction=0.2),
    "retrieval": Retrieval(COCO, every=-1, prompt="a photo of {}"),
    "plain": Retrieval(COCO, every=-1),
    "similarity": Similarity(DIGITS, every=0, **TEMPLATES),
    "probe": LinearProbe(DIGITS, every=-1, train=TRAIN, validation=DIGITS, shots=(0, 4), seeds=(1, 2), **TEMPLATES),
    "overlap": Contamination(DIGITS, every=-1, train=TRAIN, threshold=0.9, **TEMPLATES),
    "shift_imagenet_r": Robustness(Source("folder", "data/imagenet-r", ""), every=-1, dataset="imagenet_r",
                              templates="imagenet80"),
  },
  "captioning": {
    "coco": Captions(COCO, every=-1, metrics=("cider_d",), scorer="data/clip"),
    "vqa2": Vqa(Source("vqa", "data/vqa2", "val2014"), every=-1, train=Source("vqa", "data/vqa2", "train2014"),
                shots=(0, 1), seeds=(3,), batch_size=8),
    "awa2": ClassMention(AWA2, every=-1, classes="animals.txt"),
    "words": WordRecall(COCO, every=-1, nouns="nouns.txt"),
    "hallucination": Hallucination(COCO, every=-1, segments="instances_val2014.json", metrics=("chair",)),
    "probing": PromptProbing(AWA2, every=-1, metrics=("nearest",), train=dataclasses.replace(AWA2, split="train")),
  },
  "language_modelling": {},
}


def stored(task):
  return (DATA / f"config_0.1.0_{task}.json").read_text()


@pytest.mark.parametrize("task", registry.TASKS)
def test_the_config_json_of_an_earlier_release_is_read(task):
  config = from_json(stored(task), "x")
  assert config.evals == EVALS[task] and config.task == task
  assert from_json(to_json(config), "x") == config


@pytest.mark.parametrize("name", registry.EVALS)
def test_an_evaluation_knows_its_own_fields_and_no_others(name):
  cls = evaluation_of(name)
  assert issubclass(cls, Evaluation) and cls.name == name and cls.needs
  known = {f.name for f in dataclasses.fields(cls)}
  assert set(cls.files) <= known
  for field in {*config_history.UNION, "nam"} - known:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{field}'"):
      cls(**{field: ""})
    values = json.loads(stored("contrastive")) | {f"evals.zeroshot.{k}": v for k, v in flatten(cls()).items()}
    values = {k: v for k, v in values.items() if not k.startswith("evals.zeroshot.") or k.split(".")[2] in {
      *known, "name"}}
    assert from_json(json.dumps(values), "x").evals["zeroshot"] == cls()
    with pytest.raises(UserError, match=rf"^x: evals\.zeroshot\.{field}: no such field(; did you mean|; known: )"):
      from_json(json.dumps(values | {f"evals.zeroshot.{field}": ""}), "x")


def test_an_evaluation_that_is_not_there_or_none_is_one_line():
  values = json.loads(stored("contrastive")) | {"evals.zeroshot.name": "zeroshoot"}
  with pytest.raises(UserError, match=r"^x: evals\.zeroshot\.name: no evaluation 'zeroshoot'; did you mean 'zeroshot'"):
    from_json(json.dumps(values), "x")
  config, renamed = from_json(stored("contrastive"), "x"), ZeroShot()
  renamed.name = "vqa"
  for evaluation, match in ((Evaluation(), "a: expected an evaluation of the reg"), (renamed, "a.name='vqa': what")):
    config.evals = {"a": evaluation}
    with pytest.raises(UserError, match=rf"^config\.evals\.{match}"):
      check(config)


def test_fields_of_an_earlier_release_are_read_by_their_names_of_now():
  values = json.loads(stored("contrastive"))
  for name in ("data.max_bad_fraction", "loss.num_microbatches"):
    values.pop(name, None)
  old = {"data.damaged": 0.25, "data.draft": True, "data.crop": "own", "loss.accumulate": 4, "first.a": "a.py"}
  config = from_json(json.dumps(values | old), "x")
  assert (config.data.jpeg_fast_decode, config.data.crop, Data(crop="own").crop) == (True, "encoder", "encoder")
  assert (config.data.max_bad_fraction, config.loss.num_microbatches) == (0.25, 4)
  assert config.prerequisites == {"a": "a.py"}


PROGRAM = """
from limber_jax import cli
CONFIG = cli.define_config()

def main(_):
  config = cli.get_config(CONFIG)
  print(config.data.crop, config.data.jpeg_fast_decode, config.data.max_bad_fraction, config.loss.num_microbatches,
        config.evals["zeroshot"].max_bad_fraction, config.evals["contamination"].threshold)

cli.run(main)
"""


def test_flags_of_an_earlier_release_set_the_fields_of_now():
  experiment = Path(__file__).parent.parent / "experiments" / "quickstart.py"
  flags = ["--config.data.crop=own", "--config.data.draft=true", "--config.data.damaged=0.25",
           "--config.loss.accumulate", "4", "--config.evals.zeroshot.damaged=0.5",
           "--config.evals.overlap.threshold=0.75"]
  done = subprocess.run([sys.executable, "-c", PROGRAM, f"--config={experiment}", *flags], text=True,
                        capture_output=True)
  assert done.stdout.split() == ["encoder", "True", "0.25", "4", "0.5", "0.75"], done.stderr


@pytest.mark.parametrize(("old", "new"), config_history.EVALUATIONS.items())
def test_an_evaluation_is_found_by_its_earlier_name(old, new):
  values = json.loads(to_json(dataclasses.replace(from_json(stored("contrastive"), "x"), evals={})))
  own = {f"evals.a.{k}": v for k, v in flatten(evaluation_of(new)()).items()} | {"evals.a.name": old}
  assert from_json(json.dumps(values | own), "x").evals == {"a": evaluation_of(new)()}
  assert config_history.named(old, {new}) == new and config_history.named(old, {old, new}) == old
  assert config_history.named(old, {"x"}) == old and config_history.named("x", {new}) == "x"


def test_projectors_of_an_earlier_release_are_read():
  config = from_json(stored("captioning"), "x")
  assert list(config.model.extra_projectors) == ["other"]
  values = json.loads(stored("captioning")) | {"init.others.image@other": "there"}
  assert from_json(json.dumps(values), "x").init.extra_projectors["image@other"] == "there"


def test_an_entry_of_results_of_an_earlier_release_says_the_same_as_one_of_this():
  old = {"evaluation": "shift", "figures": {"top1": 0.5}, "facts": {"items": 7},
         "protocol": {"name": "shift", "classes": "imagenet_r", "damaged": 0.5, "threshold": 0.95, "source.path": "x"}}
  new = config_history.entry(old)
  assert (new["evaluation"], new["metrics"], new["metadata"]) == ("robustness", {"top1": 0.5}, {"num_examples": 7})
  assert new["protocol"] == {"name": "robustness", "dataset": "imagenet_r", "max_bad_fraction": 0.5, "source.path": "x"}
  assert config_history.entry(new) == new and not {"figures", "facts"} & new.keys()
  other = new | {"evaluation": "own", "protocol": {"classes": "x"}}  # of somebody's own
  assert config_history.entry(other) == other


def test_the_regularisation_of_a_probe_of_an_earlier_release_is_read_as_l2():
  old = {"evaluation": "linear_probe", "figures": {"accuracy": 0.5, "strength": 10.0}, "protocol": {},
         "facts": {"items": 7, "train": {"items": 9}, "shots": {"2": {"each": [0.5], "strengths": [1.0]}}}}
  new = config_history.entry(old)
  assert new["metrics"] == {"accuracy": 0.5, "l2": 10.0}
  assert new["metadata"] == {
    "num_examples": 7, "train": {"num_examples": 9}, "shots": {"2": {"each": [0.5], "l2": [1.0]}}}
  assert config_history.entry(new) == new
  other = {"evaluation": "own", "metrics": {"strength": 1.0}, "metadata": {"strengths": []}, "protocol": {}}
  assert config_history.entry(other) == other
