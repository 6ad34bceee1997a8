"""What a run writes down: records by step, whole after kills and damage, and one line where a disk is full."""

import json
import time

import pytest

from limber_jax.errors import UserError
from limber_jax.runtime.writer import Log


def make(path, start=0):
  return Log(str(path), steps=9, batch_size=4, start_step=start, active=True, print=lambda _: None)


def steps(path):
  return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def written(path, count):
  log = make(path)
  for step in range(1, count + 1):
    log.train(step, {"loss": 1 / step})
  log.close()
  return path / "metrics.jsonl"


def test_a_run_that_resumes_drops_what_it_does_again_and_what_is_damaged_alone(tmp_path):
  path = written(tmp_path, 6)
  lines = path.read_bytes().splitlines(keepends=True)
  lines[1] = b"\xff" + lines[1][1:]
  lines[2] = b"[3]\n"
  path.write_bytes(b"".join(lines)[:-5])  # torn by a kill
  make(tmp_path, start=5).close()
  assert steps(tmp_path) == [1, 4, 5]
  make(tmp_path, start=4).close()
  assert steps(tmp_path) == [1, 4]


def test_the_time_left_is_estimated_once_a_step_without_compiling_was_timed(tmp_path):
  said = []
  log = Log(str(tmp_path), steps=9, batch_size=4, start_step=3, active=True, print=said.append)
  for step in (4, 5, 6):
    log.train(step, {"loss": 1.0})
  log.close()
  assert [("  left " in line) for line in said] == [False, True, True]


def test_a_full_disk_is_one_line(tmp_path):
  path = written(tmp_path, 2)
  log = make(tmp_path, start=2)
  log._file.close()
  log._file = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 (every write fails there, as on a full disk)
  with pytest.raises(UserError, match=rf"^{path}: cannot be written \(No space left on device\)"):
    log.train(3, {"loss": 1.0})
  log.close()
  assert steps(tmp_path) == [1, 2]


def test_a_place_where_nothing_can_be_written_is_one_line(tmp_path):
  (tmp_path / "metrics.jsonl").mkdir()
  with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(Is a directory\)"):
    make(tmp_path)
  (tmp_path / "metrics.jsonl").rmdir()
  (tmp_path / "tensorboard").touch()
  with pytest.raises(UserError, match=r"tensorboard: cannot be written \((File exists|Not a directory)\)"):
    make(tmp_path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_files_for_tensorboard_that_cannot_be_written_hold_nothing_up(tmp_path, monkeypatch):
  log = make(tmp_path)

  def full(event):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(log._board.file_writer.event_writer._ev_writer, "write_event", full)
  with pytest.raises(UserError, match=r"tensorboard: cannot be written; is the disk full\? the same"):
    for step in range(1, 100):
      log.write(step, {"event": "nothing"} if step > 1 else {"loss": 1.0})
      time.sleep(0.05)
  log.close()
