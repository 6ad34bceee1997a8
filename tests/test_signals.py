"""What SIGTERM, SIGINT and SIGHUP do, in every order and at every moment."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from limber_jax.runtime.signals import Interrupted, StopRequest


def send(number):
  os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_a_flag_and_the_old_handler_comes_back(number):
  before = signal.getsignal(number)
  with StopRequest() as stop:
    assert not stop()
    send(number)
    assert stop() and stop.name == signal.Signals(number).name
  assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_after_the_first_only_ctrl_c_interrupts(first, second):
  with StopRequest() as stop:
    send(first)
    if second == signal.SIGINT:
      with pytest.raises(KeyboardInterrupt):
        send(second)
    else:
      send(second)
    assert stop.name == signal.Signals(first).name


def test_sighup_stays_ignored_where_nohup_has_it_so():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with StopRequest() as stop:
      send(signal.SIGHUP)
      assert not stop()
      send(signal.SIGTERM)
      assert stop.name == "SIGTERM"
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_who_waits_is_interrupted():
  with StopRequest() as stop:
    threading.Timer(0.2, send, (signal.SIGTERM,)).start()
    began = time.monotonic()
    with pytest.raises(Interrupted), stop.interrupts():
      threading.Event().wait(30)
    assert time.monotonic() - began < 10
    with pytest.raises(Interrupted), stop.interrupts():  # and does not begin to wait again
      pytest.fail("waits")
    send(signal.SIGTERM)  # nobody waits


def test_what_may_still_come_is_waited_for_until_the_request_is_old():
  with StopRequest() as stop:
    began = time.monotonic()
    with stop.interrupts(0.5):
      send(signal.SIGTERM)  # and the data come
    with pytest.raises(Interrupted), stop.interrupts(0.5):
      threading.Event().wait(30)
    assert 0.5 <= time.monotonic() - began < 10


def test_a_request_that_another_thread_passes_on_wakes_who_waits():
  with StopRequest() as stop:
    threading.Timer(0.2, stop.pass_on, ("SIGINT",)).start()
    with pytest.raises(Interrupted), stop.interrupts():
      threading.Event().wait(30)
    assert stop.name == "SIGINT"


def test_outside_of_the_main_thread_the_flag_is_set_by_hand():
  seen = []

  def other():
    with StopRequest() as stop:
      stop.set("a test")
      seen.append(stop.name)

  thread = threading.Thread(target=other)
  thread.start()
  thread.join()
  assert seen == ["a test"]


@pytest.mark.process
def test_a_command_that_is_done_is_not_ended_by_a_late_signal():
  code = """if True:
    import os, signal
    from limber_jax.runtime.signals import StopRequest
    with StopRequest(at_end=True):
      os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGHUP)
    print("saved")
  """
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stdout, done.stderr) == (0, "saved\n", "")
