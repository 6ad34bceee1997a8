"""The evaluation of captions: metrics by map and domain, CLIPScore by a tiny CLIP, and captions hard to score."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Compute, Decoding, Source
from limber_jax.data import transforms
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.decoding.generate import Generated
from limber_jax.errors import UserError
from limber_jax.evals.base import Stopped
from limber_jax.evals.captions import NO_SCORER, Captions
from limber_jax.metrics import captions as metric
from limber_jax.models import clip, encoders
from limber_jax.models.gptj import GPTJSize
from limber_jax.models.limber import LimberConfig
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training.setup import evaluate, make_context, make_eval, setup
from limber_jax.weights import export, load
from tests.made import config, context, install
from tests.runs import tiny_limber
from tests.standins import write_nocaps

TEXTS = ("a red dog runs over the grass", "two people sit (old) on a bench", "white kites fly up high",
         "a cat sleeps in the sun all day", "the bus stops at a red light", "a man eats pizza with his hands")
FAST = [m for m in metric.METRICS if m not in ("meteor", "spice")]


@pytest.fixture
def made(monkeypatch):
  """Sets the records of the data source "made"; captions are scored without Java, which takes seconds to start."""
  monkeypatch.setattr(metric, "has_java", lambda: False)
  return install(monkeypatch)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
  """The directory of a random CLIP that reads bytes, as a run of training records it."""
  size = clip.SIZES["clip_vit_b32_mu"]()
  task = Contrastive(clip.build(size, Compute(dtype="float32")), "softmax", 0, 1, ())
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype),
                        jax.eval_shape(task.init, jax.random.key(0))[0])
  path = tmp_path_factory.mktemp("clip")
  export.save(str(path), "limber", size, params, {})
  (path / "checkpoints").mkdir()
  (path / "config.json").write_text(json.dumps({"data.tokenizer.name": "bytes", "data.tokenizer.path": ""}))
  return str(path)


def records(domains=()):
  """Returns records with the references "TEXTS[i]", "TEXTS[i] today" and, in turn, domains."""
  return [{"text": text, "texts": (text, f"{text} today")} | ({"domain": domains[i % len(domains)]} if domains else {})
          for i, text in enumerate(TEXTS)]


def writing(captions):
  """Returns a "generate" that writes caption i about record i."""
  length = max(map(len, captions)) + 1
  rows = np.concatenate([ByteTokenizer()(text, length + 2)[:, 1:] for text in captions])
  rows = np.where((rows == 0), ByteTokenizer.eot, rows)

  def generate(params, stats, batch, eos):
    tokens = jnp.asarray(rows)[batch["index"]]
    return Generated(tokens, (tokens == eos).argmax(-1), jnp.zeros(len(tokens)))

  return generate


def settings(workdir, mesh=(1, 1, 1), **fields):
  return dataclasses.replace(context(mesh, workdir=workdir), decoding=Decoding(prompt=""), name="coco",
                             results_dir=str(workdir / "results"), **fields)


def scored(captions, which=range(6), metrics=FAST):
  """Returns what pycocoevalcap says of these captions, by metric."""
  return metric.score({str(i): captions[i] for i in which}, {str(i): records()[i]["texts"] for i in which},
                      metrics)


def test_figures_are_those_of_the_metrics_for_every_map_and_blind(made, tmp_path):
  made(records())
  other = [f"the {text}" for text in TEXTS[::-1]]
  blind = ["a photo"] * len(TEXTS)
  run = config(Captions).open(settings(tmp_path))
  found = run({"nll": None, "generate": writing(TEXTS), "generate@b": writing(other), "generate_blind": writing(blind)},
              {}, {})
  wanted = {**scored(TEXTS).metrics, **{f"{m}@b": v for m, v in scored(other).metrics.items()},
            **{f"{m}@blind": v for m, v in scored(blind).metrics.items()}}
  assert found == {**wanted, "count": 6.0}
  assert 5 < found["cider_d"] < 10 and found["bleu_1"] == pytest.approx(1) and found["cider_d@b"] < 1
  metadata = run.metadata()
  assert metadata["tokenizer"] == "python" and metadata["references"] == 12 and metadata["decoding"]["prompt"] == ""
  assert metadata["empty"] == {"first": 0, "@b": 0, "@blind": 0} and metadata["covered"] == 6
  assert metadata["skipped"] == {"meteor": metric.NO_JAVA, "spice": metric.NO_JAVA, "clip_s": NO_SCORER,
                              "ref_clip_s": NO_SCORER}
  assert json.loads(json.dumps(metadata)) == metadata
  with Image.open(tmp_path / "captions_coco.png") as sheet:
    assert sheet.width > 300


def test_every_image_has_its_scores_in_a_file(made, tmp_path):
  made(records())
  captions = [TEXTS[0], "", *TEXTS[2:]]
  config(Captions, metrics=("rouge_l", "cider_d")).open(settings(tmp_path))(
    {"generate": writing(captions), "generate@b": writing(TEXTS)}, {}, {})
  lines = [json.loads(line) for line in (tmp_path / "results" / "scores.jsonl").read_text().splitlines()]
  theirs = scored(captions, metrics=("cider_d", "rouge_l")).per_image
  assert lines == [{"index": i, "id": str(i), "caption": captions[i], **theirs[str(i)]} for i in range(6)]
  assert lines[1]["rouge_l"] == 0 < lines[0]["rouge_l"]
  assert len((tmp_path / "results" / "scores@b.jsonl").read_text().splitlines()) == 6


def test_domains_have_word_frequencies_of_their_own(made, tmp_path):
  made(records(("in-domain", "near-domain")))
  captions = [f"{text} or so" for text in TEXTS]
  found = config(Captions, metrics=("cider_d", "rouge_l")).open(settings(tmp_path))(
    {"generate": writing(captions), "generate@b": writing(TEXTS)}, {}, {})
  whole = scored(captions, metrics=("cider_d", "rouge_l")).metrics
  wanted = {"cider_d": whole["cider_d"], "rouge_l": whole["rouge_l"]}
  for name, which in (("in", (0, 2, 4)), ("near", (1, 3, 5))):
    wanted[f"cider_d/{name}"] = scored(captions, which, ("cider_d",)).metrics["cider_d"]
    wanted[f"count/{name}"] = 3.0
  assert {k: v for k, v in found.items() if "@" not in k} == {**wanted, "count": 6.0}
  assert found["cider_d/in@b"] == scored(TEXTS, (0, 2, 4), ("cider_d",)).metrics["cider_d"]
  among_all = scored(captions, metrics=("cider_d",)).per_image
  assert wanted["cider_d/in"] != pytest.approx(np.mean([among_all[i]["cider_d"] for i in "024"]), abs=1e-3)


def test_hard_captions_are_counted_and_scored(made, tmp_path):
  made(records())
  captions = ["", "a red dog " * 1000, "white\rkites\u2028fly\x85up high", "(((", "   ", TEXTS[5]]
  run = config(Captions).open(settings(tmp_path))
  found = run({"generate": writing(captions)}, {}, {})
  assert found["count"] == 6 and np.isfinite(list(found.values())).all()
  assert run.metadata()["empty"] == {"first": 2}
  lines = [json.loads(line) for line in (tmp_path / "results" / "scores.jsonl").read_text().splitlines()]
  assert len(lines[1]["caption"]) == 9999 and [line["rouge_l"] > 0 for line in lines] == [0, 1, 1, 0, 0, 1]
  assert lines[1]["rouge_l"] < 0.01 and lines[2]["rouge_l"] == lines[5]["rouge_l"] == 1


def test_images_that_cannot_be_read_are_left_out(made, tmp_path, scorer):
  made([r | ({"broken": True} if i == 1 else {}) for i, r in enumerate(records())])
  run = config(Captions, max_bad_fraction=0.5, scorer=scorer).open(settings(tmp_path))
  found = run({"generate": writing(TEXTS)}, {}, {})
  assert found["count"] == 5 and (run.metadata()["covered"], run.metadata()["damaged"]) == (5, 1)
  assert found["cider_d"] == scored(TEXTS, (0, 2, 3, 4, 5)).metrics["cider_d"]
  made([r | {"broken": True} for r in records()])
  with pytest.raises(UserError, match="no image of data source 'made' can be read"):
    config(Captions, max_bad_fraction=1.0).open(settings(tmp_path / "none"))({"generate": writing(TEXTS)}, {}, {})


def clip_scores(workdir, captions):
  """Returns (CLIPScore [N], RefCLIPScore [N]) of the made records, one image and one text at a time."""
  loaded = load.load(workdir)
  predict = Contrastive(clip.build(loaded.size, Compute(dtype="float32")), "softmax", 0, 1, ()).predict()
  length, side = loaded.size.text.context, loaded.size.image.image_size
  read, look = jax.jit(predict["embed_text"]), jax.jit(predict["embed_image"])

  def text(words):
    return np.asarray(read(loaded.params, {}, ByteTokenizer()(f"A photo depicts {words}", length)))[0]

  score, with_references = [], []
  for i, caption in enumerate(captions):
    pixels = transforms.ResizeCrop(side, "center")({"image": np.full((8, 8, 3), i, np.uint8)}, None)["image"]
    image, wrote = np.asarray(look(loaded.params, {}, pixels[None]))[0], text(caption)
    a = 2.5 * max(float(image @ wrote), 0.0)
    b = max(max(float(wrote @ text(r)) for r in records()[i]["texts"]), 0.0)
    score.append(a)
    with_references.append(2 * a * b / (a + b) if a + b else 0.0)
  return score, with_references


@pytest.mark.parametrize("mesh", [(1, 1, 1), (4, 2, 1)])
def test_clip_score_is_that_of_the_scorer_alone(made, tmp_path, scorer, mesh):
  made(records(("in-domain", "out-domain")))
  captions = ["", "a red dog " * 1000, *TEXTS[3:], TEXTS[5]]
  run = config(Captions, metrics=("clip_s", "ref_clip_s"), scorer=scorer).open(settings(tmp_path, mesh))
  found = run({"generate": writing(captions), "generate@b": writing(TEXTS)}, {}, {})
  for end, wrote in (("", captions), ("@b", TEXTS)):
    for name, values in zip(("clip_s", "ref_clip_s"), clip_scores(scorer, wrote), strict=True):
      assert found[f"{name}{end}"] == pytest.approx(np.mean(values), abs=1e-5)
      assert found[f"{name}/in{end}"] == pytest.approx(np.mean(values[::2]), abs=1e-5)
      assert found[f"{name}/out{end}"] == pytest.approx(np.mean(values[1::2]), abs=1e-5)
  assert found["clip_s"] != found["clip_s@b"]
  assert run.metadata()["scorer"]["prefix"] == "A photo depicts " and run.metadata()["skipped"] == {}


def test_a_caption_that_is_a_reference_has_a_cosine_of_one_with_it(made, tmp_path, scorer):
  made(records())
  run = config(Captions, metrics=("clip_s", "ref_clip_s"), scorer=scorer).open(settings(tmp_path))
  run({"generate": writing(TEXTS)}, {}, {})
  for line in map(json.loads, (tmp_path / "results" / "scores.jsonl").read_text().splitlines()):
    assert line["ref_clip_s"] == pytest.approx(2 * line["clip_s"] / (line["clip_s"] + 1), abs=1e-6)


@pytest.mark.parametrize(("fields", "message"), [
  ({"metrics": ("cider",)}, "metrics='cider': choose one of cider_d"),
  ({"metrics": ("cider_d", "clip_s")}, "'clip_s' needs a CLIP"),
  ({"scorer": "nowhere"}, "nowhere"),
])
def test_settings_that_do_not_fit_are_named(made, tmp_path, fields, message):
  made(records())
  with pytest.raises(UserError, match=message):
    config(Captions, **fields).open(settings(tmp_path))


def test_a_scorer_whose_tokenizer_is_unknown_or_too_large_is_named(made, monkeypatch, tmp_path, scorer):
  made(records())
  run = tmp_path / "run"
  shutil.copytree(scorer, run)
  (run / "config.json").write_text(json.dumps({"data.tokenizer.name": "gone", "data.tokenizer.path": ""}))
  with pytest.raises(UserError, match="no tokenizer 'gone'"):
    config(Captions, scorer=str(run)).open(settings(tmp_path))
  monkeypatch.setattr(ByteTokenizer, "vocab_size", 1000)
  with pytest.raises(UserError, match="its tokenizer 'bytes' has 1000 ids, the model only 512"):
    config(Captions, scorer=scorer).open(settings(tmp_path))


@pytest.mark.process
def test_a_tiny_model_captions_nocaps_files_and_resumes_where_it_was_killed(monkeypatch, tmp_path, scorer):
  monkeypatch.setattr(metric, "has_java", lambda: False)
  files = write_nocaps(tmp_path / "nocaps", hostile=True)
  source = Source(name="coco", path=files.path, split="")
  evals = {"nocaps": Captions(source=source, batch_size=8, max_bad_fraction=0.4, scorer=scorer)}
  size = LimberConfig(image=encoders.encoder_size("clip_vit_b32_mu"),
                    lm=GPTJSize(vocab=259, context=160, width=64, layers=2, heads=2, rotary=16))
  s = setup(tiny_limber(evals=evals, model=size, trainable=("prompt",)))
  state = s.init()

  def run(folder, stop=lambda: False):
    where = dataclasses.replace(make_context(s, str(tmp_path / folder), stop),
                                results_dir=str(tmp_path / folder / "results"))
    runs = {"nocaps": make_eval(s, "nocaps", where)}
    return evaluate(s, runs, state.params, state.stats), runs["nocaps"].metadata()

  found, metadata = run("whole")
  parts = {f"{m}/{part}" for part in ("in", "near", "out") for m in ("cider_d", "clip_s", "ref_clip_s")}
  parts |= {*FAST, "clip_s", "ref_clip_s"}
  assert found.keys() == {f"nocaps/{p}{end}" for p in parts for end in ("", "@blind")} | {
    f"nocaps/count{part}" for part in ("", "/in", "/near", "/out")}
  assert np.isfinite(list(found.values())).all()
  assert found["nocaps/count"] == 21 == metadata["covered"] == metadata["num_examples"] - metadata["damaged"]
  assert metadata["damaged"] == len(files.damage) + len(files.unreadable)
  asked = []

  def stop():
    asked.append(1)
    return len(asked) == 5

  with pytest.raises(Stopped):
    run("killed", stop)
  again, facts_again = run("killed")
  assert (again, facts_again) == (found, metadata)
  for path in sorted((tmp_path / "whole/results/nocaps").glob("*.jsonl")):
    assert (tmp_path / "killed/results/nocaps" / path.name).read_bytes() == path.read_bytes()
