"""Lung anatomy: the 21 structures, tree graphs, territories and quality checks."""
