"""What a data source is like: its records, formats, sizes and captions, and what cannot be read."""

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from limber_jax.data import checks, sources
from limber_jax.data.images import PLAIN, ImageOptions, sniff
from limber_jax.data.order import shuffled_index
from limber_jax.data.sources.packed import Packed
from limber_jax.data.transforms import decode
from limber_jax.errors import UserError
from limber_jax.runtime.atomic import atomic_write

SAMPLE = 10_000
COLUMNS, ROWS = 8, 6         # of the contact sheet
SIDE, LINES, GAP = 160, 3, 8  # pixels of an image, lines of its caption, pixels between


@dataclass(frozen=True)
class Look:
  """What one record is like; `reason` says why it cannot be read, "" if it can."""

  index: int
  id: str = ""
  reason: str = ""
  format: str = ""                  # JPEG | PNG | WEBP | pixels; "" = no image
  width: int = 0
  height: int = 0
  bytes: int = 0                    # of the encoded image
  turned: bool = False              # its EXIF orientation asks to turn it
  texts: tuple[str, ...] = ()
  small: Image.Image | None = None  # of those on the contact sheet


def look(source: sources.Source, index: int, keep: bool, images: ImageOptions = PLAIN) -> Look:
  """Returns what a record is like; with `keep` also its image, made small."""
  record: dict[str, Any] = {}
  try:
    record = source[index]
    texts = tuple(record.get("texts", (record["text"],)))
    if "image" not in record:
      return Look(index, record["id"], texts=texts)
    image = record["image"]
    pixels = decode(image, images)
    turn = None
    kind, size = "pixels", image.nbytes if isinstance(image, np.ndarray) else len(image)
    if isinstance(image, bytes):
      kind, turn = sniff(image)
    small = None
    if keep:
      small = Image.fromarray(pixels)
      scale = SIDE / max(small.size)  # an icon is enlarged, so that it can be seen
      small = small.resize([max(round(side * scale), 1) for side in small.size], Image.Resampling.BICUBIC)
    return Look(index, record["id"], "", kind, pixels.shape[1], pixels.shape[0], size, turn is not None, texts, small)
  except UserError as error:
    return Look(index, record.get("id", ""), str(error))


def inspect(source: sources.Source, sample: int = SAMPLE, images: ImageOptions = PLAIN
            ) -> tuple[dict[str, Any], list[Look]]:
  """Looks at a source.

  Args:
    source: the records.
    sample: how many of them, drawn at random but always the same; 0 = all.
    images: which image files are read, and which way up.

  Returns:
    Numbers as JSON has them; of sizes and lengths (least, median, greatest). And the looks for a contact sheet.
  """
  n = len(source)
  count = min(sample or n, n)
  indices = [shuffled_index(n, 0, i) for i in range(count)] if count < n else range(n)
  # Of the whole data spread over it, for neighbours often look alike; a sample comes in no order.
  shown = set(np.linspace(0, count - 1, min(count, COLUMNS * ROWS), dtype=int).tolist())
  kept: list[Look] = []
  reasons: Counter[str] = Counter()
  first: dict[str, str] = {}
  formats: Counter[str] = Counter()
  empty: list[tuple[str, int]] = []  # captions that say nothing, and their records
  turned = 0
  sizes: dict[str, list[int]] = {name: [] for name in ("width", "height", "bytes", "characters", "captions")}
  with ThreadPoolExecutor(8) as pool:
    for found in _in_pieces(pool, source, indices, shown, images):
      if found.reason:
        kind = _kind(found.reason)
        reasons[kind] += 1
        first.setdefault(kind, f"record {found.index}: {found.reason}")
        continue
      formats[found.format or "no image"] += 1
      if found.format:
        for name in ("width", "height", "bytes"):
          sizes[name].append(getattr(found, name))
      turned += found.turned
      empty += [(text, found.index) for text in checks.placeholders(found.texts)]
      sizes["captions"].append(len(found.texts))
      sizes["characters"] += map(len, found.texts)
      if found.small is not None:
        kept.append(found)
  opening = getattr(source, "damage", []) + (source.changed() if isinstance(source, Packed) else [])
  unreadable = sum(reasons.values())
  for entry in opening:
    kind = _kind(entry["reason"])
    reasons[kind] += 1
    first.setdefault(kind, "{file}: {id}: {reason}".format(**entry))
  summary = {"records": n, "looked_at": count, "classes": None if source.classes is None else len(source.classes),
          "formats": dict(formats.most_common()), "turned": turned, "notes": list(getattr(source, "notes", ())),
          "placeholders": {"count": len(empty), "first": empty[0] if empty else None},
          "unreadable": unreadable, "found_at_opening": len(opening),
          "damage": [{"reason": k, "count": c, "first": first[k]} for k, c in reasons.most_common()]}
  templates = getattr(source, "templates", None)
  return summary | {"templates": templates and len(templates)} | {
    name: _spread(values) for name, values in sizes.items()}, kept


def _in_pieces(pool: ThreadPoolExecutor, source: sources.Source, indices: Sequence[int], shown: set[int],
               images: ImageOptions) -> Iterator[Look]:
  """Yields looks in order; a thousand are under way at a time, whatever the number of records."""
  for start in range(0, len(indices), 1000):
    places = range(start, min(start + 1000, len(indices)))
    yield from pool.map(lambda place: look(source, indices[place], place in shown, images), places)


def _kind(reason: str) -> str:
  """Returns a reason without the names and numbers that are different each time: '…' and N stand in their places."""
  reason = re.sub(r"^\S*?[/.][^:]*: ", "", reason)  # where it is
  reason = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", reason)
  return re.sub(r"(?<![\w.,-])(?:0x[0-9a-f]+|\d(?:[\d,.]*\d)?)(?![\w])", "N", reason)  # but not of utf-8


def _spread(values: list[int]) -> list[float] | None:
  return [min(values), float(np.median(values)), max(values)] if values else None


def contact_sheet(looks: Sequence[Look], path: str) -> None:
  """Writes a picture of images with their captions; raises UserError if it cannot."""
  import matplotlib  # here, for its import takes longer than all the rest of the command

  font = ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 11)
  line = 14  # pixels
  cell = SIDE + GAP, SIDE + GAP + LINES * line + GAP
  rows = -(-len(looks) // COLUMNS)
  sheet = Image.new("RGB", (min(len(looks), COLUMNS) * cell[0] + GAP, rows * cell[1] + GAP), "white")
  draw = ImageDraw.Draw(sheet)
  for place, found in enumerate(looks):
    left, top = place % COLUMNS * cell[0] + GAP, place // COLUMNS * cell[1] + GAP
    sheet.paste(found.small, (left + (SIDE - found.small.width) // 2, top + SIDE - found.small.height))
    for row, text in enumerate(_wrapped(found.texts[0], font)):
      draw.text((left, top + SIDE + GAP // 2 + row * line), text, "black", font)
  with atomic_write(path, "wb", what=f"--out={path}") as file:
    sheet.save(file, "PNG")


def _wrapped(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
  """Returns a caption in at most LINES lines, each as wide as an image."""
  lines = [""]
  for word in " ".join(text[:500].split()).split(" "):
    longer = f"{lines[-1]} {word}".strip()
    if lines[-1] and font.getlength(longer) > SIDE:
      lines.append(word)
    else:
      lines[-1] = longer
  cut = len(lines) > LINES
  lines = lines[:LINES]
  for row in range(len(lines)):
    ends = "…" if cut and row == len(lines) - 1 else ""
    while font.getlength(lines[row] + ends) > SIDE:
      lines[row], ends = lines[row][:-1], "…"
    lines[row] += ends
  return lines


def lines(summary: dict[str, Any], name: str) -> Iterator[str]:
  """Yields what `inspect` found, for the terminal."""

  def of(key: str, unit: str) -> str:
    low, middle, high = summary[key]
    return f"{low:,} to {high:,} {unit}, median {middle:,.0f}"

  looked_at = summary["looked_at"]
  part = "" if looked_at == summary["records"] else f", {looked_at:,} looked at (--sample=0 for all)"
  yield f"{name}: {summary['records']:,} records{part}"
  yield "images      " + ", ".join(f"{count:,} {kind}" for kind, count in summary["formats"].items())
  if summary["turned"]:
    yield (f"turned      {summary['turned']:,} of them by their EXIF orientation, where --exif or config.data.exif "
           "heeds it")
  if summary["width"]:
    yield f"width       {of('width', 'pixels')}"
    yield f"height      {of('height', 'pixels')}"
    yield f"size        {of('bytes', 'bytes')}"
  if summary["characters"]:
    yield f"captions    {of('captions', 'a record')}"
    yield f"length      {of('characters', 'characters')}"
  if count := summary["placeholders"]["count"]:
    caption, record = summary["placeholders"]["first"]
    yield f"            {count:,} say nothing, such as {caption!r} (record {record})"
  for note in summary["notes"]:
    yield f"note        {note}"
  if summary["classes"]:
    yield f"classes     {summary['classes']:,}"
  if summary["templates"]:
    yield f"templates   {summary['templates']:,}"
  opening = f" and {summary['found_at_opening']:,} found at opening" if summary["found_at_opening"] else ""
  yield f"damage      {summary['unreadable']:,} of {summary['looked_at']:,} records{opening}"
  for entry in summary["damage"]:
    if entry["count"] == 1:
      yield f"         1  {entry['first'][:300]}"
      continue
    yield f"  {entry['count']:>8,}  {entry['reason'][:160]}"
    yield f"            first: {entry['first'][:300]}"
