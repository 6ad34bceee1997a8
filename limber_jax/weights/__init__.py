"""Weights in and out: tables beside the models, one engine that reads and writes by them, and the formats on disk."""
