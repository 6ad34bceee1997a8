"""Answers questions about images: `python -m limber_jax.vqa --workdir=runs/limber photo.jpg "what is this?"`.

The language model reads the image and "Q: what is this? A:", and its answer is what it writes up to the end of the
line. --shots=FILE puts examples before it, image and "Q: … A: …" each, every one ended by a newline. They are JSON
objects, one a line: {"image": path, "question": …, "answer": …}; paths start from the file's directory. Many questions
come from such a file too, by --questions=FILE, in place of an image and a question.
"""

import json
import os
from collections.abc import Iterator, Sequence

from absl import flags

from limber_jax import cli
from limber_jax.data import text
from limber_jax.decoding.interleaved import example_text, question_text
from limber_jax.errors import UserError
from limber_jax.inference.captioner import Captioner, Written
from limber_jax.inference.flags import Flags
from limber_jax.inference.images import attempt
from limber_jax.inference.output import stamped
from limber_jax.runtime import inputs


def answers(model: Captioner, questions: Sequence[dict[str, str]],
            shots: Sequence[dict[str, str]] = (), start: int = 0) -> Iterator[Written]:
  """Yields the answer to each of the questions from number `start` on.

  Args:
    model: what answers.
    questions: {"image": path, "question": …}.
    shots: {"image": path, "question": …, "answer": …}, examples that stand before every question, in this order.
    start: how many questions are left out because they are answered, whole batches.

  Raises:
    UserError: the image of an example cannot be read, or they are more than the language model's context holds.
  """
  before: list[int | str] = []
  images = []
  for number, shot in enumerate(shots):
    image = attempt(model.read, shot["image"])
    if isinstance(image, str):
      raise UserError(f"--shots: {shot['image']}: {image}")
    images.append(image)
    before += [number, example_text(shot["question"], shot["answer"])]
  requests = [(q["image"], (*before, len(images), question_text(q["question"]))) for q in questions]
  for written in model.write(requests, images, start=start):
    yield written._replace(text=written.text.partition("\n")[0].strip())


def read_lines(path: str, flag: str, fields: Sequence[str]) -> list[dict[str, str]]:
  """Returns {field: text} of each line of a file of JSON objects; "image" as a path from here.

  Args:
    path: of the file.
    flag: that named it, for messages.
    fields: that every object has; it may have others.

  Raises:
    UserError: no such file, nothing in it, or another object; the message names the line.
  """
  try:
    words = text.decode(inputs.read(path, inputs.LIST), f"{flag}={path}")
  except OSError as error:
    raise UserError(f"{flag}={path}: cannot be read ({error.strerror or error})") from error
  if words.lstrip().startswith("[") and words.rstrip().endswith("]"):
    raise UserError(f"{flag}={path}: one JSON array, expected an object a line; convert it: jq -c '.[]' OLD > NEW")
  out = []
  for number, line in enumerate(words.split("\n"), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{path}:{number}: no JSON ({error})") from error
    for field in fields:
      if not isinstance(record, dict) or not isinstance(record.get(field), str) or not record[field].strip():
        raise UserError(f"{path}:{number}: expected an object with the texts {', '.join(fields)}; no {field!r}")
    out.append({field: record[field] for field in fields}
               | {"image": os.path.join(os.path.dirname(path), record["image"])})
  if not out:
    raise UserError(f"{flag}={path}: no line in it")
  return out


if __name__ == "__main__":
  _flags = Flags()
  _shots = flags.DEFINE_string("shots", "", "File with examples: image, question and answer, a JSON object a line.")
  _questions = flags.DEFINE_string("questions", "", "File with image and question, a JSON object a line.")

  def _main(argv: list[str]) -> int:
    if len(argv) != (0 if _questions.value else 2):
      raise UserError(f"expected an image and a question, or --questions=FILE without; got {len(argv)} arguments")
    if not _questions.value and not argv[1].strip():
      raise UserError("the question is empty")
    questions = (read_lines(_questions.value, "--questions", ("image", "question")) if _questions.value else
                 [{"image": argv[0], "question": argv[1]}])
    shots = read_lines(_shots.value, "--shots", ("image", "question", "answer")) if _shots.value else []
    named = [_questions.value, _shots.value, *(asked["image"] for asked in (*questions, *shots))]
    with _flags.output(named) as output:
      model = _flags.open(len(questions))
      examples = [stamped(shot) for shot in shots]
      done = output.resume(lambda: {"command": "vqa", "shots": examples, **model.key()}, questions, model.batch_size)
      rows = ({"image": w.path, "error": w.error} if w.error else {**q, "answer": w.text}
              for q, w in zip(questions[done:], answers(model, questions, shots, done), strict=True))
      widths = {name: max(len(name), *(len(cli.printable(q[name])) for q in questions))
                for name in ("image", "question")}
      return output.write(rows, {**widths, "answer": 0} if _questions.value else {"answer": 0}, len(questions))

  cli.run(_main, prints=_flags.prints)
