"""What evaluations during training cost when they fail: their own figures."""

import json

import pytest
from runs import losses, tiny, zeroshot

from limber_jax.config import Checkpoint
from limber_jax.errors import UserError
from limber_jax.scores import TRIES, Scores, read
from limber_jax.train import train


def test_an_evaluation_that_fails_costs_its_own_figures(tmp_path, monkeypatch):
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

  said = []
  with monkeypatch.context() as patch:
    patch.setattr(module, "ensemble", fails)
    train(config(), str(tmp_path / "run"), log=said.append)
  assert "step 4  zeroshot: not evaluated: MemoryError: no room" in said
  assert "other0: not evaluated at step 6; measure it by python -m limber_jax.evaluate" in said
  assert losses(tmp_path / "run") == losses(tmp_path / "whole")
  found = read(str(tmp_path / "run"))
  assert found[4]["failed"] == {"zeroshot": "MemoryError: no room"} and not found[4]["figures"]
  assert found[6]["failed"] == {"other0": "ValueError: a fault"}
  assert {k: found[6]["figures"].get(k, v) for k, v in whole[6]["figures"].items()} == whole[6]["figures"]
  # The same command makes up for what the last checkpoint lacks.
  train(config(), str(tmp_path / "run"), log=lambda _: None)
  assert read(str(tmp_path / "run"))[6] == whole[6]
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
  assert read(str(tmp_path)) == {20: {"figures": {"zeroshot/top1": 0.5}, "failed": {"probe": "killed"}, "begun": {}}}
  assert Scores(str(tmp_path), 20).missing(20, ["probe", "other", "zeroshot"]) == ["probe", "other"]
  assert not Scores(str(tmp_path), 19).figures(20), "what is known of a step that is trained again is forgotten"
