"""Tasks: what a training step minimises, and what a trained model can be asked for."""
