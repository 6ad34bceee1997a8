"""The earlier name of `limber_jax.evals.word_recall`, which experiments of before import."""

from limber_jax.evals.word_recall import WordRecall as Words

__all__ = ["Words"]
