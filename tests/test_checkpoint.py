"""Checkpoints: damage is found and named, a failed save is reported, two of them are there whatever happens."""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from runs import environment

from limber_jax.checkpoints import manifest, reading
from limber_jax.checkpoints.frozen import keep_frozen, kept_frozen
from limber_jax.checkpoints.manager import Checkpoints, abstract
from limber_jax.checkpoints.scores import Scores
from limber_jax.checkpoints.state import TrainState
from limber_jax.checkpoints.steps import Steps
from limber_jax.config import Checkpoint
from limber_jax.errors import UserError

TX = optax.adam(1e-3)


def toy(step, width=8, dtype=np.float32, parts=("image", "text")):
  """Returns a state whose arrays tell the step they are of."""
  params = {part: {"kernel": jnp.full((4, width), step, dtype), "bias": jnp.arange(3.0) + step} for part in parts}
  return TrainState.create(params, {}, TX).replace(step=jnp.int32(step))


def like(state):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return abstract(state, jax.tree.map(lambda _: device, state))


def save(workdir, *steps, metrics=None, **config):
  """Saves toys of some steps as one run, measured after each, and returns the directory of the checkpoints."""
  checkpoints = Checkpoints(str(workdir), Checkpoint(**{"keep": 9} | config), write=True)
  Path(workdir, "run.json").write_text(json.dumps({"run": checkpoints.run}))
  known = Scores(str(workdir), min(steps) - 1)
  for step in steps:
    checkpoints.save(toy(step), {"data": step})
    if metrics and step in metrics:
      known.begin(step, "e")
      known.end(step, "e", metrics[step])
  checkpoints.close()
  return Path(workdir, "checkpoints")


def opened(workdir, **config):
  """Returns (the checkpoints to read, the list of lines that they say)."""
  said = []
  return Checkpoints(str(workdir), Checkpoint(**config), log=said.append), said


def of_step(checkpoints, step):
  """Returns whether what is restored of `step` is what was saved, bit for bit."""
  state, meta = checkpoints.restore(step, like(toy(0)))
  same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), state, toy(step))
  return all(jax.tree.leaves(same)) and meta == {"data": step}


def files(directory):
  return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


# The two that Orbax writes after the manifest, and that no restore reads.
UNREAD = ("_CHECKPOINT_METADATA", "commit_success.txt")


def test_the_manifest_lists_every_file_that_is_read(tmp_path):
  directory = save(tmp_path, 3) / "3"
  listed = json.loads((directory / "manifest.json").read_text())["files"]
  assert sorted([*listed, "manifest.json", *UNREAD]) == files(directory)
  assert {name: size for name, (size, _) in listed.items()} == {n: (directory / n).stat().st_size for n in listed}
  checkpoints, said = opened(tmp_path)
  assert checkpoints.find("latest") == checkpoints.latest() == 3 and of_step(checkpoints, 3) and not said


def flips(workdir, count):
  """Flips single bits, half of them by file, half by size; returns how many in what is read, and the bytes there."""
  directory = save(workdir, 1, 2) / "2"
  names, rng, found = files(directory), random.Random(0), 0
  sizes = [(directory / name).stat().st_size for name in names]
  for i in range(count):
    name = names[i // 2 % len(names)] if i % 2 else rng.choices(names, sizes)[0]
    path, bit = directory / name, rng.randrange(8)
    was = path.read_bytes()
    at = rng.randrange(len(was))
    path.write_bytes(was[:at] + bytes([was[at] ^ 1 << bit]) + was[at + 1 :])
    checkpoints, said = opened(workdir)
    if name in UNREAD:
      assert checkpoints.find("latest") == 2 and of_step(checkpoints, 2) and not said
    else:
      assert checkpoints.find("latest") == 1, f"bit {bit} of byte {at} of {name}"
      # In the manifest a flip may also say that another file has changed.
      named = "" if name == "manifest.json" else f"{name} "
      assert len(said) == 1 and f"{directory} is damaged: {named}" in said[0] and "step 1 is used" in said[0]
      with pytest.raises(UserError, match=r"checkpoints/2 is damaged: .*; there are 1, 2"):
        checkpoints.find("2")
      found += 1
    path.write_bytes(was)
  assert of_step(opened(workdir)[0], 1) and of_step(opened(workdir)[0], 2)
  return found, sum(sizes)


def test_every_flipped_bit_is_found_and_its_file_named(tmp_path):
  found, size = flips(tmp_path, 60)
  print(f"R10: {found} of {found} bits flipped in what is read, of {size} bytes, were found")


@pytest.mark.long
def test_a_thousand_flipped_bits_are_found(tmp_path):
  found, size = flips(tmp_path, 1100)  # some fall into the two files that nothing reads
  print(f"R10: {found} of {found} bits flipped in what is read, of {size} bytes, were found")
  assert found >= 1000


@pytest.mark.parametrize("how", ["deleted", "emptied", "shortened", "zeroed"])
def test_each_file_damaged_in_turn_is_found_and_the_step_before_used(how, tmp_path):
  directory = save(tmp_path, 1, 2) / "2"
  for name in files(directory):
    path = directory / name
    was = path.read_bytes()
    damaged = {"emptied": b"", "shortened": was[: len(was) // 2], "zeroed": bytes(len(was))}.get(how)
    path.unlink() if damaged is None else path.write_bytes(damaged)
    checkpoints, said = opened(tmp_path)
    if name in UNREAD:
      assert checkpoints.find("latest") == 2 and of_step(checkpoints, 2)
    else:
      step = checkpoints.find("latest")
      assert step == 1 and of_step(checkpoints, 1)
      assert len(said) == 1 and f"2 is damaged: {name} " in said[0]
      if how == "deleted":
        assert " is missing" in said[0]
      with pytest.raises(UserError, match="2 is damaged"):  # nor is it read by whoever asks for no advice
        checkpoints.restore(2, like(toy(0)))
    path.write_bytes(was)
  assert opened(tmp_path)[0].find("latest") == 2


def test_a_foreign_file_is_found(tmp_path):
  directory = save(tmp_path, 1, 2) / "2"
  (directory / "params" / "d" / "0123").write_bytes(b"?")
  checkpoints, said = opened(tmp_path)
  assert checkpoints.find("latest") == 1 and "2 is damaged: params/d/0123 was not saved there" in said[0]
  (directory / "params" / "d" / "0123").unlink()
  shutil.copy(directory.parent / "1" / "meta" / "metadata", directory / "meta" / "metadata")  # of the same size
  checkpoints, said = opened(tmp_path)
  assert checkpoints.find("latest") == 1 and "2 is damaged: meta/metadata has the SHA-256" in said[0]


@pytest.mark.parametrize("name", [".DS_Store", "._metadata", ".nfs00000000a1b2"])
def test_what_the_system_leaves_in_a_checkpoint_is_no_damage(name, tmp_path):
  directory = save(tmp_path, 1, 2) / "2"
  for folder in (directory, directory / "meta", directory.parent):
    (folder / name).write_bytes(b"?")
  checkpoints, said = opened(tmp_path)
  assert checkpoints.find("latest") == 2 and not said and of_step(checkpoints, 2)
  manifest.write(str(directory))
  assert name not in (directory / "manifest.json").read_text()
  (directory / ".other").touch()
  assert manifest.compare(str(directory)) == ".other was not saved there"


def test_a_run_moves_damaged_checkpoints_away_and_resumes(tmp_path):
  directory = save(tmp_path, 1, 2, 3)
  (directory / "3" / "optimizer" / "manifest.ocdbt").write_bytes(b"")
  said = []
  checkpoints = Checkpoints(str(tmp_path), Checkpoint(keep=9), write=True, log=said.append)
  assert checkpoints.latest() == 2 and of_step(checkpoints, 2)
  assert said == [f"{directory}/3 is damaged: optimizer/manifest.ocdbt has 0 bytes, not the "
                  f"{(directory / '2/optimizer/manifest.ocdbt').stat().st_size} that were saved; it was moved to "
                  f"{tmp_path}/damaged/3, and step 2 is used in its place"]
  checkpoints.save(toy(3), {"data": 3})  # the same step again
  checkpoints.close()
  assert of_step(opened(tmp_path)[0], 3) and (tmp_path / "damaged" / "3").is_dir()


def test_what_evaluations_found_outlives_its_file(tmp_path):
  save(tmp_path, 1, 2, best="a", metrics={1: {"a": 1.0}, 2: {"a": 0.5}})
  (tmp_path / "scores.json").write_text("{")
  with pytest.raises(UserError, match=r"scores.json is damaged \(not JSON"):
    opened(tmp_path, best="a")[0].find("best")
  said = []
  known = Scores(str(tmp_path), 2, said.append)
  assert said == [f"{tmp_path}/scores.json is damaged (not JSON: Expecting property name enclosed in double "
                  "quotes: line 1 column 2 (char 1)); it was moved to scores.json.damaged"]
  assert known.missing(2, ["a", "b"]) == ["a", "b"] and opened(tmp_path, best="a")[0].find("") == 2


def test_what_an_earlier_release_measured_still_says_which_is_the_best(tmp_path):
  directory = save(tmp_path, 1, 2, 3)
  for step, score in ((1, 0.5), (2, 1.0), (3, 0.7)):  # it saved after it measured
    (directory / str(step) / "metrics").mkdir()
    (directory / str(step) / "metrics" / "metrics").write_text(json.dumps({"a": score}))
    manifest.write(str(directory / str(step)))
  save(tmp_path, 4, 5, keep=2, best="a", metrics={5: {"a": 0.1}})
  assert sorted(os.listdir(directory)) == ["2", "4", "5"]
  assert opened(tmp_path, best="a")[0].find("best") == 2
  (directory / "2" / "metrics" / "metrics").write_text("{")
  with pytest.raises(UserError, match=r"metrics is damaged: .*--checkpoint=latest"):
    opened(tmp_path, best="a")[0].find("best")


def test_the_best_is_kept_though_it_is_measured_after_it_was_saved(tmp_path):
  directory = save(tmp_path, 1, 2, 3, 4, 5, keep=2, best="a",
                   metrics={1: {"a": 0.1}, 2: {"a": 0.9}, 3: {"a": 0.3}, 4: {"a": 0.2}})
  assert sorted(os.listdir(directory)) == ["2", "4", "5"]


def test_a_checkpoint_that_lies_elsewhere_says_so(tmp_path):
  directory, other = save(tmp_path / "a", 1, 2, 3), save(tmp_path / "b", 1, 2, 3)
  shutil.copytree(directory / "1", directory / "9")
  checkpoints, said = opened(tmp_path / "a")
  assert checkpoints.find("latest") == 3
  assert said == [f"{directory}/9 is damaged: manifest.json says that it is of step 1, not 9: it was moved or copied "
                  "here; step 3 is used in its place"]
  run = json.loads((other / "1" / "manifest.json").read_text())["run"]
  shutil.rmtree(directory / "9")
  shutil.rmtree(directory / "2")
  shutil.copytree(other / "2", directory / "2")
  with pytest.raises(UserError, match=rf"2 is damaged: manifest.json says that it is of run {run}, not \w+: it was"):
    opened(tmp_path / "a")[0].find("2")
  for step in ("1", "3"):  # swapped
    (directory / step).rename(directory / f"{step}x")
  (directory / "1x").rename(directory / "3"), (directory / "3x").rename(directory / "1")
  with pytest.raises(UserError, match=r"no checkpoint is whole: 1: manifest.json says that it is of step 3, not 1"):
    opened(tmp_path / "a")[0].find("latest")
  assert (directory / "1").is_dir() and (directory / "3").is_dir()


def test_nothing_whole_is_an_error_and_nothing_is_moved(tmp_path):
  directory = save(tmp_path, 1, 2)
  for step in (1, 2):
    (directory / str(step) / "meta" / "metadata").unlink()
  for attempt in (lambda: opened(tmp_path)[0].find("latest"),
                  lambda: Checkpoints(str(tmp_path), Checkpoint(), write=True)):
    with pytest.raises(UserError, match=r"no checkpoint is whole: 1: meta/metadata is missing; .*; 2: meta/metadata"):
      attempt()
  assert sorted(os.listdir(directory)) == ["1", "2"]
  assert opened(tmp_path)[0].latest() is None


def test_the_best_is_never_another_one(tmp_path):
  directory = save(tmp_path, 1, 2, best="a", metrics={1: {"a": 1.0}, 2: {"a": 0.5}})
  checkpoints, _ = opened(tmp_path, best="a")
  assert checkpoints.find("best") == 1
  next((directory / "1" / "params" / "d").iterdir()).unlink()
  with pytest.raises(UserError, match=r"1 is damaged: params/d/\w+ is missing.*; there are 1, 2"):
    opened(tmp_path, best="a")[0].find("best")


def test_where_nothing_says_which_is_the_best_none_is_taken_for_it(tmp_path):
  directory = save(tmp_path, 1, 2, 3, best="a", metrics={1: {"a": 1.0}, 2: {"a": 0.5}, 3: {"b": 2.0}})
  known = tmp_path / "scores.json"
  for best, why in (("", "config.checkpoint.best names no metric"), ("c", "c was measured of none of them")):
    checkpoints, said = opened(tmp_path, best=best)
    with pytest.raises(UserError, match=rf"no checkpoint is the best: {why}; there are latest and 1, 2, 3"):
      checkpoints.find("best")
    assert checkpoints.find("") == 3 and len(said) == bool(best)  # nobody asked for the best
  shutil.rmtree(directory / "1")
  checkpoints, said = opened(tmp_path, best="a")
  with pytest.raises(UserError, match=r"best: a was highest at step 1, whose checkpoint is gone; there are .* 2, 3"):
    checkpoints.find("best")
  assert checkpoints.find("") == 2 and len(said) == 1 and "step 2 is used" in said[0]
  known.unlink()
  with pytest.raises(UserError, match="a was measured of none of them"):
    opened(tmp_path, best="a")[0].find("best")


@pytest.mark.parametrize(("text", "told"), [
  ("[1]", 'wanted {"STEP"'), ('{"1": 3}', 'wanted {"STEP"'), ('{"1": {"metrics": {}}}', 'wanted {"STEP"'),
  ('{"x": {"metrics": {}, "failed": {}, "begun": {}}}', 'wanted {"STEP"'), ("\0", "not JSON"), ("", "not JSON")])
def test_damaged_scores_are_reported_without_the_words_of_python(text, told, tmp_path):
  save(tmp_path, 1, best="a", metrics={1: {"a": 1.0}})
  (tmp_path / "scores.json").write_text(text)
  with pytest.raises(UserError) as caught:
    opened(tmp_path, best="a")[0].find("best")
  assert str(caught.value).startswith(f"{tmp_path}/scores.json is damaged ({told}") and "Error" not in str(caught.value)


def test_a_step_without_metrics_of_the_best_is_saved_too(tmp_path):
  save(tmp_path, 1, 2, best="a", metrics={1: {"b": 1.0}, 2: {"a": 0.5}})
  assert opened(tmp_path, best="a")[0].find("best") == 2


def without_manifests(directory):
  """Makes of a checkpoint one of before there were manifests."""
  (directory / "manifest.json").unlink()
  path = directory / "meta" / "metadata"
  meta = json.loads(path.read_text())
  del meta["manifest"]
  path.write_text(json.dumps(meta))


def test_a_checkpoint_of_before_manifests_is_used_unchecked_and_a_line_says_so(tmp_path):
  directory = save(tmp_path, 1, 2)
  for step in (1, 2):
    without_manifests(directory / str(step))
  checkpoints, said = opened(tmp_path)
  assert checkpoints.find("latest") == 2 and of_step(checkpoints, 2)
  assert said == [f"{directory}/2 is of before checkpoints had a manifest.json: it is used unchecked"]
  save(tmp_path, 3)
  checkpoints, said = opened(tmp_path)
  assert checkpoints.find("latest") == 3 and not said


MISFITS = {
  "shape": (dict(width=16), r"params/image/kernel: expected float32 \(4, 16\), got float32 \(4, 8\)"),
  "dtype": (dict(dtype=np.float16), r"params/image/kernel: expected float16 \(4, 8\), got float32 \(4, 8\)"),
  "missing": (dict(parts=("image", "lm", "text")), r"params/lm/bias: expected float32 \(3,\), got no such array"),
  "extra": (dict(parts=("image",)), r"params/text/bias: expected no such array, got float32 \(3,\)"),
  "other model": (dict(parts=("prompt",)), r"params/image/bias: expected no such array, got float32 \(3,\)")}


@pytest.mark.parametrize("case", MISFITS)
def test_another_model_is_refused_by_name_and_nothing_older_is_tried(case, tmp_path):
  changes, message = MISFITS[case]
  directory = save(tmp_path, 1, 2)
  checkpoints, said = opened(tmp_path)
  wanted = like(toy(0, **changes))
  with pytest.raises(UserError, match=rf"^{directory}/2 does not fit this config: {message}$"):
    checkpoints.restore(checkpoints.find("latest"), wanted)
  if case == "dtype":  # of parameters alone
    found = checkpoints.restore_params(2, wanted.params, wanted.stats)[0]["image"]["kernel"]
    np.testing.assert_array_equal(found, np.full((4, 8), 2, np.float16), strict=True)
    wanted = like(jax.tree.map(lambda x: x.astype(np.int32), toy(0)))
    message = r"params/image/bias: expected int32 \(3,\), got float32 \(3,\)"
  with pytest.raises(UserError, match=rf"^{directory}/2 does not fit this config: {message}$"):
    checkpoints.restore_params(2, wanted.params, wanted.stats)
  assert not said


def test_another_optimizer_is_refused(tmp_path):
  save(tmp_path, 1)
  state = toy(0)
  other = TrainState.create(state.params, {}, optax.sgd(1e-3, momentum=0.9))
  with pytest.raises(UserError, match=r"1 does not fit this config: opt_state/0/count: expected no such array"):
    opened(tmp_path)[0].restore(1, like(other))


def test_frozen_parts_are_checked_too(tmp_path):
  tree = {"params": {"kernel": jnp.ones((2, 3))}, "stats": {}}
  keep_frozen(str(tmp_path), "lm", tree)
  np.testing.assert_array_equal(kept_frozen(str(tmp_path), "lm", like(tree))["params"]["kernel"], np.ones((2, 3)))
  with pytest.raises(UserError, match=r"frozen/lm does not fit this config: params/kernel: expected float32 \(3, 2\)"):
    kept_frozen(str(tmp_path), "lm", like(jax.tree.map(lambda x: x.T, tree)))
  path = next((tmp_path / "frozen" / "lm" / "d").iterdir())
  path.write_bytes(b"\0" * path.stat().st_size)
  with pytest.raises(UserError, match=rf"frozen/lm is damaged: d/{path.name} has the SHA-256"):
    kept_frozen(str(tmp_path), "lm", like(tree))


def fails(workdir):
  """Saves steps 1 and 2 and asks, as a run does, until it is told that the second failed; returns the message."""
  checkpoints = Checkpoints(str(workdir), Checkpoint(), write=True)
  checkpoints.save(toy(1), {"data": 1})
  checkpoints.wait()
  yield checkpoints
  with pytest.raises(UserError) as told:
    checkpoints.save(toy(2), {"data": 2})
    for _ in range(3000):
      checkpoints.check()
      time.sleep(0.01)
  checkpoints.close()  # says it once only
  yield str(told.value)


def test_a_file_too_large_is_reported_and_the_older_checkpoint_stays(tmp_path, capfd):
  attempt = fails(tmp_path)
  next(attempt)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
  try:
    message = next(attempt)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert message == (f"{tmp_path}/checkpoints: step 2 could not be saved: File too large; "
                     "the newest checkpoint is step 1")
  assert "Traceback" not in capfd.readouterr().err
  checkpoints, said = opened(tmp_path)
  assert checkpoints.latest() == 1 and of_step(checkpoints, 1) and not said
  save(tmp_path, 2)  # what was left half-written is in nobody's way
  assert of_step(opened(tmp_path)[0], 2)


@pytest.mark.process
def test_a_full_disk_is_reported(tmp_path):
  target = tmp_path / "disk"
  target.mkdir()
  if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", target],
                                    capture_output=True).returncode:
    pytest.skip("a small disk can be mounted only by root, and not in every container")
  try:
    attempt = fails(target)
    next(attempt)
    with open(target / "rest", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
      while True:
        file.write(bytes(4096))
    message = next(attempt)
    assert "step 2 could not be saved: No space left on device" in message
    assert message.endswith("the newest checkpoint is step 1")
    assert of_step(opened(target)[0], 1)
  finally:
    subprocess.run(["umount", "-l", target], check=True)


def test_no_permission_is_reported():
  with tempfile.TemporaryDirectory() as workdir:
    os.chmod(workdir, 0o755)
    attempt = fails(workdir)
    checkpoints = next(attempt)
    os.chmod(checkpoints.directory, 0o555)
    user = os.geteuid()
    if user == 0:  # to whom everything is permitted
      os.seteuid(65534)
    try:
      message = next(attempt)
    finally:
      os.seteuid(user)
      os.chmod(checkpoints.directory, 0o755)
    assert "step 2 could not be saved: Permission denied" in message
    assert message.endswith("the newest checkpoint is step 1")
    assert of_step(opened(workdir)[0], 1)


def test_a_slow_disk_holds_up_the_next_save_alone_and_names_nothing_early(tmp_path, monkeypatch):
  go, write = threading.Event(), manifest.write
  checkpoints = Checkpoints(str(tmp_path), Checkpoint(), write=True)
  checkpoints.save(toy(1), {"data": 1})
  checkpoints.wait()
  monkeypatch.setattr(manifest, "write", lambda path, **what: (go.wait(60), write(path, **what)))
  checkpoints.save(toy(2), {"data": 2})
  for _ in range(20):
    checkpoints.check()
    assert checkpoints.latest() == 1 and opened(tmp_path)[0].find("latest") == 1
    time.sleep(0.01)
  threading.Timer(0.2, go.set).start()
  checkpoints.save(toy(3), {"data": 3})
  assert checkpoints.latest() >= 2
  checkpoints.close()
  assert of_step(opened(tmp_path)[0], 2) and of_step(opened(tmp_path)[0], 3)


def test_two_are_kept_even_where_one_was_asked_for(tmp_path):
  directory = save(tmp_path, 1, 2, 3, keep=1)
  assert sorted(os.listdir(directory)) == ["2", "3"]


# One process that imports JAX once, and then forks, for each trial, a run that saves and restores until it is killed.
KILLED = """
import json, os, random, signal, sys, time, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
from limber_jax.checkpoints.manifest import compare
from test_checkpoint import Checkpoint, Checkpoints, Scores, like, of_step, toy

def run(workdir):
  checkpoints = Checkpoints(workdir, Checkpoint(keep=2, best="a"), write=True, log=lambda line: os._exit(3))
  step = checkpoints.latest() or 0
  known = Scores(workdir, step, lambda line: os._exit(5))
  if step and not of_step(checkpoints, step):
    os._exit(4)
  while True:
    step += 1
    checkpoints.save(toy(step), {{"data": step}})
    known.begin(step, "e")
    known.end(step, "e", {{"a": float(step % 7)}})
    if step % 5 == 0:
      checkpoints.wait()

workdir, rng, out = sys.argv[1], random.Random(0), []
directory = os.path.join(workdir, "checkpoints")
for trial in range(int(sys.argv[2])):
  child = os.fork()
  if child == 0:
    run(workdir)
  if trial == 0:
    began = time.monotonic()
    while not os.path.isdir(os.path.join(directory, "3")):  # from then on there are two
      time.sleep(0.01)
    took = time.monotonic() - began  # as fast as this machine is today
  time.sleep(rng.uniform(0.0, 2.5 * took))  # kills fall in start-up, restoring, saving and deleting
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  steps = [s for s in os.listdir(directory) if s.isdigit()]
  whole = [int(s) for s in steps if os.path.exists(os.path.join(directory, s, "manifest.json"))
           and compare(os.path.join(directory, s)) is None]
  out.append([os.WIFSIGNALED(status), len(steps), len(whole), max(whole, default=0)])
print(json.dumps(out))
"""


def killed(workdir, trials):
  """Returns [[whether the run lived until it was killed, checkpoints there, whole ones, the newest]] of some kills."""
  done = subprocess.run([sys.executable, "-c", KILLED.format(tests=os.path.dirname(__file__)), workdir, str(trials)],
                        env=environment(), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  out = json.loads(done.stdout.splitlines()[-1])
  print(f"R14: {trials} kills, the newest checkpoint of step {out[-1][3]}: never fewer than "
        f"{min(whole for *_, whole, _ in out)} whole ones, nothing else by their side")
  return out


def assert_nothing_was_lost(out):
  newest = 0
  for lived, there, whole, latest in out:
    assert lived, "a run found damage, or restored something else than was saved"
    assert there == whole >= 2
    assert latest >= newest
    newest = latest
  assert newest > len(out)


@pytest.mark.process
def test_two_are_whole_at_any_moment(tmp_path):
  assert_nothing_was_lost(killed(tmp_path, 10))


@pytest.mark.process
@pytest.mark.long
def test_two_are_whole_after_each_of_a_hundred_kills(tmp_path):
  assert_nothing_was_lost(killed(tmp_path, 100))


SAVED = """
import sys, threading, time
sys.path.insert(0, {tests!r})
import jax
from runs import resident
from test_checkpoint import Checkpoint, Checkpoints, toy

checkpoints = Checkpoints(sys.argv[1], Checkpoint(), write=True)
checkpoints.save(toy(0), {{}})
checkpoints.wait()
noise = jax.jit(lambda key, x: jax.random.normal(key, x.shape) if x.ndim else x)
state = jax.tree.map(lambda x: noise(jax.random.key(0), x), toy(1, width=1 << 20))
size = sum(x.nbytes for x in jax.tree.leaves(jax.block_until_ready(state)))
before, peak, done = resident(), 0, threading.Event()

def watch():
  global peak
  while not done.wait(0.001):
    peak = max(peak, resident())

thread = threading.Thread(target=watch)
thread.start()
checkpoints.save(state, {{}})
checkpoints.wait()
done.set()
thread.join()
checkpoints.close()
print(size, peak - before)
"""


@pytest.mark.process
def test_a_save_takes_less_memory_than_half_as_much_again_as_the_state(tmp_path):
  done = subprocess.run([sys.executable, "-c", SAVED.format(tests=os.path.dirname(__file__)), tmp_path],
                        env=environment(), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  size, more = map(int, done.stdout.split()[-2:])
  print(f"R23: state {size / 2**20:.0f} MiB: the peak of a save is {more / size:.2f} × the state above what is "
        "held anyway")
  assert more <= 1.5 * size


def pruned_at(moment, step, workdir, monkeypatch):
  """Deletes a checkpoint as a run that trains beside does, by a rename, at a moment of its reading; saves the next."""
  directory = Path(workdir, "checkpoints")

  def prune():
    if (directory / str(step)).exists():
      os.makedirs(directory / "deleted", exist_ok=True)
      os.rename(directory / str(step), directory / "deleted" / str(step))
      save(workdir, step + 1)

  module, name = {"listing": (Steps, "damage"), "comparing": (manifest, "_sha256"),
                  "fitting": (reading, "check_fits"), "between": (Checkpoints, "restore_params"),
                  "reading": (ocp.CompositeCheckpointHandler, "restore")}[moment]
  real = getattr(module, name)
  monkeypatch.setattr(module, name, lambda *args, **kwargs: (prune(), real(*args, **kwargs))[1])


def read(checkpoints, which):
  def reader(step):
    meta = checkpoints.meta(step)
    state = like(toy(0))
    return step, meta, checkpoints.restore_params(step, state.params, state.stats)[0]

  return checkpoints.read(which, reader)


@pytest.mark.parametrize("moment", ["listing", "comparing", "fitting", "between", "reading"])
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_chosen_anew_or_named(moment, tmp_path, monkeypatch):
  save(tmp_path / "a", 1)
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  checkpoints, said = opened(tmp_path / "a")
  with monkeypatch.context() as patch:
    pruned_at(moment, 1, tmp_path / "a", patch)
    step, meta, params = read(checkpoints, "latest")
  assert (step, meta, float(params["image"]["kernel"][0, 0])) == (2, {"data": 2}, 2.0) and not said
  with monkeypatch.context() as patch:
    pruned_at(moment, 1, tmp_path / "b", patch)
    with pytest.raises(UserError, match="the run that trains there deleted checkpoint 1 while it was read; there are "
                                        "now 2: name one of them"):
      read(opened(tmp_path / "b")[0], "1")


def test_what_does_not_fit_is_no_deletion(tmp_path):
  save(tmp_path, 1)
  checkpoints, _ = opened(tmp_path)
  other = like(toy(0, width=9))
  with pytest.raises(UserError, match="does not fit this config"):
    checkpoints.read("latest", lambda step: checkpoints.restore_params(step, other.params, other.stats))


def test_where_checkpoints_go_faster_than_they_are_read_a_line_says_so(tmp_path, monkeypatch):
  save(tmp_path, 1)
  checkpoints, _ = opened(tmp_path)
  monkeypatch.setattr(Steps, "is_gone", lambda self, step: True)
  other = like(toy(0, width=9))
  with pytest.raises(UserError, match="50 times a checkpoint was deleted while it was read, by the run that trains"):
    checkpoints.read("latest", lambda step: checkpoints.restore_params(step, other.params, other.stats))
