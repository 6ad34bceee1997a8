"""Both losses against numbers done by hand and open_clip's, and every way to compute them against the plain one."""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from limber_jax import losses
from limber_jax.losses import contrastive_loss, sigmoid_loss

N, WIDTH, E = 40, 12, 16  # 5 rows on each of 8 devices
AXES = ("data", "fsdp")
LOSSES = {"contrastive": contrastive_loss, "sigmoid": sigmoid_loss}


def mesh_of(data, fsdp, tensor=1):
  return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def embeddings(n=N, e=E, seed=0, related=0.5):
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(n, e)) * rng.uniform(0.1, 10, size=(n, 1))
  text = rng.normal(size=(n, e)) + related * image
  return image.astype(np.float32), text.astype(np.float32)


def loss_of(name, image, text, scale, bias, **kwargs):
  return LOSSES[name](image, text, scale, *([bias] if name == "sigmoid" else []), **kwargs)


def values_and_gradients(name, image, text, scale=20.0, bias=-5.0, jit=jax.jit, **kwargs):
  """Returns ((loss, metrics), gradients of image, text, scale and bias) of the loss called `name`."""
  f = jax.value_and_grad(lambda *a: loss_of(name, *a, **kwargs), argnums=(0, 1, 2, 3), has_aux=True)
  return jit(f)(image, text, jnp.float32(scale), jnp.float32(bias))


def assert_near(got, wanted, rtol, what=""):
  """Largest difference, relative to the largest number."""
  got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
  assert got.shape == wanted.shape
  size = np.abs(wanted).max()
  assert np.abs(got - wanted).max() <= rtol * size, f"{what}: {np.abs(got - wanted).max() / size} of {size}"


def assert_same(got, wanted, value_rtol=1e-6, gradient_rtol=1e-5):
  (value, metrics), gradients = got
  (wanted_value, wanted_metrics), wanted_gradients = wanted
  assert_near(value, wanted_value, value_rtol, "loss")
  for key in wanted_metrics:
    assert_near(metrics[key], wanted_metrics[key], 1e-6, key)
  for name, a, b in zip(("image", "text", "scale", "bias"), gradients, wanted_gradients, strict=True):
    if np.any(np.float32(b)):  # what float32 has none of is rounding of float64: terms that cancel, on some processors
      assert_near(a, b, gradient_rtol, f"gradient of {name}")
    else:
      assert not np.any(a)


# Against hand-made numbers and open_clip

@pytest.mark.smoke
def test_two_pairs_by_hand():
  image, text = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 0.0], [6.0, 8.0]])
  # Cosines [[1, 0.6], [0, 0.8]]: with scale 2 the pairs win by 0.8 and 1.6 in the rows, by 2 and 0.4 in the columns.
  loss, metrics = contrastive_loss(image, text, 2.0)
  assert math.isclose(loss, sum(math.log1p(math.exp(-m)) for m in (0.8, 1.6, 2.0, 0.4)) / 4, rel_tol=1e-6)
  assert metrics == {"i2t": 1.0, "t2i": 1.0, "scale": 2.0}
  # With bias -1 the logits are [[1, 0.2], [-1, 0.6]].
  loss, metrics = sigmoid_loss(image, text, 2.0, -1.0)
  assert math.isclose(loss, sum(math.log1p(math.exp(m)) for m in (-1, 0.2, -1, -0.6)) / 2, rel_tol=1e-6)
  assert metrics == {"i2t": 1.0, "t2i": 1.0, "scale": 2.0, "bias": -1.0}


def test_top1_counts_both_directions_and_lets_a_tie_pass():
  image = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
  text = jnp.array([[1.0, 0.1], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
  for chunk_size in (None, 1, 3):
    _, metrics = contrastive_loss(image, text, 10.0, chunk_size=chunk_size)
    # Texts 1 and 2 are nearer to images 0 and 1 than their own; image 3 has texts 1 and 3 alike. Text 1 is image 1's
    # only in name; text 0 and text 3 have images 0 and 3 alike.
    assert (metrics["i2t"], metrics["t2i"]) == (0.5, 0.75)


def by_open_clip(open_clip, name, image, text, scale, bias):
  """Returns the same as `values_and_gradients`, from open_clip in float64, through F.normalize."""
  torch = pytest.importorskip("torch")
  image, text = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (image, text))
  scale, bias = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (scale, bias))
  unit = [torch.nn.functional.normalize(a, dim=-1) for a in (image, text)]
  loss = (open_clip.loss.ClipLoss()(*unit, scale) if name == "contrastive" else
          open_clip.loss.SigLipLoss()(*unit, scale, bias))
  loss.backward()
  gradients = [np.zeros(a.shape) if a.grad is None else a.grad.numpy() for a in (image, text, scale, bias)]
  return (loss.item(), {}), gradients


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize(("scale", "bias"), [(1 / 0.07, -10.0), (100.0, 3.0)])
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradients_are_those_of_open_clip(open_clip, name, scale, bias, chunk_size):
  image, text = embeddings(37, 24)
  got = values_and_gradients(name, image, text, scale, bias, chunk_size=chunk_size)
  assert_same(got, by_open_clip(open_clip, name, image, text, scale, bias))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_gradients_of_well_told_pairs_are_not_rounding(open_clip, chunk_size):
  image, text = embeddings(37, 24, seed=5)  # a loss of 6e-4, where p − 1 would put gradients 1.5e-4 off
  got = values_and_gradients("contrastive", image, text, 100.0, 0.0, chunk_size=chunk_size)
  # float32 holds a cosine to 1e-7, so a logit to 1e-5, and such a loss is an exponential of logits.
  assert_same(got, by_open_clip(open_clip, "contrastive", image, text, 100.0, 0.0), 2e-5, 2e-5)


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_logits_from_minus_100_to_100_are_exact(open_clip, name, chunk_size):
  image = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32)
  text = np.roll(image, 4, axis=0)  # each text is its image's opposite
  got = values_and_gradients(name, image, text, 100.0, 0.0, chunk_size=chunk_size)
  assert_same(got, by_open_clip(open_clip, name, image, text, 100.0, 0.0))


# One device

@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [1, 7, N, 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_chunked_is_plain(name, chunk_size):
  image, text = embeddings()
  assert_same(values_and_gradients(name, image, text, chunk_size=chunk_size), values_and_gradients(name, image, text))


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_equals_finite_differences_of_float64(name, chunk_size):
  """The oracle is the plain formula in NumPy's float64, differentiated numerically, once and twice."""
  rng = np.random.default_rng(3)
  image, text = embeddings(12, 6)
  point = (image, text, np.float32(20.0), np.float32(-5.0))
  towards = tuple(np.asarray(rng.normal(size=np.shape(x)), np.float32) for x in point)

  def plain(t):
    x, y, scale, bias = (np.float64(p) + t * np.float64(d) for p, d in zip(point, towards, strict=True))
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    logits = scale * x @ y.T
    if name == "sigmoid":
      return np.logaddexp(0, (1 - 2 * np.eye(len(x))) * (logits + bias)).sum() / len(x)
    own = np.diag(logits)
    return (np.logaddexp.reduce(logits, 0) + np.logaddexp.reduce(logits, 1) - 2 * own).mean() / 2

  def loss(*point):
    return loss_of(name, *point, chunk_size=chunk_size, forward_mode=True)[0]

  h = 1e-4
  first, second = (plain(h) - plain(-h)) / (2 * h), (plain(h) - 2 * plain(0) + plain(-h)) / h**2
  value, tangent = jax.jit(lambda *p: jax.jvp(loss, p, towards))(*point)
  assert_near(value, plain(0), 1e-6)
  assert_near(tangent, first, 1e-5)
  gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
  along = jax.jit(lambda *p: jax.jvp(gradient, p, towards)[1])(*point)  # forward over reverse: a row of the Hessian
  assert_near(sum(np.vdot(a, d) for a, d in zip(along, towards, strict=True)), second, 1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_gradient_the_value_is_the_same(name):
  image, text = embeddings()
  for chunk_size in (None, 7):
    (wanted, _), _ = values_and_gradients(name, image, text, chunk_size=chunk_size)
    got, _ = jax.jit(functools.partial(loss_of, name, chunk_size=chunk_size))(image, text, 20.0, -5.0)
    assert_near(got, wanted, 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_inputs_are_reduced_in_float32(name):
  image, text = (jnp.asarray(a, jnp.bfloat16) for a in embeddings(200, 64))
  plain = values_and_gradients(name, image, text)
  assert plain[0][0].dtype == jnp.float32 and plain[1][0].dtype == jnp.bfloat16
  # The operands of products have 8 bits, so two orders of the same sum may round to neighbouring bfloat16: 2^-8.
  assert_same(values_and_gradients(name, image, text, chunk_size=33), plain, 1e-6, 2**-8)
  exact = values_and_gradients(name, image.astype(jnp.float32), text.astype(jnp.float32))
  assert_near(plain[0][0], exact[0][0], 1e-3)
  for got, wanted in zip(plain[1][:3], exact[1][:3], strict=True):
    assert_near(got, wanted, 2e-2)  # operands rounded by up to 2^-9, three times in a row, times logits of 20


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_zeros_gives_no_nan_and_no_gradient(name, chunk_size):
  image, text = embeddings()
  image[3] = 0
  (loss, _), gradients = values_and_gradients(name, image, text, chunk_size=chunk_size)
  assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)
  assert not np.any(gradients[0][3]) and np.any(gradients[1][3])


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_reaches_the_loss_and_the_gradient(name, chunk_size):
  image, text = embeddings()
  for bad, scale in ((np.s_[3, 1], 20.0), (np.s_[:], 20.0), (None, np.nan)):
    spoilt = text.copy()
    if bad is not None:
      spoilt[bad] = np.nan
    (loss, _), gradients = values_and_gradients(name, image, spoilt, scale, chunk_size=chunk_size)
    assert np.isnan(loss) and np.isnan(gradients[2]), (bad, scale)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_any_length_give_finite_gradients(name, chunk_size):
  image, text = embeddings()
  whole = values_and_gradients(name, image, text, chunk_size=chunk_size)
  for length in (1e-11, 1e-9, 1e9, 1e15):
    scaled = np.float32(length) * image / np.linalg.norm(image, axis=1, keepdims=True)
    (loss, _), gradients = values_and_gradients(name, scaled, text, chunk_size=chunk_size)
    assert_near(loss, whole[0][0], 1e-5)
    assert all(np.isfinite(g).all() for g in gradients)
  for length in (1e-15, 1e-14, 1e-13):
    (_, _), gradients = values_and_gradients(name, image * np.float32(length / 100), text, chunk_size=chunk_size)
    assert not np.any(gradients[0]) and all(np.isfinite(g).all() for g in gradients)


def test_the_temperature_starts_as_published_and_stops_at_100():
  assert math.isclose(math.exp(losses.INITIAL_LOG_SCALE), 1 / 0.07)
  assert math.isclose(math.exp(losses.SIGLIP_LOG_SCALE), 10) and losses.SIGLIP_BIAS == -10
  top = np.float32(losses.MAX_LOG_SCALE)
  assert float(top) == losses.MAX_LOG_SCALE
  assert np.float32(math.exp(top)) <= 100 < np.float32(math.exp(np.nextafter(top, np.float32(5))))
  assert jnp.exp(top) <= 100 and jax.jit(jnp.exp)(top) <= 100


# Several devices. Every way trains the same two linear layers, and must find the same gradients for them, and for its
# own rows of the images, as one device does with plain arrays.

def towers(params, batch):
  return batch["image"] @ params["image"], batch["text"] @ params["text"]


def toy():
  rng = np.random.default_rng(1)
  params = {k: rng.normal(size=(WIDTH, E)).astype(np.float32) for k in ("image", "text")}
  params |= {"scale": np.float32(20), "bias": np.float32(-5)}
  image = rng.normal(size=(N, WIDTH)).astype(np.float32)
  return params, {"image": image, "text": image + rng.normal(size=(N, WIDTH)).astype(np.float32)}


def objective(name, params, batch, **kwargs):
  return loss_of(name, *towers(params, batch), params["scale"], params["bias"], **kwargs)


def train_gradients(name, params, batch, **kwargs):
  """Returns (loss, metrics, gradients of params, gradients of the batch)."""
  f = jax.value_and_grad(functools.partial(objective, name, **kwargs), argnums=(0, 1), has_aux=True)
  (loss, metrics), (params, batch) = f(params, batch)
  return loss, metrics, params, batch


@functools.cache
def wanted(name):
  return jax.device_get(jax.jit(functools.partial(train_gradients, name))(*toy()))


def assert_as_wanted(name, got):
  for path, want in jax.tree_util.tree_leaves_with_path(wanted(name)):
    value = functools.reduce(lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, got)
    rtol = 1e-6 if path[0].idx < 2 else 1e-5
    assert_near(value, want, rtol, jax.tree_util.keystr(path))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_global_arrays_on_a_mesh_give_the_loss_of_one_device(name, shape):
  params, batch = toy()
  mesh = mesh_of(*shape)
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, NamedSharding(mesh, P(AXES)))
    got = jax.jit(functools.partial(train_gradients, name))(params, batch)
  assert_as_wanted(name, got)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("name", LOSSES)
def test_axis_name_of_the_mesh_maps_itself(name, shape, chunk_size):
  params, batch = toy()
  mesh = mesh_of(*shape)
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, NamedSharding(mesh, P(AXES)))
    got = jax.jit(functools.partial(train_gradients, name, axis_name=AXES, chunk_size=chunk_size))(params, batch)
  assert_as_wanted(name, got)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_shard_map_sum_to_those_of_one_device(name, chunk_size):
  step = functools.partial(train_gradients, name, axis_name=AXES, chunk_size=chunk_size)
  mapped = jax.shard_map(step, mesh=mesh_of(4, 2), in_specs=(P(), P(AXES)), out_specs=(P(), P(), P(), P(AXES)))
  assert_as_wanted(name, jax.jit(mapped)(*toy()))


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_unchecked_shard_map_sum_to_those_of_one_device(name, chunk_size):
  def step(params, batch):
    loss, metrics, grads, rows = train_gradients(name, params, batch, axis_name=AXES, chunk_size=chunk_size)
    return loss, metrics, lax.psum(grads, AXES), rows

  mapped = jax.shard_map(step, mesh=mesh_of(4, 2), in_specs=(P(), P(AXES)), out_specs=(P(), P(), P(), P(AXES)),
                         check_vma=False)
  assert_as_wanted(name, jax.jit(mapped)(*toy()))


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_in_pmap_sum_to_those_of_one_device(name, chunk_size):
  def step(params, batch):
    loss, metrics, grads, rows = train_gradients(name, params, batch, axis_name="i", chunk_size=chunk_size)
    return loss, metrics, lax.psum(grads, "i"), rows

  params, batch = toy()
  split = jax.tree.map(lambda a: a.reshape(8, N // 8, WIDTH), batch)
  loss, metrics, grads, rows = jax.pmap(step, axis_name="i", in_axes=(None, 0))(params, split)
  np.testing.assert_array_equal(loss, np.broadcast_to(loss[0], (8,)))  # every device holds the global loss
  loss, metrics, grads = jax.tree.map(lambda a: a[0], (loss, metrics, grads))
  assert_as_wanted(name, (loss, metrics, grads, jax.tree.map(lambda a: a.reshape(N, WIDTH), rows)))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_may_be_taken_outside_of_shard_map(name, chunk_size):
  mapped = jax.shard_map(functools.partial(objective, name, axis_name=AXES, chunk_size=chunk_size), mesh=mesh_of(4, 2),
                         in_specs=(P(), P(AXES)), out_specs=P())
  (loss, metrics), grads = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1), has_aux=True))(*toy())
  assert_as_wanted(name, (loss, metrics, *grads))


# What it costs

def compiled(n, e, **kwargs):
  row = jax.ShapeDtypeStruct((n, e), jnp.float32)
  f = jax.value_and_grad(lambda *a: contrastive_loss(*a, **kwargs), argnums=(0, 1, 2), has_aux=True)
  return jax.jit(f).lower(row, row, jax.ShapeDtypeStruct((), jnp.float32)).compile()


def test_at_32768_pairs_chunks_need_less_than_1_gb_where_plain_needs_more_than_8():
  assert compiled(32_768, 512, chunk_size=1024).memory_analysis().temp_size_in_bytes < 1e9
  assert compiled(32_768, 512).memory_analysis().temp_size_in_bytes > 8e9


def test_plain_computes_one_logits_matrix_for_both_directions_and_the_gradient():
  product = 2 * 512 * 512 * 256
  assert compiled(512, 256).cost_analysis()["flops"] < 3.2 * product  # logits, and one more for each input's gradient


def test_the_ring_never_gathers():
  with jax.set_mesh(mesh_of(4, 2)):
    text = compiled(1024, 64, axis_name=AXES, chunk_size=32).as_text()
    assert "collective-permute" in text and "all-gather" not in text
    assert "all-gather" in compiled(1024, 64, axis_name=AXES).as_text()


def bench(*flags):
  return subprocess.run([sys.executable, "-m", "limber_jax.bench", *flags], cwd=Path(__file__).parents[1], text=True,
                        capture_output=True)


@pytest.mark.process
def test_the_benchmark_prints_one_json_object():
  done = bench("loss", "--n=64", "--large=96", "--e=8", "--chunk=20", "--repeats=1")
  assert done.returncode == 0, done.stderr
  out = json.loads(done.stdout)
  assert out["at_96"]["plain_temp_bytes"] > 0 and out["chunked_time_over_plain"] > 0
  assert out["plain"]["share_of_peak"] > 0 and out["chunked"]["temp_bytes"] > 0


@pytest.mark.process
def test_an_unknown_benchmark_is_one_line():
  done = bench("los")
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr == ("error: bench: no measurement 'los'; did you mean 'loss'? known: captions, data, generate, "
                         "loss, probe, train\n")


# Mistakes

@pytest.mark.parametrize(("change", "message"), [
  ({"image": np.zeros(3, np.float32)}, r"image: expected floating-point embeddings \[N, E\], got float32\[3\]"),
  ({"text": np.zeros((3, 4), np.int32)}, r"text: expected floating-point embeddings \[N, E\], got int32\[3, 4\]"),
  ({"text": np.zeros((2, 4), np.float32)}, r"the same shape.*got \[3, 4\] and \[2, 4\]"),
  ({"scale": np.ones(1, np.float32)}, r"scale: expected a scalar, got shape \[1\]"),
  ({"chunk_size": 0}, "chunk_size: expected None or a whole number of rows, at least 1, got 0"),
  ({"axis_name": "batch", "forward_mode": True}, "forward_mode: not with axis_name='batch'"),
  ({"axis_name": "batch"}, "axis_name: 'batch' is neither an axis of shard_map or pmap here, nor of the mesh"),
])
def test_a_wrong_argument_is_named(change, message):
  image = np.ones((3, 4), np.float32)
  with pytest.raises(ValueError, match=message):
    contrastive_loss(**{"image": image, "text": image, "scale": 1.0} | change)


def test_rows_that_do_not_divide_over_the_mesh_are_named():
  image = np.ones((12, 4), np.float32)
  with jax.set_mesh(mesh_of(4, 2)), pytest.raises(ValueError, match="12 rows do not divide over the 8 devices"):
    contrastive_loss(image, image, 1.0, axis_name=AXES)
