"""Every experiment file builds at full size, and the commands answer mistakes with one line."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from limber_jax import cli, config_json, registry
from limber_jax import config as config_lib
from limber_jax.checkpoints.state import split
from limber_jax.config import Config, Loss
from limber_jax.errors import UserError
from limber_jax.runtime import parallel
from limber_jax.tasks import microbatches
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training import optimizer
from limber_jax.training.setup import example_row, outline
from limber_jax.training.train_step import make_step

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "experiments").glob("*.py"))


def get(path) -> Config:
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.smoke
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_an_experiment_builds_with_its_sharding_rules(path, axes):
  config = get(path)
  config.mesh = config_lib.Mesh(**axes)
  assert config.name == path.stem
  mesh = parallel.make_mesh(axes)
  o = outline(config, mesh)
  state, frozen = o.like, o.frozen
  if axes.get("fsdp"):
    assert not whole((state, frozen), jax.tree.map(lambda x: x.sharding, (state, frozen)))
  batch = {k: jax.ShapeDtypeStruct((config.batch_size, *v.shape), v.dtype)
           for k, v in example_row(o.task, config).items()}
  step = make_step(o.task, o.tx, optimizer.schedule(config.optim, config.steps), config.optim.spike)
  with jax.set_mesh(mesh):
    after, metrics = jax.eval_shape(step, state, frozen, batch, jax.random.key(0))
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
  assert metrics["loss"].shape == ()


def whole(tree, layout) -> list[str]:
  """Returns the large matrices that every device holds whole; convolutions may be, see models.resnet.SHARDING."""
  return [parallel.path_name(path) for (path, x), s in zip(
    jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(layout), strict=True)
    if x.size > 2**20 and s.shard_shape(x.shape) == x.shape and not re.search(
      r"(layer|stage)\d_\w+/.*kernel$|pool/\w+/kernel$", parallel.path_name(path))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_leaf_of_an_experiment_is_split_on_4_8_and_64_devices(path):
  config = get(path)
  task = registry.lookup("task", registry.TASKS, config.task).from_config(config)
  like = jax.eval_shape(task.init, jax.random.key(0))
  for sizes in ((1, 4, 1), (2, 2, 1), (1, 8, 1), (2, 2, 2), (8, 8, 1), (8, 4, 2)):
    layout = parallel.shardings(like, task.sharding, jax.sharding.AbstractMesh(sizes, parallel.AXES))
    assert not whole(like, layout), sizes
  # Its own mesh, on slices of any size; the quickstarts' batches are for one machine.
  for devices in (8, 16, 32, 64, 128, 256, 512) if not path.stem.startswith("quickstart") else ():
    sizes = [getattr(config.mesh, axis) for axis in parallel.AXES]
    sizes = tuple(n if n != -1 else -devices // int(np.prod(sizes)) for n in sizes)
    mesh = jax.sharding.AbstractMesh(sizes, parallel.AXES)
    layout = parallel.shardings(like, task.sharding, mesh)
    assert not whole(like, layout) or sizes[1] == 1, sizes
    assert config.batch_size % devices == 0
    with jax.sharding.use_abstract_mesh(mesh):
      count = microbatches.fitting(config.loss.num_microbatches, config.batch_size)
    assert config.batch_size // count % devices == 0 and (devices > 256 or count == config.loss.num_microbatches)


def test_a_frozen_network_of_convolutions_is_whole_on_every_device():
  for stem, is_split in (("limber_clip", False), ("limber_nfrn50", False), ("limber_nfrn50_tuned", True)):
    task = registry.lookup("task", registry.TASKS, "captioning").from_config(get(ROOT / "experiments" / f"{stem}.py"))
    like = jax.eval_shape(task.init, jax.random.key(0))[0]["image"]
    layout = parallel.shardings({"image": like}, task.sharding, jax.sharding.AbstractMesh((1, 8, 1), parallel.AXES))
    assert any(s.spec != jax.P() for s in jax.tree.leaves(layout)) == is_split, stem


def test_lit_trains_no_image_tower():
  config = get(ROOT / "experiments" / "lit_vitb.py")
  trained, frozen = split(jax.eval_shape(Contrastive.from_config(config).init, jax.random.key(0))[0], config.trainable)
  assert set(trained) == {"text", "logit_scale"} and set(frozen) == {"image"}


@pytest.fixture(scope="module", autouse=True)
def config_flag():
  if "config" not in flags.FLAGS:
    cli.define_config()


@pytest.mark.parametrize(("arguments", "words"), [
  (["--config=experiments/quickstat.py"], ["no file", "did you mean 'experiments/quickstart.py'"]),
  (["--config=experiments/quickstart.py", "--config.optim.learning_rate=1"], ["no such field", "optim.lr, "]),
  (["--config=experiments/quickstart.py", "--config.optim.warmup=1"], ["did you mean --config.optim.warmup_steps?"]),
  (["--config=experiments/quickstart.py", "--config.steps=1e3"], ["config.steps", "1e3"]),
  (["--config=experiments/quickstart.py", "--config.optim=3"], ["is a group", "--config.optim.lr"]),
  (["--config=experiments/quickstart.py", "--config.evals.zeroshot.threshold=0.9"], ["zeroshot.threshold: no such"]),
  (["--config=experiments/quickstart.py", "--config.evals.zeroshot.name=retrieval"], ["this is 'zeroshot'"]),
  (["--confg=experiments/quickstart.py"], ["confg", "config"]),
])
def test_a_mistake_on_the_command_line_is_one_line(arguments, words, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["train", *arguments])  # where ml_collections looks for the fields
  with pytest.raises(SystemExit) as end:
    cli._parse(sys.argv)
  said = capsys.readouterr().err
  assert end.value.code == 2
  assert said.startswith("error: ") and said.count("\n") == 1
  assert all(word in said for word in words), said


def test_a_broken_experiment_names_its_line(tmp_path, capsys):
  (tmp_path / "broken.py").write_text("def get_config():\n  return unknown\n")
  with pytest.raises(SystemExit) as end:
    cli._parse(["train", f"--config={tmp_path}/broken.py"])
  assert end.value.code == 2
  assert "broken.py, line 2: NameError" in capsys.readouterr().err


def test_overrides_are_typed_by_their_defaults(monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["train", "--config=experiments/quickstart.py", "--config.optim.lr=1",
                                    "--config.model.text.width=96", "--config.evals.zeroshot.every=7",
                                    "--config.evals.zeroshot.classes=cifar10", "--config.evals.probe.shots=(1,2)",
                                    "--config.trainable=('text', 'logit_scale')"])
  cli._parse(sys.argv)
  config = flags.FLAGS["config"].value
  assert isinstance(config.optim.lr, float) and config.model.text.width == 96
  assert config.evals["zeroshot"].every == 7 and config.trainable == ("text", "logit_scale")
  assert config.evals["zeroshot"].classes == "cifar10" and config.evals["probe"].shots == (1, 2)


def test_runs_may_differ_only_in_how_they_run():
  config = get(ROOT / "experiments" / "quickstart.py")
  saved = config_json.to_json(config)
  config.mesh.fsdp, config.log_every, config.data.workers = 2, 1, 4
  config_json.check_same(config, saved, "runs/x")
  config.optim.lr = 0.5
  with pytest.raises(UserError, match=r"runs/x holds a run with optim\.lr=0\.002, but this config says 0\.5"):
    config_json.check_same(config, saved, "runs/x")


@pytest.mark.parametrize(("field", "value"), [("kind", "hinge"), ("num_microbatches", 0), ("num_microbatches", 7)])
def test_a_loss_that_cannot_be_is_refused(field, value):
  config = get(ROOT / "experiments" / "quickstart.py")
  config.loss = Loss(**{field: value})
  with pytest.raises(UserError, match=field):
    Contrastive.from_config(config)
