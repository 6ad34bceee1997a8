"""`limber_jax.plan --search`: which settings are compiled one after the other, and which of them is the best."""

import dataclasses

import jax
import pytest
from runs import tiny

from limber_jax.config import Compute, Loss
from limber_jax.errors import UserError
from limber_jax.planning import chips, search, text
from limber_jax.planning.plan import Slices

GIB = 2**30


@dataclasses.dataclass
class Compiler:
  """Stands for the compiler: what a program takes follows from its settings by a rule."""

  gib: dict  # of one microbatch, by policy
  seconds: dict
  tried: list = dataclasses.field(default_factory=list)

  def plan(self, config, slices):
    mesh, remat, count = config.mesh, config.compute.remat, config.loss.num_microbatches
    self.tried.append((mesh.data, mesh.fsdp, mesh.tensor, remat, count))
    if mesh.tensor == 4:
      raise UserError("kernel: dimension 6 does not divide over 4 devices")
    seconds = self.seconds[remat] * (1 + 0.1 * (count - 1)) * (0.9 if mesh.fsdp == 4 else 1.2 if mesh.fsdp > 4 else 1)
    peak = self.gib[remat] / count
    problems = ["memory: too much"] if peak > 30 else []
    return {"compiled": True, "memory": {"peak": peak * GIB, "limit": int(30.75 * GIB)}, "problems": problems,
            "seconds": dict.fromkeys(("compute", "hbm", "ici", "cycles", "estimate"), seconds),
            "share_of_peak": {"estimate": 0.1 / seconds}}


@pytest.fixture
def searched(monkeypatch):
  def run(config, gib, seconds):
    compiler, said = Compiler(gib, seconds), []
    monkeypatch.setattr(search, "plan", compiler.plan)
    found = search.search(config, Slices("v4-16", 1, chips.CHIPS["v4"], jax.devices(), ""), said.append)
    assert found["variants"] == said and len(set(compiler.tried)) == len(compiler.tried) == len(said)
    return found, compiler.tried
  return run


def test_each_policy_is_tried_and_what_lacks_memory_in_more_microbatches_until_it_fits(searched):
  found, tried = searched(tiny(mesh=(8, 1, 1), batch_size=128), {"none": 100, "dots": 40, "full": 4},
                          {"none": 0.5, "dots": 1, "full": 2})
  assert tried[:6] == [(8, 1, 1, "none", 1), (8, 1, 1, "dots", 1), (8, 1, 1, "full", 1),
                       (8, 1, 1, "none", 2), (8, 1, 1, "none", 4), (8, 1, 1, "dots", 2)]
  assert tried[6:] == [(1, 8, 1, "none", 4), (2, 4, 1, "none", 4), (4, 1, 2, "none", 4), (1, 4, 2, "none", 4)]
  assert found["best"]["flags"] == ["--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.mesh.tensor=1",
                                    "--config.compute.remat=none", "--config.loss.num_microbatches=4"]


def test_fewer_microbatches_are_tried_as_long_as_they_fit(searched):
  config = tiny(mesh=(8, 1, 1), batch_size=128, loss=Loss(num_microbatches=4), compute=Compute(remat="full"))
  found, tried = searched(config, {"none": 100, "dots": 60, "full": 4}, {"none": 9, "dots": 9, "full": 2})
  assert [count for *_, remat, count in tried if remat == "full"][:3] == [4, 2, 1]
  assert [count for *_, remat, count in tried if remat == "none"] == [4, 2]
  assert found["best"]["num_microbatches"] == 1 and found["best"]["remat"] == "full"


def test_microbatches_that_leave_devices_without_rows_are_not_tried_and_nothing_may_fit(searched):
  found, tried = searched(tiny(mesh=(8, 1, 1), batch_size=16), dict.fromkeys(search.REMAT, 1e6),
                          dict.fromkeys(search.REMAT, 1))
  assert {count for *_, count in tried} == {1, 2} and found["best"] is None
  assert text.search_lines(found)[-1] == "none of them fits"


def test_settings_that_cannot_be_are_rows_with_the_reason(searched):
  config = tiny(mesh=(2, 1, 4), batch_size=64)
  found, _ = searched(config, {"none": 1, "dots": 1, "full": 1}, {"none": 1, "dots": 2, "full": 3})
  lines = text.search_lines(found)
  assert lines[2].endswith("cannot be: kernel: dimension 6 does not divide over 4 devices")
  assert found["best"]["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1} and found["best"]["remat"] == "none"
  assert lines[0] == f"tiny on v4-16, 8 chips of 30.75 GiB, batch 64: {len(lines) - 3} ways, compiled, not run"
  assert lines[-1].startswith("the best that fits, by the compiler's estimate: --config.mesh.data=2 ")


def test_a_problem_other_than_memory_comes_after_all_that_have_none():
  row = {"fits": True, "compiled": True, "problems": [], "seconds": {"estimate": 2.0}}
  worse = row | {"problems": ["float32: …"], "seconds": {"estimate": 1.0}}
  lacking = row | {"fits": False, "problems": ["memory: …"], "seconds": {"estimate": 0.5}}
  refused = {"fits": False, "compiled": False, "problems": ["no"]}
  assert sorted([refused, lacking, worse, row], key=search.rank) == [row, worse, lacking, refused]


@pytest.mark.parametrize(("count", "slices", "wanted"), [
  (4, 1, [(4, 1, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)]),
  (128, 2, [(128, 1, 1), (2, 64, 1), (32, 4, 1), (64, 1, 2), (2, 32, 2)])])
def test_meshes_have_all_chips_and_split_no_parameter_over_slices(count, slices, wanted):
  assert search.meshes(count, slices) == wanted
  assert all(data * fsdp * tensor == count and data % slices == 0 for data, fsdp, tensor in wanted)
