"""From data files to batches: rows -> messages -> tokens and labels -> ordered micro-batches."""
