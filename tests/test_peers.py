"""The line about a process that is gone, in the place of what JAX writes. Real kills are in tests/test_faults.py."""

import subprocess
import sys

import pytest

from limber_jax.runtime import peers

WORKER = b"""\
E1124 22:37:28.708191   19875 coordination_service.cc:1549] [4437] Use error polling to propagate the following error \
to all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
12
The tasks have crashed. Check the task logs for an earlier error.
F1124 22:37:28.708707   19891 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
1
12
The tasks have crashed. Check the task logs for an earlier error.

RPC: /xla.coordination.CoordinationService/PollForError [type.googleapis.com/tensorflow.CoordinationServiceError='']
*** Check failure stack trace: ***
    @     0x7ff999340634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""
COORDINATOR = b"""\
E1124 22:37:46.500730   20004 coordination_service_agent.cc:289] Polled an error from coordination service.
F1124 22:37:46.500754   20004 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted.
*** Check failure stack trace: ***
"""
SILENT = b"""\
F1124 22:38:30.683211   20605 client.h:80] Terminating process because the JAX distributed service detected fatal \
errors. absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded

RPC: /xla.coordination.CoordinationService/Heartbeat
"""
BARRIER = b"F1 1 client.h:80] Terminating process because the JAX distributed service detected fatal errors. Barrier.\n"
HARMLESS = b"W1124 22:40:30.870892   24376 preemption_sync_manager.cc:147] Failed to retrieve a notice: Socket closed\n"


@pytest.mark.parametrize(("text", "names"), [
  (WORKER, "processes 1, 12 are gone"), (COORDINATOR, "process 0 is gone"), (SILENT, "process 0 is gone"),
  (BARRIER, None), (HARMLESS, None)])
def test_the_line_names_who_is_gone(text, names):
  line = peers.parse_jax_failure(text)
  if names is None:
    assert line is None
  else:
    assert line.startswith(f"error: {names}") and line.count("\n") == 1 and line.endswith("\n")


def stderr_of(code: str) -> str:
  done = subprocess.run([sys.executable, "-c", f"import os, sys, time\nfrom limber_jax.runtime import peers\n{code}"],
                        stderr=subprocess.PIPE, text=True, timeout=60)
  return done.stderr


@pytest.mark.process
@pytest.mark.parametrize("text", [WORKER, COORDINATOR, SILENT])
def test_a_process_that_jax_aborts_leaves_one_line(text):
  said = stderr_of(f"peers.watch_stderr()\nos.write(2, b'before\\n')\nos.write(2, {text!r})\nos.abort()")
  assert said == "before\n" + peers.parse_jax_failure(text)


@pytest.mark.process
@pytest.mark.parametrize("ends", ["", "os.abort()", "os._exit(4)", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("text", [BARRIER, HARMLESS, b"Traceback\n  no new line"])
def test_all_else_passes_unchanged(text, ends):
  code = f"peers.watch_stderr()\nsys.stderr.write('a')\nsys.stderr.flush()\nos.write(2, {text!r})\n{ends}"
  assert stderr_of(code) == "a" + text.decode()


@pytest.mark.process
def test_a_process_that_lives_on_has_said_all(monkeypatch):
  said = stderr_of("peers._HELD = 0.3\npeers.watch_stderr()\n"
                   f"os.write(2, {COORDINATOR!r})\ntime.sleep(1)\nos.write(2, b'after')")
  assert said == COORDINATOR.decode() + "after"


def test_an_error_of_a_broken_collective_waits_for_the_name(monkeypatch):
  waits = []
  monkeypatch.setattr(peers.time, "sleep", waits.append)
  broken = ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:49354")
  with pytest.raises(ValueError, match="Gloo"), peers.explain_failures():
    raise broken
  with pytest.raises(RuntimeError), peers.explain_failures():
    raise RuntimeError("step 3 could not be saved") from broken
  assert waits == [1.5 * peers.HEARTBEAT] * 2
  with pytest.raises(ValueError, match="own"), peers.explain_failures():
    raise ValueError("an error of its own")
  assert len(waits) == 2
