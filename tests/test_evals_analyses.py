"""LiMBeR's analyses, on captions and prompts made by hand, and on a tiny model with files in the published layouts."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from limber_jax.config import Decoding, Source, evaluation_of
from limber_jax.data import transforms
from limber_jax.data.sources.digits import CLASSES
from limber_jax.data.tokenizers import ByteTokenizer
from limber_jax.decoding.generate import Generated
from limber_jax.errors import UserError
from limber_jax.evals import class_mention, prompt_probing, word_recall
from limber_jax.evals.class_mention import ClassMention, named, names_of, overlap
from limber_jax.evals.hallucination import Hallucination
from limber_jax.evals.prompt_probing import (
  PromptProbing,
  nearest,
  plane,
  pool,
)
from limber_jax.evals.word_recall import WordRecall
from limber_jax.metrics.words import WordNet
from limber_jax.models import encoders
from limber_jax.models.gptj import GPTJSize
from limber_jax.models.limber import LimberConfig, ProjectorConfig
from limber_jax.registry import SOURCES
from limber_jax.training.setup import evaluate, make_context, make_eval, setup
from tests.made import Made, MadeConfig, config, context, install
from tests.runs import tiny_limber
from tests.standins import write_awa2


@pytest.fixture
def made(monkeypatch):
  """Sets the records and classes of the data source "made"."""
  return install(monkeypatch)


def writing(captions, eos=ByteTokenizer.eot, length=60):
  """Returns a "generate" that writes caption i about record i; one that ends in … is cut off by the length."""
  rows = np.full((len(captions), length), eos, np.int32)
  for row, caption in zip(rows, captions, strict=True):
    ids = ByteTokenizer().encode(caption)
    ids = (ids * length)[:length] if caption.endswith("…") else ids
    row[: len(ids)] = ids

  def generate(params, stats, batch, eos):
    tokens = jnp.asarray(rows)[batch["index"]]
    ends = tokens == eos
    return Generated(tokens, jnp.where(ends.any(-1), ends.argmax(-1), length), jnp.zeros(len(tokens)))

  return generate


def settings(workdir, **fields):
  return dataclasses.replace(context(workdir=workdir), decoding=Decoding(prompt=""), **fields)


# ClassMention

@pytest.mark.parametrize(("caption", "classes"), [
  ("a photo of the digit Seven.", {7}), ("seventy", set()), ("one or two", {1, 2}), ("", set()), ("number\nzero", {0}),
  ("two sevens", {2, 7}),
])
def test_a_class_is_named_by_its_whole_name(caption, classes):
  assert named(caption, names_of([(name,) for name in CLASSES])) == classes


@pytest.mark.parametrize(("caption", "classes"), [
  ("two blue whales and oxen", {0, 2}), ("a Blue Whale", {0}), ("a whale", set()), ("blue, whale", set()),
  ("I like C++!", {1}), ("C + +", {1}), ("c", set()), ("pandas", {3}), ("a giant panda", {3}), ("mice", {4}),
])
def test_names_of_several_words_and_plurals_are_found(caption, classes):
  assert named(caption, names_of([("blue whale",), ("C++",), ("ox",), ("giant panda", "panda"), ("mouse",)])) == classes


def test_captions_are_counted_by_map_and_without_an_image(made, tmp_path):
  made([{"label": label} for label in (0, 1, 2, 1)], classes=("cat", "dog", "bird"))
  texts = np.array([ByteTokenizer()(text, 8)[0][1:] for text in ("a cat", "a dog", "a bird", "a fish")])

  def generate(which, params, stats, batch, eos):
    assert eos == ByteTokenizer.eot and batch["tokens"].shape == batch["mask"].shape == (8, 1)
    tokens = jnp.asarray(texts)[which(batch)]
    return Generated(tokens, (tokens != eos).argmin(-1), tokens[:, 0])

  right = lambda batch: batch["label"]  # noqa: E731
  never = lambda batch: jnp.full_like(batch["label"], 1)  # noqa: E731
  predict = {"nll": None, "generate": functools.partial(generate, right),
             "generate@b": functools.partial(generate, lambda batch: batch["label"] + 1),
             "generate_blind": functools.partial(generate, never)}
  found = config(ClassMention).open(settings(tmp_path))(predict, {}, {})
  assert found == {"right": 1.0, "named": 1.0, "right@b": 0.0, "named@b": 0.0, "blind": 0.5, "count": 4.0}
  with Image.open(tmp_path / "captions_class_mention.png") as sheet:
    assert sheet.width > 300


def test_naming_another_class_too_is_not_right_but_names_it(made, tmp_path):
  made([{"label": 0}, {"label": 1}], classes=("cat", "dog"))
  found = config(ClassMention).open(settings(tmp_path))({"generate": writing(["cats and a dog", "dogs"])}, {}, {})
  assert (found["right"], found["named"]) == (1 / 2, 1)


@dataclasses.dataclass
class AnimalsConfig(MadeConfig):
  """Of the data source "made", where it is of animals."""

  def open(self):
    return Animals(self)


class Animals(Made):
  """Four animals with three attributes; see `test_mistakes_…`."""

  has = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]], bool)
  names = (("cat",), ("dog", "hound"), ("bird",), ("fish",))


def test_mistakes_are_measured_by_common_attributes_and_on_wordnet(monkeypatch, made, tmp_path):
  made([{"label": label} for label in (0, 0, 1, 2, 0, 3)], classes=("cat", "dog", "bird", "fish"))
  monkeypatch.setitem(SOURCES, "made", f"{__name__}:AnimalsConfig")
  kinship = {("cat", "dog"): 0.8, ("bird", "cat"): 0.6}

  class Small(WordNet):
    def __init__(self):
      pass

    def __contains__(self, noun):
      return True

    def similarity(self, one, other):
      return 1.0 if one == other else kinship.get(tuple(sorted((one, other))), 0.5)

  monkeypatch.setattr(class_mention.WordNet, "find", Small)
  captions = ["a cat", "two hounds", "birds", "fish and a cat", "grass", "a fish and a dog"]
  run = config(ClassMention).open(settings(tmp_path))
  found = run({"generate": writing(captions)}, {}, {})
  # Wrong are the cat as a hound, the dog as birds, the bird as fish and cat; grass names nothing, the last names both.
  # Of the hound's one attribute the cat has it; of the bird's two the dog has none; of the fish's one the bird has it,
  # of the cat's two the bird has one.
  assert found["right"] == 1 / 6 and found["named"] == 2 / 6 and found["wrong"] == 3 / 6
  assert found["overlap_wrong"] == pytest.approx((1 + 0 + (1 + 1 / 2) / 2) / 3)
  assert found["wup_wrong"] == pytest.approx((0.8 + 0.5 + (0.5 + 0.6) / 2) / 3)
  # Any other animal in place of those: of a cat 1, 1/2, 0; of a dog 1/2, 0, 0; of a bird 1/2, 0, 1.
  assert found["overlap_chance"] == pytest.approx((1.5 / 3 + 0.5 / 3 + 1.5 / 3) / 3)
  assert found["wup_chance"] == pytest.approx(((0.8 + 0.6 + 0.5) + (0.8 + 0.5 + 0.5) + (0.6 + 0.5 + 0.5)) / 9)
  assert run.metadata()["wordnet"] == "found" and run.metadata()["covered"] == 6
  monkeypatch.setattr(class_mention.WordNet, "find", lambda: None)
  run = config(ClassMention).open(settings(tmp_path))
  found = run({"generate": writing(captions)}, {}, {})
  assert "wup_wrong" not in found and "nltk" in run.metadata()["wordnet"]


def test_overlap_is_of_the_attributes_of_the_class_named():
  has = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  np.testing.assert_allclose(overlap(has), [[1, 1, 0], [1 / 3, 1, 0], [0, 0, 0]])


# WordRecall

def test_words_are_counted_by_map_and_without_an_image(made, tmp_path, monkeypatch):
  monkeypatch.setattr(word_recall.metric.WordNet, "find", lambda: None)
  nouns = tmp_path / "nouns.txt"
  nouns.write_text("dog\ncat\n")
  made([{"text": "a red dog", "texts": ("a red dog", "the dog")}, {"text": "a cat", "texts": ("a cat",)}])
  run = config(WordRecall, nouns=str(nouns)).open(settings(tmp_path / "out", name="coco_words"))
  found = run({"generate": writing(["dogs", "dogs"]), "generate@b": writing(["a cat", "a red cat"]),
               "generate_blind": writing(["", ""])}, {}, {})
  assert found == {
    "nouns_precision": 1 / 4, "nouns_recall": 1 / 2, "nouns_f1": 1 / 3,  # the dog 1/2, 1, 2/3; the cat 0, 0, 0
    "modifiers_precision": 0, "modifiers_recall": 0, "modifiers_f1": 0,
    "nouns_precision@b": 1 / 4, "nouns_recall@b": 1 / 2, "nouns_f1@b": 1 / 3,
    "modifiers_precision@b": 0, "modifiers_recall@b": 0, "modifiers_f1@b": 0,
    **{f"{kind}_{metric}@blind": 0 for kind in ("nouns", "modifiers") for metric in ("precision", "recall", "f1")},
    "count": 2}
  metadata = run.metadata()
  assert "2 nouns given" in metadata["tagger"] and "no nouns_wup" in metadata["wordnet"] and metadata["covered"] == 2
  rows = [json.loads(line) for line in (tmp_path / "out/coco_words.words.jsonl").read_text().splitlines()]
  assert [(r["map"], r["word"]) for r in rows[:4]] == [("", "dog"), ("", "cat"), ("", "red"), ("b", "dog")]
  assert rows[0] == {"map": "", "category": "nouns", "word": "dog", "references": 1, "captions": 2, "both": 1,
                     "wup": None, "precision": 0.5, "recall": 1.0, "f1": 2 / 3}
  with Image.open(tmp_path / "out/coco_words.words.png") as picture:
    assert picture.format == "PNG"


def test_texts_without_words_are_one_line(made, tmp_path):
  made([{"text": "?!"}])
  with pytest.raises(UserError, match="its texts hold no word"):
    config(WordRecall).open(settings(tmp_path))({"generate": writing(["a"])}, {}, {})


# Hallucination

def instances(path, images, segments, categories=("person", "dog", "cat", "car")):
  """Writes COCO's layout: segments are (image id, category name)."""
  table = {"info": {}, "licenses": [], "images": [{"id": i, "file_name": f"{i}.jpg"} for i in images],
           "categories": [{"id": n, "name": c, "supercategory": "?"} for n, c in enumerate(categories, 1)],
           "annotations": [{"id": n, "image_id": i, "category_id": categories.index(c) + 1 if c in categories else 99}
                           for n, (i, c) in enumerate(segments)]}
  path.write_text(json.dumps(table))


def test_hallucinated_objects_and_run_off_are_counted(made, tmp_path):
  # Image 0 has a dog (segment) and a person (reference), image 1 a cat, image 2 nothing, image 3 is not captioned.
  instances(tmp_path / "instances_val2014.json", [0, 1, 2, 3], [(0, "dog"), (1, "cat"), (7, "dog"), (0, "none")])
  made([{"text": "a man", "texts": ("a man", "nice")}, {"text": "?"}, {"text": "?"}])
  run = config(Hallucination, segments=str(tmp_path / "instances_val2014.json")).open(settings(tmp_path / "out"))
  found = run({"generate": writing(["a dog and a man. A car", "a dog", "grass… "]),
               "generate@b": writing(["a dog", "a cat", "a car or a car"]),
               "generate_blind": writing(["words…"] * 3)}, {}, {})
  got = {k: v for k, v in found.items() if "@" not in k}
  assert got == {
    # dog, person, car | dog | nothing: wrong are the car and the second dog
    "chair_i": 2 / 4, "chair_s": 2 / 3, "objects": 4 / 3, "words": (7 + 2 + 1) / 3, "ended": 1.0, "cut": 1 / 3,
    "chair_i_cut": 1 / 3, "chair_s_cut": 1 / 3, "objects_cut": 1.0, "words_cut": (5 + 2 + 1) / 3, "count": 3}
  assert found["chair_i@b"] == 2 / 4 and found["chair_s@b"] == 1 / 3
  assert found["ended@blind"] == 0 and found["chair_i@blind"] == 0 and found["objects@blind"] == 0
  metadata = run.metadata()
  assert metadata["segments_skipped"] == 2 and metadata["segments"] == "instances_val2014.json"
  rows = [json.loads(line) for line in (tmp_path / "out/hallucination.objects.jsonl").read_text().splitlines()]
  assert rows[0] == {"id": "0", "caption": "a dog and a man. a car", "objects": ["dog", "person", "car"],
                     "hallucinated": ["car"]}


def test_run_off_alone_needs_no_segments(made, tmp_path):
  made([{"text": "?"}])
  found = config(Hallucination, metrics=("run_off",)).open(settings(tmp_path))(
    {"generate": writing(["a dog. A cat"])}, {}, {})
  assert found == {"words": 4, "words_cut": 2, "ended": 1, "cut": 1, "count": 1}


def test_segments_are_found_where_karpathys_file_stands_beside_cocos_annotations(made, tmp_path):
  made([{"text": "?"}])
  (tmp_path / "annotations").mkdir()
  instances(tmp_path / "annotations/instances_val2014.json", [0], [(0, "dog")])
  source = Source(name="made", path=str(tmp_path / "dataset_coco.json"))
  found = config(Hallucination, source=source, metrics=("chair",)).open(settings(tmp_path))(
    {"generate": writing(["a dog and a cat"])}, {}, {})
  assert found["chair_i"] == 1 / 2 and "words" not in found


def test_segments_that_are_missing_or_of_other_images_are_one_line(made, tmp_path):
  made([{"text": "?"}, {"text": "?"}])
  source = Source(name="made", path=str(tmp_path / "annotations" / "captions_val2017.json"))

  def refused(match, **fields):
    with pytest.raises(UserError, match=match):
      Hallucination(source=source, batch_size=8, **fields).open(settings(tmp_path))

  refused(r"annotations/instances_val2017.json': no such file; wanted COCO's instances_val2014.json .*cocodataset.org")
  (tmp_path / "annotations").mkdir()
  instances(tmp_path / "annotations/instances_val2017.json", [0], [(0, "dog")])
  refused("image 1 is not in .*instances_val2017.json")
  instances(tmp_path / "annotations/instances_val2017.json", [0, 1], [(0, "dog")], ("dog", "kat"))
  refused("no object of COCO 'kat'; did you mean")
  refused("choose one of chair, run_off", metrics=("chairs",))


# PromptProbing

def test_pooling_takes_means_over_runs_of_neighbours():
  x = jnp.arange(7, dtype=jnp.float32)[None, :, None] * jnp.array([1.0, 10.0])[None, None]  # [1, 7, 2]
  np.testing.assert_allclose(pool(x, 3)[0, :, 0], [1, 3.5, 5.5])  # 0 1 2 | 3 4 | 5 6
  np.testing.assert_allclose(pool(x, 1)[0], [[3, 30]])
  np.testing.assert_allclose(pool(x, 7), x)
  with pytest.raises(ValueError, match="cannot pool 7 tokens to 8"):
    pool(x, 8)


def test_nearest_tokens_equal_scikit_learns():
  from sklearn.metrics.pairwise import cosine_similarity

  rng = np.random.default_rng(0)
  prompt, table = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 5, 8), (40, 8)))
  want = np.argsort(-cosine_similarity(prompt.reshape(15, 8), table), axis=1)[:, :4].reshape(3, 5, 4)
  np.testing.assert_array_equal(nearest(jnp.asarray(prompt), jnp.asarray(table), 4), want)
  np.testing.assert_array_equal(nearest(jnp.asarray(table[None]), jnp.asarray(100 * table), 1)[0, :, 0], np.arange(40))


def test_the_plane_of_a_picture_is_scikit_learns_up_to_signs():
  from sklearn.decomposition import PCA

  x = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)[None]
  np.testing.assert_allclose(np.abs(plane(x)), np.abs(PCA(2).fit_transform(x)), atol=1e-4)
  np.testing.assert_array_equal(plane(np.full((4, 3), 7.0)), np.zeros((4, 2)))
  assert plane(np.arange(3.0)[:, None]).tolist() == [[-1, 0], [0, 0], [1, 0]]


# A prompt of 6 tokens of width 4 whose direction says the class of the image, and features that say nothing. Of five
# vocabulary words, "cat" points where the prompts of class 0 do.
LETTERS = {"a": 0, "dog": 1, "cat": 2, "of": 3, "zebra": 4}


class Words5(ByteTokenizer):
  """A tokenizer of five words, for what is decoded."""

  vocab_size = 5

  def decode(self, ids):
    return " ".join(f" {list(LETTERS)[i]}" for i in ids)


def probed(workdir, tokenizer=None):
  table = np.zeros((7, 4), np.float32)
  table[[0, 1, 2, 3, 4], [3, 1, 0, 2, 2]] = [1, 1, 1, 1, -1]
  table[5:] = 9  # embeddings that no token has
  direction = np.zeros((2, 4), np.float32)
  direction[0, 0] = direction[1, 1] = 1

  def prompt(params, stats, batch):
    if "prompt" in batch:
      return batch["prompt"]
    tokens = jnp.asarray(direction)[batch["label"]][:, None].repeat(6, 1)
    return tokens.at[:, 5].set(jnp.array([0.0, 0.0, -1.0, 0.0])[None])  # the last token always says zebra

  def nll(params, stats, batch):
    return prompt(params, stats, batch).shape[1] * batch["mask"].sum(-1).astype(jnp.float32)

  def features(params, stats, batch):
    return jnp.zeros((len(batch["label"]), 3, 2))

  predict = {"features": features, "prompt": prompt, "nll": nll}
  tokenizer = tokenizer or Words5()
  where = dataclasses.replace(
    settings(workdir), tokenizer=tokenizer,
    transform=transforms.captioning({"image": transforms.ResizeCrop(8, "center")}, ByteTokenizer(), 16))
  return predict, {"lm": {"embedding": jnp.asarray(table)}}, where


def test_probes_nearest_words_and_shorter_prompts_are_those_counted_by_hand(made, tmp_path, monkeypatch):
  monkeypatch.setattr(prompt_probing, "NEAREST", 1)
  monkeypatch.setattr(prompt_probing, "WIDEST", 15)  # of the prompt pooled to 4 there are 16 numbers
  # Cats and dogs in turn; the second half of the dogs' references speak of zebras.
  made([{"label": i % 2, "text": ("a cat", "a zebra of" if i > 10 else "a dog")[i % 2]} for i in range(20)],
       classes=("cat", "dog"))
  predict, params, where = probed(tmp_path)
  run = config(PromptProbing, batch_size=10).open(where)
  found = run(predict, params, {})
  # Pooled to k tokens, the made nll is k nats a token of the text.
  assert {k: v for k, v in found.items() if k.startswith("nll")} == {"nll": 6, "nll_k1": 1, "nll_k4": 4}
  # Features are the same for all, so the probe says one class; the two are equally frequent.
  assert {k: v for k, v in found.items() if k.startswith("category")} == {
    "category_features": 1 / 2, "category_prompt": 1}
  # 10 cats: cat in 5 of 6 tokens. 5 dogs of dogs: dog in 5. 5 of zebras (11, 13 …): zebra in 1 of 6.
  assert found["hits"] == pytest.approx((10 * 5 + 5 * 5 + 5 * 1) / 120) and found["images_hit"] == 1
  # By the references of the image 10 further on, of the same class: the first 5 dogs have zebras' then.
  assert found["hits_other"] == pytest.approx((10 * 5 + 5 * 1 + 5 * 5) / 120)
  assert found["count"] == 20 and run.metadata()["metrics"] == ["category", "nearest", "length", "picture"]
  rows = [json.loads(line) for line in (tmp_path / "prompt_probing.tokens.jsonl").read_text().splitlines()]
  assert len(rows) == 20 and rows[0] == {
    "id": "0", "texts": ["a cat"], "tokens": [[" cat"]] * 5 + [[" zebra"]], "hits": ["cat"]}
  assert "| 0 | a cat | cat | ` cat` ` cat`" in (tmp_path / "prompt_probing.tokens.md").read_text()
  with Image.open(tmp_path / "prompt_probing.pca.png") as picture:
    assert picture.format == "PNG"


def test_attributes_are_probed_on_other_images_and_maps_apart(monkeypatch, made, tmp_path):
  monkeypatch.setitem(SOURCES, "made", f"{__name__}:AnimalsConfig")
  made([{"label": i % 2, "text": "?"} for i in range(20)], classes=("cat", "dog", "bird", "fish"))
  predict, params, where = probed(tmp_path)
  predict |= {"prompt@b": lambda params, stats, batch: jnp.zeros((len(batch["tokens"]), 1, 3)),
              "features@b": predict["features"], "nll@b": predict["nll"]}
  train = Source(name="made", split="other")
  run = config(PromptProbing, batch_size=10, metrics=("attributes",), train=train).open(where)
  # Of the three attributes only the second tells cats from dogs.
  assert run(predict, params, {}) == {"attributes_features": 1 / 2, "attributes_prompt": 1, "attributes_prompt_k4": 1,
                                      "attributes_features@b": 1 / 2, "attributes_prompt@b": 1 / 2, "count": 20}
  assert run.metadata()["train"]["split"] == "other" and list(tmp_path.iterdir()) == []


def test_what_the_data_do_not_allow_is_reported_or_left_out(made, tmp_path):
  made([{"text": "a cat"}] * 4)
  predict, params, where = probed(tmp_path)
  predict["prompt"] = lambda params, stats, batch: jnp.ones((len(batch["tokens"]), 1, 4))
  predict["features"] = predict["prompt"]
  run = config(PromptProbing, batch_size=4, metrics=("nearest",)).open(where)
  assert set(run(predict, params, {})) == {"hits", "images_hit", "hits_other", "images_hit_other", "count"}
  for metric, match in (("category", "needs labels"), ("attributes", "as awa2 has them"), ("hits", "choose one of")):
    with pytest.raises(UserError, match=match):
      config(PromptProbing, metrics=(metric,)).open(where)


# A whole model

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A tiny LiMBeR whose prompts have 8 tokens: its setup and its state, with three evaluations on files of AWA2."""
  written = write_awa2(tmp_path_factory.mktemp("awa2"), each=5, hostile=True)
  source = Source(name="awa2", path=written.path, split="all")
  evals = {name: evaluation_of(name)(source=source, batch_size=16, max_bad_fraction=0.1)
           for name in ("class_mention", "prompt_probing", "word_recall")}
  size = LimberConfig(image=encoders.encoder_size("clip_vit_b32_mu"), prompt=ProjectorConfig(per_feature=2),
                    lm=GPTJSize(vocab=259, context=160, width=64, layers=2, heads=2, rotary=16))
  s = setup(tiny_limber(evals=evals, model=size, trainable=("prompt",)))
  return s, s.init()


@pytest.mark.process
def test_a_tiny_model_is_analysed_on_awa2s_files_and_resumes_where_it_was_killed(tiny, tmp_path, monkeypatch):
  s, state = tiny

  def run(names):
    where = dataclasses.replace(make_context(s, str(tmp_path)), results_dir=str(tmp_path / "results"))
    runs = {name: make_eval(s, name, where) for name in names}
    out = evaluate(s, runs, state.params, state.stats)
    assert all(run.metadata()["damaged"] == 2 and run.metadata()["covered"] == 50 for run in runs.values())
    return out

  whole = run(s.config.evals)
  assert whole["prompt_probing/count"] == whole["class_mention/count"] == whole["word_recall/count"] == 50
  assert {k for k in whole if k.startswith("prompt_probing/")} == {f"prompt_probing/{k}" for k in (
    "nll", "nll_k1", "nll_k4", "hits", "images_hit", "hits_other", "images_hit_other", "count",
    *(f"{kind}_{of}" for kind in ("category", "attributes") for of in ("features", "prompt", "prompt_k4")))}
  assert {*(f"class_mention/{k}" for k in ("right", "named", "wrong", "blind")),
          "word_recall/modifiers_recall"} <= whole.keys()
  # Untrained, the language model gives each of 259 tokens about the same probability.
  assert whole["prompt_probing/nll"] == pytest.approx(np.log(259), abs=0.1)
  kept = tmp_path / "results/prompt_probing/probe.jsonl"
  lines = kept.read_bytes().splitlines(keepends=True)
  kept.write_bytes(b"".join(lines[:20]) + lines[20][:30])
  assert run(["prompt_probing"]).items() <= whole.items()
  assert kept.read_bytes() == b"".join(lines)


def test_pooling_the_features_is_pooling_the_prompt_of_an_affine_map(tiny):
  s, state = tiny
  params, stats = {**s.frozen.params, **state.params}, {**s.frozen.stats, **state.stats}
  rng = np.random.default_rng(0)
  batch = {"tokens": jnp.asarray(rng.integers(1, 200, (2, 5)), jnp.int32), "mask": jnp.ones((2, 5), bool)}
  features = jnp.asarray(rng.normal(size=(2, 4, 64)), jnp.float32)
  predict = {name: jax.jit(f) for name, f in s.task.predict().items() if name in ("nll", "prompt")}

  def prompt(features):
    return predict["prompt"](params, stats, batch | {"features": features})

  # A feature becomes 2 tokens: of 2 features pooled, the first and the second token of each are.
  by_token = jnp.concatenate([pool(prompt(features)[:, i::2], 2) for i in (0, 1)], axis=2).reshape(2, 4, 64)
  of_pooled = prompt(pool(features, 2))
  np.testing.assert_allclose(by_token, of_pooled, atol=1e-5)
  # A prompt in the batch is taken at its word.
  nll = predict["nll"](params, stats, batch | {"prompt": by_token})
  np.testing.assert_allclose(nll, predict["nll"](params, stats, batch | {"features": pool(features, 2)}), rtol=1e-5)
  assert not np.allclose(nll, predict["nll"](params, stats, batch | {"features": features}), rtol=1e-5)


def test_of_classes_too_small_for_a_fifth_a_fifth_of_all_is_held_out():
  held = prompt_probing._fifth(np.arange(10) // 2)
  assert held.sum() == 2 and (prompt_probing._fifth(np.arange(10) // 2) == held).all()
  large = prompt_probing._fifth(np.repeat([0, 3], [10, 1]))
  assert large.sum() == 2 and not large[-1]
