"""The caption command and the projections it reads: a run of three steps, used as its users would."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from limber_jax import config_json
from limber_jax.config import Decoding
from limber_jax.errors import UserError
from limber_jax.inference import output, projections
from limber_jax.inference.captioner import captions
from limber_jax.inference.flags import change_decoding
from limber_jax.inference.output import Output
from limber_jax.inference.projections import open_projection, open_run, read_projection, read_run, to_use
from limber_jax.runtime import parallel
from limber_jax.training.loop import train

PICTURES = 11


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a captioning run of three steps."""
  workdir = str(tmp_path_factory.mktemp("run") / "limber")
  train(runs.tiny_limber(), workdir, log=lambda line: None)
  return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return runs.pictures(tmp_path_factory.mktemp("pictures"), PICTURES)


@pytest.fixture(scope="module")
def model(run):
  """Its first map, eight images at a time."""
  return opened(run)


@pytest.fixture(scope="module")
def own(model, pictures):
  """The captions of the pictures."""
  return texts(model, pictures)


def opened(run, name="", blind=False, **changes):
  return open_run(run, to_use(read_run(run), **({"batch_size": 8} | changes)), name=name, blind=blind)


def texts(model, paths):
  return [w.text for w in captions(model, paths)]


def command(*arguments, module="caption"):
  env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2",
                      "JAX_COMPILATION_CACHE_DIR": os.environ["LIMBER_TEST_CACHE"]}
  done = subprocess.run([sys.executable, "-m", f"limber_jax.{module}", *arguments], capture_output=True, text=True,
                        env=env, timeout=240)
  return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def shown(text):
  """Returns a text as a table shows it."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


def by_the_task(run, paths, name=""):
  """Returns captions by the task's own generate, all images at once."""
  config = to_use(read_run(run))
  model = opened(run, name)
  s = projections.setup(config)
  tokens = jnp.array([s.tokenizer.encode(config.decoding.prompt)] * len(paths), jnp.int32)
  batch = {"image": np.stack([model.read(p) for p in paths]), "tokens": tokens, "mask": jnp.ones(tokens.shape, bool)}
  generate = jax.jit(lambda params, stats, batch: s.task.predict()[f"generate{name and '@'}{name}"](
    params, stats, batch, s.tokenizer.eot), out_shardings=parallel.replicated(s.mesh))
  with jax.set_mesh(s.mesh):
    out = jax.device_get(generate(model._params, model._stats, batch))
  return [s.tokenizer.decode(t[:n].tolist()).strip() for t, n in zip(out.tokens, out.lengths, strict=True)]


@pytest.mark.parametrize("name", ["", "other"])
def test_captions_are_those_of_the_task(run, pictures, name):
  found = texts(opened(run, name), pictures)
  assert found == by_the_task(run, pictures, name)
  assert len(set(found)) > 3  # they tell the images apart


def test_a_caption_is_the_same_whatever_batch_its_image_is_in(run, model, own, pictures):
  assert texts(model, pictures[::-1]) == own[::-1]
  assert texts(opened(run, batch_size=16), pictures) == own
  beams = opened(run, decoding=change_decoding(model.decoding, beams=3))
  assert texts(beams, pictures[::-1])[::-1] == texts(beams, pictures) != own
  sampled = change_decoding(model.decoding, temperature=0.7, top_p=0.9, seed=5)
  few, many = (texts(opened(run, batch_size=n, decoding=sampled), pictures) for n in (8, 16))
  assert few == many != own


def test_every_batch_goes_through_one_program(run, pictures):
  model = opened(run)
  texts(model, pictures)
  texts(model, pictures[:3])
  assert model._continue._cache_size() == model._image_prefixes._cache_size() == 1


def test_a_blind_model_writes_the_same_about_every_image(run, pictures, own):
  found = texts(opened(run, blind=True), pictures)
  assert len(set(found)) == 1 and found[0] not in own


@pytest.mark.process
def test_the_command_prints_a_table_and_counts_what_it_cannot_read(run, own, pictures, tmp_path):
  (tmp_path / "broken.png").write_bytes(b"\x89PNG")
  missing = str(tmp_path / "none.jpg")
  images = [*pictures[:3], str(tmp_path), missing, *pictures[3:]]
  code, out, errors = command(f"--workdir={run}", "--batch_size=4", *images)
  assert code == 1
  assert out[0].split() == ["image", "caption"]
  column = out[0].index("caption")
  assert [line[:column].rstrip() for line in out[1:]] == pictures
  assert [line[column:] for line in out[1:]] == [shown(t) for t in own]
  assert errors[0].startswith(f"{tmp_path / 'broken.png'}: image of 4 bytes cannot be decoded")
  assert errors[1:] == [f"{missing}: No such file or directory", f"2 of {PICTURES + 2} images could not be read"]


def test_a_projection_captions_as_its_run_does(run, pictures, tmp_path):
  """Through the commands, on other devices than it was trained on."""
  file, found = str(tmp_path / "map.safetensors"), str(tmp_path / "captions.jsonl")
  assert command(run, file, "--to=projection", "--map=other", module="convert") == (
    0, [f"{file}: the linear map of step 3"], [])
  assert command(f"--projection={file}", "--prompt=the", "--max_new_tokens=5", f"--out={found}", *pictures) == (
    0, [f"{PICTURES} lines written to {found}"], [])
  decoding = dataclasses.replace(read_run(run).decoding, prompt="the", max_new_tokens=5)
  with open(found, encoding="utf-8") as file:
    lines = [json.loads(line) for line in file]
  expected = texts(opened(run, "other", decoding=decoding), pictures)
  assert lines == [{"image": p, "caption": c} for p, c in zip(pictures, expected, strict=True)]
  assert sorted(os.listdir(tmp_path)) == ["captions.jsonl", "map.safetensors"]


def test_a_projection_is_refused_between_other_frozen_models(run, tmp_path):
  path = str(tmp_path / "map.safetensors")
  assert projections.export_projection(run, path) == 3
  config, name = read_projection(path)
  assert config == read_run(run) and name == ""
  with pytest.raises(UserError, match=rf"^{path} was trained on another image encoder \(clip_vit_b32_mu\)"):
    open_projection(path, to_use(dataclasses.replace(config, seed=1)), name)
  open_run(run, to_use(dataclasses.replace(config, seed=1)))  # its random models are kept beside its checkpoints
  moved = str(tmp_path / "moved")
  shutil.copytree(run, moved, ignore=shutil.ignore_patterns("frozen"))
  with pytest.raises(UserError, match=rf"^{moved} was trained on other weights of 'image': its checkpoint 3 has the"):
    open_run(moved, to_use(dataclasses.replace(config, seed=1)))
  del config.model.extra_projectors["other"]
  config.trainable = ("prompt", "lm")
  (tmp_path / "config.json").write_text(config_json.to_json(config))
  with pytest.raises(UserError, match="a run that trained 'lm' too; a projection is all there is only where"):
    projections.export_projection(str(tmp_path), path)
  config.trainable = ("lm",)
  (tmp_path / "config.json").write_text(config_json.to_json(config))
  with pytest.raises(UserError, match="a run that trained no 'prompt'; it trained lm"):
    projections.export_projection(str(tmp_path), path)


@pytest.mark.process
def test_a_mistake_ends_the_command_with_one_line(run, pictures):
  assert command(f"--workdir={run}") == (2, [], ["error: no images given; name files or folders after the flags"])
  code, out, errors = command(f"--workdir={run}", "--beem=3", pictures[0])
  assert (code, out, len(errors)) == (2, [], 1) and "beams" in errors[0]


def test_mistakes_are_reported_in_a_line(run, tmp_path):
  config = read_run(run)
  (tmp_path / "config.json").write_text(config_json.to_json(runs.tiny()))
  for call, match in (
      (lambda: read_run(str(tmp_path / "none")), "no run there .config.json: No such file or directory.; train one"),
      (lambda: read_run(str(tmp_path)), "config.json: a run of task 'contrastive', which writes no captions"),
      (lambda: opened(run, "othr"), "--map: no map 'othr'; did you mean 'other'"),
      (lambda: open_run(run, to_use(config), checkpoint="7"), "no checkpoint '7'; there are latest, best and 3"),
      (lambda: to_use(config, init=["img=x"]), r"--init=img=x: expected PART=PATH .*'image'\? known: image, image@oth"),
      (lambda: to_use(config, init=["prompt=x"]), "--init=prompt=x: expected PART=PATH of a frozen part"),
      (lambda: to_use(config, init=["lm"]), "--init=lm: expected PART=PATH"),
      (lambda: read_projection(str(tmp_path / "config.json")), "no projection can be read there"),
      (lambda: Output(path=str(tmp_path / "no" / "x")), "--out=.*: cannot be written .No such file"),
      (lambda: Output(path=str(tmp_path)), "--out=.*: cannot be written .Is a directory")):
    with pytest.raises(UserError, match=match) as error:
      call()
    assert "\n" not in str(error.value)
  changed = to_use(config, init=["image@other=a", "lm=b=c"]).init
  assert [changed.path_of(p) for p in ("image@other", "lm", "image")] == ["a", "b=c", ""] and config.init.lm == ""


def test_longer_texts_than_the_context_holds_are_refused(run, pictures):
  decoding = dataclasses.replace(read_run(run).decoding, prompt="x" * 160)
  with pytest.raises(UserError, match="164 positions of images and text, and max_new_tokens=8, are more than"):
    texts(opened(run, decoding=decoding), pictures)


def test_flags_change_how_texts_are_written():
  greedy, beam = Decoding(prompt="of", max_new_tokens=9), Decoding("beam", beams=7, length_penalty=2.0)
  sample = Decoding("sample", temperature=0.7, top_p=0.9, inverted_nucleus=True, seed=3)
  for own, change, wanted in (
      (greedy, {}, greedy), (sample, {}, sample),
      (greedy, {"prompt": "", "max_new_tokens": 3}, Decoding(prompt="", max_new_tokens=3)),
      (greedy, {"beams": 2}, dataclasses.replace(greedy, method="beam", beams=2)),
      (beam, {"beams": 2}, dataclasses.replace(beam, beams=2)),
      (sample, {"beams": 2}, Decoding("beam", beams=2, seed=3)),
      (beam, {"temperature": 0.0}, Decoding()), (sample, {"temperature": 0.0}, Decoding(seed=3)),
      (beam, {"temperature": 0.5, "seed": 4}, Decoding("sample", temperature=0.5, seed=4)),
      (greedy, {"top_p": 0.5}, dataclasses.replace(greedy, method="sample", top_p=0.5)),
      (sample, {"temperature": 0.5}, dataclasses.replace(sample, temperature=0.5))):
    assert change_decoding(own, **change) == wanted
  for change, match in (({"beams": 2, "top_p": 0.5}, "choose one of the two"), ({"seed": 1}, "--seed is for sampling"),
                        ({"temperature": 0.0, "top_p": 0.5}, "--top_p is for sampling"),
                        ({"prompt": "A picture of "}, "no space at its end")):
    with pytest.raises(UserError, match=match):
      change_decoding(greedy, **change)


def test_a_table_shows_paths_as_they_are_and_texts_on_one_line(capsys):
  rows = [{"image": "a  b.png", "caption": "one\n two\x1b[2J"}, {"image": "c\udc80.png", "caption": ""}]
  with Output() as output:
    assert output.write(rows, {"image": 8, "caption": 0}, 2) == 0
  assert capsys.readouterr().out == "image     caption\na  b.png  one two\\x1b[2J\nc\\udc80.png\n"


def test_a_table_without_a_row_has_no_heading(capsys):
  with Output() as output:
    assert output.write([{"image": "a.png", "error": "no"}], {"image": 8, "caption": 0}, 1) == 1
  assert capsys.readouterr() == ("", "a.png: no\n1 of 1 images could not be read\n")


def test_many_images_are_counted_on_stderr_and_a_file_is_whole_or_not_there(tmp_path, capsys):
  path = tmp_path / "out.jsonl"
  inputs = [{"image": str(i)} for i in range(output.PROGRESS)]
  rows = [given | {"caption": "ä"} for given in inputs]
  with Output(path=str(path)) as out:
    assert out.resume(dict, inputs, 8) == 0
    assert out.write(rows, {"image": 5, "caption": 0}, len(rows)) == 0
  assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == rows
  said = capsys.readouterr()
  assert said.out == f"50 lines written to {path}\n"
  assert [line.split(",")[0] for line in said.err.splitlines()] == ["1 of 50 images", "50 of 50 images"]
  assert [f.name for f in tmp_path.iterdir()] == ["out.jsonl"]


def written(path, inputs, rows, key="a"):
  """Returns (how many were done, exit code) of a command whose batches are of two."""
  with Output(path=str(path)) as out:
    done = out.resume(lambda: {"key": key}, inputs, 2)
    return done, out.write(rows(done), {"image": 5, "caption": 0}, len(inputs))


def test_what_is_stopped_resumes_behind_the_last_whole_batch_if_nothing_has_changed(tmp_path, capsys):
  path, partial, asked = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial", []
  inputs = [{"image": str(tmp_path / f"{i}.png")} for i in range(7)]
  for given in inputs[1:]:
    open(given["image"], "w").close()
  rows = [{**inputs[0], "error": "no such file"}, *(given | {"caption": "c"} for given in inputs[1:])]

  def stopped(number, error):
    def until(done):
      asked.append(done)
      yield from rows[done:number]
      if error:
        raise error
      os.kill(os.getpid(), signal.SIGHUP)
      yield from rows[number:]

    return until

  with pytest.raises(UserError, match="no more"):
    written(path, inputs, stopped(0, UserError("no more")))
  assert not partial.exists()  # there is nothing to keep
  with pytest.raises(UserError, match="no more"):
    written(path, inputs, stopped(5, UserError("no more")))
  assert sorted(os.listdir(tmp_path))[6:] == ["out.jsonl.partial"]
  assert written(path, inputs, stopped(6, None)) == (4, 1)  # the signal came at the last row
  assert "stopped by SIGHUP after 7 of 7" not in (said := capsys.readouterr()).out
  assert path.exists() and not partial.exists() and said.err.count("no such file") == 2
  path.unlink()
  with pytest.raises(KeyboardInterrupt):
    written(path, inputs, stopped(5, KeyboardInterrupt()))
  with open(partial, "a") as file:
    file.write('{"input": [{"image": "half')
  assert written(path, inputs, stopped(4, None)) == (4, 0) and not path.exists()
  assert "stopped by SIGHUP after 5 of 7; the same command resumes" in capsys.readouterr().out
  os.utime(inputs[3]["image"], (1, 1))
  assert written(path, inputs, lambda done: rows[done:]) == (2, 1)  # a changed image is written about again
  assert [json.loads(line) for line in path.read_text().splitlines()] == rows[1:]
  with pytest.raises(UserError, match="no more"):
    written(path, inputs, stopped(5, UserError("no more")))
  assert written(path, inputs, lambda done: rows[done:], key="b") == (0, 1)
  assert f"{partial}: of another model, other settings or another version; begun again" in capsys.readouterr().err


def test_a_fifo_gets_the_rows_as_they_come(tmp_path, capsys):
  os.mkfifo(tmp_path / "fifo")
  got = []
  reader = threading.Thread(target=lambda: got.append((tmp_path / "fifo").read_text()))
  reader.start()
  rows = [{"image": "a", "caption": "b"}, {"image": "c", "error": "d"}]
  assert written(tmp_path / "fifo", [{"image": "a"}, {"image": "c"}], lambda done: rows[done:]) == (0, 1)
  reader.join(10)
  assert got == [json.dumps(rows[0]) + "\n"] and os.listdir(tmp_path) == ["fifo"] and not capsys.readouterr().out
