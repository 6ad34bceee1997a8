"""Where commands may write: nothing that they read, and nothing of a run, is ever replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from absl import flags

from limber_jax.config import Source
from limber_jax.config_json import to_json
from limber_jax.data import features
from limber_jax.data.sources import packed
from limber_jax.data.tokenizers import BpeTokenizer
from limber_jax.errors import UserError
from limber_jax.inference import destination
from limber_jax.inference.output import OutFlags, Output
from limber_jax.runtime.atomic import SUFFIX

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
  """A workdir with all that a run keeps, and one file that is the user's own."""
  workdir = tmp_path / "run"
  for name in ("config.json", "run.json", "results.json", "metrics.jsonl", "scores.json", "bad_records.jsonl",
               "goodput.json", "checkpoints/20/manifest.json", "evaluation/a.jsonl", "frozen/image/d", "mine.jsonl"):
    (workdir / name).parent.mkdir(parents=True, exist_ok=True)
    (workdir / name).write_text(to_json(runs.tiny()) if name == "config.json" else "{}")
  return workdir


def refused(path, match, **options):
  with pytest.raises(UserError, match=match) as error:
    destination.file(str(path), what=f"--out={path}", **options)
  assert "\n" not in str(error.value)


def test_no_file_of_a_run_is_replaced_and_others_beside_it_may_be(run, tmp_path):
  before = sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file())
  (tmp_path / "link").symlink_to(run)
  for name in ("config.json", "run.json", "results.json", "metrics.jsonl", "scores.json", "bad_records.jsonl", ".lock",
               "goodput.json", "checkpoints/20/manifest.json", "checkpoints/20/new", "evaluation/a.jsonl",
               "frozen/image/d"):
    for path in (run / name, tmp_path / "link" / name):
      refused(path, f"^--out={path}: belongs to the run in {run}, and would be replaced; choose another file$")
  for name in ("mine.jsonl", "new.jsonl", "report.md"):
    destination.file(str(run / name), what="x")
  destination.file(str(tmp_path / "config.json"), what="x")
  assert sorted((p, p.read_bytes()) for p in run.rglob("*") if p.is_file()) == before


def test_no_file_that_a_command_reads_is_replaced_under_any_name(tmp_path):
  photo, inside = tmp_path / "a.png", tmp_path / "data" / "b.png"
  inside.parent.mkdir()
  for path in (photo, inside):
    path.write_bytes(b"x")
  (tmp_path / "link.png").symlink_to(photo)
  os.link(photo, tmp_path / "hard.png")
  for name in ("a.png", "link.png", "hard.png", "data/../a.png"):
    refused(tmp_path / name, "is read by this command, and would be replaced", reads=["none.png", str(photo)])
  for end in (".partial", SUFFIX):
    photo.rename(tmp_path / f"new{end}")
    refused(tmp_path / "new", f"new{end} is read by this command", reads=[str(tmp_path / f"new{end}")])
    (tmp_path / f"new{end}").rename(photo)
  refused(inside, "b.png: is there already, in .*data, which this command reads", reads=[str(tmp_path / "data")])
  destination.file(str(inside.with_name("c.png")), what="x", reads=[str(tmp_path / "data")])
  (tmp_path / "model").mkdir()
  for name in ("model.safetensors", "labels.jsonl"):
    (tmp_path / "model" / name).write_text("x")
  assert [os.path.basename(f) for f in destination.weights(str(tmp_path / "model"))] == ["model.safetensors"]
  assert destination.data(Source("captions", str(tmp_path / "{a,b}.png")))[:-1] == []  # b is missing
  assert destination.data(Source("captions", str(tmp_path / "[ab].png")))[:-1] == [str(photo)]
  with pytest.raises(UserError, match=r"rows that are not all there go to .*x.partial, which is something else"):
    (tmp_path / "x.partial").write_text("my notes\n")
    Output(path=str(tmp_path / "x"))
  assert (tmp_path / "x.partial").read_text() == "my notes\n"


def test_a_directory_to_fill_is_none_of_a_run_no_file_and_not_full_of_other_things(run, tmp_path):
  (tmp_path / "file").touch()
  (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
  for path, match in ((tmp_path / "file", "is a file, where a directory belongs"),
                      (tmp_path / "dangling", "is a link that leads nowhere, where a directory belongs"),
                      (run, "is the workdir of a run; choose another"),
                      (run / "checkpoints", f"is a part of the run in {run}"),
                      ("-", "wanted the name of a directory")):
    with pytest.raises(UserError, match=match):
      destination.directory(str(path), what=f"--out={path}")
  for path, runs_too in ((tmp_path / "new", False), (tmp_path / "new", True), (run, True)):
    destination.directory(str(path), what="x", runs=runs_too)
  with pytest.raises(UserError, match="is a part of the run in"):
    destination.directory(str(run / "checkpoints"), what="x", runs=True)
  refused("-", "^--out=-: wanted the name of a file, for what is written is no text")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.tex").touch()
  with pytest.raises(UserError, match=r"full is not empty, it has thesis\.tex; choose another directory"):
    features.claim(str(tmp_path / "full"), {"records": 1}, 1, write=True)
  with pytest.raises(UserError, match=r"full is not empty, it has thesis\.tex; choose another directory"):
    BpeTokenizer.train(["a"], 300, str(tmp_path / "full"))
  (tmp_path / "packed").mkdir()
  (tmp_path / "packed" / packed.MANIFEST).write_text(json.dumps({"kind": packed.KIND, "version": packed.VERSION}))
  with pytest.raises(UserError, match=f"what {packed.KIND} wrote, and no features"):
    features.claim(str(tmp_path / "packed"), {"records": 1}, 1, write=True)
  assert os.listdir(tmp_path / "full") == ["thesis.tex"]


def test_a_dash_is_standard_output_for_lines(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  chosen = OutFlags()
  try:
    flags.FLAGS.out = "-"
    with chosen.output([]) as out:
      assert chosen.prints() and out.write([{"image": "a", "caption": "b"}], {"image": 5, "caption": 0}, 1) == 0
  finally:
    delattr(flags.FLAGS, "out")
    delattr(flags.FLAGS, "json")
  assert capsys.readouterr().out == '{"image": "a", "caption": "b"}\n' and os.listdir(tmp_path) == []


COMMANDS = """
import contextlib, io, json, os, runpy, sys
def command(module, *arguments):
  from absl import flags
  for name in list(flags.FLAGS):
    if name not in known:
      delattr(flags.FLAGS, name)
  sys.argv = [module, *arguments]
  said = io.StringIO()
  with contextlib.redirect_stderr(said):
    try:
      runpy.run_module(f"limber_jax.{module}", run_name="__main__")
    except SystemExit as end:
      return end.code, said.getvalue()
from absl import flags
import limber_jax.cli
known = set(flags.FLAGS)
print(json.dumps([command(*line) for line in json.loads(sys.argv[1])]))
"""


@pytest.mark.process
def test_every_command_refuses_before_it_computes(run, tmp_path):
  photo, table = tmp_path / "a.png", tmp_path / "t.tsv"
  photo.write_bytes(b"x")
  table.write_text("a.png\ta\n")
  (run / "config.json").write_text(to_json(runs.tiny_limber()))
  there = str(run / "config.json")
  lines = [("classify", f"--weights={run}", "--labels=a,b", f"--out={photo}", str(photo)),
           ("classify", f"--weights={run}", "--labels=a,b", f"--out={there}", str(photo)),
           ("caption", f"--workdir={run}", f"--out={photo}", str(tmp_path)),
           ("caption", f"--workdir={run}", f"--out={there}", str(photo)),
           ("vqa", f"--workdir={run}", f"--out={photo}", str(photo), "what?"),
           ("report", str(run), f"--out={run}/results.json"), ("inspect", str(table), f"--out={table}"),
           ("pack", str(table), there), ("convert", str(run), there, "--to=projection"),
           ("convert", str(run), str(run / "checkpoints"), "--to=hf"),
           ("encode", f"--config={ROOT}/experiments/quickstart.py", f"--out={run}"),
           ("train_tokenizer", f"--source={table}", f"--out={run}"), ("inspect", str(table), "--out=-"),
           ("evaluate", f"--config={ROOT}/experiments/quickstart.py", f"--workdir={run}", "--out=-")]
  env = runs.environment() | {"PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run([sys.executable, "-Wignore", "-c", COMMANDS, json.dumps(lines)], capture_output=True, text=True,
                        cwd=tmp_path, env=env)
  assert done.returncode == 0, done.stderr
  for line, (code, said) in zip(lines, json.loads(done.stdout.splitlines()[-1]), strict=True):
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (line, code, said)
    assert "choose another" in said or "wanted the name" in said, (line, said)
  assert photo.read_bytes() == b"x" and json.loads((run / "config.json").read_text())["task"] == "captioning"
