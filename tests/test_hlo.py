"""The text of compiled programs: what is read of it, against numbers by hand.

data/step_v4-16.hlo is libtpu 0.0.42.1's program for one of the 8 chips of a v4-16: three layers tanh(x·w) of
bfloat16 [1024, 256] by [256, 256] in a loop, the mean of squares, and one step of gradient descent on w, which is
float32 and donated. Of the compiler's settings only the estimated cycles were kept.
"""

from pathlib import Path

import pytest

from limber_jax.errors import UserError
from limber_jax.planning import hlo
from limber_jax.planning.costs import Collective, Costs
from limber_jax.planning.modules import part_of

STEP = hlo.parse((Path(__file__).parent / "data/step_v4-16.hlo").read_text())


def of_line(text):
  """Returns the one operation of a line."""
  return hlo.parse(f"HloModule m\n\nENTRY %main () -> f32[] {{\n  {text}\n}}\n").computations["main"]


@pytest.mark.parametrize(("text", "number", "padded", "in_hbm"), [
  ("f32[3,5]{1,0:T(8,128)}", 60, 4 * 8 * 128, True),
  ("f32[3,5]{0,1:T(8,128)}", 60, 4 * 8 * 128, True),               # 5 rows of 3
  ("bf16[2,130,9]{1,2,0:T(8,128)(2,1)S(3)}", 4680, 2 * 2 * 16 * 256, False),
  ("f32[]{:T(128)}", 4, 4, True),
  ("pred[7]{0:T(512)}", 7, 7, True),                               # what fills up a single row is not counted
  ("s32[2,2]", 16, 16, True)])
def test_an_array_has_the_bytes_of_its_numbers_and_those_of_its_tiles(text, number, padded, in_hbm):
  array, = hlo.arrays(text)
  assert (array.bytes, array.padded, array.in_hbm) == (number, padded, in_hbm)


def test_an_operation_is_taken_apart():
  op = of_line('ROOT %c.1 = (f32[2]{0}, (s32[], u32[]{:S(2)})) fusion(%a.1, /*index=1*/%b), kind=kLoop, calls=%f.2, '
               'metadata={op_name="jit(f)/jvp(ViT)/mul" stack_frame_id=3}')["c.1"]
  assert (op.kind, op.operands, op.attribute("calls"), op.attribute("body")) == ("fusion", ["a.1", "b"], "f.2", "")
  assert [a.dtype for a in op.out] == ["f32", "s32", "u32"] and op.op_name == "jit(f)/jvp(ViT)/mul"


def test_what_is_no_program_is_refused():
  with pytest.raises(UserError, match="no line that begins with ENTRY"):
    hlo.parse("module @jit_f attributes {mhlo.num_partitions = 8 : i32} {\n}\n")


CONVOLUTION = """HloModule m

ENTRY %main (x: f32[2,{length},3], k: f32[3,3,5]) -> f32[2,{out},5] {{
  %x = f32[2,{length},3]{{2,1,0}} parameter(0)
  %k = f32[3,3,5]{{2,1,0}} parameter(1)
  ROOT %c = f32[2,{out},5]{{2,1,0}} convolution(%x, %k), window={{size=3{window}}}, dim_labels=b0f_0io->b0f
}}
"""


@pytest.mark.parametrize(("length", "out", "window", "met"), [
  (10, 8, "", 24), (10, 10, " pad=1_1", 28), (10, 4, " stride=2", 12), (10, 6, " rhs_dilate=2", 18),
  (4, 7, " pad=1_1 lhs_dilate=2", 10)])  # 4 numbers with zeros between them: at even places one of three, at odd two
def test_a_convolution_costs_two_flops_for_each_number_that_its_window_meets(length, out, window, met):
  ops = hlo.parse(CONVOLUTION.format(length=length, out=out, window=window)).computations["main"]
  assert hlo.product(ops["c"], ops)[0] == pytest.approx(2 * 2 * 3 * 5 * met)


def test_a_product_of_matrices_costs_two_flops_for_each_pair():
  ops = of_line("%a = bf16[4,6,8]{2,1,0} parameter(0)\n  %b = f32[4,8,5]{2,1,0} parameter(1)\n"
                "  ROOT %c = f32[4,6,5]{2,1,0} dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
                "rhs_batch_dims={0}, rhs_contracting_dims={1}")
  flops, left, right = hlo.product(ops["c"], ops)
  assert (flops, left.dtype, right.dtype) == (2 * 4 * 6 * 5 * 8, "bf16", "f32")


def test_a_loop_of_a_tpu_runs_as_often_as_its_condition_says():
  loops = [op for ops in STEP.computations.values() for op in ops.values() if op.kind == "while"]
  assert [hlo.iterations(loop, STEP) for loop in loops] == [3, 3]


def test_donated_buffers_are_told_from_those_that_are_used():
  assert hlo.donated(STEP) == (1, 0)
  header = "HloModule m, input_output_alias={ {0}: (0, {}, may-alias), {1, 2}: (3, {1}, must-alias) }, "
  header += "buffer_donor={ (5, {}) }, entry_computation_layout={(f32[])->f32[]}"
  assert hlo.donated(hlo.Module({}, "", header)) == (2, 1)


def test_the_costs_of_a_step_are_those_counted_by_hand():
  costs = Costs(STEP)
  assert costs.total.flops == 3 * 3 * 2 * 1024 * 256 * 256       # layers, forward and two backward
  assert costs.collectives == {"all-reduce": Collective(1, 3, 3 * 256 * 256 * 2, 0)}  # a layer's gradient, bfloat16
  # w twice to be read and once written, x read; the rest stays beside the cores. What counts loops is a few bytes.
  assert costs.total.bytes == pytest.approx(3 * (3 * 256 * 256 * 4) + 1024 * 256 * 2, rel=1e-4)
  assert not costs.float32 and not costs.unclear
  assert {k: v.flops for k, v in costs.parts.items() if v.flops} == {
    ("Tower", "forward"): costs.total.flops / 3, ("Tower", "backward"): costs.total.flops * 2 / 3}
  assert sum(cost.cycles for cost in costs.parts.values()) == costs.total.cycles == 74644


def test_a_loop_of_unknown_length_is_named_and_counted_once():
  text = (Path(__file__).parent / "data/step_v4-16.hlo").read_text().replace("constant(3)", "constant(-3)")
  costs = Costs(hlo.parse(text))
  assert costs.unclear == ["jit(step)/jvp(Tower)/while", "jit(step)/transpose(jvp(Tower))/while"]
  assert costs.parts["Tower", "forward"].flops == 2 * 1024 * 256 * 256


FLAX = "jit(flagged)/{}/while/body/closed_call/{}blocks/attn/{}"


@pytest.mark.parametrize(("op_name", "module", "way"), [
  (FLAX.format("jvp(ViT)", "", "q/dot_general"), "ViT/blocks/attn/q", "forward"),
  (FLAX.format("jvp(ViT)", "", "vmap(BTNH,BSNH->BNTS)/dot_general"), "ViT/blocks/attn", "forward"),
  (FLAX.format("transpose(jvp(ViT))", "checkpoint/", "q/add_any"), "ViT/blocks/attn/q", "backward"),
  (FLAX.format("transpose(jvp(ViT))", "checkpoint/rematted_computation/", "vmap()/mul"), "ViT/blocks/attn",
   "recomputed"),
  ("checkpoint/blocks/ln_1/reduce_sum", "blocks/ln_1", "backward"),
  ("jit(flagged)/jvp(ViT)/ln_pre/add;jit(flagged)/mul", "ViT/ln_pre", "forward"),
  ("jit(flagged)/ResNet/conv1/conv_general_dilated", "ResNet/conv1", "forward"),
  ("jit(flagged)/jvp(TextTransformer)/jit(take_along_axis)/gather", "TextTransformer", "forward"),
  ("jit(flagged)/jvp(jit(softplus))/exp", "loss", ""), ("jit(flagged)/transpose(jvp())/mul", "loss", ""),
  ("jit(flagged)/reduce_sum", "update", ""), ("jit(flagged)/jit(clip)/max", "update", ""),
  ("broadcast.118", "unnamed", ""), ("state.params['image']", "unnamed", ""), ("", "unnamed", "")])
def test_an_operation_belongs_to_the_module_and_the_pass_that_jax_named(op_name, module, way):
  assert part_of(op_name) == (module, way)
