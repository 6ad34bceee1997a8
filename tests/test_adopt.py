"""Preprocessing that came with weights: from their directory into classify, evaluate, training and features."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from limber_jax import config_json
from limber_jax.config import Compute, Data, Init, Optim, Source, Tokenizer
from limber_jax.data import pipeline, tokenizers, transforms
from limber_jax.data.sources.digits import Digits
from limber_jax.errors import UserError
from limber_jax.inference.classifier import Classifier
from limber_jax.models import clip, encoders, spec
from limber_jax.models.limber import LimberConfig, Projector
from limber_jax.models.text import TextSize
from limber_jax.models.vit import ViTSize
from limber_jax.tasks.captioning import Captioning
from limber_jax.tasks.contrastive import Contrastive
from limber_jax.training import results
from limber_jax.training.loop import train
from limber_jax.training.setup import make_context
from limber_jax.weights import export, load, parts, projection
from limber_jax.weights.adopt import adopt, beside
from tests.runs import tiny, tiny_limber

SIDE = 40
SIZE = dataclasses.replace(clip.SIZES["clip_vit_b32_mu"](), image=ViTSize(image_size=SIDE, patch=8, width=64, layers=2,
                                                                         heads=2),
                           text=TextSize(context=32, vocab=259, width=64, layers=2, heads=2))
SQUASH = {"resize": "squash", "resample": "bilinear", "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def write(path, to, **changes):
  """Writes a CLIP of random weights, and its preprocessing changed, as another library has it."""
  task = Contrastive(clip.build(SIZE, Compute(dtype="float32")), "softmax", 0, 1, ())
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype),
                        jax.eval_shape(task.init, jax.random.key(0))[0])
  params["logit_scale"] = np.float32(np.log(7))
  export.save(str(path), to, dataclasses.replace(SIZE, **changes), params, {})
  return str(path)


@pytest.fixture(scope="module")
def squash(tmp_path_factory):
  """A directory of transformers whose images are squashed, bilinear, and normalised by other numbers."""
  return write(tmp_path_factory.mktemp("squash") / "hf", "hf", **SQUASH)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Images of several shapes: wide, tall, small, one pixel wide."""
  folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
  paths = []
  for i, (w, h) in enumerate([(180, 80), (61, 133), (9, 14), (1, 40)]):
    blocks = rng.integers(0, 256, (-(-h // 5), -(-w // 5), 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)[:h, :w]
    paths.append(str(folder / f"{i}.png"))
    Image.fromarray(blocks).save(paths[-1])
  return paths


def cosine(a, b):
  a, b = np.asarray(a, float), np.asarray(b, float)
  return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture
def theirs(request, transformers, open_clip):
  """Returns f(kind, path) -> embeddings [n, E] of image files by the other library, from file to embedding."""
  import torch

  def embed(kind, path, photos):
    images = [Image.fromarray(transforms.decode(Path(photo).read_bytes())) for photo in photos]
    with torch.no_grad():
      if kind == "hf":
        model = transformers.CLIPModel.from_pretrained(path).eval()
        pixels = transformers.CLIPImageProcessorPil.from_pretrained(path)(images, return_tensors="pt")["pixel_values"]
        return model.visual_projection(model.vision_model(pixels).pooler_output).numpy()
      model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
      return model.eval().encode_image(torch.stack([preprocess(image) for image in images])).numpy()

  return embed


@pytest.mark.parametrize(("kind", "changes"), [
  ("hf", SQUASH), ("open_clip", SQUASH), ("open_clip", {"resize": "longest"})],
  ids=["hf-squash", "open_clip-squash", "open_clip-longest"])
def test_embeddings_equal_the_other_librarys_from_file_to_embedding(tmp_path, photos, theirs, kind, changes):
  path = write(tmp_path / kind, kind, **changes)
  photos = photos[: 3 if changes.get("resize") == "longest" else 4]  # open_clip's own fails on a 1 × 40 image there
  want = theirs(kind, path, photos)

  model = Classifier(path, ["a", "b"], ["{}"], Tokenizer("bytes"), batch_size=8)  # the command classify
  by_classify = model._embed_image(np.stack([model.read(photo) for photo in photos]))
  np.testing.assert_allclose(cosine(by_classify, want), 1, atol=1e-5)

  config = tiny(mesh=(8, 1, 1))                                                   # evaluate --weights
  s, params, stats, _ = results.imported(config, str(tmp_path), path)
  transform = make_context(s, "").transform
  images = np.stack([transform({"image": Path(p).read_bytes(), "text": "a"}, None)["image"] for p in photos])
  frozen = {**s.frozen.params, **params}
  by_evaluate = jax.jit(s.task.predict()["embed_image"])(frozen, {**s.frozen.stats, **stats}, images)
  np.testing.assert_allclose(cosine(by_evaluate, want), 1, atol=1e-5)


def finetune(path, workdir, **changes):
  """Returns the experiment that fine-tunes the model at `path` on eight digits for a step, trained."""
  config = tiny(model=dataclasses.replace(SIZE), steps=1, batch_size=8, mesh=(8, 1, 1), optim=Optim(warmup_steps=0),
                init=Init(image=path, text=path), **changes)
  said = []
  train(config, str(workdir), log=said.append)
  return config, said


def test_a_run_has_the_preprocessing_of_its_weights_for_good(tmp_path, squash):
  copy = write(tmp_path / "copy", "hf", **SQUASH)
  config, said = finetune(copy, tmp_path / "run")
  assert said[0] == (f"image: preprocessing as {copy} has it: mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), "
                     "resize='squash', resample='bilinear'")
  recorded = json.loads((tmp_path / "run" / "config.json").read_text())
  assert (recorded["model.resize"], recorded["model.resample"], recorded["model.mean"]) == (
    "squash", "bilinear", [0.5, 0.4, 0.3])
  assert config.model.resize == "shortest"  # the caller's own is left alone

  (tmp_path / "copy" / "preprocessor_config.json").unlink()  # from now on the run alone knows
  assert load.open_model(str(tmp_path / "run")).size == dataclasses.replace(SIZE, **SQUASH)
  assert adopt(config, str(tmp_path / "run")) == dataclasses.replace(SIZE, **SQUASH)
  s, *_ = results.trained(config, str(tmp_path / "run"), "latest")
  assert s.config.model.resize == "squash"
  assert make_context(s, "").transform.steps[1].rules[0][1].crop == "squash"
  train(config, str(tmp_path / "run"), log=said.append)  # resumes, that is, has nothing left to do
  onward = tiny_limber(init=Init(image=str(tmp_path / "run")), model=limber_size())
  assert onward.model.image.resize == "shortest" and adopt(onward).image.resize == "squash"


def limber_size(**changes):
  image = spec.EncoderConfig(SIZE.image, embed_dim=SIZE.embed_dim, activation=SIZE.activation, **changes)
  other = Projector(dataclasses.replace(image, tower=dataclasses.replace(SIZE.image)))
  return LimberConfig(image=image, lm=tiny_limber().model.lm, extra_projectors={"x": other, "y": Projector()})


def test_every_encoder_of_a_limber_takes_what_its_own_weights_come_with(tmp_path, squash):
  longest = write(tmp_path / "longest", "open_clip", resize="longest", fill_color=9)
  config = tiny_limber(model=limber_size(), init=Init(image=squash, extra_projectors={"image@x": longest}),
                       trainable=("prompt", "prompt@x", "prompt@y"))
  said = []
  model = adopt(config, log=said.append)
  assert (model.image.resize, model.image.resample, model.image.mean) == ("squash", "bilinear", (0.5, 0.4, 0.3))
  assert (model.extra_projectors["x"].image.resize, model.extra_projectors["x"].image.fill_color) == ("longest", 9)
  assert len(said) == 2 and said[1] == f"image@x: preprocessing as {longest} has it: resize='longest', fill_color=9"
  config.model = model
  task = Captioning.from_config(config)
  assert (task.rule("").crop, task.rule("x").crop) == ("squash", "longest")  # of caption, vqa, encode and evaluation
  assert task.pixels_of("x") == "image@x"


def test_a_limber_sees_of_an_image_file_what_transformers_shows_its_own_tower(squash, photos, transformers):
  import torch

  config = tiny_limber(model=LimberConfig(image=limber_size().image, lm=tiny_limber().model.lm), trainable=("prompt",),
                       init=Init(image=squash), data=Data(crop="encoder"))
  config.model = adopt(config, log=lambda _: None)
  task = Captioning.from_config(config)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                      task.model.encoders[""].shapes()[0])
  params, _ = parts.load_part(squash, "image", config.model.image, like)
  images = np.stack([task.pixels(config.data)({"image": Path(p).read_bytes()}, None)["image"] for p in photos])
  ours = jax.jit(task.predict()["features"])({"image": params}, {}, {"image": images})

  tower = transformers.CLIPModel.from_pretrained(squash).eval().vision_model
  processor = transformers.CLIPImageProcessorPil.from_pretrained(squash)
  with torch.no_grad():
    files = [Image.fromarray(transforms.decode(Path(p).read_bytes())) for p in photos]
    want = tower(processor(files, return_tensors="pt")["pixel_values"]).last_hidden_state[:, 1:].numpy()
  np.testing.assert_allclose(cosine(ours, want), 1, atol=1e-5)


def test_a_config_that_contradicts_the_weights_is_refused_and_native_pixels_are_left_alone(squash):
  config = tiny_limber(model=limber_size(resample="box"), init=Init(image=squash))
  with pytest.raises(UserError, match=r"has resample='bilinear', but this config's model has 'box'; set --config.model."
                                      r"image.resample=bilinear"):
    adopt(config)
  config = tiny(model=dataclasses.replace(SIZE, mean=(0.1,) * 3), init=Init(image=squash))
  with pytest.raises(UserError, match=r"has mean=\(0.5, 0.4, 0.3\), .* set --config.model.mean=\(0.5, 0.4, 0.3\)"):
    adopt(config)
  native = limber_size(resize="native", mean=(0.0,) * 3, std=(1.0,) * 3)
  assert adopt(tiny_limber(model=native, init=Init(image=squash))) == native


def test_a_run_of_before_resumes_as_it_was_whatever_its_weights_directory_says(tmp_path, squash):
  for config in (tiny(model=dataclasses.replace(SIZE), init=Init(image=squash)),
                 tiny_limber(model=limber_size(), init=Init(image=squash))):
    old = {k: v for k, v in config_json.flatten(config).items()
           if k.rpartition(".")[2] not in ("resize_to", "crop_rounding", "fill_color", "eos")
           and k not in ("model.resize", "model.resample")}
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    assert config_json.from_json(json.dumps(old), "old").model == config.model
    assert adopt(config, str(tmp_path)) == config.model
    config_json.check_same(dataclasses.replace(config, model=adopt(config, str(tmp_path))), json.dumps(old), "old")
    # What is kept of it beside (features, results of examples) is found again by the same words.
    assert config_json.flatten(config.model, known=True) == {
      k.removeprefix("model."): v for k, v in old.items() if k.startswith("model.")}


def test_a_projection_is_used_on_the_pixels_that_it_learnt_from(tmp_path, squash):
  learnt = tiny_limber(model=limber_size(resample="hamming", resize="squash"), init=Init(image=squash))
  card = {"encoder": "", "lm": "", "digests": {"image": "", "lm": ""}, "step": 1, "version": "0", "map": "",
          "config": config_json.flatten(learnt)}
  path = str(tmp_path / "map.safetensors")
  projection.save(path, {"kernel": np.zeros((2, 2))}, card)
  config = tiny_limber(model=limber_size(), init=Init(image=squash))
  assert adopt(config, weights=path).image.resample == "hamming"
  assert adopt(config, weights=str(tmp_path / "proj.ckpt"), log=lambda _: None).image.resample == "bilinear"
  # That of an extra projector goes into the place of the first.
  learnt.model.extra_projectors["x"].image.resample = "box"
  projection.save(path, {"kernel": np.zeros((2, 2))}, card | {"config": config_json.flatten(learnt), "map": "x"})
  assert adopt(config, weights=path).image.resample == "box"


def test_weights_without_a_directory_that_says_anything_change_nothing(tmp_path, squash):
  source = load.open_model(squash).source
  for name in ("alone", "beside"):
    (tmp_path / name).mkdir()
    save_file({n: np.asarray(t) for n, t in source.items()}, tmp_path / name / "model.safetensors")
  for file in ("config.json", "preprocessor_config.json"):
    (tmp_path / "beside" / file).write_bytes(Path(squash, file).read_bytes())
  alone = Init(image=str(tmp_path / "alone/model.safetensors"))
  config = tiny(model=dataclasses.replace(SIZE, mean=(0.1,) * 3), init=alone)
  assert adopt(config) == config.model
  config = tiny(model=SIZE, init=Init(image=str(tmp_path / "beside/model.safetensors")))
  assert adopt(config, log=lambda _: None).resize == "squash"
  assert adopt(tiny(model=SIZE)) == SIZE  # random
  for damaged in (b"[" * 100_000, b"\xff", b"[]"):  # of which those tell who read all of it
    (tmp_path / "config.json").write_bytes(damaged)
    assert adopt(tiny(model=SIZE), str(tmp_path)) == SIZE


def test_the_data_fingerprint_changes_with_the_pixels_and_only_with_them():
  def fingerprint(task, data):
    return pipeline.data_fingerprint(Digits(Source(split="test")), tokenizers.load(Tokenizer("bytes")), data, 8, 0,
                                     task.pixel_settings(data))

  def contrastive(crop, **changes):
    config = tiny(model=dataclasses.replace(SIZE, **changes), data=Data(crop=crop))
    return fingerprint(Contrastive.from_config(config), config.data)

  def captioning(crop, **changes):
    config = tiny_limber(model=limber_size(**changes), data=Data(crop=crop), trainable=("prompt",))
    return fingerprint(Captioning.from_config(config), config.data)

  before = pipeline.data_fingerprint(Digits(Source(split="test")), tokenizers.load(Tokenizer("bytes")),
                                     Data(crop="random"), 8, 0)
  assert contrastive("random") == contrastive("random", resize="squash", crop_rounding="down") == before
  assert contrastive("random", resample="bilinear") != before
  fast = Data(source=Source(split="test"), crop="encoder", jpeg_fast_decode=True)
  assert pipeline.data_fingerprint(Digits(fast.source), tokenizers.load(Tokenizer("bytes")), fast, 8, 0) == (
    "556488ce10843e32896752912e5b433c9b13bc106c24afd233226f4dea70c7fe")  # as release 0.1.0 had it
  assert len({contrastive("encoder"), contrastive("encoder", resize="squash"),
              contrastive("encoder", crop_rounding="down"), contrastive("center"),
              contrastive("encoder", resize="squash", resize_to=50)}) == 5
  assert captioning("random", resize="squash", resample="bilinear") == before  # as of runs that had this choice
  assert captioning("encoder", resize="squash") == captioning("encoder")
  assert len({captioning("encoder"), captioning("encoder", resize_to=50), captioning("encoder", crop_rounding="down"),
              captioning("encoder", resize="longest"), captioning("encoder", resize="longest", fill_color=9),
              captioning("encoder", resample="lanczos"), captioning("random", resample="lanczos")}) == 7


def test_features_of_other_preprocessing_are_other_features_and_those_of_before_the_same():
  config = tiny_limber(model=limber_size(), data=Data(crop="encoder"), trainable=("prompt",))
  plain = Captioning.from_config(config).feature_specs(config.data)["image"]
  assert plain["pixels"] == {"size": SIDE, "crop": "center", "resample": "bicubic"}
  assert not {"resize_to", "crop_rounding", "fill_color"} & plain["encoder"].keys()
  for changes in ({"crop_rounding": "down"}, {"resize_to": 50}, {"resize": "longest"}, {"resample": "box"}):
    config.model = limber_size(**changes)
    assert Captioning.from_config(config).feature_specs(config.data)["image"]["pixels"] == plain["pixels"] | (
      changes if "resize" not in changes else {"crop": "longest"})


def test_other_kinds_of_encoders_take_what_lies_beside_their_weights(tmp_path):
  beit = encoders.encoder_size("beit_l16_mu")
  (tmp_path / "beit").mkdir()
  assert beside(str(tmp_path / "beit"), beit) is None
  (tmp_path / "beit" / "preprocessor_config.json").write_text(json.dumps({
    "feature_extractor_type": "BeitFeatureExtractor", "size": 40, "crop_size": 32, "do_center_crop": True,
    "resample": 3, "image_mean": [0.5, 0.4, 0.3]}))
  model = LimberConfig(image=beit, lm=tiny_limber().model.lm)
  config = tiny_limber(model=model, init=Init(image=str(tmp_path / "beit")))
  found = adopt(config).image
  assert (found.resize, found.resize_to, found.resample, found.mean) == ("squash", 40, "bicubic", (0.5, 0.4, 0.3))

  for name, reference in (("nf_resnet50_mu", False), ("nf_resnet50_reference_mu", True)):
    size = encoders.encoder_size(name)
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps({"architecture": "nf_resnet50", "pretrained_cfg": {
      "crop_pct": 0.94, "interpolation": "bicubic", "mean": spec.IMAGENET_MEAN, "std": spec.IMAGENET_STD}}))
    config.model, config.init = LimberConfig(image=size, lm=config.model.lm), Init(image=str(tmp_path / name))
    assert adopt(config).image == (size if reference else dataclasses.replace(size, resize_to=68))


def test_what_lies_beside_a_state_dict_counts_also_where_its_model_is_named(tmp_path, squash):
  for name in ("model.safetensors", "preprocessor_config.json"):
    (tmp_path / name).write_bytes((Path(squash) / name).read_bytes())
  (tmp_path / "other").mkdir()
  config = tmp_path / "other" / "config.json"
  config.write_bytes((Path(squash) / "config.json").read_bytes())
  for path in (tmp_path, tmp_path / "model.safetensors"):
    size = load.load(str(path), model=str(config)).size
    assert (size.resize, size.resample, size.mean) == ("squash", "bilinear", pytest.approx(SQUASH["mean"]))
  said = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
  (tmp_path / "other" / "preprocessor_config.json").write_text(json.dumps(said))
  with pytest.raises(UserError, match=r"preprocessor_config\.json says mean=\(0\.5, 0\.4, 0\.3\), but the model"):
    load.load(str(tmp_path), model=str(config))
