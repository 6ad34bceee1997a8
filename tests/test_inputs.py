"""The bytes of users' files: whatever is no regular file, or too large, is named at once and never read."""

import os
import socket
import stat

import jax
import pytest
import runs
import test_images
from PIL import Image

from limber_jax.config import Source, evaluation_of
from limber_jax.data import corpus, tokenizers
from limber_jax.data.sources import annotations, folder
from limber_jax.data.sources.captions import Captions
from limber_jax.data.sources.folder import Folder
from limber_jax.data.sources.jsonl import Jsonl
from limber_jax.errors import UserError
from limber_jax.evals import prompts
from limber_jax.evals.splits import named
from limber_jax.evals.zeroshot import ZeroShot
from limber_jax.inference import classifier, images, questions
from limber_jax.runtime import inputs, parallel
from limber_jax.training.setup import make_context, make_eval
from limber_jax.weights import configs, files

PIPE = "a named pipe, not a file"


@pytest.fixture
def strange(tmp_path):
  """Returns {what it is: path} of what must not be read."""
  os.mkfifo(tmp_path / "pipe")
  with socket.socket(socket.AF_UNIX) as one:
    one.bind(str(tmp_path / "socket"))
  (tmp_path / "folder").mkdir()
  (tmp_path / "link").symlink_to("pipe")
  (tmp_path / "circle").symlink_to("circle")
  return {PIPE: tmp_path / "pipe", "a socket, not a file": tmp_path / "socket",
          "a directory, not a file": tmp_path / "folder", "no such file": tmp_path / "none"}


def test_what_is_no_file_is_named_and_nothing_waits_for_it(strange, tmp_path):
  assert {what: inputs.what_is(str(path)) for what, path in strange.items()} == {what: what for what in strange}
  assert inputs.what_is(str(tmp_path / "link")) == PIPE
  assert inputs.what_is(str(tmp_path / "circle")) == "Too many levels of symbolic links"
  assert "null" in inputs.what_is(f"{tmp_path}/a\0b")
  for what, path in strange.items():
    for read in (inputs.opened, inputs.mapped, lambda path: inputs.read(path, inputs.IMAGE)):
      with pytest.raises(OSError) as caught:
        read(str(path))
      assert caught.value.strerror.lower().startswith(what[:12].lower())
  with pytest.raises(OSError, match="a device, not a file"):
    inputs.check_regular(stat.S_IFCHR | 0o666)
  (tmp_path / "empty").touch()
  assert inputs.what_is(str(tmp_path / "empty")) == "" and inputs.mapped(str(tmp_path / "empty")) == b""


def test_a_file_that_becomes_a_pipe_while_it_is_opened_is_named(strange, tmp_path, monkeypatch):
  (tmp_path / "file").write_bytes(b"x")
  before, looked = os.stat(tmp_path / "file"), os.stat
  monkeypatch.setattr(os, "stat", lambda path, **kw: before if path == str(tmp_path / "pipe") else looked(path, **kw))
  with pytest.raises(OSError, match=PIPE):
    inputs.opened(str(tmp_path / "pipe"))


def test_a_file_too_large_is_refused_by_its_size_alone(tmp_path):
  with open(tmp_path / "large", "wb") as file:
    file.truncate(5 << 30)  # a sparse one
  for kind in (inputs.IMAGE, inputs.ANNOTATIONS, inputs.LIST, inputs.TOKENIZER, inputs.CONFIG):
    with pytest.raises(UserError, match=rf"^{tmp_path}/large: {kind.what} of 5,368,709,120 bytes; at most "
                                        f"{kind.most:,} are read"):
      inputs.read(str(tmp_path / "large"), kind)


def test_names_in_data_stay_below_their_folder_and_links_count_as_what_they_lead_to(tmp_path):
  assert inputs.below("/a/b", "c/../d.jpg") == "/a/b/d.jpg" and inputs.below("/a/b", "..d.jpg") == "/a/b/..d.jpg"
  assert inputs.below("/a/b", "../c") is inputs.below("/a/b", "/a/bc/d") is inputs.below("/a/b", "/c") is None
  outside, inside = tmp_path / "outside.png", tmp_path / "data" / "class"
  inside.mkdir(parents=True)
  Image.new("RGB", (2, 2), "red").save(outside)
  (inside / "a.png").symlink_to(outside)
  (inside / "loop.png").symlink_to("loop.png")
  os.mkfifo(inside / "pipe.png")
  (inside / "piped.png").symlink_to(inside / "pipe.png")
  (tmp_path / "data" / "t.tsv").write_text("filepath\ttitle\nclass/a.png\tx\nclass/piped.png\ty\n../outside.png\tz\n")
  source, table = Folder(Source("folder", str(tmp_path / "data"), "")), Captions(
    Source("captions", str(tmp_path / "data" / "t.tsv")))
  names = [source.annotation(i)["id"] for i in range(len(source))]
  assert names == [f"class/{n}.png" for n in ("a", "loop", "pipe", "piped")]
  found = {}
  for name, read in (("folder", lambda: source[0]["image"]), ("table", lambda: table[0]["image"]),
                     ("classify", lambda: folder.read_image(str(inside / "a.png"))),
                     ("annotations", lambda: annotations.read_image(str(inside), "a.png", ()))):
    found[name] = read()
  assert set(found.values()) == {outside.read_bytes()}
  for read in (lambda: source[3], lambda: table[1], lambda: folder.read_image(str(inside / "piped.png")),
               lambda: annotations.read_image(str(inside), "piped.png", ())):
    with pytest.raises((UserError, OSError), match=PIPE):
      read()
  with pytest.raises(UserError, match="lies outside of"):
    table[2]
  with pytest.raises(UserError, match=r"loop\.png: cannot be read \(Too many levels"):
    source[1]
  assert images.attempt(folder.read_image, str(inside / "pipe.png")) == PIPE


def reads(path):
  """Returns, by name, what reads a file at `path` that a user may name."""
  return {
    "table": lambda: Captions(Source("captions", path)), "lines": lambda: Jsonl(Source("jsonl", path)),
    "annotations": lambda: annotations.load(path, "it"), "folder": lambda: Folder(Source("folder", path)),
    "templates": lambda: prompts.load_templates(path), "labels": lambda: classifier.read_labels([], path),
    "questions": lambda: questions.read_lines(path, "--questions", ("image",)), "weights": lambda: files.tensors(path),
    "captions": lambda: list(corpus.lines(path)), "image": lambda: folder.read_image(path),
    "configuration": lambda: configs.size_in(path), "clip": lambda: tokenizers.ClipTokenizer(path),
    "bpe": lambda: tokenizers.BpeTokenizer(path), "gpt2": lambda: tokenizers.Gpt2Tokenizer(path),
  }


@pytest.mark.parametrize("name", sorted(reads("")))
def test_every_reader_names_a_pipe(name, strange):
  with pytest.raises((UserError, OSError)) as caught:
    reads(str(strange[PIPE]))[name]()
  assert PIPE in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "train", "field"), [
  ("zeroshot", None, "source"), ("linear_probe", Source("digits", split="train"), "source"),
  ("linear_probe", Source("captions", "/nowhere.tsv"), "train")])
def test_data_that_an_evaluation_misses_are_named_by_its_own_field(name, train, field, tmp_path):
  here, missing = Source("digits", split="test"), Source("captions", "/nowhere.tsv")
  config = runs.tiny(evals={"held": evaluation_of(name)(
    source=here if field == "train" else missing, **{"train": train} if train else {})})
  s = test_images.made(config)
  s.mesh = parallel.make_mesh(vars(config.mesh), jax.devices()[:1])
  with pytest.raises(UserError, match=rf"^config\.evals\.held\.{field}\.path='/nowhere\.tsv': no such file") as caught:
    make_eval(s, "held", make_context(s, str(tmp_path)))
  assert "config.data.source" not in str(caught.value)


def test_a_folder_that_an_evaluation_misses_is_named_by_its_own_field_before_its_splits_are_known():
  with pytest.raises(UserError, match=r"^config\.evals\.held\.source\.path='/nowhere': no such file") as caught:
    named(ZeroShot(source=Source("folder", "/nowhere")), "held")
  assert "config.data.source" not in str(caught.value)
