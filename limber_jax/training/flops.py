"""What a step cannot do without, in FLOPs, and what the devices could do at most: together their share of the peak.

Model FLOPs are the matrix products and convolutions of the traced loss and of its gradient for the parts that are
trained, and nothing for recomputation. Of a CLIP they are three times the forward pass's. Of a LiMBeR they are less
than twice: through the frozen language model goes the gradient of its inputs alone, and through the encoder none.
"""

import copy
import dataclasses
import math
from typing import Any

import jax

from limber_jax import registry
from limber_jax.checkpoints.state import split
from limber_jax.config import Config

# Dense products in bfloat16 of one device as JAX counts them, FLOP/s; of the makers' data sheets, without sparsity.
PEAKS = {
  "TPU v2": 22.5e12, "TPU v3": 61.5e12,  # cores, two a chip
  "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
  "TPU v6 lite": 918e12, "TPU v6e": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA L4": 121e12,
}


def peak_flops(config: Config) -> float:
  """Returns the FLOP/s that all devices reach at most; 0 where that is not known.

  It is config.peak_flops of each if set, else of the table for what it knows, in bfloat16 and float16.
  """
  known = PEAKS.get(jax.devices()[0].device_kind, 0.0) if config.compute.dtype != "float32" else 0.0
  return (config.peak_flops or known) * jax.device_count()


def model_flops(config: Config, batch: dict[str, Any]) -> tuple[int, int]:
  """Returns the FLOPs (of the forward pass, of that and the gradient for what is trained) of one step.

  Counted in programs without anything that computes twice, and without attention that is one opaque operation.

  Args:
    config: the experiment.
    batch: arrays [N, …] of the global batch, or their ShapeDtypeStructs.
  """
  plain = copy.copy(config)
  plain.compute = dataclasses.replace(config.compute, remat="none", attention="xla", unroll=1)
  plain.loss = dataclasses.replace(config.loss, num_microbatches=1, chunk_size=0)
  task = registry.lookup("task", registry.TASKS, config.task).from_config(plain)
  params, stats = jax.eval_shape(task.init, jax.random.key(0))
  trained, frozen = split(params, config.trainable)
  batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)

  def loss(trained, frozen, stats, batch):
    return task.loss({**frozen, **trained}, stats, batch, jax.random.key(0))[0]

  forward, both = (count_flops(jax.make_jaxpr(f)(trained, frozen, stats, batch).jaxpr)
                   for f in (loss, jax.value_and_grad(loss)))
  return forward, both


def count_flops(jaxpr: Any) -> int:
  """Returns twice the multiplications of every matrix product and convolution in a jaxpr, loops counted out.

  XLA's own cost analysis counts the body of a loop once.
  """
  total = 0
  for eqn in jaxpr.eqns:
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += 2 * out.size * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
    elif name == "conv_general_dilated":
      kernel = eqn.invars[1].aval
      features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
      # The gradient of a convolution with strides spreads its input by zeros, which are nobody's work.
      total += 2 * out.size * kernel.size // features // math.prod(eqn.params["lhs_dilation"])
    else:
      times = eqn.params["length"] if name == "scan" else 1
      for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
          total += times * count_flops(inner)
  return total
