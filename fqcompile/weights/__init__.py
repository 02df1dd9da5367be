"""Constant weights: how a site computes its matrix, and the packed copies found by identity."""
