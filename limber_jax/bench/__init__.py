"""Measurements: each prints one JSON object, its figures as ratios against a peer or a limit of the same run."""
