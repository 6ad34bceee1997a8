"""Measurements: each prints one JSON object, its numbers as ratios against a peer or a limit of the same run."""
