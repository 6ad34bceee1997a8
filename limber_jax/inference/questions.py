"""Questions about images, with examples before them, and the answers of a language model."""

import json
import os
from collections.abc import Iterator, Sequence

from limber_jax.data import text
from limber_jax.decoding.interleaved import example_text, question_text
from limber_jax.errors import UserError
from limber_jax.inference.captioner import Captioner, Written
from limber_jax.inference.images import attempt
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
