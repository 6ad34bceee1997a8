"""The objects of the training loop, each alone, and what the loop shows of itself: traces, its share of the peak."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import tiny

from limber_jax.config import Checkpoint, Optim
from limber_jax.errors import UserError
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.signals import Interrupted, StopRequest
from limber_jax.training.feed import Feed
from limber_jax.training.flops import model_flops, peak_flops
from limber_jax.training.loop import train
from limber_jax.training.profiling import Profiler, parse_steps
from limber_jax.training.saving import Saver
from limber_jax.training.step_log import StepLog
from limber_jax.training.stopping import Stopping


class Recorder:
  """Keeps what it is called with: stands for the log, the checkpoints, or the damage of a run."""

  def __init__(self, **answers):
    self.calls, self._answers = [], answers

  def __getattr__(self, name):
    def call(*args, **kwargs):
      self.calls.append((name, *args))
      return self._answers.get(name)
    return call

  def names(self):
    return [name for name, *_ in self.calls]


def given(**changes):
  values = {"loss": 1.5, "grad_norm": 2.0, "stop": 0, "skipped": 0, "skipped_in_row": 0, "damaged": 0, "differing": 0}
  return {k: jnp.asarray(v) for k, v in (values | changes).items()}


def step_log(**changes):
  out, damage = Recorder(), Recorder(flush=[])
  return StepLog(tiny(log_every=2, **changes), out, damage, 0, lambda: 7), out, damage


def test_a_step_is_written_when_it_is_flushed_and_not_before():
  steps, out, damage = step_log()
  steps.push(2, given())
  assert not out.calls and not steps.flush()
  assert out.calls[-1] == ("train", 2, {"loss": 1.5, "grad_norm": 2.0})
  assert ("count", 0) in damage.calls
  out.calls.clear()
  assert not steps.flush() and not out.calls  # nothing is pending any more


def test_a_step_that_another_process_asks_to_be_the_last_is():
  steps, _, _ = step_log()
  steps.push(3, given(stop=1))
  assert steps.flush()


def test_a_step_that_was_skipped_is_named_with_what_was_too_much():
  steps, out, _ = step_log()
  steps.push(2, given(skipped=1, skipped_in_row=1, loss=jnp.inf, loss_limit=3.0, grad_norm_limit=4.0))
  steps.flush()
  assert out.calls[0][1:] == (2, {"event": "skipped", "loss": "inf", "grad_norm": "2.0", "loss_limit": "3.0",
                                  "grad_norm_limit": "4.0"})
  assert out.names() == ["write", "line"]


def test_too_many_steps_that_are_skipped_end_the_run():
  steps, _, _ = step_log(optim=Optim(max_skips=3))
  steps.push(9, given(skipped=1, skipped_in_row=3))
  with pytest.raises(UserError, match=r"^steps 7 to 9 had no finite .*max_skips=3\); the last checkpoint is step 7"):
    steps.flush()


def test_processes_that_read_other_records_for_the_same_rows_end_the_run():
  steps, _, _ = step_log()
  steps.push(5, given(differing=2))
  with pytest.raises(UserError, match=r"^step 5: processes .* read other records for 2 of them"):
    steps.flush()


def test_a_process_alone_stops_while_it_waits_and_says_why(tmp_path):
  request = StopRequest()
  stopping = Stopping(request, TimeTracker(str(tmp_path)))
  assert not stopping.alone() and not stopping.together() and str(stopping) == "another process"
  request.set("SIGTERM")
  assert stopping.alone() and stopping.together() and str(stopping) == "SIGTERM"
  with pytest.raises(Interrupted), stopping.waiting():
    pass


def test_a_run_claims_its_workdir_with_its_first_checkpoint_only(tmp_path, monkeypatch):
  claims = []
  monkeypatch.setattr("limber_jax.training.saving.workdirs.claim", lambda *args: claims.append(args))
  setup = Recorder()
  setup.config, setup.drawn, setup.digests = tiny(checkpoint=Checkpoint(every=4), steps=10), (), {"lm": "d"}
  checkpoints, held = Recorder(), Recorder()
  saver = Saver(checkpoints, setup, str(tmp_path), held, TimeTracker(str(tmp_path)), start=3, fingerprint="f")
  assert saver.last == 3 and not claims and [step for step in range(11) if saver.due(step)] == [0, 4, 8, 10]
  for step in (4, 8):
    saver.save(step, "state")
    assert saver.last == step and len(claims) == 1 and held.calls.pop() == ("check",)
  assert [call for call in checkpoints.calls if call[0] == "save"] == 2 * [
    ("save", "state", {"data": "f", "frozen": {"lm": "d"}})]


@pytest.mark.parametrize("text", ["3", "3:", "0:2", "5:4", "a:b", "1:2:3", "-1:2"])
def test_a_profile_of_no_steps_is_one_line(text):
  with pytest.raises(UserError, match=rf"^--profile={text}: expected first:last"):
    parse_steps(text)


def test_a_profile_ends_even_where_the_run_does(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(path))
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
  profiler = Profiler(str(tmp_path), parse_steps("2:9"))
  for step in (1, 2, 3):
    profiler.before(step)
    assert profiler.after(step, jnp.zeros(())) == ""
  profiler.close()
  profiler.close()
  assert calls == [str(tmp_path / "profile"), "stop"]


def test_a_run_shows_a_trace_of_the_steps_asked_for_and_its_share_of_the_peak(tmp_path):
  said = []
  config = tiny(mesh=(-1, 1, 1), steps=4, log_every=1, peak_flops=1e12)
  train(config, str(tmp_path), log=said.append, profile=(2, 3))
  assert any(line == f"the trace of steps 2 to 3 is in {tmp_path}/profile" for line in said)
  assert [f for f in pathlib.Path(tmp_path, "profile").rglob("*") if f.is_file() and f.stat().st_size]
  with open(tmp_path / "metrics.jsonl", encoding="utf-8") as file:
    records = [json.loads(line) for line in file]
  side = config.model.image.image_size
  batch = {"image": np.zeros((config.batch_size, side, side, 3), np.uint8),
           "tokens": np.zeros((config.batch_size, config.model.text.context), np.int32)}
  forward, both = model_flops(config, batch)
  assert both == pytest.approx(3 * forward, rel=0.1)
  for record in records:
    rate = record["examples_per_second"] / config.batch_size * both
    assert record["model_flops_per_second"] == pytest.approx(rate, rel=1e-6)
    assert record["share_of_peak"] == pytest.approx(rate / (1e12 * jax.device_count()), rel=1e-6)
  assert "of peak" in next(line for line in said if line.startswith("step 4/4"))


def test_a_peak_that_nobody_knows_is_no_metric():
  assert peak_flops(tiny()) == 0  # a CPU


def test_an_array_that_would_go_to_a_device_unasked_ends_the_run(tmp_path, monkeypatch):
  take = Feed.take

  def on_the_host(*args):
    batch, flags = take(*args)
    return jax.tree.map(np.asarray, batch), flags

  monkeypatch.setattr(Feed, "take", on_the_host)
  with pytest.raises(Exception, match=r"Disallowed host-to-device transfer"):
    train(tiny(mesh=(-1, 1, 1), steps=3), str(tmp_path), log=lambda _: None)
