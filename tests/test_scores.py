"""What evaluations during training cost when they fail: their own metrics."""

import json
import os
import subprocess
import sys

import pytest
from runs import environment, losses, tiny, zeroshot

from limber_jax.checkpoints.scores import TRIES, Scores, read
from limber_jax.config import Checkpoint
from limber_jax.errors import UserError
from limber_jax.train import exit_code
from limber_jax.training.loop import train


@pytest.mark.process
def test_an_evaluation_that_fails_costs_its_own_metrics(tmp_path, monkeypatch):
  from limber_jax.evals import zeroshot as module

  def config():
    return tiny(mesh=(8, 1, 1), checkpoint=Checkpoint(every=4, best="zeroshot/top1"), evals=zeroshot(every=2) | {
      f"other{i}": e for i, e in enumerate(zeroshot(every=3).values())})

  train(config(), str(tmp_path / "whole"), log=lambda _: None)
  whole, real, calls = read(str(tmp_path / "whole")), module.ensemble, []

  def fails(*args):
    calls.append(1)
    if len(calls) in (3, 5):  # of zeroshot at step 4, and of the other one at step 6
      raise MemoryError("no room") if len(calls) == 3 else ValueError("a fault")
    return real(*args)

  said, failures = [], []
  with monkeypatch.context() as patch:
    patch.setattr(module, "ensemble", fails)
    train(config(), str(tmp_path / "run"), log=said.append, failures=failures)
  assert failures == ["zeroshot/4", "other0/6"] and exit_code(failures, config(), str(tmp_path / "run")) == 1
  assert exit_code([], config(), str(tmp_path / "run")) == 1  # the last step's is still missing
  assert "step 4  zeroshot: not evaluated: MemoryError: no room" in said
  assert "other0: not evaluated at step 6; measure it by python -m limber_jax.evaluate" in said
  assert losses(tmp_path / "run") == losses(tmp_path / "whole")
  found = read(str(tmp_path / "run"))
  assert found[4]["failed"] == {"zeroshot": "MemoryError: no room"} and not found[4]["metrics"]
  assert found[6]["failed"] == {"other0": "ValueError: a fault"}
  assert {k: found[6]["metrics"].get(k, v) for k, v in whole[6]["metrics"].items()} == whole[6]["metrics"]
  # The same command makes up for what the last checkpoint lacks.
  train(config(), str(tmp_path / "run"), log=lambda _: None, failures=(failures := []))
  assert read(str(tmp_path / "run"))[6] == whole[6]
  assert failures == [] and exit_code(failures, config(), str(tmp_path / "run")) == 0  # though step 4's failed once
  with open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  assert [r["step"] for r in records if "other0/top1" in r] == [3, 6]
  assert [(r["step"], r["evaluation"]) for r in records if r.get("event") == "not evaluated"] == [
    (4, "zeroshot"), (6, "other0")]


def test_an_evaluation_that_is_killed_again_and_again_is_left_out(tmp_path):
  for _ in range(TRIES):
    Scores(str(tmp_path), 20).begin(20, "probe")
  known = Scores(str(tmp_path), 20)
  with pytest.raises(UserError, match=rf"killed {TRIES} times at this step"):
    known.begin(20, "probe")
  known.end(20, "probe", {}, failed="killed")
  known.begin(20, "other")
  known.interrupted(20, "other")  # by a signal: no fault of its own
  known.begin(20, "zeroshot")
  known.end(20, "zeroshot", {"zeroshot/top1": 0.5})
  assert read(str(tmp_path)) == {20: {"metrics": {"zeroshot/top1": 0.5}, "failed": {"probe": "killed"}, "begun": {}}}
  kept = (tmp_path / "scores.json").read_text()
  (tmp_path / "scores.json").write_text(kept.replace('"metrics"', '"figures"'))  # as earlier releases called them
  assert read(str(tmp_path)) == {int(step): entry for step, entry in json.loads(kept).items()}
  assert Scores(str(tmp_path), 20).missing(20, ["probe", "other", "zeroshot"]) == ["probe", "other"]
  assert not Scores(str(tmp_path), 19).metrics(20), "what is known of a step that is trained again is forgotten"


# One process that imports JAX once, and then forks each start of a run, some of whose evaluations are made to fail.
FAILING = """
import json, os, random, resource, signal, sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("ignore")
import numpy as np
from limber_jax.training import evaluations, loop
from limber_jax.config import Checkpoint
from limber_jax.data.sources.digits import Digits
from limber_jax.checkpoints.scores import Scores
from runs import tiny, zeroshot

EVERY, STEPS = 4, 12
evals = {{name: zeroshot(every=n)["zeroshot"] for name, n in (("a", 2), ("b", 3), ("c", 4))}}
POINTS = [(step, name) for name, e in evals.items() for step in range(e.every, STEPS + 1, e.every)]
KINDS = ("exception", "damage", "kill", "memory")

def run(workdir, faults):
  now, begin, evaluate, read = [], Scores.begin, evaluations.evaluate, Digits.__getitem__
  spent = os.path.join(workdir, "spent")

  def begun(self, step, name):
    begin(self, step, name)
    now[:] = [step, name]

  def failing(*args):
    kind = faults.get(tuple(now))
    done = open(spent).read().split() if os.path.exists(spent) else []
    if kind is None or f"{{now[0]}}{{now[1]}}" in done:
      return evaluate(*args)
    with open(spent, "a") as file:
      file.write(f"{{now[0]}}{{now[1]}} ")
    if kind == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exception":
      raise RuntimeError("made to fail")
    if kind == "memory":
      limit = resource.getrlimit(resource.RLIMIT_AS)
      resource.setrlimit(resource.RLIMIT_AS, (2**36, limit[1]))
      try:
        return np.ones(2**40), evaluate(*args)
      finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    def gone(self, index):
      raise OSError(5, "Input/output error")
    Digits.__getitem__ = lambda self, index: gone(self, index) if len(self) == 360 else read(self, index)
    try:
      return evaluate(*args)
    finally:
      Digits.__getitem__ = read

  Scores.begin, evaluations.evaluate = begun, failing
  loop.train(tiny(steps=STEPS, checkpoint=Checkpoint(every=EVERY), evals=evals), workdir, log=lambda line: None)

rng, out = random.Random(0), []
for number in range(1 + int(sys.argv[2])):
  workdir = os.path.join(sys.argv[1], str(number))
  os.makedirs(workdir)
  faults = {{point: rng.choice(KINDS) for point in rng.sample(POINTS, 3)}} if number else {{}}
  starts = []
  while not starts or starts[-1][1] == signal.SIGKILL:
    child = os.fork()
    if child == 0:
      run(workdir, faults)
      os._exit(0)
    status = os.waitpid(child, 0)[1]
    folder = os.path.join(workdir, "checkpoints")
    steps = [int(s) for s in os.listdir(folder) if s.isdigit()] if os.path.isdir(folder) else []
    starts.append([max(steps, default=0), status])
  out.append([[[*point, kind] for point, kind in sorted(faults.items())], starts])
print(json.dumps(out))
"""


@pytest.mark.process
@pytest.mark.long
def test_sixty_evaluations_that_fail_cost_nothing_but_their_own_metrics(tmp_path):
  script = FAILING.format(tests=os.path.dirname(__file__))
  done = subprocess.run([sys.executable, "-c", script, tmp_path / "runs", "20"], env=environment(),
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  runs = json.loads(done.stdout.splitlines()[-1])
  whole = read(str(tmp_path / "runs" / "0"))
  assert sum(len(entry["metrics"]) > 0 for entry in whole.values()) == 8
  counted = 0
  for number, (faults, starts) in enumerate(runs[1:], 1):
    workdir = tmp_path / "runs" / str(number)
    assert starts[-1] == [12, 0], (faults, starts)
    killed_at = [step for step, _, kind in faults if kind == "kill"]
    assert sorted(step // 4 * 4 for step in killed_at) == [newest for newest, _ in starts[:-1]]  # 0 steps lost beyond
    assert losses(workdir) == losses(tmp_path / "runs" / "0")
    found = read(str(workdir))
    failed = {(step, name) for step, name, kind in faults if kind != "kill"}
    # Done again after a kill: what followed the checkpoint, and what is made up for at its own step.
    again = {(step, name) for step, name in failed if any(k // 4 * 4 <= step <= k for k in killed_at)}
    assert {(step, name) for step, entry in found.items() for name in entry["failed"]} <= failed
    assert {(step, name) for step, entry in found.items() for name in entry["failed"]} >= failed - again
    for step, entry in whole.items():
      left_out = {name for s, name in failed if s == step and name in found[step]["failed"]}
      assert found[step]["metrics"] == {k: v for k, v in entry["metrics"].items() if k.split("/")[0] not in left_out}
    counted += len(faults)
  assert counted == 60
