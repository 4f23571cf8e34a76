"""Evaluations of the shipped weights."""
