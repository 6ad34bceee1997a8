"""Scores of predictions against references: no model and no data source."""
