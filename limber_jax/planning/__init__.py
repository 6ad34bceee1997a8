"""What a training step needs of a TPU slice that is not there: its own step, compiled and never run."""
