"""`limber_jax.plan`: a run's own step compiled for TPU slices, what is said of it, and what is a problem."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import environment, tiny
from test_rows import Device

from limber_jax.config import Compute
from limber_jax.errors import UserError
from limber_jax.planning import chips, hlo, program, text
from limber_jax.planning.costs import Collective, Cost, Costs
from limber_jax.planning.plan import Slices, memory_of, plan, rates, rows_of_hosts
from limber_jax.planning.problems import of_donation, of_float32, of_logits, of_memory, remade
from limber_jax.planning.program import listening
from limber_jax.runtime import parallel
from limber_jax.training import loop
from limber_jax.training.flops import PEAKS
from limber_jax.training.setup import outline

ROOT = Path(__file__).parent.parent
STEP = ROOT / "tests/data/step_v4-16.hlo"  # test_hlo.py says of what
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra [aot] is not installed")


def on_this_machine(tmp_path):
  """The simulated devices in the place of a slice: all but libtpu itself."""
  return Slices("v4-16", 1, chips.CHIPS["v4"], jax.devices(), str(tmp_path))


def test_each_accelerator_type_has_a_chip_of_which_the_peak_is_known():
  for name, (chip, count) in chips.TOPOLOGIES.items():
    assert chip.kind in PEAKS and chip.flops == PEAKS[chip.kind]
    assert int(name.split("-")[1]) == count * chip.cores
  assert chips.chip_of("v4-128")[1] == chips.chip_of("v5p-128")[1] == 64  # these count cores
  assert chips.chip_of("v5e-16") == chips.chip_of("v5litepod-16") == (chips.CHIPS["v5litepod"], 16)


@pytest.mark.parametrize(("name", "nearest"), [("v4-129", "v4-128"), ("v5-128", "v5p-128"), ("v6-17", "v6e-16"),
                                               ("v4", "v4-8"), ("v5e-2048", "v5litepod-256")])
def test_an_unknown_accelerator_type_is_answered_with_the_nearest(name, nearest):
  with pytest.raises(UserError, match=f"no such TPU slice; did you mean {nearest!r}. known: v4-8, v4-16, "):
    chips.chip_of(name)


def test_without_libtpu_one_line_says_how_to_get_it(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r"libtpu, the compiler for TPUs, is not installed; pip install -e '\.\[aot\]'"):
    chips.devices_of("v4-16", 1, str(tmp_path))
  assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["aot"] == ["jax[tpu]"]


def test_the_step_is_compiled_for_the_arguments_that_a_run_calls_it_with(tmp_path, monkeypatch):
  config, seen = tiny(mesh=(2, 2, 2), trainable=("text", "logit_scale")), []

  class Called(Exception):
    pass

  def step(*arguments):
    seen.extend(arguments)
    raise Called

  monkeypatch.setattr(loop, "compiled_step", lambda setup: step)
  with pytest.raises(Called):
    loop.train(config, str(tmp_path), log=lambda _: None)
  planned = program.arguments(outline(config, parallel.make_mesh(dataclasses.asdict(config.mesh))))
  assert jax.tree.structure(tuple(seen)) == jax.tree.structure(planned)
  for (path, run), spec in zip(jax.tree_util.tree_leaves_with_path(tuple(seen)), jax.tree.leaves(planned), strict=True):
    assert (run.shape, run.dtype) == (spec.shape, spec.dtype), path
    assert run.sharding.is_equivalent_to(spec.sharding, run.ndim), path


def test_a_plan_has_the_model_s_flops_in_the_compiled_program_and_what_remat_does_twice(tmp_path):
  found = plan(tiny(mesh=(8, 1, 1)), on_this_machine(tmp_path))
  assert found["problems"] == [] and found["compiled"] and found["label"] == "compiled, not run"
  # Counted in the text of the compiled program, and in the traced loss: two ways that share no code.
  assert found["flops"]["hardware"] == pytest.approx(found["flops"]["model"], rel=1e-3)
  assert found["hosts"] == {"count": 1, "rows": 16, "copies": 1} and found["mesh"]["data"] == 8
  assert found["collectives"]["all-reduce"]["runs"] > 0
  assert json.loads(json.dumps(found)) == found
  remat = plan(tiny(mesh=(8, 1, 1), compute=Compute(dtype="float32", remat="full")), on_this_machine(tmp_path))
  assert remat["flops"]["model"] == found["flops"]["model"]
  assert remat["flops"]["hardware"] > 1.15 * found["flops"]["hardware"]
  assert "recomputed" in {part["pass"] for part in remat["heaviest"]}


def test_rows_that_do_not_divide_are_a_problem_and_nothing_is_compiled(tmp_path, monkeypatch):
  monkeypatch.setattr(program, "compile_step", None)
  found = plan(tiny(mesh=(8, 1, 1), batch_size=12), on_this_machine(tmp_path))
  assert found["problems"] == ["rows that processes cannot supply: a batch of 12 does not divide over 8 devices (mesh "
                               "axes data × fsdp)"]
  assert not found["compiled"] and text.lines(found)[-1].startswith("1 problem; not compiled by jax")


def test_a_mesh_that_does_not_fit_is_refused_in_one_line(tmp_path):
  with pytest.raises(UserError, match=r"mesh \{'data': 3, 'fsdp': 1, 'tensor': 1\} needs 3 devices, there are 8"):
    plan(tiny(mesh=(3, 1, 1)), on_this_machine(tmp_path))


def test_hosts_that_share_an_axis_load_the_same_rows():
  devices = np.array([Device(i, i // 4) for i in range(16)], object)
  mesh = jax.sharding.Mesh(devices.reshape(8, 1, 2), parallel.AXES)
  assert rows_of_hosts(32, mesh) == ({"count": 4, "rows": 8, "copies": 1}, "")
  mesh = jax.sharding.Mesh(devices.reshape(2, 1, 8), parallel.AXES)
  assert rows_of_hosts(32, mesh) == ({"count": 4, "rows": 16, "copies": 2}, "")


def test_the_bounds_are_work_by_rate_and_the_share_is_that_of_the_longest():
  costs = Costs(hlo.parse(STEP.read_text()))
  costs.total = Cost(cycles=2.1e9, bytes=1.2e12, flops=137.5e12)
  costs.collectives = {"all-reduce": Collective(1, 2, 13.5e9, 0), "all-gather": Collective(1, 1, 27e9, 1)}
  found = rates(costs, 55e12, chips.CHIPS["v4"])  # 275 TFLOP/s, 1.2 TB/s, 270 GB/s, 1.05 GHz
  assert found["seconds"] == pytest.approx({"compute": 0.5, "hbm": 1.0, "ici": 0.2, "cycles": 2.0, "estimate": 2.2})
  assert found["bound"] == "hbm" and found["share_of_peak"] == pytest.approx({"bound": 0.2, "estimate": 0.2 / 2.2})
  assert rates(costs, 55e12, chips.CHIPS["v4"], peak=27.5e12)["bound"] == "compute"


def stats(**changes):
  return types.SimpleNamespace(**{"peak_memory_in_bytes": 0, "argument_size_in_bytes": 2**31,
                                  "alias_size_in_bytes": 2**30, "temp_size_in_bytes": 2**29} | changes)


@pytest.mark.parametrize(("peak", "fits"), [(29.8, True), (29.9, False), (31, False)])
def test_memory_is_a_problem_from_three_percent_below_the_chip_s(peak, fits):
  memory = memory_of(stats(peak_memory_in_bytes=int(peak * 2**30)), chips.CHIPS["v4"])
  assert (memory["limit"], memory["arguments"], memory["donated"], memory["temporary"]) == (
    int(30.75 * 2**30), 2**31, 2**30, 2**29)
  problems = of_memory(memory)
  assert not problems if fits else problems[0].startswith(f"memory: the peak of {peak:.2f} GiB leaves less than 3%")


def test_state_that_is_given_up_and_not_used_again_is_a_problem():
  like = {"a": np.zeros(1)}
  o = types.SimpleNamespace(like=like)
  assert of_donation(hlo.parse(STEP.read_text()), o) == []
  assert "1 of the 1 buffers" in of_donation(hlo.parse(STEP.read_text().replace("input_output_alias", "x")), o)[0]
  unused = STEP.read_text().replace("input_output_alias={ {}: (0, {}, may-alias) }", "buffer_donor={ (0, {}) }")
  assert "1 of the 1 buffers" in of_donation(hlo.parse(unused), o)[0]


def test_logits_of_all_pairs_on_one_chip_are_a_problem_and_a_kernel_of_that_shape_is_none():
  module = hlo.parse("""HloModule m

ENTRY %main (a: f32[64,64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  %b = f32[64,64]{1,0} add(%a, %a), metadata={op_name="jit(step)/jvp(ViT)/blocks/fc/add"}
  ROOT %c = f32[64,64]{1,0} exponential(%b), metadata={op_name="jit(step)/jvp(jit(logsumexp))/exp"}
}
""")
  assert of_logits(module, 32) == []
  assert of_logits(module, 64)[0].startswith("logits: 1 operations hold all 64 × 64 of them on one chip")


def test_products_of_float32_are_a_problem_from_one_percent_where_activations_are_narrower():
  costs = Costs(hlo.parse(STEP.read_text()))
  assert of_float32(costs, "bfloat16") == []
  costs.float32["ViT/head"] = 0.02 * costs.total.flops
  assert of_float32(costs, "float32") == []
  assert of_float32(costs, "bfloat16") == [
    "float32: 2.0% of the FLOPs are in products with an operand of float32, most of them in ViT/head"]


def test_the_partitioner_s_own_complaint_is_a_problem_that_says_where():
  line = ("W1127 spmd_partitioner.cc:654] [SPMD] Involuntary full rematerialization. The compiler cannot go from "
          "sharding {devices=[8,1]<=[8]} to {devices=[1,4,2]<=[8]} efficiently for HLO operation %sin.3 = f32[2,256]"
          '{1,0} reshape(%sin.2), metadata={op_name="jit(f)/sin"}. As the last resort, SPMD will replicate the tensor')
  assert remade(["something else", line, line]) == [
    "involuntary rematerialisation, 2 ×: an array is made whole on every chip, for its shardings do not go into each "
    "other: a chip's part f32[2,256], {devices=[8,1]<=[8]} to {devices=[1,4,2]<=[8]}, op_name jit(f)/sin"]
  assert remade(["something else"]) == []


RESHARDED = """
import sys
import jax, jax.numpy as jnp
from limber_jax.planning import chips, hlo, problems, program
from limber_jax.runtime import parallel
from jax.sharding import NamedSharding
jax.config.update("jax_platforms", "cpu")
mesh = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, chips.devices_of("v4-16", 1, sys.argv[1]))
first = NamedSharding(mesh, jax.P(("data", "fsdp", "tensor")))
then = NamedSharding(mesh, jax.P(None, ("fsdp", "data")))
x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=first)
with program.listening(sys.argv[1]) as said:
  step = jax.jit(lambda x: jnp.sin(x).reshape(16, 256), out_shardings=then, donate_argnums=0).lower(x).compile()
print(problems.remade(said)[0])
print(hlo.donated(hlo.parse(step.as_text())))
"""


@needs_libtpu
@pytest.mark.process
def test_what_libtpu_says_of_shardings_is_heard_and_what_it_does_with_a_donated_buffer_seen(tmp_path):
  done = subprocess.run([sys.executable, "-W", "ignore", "-c", RESHARDED, str(tmp_path)], cwd=ROOT, text=True,
                        capture_output=True, timeout=300, env=environment() | {"PYTHONPATH": str(ROOT)})
  assert done.returncode == 0, done.stderr
  complaint, donation = done.stdout.splitlines()
  assert complaint.startswith("involuntary rematerialisation, 1 ×: ") and "op_name jit(" in complaint
  assert donation == "(0, 0)"  # JAX takes back what cannot hold a result, which has another shape here


def test_what_libtpu_logs_while_it_compiles_is_heard_and_what_it_logged_before_is_not(tmp_path, capfd):
  (tmp_path / "tpu_driver.vm.log.WARNING.1").write_text("before\n")
  with listening(str(tmp_path)) as said:
    with open(tmp_path / "tpu_driver.vm.log.WARNING.1", "a") as log:
      log.write("meanwhile\n")
    (tmp_path / "tpu_driver.vm.log.WARNING.2").write_text("in another file\n")
    os.write(2, b"on stderr\n")
  assert sorted(said) == ["in another file", "meanwhile", "on stderr"] and capfd.readouterr().err == ""


def test_every_line_of_a_plan_says_that_nothing_was_run_where_it_could_be_taken_for_a_measurement(tmp_path):
  lines = text.lines(plan(tiny(mesh=(8, 1, 1)), on_this_machine(tmp_path)))
  assert lines[0] == "tiny on v4-16, 8 chips: compiled, not run" and lines[-1].endswith("nothing was run")
  for name in ("mesh", "hosts", "memory", "FLOPs", "HBM", "ICI", "bounds", "cycles", "heaviest"):
    assert any(line.startswith(f"  {name} ") for line in lines), name
  assert len(lines) - 1 - next(i for i, line in enumerate(lines) if "heaviest" in line) == 11  # and the last line


def command(*arguments, **environment_):
  """Returns (exit code, stdout, stderr) of limber_jax.plan."""
  done = subprocess.run([sys.executable, "-W", "ignore", "-m", "limber_jax.plan", *arguments], cwd=ROOT, text=True,
                        capture_output=True, timeout=580, env=environment() | environment_)
  return done.returncode, done.stdout, done.stderr


@pytest.mark.process
@pytest.mark.parametrize(("flags", "message"), [
  (("--topology=v4-127",), "--topology=v4-127: no such TPU slice; did you mean 'v4-128'? known: "),
  ((), "--topology is missing; for example --topology=v4-128"),
  (("--topology=v4-16", "x"), "unexpected argument 'x'")])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(flags, message):
  code, out, err = command("--config=experiments/clip_vitb.py", *flags)
  assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


EXPERIMENT = """
from limber_jax.config import Compute, Config
from limber_jax.models import clip

def get_config():
  return Config(name="mu", model=clip.SIZES["clip_vit_b32_mu"](), batch_size=512, compute=Compute(remat="full"))
"""


@needs_libtpu
@pytest.mark.long  # a minute or two
def test_a_mu_model_is_planned_for_a_slice_of_two_hosts(tmp_path):
  (tmp_path / "mu.py").write_text(EXPERIMENT)
  code, out, err = command(f"--config={tmp_path}/mu.py", "--topology=v4-16", "--json")
  found = json.loads(out)
  assert code == int(bool(found["problems"])) and err == ""
  assert (found["chips"], found["hosts"], found["mesh"]) == (
    8, {"count": 2, "rows": 256, "copies": 1}, {"data": 8, "fsdp": 1, "tensor": 1})
  assert [p for p in found["problems"] if not p.startswith("float32: ")] == []  # attention of a mu is a large part
  assert 1.1 < found["flops"]["hardware"] / found["flops"]["model"] < 1.35 and found["cycles"] > 1e5
  assert 0 < found["memory"]["arguments"] < found["memory"]["peak"] < 0.1 * found["memory"]["limit"]
  assert found["collectives"]["all-reduce"]["runs"] >= 1 and len(found["heaviest"]) == 10
  code, _, err = command(f"--config={tmp_path}/mu.py", "--topology=v4-16", "--config.mesh.data=3")
  assert code == 2 and re.fullmatch(r"error: mesh .* needs 3 devices, there are 8\n", err)
