"""Reports: the published numbers, the tables, the pictures, and the command."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
from matplotlib.image import imread

from limber_jax.errors import UserError
from limber_jax.reports import figures as figures_lib
from limber_jax.reports import published, report
from limber_jax.reports import runs as runs_lib
from limber_jax.reports.text import escape, markdown, number

# As LiMBeR's table 1 has them, typed from the paper and not from published.json: NoCaps CIDEr-D in, out, near
# and all, CLIP-S, RefCLIP-S; COCO CIDEr-D, CLIP-S, RefCLIP-S.
CAPTIONING = {
  "NFRN50 Tuned": "20.9 30.8 25.3 27.3 66.5 72.5 35.3 69.7 74.8",
  "MAGMA (released)": "18.0 12.7 18.4 16.9 63.2 68.8 52.1 76.7 79.4",
  "MAGMA (ours)": "30.4 43.4 36.7 38.7 74.3 78.7 47.5 75.3 79.6",
  "BEIT Random": "5.5 3.6 4.1 4.4 46.8 55.1 5.2 48.8 56.2",
  "NFRN50 Random": "5.4 4.0 4.9 5.0 47.5 55.7 4.8 49.5 57.1",
  "BEIT": "20.3 16.3 18.9 18.9 62.0 69.1 22.3 63.6 70.0",
  "NFRN50": "21.3 31.2 26.9 28.5 65.6 71.8 36.2 68.9 74.1",
  "BEIT FT": "38.5 48.8 43.1 45.3 73.0 78.1 51.0 74.2 78.9",
  "CLIP": "34.3 48.4 41.6 43.9 74.7 79.4 54.9 76.2 80.4"}
VQA = {
  "Blind": "20.60 35.11 36.17 36.99", "NFRN50 Tuned": "27.15 37.47 38.48 39.18",
  "MAGMA (ours)": "24.62 39.27 40.58 41.51", "MAGMA (reported)": "32.70 40.20 42.50 43.80",
  "NFRN50 Random": "25.34 36.15 36.79 37.43", "BEIT": "24.92 34.35 34.70 31.72",
  "NFRN50": "27.63 37.51 38.58 39.17", "CLIP": "33.33 39.93 40.82 40.34"}


def entry(evaluation, metrics, covered=100, num_examples=100, protocol=(), **metadata):
  """Returns one evaluation of results.json."""
  return {"evaluation": evaluation, "metrics": metrics, "protocol": {"name": evaluation, **dict(protocol)},
          "metadata": {"source": "made", "split": "val", "data": "0123456789abcdef", "num_examples": num_examples,
                       "covered": covered, "damaged": num_examples - covered, **metadata}}


def results(name="limber_clip", evaluations=(), model="", **changes):
  """Returns what results.json holds."""
  return {"name": name, "task": "captioning", "model": model, "step": 15000, "seed": 3,
          "weights": {"image": "aa11", "lm": "bb22"}, "versions": {"jax": "0.10.2"},
          "evaluations": dict(evaluations), "failed": {}, **changes}


def limber(name, cider=0.5485, shots0=0.333333):
  """Returns the results of a run of LiMBeR."""
  return results(name, {
    "coco": entry("captions", {"cider_d": cider, "clip_s": 0.7, "cider_d@blind": 0.011}, num_examples=5000,
                  covered=4998, damage=["val/1.jpg: cut short", "val/2.jpg: no | image"]),
    "vqa2": entry("vqa", {"accuracy_0shot": shots0, "accuracy_4shot": 0.4, "accuracy_0shot@blind_text": 0.2})})


def runs(*several):
  return [runs_lib.of(r, f"runs/{i}") for i, r in enumerate(several)]


def cells(text, title):
  """Returns the rows of the table below the heading `title`, the header first, cells stripped."""
  lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
  table = [line for line in lines if line.startswith("|")]
  return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table if set(line) - set("|-: ")]


# The published numbers


def test_published_metrics_of_limber_are_those_of_the_paper():
  metrics = {
    "nocaps": entry("captions", {f"cider_d{s}": 1.0 for s in ("", "/in", "/out", "/near")}
                    | {"clip_s": 1.0, "ref_clip_s": 1.0}),
    "coco": entry("captions", {"cider_d": 1.0, "clip_s": 1.0, "ref_clip_s": 1.0}),
    "vqa2": entry("vqa", {f"accuracy_{n}shot": 1.0 for n in (0, 1, 2, 4)})}
  rows = cells(report.report(runs(results("limber_clip", metrics), results("limber_beit"))), "Captioning and VQA")
  theirs, name = {}, None
  for row in rows[1:]:
    name = row[0] or name
    if row[1] == "LiMBeR paper":
      theirs[name] = row[2:]
  assert [n for n in theirs if n in CAPTIONING] == list(CAPTIONING)  # the paper's order
  for name, metrics in CAPTIONING.items():
    assert theirs[name][:9] == metrics.split(), name
  for name, metrics in VQA.items():
    assert theirs[name][9:] == metrics.split(), name
  assert theirs["BEIT FT"][9:] == theirs["BEIT Random"][9:] == ["–"] * 4
  assert theirs["Blind"][:9] == ["–"] * 9


@pytest.mark.parametrize(("evaluation", "model", "column", "source", "percent"), [
  ("class_mention", "limber_clip", "awa2/named", "LiMBeR paper", 59),
  ("class_mention", "limber_nfrn50", "awa2/overlap_wrong", "LiMBeR paper", 68),
  ("class_mention", "limber_nfrn50_random", "awa2/named", "LiMBeR paper", 0.4),
  ("zeroshot", "clip_rn50", "imagenet/top1", "CLIP paper", 59.6),
  ("zeroshot", "clip_rn50", "imagenet/top1", "open_clip", 59.82),
  ("zeroshot", "clip_vit_l14_336", "imagenet/top1", "open_clip", 76.56),
  ("zeroshot", "clip_vit_l14_336", "imagenet/top5", "CLIP paper", 95),
  ("zeroshot", "clip_vit_b32", "food101/top1", "open_clip", 84.0),
  ("zeroshot", "clip_vit_b32", "oxford_pets/mean_per_class", "open_clip", 87.0),
  ("zeroshot", "clip_rn101", "rendered_sst2/top1", "open_clip", 64.03),
  ("robustness", "clip_vit_l14_336", "imagenet_a/top1", "CLIP paper", 77.2),
  ("robustness", "clip_vit_l14_336", "imagenet_vid_robust/pm10_own", "CLIP paper", 89.2),
  ("robustness", "clip_vit_b16", "imagenet_r/top1", "open_clip", 77.7),
  ("robustness", "resnet101", "imagenet_a/top1", "CLIP paper", 2.7),
  ("retrieval", "clip_vit_l14_336", "coco/t2i_r1", "CLIP issue 115", 37.8),
  ("retrieval", "clip_vit_l14_336", "flickr30k/i2t_r1", "CLIP paper", 88.0),
  ("retrieval", "clip_vit_b32", "coco/i2t_r1", "open_clip", 50.12),
  ("retrieval", "clip_vit_b32", "flickr30k/t2i_r1", "open_clip", 58.78),
])
def test_other_published_metrics_are_those_of_their_sources(evaluation, model, column, source, percent):
  found = published.load().find(evaluation, model, column)
  assert {v for table, v in found if table.source == source} == {percent}


def test_every_published_metric_is_a_percentage_of_a_known_model_and_data_set():
  book = published.load()
  for table in book.tables:
    assert table.certainty in book.certainty and table.where
    assert set(table.rows) <= set(book.models)
    assert {c.split("/")[0] for c in table.columns} <= set(book.data)
    assert set(table.num_examples) | set(table.split) <= {c.split("/")[0] for c in table.columns}
    assert all(0 < v <= 100 for row in table.rows.values() for v in row.values())


@pytest.mark.parametrize(("name", "model"), [
  ("limber_nfrn50_tuned", "limber_nfrn50_tuned"), ("magma", "magma"), ("ViT-B/32", "clip_vit_b32"),
  ("clip_vitb", "clip_vit_b32"), ("clip_vitl14", "clip_vit_l14"), ("quickstart", None), ("", None)])
def test_an_experiment_is_known_by_its_name(name, model):
  assert published.load().model_of(name) == model


@pytest.mark.parametrize(("name", "evaluation", "data"), [
  ("coco", "captions", "coco"), ("coco_retrieval", "retrieval", "coco"), ("pcam", "zeroshot", "patch_camelyon"),
  ("ImageNet-A", "zeroshot", "imagenet_a"), ("imagenet_o", "zeroshot", None), ("zeroshot", "zeroshot", None)])
def test_a_data_set_is_known_by_the_name_of_its_evaluation(name, evaluation, data):
  assert published.load().data_of(name, evaluation) == data


# Text


@pytest.mark.parametrize(("value", "text"), [
  (0.549, "54.9"), (0.5485, "54.9"), (0.5484, "54.8"), (0.0, "0.0"), (-0.0001, "0.0"), (1.0, "100.0"), (10.0, "1000.0"),
  (0.00049, "0.0"), (0.0005, "0.1"), (None, "–"), (math.nan, "nan"), (-math.inf, "-inf"),
  (1e300, "1e+302"), (3, "300.0")])
def test_scores_are_times_100_and_rounded_half_up(value, text):
  assert number(value) == text


def test_vqa_has_two_digits():
  rows = cells(report.report(runs(limber("limber_clip"))), "Captioning and VQA")
  assert rows[0][-4:] == ["VQA2 0-shot", "1-shot", "2-shot", "4-shot"]
  assert rows[1][:2] == ["CLIP", "measured"] and rows[1][-4:] == ["33.33", "–", "–", "40.00"]


def test_columns_line_up_and_nothing_in_a_cell_breaks_the_table():
  rows = [("a|b", 1), ("new\nline *x* `y` <img> _z_", "–"), ("back\\slash", 12.5)]
  text = markdown(("name", "value"), rows, 1)
  lines = text.splitlines()
  assert len({len(line) for line in lines}) == 1 and len(lines) == 5
  assert lines[2].startswith("| a\\|b ") and lines[2].endswith("|     1 |")
  assert "new line \\*x\\* \\`y\\` &lt;img> \\_z\\_" in lines[3] and "back\\\\slash" in lines[4]
  assert lines[1].endswith("----: |")


def test_underscores_within_words_stay():
  assert escape("limber_nfrn50_tuned") == "limber_nfrn50_tuned"


# The report of one run


def test_a_run_is_first_and_the_paper_is_beneath():
  rows = cells(report.report(runs(limber("limber_nfrn50"))), "Captioning and VQA")
  assert rows[1][:2] == ["NFRN50", "measured"] and rows[2][:2] == ["", "LiMBeR paper"]
  assert rows[0][8] == "COCO" and rows[1][8] == "54.9" and rows[2][8] == "36.2"
  assert rows[3][0] == "NFRN50 Tuned" and len(rows) == 1 + 1 + 11 + 1  # measured, published, and measured blind
  blind = [row for row in rows if row[0] == "Blind"]
  assert blind == [["Blind", "measured", *["–"] * 6, "1.1", "–", "–", "20.00", "–", "–", "–"]]


def test_results_of_an_earlier_release_give_the_same_report():
  now = results(evaluations={"coco": entry("captions", {"cider_d": 0.5}), "awa2": entry("class_mention", {"right": 1})})
  text = json.dumps(now)
  for new, old in (("metrics", "figures"), ("metadata", "facts"), ("num_examples", "items"),
                   ("class_mention", "naming")):
    assert f'"{new}"' in text
    text = text.replace(f'"{new}"', f'"{old}"')
  assert report.report(runs(json.loads(text))) == report.report(runs(now))


def test_what_metrics_rest_on_is_reported():
  text = report.report(runs(results("limber_clip", {
    "coco": entry("captions", {"cider_d": 0.5, "count": 4998.0, "l2": 0.0123456, "cider_d/in@other": 0.25},
                  num_examples=5000, covered=4998, damage=["val/1.jpg: cut short", "val/2.jpg: no | image"],
                  protocol={"source.split": "karpathy_test", "metrics": ["cider_d", "spice"], "scorer": "",
                            "seeds": [1]},
                  prompts=[f"a photo {i}" for i in range(80)])},
    failed={"nocaps": "data/nocaps: no such | file"})))
  assert "Metrics of 4,998 of 5,000 examples, 2 damaged." in text
  assert "Damaged:\n\n- val/1.jpg: cut short\n- val/2.jpg: no \\| image" in text
  assert cells(text, "coco: captions")[:5] == [
    ["metric", "value", "other"], ["CIDEr-D", "50.0", "–"], ["count", "4,998", "–"], ["l2", "0.01235", "–"],
    ["CIDEr-D in", "–", "25.0"]]
  settings = dict(cells(text, "coco: captions")[6:])
  assert settings["source.split"] == "karpathy_test" and settings["metrics"] == "cider_d, spice"
  assert not {"scorer", "seeds"} & settings.keys()  # the first has its default, and captions have no others
  assert settings["prompts"] == "80: a photo 0, a photo 1, a photo 2, …" and settings["data"] == "0123456789abcdef"
  assert cells(text, "Failed evaluations") == [["evaluation", "reason"], ["nocaps", "data/nocaps: no such \\| file"]]
  assert cells(text, "Weights and versions")[1:] == [["weights.image", "aa11"], ["weights.lm", "bb22"],
                                                     ["versions.jax", "0.10.2"]]
  assert "captioning, step 15,000, seed 3." in text


def test_of_many_damaged_items_the_first_are_named():
  damage = [f"{i}.jpg: cut short" for i in range(30)]
  text = report.report(runs(results(evaluations={"a": entry("word_recall", {"count": 1.0}, 70, 100, damage=damage)})))
  assert "30 damaged" in text and "Damaged, the first 20:" in text and "19.jpg" in text and "20.jpg" not in text


def test_vqa_by_type_and_deviations_are_in_the_papers_unit():
  metrics = {"accuracy_4shot": 0.4034, "accuracy_4shot_sd": 0.00125, "accuracy_4shot/number": 0.3,
             "truncated_4shot@blind_zeros": 0.25}
  text = report.report(runs(results(evaluations={"vqa2": entry("vqa", metrics)})))
  assert cells(text, "vqa2: vqa")[:5] == [
    ["metric", "value", "blind_zeros"], ["4-shot", "40.34", "–"], ["4-shot, deviation", "0.13", "–"],
    ["4-shot number", "30.00", "–"], ["4-shot, truncated", "–", "25.00"]]


def test_another_number_of_examples_than_the_published_is_reported():
  text = report.report(runs(results("limber_clip", {"vqa2": entry("vqa", {"accuracy_0shot": 0.3})})))
  assert "Metrics of 100 of 100 examples. Published numbers are of 214,354 (LiMBeR paper)." in text
  whole = report.report(runs(results("limber_clip", {"vqa2": entry("vqa", {"accuracy_0shot": 0.3}, 214354, 214354)})))
  assert "214,354 of 214,354 examples." in whole and "Published numbers are of" not in whole


def test_how_certain_published_metrics_are_is_reported_of_those_shown_only():
  text = report.report(runs(limber("limber_clip")))
  assert "- LiMBeR paper, table 1 (arXiv 2209.15162); given to this project" in text and "open_clip" not in text
  text = report.report(runs(results("clip_vitb", {"imagenet": entry("zeroshot", {"top1": 0.63})})))
  assert "from memory: check it against the paper" in text and "docs/openclip_results.csv" in text


def test_zero_shot_has_the_papers_metric_of_each_data_set_and_the_sizes_next_to_the_model():
  text = report.report(runs(results("mine", {
    "pets": entry("zeroshot", {"top1": 0.9, "top5": 0.99, "mean_per_class": 0.875}),
    "imagenet": entry("zeroshot", {"top1": 0.6332, "count": 50000.0}),
    "digits": entry("zeroshot", {"top1": 0.981, "mean_per_class": 0.98})}, model="clip_vit_b32")))
  assert cells(text, "Zero-shot classification") == [
    ["data set", "metric", "CLIP ViT-B/32 (mine)", "measured again", "CLIP paper", "CLIP RN50x64", "CLIP ViT-B/16"],
    ["ImageNet", "top-1", "63.3", "63.3", "63.2", "73.9", "68.3"],
    ["Oxford Pets", "mean per class", "87.5", "87.0", "–", "93.6", "88.9"],
    ["digits", "top-1", "98.1", "–", "–", "–", "–"]]


def test_a_data_set_without_the_papers_metric_is_in_no_table():
  text = report.report(runs(results("mine", {"digits": entry("zeroshot", {"top5": 0.9})})))
  assert "Zero-shot classification" not in text and ["top-5", "90.0"] in cells(text, "digits: zeroshot")


def test_shifts_are_beside_the_published_ones_and_have_their_robustness():
  shifts = {"imagenet": {"top1": 0.75}, "imagenet_v2": {"top1": 0.7}, "imagenet_sketch": {"top1": 0.6}}
  text = report.report(runs(results("clip_vitl14", {
    f"my {name}": entry("robustness", metrics, protocol={"dataset": name}) for name, metrics in shifts.items()})))
  rows = cells(text, "Natural distribution shift")
  assert rows[0] == ["model", "source", "ImageNet", "V2", "A", "R", "ObjectNet", "Sketch", "Vid PM-0", "PM-10",
                     "YT-BB PM-0", "PM-10"]
  assert rows[1][:8] == ["CLIP ViT-L/14", "measured", "75.0", "70.0", "–", "–", "–", "60.0"]
  assert rows[2][:8] == ["", "open_clip", "75.5", "69.8", "70.8", "87.8", "68.9", "59.6"]
  assert rows[-1][:8] == ["ResNet-101 on ImageNet", "CLIP paper", "76.2", "64.3", "2.7", "37.7", "32.6", "25.2"]
  header, v2, sketch, mean = cells(text, "Effective robustness")
  assert header[2:] == ["ImageNet, same classes", "expected", "measured", "effective", "gap cut, %"]
  assert v2[1:3] == ["ImageNetV2", "75.0"] and mean[1] == "mean of 2"
  for row in (v2, sketch, mean):
    assert float(row[5]) == pytest.approx(float(row[4]) - float(row[3]), abs=0.11)


def test_relative_robustness_is_what_an_intervention_gained_under_each_shift():
  """Taori et al. (2020), section 3: accuracy under the shift after it, less that before it."""

  def run(name, **metrics):
    return results(name, {key: entry("robustness", {"top1": value}, protocol={"dataset": key})
                          for key, value in metrics.items()})

  before, after = runs(run("standard", imagenet=0.76, imagenet_v2=0.63, imagenet_sketch=0.25),
                       run("robust", imagenet=0.75, imagenet_v2=0.7, imagenet_sketch=0.21))
  header, v2, sketch, mean = cells(report.report([after], before=before), "Effective robustness")
  assert header[-1] == "relative to standard, runs/0"
  assert (v2[-1], sketch[-1], mean[-1]) == ("7.0", "-4.0", "1.5")
  assert cells(report.report([before, after], before=before), "Effective robustness")[1][-1] in ("0.0", "7.0")
  with pytest.raises(UserError, match="--before=runs/0: no accuracy there under a shift that the other"):
    report.report([after], before=runs(run("other", imagenet=0.7))[0])


def test_overlap_is_beside_clips_own_and_corrected_for_the_number_of_data_sets():
  birds = {"top1": 0.4, "clean": 0.39, "overlap": 0.5, "share": 0.1, "gain": 0.01, "p": 0.02}
  text = report.report(runs(results("mine", {
    "birdsnap_overlap": entry("contamination", birds),
    "digits": entry("contamination", {"top1": 0.9, "clean": 0.9, "share": 0.0})})))
  assert cells(text, "Overlap with the training data") == [
    ["model", "data set", "all", "clean", "overlap", "share, %", "gain", "p", "p, corrected", "CLIP's share, %",
     "CLIP's gain"],
    ["mine", "Birdsnap", "40.0", "39.0", "50.0", "10.0", "1.0", "0.02", "0.04", "12.1", "0.6"],
    ["mine", "digits", "90.0", "90.0", "–", "0.0", "–", "–", "–", "–", "–"],
    ["mine", "median of 2", "–", "–", "–", "5.0", "–", "–", "–", "2.2", "–"]]


def test_figures_that_are_not_finite_break_nothing(tmp_path):
  broken = limber("limber_clip", cider=math.nan, shots0=math.inf)
  broken["evaluations"]["contamination"] = entry("contamination", {"share": math.nan, "gain": math.nan, "p": math.nan})
  broken["evaluations"]["imagenet"] = entry("zeroshot", {"top1": math.nan})
  broken["evaluations"]["robustness"] = entry("robustness", {"top1": -math.inf}, protocol={"dataset": "imagenet"})
  report.write(json.loads(json.dumps(broken)), str(tmp_path))
  rows = cells((tmp_path / "report.md").read_text(), "Captioning and VQA")
  assert rows[1][:2] == ["CLIP", "measured"] and "nan" in rows[1] and "inf" in rows[1]


# The report of several runs


def test_several_runs_are_rows_in_the_papers_order_unknown_ones_last():
  several = runs(results("my|run", {"coco": entry("captions", {"cider_d": 0.1})}),
                 *map(limber, ["limber_clip", "magma", "limber_nfrn50_tuned", "limber_beit_ft", "limber_beit"]))
  text = report.report(several)
  rows = cells(text, "Captioning and VQA")
  assert [row[0] for row in rows if row[1] == "measured"] == [
    "NFRN50 Tuned", "MAGMA (ours)", "BEIT", "BEIT FT", "CLIP", "Blind", "my\\|run"]  # all are blind in the same way
  assert [row[0] for row in rows if row[1] == "LiMBeR paper" and row[0]] == [
    "MAGMA (released)", "BEIT Random", "NFRN50 Random", "NFRN50", "MAGMA (reported)"]
  assert len(cells(text, "What the metrics rest on")) == 1 + 1 + 5 * 2
  assert text.startswith("# 6 runs\n")


def test_two_runs_of_one_name_are_distinguished_by_their_workdirs():
  rows = cells(report.report(runs(limber("limber_clip", 0.5), limber("limber_clip", 0.6))), "Captioning and VQA")
  assert [(row[0], row[8]) for row in rows if row[1] == "measured"][:2] == [
    ("CLIP (runs/0)", "50.0"), ("CLIP (runs/1)", "60.0")]


def test_other_evaluations_have_a_column_a_run():
  text = report.report(runs(
    results("limber_beit", {"words": entry("word_recall", {"nouns_f1": 0.5})}),
    results("limber_clip", {"words": entry("word_recall", {"nouns_f1": 0.25, "count": 40.0})})))
  assert cells(text, "words: word_recall") == [
    ["metric", "BEIT", "CLIP"], ["nouns_f1", "0.5", "0.25"], ["count", "–", "40"]]


def test_of_two_evaluations_of_a_data_set_the_one_with_its_name_is_in_the_table():
  there = {"source.path": "data/tfds/cifar10"}
  both = {"single_prompt": entry("zeroshot", {"top1": 0.1}, protocol=there),
          "cifar10": entry("zeroshot", {"top1": 0.2}, protocol=there)}
  rows = cells(report.report(runs(results("clip_rn50", both))), "Zero-shot classification")
  assert [row[:3] for row in rows[1:]] == [["CIFAR10", "top-1", "20.0"], ["single_prompt", "top-1", "10.0"]]


@pytest.mark.parametrize(("name", "kind", "protocol", "data"), [
  ("a", "captions", {"source.path": "/d/dataset_coco.json", "classes": ""}, "coco"),
  ("a", "captions", {"source.path": "/d/nocaps_val_4500_captions.json", "classes": ""}, "nocaps"),
  ("a", "zeroshot", {"source.path": "data/birds", "classes": "birdsnap"}, "birdsnap"),
  ("a", "zeroshot", {"source.path": "data/a", "classes": "imagenet"}, "a"),  # those of ImageNet-V2 are the same
  ("imagenet_v2", "zeroshot", {"source.path": "data/a", "classes": "imagenet"}, "imagenet_v2"),
  ("coco", "robustness", {"source.path": "data/a", "dataset": "objectnet"}, "objectnet")])
def test_a_data_set_is_known_by_name_classes_or_file(name, kind, protocol, data):
  run = runs_lib.of(results(evaluations={name: entry(kind, {"x": 0.5}, protocol=protocol)}), "")
  assert run.data == {name: data} and run.scores == {(kind, ""): {f"{data}/x": 0.5}}


def test_a_report_is_the_same_every_time(tmp_path):
  for folder in ("a", "b"):
    report.write(limber("limber_clip"), str(tmp_path / folder))
  names = sorted(os.listdir(tmp_path / "a"))
  assert names == ["report.md", "report_captioning.png", "report_vqa.png"] == sorted(os.listdir(tmp_path / "b"))
  for name in names:
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# Pictures


def test_pictures_are_drawn_of_what_there_is(tmp_path):
  shifts = {f"shift_{name}": entry("robustness", {"top1": 0.6}, protocol={"dataset": name})
            for name in ("imagenet", "imagenet_v2")}
  clip = results("clip_vitb", {name: entry("zeroshot", {"top1": 0.6}) for name in ("imagenet", "cifar10")} | shifts)
  report.write(clip, str(tmp_path))
  text = (tmp_path / "report.md").read_text()
  for name in ("zeroshot", "robustness"):
    assert f"![report_{name}](report_{name}.png)" in text
    image = imread(tmp_path / f"report_{name}.png")
    assert image.shape[1] > 300 and len(set(map(tuple, image.reshape(-1, image.shape[2])[::7].tolist()))) > 3
  assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "report_vqa.png").exists()
  assert set(figures_lib.pictured(runs(limber("magma"), limber("my$model"), clip))) == {"captioning", "vqa", "zeroshot"}
  assert figures_lib.pictured(runs(results())) == {}


def test_bars_and_lines_are_where_the_metrics_are():
  figures = figures_lib.pictured(runs(limber("limber_clip", cider=0.5, shots0=0.3)))
  bars = figures["captioning"].axes[0].containers
  assert [b.get_height() for b in bars[0]] == [50, 70]
  assert [b.get_height() for b in bars[1]] == [54.9, 76.2]
  lines = {line.get_label(): line.get_xydata().tolist() for line in figures["vqa"].axes[0].lines}
  assert lines["CLIP"] == [[0, 30], [4, 40]] and lines["Blind"] == [[0, 20]]
  assert [0, 33.33] in [line.get_xydata().tolist()[0] for line in figures["vqa"].axes[0].lines]


# Mistakes


def damaged(change):
  """Returns results with a change made to them."""
  out = copy.deepcopy(limber("limber_clip"))
  change(out)
  return out


@pytest.mark.parametrize(("change", "message"), [
  (lambda r: r.pop("step"), "step: expected int, got nothing"),
  (lambda r: r.update(evaluations=[]), "evaluations: expected dict, got []"),
  (lambda r: r["evaluations"].update(coco=3), "evaluations.coco: expected an object with evaluation, metrics"),
  (lambda r: r["evaluations"]["coco"].pop("metadata"), "evaluations.coco: metadata: expected dict, got nothing"),
  (lambda r: r["evaluations"]["coco"]["metrics"].update(x="1"), "coco.metrics.x: expected a number, got '1'"),
  (lambda r: r["evaluations"]["coco"]["metrics"].update(x=10**400), "coco.metrics.x: expected a number, got 1000"),
])
def test_another_layout_is_named(change, message):
  with pytest.raises(UserError) as error:
    runs_lib.of(damaged(change), "runs/a")
  assert message in str(error.value) and "runs/a" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("content", "message"), [
  (None, "no results.json there; run python -m limber_jax.evaluate --workdir="),
  (b'{"name": "x", "eval', "is no JSON (Unterminated string"),
  (b"\xff\xfe\x00", "is no JSON"),
  (b"[" * 100_000, "is no JSON"),
  (b"[]", "expected an object with name, task"),
  (b'{"name": "quickstart", "step": 3, "metrics": {}}', "task: expected str, got nothing; run limber_jax.evaluate"),
])
def test_results_that_cannot_be_read_are_reported_in_one_line(content, message, tmp_path):
  if content is not None:
    (tmp_path / "results.json").write_bytes(content)
  with pytest.raises(UserError) as error:
    runs_lib.read(str(tmp_path))
  assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.process
def test_the_command_prints_and_writes_and_names_mistakes(tmp_path):
  for name in ("limber_clip", "limber_beit"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps(limber(name)))

  def call(*arguments):
    return subprocess.run([sys.executable, "-m", "limber_jax.report", *arguments], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONIOENCODING": "utf-8"})

  printed = call("limber_clip")
  assert printed.returncode == 0, printed.stderr
  assert printed.stdout == report.report([runs_lib.read(str(tmp_path / "limber_clip"))]) and printed.stderr == ""
  written = call("limber_clip", "limber_beit", "--out=out/table.md")
  assert written.returncode == 0, written.stderr
  assert written.stdout == "written to out/table.md\n"
  assert sorted(os.listdir(tmp_path / "out")) == ["table.md", "table_captioning.png", "table_vqa.png"]
  assert [r[0] for r in cells((tmp_path / "out/table.md").read_text(), "Captioning and VQA") if r[1] == "measured"] == [
    "BEIT", "CLIP", "Blind"]
  wrong = call("limber_clip", "limber_cilp")
  assert wrong.returncode == 2 and wrong.stdout == ""
  assert wrong.stderr == ("error: limber_cilp: no results.json there; run python -m limber_jax.evaluate "
                          "--workdir=limber_cilp --config=… first\n")
