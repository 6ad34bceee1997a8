"""The earlier name of `limber_jax.evals.class_mention`, which experiments of before import."""

from limber_jax.evals.class_mention import ClassMention as Naming

__all__ = ["Naming"]
