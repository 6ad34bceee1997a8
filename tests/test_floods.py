"""Files that would hang or flood a command: each in a process of 2 GB and 20 s, named, refused or replaced.

The limits are on memory that a process may write to (what JAX maps to read, and reserves, does not count) and on its
processor time; a wait shows at the wall clock, which has room for a busy machine.
"""

import gzip
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from PIL import Image

from limber_jax.config import Compute
from limber_jax.models import clip
from limber_jax.models.text import TextSize
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.weights import export
from tests import test_images, test_vocabularies

MEMORY, SECONDS, WALL = 2 << 30, 20, 300

pytestmark = pytest.mark.long


def start(*command, warm=False):
  """Returns what a command printed and its exit code, under the limits; to `warm` the cache of programs, without."""
  env = runs.environment() | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
  limits = "" if warm else f"ulimit -d {MEMORY >> 10} -t {SECONDS}; "
  done = subprocess.run(["bash", "-c", f'{limits}exec "$@"', "bash", sys.executable, *command], capture_output=True,
                        text=True, check=False, env=env, timeout=WALL)
  print(done.stdout[-2000:], done.stderr[-3000:])
  assert done.returncode >= 0, f"killed by signal {-done.returncode}"
  assert "Traceback" not in done.stderr and "MemoryError" not in done.stderr
  return done


def large(path):
  with open(path, "wb") as file:
    file.truncate(5 << 30)


def nothing_but_segments():
  """Returns a JPEG of 19 MB, nearly all of it empty segments."""
  data = test_images.saved(Image.new("RGB", (8, 8)), "JPEG")
  return data[:2] + b"\xff\xfe\0\2" * 4_700_000 + data[2:]


BAD = ("scans.jpg", "segments.jpg", "pipe.jpg", "link.jpg", "large.jpg", "far.jpg", "socket.jpg", "circle.jpg",
       "folder.jpg")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder of two classes with 24 good images, and with what is in BAD."""
  root = tmp_path_factory.mktemp("photos")
  for name in ("cat", "dog"):
    (root / name).mkdir()
    runs.pictures(root / name, 12)
  here = root / "dog"
  (here / "scans.jpg").write_bytes(test_images.scans(6500, 4800, 2000, Image.new("RGB", (6500, 4800), "red")))
  (here / "segments.jpg").write_bytes(nothing_but_segments())
  os.mkfifo(here / "pipe.jpg")
  (here / "link.jpg").symlink_to("pipe.jpg")
  large(here / "large.jpg")
  large(root / "outside")
  (here / "far.jpg").symlink_to(root / "outside")
  with socket.socket(socket.AF_UNIX) as one:
    one.bind(str(here / "socket.jpg"))
  (here / "circle.jpg").symlink_to("circle.jpg")
  (here / "folder.jpg").mkdir()
  return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """The directory of a tiny CLIP whose text tower reads bytes."""
  size = clip.SIZES["clip_vit_b32_mu"]()
  size.text = TextSize(context=32, vocab=259, width=64, layers=2, heads=2)
  shapes = jax.eval_shape(Contrastive(clip.build(size, Compute()), "softmax", 0, 1, ()).init, jax.random.key(0))[0]
  params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32) / 9, shapes)
  export.save(path := str(tmp_path_factory.mktemp("weights")), "hf", size, params, {})
  return path


@pytest.mark.process
def test_classify_names_each(photos, weights):
  paths = [str(photos), *(str(photos / "dog" / name) for name in BAD[:-1])]
  done = start("-m", "limber_jax.classify", f"--weights={weights}", "--labels=cat,dog", "--tokenizer=bytes", "--json",
               *paths)
  assert done.returncode == 1 and len(done.stdout.splitlines()) == 24
  for name in BAD[:-1]:
    assert done.stderr.count(f"/dog/{name}: ") == 2, name
  for reason in ("JPEG file of more than 32 scans", "JPEG file of more than 100,000 segments",
                 "a named pipe, not a file", "image of 5,368,709,120 bytes; at most 20,000,000 are read",
                 "a socket, not a file", "symbolic links"):
    assert reason in done.stderr, reason


@pytest.mark.process
def test_caption_names_each(photos, tmp_path):
  runs.untrained(runs.tiny_limber(), str(tmp_path))
  command = ("-m", "limber_jax.caption", f"--workdir={tmp_path}", "--json", "--batch_size=8")
  start(*command, str(photos / "cat"), warm=True)
  done = start(*command, str(photos))
  assert done.returncode == 1 and len(done.stdout.splitlines()) == 24
  assert all(done.stderr.count(f"/dog/{name}: ") == 1 for name in BAD[:-1])


@pytest.mark.process
def test_training_replaces_each_and_names_it(photos, tmp_path):
  command = ("-m", "limber_jax.train", "--config=experiments/quickstart.py", "--config.data.source.name=folder",
             f"--config.data.source.path={photos}", "--config.data.max_bad_fraction=0.5", "--config.batch_size=16",
             "--config.optim.warmup_steps=1")
  start(*command, "--config.data.source.name=digits", "--config.data.source.path=", "--config.steps=6",
        f"--workdir={tmp_path}/warm", warm=True)
  done = start(*command, "--config.data.source.split=", "--config.steps=6", f"--workdir={tmp_path}/run")
  assert done.returncode == 0
  lines = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
  named = {line["id"] for line in lines}
  assert {f"dog/{name}" for name in BAD[:-1]} <= named, named


TABLES = {
  "table": ("captions", "t.tsv", "filepath\ttitle\n{}\ta dog\n"),
  "lines": ("jsonl", "t.jsonl", '{{"image": "{}", "caption": "a dog"}}\n'),
}


@pytest.mark.process
@pytest.mark.parametrize("kind", TABLES)
def test_inspect_names_each_image_of_a_table(kind, photos):
  source, name, row = TABLES[kind]
  rows = [row.format(f"dog/{bad}") for bad in (*BAD, "00.png")]
  head = row.splitlines()[0] + "\n" if kind == "table" else ""
  (photos / name).write_text(head + "".join(r.removeprefix(head) for r in rows))
  done = start("-m", "limber_jax.inspect", str(photos / name), f"--source={source}", "--json", "--out=")
  assert json.loads(done.stdout)["unreadable"] == len(BAD)


@pytest.mark.process
@pytest.mark.parametrize("name", ["pipe.jpg", "large.jpg", "socket.jpg", "folder.jpg"])
@pytest.mark.parametrize("flag", ["--weights", "--labels_file", "--templates", "--tokenizer_path", "--model"])
def test_every_flag_that_names_a_file_refuses_what_is_none(name, flag, photos, weights):
  given = {"--weights": weights, "--labels": "a,b", "--tokenizer": "clip" if flag == "--tokenizer_path" else "bytes"}
  given |= {flag: str(photos / "dog" / name)}
  done = start("-m", "limber_jax.classify", *(f"{k}={v}" for k, v in given.items()), str(photos / "cat" / "00.png"))
  assert done.returncode == 2 and done.stderr.count("\n") == 1 and str(photos / "dog" / name) in done.stderr


VOCABULARIES = {
  "a normalizer that grows texts": {"normalizer": test_vocabularies.GROWING},
  "a regular expression that explodes": {"pre_tokenizer": test_vocabularies.EXPLODING},
  "padding to 1e8": {"padding": test_vocabularies.PADDING},
  "truncation": {"truncation": test_vocabularies.CUTTING},
}
TOKENIZE = """if True:
  import sys
  from limber_jax.config import Tokenizer
  from limber_jax.data import tokenizers
  from limber_jax.errors import UserError
  try:
    found = tokenizers.load(Tokenizer(sys.argv[1], sys.argv[2]))("a" * 5000 + " dog", 77)
  except UserError as error:
    print("refused:", error)
  else:
    print("read:", found.shape)
"""


@pytest.mark.process
@pytest.mark.parametrize("flaw", VOCABULARIES)
def test_a_hostile_tokenizer_is_refused_or_its_rules_have_no_effect(flaw, tmp_path):
  from limber_jax.data.tokenizers import BpeTokenizer
  BpeTokenizer.train(["a red dog", "two blue cats"] * 4, 290, str(tmp_path))
  values = json.loads((tmp_path / "tokenizer.json").read_text()) | VOCABULARIES[flaw]
  (tmp_path / "tokenizer.json").write_text(json.dumps(values))
  done = start("-c", TOKENIZE, "bpe", str(tmp_path))
  told = f"refused: {tmp_path}/tokenizer.json: its " if flaw.startswith(("a norm", "a reg")) else "read: (1, 77)"
  assert done.stdout.startswith(told) and done.stdout.count("\n") == 1


@pytest.mark.process
def test_a_compressed_vocabulary_of_3_gb_is_refused(tmp_path):
  file = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
  file.write_bytes(gzip.compress(bytes(1 << 20)) * 3000)
  done = start("-c", TOKENIZE, "clip", str(file))
  assert "refused: " in done.stdout and "at most 33,554,432 are read" in done.stdout


SETTINGS = ("model.image.layers=60000", "model.image.layers=0", "model.image.heads=0", "model.image.patch=0",
            "model.text.vocab=100000000000", "seed=100000000000000000000", "batch_size=0", "data.workers=-1",
            "checkpoint.every=0", "loss.chunk_size=-4", "log_every=0")


@pytest.mark.process
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_would_flood_the_memory_is_refused_before_anything_is_allocated(setting, tmp_path):
  done = start("-m", "limber_jax.train", "--config=experiments/quickstart.py", f"--workdir={tmp_path}/run",
               f"--config.{setting}", "--config.steps=1")
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.process
def test_beams_without_end_are_refused(photos, tmp_path):
  runs.untrained(runs.tiny_limber(), str(tmp_path))
  done = start("-m", "limber_jax.caption", f"--workdir={tmp_path}", str(photos / "cat" / "00.png"), "--beams=1000000")
  assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
