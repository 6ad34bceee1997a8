"""The classify command: probabilities, folders, unreadable images, a user's mistakes."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Compute, Source, Tokenizer
from limber_jax.data.sources.folder import Folder
from limber_jax.errors import UserError
from limber_jax.inference.classifier import Classifier, read_labels
from limber_jax.inference.images import find
from limber_jax.models import clip, spec
from limber_jax.models.text import TextSize
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.weights import export, load

LABELS = ["a dog", "a cat, asleep", "кошка", "0"]
TEMPLATES = ["{}", "a photo of {}."]
BYTES = Tokenizer("bytes")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """The directory of a tiny CLIP in Hugging Face's format, whose text tower reads bytes."""
  size = clip.SIZES["clip_vit_b32_mu"]()
  size.text = TextSize(context=32, vocab=259, width=64, layers=2, heads=2)
  rng = np.random.default_rng(0)
  task = Contrastive(clip.build(size, Compute(dtype="float32")), "softmax", 0, 1, ())
  params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype),
                        jax.eval_shape(task.init, jax.random.key(0))[0])
  params["logit_scale"] = np.float32(np.log(7))
  path = str(tmp_path_factory.mktemp("weights"))
  export.save(path, "hf", size, params, {})
  return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """A folder with five images, one of them in a folder of its own, a broken one and a text file."""
  root = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(1)
  (root / "more").mkdir()
  for name, shape in {"a.png": (16, 16), "b.jpg": (40, 23), "more/c.webp": (17, 64), "d.JPEG": (90, 90),
                      "e.png": (16, 300)}.items():
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(root / name, format={"png": "PNG", "webp": "WEBP"}.get(name[-3:], "JPEG"))
  (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:100])
  (root / "notes.txt").write_text("no image")
  return root


def test_probabilities_equal_those_of_transformers(weights, photos, transformers):
  import torch

  model = transformers.CLIPModel.from_pretrained(weights).eval()
  ours = Classifier(weights, LABELS, TEMPLATES, BYTES, batch_size=3)
  images = np.stack([ours.read(str(photos / name)) for name in ("a.png", "b.jpg", "d.JPEG")] * 3)  # more than a batch
  pixels = ((images / 255 - spec.MEAN) / spec.STD).astype(np.float32).transpose(0, 3, 1, 2)

  def embed(text):
    ids = torch.tensor([[257, *(byte + 1 for byte in text.lower().encode()), 258]])
    return torch.nn.functional.normalize(model.text_projection(model.text_model(ids).pooler_output), dim=-1)[0]

  with torch.no_grad():
    image = model.visual_projection(model.vision_model(torch.tensor(pixels)).pooler_output)
    text = torch.stack([sum(embed(template.replace("{}", label)) for template in TEMPLATES) for label in LABELS])
    image, text = (torch.nn.functional.normalize(x, dim=-1) for x in (image, text))
    theirs = (7 * image @ text.T).softmax(-1)
  np.testing.assert_allclose(ours(images), theirs.numpy(), atol=1e-5)
  assert np.ptp(ours(images), axis=1).min() > 0.02  # the labels are not all alike to it


def run(*arguments, env=None):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"} | (env or {})
  done = subprocess.run([sys.executable, "-m", "limber_jax.classify", *arguments], capture_output=True, text=True,
                        env=env, timeout=240)
  return done.returncode, done.stdout.split("\n")[:-1], done.stderr.split("\n")[:-1]


@pytest.mark.process
def test_a_mistake_ends_the_command_with_one_line(weights):
  assert run(f"--weights={weights}", "--labels=a dog,a cat", "--tokenizer=bytes") == (
    2, [], ["error: no images given; name files or folders after the flags"])


@pytest.mark.process
def test_the_command_names_what_it_can_read_and_counts_the_rest(weights, photos):
  missing = str(photos / "none.jpg")
  code, out, errors = run(f"--weights={weights}", '--labels=a dog,"a cat, asleep",кошка,0', "--json",
                          "--tokenizer=bytes", f"--templates={TEMPLATES[1]}", str(photos), missing)
  assert code == 1
  names = ["a.png", "b.jpg", "d.JPEG", "e.png", "more/c.webp"]
  records = [json.loads(line) for line in out]
  assert [r["image"] for r in records] == [str(photos / name) for name in names]
  model = Classifier(weights, LABELS, TEMPLATES[1:], BYTES)
  expected = model(np.stack([model.read(str(photos / name)) for name in names]))
  for record, row in zip(records, expected, strict=True):
    assert list(record["probabilities"]) == LABELS
    np.testing.assert_allclose(list(record["probabilities"].values()), row, atol=1e-5)
    assert record["label"] == LABELS[row.argmax()] and record["probability"] == max(record["probabilities"].values())
  assert any(error.startswith(f"{photos / 'broken.png'}: image of 100 bytes cannot be decoded") for error in errors)
  assert f"{missing}: No such file or directory" in errors
  assert errors[-1] == "2 of 7 images could not be read"


@pytest.mark.process
def test_the_command_prints_a_table(weights, photos):
  code, out, errors = run(f"--weights={weights}", "--labels=a dog,a cat,0", "--tokenizer=bytes", str(photos / "a.png"),
                          str(photos / "more"))
  assert (code, errors) == (0, [])
  assert out[0].split() == ["image", "label", "p", "next"]
  assert [line.split("  ")[0] for line in out[1:]] == [str(photos / "a.png"), str(photos / "more" / "c.webp")]
  column = out[0].index("label")
  for line in out[1:]:
    shares = [float(word.rstrip("%,")) for word in line.split() if word.rstrip(",").endswith("%")]
    assert line[column:].startswith(("a dog", "a cat", "0 "))
    assert len(shares) == 3 and shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.16)


@pytest.mark.process
def test_a_name_that_is_not_utf8_is_shown_escaped_and_loses_no_other_image(weights, photos, tmp_path):
  for name in (b"a.png", b"b\xff.png", b"c\n.png", "d\u2028é.png".encode()):
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
      file.write((photos / "a.png").read_bytes())
  (tmp_path / "e\x1b[2J.png").write_text("no image")
  for encoding in ("utf-8:strict", "ascii:strict"):
    env = {"PYTHONIOENCODING": encoding}
    code, out, errors = run(f"--weights={weights}", "--labels=a dog,a cat", "--tokenizer=bytes", str(tmp_path), env=env)
    e = "é" if encoding.startswith("utf") else r"\xe9"
    names = ["a.png", r"b\udcff.png", r"c\n.png", rf"d\u2028{e}.png"]
    assert sorted(line.split("  ")[0] for line in out[1:]) == sorted(f"{tmp_path}/{name}" for name in names)
    assert code == 1 and errors[0].startswith(rf"{tmp_path}/e\x1b[2J.png: image of 8 bytes cannot be decoded")
    assert errors[1:] == ["1 of 5 images could not be read"]


def test_folders_are_read_as_class_folders_are(photos, tmp_path):
  """Links are followed, each place is read once, and what macOS leaves beside images is none."""
  here, there = tmp_path / "here", tmp_path / "there"
  for folder in (here / "deep" / "er", there, here / ".hidden"):
    folder.mkdir(parents=True)
  for place in (here / "a.png", here / "._a.png", here / "deep/er/b.ppm", there / "c.png", here / ".hidden/d.png"):
    Image.open(photos / "a.png").save(place, format="PPM" if place.suffix == ".ppm" else "PNG")
  (here / "link").symlink_to(there)
  (here / "deep" / "loop").symlink_to(here)
  (here / "one.png").symlink_to(there / "c.png")
  (here / "gone.png").symlink_to(tmp_path / "nothing")
  names = ("a.png", "deep/er/b.ppm", "gone.png", "link/c.png", "one.png")
  assert find([str(here)]) == [str(here / name) for name in names]
  classes = tmp_path / "classes"
  (classes / "x").mkdir(parents=True)
  shutil.copytree(here, classes / "x" / "here", symlinks=True)
  os.remove(classes / "x" / "here" / "deep" / "loop")  # class folders are followed to a depth, not round a circle
  ids = [os.path.relpath(Folder(Source("folder", str(classes), "")).annotation(i)["id"], "x/here") for i in range(5)]
  assert [os.path.join(here, name) for name in sorted(ids)] == find([str(here)])


def test_mistakes_are_reported_in_a_line(weights, photos, tmp_path):
  (tmp_path / "labels.txt").write_text("a dog\n\na cat\n")
  assert read_labels(["a fish"], str(tmp_path / "labels.txt")) == ["a fish", "a dog", "a cat"]
  (tmp_path / "folder").mkdir()
  for call, match in (
      (lambda: read_labels(["one"], ""), "wanted two labels or more, got 1"),
      (lambda: read_labels(["a dog"], str(tmp_path / "labels.txt")), "'a dog' is given twice"),
      (lambda: find([]), "no images given"),
      (lambda: find([str(tmp_path / "folder")]), r"no images in this folder; looked for \.jpg"),
      (lambda: Classifier(str(tmp_path / "none"), LABELS, ["{}"], BYTES), "no such file or directory"),
      (lambda: Classifier(weights, LABELS, ["{}"], Tokenizer("byte")), "did you mean 'bytes'"),
      (lambda: Classifier(weights, ["a", "b" * 40], ["{}"], BYTES), "at most 32 fit"),
      (lambda: Classifier(weights, LABELS, ["{}"], Tokenizer("bpe", _bpe(tmp_path))), "has 300 ids, .* only 259")):
    with pytest.raises(UserError, match=match):
      call()


def _bpe(folder):
  from limber_jax.data.tokenizers import BpeTokenizer

  BpeTokenizer.train([f"word{i} and {i}{i}" for i in range(200)], 300, str(folder / "bpe"))
  return str(folder / "bpe")


def test_the_tokenizer_is_the_one_beside_the_weights(tmp_path):
  assert load.own_tokenizer(str(tmp_path)) == Tokenizer("clip", "")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
  (tmp_path / "tokenizer.json").write_text("{}")
  assert load.own_tokenizer(str(tmp_path)) == Tokenizer("clip", str(tmp_path))
  assert load.own_tokenizer(str(tmp_path / "model.safetensors")) == Tokenizer("clip", str(tmp_path))
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="names no tokenizer"):
    load.own_tokenizer(str(tmp_path))
  (tmp_path / "config.json").write_text(json.dumps({"data.tokenizer.name": "bpe", "data.tokenizer.path": "my_bpe"}))
  assert load.own_tokenizer(str(tmp_path)) == Tokenizer("bpe", "my_bpe")
