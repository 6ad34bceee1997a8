"""A random walk over all fields of a configuration: what is set ends in a run or in one line, never in a traceback."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from runs import tiny, tiny_limber, zeroshot

from limber_jax import config, ranges, registry
from limber_jax.config import Source
from limber_jax.config_json import flatten, from_json, to_json
from limber_jax.errors import UserError
from limber_jax.evals.captions import Captions
from limber_jax.models import gptj
from limber_jax.training import optimizer
from limber_jax.training.setup import setup

ROOT = Path(__file__).parent.parent
NUMBERS = ("0", "1", "-1", "2", "3", "7", "16", "1000", "-1000", "1000000", "2147483648", "100000000000",
           "100000000000000000000")
FLOATS = (*NUMBERS, "nan", "inf", "-inf", "1e39", "1e308", "1e-50", "1e-10", "0.5", "1.5", "-0.5", "0.99999999999",
          "1e20")
WORDS = ("", "x", "-1", "nan", "none", "../..", "ü", "a b", "x" * 300)
TUPLES = ("()", "(0,)", "(1,)", "(-1,)", "(1, 2)", "(0.5, 0.5, 0.5)", "(0.0, 0.0, 0.0)", "('x',)", "x", "(1e39, 1, 1)",
          "(1, 1, 1, 1)", "(0, 0, 0, 0)")
# What is valid, and would take hours or all of this machine: no mistake that one line could name.
NOT_TRIED = {"steps": 16, "workers": 2, "threads": 64, "batch_size": 1000, "layers": 1000}  # by a name's last part


def experiments():
  """Returns the three tiny experiments, by task."""
  lm = {"task": "language_modelling", "model": gptj.SIZES["gptj_digits"](), "trainable": ("lm",), "steps": 3}
  out = {"contrastive": tiny(evals=zeroshot(), steps=4), "captioning": tiny_limber(), "language_modelling": tiny(**lm)}
  out["contrastive"].optim.part_lr = {"text": 1e-3}
  out["captioning"].evals = {"captions": Captions(Source(split="test"), every=-1)}
  for c in out.values():
    c.data.threads, c.checkpoint.every = 2, 2
  return out


def settings(seed, count):
  """Returns (task, field, value as on the command line) of `count` settings drawn at random."""
  rng, out = random.Random(seed), []
  fields = [(task, name, value) for task, c in experiments().items() for name, value in flatten(c).items()]
  while len(out) < count:
    task, name, value = rng.choice(fields)
    allowed = field_of(name, experiments()[task])
    if isinstance(value, bool):
      values = ("true", "false", "2", "x", "")
    elif isinstance(value, int | float):
      edges = [b for b in (allowed.at_least, allowed.above, allowed.at_most, allowed.below) if b is not None]
      values = (*(NUMBERS if isinstance(value, int) else FLOATS), str(value), str(-value), str(2 * value),
                *(f"{b + d}" for b in edges for d in (-1, 0, 1)))
    else:
      values = TUPLES if isinstance(value, list) else (*WORDS, *allowed.choices)
    given = rng.choice(values)
    tried = NOT_TRIED.get(name.split(".")[-1], math.inf)
    if given.lstrip("-").isdigit() and tried < int(given) <= allowed.at_most:
      continue
    out.append((task, name, given))
  return out


def field_of(name, root):
  """Returns the range of the field of a dotted name."""
  holder, allowed = root, ranges.ANY
  for part in name.split("."):
    if isinstance(holder, dict):
      holder = holder.get(part)
    else:
      allowed = ranges.range_of(next(f for f in type(holder).__dataclass_fields__.values() if f.name == part))
      holder = getattr(holder, part)
  return allowed


def put(root, name, text):
  """Sets a field as ml_collections would, by the type that is there; raises ValueError where it cannot."""
  *way, last = name.split(".")
  for part in way:
    root = root[part] if isinstance(root, dict) else getattr(root, part)
  old = root[last] if isinstance(root, dict) else getattr(root, last)
  if isinstance(old, bool):
    value = {"true": True, "false": False}.get(text, text)
  elif isinstance(old, tuple):
    value = eval(text, {"x": "x"})  # our own words
  else:
    value = type(old)(text) if isinstance(old, int | float) else text
  if isinstance(root, dict):
    root[last] = value
  else:
    setattr(root, last, value)


def test_a_setting_passes_and_comes_back_from_its_json_or_is_one_line():
  passed = refused = 0
  for task, name, text in settings(0, 800):
    c = experiments()[task]
    try:
      put(c, name, text)
    except ValueError:
      continue
    try:
      ranges.split_commas(c)
      config.check(c)
      config.check_best(c)
    except UserError as error:
      assert "\n" not in str(error) and ("config." in str(error) or name == "task"), (name, text, error)
      refused += 1
      continue
    assert to_json(from_json(to_json(c), "x")) == to_json(c), (name, text)
    values = [v for x in flatten(c).values() for v in (x if isinstance(x, list) else [x]) if isinstance(v, float)]
    assert all(map(math.isfinite, values)), (name, text)
    try:
      registry.lookup("task", registry.TASKS, task).from_config(c)
      optimizer.make(c.optim, c.steps)
    except UserError as error:
      assert "\n" not in str(error), (name, text, error)
    passed += 1
  assert passed > 150 and refused > 150


# A process that has imported everything forks one command a setting: it trains by the command line, as a user does.
SERVER = """
import json, os, resource, runpy, sys, traceback
import jax, numpy as np
import limber_jax.train, limber_jax.evaluate
from limber_jax import cli
from limber_jax.training.loop import train

def main():
  holder, workdir = cli.define_config(), sys.argv.pop()
  def run(argv):
    state = train(cli.get_config(holder), workdir)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params))):
      print("NaN parameters", file=sys.stderr)
      return 3
  cli.run(run)

for line in sys.stdin:
  argv, out = json.loads(line)
  if (child := os.fork()) == 0:
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1), os.dup2(file, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (300,) * 2)
    sys.argv = ["train", *argv]
    main()
    os._exit(98)
  print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), flush=True)
"""

EXPERIMENT = """
import sys
sys.path.insert(0, {root!r})
from test_walk import experiments

def get_config():
  return experiments()[{task!r}]
"""


@pytest.mark.process
@pytest.mark.long
def test_500_settings_train_or_are_refused_in_one_line(tmp_path):
  for task in experiments():
    (tmp_path / f"{task}.py").write_text(EXPERIMENT.format(root=str(ROOT / "tests"), task=task))
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "NPROC": "4", "PYTHONPATH": str(ROOT),
                      "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
                      "XLA_FLAGS": "--xla_backend_optimization_level=0",
                      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  seed, count = int(os.environ.get("WALK_SEED", 1)), int(os.environ.get("WALK_COUNT", 500))
  report, bad = open(os.environ.get("WALK_REPORT", tmp_path / "report.jsonl"), "w"), []  # noqa: SIM115
  with subprocess.Popen([sys.executable, "-W", "ignore", "-c", SERVER], cwd=tmp_path, env=env, text=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
    for i, (task, name, text) in enumerate(settings(seed, count)):
      argv = [f"--config={tmp_path}/{task}.py", f"--config.{name}={text}", str(tmp_path / f"run{i}")]
      server.stdin.write(json.dumps([argv, str(tmp_path / "out")]) + "\n")
      server.stdin.flush()
      code = json.loads(server.stdout.readline())
      said = (tmp_path / "out").read_text(errors="replace")
      errors = [line for line in said.splitlines() if line.startswith("error: ")]
      metrics = tmp_path / f"run{i}" / "metrics.jsonl"
      losses = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
      losses = [float(r["loss"]) for r in losses if "lr" in r]
      hot = name == "optim.lr" and float(text) >= 1  # then it climbs by right
      climbs = not hot and len(losses) > 1 and not losses[-1] < 2 * losses[0] + 1
      fine = "Traceback" not in said and ((code == 0 and not climbs) or (code == 2 and len(errors) == 1))
      said = (errors or [""])[0][:200] if fine else said[-1500:]
      line = json.dumps([fine, code, task, name, text[:40], said, losses])
      report.write(line + "\n")
      report.flush()
      if not fine:
        bad.append(line)
  report.close()
  assert not bad, "\n".join(bad)


def test_a_dtype_that_the_device_has_no_products_of_is_refused_in_one_line():
  with pytest.raises(UserError, match=r"^config\.compute\.dtype='float16': on a CPU there are no products of it"):
    setup(tiny(mesh=(-1, 1, 1), compute=config.Compute(dtype="float16")))
