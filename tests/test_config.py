"""A configuration comes back from its JSON, and nothing else passes for one."""

import json
import re
from pathlib import Path

import pytest

from limber_jax import cli, registry
from limber_jax.config import Evaluation, Source, check_numbers, from_json, to_json
from limber_jax.errors import UserError
from limber_jax.train import setup, train

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
LIMBER = EXPERIMENTS / "quickstart_limber.py"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda p: p.stem)
def test_an_experiment_comes_back_from_its_json(path):
  config = cli.load_experiment(str(path))
  back = from_json(to_json(config), "x")
  assert back == config and type(back.model) is type(config.model)
  check_numbers(config)


def test_names_with_dots_come_back():
  config = cli.load_experiment(str(LIMBER))
  config.first, config.init.others = {"runs/v1.0": "a.py", "b": "c"}, {"image@random": "runs/v1.5"}
  config.optim.part_lr = {"prompt": 1.0}
  assert from_json(to_json(config), "x") == config


def test_a_run_of_before_a_setting_was_there_has_its_default():
  config = cli.load_experiment(str(LIMBER))
  config.optim.lr, config.evals["more"] = 5.0, Evaluation(train=Source(split="test"), shots=(1, 2))
  values = json.loads(to_json(config))
  for name in [n for n in values if n.startswith(("captions.", "evals.digits.train", "evals.more.source."))]:
    del values[name]
  del values["optim.clip_norm"], values["evals.more.validation"]
  back = from_json(json.dumps(values), "x")
  config.optim.clip_norm = 0.0
  assert back == config and back.optim.lr == 5.0


def test_every_task_has_its_model():
  assert registry.SIZES.keys() == registry.TASKS.keys()


@pytest.mark.parametrize("change,message", [
  ({"optim.lrr": 1.0}, "optim.lrr: no such field; did you mean 'optim.lr'"),
  ({"seeds": 1}, "seeds: no such field; did you mean 'seed'"),
  ({"model.others.random.image": None}, "model.others.random.image.activation: no such field"),
  ({"evals.digits.nam": "x"}, "evals.digits.nam: no such field; did you mean 'evals.digits.name'"),
  ({"name": ...}, "name is missing"),
  ({"model.lm.width": ...}, "model.lm.width is missing"),
  ({"model.image.tower.kind": ...}, "model.image.tower.kind is missing"),
  ({"model.image.tower.kind": "vitt"}, "model.image.tower.kind: expected one of vit, resnet, beit, nf_resnet, got 'vi"),
  ({"model.image.tower.kind": ["vit"]}, r"model.image.tower.kind: expected str, got \['vit'\]"),
  ({"task": "caption"}, "no task 'caption'; did you mean 'captioning'"),
  ({"task": "contrastive"}, "model.embed_dim is missing"),
  ({"steps": 3.5}, "steps: expected int, got 3.5"),
  ({"steps": True}, "steps: expected int, got True"),
  ({"optim.lr": "1"}, "optim.lr: expected float, got '1'"),
  ({"optim.lr": True}, "optim.lr: expected float, got True"),
  ({"optim.lr": None}, "optim.lr: expected float, got None"),
  ({"model.prompt.layer_norm": 0}, "model.prompt.layer_norm: expected bool, got 0"),
  ({"trainable": "prompt"}, r"trainable: expected tuple\[str, ...\], got 'prompt'"),
  ({"trainable": ["prompt", 1]}, "trainable: expected str, got 1"),
])
def test_a_json_with_a_mistake_is_refused(change, message):
  values = json.loads(to_json(cli.load_experiment(str(LIMBER)))) | change
  with pytest.raises(UserError, match=f"^runs/x/config.json: {message}"):
    from_json(json.dumps({k: v for k, v in values.items() if v is not ...}), "runs/x/config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "[" * 100_000])
def test_what_is_no_json_object_is_no_configuration(text):
  with pytest.raises(UserError, match=r"^x: no configuration, for it is no JSON"):
    from_json(text, "x")


@pytest.mark.parametrize(("name", "value", "least"), [
  ("batch_size", 0, 1), ("batch_size", -8, 1), ("log_every", 0, 1), ("checkpoint.every", 0, 1), ("steps", 0, 1),
  ("loss.accumulate", 0, 1), ("data.workers", -1, 0), ("optim.max_skips", 0, 1), ("evals.digits.batch_size", 0, 1)])
def test_a_number_that_is_too_small_is_one_line(name, value, least, tmp_path):
  config = cli.load_experiment(str(LIMBER))
  holder, *fields, last = config, *name.split(".")
  for field in fields:
    holder = holder[field] if isinstance(holder, dict) else getattr(holder, field)
  setattr(holder, last, value)
  for call in (lambda: train(config, str(tmp_path / "run")), lambda: setup(config)):
    with pytest.raises(UserError, match=f"^config.{re.escape(name)}={value}: wanted {least} or more$"):
      call()
  assert not (tmp_path / "run").exists()
