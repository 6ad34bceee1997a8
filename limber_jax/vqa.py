"""Answers questions about images: `python -m limber_jax.vqa --workdir=runs/limber photo.jpg "what is this?"`.

The language model reads the image and "Q: what is this? A:", and its answer is what it writes up to the end of the
line. --shots=FILE puts examples before it, image and "Q: … A: …" each, every one ended by a newline. They are JSON
objects, one a line: {"image": path, "question": …, "answer": …}; paths start from the file's directory. Many questions
come from such a file too, by --questions=FILE, in place of an image and a question.
"""

from absl import flags

from limber_jax import cli
from limber_jax.errors import UserError
from limber_jax.inference.flags import Flags
from limber_jax.inference.output import stamped
from limber_jax.inference.questions import answers, read_lines

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
