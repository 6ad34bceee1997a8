"""Whose a workdir is, and where its paths lead from anywhere."""

import dataclasses
import os
import shutil

import pytest
import runs

from limber_jax.checkpoints import workdirs
from limber_jax.errors import UserError
from limber_jax.training.loop import train


def claimed(workdir, config):
  workdir.mkdir(parents=True)
  (workdir / "checkpoints" / "6").mkdir(parents=True)
  workdirs.claim(config, str(workdir), "a run")
  return str(workdir)


def test_a_run_finds_its_weights_from_any_folder_and_wherever_both_were_moved(tmp_path, monkeypatch):
  home, away = tmp_path / "home", tmp_path / "away"
  (home / "weights" / "lm").mkdir(parents=True)
  away.mkdir()
  config = runs.tiny_limber()
  config.init.lm, config.init.extra_projectors = "weights/lm", {"image@other": "not there"}
  monkeypatch.chdir(home)
  claimed(home / "runs" / "a", config)

  def lm(workdir):
    return workdirs.read_config(workdir).init.lm

  assert os.path.samefile(lm("runs/a"), "weights/lm")
  monkeypatch.chdir(away)
  assert os.path.samefile(lm("../home/runs/a"), home / "weights" / "lm")
  shutil.copytree(home, tmp_path / "copy")
  assert os.path.samefile(lm("../copy/runs/a"), tmp_path / "copy" / "weights" / "lm")
  shutil.move(home / "runs" / "a", away / "a")  # the run alone
  assert os.path.samefile(lm("a"), home / "weights" / "lm")
  shutil.rmtree(home)
  assert workdirs.read_config("a").init == config.init


def test_a_workdir_without_a_checkpoint_is_nobodys(tmp_path):
  workdir = claimed(tmp_path / "run", runs.tiny())
  with pytest.raises(UserError, match=r"holds a run with seed=0, but this config says 1"):
    workdirs.check(runs.tiny(seed=1), workdir)
  (tmp_path / "run" / "checkpoints" / "6").rmdir()
  workdirs.check(runs.tiny(seed=1), workdir)
  assert not workdirs.begun(workdir)


def test_frozen_weights_may_lie_elsewhere_and_nothing_else_may(tmp_path):
  config = runs.tiny_limber()
  config.init.lm, config.init.prompt, config.init.extra_projectors = "here/lm", "here/map", {"image@other": "here/x"}
  workdir = claimed(tmp_path / "run", config)

  def check(**init):
    workdirs.check(dataclasses.replace(config, init=dataclasses.replace(config.init, **init)), workdir)

  check(lm="there/lm", extra_projectors={"image@other": "there/x"})
  for init, name in (({"prompt": "there/map"}, "prompt"), ({"lm": ""}, "lm"), ({"image": "new"}, "image"),
                     ({"extra_projectors": {}}, "extra_projectors.image@other")):
    with pytest.raises(UserError, match=rf"holds a run with init.{name}="):
      check(**init)


@pytest.mark.process
def test_a_run_resumes_with_its_frozen_weights_from_another_path_and_no_others(tmp_path):
  mesh = (-1, 1, 1)
  runs.untrained(runs.tiny(mesh=mesh), str(tmp_path / "start"))
  runs.untrained(runs.tiny(mesh=mesh, seed=5), str(tmp_path / "other"))

  def start(path, **changes):
    config = runs.tiny(mesh=mesh, trainable=("text", "logit_scale"), steps=3, **changes)
    config.init.image = str(tmp_path / path)
    return train(config, str(tmp_path / "run"), log=lambda _: None)

  start("start")
  shutil.move(tmp_path / "start", tmp_path / "moved")
  assert int(start("moved").step) == 3
  with pytest.raises(UserError, match=r"was trained on other weights of 'image': .*; name the same weights, wherever"):
    start("other")
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(UserError, match=r"lacks its config.json.* was trained on other data or by another seed.* back"):
    start("moved", seed=1)


def test_a_workdir_that_cannot_be_is_reported_before_anything_is_done(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "checkpoints").touch()
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "metrics.jsonl").mkdir()
  for name, message in (("file/run", "file is a file, where a directory belongs"),
                        ("run", "checkpoints is a file, where a directory belongs"),
                        ("full", "metrics.jsonl: cannot be written .Is a directory")):
    with pytest.raises(UserError, match=message):
      workdirs.check(runs.tiny(), str(tmp_path / name))
  workdirs.check(runs.tiny(), str(tmp_path / "none" / "yet"))
  assert not (tmp_path / "none").exists()
