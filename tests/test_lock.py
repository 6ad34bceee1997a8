"""The lock that lets one process at a time write into a place: who is refused, who takes over, and what is said."""

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from limber_jax.errors import UserError
from limber_jax.runtime import lock
from limber_jax.runtime.lock import Lock

HOLD = """if True:
  import sys, time
  from limber_jax.runtime import lock
  with lock.Lock(sys.argv[1], what="it"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path(tmp_path):
  return tmp_path / "new" / ".lock"


@pytest.fixture
def other(path):
  """Another process that holds the lock."""
  process = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.communicate()


def refusal(path, **kwargs) -> str:
  with pytest.raises(UserError) as error, Lock(path, what="runs/a", **kwargs):
    pass
  return str(error.value)


def foreign(path, age: float, **changes) -> None:
  """Writes the lock of a process of another machine that gave its last sign of life `age` seconds ago."""
  path.parent.mkdir()
  path.write_text(json.dumps({"host": "b7", "pid": 12, "since": "2026-01-02 03:04:05 UTC", "boot": "b", "pids": "p",
                              "began": "1"} | changes))
  os.utime(path, (time.time() - age, time.time() - age))


def without_flock(fd, how):
  raise OSError(errno.ENOTSUP, "Operation not supported")


@pytest.mark.process
def test_who_comes_second_is_told_host_process_and_since_when(path, other):
  began = time.monotonic()
  line = refusal(path, otherwise="choose another --workdir")
  assert time.monotonic() - began < 1
  since = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"
  assert re.fullmatch(rf"runs/a is in use by process {other.pid} on host {re.escape(socket.gethostname())} since "
                      rf"{since}; wait until it has ended, or choose another --workdir", line)


def test_after_the_end_nothing_is_left(path):
  with Lock(path, what="runs/a"):
    assert path.exists()
    assert f"process {os.getpid()} " in refusal(path)
  assert not path.parent.exists()
  with Lock(path, what="runs/a"):
    (path.parent / "kept").touch()
  assert os.listdir(path.parent) == ["kept"]


@pytest.mark.process
def test_after_a_kill_the_next_takes_over_at_once(path, other):
  other.kill()
  other.wait()
  assert path.exists()
  began, said = time.monotonic(), []
  with Lock(path, what="runs/a", log=said.append) as held:
    assert json.loads(path.read_text())["pid"] == os.getpid()
    held.check()
  assert time.monotonic() - began < 1 and said == []


@pytest.mark.process
def test_a_process_that_stands_still_keeps_its_lock(path, other):
  other.send_signal(signal.SIGSTOP)
  os.utime(path, (0, 0))  # as after hours
  assert f"process {other.pid} " in refusal(path)


@pytest.mark.process
def test_a_child_does_not_hold_the_lock_of_its_parent(path):
  script = HOLD.replace("time.sleep(600)", "import os; os.fork() == 0 and time.sleep(600); os.kill(os.getpid(), 9)")
  process = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.DEVNULL, start_new_session=True)
  assert process.wait() == -signal.SIGKILL
  try:
    with Lock(path, what="runs/a", wait=5):  # the child may just be at it
      pass
  finally:
    os.killpg(process.pid, signal.SIGKILL)


def test_on_another_machine_a_lock_is_judged_by_its_last_sign_of_life(path):
  foreign(path, 20)
  line = refusal(path, otherwise="choose another --workdir")
  assert re.fullmatch(
    r"runs/a is in use by process 12 on host b7 since 2026-01-02 03:04:05 UTC, another machine, whose last sign of "
    r"life was (19|20|21) s ago; wait until it has ended, or choose another --workdir; if it is gone, start again in "
    rf"(39|40|41) s, or remove {re.escape(str(path))}", line)
  assert json.loads(path.read_text())["host"] == "b7"
  os.utime(path, (time.time() + 90_000, time.time() + 90_000))
  line = refusal(path, otherwise="choose another --workdir")
  assert re.search(r"life bears a time (90,00\d|89,99\d) s ahead of the clock here: whether it is gone", line), line
  assert line.endswith(f"remove {path}, or choose another --workdir")
  os.utime(path, (time.time() - 300, time.time() - 300))
  said = []
  with Lock(path, what="runs/a", log=said.append):
    assert json.loads(path.read_text())["pid"] == os.getpid()
  assert len(said) == 1 and re.search(r"process 12 on host b7 .*last sign of life was (299|300|301) s ago: it is taken",
                                      said[0])


def test_the_holder_gives_signs_of_life(path, monkeypatch):
  monkeypatch.setattr(lock, "BEAT", 0.05)
  with Lock(path, what="runs/a"):
    os.utime(path, (0, 0))
    until = time.monotonic() + 10
    while path.stat().st_mtime < time.time() - 100:
      assert time.monotonic() < until
      time.sleep(0.01)


def test_where_the_system_has_no_flock_a_process_is_known_by_its_number_and_its_beginning(path, monkeypatch):
  monkeypatch.setattr(fcntl, "flock", without_flock)
  foreign(path, 0, boot=lock._boot(), pids=lock._namespace(), pid=os.getppid(), began=lock._began(os.getppid()))
  assert f"process {os.getppid()} on host b7" in refusal(path)
  foreign_began = json.loads(path.read_text()) | {"began": "1"}  # another process of the same number
  path.write_text(json.dumps(foreign_began))
  with Lock(path, what="runs/a"):
    assert f"process {os.getpid()} " in refusal(path)


def test_who_has_lost_the_lock_is_told_so_and_leaves_that_of_the_other_alone(path, tmp_path):
  with Lock(path, what="runs/a") as held:
    path.unlink()
    with pytest.raises(UserError, match=r"no longer held by this process: .*was removed"):
      held.check()
    path.parent.rmdir()
    foreign(path, 0)
    with pytest.raises(UserError, match="no longer held by this process: process 12 on host b7 since"):
      held.check()
  assert json.loads(path.read_text())["host"] == "b7"


def test_of_many_at_once_one_gets_it_and_the_others_one_after_another(path):
  inside, most = [], []

  def one(number):
    with Lock(path, what="runs/a", wait=30):
      inside.append(number)
      most.append(len(inside))
      time.sleep(0.01)
      inside.remove(number)

  with ThreadPoolExecutor(8) as pool:
    list(pool.map(one, range(8)))
  assert most == [1] * 8


def test_of_several_paths_all_are_held_or_none(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  with Lock(b, what="b"):
    with pytest.raises(UserError), Lock(a, b, what="both"):
      pass
    assert not a.exists()
    with Lock(a, what="a"):
      pass


def test_where_nothing_can_be_written_one_line_says_so(tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  for path in (tmp_path / "link" / ".lock", tmp_path / "link" / "run" / ".lock"):
    with pytest.raises(UserError, match=r"link is a link to .*nowhere, which is not there\)$"), Lock(path, what="a"):
      pass
  held = Lock(tmp_path / "file" / ".lock", what="runs/a")
  with pytest.raises(UserError, match=r"^runs/a: cannot write there \((Not a directory|File exists)\)$"), held:
    pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 200])
def test_a_lock_that_cannot_be_read_is_no_obstacle(content, path):
  path.parent.mkdir()
  path.write_text(content)
  with contextlib.ExitStack() as stack:
    stack.enter_context(Lock(path, what="runs/a"))
    assert "in use" in refusal(path)
