"""What commands do whose stdout or stderr is closed, broken, full or knows ASCII alone."""

import errno
import io
import os
import subprocess
import sys
import threading

import pytest

from limber_jax.runtime import streams

# A command that prints 200 lines and writes a file of them; its standard output is all that it makes if told so.
COMMAND = """if True:
  import logging, sys
  from limber_jax import cli
  def main(argv):
    with open(argv[0], "w") as file:
      for i in range(200):
        print(f"line {i} \\N{GREEK SMALL LETTER ALPHA}")
        print("to stderr \\udc80", file=sys.stderr)
        logging.warning("logged \\N{GREEK SMALL LETTER ALPHA}")
        file.write(f"{i}\\n")
    return 3
  cli.run(main, prints=lambda: sys.argv[-1] == "prints")
"""


def command(shell, tmp_path, **env):
  """Runs COMMAND as `shell` has it, with {} for it; returns (exit code, stdout, stderr)."""
  file = tmp_path / "command.py"
  file.write_text(COMMAND)
  call = f'"{sys.executable}" {file} {tmp_path}/made'
  done = subprocess.run(["bash", "-c", shell.replace("{}", call)], capture_output=True, timeout=60,
                        env=os.environ | env)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("shell", [
  "{} >&-", "{} 2>&-", "{} >&- 2>&- <&-", "{} | true; exit ${PIPESTATUS[0]}",
  "{} 2>&1 | head -1; exit ${PIPESTATUS[0]}", "{} > /dev/full", "{} > /dev/full 2>&1"])
def test_whatever_takes_its_lines_a_command_that_makes_files_goes_on_to_its_end(shell, tmp_path):
  code, _, errors = command(shell, tmp_path)
  assert code == 3 and b"Traceback" not in errors and b"Exception ignored" not in errors
  assert (tmp_path / "made").read_text().split() == [str(i) for i in range(200)]  # and nothing printed among them


@pytest.mark.process
@pytest.mark.parametrize(("shell", "code", "says"), [
  ("{} prints | head -1; exit ${PIPESTATUS[0]}", 141, b""),
  ("{} prints >&-", 2, b"error: standard output: it is closed; this command makes nothing but what it prints"),
  ("{} prints > /dev/full", 2, b"error: standard output: No space left on device; this command makes nothing but")])
def test_a_command_that_only_prints_ends_with_its_stdout(shell, code, says, tmp_path):
  got, _, errors = command(shell, tmp_path)
  said = [line for line in errors.splitlines() if not line.startswith(b"to stderr") and b"logged" not in line]
  assert (got, len(said)) == (code, bool(says)) and all(line.startswith(says) for line in said)


# The C locale is no choice of anyone's: a command speaks UTF-8 there.
@pytest.mark.process
@pytest.mark.parametrize(("env", "alpha"), [
  ({"PYTHONIOENCODING": "ascii"}, b"\\u03b1"),
  ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, "\u03b1".encode())])
def test_characters_that_a_stream_has_not_are_escaped(env, alpha, tmp_path):
  code, out, errors = command("{}", tmp_path, **env)
  assert code == 3 and out.splitlines()[199] == b"line 199 " + alpha
  assert b"to stderr \\udc80\n" in errors and b"logged " + alpha + b"\n" in errors and b"Traceback" not in errors


@pytest.fixture
def pipe():
  """(stream, descriptor to read from) of a pipe whose writing end belongs to the stream."""
  read, write = os.pipe()
  yield streams._Text(io.BufferedWriter(streams._Raw(write, "test")), "utf-8", "backslashreplace",
                      line_buffering=True), read
  os.close(write)


def test_a_line_is_there_as_soon_as_it_was_printed(pipe):
  stream, read = pipe
  print("one", "two", file=stream)
  assert os.read(read, 100) == b"one two\n"
  os.close(read)


def test_control_characters_are_shown_and_not_obeyed(pipe):
  stream, read = pipe
  print("a\x1b[2Jb\x07\x9b\u202etxt\rc\td\ne", file=stream)
  stream.write(f"{streams.ERASE}step 1\x00\n")
  stream.write("\r 50%\n")
  assert os.read(read, 1000).decode() == (
    "a\\x1b[2Jb\\x07\\x9b\\u202etxt\\rc\td\ne\n" f"{streams.ERASE}step 1\\x00\n" "\r 50%\n")
  os.close(read)


def test_a_descriptor_that_does_not_wait_is_waited_for(pipe):
  stream, read = pipe
  os.set_blocking(stream.fileno(), False)
  text, got = "x" * 300_000 + "\n", bytearray()

  def take():
    while len(got) < len(text):
      got.extend(os.read(read, 65536))

  thread = threading.Thread(target=take)
  thread.start()
  stream.write(text)
  thread.join(30)
  assert got.decode() == text
  os.close(read)


def test_what_must_arrive_says_once_that_it_does_not(pipe, monkeypatch):
  stream, read = pipe
  monkeypatch.setattr(sys, "stdout", stream)
  streams.must_arrive()
  os.close(read)
  with pytest.raises(streams.Gone) as gone:
    print("lost")
  assert gone.value.error.errno == errno.EPIPE
  print("and nothing more of it")
  assert os.path.samestat(os.fstat(stream.fileno()), os.stat(os.devnull))  # for libraries and children
