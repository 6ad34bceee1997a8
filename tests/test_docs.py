"""The README and the pages of docs/: their commands, links and code are those of the program as it is."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from limber_jax import help
from limber_jax.config import Source

ROOT = Path(__file__).parent.parent
PAGES = [f for f in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))) if f.exists()]
NAMES = [f.relative_to(ROOT).as_posix() for f in PAGES]
COMMAND = re.compile(r"python -m (limber_jax\.[\w.]+\w)((?: |\\\n)[^`\n|#&]*(?:\\\n[^`\n|#&]*)*)?")
FLAG = re.compile(r"(?<![\w-])--(\w[\w.-]*)")
BLOCK = re.compile(r"(<!-- compiled only: .* -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS = {"strict", "fix", "check"}  # flags of mkdocs and ruff
FIELDS = {re.compile(re.escape(name).replace("NAME", r"\w+")) for name, *_ in help.fields()}


def commands(page):
  """Returns {"limber_jax.bench.loss": its flags} of all commands that stand in a page, in its code and its text."""
  found = {}
  for module, rest in COMMAND.findall(page.read_text()):
    bench = re.match(r" (\w+)", rest) if module == "limber_jax.bench" else None
    found.setdefault(f"{module}.{bench[1]}" if bench else module, set()).update(FLAG.findall(rest))
  return {command: flags for command, flags in found.items() if not command.endswith((".X", ".NAME"))}


def file_of(command):
  return ROOT / f"{command.replace('.', '/')}.py"


def defined(nodes):
  """Returns (the names of the flags that some code defines, all names that it uses)."""
  flags, used = set(), set()
  for node in (n for top in nodes for n in ast.walk(top)):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.startswith("DEFINE_"):
      name = node.args[0]
      flags |= {name.value} if isinstance(name, ast.Constant) else {f.name for f in dataclasses.fields(Source)}
    used |= {getattr(node, "id", None) or getattr(node, "attr", None)}
  return flags, used


@functools.cache
def shared():
  """Returns {name: as `defined`} of every class and function of the program that defines flags or uses such a one."""
  found = {}
  for file in (ROOT / "limber_jax").rglob("*.py"):
    if "DEFINE_" in (text := file.read_text()):
      for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
          flags, used = defined([node])
          before = found.get(node.name, (set(), set()))
          found[node.name] = before[0] | flags, before[1] | used
  return found


@functools.cache
def flags_of(command):
  """Returns the names of a command's flags, from its code; tests/test_help.py holds what it prints of them."""
  body = [n for n in ast.parse(file_of(command).read_text()).body if not isinstance(n, ast.ClassDef | ast.FunctionDef)]
  flags, used = defined(body)
  seen = set()
  while names := (used & shared().keys()) - seen:
    seen |= names
    for name in names:
      flags, used = flags | shared()[name][0], used | shared()[name][1]
  return flags | {"help"}


def is_field(flag):
  return any(f.fullmatch(flag) for f in FIELDS)


def test_the_readme_is_a_front_page():
  assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_of_a_page_exists_and_has_the_flags_it_is_given(page):
  for command, flags in commands(page).items():
    assert file_of(command).is_file(), f"{page.name}: no module for python -m {command}"
    for flag in flags - flags_of(command):
      known = flag.startswith("config.") and "config" in flags_of(command) and is_field(flag)
      assert known, f"{page.name}: {command} has no --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_flag_in_a_page_is_one_of_some_program(page):
  own = {flag for flags, _ in shared().values() for flag in flags} | {"help"}
  for file in (ROOT / "limber_jax").rglob("*.py"):
    own |= defined([ast.parse(file.read_text())])[0] if "DEFINE_" in file.read_text() else set()
  own |= set(FLAG.findall((ROOT / "tpu_setup.sh").read_text())) | OTHERS
  for flag in set(FLAG.findall(page.read_text())) - own:
    assert is_field(flag), f"{page.name}: no command has --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_experiment_of_a_page_is_there(page):
  for path in set(re.findall(r"experiments/\w+\.py", page.read_text())) - {"experiments/X.py"}:
    assert (ROOT / path).is_file(), f"{page.name}: {path}"


def anchors(page):
  """Returns the anchors of a page's headings, as GitHub and MkDocs make them."""
  text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
  return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_within_the_documentation_lead_somewhere(page):
  text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"\w+:", target):
      continue
    file, _, anchor = target.partition("#")
    there = page.parent / file if file else page
    assert there.is_file(), f"{page.name}: {target}"
    assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [f for f in PAGES if BLOCK.search(f.read_text())],
                         ids=lambda f: f.relative_to(ROOT).as_posix())
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
  """Blocks of a page share their names, and have the `config` of an experiment; some are compiled only, and say why."""
  monkeypatch.chdir(tmp_path)
  names = {"config": types.SimpleNamespace(evals={})}
  for number, (skipped, code) in enumerate(BLOCK.findall(page.read_text()), 1):
    program = compile(code, f"{page.name}, block {number}", "exec")
    if not skipped:
      exec(program, names)


@pytest.mark.long  # 8 s
def test_the_site_builds_without_a_warning_and_needs_nothing_from_elsewhere(tmp_path):
  pytest.importorskip("mkdocstrings")
  done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT,
                        text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  pages = {f.name: f.read_text() for f in tmp_path.glob("*.html")}
  assert {f"{f.stem}.html" for f in (ROOT / "docs").glob("*.md")} <= pages.keys()
  for name, text in pages.items():
    assert not re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*', text), name
    assert not re.findall(r'<link[^>]* rel="stylesheet"[^>]* href="(?:https?:)?//[^"]*', text), name
  assert "contrastive_loss" in pages["api.html"] and "--config.optim.lr" in pages["api.html"]
