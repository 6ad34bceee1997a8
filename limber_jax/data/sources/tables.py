"""How a table in a text file is laid out: its line ends, separator, columns, quotes, and where its rows start."""

import array
import csv
import itertools
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from limber_jax.data import text
from limber_jax.errors import UserError, did_you_mean

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")  # of paths of images
URL_KEYS = ("url", "image_url", "img_url", "imageurl", "image url", "link")
SEPARATORS = (",", ";", "|")  # of a first line without a tab, the likeliest first
QUOTING = ("", "none", "csv")
SAMPLE = 20  # rows that are looked at for what stands in which column

_WHOLE = re.compile(rb'"(?:[^"]|"")*"')  # a quoted field that ends on its line


@dataclass(frozen=True)
class Table:
  """A table's bytes, and how they are read."""

  data: mmap.mmap
  path: str
  begin: int          # of its first line
  end: bytes          # of a line: "\\n", also of "\\r\\n", or an old Mac's "\\r"
  separator: str
  spaced: bool = False  # a space follows every separator, and is none of the field

  def line(self, start: int) -> bytes:
    """Returns the line that starts at a byte, without its end."""
    stop = self.data.find(self.end, start)
    return self.data[start : stop if stop >= 0 else len(self.data)].rstrip(b"\r\n")

  def number(self, place: int) -> int:
    """Returns the number of the line that a byte is in, from 1 on."""
    step = 1 << 24
    return 1 + sum(self.data[i : min(i + step, place)].count(self.end) for i in range(0, place, step))

  def fields(self, line: bytes, quoted: bool, where: str) -> list[str]:
    """Returns the fields of a row; raises UserError, which begins with `where`, if it is none."""
    words = text.decode(line.rstrip(b"\r\n"), where, whole=False)
    if quoted:
      try:
        return next(csv.reader([words], delimiter=self.separator, skipinitialspace=self.spaced), [""])
      except csv.Error as error:
        raise UserError(f"{where}: {error}") from error
    found = words.split(self.separator)
    return [field.removeprefix(" ") for field in found] if self.spaced else found


def open_table(data: mmap.mmap, path: str, separator: str, keys: tuple[str, ...]) -> tuple[Table, list[str]]:
  """Returns a table, and the fields of its first line without the white space around them.

  Args:
    data: the file.
    path: of it.
    separator: a character; "" = a tab where the name ends in .tsv or the first line has one, else of comma, semicolon
      and bar the one between which most of the `keys` stand.
    keys: names of columns that may be there, in small letters.

  Raises:
    UserError: it is not UTF-8, or `separator` is none.
  """
  begin = text.check_encoding(data, path)
  end = b"\r" if data.find(b"\n") < 0 <= data.find(b"\r") else b"\n"
  first = Table(data, path, begin, end, separator).line(begin)
  given = separator.replace("\\t", "\t")

  def header(separator: str) -> list[str]:
    table = Table(data, path, begin, end, separator, spaced=True)
    return [field.strip() for field in table.fields(first, True, f"{path}, the first line")]

  if not given:
    tab = path.lower().endswith(".tsv") or b"\t" in first
    given = "\t" if tab else max(SEPARATORS, key=lambda s: sum(name.lower() in keys for name in header(s)))
  if len(given) != 1 or given in '"\r\n':
    raise UserError(f"config.data.source.separator={separator!r}: wanted one character")
  count = first.count(given.encode())
  spaced = given != "\t" and count > 0 and first.count(given.encode() + b" ") == count
  return Table(data, path, begin, end, given, spaced), header(given)


def column(header: list[str], name: str) -> str | None:
  """Returns the name in the header that is `name`, or `name` but for letter case; None if there is none."""
  return name if name in header else next((h for h in header if h.lower() == name.lower()), None)


def choose(header: list[str], wanted: str, known: tuple[str, ...]) -> tuple[str | None, list[str]]:
  """Returns (the column to take, all that could have been meant): `wanted`, or for "" the known ones in their order."""
  found = [c for name in ((wanted,) if wanted else known) if (c := column(header, name)) is not None]
  return next(iter(found), None), found


def choice(where: str, what: str, found: list[str], field: str) -> str:
  """Returns what is said of the column that was chosen, the first of several that could have been."""
  return (f"{where}: {what} are in column {found[0]!r}, not in {', '.join(map(repr, found[1:]))}; source.{field} names "
          "another")


def check_columns(table: Table, header: list[str], text_keys: tuple[str, ...]) -> None:
  """Raises UserError if a first line without a column of images names addresses."""
  url, words = choose(header, "", URL_KEYS)[0], choose(header, "", text_keys)[0]
  if url is not None and words is not None:
    kind = "tsv" if table.separator == "\t" else "csv"
    raise UserError(f"{table.path}: its column {url!r} holds addresses, and nothing is fetched during training; "
                    f"download the images first: img2dataset --url_list={table.path} --input_format={kind} "
                    f"--url_col={url} --caption_col={words}")


def check_order(table: Table, starts: np.ndarray) -> None:
  """Raises UserError if the first rows of a table without a header have the path first."""
  rows = [table.line(int(start)).split(b"\t") for start in starts[:SAMPLE]]
  shares = [np.mean([len(r) > i and r[i].strip().lower().endswith(tuple(s.encode() for s in SUFFIXES)) for r in rows])
            for i in (0, 1)]
  if shares[0] >= 0.9 and shares[1] <= 0.1:
    raise UserError(f"{table.path}: caption and path look swapped: without a header the path comes second, and here "
                    f"{rows[-1][0].decode(errors='replace')!r:.80} comes first; put a first line "
                    "'filepath<TAB>title' above")


def quoting(table: Table, header: list[str], wanted: str) -> tuple[bool, bool, str]:
  """Returns (whether fields are quoted as in CSV, whether that changes what is read, and why; "" if it is usual).

  A table whose separator is a tab has no quotes but those that it is certain to have: where all of its first line is
  quoted, where quotes are doubled as a CSV writer doubles them and none stands as no writer leaves it, or where it can
  be read in no other way. Any other table is CSV.

  Raises:
    UserError: both are possible and give different captions; `wanted` says which it is, "csv" or "none".
  """
  is_csv(wanted)
  first = table.line(table.begin)
  after = table.begin + len(first)
  starting = b"(?:" + re.escape(table.separator.encode()) + b"|[\r\n])" + b" *" * table.spaced + b'"'
  matters = re.compile(starting).search(table.data, after) is not None
  if wanted or table.separator != "\t":
    return wanted != "none", matters, ""
  if all(_WHOLE.fullmatch(field) for field in first.split(b"\t")):
    return True, matters, "its first line is quoted"
  if not matters:
    return False, False, ""
  found = _kinds(table, after)
  way = "say which with --config.data.source.quoting=csv or quoting=none"
  if "open" in found and _consistent(table, len(header)):
    return True, True, f"line {found['open']} opens a quoted field that a later line ends"
  if "doubled" in found:
    if against := found.get("open") or found.get("bare"):
      raise UserError(f"{table.path}: line {found['doubled']} has doubled quotes as a CSV writer leaves them, and line "
                      f"{against} a quote as none does; {way}")
    return True, True, f"line {found['doubled']} has doubled quotes as a CSV writer leaves them"
  if lone := found.get("open") or found.get("bare"):
    return False, True, f"line {lone} has a quote as no CSV writer leaves it"
  if "whole" in found:
    raise UserError(f"{table.path}, line {found['whole']}: a field in quotes, which a tab-separated table may mean "
                    f"either way; {way}")
  return False, False, ""


def is_csv(wanted: str) -> bool:
  """Returns whether the user says that fields are quoted as in CSV; raises UserError if it is no way to quote."""
  if wanted not in QUOTING:
    raise UserError(f"config.data.source.quoting={wanted!r}: choose one of {', '.join(QUOTING[1:])}, or leave it empty")
  return wanted == "csv"


def _kinds(table: Table, after: int) -> dict[str, int]:
  """Returns the number of the first line that has each kind of quote.

  doubled: a quoted field that ends on its line, with quotes in it, all doubled. whole: one without quotes in it. open:
  a field that begins with a quote and is none of these. bare: a quote in a field that does not begin with one.
  """
  found: dict[str, int] = {}
  data, place = table.data, after
  while len(found) < 4 and (place := data.find(b'"', place)) >= 0:
    start = data.rfind(table.end, 0, place) + 1
    line = table.line(start)
    for field in line.split(b"\t"):
      if b'"' in field and field != b'""':
        kind = "bare" if field[:1] != b'"' else "open" if not _WHOLE.fullmatch(field) else (
          "doubled" if b'""' in field[1:-1] else "whole")
        found.setdefault(kind, start)
    place = max(start + len(line), place + 1)
  return {kind: table.number(start) for kind, start in found.items()}


def _lines(table: Table, start: int) -> Iterator[tuple[int, str]]:
  """Yields (where it ends, a line, a byte a letter) from a byte on, as the module csv takes lines."""
  while start < len(table.data):
    stop = table.data.find(table.end, start)
    stop = len(table.data) if stop < 0 else stop + 1
    yield stop, table.data[start:stop].decode("latin-1").rstrip("\r\n").replace("\r", " ") + "\n"
    start = stop


def _rows(table: Table, strict: bool) -> Iterator[tuple[int, int, int, list[str]]]:
  """Yields (where it starts, where it ends, its lines, its fields) of each row of a quoted table, the first line too.

  Raises csv.Error.
  """
  position, start, before = table.begin, table.begin, 0

  def lines() -> Iterator[str]:
    nonlocal position
    for position, line in _lines(table, table.begin):  # noqa: B007 (where the last line ended is what is wanted)
      yield line

  reader = csv.reader(lines(), delimiter=table.separator.encode().decode("latin-1"), skipinitialspace=table.spaced,
                      strict=strict)
  for row in reader:
    if row:
      yield start, position, reader.line_num - before, row
    start, before = position, reader.line_num


def _consistent(table: Table, width: int) -> bool:
  """Returns whether a table with tabs is quoted without a flaw, and no quote holds what is a row by itself."""
  tabs = width - 1
  try:
    for start, stop, count, row in _rows(table, strict=True):
      if len(row) != width:
        return False
      inner = table.data[start:stop].rstrip(b"\r\n").split(table.end)[1:] if count > 1 else ()
      if any(line.count(b"\t") == tabs for line in inner):
        return False
  except csv.Error:
    return False
  return True


def quoted_starts(table: Table, width: int, image: int, certain: bool) -> np.ndarray:
  """Returns where rows start, int64 [rows], for a table whose quoted fields may hold line breaks.

  Args:
    table: with its first line.
    width, image: how many columns, and which holds the path.
    certain: the user said that it is quoted.

  Raises:
    UserError: a quote takes in rows that follow; the message names its line.
  """
  starts = array.array("q")
  start = stop = table.begin
  try:
    for start, stop, count, _ in _rows(table, strict=False):
      starts.append(start)
      if count > 1:
        _check_break(table, start, stop, width, image, certain)
    if len(starts):
      _check_break(table, start, stop, width, image, certain)
  except csv.Error as error:
    raise UserError(f"{table.path}, line {table.number(stop)}: {error}: perhaps a quote that never ends; "
                    "--config.data.source.quoting=none reads quotes as letters") from error
  return np.array(starts, np.int64)


def _check_break(table: Table, start: int, stop: int, width: int, image: int, certain: bool) -> None:
  """Raises UserError if a quote in the lines of a row is one that nothing ends, or takes in what are rows."""
  lines = [line for _, line in itertools.takewhile(lambda found: found[0] <= stop, _lines(table, start))]
  first = table.number(start)
  way = "end it, or read quotes as letters with --config.data.source.quoting=none"
  options = {"delimiter": table.separator.encode().decode("latin-1"), "skipinitialspace": table.spaced}
  try:
    list(csv.reader(lines, strict=True, **options))
  except csv.Error as error:
    if len(lines) > 1 or "end of data" in str(error):
      raise UserError(f"{table.path}, line {first}: a quote that nothing ends"
                      + f", which takes in the {len(lines) - 1:,} lines that follow" * (len(lines) > 1)
                      + f"; {way}") from None
  inner = [] if certain else [next(csv.reader([line.rstrip("\r\n")], **options), []) for line in lines[1:]]
  like = [len(row) == width for row in inner]
  paths = [len(row) == width and row[image].strip().lower().endswith(SUFFIXES) for row in inner]
  if any(paths) or (len(like) > 3 and all(like[:-1])) or (table.separator == "\t" and any(like)):
    raise UserError(f"{table.path}, line {first}: a quote takes in lines up to {first + len(lines) - 1} that are rows "
                    f"by themselves; {way}, or say that they are none with quoting=csv")


def line_starts(data: mmap.mmap, begin: int, end: bytes = b"\n") -> np.ndarray:
  """Returns where the lines of a file start, int64 [rows], from the byte `begin` on; empty lines are left out."""
  data = np.frombuffer(data, np.uint8)
  step = 1 << 26  # bytes looked at together
  breaks = [np.flatnonzero(data[i : i + step] == ord(end)) + i for i in range(0, len(data), step)]
  starts = np.concatenate([[begin], np.concatenate(breaks) + 1, [len(data) + 1]])
  length = np.diff(starts) - 1
  starts = starts[:-1]
  empty = (length <= 0) | ((length == 1) & (data[np.minimum(starts, len(data) - 1)] == ord("\r")))
  return starts[~empty]


def missing(table: Table, name: str, header: list[str], wanted: str) -> UserError:
  """Returns the error of a table without a column `name`, "" = without any that is known."""
  what = f"column {name!r}" if name else "known column name in the first line"
  return UserError(f"{table.path}: no {what}{did_you_mean(name, header)}; wanted {wanted}; name others with "
                   "--config.data.source.image_key=… and text_key=…")
