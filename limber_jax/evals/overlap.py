"""The earlier name of `limber_jax.evals.contamination`, which experiments of before import."""

from limber_jax.evals.contamination import Contamination as Overlap

__all__ = ["Overlap"]
