"""The one way to write a file: whole or not there, whatever stands in its place."""

import os
import stat
import threading

import numpy as np
import pytest

from limber_jax.errors import UserError
from limber_jax.models import clip
from limber_jax.runtime import atomic
from limber_jax.weights import export


def listed(folder):
  return sorted(os.listdir(folder))


def test_a_file_is_there_once_it_is_whole(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("old")
  path.chmod(0o640)
  with atomic.atomic_write(str(path)) as file:
    file.write("né\n")
    assert path.read_text() == "old" and listed(tmp_path) == ["a.txt", "a.txt.tmp"]
  assert path.read_bytes() == "né\n".encode() and listed(tmp_path) == ["a.txt"]
  assert stat.S_IMODE(path.stat().st_mode) == 0o640
  with atomic.atomic_write(str(tmp_path / "b"), "wb") as file:
    file.write(b"\0")
  assert (tmp_path / "b").read_bytes() == b"\0"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_whatever_happens_the_old_file_stays_and_nothing_is_beside_it(error, tmp_path):
  (tmp_path / "a").write_text("old")
  wanted = UserError if isinstance(error, OSError) else error
  with pytest.raises(wanted) as raised, atomic.atomic_write(str(tmp_path / "a"), what="--out=a") as file:
    file.write("half")
    raise error
  assert listed(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
  if wanted is UserError:
    assert str(raised.value) == "--out=a: cannot be written (No space left on device)"


def test_what_a_kill_left_is_no_part_of_the_next_file(tmp_path):
  (tmp_path / "a.tmp").write_text("half of something long")
  with atomic.atomic_write(str(tmp_path / "a")) as file:
    file.write("new")
  assert listed(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
  (tmp_path / "there").mkdir()
  (tmp_path / "there" / "real").write_text("old")
  (tmp_path / "second").symlink_to("there/real")
  (tmp_path / "first").symlink_to(tmp_path / "second")
  with atomic.atomic_write(str(tmp_path / "first")) as file:
    file.write("new")
  assert (tmp_path / "there" / "real").read_text() == "new" and listed(tmp_path / "there") == ["real"]
  assert os.readlink(tmp_path / "first") == str(tmp_path / "second")
  assert os.readlink(tmp_path / "second") == "there/real"
  (tmp_path / "broken").symlink_to("there/new")
  with atomic.atomic_write(str(tmp_path / "broken")) as file:
    file.write("made")
  assert (tmp_path / "there" / "new").read_text() == "made" and (tmp_path / "broken").is_symlink()


def test_a_fifo_is_written_to_and_never_replaced(tmp_path):
  os.mkfifo(tmp_path / "fifo")
  got = []
  reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_text()))
  atomic.check(str(tmp_path / "fifo"))  # waits for nobody
  reader.start()
  with atomic.atomic_write(str(tmp_path / "fifo")) as file:
    file.write("line\n")
  reader.join(10)
  assert got == ["line\n"] and stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode) and listed(tmp_path) == ["fifo"]
  assert not atomic.is_regular(str(tmp_path / "fifo"))


def test_a_descriptor_that_is_open_goes_on_where_it_is(tmp_path):
  """As of `--out=/dev/stdout > FILE`."""
  with open(tmp_path / "a", "wb", buffering=0) as file:
    file.write(b"before ")
    (tmp_path / "link").symlink_to(f"/dev/fd/{file.fileno()}")
    for path in (f"/dev/fd/{file.fileno()}", str(tmp_path / "link")):
      atomic.check(path)
      with atomic.atomic_write(path) as opened:
        opened.write("line ")
    file.write(b"after")
  assert (tmp_path / "a").read_text() == "before line line after" and listed(tmp_path) == ["a", "link"]


def test_a_terminal_is_written_to():
  ours, theirs = os.openpty()
  with atomic.atomic_write(os.ttyname(theirs)) as file:
    file.write("line\n")
  assert os.read(ours, 100) == b"line\r\n"
  os.close(ours)
  os.close(theirs)


def test_where_nothing_can_be_written_is_reported_before_and_in_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "circle").symlink_to("circle")
  (tmp_path / "odd.tmp").symlink_to("file")
  (tmp_path / "fixed").write_text("old")
  (tmp_path / "fixed").chmod(0o400)
  for path, says in (
      (tmp_path, "Is a directory"), (f"{tmp_path}/new/", "Is a directory"),
      (tmp_path / "none" / "a", "No such file or directory"), (tmp_path / "file" / "a", "Not a directory"),
      (tmp_path / "circle", "Too many levels of symbolic links"), (tmp_path / "odd", "Too many levels of"),
      *([(tmp_path / "fixed", "Permission denied")] if os.getuid() else [])):
    for act in (atomic.check, lambda path: atomic.atomic_write(path).__enter__()):
      with pytest.raises(UserError, match=rf"^{path}: cannot be written \({says}") as error:
        act(str(path))
      assert "\n" not in str(error.value)
  before = listed(tmp_path)
  atomic.check(str(tmp_path / "a"))
  assert listed(tmp_path) == before == ["circle", "file", "fixed", "odd.tmp"]


def test_two_writers_of_one_file_come_one_after_the_other(tmp_path):
  path, texts = str(tmp_path / "a"), [c * 50_000 for c in "abcdefgh"]

  def write(text):
    with atomic.atomic_write(path) as file:
      for i in range(0, len(text), 5000):
        file.write(text[i : i + 5000])
        file.flush()

  threads = [threading.Thread(target=write, args=(text,)) for text in texts]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
  with open(path) as file:
    assert file.read() in texts
  assert listed(tmp_path) == ["a"]


def test_an_export_that_fails_leaves_nothing_and_one_that_was_killed_is_begun_again(tmp_path, monkeypatch):
  size = clip.SIZES["clip_vit_b32_mu"]()
  params, out = {"image": {}}, tmp_path / "out"
  monkeypatch.setitem(export.FORMATS, "limber", lambda size, tree: ({"config.json": {"a": 1}}, "w.safetensors", ()))
  monkeypatch.setattr(export.convert, "export", lambda rows, tree: {"w": np.ones(3, np.float32)})

  def failing(error):
    def fails(path, name, tensors):
      (out / f"{name}.tmp").write_text("half")
      raise error

    return fails

  for error, wanted in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UserError)):
    with monkeypatch.context() as patch, pytest.raises(wanted):
      patch.setattr(export, "_save", failing(error))
      export.save(str(out), "limber", size, params, {})
    assert listed(tmp_path) == []
  out.mkdir()
  (out / "w.safetensors.tmp").write_text("what a kill left")
  export.save(str(out), "limber", size, params, {})
  assert listed(out) == ["config.json", "w.safetensors"]
  with pytest.raises(UserError, match="holds something already"):
    export.check_new(str(out))
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"):
    export.check_new(str(tmp_path / "file"))
