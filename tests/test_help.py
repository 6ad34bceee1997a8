"""What `--help` prints, of every command."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from limber_jax import help

ROOT = Path(__file__).parent.parent
COMMANDS = sorted(f.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                  for f in (ROOT / "limber_jax").rglob("*.py") if "\n  cli.run(" in f.read_text())

# Each command in a fork of one process that has imported what takes long.
SCRIPT = """
import json, os, runpy, sys
import limber_jax.inference.captioner, limber_jax.evaluate, limber_jax.train
for name in sys.argv[1:]:
  read, write = os.pipe()
  if (child := os.fork()) == 0:
    os.dup2(write, 1), os.dup2(write, 2)
    sys.argv = [name.removesuffix(".__main__"), "--help"]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    os._exit(99)
  os.close(write)
  text = open(read).read()
  print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text]), flush=True)
"""


@pytest.mark.process
def test_help_of_every_command_says_what_it_does_and_lists_its_flags():
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, *COMMANDS], cwd=ROOT, text=True, timeout=300,
                        capture_output=True)
  pages = {name: (code, text) for name, code, text in map(json.loads, done.stdout.splitlines())}
  assert pages.keys() == set(COMMANDS) >= {"limber_jax.train", "limber_jax.caption", "limber_jax.bench.__main__"}
  for name, (code, text) in pages.items():
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    assert code == 0 and text.startswith(ast.get_docstring(ast.parse(source)).splitlines()[0]), (name, text)
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
      if ast.unparse(call.func).startswith("flags.DEFINE_") and isinstance(call.args[0], ast.Constant):
        assert f"--{call.args[0].value}\n" in text.replace("--[no]", "--"), (name, call.args[0].value)
    assert ("--config\n" in text) == ("--config.FIELD" in text) == ("cli.define_config()" in source), name
    assert "--logtostderr" not in text and "--grain" not in text and "--jax" not in text, name
  assert "--beams\n" in pages["limber_jax.caption"][1] and "--split\n" in pages["limber_jax.pack"][1]


@pytest.mark.parametrize(("argv", "page"), [
  (["--help"], ""), (["-h"], ""), (["x", "-help"], ""), (["--helpshort"], ""), (["--help=config"], "config"),
  (["--help=lr"], "lr"), (["--", "--help"], None), (["--workdir=x"], None), ([], None)])
def test_help_is_asked_for_in_several_ways(argv, page):
  assert help.asked(["train", *argv]) == page


def test_every_field_is_listed_with_type_default_range_and_comment():
  page = " ".join(help.configuration().split())
  for entry in ("--config.optim.clip_norm global gradient norm; 0 does not clip (float, default 0.0, 0 or more) --",
                "--config.optim.b2 (float, default 0.98, 0 or more and less than 1) --",
                "--config.optim.schedule cosine | linear: after a linear warm-up | deepspeed: a logarithmic",
                "--config.evals.NAME.source.path [jsonl] the file (str, default '') --",
                "--config.data.source.split [jsonl packed] train or \"\": there are no parts (str,",
                "--config.model.lm.layers [task captioning] (int, default 28, 1 to 10000) --"):
    assert entry in page, entry
  assert help.configuration("clip_norm").startswith("  --config.optim.clip_norm\n")
  assert "no field" in help.configuration("clip_nrom")
