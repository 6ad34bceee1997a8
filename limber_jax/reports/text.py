"""Numbers and tables as Markdown has them."""

import math
import re
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from limber_jax.map_names import join, split
from limber_jax.reports.runs import SCORES, printable

NONE = "–"  # a metric that there is not


def number(value: float | None, digits: int = 1, times: int = 100) -> str:
  """Returns a metric times 100 with so many digits, half rounded up as it is written: 0.5485 -> "54.9"."""
  if value is None:
    return NONE
  if not math.isfinite(value := float(value)):
    return str(value)
  if abs(value) >= 1e9:
    return f"{value * times:.3g}"
  exact = (Decimal(repr(value)) * times).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
  return f"{exact + 0:f}"  # + 0: no minus before a zero


def percent(value: float | None, digits: int = 1) -> str:
  """Returns a published number, which is in percent already."""
  return number(value, digits, times=1)


def escape(text: Any) -> str:
  """Returns a text as one line of Markdown that shows it as it is, also inside a table."""
  return re.sub(r"([\\|`*\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", printable(str(text))).replace("<", "&lt;")


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]], numbers: int = 0) -> str:
  """Returns a table whose columns line up in the text too; the last `numbers` of them to the right."""
  cells = [[escape(cell) for cell in row] for row in (header, *rows)]
  widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
  right = [i >= len(header) - numbers for i in range(len(header))]

  def line(row):
    padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
    return f"| {' | '.join(padded)} |"

  rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
  return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


def name_of(metric: str) -> str:
  """Returns a metric's name as the papers have it: "cider_d/in" -> "CIDEr-D in"; "" of a metric that they have not."""
  whole, map_ = split(metric)
  parts = whole.split("/")
  for i, part in enumerate(parts):
    if m := re.fullmatch(r"(accuracy|truncated)_(\d+)shot(_sd)?", part):  # of evaluation "vqa"
      parts[i] = f"{m[2]}-shot" + ", truncated" * (m[1] == "truncated") + ", deviation" * bool(m[3])
    elif part in SCORES:
      parts[i] = SCORES[part]
    else:
      continue
    return join(" ".join(parts), map_)
  return ""


def shown(metric: str, value: float | None) -> str:
  """Returns a metric as it is printed: scores times 100, whole numbers whole, others with four digits."""
  if value is None or name_of(metric):
    return number(value, 2 if "shot" in metric else 1)
  if math.isfinite(value) and value == int(value):
    return f"{int(value):,}" if abs(value) < 1e15 else f"{float(value):.4g}"
  return f"{value:.4g}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
  """Returns {"source.name": "coco", …}: what is set, by its dotted name; of a long list the first three."""
  out = {}
  for key, value in values.items():
    if isinstance(value, dict):
      out |= flat(value, f"{prefix}{key}.")
    elif isinstance(value, list) and value:
      some = ", ".join(map(str, value if len(value) <= 6 else value[:3]))
      out[f"{prefix}{key}"] = some if len(value) <= 6 else f"{len(value)}: {some}, …"
    elif value not in ("", None, []):
      out[f"{prefix}{key}"] = str(value) if len(str(value)) <= 200 else f"{str(value)[:200]}…"
  return out
