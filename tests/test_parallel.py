"""Meshes, sharding tables and batches over devices."""

import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from runs import environment

from limber_jax.errors import UserError
from limber_jax.runtime import parallel


def test_one_axis_takes_what_is_left():
  assert dict(parallel.make_mesh({"data": -1, "fsdp": 2}).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": -1}, {"data": 0}, {"rows": 8}, {"data": 16}])
def test_a_mesh_that_cannot_be_is_refused(sizes):
  with pytest.raises(UserError, match="mesh"):
    parallel.make_mesh(sizes)


def test_rules_fit_parameters_and_adams_moments_alike():
  mesh = parallel.make_mesh({"data": 4, "fsdp": 2})
  leaf = jax.ShapeDtypeStruct((6, 4), np.float32)
  tree = {"params": {"fc": {"kernel": leaf}}, "opt": [{"mu": {"fc": {"kernel": leaf}}}],
          "count": jax.ShapeDtypeStruct((), np.int32)}
  out = parallel.shardings(tree, ((r"fc/kernel$", P("fsdp", None)),), mesh)
  assert out["params"]["fc"]["kernel"].spec == out["opt"][0]["mu"]["fc"]["kernel"].spec == P("fsdp", None)
  assert out["count"].spec == P()


@pytest.mark.parametrize(("shape", "rule", "message"), [
  ((6, 4), (r"nothing", P()), "fits no row"),
  ((6, 5), (r"kernel", P(None, "fsdp")), "dimension 5 .* fsdp"),
  ((6,), (r"kernel", P(None, "fsdp")), "more dimensions"),
])
def test_a_leaf_without_a_fitting_row_is_named(shape, rule, message):
  with pytest.raises(UserError, match=f"a/kernel: .*{message}"):
    parallel.shardings({"a": {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}}, (rule,),
                       parallel.make_mesh({"data": 4, "fsdp": 2}))


def test_a_second_row_says_how_a_leaf_lies_that_the_first_does_not_divide():
  mesh = parallel.make_mesh({"data": 4, "fsdp": 2})
  rules = ((r"kernel", P(None, "fsdp")), (r"kernel", P("fsdp")), (r"kernel", P()))
  found = parallel.shardings({f"{n}x{m}": {"kernel": jax.ShapeDtypeStruct((n, m), np.float32)}
                              for n, m in ((6, 4), (6, 5), (3, 5))}, rules, mesh)
  assert [x.spec for x in jax.tree.leaves(found)] == [P(), P(None, "fsdp"), P("fsdp")]


def test_a_batch_goes_round_unchanged():
  mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rows = parallel.local_rows(12, mesh)
  assert rows.tolist() == list(range(12))
  batch = {"x": np.arange(24).reshape(12, 2)}
  out = parallel.global_batch(batch, mesh)["x"]
  assert out.sharding.spec == P(("data", "fsdp"))
  np.testing.assert_array_equal(out, batch["x"])


def test_a_batch_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="a batch of 12 does not divide over 8"):
    parallel.local_rows(12, parallel.make_mesh({"data": 8}))


def test_constraints_hold_on_a_mesh_and_vanish_without_one():
  x = np.ones((8, 4), np.float32)
  with jax.set_mesh(parallel.make_mesh({"data": 8})):
    text = jax.jit(lambda x: parallel.constrain(x, "data", None) * 2).lower(x).as_text()
    uneven = jax.jit(lambda x: parallel.constrain(x, "data", None) * 2)(x[:3])
  assert "sharding_constraint" in text
  assert uneven.shape == (3, 4)
  assert "sharding_constraint" not in jax.jit(lambda x: parallel.constrain(x, "data", None) * 2).lower(x).as_text()


FROM_FIRST = """
import sys, time
import jax
from limber_jax.runtime import parallel
from limber_jax.errors import UserError

def slow():
  assert jax.process_index() == 0
  time.sleep({seconds})
  return {{"x": [1.5, None]}}

def wrong():
  raise UserError("no such file")

parallel.start()
assert parallel.broadcast_from_process_0(slow) == {{"x": [1.5, None]}}
assert parallel.allgather_objects({{"me": jax.process_index()}}) == [{{"me": 0}}, {{"me": 1}}]
try:
  parallel.broadcast_from_process_0(wrong)
except UserError as error:
  assert str(error) == "no such file"
else:
  sys.exit("no error")
"""


# Collectives on CPUs give up after 30 s, and scoring captions or fitting probes takes longer.
@pytest.mark.process
@pytest.mark.parametrize("seconds", [0, pytest.param(40, marks=pytest.mark.long)])
def test_every_process_gets_what_the_first_one_found_however_long_it_took(seconds, tmp_path):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  both = [subprocess.Popen([sys.executable, "-c", FROM_FIRST.format(seconds=seconds)], text=True,
                           stderr=subprocess.PIPE, env=environment(1, 2, i, port)) for i in range(2)]
  ends = [p.communicate(timeout=120)[1] for p in both]
  assert [p.returncode for p in both] == [0, 0], ends
