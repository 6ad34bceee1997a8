"""Results of runs beside the published ones: tables, figures, and whose numbers they are."""
