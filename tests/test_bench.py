"""Each measurement prints one JSON object, and what it counts is what the model needs."""

import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from limber_jax.bench import measure
from limber_jax.training.flops import count_flops

ROOT = Path(__file__).parents[1]
GENERATE = ("generate", "--size=gptj_mu", "--prompt=6", "--new_tokens=4", "--repeats=1")


def bench(*flags):
  return subprocess.run([sys.executable, "-m", "limber_jax.bench", *flags], cwd=ROOT, text=True, capture_output=True)


def measured(*flags):
  """Returns the object that a measurement prints, all of its figures finite."""
  done = bench(*flags)
  assert done.returncode == 0, done.stderr
  out = json.loads(done.stdout)

  def numbers(value):
    if isinstance(value, dict | list):
      return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers(v)]
    return [value] if isinstance(value, int | float) else []

  assert all(math.isfinite(n) and n >= 0 for n in numbers(out)), out
  return out


@pytest.mark.process
def test_generation_is_measured_at_every_batch_size_and_writes_the_peers_tokens(transformers):
  out = measured(*GENERATE, "--batch_sizes=1,3")
  assert (out["parameters"], out["weight_bytes"]) == (165_376, 4 * 165_376)
  for rows in (1, 3):
    at = out[f"at_{rows}"]
    # All weights but the embedding, its rows, and 2 layers' keys and values of width 64 in 6 to 8 slots.
    assert at["bytes_per_step"] == 4 * (165_376 - 512 * 64 + rows * 64 + 2 * 2 * rows * 7 * 64)
    assert at["rows_with_other_tokens"] == at["rows_decoded_otherwise"] == 0
    assert len(at["speed_of_each_pair"]) == 1 and at["speed_against_transformers"] > 0
    assert at["decode_seconds_per_token"] > 0 and at["share_of_bandwidth"] > 0 and at["peak_memory_bytes"] > 0


@pytest.mark.process
def test_beams_and_bfloat16_are_measured_without_a_peer():
  out = measured(*GENERATE, "--batch_sizes=2", "--beams=2", "--dtype=bfloat16", "--nopeer")
  assert (out["decoding"], out["beams"], out["dtype"], out["weight_bytes"]) == ("beam", 2, "bfloat16", 2 * 165_376)
  assert out["at_2"]["tokens_per_second"] > 0 and "speed_against_transformers" not in out["at_2"]


@pytest.mark.process
@pytest.mark.parametrize(("config", "flags", "trained"), [
  ("limber_clip", ("--batch_size=8",), 512 * 64 + 64),
  ("quickstart_lm", ("--size=mu", "--batch_size=2"), 165_376),
])
def test_a_step_of_a_frozen_and_of_a_trained_language_model_is_measured(config, flags, trained):
  out = measured("train", f"--config=experiments/{config}.py", "--size=mu", "--repeats=1", *flags)
  assert out["trained_parameters"] == trained
  assert out["frozen_bytes"] >= 4 * (out["parameters"] - trained)  # of float32, and statistics
  assert 8 * trained <= out["optimizer_bytes"] < 8 * trained + 64  # Adam's two moments
  assert (out["frozen_bytes"] == 0) == (out["parameters"] == trained)
  assert 1 < out["model_flops_over_forward"] < (2 if out["frozen_bytes"] else 3.01)
  assert out["examples_per_second"] > 0 and out["share_of_peak"] > 0 and "speed_against_open_clip" not in out


@pytest.mark.process
def test_a_step_of_a_clip_is_measured_beside_open_clips(open_clip):
  out = measured("train", "--config=experiments/clip_vitb.py", "--size=mu", "--repeats=1", "--batch_size=4")
  assert out["speed_against_open_clip"] > 0 and len(out["speed_of_each_pair"]) == 1
  assert out["frozen_bytes"] == 0 and 2.8 < out["model_flops_over_forward"] <= 3


@pytest.mark.process
def test_reading_is_measured_beside_plain_pillow_and_as_a_share_of_training():
  out = measured("data", "--images=12", "--size=32", "--workers=1", "--batch_size=4", "--round=2", "--repeats=1",
                 "--nopeer", "--steps=5", "--model=clip_vit_b32_mu", "--pairs=4")
  assert out["images_per_second"].keys() == {"pillow", "files", "tars", "packed"}
  assert all(len(out[name]["speed_of_each_round_against_pillow"]) == 1 for name in ("files", "tars", "packed"))
  assert out["run"]["steps"] == 1 and 0 <= out["run"]["data_wait"] <= 1


@pytest.mark.process
@pytest.mark.parametrize(("flags", "words"), [
  (("generate", "--size=gptj_6"), "--size: no size 'gptj_6'; did you mean 'gptj_6b'?"),
  (("generate", "--batch_sizes=1,x"), "--batch_sizes=1,x: expected whole numbers"),
  (("generate", "--batch_sizes="), "--batch_sizes=: expected whole numbers"),
  (("generate", "--new_tokens=1"), "new_tokens"),
  (("generate", "--size=gptj_mu", "--prompt=60"), "max_new_tokens=32: expected"),
  (("generate", "now"), "unexpected argument 'now'"),
  (("data", "--model=clip_vit_b3"), "--model: no CLIP 'clip_vit_b3'; did you mean 'clip_vit_b32'?"),
  (("data", "--steps=4"), "--steps=4: wanted 0, or more than the 4"),
  (("train",), "--config is missing"),
  (("train", "--config=experiments/limber_clip.py", "--size=gptj_mu"), "no size 'gptj_mu' for task 'captioning'"),
  (("train", "--config=experiments/limber_clip.py", "--size=mu", "--batch_size=3"), "microbatches=8 does not divide"),
])
def test_a_mistake_is_one_line(flags, words):
  done = bench(*flags)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr


# What is counted

def flops(f, *args):
  return count_flops(jax.make_jaxpr(f)(*args).jaxpr)


def test_products_in_loops_count_as_often_as_they_run():
  a = jnp.ones((3, 4))
  b = jnp.ones((4, 4))
  assert flops(lambda a, b: a @ b, a, b) == 2 * 3 * 4 * 4
  assert flops(lambda a, b: jax.lax.scan(lambda c, _: (c @ b, None), a, None, length=5)[0], a, b) == 5 * 2 * 3 * 4 * 4


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_each_gradient_of_a_convolution_costs_as_much_as_the_convolution(stride):
  x, w = jnp.ones((2, 12, 12, 3)), jnp.ones((stride, stride, 3, 5))

  def f(x, w):
    return jax.lax.conv_general_dilated(x, w, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  forward = 2 * 2 * (12 // stride) ** 2 * 5 * stride**2 * 3
  assert flops(f, x, w) == forward
  assert flops(jax.value_and_grad(lambda *a: f(*a).sum(), (0, 1)), x, w) == 3 * forward


def test_ratios_are_of_pairs_and_their_median_is_the_answer():
  assert measure.ratios([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == (2.0, [2.0, 3.0, 1.0])


def test_the_size_of_a_tree_is_counted_in_numbers_and_bytes():
  tree = {"a": np.zeros((2, 3), np.float32), "b": jnp.zeros(5, jnp.bfloat16)}
  assert (measure.size_of(tree), measure.bytes_of(tree)) == (11, 34)
