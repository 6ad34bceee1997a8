"""A hook of MkDocs: lines of its own that become what the code says of itself.

`!!! registry EVALS evaluation` becomes the docstring of every class in that table of the registry, as it is written:
those of evaluations and data sources say in columns what each of their fields means, which Markdown would run together
into paragraphs. `!!! configuration` becomes what --help=config prints.
"""

import ast
import re
from pathlib import Path
from typing import Any

from limber_jax import help as help_lib

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
  """Returns the page with the docstrings that it asks for."""
  markdown = re.sub(r"^!!! registry (\w+) (\w+)$", lambda m: docstrings(m[1], m[2]), markdown, flags=re.MULTILINE)
  return re.sub(r"^!!! configuration$", lambda _: f"```text\n{help_lib.configuration()}\n```", markdown,
                flags=re.MULTILINE)


def docstrings(table: str, what: str) -> str:
  """Returns a heading and a docstring for each entry of a table; raises ValueError if there is no such table or class.

  Args:
    table: such as EVALS.
    what: its entries are, such as evaluation: headings of other tables may have the same names.
  """
  entries = [ast.literal_eval(node.value) for node in _parsed("limber_jax.registry").body
             if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == table]
  if not entries:
    raise ValueError(f"limber_jax/registry.py has no table {table}")
  return "\n\n".join(f"### {what.capitalize()} `{name}`\n\n```text\n{_docstring(*target.split(':'))}\n```"
                     for name, target in sorted(entries[0].items()))


def _docstring(module: str, name: str) -> str:
  found = [ast.get_docstring(n) for n in _parsed(module).body if isinstance(n, ast.ClassDef) and n.name == name]
  if not found or not found[0]:
    raise ValueError(f"{module}:{name}: no such class, or it has no docstring")
  return found[0]


def _parsed(module: str) -> ast.Module:
  return ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
