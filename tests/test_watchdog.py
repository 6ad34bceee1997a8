"""A run that gets nowhere ends, and says where it hangs."""

import subprocess
import sys
import time

import pytest

from limber_jax.runtime import watchdog
from limber_jax.runtime.goodput import TimeTracker
from limber_jax.runtime.watchdog import EXIT_CODE, Watchdog


@pytest.fixture
def guarded(tmp_path, capfd):
  """Returns a function that gives (TimeTracker, Watchdog, exit codes) with a limit."""

  def make(seconds):
    codes = []
    tracker = TimeTracker(str(tmp_path))
    return tracker, Watchdog(tracker, seconds, end=codes.append), codes

  return make


def test_it_ends_what_makes_no_progress_and_names_the_phase(guarded, capfd):
  tracker, dog, codes = guarded(0.6)
  began = time.monotonic()
  with dog, tracker("data"):
    while not codes and time.monotonic() < began + 10:
      time.sleep(0.05)
  assert codes == [EXIT_CODE]
  assert 0.6 < time.monotonic() - began < 5
  said = capfd.readouterr().err
  assert said.startswith("error: no progress for 0.6 s in phase 'data' of this process (config.watchdog=0.6); ")
  assert "test_it_ends_what_makes_no_progress" in said and "in _watch" in said  # the stacks of two threads


@pytest.mark.parametrize("how", ["steps", "batches of an evaluation"])
def test_progress_is_not_ended(how, guarded):
  tracker, dog, codes = guarded(1.2)
  with dog, tracker("step"):
    for _ in range(10):
      if how == "steps":
        with tracker("data"):
          pass
      else:
        tracker.alive()
      time.sleep(0.25)
  assert codes == []


def test_a_compiler_has_more_patience(guarded):
  tracker, dog, codes = guarded(0.6)
  with dog, tracker("compile"):
    time.sleep(2)
  assert codes == []


def test_time_in_which_the_process_was_stopped_does_not_count(guarded, monkeypatch):
  tracker, dog, codes = guarded(30)

  class Time:
    jumps = 0.0

    def monotonic(self):
      self.jumps += 100  # at every look, as after as many Ctrl-Z
      return time.monotonic() + self.jumps

  monkeypatch.setattr(watchdog, "time", Time())
  with dog, tracker("step"):
    time.sleep(1.6)
  assert codes == []


def test_zero_waits_for_ever(guarded):
  tracker, dog, codes = guarded(0)
  with dog, tracker("step"):
    time.sleep(1.2)
  assert codes == []


@pytest.mark.process
def test_the_process_ends_with_all_stacks_on_stderr(tmp_path):
  code = """if True:
    import sys, threading, time
    from limber_jax.runtime.goodput import TimeTracker
    from limber_jax.runtime.watchdog import Watchdog
    def waits_in_a_thread(): time.sleep(1000)
    def waits_in_the_main_thread(): threading.Lock().acquire() and threading.Event().wait()
    threading.Thread(target=waits_in_a_thread).start()
    with TimeTracker(sys.argv[1]) as tracker, Watchdog(tracker, 1.0, name="process 3"), tracker("step"):
      waits_in_the_main_thread()
  """
  began = time.monotonic()
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
  assert done.returncode == EXIT_CODE
  assert time.monotonic() - began < 1 + 5 + 10  # and imports
  assert "in phase 'step' of process 3" in done.stderr
  assert "waits_in_a_thread" in done.stderr and "waits_in_the_main_thread" in done.stderr
  assert (tmp_path / "goodput.json").exists()
