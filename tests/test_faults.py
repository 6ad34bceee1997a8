"""What happens to a run that is killed, told to stop, or started again: nothing that a user would notice."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runs import environment, losses, tiny, zeroshot

from limber_jax import parallel
from limber_jax import train as train_lib
from limber_jax.checkpoint import Checkpoints
from limber_jax.config import Checkpoint, Optim
from limber_jax.errors import UserError
from limber_jax.train import train

EXPERIMENT = """
import sys
sys.path.insert(0, {tests!r})
from runs import tiny, zeroshot
from limber_jax.config import Checkpoint, Optim

def get_config():
  return tiny(steps={steps}, checkpoint=Checkpoint(every=3, keep=2), evals=zeroshot(every=4), mesh=({mesh}),
              optim=Optim(lr=2e-4, warmup_steps=4))
"""


@pytest.fixture(autouse=True)
def only_the_devices_of_the_mesh(monkeypatch):
  """A mesh of one device, of the eight that are simulated, is an error to a user, and what most tests here want."""
  make = parallel.make_mesh
  monkeypatch.setattr(parallel, "make_mesh", lambda sizes: make(sizes, jax.devices()[: math.prod(sizes.values())]))


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.fixture
def experiment(tmp_path):
  """Returns (a function that starts the real command on a tiny experiment, its workdir)."""
  file = tmp_path / "tiny.py"

  def start(workdir, *, steps=20, devices=1, processes=1, index=0, port=0, mesh="-1, 1, 1"):
    file.write_text(EXPERIMENT.format(tests=os.path.dirname(__file__), steps=steps, mesh=mesh))
    env = environment(tmp_path / "cache", devices, processes, index, port)
    return subprocess.Popen([sys.executable, "-m", "limber_jax.train", f"--config={file}", f"--workdir={workdir}"],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

  return start


def final_arrays(workdir, step):
  """Returns every array of a checkpoint, read without a config."""
  import orbax.checkpoint as ocp
  checkpointer = ocp.StandardCheckpointer()
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  out = []
  for item in ("params", "optimizer"):
    path = os.path.join(workdir, "checkpoints", str(step), item)
    metadata = checkpointer.metadata(path).item_metadata.tree
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), metadata)
    out += jax.tree.leaves(checkpointer.restore(path, like))
  return out


@pytest.mark.parametrize("size", ["clip_vit_b32_mu", "clip_rn50_mu"])
def test_resumed_equals_uninterrupted_from_any_step(size, tmp_path):
  def config():
    return tiny(size, checkpoint=Checkpoint(every=1, keep=100))

  whole = train(config(), str(tmp_path / "whole"), log=lambda _: None)
  for stop in (1, 4):
    workdir = str(tmp_path / f"stopped{stop}")
    shutil.copytree(tmp_path / "whole", workdir)
    for step in range(stop + 1, 7):
      shutil.rmtree(f"{workdir}/checkpoints/{step}")
    resumed = train(config(), workdir, log=lambda _: None)
    assert_same(resumed, whole)
    assert losses(workdir) == losses(str(tmp_path / "whole"))


def test_killed_ten_times_equals_uninterrupted(experiment, tmp_path):
  steps = 20
  whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
  process = experiment(whole, steps=steps)
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output
  rng = random.Random(0)
  for _ in range(10):
    process = experiment(killed, steps=steps)
    for _ in range(rng.choice([0, 1, 2, 4])):  # of progress: kills fall in start-up, steps, saves and evaluations
      process.stdout.readline()
    time.sleep(rng.uniform(0, 1.5))
    process.kill()
    process.communicate()
  process = experiment(killed, steps=steps)
  output, _ = process.communicate(timeout=240)
  assert process.returncode == 0, output
  assert len(losses(whole)) == steps
  assert losses(killed) == losses(whole)
  assert_same(final_arrays(killed, steps), final_arrays(whole, steps))


def stop_in(moment: str, monkeypatch) -> None:
  """Sends this process a real SIGTERM in the middle of a step, a save or an evaluation."""

  def send():
    os.kill(os.getpid(), signal.SIGTERM)

  if moment == "step":
    record = train_lib.Log.train
    monkeypatch.setattr(train_lib.Log, "train", lambda self, step, m: (record(self, step, m), step == 3 and send()))
  elif moment == "save":
    save = Checkpoints.save
    # The save goes on in the background while the signal arrives.
    monkeypatch.setattr(Checkpoints, "save", lambda self, state, *a, **k: (save(self, state, *a, **k), send()))
  else:
    from limber_jax.evals.zeroshot import ensemble

    def interrupted(*args):
      send()
      return ensemble(*args)

    monkeypatch.setattr("limber_jax.evals.zeroshot.ensemble", interrupted)


@pytest.mark.parametrize("moment", ["step", "save", "evaluation"])
def test_sigterm_saves_and_the_next_start_goes_on(moment, tmp_path, monkeypatch):
  def config():
    return tiny(checkpoint=Checkpoint(every=3), evals=zeroshot(every=4))

  whole = train(config(), str(tmp_path / "whole"), log=lambda _: None)
  said = []
  with monkeypatch.context() as patch:
    stop_in(moment, patch)
    stopped = train(config(), str(tmp_path / "stopped"), log=said.append)
  assert 3 <= int(stopped.step) < 6
  assert "stopped by SIGTERM" in said[-1]
  assert Checkpoints(str(tmp_path / "stopped"), Checkpoint()).latest() == int(stopped.step)
  resumed = train(config(), str(tmp_path / "stopped"), log=lambda _: None)
  assert_same(resumed, whole)
  assert losses(str(tmp_path / "stopped")) == losses(str(tmp_path / "whole"))
  # An evaluation that was cut short has been made up for.
  for run in ("whole", "stopped"):
    with open(tmp_path / run / "metrics.jsonl", encoding="utf-8") as file:
      assert [r["step"] for r in map(json.loads, file) if "zeroshot/top1" in r] == [4, 6]


def test_the_command_exits_0_after_sigterm(experiment, tmp_path):
  process = experiment(str(tmp_path / "run"), steps=100_000)
  for _ in range(4):
    process.stdout.readline()
  process.terminate()
  output, _ = process.communicate(timeout=120)
  assert process.returncode == 0, output
  assert "stopped by SIGTERM at step" in output and "Traceback" not in output


def free_port() -> int:
  import socket
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def test_two_processes_equal_one_and_stop_together(experiment, tmp_path):
  alone = experiment(str(tmp_path / "alone"), steps=8, devices=2)
  output, _ = alone.communicate(timeout=240)
  assert alone.returncode == 0, output
  port = free_port()
  pair = [experiment(str(tmp_path / "pair"), steps=8, processes=2, index=i, port=port) for i in range(2)]
  outputs = [p.communicate(timeout=240)[0] for p in pair]
  assert [p.returncode for p in pair] == [0, 0], outputs
  one, two = losses(str(tmp_path / "alone")), losses(str(tmp_path / "pair"))
  np.testing.assert_allclose([float.fromhex(v) for v in two.values()], [float.fromhex(v) for v in one.values()],
                             rtol=1e-5)
  assert one.keys() == two.keys()

  port = free_port()
  pair = [experiment(str(tmp_path / "stop"), steps=100_000, processes=2, index=i, port=port) for i in range(2)]
  for _ in range(4):
    pair[0].stdout.readline()
  pair[1].terminate()  # only one of them hears the signal
  outputs = [p.communicate(timeout=120)[0] for p in pair]
  assert [p.returncode for p in pair] == [0, 0], outputs
  assert "stopped by another process" in outputs[0] and "stopped by SIGTERM" in outputs[1]


@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 2, 2)])
def test_a_checkpoint_goes_on_on_another_mesh(mesh, tmp_path):
  def config(mesh, steps=6):
    return tiny(steps=steps, mesh=mesh, checkpoint=Checkpoint(every=3), optim=Optim(lr=2e-4, warmup_steps=2))

  whole = train(config((1, 1, 1)), str(tmp_path / "whole"), log=lambda _: None)
  shutil.copytree(tmp_path / "whole", tmp_path / "moved")
  shutil.rmtree(tmp_path / "moved" / "checkpoints" / "6")
  moved = train(config(mesh), str(tmp_path / "moved"), log=lambda _: None)
  assert moved.params["text"]["blocks"]["fc"]["kernel"].sharding.mesh.shape["fsdp"] == mesh[1]
  for a, b in zip(jax.tree.leaves(jax.device_get(moved.params)), jax.tree.leaves(jax.device_get(whole.params)),
                  strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_workdir_of_another_experiment_is_refused(tmp_path):
  train(tiny(steps=3), str(tmp_path), log=lambda _: None)
  with pytest.raises(UserError, match=r"holds a run with seed=0, but this config says 1"):
    train(tiny(steps=3, seed=1), str(tmp_path), log=lambda _: None)


def test_k_bad_steps_in_a_row_stop_the_run_and_name_the_steps(tmp_path, monkeypatch):
  from limber_jax.tasks.contrastive import Contrastive
  loss = Contrastive.loss
  monkeypatch.setattr(Contrastive, "loss", lambda *a: (lambda out: (out[0] * np.nan, out[1]))(loss(*a)))
  config = tiny(checkpoint=Checkpoint(every=1))
  config.optim.max_skips = 3
  with pytest.raises(UserError, match="steps 1 to 3 had no finite loss"):
    train(config, str(tmp_path), log=lambda _: None)
