"""Tables as people really have them: quotes, separators, line ends, encodings, columns, and captions that are none."""

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image

from limber_jax import registry
from limber_jax.config import Source
from limber_jax.data import text as text_lib
from limber_jax.data.sources.captions import Captions
from limber_jax.errors import UserError
from limber_jax.pack import pack
from tests import layouts


def png(value=0):
  out = io.BytesIO()
  Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(out, "PNG")
  return out.getvalue()


def table(folder, data, name="t.tsv", **fields):
  (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
  return Captions(Source("captions", str(folder / name), **fields))


def texts(source):
  return [source.annotation(i)["text"] for i in range(len(source))]


def flaws(source):
  """Returns {row: why} of the rows that cannot be read."""
  out = {}
  for i in range(len(source)):
    try:
      source.annotation(i)
    except UserError as error:
      assert "\n" not in str(error)
      out[i] = str(error)
  return out


def written(rows, dialect=csv.excel_tab, **options):
  """Returns a table as the module csv writes it, and with it pandas' to_csv."""
  out = io.StringIO()
  csv.writer(out, dialect, lineterminator="\n", **options).writerows([("filepath", "title"), *rows])
  return out.getvalue()


# Quotes

def test_stray_quotes_in_a_table_with_tabs_are_letters_and_no_row_is_lost(tmp_path):
  rows = [f"{chr(34) * (i in (3, 30))}thing {i}" for i in range(40)]
  source = table(tmp_path, "filepath\ttitle\n" + "".join(f"{i}.png\t{t}\n" for i, t in enumerate(rows)))
  assert texts(source) == rows and len(source.notes) == 1 and "quotes are letters, for line 5 has a" in source.notes[0]
  neat = [t.replace("thing 30", "thing") + '"' * (i == 30) for i, t in enumerate(rows)]  # a pair that CSV would take
  source = table(tmp_path, "filepath\ttitle\n" + "".join(f"{i}.png\t{t}\n" for i, t in enumerate(neat)))
  assert texts(source) == neat


def test_what_a_csv_writer_writes_with_tabs_is_read_back_to_the_letter(tmp_path):
  captions = ['a "b" c', '"all of it"', "plain", "it's", '"', "two\nlines", "x\ty", 'end"', '""']
  for keep in (captions, [c for c in captions if "\n" not in c], captions[:1]):
    rows = [(f"{i}.png", c) for i, c in enumerate(keep)]
    source = table(tmp_path, written(rows))
    assert texts(source) == keep and "quoted as in CSV" in source.notes[0]
    assert texts(table(tmp_path, written(rows, quoting=csv.QUOTE_ALL))) == keep
  unquoted = table(tmp_path, written([("a.png", "plain")]))
  assert texts(unquoted) == ["plain"] and not unquoted.notes


def test_what_may_be_read_either_way_is_asked_and_the_answer_is_followed(tmp_path):
  data = 'filepath\ttitle\na.png\tone\nb.png\t"two"\n'
  with pytest.raises(UserError, match=r"t\.tsv, line 3: a field in quotes.*quoting=csv or quoting=none") as caught:
    table(tmp_path, data)
  assert "\n" not in str(caught.value)
  assert texts(table(tmp_path, data, quoting="csv")) == ["one", "two"]
  assert texts(table(tmp_path, data, quoting="none")) == ["one", '"two"']
  assert texts(table(tmp_path, data + 'c.png\ta "b"\n')) == ["one", '"two"', 'a "b"']  # which no writer leaves so
  assert texts(table(tmp_path, '"filepath"\t"title"\nb.png\t"two"\n')) == ["two"]
  mixed = data + 'c.png\t"a ""b"""\nd.png\t"e\n'
  with pytest.raises(UserError, match=r"line 4 has doubled quotes .* and line 5 a quote as none does"):
    table(tmp_path, mixed)
  with pytest.raises(UserError, match=r"quoting='CSV': choose one of none, csv"):
    table(tmp_path, data, quoting="CSV")


def test_a_table_that_was_read_as_csv_has_the_same_fingerprint_where_it_is_said_to_be(tmp_path):
  data = 'filepath\ttitle\na.png\tone\nb.png\t"two"\n'
  read = [table(tmp_path, data, quoting=q).fingerprint() for q in ("csv", "none")]
  assert read[0] == "b64157aeb9076f60" != read[1]  # as of 81b353f


@pytest.mark.parametrize(("rows", "line"), [
  ((3,), 5), ((3, 30), 5), ((39,), 41), ((3, 4), 5),
])
def test_a_quote_that_takes_in_rows_of_a_comma_table_is_refused_with_its_line(tmp_path, rows, line):
  data = "filepath,title\n" + "".join(f"{i}.png,{chr(34) * (i in rows)}thing {i}\n" for i in range(40))
  with pytest.raises(UserError, match=rf"t\.csv, line {line}: a quote .*quoting=none") as caught:
    table(tmp_path, data, "t.csv")
  assert "\n" not in str(caught.value)
  assert len(texts(table(tmp_path, data, "t.csv", quoting="none"))) == 40


def test_a_pair_of_quotes_around_whole_rows_is_refused_and_lines_of_a_caption_are_not(tmp_path):
  data = 'filepath,title\n0.png,"thing 0\n1.png,thing 1\n2.png,thing 2"\n3.png,x\n'
  with pytest.raises(UserError, match=r"line 2: a quote takes in lines up to 4 that are rows by themselves"):
    table(tmp_path, data, "t.csv")
  assert len(table(tmp_path, data, "t.csv", quoting="csv")) == 2
  caption = "Red, blue\nand green, too\n\nand more"
  assert texts(table(tmp_path, written([("a.png", caption), ("b.png", "x")], csv.excel), "t.csv")) == [caption, "x"]


def test_a_line_break_in_a_field_without_quotes_is_named(tmp_path):
  source = table(tmp_path, "filepath\ttitle\na.png\ttwo\nlines\nb.png\tx\n")
  assert list(flaws(source)) == [1] and "row 2: wanted 2 columns, got 1; a line break in a field? (line 3)" in flaws(
    source)[1]


# Layouts

@pytest.mark.parametrize(("data", "name"), [
  ("filepath;title\na.png;x, y\nb.png;z\n", "t.csv"), ("filepath|title\na.png|x, y\nb.png|z\n", "t.csv"),
  ('Image,Caption\na.png,"x, y"\nb.png,z\n', "t.csv"), ("FILEPATH\tTITLE\na.png\tx, y\nb.png\tz\n", "t.tsv"),
  ('filepath, title\na.png, "x, y"\nb.png, z\n', "t.csv"), ("filepath , title\ra.png,z\r", "t.csv"),
  ("filepath,title\ra.png,z\r", "t.csv"), ('filepath,title\r"a.png","z"', "t.csv"), ("z\ta.png\rz\tb.png\r", "t.tsv"),
  ("\ufefffilepath,title\r\na.png,z\r\n", "t.csv"), ("\ufeffz\ta.png\n", "t.tsv"),
])
def test_other_separators_capitals_spaces_and_line_ends_are_read(tmp_path, data, name):
  for file in ("a.png", "b.png"):
    (tmp_path / file).write_bytes(png())
  source = table(tmp_path, data.encode(), name)
  assert texts(source)[-1] == "z" and source[0]["image"] == png() and not source.notes
  assert texts(source)[0] in ("x, y", "z")


@pytest.mark.parametrize(("data", "message"), [
  ("filepath,title\na.png,x\n".encode("utf-16"), r"t\.csv: UTF-16, wanted UTF-8; convert it: iconv -f UTF-16 "),
  ("filepath,title\na.png,x\n".encode("utf-16-le"), "UTF-16LE, wanted"),
  ("filepath,title\na.png,x\n".encode("utf-16-be"), "UTF-16BE, wanted"),
  ("filepath,title\na.png,x\n".encode("utf-32"), "UTF-32, wanted"),
  ("filepath,title\na.png,x\n".encode("utf-32-le"), "UTF-32LE, wanted"),
  ("filepath,Übers\na.png,x\n".encode("latin-1"), "the first line, byte 9 of 14: not UTF-8 .*Windows-1252"),
  (b"caption\turl\nx\thttps://example.com/a\n", "column 'url' holds addresses.* img2dataset .*--input_format=tsv"),
  (b"URL,TEXT\nhttps://example.com/a,x\n", "--url_col=URL --caption_col=TEXT"),
  (b"a.png\ta dog\nb.png\ta cat\n", "caption and path look swapped.*'b.png' comes first"),
])
def test_what_another_file_is_stands_in_one_line(tmp_path, data, message):
  with pytest.raises(UserError, match=message) as caught:
    table(tmp_path, data, "t.csv")
  assert "\n" not in str(caught.value)


def test_a_row_in_latin_1_is_named_with_what_it_is(tmp_path):
  source = table(tmp_path, "filepath,title\na.png,x\nb.png,café\n".encode("latin-1"), "t.csv")
  assert "row 2, byte 9 of 10: not UTF-8" in flaws(source)[1] and "Latin-1" in flaws(source)[1]


def test_a_caption_is_taken_before_a_title_and_it_is_said(tmp_path):
  source = table(tmp_path, "filepath,title,caption\na.png,IMG_1.jpg,a dog\n", "t.csv")
  assert texts(source) == ["a dog"]
  assert source.notes == ["t.csv: captions are in column 'caption', not in 'title'; source.text_key names another"]
  source = table(tmp_path, "filepath,title,caption\na.png,IMG_1.jpg,a dog\n", "t.csv", text_key="Title")
  assert texts(source) == ["IMG_1.jpg"] and not source.notes


# Captions that are none, the same in every source

NONE = ("", "   ", "\0", "\ufeff", "\x07 ")
RECORDS = layouts.digits(3)


def write(name, folder, caption):
  """Writes two records, the second with this caption, as the source `name` reads them; returns where."""
  records = [RECORDS[0], RECORDS[1] | {"text": caption}]
  match name:
    case "captions":
      (folder / "t.tsv").write_text("filepath\ttitle\n" + "".join(f"{r['key']}.png\t{r['text']}\n" for r in records))
      for r in records:
        (folder / f"{r['key']}.png").write_bytes(r["image"])
      return folder / "t.tsv"
    case "webdataset":
      return layouts.write_webdataset(folder / "t", records, suffix="png")
    case "parquet":
      return layouts.write_img2dataset_parquet(folder / "p", records)
    case "huggingface":
      return layouts.write_saved(folder / "h", records)
    case "jsonl":
      return layouts.write_jsonl(folder / "j", records)
    case "packed":
      write("jsonl", folder, caption)
      pack(Source("jsonl", str(folder / "j" / "train.jsonl")), str(folder / "out"), damaged=1.0, log=lambda _: None)
      return folder / "out"
    case "coco":
      images = [{"id": i, "file_name": f"{i}.png"} for i in range(2)]
      notes = [{"id": i, "image_id": i, "caption": r["text"]} for i, r in enumerate(records)]
      for i, r in enumerate(records):
        (folder / f"{i}.png").write_bytes(r["image"])
      (folder / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
      return folder / "c.json"
  raise AssertionError(name)


SOURCES = ("captions", "webdataset", "parquet", "huggingface", "jsonl", "packed", "coco")


def opened(name, path):
  source = registry.lookup("data source", registry.SOURCES, name)
  return source(Source(name, str(path), split="" if name == "coco" else "train"))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("caption", NONE)
def test_an_empty_caption_is_a_bad_record_in_every_source(tmp_path, name, caption):
  source = opened(name, write(name, tmp_path, caption))
  good = [i for i in range(len(source)) if i not in flaws(source)]
  assert [source[i]["text"] for i in good] == [RECORDS[0]["text"]]
  named = [*flaws(source).values(), *(d["reason"] for d in getattr(source, "damage", []))]
  assert named if name != "packed" else not named  # pack has named it in dropped.jsonl
  assert all("empty caption" in n or "no caption that can be used" in n for n in named)


@pytest.mark.parametrize("name", SOURCES)
def test_control_characters_and_byte_order_marks_are_taken_out_of_captions_in_every_source(tmp_path, name):
  source = opened(name, write(name, tmp_path, "\ufeffa\0 b\x07\x1b[0m\x0bc\x85d é漢🐕"))
  assert texts(source)[1] == "a b[0m c d é漢🐕"


def test_cleaning_leaves_every_other_text_as_it_is():
  rng = np.random.default_rng(0)
  for _ in range(300):
    text = "".join(chr(c) for c in rng.integers(32, 0x3000, 20) if not 0x7f <= c < 0xa0)
    assert text_lib.clean(text) == text
  assert text_lib.clean("a\tb\r\nc") == "a\tb\r\nc"
  assert text_lib.clean("".join(map(chr, range(0x20)))).split() == []


def test_a_fingerprint_changes_with_what_is_read_and_only_then(tmp_path):
  plain, cleaned = "filepath,title\na.png,x\n", "filepath,title\na.png,\x07\n"
  assert table(tmp_path, plain, "t.csv").fingerprint() == "4abb726fe0b5813a"  # as of 81b353f
  assert len(plain) == len(cleaned)
  assert table(tmp_path, cleaned, "t.csv").fingerprint() != table(tmp_path, plain, "t.csv").fingerprint()
