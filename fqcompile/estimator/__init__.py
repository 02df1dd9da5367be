"""Estimate memory, speed and cost of a model from its shape alone: without a GPU or weights."""
