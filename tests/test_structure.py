"""The shape of the tree: who may import whom, what is never imported, and that every name leads somewhere."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from limber_jax import registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "limber_jax"
FILES = sorted(f for folder in ("limber_jax", "experiments", "tests") for f in (ROOT / folder).rglob("*.py"))

# A module imports from lower layers and from its own package; those that stand directly in limber_jax may also import
# their neighbours in the same layer.
LAYERS = (
  {"__init__", "losses", "losses_engine", "config", "config_history", "config_json", "map_names", "ranges",
   "registry", "errors"},
  {"runtime"},
  {"cli", "help", "models", "data", "metrics"},
  {"checkpoints"},
  {"weights", "decoding"},
  {"tasks"},
  {"evals"},
  {"training"},
  {"inference", "reports", "planning"},
  {"recipes", "train", "plan", "evaluate", "encode", "caption", "vqa", "classify", "convert", "health", "inspect",
   "pack", "report", "train_tokenizer"},
  {"bench"},
)


def imports(path):
  """Returns (line, "limber_jax.models.vit") for each import of a file, those inside functions too.

  `from a import b` counts as a.b where that is a module, else as a.
  """
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
      for alias in node.names:
        deeper = ROOT.joinpath(*node.module.split("."), alias.name)
        is_module = deeper.is_dir() or deeper.with_suffix(".py").is_file()
        yield node.lineno, f"{node.module}.{alias.name}" if is_module else node.module


def part(module):
  """Returns "models" for limber_jax.models.vit, "__init__" for limber_jax itself."""
  return module.split(".")[1] if "." in module else "__init__"


def layer(name):
  found = [i for i, names in enumerate(LAYERS) if name in names]
  assert found, f"limber_jax/{name} is in no layer: give it one in tests/test_structure.py"
  return found[0]


def own(path):
  return path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


@pytest.mark.parametrize("path", [f for f in FILES if f.is_relative_to(ROOT / "limber_jax")], ids=own)
def test_a_module_imports_only_from_lower_layers_and_its_own_package(path):
  me = part(own(path))
  for line, module in imports(path):
    if module.split(".")[0] == "limber_jax":
      other = part(module)
      beside = layer(me) == layer(other) and not any((ROOT / "limber_jax" / p).is_dir() for p in {me, other})
      assert me == other or layer(other) < layer(me) or beside, (
        f"{path.relative_to(ROOT)}:{line}: {me} is in layer {layer(me)} and imports {module} of layer {layer(other)}")


def test_no_modules_import_each_other_in_a_circle():
  graph = {own(f): {m for _, m in imports(f) if m.startswith("limber_jax")} for f in FILES
           if f.is_relative_to(ROOT / "limber_jax")}
  while leaves := [m for m, needs in graph.items() if not needs & (graph.keys() - {m})]:
    for module in leaves:
      del graph[module]
  assert not graph


@pytest.mark.smoke
def test_importing_the_losses_loads_jax_and_optax_and_no_more():
  script = """if True:
    import sys
    import jax, optax
    before = set(sys.modules)
    import limber_jax.losses
    print(*sorted({m if m.startswith("limber_jax") else m.split(".")[0] for m in set(sys.modules) - before}))
  """
  loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True).stdout
  assert set(loaded.split()) - set(sys.stdlib_module_names) <= {
    "limber_jax", "limber_jax.losses", "limber_jax.losses_engine", "limber_jax.errors"}


COMMANDS = sorted(f.stem for f in (ROOT / "limber_jax").glob("*.py") if 'if __name__ == "__main__":' in f.read_text())


def test_no_module_imports_a_command():
  commands = {f"limber_jax.{name}" for name in COMMANDS}
  assert {"limber_jax.train", "limber_jax.caption", "limber_jax.health"} <= commands
  for path in (f for f in FILES if f.is_relative_to(ROOT / "limber_jax")):
    for line, module in imports(path):
      assert module not in commands, f"{path.relative_to(ROOT)}:{line}: {module} is a command; what it calls lies below"


def test_importing_a_command_loads_nothing_that_takes_seconds():
  script = "if True:\n" + "\n".join(f"  import limber_jax.{name}" for name in ("losses", *COMMANDS)) + """
  import sys
  print(*sys.modules)
  """
  loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True
                          ).stdout.split()
  assert "limber_jax.evaluate" in loaded
  assert {"torch", "tensorflow", "tensorboardX", "matplotlib"}.isdisjoint(loaded)


# This list may only shrink.
LONG_FILES: dict[str, int] = {}  # lines they may have, of files not yet split


@pytest.mark.parametrize("path", [f for f in FILES if f.is_relative_to(ROOT / "limber_jax")], ids=own)
def test_a_file_has_at_most_400_lines_and_a_function_80(path):
  text, name = path.read_text(), path.relative_to(ROOT / "limber_jax").as_posix()
  assert len(text.splitlines()) <= LONG_FILES.get(name, 400), f"{name}: split it by meaning"
  assert name not in LONG_FILES or len(text.splitlines()) > 400, f"{name} is short enough: take it off LONG_FILES"
  functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
  assert [f"{n.name}: {n.end_lineno - n.lineno + 1} lines" for n in functions if n.end_lineno - n.lineno >= 80] == []


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_a_file_says_what_it_is_and_imports_nothing_forbidden(path):
  assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
  forbidden = {"tensorflow"}
  if not path.is_relative_to(ROOT / "tests"):  # where a pickle of our own making is what a worker process gets
    forbidden |= {"pickle", "cloudpickle", "dill", "joblib", "pytest"}
    if not path.is_relative_to(ROOT / "limber_jax/bench"):
      forbidden |= {"torch", "torchvision", "open_clip", "timm"}
  assert [f"{line}: {module}" for line, module in imports(path) if module.split(".")[0] in forbidden] == []


AT = {  # "@" that has nothing to do with maps
  "metrics/words.py": "the signs of WordNet's own files",
  "metrics/ptb.py": "addresses in regular expressions",
}


def at_signs(code):
  """Returns the lines of a module with a string, or a part of one, that begins or ends with the @ of a map's name.

  That is what takes a name apart or joins one: "@", "@name", f"{what}@{name}". Docstrings do not count, and "R@" is of
  recall.
  """
  tree = ast.parse(code)
  docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
  found = [(node.lineno, node.value) for node in ast.walk(tree)
           if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs]
  return [line for line, text in found if text.strip().startswith("@")
          or (text.endswith("@") and not text.endswith(("R@", "recall@")))]


def test_map_names_alone_joins_and_splits_names_at_the_at_sign():
  root = ROOT / "limber_jax"
  found = {f.relative_to(root).as_posix(): lines for f in root.rglob("*.py") if (lines := at_signs(f.read_text()))}
  assert found.pop("map_names.py")
  assert found.keys() == AT.keys(), "join and split by limber_jax.map_names; lines: " + str(found)


@pytest.mark.parametrize("code", (
  'part.partition("@")', 'part.split("@", 1)[0]', '"@" in part', 'name.removeprefix("@")', 'kind == "@blind"',
  'f"{kind}@{name}"', 'f"prompt@{name}"', 'kind + "@" + name', 'f"{label} @{name}"'))
def test_names_that_are_joined_or_split_by_hand_are_found(code):
  assert at_signs(code) == [1] and at_signs('def f():\n  """Returns "@name"."""\n  return f"R@{k}"') == []


TABLES = {name: table for name, table in vars(registry).items() if name.isupper()}


@pytest.mark.parametrize("target", [t for table in TABLES.values() for t in table.values()])
def test_a_registry_entry_leads_to_a_file_that_defines_it(target):
  module, attribute = target.split(":")
  base = ROOT.joinpath(*module.split("."))
  file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
  assert file.is_file(), f"{target}: no file {file}"
  tree = ast.parse(file.read_text())
  defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
  for node in tree.body:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    defined |= {t.id for t in targets if isinstance(t, ast.Name)}
  assert attribute in defined


def model_classes():
  """Returns the names of all classes that files of limber_jax/models define."""
  trees = [ast.parse(path.read_text()) for path in (PACKAGE / "models").glob("*.py")]
  return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def asks_for(tree, classes):
  """Returns the lines in which isinstance or issubclass asks for one of the classes, under whatever module's name."""
  calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
           and n.func.id in ("isinstance", "issubclass") and len(n.args) == 2]
  return [n.lineno for n in calls if classes & {
    x.attr if isinstance(x, ast.Attribute) else x.id for x in ast.walk(n.args[1])
    if isinstance(x, ast.Attribute | ast.Name)}]


@pytest.mark.parametrize("code", ["isinstance(x, ViT)", "isinstance(a.b, vit.ViT)", "issubclass(x, (int, vit.ViT))"])
def test_a_question_for_a_models_class_is_found(code):
  assert asks_for(ast.parse(code), {"ViT"}) == [1] and not asks_for(ast.parse(code), {"Other"})


def test_no_module_but_models_asks_what_class_a_model_is_of():
  classes = model_classes()
  assert {"ClipConfig", "EncoderConfig", "Limber"} <= classes
  found = [f"{path}:{line}" for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "models" not in path.parents
           for line in asks_for(ast.parse(path.read_text()), classes)]
  assert not found, found
