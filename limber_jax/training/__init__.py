"""Training: an experiment made concrete, the optimizer, one step, and the loop over them."""
