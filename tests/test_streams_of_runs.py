"""The three kinds of stream that take no lines, and a terminal that goes away, under real commands on tiny models."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from runs import environment, losses, pictures, tiny_limber, untrained

from limber_jax import cli
from limber_jax.checkpoints.manifest import compare

EXPERIMENT = """
import sys, time
sys.path.insert(0, {tests!r})
from runs import tiny, zeroshot
from limber_jax.config import Checkpoint, Data, Source, Tokenizer
from limber_jax.data.sources.digits import Digits
def get_config():
  if {slow}:  # in the evaluation alone, which reads in this process
    read = Digits.__getitem__
    Digits.__getitem__ = lambda self, index: (time.sleep(0.1), read(self, index))[1]
  return tiny(steps={steps}, checkpoint=Checkpoint(every=3, keep=9), evals=zeroshot(every=4), mesh=(-1, 1, 1),
              data=Data(source=Source(name="digits"), tokenizer=Tokenizer(name="bytes"), threads=1, workers=1))
"""
# Becomes a command, as the leader of a session whose terminal is its standard input; also where these tests have nohup.
LEADER = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
COMMANDS = ("train", "evaluate", "caption", "classify")
STREAMS = {"closed": ("{} >&- 2>&-", {}), "broken": ("{} 2>&1 | true; exit ${PIPESTATUS[0]}", {}),
           "ascii": ("{}", {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})}
COUNT = 400


class Commands:
  """The four commands, each with what it makes, in one folder."""

  def __init__(self, root):
    self.root = root
    self.env = environment(devices=1)
    self.write(root / "clip.py")
    untrained(cli.load_experiment(str(root / "clip.py")), str(root / "clip"))
    untrained(tiny_limber(), str(root / "limber"))
    (root / "images").mkdir()
    first = pictures(root / "images", 20)
    for i in range(20, COUNT):
      os.link(first[i % 20], root / "images" / f"é{i:03}.png")
    self.wanted = {}
    for name in COMMANDS:
      code, place, _, errors = self.end(name, "whole", "{} > /dev/null", {})
      assert code == 0, errors
      self.wanted[name] = self.made(name, place)

  def write(self, file, steps=8, slow=False):
    """Writes an experiment."""
    file.write_text(EXPERIMENT.format(tests=os.path.dirname(__file__), steps=steps, slow=slow))

  def call(self, name, into, steps=8, slow=False, out=True):
    """Returns (the arguments of a command, where what it makes goes)."""
    file, place = self.root / f"{into}_{name}.py", self.root / f"{into}_{name}"
    self.write(file, steps if name == "train" else 8, slow)
    if name == "evaluate" and not place.exists():
      shutil.copytree(self.root / "clip", place)
    arguments = {
      "train": [f"--config={file}", f"--workdir={place}"],
      "evaluate": [f"--config={file}", f"--workdir={place}"],
      "caption": [f"--workdir={self.root / 'limber'}", "--batch_size=4", *([f"--out={place}"] if out else []),
                  str(self.root / "images")],
      "classify": [f"--weights={self.root / 'clip'}", "--labels=é,zwei", *([f"--out={place}"] if out else []),
                   str(self.root / "images")]}[name]
    return [sys.executable, "-m", f"limber_jax.{name}", *arguments], place

  def end(self, name, into, shell, env, **how):
    """Runs a command in a shell; returns (exit code, where what it makes is, stdout, stderr)."""
    call, place = self.call(name, into, **how)
    call = " ".join(f"'{word}'" for word in call)
    done = subprocess.run(["bash", "-c", shell.replace("{}", call)], env=self.env | env, capture_output=True,
                          timeout=300)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
    return done.returncode, place, done.stdout, done.stderr

  def made(self, name, place):
    """Returns what a command has made, all of it."""
    if name == "train":
      with open(place / "metrics.jsonl", encoding="utf-8") as file:
        evaluated = [r for r in map(json.loads, file) if "zeroshot/top1" in r]
      checkpoints = sorted(int(step) for step in os.listdir(place / "checkpoints") if step.isdigit())
      assert all(compare(place / "checkpoints" / str(step)) is None for step in checkpoints)
      return losses(place), evaluated, checkpoints
    if name == "evaluate":
      return json.loads((place / "results.json").read_text())["evaluations"]
    assert not os.path.exists(f"{place}.partial")
    return place.read_text()

  def hang_up(self, name, into, until):
    """Starts a command on a terminal, which goes away once `until` is true of its place; returns as `end` does."""
    call, place = self.call(name, into, slow=name == "evaluate", steps=100_000)
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", LEADER, *call], env=self.env, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)
    os.close(theirs)
    deadline = time.monotonic() + 240
    os.set_blocking(ours, False)
    while not until(place):
      assert time.monotonic() < deadline and process.poll() is None
      try:
        os.read(ours, 65536)
      except OSError:
        time.sleep(0.01)
    os.close(ours)
    return process.wait(240), place


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
  assert len(jax.devices()) == 8
  return Commands(tmp_path_factory.mktemp("commands"))


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_makes_the_same_whatever_takes_its_lines(name, stream, commands):
  shell, env = STREAMS[stream]
  code, place, _, _ = commands.end(name, stream, shell, env)
  assert code == 0
  assert commands.made(name, place) == commands.wanted[name]


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("name", ["caption", "classify"])
def test_what_is_only_printed_ends_with_its_stream(name, commands):
  code, _, out, errors = commands.end(name, "printed", "{} | head -1; exit ${PIPESTATUS[0]}", {}, out=False)
  progress = [line for line in errors.splitlines() if f" of {COUNT} images, ".encode() in line]
  assert (code, errors.splitlines(), out.count(b"\n")) == (141, progress, 1)
  code, _, _, errors = commands.end(name, "printed", "{} >&-", {}, out=False)
  assert code == 2 and errors.startswith(b"error: standard output: it is closed") and errors.count(b"\n") == 1
  code, _, out, _ = commands.end(name, "printed", "{} --json", STREAMS["ascii"][1], out=False)
  assert (code, out.decode("ascii")) == (0, commands.wanted[name])


@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_terminal_took_along_resumes_as_if_nothing_had_been(name, commands):
  def begun(place):
    if name == "train":
      return (place / "checkpoints" / "6" / "manifest.json").exists()
    if name == "evaluate":
      return any(path.read_bytes().count(b"\n") > 1 for path in (place / "evaluation").rglob("*.jsonl"))
    partial = Path(f"{place}.partial")
    return partial.exists() and partial.read_bytes().count(b"\n") > 5

  code, place = commands.hang_up(name, "hung", begun)
  assert code == 0
  if name == "train":
    seen, _, checkpoints = commands.made(name, place)
    assert list(seen) == list(range(1, checkpoints[-1] + 1)) and len(seen) < 100_000
    assert {step: loss for step, loss in seen.items() if step == 1} == {1: commands.wanted[name][0][1]}
    return
  assert not (place / "results.json" if name == "evaluate" else place).exists()
  code, place, _, errors = commands.end(name, "hung", "{} > /dev/null", {})
  assert code == 0 and commands.made(name, place) == commands.wanted[name]
  assert name == "evaluate" or b"resuming behind" in errors


@pytest.mark.process
@pytest.mark.long
def test_nohup_resumes_without_its_terminal(commands):
  call, place = commands.call("train", "nohup")
  process = subprocess.Popen(["nohup", *call], env=commands.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  while not (place / "metrics.jsonl").exists():
    time.sleep(0.02)
  process.send_signal(signal.SIGHUP)
  assert process.wait(240) == 0 and commands.made("train", place) == commands.wanted["train"]
