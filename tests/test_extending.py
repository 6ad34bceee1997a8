"""The recipes of docs/extending.md, each from one file of its own: registered, trained, evaluated, decoded, read."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import torch
from PIL import Image
from safetensors.numpy import save_file

from limber_jax import config as config_lib
from limber_jax import config_json, registry
from limber_jax.config import Decoding, Init, Source, Tokenizer
from limber_jax.decoding.generate import generate
from limber_jax.errors import UserError
from limber_jax.evals.captions import Captions
from limber_jax.evals.linear_probe import LinearProbe
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.inference.captioner import captions
from limber_jax.inference.projections import (
  export_projection,
  open_projection,
  open_run,
  read_projection,
  read_run,
  to_use,
)
from limber_jax.models.encoders import Encoder, encoder_size
from limber_jax.models.limber import LimberConfig
from limber_jax.models.spec import decoder_of
from limber_jax.training.loop import train
from limber_jax.training.results import results
from limber_jax.weights.parts import load_part
from limber_jax.weights.rewrite import rewrite

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = dict(re.findall(r"^```python\n# limber_jax/(\S+)\.py\n(.*?)^```$", PAGE.read_text(), re.M | re.S))
LINES = re.findall(r"`(\w+)\[\"(\w+)\"\] = \"limber_jax\.([\w.]+):(\w+)\"`", PAGE.read_text())


@pytest.fixture
def recipe(tmp_path, monkeypatch):
  """Returns a function that writes the files of recipes to a folder and registers them as the page says."""
  monkeypatch.syspath_prepend(str(tmp_path / "added"))

  def add(*names):
    for table, name, module, attribute in LINES:
      if (path := module.replace(".", "/")).rpartition("/")[2] not in names:
        continue
      file = tmp_path / "added" / f"{path.rpartition('/')[2]}.py"
      file.parent.mkdir(exist_ok=True)
      file.write_text(BLOCKS[path])
      monkeypatch.delitem(sys.modules, file.stem, raising=False)
      importlib.invalidate_caches()
      monkeypatch.setitem(getattr(registry, table), name, f"{file.stem}:{attribute}")

  return add


def test_every_recipe_has_its_line_and_every_line_its_recipe():
  assert {module.replace(".", "/") for _, _, module, _ in LINES} == set(BLOCKS) and len(BLOCKS) >= 6


def limber(**changes):
  model = LimberConfig(image=encoder_size("patches_s"), lm=decoder_of("mean").named["mean_s"]())
  return runs.tiny_limber(**({"model": model, "trainable": ("prompt",), "evals": {
    "captions": Captions(Source(split="test"), every=0, batch_size=40)}} | changes))


@pytest.mark.process
def test_an_encoder_and_a_language_model_of_one_file_each_train_evaluate_and_caption(recipe, tmp_path):
  recipe("patches", "meanlm")
  run = str(tmp_path / "run")
  said = []
  state = train(limber(decoding=Decoding(prompt="a", max_new_tokens=4)), run, log=said.append)
  assert int(state.step) == 3 and any("captions/cider" in line for line in said), said
  pictures = runs.pictures(tmp_path, 3)
  config = to_use(read_run(run), batch_size=3)
  assert config.model.image.tower.kind == "patches" and config.model.lm.kind == "mean"
  found = [w.text for w in captions(open_run(run, config), pictures)]
  assert len(found) == 3
  export_projection(run, str(tmp_path / "map.safetensors"), checkpoint="latest")
  again, name = read_projection(str(tmp_path / "map.safetensors"))
  frozen = [f"{part}={run}" for part in ("image", "lm")]  # they were random, and lie with the run
  model = open_projection(str(tmp_path / "map.safetensors"), to_use(again, init=frozen, batch_size=3), name)
  assert [w.text for w in captions(model, pictures)] == found


def test_greedy_decoding_with_the_cache_equals_the_full_pass(recipe):
  recipe("meanlm")
  spec = decoder_of("mean")
  model = spec.module(spec.named["mean_s"](), config_lib.Compute(dtype="float32"), None)
  own = spec.init(model, jax.random.key(0))
  params = {"params": own}
  tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 264)
  x = model.apply(params, tokens, method="embed")
  mask = np.ones((2, 5), bool)
  got = generate(model, own, x, np.arange(5)[None].repeat(2, 0), mask, max_new_tokens=4, eos=-1,
                 settings=Decoding()).tokens
  for _ in range(4):
    T = tokens.shape[1]
    hidden, _ = model.apply(params, model.apply(params, tokens, method="embed"), np.arange(T)[None].repeat(2, 0),
                            np.ones((2, T), bool))
    logits = model.apply(params, hidden[:, -1:], method="logits")
    tokens = np.concatenate([tokens, logits.argmax(-1)], axis=1)
  np.testing.assert_array_equal(got, tokens[:, 5:])


def test_an_encoders_weights_load_from_a_file_by_its_table(recipe, tmp_path):
  recipe("patches")
  size = encoder_size("patches_s")
  layer = torch.nn.Linear(192, 64)
  save_file({f"embed.{k}": v.detach().numpy() for k, v in layer.named_parameters()}, tmp_path / "x.safetensors")
  encoder = Encoder.from_config(size, config_lib.Compute(dtype="float32"))
  params, _ = load_part(str(tmp_path / "x.safetensors"), "image", size, encoder.shapes()[0])
  image = np.asarray(Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(32, 32, 3)))
  tokens = encoder.encode(params, {}, image[None])[0].tokens
  patches = torch.tensor((image / 255 - 0.5) / 0.5, dtype=torch.float32).reshape(4, 8, 4, 8, 3).transpose(1, 2)
  np.testing.assert_allclose(tokens[0], layer(patches.reshape(16, 192)).detach(), atol=1e-5)
  with pytest.raises(UserError, match="patches of 5 do not tile 32 pixels"):
    Encoder.from_config(dataclasses.replace(size, tower=dataclasses.replace(size.tower, patch=5)), config_lib.Compute())
  with pytest.raises(UserError, match=r"config.init.image: .*gone: no such file"):
    model = LimberConfig(image=size, lm=runs.tiny_limber().model.lm)
    config = runs.tiny_limber(model=model, trainable=("prompt",), init=Init(image=str(tmp_path / "gone")))
    train(config, str(tmp_path / "run"), log=lambda _: None)


@pytest.mark.process
def test_an_evaluation_of_one_file_runs_while_training_and_by_the_command(recipe, tmp_path):
  recipe("collapse")
  cls = config_lib.evaluation_of("collapse")
  config = runs.tiny("clip_vit_digits", mesh=(-1, 1, 1), steps=3, evals={"collapse": cls(
    source=Source(split="test"), every=0, batch_size=64)})
  said, run = [], str(tmp_path / "run")
  train(config, run, log=said.append)
  assert any("collapse/cosine" in line for line in said), said
  again = config_json.from_json((tmp_path / "run" / "config.json").read_text(), "x")
  assert type(again.evals["collapse"]) is cls and again.evals["collapse"].most == 1000
  found = results(config, run)["evaluations"]["collapse"]["metrics"]["cosine"]
  config.evals["collapse"].most = 2  # of two images it is their cosine
  pair = results(config, run)["evaluations"]["collapse"]["metrics"]["cosine"]
  assert -1 <= pair <= 1 and -1 <= found <= 1 and pair != found
  with pytest.raises(UserError, match=r"most=1: wanted 2 or more"):
    config_lib.check(dataclasses.replace(config, evals={"collapse": cls(most=1)}))


@pytest.mark.process
def test_a_source_and_a_tokenizer_of_one_file_each_train_and_are_evaluated(recipe, tmp_path):
  recipe("squares", "letters")
  config = runs.tiny(
    "clip_vit_digits", mesh=(-1, 1, 1), steps=3,
    evals={"zeroshot": ZeroShot(source=Source(name="squares", split="test"), every=0, batch_size=16,
                                  templates="a {} square")})
  config.data.source, config.data.tokenizer = Source(name="squares"), Tokenizer(name="letters")
  said = []
  train(config, str(tmp_path / "run"), log=said.append)
  assert "64 examples" in said[0] and any("zeroshot/top1" in line for line in said), said
  text = (tmp_path / "run" / "config.json").read_text()
  assert config_json.from_json(text, "x").data.source == Source("squares", size=32)
  with pytest.raises(UserError, match=r"data\.source\.size=0: wanted 1 or more"):
    config_json.from_json(text.replace('"data.source.size": 32', '"data.source.size": 0'), "x")
  with pytest.raises(UserError, match=r"^data source 'squares' has no field 'pixels'; known: name, size, split$"):
    Source("squares", pixels=3)


def regression(**changes):
  module = importlib.import_module("regression")
  config = runs.tiny(mesh=(-1, 1, 1), steps=3, **{"evals": {"probe": LinearProbe(
    Source("digits", split="test"), train=Source("digits", split="train"), every=-1, batch_size=128)}} | changes)
  model = module.RegressionConfig(encoder_size("clip_vit_b32_mu"))
  return dataclasses.replace(config, task="regression", model=model, trainable=("image", "head"))


@pytest.mark.process
def test_a_task_of_one_file_trains_is_evaluated_and_its_encoder_is_used_elsewhere(recipe, tmp_path):
  recipe("regression")
  run = str(tmp_path / "run")
  said, config = [], regression()
  state = train(config, run, log=said.append)
  steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
  assert int(state.step) == 3 and [s["step"] for s in steps if "absolute_error" in s] == [1, 2, 3]
  again = config_json.from_json((tmp_path / "run" / "config.json").read_text(), "x")
  assert again.model == config.model and again.task == "regression"
  found = results(config, run)
  assert 0 < found["evaluations"]["probe"]["metrics"]["accuracy"] <= 1 and found["model"] == ""
  # The trained encoder is read by another task as any other's.
  encoder = Encoder.from_config(config.model.image, config.compute)
  params, _ = load_part(run, "image", config.model.image, encoder.shapes()[0])
  jax.tree.map(np.testing.assert_array_equal, params, state.params["image"])
  with pytest.raises(UserError, match=r"a run of task 'regression', and a CLIP is wanted here; .*evaluate"):
    list(rewrite(run, str(tmp_path / "out"), "hf", ""))
  with pytest.raises(UserError, match="of task 'regression' a run is evaluated, by its --workdir"):
    results(config, run, weights=run, out=str(tmp_path / "other"))
  with pytest.raises(UserError, match=r"task 'regression' needs a regression\.RegressionConfig, got ClipConfig"):
    train(dataclasses.replace(runs.tiny(), task="regression"), str(tmp_path / "new"))


def test_a_task_of_one_file_learns_and_computes_what_it_says(recipe):
  recipe("regression")
  config = regression()
  task = registry.lookup("task", registry.TASKS, "regression").from_config(config)
  params, stats = task.init(jax.random.key(0))
  rng = np.random.default_rng(0)
  batch = {"image": rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8), "label": np.arange(8, dtype=np.int32)}
  values = task.predict()["value"](params, stats, batch["image"])
  loss, (metrics, _) = task.loss(params, stats, batch, jax.random.key(1))
  np.testing.assert_allclose(loss, np.mean((values - np.arange(8)) ** 2) / 100, rtol=1e-5)
  np.testing.assert_allclose(metrics["absolute_error"], np.mean(np.abs(values - np.arange(8))), rtol=1e-5)
  in_microbatches = dataclasses.replace(task, num_microbatches=4).loss(params, stats, batch, jax.random.key(1))[0]
  np.testing.assert_allclose(in_microbatches, loss, rtol=1e-5)


@pytest.mark.process
def test_a_task_of_one_file_goes_through_the_commands(recipe, tmp_path):
  recipe("regression")
  (tmp_path / "added" / "x.py").write_text(f"""if True:
    import dataclasses, sys
    sys.path += [{str(tmp_path / "added")!r}, {str(PAGE.parent.parent / "tests")!r}]
    from limber_jax import registry
    registry.TASKS["regression"] = "regression:Regression"
    from test_extending import regression as get_config
  """)

  def command(name, *arguments):
    return subprocess.run([sys.executable, "-m", f"limber_jax.{name}", *arguments], cwd=PAGE.parent.parent, text=True,
                          capture_output=True, env=runs.environment())

  flags = (f"--config={tmp_path}/added/x.py", f"--workdir={tmp_path}/run")
  done = command("train", *flags, "--config.model.scale=5")
  assert done.returncode == 0 and "step 3/3  loss" in done.stdout, done.stderr
  done = command("train", *flags)
  assert done.returncode == 2 and "model.scale=5.0" in done.stderr  # another experiment
  done = command("evaluate", *flags, "--config.model.scale=5")
  assert done.returncode == 0 and "probe/accuracy" in done.stdout, done.stderr
  assert "linear" in (tmp_path / "run" / "report.md").read_text()
  done = command("convert", f"{tmp_path}/run", f"{tmp_path}/out", "--to=hf")
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a run of task 'regression'" in done.stderr
