"""The earlier name of `limber_jax.evals.prompt_probing`, which experiments of before import."""

from limber_jax.evals.prompt_probing import PromptProbing as Probing

__all__ = ["Probing"]
