"""The vqa command against a sequence put together by hand, and what it says of its files."""

import json
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from test_caption import command, opened

from limber_jax.decoding.interleaved import question_text
from limber_jax.errors import UserError
from limber_jax.inference.captioner import Written
from limber_jax.inference.projections import read_run, setup, to_use
from limber_jax.inference.questions import answers, read_lines

LENGTH = 160  # of the sequence by hand
END = 258     # id that ends a text, and starts the next


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a captioning run before its first step."""
  workdir = str(tmp_path_factory.mktemp("run"))
  runs.untrained(runs.tiny_limber(), workdir)
  return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  return runs.pictures(tmp_path_factory.mktemp("pictures"), 6)


@pytest.fixture(scope="module")
def shots(pictures):
  return [{"image": pictures[4], "question": "is it red?", "answer": "yes"},
          {"image": pictures[5], "question": "how many are there?", "answer": "two of them"}]


@pytest.fixture(scope="module")
def questions(pictures):
  return [{"image": path, "question": text} for path, text in
          zip(pictures[:4], ["what?", "what is in this picture?", "why", "which colour has it?"], strict=True)]


def attentive(run, **changes):
  """Returns the model with attention so strong that far images and their order change what is written."""
  model = opened(run, **changes)
  attn = {name: {"kernel": x["kernel"] * 8} for name, x in model._params["lm"]["blocks"]["attn"].items()}
  lm = model._params["lm"]
  model._params["lm"] = lm | {"blocks": lm["blocks"] | {"attn": attn}}
  return model


@pytest.fixture(scope="module")
def by_hand(run):
  """f(list of paths, texts and ids) -> what an attentive model writes: token by token, by full passes over one row."""
  model = attentive(run)
  s = setup(to_use(read_run(run)))
  limber = s.task.model
  params, stats = jax.tree.map(jnp.asarray, jax.device_get((model._params, model._stats)))  # on one device

  @jax.jit
  def prompt(image):
    return limber.image_prefix(params, limber.encode(params, stats, image[None], "")[0])[0]

  @jax.jit
  def likeliest(x, length):
    mask = (jnp.arange(LENGTH) < length)[None]
    hidden, _ = limber.lm.apply(limber.lm_params(params), x[None], jnp.arange(LENGTH)[None], mask)
    return limber.logits(params, hidden[0, length - 1]).argmax()

  def embedded(part):
    if isinstance(part, str) and part.endswith(".png"):
      return prompt(model.read(part))
    ids = [part] if isinstance(part, int) else [byte + 1 for byte in " ".join(part.lower().split()).encode()]
    return np.asarray(params["lm"]["embedding"])[ids]

  def follow(sequence):
    x = np.concatenate([embedded(part) for part in sequence])
    out = []
    for _ in range(model.decoding.max_new_tokens):
      token = int(likeliest(np.pad(x, ((0, LENGTH - len(x)), (0, 0))), len(x)))
      if token == END:
        break
      out.append(token)
      x = np.concatenate([x, embedded(token)])
    return bytes(token - 1 for token in out if 0 < token < 257).decode("utf-8", "replace").split("\n")[0].strip()

  return follow


@pytest.mark.parametrize("count", [0, 2])
def test_answers_are_those_of_the_sequence_put_together_by_hand(run, by_hand, questions, shots, count):
  before = [part for shot in shots[:count]
            for part in (shot["image"], f"Q: {shot['question']} A: {shot['answer']}")]
  expected = [by_hand([*before, q["image"], f"Q: {q['question']} A:"]) for q in questions]
  assert len(set(expected)) > 1
  if shots[:count]:  # the examples' images and their order count
    others = [{**shot, "image": other["image"]} for shot, other in zip(shots, shots[::-1], strict=True)]
    assert [w.text for w in answers(attentive(run), questions, others)] != expected
  found = list(answers(attentive(run), questions, shots[:count]))
  assert found == [Written(q["image"], text) for q, text in zip(questions, expected, strict=True)]


def test_a_blind_model_reads_the_texts_alone(run, by_hand, questions, shots):
  before = " ".join(f"Q: {shot['question']} A: {shot['answer']}" for shot in shots)
  expected = [by_hand([END, f"{before} Q: {q['question']} A:"]) for q in questions]
  assert [w.text for w in answers(attentive(run, blind=True), questions, shots)] == expected


def test_an_answer_ends_with_its_line():
  Model = namedtuple("Model", ["read", "write"])

  def write(requests, images, **_):
    assert [list(image) for image in images] == [[ord("s")]]
    assert requests == [("q", (0, "Q: a? A: b\n", 1, "Q: c A:"))]
    return [Written("q", " a dog \nQ: more A: cat"), Written("r", "", "no image")]

  model = Model(lambda path: np.frombuffer(path.encode(), np.uint8), write)
  found = answers(model, [{"image": "q", "question": " c "}], [{"image": "s", "question": "a?", "answer": " b\n"}])
  assert list(found) == [Written("q", "a dog"), Written("r", "", "no image")]
  assert question_text("what is it? ") == "Q: what is it? A:"


@pytest.mark.process
def test_the_command_answers_a_question(run, pictures):
  code, out, errors = command(f"--workdir={run}", "--json", pictures[0], "what is it?", module="vqa")
  assert (code, errors) == (0, [])
  question = {"image": pictures[0], "question": "what is it?"}
  assert [json.loads(line) for line in out] == [{**question, "answer": next(answers(opened(run), [question])).text}]


@pytest.mark.process
def test_the_command_answers_a_file_of_questions_with_examples(run, questions, shots, pictures, tmp_path):
  folder = tmp_path / "files"
  folder.mkdir()
  (folder / "shots.jsonl").write_text("\n".join(map(json.dumps, shots)))
  lines = [*questions[:2], {"image": "none.png", "question": "who?", "id": 7}, *questions[2:]]
  (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
  code, out, errors = command(f"--workdir={run}", f"--shots={folder}/shots.jsonl", "--json", "--max_new_tokens=8",
                              f"--questions={folder}/questions.jsonl", module="vqa")
  assert code == 1
  expected = answers(opened(run), questions, shots)
  assert [json.loads(line) for line in out] == [{**q, "answer": w.text}
                                                for q, w in zip(questions, expected, strict=True)]
  assert errors == [f"{folder}/none.png: No such file or directory", "1 of 5 images could not be read"]


def test_mistakes_are_reported_in_a_line(run, shots, questions, tmp_path):
  path = tmp_path / "x.jsonl"
  for text, match in (("", "--shots=.*: no line in it"), ("\n{", r"x.jsonl:2: no JSON"),
                      ("[1]", r"x.jsonl: one JSON array, expected an object a line"),
                      ('{"image": "a", "question": "b"}', r"x.jsonl:1: expected an object .*no 'answer'"),
                      ('{"image": "a", "question": " ", "answer": "c"}', "no 'question'"),
                      ('{"image": 3, "question": "b", "answer": "c"}', "no 'image'")):
    path.write_text(text)
    with pytest.raises(UserError, match=match):
      read_lines(str(path), "--shots", ("image", "question", "answer"))
  with pytest.raises(UserError, match=r"--shots=.*none: cannot be read .No such file"):
    read_lines(str(tmp_path / "none"), "--shots", ("image",))
  model = opened(run)
  with pytest.raises(UserError, match=r"--shots: .*none.png: No such file or directory"):
    list(answers(model, questions, [{"image": str(tmp_path / "none.png"), "question": "a", "answer": "b"}]))
  with pytest.raises(UserError, match="positions of images and text, and max_new_tokens=8, are more than the language"):
    list(answers(model, questions, shots * 4))


@pytest.mark.process
def test_a_question_without_an_image_is_a_mistake(run):
  assert command(f"--workdir={run}", "what?", module="vqa") == (
    2, [], ["error: expected an image and a question, or --questions=FILE without; got 1 arguments"])
