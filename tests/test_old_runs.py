"""Runs of release 0.1.0 (81b353f) resume, are evaluated, captioned and converted: one of each task, in tests/data.

They were trained for 4 steps on scikit-learn's digits, and their checkpoint of step 4 was deleted; losses.json has the
losses of all four, on the processor of that day.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from limber_jax import config_json
from limber_jax.caption import captions
from limber_jax.checkpoints import workdirs
from limber_jax.evaluate import results
from limber_jax.inference.projections import export_projection, open_run, read_run, to_use
from limber_jax.training.loop import train
from limber_jax.weights import export, load

DATA = Path(__file__).parent / "data" / "runs_0.1.0"


@pytest.fixture(params=["contrastive", "captioning", "language_modelling"])
def old(request, tmp_path):
  """Returns (task, workdir) of a stored run."""
  with tarfile.open(DATA / f"{request.param}.tar.gz") as file:
    file.extractall(tmp_path, filter="data")
  return request.param, str(tmp_path / request.param)


def on_all_devices(config):
  config.mesh.data = -1
  for e in config.evals.values():
    e.batch_size = 64
  return config


@pytest.mark.process
def test_an_old_run_resumes_as_it_would_have(old):
  _, workdir = old
  with open(f"{workdir}/losses.json", encoding="utf-8") as file:
    wanted = json.load(file)
  config = on_all_devices(workdirs.read_config(workdir))
  said = []
  assert int(train(config, workdir, log=said.append).step) == 4
  assert any("resuming from step 2" in line for line in said), said
  with open(f"{workdir}/metrics.jsonl", encoding="utf-8") as file:
    losses = {r["step"]: r["loss"] for r in map(json.loads, file) if "loss" in r}
  np.testing.assert_allclose([losses[3], losses[4]], [wanted["3"], wanted["4"]], rtol=1e-5)


@pytest.mark.process
def test_an_old_run_is_evaluated_captioned_and_converted(old, tmp_path):
  task, workdir = old
  config = on_all_devices(workdirs.read_config(workdir))
  assert config_json.from_json(config_json.to_json(config), "x") == config
  if config.evals:
    found = results(config, workdir, data="")
    assert found["evaluations"].keys() == config.evals.keys()
  if task == "contrastive":
    model = load.load(workdir)
    export.save(str(tmp_path / "hf"), "hf", model.size, model.params, model.stats)
    again = load.load(str(tmp_path / "hf")).params
    assert jax.tree.all(jax.tree.map(np.array_equal, again, model.params))
  if task == "captioning":
    use = to_use(read_run(workdir), batch_size=2)
    pictures = runs.pictures(tmp_path, 2)
    assert len([w.text for w in captions(open_run(workdir, use), pictures)]) == 2
    assert export_projection(workdir, str(tmp_path / "map.safetensors"), checkpoint="latest") == 2
