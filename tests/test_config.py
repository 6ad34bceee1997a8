"""A configuration comes back from its JSON, and nothing else passes for one."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, tiny, tiny_limber

from limber_jax import cli, help, ranges, registry
from limber_jax.checkpoints import workdirs
from limber_jax.config import Compute, Optim, Source, check, check_best, missing_best, models_of
from limber_jax.config_json import check_same, from_json, to_json
from limber_jax.errors import UserError
from limber_jax.evals.captions import Captions
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.vqa import Vqa
from limber_jax.evals.word_recall import WordRecall
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training.loop import train
from limber_jax.training.setup import setup

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
LIMBER = EXPERIMENTS / "quickstart_limber.py"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda p: p.stem)
def test_an_experiment_comes_back_from_its_json(path):
  config = cli.load_experiment(str(path))
  back = from_json(to_json(config), "x")
  assert back == config and type(back.model) is type(config.model)
  check(config)


def test_names_with_dots_come_back():
  config = cli.load_experiment(str(LIMBER))
  config.prerequisites, config.init.extra_projectors = {"runs/v1.0": "a.py", "b": "c"}, {"image@random": "runs/v1.5"}
  config.optim.part_lr = {"prompt": 1.0}
  assert from_json(to_json(config), "x") == config


def test_a_run_of_before_a_setting_was_there_has_its_default():
  config = cli.load_experiment(str(LIMBER))
  config.optim.lr, config.evals["more"] = 5.0, LinearProbe(train=Source(split="test"), shots=(1, 2))
  values = json.loads(to_json(config))
  for name in [n for n in values if n.startswith(("captions.", "evals.digits.classes", "evals.more.source."))]:
    del values[name]
  del values["optim.clip_norm"], values["evals.more.validation"]
  back = from_json(json.dumps(values), "x")
  config.optim.clip_norm = 0.0
  assert back == config and back.optim.lr == 5.0


def test_every_task_has_its_model():
  assert all(models_of(task) for task in registry.TASKS)


@pytest.mark.parametrize("change,message", [
  ({"optim.lrr": 1.0}, "optim.lrr: no such field; did you mean 'optim.lr'"),
  ({"seeds": 1}, "seeds: no such field; did you mean 'seed'"),
  ({"model.extra_projectors.random.image": None}, "model.extra_projectors.random.image.activation: no such field"),
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
  with pytest.raises(UserError, match=r"^x: no configuration, for it is (no JSON|empty)"):
    from_json(text, "x")


@pytest.mark.parametrize(("name", "value", "wanted"), [
  ("batch_size", 0, "1 or more"), ("log_every", 0, "1 or more"), ("checkpoint.every", -5, "1 or more"),
  ("evals.digits.batch_size", 0, "1 or more"), ("data.workers", -1, "0 or more"),
  ("optim.clip_norm", -1.0, "0 or more"),
  ("optim.b1", 1.5, "less than 1"), ("optim.b2", 1 - 1e-12, "less than 1"), ("optim.eps", 0.0, "more than 0"),
  ("optim.weight_decay", -1.0, "0 or more"), ("watchdog", -1.0, "0, or 1 or more"),
  ("seed", 10**20, "4294967295 or less"), ("decoding.beams", 10**6, "1000 or less"),
  ("data.crop_scale", (0.5, math.nan), "a finite number"), ("optim.part_lr", {"prompt": math.inf}, "a finite number"),
  ("model.lm.layers", 60_000, "10000 or less"), ("model.lm.heads", 0, "1 or more"),
  ("model.image.std", (0.2, 0.0, 0.2), "1e-06 or more")])
def test_a_number_out_of_its_range_is_one_line_wherever_it_is_read(name, value, wanted, tmp_path):
  config = cli.load_experiment(str(LIMBER))
  holder, *fields, last = config, *name.split(".")
  for field in fields:
    holder = holder[field] if isinstance(holder, dict) else getattr(holder, field)
  setattr(holder, last, value)
  path = f"{name}.prompt" if isinstance(value, dict) else name
  message = rf"{re.escape(path)}=\S+: wanted {re.escape(wanted)}$"
  for call in (lambda: train(config, str(tmp_path / "run")), lambda: setup(config)):
    with pytest.raises(UserError, match=f"^config.{message}"):
      call()
  with pytest.raises(UserError, match=f"^runs/x/config.json: {message}"):
    from_json(to_json(config), "runs/x/config.json")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("change", "message"), [
  ({"data": {"workers": 2}}, "data: expected Data, got {'workers': 2}"),
  ({"steps": "10"}, "steps: expected int, got '10'"), ({"steps": 10.0}, "steps: expected int, got 10.0"),
  ({"model": "clip_vit_b32"}, "model: expected a size, such as models.clip.SIZES"),
  ({"evals": {"a.b": ZeroShot()}}, "evals: expected names without dots, got 'a.b'"),
  ({"evals": {"a": {"name": "zeroshot"}}}, "evals.a: expected Evaluation, got {'name': 'zeroshot'}"),
  ({"optim": Optim(eps=1e-50)}, "optim.eps=1e-50: it is 0 in float32, whose numbers begin at 1.2e-38$"),
  ({"evals": {"a": Vqa(seeds=())}}, r"evals.a.seeds=\(\): wanted one at least$"),
  ({"trainable": "prompt"}, r"trainable: expected tuple\[str, ...\], got 'prompt'")])
def test_what_cannot_be_in_an_experiment_is_named(change, message, tmp_path):
  config = cli.load_experiment(str(LIMBER))
  for name, value in change.items():
    setattr(config, name, value)
  with pytest.raises(UserError, match=f"^config.{message}"):
    train(config, str(tmp_path / "run"))


@pytest.mark.parametrize("best", ["top1", "digit/top1", "digits", "words/top1"])
def test_the_best_checkpoint_is_by_a_metric_of_an_evaluation_in_training(best):
  config = cli.load_experiment(str(LIMBER))
  config.checkpoint.best, config.evals["word_recall"] = best, WordRecall(every=-1)
  with pytest.raises(UserError, match=rf"checkpoint.best='{best}': wanted a metric .* such as digits/top1; those of t"):
    check_best(config)
  config.checkpoint.best = "digits/cider"
  check_best(config)
  assert missing_best("digits/cider", {"digits/top1": 0.5, "words/top1": 0.5}).endswith("there are digits/top1")
  assert not missing_best("digits/cider", {"digits/cider": 0.5}) and not missing_best("digits/cider", {"words/top1": 1})


def test_what_only_tracing_would_meet_is_one_line_or_works():
  task = Contrastive.from_config(tiny(trainable=("text",)))
  assert task.project({"text": {}}) == {"text": {}}  # logit_scale is not trained
  config = tiny(compute=Compute(attention="cudnn"), mesh=(-1, 1, 1))
  with pytest.raises(UserError, match=r"^config.compute.attention='cudnn' is for GPUs and half precision, and this is"):
    setup(config)


def test_a_range_says_what_it_allows():
  assert str(ranges.Range(at_least=0, below=1)) == "0 or more and less than 1"
  assert str(ranges.Range(at_least=1, or_zero=True)) == "0, or 1 or more"
  assert str(ranges.Range(at_least=0, at_most=255)) == "0 to 255"
  assert str(ranges.Range(choices=("", "csv"))) == '"" | csv'
  assert str(ranges.ANY) == ""


def test_every_number_of_every_configuration_has_a_range():
  open_ended = {"model.mean", "model.image.mean", "model.extra_projectors.NAME.image.mean"}  # any finite number
  for name, field, hint, _ in help.fields():
    bare = field.metadata.get("range") is None
    assert not bare or hint in (str, bool) or str in getattr(hint, "__args__", ()) or "Source" in str(hint), name
    if hint in (int, float):
      assert str(ranges.range_of(field)) or name.removeprefix("config.") in open_ended, name


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(tmp_path):
  config = tiny_limber()
  config.model.lm.layers, config.model.lm.width = 10_000, 8192
  with pytest.raises(UserError, match=r"^config.model has 8,0\d\d.\d G parameters, [\d,.]+ GB, and 8 × cpu have "):
    setup(config)


def test_a_mistake_in_an_experiment_that_comes_first_is_reported_before_anything_is_trained(tmp_path):
  (tmp_path / "broken.py").write_text("from runs import tiny\n\ndef get_config():\n  return tiny(steps=-1)\n")
  with pytest.raises(UserError, match=r"broken.py: config.steps=-1: wanted 1 or more$"):
    train(tiny(prerequisites={"a": f"{EXPERIMENTS}/quickstart.py", "b": f"{tmp_path}/broken.py"}),
          str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_texts_with_commas_are_several_and_a_group_of_settings_does_not_flood():
  config = tiny(trainable=("image, text",), evals={"a": Captions(metrics=("cider,bleu",))})
  ranges.split_commas(config)
  assert config.trainable == ("image", "text") and config.evals["a"].metrics == ("cider", "bleu")
  config = tiny(trainable=(-1,))
  ranges.split_commas(config)
  with pytest.raises(UserError, match=r"^config\.trainable: expected str, got -1$"):
    check(config)
  line = cli._group("evals", [f"evals.a.{n}" for n in range(50)])
  assert len(line) < 600 and "and 30 more" in line and line.endswith("every=-1 leaves one out of training")


def test_a_config_json_with_a_mark_is_read_and_an_empty_one_is_named(tmp_path):
  (tmp_path / "config.json").write_text("\ufeff" + to_json(tiny()), encoding="utf-8")
  assert workdirs.read_config(str(tmp_path)) == tiny()
  with pytest.raises(UserError, match=r"^runs/a/config\.json: no configuration, for it is empty$"):
    check_same(tiny(), "", "runs/a")


def test_a_captioning_run_is_no_clip_and_the_commands_for_it_are_named():
  with pytest.raises(UserError, match=r"^runs/a is a run of task 'captioning', and a CLIP is wanted here; lim"):
    workdirs.check_clip({"task": "captioning"}, "runs/a")
  assert workdirs.check_clip({"task": "contrastive"}, "runs/a") == {"task": "contrastive"}


def test_a_get_config_without_a_return_is_reported(tmp_path):
  (tmp_path / "x.py").write_text("def get_config():\n  pass\n")
  command = [sys.executable, "-m", "limber_jax.train", f"--config={tmp_path}/x.py", f"--workdir={tmp_path}/r"]
  done = subprocess.run(command, capture_output=True, text=True, env=environment())
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == "error: --config: get_config() gave a NoneType, wanted a limber_jax.config.Config\n"
