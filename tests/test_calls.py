"""What the package never does: run code out of data, start other programs, open connections.

Experiment files are Python, and run as such (`runpy` in limber_jax/cli.py). Java's tokenizers and scorers are programs
(limber_jax/metrics/captions.py). Connections are huggingface_hub's own, for weights that a user names. Workers that
read data are this package's own processes, which Python's multiprocessing and Grain start and send their work.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "limber_jax").rglob("*.py"))

BUILTINS = {"eval", "exec", "compile", "__import__"}
MODULES = {"subprocess", "socket", "pickle", "_pickle", "marshal", "shelve", "runpy", "pty", "ctypes", "cffi",
           "http", "ftplib", "smtplib", "urllib.request", "requests", "httpx", "aiohttp"}
OF_OS = {"system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "startfile"}
ALLOWED = {
  "limber_jax/cli.py": {"runpy"},                   # an experiment is code
  "limber_jax/metrics/captions.py": {"subprocess"},  # Java: the published tokenizer and scorers
  "limber_jax/runtime/health.py": {"socket"},       # for the host's name
  "limber_jax/runtime/lock.py": {"socket"},         # for the host's name
  "limber_jax/runtime/surroundings.py": {"os.execv"},       # this program again, in Python's UTF-8 mode
  "limber_jax/runtime/peers.py": {"os.fork"},               # of several processes: what their stderr passes through
}


def used(path):
  """Yields (line, what) of all in a file that runs code, starts a program or opens a connection."""
  for node in ast.walk(ast.parse(path.read_text())):
    names = []
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
      yield from ((node.lineno, f"os.{alias.name}") for alias in node.names
                  if node.module == "os" and _starts(alias.name))
    for name in names:
      parts = name.split(".")
      yield from ((node.lineno, start) for i in range(len(parts)) if (start := ".".join(parts[: i + 1])) in MODULES)
    if isinstance(node, ast.Name) and node.id in BUILTINS:
      yield node.lineno, node.id
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      if node.value.id == "os" and _starts(node.attr):
        yield node.lineno, f"os.{node.attr}"
      if node.value.id == "builtins":
        yield node.lineno, f"builtins.{node.attr}"
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True) is not False:
      yield node.value.lineno, "allow_pickle"
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
      yield node.value.lineno, "trust_remote_code"


def _starts(name):
  return name in OF_OS or name.startswith(("exec", "spawn"))


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_file_runs_code_out_of_data_starts_programs_or_connects(path):
  name = path.relative_to(ROOT).as_posix()
  assert [f"{line}: {what}" for line, what in used(path) if what not in ALLOWED.get(name, ())] == []


def test_what_is_allowed_is_used():
  for name, what in ALLOWED.items():
    assert what <= {u for _, u in used(ROOT / name)}, f"{name} no longer needs {what}"


@pytest.mark.parametrize("code", [
  "eval('1')", "f = exec", "import pickle", "from subprocess import run", "import os\nos.execv('a', [])",
  "import socket as s", "import urllib.request", "from urllib import request", "numpy.load(f, allow_pickle=True)",
  "numpy.load(f, allow_pickle=flag)", "import builtins\nbuiltins.eval('1')", "from os import system\nsystem('a')",
  "AutoModel.from_pretrained(a, trust_remote_code=False)", "import http.client"])
def test_the_scan_sees(code, tmp_path):
  file = tmp_path / "code.py"
  file.write_text(code)
  assert list(used(file))


# Runs in a process of its own: an audit hook cannot be taken back, and must be there before anything is imported.
# Python itself and dataclasses run code to import modules, so of that only what the package asks for counts.
AUDITED = """
import importlib, json, os, pathlib, shutil, sys
package, workdir, seen = sys.argv[1], sys.argv[2], set()

def hook(event, args):
  if event in ("exec", "compile", "marshal.loads"):
    file = sys._getframe(1).f_code.co_filename
    if file.startswith(package):
      seen.add((event, file))
  # A socket alone is asyncio's pair for waking itself up. The events of TensorBoard go to its own thread as a pickle.
  elif event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
    seen.add((event, str(args[1:])))
  elif event == "pickle.find_class" and args in (("builtins", "object"), ("tensorboardX.proto.event_pb2", "Event")):
    pass
  elif event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.spawn",
                 "os.posix_spawn", "pty.spawn", "urllib.Request"):
    seen.add((event, str(args)))

sys.addaudithook(hook)
{script}
print(json.dumps(sorted(seen)))
"""


def audited(script, tmp_path):
  """Returns [[event, what]] of what a process did that it should not."""
  env = environment() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
  done = subprocess.run([sys.executable, "-c", AUDITED.format(script=script), ROOT / "limber_jax", tmp_path / "run"],
                        cwd=tmp_path, text=True, capture_output=True, env=env)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


COMMANDS = """
for path in sorted(pathlib.Path(package).rglob("*.py")):
  if path.stem != "__main__" and "bench" not in path.parts:
    module = path.relative_to(pathlib.Path(package).parent).with_suffix("").as_posix().replace("/", ".")
    importlib.import_module(module.removesuffix(".__init__"))
from limber_jax.config import Checkpoint
from limber_jax.training.loop import train
from runs import tiny, zeroshot
for last in ("3", ""):  # from the first step, and then from a checkpoint
  said = []
  train(tiny(steps=3, checkpoint=Checkpoint(every=1), evals=zeroshot(every=1)), workdir, log=said.append)
  if last:
    shutil.rmtree(os.path.join(workdir, "checkpoints", last))
assert "resuming from step 2" in said[0], said
"""


@pytest.mark.process
def test_importing_every_command_and_a_training_run_do_none_of_it(tmp_path):
  assert audited(COMMANDS, tmp_path) == []


DOING_IT = """
import pickle, socket, subprocess
subprocess.run(["true"])
pickle.loads(pickle.dumps(os.path.join))
exec(compile("eval('1')", os.path.join(package, "x.py"), "exec"))
try:
  socket.create_connection(("127.0.0.1", 1))
except OSError:
  pass
"""


@pytest.mark.process
def test_the_audit_sees(tmp_path):
  assert {"subprocess.Popen", "pickle.find_class", "exec", "socket.connect"} <= {
    event for event, _ in audited(DOING_IT, tmp_path)}
