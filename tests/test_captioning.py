"""The captioning task: what counts in the loss, what is trained and what is not, and that nothing else matters."""

import dataclasses
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run

from limber_jax import losses
from limber_jax.config import (
  Captions,
  Checkpoint,
  Compute,
  Config,
  Data,
  Decoding,
  Loss,
  Mesh,
  Optim,
  Source,
  Tokenizer,
)
from limber_jax.errors import UserError
from limber_jax.models import encoders, gptj
from limber_jax.models.adapters import AdapterConfig
from limber_jax.models.limber import Limber, LimberConfig, Projector, ProjectorConfig
from limber_jax.runtime import parallel
from limber_jax.tasks.captioning import Captioning, token_weights
from limber_jax.tasks.language_modelling import LanguageModelling
from limber_jax.training import optimizer
from limber_jax.training.flops import count_flops
from limber_jax.training.loop import train

VIT = dataclasses.replace(encoders.encoder_size("clip_vit_b32_mu"))
RESNET = encoders.encoder_size("clip_rn50_mu")


def size(image=VIT, dropout=0.0, **fields):
  return LimberConfig(image=image, prompt=ProjectorConfig(dropout=dropout), lm=gptj.SIZES["gptj_mu"](), **fields)


def tiny(model=None, **changes):
  defaults = {
    "name": "tiny", "task": "captioning", "model": model or size(), "trainable": ("prompt",), "batch_size": 16,
    "steps": 6, "log_every": 1, "optim": Optim(lr=1e-3, schedule="linear", warmup_steps=2, weight_decay=0.0,
                                               clip_norm=1.0),
    "data": Data(source=Source(name="digits"), tokenizer=Tokenizer(name="bytes"), crop="encoder", length=20, threads=2),
    "compute": Compute(dtype="float32"), "mesh": Mesh(1, 1, 1), "checkpoint": Checkpoint(every=100)}
  return Config(**(defaults | changes))


def batches(config, count):
  rng = np.random.default_rng(0)
  n, side = config.batch_size, config.model.image.tower.image_size
  out = []
  for _ in range(count):
    length = rng.integers(2, config.data.length + 1, n)
    out.append({"image": rng.integers(0, 256, (n, side, side, 3), np.uint8),
                "tokens": rng.integers(0, 256, (n, config.data.length), np.int32),
                "mask": np.arange(config.data.length) < length[:, None]})
  return out


# The loss

def test_the_caption_loss_is_pytorchs_cross_entropy():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  logits, tokens = rng.normal(size=(3, 5, 7)).astype(np.float32), rng.integers(0, 7, (3, 5))
  mask = np.arange(5) < np.array([5, 2, 3])[:, None]
  theirs = torch.tensor(logits, requires_grad=True)
  labels = torch.tensor(np.where(mask, tokens, -100))
  loss = torch.nn.functional.cross_entropy(theirs.reshape(-1, 7), labels.reshape(-1))
  loss.backward()
  (got, metrics), gradient = jax.value_and_grad(losses.caption_loss, has_aux=True)(logits, tokens, mask)
  np.testing.assert_allclose(got, loss.item(), rtol=1e-6)
  np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-7)
  assert metrics["accuracy"] == np.mean((logits.argmax(-1) == tokens)[mask])


def test_what_does_not_count_may_be_anything():
  logits = jnp.zeros((1, 2, 4)).at[0, 1].set(jnp.nan)
  mask = np.array([[True, False]])
  assert losses.caption_loss(logits, np.zeros((1, 2), int), mask)[0] == pytest.approx(np.log(4))
  assert losses.caption_loss(logits, np.zeros((1, 2), int), ~mask & False)[0] == 0
  for outside in (-1, 4, 2**31 - 1):  # no id: its loss is no number, and where it does not count nothing
    assert np.isnan(losses.caption_loss(logits, np.array([[0, outside]]), np.ones((1, 2), bool))[0])
    assert losses.caption_loss(logits, np.array([[0, outside]]), mask)[0] == pytest.approx(np.log(4))


LOGITS = np.zeros((2, 3, 4), np.float32)


@pytest.mark.parametrize(("arguments", "message"), [
  ((LOGITS[0], np.zeros((2, 3), int), np.ones((2, 3))), r"logits: expected floating-point \[B, T, V]"),
  ((LOGITS, np.zeros((2, 4), int), np.ones((2, 3))), r"tokens: expected shape \[2, 3], got"),
  ((LOGITS, np.zeros((2, 3)), np.ones((2, 3))), "tokens: expected integers, got float64"),
])
def test_a_caption_loss_of_wrong_shapes_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    losses.caption_loss(*arguments)


def test_the_nats_of_each_caption_add_up_to_the_loss():
  config = tiny()
  task, batch = Captioning.from_config(config), batches(config, 1)[0]
  params, stats = jax.jit(task.init)(jax.random.key(0))
  nats = jax.jit(task.predict()["nll"])(params, stats, batch)
  loss, _ = jax.jit(task.loss)(params, stats, batch, jax.random.key(0))
  assert nats.shape == (16,)
  np.testing.assert_allclose(nats.sum() / batch["mask"].sum(), loss, rtol=1e-6)


MASK = np.arange(4) < np.array([2, 4, 3, 1])[:, None]  # ends with their EOS


def test_every_token_counts_the_same_by_default_the_eos_too():
  np.testing.assert_allclose(token_weights(jnp.asarray(MASK), Captions()), MASK / 10)


def test_the_reference_gave_the_longest_of_each_micro_batch_no_eos():
  got = token_weights(jnp.asarray(MASK), Captions(eos="reference", micro_batch=2))
  want = MASK.copy()
  want[1, 3] = want[2, 2] = False
  np.testing.assert_allclose(got, want / 8)
  both = token_weights(jnp.ones((2, 3), bool), Captions(eos="reference", micro_batch=2))  # equally long: both lose it
  np.testing.assert_allclose(both, np.array([[1, 1, 0], [1, 1, 0]]) / 4)


def test_the_reference_took_the_mean_of_micro_batches():
  got = token_weights(jnp.asarray(MASK), Captions(mean="reference", micro_batch=2))
  np.testing.assert_allclose(got, MASK / np.array([12, 12, 8, 8])[:, None])


SCHEDULE = {0: 0.0, 1: 1.204e-4, 10: 4.166e-4, 50: 6.830e-4, 99: 8.0e-4, 1000: 7.517e-4, 7500: 4.027e-4, 14999: 5.4e-8}


def test_schedules_have_the_values_of_the_reference_and_of_the_paper():
  reference = optimizer.schedule(Optim(lr=8e-4, schedule="deepspeed", warmup_steps=100), 15_000)
  for step, want in SCHEDULE.items():
    assert float(reference(step)) == pytest.approx(want, rel=7e-3 if step == 14999 else 5e-4), step
  paper = optimizer.schedule(Optim(lr=8e-4, schedule="linear", warmup_steps=100), 15_000)
  for step, want in {0: 8e-6, 1: 1.6e-5, 10: 8.8e-5, 50: 4.08e-4, 99: 8e-4, 1000: 8e-4 * 14_000 / 14_900,
                     7500: 8e-4 * 7500 / 14_900, 14_999: 8e-4 / 14_900}.items():
    assert float(paper(step)) == pytest.approx(want, rel=1e-4, abs=1e-11), step


# What is trained

def test_no_weight_gradient_of_a_frozen_part_is_computed():
  config = tiny()
  task, batch = Captioning.from_config(config), batches(config, 1)[0]
  params, stats = jax.eval_shape(task.init, jax.random.key(0))
  frozen = {k: v for k, v in params.items() if k != "prompt"}

  def loss(prompt, frozen):
    return task.loss(frozen | {"prompt": prompt}, stats, batch, jax.random.key(0))[0]

  forward, both = (count_flops(jax.make_jaxpr(f)(params["prompt"], frozen).jaxpr) for f in (loss, jax.grad(loss)))
  everything = count_flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params["prompt"], frozen).jaxpr)
  assert both <= 2.1 * forward < 2.5 * forward < everything


def test_the_head_never_runs_on_the_prompt():
  config = tiny()
  task, batch = Captioning.from_config(config), batches(config, 1)[0]
  params, stats = jax.eval_shape(task.init, jax.random.key(0))
  text = str(jax.make_jaxpr(lambda p: task.loss(p, stats, batch, jax.random.key(0))[0])(params))
  assert task.model.prefix_length() > 1
  assert f"f32[16,{config.data.length},512]" in text  # logits of the text
  assert f"f32[16,{config.data.length - 1 + task.model.prefix_length()},512]" not in text


def test_50_steps_leave_frozen_bytes_unchanged_and_out_of_checkpoints(tmp_path, only_the_devices_of_the_mesh):
  config = tiny(size(RESNET), steps=50, batch_size=4, checkpoint=Checkpoint(every=25))
  from limber_jax.training.setup import setup
  before = jax.device_get(setup(config).frozen)
  state = train(config, str(tmp_path), log=lambda _: None)
  after = jax.device_get(setup(config).frozen)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert a.tobytes() == b.tobytes()
  assert set(state.params) == {"prompt"} and state.stats == {}
  stored = sum(os.path.getsize(os.path.join(folder, f)) for folder, _, files in os.walk(tmp_path / "checkpoints" / "50")
               for f in files)
  assert stored < 3 * sum(x.nbytes for x in jax.tree.leaves(state.params)) + 2**16


def test_adapters_and_a_tuned_encoder_train_at_their_own_rates():
  config = tiny(size(adapters=AdapterConfig(attention="normal", mlp="parallel")),
                trainable=("image", "prompt", "adapters"),
                optim=Optim(lr=1e-3, part_lr={"image": 1e-5}, schedule="linear", warmup_steps=0, weight_decay=0.0))
  task = Captioning.from_config(config)
  start, _ = jax.jit(task.init)(jax.random.key(0))
  _, states = run(config, batches(config, 1), Captioning)
  moved = {part: max(float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(states[0].params[part]),
                                                               jax.tree.leaves(start[part]), strict=True))
           for part in config.trainable}
  # Adam's first update is its rate, whatever the gradient.
  assert moved == pytest.approx({"image": 1e-5, "prompt": 1e-3, "adapters": 1e-3}, rel=0.02)


def test_a_further_map_trains_as_if_it_were_alone():
  both = tiny(size(extra_projectors={"other": Projector(image=RESNET, prompt=ProjectorConfig(dropout=0.0))}),
              trainable=("prompt", "prompt@other"))
  data = batches(both, 3)
  side = RESNET.tower.image_size
  for batch in data:
    batch["image@other"] = np.random.default_rng(1).integers(0, 256, (16, side, side, 3), np.uint8)
  metrics, states = run(both, data, Captioning)
  alone, alone_states = run(tiny(), data, Captioning)
  np.testing.assert_allclose([m["nats"] for m in metrics], [m["loss"] for m in alone], rtol=1e-6)
  np.testing.assert_allclose([m["nats"] + m["nats@other"] for m in metrics], [m["loss"] for m in metrics], rtol=1e-6)
  for a, b in zip(jax.tree.leaves(states[-1].params["prompt"]), jax.tree.leaves(alone_states[-1].params["prompt"]),
                  strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


# How it is run

@pytest.mark.parametrize("model", [size(), size(RESNET)], ids=["vit", "resnet"])
def test_every_mesh_gives_the_losses_of_one_device(model):
  config = tiny(model)
  data = batches(config, 4)
  want = [m["loss"] for m in run(config, data, Captioning)[0]]
  for mesh in ((4, 2, 1), (2, 2, 2)):
    got = [m["loss"] for m in run(tiny(model, mesh=Mesh(*mesh)), data, Captioning)[0]]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("captions", [Captions(), Captions("reference", "reference", 4)], ids=["sane", "reference"])
def test_accumulated_steps_equal_whole_batches(captions):
  config = tiny(captions=captions)
  data = batches(config, 4)
  whole, whole_states = run(config, data, Captioning)
  split, states = run(tiny(captions=captions, loss=Loss(num_microbatches=4)), data, Captioning)
  for name in ("loss", "grad_norm", "accuracy"):
    np.testing.assert_allclose([m[name] for m in split], [m[name] for m in whole], rtol=1e-5)
  for a, b in zip(jax.tree.leaves(states[-1].params), jax.tree.leaves(whole_states[-1].params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(("trainable", "rows"), [(("prompt",), 16), (("prompt", "image"), 4)])
def test_a_frozen_encoder_sees_the_whole_batch_at_once_and_a_trained_one_its_pieces(trainable, rows, monkeypatch):
  config, seen, encode = tiny(trainable=trainable, loss=Loss(num_microbatches=4)), [], Limber.encode
  monkeypatch.setattr(Limber, "encode", lambda self, params, stats, images, *args, **kwargs: (
    seen.append(images.shape[0]), encode(self, params, stats, images, *args, **kwargs))[1])
  task = Captioning.from_config(config)
  params, stats = jax.eval_shape(task.init, jax.random.key(0))
  jax.eval_shape(task.loss, params, stats, batches(config, 1)[0], jax.random.key(0))
  assert seen and set(seen) == {rows}


def test_resumed_equals_uninterrupted(tmp_path):
  def config():
    return tiny(size(dropout=0.1), mesh=Mesh(data=-1), checkpoint=Checkpoint(every=2, keep=10))

  whole = train(config(), str(tmp_path / "whole"), log=lambda _: None)
  shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
  for step in (4, 6):
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(step))
  resumed = train(config(), str(tmp_path / "stopped"), log=lambda _: None)
  for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(a, b)


def test_random_frozen_weights_are_kept_and_others_refused_on_resuming(tmp_path, monkeypatch,
                                                                        only_the_devices_of_the_mesh):
  config = tiny(steps=3)
  train(config, str(tmp_path), log=lambda _: None)
  init = Captioning.init
  # Another machine draws other bits.
  monkeypatch.setattr(Captioning, "init", lambda self, rng: init(self, jax.random.fold_in(rng, 1)))
  assert int(train(config, str(tmp_path), log=lambda _: None).step) == 3
  shutil.rmtree(tmp_path / "frozen")
  with pytest.raises(UserError, match=r"was trained on other weights of 'image': its checkpoint 3 has the digest"):
    train(config, str(tmp_path), log=lambda _: None)


def test_the_encoder_runs_as_at_test_unless_told_otherwise():
  config = tiny(size(RESNET))
  task, batch = Captioning.from_config(config), batches(config, 1)[0]
  params, stats = jax.jit(task.init)(jax.random.key(0))
  as_theirs = Captioning.from_config(tiny(size(RESNET), captions=Captions(encoder="train")))
  loss, (_, same) = jax.jit(task.loss)(params, stats, batch, jax.random.key(0))
  other, (_, changed) = jax.jit(as_theirs.loss)(params, stats, batch, jax.random.key(0))
  assert loss != other
  assert all((a == b).all() for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(same), strict=True))
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(changed), strict=True))


@pytest.mark.parametrize(("changes", "message"), [
  ({"model": VIT}, "needs a models.limber.LimberConfig, got EncoderConfig"),
  ({"loss": Loss(num_microbatches=3)}, "num_microbatches=3 does not divide config.batch_size=16"),
  ({"captions": Captions(eos="never")}, "captions.eos='never': choose one of always, reference"),
  ({"captions": Captions(eos="reference", micro_batch=5)}, "micro_batch=5 does not divide"),
  ({"decoding": Decoding("beam", top_p=0.9)}, "decoding.top_p=0.9 is for method='sample', but the method is 'beam'"),
  ({"data": Data(length=63)}, "more than the language model's context of 64"),
  ({"model": size(RESNET), "loss": Loss(num_microbatches=2), "captions": Captions(encoder="train"),
    "trainable": ("prompt", "image")}, "BatchNorm"),
  ({"trainable": ("image", "prompt"), "data": Data(features="x", length=9)}, "holds what a frozen encoder saw"),
])
def test_settings_that_cannot_go_together_are_refused(changes, message):
  config = dataclasses.replace(tiny(), **changes)
  with pytest.raises(UserError, match=message):
    Captioning.from_config(config)


# Texts alone

def test_a_text_of_one_token_has_nothing_to_predict():
  config = tiny(gptj.SIZES["gptj_mu"](), task="language_modelling", trainable=("lm",), data=Data(length=1))
  with pytest.raises(UserError, match=r"^config.data.length=1: wanted 2 or more: what is predicted follows another"):
    LanguageModelling.from_config(config)


def test_a_language_model_learns_its_captions_and_counts_them_once():
  config = tiny(gptj.SIZES["gptj_mu"](), task="language_modelling", trainable=("lm",))
  task = LanguageModelling.from_config(config)
  data = [{k: b[k] for k in ("tokens", "mask")} for b in batches(tiny(), 3)]
  whole, _ = run(config, data, LanguageModelling)
  config.loss.num_microbatches = 4
  split, _ = run(config, data, LanguageModelling)
  np.testing.assert_allclose([m["loss"] for m in split], [m["loss"] for m in whole], rtol=1e-5)
  params, stats = jax.jit(task.init)(jax.random.key(0))
  nll = task.predict()["nll"](params, stats, jax.tree.map(jnp.asarray, data[0]))
  np.testing.assert_allclose(nll.sum() / data[0]["mask"][:, 1:].sum(), whole[0]["loss"], rtol=1e-5)


def test_sharding_rows_hold_for_every_part_and_only_there():
  rules = parallel.within("prompt", ((r"kernel$", jax.P("fsdp")),))
  mesh = parallel.make_mesh({"data": 4, "fsdp": 2})
  leaf = jax.ShapeDtypeStruct((4, 4), np.float32)
  out = parallel.shardings({"mu": {"prompt": {"linear": {"kernel": leaf}}}}, rules, mesh)
  assert out["mu"]["prompt"]["linear"]["kernel"].spec == jax.P("fsdp")
  with pytest.raises(UserError, match="fits no row"):
    parallel.shardings({"prompt@b": {"kernel": leaf}}, rules, mesh)
