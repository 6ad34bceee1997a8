"""Tables as people really have them: quotes, separators, line ends, encodings, columns, and captions that are none."""

import csv
import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from limber_jax import config_json
from limber_jax.config import Data, Source, Tokenizer
from limber_jax.data import checks
from limber_jax.data import text as text_lib
from limber_jax.data.inspection import inspect, lines
from limber_jax.data.packing import pack
from limber_jax.data.pipeline import data_fingerprint
from limber_jax.data.sources.captions import Captions
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.errors import UserError
from limber_jax.evals.prompts import lines as list_lines
from limber_jax.inference.questions import read_lines
from limber_jax.training.loop import train
from tests import layouts
from tests.runs import tiny


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
  return Source(name, str(path), split="" if name == "coco" else "train").open()


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


# Captions that say nothing, and other choices, are reported

def test_placeholders_are_counted_by_inspect_pack_and_a_runs_start_and_none_is_dropped(tmp_path):
  words = ("nan", "None", "NA", "null", "N/A", " NaN ", "#N/A")
  for i in range(40):
    (tmp_path / f"{i}.png").write_bytes(png(i))
  source = table(tmp_path, "filepath,title\n" + "".join(
    f"{i}.png,{words[i] if i < len(words) else f'none of {i}'}\n" for i in range(40)), "t.csv")
  assert len(texts(source)) == 40 and not flaws(source)
  assert checks.look(source) == "7 of 40 captions looked at say nothing, such as 'nan'; they are kept"
  found, _ = inspect(source)
  assert found["placeholders"] == {"count": 7, "first": ("nan", 0)} and not found["damage"]
  assert "            7 say nothing, such as 'nan' (record 0)" in list(lines(found, "t"))
  said = []
  manifest = pack(Source("captions", str(tmp_path / "t.csv")), str(tmp_path / "out"), log=said.append)
  assert manifest["placeholders"] == 7 and manifest["records"] == 40 and manifest["dropped"] == 0
  assert "captions that say nothing: 7, such as 'nan'; they are kept" in said


def test_of_large_data_a_spread_sample_is_looked_at():
  class Many:
    def __len__(self):
      return 10**9

    def annotation(self, index):
      return {"text": "nan" if index >= 5 * 10**8 else "a dog"}

  assert checks.look(Many()).startswith("5,000 of 10,000 captions looked at say nothing")


def test_inspect_tells_stray_quotes_empty_captions_and_choices(tmp_path):
  for i in range(4):
    (tmp_path / f"{i}.png").write_bytes(png(i))
  found, _ = inspect(table(tmp_path, 'filepath\ttitle\tcaption\n0.png\tx\t"a\n1.png\tx\tb\n2.png\tx\t\n3.png\tx\tb\n'))
  assert found["records"] == 4 and found["unreadable"] == 1 and "empty caption" in found["damage"][0]["reason"]
  said = [line for line in lines(found, "t") if line.startswith("note ")]
  assert len(said) == 2 and "'caption', not in 'title'" in said[0] and "quotes are letters, for line 2" in said[1]


@pytest.mark.parametrize("name", ["jsonl", "parquet", "huggingface"])
def test_of_several_columns_of_captions_it_is_said_which_was_taken_in_other_sources_too(tmp_path, name):
  rows = [{"image": "a.png", "title": "IMG_1.jpg", "caption": "a dog"}] * 2
  if name == "jsonl":
    (tmp_path / "t").write_text("".join(json.dumps(r) + "\n" for r in rows))
  elif name == "parquet":
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t")
  else:
    layouts.write_saved(tmp_path / "t", RECORDS)
    data = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "t" / "data-00000-of-00001.arrow"), "wb") as file, pa.ipc.new_stream(
        file, data.schema) as out:
      out.write_table(data)
  source = opened(name, tmp_path / "t")
  assert texts(source) == ["a dog"] * 2
  [note] = source.notes
  assert "captions are in column 'caption', not in 'title'; source.text_key names another" in note


# Too few for a batch

def test_a_run_on_fewer_records_than_a_batch_is_refused_and_an_option_allows_it(tmp_path):
  config = tiny(steps=3, data=Data(source=Source("captions", str(tmp_path / "t.tsv")), tokenizer=Tokenizer("bytes")))
  for i in range(15):
    (tmp_path / f"{i}.png").write_bytes(png(i))
  source = table(tmp_path, "filepath\ttitle\n" + "".join(f"{i}.png\tthing {i}\n" for i in range(15)))
  with pytest.raises(UserError, match=r"the data have 15 records, of which a batch wants 16.*data\.repeat") as caught:
    train(config, str(tmp_path / "run"), log=lambda _: None)
  assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
  old = data_fingerprint(source, ByteTokenizer(), config.data, 16, 0)
  config.data.repeat = True
  checks.check_enough(source, config)
  assert data_fingerprint(source, ByteTokenizer(), config.data, 16, 0) == old
  config_json.check_same(config, config_json.to_json(dataclasses.replace(config, data=dataclasses.replace(
    config.data, repeat=False))), "run")


def test_a_member_of_a_mixture_needs_its_share_of_a_batch(tmp_path):
  digits = {"name": "digits", "weight": 1}
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 7)
  (tmp_path / "mix.json").write_text(json.dumps({"sources": [digits, digits | {"name": "jsonl", "path": "a.jsonl"}]}))
  mixture = Source("mixture", str(tmp_path / "mix.json")).open()
  checks.check_enough(mixture, tiny(batch_size=14))
  with pytest.raises(UserError, match="source 1 of the mixture has 7 records, of which a batch wants 8"):
    checks.check_enough(mixture, tiny(batch_size=16))


# Other files of text

@pytest.mark.parametrize(("data", "message"), [
  ('[{"image": "a.png", "caption": "x"}]', "one JSON array, wanted an object a line.*jq -c"),
  ('[\n {"image": "a.png",\n "caption": "x"}\n]\n', "one JSON array"),
  ('{\n "image": "a.png",\n "caption": "x"\n}\n', "objects over several lines each"),
  ('{"image": "a.png", "caption": "x"}\n'.encode("utf-16"), "UTF-16, wanted UTF-8"),
])
def test_json_that_is_no_lines_is_named_for_what_it_is(tmp_path, data, message):
  (tmp_path / "a.jsonl").write_bytes(data if isinstance(data, bytes) else data.encode())
  with pytest.raises(UserError, match=rf"a\.jsonl: {message}") as caught:
    opened("jsonl", tmp_path / "a.jsonl")
  assert "\n" not in str(caught.value)


def test_questions_and_lists_may_begin_with_a_byte_order_mark_and_other_encodings_are_named(tmp_path):
  line = json.dumps({"image": "a.png", "question": "what?"})
  path = tmp_path / "q"
  path.write_text("\ufeff" + line)
  assert read_lines(str(path), "--questions", ("question",))[0]["question"] == "what?"
  path.write_text("\ufeffone\rtwo\r")
  assert list_lines(str(path), "--labels_file") == ["one", "two"]
  path.write_text(f"[{line}]")
  with pytest.raises(UserError, match="one JSON array"):
    read_lines(str(path), "--questions", ("question",))
  path.write_bytes(line.encode("utf-16"))
  for read in (lambda: read_lines(str(path), "--questions", ()), lambda: list_lines(str(path), "--labels_file")):
    with pytest.raises(UserError, match="UTF-16, wanted UTF-8"):
      read()


def test_a_table_without_a_header_has_quotes_where_it_is_said_and_a_stray_one_is_a_letter(tmp_path):
  text = '"a ""big"" dog"\t0.png\na cat\t1.png\n"two\nlines"\t2.png\n'
  assert texts(table(tmp_path, text, quoting="csv")) == ['a "big" dog', "a cat", "two\nlines"]
  assert texts(table(tmp_path, '"stray dog\t0.png\na cat\t1.png\n')) == ['"stray dog', "a cat"]
  with pytest.raises(UserError, match="quoting='cvs': choose one of none, csv"):
    table(tmp_path, text, quoting="cvs")


def test_lines_that_a_quote_of_a_comma_table_takes_in_are_reported(tmp_path):
  source = table(tmp_path, 'filepath,title\nx/0,"stray dog\nx/1,a cat\nx/2,bird"\nx/3,x\n', name="t.csv")
  assert len(source) == 2
  assert source.notes == ["t.csv: 2 lines are taken for parts of a quoted field, the first line 3; "
                          "source.quoting=none reads quotes as letters"]
