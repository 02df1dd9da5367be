"""Quantize a weight matrix to codes and scales: checks, granularity, scale search, choice."""
