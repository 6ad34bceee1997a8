"""limber_jax: CLIP and LiMBeR in JAX and Flax, for TPU, GPU and CPU.

Nothing is imported here, so that `from limber_jax.losses import contrastive_loss` loads jax and optax and no more.
"""

__version__ = "0.1.0"
