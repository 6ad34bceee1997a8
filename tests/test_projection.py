"""What a projection was trained between: digests of frozen weights, and the file that carries them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from limber_jax.errors import UserError
from limber_jax.runtime import parallel
from limber_jax.weights import parts, projection
from limber_jax.weights.digest import digest

TYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.int8, bool, np.float64, np.int64)


def tree(seed=0):
  rng = np.random.default_rng(seed)
  return {"blocks": {"q": {"kernel": rng.normal(size=(3, 16, 8)).astype(np.float32)},
                     "fc": {"bias": rng.normal(size=(3, 8)).astype(ml_dtypes.bfloat16)}},
          "scale": np.float32(2), "ids": rng.integers(0, 9, 16)}


def test_a_digest_is_the_same_on_one_device_on_eight_and_in_numpy():
  x = tree() | {"ids": np.arange(16, dtype=np.int32)}  # jax has no int64
  want = digest(x)
  assert len(want) == 32 and int(want, 16)
  assert digest(jax.tree.map(jnp.asarray, x)) == want
  P = jax.P
  for sizes, kernel, bias in (({"fsdp": 8}, P(None, "fsdp"), P(None, "fsdp")), ({"data": 4, "tensor": 2}, P(), P()),
                              ({"data": 2, "fsdp": 2, "tensor": 2}, P(None, "fsdp", "tensor"), P(None, "tensor"))):
    mesh = parallel.make_mesh(sizes)
    specs = {"blocks": {"q": {"kernel": kernel}, "fc": {"bias": bias}}, "scale": P(), "ids": P(("data", "fsdp"))}
    spread = jax.tree.map(lambda a, s, mesh=mesh: jax.device_put(a, jax.NamedSharding(mesh, s)), x, specs)
    assert digest(spread) == want
    one = jax.tree.map(lambda a: jax.device_put(a, jax.devices()[3]), x)
    assert digest(one) == want


def test_the_digest_is_this_one():
  """Cards of projections hold it: a change of the sum or of its parts would make all of them wrong."""
  x = {"a": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}, "b": np.arange(5, dtype=np.uint8)}
  assert digest(x) == "954ff8da85924c1aca7d77356f6b522c"


@pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
def test_any_flipped_bit_changes_the_digest(dtype):
  rng = np.random.default_rng(0)
  data = rng.integers(0, 2 if dtype is bool else 256, 6 * 7 * np.dtype(dtype).itemsize, np.uint8)
  seen = {digest({"x": data.view(dtype).reshape(6, 7)})}
  flips = 60
  for bit in rng.choice(data.size * (1 if dtype is bool else 8), flips if dtype is not bool else 40, replace=False):
    other = data.copy()
    if dtype is bool:
      other[bit] ^= 1
    else:
      other[bit // 8] ^= 1 << (bit % 8)
    seen.add(digest({"x": other.view(dtype).reshape(6, 7)}))
  assert len(seen) == (41 if dtype is bool else flips + 1)


def test_swapped_elements_change_the_digest():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(8, 8)).astype(np.float32)
  x[3, 4] = -x[1, 2]  # which differ by 2³¹, and so vanish in any sum of even multiples
  seen = {digest(x)}
  pairs = [((1, 2), (3, 4)), *(((a, b), (c, d)) for a, b, c, d in rng.integers(0, 8, (60, 4)) if (a, b) != (c, d))]
  for i, j in pairs:
    other = x.copy()
    other[i], other[j] = x[j], x[i]
    seen.add(digest(other))
  assert len(seen) == len({frozenset(p) for p in pairs}) + 1
  seen |= {digest(y) for y in (x.T, x[::-1], x[:, ::-1], x.reshape(4, 16), x.reshape(64), np.roll(x, 1, 0))}
  assert len(seen) == len({frozenset(p) for p in pairs}) + 7


def test_paths_shapes_and_types_are_part_of_a_digest():
  x = np.zeros((2, 2), np.float32)
  trees = [{"a": x}, {"b": x}, {"a": {"b": x}}, {"a": x, "b": x}, {"a": x.reshape(4)}, {"a": x.astype(np.int32)},
           {"a": x.astype(ml_dtypes.bfloat16)}, {"a": x[:1]}, {"a": -x}, {"a": x[0, 0]}, {"a": np.zeros((0,))}, {}]
  assert len({digest(t) for t in trees}) == len(trees)
  assert digest({"b": x, "a": x + 1}) == digest({"a": x + 1, "b": x})
  with pytest.raises(ValueError, match="a: no digest of complex64"):
    digest({"a": x.astype(np.complex64)})


# The file


def metadata(**changes):
  return {"encoder": "clip_rn50x16", "lm": "gptj_6b", "digests": {"image": digest(tree(0)), "lm": digest(tree(1))},
          "config": {"optim.lr": 8e-4, "model": {"k": 1}}, "step": 15_000, "version": "0.1"} | changes


def params(seed=0):
  rng = np.random.default_rng(seed)
  return {"linear": {"kernel": rng.normal(size=(6, 4)).astype(np.float32).T, "bias": np.ones(6, np.float32)}}


def test_a_projection_comes_back_bit_for_bit_with_its_card(tmp_path):
  path = str(tmp_path / "limber.safetensors")
  for value in (params(), jax.tree.map(jnp.asarray, params())):
    projection.save(path, value, metadata())
    got, got_card = projection.load(path)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, params())
    assert got_card == metadata()
  assert [f.name for f in tmp_path.iterdir()] == ["limber.safetensors"]
  with safe_open(path, framework="np") as file:
    assert json.loads(file.metadata()["card"])["step"] == 15_000
    assert set(file.keys()) == {"linear/kernel", "linear/bias"}


def test_half_precision_is_written_as_float32(tmp_path):
  path = str(tmp_path / "limber.safetensors")
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params())
  projection.save(path, half, metadata())
  got, _ = projection.load(path)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32), strict=True), got, half)


def test_frozen_weights_other_than_it_was_trained_between_are_refused(tmp_path):
  path = str(tmp_path / "limber.safetensors")
  projection.save(path, params(), metadata())
  _, c = projection.load(path)
  right = {"image": digest(tree(0)), "lm": digest(tree(1))}
  projection.check(c, right, path)
  projection.check(c, {"lm": right["lm"]}, path)
  for part, what in (("image", r"another image encoder \(clip_rn50x16\)"),
                     ("lm", r"another language model \(gptj_6b\)")):
    wrong = digest(tree(2))
    with pytest.raises(UserError, match=f"^{path} was trained on {what}: the weights of '{part}' have the digest "
                                        f"{wrong}, expected {right[part]}$"):
      projection.check(c, right | {part: wrong}, path)


def test_what_is_no_projection_is_refused(tmp_path):
  path = str(tmp_path / "x.safetensors")
  with pytest.raises(UserError, match=f"{path}: no projection can be read there"):
    projection.load(path)
  (tmp_path / "x.safetensors").write_bytes(b"\x80\x02}.")
  with pytest.raises(UserError, match=f"{path}: no projection can be read there"):
    projection.load(path)
  save_file({"w": np.zeros(2, np.float32)}, path)
  with pytest.raises(UserError, match="a safetensors file, but not a projection: it has no metadata"):
    projection.load(path)
  for text, reason in (("[", "no projection can be read there"), ("[" * 100_000, "no projection can be read there"),
                       ("{}", "its metadata have no 'encoder'"), ("[1]", "its metadata have no 'encoder'"),
                       (json.dumps(metadata(digests={"image": "0"})), "digests are not those of image and lm"),
                       (json.dumps(metadata(digests={"image": "0", "lm": 1})), "digests are not those of image")):
    save_file({"w": np.zeros(2, np.float32)}, path, metadata={"card": text})
    with pytest.raises(UserError, match=reason) as error:
      projection.load(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
  save_file({"w": np.zeros(2, np.float16)}, path, metadata={"card": json.dumps(metadata())})
  with pytest.raises(UserError, match="w: expected float32, got float16"):
    projection.load(path)


def test_a_card_that_is_not_one_is_not_written(tmp_path):
  path = str(tmp_path / "x.safetensors")
  for wrong, reason in ((metadata(config=object()), "not plain JSON"), (metadata(step=float("nan")), "not plain JSON"),
                        ({"step": 1}, "its metadata have no 'encoder'"), (metadata(digests={}), "digests are not th")):
    with pytest.raises(UserError, match=reason):
      projection.save(path, params(), wrong)
  with pytest.raises(UserError, match="cannot be written"):
    projection.save(str(tmp_path / "no" / "x.safetensors"), params(), metadata())
  assert not list(tmp_path.iterdir())


def test_a_prompt_loads_from_a_projection_and_from_the_references_file(tmp_path):
  torch = pytest.importorskip("torch")
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params())
  projection.save(str(tmp_path / "ours"), params(), metadata())
  linear = torch.nn.Linear(4, 6)
  with torch.no_grad():
    linear.weight[:] = torch.tensor(params()["linear"]["kernel"].T.copy())
    linear.bias[:] = 1
  torch.save(linear.state_dict(), tmp_path / "proj.ckpt")
  for name in ("ours", "proj.ckpt"):
    got, stats = parts.load_part(str(tmp_path / name), "prompt", None, like)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b, strict=True), got, params())
    assert stats == {}
  like["linear"]["kernel"] = jax.ShapeDtypeStruct((4, 12), np.float32)
  with pytest.raises(UserError, match=r"proj.ckpt: linear/kernel: expected \(4, 12\), got \(4, 6\) from weight"):
    parts.load_part(str(tmp_path / "proj.ckpt"), "prompt", None, like)
