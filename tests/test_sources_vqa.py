"""The data source of VQA v2: its files in their real layout, and what is damaged in them."""

import json
import pickle
import re

import pytest

from limber_jax.config import Source
from limber_jax.data.sources.vqa import Vqa
from limber_jax.errors import UserError
from tests.standins import write_vqa2

QUESTIONS, ANSWERS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"


def opened(path, split="val2014", **fields):
  return Vqa(Source(name="vqa", path=str(path), split=split, **fields))


def question(id_=1, **fields):
  return {"question_id": id_, "image_id": 42, "question": "is it?"} | fields


def answers(id_=1, **fields):
  people = [{"answer": "yes", "answer_id": i, "answer_confidence": "maybe"} for i in range(1, 11)]
  return {"question_id": id_, "image_id": 42, "answers": people, "multiple_choice_answer": "yes",
          "answer_type": "yes/no", "question_type": "is it"} | fields


def write(folder, questions, annotations):
  (folder / QUESTIONS).write_text(json.dumps({"questions": questions}))
  (folder / ANSWERS).write_text(json.dumps({"annotations": annotations}))


def test_records_are_those_of_the_files(tmp_path):
  write(tmp_path, [question(7, question="what?", image_id=3), question(5)],
        [answers(5), answers(7, multiple_choice_answer="two", answer_type="number", question_type="what",
                             answers=[{"answer": "two"}] * 6 + [{"answer": "2"}] * 4)])
  source = opened(tmp_path)
  assert len(source) == 2 and source.damage == []
  assert source.annotation(0) == {"id": "7", "text": "what?", "answers": ("two",) * 6 + ("2",) * 4, "answer": "two",
                                  "answer_type": "number", "question_type": "what"}
  assert source.annotation(1)["answers"] == ("yes",) * 10
  (tmp_path / "val2014").mkdir()
  (tmp_path / "val2014" / "COCO_val2014_000000000003.jpg").write_bytes(b"three")
  assert source[0] == source.annotation(0) | {"image": b"three"}
  assert pickle.loads(pickle.dumps(source))[0] == source[0]
  with pytest.raises(UserError, match=r"no image 'COCO_val2014_000000000042\.jpg' in "):
    source[1]


def test_the_directory_the_file_and_a_directory_of_images_lead_to_the_same_records(tmp_path):
  written = write_vqa2(tmp_path / "data")
  a, b = opened(tmp_path / "data"), opened(written.path)
  (tmp_path / "data" / "val2014").rename(tmp_path / "elsewhere")
  c = opened(written.path, images=str(tmp_path / "elsewhere"))
  assert len(a) == written.records == len(c)
  assert a.fingerprint() == b.fingerprint() == c.fingerprint()
  assert c[5]["image"][:2] == b"\xff\xd8" and c[5]["answer_type"] == "other"
  train = write_vqa2(tmp_path / "data", subset="train2014")
  assert opened(train.path, "train2014").fingerprint() != a.fingerprint()


@pytest.mark.parametrize("change", [
  {"answers": [{"answer": "no"}] * 10}, {"multiple_choice_answer": "no"}, {"answer_type": "other"}])
def test_the_fingerprint_changes_with_the_data(tmp_path, change):
  write(tmp_path, [question()], [answers()])
  before = opened(tmp_path).fingerprint()
  write(tmp_path, [question()], [answers(**change)])
  assert opened(tmp_path).fingerprint() != before


def test_what_is_damaged_is_named_once_and_the_rest_is_kept(tmp_path):
  write(tmp_path,
        [question(1), question(1, question="again?"), question(1), "no object", {"question": "who?"}, question("2"),
         question(3, question=" \n"), question(4, question="x" * 10_000), question(5), question(6), question(7),
         question(8, image_id=None), question(9), question(10), question(11)],
        [answers(1), answers(3), answers(6, answers=[]), answers(7, answers=[{"answer": "yes"}, {"answr": "yes"}]),
         answers(9), answers(9), answers(10, answer_type=None), [], answers(12), answers(11)])
  source = opened(tmp_path)
  assert [source.annotation(i)["id"] for i in range(len(source))] == ["1", "9", "11"]
  assert source.annotation(0)["text"] == "is it?"
  twice = "its id is listed twice, and the first counts"
  assert source.damage == [{"file": file, "id": id_, "reason": reason} for file, id_, reason in (
    (QUESTIONS, "question 1", twice),
    (QUESTIONS, "entry 3", "wanted an object, got str"),
    (QUESTIONS, "entry 4", "no 'question_id'"),
    (QUESTIONS, "entry 5", "'question_id' is of type str"),
    (QUESTIONS, "question 3", "empty question"),
    (QUESTIONS, "question 4", "question of 10,000 characters, wanted fewer than 10,000"),
    (QUESTIONS, "question 8", "'image_id' is of type NoneType"),
    (ANSWERS, "question 6", "no answers"),
    (ANSWERS, "question 7", "answer 1: no 'answer'"),
    (ANSWERS, "question 9", twice),
    (ANSWERS, "question 10", "'answer_type' is of type NoneType"),
    (ANSWERS, "entry 7", "wanted an object, got list"),
    (ANSWERS, "question 5", "no entry with its answers"),
    (ANSWERS, "annotation 12", f"answers to a question that is not in {QUESTIONS}"))]


def test_hostile_files_give_the_records_of_the_others_and_the_unreadable_ones(tmp_path):
  written, plain = write_vqa2(tmp_path / "a", hostile=True), write_vqa2(tmp_path / "b")
  source, other = opened(written.path), opened(plain.path)
  assert len(source) == written.records
  assert {d["id"] for d in source.damage} == set(written.damage) and len(source.damage) == len(written.damage)
  ids = [source.annotation(i)["id"] for i in range(len(source))]
  assert [i for i in ids if i not in written.unreadable] == [other.annotation(i)["id"] for i in range(len(other))]


def test_files_that_are_no_vqa_are_reported_in_a_line(tmp_path):
  def refused(match, **fields):
    with pytest.raises(UserError, match=match) as error:
      opened(**{"path": tmp_path, **fields})
    assert "\n" not in str(error.value)

  page = re.escape("https://visualqa.org/download.html")
  refused("source.split='val': VQA v2 has answers to train2014 and val2014; did you mean 'val2014'", split="val")
  refused(f"{QUESTIONS}': no such file; wanted VQA v2's {QUESTIONS} and beside it {ANSWERS} .{page}.")
  (tmp_path / QUESTIONS).write_text('{"questions": [{"question_id": 1, "question": "ü?", "ima')
  refused(f"{QUESTIONS}, byte 53 of 57: not JSON .*; the file is cut off")
  write(tmp_path, [question()], [answers(2)])
  (tmp_path / ANSWERS).unlink()
  refused(f"{ANSWERS}': no such file; wanted .*{page}")
  write(tmp_path, [question()], [answers(2)])
  refused(f"answers to none of the questions; the first flaw: {ANSWERS}: question 1: no entry with its answers; wanted")
  (tmp_path / ANSWERS).write_text('{"answers": []}')
  refused(f"{ANSWERS}: wanted a list of 'annotations', got no such key")
