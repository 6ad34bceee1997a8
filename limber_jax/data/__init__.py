"""Data: sources of records, what is done to a record, tokenizers, and batches in an order only the step decides."""
