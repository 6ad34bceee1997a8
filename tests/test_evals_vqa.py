"""The evaluation of VQA v2: metrics by hand, answers against those of the command, files in the real layout."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Source
from limber_jax.data import transforms
from limber_jax.data.sources.vqa import Vqa as VqaSource
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.decoding.generate import Generated
from limber_jax.errors import UserError
from limber_jax.evals.base import Stopped
from limber_jax.evals.vqa import Vqa
from limber_jax.inference.captioner import Captioner
from limber_jax.inference.projections import to_use
from limber_jax.inference.questions import answers
from limber_jax.training.setup import make_context, setup
from tests import made, runs
from tests.standins import write_vqa2

SEEDS = (4, 5, 7)  # whose examples differ
QUESTIONS = 16  # tokens of the longest question of the data made by hand, and more


@pytest.fixture
def install(monkeypatch):
  return made.install(monkeypatch)


def record(text="what?", people=("yes",) * 10, kind="yes/no", **fields):
  best = max(people, key=people.count)
  return {"text": text, "answers": tuple(people), "answer": best, "answer_type": kind, **fields}


def config(**fields):
  return made.config(Vqa, **{"train": Source(name="made"), "metrics": ("accuracy",), **fields})


def context(**fields):
  transform = transforms.captioning({"image": transforms.ResizeCrop(8, "center")}, ByteTokenizer(), QUESTIONS)
  return dataclasses.replace(made.context(length=QUESTIONS), transform=transform, name="vqa2", **fields)


def scripted(texts, after=None, seen=None):
  """Returns functions of a model that says texts[i] of image i, or after examples `after`[their images' sum]."""

  def written(texts, index):
    rows = [[byte + 1 for byte in text.encode()] for text in texts]
    tokens = np.array([row + [ByteTokenizer.eot] * (40 - len(row)) for row in rows], np.int32)
    return Generated(jnp.asarray(tokens)[index], jnp.array([len(row) for row in rows])[index], index)

  def generate(params, stats, batch, eos, prefix=None):
    assert eos == ByteTokenizer.eot and batch["mask"].shape == batch["tokens"].shape
    if seen is not None:
      seen.append((batch["tokens"].shape[1], prefix is not None))
    shown = batch["image"][:, 0, 0, 0].astype(jnp.int32) if "image" in batch else batch["index"]
    return written(texts, shown) if prefix is None else written(after, jnp.full_like(shown, prefix["sum"]))

  return {
    "generate": generate, "generate_blind": generate,
    "prompt": lambda params, stats, batch: batch["image"][:, :2, 0, :1].astype(jnp.float32),  # two tokens an image
    "read": lambda params, stats, batch: {"sum": (batch["shared"].sum() / 2).astype(jnp.int32)}}


def test_figures_are_those_counted_by_hand(install):
  # The words that are right count for 1, 0.9, 0.3 and 0: the first line, and of it the first word, in any case where
  # people differ.
  install([record(people=("yes",) * 10), record(people=("two",) * 3 + ("3",) * 7, kind="number"),
           record(people=("a red car",) + ("blue",) * 9, kind="other"), record(people=("no",) * 10)])
  texts = [" yes of course\nQ: no", " Two!", " red car", "\nno"]
  found = config(shots=(0,)).open(context())
  assert found(scripted(texts), {}, {}) == {
    "accuracy_0shot": pytest.approx((1 + 0.9 + 0 + 0) / 4), "accuracy_0shot/yes/no": 0.5,
    "accuracy_0shot/number": pytest.approx(0.9), "accuracy_0shot/other": 0.0}
  metadata = found.metadata()
  assert metadata["answer_types"] == {"number": 1, "other": 1, "yes/no": 2}
  assert (metadata["prompt"], metadata["num_examples"], metadata["covered"]) == ("Q: {} A:", 4, 4)
  assert "examples" not in metadata
  json.dumps(metadata)


def test_truncated_answers_have_as_many_words_as_the_longest_of_people(install):
  install([record(people=("a red car",) + ("blue",) * 9, kind="other"), record(people=("no", *["yes"] * 9))])
  found = config(shots=(0,), metrics=("truncated",)).open(context())(scripted(["red car of a", "No way"]), {}, {})
  assert found["truncated_0shot"] == pytest.approx((0 + 0.3) / 2)
  run = config(shots=(0,), metrics=("truncated",)).open(context())
  found = run(scripted(["The red car is", "no way"]), {}, {})
  assert found == {
    "truncated_0shot": pytest.approx((0.3 + 0.3) / 2), "truncated_0shot/other": pytest.approx(0.3),
    "truncated_0shot/yes/no": pytest.approx(0.3), "accuracy_0shot": pytest.approx(0.3 / 2),
    "accuracy_0shot/other": 0.0, "accuracy_0shot/yes/no": pytest.approx(0.3)}


def test_a_metric_after_examples_is_the_mean_over_seeds(install):
  # Of a seed, the examples are the first of its permutation of the records that can be shown and have an answer.
  unfit = {0: {"broken": True}, 3: {"answer": " "}}
  records = [record(str(i)) | unfit.get(i, {}) for i in range(8)]
  install(records)
  drawn = {s: [i for i in np.random.RandomState(s).permutation(8).tolist() if i not in unfit][:2] for s in SEEDS}
  firsts, sums = {d[0] for d in drawn.values()}, {sum(d) for d in drawn.values()}
  right = {drawn[SEEDS[0]][0], sum(drawn[SEEDS[1]])}
  after = ["yes" if i in right else "no" for i in range(16)]
  run = config(shots=(2, 0, 1), seeds=SEEDS, max_bad_fraction=0.5).open(context())
  found = run(scripted(["yes"] * 4 + ["no"] * 4, after), {}, {})
  one = [float(drawn[s][0] in right) for s in SEEDS]
  two = [float(sum(drawn[s]) in right) for s in SEEDS]
  assert len(firsts) == len(sums) == 3 and 0 < sum(one) < 3 and 0 < sum(two) < 3  # the seeds differ
  assert found == {
    "accuracy_0shot": pytest.approx(3 / 7), "accuracy_0shot/yes/no": pytest.approx(3 / 7),
    "accuracy_1shot": pytest.approx(np.mean(one)), "accuracy_1shot/yes/no": pytest.approx(np.mean(one)),
    "accuracy_1shot_sd": pytest.approx(np.std(one, ddof=1)),
    "accuracy_2shot": pytest.approx(np.mean(two)), "accuracy_2shot/yes/no": pytest.approx(np.mean(two)),
    "accuracy_2shot_sd": pytest.approx(np.std(two, ddof=1))}
  metadata = run.metadata()
  assert metadata["examples"] == {str(s): [str(i) for i in drawn[s]] for s in drawn}
  assert (metadata["separator"], metadata["damaged"]) == ("\n", 1)
  assert config(shots=(2,), seeds=SEEDS[2:], max_bad_fraction=0.5).open(context()).metadata()["examples"] == {
    str(SEEDS[2]): metadata["examples"][str(SEEDS[2])]}


def test_questions_are_as_long_as_the_longest_and_seeds_share_a_program(install):
  install([record("a"), record("abc"), record("abcd"), record("much too long to be asked")])
  seen = []
  run = config(shots=(0, 1), seeds=(1, 2, 3), max_bad_fraction=0.25).open(context())
  found = run(scripted(["yes"] * 16, ["yes"] * 16, seen), {}, {})
  assert seen == [(QUESTIONS, False), (QUESTIONS, True)]
  assert found["accuracy_1shot"] == 1 and run.metadata()["damage"] == [
    "3: a question of 31 tokens; config.data.length lets 16 in"]
  install([record("a"), record("abc"), record("abcd")])
  seen = []
  config(shots=(0,)).open(context())(scripted(["yes"] * 3, seen=seen), {}, {})
  assert seen == [(len("q: abcd a:"), False)]


def test_what_does_not_fit_is_one_line(install):
  def refused(match, records=({},), **fields):
    install([record() | r if "text" not in r else r for r in records])
    with pytest.raises(UserError, match=match) as error:
      config(**fields).open(context())
    assert "\n" not in str(error.value)

  refused(r"evaluation 'vqa2': shots=\(0, 4\), and no `train` to draw examples from", shots=(0, 4), train=None)
  refused(r"shots=\(\), seeds=\(0,\): wanted numbers of examples, 0 or more", shots=())
  refused(r"shots=\(-1,\)", shots=(-1,))
  refused("config.evals.vqa2.metrics='blind': choose one of accuracy, truncated, blind_text, blind_zeros",
          metrics=("blind",))
  refused("wanted 4 examples, and its `train` has 1 that can be used", shots=(4,))
  refused("records of its source have no 'answer'; wanted those of data source 'vqa'", records=({"text": "a"},))


@pytest.mark.parametrize("blinds", [("blind_text", "blind_zeros"), ()])
def test_the_blind_metrics_are_of_texts_alone_and_of_black_images(install, blinds):
  install([record(), record(people=("no",) * 10)])
  predict = scripted(["yes", "no"], ["yes"] * 4)
  predict["generate@b"] = lambda params, stats, batch, *rest: predict["generate"](
    params, stats, batch | {"image": 1 - batch["image"]}, *rest)
  found = config(shots=(0,), metrics=blinds).open(context())(predict, {}, {})
  assert {k: v for k, v in found.items() if "/" not in k} == {
    "accuracy_0shot": 1.0, "accuracy_0shot@b": 0.0,
    "accuracy_0shot@blind_text": 0.5,   # always after something that is read first, the start of a text
    "accuracy_0shot@blind_zeros": 0.5}  # image 0 is black anyway


# A tiny LiMBeR on files in the real layout.

@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  write_vqa2(folder, 4)
  write_vqa2(folder, 8, "train2014")
  return folder


def files(folder, split="val2014"):
  return Source(name="vqa", path=str(folder), split=split)


def evaluation(folder, train=None, **fields):
  return Vqa(**{"source": files(folder), "train": files(train or folder, "train2014"), "batch_size": 8,
                "shots": (0, 2), "seeds": (0, 1)} | fields)


@pytest.fixture(scope="module")
def model():
  """(setup, parameters) of a model whose attention is so strong that far images and their order count."""
  s = setup(to_use(runs.tiny_limber(), batch_size=8))
  params = jax.device_get(s.init())
  params = {**s.frozen.params, **params.params}
  attn = {name: {"kernel": x["kernel"] * 8} for name, x in params["lm"]["blocks"]["attn"].items()}
  return s, params | {"lm": params["lm"] | {"blocks": params["lm"]["blocks"] | {"attn": attn}}}


def run(model, config, **fields):
  """Returns (metrics, metadata) of an evaluation."""
  s, params = model
  found = config.open(dataclasses.replace(make_context(s, ""), name="vqa2", **fields))
  return found(s.task.predict(), params, {}), found.metadata()


def lines(path):
  """Returns what is kept of each example."""
  with open(path, encoding="utf-8") as file:
    return [json.loads(line) for line in file][1:]


@pytest.mark.long
def test_answers_are_those_of_the_command(model, data, tmp_path):
  s, params = model
  found, metadata = run(model, evaluation(data), results_dir=str(tmp_path / "results"))
  kinds = {"": ("", False), "@other": ("other", False), "@blind_text": ("", True), "@blind_zeros": ("", False)}
  assert sorted(os.listdir(tmp_path / "results")) == sorted(
    f"{name}{kind}.jsonl" for name in ("0shot", "2shot_seed0", "2shot_seed1") for kind in kinds)
  black = str(tmp_path / "black.png")
  Image.new("RGB", (32, 32)).save(black)
  sources = {split: VqaSource(files(data, split)) for split in ("val2014", "train2014")}

  def shown(split, index, kind):
    name = f"COCO_{split}_{sources[split]._entries[index].image:012}.jpg"
    return black if kind == "@blind_zeros" else str(data / split / name)

  different = set()
  notes = {split: [source.annotation(i) for i in range(len(source))] for split, source in sources.items()}
  train = [note["id"] for note in notes["train2014"]]
  captioners = {key: Captioner(s, params, {}, key[0], blind=key[1]) for key in kinds.values()}
  for kind, key in kinds.items():
    questions = [{"image": shown("val2014", i, kind), "question": note["text"]}
                 for i, note in enumerate(notes["val2014"])]
    for file, drawn in (("0shot", []), ("2shot_seed1", metadata["examples"]["1"])):
      shots = [{"image": shown("train2014", i, kind), "question": notes["train2014"][i]["text"],
                "answer": notes["train2014"][i]["answer"]} for i in map(train.index, drawn)]
      want = [written.text for written in answers(captioners[key], questions, shots)]
      kept = lines(tmp_path / "results" / f"{file}{kind}.jsonl")
      assert [r["raw"].partition("\n")[0].strip() for r in kept] == want
      assert [r["id"] for r in kept] == [note["id"] for note in notes["val2014"]]
      different.add(tuple(want))
  assert len(different) == 8  # the kinds and the examples count
  assert lines(tmp_path / "results" / "2shot_seed0.jsonl") != lines(tmp_path / "results" / "2shot_seed1.jsonl")
  assert {k.partition("@")[2] for k in found} == {"", "other", "blind_text", "blind_zeros"}
  assert {k for k in found if "_sd" in k} == {f"accuracy_2shot_sd{kind}" for kind in kinds}


WORDS = ("yes", "no", "0", "3", "five", "seven", "a digit", "digit")


def by_script(folder, train=None, *, stop=lambda: False, results_dir="", **fields):
  """Returns (metrics, metadata) of a model that says something else of each grey."""
  found = evaluation(folder, train, metrics=("accuracy",), shots=(0, 1, 2), **fields).open(dataclasses.replace(
    context(stop=stop, results_dir=str(results_dir)), length=64,
    transform=transforms.captioning({"image": transforms.ResizeCrop(8, "center")}, ByteTokenizer(), 64)))
  texts = [WORDS[i % len(WORDS)] for i in range(2**11)]
  return found(scripted(texts, texts), {}, {}), found.metadata()


def test_hostile_files_change_no_metric(data, tmp_path, capsys):
  written = write_vqa2(tmp_path, 4, hostile=True)
  metrics, metadata = by_script(tmp_path, data, max_bad_fraction=0.5)
  assert metrics == by_script(data)[0] and 0 < metrics["accuracy_0shot"] < 1
  assert metadata["covered"] == 12 and metadata["num_examples"] == written.records + len(written.damage)
  told = capsys.readouterr().err.splitlines()
  for name in (*written.damage, *written.unreadable):
    assert len([line for line in told if f"{name}: " in line]) == 1
  assert len(told) == len(written.damage) + len(written.unreadable) == metadata["damaged"]
  with pytest.raises(UserError, match=r"evaluation 'vqa2': 6 of 20 examples cannot be used, more than its `max_bad"):
    by_script(tmp_path, data)


def test_an_evaluation_that_was_killed_resumes_to_the_same_metrics(data, tmp_path):
  whole = by_script(data, results_dir=tmp_path / "whole")
  for after in (2, 5, 4):
    left = [after]

    def stop(left=left):
      left[0] -= 1
      return left[0] < 0

    with pytest.raises(Stopped):
      by_script(data, results_dir=tmp_path / "parts", stop=stop)
  assert by_script(data, results_dir=tmp_path / "parts") == whole
  for name in os.listdir(tmp_path / "whole"):
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
  # Other examples are other results, and what was kept is not taken for them.
  write_vqa2(tmp_path / "other", 6, "train2014")
  other = tmp_path / "other"
  assert by_script(data, other, results_dir=tmp_path / "parts")[0] == by_script(data, other)[0]
