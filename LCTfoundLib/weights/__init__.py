"""Weights: registry, cards, checks."""
