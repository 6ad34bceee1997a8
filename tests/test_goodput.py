"""The tracker of wall time: what counts as what, over any number of starts and kills."""

import json
import subprocess
import sys
import time

import jax
import pytest
from runs import tiny, zeroshot

from limber_jax.config import Checkpoint
from limber_jax.runtime import goodput, parallel
from limber_jax.runtime.goodput import PHASES, TimeTracker, process_began
from limber_jax.runtime.writer import Log
from limber_jax.training.loop import train


class Clock:
  """Time that passes when it is told to."""

  now = 100.0

  def __call__(self):
    return self.now

  def passes(self, seconds):
    self.now += seconds


def account(path):
  """Returns {phase: seconds} of what is more than 0."""
  with open(path / goodput.FILE, encoding="utf-8") as file:
    return {phase: s for phase, s in json.load(file)["seconds"].items() if s}


def test_a_phase_within_another_counts_as_the_inner_one(tmp_path):
  clock = Clock()
  tracker = TimeTracker(str(tmp_path), clock=clock, began=90.0)
  clock.passes(5)
  with tracker("step"):
    clock.passes(2)
    with tracker("data") as wait:
      clock.passes(3)
    clock.passes(4)
    with pytest.raises(KeyError), tracker("save"):
      clock.passes(1)
      raise KeyError
    clock.passes(0.5)
  clock.passes(0.25)
  tracker.write()
  assert wait.seconds == 3
  assert account(tmp_path) == {"start": 15.25, "step": 6.5, "data": 3, "save": 1}
  assert tracker.summary() == "goodput 25.2% of 0m 25s; the rest: start 59.2%, data 11.7%, save 3.9%"


def test_steps_done_again_after_a_kill_count_as_recomputed(tmp_path):
  def run(start, stop, clock):
    tracker = TimeTracker(str(tmp_path), clock=clock)
    with tracker("restore"):
      clock.passes(1)
    tracker.at(start)
    with tracker("step"):
      for step in range(start, stop):
        with tracker("data"):
          clock.passes(0.25)
        tracker.at(step + 1)
        clock.passes(0.75)  # the step itself goes on beside the loop, which has counted it
    tracker.write()  # and then a kill

  run(0, 10, Clock())
  assert account(tmp_path) == {"restore": 1, "data": 2.5, "step": 7.5}
  run(6, 12, Clock())
  account_ = account(tmp_path)
  # Steps 7 to 10 again: four waits for data, and three steps, for the first time of step 10 had not passed.
  assert account_ == {"restore": 2, "data": 3, "step": 9.75, "recomputed": 3.25}
  assert sum(account_.values()) == 18
  with open(tmp_path / goodput.FILE, encoding="utf-8") as file:
    values = json.load(file)
  assert (values["starts"], values["max_step"], values["wall_seconds"]) == (2, 12, 18)
  assert values["goodput"] == round(9.75 / 18, 4)


def test_a_run_of_before_phases_had_their_names_keeps_its_account(tmp_path):
  seconds = dict.fromkeys(PHASES, 1.0)
  seconds["lost"] = seconds.pop("recomputed") + 4
  (tmp_path / goodput.FILE).write_text(json.dumps({"seconds": seconds, "starts": 2, "reached": 7}))
  tracker = TimeTracker(str(tmp_path))
  assert tracker.seconds["recomputed"] == 5 and tracker.max_step == 7


@pytest.mark.parametrize("text", [
  "", "{", "[]", "null", '{"seconds": {}, "starts": 1, "max_step": 1}', "[" * 100_000,
  json.dumps({"seconds": dict.fromkeys(PHASES, -1), "starts": 1, "max_step": 1}),
  json.dumps({"seconds": dict.fromkeys(PHASES, float("nan")), "starts": 1, "max_step": 1}),
  json.dumps({"seconds": dict.fromkeys(PHASES, 1e999), "starts": 1, "max_step": 1}),
  json.dumps({"seconds": dict.fromkeys(PHASES, 1), "starts": 1e999, "max_step": 1})],
  ids=lambda text: text[:12])
def test_a_damaged_account_begins_anew(text, tmp_path):
  (tmp_path / goodput.FILE).write_text(text)
  clock = Clock()
  tracker = TimeTracker(str(tmp_path), clock=clock)
  clock.passes(2)
  tracker.write()
  assert account(tmp_path) == {"start": 2}


def test_an_account_that_cannot_be_written_ends_nothing(tmp_path):
  with TimeTracker(str(tmp_path / "missing")) as tracker:
    tracker.write()
  assert list(tmp_path.iterdir()) == []


def test_only_process_0_writes(tmp_path):
  with TimeTracker(str(tmp_path), active=False):
    pass
  assert list(tmp_path.iterdir()) == []


def test_it_is_written_while_nothing_else_happens(tmp_path):
  with TimeTracker(str(tmp_path)) as tracker, tracker("compile"):
    end = time.monotonic() + 10
    while not (tmp_path / goodput.FILE).exists():
      assert time.monotonic() < end
      time.sleep(0.05)
    assert account(tmp_path)["compile"] > 0.5


def test_a_process_knows_when_it_began():
  before = time.monotonic()
  code = "import time; time.sleep(0.2); from limber_jax.runtime.goodput import process_began; print(process_began())"
  began = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
  assert before - 0.05 < began < before + 0.2
  assert process_began() < before


@pytest.mark.long  # the start and end of the process are 1 % of so short a run where other tests run beside it
def test_a_run_accounts_for_all_of_its_time(tmp_path, monkeypatch):
  """And shows it; what it does again after it was cut short is recomputed."""
  make = parallel.make_mesh
  monkeypatch.setattr(parallel, "make_mesh", lambda sizes: make(sizes, jax.devices()[:1]))

  def config():
    return tiny(steps=8, checkpoint=Checkpoint(every=3), evals=zeroshot(every=4))

  record = Log.train

  def slow(self, step, metrics):
    time.sleep(0.2)
    record(self, step, metrics)
    if step == 5 and not said:
      raise RuntimeError

  monkeypatch.setattr(Log, "train", slow)
  said = []
  before = time.monotonic()
  with pytest.raises(RuntimeError):
    train(config(), str(tmp_path), log=lambda _: None)
  said.append("the second start")
  train(config(), str(tmp_path), log=said.append)
  wall = time.monotonic() - before
  seconds = account(tmp_path)
  print({k: round(v, 2) for k, v in seconds.items()}, f"of {wall:.2f} s")
  assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
  assert seconds.keys() == set(PHASES)
  assert seconds["recomputed"] >= 2 * 0.2  # steps 4 and 5, which the checkpoint of step 3 did not hold
  assert seconds["step"] >= 6 * 0.2
  assert said[-1].startswith("goodput ") and "in 2 starts; the rest: " in said[-1]
