"""Export: surfaces, segmentations, tables, reports."""
