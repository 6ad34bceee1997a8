"""Evaluations: what a model is measured by, during training and after it."""
